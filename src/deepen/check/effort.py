"""How much a run of the suite does."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import torch


@dataclass(frozen=True)
class Effort:
    """Sizes of the cases: `quick` ones for a model of 135M parameters in two minutes on two cores, or thorough ones."""

    length: int
    """Tokens of a text."""
    num_texts: int
    num_cuts: int
    widths: tuple[int, ...]
    """Tokens in one cached step; kernels that work in blocks of 64 are met just below, at and above that."""
    dtypes: tuple[torch.dtype, ...]
    """Precisions that are tried; the widest one that runs is what the others are compared with."""
    slow: bool
    """Whether checks run that take minutes on a real model (compilation)."""

    def within(self, context_length: int | None) -> "Effort":
        """The same for a model that reads at most so many tokens."""
        if context_length is None or context_length >= self.length:
            return self
        return replace(self, length=context_length, num_cuts=min(self.num_cuts, context_length - 1))

    def cuts(self, seed: int) -> Sequence[int]:
        """Positions inside a text, in order; others for another seed."""
        return sorted(Random(seed).sample(range(1, self.length), self.num_cuts))


QUICK = Effort(length=40, num_texts=1, num_cuts=3, widths=(1, 3, 8), dtypes=(torch.bfloat16, torch.float32), slow=False)
THOROUGH = Effort(
    length=150,
    num_texts=3,
    num_cuts=6,
    widths=(1, 2, 7, 63, 64, 65),
    dtypes=(torch.bfloat16, torch.float16, torch.float32, torch.float64),
    slow=True,
)
