"""What becomes of a check: it passes with figures, finds a fault, or does not apply."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Passed:
    """All cases agreed. `largest` is the largest difference seen and `allowed` what rounding explains, both in logits.

    They are None where equality means equal bits or equal ids.
    """

    num_cases: int
    largest: float | None = None
    allowed: float | None = None
    note: str = ""
    """What else there is to know of how it was judged, such as the compiler used."""


class Fault(Exception):
    """The model fails the check: what was seen, and what in a model's code makes for that."""

    def __init__(self, seen: str, *, cause: str) -> None:
        super().__init__(seen)
        self.seen, self.cause = seen, cause


class NotApplicable(Exception):
    """The check asks for something that this model doesn't have; the message says what."""
