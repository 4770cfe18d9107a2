"""Stops a run whose loss has risen for good.

With m(t) the median of the last `window` losses up to step t, a run has diverged where

    m(t) > factor * max(lowest m so far, floor)

- Medians, because single steps may have a loss of any size: up to half a window of spikes changes nothing.
- The lowest one, because a loss that climbs slowly is never much above what it was a moment ago.
- A factor well above what a harder part of the data, or a weight of the loss that changes on schedule, brings. With
  noise of a factor up to `factor` between the luckiest and the unluckiest step, a loss that falls can't trip it.
- The floor, because ratios of losses near zero mean nothing: 0.004 after 0.001 is a model that has learned its data.
- A loss whose median was ever below zero (a log-density, say) has no zero to be a multiple of, so it is not judged.

Nothing is judged before the first full window. What is not finite stops a run at once, elsewhere.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from deepen.core.config import Config
from deepen.core.errors import CheckpointError, DeepenError


class Diverged(DeepenError):
    """The loss of a run has become several times what it was."""


@dataclass(frozen=True)
class GuardConfig(Config):
    """When a run has diverged; `window` in optimizer steps, `floor` in the loss's unit (nats for cross entropy)."""

    window: int = 50
    factor: float = 3.0
    floor: float = 0.1

    def validate(self) -> list[str]:
        """One message for each value that can't be judged by."""
        problems = []
        if self.window < 1:
            problems.append(f"window must be at least 1, not {self.window}")
        if self.factor <= 1:
            problems.append(f"factor must be above 1, not {self.factor}")
        if self.floor <= 0:
            problems.append(f"floor must be above 0, not {self.floor}")
        return problems


class DivergenceGuard:
    """Takes the loss of each step, and raises once they have risen for good."""

    def __init__(self, config: GuardConfig | None = None) -> None:
        """Raises `ConfigError` for an impossible configuration."""
        self.config = config if config is not None else GuardConfig()
        self.config.check()
        self._recent: deque[float] = deque(maxlen=self.config.window)
        self._lowest: float | None = None
        self._lowest_step = 0

    def take(self, loss: float, *, step: int) -> None:
        """The total loss of an optimizer step. Raises `Diverged` if that is, or the losses so far are, too much."""
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} at step {step}; {_WAY_OUT}")
        self._recent.append(loss)
        if len(self._recent) < self.config.window:
            return
        now = median(self._recent)
        if self._lowest is None or now < self._lowest:
            self._lowest, self._lowest_step = now, step
        if self._lowest >= 0 and now > self.config.factor * max(self._lowest, self.config.floor):
            raise Diverged(self._message(now, self._lowest, loss, step))

    def state(self) -> dict[str, Any]:
        """What it has seen, as plain JSON types."""
        return {"recent": list(self._recent), "lowest": self._lowest, "lowest_step": self._lowest_step}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises `CheckpointError` if that is the state of another window."""
        recent = [float(loss) for loss in state["recent"]]
        if len(recent) > self.config.window:
            raise CheckpointError(
                f"the saved guard looked at {len(recent)} losses, and window is {self.config.window}; resume with the "
                "window that the run had"
            )
        self._recent.clear()
        self._recent.extend(recent)
        self._lowest = None if state["lowest"] is None else float(state["lowest"])
        self._lowest_step = int(state["lowest_step"])

    def _message(self, now: float, lowest: float, loss: float, step: int) -> str:
        return (
            f"the loss has diverged: it is {loss:.4g} at step {step}, and the median of the last {self.config.window} "
            f"is {now:.4g}, more than {self.config.factor:g} times {max(lowest, self.config.floor):.4g} (the lowest "
            f"such median was {lowest:.4g}, at step {self._lowest_step}); {_WAY_OUT}"
        )


_WAY_OUT = "go on from a step before that with a lower learning_rate, a longer warmup_steps or a lower grad_clip"
