"""Exact mode on a GPU: the plain output there, token for token but at near-ties, whatever drafts and at any width."""

from functools import cache

import pytest
import torch

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.evaluate.agreement import compare
from deepen.evaluate.delta_equality import PARTLY_RIGHT, draw_cases, tally_cases
from deepen.evaluate.noise import fill_with_noise
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.stop import StopConfig
from deepen.methods.chunk.model import ChunkRefineWrapper

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA reaches"),
    # What Triton and the kernels' package deprecate in themselves and each other is not ours.
    pytest.mark.filterwarnings("ignore"),
]

# By how many processed logits a choice may be apart from the other where two widths of a pass round differently.
NEAR_TIES = {torch.float32: 1e-3, torch.bfloat16: 0.25}
# In bfloat16 passes of different widths may choose other experts, which no margin between tokens bounds.
WITH_EXPERTS = ("kimi_linear", "qwen3_next")
DRAFTS = ("mask", "lookup", "auto")
ALONE = [[5, 9, 2, 7]]
RAGGED = [[5, 9, 2, 7], [1, 2, 3] * 6, [250], list(range(40, 70))]
# Tokens kept of each of some passes over 8.
COMMITS = (3, 1, 8, 2, 5, 8, 1)
STOP = StopConfig(max_new_tokens=40)

every_base = pytest.mark.parametrize("name", tiny.NAMES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@cache
def backbone(name: str, dtype: torch.dtype) -> Backbone:
    return Backbone.attach(tiny.build(name, dtype=dtype).requires_grad_(False).cuda())


@cache
def wrapper(name: str, dtype: torch.dtype, draft: str, chunk_width: int) -> ChunkRefineWrapper:
    model = ChunkRefineWrapper(
        backbone(name, dtype).model, recursive_enabled=True, draft=draft, chunk_width=chunk_width, d_state=16
    )
    fill_with_noise(model)
    return model


@cache
def plain(name: str, dtype: torch.dtype, num_rows: int) -> list[list[int]]:
    rows = ALONE if num_rows == 1 else RAGGED
    return [result.tokens for result in complete(PlainDecoder(backbone(name, dtype)), rows, stop=STOP)]


@every_base
@every_dtype
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("chunk_width", [1, 8, 64])
@pytest.mark.parametrize("rows", [ALONE, RAGGED], ids=["alone", "ragged"])
def test_any_draft_gives_the_plain_output(
    name: str, dtype: torch.dtype, draft: str, chunk_width: int, rows: list[list[int]]
) -> None:
    exact = complete(wrapper(name, dtype, draft, chunk_width), rows, stop=STOP)
    may_part = dtype == torch.bfloat16 and name in WITH_EXPERTS
    for ids, ours, theirs in zip(rows, exact, plain(name, dtype, len(rows)), strict=True):
        verdict = compare(backbone(name, dtype), ids, ours.tokens, theirs)
        assert may_part or verdict.equal or verdict.margin < NEAR_TIES[dtype], verdict
        assert ours.passes <= len(ours.tokens)


@every_base
def test_drafts_that_are_partly_right(name: str) -> None:
    """In random cases, sampled too: of what is accepted there is much, and no state or entry is a draft's."""
    base = backbone(name, torch.float32)
    tally = tally_cases(base, {}, draw_cases(12, [PARTLY_RIGHT]), done=lambda _: None)
    assert not tally.others
    assert tally.accepted > tally.tokens / 4


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_few_rows_part_where_bfloat16_chooses_other_experts(name: str) -> None:
    tally = tally_cases(backbone(name, torch.bfloat16), {}, draw_cases(16, [PARTLY_RIGHT]), done=lambda _: None)
    assert tally.equal >= 0.8 * tally.rows


@torch.no_grad()
@every_base
def test_after_every_commit_the_cache_is_near_a_fresh_prefill(name: str) -> None:
    """Whichever drafts were refused: entries, states and windows are those of the committed tokens."""
    base = backbone(name, torch.float32)
    text = [*RAGGED[1], *plain(name, torch.float32, 4)[1]]
    cache = base.new_cache(batch_size=1, capacity=len(text) + 8)
    for count in COMMITS:
        done = cache.lengths[0]
        # The rest of each pass is wrong, and refused.
        ids = [*text[done : done + count], *[0] * (8 - count)]
        base.run(torch.tensor([ids], device="cuda"), cache)
        cache.commit([count])
    fresh = base.new_cache(batch_size=1, capacity=len(text))
    base.run(torch.tensor([text[: sum(COMMITS)]], device="cuda"), fresh)
    fresh.commit([sum(COMMITS)])
    for layer in range(base.num_layers):
        recurrent = layer in cache.recurrent_layers
        held = cache.state(layer) if recurrent else cache.entries(layer, 0)
        expected = fresh.state(layer) if recurrent else fresh.entries(layer, 0)
        for one, other in zip(held, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * max(1.0, float(other.abs().max())))
