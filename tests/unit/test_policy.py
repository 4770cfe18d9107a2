"""Sources and widths: what a policy learns of prices and chances, and that what it chooses pays."""

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice
from random import Random

import pytest
from effort import share_of_profile
from hypothesis import given
from hypothesis import strategies as st

from deepen.core.types import RowAdvance
from deepen.generate.drafts import NO_DRAFT, Draft, LookupDraft
from deepen.generate.policy import Acceptance, Choice, DraftPolicy, Offer, PassPrice
from deepen.generate.verify import agreement
from deepen.nn.attention import QUERY_BLOCK, round_up

MOST = 15
EVIDENCE = (1, 2, 3, 4, 8, 16)
# What a pass costs in one-token passes, by its width.
Price = Callable[[int], float]


def line(slope: float) -> Price:
    return lambda width: 1 + slope * (width - 1)


# The shape measured with packed linears on two cores: cheap up to eight positions, then steeper.
def packed(width: int) -> float:
    return 1 + 0.05 * (width - 1) if width <= 8 else 1.35 + 0.075 * (width - 8)


class TestPassPrice:
    @given(
        timed=st.lists(st.tuples(st.integers(1, 200), st.floats(1e-4, 10.0)), max_size=30), width=st.integers(1, 200)
    )
    def test_is_positive_and_one_for_one_token(self, timed: list[tuple[int, float]], width: int) -> None:
        price = PassPrice()
        for each_width, seconds in timed:
            price.observe(each_width, seconds)
        assert price.relative(1) == 1.0
        assert price.relative(width) > 0

    @given(slope=st.floats(0.0, 1.0), blocks=st.integers(1, 10))
    def test_learns_a_line_from_two_widths(self, slope: float, blocks: int) -> None:
        price = PassPrice()
        for timed in (1, 40):
            price.observe(timed, 0.04 * line(slope)(timed))
        width = QUERY_BLOCK * blocks
        assert price.relative(width) == pytest.approx(line(slope)(width))
        assert price.relative(width - 1) == pytest.approx(line(slope)(width))

    def test_one_slow_pass_among_several_changes_nothing(self) -> None:
        price = PassPrice()
        for seconds in (0.04, 0.04, 2.0):
            price.observe(1, seconds)
        price.observe(8, 0.06)
        assert price.relative(8) == pytest.approx(1.5)

    def test_forgets_what_passes_once_took(self) -> None:
        price = PassPrice()
        for _ in range(50):
            price.observe(1, 1.0)
            price.observe(4, 1.0)
        for _ in range(8):
            price.observe(4, 3.0)
        assert price.relative(4) == pytest.approx(3.0)

    def test_wider_passes_count_as_dear_until_a_one_token_pass_was_timed(self) -> None:
        price = PassPrice()
        untimed = price.relative(8)
        price.observe(8, 0.06)
        assert price.relative(8) == pytest.approx(untimed)
        price.observe(1, 0.05)
        assert price.relative(8) == pytest.approx(1.2)
        assert untimed > 2


class TestAcceptance:
    @given(observed=st.lists(st.tuples(st.integers(0, 16), st.integers(0, 20), st.integers(0, 20)), max_size=40))
    def test_is_always_a_chance(self, observed: list[tuple[int, int, int]]) -> None:
        acceptance = Acceptance()
        for evidence, compared, accepted in observed:
            acceptance.observe(evidence, compared, min(accepted, compared))
        assert all(0 < acceptance.chance(evidence) < 1 for evidence in range(40))

    @given(
        evidence=st.integers(0, 16),
        before=st.lists(st.booleans(), max_size=60),
        after=st.lists(st.booleans(), max_size=9),
    )
    def test_one_more_accepted_token_never_lowers_it(
        self, evidence: int, before: list[bool], after: list[bool]
    ) -> None:
        chances = []
        for right in (0, 1):
            acceptance = Acceptance()
            for each in (*before, right, *after):
                acceptance.observe(evidence, 1, int(each))
            chances.append(acceptance.chance(evidence))
        assert chances[0] < chances[1]

    def test_starts_higher_for_longer_matches(self) -> None:
        chances = [Acceptance().chance(evidence) for evidence in (0, *EVIDENCE)]
        assert chances == sorted(chances)

    def test_each_accepted_token_is_evidence_for_the_next(self) -> None:
        acceptance, untouched = Acceptance(), Acceptance()
        acceptance.observe(1, 5, 2)  # right behind matches of 1 and 2, wrong behind one of 3
        assert acceptance.chance(1) > untouched.chance(1)
        assert acceptance.chance(2) > untouched.chance(2)
        assert acceptance.chance(3) < untouched.chance(3)
        assert acceptance.chance(4) == untouched.chance(4)

    def test_nothing_compared_is_nothing_learnt(self) -> None:
        acceptance = Acceptance()
        acceptance.observe(3, 0, 0)
        assert acceptance.chance(3) == Acceptance().chance(3)

    @pytest.mark.parametrize("evidence", EVIDENCE)
    def test_forgets(self, evidence: int) -> None:
        acceptance = Acceptance()
        for _ in range(1000):
            acceptance.observe(evidence, 1, 0)
        assert acceptance.chance(evidence) < 0.03
        for _ in range(50):
            acceptance.observe(evidence, 1, 1)
        assert acceptance.chance(evidence) > 0.6
        for _ in range(50):
            acceptance.observe(evidence, 1, 0)
        assert acceptance.chance(evidence) < 0.4


def trained(price: Price, rights: dict[int, float], source: str = "lookup") -> DraftPolicy:
    """A policy that has timed every width and seen the share `rights[evidence]` of a source's tokens accepted."""
    policy = DraftPolicy()
    for width in (1, *range(QUERY_BLOCK, MOST + 2, QUERY_BLOCK)):
        policy.price.observe(width, 0.04 * price(width))
    for evidence, share in rights.items():
        for index in range(200):
            policy.acceptance[source].observe(evidence, 1, int(int((index + 1) * share) > int(index * share)))
    return policy


def copied(evidence: int, most: int = MOST) -> Draft:
    return Draft((1,) * most, "lookup", evidence)


def length_chosen(policy: DraftPolicy, evidence: int, most: int = MOST) -> int:
    """Of a copied draft, where there is nothing else to choose."""
    return len(policy.choose([Offer(copied(evidence, most))])[0].draft.tokens)


def rate(policy: DraftPolicy, source: str, evidence: int, length: int, price: float, sure: int) -> float:
    """Expected tokens over price, by the definition."""
    expected, reached = float(sure), 1.0
    for position in range(length):
        reached *= policy.acceptance[source].chance(evidence + position)
        expected += reached
    return expected / price


def best_length(policy: DraftPolicy, evidence: int, most: int) -> int:
    """The plain oracle for copies: every length's rate, the shortest of equals."""
    prices = [policy.price.relative(1 + length) for length in range(most + 1)]
    return max(range(most + 1), key=lambda length: rate(policy, "lookup", evidence, length, prices[length], 1))


def rates(policy: DraftPolicy, offer: Offer, price: Price, surcharge: float) -> dict[Choice, float]:
    """Of everything that a row could do."""
    found = {Choice(): 1.0}
    for draft in (offer.copied, offer.pending):
        for length in range(1, len(draft.tokens) + 1):
            paid = blocked(price, 1 + length)
            found[Choice(draft.shortened(length))] = rate(policy, draft.source, draft.evidence, length, paid, 1)
    for slots in range(1, offer.most_slots + 1):
        paid = (1 + surcharge) * blocked(price, 1 + slots)
        found[Choice(num_slots=slots)] = rate(policy, "mask", 0, slots, paid, 2)
    return found


def blocked(price: Price, width: int) -> float:
    """A pass has whole blocks of positions."""
    return price(round_up(width, QUERY_BLOCK) if width > 1 else 1)


rights = st.dictionaries(st.sampled_from(EVIDENCE), st.floats(0.0, 1.0))


class TestChoice:
    @given(
        steps=st.lists(st.floats(0.0, 0.5), min_size=16, max_size=16),
        rights=rights,
        evidence=st.integers(0, 16),
        most=st.integers(0, MOST),
    )
    def test_a_length_is_the_best_of_all(
        self, steps: list[float], rights: dict[int, float], evidence: int, most: int
    ) -> None:
        """Where a wider pass never costs less."""
        policy = trained(lambda width: 1 + sum(steps[: width - 1]), rights)
        assert length_chosen(policy, evidence, most) == best_length(policy, evidence, most)

    @given(
        slope=st.floats(0.0, 0.5),
        surcharge=st.floats(1.0, 2.0),
        copies=rights,
        slots=st.dictionaries(st.sampled_from((0, *EVIDENCE)), st.floats(0.0, 1.0)),
        evidence=st.integers(0, 16),
        num_accepted=st.integers(0, 8),
        most=st.integers(0, MOST),
    )
    def test_a_source_is_the_best_of_all(
        self,
        slope: float,
        surcharge: float,
        copies: dict[int, float],
        slots: dict[int, float],
        evidence: int,
        num_accepted: int,
        most: int,
    ) -> None:
        price = line(slope)
        policy = trained(price, copies)
        policy.acceptance["mask"] = trained(price, slots, "mask").acceptance["mask"]
        time_slots(policy, price, surcharge)
        for pending in (NO_DRAFT, Draft((2,) * (most // 2), "mask", num_accepted)):
            offer = Offer(copied(evidence, most), pending, most)
            found = rates(policy, offer, price, surcharge)
            chosen = policy.choose([offer])[0]
            probe = Choice(num_slots=min(QUERY_BLOCK - 1, most))
            if chosen != probe or max(found.values()) > 1 + 1e-9:
                assert found[chosen] == pytest.approx(max(found.values()), rel=1e-9)

    def test_is_plain_where_width_costs_as_much_as_passes(self) -> None:
        policy = trained(line(1.0), dict.fromkeys(EVIDENCE, 0.9))
        assert {length_chosen(policy, evidence) for evidence in EVIDENCE} == {0}

    def test_is_plain_where_nothing_is_accepted(self) -> None:
        policy = trained(line(0.02), dict.fromkeys(EVIDENCE, 0.0))
        assert {length_chosen(policy, evidence) for evidence in EVIDENCE} == {0}

    def test_is_long_where_width_is_cheap_and_copies_go_on(self) -> None:
        policy = trained(line(0.02), dict.fromkeys(EVIDENCE, 0.99))
        assert length_chosen(policy, 16) == MOST

    def test_grows_with_the_chance_and_shrinks_with_the_price(self) -> None:
        by_chance = [length_chosen(trained(packed, {8: share}), 8) for share in (0.1, 0.5, 0.8, 0.98)]
        by_price = [length_chosen(trained(line(slope), {8: 0.8}), 8) for slope in (0.01, 0.1, 0.3, 1.0)]
        assert by_chance == sorted(by_chance) and by_chance[0] < by_chance[-1]
        assert by_price == sorted(by_price, reverse=True) and by_price[0] > by_price[-1]

    def test_begins_with_a_plain_pass_unless_the_evidence_is_strong(self) -> None:
        assert length_chosen(DraftPolicy(), 1) == 0
        assert length_chosen(DraftPolicy(), 16) > 8
        assert DraftPolicy().choose([Offer(copied(1), most_slots=MOST)]) == [Choice()]

    def test_fresh_proposals_are_verified_before_new_ones_are_made(self) -> None:
        policy = trained(packed, dict.fromkeys((0, *EVIDENCE), 0.8), "mask")
        time_slots(policy, packed, 1.1)
        num_slots = policy.choose([Offer(most_slots=MOST)])[0].num_slots
        assert num_slots > 3
        pending = Draft((2,) * num_slots, "mask", 0)
        assert policy.choose([Offer(pending=pending, most_slots=MOST)])[0].draft.source == "mask"

    def test_a_sure_copy_beats_slots_and_slots_beat_a_weak_one(self) -> None:
        policy = trained(packed, {1: 0.1, 16: 0.99})
        policy.acceptance["mask"] = trained(packed, dict.fromkeys((0, *EVIDENCE), 0.8), "mask").acceptance["mask"]
        time_slots(policy, packed, 1.1)
        strong, weak = policy.choose([Offer(copied(each), most_slots=MOST) for each in (16, 1)])
        assert (len(strong.draft.tokens), strong.num_slots) == (MOST, 0)
        assert (weak.draft, weak.num_slots > 0) == (NO_DRAFT, True)

    @given(
        steps=st.lists(st.floats(0.0, 0.5), min_size=16, max_size=16),
        rights=rights,
        evidences=st.lists(st.sampled_from((0, *EVIDENCE)), min_size=2, max_size=6),
    )
    def test_rows_together_bring_as_much_as_at_any_common_width(
        self, steps: list[float], rights: dict[int, float], evidences: list[int]
    ) -> None:
        """Of the widths that rows would choose alone, and where a wider pass never costs less."""
        policy = trained(lambda width: 1 + sum(steps[: max(0, width - 1)]), rights)
        offers = [Offer(copied(evidence)) for evidence in evidences]
        alone = [policy.choose([offer])[0].draft for offer in offers]
        together = [choice.draft for choice in policy.choose(offers)]

        def brought(drafts: list[Draft]) -> float:
            price = policy.price.relative(1 + max(len(draft.tokens) for draft in drafts))
            expected = [rate(policy, "lookup", draft.evidence, len(draft.tokens), 1.0, 1) for draft in drafts]
            return sum(expected) / price

        cuts = {0, *(len(draft.tokens) for draft in alone)}
        assert brought(together) >= max(brought([draft.shortened(cut) for draft in alone]) for cut in cuts) - 1e-9

    def test_one_row_s_copy_is_not_paid_by_many(self) -> None:
        """Alone it is worth its price; beside seven rows without any it isn't."""
        policy = trained(line(0.15), {16: 0.99})
        busy, idle = Offer(copied(16)), Offer()
        assert len(policy.choose([busy])[0].draft.tokens) > 0
        assert all(choice == Choice() for choice in policy.choose([busy, *[idle] * 7]))
        assert all(len(choice.draft.tokens) > 0 for choice in policy.choose([busy] * 8))

    def test_prices_stand_while_a_few_rows_leave(self) -> None:
        policy = DraftPolicy()
        for num_rows, seconds in ((32, 0.04), (31, 0.04), (24, 0.04)):
            policy.observe([Offer()] * num_rows, [Choice()] * num_rows, [RowAdvance((5,))] * num_rows, seconds)
            assert policy.price.seconds(1) == seconds
        policy.observe([Offer()] * 23, [Choice()] * 23, [RowAdvance((5,))] * 23, 0.01)
        assert policy.price.seconds(1) == 0.01

    def test_rows_that_are_idle_probe_together(self) -> None:
        policy = DraftPolicy()
        for _ in range(60):
            policy.observe([Offer()] * 5, [Choice()] * 5, [RowAdvance((5,))] * 5, 0.04)
        idle, busy, waiting = (
            Offer(most_slots=MOST),
            Offer(copied(16), most_slots=MOST),
            Offer(pending=Draft((6,), "mask", 0), most_slots=MOST),
        )
        choices = policy.choose([idle, busy, waiting, idle, Offer(most_slots=2), Offer()])
        assert [choice.num_slots for choice in choices] == [3, 0, 0, 3, 2, 0]
        assert len(choices[1].draft.tokens) > 0


def time_slots(policy: DraftPolicy, price: Price, surcharge: float) -> None:
    """Let it time passes with slots of every width, the first of which counts for nothing."""
    for width in (1 + MOST, *range(QUERY_BLOCK, MOST + 2, QUERY_BLOCK)):
        seconds = 0.04 * surcharge * price(width)
        policy.observe([], [Choice(num_slots=width - 1)], [], seconds)


# Which of the slots behind a position would be right, by the tokens gained so far.
Slots = Callable[[int], Sequence[bool]]


def never(_gained: int) -> Sequence[bool]:
    return [False] * MOST


class Rows:
    """A policy's passes over one row in a world where a pass costs `price` and nothing else takes time.

    With `slots` there is a sidecar, whose draft passes cost `surcharge` times as much as others.
    """

    def __init__(self, price: Price, *, slots: Slots | None = None, surcharge: float = 1.1) -> None:
        self.policy = DraftPolicy()
        self.paid = 0.0
        self.gained = 0
        self.num_slots = 0
        self._price, self._slots, self._surcharge = price, slots, surcharge
        self._pending = NO_DRAFT
        self._total = 0

    def advance(self, copy: Draft, coming: Sequence[int]) -> tuple[int, ...]:
        """One pass, which may draft from `copy` where the base goes on with `coming`; gives what is committed."""
        room = len(coming) - 1
        most_slots = max(0, room - 1) if self._slots is not None else 0
        offer = Offer(copy.shortened(room), self._pending.shortened(room), most_slots)
        choice = self.policy.choose([offer])[0]
        accepted = agreement(choice.draft.tokens, coming)
        committed = tuple(coming[: accepted + 1])
        price = self._price(choice.width) * (self._surcharge if choice.num_slots else 1)
        row = RowAdvance(committed, len(choice.draft.tokens), accepted, choice.draft.source)
        self.policy.observe([offer], [choice], [row], 0.04 * price)
        self._pending = self._proposed(choice.num_slots, coming) or self._pending.behind(committed)
        self.paid += price
        self.gained += len(committed)
        self.num_slots += choice.num_slots
        self._total += len(committed)
        return committed

    def _proposed(self, num_slots: int, coming: Sequence[int]) -> Draft | None:
        if not num_slots or self._slots is None:
            return None
        right = self._slots(self._total)
        return Draft(tuple(coming[1 + i] if right[i] else -1 for i in range(num_slots)), "mask", 0)

    def continue_text(self, prompt: Sequence[int], text: Sequence[int]) -> None:
        """Decode all of `text` with copied drafts."""
        lookup, history, end = LookupDraft(), list(prompt), len(prompt) + len(text)
        whole = [*prompt, *text]
        while len(history) < end:
            history += self.advance(lookup.propose(history, MOST), whole[len(history) :][: MOST + 1])

    def continue_freely(self, num_tokens: int) -> float:
        """Decode so many tokens where nothing repeats; gives their rate."""
        self.rate()
        while self.gained < num_tokens:
            start = self._total
            self.advance(NO_DRAFT, range(start, start + min(MOST, num_tokens - self.gained - 1) + 1))
        return self.rate()

    def rate(self) -> float:
        """Tokens a one-token pass's price, since the last call."""
        rate, self.gained, self.paid = self.gained / max(self.paid, 1e-9), 0, 0.0
        return rate


class Read:
    """A policy's passes over one row where a drafter drafts, each of whose tokens costs `token_price` passes.

    It promises `promised` of every token, and with the chance `chance` keeps it, if those before were right.
    """

    def __init__(self, price: Price, *, promised: float, chance: Callable[[int], float], token_price: float) -> None:
        self.policy, self.num_drafted, self.num_tokens = DraftPolicy(), 0, 0
        self._price, self._promised, self._chance, self._token_price = price, promised, chance, token_price
        self._source = Random(11)

    def rate(self, num_tokens: int) -> float:
        """Tokens for the price of a one-token pass, over so many more of them."""
        paid, gained = 0.0, 0
        while gained < num_tokens:
            room = min(MOST, num_tokens - gained - 1)
            drafted, num_drafted = self._draft(room)
            paid += num_drafted * self._token_price
            offer = Offer(drafted=drafted)
            choice = self.policy.choose([offer])[0]
            coming = self._coming(drafted, room)
            accepted = agreement(choice.draft.tokens, coming)
            price = self._price(choice.width)
            row = RowAdvance(tuple(coming[: accepted + 1]), len(choice.draft.tokens), accepted, choice.draft.source)
            self.policy.observe([offer], [choice], [row], 0.04 * price)
            paid, gained = paid + price, gained + accepted + 1
        self.num_tokens += gained
        return gained / paid

    def _draft(self, room: int) -> tuple[Draft, int]:
        # Nothing was read before the first pass that it could start from.
        (most,) = self.policy.ask([NO_DRAFT], [room]) if self.policy.price.timed else (0,)
        confidence = [self._promised] if most else []
        while confidence and len(confidence) < most and self.policy.goes_on([confidence]):
            confidence.append(self._promised)
        draft = Draft((0,) * len(confidence), "shallow", 0, tuple(confidence)) if confidence else NO_DRAFT
        if confidence:
            self.policy.drafted([draft], 0.04 * self._token_price * len(confidence))
        self.num_drafted += len(confidence)
        return draft, len(confidence)

    def _coming(self, drafted: Draft, room: int) -> list[int]:
        right = 0
        while right < len(drafted.tokens) and self._source.random() < self._chance(self.num_tokens):
            right += 1
        return [0] * right + [1] * (room + 1 - right)


def best_rate_of_drafter(chance: float, price: Price, token_price: float) -> float:
    """By the best number of tokens."""
    found = [
        sum(chance**accepted for accepted in range(length + 1)) / (blocked(price, 1 + length) + length * token_price)
        for length in range(MOST + 1)
    ]
    return max(found)


class TestDrafter:
    """Where a drafter is asked; counted cost, its steps included."""

    @pytest.mark.parametrize("promised", [0.05, 0.5, 0.99])
    @pytest.mark.parametrize("price", [line(0.02), line(0.3), packed], ids=["line", "steep", "packed"])
    def test_one_that_is_always_wrong_costs_little_from_the_start(self, price: Price, promised: float) -> None:
        read = Read(price, promised=promised, chance=lambda _: 0.0, token_price=0.03)
        assert read.rate(64) >= 0.95
        assert read.rate(512) >= 0.97

    @pytest.mark.parametrize("chance", [0.1, 0.3, 0.5, 0.7, 0.9])
    @pytest.mark.parametrize("price", [line(0.02), packed], ids=["line", "packed"])
    def test_one_that_knows_itself_brings_most_of_what_it_can(self, price: Price, chance: float) -> None:
        read = Read(price, promised=chance, chance=lambda _: chance, token_price=0.03)
        best = best_rate_of_drafter(chance, price, 0.03)
        assert read.rate(2000) >= 0.87 * best

    @pytest.mark.parametrize("promised", [0.4, 0.9])
    def test_one_that_promises_too_little_or_too_much_still_pays(self, promised: float) -> None:
        read = Read(packed, promised=promised, chance=lambda _: 0.6, token_price=0.03)
        assert read.rate(2000) >= 0.9 * best_rate_of_drafter(0.6, packed, 0.03)

    def test_one_that_becomes_good_is_noticed_and_one_that_was_is_given_up(self) -> None:
        read = Read(packed, promised=0.8, chance=lambda num: 0.8 * (400 <= num < 1200), token_price=0.03)
        assert read.rate(400) >= 0.96
        read.rate(200)
        assert read.rate(600) >= 0.85 * best_rate_of_drafter(0.8, packed, 0.03)
        read.rate(100)
        assert read.rate(400) >= 0.96

    def test_is_not_asked_where_drafting_costs_as_much_as_passes(self) -> None:
        read = Read(packed, promised=0.6, chance=lambda _: 0.6, token_price=1.0)
        read.rate(100)
        before = read.num_drafted
        read.rate(500)
        assert read.num_drafted - before < 30

    def test_is_not_asked_about_rows_with_a_sure_copy(self) -> None:
        policy = trained(packed, {1: 0.1, 16: 0.99})
        asked = [copied(16), copied(1), NO_DRAFT], [MOST, MOST, 0]
        assert policy.ask(*asked) == [0, 3, 0]  # a first draft is short
        policy.drafted([Draft((0,), "shallow", 0, (0.9,))], 0.001)
        assert policy.ask(*asked) == [0, MOST, 0]

    def test_near_its_limit_a_row_is_not_expected_to_gain_more_than_it_has_room_for(self) -> None:
        policy = trained(packed, {4: 0.9, 1: 0.1})
        policy.drafted([Draft((0,) * 8, "shallow", 0, (0.9,) * 8)] * 8, 0.001)
        assert policy.ask([copied(4, 1), copied(1, 8)], [1, 8]) == [0, 8]

    def test_a_draft_ends_where_nobody_would_reach(self) -> None:
        policy = trained(packed, {})
        assert policy.goes_on([[0.9, 0.9], [0.1, 0.1]])
        assert not policy.goes_on([[0.2, 0.1], [0.1, 0.1]])


def always_wrong(rows: Rows, evidence: Iterable[int]) -> None:
    for each in evidence:
        rows.advance(Draft((1,) * MOST, "lookup", each), (0,) * (MOST + 1))


def with_chance(chance: float, seed: int) -> Slots:
    """Each slot is right with this chance if those before it are."""
    random = Random(seed)
    return lambda _gained: [random.random() < chance for _ in range(MOST)]


def best_rate(chance: float, price: Price, surcharge: float) -> float:
    """What somebody who knows the chance would get: plain decoding, or always the best number of slots."""
    both = [
        (1 + sum(chance**accepted for accepted in range(slots + 1))) / ((1 + surcharge) * price(1 + slots))
        for slots in range(1, MOST + 1)
    ]
    return max(1.0, *both)


# A trained sidecar, an untrained one, and none.
sidecars = st.sampled_from([None, never])
surcharges = st.floats(1.0, 1.5)


class TestWhatItCosts:
    """Counted cost: prices are known exactly, so that only choices count."""

    @share_of_profile(5, least=25)
    @given(
        slope=st.floats(0.0, 2.0),
        pattern=st.lists(st.sampled_from(EVIDENCE), min_size=1, max_size=8),
        slots=sidecars,
        surcharge=surcharges,
    )
    def test_drafts_of_which_nothing_is_accepted_are_given_up(
        self, slope: float, pattern: list[int], slots: Slots | None, surcharge: float
    ) -> None:
        rows = Rows(line(slope), slots=slots, surcharge=surcharge)
        always_wrong(rows, islice(cycle(pattern), 192))
        rows.rate()
        always_wrong(rows, islice(cycle(pattern), 256))
        assert rows.rate() >= 0.97

    @pytest.mark.parametrize("price", [line(0.02), line(0.3), packed], ids=["line", "steep", "packed"])
    @pytest.mark.parametrize("num_tokens", [16, 48, 64, 128, 512])
    def test_an_untrained_sidecar_costs_next_to_nothing_from_the_start(self, price: Price, num_tokens: int) -> None:
        rows = Rows(price, slots=never)
        assert rows.continue_freely(num_tokens) >= 0.97
        # It is probed, a few slots at a time.
        assert num_tokens < 64 or 0 < rows.num_slots <= num_tokens // 5

    @pytest.mark.parametrize("surcharge", [1.0, 1.5])
    @pytest.mark.parametrize("price", [line(0.02), packed], ids=["line", "packed"])
    def test_a_sidecar_that_becomes_good_is_noticed(self, price: Price, surcharge: float) -> None:
        rows = Rows(price, slots=lambda gained: [gained >= 400] * MOST, surcharge=surcharge)
        assert rows.continue_freely(400) >= 0.97
        rows.continue_freely(250)
        assert rows.continue_freely(200) >= 0.85 * best_rate(1.0, price, surcharge) > 2.5

    def test_a_sidecar_that_was_good_is_given_up(self) -> None:
        rows = Rows(packed, slots=lambda gained: [gained < 400] * MOST)
        assert rows.continue_freely(400) > 3
        assert rows.continue_freely(100) > 0.7
        assert rows.continue_freely(200) >= 0.97

    @share_of_profile(8, least=12)
    @given(seed=st.integers(0, 2**32), chance=st.floats(0.0, 1.0), slope=st.floats(0.01, 0.3), surcharge=surcharges)
    def test_regret_over_slots_is_bounded(self, seed: int, chance: float, slope: float, surcharge: float) -> None:
        """Whatever their chance: little less than plain decoding, and in the long run most of the best choice."""
        rows = Rows(line(slope), slots=with_chance(chance, seed), surcharge=surcharge)
        assert rows.continue_freely(300) >= 0.95
        rows.continue_freely(300)
        assert rows.continue_freely(600) >= max(0.96, 0.7 * best_rate(chance, line(slope), surcharge))

    @share_of_profile(8, least=12)
    @given(
        seed=st.integers(0, 2**32),
        period=st.integers(10, 200),
        slope=st.floats(0.01, 0.3),
        surcharge=surcharges,
    )
    def test_regret_is_bounded_where_slots_are_good_now_and_then(
        self, seed: int, period: int, slope: float, surcharge: float
    ) -> None:
        phase = Random(seed).randrange(2 * period)
        rows = Rows(
            line(slope),
            slots=lambda gained: [(gained + phase) // period % 2 == 0] * MOST,
            surcharge=surcharge,
        )
        assert rows.continue_freely(600) >= 0.95

    def test_slots_and_copies_take_turns(self) -> None:
        """A text half of which is copied, and a sidecar that is right about the other half."""
        random = Random(5)
        text = random.choices(range(10_000), k=150)
        new = [10_000 + index for index in range(150)]
        alone = Rows(packed)
        alone.continue_text(text, [*new, *text])
        both = Rows(packed, slots=with_chance(0.9, 5))
        both.continue_text(text, [*new, *text])
        assert both.rate() > 1.3 * alone.rate() > 1.3

    @pytest.mark.parametrize("price", [line(0.02), packed], ids=["line", "packed"])
    @pytest.mark.parametrize("evidence", EVIDENCE)
    def test_giving_up_costs_little(self, price: Price, evidence: int) -> None:
        rows = Rows(price)
        always_wrong(rows, [evidence] * 128)
        assert rows.rate() >= 0.97

    def test_text_that_never_repeats_costs_nothing(self) -> None:
        rows = Rows(packed)
        rows.continue_text([0], range(1, 200))
        assert rows.rate() == 1.0

    @share_of_profile(5, least=25)
    @given(seed=st.integers(0, 2**32), num_kinds=st.sampled_from([4, 16, 64, 256]))
    def test_chance_repetitions_cost_little(self, seed: int, num_kinds: int) -> None:
        """Random text: the last tokens have often occurred before, and what followed means nothing."""
        text = Random(seed).choices(range(num_kinds), k=512)
        rows = Rows(packed)
        rows.continue_text(text[:64], text[64:])
        assert rows.rate() >= 0.97

    @given(seed=st.integers(0, 2**32))
    def test_a_copied_text_comes_in_few_passes(self, seed: int) -> None:
        text = Random(seed).choices(range(500), k=200)
        rows = Rows(packed)
        rows.continue_text(text, text)
        assert rows.rate() >= 3.5

    def test_notices_that_a_text_begins_to_repeat_itself(self) -> None:
        rows = Rows(packed)
        always_wrong(rows, [3] * 200)
        assert length_chosen(rows.policy, 3) == 0
        # Each plain pass commits a token, and it was in the proposal that nobody drafted.
        for _ in range(8):
            rows.advance(Draft(tuple(range(MOST)), "lookup", 3), range(MOST + 1))
        assert length_chosen(rows.policy, 3) > 8

    @pytest.mark.parametrize("evidence", EVIDENCE)
    def test_notices_that_it_ends(self, evidence: int) -> None:
        rows = Rows(packed)
        for _ in range(100):
            rows.advance(Draft(tuple(range(MOST)), "lookup", evidence), range(MOST + 1))
        before = length_chosen(rows.policy, evidence)
        always_wrong(rows, [evidence] * 20)
        soon = length_chosen(rows.policy, evidence)
        always_wrong(rows, [evidence] * 60)
        assert before == MOST
        # Weak matches behind which copies had gone on for long are trusted longest.
        assert soon <= (MOST if evidence < 4 else 3)
        assert length_chosen(rows.policy, evidence) == 0

    def test_a_batch_that_shrinks_has_other_prices(self) -> None:
        policy, nothing, wide = DraftPolicy(), Offer(), Choice(copied(1, 3))
        for _ in range(4):
            policy.observe([nothing] * 2, [Choice()] * 2, [RowAdvance((5,))] * 2, 1.0)
            policy.observe([nothing] * 2, [wide] * 2, [RowAdvance((5, 6, 7, 8), drafted=3, accepted=3)] * 2, 4.0)
        assert policy.price.relative(4) == pytest.approx(4.0)
        policy.observe([nothing], [Choice()], [RowAdvance((5,))], 0.5)
        assert policy.price.relative(4) < 1.5
