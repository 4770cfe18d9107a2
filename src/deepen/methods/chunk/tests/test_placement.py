"""Where the parts of a sidecar are, and in which dtype, beside a base in 16 bits or spread over devices."""

import pytest
import torch
from torch import nn

from deepen.backbones import tiny
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.model import ChunkRefineWrapper

SMALL = RecursiveConfig(recursive_enabled=True, d_state=8, gate_hidden=8, max_chunk_len=16, chunk_width=16)
EVERY_LAYER = {"layers_to_refine": (0, 1, 2, 3), "share_cells": False}


def places(module: nn.Module | None) -> set[str]:
    assert module is not None
    return {parameter.device.type for parameter in module.parameters()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_master_weights_are_fp32_whatever_the_base_is(dtype):
    base = tiny.build("kimi_linear", dtype=dtype)
    model = ChunkRefineWrapper(base, SMALL)
    of_base = {id(parameter) for parameter in base.parameters()}
    added = [parameter for parameter in model.parameters() if id(parameter) not in of_base]
    assert {parameter.dtype for parameter in added} == {torch.float32}
    assert {tensor.dtype for tensor in model.saved_state().values()} == {torch.float32}
    h = torch.randn(1, 3, 64).to(dtype)
    nn.init.normal_(model.refine_cells[0].out.weight)
    refined = model.refine_slots(3, h, torch.ones(1, 3, dtype=torch.bool))
    assert refined.dtype == dtype and not torch.equal(refined, h)


def test_each_cell_is_where_its_layer_is():
    base = tiny.build("kimi_linear")
    base.model.layers[2].to("meta")
    model = ChunkRefineWrapper(base, SMALL, **EVERY_LAYER)
    assert [places(cell) for cell in model.refine_cells] == [{"cpu"}, {"cpu"}, {"meta"}, {"cpu"}]
    assert places(model.boundary) == places(model.latent_token) == places(model.mask_token) == {"cpu"}


def test_a_shared_cell_is_where_its_first_layer_is():
    base = tiny.build("kimi_linear")
    base.model.layers[1].to("meta")
    model = ChunkRefineWrapper(base, SMALL, layers_to_refine=(1, 3), share_cells=True)
    assert [places(cell) for cell in model.refine_cells] == [{"meta"}]


def test_the_rest_is_where_the_embedding_is():
    base = tiny.build("kimi_linear")
    base.model.embed_tokens.to("meta")
    model = ChunkRefineWrapper(base, SMALL, **EVERY_LAYER)
    assert {place for cell in model.refine_cells for place in places(cell)} == {"cpu"}
    assert places(model.boundary) == places(model.latent_token) == places(model.mask_token) == {"meta"}


def test_nothing_is_drawn_for_parts_without_memory():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model = ChunkRefineWrapper(tiny.build("kimi_linear").to("meta"), SMALL)
    assert places(model) == {"meta"} and torch.equal(torch.get_rng_state(), state)


def test_where_a_default_device_is_set_nothing_changes():
    torch.manual_seed(1)
    expected = ChunkRefineWrapper(tiny.build("llama"), SMALL).saved_state()
    torch.manual_seed(1)
    base = tiny.build("llama")
    with torch.device("meta"):
        found = ChunkRefineWrapper(base, SMALL).saved_state()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
