"""One verify pass: what of any draft is committed, what the cache holds then, and how prompts are read."""

from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.core.types import Advance, Prompt
from deepen.generate.drafts import NO_DRAFT, Draft
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.generate.stop import StopConfig
from deepen.generate.verify import PREFILL_WIDTH, Decoding, agreement, open_decoding, read, verify

PROMPT = (5, 9, 2, 7)
NUM_NEW = 12


@cache
def backbone(name: str = "llama") -> Backbone:
    attached = Backbone.attach(tiny.build(name).requires_grad_(False))
    attached.pack()
    return attached


@cache
def greedy(prompt: tuple[int, ...] = PROMPT) -> list[int]:
    """What plain decoding says behind it."""
    return complete(PlainDecoder(backbone()), [prompt], stop=StopConfig(max_new_tokens=NUM_NEW))[0].tokens


def greedy_sampler(num_rows: int = 1) -> BatchSampler:
    return BatchSampler([SamplingConfig()] * num_rows)


def draft(tokens: Sequence[int]) -> Draft:
    return Draft(tuple(tokens), source="test", evidence=0)


def wrong(token: int) -> int:
    return (token + 1) % 256


@given(pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=8))
def test_agreement_is_the_common_beginning(pairs: list[tuple[int, int]]) -> None:
    drafted, emitted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    length = agreement(drafted, [*emitted, 7])
    assert drafted[:length] == emitted[:length]
    assert length == len(pairs) or drafted[length] != emitted[length]


@given(length=st.integers(0, NUM_NEW - 2), data=st.data())
def test_what_is_committed_of_any_draft(length: int, data: st.DataObject) -> None:
    """The part of it that the base agrees with, and the base's own next token."""
    expected = greedy()
    num_right = data.draw(st.integers(0, length))
    tokens = [*expected[:num_right], *map(wrong, expected[num_right:length])]
    decoding = open_decoding(backbone(), Prompt((PROMPT,), NUM_NEW))
    advance = verify(backbone(), decoding, [draft(tokens)], greedy_sampler())
    row = advance.rows[0]
    assert list(row.tokens) == expected[: num_right + 1]
    assert (row.drafted, row.accepted, row.source) == (length, num_right, "test")
    assert (advance.spent.passes, advance.spent.positions) == (1, 1 + length)
    # The cache holds all that is committed but the last token, which the next pass reads first.
    assert decoding.rows == [[*PROMPT, *row.tokens]]
    assert decoding.cache.lengths == [len(decoding.rows[0]) - 1]
    assert decoding.room(0) == NUM_NEW - len(row.tokens)


def test_a_right_token_behind_a_wrong_one_is_not_committed() -> None:
    expected = greedy()
    tokens = [expected[0], wrong(expected[1]), *expected[2:6]]
    decoding = open_decoding(backbone(), Prompt((PROMPT,), NUM_NEW))
    row = verify(backbone(), decoding, [draft(tokens)], greedy_sampler()).rows[0]
    assert list(row.tokens) == expected[:2]


def test_rows_are_judged_each_by_its_own_draft() -> None:
    prompts = (PROMPT, (8, 8), (1, 2, 3, 4, 5, 6))
    expected = [greedy(prompt) for prompt in prompts]
    decoding = open_decoding(backbone(), Prompt(prompts, NUM_NEW))
    drafts = [draft(expected[0][:5]), NO_DRAFT, draft([expected[2][0], wrong(expected[2][1]), 0])]
    advance = verify(backbone(), decoding, drafts, greedy_sampler(3))
    assert [len(row.tokens) for row in advance.rows] == [6, 1, 2]
    assert [list(row.tokens) for row in advance.rows] == [expected[0][:6], expected[1][:1], expected[2][:2]]
    assert advance.spent.positions == 6 + 1 + 4
    decoding.drop([1])
    assert decoding.rows == [[*prompts[0], *expected[0][:6]], [*prompts[2], *expected[2][:2]]]
    assert decoding.cache.lengths == [len(row) - 1 for row in decoding.rows]
    rest = verify(backbone(), decoding, [NO_DRAFT] * 2, greedy_sampler(2))
    assert [list(row.tokens) for row in rest.rows] == [expected[0][6:7], expected[2][2:3]]


class Trusting(PlainDecoder):
    """Drafts the base's own next tokens, so that each pass commits several at once."""

    def __init__(self, expected: Sequence[int], width: int) -> None:
        super().__init__(backbone())
        self._expected, self._width = list(expected), width

    def advance(self, decoding: Decoding, sampler: BatchSampler) -> Advance:
        start = len(decoding.rows[0]) - len(PROMPT)
        tokens = self._expected[start : start + min(self._width, decoding.room(0)) - 1]
        return verify(backbone(), decoding, [draft(tokens)], sampler)


@pytest.mark.parametrize("width", [2, 3, 5, 12])
@pytest.mark.parametrize("end", range(1, NUM_NEW))
def test_an_end_inside_an_accepted_draft_is_the_last_token(width: int, end: int) -> None:
    expected = greedy()
    stop = StopConfig(max_new_tokens=NUM_NEW, eos_ids=(expected[end],))
    first = expected.index(expected[end])
    result = complete(Trusting(expected, width), [PROMPT], stop=stop)[0]
    assert result.tokens == expected[: first + 1]
    assert result.reason == "eos"
    assert result.passes == -(-(first + 1) // width)


@pytest.mark.parametrize("num_new", [0, 1, 4])
@pytest.mark.parametrize("length", [1, 2, PREFILL_WIDTH, PREFILL_WIDTH + 1, PREFILL_WIDTH + 2, 500])
def test_a_prompt_is_read_but_for_its_last_token(length: int, num_new: int) -> None:
    prompt = tuple(token % 250 for token in range(length))
    decoding = open_decoding(backbone(), Prompt((prompt,), num_new))
    assert decoding.cache.lengths == [length - 1]
    assert (decoding.prefill.passes, decoding.prefill.positions) == (-(-(length - 1) // PREFILL_WIDTH), length - 1)
    assert decoding.limits == [length + num_new]


@torch.no_grad()
def test_a_prompt_read_in_parts_is_the_prompt_read_at_once() -> None:
    ids = [token * 7 % 256 for token in range(2 * 180)]

    def logits(parts: Sequence[Sequence[int]]) -> Tensor:
        cache = backbone().new_cache(batch_size=1, capacity=len(ids) + 1)
        for part in parts:
            read(backbone(), cache, [part])
        return backbone().run(torch.tensor([[0]]), cache)

    assert torch.equal(logits([ids]), logits([ids[:101], ids[101:]]))
    assert not torch.equal(logits([ids]), logits([ids[1:]]))
