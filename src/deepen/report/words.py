"""Values as texts, the same in a terminal and on a page."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

_PREFIXES = ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " K"))
_SHORT_LIST = 40
_MOST_DIGITS = 17


def cell(value: Any) -> str:
    """A value of any plain JSON type: whole numbers with separators, others in up to six digits, none, yes and no."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return _short(value, digits=6)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {cell(each)}" for key, each in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(f"{each:.3g}" if isinstance(each, float) else cell(each) for each in value) or "none"
    return str(value)


def is_long_list(value: Any) -> bool:
    """Whether it holds so many values that a table's cell is no place for them."""
    return isinstance(value, Mapping | Sequence) and not isinstance(value, str) and len(cell(value)) > _SHORT_LIST


def signed(value: float | None) -> str:
    """A difference, with its sign, in three digits; nothing where there is none."""
    if value is None:
        return ""
    return "0" if value == 0 else _short(value, digits=3, sign="+")


def interval(ends: Sequence[float] | None) -> str:
    """Both ends of an interval of differences; nothing where there is none."""
    return "" if ends is None else f"{signed(ends[0])} to {signed(ends[1])}"


def amount(value: float) -> str:
    """A number of any size in three digits: 0.25, 1.5 M, 4e-05."""
    return _short(value, digits=3)


def amounts(values: Sequence[float]) -> list[str]:
    """Ascending numbers, as an axis has them, each in as many digits as tell all of them; three at least."""
    nearest = min((after - before for before, after in pairwise(values)), default=math.inf)
    enough = (
        digits
        for digits in range(3, _MOST_DIGITS)
        if all(abs(float(f"{value:.{digits}g}") - value) <= nearest / 100 for value in values)
    )
    digits = next(enough, _MOST_DIGITS)
    return [_short(value, digits=digits) for value in values]


def _short(value: float, *, digits: int, sign: str = "") -> str:
    """In as many digits as are told, or fewer; a number that takes more before its point is told by prefix."""
    rounded = abs(float(f"{value:.{digits}g}"))
    size, prefix = 1.0, ""
    if rounded >= 10**digits:
        size, prefix = next((size, prefix) for size, prefix in _PREFIXES if rounded >= size)
    return f"{value / size:{sign}.{digits}g}{prefix}"
