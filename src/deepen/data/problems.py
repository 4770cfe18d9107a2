"""Problems with one right answer, made from a seed: what a model can be asked without any data from elsewhere.

    arithmetic  Modulo 97: a = 7; b = a + 5; c = b * 2; c?     24     difficulty: steps
    pointers    d>b a>d c>a b>c; a 3?                          c      difficulty: hops

A problem of either kind needs its steps one after the other: the answer is a function of every one of them.
"""

import random
import re
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

from deepen.core.errors import AddressError, ConfigError
from deepen.core.hints import did_you_mean
from deepen.data.records import Record

# A prime: adding, subtracting and multiplying by 2..9 each map the remainders onto themselves, one to one, so that the
# answer depends on every step and is as likely to be any remainder.
_MODULUS = 97
_NAMES = string.ascii_lowercase


@dataclass(frozen=True)
class Problem:
    """A question, its only right answer, and how many steps lead there. `chance` is the share a blind guess gets."""

    prompt: str
    answer: str
    difficulty: int
    chance: float

    def is_solved_by(self, reply: str) -> bool:
        """Whether the reply's first word, number or letter is the answer."""
        found = re.match(r"\W*(\w+)", reply)
        return found is not None and found[1] == self.answer

    def record(self, place: str) -> Record:
        """As training data: prompt and response."""
        return Record({"prompt": self.prompt, "response": self.answer, "difficulty": self.difficulty}, place)


def arithmetic(source: random.Random, steps: int) -> Problem:
    """A chain of assignments modulo 97, each from the one before; a blind guess is right once in 97 times."""
    if not 1 <= steps < len(_NAMES):
        raise ConfigError(f"steps must be between 1 and {len(_NAMES) - 1}, not {steps}")
    value = source.randrange(_MODULUS)
    lines = [f"{_NAMES[0]} = {value}"]
    for before, name in pairwise(_NAMES[: steps + 1]):
        operator, number = source.choice("+-*"), source.randrange(2, 10)
        value = {"+": value + number, "-": value - number, "*": value * number}[operator] % _MODULUS
        lines.append(f"{name} = {before} {operator} {number}")
    prompt = f"Modulo {_MODULUS}: {'; '.join(lines)}; {_NAMES[steps]}?"
    return Problem(prompt, str(value), steps, chance=1 / _MODULUS)


def pointers(source: random.Random, hops: int, *, num_nodes: int = 8) -> Problem:
    """Follow arrows through a shuffled table: every node points to another, and all of them form one circle.

    On a circle longer than the walk no node comes twice, so the answer tells how far one has followed; a node that was
    passed is never right, and the best blind guess is one of the nodes but the first: 1 / (num_nodes - 1).
    """
    if not 3 <= num_nodes <= len(_NAMES):
        raise ConfigError(f"num_nodes must be between 3 and {len(_NAMES)}, not {num_nodes}")
    if not 1 <= hops < num_nodes:
        raise ConfigError(f"hops must be between 1 and {num_nodes - 1} (num_nodes - 1), not {hops}")
    circle = source.sample(_NAMES[:num_nodes], num_nodes)
    arrows = [f"{a}>{b}" for a, b in zip(circle, circle[1:] + circle[:1], strict=True)]
    source.shuffle(arrows)
    return Problem(f"{' '.join(arrows)}; {circle[0]} {hops}?", circle[hops], hops, chance=1 / (num_nodes - 1))


KINDS: dict[str, Callable[[random.Random, int], Problem]] = {"arithmetic": arithmetic, "pointers": pointers}


def problems(kind: str, *, count: int, difficulty: int, seed: int = 0) -> Iterator[Problem]:
    """`count` problems of one kind and difficulty, the same for the same arguments. Raises `AddressError`."""
    if kind not in KINDS:
        raise AddressError(f'unknown kind of problem "{kind}"{did_you_mean(kind, KINDS)}')
    for number in range(count):
        yield KINDS[kind](random.Random(f"{kind} {difficulty} {seed} {number}"), difficulty)
