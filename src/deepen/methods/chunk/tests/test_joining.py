"""Rows that come to a running decoding and leave it, in exact mode with every draft; refined mode refuses them."""

from functools import cache
from typing import Any

import pytest
import torch
from comings import CAPACITY, MOST_ROWS, Request, advance, alone, assert_bits, requests, served
from effort import share_of_profile
from hypothesis import given
from hypothesis import strategies as st

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.core.errors import CannotJoin
from deepen.core.method import Joining
from deepen.core.types import Prompt
from deepen.generate.plain import PlainDecoder
from deepen.methods.chunk.model import ChunkRefineWrapper

DRAFTER = {"drafter_hidden": 24, "draft_vocab": 200}
SOURCES: list[dict[str, Any]] = [
    *({"draft": draft} for draft in ("ar", "lookup", "jacobi", "mask")),
    {"draft": "shallow", **DRAFTER},
    {"draft": "lookup", "cache_reset_policy": "reset_all"},
]
BY_THE_CLOCK: list[dict[str, Any]] = [{"draft": "auto"}, {"draft": "auto", **DRAFTER}]


@cache
def backbone() -> Backbone:
    attached = Backbone.attach(tiny.build("llama").requires_grad_(False))
    attached.pack()
    return attached


@cache
def wrapper(**fields: Any) -> ChunkRefineWrapper:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        settings = {"recursive_enabled": True, "chunk_width": 6, "d_state": 16, "gate_hidden": 16}
        model = ChunkRefineWrapper(backbone().model, **(settings | fields))
        with torch.no_grad():
            for tensor in model.saved_state().values():
                if tensor.is_floating_point():
                    tensor.normal_(std=0.5)
    return model


@share_of_profile(2, least=12)
@given(source=st.sampled_from([*SOURCES, *BY_THE_CLOCK]), asked=requests, data=st.data())
def test_any_coming_and_going_gives_each_row_the_bits_of_plain_decoding(
    source: dict[str, Any], asked: list[Request], data: st.DataObject
) -> None:
    model = wrapper(**source)
    for ours, request in zip(served(model, asked, data), asked, strict=True):
        assert_bits(ours, alone(PlainDecoder(backbone()), request))


def opened(model: ChunkRefineWrapper, *prompts: list[int]) -> Any:
    return model.open(Prompt(tuple(map(tuple, prompts)), 20, CAPACITY))


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_drafts_go_with_their_rows(source: dict[str, Any]) -> None:
    """What is proposed next in each row is what would be proposed if it had never been joined or moved."""
    model, prompts = wrapper(**source), [[1, 2, 3] * 4, [9, 8] * 5, [7]]
    apart = [opened(model, prompt) for prompt in prompts]
    together = opened(model, prompts[0])
    running = [Request(prompt, 20) for prompt in prompts]
    for number, decoding in enumerate(apart):
        for _ in range(5 - number):
            advance(model, decoding, [Request([], 20)])
    for number in range(5):
        if number in (1, 2):
            model.join(together, opened(model, prompts[number]), most_rows=MOST_ROWS)
        advance(model, together, running[: min(3, number + 1)])
    order = [2, 0, 1]
    model.keep(together, order)
    for place, row in enumerate(order):
        assert together.rows[place] == apart[row].rows[0]
        assert together.pending[place] == apart[row].pending[0]
        history = together.rows[place]
        for ours, theirs in ((together.lookups, apart[row].lookups), (together.guesses, apart[row].guesses)):
            assert ours[place].propose(history, 5) == theirs[0].propose(history, 5)
        assert (together.tops[place] is None) == (apart[row].tops[0] is None) == (source["draft"] != "shallow")
        if together.tops[place] is not None:
            torch.testing.assert_close(together.tops[place], apart[row].tops[0], rtol=1e-5, atol=1e-5)


def test_a_row_that_has_not_passed_yet_is_drafted_for_from_its_second_pass_on() -> None:
    model = wrapper(draft="shallow", **DRAFTER)
    together = opened(model, [1, 2, 3])
    advance(model, together, [Request([1, 2, 3], 20)])
    model.join(together, opened(model, [4, 5]), most_rows=2)
    rows = [model.advance(together, Plain()).rows for _ in range(2)]
    assert [[row.drafted for row in each] for each in rows] == [[5, 0], [5, 5]]


class Plain:
    """Chooses the best."""

    def choose(self, row: int, logits: torch.Tensor, history: object, drafted: object) -> list[int]:
        return logits.argmax(dim=-1).tolist()


def test_what_passes_cost_is_what_the_running_decoding_has_measured() -> None:
    model = wrapper(draft="auto")
    decoding = opened(model, [1, 2, 3])
    policy = decoding.policy
    model.join(decoding, opened(model, [4]), most_rows=2)
    assert decoding.policy is policy


def test_refined_mode_says_that_none_can_join() -> None:
    model = wrapper(commit_mode="refined")
    assert isinstance(model, Joining)
    decoding = opened(model, [1, 2], [3, 4, 5])
    with pytest.raises(CannotJoin, match=r'commit_mode is "refined".*set commit_mode to "exact"'):
        model.join(decoding, opened(model, [6]), most_rows=3)
    with pytest.raises(CannotJoin, match="commit_mode"):
        model.feed(decoding, [6])
    with pytest.raises(CannotJoin, match="commit_mode"):
        model.check_joining()
    wrapper().check_joining()


def test_refined_rows_may_change_places() -> None:
    model = wrapper(commit_mode="refined", carry_state=True)
    decoding, turned = (opened(model, [1, 2, 3], [4, 5], [6]) for _ in range(2))
    for each in (decoding, turned):
        advance(model, each, [Request([], 20)] * 3)
    model.keep(turned, [2, 0])
    for each in (decoding, turned):
        advance(model, each, [Request([], 20)] * len(each.rows))
    assert turned.rows == [decoding.rows[2], decoding.rows[0]]
