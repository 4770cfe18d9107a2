"""What an engine asks of whoever runs its requests, and what it is told."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from deepen.core.types import RowAdvance, Spent

from .request import Live


@dataclass(frozen=True)
class Gain:
    """What a request has gained in a tick."""

    live: Live
    advance: RowAdvance
    passes: int


@dataclass
class Statistics:
    """What was run since the beginning.

    tokens   that were committed, also those behind a request's end
    spent    batched by depth, passes are calls of a group of recursions, and positions tokens that entered, those of
             prompts too; of rows it is what their advances have spent
    calls    numbers of tokens that ran in one call, and how often so many did
    heads    batched by depth, the same of the head
    """

    tokens: int = 0
    spent: Spent = field(default_factory=Spent)
    calls: Counter[int] = field(default_factory=Counter)
    heads: Counter[int] = field(default_factory=Counter)


class Runner(Protocol):
    """How an engine runs requests, whatever the model."""

    statistics: Statistics

    @property
    def num_bytes(self) -> int:
        """Of keys, values and states that requests hold now."""

    @property
    def most_bytes(self) -> int:
        """That they can ever hold."""

    def refusal(self, num_tokens: int) -> str | None:
        """Why a request that may come to so many tokens can never be held; None if it can."""

    def has_room(self, num_tokens: int) -> bool:
        """Whether it can be held now."""

    def admit(self, live: Live) -> None:
        """Begin with a request for which there is room."""

    def remove(self, live: Live) -> None:
        """Forget a request and all that it holds."""

    def tick(self) -> list[Gain]:
        """One unit of work; every request commits something within a bounded number of these."""
