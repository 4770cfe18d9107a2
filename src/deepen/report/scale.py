"""From values to places along an axis, and the ticks on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

_NUM_TICKS = 6
_DECADES_FOR_LOGARITHM = 1.5
_MARGIN = 0.04


@dataclass(frozen=True)
class Linear:
    """Values between `low` and `high` lie evenly between the places `start` and `end`."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Where a value lies."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values, ascending."""
        step = _round_step((self.high - self.low) / _NUM_TICKS)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


@dataclass(frozen=True)
class Logarithmic:
    """Equal ratios lie equally far apart; all values are above 0."""

    low: float
    high: float
    start: float
    end: float

    def place(self, value: float) -> float:
        """Where a value lies."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Powers of ten, not more than a few of them, with 2 and 5 times as much where there is room."""
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        every = math.ceil((last - first) / (_NUM_TICKS + 1))
        factors = (1, 2, 5) if last - first <= 2 else (1,)
        found = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
        return [tick for tick in found if self.low <= tick <= self.high]


Scale = Linear | Logarithmic


class MakeScale(Protocol):
    """Chooses a scale for values."""

    def __call__(self, values: Sequence[float], *, start: float, end: float) -> Scale:
        """One that all of them fit on, of which there is at least one."""


def linear(values: Sequence[float], *, start: float, end: float) -> Linear:
    """A scale that all values fit on, of which there is at least one; a single value lies in the middle.

    There is a margin beyond the least and the greatest, unless that is 0.
    """
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    margin = (high - low) * _MARGIN
    return Linear(low - margin * (low != 0), high + margin * (high != 0), start, end)


def by_range(values: Sequence[float], *, start: float, end: float) -> Scale:
    """Logarithmic where the values, all above 0, lie decades apart."""
    low, high = min(values), max(values)
    if low <= 0 or math.log10(high / low) < _DECADES_FOR_LOGARITHM:
        return linear(values, start=start, end=end)
    margin = (high / low) ** _MARGIN
    return Logarithmic(low / margin, high * margin, start, end)


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
