"""How long a draft should be: as long as the tokens it is expected to add pay for the width they cost.

The chance that a drafted token is accepted depends on the evidence for it: how many tokens before it are those of the
text it was copied from. Each accepted token is one more. So a draft of k tokens with evidence e commits, in
expectation, 1 + c(e) + c(e) c(e + 1) + ... + c(e) ... c(e + k - 1) tokens, for the price of a pass k + 1 wide. Chances
and prices are measured while decoding runs. None of this can change the output: a pass commits only what the base
emits.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from statistics import median

from deepen.core.types import RowAdvance
from deepen.generate.drafts import Draft
from deepen.generate.verify import agreement
from deepen.nn.attention import QUERY_BLOCK, round_up

# The share of a one-token pass that each further position costs, until it is measured.
_FURTHER_POSITION = 0.02
# How many times as dear as that a wider pass counts until a one-token pass was timed: until then only a draft that is
# all but sure should be tried.
_UNTIMED = 2.0
_RECENT = 8


class PassPrice:
    """Seconds a pass takes, by width: the median of the last few, and between and beyond timed widths a line."""

    def __init__(self) -> None:
        self._recent: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_RECENT))
        self._seconds: dict[int, float] = {}

    def observe(self, width: int, seconds: float) -> None:
        """One pass of `width` positions took `seconds`."""
        width = _tracked(width)
        self._recent[width].append(seconds)
        self._seconds[width] = median(self._recent[width])

    def relative(self, width: int) -> float:
        """The price of a pass of `width`, in units of what a one-token pass costs by the same estimate."""
        price = self._estimate(width) / self._estimate(1)
        return price if width == 1 or 1 in self._seconds else price * _UNTIMED

    def _estimate(self, width: int) -> float:
        width = _tracked(width)
        if width in self._seconds:
            return self._seconds[width]
        below = max((timed for timed in self._seconds if timed < width), default=None)
        above = min((timed for timed in self._seconds if timed > width), default=None)
        if below is not None and above is not None:
            share = (width - below) / (above - below)
            return self._seconds[below] * (1 - share) + self._seconds[above] * share
        timed = below or above
        return _assumed(width) * (self._seconds[timed] / _assumed(timed) if timed is not None else 1.0)


def _tracked(width: int) -> int:
    """The width under which a price is kept: passes come in whole blocks of positions."""
    return width if width == 1 else round_up(width, QUERY_BLOCK)


def _assumed(width: int) -> float:
    return 1 + _FURTHER_POSITION * (width - 1)


# The chance of a token behind a match of so many or more, before anything was observed. Only a starting point.
_PRIOR = {0: 0.2, 1: 0.3, 2: 0.45, 3: 0.6, 4: 0.8, 8: 0.9}
# How many observations the prior counts for, and the factor by which an observation fades with each that follows. Where
# nothing comes true a chance thus falls to 0.9 * 0.5 / 25.5 = 0.018. Drafts are made only where their chance is above
# what they cost, so in the long run they can't cost more than that.
_PRIOR_WEIGHT = 0.5
_FADING = 0.96


class Acceptance:
    """The chance that a drafted token is accepted, by the evidence for it; observations fade, so that it can change."""

    def __init__(self) -> None:
        self._counts: dict[int, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def observe(self, evidence: int, compared: int, accepted: int) -> None:
        """Of a draft with `evidence`, `compared` tokens were compared with what came, and the first `accepted` equal.

        What stands behind the first that differs tells nothing.
        """
        for position in range(min(accepted + 1, compared)):
            kind = _kind(evidence + position)
            right, wrong = (count * _FADING for count in self._counts[kind])
            self._counts[kind] = (right + 1, wrong) if position < accepted else (right, wrong + 1)

    def chance(self, evidence: int) -> float:
        """Estimated acceptance of one token, in (0, 1)."""
        kind = _kind(evidence)
        right, wrong = self._counts[kind]
        return (right + _PRIOR[kind] * _PRIOR_WEIGHT) / (right + wrong + _PRIOR_WEIGHT)


def _kind(evidence: int) -> int:
    return max(kind for kind in _PRIOR if kind <= evidence)


class WidthPolicy:
    """Chooses draft lengths for one decoding from what its passes cost and how many drafted tokens were accepted."""

    def __init__(self) -> None:
        self.price = PassPrice()
        self.acceptance = Acceptance()
        self._num_rows = 0

    def length(self, evidence: int, most: int) -> int:
        """Tokens of a draft, 0 .. `most`, that maximise expected tokens over price; 0 is plain decoding."""
        best, best_rate = 0, 1.0
        reached = expected = 1.0
        for length in range(1, most + 1):
            reached *= self.acceptance.chance(evidence + length - 1)
            expected += reached
            price = self.price.relative(length + 1)
            if expected > best_rate * price:
                best, best_rate = length, expected / price
            if expected + reached * (most - length) <= best_rate * price:
                break  # not even for this price would the tokens further on be worth it
        return best

    def observe(self, proposals: Sequence[Draft], gained: Sequence[RowAdvance], seconds: float) -> None:
        """One pass took `seconds`; row r could have drafted all of `proposals[r]`, and drafted some or none of it.

        What a row committed tells about its proposal even where that was not drafted, so that a text that begins to
        repeat itself is noticed at no cost.
        """
        if len(gained) != self._num_rows:
            # A pass over more or fewer rows has another price at each width.
            self.price, self._num_rows = PassPrice(), len(gained)
        self.price.observe(1 + max(row.drafted for row in gained), seconds)
        for proposal, row in zip(proposals, gained, strict=True):
            compared = proposal.tokens[: len(row.tokens)]
            self.acceptance.observe(proposal.evidence, len(compared), agreement(compared, row.tokens))
