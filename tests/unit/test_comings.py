"""Rows that come to a running decoding and leave it: plain decoding, and what is refused."""

from functools import cache

import pytest
from comings import Request, advance, alone, assert_bits, requests, served
from effort import share_of_profile
from hypothesis import event, given
from hypothesis import strategies as st

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.core.errors import PromptError, RollbackError
from deepen.core.method import Joining
from deepen.core.types import Prompt
from deepen.evaluate.agreement import NEAR_TIE_MARGIN_RECURRENT, compare
from deepen.generate.plain import PlainDecoder
from deepen.generate.verify import PREFILL_WIDTH


@cache
def backbone(name: str = "llama") -> Backbone:
    attached = Backbone.attach(tiny.build(name).requires_grad_(False))
    attached.pack()
    return attached


def plain(name: str = "llama") -> PlainDecoder:
    return PlainDecoder(backbone(name))


def test_it_meets_the_protocol() -> None:
    assert isinstance(plain(), Joining)


@share_of_profile(3, least=8)
@given(name=st.sampled_from(["llama", "qwen3"]), asked=requests, data=st.data())
def test_any_coming_and_going_gives_each_row_the_bits_it_has_alone(
    name: str, asked: list[Request], data: st.DataObject
) -> None:
    for ours, request in zip(served(plain(name), asked, data), asked, strict=True):
        assert_bits(ours, alone(plain(name), request))


@share_of_profile(8, least=3)
@given(asked=requests, data=st.data())
def test_states_of_recurrent_layers_come_and_go_too(asked: list[Request], data: st.DataObject) -> None:
    """Up to near-ties: their kernels round by the width of a pass, and so by the pieces of a prompt."""
    decoder = plain("kimi_linear")
    for ours, request in zip(served(decoder, asked, data), asked, strict=True):
        tokens = alone(decoder, request).tokens[: len(ours.tokens)]
        if ours.tokens:
            base = backbone("kimi_linear")
            verdict = compare(base, request.prompt, ours.tokens, tokens, sampling=request.sampling)
            event("equal" if verdict.equal else "near-tie")
            assert verdict.equal or verdict.margin < NEAR_TIE_MARGIN_RECURRENT, str(verdict)


def test_a_row_without_entries_joins_and_is_joined() -> None:
    """No pass was run over prompts of one token."""
    short, long = Request([7], 3), Request([1, 2, 3, 4], 3)
    for asked in ([short, long], [long, short], [short, short.again()]):
        for name in ("llama", "kimi_linear"):
            decoder, running = plain(name), [request.again() for request in asked]
            decoding, other = (decoder.open(Prompt((tuple(r.prompt),), r.num_new, 16)) for r in running)
            decoder.join(decoding, other, most_rows=2)
            for _ in range(3):
                advance(decoder, decoding, running)
            assert [request.tokens for request in running] == [alone(decoder, r).tokens for r in asked]


def test_a_prompt_that_was_fed_is_as_one_that_was_opened() -> None:
    prompt = tuple(token * 7 % 256 for token in range(PREFILL_WIDTH + 40))
    at_once = plain().open(Prompt((prompt,), 5, 400))
    decoding = plain().open(Prompt((prompt[:3],), 5, 400))
    fed = [plain().feed(decoding, piece) for piece in (prompt[3:20], (), prompt[20:])]
    assert (decoding.rows, decoding.limits) == (at_once.rows, at_once.limits)
    assert decoding.cache.lengths == at_once.cache.lengths
    assert [(spent.passes, spent.positions) for spent in fed] == [(1, 17), (0, 0), (2, len(prompt) - 20)]
    assert decoding.prefill.positions == at_once.prefill.positions == len(prompt) - 1


def test_memory_is_as_large_as_the_capacity() -> None:
    one = plain().open(Prompt(((1, 2, 3),), 5, 300))
    assert one.cache.capacity == 300
    assert plain().open(Prompt(((1, 2, 3),), 5)).cache.capacity == 8


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(PromptError, match=r"prompt 1 has 4 tokens; with max_new_tokens 5 .* capacity of 8"):
        plain().open(Prompt(((1, 2), (1, 2, 3, 4)), 5, 8))
    with pytest.raises(PromptError, match="capacity is 513, but this model's context is 512"):
        plain().open(Prompt(((1, 2),), 5, 513))
    decoding = plain().open(Prompt(((1, 2),), 5, 8))
    with pytest.raises(PromptError, match=r"with 2 tokens more .* are 9, .* capacity of 8"):
        plain().feed(decoding, [3, 4])
    with pytest.raises(PromptError, match="id 999, outside"):
        plain().feed(decoding, [999])
    assert (decoding.rows, decoding.limits, decoding.cache.lengths) == ([[1, 2]], [7], [1])
    plain().feed(decoding, [3])
    plain().join(decoding, plain().open(Prompt(((4,),), 5, 8)), most_rows=2)
    with pytest.raises(RollbackError, match="this decoding has 2 rows"):
        plain().feed(decoding, [5])


def test_a_join_that_is_refused_changes_nothing() -> None:
    decoding = plain().open(Prompt(((1, 2),), 5, 8))
    with pytest.raises(RollbackError, match="room for 9 tokens can't join those with room for 8"):
        plain().join(decoding, plain().open(Prompt(((4,),), 5, 9)), most_rows=2)
    with pytest.raises(RollbackError, match="3 rows are more than most_rows, 2"):
        plain().join(decoding, plain().open(Prompt(((4,), (5,)), 5, 8)), most_rows=2)
    assert (decoding.rows, decoding.limits, decoding.cache.lengths) == ([[1, 2]], [7], [1])
