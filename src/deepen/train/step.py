"""One optimizer step after another, over the protocol alone.

A step draws its rows, has the method prepare and count all of them, divides them over ranks and micro-batches, asks
for loss sums, divides each by the count over the whole step, and moves the parameters that the method's groups name.
So loss and gradients don't depend on how a step was divided.

What is drawn at random in a step comes from seeds that are functions of the run's seed and of the step (and, inside
`train_step`, of rank and micro-batch): a run that goes on needs no state of a generator to draw what it would have.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepen.core.errors import DeepenError
from deepen.core.method import adapted
from deepen.core.seeds import seed_at
from deepen.core.types import Batch, LossTerm, Progress, StepOutput, Unit, Work
from deepen.train.module import StepModule, whole
from deepen.train.optim import Optimizers
from deepen.train.ranks import ALONE, Ranks
from deepen.train.schedule import Schedule


class NotFinite(DeepenError):
    """A loss or a gradient became infinite or no number; the parameters are still those of the step before."""


@dataclass(frozen=True)
class StepReport:
    """One finished optimizer step, counted from 1, over all ranks.

    `losses` are means per unit of each term, unweighted; `total` is what was differentiated. `num_tokens` counts real
    tokens, `work` all that was computed.
    """

    step: int
    losses: Mapping[str, float]
    total: float
    learning_rate: float
    gradient_norm: float
    num_tokens: int
    work: Work
    metrics: Mapping[str, float]


class Steps:
    """Makes the steps of a run of `num_steps`, in any order that `take` is called in.

    `rows_of` gives all rows of a step. `carry` is what the last `train_step` left for the next one, None before the
    first.
    """

    def __init__(
        self,
        module: StepModule,
        optimizers: Optimizers,
        rows_of: Callable[[int], Batch],
        *,
        num_steps: int,
        seed: int = 0,
        num_micro_batches: int = 1,
        grad_clip: float | None = None,
        schedule: Schedule | None = None,
        autocast: torch.dtype | None = None,
        device: torch.device | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._module, self._model, self._optimizers = module, module.model, optimizers
        self._rows_of, self._num_steps, self._seed = rows_of, num_steps, seed
        self._num_micro_batches, self._grad_clip, self._schedule = num_micro_batches, grad_clip, schedule
        self._autocast, self._ranks = autocast, ranks
        self._device = device if device is not None else torch.device("cpu")
        self.carry: Any = None
        self.has_begun = False

    def take(self, index: int) -> StepReport:
        """Make the step `index`, counted from 0. Raises `NotFinite`, naming it, before a bad one is made."""
        carry = self.carry
        try:
            return self._take(index)
        except NotFinite:
            self.carry = carry  # as the parameters: of the step before
            raise

    def _take(self, index: int) -> StepReport:
        progress, where = Progress(index, self._num_steps), f"at step {index + 1} of {self._num_steps}"
        self._optimizers.set_rates(self._schedule.factor(index) if self._schedule is not None else 1.0)
        torch.manual_seed(seed_at(self._seed, index))
        prepared = self._model.prepare(self._rows_of(index), progress)
        counts = self._model.count(prepared)
        parts = self._ranks.share(prepared, num_parts=self._num_micro_batches)
        self._optimizers.clear()
        sums = _Sums()
        for number, part in enumerate(parts):
            torch.manual_seed(seed_at(self._seed, index, self._ranks.rank, number))
            output = self._differentiate(part, counts, progress)
            sums.add(output, output.work if output.work is not None else self._model.step_work(part))
        self._module.release()
        found = sums.over(self._ranks)
        losses = {name: total / max(counts[found.units[name]], 1) for name, total in found.losses.items()}
        total = sum(found.weights[name] * loss for name, loss in losses.items())
        _require_finite({**losses, "total": total}, where)
        norm = self._move(where)
        self._model.after_step(found.statistics)
        return StepReport(
            step=index + 1,
            losses=losses,
            total=total,
            learning_rate=self._optimizers.learning_rate,
            gradient_norm=norm,
            num_tokens=int(prepared.lengths.sum()),
            work=found.work,
            metrics=found.metrics,
        )

    def _differentiate(self, part: Batch, counts: Mapping[Unit, int], progress: Progress) -> StepOutput:
        """Add the gradient of one micro-batch's losses to the parameters'."""
        batch = part.to(self._device)
        if not self.has_begun:
            self.carry, self.has_begun = self._model.begin(batch), True
        self._module.gather()
        with adapted(self._model):  # also for the backward, which may run parts of the forward again
            with torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None):
                output: StepOutput = self._module(batch, self.carry, progress)
            terms = [term.weight * _mean(name, term, counts) for name, term in output.losses.items()]
            total = torch.stack(terms).sum()
            if not total.requires_grad:
                raise DeepenError("no loss depends on a trainable parameter; does the method's config switch it off?")
            total.backward()
        self.carry = output.carry
        return output

    def _move(self, where: str) -> float:
        """Take one step down the gradient, unless that is not finite; gives its norm over all parameters."""
        parameters = self._optimizers.parameters
        if not self._module.is_sharded:
            self._ranks.sum_gradients(parameters)
        norm = whole(
            nn.utils.clip_grad_norm_(parameters, math.inf if self._grad_clip is None else self._grad_clip)
        ).item()
        if not math.isfinite(norm):
            raise NotFinite(f"the gradient's norm is {norm} {where}; try a lower learning_rate or grad_clip")
        self._optimizers.step()
        return norm


@dataclass
class _Sums:
    """Over a step's micro-batches, kept on the model's device until all are made: reading one waits for it."""

    totals: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, Unit] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)
    work: Work = field(default_factory=Work)

    def add(self, output: StepOutput, work: Work) -> None:
        for name, term in output.losses.items():
            self._add(f"loss {name}", term.total)
            self._require_same_weight(name, term)
            self.units[name], self.weights[name] = term.unit, term.weight
        for name, mean in output.metrics.items():
            self._add(f"total {name}", mean.total)
            self._add(f"count {name}", mean.count)
        for name, statistic in output.statistics.items():
            held = self.statistics.get(name)
            self.statistics[name] = statistic.detach() if held is None else held + statistic.detach()
        self.work += work

    def _require_same_weight(self, name: str, term: LossTerm) -> None:
        """A loss that weighed otherwise in one part would depend on how the step is divided."""
        weight = self.weights.get(name, term.weight)
        if term.weight != weight:
            raise DeepenError(
                f'the loss "{name}" has weight {term.weight} in one micro-batch of a step and weight {weight} in those '
                "before; the method must give it one weight, also where nothing counts"
            )

    def _add(self, name: str, value: Tensor | float) -> None:
        tensor = torch.as_tensor(value).detach()
        self.totals[name] = self.totals[name] + tensor if name in self.totals else tensor

    def over(self, ranks: Ranks) -> "_StepSums":
        """Their sums over ranks, read from the device."""
        names = sorted(self.totals)
        values = ranks.total(torch.stack([self.totals[name].cpu().double() for name in names]))
        figures = dict(zip(names, values.tolist(), strict=True))
        work = torch.tensor([self.work.without_gradient, self.work.one_gradient, self.work.two_gradients])
        return _StepSums(
            losses={name: figures[f"loss {name}"] for name in self.units},
            units=self.units,
            weights=self.weights,
            metrics=_ratios(figures),
            statistics={name: ranks.total(tensor.cpu()) for name, tensor in sorted(self.statistics.items())},
            work=Work(*ranks.total(work).tolist()),
        )


def _ratios(figures: Mapping[str, float]) -> dict[str, float]:
    """The means of what was summed as a total and a count; no number where nothing was counted."""
    names = [name.removeprefix("total ") for name in figures if name.startswith("total ")]
    return {name: figures[f"total {name}"] / (figures[f"count {name}"] or math.nan) for name in names}


@dataclass(frozen=True)
class _StepSums:
    losses: Mapping[str, float]
    units: Mapping[str, Unit]
    weights: Mapping[str, float]
    metrics: Mapping[str, float]
    statistics: Mapping[str, Tensor]
    work: Work


def _mean(name: str, term: LossTerm, counts: Mapping[Unit, int]) -> Tensor:
    """The term per unit of the whole step; a step without that unit has nothing to divide."""
    if term.unit not in counts:
        raise DeepenError(
            f'the loss "{name}" is per {term.unit}, but the model\'s count() gives {", ".join(counts) or "nothing"}'
        )
    return term.total / max(counts[term.unit], 1)


def _require_finite(losses: Mapping[str, float], where: str) -> None:
    for name, value in losses.items():
        if not math.isfinite(value):
            raise NotFinite(f'the loss "{name}" is {value} {where}; try a lower learning_rate or grad_clip')
