"""A model's own greedy answers as a corpus to train on: the data of whoever is to draft what the model will say.

| file | holds |
|---|---|
| `FILE.jsonl` | a record a line: the ids of a prompt and of its answer (data/formats.py), their texts, why it ended |
| `FILE.jsonl.json` | what made it: model, tokenizer, prompts, every setting that decides an answer |

Records come in an order that the seed draws, a batch at a time, each batch flushed to the disk. A file that was cut off
is gone on with at a batch's beginning, so that every row is decoded beside the same others: the finished file is the
same, byte for byte. (But where a draft's width goes by the clock and the model's kernels round by the width, as in
recurrent layers, two nearly equal choices may swap.)
"""

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepen import __version__
from deepen.checkpoint import Opened, open_model
from deepen.core.config import Config
from deepen.core.errors import DeepenError
from deepen.core.line_file import LineFile
from deepen.data.formats import Document
from deepen.data.measured import documents_of
from deepen.evaluate.environment import environment
from deepen.evaluate.metrics import ANSWER_METRICS, generation_figures
from deepen.evaluate.results import Answer
from deepen.generate.events import RowResult
from deepen.generate.loop import complete
from deepen.generate.stop import StopConfig
from deepen.train.samples import beginning

FORMAT = 1

REPEATING = 0.5
"""An answer repeats itself if at least this share of its 4-grams were there before in it."""

_REPETITION = next(metric for metric in ANSWER_METRICS if metric.name == "repetition")
_OF_TEXT = ("num_answers", "num_tokens", "mean_length", "distinct_1", "distinct_2", "distinct_3", "repetition")
_LEAST = {"num_prompts": 1, "max_new_tokens": 1, "batch_size": 1, "prompt_tokens": 1}
# Where the base is now decides nothing: its fingerprint does.
_NOT_COMPARED = {"base"}


@dataclass(frozen=True)
class DistillConfig(Config):
    """Which model answers which prompts, and where its answers are written."""

    # A model's address, or an adapter folder, which decodes as its method does.
    model: str
    # A corpus's name or path; of a text its beginning is the prompt, of anything else what is asked first.
    data: str
    # The `.jsonl` file to write.
    out: str
    # Training documents to answer; null takes all.
    num_prompts: int | None = None
    # Tokens of an answer, at most.
    max_new_tokens: int = 128
    # Prompts that are answered together.
    batch_size: int = 8
    # Of a text, at most.
    prompt_tokens: int = 64
    # Of the order in which documents are taken.
    seed: int = 0
    # Where an adapter's base is, if it has moved.
    base: str | None = None
    # Null is float32 on a CPU and the model's own elsewhere; and an accelerator if there is one.
    dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False

    def validate(self) -> list[str]:
        """One message for each value that can't be."""
        problems = [f"{name} must not be empty" for name in ("model", "data") if not getattr(self, name)]
        if Path(self.out).suffix != ".jsonl":
            problems.append(f'out must be a file whose name ends in .jsonl, not "{self.out}"')
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"{name} must be at least {least}, not {value}")
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed must be between 0 and 2**63 - 1, not {self.seed}")
        return problems


@dataclass(frozen=True)
class Distilled:
    """What is in the file now, and what of it was made by this call.

    `figures` are over all answers: counts, mean length, distinct n-grams, `repetition` (the share of 4-grams that were
    there before) and `num_repeating`; `reasons` count why answers ended. `tokens_per_pass` is over the `num_made`
    answers that this call has made; None where it has made none.
    """

    path: Path
    figures: Mapping[str, Any]
    reasons: Mapping[str, int]
    num_made: int
    tokens_per_pass: float | None


Display = Callable[[int], AbstractContextManager[Callable[[int], object]]]
"""For a total, what is called with each number of answers that are there while the block lasts."""


@contextmanager
def _unseen(total: int) -> Iterator[Callable[[int], object]]:
    yield lambda num_answers: None


def distill(config: DistillConfig, *, display: Display = _unseen) -> Distilled:
    """Write the answers, or those that a file which was cut off still lacks; a finished file is left as it is.

    Raises `DeepenError` for what can't be read or decoded, for a file of other settings, naming the field, and for one
    that was changed.
    """
    config.check()
    opened = open_model(
        config.model,
        dtype=config.dtype,
        device=config.device,
        base=config.base,
        trust_remote_code=config.trust_remote_code,
        pack=True,
    )
    prompts = _prompts(config, opened)
    file = LineFile(config.out)
    file.claim(_made_by(config, opened, prompts), not_compared=_NOT_COMPARED)
    num_kept = _mend(file, prompts, batch_size=config.batch_size)
    spent = Counter[str]()
    with display(len(prompts)) as advance:
        advance(num_kept)
        for first in range(num_kept, len(prompts), config.batch_size):
            batch = prompts[first : first + config.batch_size]
            results = _answers(opened, batch, config)
            file.append([_record(*each, opened) for each in zip(batch, results, strict=True)])
            spent.update(answers=len(batch), tokens=sum(len(result.tokens) for result in results))
            spent.update(passes=sum(result.passes for result in results))
            advance(len(batch))
    return _summed_up(file, prompts, spent)


def _answers(opened: Opened, batch: Sequence[Sequence[int]], config: DistillConfig) -> list[RowResult]:
    stop = StopConfig(max_new_tokens=config.max_new_tokens, eos_ids=opened.eos_ids)
    return complete(opened.decoder, batch, stop=stop, tokenizer=opened.tokenizer)


def _record(prompt: Sequence[int], result: RowResult, opened: Opened) -> dict[str, Any]:
    return {
        "prompt_ids": list(prompt),
        "response_ids": list(result.tokens),
        "tokenizer": opened.identity.tokenizer,
        # Not `prompt` and `response`, which are another format's fields.
        "prompt_text": opened.tokenizer.decode(list(prompt), skip_special_tokens=False),
        "response_text": result.text,
        "reason": result.reason,
    }


# Prompts


def _prompts(config: DistillConfig, opened: Opened) -> list[tuple[int, ...]]:
    """The ids of each, in the order that the seed draws; what doesn't fit into the model's context is left out."""
    documents = list(documents_of(config.data, "train"))
    wanted = len(documents) if config.num_prompts is None else config.num_prompts
    context, num_left_out, prompts = opened.backbone.context_length, 0, list[tuple[int, ...]]()
    for document in _drawn(documents, seed=config.seed):
        if len(prompts) == wanted:
            break
        ids = tuple(beginning(document, opened.tokenizer, num_tokens=config.prompt_tokens).ids)
        if ids and (context is None or len(ids) + config.max_new_tokens <= context):
            prompts.append(ids)
        else:
            num_left_out += 1
    if not prompts:
        raise DeepenError(
            f"{config.data} has no prompt for {config.model}: of its {len(documents)} training documents none fits "
            f"into the model's context of {context} tokens with max_new_tokens {config.max_new_tokens}; lower that, or "
            "give other data"
        )
    if num_left_out:
        warnings.warn(
            f"{num_left_out} prompts were left out, as they don't fit into the model's context of {context} tokens "
            f"with max_new_tokens {config.max_new_tokens}",
            stacklevel=2,
        )
    if config.num_prompts is not None and len(prompts) < config.num_prompts:
        warnings.warn(f"num_prompts is {config.num_prompts}, and {config.data} has {len(prompts)}", stacklevel=2)
    return prompts


def _drawn(documents: Sequence[Document], *, seed: int) -> Iterator[Document]:
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    return (documents[index] for index in order.tolist())


# What made a file


def _made_by(config: DistillConfig, opened: Opened, prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
    """All that decides the file, as plain JSON types."""
    where = environment(opened.backbone)
    return {
        "format": FORMAT,
        "deepen_version": __version__,
        "model": config.model,
        "base": opened.identity.address,
        "fingerprint": opened.identity.fingerprint,
        "tokenizer": opened.identity.tokenizer,
        **_method_facts(config, opened),
        "data": config.data,
        "num_prompts": config.num_prompts,
        "max_new_tokens": config.max_new_tokens,
        "batch_size": config.batch_size,
        "prompt_tokens": config.prompt_tokens,
        "seed": config.seed,
        "eos_ids": list(opened.eos_ids),
        "dtype": where["dtype"],
        "device": where["device"],
        "num_records": len(prompts),
        "prompts": hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
    }


def _method_facts(config: DistillConfig, opened: Opened) -> dict[str, Any]:
    """The method, how it is set and a digest of what was trained."""
    method, model = opened.method, opened.model
    if method is None or model is None:
        return {"method": None, "method_config": None, "method_weights": None}
    with (Path(config.model).expanduser() / method.weights_file).open("rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    return {"method": method.name, "method_config": model.config.to_dict(), "method_weights": weights}


# The file


def _mend(file: LineFile, prompts: Sequence[tuple[int, ...]], *, batch_size: int) -> int:
    """The number of answers that are there and stay; a last batch that was cut off is taken away."""
    sizes = [size for size, _ in _whole_lines(file, prompts)]
    num_kept = len(sizes) if len(sizes) == len(prompts) else len(sizes) // batch_size * batch_size
    file.cut(sum(sizes[:num_kept]))
    return num_kept


def _whole_lines(file: LineFile, prompts: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Bytes and record of each line. Raises `DeepenError` for what no call has written."""

    def answers_its_prompt(index: int, record: Mapping[str, Any]) -> bool:
        return [record.get("prompt_ids")] == [list(ids) for ids in prompts[index : index + 1]]

    return file.whole_lines(answers_its_prompt)


# Figures


def _summed_up(file: LineFile, prompts: Sequence[tuple[int, ...]], spent: Mapping[str, int]) -> Distilled:
    records = [record for _, record in _whole_lines(file, prompts)]
    answers = [_as_answer(record, index) for index, record in enumerate(records)]
    found = generation_figures(answers)
    num_repeating = sum((_REPETITION.over([answer]) or 0.0) >= REPEATING for answer in answers)
    return Distilled(
        file.path,
        {**{name: found[name] for name in _OF_TEXT}, "num_repeating": num_repeating},
        dict(sorted(Counter(record["reason"] for record in records).items())),
        spent.get("answers", 0),
        spent["tokens"] / spent["passes"] if spent.get("passes") else None,
    )


def _as_answer(record: Mapping[str, Any], index: int) -> Answer:
    """What figures of texts need; the file has no costs, some of which a clock decides."""
    return Answer(
        prompt=str(index),
        domain="distilled",
        num_prompt_tokens=len(record["prompt_ids"]),
        tokens=tuple(record["response_ids"]),
        text=record["response_text"],
        reason=record["reason"],
        seconds=0.0,
        passes=0,
        positions=0,
        flops=0,
        commits=(),
        passes_of_commits=(),
        drafted={},
        judged={},
        agreed={},
        passes_by_source={},
        edits=0,
        p_commit=(),
    )
