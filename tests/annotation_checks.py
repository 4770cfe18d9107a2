"""The checker that conftest.py puts on each function of deepen: beartype, for the annotations it can check."""

import random
from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype
from beartype._check.code import codemain
from beartype.door import is_bearable
from beartype.roar import BeartypeException

# Of a list, beartype checks one entry at random. It shall draw from a generator of its own: the global one belongs to
# the code under test, and Hypothesis watches it.
codemain.getrandbits = random.Random(0).getrandbits

_CONF = BeartypeConf(is_pep484_tower=True)  # an int is a float, as everywhere in Python


def check(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
    """`function`, raising on an argument or a result that isn't what its annotation says."""
    # A configuration takes what a user wrote and tells what doesn't fit; that must be seen in tests, too.
    if function.__qualname__.endswith("Config.__init__"):
        return function
    function.__annotations__ = {name: _checkable(hint) for name, hint in function.__annotations__.items()}
    checked: Callable[..., Any] = beartype(conf=_CONF)(function)
    return checked


def _checkable(hint: Any) -> Any:
    """The annotation, or Any where beartype has no way to check it (Self; a Protocol not made for isinstance)."""
    try:
        is_bearable(None, hint, conf=_CONF)
    except BeartypeException:
        return Any
    return hint
