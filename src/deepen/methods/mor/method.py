"""The protocol over a `MoRForCausalLM`: how it is trained, decoded, scored and counted."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepen.backbones.hf import Backbone
from deepen.core.depthwise import DepthLayout, KeyValues, Running, State
from deepen.core.errors import CheckpointError, ConfigError
from deepen.core.method import Sampler
from deepen.core.types import (
    Advance,
    Batch,
    LossTerm,
    Mean,
    Progress,
    Prompt,
    RowAdvance,
    Score,
    Spent,
    StepOutput,
    Unit,
    Work,
)
from deepen.generate.scoring import ScoreSheet
from deepen.generate.verify import PREFILL_WIDTH, check_prompt, pad_rows

from .config import MoRConfig
from .deeper import at_depth
from .depthwise import DepthwiseModel, depth_layout
from .losses import router_terms
from .metrics import router_figures
from .model import DepthCache, MoRForCausalLM, Reading
from .routing import AllRecur, ExpertChoice
from .work import Prices, expected_multiply_adds, expected_state_bytes, training_work

LEARNING_RATE = 3e-3
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1

# What a model that is there may be told differently: how it is trained, and how it computes what it computes.
_CHANGEABLE = (
    *("selection", "topk_warmup_steps", "threshold_rate", "balancing", "bias_rate", "execution"),
    *("auxiliary_weight", "balance_weight", "z_weight"),
)


@dataclass
class MoRDecoding:
    """Rows being continued: committed ids, of which `store` has read all but the last."""

    store: DepthCache
    rows: list[list[int]]
    prefill: Spent = field(default_factory=Spent)


class MixtureOfRecursions(nn.Module):
    """A model of the architecture "mor", which is the base and all of what is trained."""

    # It is its own base; what it promises is its own output.
    promises_base = False

    def __init__(self, config: MoRConfig, backbone: Backbone) -> None:
        """Use `build`."""
        super().__init__()
        self.backbone = backbone
        self.base: Any = backbone.model
        for name in _CHANGEABLE:
            setattr(self.base.config, name, getattr(config, name))
        self.config: MoRConfig = self.base.config
        self._prices = Prices.of(self.config)
        self._depthwise = DepthwiseModel(self.base.model)

    @classmethod
    def build(cls, config: MoRConfig, backbone: Backbone, vocab_size: int) -> Self:
        """Over a `MoRForCausalLM`, whose configuration `config` is but for how it is trained.

        Raises `ConfigError` for another model, and for another configuration.
        """
        if not isinstance(backbone.model, MoRForCausalLM):
            raise ConfigError(
                f"mor is a model of its own, and can't stand on a {type(backbone.model).__name__}; make one with "
                "`deepen new mor-1m-nr3 --out DIR`, or from a Llama's weights with --from MODEL"
            )
        own, given = (each.to_dict() for each in (backbone.model.config, config))
        other = [name for name in own if name not in _CHANGEABLE and own[name] != given.get(name)]
        if other:
            raise ConfigError(
                f"{other[0]} is {own[other[0]]} in this model, and can't become {given.get(other[0])}; what can be set "
                f"anew is {', '.join(_CHANGEABLE)}"
            )
        return cls(config, backbone)

    # Decoding

    @torch.no_grad()
    def open(self, prompt: Prompt) -> MoRDecoding:
        """Read the prompt's rows but their last tokens, in passes of at most PREFILL_WIDTH columns.

        Raises `PromptError` for an empty row, an id outside the vocabulary, or more tokens than the context holds.
        """
        check_prompt(self.backbone, prompt)
        decoding = MoRDecoding(DepthCache(), [list(row) for row in prompt.rows])
        for start in range(0, max(1, *(len(row) - 1 for row in decoding.rows)), PREFILL_WIDTH):
            slabs = [row[:-1][start : start + PREFILL_WIDTH] for row in decoding.rows]
            widths = torch.tensor([len(slab) for slab in slabs])
            if not widths.any():
                continue
            ids = pad_rows(slabs, self.backbone.device)
            real = (torch.arange(ids.shape[1]) < widths[:, None]).to(ids.device)
            reading = self.base.model.read(ids, real=real, cache=decoding.store)
            decoding.prefill += Spent(1, int(widths.sum()), reading.ran.num_applied)
        return decoding

    @torch.no_grad()
    def advance(self, decoding: MoRDecoding, sampler: Sampler) -> Advance:
        """One pass over each row's last token, as deep as that goes; one new token a row."""
        ids = torch.tensor([row[-1:] for row in decoding.rows], device=self.backbone.device)
        reading = self.base.model.read(ids, cache=decoding.store)
        logits = self.base.lm_head(reading.hidden)
        spent = self._spent(reading, decoding.rows)
        gained = [sampler.choose(row, logits[row, None], ids, ()) for row, ids in enumerate(decoding.rows)]
        for row, tokens in zip(decoding.rows, gained, strict=True):
            row.extend(tokens)
        return Advance(tuple(RowAdvance(tuple(tokens)) for tokens in gained), spent)

    def _spent(self, reading: Reading, rows: Sequence[Sequence[int]]) -> Spent:
        """What was run, and how many more FLOPs (or fewer) that was than `flops` tells of tokens in general."""
        run = 2 * reading.ran.multiply_adds(self._prices, num_logits=len(rows))
        told = sum(self.flops(num_positions=1, context=len(row) - 1) for row in rows)
        return Spent(1, len(rows), reading.ran.num_applied, added_flops=run - told)

    def drop(self, decoding: MoRDecoding, rows: Sequence[int]) -> None:
        """Forget finished rows."""
        kept = [row for row in range(len(decoding.rows)) if row not in set(rows)]
        decoding.store.keep_rows(kept)
        decoding.rows = [decoding.rows[row] for row in kept]

    @torch.no_grad()
    def score(self, batch: Batch) -> Score:
        """One forward over the whole text. Thresholds decide, whatever training goes by: no token sees a later one."""
        return self._score(batch, topk=False)

    @property
    def looks_ahead(self) -> bool:
        """Whether it is trained by the best of whole rows."""
        return bool(self.config.selection == "topk")

    @torch.no_grad()
    def score_looking_ahead(self, batch: Batch) -> Score:
        """The best of whole rows decide, as the paper has it: later tokens say how deep earlier ones run."""
        return self._score(batch, topk=True)

    def _score(self, batch: Batch, *, topk: bool) -> Score:
        ids, real = batch.input_ids.to(self.backbone.device), _real(batch).to(self.backbone.device)
        reading = self.base.model.read(ids, real=real, topk=topk)
        hidden = reading.run.spread(reading.hidden)
        sheet = ScoreSheet(batch.input_ids.shape, self.backbone.dtype)
        for row, tokens in enumerate(batch.unpadded()):
            sheet.put(row, 1, tokens[1:], self.base.lm_head(hidden[row, : max(0, len(tokens) - 1)]))
        return replace(sheet.score, depths=self._depths(reading))

    def _depths(self, reading: Reading) -> Tensor | None:
        """`[B, T]`, on the CPU; None where nothing decides about them."""
        if isinstance(self.base.model.router, AllRecur):
            return None
        depths: Tensor = reading.run.spread(reading.routed.depths(reading.run.real))
        return depths.cpu()

    @property
    def num_recursions(self) -> int:
        """Nr."""
        return int(self.config.num_recursions)

    def at_depth(self, num_recursions: int) -> Self:
        """Over the same parameters; what decides about levels that were not trained is said in deeper.py.

        Raises `ConfigError` for a number below 1, and for one beyond what the router can decide about.
        """
        base = at_depth(self.base, num_recursions)
        return type(self)(base.config, Backbone.attach(base)).train(self.training)

    # Tokens batched by depth

    def depth_layout(self) -> DepthLayout:
        """Layers, and the entries that they make and read."""
        return depth_layout(self.config)

    @torch.no_grad()
    def enter(self, ids: Tensor, running: Running, kv: KeyValues) -> State:
        """Up to the first recursion."""
        return self._depthwise.enter(ids, running, kv)

    @torch.no_grad()
    def recur(self, state: State, running: Running, kv: KeyValues) -> tuple[State, Tensor]:
        """One recursion of each token, and who goes on."""
        return self._depthwise.recur(state, running, kv)

    @torch.no_grad()
    def leave(self, state: State, running: Running, kv: KeyValues) -> Tensor:
        """From the last recursion to the head."""
        return self._depthwise.leave(state, running, kv)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """The head."""
        logits: Tensor = self.base.lm_head(hidden)
        return logits

    # Training

    def begin(self, batch: Batch) -> None:
        """Nothing is carried."""

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        """Nothing is drawn."""
        return batch

    def count(self, batch: Batch) -> dict[Unit, int]:
        """Predicted tokens."""
        return {"token": int(batch.predicted().sum())}

    def train_step(self, batch: Batch, carry: None, progress: Progress) -> StepOutput:
        """Cross entropy of the next token, and the router's terms over the tokens that predict one.

        Tokens see all before them in their row, other documents too, as in any model of transformers that is given
        nothing but ids. Pads are not computed.
        """
        batch = batch.to(self.backbone.device)
        topk = self.config.selection == "topk" or progress.step < self.config.topk_warmup_steps
        reading: Reading = self.base.model.read(batch.input_ids, real=_real(batch), topk=topk)
        counted = reading.run.packed(F.pad(batch.predicted(), (0, 1)))
        targets = reading.run.packed(batch.input_ids.roll(-1, dims=1))[counted]
        logits = self.base.lm_head(reading.hidden[counted])
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = {"final_ce": LossTerm(F.cross_entropy(wide, targets, reduction="sum"), "token")}
        router = self.base.model.router
        for name, (total, weight) in router_terms(self.config, router, reading.routed, counted).items():
            losses[name] = LossTerm(total, "token", weight)
        return StepOutput(
            losses,
            metrics=self._metrics(reading, topk=topk),
            statistics=self._statistics(reading),
            work=training_work(reading.ran.multiply_adds(self._prices, num_logits=len(targets))),
        )

    def _metrics(self, reading: Reading, *, topk: bool) -> dict[str, Mean]:
        figures = router_figures(self.base.model.router, reading.routed, reading.run.real)
        if isinstance(self.base.model.router, ExpertChoice):
            # Then routers have looked ahead, and the loss of the step is no model's that could generate.
            figures["router/looks_ahead"] = Mean(float(topk))
        return figures

    def _statistics(self, reading: Reading) -> dict[str, Tensor]:
        counted: dict[str, Tensor] = self.base.model.router.count(reading.routed, reading.run.real)
        return counted

    def step_work(self, batch: Batch) -> Work:
        """Of a step in which each recursion keeps the share that it is to keep; `train_step` tells what it was."""
        logits = batch.predicted().sum(dim=1).tolist()
        return training_work(
            sum(
                expected_multiply_adds(self.config, num_positions=length, context=0, num_logits=num)
                for length, num in zip(batch.lengths.tolist(), logits, strict=True)
            )
        )

    def after_step(self, statistics: Mapping[str, Tensor]) -> None:
        """Move thresholds, or loads and biases."""
        if not statistics:
            return
        is_expert_choice = isinstance(self.base.model.router, ExpertChoice)
        biased = self.config.bias_rate if self.config.balancing == "bias" else 0.0
        self.base.model.router.move(statistics, rate=self.config.threshold_rate if is_expert_choice else biased)

    def optim_groups(self) -> list[dict[str, Any]]:
        """Everything; norms and expert-choice routers, which are vectors, apart: they are not decayed."""
        common = {"lr": LEARNING_RATE, "betas": BETAS}
        parameters = list(self.base.parameters())
        return [
            {"params": [each for each in parameters if not _is_vector(each)], **common, "weight_decay": WEIGHT_DECAY},
            {"params": [each for each in parameters if _is_vector(each)], **common, "weight_decay": 0.0},
        ]

    def shard_units(self) -> list[nn.Module]:
        """The layers with weights of their own."""
        return list(self.base.model.layers)

    def recurring_units(self) -> list[nn.Module]:
        """Those that stand in several places of the unrolled depth."""
        uses = Counter(self.base.model.layout.unique)
        return [layer for index, layer in enumerate(self.base.model.layers) if uses[index] > 1]

    # What is saved, and what it costs

    def saved_state(self) -> dict[str, Tensor]:
        """Nothing: what is trained is the model itself, which is saved as a folder of transformers'."""
        return {}

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Nothing; `CheckpointError` for any tensor."""
        if state:
            raise CheckpointError(f"a mor model is saved as a whole; unknown {', '.join(sorted(state))}")

    def flops(self, *, num_positions: int, context: int, num_logits: int | None = None) -> int:
        """Where each recursion keeps the share of tokens that it is to keep; `Spent` makes up the difference."""
        num_logits = num_positions if num_logits is None else num_logits
        given = {"num_positions": num_positions, "context": context, "num_logits": num_logits}
        return 2 * expected_multiply_adds(self.config, **given)

    def state_bytes(self, *, context: int) -> int:
        """Of keys and values, where each recursion has kept the share of tokens that it is to keep."""
        size = self.backbone.dtype.itemsize
        return expected_state_bytes(self.config, context=context, bytes_per_number=size)


def _real(batch: Batch) -> Tensor:
    """`[B, T]`: which positions are no pads."""
    places = torch.arange(batch.input_ids.shape[1], device=batch.lengths.device)
    return places < batch.lengths[:, None]


def _is_vector(parameter: Tensor) -> bool:
    return sum(size > 1 for size in parameter.shape) <= 1
