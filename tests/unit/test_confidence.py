"""Chances from confidences, and what a drafter is expected to bring and to take."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepen.generate.confidence import Calibration, Outlook

confidences = st.lists(st.floats(0.0, 1.0), max_size=8)


class TestCalibration:
    @given(observed=st.lists(st.tuples(confidences, st.integers(0, 8)), max_size=30), asked=confidences)
    def test_gives_chances(self, observed: list[tuple[list[float], int]], asked: list[float]) -> None:
        calibration = Calibration()
        for confidence, accepted in observed:
            calibration.observe(confidence, min(accepted, len(confidence)))
        chances, reach = calibration.chances(asked), calibration.reach(asked)
        assert all(0 <= chance < 1 for chance in chances)
        assert reach == sorted(reach, reverse=True) and len(reach) == len(asked)

    def test_believes_what_it_has_not_seen(self) -> None:
        assert Calibration().chances([0.2, 0.9]) == [0.2, 0.9]
        assert Calibration().reach([0.2, 0.9]) == pytest.approx([0.2, 0.18])

    @pytest.mark.parametrize("factor", [0.3, 0.8, 1.2])
    def test_learns_how_often_a_promise_is_kept(self, factor: float) -> None:
        source, calibration = Random(3), Calibration(fading=0.995)
        for _ in range(3000):
            promised = source.uniform(0.1, 0.8)
            calibration.observe([promised], int(source.random() < factor * promised))
        (chance,) = calibration.chances([0.5])
        assert chance == pytest.approx(0.5 * factor, abs=0.06)

    def test_finds_out_by_a_few_tokens_that_a_sure_drafter_is_wrong(self) -> None:
        calibration = Calibration()
        for _ in range(5):
            calibration.observe([0.9] * 5, 0)
        assert calibration.chances([0.9])[0] < 0.2

    def test_what_stands_behind_a_wrong_token_tells_nothing(self) -> None:
        one, other = Calibration(), Calibration()
        one.observe([0.5, 0.6, 0.7, 0.8], 1)
        other.observe([0.5, 0.6], 1)
        assert one.chances([0.5]) == other.chances([0.5])

    def test_forgets(self) -> None:
        calibration = Calibration()
        for _ in range(200):
            calibration.observe([0.5], 0)
        for _ in range(100):
            calibration.observe([0.5], 1)
        assert calibration.chances([0.5])[0] > 0.8


class TestOutlook:
    def test_expects_what_the_last_drafts_promised(self) -> None:
        outlook, calibration = Outlook(), Calibration()
        for _ in range(20):
            outlook.made([[0.5, 0.5]], 1.0)
        assert outlook.gain(calibration, 8) == pytest.approx(0.75)
        assert outlook.gain(calibration, 1) == pytest.approx(0.5)
        assert outlook.length == 2

    def test_expects_less_as_soon_as_less_came_true(self) -> None:
        outlook, calibration = Outlook(), Calibration()
        outlook.made([[0.9] * 8] * 20, 1.0)
        before = outlook.gain(calibration, 8)
        for _ in range(3):
            calibration.observe([0.9] * 8, 0)
        assert outlook.gain(calibration, 8) < 0.1 * before

    def test_a_token_costs_what_it_took(self) -> None:
        outlook = Outlook()
        before = outlook.price_of_token(0.04)
        outlook.made([[0.5] * 5], 1.0)  # the first pays for what is prepared
        assert outlook.price_of_token(0.04) == before
        for seconds in (0.3, 0.01, 0.02):
            outlook.made([[0.5] * 3, [0.5] * 5], seconds)
        assert outlook.price_of_token(0.04) == pytest.approx(0.05)
        assert outlook.price_of_token(None) == before
        outlook.forget_prices()
        outlook.made([[0.5] * 5], 3.0)  # a machine that was busy elsewhere
        assert outlook.price_of_token(0.04) == before
