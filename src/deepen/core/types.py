"""Values that pass between methods and the shared code. Letters: B batch, T tokens, W chunk, V vocabulary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

Unit = Literal["token", "masked", "chunk", "sequence"]
Cut = Literal["document", "packed"]
"""document: a row holds one document, or a part of it; packed: rows are full, and may hold several."""


@dataclass(frozen=True)
class Progress:
    """How far a training run is; schedules are functions of it, so that modules count nothing."""

    step: int
    total: int

    @property
    def fraction(self) -> float:
        """Share of the run that lies behind, in [0, 1]."""
        return min(1.0, self.step / self.total) if self.total > 0 else 1.0


@dataclass(frozen=True)
class Batch:
    """Token ids `[B, T]`, right-padded, and how many of each row are real, `[B]`.

    Pads are known from `lengths`, never from an id: a tokenizer may use its end-of-sequence token as pad.

    `documents` `[B, T]` numbers the document of each token where rows hold several: no token predicts the first of
    another document. None: a row is one document. `learned` `[B, T]` is False where a token is read but not predicted,
    as those of a prompt; None: all are. `difficulty` `[B, T]` is that of each token's document, as its record says it,
    and 0 where it doesn't; None: no record does.
    """

    input_ids: Tensor
    lengths: Tensor
    documents: Tensor | None = None
    learned: Tensor | None = None
    difficulty: Tensor | None = None

    per_token: ClassVar[tuple[str, ...]] = ("input_ids", "documents", "learned", "difficulty")
    """Fields of shape `[B, T]`, which are as wide as the longest row. A method whose `prepare` gives more adds its own;
    its other tensors are `[B, ...]`."""

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    def rows(self, indices: Sequence[int]) -> Self:
        """These rows, no wider than the longest of them."""
        chosen = {name: tensor[list(indices)] for name, tensor in self._tensors().items()}
        width = int(chosen["lengths"].max())
        return replace(self, **{n: t[:, :width] if n in self.per_token else t for n, t in chosen.items()})

    def unpadded(self) -> list[list[int]]:
        """The ids of each row, without pads."""
        return [ids[:length] for ids, length in zip(self.input_ids.tolist(), self.lengths.tolist(), strict=True)]

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def predicted(self) -> Tensor:
        """`[B, T - 1]`: whether token t + 1 is one that token t is to predict."""
        places = torch.arange(1, self.input_ids.shape[1], device=self.lengths.device)
        counted = places < self.lengths[:, None]
        if self.documents is not None:
            counted = counted & (self.documents[:, 1:] == self.documents[:, :-1])
        return counted if self.learned is None else counted & self.learned[:, 1:]


@dataclass(frozen=True)
class LossTerm:
    """A loss as a **sum** over `unit`s; the trainer divides once, by the count over ranks and micro-batches."""

    total: Tensor
    unit: Unit
    weight: float = 1.0


@dataclass(frozen=True)
class Mean:
    """A figure to log, as what was summed and over how many: the trainer sums both over a step, then divides."""

    total: Tensor | float
    count: Tensor | float = 1.0


@dataclass(frozen=True)
class StepOutput:
    """What one `train_step` gives.

    losses      named terms; the same names in every step
    carry       what the next call gets
    metrics     figures to log
    statistics  tensors that `after_step` gets, summed over the step's micro-batches and ranks
    work        what the step has cost, where that shows only as it runs; otherwise `step_work` tells
    """

    losses: Mapping[str, LossTerm]
    carry: Any = None
    metrics: Mapping[str, Mean] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    work: "Work | None" = None


@dataclass(frozen=True)
class Prompt:
    """Rows of token ids to continue, and the most tokens any row may gain.

    `capacity` is how many tokens, old and new, each row shall have memory for; None: as many as the longest row may
    grow to.
    """

    rows: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    capacity: int | None = None


@dataclass(frozen=True)
class Spent:
    """Recursion one `advance` cost: passes through the layers, and token positions run in them (pads excluded).

    `layer_applications` counts how often one layer, or a block that stands for one, was applied to one position.
    `added_flops` are those of a method's own modules that its `flops` doesn't tell of these positions.
    """

    passes: int = 0
    positions: int = 0
    layer_applications: int = 0
    added_flops: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        """Both together."""
        return Spent(
            self.passes + other.passes,
            self.positions + other.positions,
            self.layer_applications + other.layer_applications,
            self.added_flops + other.added_flops,
        )


@dataclass(frozen=True)
class Work:
    """Multiply-adds of matrix products, sorted by how many of their two operands get a gradient.

    A product y = x w is done once forward. Backward it is done again for each operand with gradient: dx = dy w^T,
    dw = x^T dy. Work under `no_grad` has none, work through frozen weights has one (the input), work through trained
    weights two; at the place where a gradient first flows, trained weights read an input without one, which is one
    again. So a back-propagation that is cut short is counted as what it is.
    """

    without_gradient: int = 0
    one_gradient: int = 0
    two_gradients: int = 0

    @classmethod
    def of(cls, multiply_adds: int, *, operands: int = 0) -> "Work":
        """So many multiply-adds, of which this number of operands get a gradient."""
        counts = [0, 0, 0]
        counts[operands] = multiply_adds
        return cls(*counts)

    @property
    def multiply_adds(self) -> int:
        """Of the forward."""
        return self.without_gradient + self.one_gradient + self.two_gradients

    @property
    def forward_flops(self) -> int:
        """2 per multiply-add."""
        return 2 * self.multiply_adds

    @property
    def backward_flops(self) -> int:
        """2 per multiply-add and operand with gradient."""
        return 2 * (self.one_gradient + 2 * self.two_gradients)

    @property
    def flops(self) -> int:
        """Forward and backward."""
        return self.forward_flops + self.backward_flops

    @property
    def detached(self) -> "Work":
        """The same products under `no_grad`."""
        return Work(self.multiply_adds)

    @property
    def recomputed(self) -> "Work":
        """With activation checkpointing: the backward runs the forward again before it begins."""
        return self + self.detached

    def __add__(self, other: "Work") -> "Work":
        """Both together."""
        return Work(
            self.without_gradient + other.without_gradient,
            self.one_gradient + other.one_gradient,
            self.two_gradients + other.two_gradients,
        )

    def __mul__(self, times: int) -> "Work":
        """As often as that."""
        return Work(times * self.without_gradient, times * self.one_gradient, times * self.two_gradients)

    __rmul__ = __mul__


@dataclass(frozen=True)
class RowAdvance:
    """What one row gained: committed tokens in order, and how many of them a draft had proposed.

    Where a method changes its drafts: `edits`, the committed tokens that differ from the draft's, and `p_commit`, the
    probability with which it held the chunk to be done.
    """

    tokens: tuple[int, ...]
    drafted: int = 0
    accepted: int = 0
    source: str = "plain"
    edits: int = 0
    p_commit: float | None = None


@dataclass(frozen=True)
class Advance:
    """One unit of recursion: what each row committed, in the rows' present order, and what it cost."""

    rows: tuple[RowAdvance, ...]
    spent: Spent


@dataclass(frozen=True)
class Score:
    """Leak-free log-probabilities.

    `log_probs` is fp32 (fp64 for an fp64 model) `[B, T]`: entry t is log p(token t | tokens before t), zero where
    `scored` `[B, T]` is False (pads, and the first token, which nothing predicts). `correct` `[B, T]` says whether
    token t was the argmax.

    `depths` `[B, T]`, whole numbers, is for methods that let tokens run different depths: the recursions that token t
    itself ran as it was read, 1 at least, 0 at pads. So what predicts token t is of depth t - 1. None: all the same.
    """

    log_probs: Tensor
    scored: Tensor
    correct: Tensor
    depths: Tensor | None = None
