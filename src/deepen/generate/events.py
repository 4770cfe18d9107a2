"""What a generation reports while it runs, and what is left of it when a row has ended."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from deepen.core.types import RowAdvance

FinishReason = Literal["eos", "stop_string", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class Committed:
    """A row gained tokens. `text` is what may be shown now: put together over events it is the row's whole text.

    `advance` says what the decoder did for them in `passes` passes; it may have gone beyond the row's end, `tokens`
    don't.
    """

    row: int
    tokens: tuple[int, ...]
    text: str
    advance: RowAdvance
    passes: int


@dataclass(frozen=True)
class Finished:
    """A row has ended; one that failed, with its `error`."""

    row: int
    reason: FinishReason
    error: Exception | None = None


Event = Committed | Finished


@dataclass
class RowResult:
    """One row's outcome: new ids without the prompt, their text, why it ended and what it cost.

    `passes` counts every pass run while the row was alive, those that read its prompt aside. `commits` has the tokens
    of each; `drafted` and `accepted` count draft tokens by source. `error` is that of a row that failed.
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: FinishReason | None = None
    error: Exception | None = None
    passes: int = 0
    commits: list[int] = field(default_factory=list)
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)

    @property
    def tokens_per_pass(self) -> float:
        """Committed tokens over passes; 0 before the first."""
        return len(self.tokens) / self.passes if self.passes else 0.0

    def add(self, event: Event) -> None:
        """Take one event of this row."""
        if isinstance(event, Finished):
            self.reason, self.error = event.reason, event.error
            return
        self.tokens += event.tokens
        self.text += event.text
        self.passes += event.passes
        self.commits.append(len(event.tokens))
        if event.advance.drafted:
            self.drafted[event.advance.source] += event.advance.drafted
            self.accepted[event.advance.source] += event.advance.accepted
