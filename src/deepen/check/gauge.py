"""Compares logits that must be equal, and remembers how near to unequal they came."""

from collections.abc import Callable

import torch
from torch import Tensor

from deepen.check.outcome import Fault, Passed


class Gauge:
    """The largest difference over many comparisons, against what rounding explains."""

    def __init__(self, allowed: float) -> None:
        """`allowed` in logits."""
        self.allowed = allowed
        self.largest = 0.0
        self.num_cases = 0

    def compare(self, actual: Tensor, expected: Tensor, *, seen: str, cause: str | Callable[[], str]) -> None:
        """One case: two `[..., T, V]` of the same positions. Raises `Fault` that begins with `seen` if they differ.

        `cause` may be a function, called only then: a diagnosis may take further runs of the model.
        """
        self.num_cases += 1
        difference = (actual.double() - expected.double()).abs().amax(dim=-1)
        if not torch.isfinite(difference).all():
            raise Fault(f"{seen}: some logits are not finite", cause=_said(cause))
        if difference.numel() == 0:
            return
        self.largest = max(self.largest, float(difference.max()))
        if self.largest > self.allowed:
            too_large = (difference > self.allowed).reshape(-1, difference.shape[-1])
            position = int(too_large.any(dim=0).nonzero()[0])
            raise Fault(
                f"{seen}: logits differ by up to {self.largest:.2g}, first at position {position} of these "
                f"(rounding explains {self.allowed:.1g})",
                cause=_said(cause),
            )

    def passed(self) -> Passed:
        """The figures of all cases."""
        return Passed(self.num_cases, self.largest, self.allowed)


def _said(cause: str | Callable[[], str]) -> str:
    return cause if isinstance(cause, str) else cause()
