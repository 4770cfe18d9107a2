"""On bases with recurrent layers: both modes, every draft and policy, and nothing but committed tokens in a state.

Their kernels round by the width of a pass, and experts by who else visits them, so ids are equal up to near-ties, of
which there may be few.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from effort import share_of_profile
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

from deepen.backbones import tiny
from deepen.backbones.cache import PrefixCache
from deepen.backbones.hf import Backbone
from deepen.core.types import Batch, Prompt
from deepen.evaluate.agreement import NEAR_TIE_MARGIN_RECURRENT, compare
from deepen.generate.drafts import Draft
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.generate.scoring import score_at_once
from deepen.generate.stop import StopConfig
from deepen.generate.verify import open_decoding, verify
from deepen.methods.chunk.model import ChunkRefineWrapper

BASES = ("kimi_linear", "qwen3_next")
DRAFTS = ("ar", "lookup", "jacobi", "mask", "auto", "shallow")
DRAFTER = {"drafter_hidden": 24, "draft_vocab": 200}
SOURCES: list[dict[str, Any]] = [*({"draft": draft} for draft in DRAFTS), {"draft": "auto", **DRAFTER}]
POLICIES = ("keep_kda_recurrent_reset_mla", "reset_all")
TOLERANCE = 1e-4


@cache
def backbone(name: str) -> Backbone:
    attached = Backbone.attach(tiny.build(name).requires_grad_(False))
    attached.pack()
    return attached


@cache
def wrapper(name: str, *, noise: float = 0.0, **fields: Any) -> ChunkRefineWrapper:
    settings = {"recursive_enabled": True, "chunk_width": 8, "d_state": 16, "gate_hidden": 16, "max_chunk_len": 128}
    if fields.get("draft") == "shallow":
        settings |= DRAFTER
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = ChunkRefineWrapper(backbone(name).model, **(settings | fields))
        if noise:
            with torch.no_grad():
                for tensor in model.saved_state().values():
                    if tensor.is_floating_point():
                        tensor.normal_(std=noise)
    return model


prompts = st.lists(st.integers(0, 255), min_size=1, max_size=30)
loops = st.builds(lambda unit, times: unit * times, st.lists(st.integers(0, 255), min_size=1, max_size=6), st.just(5))
samplings = st.one_of(
    st.just(SamplingConfig()),
    st.builds(
        SamplingConfig,
        temperature=st.sampled_from([0.5, 1.0]),
        top_p=st.sampled_from([1.0, 0.9]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        seed=st.integers(0, 99),
    ),
)


def assert_same(
    name: str,
    rows: Sequence[Sequence[int]],
    ours: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    samplings: Sequence[SamplingConfig],
) -> None:
    """Row by row equal, or parted at a near-tie, which hypothesis counts (`--hypothesis-show-statistics`)."""
    for row, our_tokens, their_tokens, sampling in zip(rows, ours, theirs, samplings, strict=True):
        verdict = compare(backbone(name), row, our_tokens, their_tokens, sampling=sampling)
        event("equal" if verdict.equal else "near-tie")
        assert verdict.equal or verdict.margin < NEAR_TIE_MARGIN_RECURRENT, (
            f"{verdict}: {our_tokens} against {their_tokens}"
        )


@share_of_profile(5, least=10)
@given(
    name=st.sampled_from(BASES),
    noise=st.sampled_from([0.0, 5.0]),
    source=st.sampled_from(SOURCES),
    chunk_width=st.sampled_from([1, 2, 5, 8, 70]),
    policy=st.sampled_from(POLICIES),
    rows=st.lists(st.one_of(prompts, loops), min_size=1, max_size=4),
    sampling=samplings,
    max_new_tokens=st.integers(1, 24),
)
def test_exact_mode_gives_the_plain_output(
    name: str,
    noise: float,
    source: dict[str, Any],
    chunk_width: int,
    policy: str,
    rows: list[list[int]],
    sampling: SamplingConfig,
    max_new_tokens: int,
) -> None:
    model = wrapper(name, noise=noise, chunk_width=chunk_width, cache_reset_policy=policy, **source)
    samplings, stop = [sampling] * len(rows), StopConfig(max_new_tokens=max_new_tokens)
    plain = complete(PlainDecoder(backbone(name)), rows, sampling=samplings, stop=stop)
    exact = complete(model, rows, sampling=samplings, stop=stop)
    assert_same(name, rows, [row.tokens for row in exact], [row.tokens for row in plain], samplings)
    for result in exact:
        assert result.passes <= len(result.tokens) or policy == "reset_all"


@pytest.mark.parametrize("name", BASES)
def test_any_part_of_a_draft_is_accepted(name: str) -> None:
    """Random models rarely repeat themselves, so here drafts are right as far as we want them to be."""
    base, prompts = backbone(name), [[1, 2, 3], [4, 5]]
    plain = [row.tokens for row in complete(PlainDecoder(base), prompts, stop=StopConfig(max_new_tokens=30))]
    decoding, sampler = (
        open_decoding(base, Prompt(tuple(map(tuple, prompts)), 30)),
        BatchSampler([SamplingConfig()] * 2),
    )
    for num_right in (3, 2, 1, 0, 3, 0):
        drafts = []
        for row, (prompt, tokens) in enumerate(zip(prompts, plain, strict=True)):
            done = len(decoding.rows[row]) - len(prompt)
            right = num_right if row == 0 else 3 - num_right
            wrong = (tokens[done + right] + 1) % 256
            drafts.append(Draft((*tokens[done : done + right], wrong, wrong), source="lookup", evidence=0))
        advance = verify(base, decoding, drafts, sampler)
        assert [len(row.tokens) for row in advance.rows] == [num_right + 1, 4 - num_right]
    for ids, prompt, tokens in zip(decoding.rows, prompts, plain, strict=True):
        assert ids == [*prompt, *tokens[: len(ids) - len(prompt)]]
        assert len(ids) > len(prompt) + 12


@share_of_profile(10, least=8)
@given(
    name=st.sampled_from(BASES),
    rows=st.lists(st.one_of(prompts, loops), min_size=1, max_size=3),
    sampling=samplings,
    policy=st.sampled_from(POLICIES),
    max_new_tokens=st.integers(1, 16),
)
def test_untrained_refined_mode_gives_the_plain_output(
    name: str, rows: list[list[int]], sampling: SamplingConfig, policy: str, max_new_tokens: int
) -> None:
    model = wrapper(name, commit_mode="refined", cache_reset_policy=policy)
    samplings, stop = [sampling] * len(rows), StopConfig(max_new_tokens=max_new_tokens)
    plain = complete(PlainDecoder(backbone(name)), rows, sampling=samplings, stop=stop)
    refined = complete(model, rows, sampling=samplings, stop=stop)
    assert_same(name, rows, [row.tokens for row in refined], [row.tokens for row in plain], samplings)


def assert_is_fresh_prefill(cache: PrefixCache, base: Backbone, rows: Sequence[Sequence[int]]) -> None:
    """Entries, states and windows are those of reading `rows` at once."""
    assert cache.lengths == [len(row) for row in rows]
    for place, row in enumerate(rows):
        if not row:
            continue
        fresh = base.new_cache(batch_size=1, capacity=len(row))
        base.run(torch.tensor([list(row)]), fresh)
        fresh.commit([len(row)])
        for layer in cache.recurrent_layers:
            for held, expected in zip(cache.state(layer), fresh.state(layer), strict=True):
                close(held[place], expected[0])
        for held, expected in zip(cache.entries(3, place), fresh.entries(3, 0), strict=True):
            close(held, expected)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=TOLERANCE, atol=TOLERANCE * max(1.0, float(expected.abs().max())))


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(
    "fields",
    [
        *SOURCES,
        *({"commit_mode": "refined", "draft": draft, "use_latent_token": True} for draft in ("ar", "mask")),
        {"commit_mode": "refined", "cache_reset_policy": "reset_all"},
        {"commit_mode": "refined", "cache_reset_policy": "keep_all"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:cache_reset_policy keep_all")
def test_after_every_commit_the_cache_is_a_fresh_prefill(name: str, fields: dict[str, Any]) -> None:
    """With noise in every cell: neither slots nor [Z] nor a rejected or refined token is in a state."""
    model, rows = wrapper(name, noise=0.5, **fields), [[5, 6, 5, 6, 5, 6, 5], [9, 8, 7]]
    decoding = model.open(Prompt(tuple(map(tuple, rows)), 20))
    sampler = BatchSampler([SamplingConfig()] * 2)
    while min(decoding.room(row) for row in (0, 1)) > 0:
        model.advance(decoding, sampler)
        # What was committed last is read at the beginning of the next step.
        unread = [len(tokens) for tokens in getattr(decoding, "unread", ([0], [0]))]
        held = [ids[: len(ids) - num] for ids, num in zip(decoding.rows, unread, strict=True)]
        assert_is_fresh_prefill(decoding.cache, backbone(name), held)


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
def test_what_slots_hold_reaches_no_clean_position(name: str) -> None:
    base, tokens = backbone(name), torch.arange(24).view(2, 12)
    slots = torch.zeros_like(tokens, dtype=torch.bool)
    slots[0, 4:] = slots[1, 9:] = True

    def logits(model: ChunkRefineWrapper) -> Tensor:
        cache = base.new_cache(batch_size=2, capacity=20)
        base.run(torch.tensor([[1, 2, 3], [4, 5, 6]]), cache)
        cache.commit([3, 3])
        return base.run(tokens, cache, edit=lambda layer, h: model.refine_slots(layer, h, slots))

    clean, noisy = (logits(wrapper(name, noise=noise, draft="mask")) for noise in (0.0, 5.0))
    assert not torch.allclose(noisy[slots], clean[slots], atol=1e-2)
    close(noisy[~slots], clean[~slots])


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("draft", ["ar", "mask"])
def test_reading_the_prefix_anew_changes_nothing(name: str, draft: str) -> None:
    rows, stop = [[1, 2, 3, 4], [50, 60]], StopConfig(max_new_tokens=18)
    kept, anew = (
        complete(
            wrapper(name, noise=0.3, commit_mode="refined", draft=draft, cache_reset_policy=policy), rows, stop=stop
        )
        for policy in POLICIES
    )
    assert [row.tokens for row in kept] == [row.tokens for row in anew]
    assert [row.tokens for row in kept] != [
        row.tokens for row in complete(PlainDecoder(backbone(name)), rows, stop=stop)
    ]


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("mode", ["exact", "refined"])
def test_a_row_depends_on_neither_batch_mates_nor_order(name: str, mode: str) -> None:
    model = wrapper(name, noise=0.3, commit_mode=mode, draft="mask")
    rows, stop = [[1, 2, 3], [4] * 9, [7, 8, 9, 10, 7, 8]], StopConfig(max_new_tokens=14)
    samplings = [SamplingConfig(temperature=0.7, seed=seed) for seed in range(3)]
    together = complete(model, rows, sampling=samplings, stop=stop)
    backwards = complete(model, rows[::-1], sampling=samplings[::-1], stop=stop)[::-1]
    for row in range(3):
        alone = complete(model, rows[row : row + 1], sampling=samplings[row : row + 1], stop=stop)[0]
        assert alone.tokens == together[row].tokens == backwards[row].tokens


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("mode", ["exact", "refined"])
def test_untrained_it_scores_as_the_base(name: str, mode: str) -> None:
    ids = torch.arange(18).view(2, 9)
    batch = Batch(ids, lengths=torch.tensor([9, 4]))
    actual, expected = wrapper(name, commit_mode=mode).score(batch), score_at_once(backbone(name), batch)
    assert torch.equal(actual.scored, expected.scored)
    close(actual.log_probs, expected.log_probs)
