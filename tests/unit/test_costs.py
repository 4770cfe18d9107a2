"""Costs computed from a model's modules and configuration, against what torch counts and transformers holds."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from deepen.backbones import tiny
from deepen.backbones.costs import pass_flops, row_state_bytes
from deepen.backbones.hf import Backbone

NUM_POSITIONS = 24


def eager(name: str) -> Backbone:
    model = tiny.build(name)
    model.set_attn_implementation("eager")
    return Backbone.attach(model)


def counted(backbone: Backbone) -> int:
    ids = torch.arange(NUM_POSITIONS)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.model(ids)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "qwen3", "nanochat"])
def test_flops_of_a_pass_are_those_torch_counts(name: str) -> None:
    backbone = eager(name)
    config = backbone.config
    # Eager attention computes all T x T scores and then hides the upper triangle; only what is visible is our count.
    hidden = NUM_POSITIONS * (NUM_POSITIONS - 1) // 2
    head_dim = backbone.hidden_size // config.num_attention_heads
    wasted = 2 * hidden * 2 * config.num_attention_heads * head_dim * backbone.num_layers
    # The rotary angles are an outer product of positions and frequencies, counted as a product of width one.
    rotary = 2 * NUM_POSITIONS * head_dim // 2
    assert counted(backbone) - wasted - pass_flops(backbone, num_positions=NUM_POSITIONS, context=0) in (0, rotary)


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("split", [1, 7, 23])
def test_a_pass_in_two_parts_costs_as_much(name: str, split: int) -> None:
    backbone = Backbone.attach(tiny.build(name))
    parts = pass_flops(backbone, num_positions=split, context=0)
    parts += pass_flops(backbone, num_positions=NUM_POSITIONS - split, context=split)
    assert parts == pass_flops(backbone, num_positions=NUM_POSITIONS, context=0)


def test_only_visited_experts_are_counted() -> None:
    """By hand: the layers of the tiny kimi_linear model, product by product."""
    backbone = Backbone.attach(tiny.build("kimi_linear"))
    linears = sum(m.weight.numel() for m in backbone.model.modules() if isinstance(m, torch.nn.Linear))
    experts = sum(
        2 * weight[0].numel()
        for name, weight in backbone.model.named_parameters()
        if ".experts." in name and weight.ndim == 3
    )
    routers = sum(w.numel() for name, w in backbone.model.named_parameters() if name.endswith("mlp.gate.weight"))
    config = backbone.config
    latent_attention = config.num_attention_heads * (
        config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    )
    assert experts > 0
    assert routers > 0
    expected = 2 * (linears + experts + routers + latent_attention)
    assert pass_flops(backbone, num_positions=1, context=0) == expected


@pytest.mark.parametrize("name", tiny.NAMES)
def test_state_bytes_are_those_of_transformers_cache(name: str) -> None:
    backbone = Backbone.attach(tiny.build(name))
    cache = DynamicCache(config=backbone.config)
    with torch.no_grad():
        backbone.model(torch.arange(NUM_POSITIONS)[None], past_key_values=cache, use_cache=True)
    held = 0
    for layer in cache.layers:
        tensors = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        tensors += [*getattr(layer, "conv_states", {}).values(), *getattr(layer, "recurrent_states", {}).values()]
        held += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    assert row_state_bytes(backbone, context=NUM_POSITIONS) == held
