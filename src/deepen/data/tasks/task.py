"""What a task is: a drawn example, its place in one split, and what a blind guess gets."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, get_args

from deepen.core.config import Config
from deepen.core.errors import ConfigError
from deepen.data.records import Split
from deepen.data.tasks.draws import Draws
from deepen.data.vocabulary import tokenizer_fingerprint

HELD_OUT_PERCENT = 10
"""Of all instances, in each of validation and test."""

MOST_COUNTED = 64
"""A count (of hops, say) is one word up to here."""

MOST_EXAMPLES = 10_000_000
ANSWER = "="
"""Ends every prompt."""

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>")

_ATTEMPTS = 2_000


@dataclass(frozen=True)
class Example:
    """A prompt and its only right answer, in words of the task's vocabulary.

    `difficulty` is the number of steps that lead there, as the task counts them; `instance` what no two splits share.
    `further` is what is asked and answered behind that, as difficult each.
    """

    prompt: tuple[str, ...]
    answer: tuple[str, ...]
    difficulty: int
    instance: str
    further: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class Words:
    """The words of a task, of which number n has the id n."""

    words: tuple[str, ...]

    def get_vocab(self) -> dict[str, int]:
        """The id of each word."""
        return {word: number for number, word in enumerate(self.words)}

    @property
    def digest(self) -> str:
        """That of a tokenizer with these words."""
        return tokenizer_fingerprint(self)


@dataclass(frozen=True)
class Task(Config, ABC):
    """Settings of a task; its words don't depend on them, so that a model can be asked what it was not trained on."""

    name: ClassVar[str]
    own_words: ClassVar[tuple[str, ...]]
    """Besides special tokens and the mark that ends a prompt."""

    # Training examples; validation examples, and as many for test.
    examples: int = 20_000
    held_out: int = 1_000
    # Of all that is drawn. Instances are in the same split for every seed.
    seed: int = 0

    @abstractmethod
    def example(self, split: Split, index: int) -> Example:
        """Number `index` of a split, from 0. Raises `ConfigError` where the settings leave the split no instance."""

    @abstractmethod
    def chance(self, difficulty: int) -> float:
        """The share of answer tokens that the best blind guess gets, computed, not estimated.

        A blind guess knows settings and difficulty, and what the task's module says that it sees. Of whole answers
        it gets at most this share.
        """

    def validate(self) -> list[str]:
        """What is wrong with the settings; a task adds its own."""
        return [
            *outside("examples", self.examples, (1, MOST_EXAMPLES)),
            *outside("held_out", self.held_out, (1, MOST_EXAMPLES)),
            *outside("seed", self.seed, (0, 2**63 - 1)),
        ]

    @classmethod
    def vocabulary(cls) -> Words:
        """All words, special tokens first."""
        return Words((*SPECIAL_TOKENS, ANSWER, *cls.own_words))

    def num_examples(self, split: Split) -> int:
        """How many examples it has."""
        return self.examples if split == "train" else self.held_out


@dataclass(frozen=True)
class DrawnTask(Task):
    """One whose examples are drawn until one is of the split that is asked for."""

    @abstractmethod
    def draw(self, draws: Draws, split: Split) -> Example | None:
        """An example of the split; None if what was drawn is none, as it mostly is for being another split's."""

    def example(self, split: Split, index: int) -> Example:
        """Number `index` of a split, from 0. Raises `ConfigError` where the settings leave the split no instance."""
        place = get_args(Split).index(split), index
        for attempt in range(_ATTEMPTS):
            found = self.draw(Draws(self.seed, number_of(self.name), *place, attempt), split)
            if found is not None:
                return found
        raise ConfigError(
            f"task {self.name} with {_told(self.to_dict())} has no {split} example among {_ATTEMPTS:,} drawn; give "
            "settings with more different ones"
        )


def split_of_instance(instance: str) -> Split:
    """10 % validation, 10 % test, the rest training, by the sha256 of its UTF-8, whatever the settings are."""
    percentile = int.from_bytes(hashlib.sha256(instance.encode()).digest()[:8], "big") * 100 >> 64
    if percentile < HELD_OUT_PERCENT:
        return "test"
    return "validation" if percentile < 2 * HELD_OUT_PERCENT else "train"


def counts() -> tuple[str, ...]:
    """The words of 1 .. MOST_COUNTED."""
    return tuple(str(number) for number in range(1, MOST_COUNTED + 1))


def outside(name: str, value: int | tuple[int, int], limits: tuple[int, int]) -> list[str]:
    """What is wrong with a setting, or with a range, that must lie within `limits`, both included."""
    low, high = (value, value) if isinstance(value, int) else value
    if low > high:
        return [f"{name} {low}-{high} is empty; write the lower number first"]
    if limits[0] <= low and high <= limits[1]:
        return []
    given = f"{low}" if isinstance(value, int) else f"{low}-{high}"
    return [f"{name} must be within {limits[0]}-{limits[1]}, not {given}"]


def number_of(name: str) -> int:
    """A number to draw by, of its own for each name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _told(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())
