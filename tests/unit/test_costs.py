"""Costs computed from a model's modules and configuration, against what torch counts and transformers holds."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from deepen.backbones import tiny
from deepen.backbones.costs import pass_flops, row_state_bytes
from deepen.backbones.hf import Backbone

NUM_POSITIONS = 24


def build(name: str) -> PreTrainedModel:
    """A tiny model, or one of an architecture that this project knows nothing of."""
    if name != "gpt2":
        return tiny.build(name)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()


def eager(name: str) -> Backbone:
    model = build(name)
    model.set_attn_implementation("eager")
    return Backbone.attach(model)


def counted(backbone: Backbone) -> dict[str, dict[Any, int]]:
    """FLOPs of one forward by module (as a path, "Global" is all) and operator."""
    ids = torch.arange(NUM_POSITIONS)[None]
    with torch.no_grad(), FlopCounterMode(display=False, depth=8) as counter:
        backbone.model(ids)
    return counter.get_flop_counts()


def visible_share(num_positions: int) -> Fraction:
    """Eager attention computes all T x T scores and then hides the upper triangle; we count what is visible."""
    return Fraction(num_positions + 1, 2 * num_positions)


@pytest.mark.parametrize("name", ["llama", "qwen3", "nanochat", "gpt2"])
def test_flops_of_a_pass_are_those_torch_counts(name: str) -> None:
    backbone = eager(name)
    total = counted(backbone)["Global"]
    config = backbone.config
    head_dim = backbone.hidden_size // config.num_attention_heads
    scores = 2 * NUM_POSITIONS**2 * 2 * config.num_attention_heads * head_dim * backbone.num_layers
    hidden = scores * (1 - visible_share(NUM_POSITIONS))
    assert pass_flops(backbone, num_positions=NUM_POSITIONS, context=0) == sum(total.values()) - hidden


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next"])
def test_flops_of_a_recurrent_pass_are_those_torch_counts_but_for_the_states(name: str) -> None:
    backbone = eager(name)
    counts, aten = counted(backbone), torch.ops.aten
    prefix = f"{type(backbone.model).__name__}.model.layers"
    # Weights meet positions in plain products; batched ones are attention's scores and the arithmetic of the states.
    products = counts["Global"][aten.mm] + counts[f"{prefix}.3.self_attn"][aten.bmm] * visible_share(NUM_POSITIONS)
    # A window of four slides over three positions before the first, too.
    convolutions = Fraction(counts["Global"][aten.convolution] * NUM_POSITIONS, NUM_POSITIONS + 3)
    assert products + convolutions == pass_flops(backbone, num_positions=NUM_POSITIONS, context=0)
    part = "self_attn" if name == "kimi_linear" else "linear_attn"
    states = [counts[f"{prefix}.{layer}.{part}"][aten.bmm] for layer in range(3)]
    attention = counts[f"{prefix}.3.self_attn"][aten.bmm]
    assert counts["Global"][aten.bmm] == sum(states) + attention


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
    linears = sum(
        m.weight.numel() for m in backbone.model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv1d)
    )
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


@pytest.mark.parametrize("name", [*tiny.NAMES, "gpt2"])
def test_state_bytes_are_those_of_transformers_cache(name: str) -> None:
    backbone = Backbone.attach(build(name))
    cache = DynamicCache(config=backbone.config)
    with torch.no_grad():
        backbone.model(torch.arange(NUM_POSITIONS)[None], past_key_values=cache, use_cache=True)
    held = 0
    for layer in cache.layers:
        tensors = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        tensors += getattr(layer, "recurrent_states", {}).values()
        # They keep one input more than the convolution needs.
        tensors += [columns[..., 1:] for columns in getattr(layer, "conv_states", {}).values()]
        held += sum(tensor.nbytes for tensor in tensors if tensor is not None)
    assert row_state_bytes(backbone, context=NUM_POSITIONS) == held
