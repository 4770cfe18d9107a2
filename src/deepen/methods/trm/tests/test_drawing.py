"""Draws of outer steps: their range, their mean, and that a seed makes them."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepen.core.errors import CannotTrain
from deepen.core.types import Batch
from deepen.methods.trm.config import TRMConfig
from deepen.methods.trm.drawing import draw_halting_step, draw_outer_steps, drawn_for

NUM_DRAWS = 4000


def config(**fields: Any) -> TRMConfig:
    made = TRMConfig(use_trm=True, **fields)
    made.check()
    return made


def draws(**fields: Any) -> list[int]:
    torch.manual_seed(0)
    made = config(**fields)
    return [draw_outer_steps(made) for _ in range(NUM_DRAWS)]


def test_a_fixed_number_is_not_drawn():
    state = torch.get_rng_state()
    assert {draw_outer_steps(config(trm_T=4)) for _ in range(9)} == {4}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("fields", "most"), [({"trm_T": 3}, 5), ({"trm_T": 3, "T_max": 9}, 9), ({"trm_T": 1}, 1)])
def test_uniform_draws_are_each_as_likely(fields, most):
    found = torch.bincount(torch.tensor(draws(T_sampling="uniform", **fields)), minlength=most + 1)
    assert found[0] == 0 and len(found) == most + 1
    expected = NUM_DRAWS / most
    assert ((found[1:] - expected).abs() < 5 * expected**0.5).all()


@pytest.mark.parametrize("mean", [1, 2, 6])
def test_lognormal_poisson_draws_have_their_mean_and_a_long_tail(mean):
    found = torch.tensor(draws(T_sampling="lognormal_poisson", trm_T=mean), dtype=torch.float64)
    assert found.min() >= 1
    # Variance of the mixture: the mean rate, and the spread of rates.
    rate = mean - 1
    deviation = (rate + rate**2 * (torch.tensor(0.25).exp() - 1)) ** 0.5
    assert abs(found.mean() - mean) <= 4 * deviation / NUM_DRAWS**0.5
    assert abs(found.std() - deviation) <= 0.1 * deviation
    assert mean < 3 or found.max() > 2 * mean


def test_the_most_is_kept_to():
    found = draws(T_sampling="lognormal_poisson", trm_T=4, T_max=6)
    assert max(found) == 6 and min(found) == 1


@given(st.integers(0, 2**31), st.sampled_from(["uniform", "lognormal_poisson"]))
def test_a_seed_draws_the_same_again(seed, kind):
    found = []
    for _ in range(2):
        torch.manual_seed(seed)
        found.append([draw_outer_steps(config(T_sampling=kind, trm_T=5)) for _ in range(5)])
    assert found[0] == found[1]


def hard(*difficulties: list[int], learned: list[list[bool]] | None = None) -> Batch:
    told = torch.tensor(difficulties)
    return Batch(
        torch.zeros_like(told),
        torch.full((len(told),), told.shape[1]),
        learned=None if learned is None else torch.tensor(learned),
        difficulty=told,
    )


class TestByDifficulty:
    def test_each_token_gets_what_its_document_needs(self):
        drawn = drawn_for(config(T_sampling="task"), hard([3, 3, 3], [5, 5, 0]))
        assert drawn.own_outer is not None and drawn.own_outer.tolist() == [[3, 3, 3], [5, 5, 1]]
        assert drawn.num_outer == 5
        assert drawn.mean_outer.total == 16 and drawn.mean_outer.count == 4

    def test_the_most_bounds_what_a_document_asks_for(self):
        drawn = drawn_for(config(T_sampling="task", T_max=4), hard([3, 3], [1500, 1500]))
        assert drawn.own_outer is not None and drawn.own_outer.tolist() == [[3, 3], [4, 4]]

    def test_no_more_steps_are_made_than_predicted_tokens_need(self):
        drawn = drawn_for(config(T_sampling="task"), hard([9, 9, 9, 2, 2], learned=[[False] * 4 + [True]]))
        assert drawn.own_outer is not None and drawn.own_outer.tolist() == [[2] * 5]
        assert drawn.num_outer == 2

    def test_a_fixed_point_draws_from_there_to_the_most(self):
        torch.manual_seed(0)
        batch = hard([1] * NUM_DRAWS, [4] * NUM_DRAWS, [8] * NUM_DRAWS)
        drawn = drawn_for(config(T_sampling="fixed_point", T_max=6), batch)
        assert drawn.own_outer is not None
        for row, (least, most) in zip(drawn.own_outer, [(1, 6), (4, 6), (6, 6)], strict=True):
            found = torch.bincount(row, minlength=most + 1)
            expected = NUM_DRAWS / (most - least + 1)
            assert not found[:least].any() and len(found) == most + 1
            assert ((found[least:] - expected).abs() < 5 * expected**0.5).all()

    @pytest.mark.parametrize("batch", [replace(hard([2, 2]), difficulty=None), hard([2, 2], [0, 0])])
    def test_data_that_does_not_tell_is_refused(self, batch):
        with pytest.raises(CannotTrain, match=r"T_sampling task .* set T_sampling to uniform"):
            drawn_for(config(T_sampling="task"), batch)

    def test_what_is_not_predicted_need_not_tell(self):
        batch = hard([0, 0, 4, 4], learned=[[False, False, False, True]])
        assert drawn_for(config(T_sampling="task"), batch).num_outer == 4

    def test_rows_take_their_own_steps_with_them(self):
        drawn = drawn_for(config(T_sampling="task"), hard([3, 3, 3], [5, 5, 5])).rows([0])
        assert drawn.own_outer is not None and drawn.own_outer.tolist() == [[3, 3, 3]]
        # As all rows of the step.
        assert drawn.num_outer == 5


def test_the_halting_head_is_asked_after_every_step_but_the_last():
    torch.manual_seed(0)
    assert {draw_halting_step(4) for _ in range(100)} == {1, 2, 3}
    assert draw_halting_step(2) == draw_halting_step(1) == 1
