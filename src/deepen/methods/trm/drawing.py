"""How many outer steps a training batch gets.

One draw for all of its rows:

    fixed                T
    uniform              1 .. T_max, each as likely
    lognormal_poisson    1 + Poisson(exp(tau)), tau ~ N(log(T - 1) - s^2 / 2, s): T on average, now and then many more
                         (Geiping et al. 2025, arXiv 2502.05171, s = 1/2)

For each token, by the difficulty k that its document's record tells:

    task                 k: as many as it needs, which nobody knows of a question that hasn't been answered
    fixed_point          k .. T_max, each as likely: so that the answer, once found, stays

T_max is the most in any case.

Draws come from torch's generator, which the trainer seeds with the run's seed and the step before any rank or
micro-batch has its part.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from deepen.core.errors import CannotTrain
from deepen.core.types import Batch, Mean

from .config import TRMConfig

SPREAD = 0.5
"""s, of the logarithm of the rate."""


@dataclass(frozen=True)
class TRMBatch(Batch):
    """Rows with what was drawn for all of them."""

    num_outer: int = 0
    """Outer steps."""
    own_outer: Int[Tensor, "B T"] | None = None
    """How many of these each token takes; None: all."""
    halting_step: int = 0
    """The step after which the halting head is asked; 0 without one."""

    per_token: ClassVar[tuple[str, ...]] = (*Batch.per_token, "own_outer")

    @property
    def mean_outer(self) -> Mean:
        """Outer steps of a predicted token."""
        if self.own_outer is None:
            return Mean(float(self.num_outer))
        own = self.own_outer[:, :-1][self.predicted()]
        return Mean(float(own.sum()), float(own.numel()))


def drawn_for(config: TRMConfig, batch: Batch) -> TRMBatch:
    """`batch` with a draw of its own. Raises `CannotTrain` where T is the task's, and it doesn't tell."""
    drawn = TRMBatch(**vars(batch))
    if config.draws_by_difficulty:
        own = draw_own_steps(config, batch)
        predicted = batch.predicted()
        num_outer = int(own[:, :-1][predicted].max()) if predicted.any() else 1
        drawn = replace(drawn, num_outer=num_outer, own_outer=own.clamp(max=num_outer))
    else:
        drawn = replace(drawn, num_outer=draw_outer_steps(config))
    asked = draw_halting_step(drawn.num_outer) if config.halt == "learned" else 0
    return replace(drawn, halting_step=asked)


def draw_own_steps(config: TRMConfig, batch: Batch) -> Int[Tensor, "B T"]:
    """T of each token, at least 1."""
    told = batch.difficulty
    if told is None or not told[:, :-1][batch.predicted()].all():
        raise untold(config, "not all of this data tells")
    least = told.clamp(min=1, max=config.T_max)
    if config.T_sampling == "task":
        return least
    assert config.T_max is not None, "the configuration asks for it"
    # Drawn in float64, whose product never rounds up to the next whole number.
    more = torch.rand(least.shape, dtype=torch.float64) * (config.T_max - least + 1)
    return least + more.long()


def untold(config: TRMConfig, what: str) -> CannotTrain:
    """Of data that doesn't tell its difficulty."""
    return CannotTrain(
        f"T_sampling {config.T_sampling} takes outer steps by how difficult each example is, and {what}; train on a "
        'task, as task:pointer, or on answers that all have "difficulty" beside them, or set T_sampling to uniform'
    )


def draw_outer_steps(config: TRMConfig) -> int:
    """T of the next batch, whatever is in it."""
    if config.T_sampling == "fixed":
        return config.trm_T
    if config.T_sampling == "uniform":
        most = 2 * config.trm_T - 1 if config.T_max is None else config.T_max
        return int(torch.randint(1, most + 1, ()))
    if config.trm_T == 1:
        return 1
    rate = torch.exp(math.log(config.trm_T - 1) - SPREAD**2 / 2 + SPREAD * torch.randn((), dtype=torch.float64))
    drawn = 1 + int(torch.poisson(rate))
    return drawn if config.T_max is None else min(drawn, config.T_max)


def draw_halting_step(num_outer: int) -> int:
    """The step after which the halting head is asked; the last is never asked when there is another."""
    return int(torch.randint(1, max(2, num_outer), ()))
