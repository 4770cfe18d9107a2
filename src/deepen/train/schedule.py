"""Learning rates over a run, as factors of each group's own: functions of the step, which hold nothing.

With w warm-up steps, a decay that begins at step b, N steps in all, and a floor f:

    s < w                  (s + 1) / w
    constant               1
    linear, cosine         from 1 at w to f at N, straight or along half a cosine       (b = w)
    trapezoid              1 up to b, then straight to f at N                           (b = N - decay steps)

A trapezoid's plateau doesn't know where the run ends, so one long run can be cooled down from any of its checkpoints
(Hu et al. 2024, MiniCPM; Hägele et al. 2024).
"""

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["constant", "linear", "cosine", "trapezoid"]


@dataclass(frozen=True)
class Schedule:
    """`warmup_steps` and `decay_steps` in optimizer steps; `floor` is the factor at the end of a decay."""

    shape: Shape
    num_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    floor: float = 0.0

    def factor(self, step: int) -> float:
        """Of the optimizer step `step`, counted from 0; in (0, 1] during warm-up, in [floor, 1] after it."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.shape == "constant":
            return 1.0
        begin = self.num_steps - self.decay_steps if self.shape == "trapezoid" else self.warmup_steps
        if step < begin:
            return 1.0
        # The last step is one before the end, so that it still moves something where the floor is 0.
        covered = min(1.0, (step - begin) / max(1, self.num_steps - begin))
        if self.shape == "cosine":
            covered = (1 - math.cos(math.pi * covered)) / 2
        return 1.0 + (self.floor - 1.0) * covered
