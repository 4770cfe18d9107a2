"""transformers' own `generate` says what our decoding says: theirs with its kernels, ours packed and unpacked.

Kernels of different shapes round differently, so two decodings may part where the base's choice was a near-tie; that
is the only excuse.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from effort import share_of_profile
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.data.tokenizer import EOS_ID, PAD_ID, byte_tokenizer
from deepen.evaluate.agreement import NEAR_TIE_MARGIN, NEAR_TIE_MARGIN_RECURRENT, compare
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.generate.stop import StopConfig
from deepen.methods.chunk.model import ChunkRefineWrapper

ATTENTION_ONLY = ("llama", "qwen3", "nanochat")
RECURRENT = ("kimi_linear", "qwen3_next")
ALL = (*ATTENTION_ONLY, *RECURRENT)
TOKENIZER = byte_tokenizer()
PROMPT = list(b"The lamp is lit. The boat comes in. The lamp is")
LOOP = list(b"one two one two one two one")
NUM_NEW = 24

every_model = pytest.mark.parametrize("name", ALL)
prompts = st.lists(st.integers(0, 255), min_size=1, max_size=24)
loops = st.builds(lambda unit, times: unit * times, st.lists(st.integers(0, 255), min_size=1, max_size=6), st.just(4))


@cache
def reference(name: str) -> PreTrainedModel:
    """The model that transformers runs; ours is another one with the same weights."""
    return tiny.build(name)


@cache
def backbone(name: str, *, packed: bool) -> Backbone:
    attached = Backbone.attach(tiny.build(name).requires_grad_(False))
    if packed:
        attached.pack()
    return attached


def generate(
    name: str, rows: Sequence[list[int]], *, eos: Sequence[int] = (EOS_ID,), **options: Any
) -> list[list[int]]:
    """New tokens of each row by transformers, up to its end; rows are padded on the left."""
    width = max(map(len, rows))
    padded = torch.tensor([[PAD_ID] * (width - len(row)) + row for row in rows])
    is_real = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    output = reference(name).generate(
        padded,
        attention_mask=is_real,
        do_sample=False,
        max_new_tokens=options.pop("max_new_tokens", NUM_NEW),
        eos_token_id=list(eos),
        pad_token_id=PAD_ID,
        **options,
    )
    return [_until_end(row, eos) for row in output[:, width:].tolist()]


def _until_end(tokens: list[int], eos: Sequence[int]) -> list[int]:
    """What stands behind the end is padding, which rows of one batch get until the last has ended."""
    ends = [index + 1 for index, token in enumerate(tokens) if token in eos]
    return tokens[: ends[0]] if ends else tokens


def decode(
    decoder: Any, rows: Sequence[list[int]], *, sampling: SamplingConfig | None = None, **stop: Any
) -> list[list[int]]:
    stop_config = StopConfig(**{"max_new_tokens": NUM_NEW, "eos_ids": (EOS_ID,), **stop})
    results = complete(decoder, rows, sampling=sampling, stop=stop_config, tokenizer=TOKENIZER)
    return [result.tokens for result in results]


def assert_plain_gives(
    name: str,
    rows: Sequence[list[int]],
    theirs: Sequence[list[int]],
    *,
    sampling: SamplingConfig | None = None,
    **stop: Any,
) -> None:
    for packed in (False, True):
        decoder = PlainDecoder(backbone(name, packed=packed))
        assert_same(name, rows, decode(decoder, rows, sampling=sampling, **stop), theirs, sampling)


def assert_chunks_give(
    name: str,
    rows: Sequence[list[int]],
    theirs: Sequence[list[int]],
    *,
    draft: str = "lookup",
    sampling: SamplingConfig | None = None,
    **stop: Any,
) -> None:
    for packed in (False, True):
        model = ChunkRefineWrapper(
            backbone(name, packed=packed).model, recursive_enabled=True, draft=draft, chunk_width=8, d_state=8
        )
        assert_same(name, rows, decode(model, rows, sampling=sampling, **stop), theirs, sampling)


def assert_same(
    name: str,
    rows: Sequence[list[int]],
    ours: Sequence[list[int]],
    theirs: Sequence[list[int]],
    sampling: SamplingConfig | None,
) -> None:
    """Equal, or parted by a near-tie of the unpacked base."""
    limit = NEAR_TIE_MARGIN_RECURRENT if name in RECURRENT else NEAR_TIE_MARGIN
    for row, our_tokens, their_tokens in zip(rows, ours, theirs, strict=True):
        verdict = compare(backbone(name, packed=False), row, our_tokens, their_tokens, sampling=sampling)
        assert verdict.equal or verdict.margin < limit, f"{verdict}: {our_tokens} against {their_tokens}"


@every_model
def test_greedy(name: str) -> None:
    theirs = generate(name, [PROMPT])
    assert len(set(theirs[0])) > NUM_NEW // 4  # a text that repeats one token would prove little
    assert_plain_gives(name, [PROMPT], theirs)


@share_of_profile(3, least=8)
@given(name=st.sampled_from(ALL), row=st.one_of(prompts, loops))
def test_any_prompt(name: str, row: list[int]) -> None:
    assert_plain_gives(name, [row], generate(name, [row], max_new_tokens=12), max_new_tokens=12)


@every_model
@pytest.mark.parametrize("penalty", [1.3, 0.6])
def test_repetition_penalty(name: str, penalty: float) -> None:
    theirs = generate(name, [LOOP], repetition_penalty=penalty)
    assert theirs != generate(name, [LOOP])
    assert_plain_gives(name, [LOOP], theirs, sampling=SamplingConfig(repetition_penalty=penalty))


@every_model
def test_ends_at_any_of_several_ids(name: str) -> None:
    tokens = generate(name, [PROMPT])[0]
    late = [token for index, token in enumerate(tokens) if index >= 8 and token not in tokens[:index]]
    eos = (late[1], late[0])
    theirs = generate(name, [PROMPT], eos=eos)
    assert theirs[0][-1] == late[0] and 8 < len(theirs[0]) < NUM_NEW
    assert_plain_gives(name, [PROMPT], theirs, eos_ids=eos)


@every_model
def test_ends_with_a_stop_string(name: str) -> None:
    tokens = generate(name, [PROMPT])[0]
    pairs = [bytes(pair).decode() for pair in pairwise(tokens) if all(32 < token < 127 for token in pair)]
    stop_strings = (pairs[-1], "not in the text")
    theirs = generate(name, [PROMPT], stop_strings=list(stop_strings), tokenizer=TOKENIZER)
    assert bytes(theirs[0][-2:]).decode() == pairs[-1]
    assert_plain_gives(name, [PROMPT], theirs, stop_strings=stop_strings)


@every_model
def test_two_prompts_of_one_length(name: str) -> None:
    rows = [PROMPT, PROMPT[::-1]]
    first, second = generate(name, rows)
    eos = (next(token for token in first[5:] if token not in second),)
    theirs = generate(name, rows, eos=eos)
    assert len(theirs[0]) < len(theirs[1]) == NUM_NEW
    assert_plain_gives(name, rows, theirs, eos_ids=eos)


@every_model
def test_prompts_of_different_lengths(name: str) -> None:
    rows = [PROMPT[:9], LOOP, PROMPT[-1:], PROMPT]
    theirs = generate(name, rows)
    assert_plain_gives(name, rows, theirs)
    assert_chunks_give(name, rows, theirs)


@every_model
@pytest.mark.parametrize("draft", ["lookup", "jacobi", "mask", "auto"])
def test_exact_chunks(name: str, draft: str) -> None:
    for row in (PROMPT, LOOP):
        assert_chunks_give(name, [row], generate(name, [row]), draft=draft)


@every_model
def test_exact_chunks_end_where_theirs_do(name: str) -> None:
    eos = (generate(name, [LOOP])[0][9],)
    assert_chunks_give(name, [LOOP], generate(name, [LOOP], eos=eos), eos_ids=eos)


@pytest.mark.parametrize("name", ATTENTION_ONLY)  # transformers refuses to draft on the others
def test_exact_chunks_against_their_prompt_lookup(name: str) -> None:
    for row in (PROMPT, LOOP):
        assert_chunks_give(name, [row], generate(name, [row], prompt_lookup_num_tokens=7))


@share_of_profile(3, least=8)
@given(name=st.sampled_from(ALL), row=loops, penalty=st.sampled_from([1.0, 1.2]))
def test_exact_chunks_on_any_loop(name: str, row: list[int], penalty: float) -> None:
    theirs = generate(name, [row], repetition_penalty=penalty, max_new_tokens=12)
    assert_chunks_give(name, [row], theirs, sampling=SamplingConfig(repetition_penalty=penalty), max_new_tokens=12)


SAMPLINGS = [
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.7, top_k=12),
    SamplingConfig(temperature=1.4, top_p=0.8),
    SamplingConfig(temperature=1.2, min_p=0.03),
    SamplingConfig(temperature=1.5, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.3),
]
NUM_DRAWS = 2000
LEAST_EXPECTED = 5.0


@torch.no_grad()
@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_sampled_tokens_are_distributed_as_theirs(sampling: SamplingConfig) -> None:
    """Pearson's chi-square over the tokens expected often enough; the rarer ones count as one."""
    expected = NUM_DRAWS * their_scores(sampling).double().softmax(dim=0)
    counts = torch.bincount(torch.tensor(our_draws(sampling)), minlength=len(expected)).double()

    assert counts[expected == 0].sum() == 0
    common = expected >= LEAST_EXPECTED
    counts = torch.cat([counts[common], counts[~common].sum()[None]])
    expected = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = ((counts - expected).square() / expected)[expected > 0].sum()
    freedom = (expected > 0).sum() - 1.0
    assert freedom >= 3
    assert torch.special.gammaincc(freedom / 2, statistic.float() / 2) > 0.01


def their_scores(sampling: SamplingConfig) -> torch.Tensor:
    """The scores `[V]` of the token behind PROMPT that transformers draws from: processed and filtered."""
    prompt = torch.tensor([PROMPT])
    output = reference("llama").generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=1,
        pad_token_id=PAD_ID,
        do_sample=True,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p or None,
        repetition_penalty=sampling.repetition_penalty,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return output.scores[0][0]


def our_draws(sampling: SamplingConfig) -> list[int]:
    """The token behind PROMPT under each of the first NUM_DRAWS seeds."""
    base = backbone("llama", packed=True)
    logits = base.run(torch.tensor([PROMPT]), base.new_cache(batch_size=1, capacity=len(PROMPT)), keep="last")[0]
    sampler = BatchSampler([replace(sampling, seed=seed) for seed in range(NUM_DRAWS)])
    return [sampler.choose(row, logits, PROMPT, [])[0] for row in range(NUM_DRAWS)]
