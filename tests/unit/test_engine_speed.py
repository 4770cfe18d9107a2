"""What is told of an engine's speed: figures from rounds that are written down here, and real ones on small models."""

from collections import Counter
from functools import partial

import pytest
import torch
from mor_models import method

from deepen.core.types import Spent
from deepen.engine.request import Request
from deepen.engine.runner import Statistics
from deepen.evaluate.engine_speed import (
    Answers,
    Arm,
    answer,
    figures,
    ideal_ratio,
    ratio,
    time_arms,
    under_load,
)
from deepen.generate.stop import StopConfig


def written(seconds: float, *, tokens: tuple[tuple[int, ...], ...] = ((1, 2), (3, 4)), layers: int = 40) -> Answers:
    statistics = Statistics(4, Spent(5, 10, layers), Counter({3: 4, 8: 1}), Counter({2: 2}))
    return Answers(tokens, seconds, statistics, most_bytes=77)


def test_figures_are_medians_and_counts() -> None:
    found = figures([written(1.0), written(2.0), written(4.0)], slots=2)
    assert found == {
        "tokens_per_second": {"median": 2.0, "low": 1.0, "high": 4.0},
        "tokens_per_call": 4 / 5,
        "utilisation": 20 / 5 / 2,
        "applications": 4.0,
        "tokens_per_head": 2.0,
        "most_bytes": 77,
    }


def test_a_ratio_is_that_of_medians_with_the_spread_of_rounds() -> None:
    mine, plain = [written(s) for s in (1.0, 1.0, 2.0)], [written(s) for s in (2.0, 4.0, 4.0)]
    assert ratio(mine, plain) == {"ratio": 4.0, "low": 2.0, "high": 4.0}


def test_the_ideal_counts_layers_and_head() -> None:
    """Of the plain model 4 layers a token and a head; the other applies 2.5."""
    plain = Arm("plain", method(num_recursions=1, num_hidden_layers=4), method(num_recursions=1).backbone)
    whole, head = (
        plain.decoder.flops(num_positions=1, context=9, num_logits=1),
        plain.decoder.flops(num_positions=1, context=9, num_logits=1)
        - plain.decoder.flops(num_positions=1, context=9, num_logits=0),
    )
    shortened = (whole - head) * 2.5 / 4 + head
    found = ideal_ratio(written(1.0, layers=25), plain, written(1.0, layers=40), context=9)
    assert found == pytest.approx(whole / shortened)


REQUESTS = [Request((place, 2, 3), stop=StopConfig(max_new_tokens=4)) for place in range(5)]


@pytest.fixture(scope="module")
def arms() -> list[Arm]:
    made = {
        "plain": method(num_recursions=1, num_hidden_layers=4, dtype=torch.float32),
        "deep": method(dtype=torch.float32),
    }
    return [Arm(name, model, model.backbone) for name, model in made.items()]


def test_arms_take_turns_and_say_the_same_in_every_round(arms: list[Arm]) -> None:
    told: list[int] = []
    found = time_arms(arms, REQUESTS, slots=3, rounds=2, done=told.append)
    assert sum(told) == 2 * 3
    for arm in arms:
        alone = answer(arm, REQUESTS, slots=1)
        assert [each.tokens for each in found[arm.name]] == [alone.tokens] * 2
        assert found[arm.name][0].num_tokens == 5 * 4
        assert found[arm.name][0].speed > 0
    plain = found["plain"][0].statistics.spent
    assert plain.layer_applications == 4 * plain.positions


def test_latencies_are_those_of_requests_that_come_one_by_one(arms: list[Arm]) -> None:
    measured = partial(under_load, arms[1], REQUESTS, slots=2)
    found = measured(per_second=200.0)
    assert set(found) == {"to_first", "to_last", "per_token"}
    for values in found.values():
        assert 0 < values["p50"] <= values["p90"] <= values["p99"]
    assert found["to_first"]["p50"] < found["to_last"]["p50"]
