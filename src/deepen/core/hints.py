"""The way out of a mistyped name."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """What to append to an error about an unknown `name`: the nearest known one, else all of them."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    if nearest:
        return f'; did you mean "{nearest[0]}"?'
    return f"; known are: {', '.join(names)}" if names else "; none are known"
