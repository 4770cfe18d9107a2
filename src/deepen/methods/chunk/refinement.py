"""What becomes of one row's chunk in refined mode: its tokens, which of them may be edited, and how many to commit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from deepen.methods.chunk.config import RecursiveConfig


@dataclass
class Chunk:
    """A chunk while it is refined. `draft` stays as it was; `tokens` is what refinement has made of it.

    `confidence` is the probability that the latest pass gives to each token; entry 0 is the token that the clean
    prefix decides, which is never edited.
    """

    draft: tuple[int, ...]
    tokens: list[int] = field(init=False)
    confidence: list[float] = field(init=False)
    p_commit: float = 0.0
    length: int = field(init=False)
    """How many tokens the length head would commit."""
    done: bool = False
    _editable_from: int = field(init=False)
    """Every token from here on stands behind one that the pass before edited."""

    def __post_init__(self) -> None:
        self.tokens = list(self.draft)
        self.confidence = [1.0] * len(self.draft)
        self.length = self._editable_from = len(self.draft)

    @property
    def edited(self) -> list[bool]:
        """Which tokens differ from the draft's."""
        return [token != drafted for token, drafted in zip(self.tokens, self.draft, strict=True)]

    def edit(self, chosen: Sequence[int], old: Sequence[float], new: Sequence[float], *, rate: float) -> None:
        """Take `chosen` where tokens may be edited: a share `rate` with the lowest confidence, and all behind an edit.

        `chosen[i]` is the pass's token for position i + 1, `old[i]` and `new[i]` the probabilities it gives to the
        token there and to the chosen one. What may not be edited is an anchor.
        """
        candidates = range(1, len(self.tokens))
        lowest = sorted(candidates, key=lambda i: (old[i - 1], i))[: math.ceil(rate * len(candidates))]
        editable = {*lowest, *range(min(self._editable_from + 1, len(self.tokens)), len(self.tokens))}
        edits = [i for i in sorted(editable) if chosen[i - 1] != self.tokens[i]]
        for i in candidates:
            self.confidence[i] = new[i - 1] if i in edits else old[i - 1]
        for i in edits:
            self.tokens[i] = chosen[i - 1]
        self._editable_from = edits[0] if edits else len(self.tokens)

    def num_committed(self, config: RecursiveConfig, *, ends: Sequence[int], pad: int | None) -> int:
        """How many leading tokens to commit, at least one; `ends` are ids that end a text, `pad` the one that fills.

        The length head decides if it is enabled, else the text ends before its trailing blanks. Passes that ran out
        before the boundary head was sure commit no edited token whose confidence is below the floor.
        """
        count = self.length if config.enable_length_head else _without_blanks(self.tokens, ends, pad)
        if self.p_commit < config.commit_threshold:
            unsure = (
                i for i, edited in enumerate(self.edited) if edited and self.confidence[i] < config.min_commit_threshold
            )
            count = min(count, next(unsure, count))
        return min(max(1, count), len(self.tokens))

    def restore(self) -> None:
        """Be the draft again: the base finds it likelier."""
        self.tokens = list(self.draft)

    def tail(self, count: int) -> tuple[int, ...]:
        """What stays as the next chunk's draft when `count` tokens are committed.

        That is the rest, if it is untouched and stands behind what it was drafted for: if nothing was edited.
        """
        return () if any(self.edited) else self.draft[count:]


def _without_blanks(tokens: Sequence[int], ends: Sequence[int], pad: int | None) -> int:
    """The number of tokens up to an end of the text, or else up to trailing pads."""
    for index, token in enumerate(tokens):
        if token in ends:
            return index + 1
    length = len(tokens)
    while length and tokens[length - 1] == pad:
        length -= 1
    return length
