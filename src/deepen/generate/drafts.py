"""Where drafts come from without a pass of their own: nowhere, copied from what the row says, or left from a pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deepen.core.errors import ConfigError

# A history is taken for the one seen before, grown, if it has the same tokens here at the end of what was seen.
_NUM_COMPARED = 64


@dataclass(frozen=True)
class Draft:
    """A proposal for the next tokens: where it comes from, and how strong the sign for it is (0: none).

    `confidence` is how sure its source is of each token, in [0, 1], if it says so; `evidence` then means nothing.
    """

    tokens: tuple[int, ...]
    source: str
    evidence: int
    confidence: tuple[float, ...] = ()

    def shortened(self, length: int) -> "Draft":
        """Its first `length` tokens at most; `NO_DRAFT` where that is none."""
        tokens = self.tokens[:length]
        return replace(self, tokens=tokens, confidence=self.confidence[:length]) if tokens else NO_DRAFT

    def behind(self, committed: Sequence[int]) -> "Draft":
        """What it still proposes once `committed` stands in its place: `NO_DRAFT` unless all of that agrees with it.

        Each token that agreed is one more sign for those behind it.
        """
        length = len(committed)
        if len(self.tokens) <= length or self.tokens[:length] != tuple(committed):
            return NO_DRAFT
        return replace(
            self,
            tokens=self.tokens[length:],
            evidence=self.evidence + length,
            confidence=self.confidence[length:],
        )


NO_DRAFT = Draft((), source="ar", evidence=0)


class LookupDraft:
    """Copies what followed the last tokens when they occurred before: prompt lookup.

    The longest suffix of the history, of at most `max_ngram` tokens, that also occurs earlier is found, at its latest
    earlier occurrence; one of fewer than `min_ngram` tokens counts for nothing. `evidence` is the length of the match
    there, followed backwards to at most `max_evidence` tokens. The copy may run into its own beginning: behind
    "a b a b" it goes on "a b a b ...", as long as asked.

    One object a row. It remembers the history, so a call takes time for the new tokens only. A history that isn't the
    last one with tokens appended makes it start anew; should one differ only more than 64 tokens before the end of
    what was seen, that goes unnoticed, and drafts are copied from what was seen.
    """

    def __init__(self, *, max_ngram: int = 3, min_ngram: int = 1, max_evidence: int = 16) -> None:
        """Raises `ConfigError` unless 1 <= min_ngram <= max_ngram <= max_evidence."""
        if not 1 <= min_ngram <= max_ngram <= max_evidence:
            raise ConfigError(
                "a lookup draft needs 1 <= min_ngram <= max_ngram <= max_evidence, "
                f"not min_ngram {min_ngram}, max_ngram {max_ngram}, max_evidence {max_evidence}"
            )
        self._sizes = range(max_ngram, min_ngram - 1, -1)
        self._max_evidence = max_evidence
        self._seen: list[int] = []
        # Where the latest occurrence of an n-gram ends that has a token behind it.
        self._end_of: dict[tuple[int, ...], int] = {}

    def propose(self, history: Sequence[int], most: int) -> Draft:
        """Exactly `most` tokens, or none where the end of the history has no earlier occurrence."""
        self._observe(history)
        end = self._find()
        if end is None or most <= 0:
            return Draft((), source="lookup", evidence=0)
        period = len(self._seen) - end
        tokens = tuple(self._seen[end + index % period] for index in range(most))
        return Draft(tokens, source="lookup", evidence=self._match_length(end))

    def _observe(self, history: Sequence[int]) -> None:
        known = len(self._seen)
        if list(history[max(0, known - _NUM_COMPARED) : known]) != self._seen[-_NUM_COMPARED:]:
            self._seen, self._end_of, known = [], {}, 0
        for token in history[known:]:
            self._index_suffixes()
            self._seen.append(token)

    def _index_suffixes(self) -> None:
        """Note where the n-grams at the end of what was seen end, now that a token follows them."""
        end = len(self._seen)
        for size in self._sizes:
            if size <= end:
                self._end_of[tuple(self._seen[end - size :])] = end

    def _find(self) -> int | None:
        """The end of the latest earlier occurrence of the longest suffix that has one."""
        for size in self._sizes:
            end = self._end_of.get(tuple(self._seen[-size:])) if size <= len(self._seen) else None
            if end is not None:
                return end
        return None

    def _match_length(self, end: int) -> int:
        """How many tokens before `end` are those at the end of the history, the occurrences may overlap."""
        length = 0
        while length < min(end, self._max_evidence) and self._seen[end - 1 - length] == self._seen[-1 - length]:
            length += 1
        return length


class JacobiDraft:
    """What a pass predicted behind the first draft token it rejected: a Jacobi iteration over the tokens to come.

    A pass over the last token and a draft predicts a token behind every position. Those up to the first rejected one
    are committed. The others were predicted from a draft that was partly wrong, and may still be right; they are the
    next draft, each at its own place. What is missing to the length asked for, all of it before the first pass, is
    filled with the last token of the row. One object a row.
    """

    def __init__(self) -> None:
        self._leftovers: tuple[int, ...] = ()

    def propose(self, history: Sequence[int], most: int) -> Draft:
        """Exactly `most` tokens behind `history`: what was kept from the last pass over it, then its last token."""
        leftovers = self._leftovers[:most]
        return Draft((*leftovers, *[history[-1]] * (most - len(leftovers))), source="jacobi", evidence=0)

    def keep(self, leftovers: Sequence[int]) -> None:
        """What a pass predicted behind the tokens it committed, the first of them for the place right behind those."""
        self._leftovers = tuple(leftovers)
