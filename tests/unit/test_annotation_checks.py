"""The checker that all tests run under: does it look, and does it keep out of the way?"""

import random
from collections.abc import Sequence
from typing import Any, Protocol, Self

import pytest
import torch
from annotation_checks import check
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from deepen.core.hints import did_you_mean


class Chooser(Protocol):
    def choose(self) -> int: ...


class Grown:
    def grow(self, by: int) -> Self:
        return self


@jaxtyped(typechecker=check)
def mean(values: Float[Tensor, "B T"], scale: float = 1.0) -> Float[Tensor, "B"]:
    return values.mean(1) * scale


def test_deepen_itself_is_checked():
    with pytest.raises(TypeCheckError, match="parameter 'name'"):
        did_you_mean(3, ["a"])


def test_a_wrong_shape_is_seen():
    assert mean(torch.ones(2, 3)).tolist() == [1, 1]
    with pytest.raises(TypeCheckError, match="parameter 'values'"):
        mean(torch.ones(2))


def test_an_int_is_a_float():
    assert mean(torch.ones(2, 3), scale=2).tolist() == [2, 2]


def test_self_and_protocols_are_passed_over_and_the_rest_is_checked():
    def use(chooser: Chooser, others: Sequence[Chooser], count: int) -> Any:
        return count

    checked = jaxtyped(use, typechecker=check)
    assert checked(None, (), 3) == 3
    with pytest.raises(TypeCheckError, match="parameter 'count'"):
        checked(None, (), "3")

    grow = jaxtyped(Grown.grow, typechecker=check)
    grown = Grown()
    assert grow(grown, 3) is grown


def test_the_global_random_generator_is_left_alone():
    def total(values: list[int]) -> int:
        return sum(values)

    before = random.getstate()
    assert jaxtyped(total, typechecker=check)([1, 2, 3]) == 6
    assert random.getstate() == before
