"""Values that pass between methods and the shared code. Letters: B batch, T tokens, W chunk, V vocabulary."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

Unit = Literal["token", "chunk", "sequence"]


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
    """

    input_ids: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class LossTerm:
    """A loss as a **sum** over `unit`s; the trainer divides once, by the count over ranks and micro-batches."""

    total: Tensor
    unit: Unit
    weight: float = 1.0


@dataclass(frozen=True)
class StepOutput:
    """What one `train_step` gives: named loss terms, the next carry, and figures to log."""

    losses: Mapping[str, LossTerm]
    carry: Any = None
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompt:
    """Rows of token ids to continue, and the most tokens any row may gain."""

    rows: tuple[tuple[int, ...], ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Spent:
    """Recursion one `advance` cost: passes through the layers, and token positions run in them (pads excluded)."""

    passes: int = 0
    positions: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        """Both together."""
        return Spent(self.passes + other.passes, self.positions + other.positions)


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
    """

    log_probs: Tensor
    scored: Tensor
    correct: Tensor
