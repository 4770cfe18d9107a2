"""How far to believe a drafter that says how sure it is, and whether it pays to ask it."""

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from operator import mul
from statistics import fmean

_MOST_CHANCE = 0.98
_RECENT = 8
_FEW = 3


class Calibration:
    """Chances from a drafter's confidences: one factor, which is what came true over what was promised.

    One for all confidences, so that a drafter that is always wrong and always sure is found out by a few tokens. Where
    nothing was observed it is believed; an observation fades by `fading` with each that follows.
    """

    def __init__(self, *, prior_weight: float = 1.0, fading: float = 0.96) -> None:
        self._prior_weight, self._fading = prior_weight, fading
        self._promised = self._right = 0.0

    def observe(self, confidence: Sequence[float], accepted: int) -> None:
        """Of tokens of these confidences that were compared with what came, the first `accepted` were equal.

        What stands behind the first that differs tells nothing.
        """
        for place, promised in enumerate(confidence[: accepted + 1]):
            self._promised = self._promised * self._fading + promised
            self._right = self._right * self._fading + (place < accepted)

    def chances(self, confidence: Sequence[float]) -> list[float]:
        """Of each token, if all before it are accepted."""
        factor = (self._right + self._prior_weight) / (self._promised + self._prior_weight)
        return [min(_MOST_CHANCE, factor * promised) for promised in confidence]

    def reach(self, confidence: Sequence[float]) -> list[float]:
        """Of each token, the chance that it is accepted with all before it."""
        return list(accumulate(self.chances(confidence), mul))


# How sure a drafter is taken to be of its tokens before it made a draft.
_UNASKED = (0.6, 0.6, 0.6)


class Outlook:
    """What a draft is expected to bring and to take before it is made, by the last few.

    The first draft also pays for whatever is prepared on first use, so its time counts for nothing.
    """

    def __init__(self, *, share_of_a_token: float = 0.03) -> None:
        """`share_of_a_token` is what drafting one costs in passes of one token, until it is timed."""
        self._made: deque[Sequence[float]] = deque([_UNASKED], maxlen=_RECENT)
        self._share_of_a_token = share_of_a_token
        self._seconds: deque[float] = deque(maxlen=_RECENT)
        self._is_warm = False

    def made(self, confidences: Sequence[Sequence[float]], seconds: float) -> None:
        """Drafts of these confidences, one a row, were made together in so many seconds."""
        self._made.extend(confidences)
        if self._is_warm:
            self._seconds.append(seconds / max(map(len, confidences)))
        self._is_warm = True

    def gain(self, calibration: Calibration, most: int) -> float:
        """Accepted tokens a draft of `most` tokens at most, as the drafter is believed now."""
        return fmean(sum(calibration.reach(confidence[:most])) for confidence in self._made)

    @property
    def is_known(self) -> bool:
        """Whether any draft was made."""
        return self._is_warm

    @property
    def length(self) -> int:
        """Tokens a draft."""
        return round(fmean(map(len, self._made)))

    def price_of_token(self, pass_seconds: float | None) -> float:
        """Of drafting one, in passes of one token, which take `pass_seconds`, None if that isn't known.

        By the fastest of the last drafts: what disturbs a machine only makes them slower. Until a few were timed they
        may only make it cheaper, as a drafter that seemed too dear would seldom be timed again.
        """
        if not self._seconds or pass_seconds is None:
            return self._share_of_a_token
        timed = min(self._seconds) / pass_seconds
        return timed if len(self._seconds) >= _FEW else min(timed, self._share_of_a_token)

    def forget_prices(self) -> None:
        """Of another number of rows they are others."""
        self._seconds.clear()
