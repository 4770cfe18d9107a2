"""How long a draft should be: as long as the tokens it is expected to add pay for the width they cost.

With a chance p that a drafted token is accepted, given that those before it were, a draft of k tokens commits
1 + p + ... + p^k tokens in expectation, for the price of a pass k + 1 wide. Both p (by how good the evidence for the
draft is) and the price (by width) are measured while decoding runs. None of this can change the output: a pass commits
only what the base emits.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import median

# Widths whose price is tracked one by one; the price between two of them is interpolated.
_WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
# The share of a one-token pass that each further position costs, until it is measured.
_FURTHER_POSITION = 0.02
_RECENT = 8


class PassPrice:
    """Seconds a pass takes, by width: the median of the last few, or a straight line where none was timed."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT))

    def observe(self, width: int, seconds: float) -> None:
        """One pass of `width` positions took `seconds`."""
        self._seconds[_bucket(width)].append(seconds)

    def relative(self, width: int) -> float:
        """The price of a pass of `width`, in units of whatever a one-token pass costs by the same estimate."""
        return self._estimate(width) / self._estimate(1)

    def _estimate(self, width: int) -> float:
        if not self._seconds:
            return 1 + _FURTHER_POSITION * (width - 1)
        bucket = _bucket(width)
        if bucket in self._seconds:
            return median(self._seconds[bucket])
        # The nearest width that was timed, moved along the assumed line.
        known = min(self._seconds, key=lambda other: abs(other - bucket))
        return (
            median(self._seconds[known]) * (1 + _FURTHER_POSITION * (width - 1)) / (1 + _FURTHER_POSITION * (known - 1))
        )


def _bucket(width: int) -> int:
    return next((known for known in _WIDTHS if known >= width), _WIDTHS[-1])


class Acceptance:
    """The chance that a drafted token is accepted, by the kind of evidence behind the draft.

    A beta estimate that forgets: `weight` drafted tokens' worth of prior, and observations fading by `keep` a draft,
    so that a text that stops repeating itself is noticed within a few passes.
    """

    def __init__(self, *, weight: float = 4.0, keep: float = 0.95) -> None:
        self._weight, self._keep = weight, keep
        self._counts: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def observe(self, evidence: int, drafted: int, accepted: int) -> None:
        """A draft of `drafted` tokens had its first `accepted` ones accepted; what stands behind tells nothing."""
        if drafted == 0:
            return
        counts = self._counts[_evidence_class(evidence)]
        counts[0] = counts[0] * self._keep + accepted
        counts[1] = counts[1] * self._keep + (accepted < drafted)

    def chance(self, evidence: int) -> float:
        """Estimated acceptance of one token, in (0, 1)."""
        kind = _evidence_class(evidence)
        right, wrong = self._counts[kind]
        prior = _PRIOR[kind] * self._weight
        return (right + prior) / (right + wrong + self._weight)


# A match of n tokens behind a copied draft: the longer, the likelier that the copy goes on. Only a starting point.
_PRIOR = {0: 0.2, 1: 0.3, 2: 0.45, 3: 0.6, 4: 0.8, 8: 0.9}


def _evidence_class(evidence: int) -> int:
    return max(kind for kind in _PRIOR if kind <= evidence)


class WidthPolicy:
    """Chooses draft lengths for one decoding from what its passes cost and how many drafted tokens were accepted."""

    def __init__(self) -> None:
        self.price = PassPrice()
        self.acceptance = Acceptance()

    def length(self, evidence: int, most: int) -> int:
        """Tokens of a draft, 0 .. `most`, that maximise expected tokens over price; 0 is plain decoding."""
        chance = self.acceptance.chance(evidence)
        return max(range(most + 1), key=lambda k: self._rate(chance, k))

    def _rate(self, chance: float, length: int) -> float:
        expected = (1 - chance ** (length + 1)) / (1 - chance)
        return expected / self.price.relative(length + 1)

    def observe(self, evidence: Sequence[int], drafted: Sequence[int], accepted: Sequence[int], seconds: float) -> None:
        """One pass over rows that drafted `drafted[row]` tokens on `evidence[row]`, `accepted[row]` of them right."""
        self.price.observe(1 + max(drafted), seconds)
        for kind, tried, right in zip(evidence, drafted, accepted, strict=True):
            self.acceptance.observe(kind, tried, right)
