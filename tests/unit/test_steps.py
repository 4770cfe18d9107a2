"""Steps tell what a loop over all rows at once would have told, however the tokens arrive."""

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepen.generate.steps import Steps

PAD = 99


class EndsRows:
    """Ends a row when its tokens add up to a multiple of `divisor`; keeps what it was shown."""

    def __init__(self, divisor: int) -> None:
        self.divisor = divisor
        self.shown: list[list[list[int]]] = []

    def __call__(self, ids: Tensor, scores: None) -> Tensor:
        self.shown.append(ids.tolist())
        return ids.sum(dim=1) % self.divisor == 0


def told_at_once(rows: list[list[int]], eos: set[int], pad: int | None, criteria: Any) -> list[list[int]]:
    """The steps of a loop that has one token of each row at a time."""
    ids = [[1] for _ in rows]
    running = [True] * len(rows)
    steps = []
    for tokens in zip(*rows, strict=True):
        step = [token if goes_on or pad is None else pad for token, goes_on in zip(tokens, running, strict=True)]
        ids = [[*row, token] for row, token in zip(ids, step, strict=True)]
        ended = criteria(torch.tensor(ids), None).tolist()
        running = [
            goes_on and token not in eos and not end for goes_on, token, end in zip(running, step, ended, strict=True)
        ]
        steps.append(step)
        if not any(running):
            break
    return steps


@given(data=st.data(), num_rows=st.integers(1, 4), pad=st.sampled_from([None, PAD]), divisor=st.integers(2, 12))
def test_any_order_of_arrival(data: st.DataObject, num_rows: int, pad: int | None, divisor: int) -> None:
    tokens = st.lists(st.integers(0, 9), min_size=8, max_size=8)
    rows = data.draw(st.lists(tokens, min_size=num_rows, max_size=num_rows))
    eos = data.draw(st.sets(st.integers(0, 9), max_size=2)) if pad is not None else set()
    theirs, ours = EndsRows(divisor), EndsRows(divisor)
    expected = told_at_once(rows, eos, pad, theirs)

    steps = Steps(torch.ones(num_rows, 1, dtype=torch.int64), eos_ids=list(eos), pad_id=pad, criteria=ours)
    left = [list(row) for row in rows]
    told = []
    while any(left):
        row = data.draw(st.sampled_from([row for row in range(num_rows) if left[row]]))
        size = data.draw(st.integers(1, 4))
        told += [step.tolist() for step in steps.after(row, left[row][:size])]
        left[row] = left[row][size:]
    assert told == expected
    assert ours.shown == theirs.shown


def test_a_step_waits_only_for_rows_that_go_on() -> None:
    steps = Steps(torch.zeros(2, 1, dtype=torch.int64), eos_ids=[5], pad_id=PAD)
    assert list(steps.after(0, [5])) == []
    assert [step.tolist() for step in steps.after(1, [1, 2])] == [[5, 1], [PAD, 2]]
    assert not steps.ended
    assert [step.tolist() for step in steps.after(1, [5, 3])] == [[PAD, 5]]
    assert steps.ended
