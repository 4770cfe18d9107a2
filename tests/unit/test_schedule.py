"""Learning-rate factors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepen.train.schedule import Schedule


def factors(schedule: Schedule) -> list[float]:
    return [schedule.factor(step) for step in range(schedule.num_steps)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule("constant", 4), [1, 1, 1, 1]),
        (Schedule("constant", 4, warmup_steps=2), [0.5, 1, 1, 1]),
        (Schedule("linear", 4), [1, 0.75, 0.5, 0.25]),
        (Schedule("linear", 6, warmup_steps=2, floor=0.2), [0.5, 1, 1, 0.8, 0.6, 0.4]),
        (Schedule("cosine", 4), [1, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4]),
        (Schedule("trapezoid", 6, warmup_steps=1, decay_steps=2), [1, 1, 1, 1, 1, 0.5]),
        (Schedule("trapezoid", 4, decay_steps=4, floor=0.5), [1, 0.875, 0.75, 0.625]),
        (Schedule("trapezoid", 3), [1, 1, 1]),
    ],
)
def test_by_hand(schedule, expected):
    assert factors(schedule) == pytest.approx(expected)


@given(st.integers(1, 60), st.integers(0, 20), st.integers(0, 20), st.floats(0, 1), st.data())
def test_it_rises_in_the_warm_up_and_never_after_it(num_steps, warmup_steps, decay_steps, floor, data):
    shape = data.draw(st.sampled_from(["constant", "linear", "cosine", "trapezoid"]))
    found = factors(Schedule(shape, num_steps, warmup_steps, decay_steps, floor))
    assert all(0 < factor <= 1 for factor in found[:warmup_steps])
    assert found[:warmup_steps] == sorted(found[:warmup_steps])
    behind = found[warmup_steps:]
    assert behind == sorted(behind, reverse=True)
    assert all(floor - 1e-12 <= factor <= 1 for factor in behind)


@given(st.integers(2, 60), st.integers(1, 20))
def test_a_trapezoids_plateau_is_that_of_every_longer_one(num_steps, decay_steps):
    short = Schedule("trapezoid", num_steps, 1, min(decay_steps, num_steps - 1))
    long = Schedule("trapezoid", 10 * num_steps, 1, decay_steps)
    plateau = num_steps - short.decay_steps
    assert factors(short)[:plateau] == factors(long)[:plateau]
