"""Rows that come to a running decoding and leave it, with a refiner at every place."""

from typing import Any

import pytest
import torch
from comings import CAPACITY, Request, alone, assert_close, requests, served
from effort import share_of_profile
from hypothesis import given
from hypothesis import strategies as st
from trm_models import KINDS, base, model

from deepen.core.errors import RollbackError
from deepen.core.method import Joining
from deepen.core.types import Prompt
from deepen.generate.plain import PlainDecoder


@share_of_profile(3, least=8)
@given(
    kind=st.sampled_from(KINDS),
    halting=st.sampled_from([{}, {"halt": "delta", "halt_threshold": 0.4, "trm_T": 4}]),
    asked=requests,
    data=st.data(),
)
def test_any_coming_and_going_gives_each_row_what_it_has_alone(
    kind: dict[str, Any], halting: dict[str, Any], asked: list[Request], data: st.DataObject
) -> None:
    made = model(**kind, **halting)
    assert isinstance(made, Joining)
    for ours, request in zip(served(made, asked, data), asked, strict=True):
        assert_close(ours, alone(made, request), tolerance=1e-8)


def test_rows_that_were_read_without_the_refiner_are_refused() -> None:
    made = model(base(dtype=torch.float64), mixing="evidence")
    prompt = Prompt(((1, 2, 3),), 4, CAPACITY)
    bare = PlainDecoder(made.backbone).open(prompt)
    with pytest.raises(RollbackError, match="entries of the refiner at the head"):
        made.join(made.open(prompt), bare, most_rows=2)
