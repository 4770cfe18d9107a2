"""What draft passes and refined passes are said to cost, and rows to hold, is what torch counts and what is held."""

from typing import Any

import pytest
import torch
from effort import share_of_profile
from hypothesis import given
from hypothesis import strategies as st

from deepen.backbones import tiny
from deepen.backbones.costs import pass_costs, row_state_bytes
from deepen.check.counted import committed_bytes, counted_flops, passes_of
from deepen.core.types import Advance, Prompt
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.methods.chunk.model import ChunkRefineWrapper

BASES = {name: tiny.build(name).requires_grad_(False) for name in ("llama", "kimi_linear")}
OPTIONS: list[dict[str, Any]] = [
    {"draft": "mask"},
    {"draft": "mask", "pooling": "chunk"},
    {"draft": "mask", "layers_to_refine": (0, 2, 3), "share_cells": True, "refine_hidden": 24},
    {"draft": "auto"},
    {"draft": "auto", "drafter_hidden": 24, "draft_vocab": 200},
    {"draft": "shallow", "drafter_hidden": 24, "draft_vocab": 200},
    {"draft": "lookup", "cache_reset_policy": "reset_all"},
    {"commit_mode": "refined"},
    {"commit_mode": "refined", "draft": "mask", "pooling": "chunk"},
    {"commit_mode": "refined", "use_latent_token": False, "layers_to_refine": (1,)},
    {"commit_mode": "refined", "draft": "mask", "carry_state": True, "cache_reset_policy": "reset_all"},
    {"commit_mode": "refined", "share_cells": True, "commit_threshold": 1.0, "keep_better": True},
    {"commit_mode": "refined", "cache_reset_policy": "keep_all", "commit_threshold": 1.0},
]


def wrapper(base: str, options: dict[str, Any]) -> ChunkRefineWrapper:
    """With noise in every cell, so that drafts fail and refined passes edit."""
    sizes = {"chunk_width": 6, "max_inner_steps": 3, "d_state": 16, "gate_hidden": 16, "max_chunk_len": 32}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = ChunkRefineWrapper(BASES[base], recursive_enabled=True, **sizes, **options)
        for tensor in model.saved_state().values():
            if tensor.is_floating_point():
                tensor.normal_(std=0.3)
    return model


def opened(model: ChunkRefineWrapper, num_tokens: int) -> tuple[Any, BatchSampler]:
    prompt = tuple(torch.arange(num_tokens).remainder(7).tolist())
    return model.open(Prompt((prompt,), 60)), BatchSampler([SamplingConfig()])


@pytest.mark.filterwarnings("ignore:cache_reset_policy keep_all")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
def test_flops_are_those_torch_counts(options: dict[str, Any]) -> None:
    model = wrapper("llama", options)
    costs, num_layers = pass_costs(model.backbone), model.backbone.num_layers
    decoding, sampler = opened(model, 11)
    advances: list[Advance] = []
    for _ in range(4):
        with passes_of(model.backbone) as passes:
            counted = counted_flops(lambda: advances.append(model.advance(decoding, sampler)))
        spent = advances[-1].spent
        assert counted == sum(ran.flops_computed(model.backbone, costs) for ran in passes) + spent.added_flops
        positions = sum(sum(ran.widths) for ran in passes)
        assert (spent.passes, spent.positions) == (len(passes), positions)
        assert spent.layer_applications == num_layers * positions
    if options.get("draft") != "auto":  # which goes by the clock
        assert any(advance.spent.added_flops for advance in advances) == (options.get("draft") != "lookup")


def test_the_passes_of_a_chunk_cost_what_is_told_beforehand() -> None:
    """By hand: a refined chunk of six tokens, read, drafted and refined in three passes with [Z]."""
    model = wrapper("llama", {"commit_mode": "refined", "commit_threshold": 1.0, "enable_length_head": False})
    told = model.advance_flops(context=40)
    clean, drafting, refining, per_token = told.values()
    flops = model.flops
    assert clean == flops(num_positions=6, context=34, num_logits=1)
    assert drafting == sum(flops(num_positions=1, context=40 + place) for place in range(5))
    cells = model.refine_cells
    assert cells is not None and model.boundary is not None and model.latent_token is not None and model.plan
    of_cell = 7 * cells[0].flops_per_token + cells[0].flops_per_row + cells[0].flops_per_state_update
    of_pass = flops(num_positions=7, context=40) + len(model.plan.layers) * of_cell + model.boundary.flops_per_row
    assert refining == 3 * of_pass + 2 * model.latent_token.flops_per_row
    assert per_token == (clean + drafting + refining) // 6
    exact = wrapper("llama", {"draft": "mask"})
    verify, draft = exact.advance_flops(context=40).values()
    assert verify == flops(num_positions=6, context=40)
    assert draft == verify + exact.sidecar_flops(num_positions=6)
    assert list(wrapper("llama", {"draft": "lookup"}).advance_flops(context=40).values()) == [verify]


@pytest.mark.filterwarnings("ignore:cache_reset_policy keep_all")
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())))
@share_of_profile(20, least=3)
@given(
    base=st.sampled_from(sorted(BASES)),
    num_tokens=st.integers(1, 40),
    num_advances=st.integers(1, 3),
)
def test_bytes_are_those_that_are_held(base: str, options: dict[str, Any], num_tokens: int, num_advances: int) -> None:
    model = wrapper(base, options)
    decoding, sampler = opened(model, num_tokens)
    for _ in range(num_advances):
        model.advance(decoding, sampler)
        states = sum(state.nbytes for state in getattr(decoding, "states", {}).values())
        context = decoding.cache.lengths[0]
        assert model.state_bytes(context=context) == committed_bytes(decoding.cache) + states
        carries = options.get("carry_state", False)
        assert (model.state_bytes(context=context) > row_state_bytes(model.backbone, context=context)) == carries
