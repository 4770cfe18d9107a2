"""The guard lets falling losses fall, and stops those that have risen for good."""

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepen.core.errors import CheckpointError, ConfigError
from deepen.train.guard import Diverged, DivergenceGuard, GuardConfig

seeds = st.integers(0, 2**32)
windows = st.integers(1, 60)


def trips_at(losses, config: GuardConfig | None = None) -> int | None:
    """The step, counted from 1, at which the guard stops these losses."""
    guard = DivergenceGuard(config)
    for step, loss in enumerate(losses, start=1):
        try:
            guard.take(loss, step=step)
        except Diverged:
            return step
    return None


class TestRule:
    @given(seeds, windows, st.floats(1e-6, 100.0), st.floats(0.9, 1.0), st.floats(1.1, 8.0))
    def test_a_falling_curve_never_trips_it_while_its_noise_is_below_the_factor(self, seed, window, top, fall, factor):
        draw = random.Random(seed)
        losses = [top * fall**step * draw.uniform(1.0, factor * 0.999) for step in range(400)]
        assert trips_at(losses, GuardConfig(window=window, factor=factor)) is None

    @given(seeds, windows, st.floats(0.1, 100.0), st.floats(1.5, 8.0))
    def test_a_curve_that_jumps_above_the_factor_trips_it_within_a_window(self, seed, window, low, factor):
        draw = random.Random(seed)
        quietest = max(0.5, 1 / factor)  # more noise than the factor is no noise
        before = [low * draw.uniform(quietest, 1.0) for _ in range(window + draw.randrange(100))]
        behind = [low * factor * draw.uniform(1.001, 5.0) for _ in range(window)]
        step = trips_at([*before, *behind], GuardConfig(window=window, factor=factor))
        assert step is not None and len(before) < step <= len(before) + window // 2 + 1

    @given(windows, st.integers(1, 300))
    def test_a_slow_climb_trips_it_within_a_window_of_having_passed_the_factor(self, window, num_steps):
        climb = [2.0 * 4.0 ** (step / num_steps) for step in range(num_steps + 1)]
        passed = next(step for step, loss in enumerate(climb) if loss > 6.0)
        step = trips_at([*[2.0] * window, *climb, *[8.0] * window], GuardConfig(window=window))
        assert step is not None and window + passed < step <= 2 * window + passed + 1

    @given(seeds, st.integers(3, 60))
    def test_spikes_in_less_than_half_a_window_change_nothing(self, seed, window):
        draw = random.Random(seed)
        losses = []
        for _ in range(5):
            part = [2.0] * (window - (window - 1) // 2) + [1e6] * ((window - 1) // 2)
            losses += [2.0] * window + draw.sample(part, window)
        assert trips_at(losses, GuardConfig(window=window)) is None

    def test_a_loss_near_zero_may_rise_below_the_floor(self):
        losses = [*[1e-4] * 50, *[0.29] * 50]
        assert trips_at(losses) is None
        assert trips_at([*losses, *[0.31] * 50]) is not None
        assert trips_at(losses, GuardConfig(floor=0.01)) is not None
        assert trips_at([*[0.0] * 50, *[1.0] * 50]) is not None

    def test_a_loss_that_was_below_zero_is_not_judged(self):
        assert trips_at([*[-2.0] * 50, *[100.0] * 100]) is None

    def test_nothing_is_judged_before_a_full_window(self):
        assert trips_at([1.0, *[50.0] * 49]) is None

    @pytest.mark.parametrize("loss", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_stops_at_once(self, loss):
        with pytest.raises(Diverged, match=f"the loss is {loss} at step 1; .* lower learning_rate"):
            DivergenceGuard().take(loss, step=1)

    def test_the_message_names_what_was_compared_and_a_way_out(self):
        guard = DivergenceGuard(GuardConfig(window=3))
        with pytest.raises(Diverged) as stopped:
            for step, loss in enumerate([2.0, 1.5, 1.0, 9.0, 9.5], start=11):
                guard.take(loss, step=step)
        assert str(stopped.value) == (
            "the loss has diverged: it is 9.5 at step 15, and the median of the last 3 is 9, more than 3 times 1.5 "
            "(the lowest such median was 1.5, at step 13); go on from a step before that with a lower learning_rate, "
            "a longer warmup_steps or a lower grad_clip"
        )


class TestState:
    @given(seeds, windows, st.integers(0, 200))
    def test_resumed_is_uninterrupted(self, seed, window, num_before):
        draw = random.Random(seed)
        losses = [draw.lognormvariate(0.0, 0.8) for _ in range(200)]
        config = GuardConfig(window=window, factor=1.5)
        whole = trips_at(losses, config)
        guard = DivergenceGuard(config)
        found = None
        for step, loss in enumerate(losses, start=1):
            if step == num_before:
                resumed = DivergenceGuard(config)
                resumed.load_state(json.loads(json.dumps(guard.state())))
                assert resumed.state() == guard.state()
                guard = resumed
            try:
                guard.take(loss, step=step)
            except Diverged:
                found = step
                break
        assert found == whole

    def test_the_state_of_a_wider_window_is_told(self):
        guard = DivergenceGuard()
        for step in range(60):
            guard.take(1.0, step=step)
        with pytest.raises(CheckpointError, match="looked at 50 losses, and window is 20"):
            DivergenceGuard(GuardConfig(window=20)).load_state(guard.state())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 0}, "window must be at least 1, not 0"),
        ({"factor": 1.0}, r"factor must be above 1, not 1\.0"),
        ({"floor": 0.0}, r"floor must be above 0, not 0\.0"),
    ],
)
def test_impossible_values_are_told(fields, message):
    with pytest.raises(ConfigError, match=message):
        DivergenceGuard(GuardConfig(**fields))
