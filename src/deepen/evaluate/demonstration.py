"""The parts of the main job on one model: graft, verify, answer, score. What prints them stands in the command line."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from deepen.backbones import resolve
from deepen.backbones.hf import Backbone
from deepen.checkpoint import base_address, is_adapter, read_adapter
from deepen.core.errors import PromptError
from deepen.core.registry import Method
from deepen.core.types import Batch
from deepen.data.batches import batch_of, token_ids
from deepen.data.split import documents
from deepen.evaluate.agreement import Agreement, compare, widest_difference
from deepen.evaluate.environment import environment
from deepen.evaluate.noise import fill_with_noise
from deepen.evaluate.prompts import PROMPTS, DomainPrompt
from deepen.evaluate.scoring import FIRST_SCORED, measure
from deepen.generate.events import Committed, RowResult
from deepen.generate.loop import complete, stream
from deepen.generate.plain import PlainDecoder
from deepen.generate.scoring import score_at_once
from deepen.generate.stop import StopConfig

_SHOWN = ("moon", "account", "letter")
_NOISE_TOKENS = 48
_MAX_DOCUMENT_TOKENS = 512
# Text arrives as it is committed: the text itself, and how many tokens one pass gave.
Show = Callable[[str, int], None]


@dataclass(frozen=True)
class Answer:
    """One prompt, answered by exact decoding and, for comparison, plainly and by transformers.

    `seconds` are end to end, prompt included. `drafted` and `accepted` count draft tokens of all sources.
    """

    name: str
    domain: str
    tokens: list[int]
    text: str
    passes: int
    commits: list[int]
    drafted: int
    accepted: int
    seconds: float
    plain_seconds: float
    hf_seconds: float
    against_plain: Agreement
    against_transformers: Agreement

    @property
    def tokens_per_pass(self) -> float:
        """Tokens over passes, those that read the prompt aside."""
        return len(self.tokens) / self.passes

    @property
    def exact(self) -> bool:
        """Equal to plain decoding; to transformers equal, or parted by a near-tie between two kernels' rounding."""
        return self.against_plain.equal and (self.against_transformers.equal or self.against_transformers.near_tie)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "tokens_per_pass": self.tokens_per_pass, "exact": self.exact}


class Demonstration:
    """One base model with one method grafted onto it, packed for decoding.

    `model` is an untrained graft. `answering` is what answers: that, or the trained adapter if one was given.
    """

    def __init__(
        self, address: str, method: Method, preset: str, settings: dict[str, Any], *, max_new_tokens: int
    ) -> None:
        """`address` is a base model's, or an adapter's folder; `settings` go over the configuration of either graft."""
        trained = Path(address) if is_adapter(address) else None
        loaded = resolve.load(address if trained is None else base_address(trained))
        self.tokenizer = loaded.tokenizer
        self.backbone = Backbone.attach(loaded.model)
        self._probe = self._encode("Both fields were cut in July. The north field gave 4.1 tonnes a hectare. " * 2)
        with torch.no_grad():
            self._logits_before = loaded.model(torch.tensor([self._probe])).logits
        self.config = replace(method.load_config(preset), **settings)
        self.config.check()
        self._method = method
        self.model = self.answering = self._build(self.config)
        if trained is not None:
            self.answering = read_adapter(trained, self.backbone, loaded=loaded, overrides={**settings, "draft": None})
        self._stop = StopConfig(max_new_tokens=max_new_tokens, eos_ids=(loaded.tokenizer.eos_token_id,))
        shown = {name: prompt for name in _SHOWN for prompt in PROMPTS if prompt.name == name}
        self.prompts = {name: prompt for name, prompt in shown.items() if self._fits(prompt, max_new_tokens)}
        self.left_out = [name for name in shown if name not in self.prompts]
        if not self.prompts:
            raise PromptError(
                f"no prompt of the demonstration fits into this model's context of {self.backbone.context_length} "
                f"with max_new_tokens {max_new_tokens}; lower it, or choose a model with a longer context"
            )

    def _fits(self, prompt: DomainPrompt, max_new_tokens: int) -> bool:
        context = self.backbone.context_length
        return context is None or len(prompt.encode(self.tokenizer)) + max_new_tokens <= context

    def _build(self, config: Any) -> Any:
        return self._method.load_model_type().build(config, self.backbone, self.backbone.vocab_size)

    def _encode(self, text: str) -> list[int]:
        return token_ids(text, self.tokenizer)

    def budget(self) -> dict[str, str | int | float]:
        """What the base has, and what the method adds, by label."""
        return {
            "parameters": self.backbone.num_parameters,
            "layers": self.backbone.num_layers,
            **self.model.describe(),
        }

    def trained(self) -> dict[str, str | int | float] | None:
        """What answers, by label, if that was trained."""
        return None if self.answering is self.model else self.answering.describe()

    def environment(self) -> dict[str, str | int]:
        """What figures depend on."""
        return environment(self.backbone)

    def identity(self) -> dict[str, bool]:
        """What must hold of an untrained graft, by label; packs the linears on the way."""
        with torch.no_grad():
            logits_after = self.model(torch.tensor([self._probe])).logits
        same_forward = torch.equal(logits_after, self._logits_before)
        self.backbone.pack()
        return {
            "the grafted model's forward is the base's, bit for bit": same_forward,
            "a pass through untrained cells is a clean pass, bit for bit": self._cells_change_nothing(),
            f"a pass over {self.config.chunk_width} tokens is {self.config.chunk_width} passes over one, bit for bit": (
                widest_difference(self.backbone, self._probe, width=self.config.chunk_width) == 0.0
            ),
        }

    @torch.no_grad()
    def _cells_change_nothing(self) -> bool:
        tokens = torch.tensor([self._probe])
        everywhere = torch.ones_like(tokens, dtype=torch.bool)

        def logits(edit: Any) -> torch.Tensor:
            cache = self.backbone.new_cache(batch_size=1, capacity=len(self._probe))
            return self.backbone.run(tokens, cache, edit=edit)

        refined = logits(lambda layer, h: self.model.refine_slots(layer, h, everywhere))
        return torch.equal(refined, logits(None))

    def answer(self, name: str, *, show: Show) -> Answer:
        """Answer a prompt exactly, streaming, then plainly and by transformers, and compare the ids."""
        ids = self.prompts[name].encode(self.tokenizer)
        result, seconds = self._streamed(ids, show)
        plain, plain_seconds = _timed(lambda: complete(PlainDecoder(self.backbone), [ids], stop=self._stop)[0])
        theirs, hf_seconds = _timed(lambda: self._transformers(ids))
        return self._as_answer(name, ids, result, plain.tokens, theirs, (seconds, plain_seconds, hf_seconds))

    def answer_with_noise(self) -> Answer:
        """Answer the first prompt with a sidecar of normal noise that drafts with its slots."""
        name = next(iter(self.prompts))
        ids = self.prompts[name].encode(self.tokenizer)
        noisy = self._build(replace(self.config, draft="mask"))
        fill_with_noise(noisy)
        stop = replace(self._stop, max_new_tokens=_NOISE_TOKENS)
        result, seconds = _timed(lambda: complete(noisy, [ids], stop=stop)[0])
        plain, plain_seconds = _timed(lambda: complete(PlainDecoder(self.backbone), [ids], stop=stop)[0])
        # transformers has answered this prompt before; here the base's own tokens are what counts.
        times = (seconds, plain_seconds, plain_seconds)
        return self._as_answer(name, ids, result, plain.tokens, plain.tokens, times)

    def _as_answer(
        self,
        name: str,
        ids: Sequence[int],
        result: RowResult,
        plain: list[int],
        theirs: list[int],
        seconds: tuple[float, float, float],
    ) -> Answer:
        return Answer(
            name,
            self.prompts[name].domain,
            result.tokens,
            result.text,
            result.passes,
            result.commits,
            sum(result.drafted.values()),
            sum(result.accepted.values()),
            *seconds,
            compare(self.backbone, ids, result.tokens, plain),
            compare(self.backbone, ids, result.tokens, theirs),
        )

    def _streamed(self, ids: Sequence[int], show: Show) -> tuple[RowResult, float]:
        result = RowResult()
        began = perf_counter()
        for event in stream(self.answering, [ids], stop=self._stop, tokenizer=self.tokenizer):
            result.add(event)
            if isinstance(event, Committed):
                show(event.text, len(event.tokens))
        return result, perf_counter() - began

    def _transformers(self, ids: Sequence[int]) -> list[int]:
        """transformers' own greedy `generate`, with its own kernels."""
        self.backbone.unpack()
        try:
            prompt = torch.tensor([list(ids)])
            output = self.backbone.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=self._stop.max_new_tokens,
                do_sample=False,
                eos_token_id=list(self._stop.eos_ids),
                pad_token_id=self._stop.eos_ids[0],
            )
            return list(output[0, len(ids) :].tolist())
        finally:
            self.backbone.pack()

    def scores(self, num_tokens: int) -> dict[str, Any]:
        """Figures of held-out documents before and after surgery, and how far the means are apart."""
        batches = list(self._held_out(num_tokens))
        self.backbone.unpack()
        base = measure(lambda batch: score_at_once(self.backbone, batch), batches, tokenizer=self.tokenizer)
        self.backbone.pack()
        grafted = measure(self.model.score, batches, tokenizer=self.tokenizer)
        before, after = base.figures, grafted.figures
        return {"before": before, "after": after, "difference": abs(after["nll"] - before["nll"])}

    def _held_out(self, num_tokens: int) -> Sequence[Batch]:
        batches, left = [], num_tokens
        for text in documents("wiki", "test"):
            row = self._encode(text)[: min(_MAX_DOCUMENT_TOKENS, FIRST_SCORED + left)]
            if len(row) > FIRST_SCORED:
                batches.append(batch_of([row]))
                left -= len(row) - FIRST_SCORED
            if left == 0:
                break
        return batches


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = perf_counter()
    result = work()
    return result, perf_counter() - began
