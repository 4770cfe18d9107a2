"""What a row's next pass should do: the drafts or slots expected to add the most tokens for the price of their width.

Two sources are weighed against plain decoding, a pass of one position for one token:

- A copied draft. The chance that one of its tokens is accepted depends on the evidence for it: how many tokens before
  it are those of the text it was copied from. Each accepted token is one more. So a draft of k tokens with evidence e
  commits, in expectation, 1 + c(e) + c(e) c(e + 1) + ... + c(e) ... c(e + k - 1) tokens, for the price of a pass k + 1
  wide.
- Slots. What they propose is verified by the pass behind theirs, so k slots take two passes, each k + 1 wide, for 2
  tokens and the accepted ones. Evidence is the number of slots before. That nothing is accepted is the rule until a
  sidecar is trained, and can't be known before some slots were filled. So every now and then a pass that would have
  been plain *probes*: it fills the rest of its block of positions with slots. No pass verifies them; the tokens that
  come anyway say whether they were right. Probes may cost `_PROBE_SHARE` of plain decoding.

Where there is a drafter, which drafts without a pass of the base, it stands in the place of slots. It says how sure it
is of each token, and is believed as far as it was right (confidence.py). It is asked where a draft is expected to bring
more than it costs, and otherwise now and then, as slots are; a draft ends where its next token would not pay.

What a pass predicts behind a rejected token ("jacobi") is no further source: it was measured to commit 1.07 tokens a
pass of 8 positions (benchmarks/results/stages/jacobi), which costs 1.12 times a pass of one (results/decoding.json).

Rows that share a pass share its width: what its widest row takes is computed for all of them. So no row takes more than
pays for all together.

Chances and prices are measured while decoding runs. None of this can change the output: a pass commits only what the
base emits.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from deepen.core.types import RowAdvance
from deepen.generate.confidence import Calibration, Outlook
from deepen.generate.drafts import NO_DRAFT, Draft
from deepen.generate.verify import agreement
from deepen.nn.attention import QUERY_BLOCK, round_up

# The share of a one-token pass that each further position costs, until it is measured.
_FURTHER_POSITION = 0.02
# How many times as dear as that a wider pass counts until a one-token pass was timed: until then only a draft that is
# all but sure should be tried.
_UNTIMED = 2.0
_RECENT = 8
# Passes over numbers of rows of which one is this share of the other, at least, are taken to cost alike.
_ALIKE = 0.75


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

    @property
    def timed(self) -> bool:
        """Whether any pass was."""
        return bool(self._seconds)

    def relative(self, width: int) -> float:
        """The price of a pass of `width`, in units of what a one-token pass costs by the same estimate."""
        return self.in_plain_passes(self.seconds(width)) if width > 1 else 1.0

    def in_plain_passes(self, seconds: float) -> float:
        """So many seconds in units of what a one-token pass costs."""
        price = seconds / self.seconds(1)
        return price if 1 in self._seconds else price * _UNTIMED

    def seconds(self, width: int) -> float:
        """What a pass of `width` takes by what was timed; a pass of one token takes 1 until any was."""
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


# The chance of a token before anything was observed, by the evidence for it: behind a copied match of so many or more.
# Only a starting point.
_COPY_PRIOR: dict[int, float | None] = {0: 0.2, 1: 0.3, 2: 0.45, 3: 0.6, 4: 0.8, 8: 0.9}
# In a slot behind so many accepted ones. None: as likely as with the evidence before, so that a probe of a few slots
# tells something of longer drafts.
_SLOT_PRIOR: dict[int, float | None] = {0: 0.05, 1: None, 2: None, 3: None, 4: None, 8: None}


class Acceptance:
    """The chance that a drafted token is accepted, by the evidence for it; observations fade, so that it can change.

    The prior counts for `prior_weight` observations, and an observation fades by the factor `fading` with each that
    follows. By default, where nothing comes true a chance thus falls to 0.9 * 0.5 / 25.5 = 0.018. Drafts are made only
    where their chance is above what they cost, so in the long run they can't cost more than that.
    """

    def __init__(
        self, prior: Mapping[int, float | None] = _COPY_PRIOR, *, prior_weight: float = 0.5, fading: float = 0.96
    ) -> None:
        self._prior, self._prior_weight, self._fading = dict(sorted(prior.items())), prior_weight, fading
        self._counts: dict[int, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def observe(self, evidence: int, compared: int, accepted: int) -> None:
        """Of a draft with `evidence`, `compared` tokens were compared with what came, and the first `accepted` equal.

        What stands behind the first that differs tells nothing.
        """
        for position in range(min(accepted + 1, compared)):
            kind = self._kind(evidence + position)
            right, wrong = (count * self._fading for count in self._counts[kind])
            self._counts[kind] = (right + 1, wrong) if position < accepted else (right, wrong + 1)

    def chance(self, evidence: int) -> float:
        """Estimated acceptance of one token, in (0, 1)."""
        chance = 0.0
        for kind, prior in self._prior.items():
            if kind > evidence:
                break
            right, wrong = self._counts[kind]
            start = prior if prior is not None else chance
            chance = (right + start * self._prior_weight) / (right + wrong + self._prior_weight)
        return chance

    def _kind(self, evidence: int) -> int:
        return max(kind for kind in self._prior if kind <= evidence)


# The share of plain decoding that probes of slots may cost; with what wrong copies may cost, that stays below 0.03.
_PROBE_SHARE = 0.008
# A probe's slots: with the token before them one block, which a pass computes anyway.
_PROBE_SLOTS = QUERY_BLOCK - 1
# How many times as dear as one without slots a pass with slots counts until one was timed.
_UNTIMED_SLOTS = 1.25


@dataclass(frozen=True)
class Offer:
    """What a row could do in its next pass: verify `copied` or `pending`, tokens of earlier slots, or fill new slots.

    No draft may be longer than the row has room for, nor slots more than `most_slots`. `drafted` is what a drafter
    proposes, if it was asked.
    """

    copied: Draft = NO_DRAFT
    pending: Draft = NO_DRAFT
    most_slots: int = 0
    drafted: Draft = NO_DRAFT

    @property
    def drafts(self) -> tuple[Draft, Draft, Draft]:
        """What could be verified, or nothing."""
        return self.copied, self.pending, self.drafted


@dataclass(frozen=True)
class Choice:
    """What it does: verify `draft`, or fill `num_slots` slots; decode plainly if neither is any."""

    draft: Draft = NO_DRAFT
    num_slots: int = 0

    @property
    def width(self) -> int:
        """Positions of the pass that this takes."""
        return 1 + len(self.draft.tokens) + self.num_slots

    def within(self, width: int) -> "Choice":
        """As much of it as a pass of `width` has room for: a shorter draft, but no fewer slots than it wants."""
        if self.width <= width:
            return self
        return Choice() if self.num_slots else Choice(self.draft.shortened(width - 1))


class DraftPolicy:
    """Chooses sources and widths for one decoding from what its passes cost and how many tokens were accepted."""

    def __init__(self) -> None:
        self.price = PassPrice()
        """Of passes without slots, by which those with slots are measured, too."""
        self.acceptance = {
            "lookup": Acceptance(),
            # Slots are observed rarely while they don't pay. With a short memory a few probes bring them back; with a
            # heavier prior one that happened to be right doesn't.
            "mask": Acceptance(_SLOT_PRIOR, prior_weight=2.0, fading=0.9),
        }
        self.calibration = Calibration()
        self._outlook = Outlook()
        self._slot_price = PassPrice()
        self._slots_are_warm = False
        self._allowance = 0.0
        self._num_rows = 0

    def choose(self, offers: Sequence[Offer]) -> list[Choice]:
        """What each row should do in the next pass."""
        choices = self._together([self._best(offer) for offer in offers])
        probes = self._probes(offers, choices)
        return [probes.get(row, choice) for row, choice in enumerate(choices)]

    def _together(self, choices: Sequence[Choice]) -> list[Choice]:
        """No wider than pays for all rows together: what the widest row takes is computed for each of them."""
        widths = sorted({1, *(choice.width for choice in choices)})
        best, best_rate = 1, float(len(choices))
        for width in widths[1:]:
            brought = sum(self._brings(choice, width) for choice in choices)
            with_slots = any(choice.num_slots for choice in choices if choice.width <= width)
            rate = brought / (self._price_with_slots(width) if with_slots else self.price.relative(width))
            if rate > best_rate:
                best, best_rate = width, rate
        return [choice.within(best) for choice in choices]

    def _brings(self, choice: Choice, width: int) -> float:
        """Tokens expected of a row's choice in a pass of `width`; slots are worth what they bring for their price."""
        cut = choice.within(width)
        if not cut.num_slots:
            return self._rate(self._chances(cut.draft), 1.0, sure=1)
        chances = [self.acceptance["mask"].chance(number) for number in range(cut.num_slots)]
        rate = self._rate(chances, self._price_of_both(cut.width), sure=2)
        return rate * self._price_with_slots(cut.width)

    @staticmethod
    def _rate(chances: Sequence[float], price: float, *, sure: int) -> float:
        expected, reached = float(sure), 1.0
        for chance in chances:
            reached *= chance
            expected += reached
        return expected / price

    def ask(self, copies: Sequence[Draft], most: Sequence[int]) -> list[int]:
        """How many tokens a drafter should draft of each row, at most; `most` is what there is room for.

        The rows have these copies as well. Where nobody should be asked, 0.
        """
        wanted = [
            room if room and self._rate_expected(room) > self._rate_of(copied) else 0
            for copied, room in zip(copies, most, strict=True)
        ]
        if any(wanted):
            # A first draft is short: neither its worth nor what width costs is known.
            return wanted if self._outlook.is_known else [min(_PROBE_SLOTS, room) for room in wanted]
        probes = [min(_PROBE_SLOTS, room) for room in most]
        cost = max(probes, default=0) * self._price_of_token()
        if not any(probes) or cost > self._allowance:
            return [0] * len(most)
        self._allowance -= cost
        return probes

    def goes_on(self, confidence: Sequence[Sequence[float]]) -> bool:
        """Whether another token should be drafted behind those of these confidences, one or more in each row."""
        rate = max(1.0, self._rate_expected(self._outlook.length))
        reach = max(self.calibration.reach(row)[-1] for row in confidence)
        a_few = 2 * QUERY_BLOCK
        price_of_place = (self.price.relative(1 + a_few) - 1) / a_few
        return reach > rate * (self._price_of_token() + price_of_place)

    def drafted(self, drafts: Sequence[Draft], seconds: float) -> None:
        """A drafter was asked of some rows, which took it so long."""
        self._outlook.made([draft.confidence for draft in drafts if draft.tokens], seconds)

    def _rate_expected(self, most: int) -> float:
        """Of the next draft of so many tokens at most, before it is made."""
        length = min(most, self._outlook.length)
        price = self.price.relative(1 + length) + length * self._price_of_token()
        return (1 + self._outlook.gain(self.calibration, most)) / price

    def _price_of_token(self) -> float:
        return self._outlook.price_of_token(self.price.seconds(1) if self.price.timed else None)

    def observe(
        self, offers: Sequence[Offer], choices: Sequence[Choice], gained: Sequence[RowAdvance], seconds: float
    ) -> None:
        """One pass took `seconds`, in which each row was offered and chose as given and gained `gained`.

        What a row committed tells about its drafts even where they were not verified, so that a text that begins to
        repeat itself, or slots that begin to be right, are noticed at no cost.
        """
        if not _ALIKE * self._num_rows <= len(gained) <= self._num_rows / _ALIKE:
            # A pass over many more or fewer rows has another price at each width.
            self.price, self._slot_price, self._num_rows = PassPrice(), PassPrice(), len(gained)
            self._outlook.forget_prices()
        self._allowance += _PROBE_SHARE
        self._time(choices, seconds)
        for offer, row in zip(offers, gained, strict=True):
            for draft in offer.drafts:
                compared = draft.shortened(len(row.tokens))
                if compared.tokens:
                    self._judge(compared, agreement(compared.tokens, row.tokens))

    def _judge(self, compared: Draft, accepted: int) -> None:
        if compared.confidence:
            self.calibration.observe(compared.confidence, accepted)
        else:
            self.acceptance[compared.source].observe(compared.evidence, len(compared.tokens), accepted)

    def _time(self, choices: Sequence[Choice], seconds: float) -> None:
        width = max(choice.width for choice in choices)
        if not any(choice.num_slots for choice in choices):
            self.price.observe(width, seconds)
        elif self._slots_are_warm:
            self._slot_price.observe(width, seconds)
        else:
            # The first pass with slots also pays for whatever is prepared on first use. Few are timed while they don't
            # pay, so that one outlier would be believed for long.
            self._slots_are_warm = True

    def _best(self, offer: Offer) -> Choice:
        best, best_rate = Choice(), 1.0
        for draft in offer.drafts:
            length, rate = self._best_length(self._chances(draft), self.price.relative)
            if rate > best_rate:
                best, best_rate = Choice(draft.shortened(length)), rate
        slots = [self.acceptance["mask"].chance(number) for number in range(offer.most_slots)]
        length, rate = self._best_length(slots, self._price_of_both, sure=2)
        return Choice(num_slots=length) if rate > best_rate else best

    def _chances(self, draft: Draft) -> list[float]:
        """Of each of its tokens, if those before it are accepted."""
        if draft.confidence:
            return self.calibration.chances(draft.confidence)
        return [self.acceptance[draft.source].chance(draft.evidence + place) for place in range(len(draft.tokens))]

    def _rate_of(self, draft: Draft) -> float:
        return self._best_length(self._chances(draft), self.price.relative)[1]

    def _best_length(
        self, chances: Sequence[float], price_of: Callable[[int], float], *, sure: int = 1
    ) -> tuple[int, float]:
        """How long a draft of tokens with these chances brings most expected tokens for its price, and how many.

        Without a draft that is 1, plain decoding. `sure` tokens come whatever is accepted; `price_of` is told the
        width, in plain passes.
        """
        best, best_rate, most = 0, 1.0, len(chances)
        reached, expected = 1.0, float(sure)
        for length, chance in enumerate(chances, start=1):
            reached *= chance
            expected += reached
            price = price_of(length + 1)
            if expected > best_rate * price:
                best, best_rate = length, expected / price
            if expected + reached * (most - length) <= best_rate * price:
                break  # not even for this price would the tokens further on be worth it
        return best, best_rate

    def _price_of_both(self, width: int) -> float:
        """Of a pass with slots and the pass that verifies what they propose, in plain passes."""
        return self._price_with_slots(width) + self.price.relative(width)

    def _price_with_slots(self, width: int) -> float:
        if not (self._slot_price.timed and self.price.timed):
            return self.price.relative(width) * _UNTIMED_SLOTS
        return self.price.in_plain_passes(self._slot_price.seconds(width))

    def _probes(self, offers: Sequence[Offer], choices: Sequence[Choice]) -> dict[int, Choice]:
        """Rows that would decode plainly and can probe instead, if the allowance is enough, which is then used up."""
        # The rows of a pass share its price, so all that can probe do.
        probes = {
            row: Choice(num_slots=min(_PROBE_SLOTS, offer.most_slots))
            for row, (offer, choice) in enumerate(zip(offers, choices, strict=True))
            if choice.width == 1 and offer.most_slots and not offer.pending.tokens
        }
        if not probes:
            return {}
        cost = self._price_with_slots(max(probe.width for probe in probes.values())) - 1
        if cost > self._allowance:
            return {}
        self._allowance -= max(0.0, cost)
        return probes
