"""Tensors by name, filled from others."""

import pytest
import torch

from deepen.core.errors import CheckpointError
from deepen.core.tensors import fill


def test_they_are_filled_in_place():
    own = {"a": torch.zeros(2), "b": torch.zeros(1, 3, requires_grad=True)}
    fill(own, {"b": torch.ones(1, 3), "a": torch.tensor([1.0, 2.0])}, what="x")
    assert own["a"].tolist() == [1.0, 2.0] and own["b"].tolist() == [[1.0] * 3]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, r"the y: missing a; missing b$"),
        ({"a": (2,), "b": (3,), "c": (1,)}, r"the y: unknown c; b is \[3\], expected \[1, 3\]$"),
        ({f"z{n}": (1,) for n in range(9)}, r"the y: missing a; missing b; unknown z0; .*; and 6 more$"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_copied(given, told):
    own = {"a": torch.zeros(2), "b": torch.zeros(1, 3)}
    with pytest.raises(CheckpointError, match=told):
        fill(own, {name: torch.ones(shape) for name, shape in given.items()}, what="the y")
    assert not any(tensor.any() for tensor in own.values())
