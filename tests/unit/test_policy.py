"""Draft lengths: what a policy learns of prices and chances, and that what it chooses pays."""

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice
from random import Random

import pytest
from effort import share_of_profile
from hypothesis import given
from hypothesis import strategies as st

from deepen.core.types import RowAdvance
from deepen.generate.drafts import Draft, LookupDraft
from deepen.generate.policy import Acceptance, PassPrice, WidthPolicy
from deepen.generate.verify import agreement
from deepen.nn.attention import QUERY_BLOCK

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


def trained(price: Price, rights: dict[int, float]) -> WidthPolicy:
    """A policy that has timed every width and seen the share `rights[evidence]` of drafted tokens accepted."""
    policy = WidthPolicy()
    for width in (1, *range(QUERY_BLOCK, MOST + 2, QUERY_BLOCK)):
        policy.price.observe(width, 0.04 * price(width))
    for evidence, share in rights.items():
        for index in range(200):
            policy.acceptance.observe(evidence, 1, int(int((index + 1) * share) > int(index * share)))
    return policy


def best_length(policy: WidthPolicy, evidence: int, most: int) -> int:
    """The plain oracle: every length's expected tokens over its price, the shortest of equals."""

    def rate(length: int) -> float:
        expected = reached = 1.0
        for position in range(length):
            reached *= policy.acceptance.chance(evidence + position)
            expected += reached
        return expected / policy.price.relative(length + 1)

    return max(range(most + 1), key=rate)


class TestLength:
    @given(
        steps=st.lists(st.floats(0.0, 0.5), min_size=16, max_size=16),
        rights=st.dictionaries(st.sampled_from(EVIDENCE), st.floats(0.0, 1.0)),
        evidence=st.integers(0, 16),
        most=st.integers(0, MOST),
    )
    def test_is_the_best_of_all(self, steps: list[float], rights: dict[int, float], evidence: int, most: int) -> None:
        """Where a wider pass never costs less."""
        policy = trained(lambda width: 1 + sum(steps[: width - 1]), rights)
        length = policy.length(evidence, most)
        assert 0 <= length <= most
        assert length == best_length(policy, evidence, most)

    def test_is_zero_where_width_costs_as_much_as_passes(self) -> None:
        policy = trained(line(1.0), dict.fromkeys(EVIDENCE, 0.9))
        assert {policy.length(evidence, MOST) for evidence in EVIDENCE} == {0}

    def test_is_zero_where_nothing_is_accepted(self) -> None:
        policy = trained(line(0.02), dict.fromkeys(EVIDENCE, 0.0))
        assert {policy.length(evidence, MOST) for evidence in EVIDENCE} == {0}

    def test_is_long_where_width_is_cheap_and_copies_go_on(self) -> None:
        policy = trained(line(0.02), dict.fromkeys(EVIDENCE, 0.99))
        assert policy.length(16, MOST) == MOST

    def test_grows_with_the_chance_and_shrinks_with_the_price(self) -> None:
        by_chance = [trained(packed, {8: share}).length(8, MOST) for share in (0.1, 0.5, 0.8, 0.98)]
        by_price = [trained(line(slope), {8: 0.8}).length(8, MOST) for slope in (0.01, 0.1, 0.3, 1.0)]
        assert by_chance == sorted(by_chance) and by_chance[0] < by_chance[-1]
        assert by_price == sorted(by_price, reverse=True) and by_price[0] > by_price[-1]

    def test_begins_with_a_plain_pass_unless_the_evidence_is_strong(self) -> None:
        assert WidthPolicy().length(1, MOST) == 0
        assert WidthPolicy().length(16, MOST) > 8


class Rows:
    """A policy's passes over one row in a world where a pass costs `price` and nothing else takes time."""

    def __init__(self, price: Price) -> None:
        self.policy = WidthPolicy()
        self.paid = 0.0
        self.gained = 0
        self._price = price

    def advance(self, copy: Draft, coming: Sequence[int]) -> tuple[int, ...]:
        """One pass, which may draft from `copy` where the base goes on with `coming`; gives what is committed."""
        length = self.policy.length(copy.evidence, min(len(copy.tokens), len(coming) - 1))
        accepted = agreement(copy.tokens[:length], coming)
        committed = tuple(coming[: accepted + 1])
        price = self._price(1 + length)
        self.policy.observe([copy], [RowAdvance(committed, length, accepted, copy.source)], 0.04 * price)
        self.paid += price
        self.gained += len(committed)
        return committed

    def continue_text(self, prompt: Sequence[int], text: Sequence[int]) -> None:
        """Decode all of `text` with copied drafts."""
        lookup, history, end = LookupDraft(), list(prompt), len(prompt) + len(text)
        whole = [*prompt, *text]
        while len(history) < end:
            history += self.advance(lookup.propose(history, MOST), whole[len(history) :][: MOST + 1])

    def rate(self) -> float:
        """Tokens a one-token pass's price, since the last call."""
        rate, self.gained, self.paid = self.gained / self.paid, 0, 0.0
        return rate


def always_wrong(rows: Rows, evidence: Iterable[int]) -> None:
    for each in evidence:
        rows.advance(Draft((1,) * MOST, "lookup", each), (0,) * (MOST + 1))


class TestWhatItCosts:
    """Counted cost: prices are known exactly, so that only choices count."""

    @share_of_profile(5, least=25)
    @given(
        slope=st.floats(0.0, 2.0),
        pattern=st.lists(st.sampled_from(EVIDENCE), min_size=1, max_size=8),
    )
    def test_drafts_of_which_nothing_is_accepted_are_given_up(self, slope: float, pattern: list[int]) -> None:
        rows = Rows(line(slope))
        always_wrong(rows, islice(cycle(pattern), 192))
        rows.rate()
        always_wrong(rows, islice(cycle(pattern), 256))
        assert rows.rate() >= 0.97

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
        assert rows.policy.length(3, MOST) == 0
        # Each plain pass commits a token, and it was in the proposal that nobody drafted.
        for _ in range(8):
            rows.advance(Draft(tuple(range(MOST)), "lookup", 3), range(MOST + 1))
        assert rows.policy.length(3, MOST) > 8

    @pytest.mark.parametrize("evidence", EVIDENCE)
    def test_notices_that_it_ends(self, evidence: int) -> None:
        rows = Rows(packed)
        for _ in range(100):
            rows.advance(Draft(tuple(range(MOST)), "lookup", evidence), range(MOST + 1))
        before = rows.policy.length(evidence, MOST)
        always_wrong(rows, [evidence] * 20)
        soon = rows.policy.length(evidence, MOST)
        always_wrong(rows, [evidence] * 60)
        assert before == MOST
        # Weak matches behind which copies had gone on for long are trusted longest.
        assert soon <= (MOST if evidence < 4 else 3)
        assert rows.policy.length(evidence, MOST) == 0

    def test_a_batch_that_shrinks_has_other_prices(self) -> None:
        policy = WidthPolicy()
        nothing = Draft((), "lookup", 0)
        for _ in range(4):
            policy.observe([nothing] * 2, [RowAdvance((5,))] * 2, 1.0)
            policy.observe([nothing] * 2, [RowAdvance((5, 6, 7, 8), drafted=3, accepted=3)] * 2, 4.0)
        assert policy.price.relative(4) == pytest.approx(4.0)
        policy.observe([nothing], [RowAdvance((5,))], 0.5)
        assert policy.price.relative(4) < 1.5
