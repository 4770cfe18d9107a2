"""Costs computed from a model's modules and configuration, against what torch counts and what is really held."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from deepen.backbones import tiny
from deepen.backbones.costs import (
    gradient_reaches,
    pass_costs,
    pass_flops,
    replay_bytes_per_token,
    row_state_bytes,
    training_work,
)
from deepen.backbones.hf import Backbone
from deepen.backbones.recurrence import use_delta_attention
from deepen.check.counted import committed_bytes, counted_flops, pass_flops_computed
from deepen.core.types import Work
from deepen.nn import kda

NUM_POSITIONS = 24
NAMES = [*tiny.NAMES, "gpt2"]
LATENT = ("kimi_linear",)


def build(name: str) -> PreTrainedModel:
    """A tiny model, or one of an architecture that this project knows nothing of."""
    if name != "gpt2":
        return tiny.build(name)
    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


@pytest.fixture
def recurrent_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delta attention runs token by token, as it is counted, however many tokens there are."""
    monkeypatch.setattr(kda, "RECURRENT_WIDTH", 10**6)


def eager(name: str) -> Backbone:
    model = build(name)
    model.set_attn_implementation("eager")
    use_delta_attention(model)
    return Backbone.attach(model)


def ids(num_positions: int = NUM_POSITIONS) -> torch.Tensor:
    return torch.arange(num_positions)[None]


def attention_layers(backbone: Backbone) -> list[int]:
    return [layer for layer in range(backbone.num_layers) if layer not in backbone.recurrent_layers]


def hidden_flops(backbone: Backbone) -> int:
    """Of one attention layer: eager attention computes all T x T scores and hides those above the diagonal.

    Forward; backward comes to twice as much.
    """
    config = backbone.config
    widths = (
        (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
        if hasattr(config, "kv_lora_rank")
        else 2 * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    )
    return 2 * config.num_attention_heads * widths * NUM_POSITIONS * (NUM_POSITIONS - 1) // 2


@pytest.mark.usefixtures("recurrent_form")
@pytest.mark.parametrize("name", NAMES)
def test_flops_of_a_forward_are_those_torch_counts(name: str) -> None:
    backbone = eager(name)
    with torch.no_grad():
        counted = counted_flops(lambda: backbone.model(ids()))
    expected = counted - len(attention_layers(backbone)) * hidden_flops(backbone)
    assert pass_flops(backbone, num_positions=NUM_POSITIONS, context=0) == expected
    assert training_work(backbone, num_positions=NUM_POSITIONS).forward_flops == expected


# What is trained: freezes the rest, and gives the first layer whose attention gets a gradient.
Freeze = Callable[[Backbone], int]


def _only(*parts: nn.Module) -> None:
    """Freeze all but these parts of the model that they are in; the first is the model."""
    model, *trained = parts
    model.requires_grad_(False)
    for part in trained:
        part.requires_grad_(True)


def _everything(backbone: Backbone) -> int:
    return 0


def _all_but_embeddings(backbone: Backbone) -> int:
    untied(backbone)
    _only(backbone.model, backbone.layers, backbone.final_norm, backbone.head)
    return 0


def _the_embedding(backbone: Backbone) -> int:
    untied(backbone)
    _only(backbone.model, backbone.embedding)
    return 0


def _the_top_two_layers(backbone: Backbone) -> int:
    _only(backbone.model, *backbone.layers[-2:])
    return backbone.num_layers - 2


def _one_layer_in_the_middle_and_the_norm(backbone: Backbone) -> int:
    _only(backbone.model, backbone.layers[1], backbone.final_norm)
    return 1


def _a_layer_without_its_norms(backbone: Backbone) -> int:
    _only(backbone.model, backbone.layers[1])
    for name, part in backbone.layers[1].named_children():
        if "norm" in name or name.startswith("ln_"):
            part.requires_grad_(False)
    return 1


def _an_mlp_without_its_norm(backbone: Backbone) -> int:
    _only(backbone.model, backbone.layers[1].mlp)
    return 2


def _the_attention_of_a_layer(backbone: Backbone) -> int:
    layer = backbone.layers[1]
    _only(backbone.model, *(part for name, part in layer.named_children() if "attn" in name))
    return 1


def _the_norm_before_an_mlp(backbone: Backbone) -> int:
    norms = [part for name, part in backbone.layers[1].named_children() if "norm" in name or name.startswith("ln_")]
    _only(backbone.model, norms[1])
    return 2 if list(norms[1].parameters()) else backbone.num_layers


def _the_final_norm(backbone: Backbone) -> int:
    _only(backbone.model, backbone.final_norm)
    return backbone.num_layers


def _the_head(backbone: Backbone) -> int:
    untied(backbone)
    _only(backbone.model, backbone.head)
    return backbone.num_layers


def untied(backbone: Backbone) -> None:
    if backbone.head.weight is backbone.embedding.weight:
        backbone.head.weight = nn.Parameter(backbone.head.weight.detach().clone())


FREEZES = [
    _everything,
    _all_but_embeddings,
    _the_embedding,
    _the_top_two_layers,
    _one_layer_in_the_middle_and_the_norm,
    _a_layer_without_its_norms,
    _an_mlp_without_its_norm,
    _the_attention_of_a_layer,
    _the_norm_before_an_mlp,
    _the_final_norm,
    _the_head,
]


@pytest.mark.usefixtures("recurrent_form")
@pytest.mark.parametrize("freeze", FREEZES, ids=lambda freeze: freeze.__name__.strip("_"))
@pytest.mark.parametrize("name", NAMES)
def test_flops_of_a_backward_are_those_torch_counts(name: str, freeze: Freeze) -> None:
    backbone = eager(name)
    first = freeze(backbone)
    loss = backbone.model(ids()).logits.square().mean()
    work = training_work(backbone, num_positions=NUM_POSITIONS)
    if not loss.requires_grad:  # a norm may have no parameters
        assert work == Work(work.multiply_adds)
        return
    through = sum(layer >= first for layer in attention_layers(backbone))
    assert work.backward_flops == counted_flops(loss.backward) - through * 2 * hidden_flops(backbone)
    reached = [gradient_reaches(backbone, layer) for layer in range(-1, backbone.num_layers)]
    assert reached == sorted(reached)


@pytest.mark.usefixtures("recurrent_form")
@pytest.mark.parametrize("name", NAMES)
def test_a_module_on_top_of_a_frozen_model(name: str) -> None:
    backbone = eager(name)
    backbone.model.requires_grad_(False)
    top = nn.Parameter(torch.ones(backbone.hidden_size))
    after = backbone.num_layers - 2

    def scale(module: nn.Module, inputs: object, output: object) -> object:
        return output * top if isinstance(output, torch.Tensor) else (output[0] * top, *output[1:])

    backbone.layers[after].register_forward_hook(scale)
    loss = backbone.model(ids()).logits.square().mean()
    work = training_work(backbone, num_positions=NUM_POSITIONS, begins_after=after)
    through = sum(layer > after for layer in attention_layers(backbone))
    assert work.backward_flops == counted_flops(loss.backward) - through * 2 * hidden_flops(backbone)
    assert work.two_gradients == through * (
        hidden_flops(backbone) // 2 * (NUM_POSITIONS + 1) // (NUM_POSITIONS - 1)
    ) + (sum(layer > after for layer in backbone.recurrent_layers) * states_products(backbone))


def states_products(backbone: Backbone) -> int:
    """Multiply-adds of a recurrent layer's state over all positions, but the one whose state gets no gradient."""
    return (2 * NUM_POSITIONS - 1) * 4 * 16 * 16


@pytest.mark.usefixtures("recurrent_form")
def test_recomputing_is_another_forward() -> None:
    backbone = eager("llama")
    embedded = backbone.embedding(ids())
    with set_checkpoint_early_stop(False):
        logits = checkpoint(lambda h: backbone.model(inputs_embeds=h).logits, embedded, use_reentrant=False)
        counted = counted_flops(logits.square().mean().backward)
    work = training_work(backbone, num_positions=NUM_POSITIONS)
    again = work.recomputed.flops - work.forward_flops
    assert again == work.forward_flops + work.backward_flops
    assert again == counted - backbone.num_layers * 3 * hidden_flops(backbone)


@pytest.mark.usefixtures("recurrent_form")
@pytest.mark.parametrize(("width", "context"), [(1, 0), (1, 5), (3, 0), (8, 9), (5, 126), (4, 130), (128, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_flops_of_our_passes_are_those_torch_counts(name: str, width: int, context: int) -> None:
    """Entries and, but for recurrent models, positions come in blocks; each costs what we say that it costs."""
    backbone = Backbone.attach(build(name))
    if width + context > (backbone.context_length or 0):
        pytest.skip("longer than this model's context")
    cache = backbone.new_cache(batch_size=1, capacity=context + width)
    tokens = torch.arange(context + width)[None] % 60
    with torch.no_grad():
        if context:
            backbone.run(tokens[:, :context], cache)
            cache.commit([context])
        # The window before the pass stands before its own inputs.
        counted = counted_flops(lambda: backbone.run(tokens[:, context:], cache), positions_before=3)
    costs = pass_costs(backbone)
    assert counted == pass_flops_computed(backbone, costs, width=width, contexts=[context], num_logits=width)
    whole = costs.over(num_positions=width, context=context)
    visible = width * context + width * (width + 1) // 2
    parts = width * (costs.per_position + costs.per_logit) + visible * costs.per_visible
    assert whole == parts + (context + width) * costs.per_entry
    assert whole.forward_flops == pass_flops(backbone, num_positions=width, context=context)


@torch.no_grad()
@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next"])
def test_one_token_needs_no_form_but_its_own(name: str) -> None:
    backbone = Backbone.attach(build(name))
    cache = backbone.new_cache(batch_size=1, capacity=8)
    counted = counted_flops(lambda: backbone.run(ids(1), cache), positions_before=3)
    assert counted == pass_flops_computed(backbone, pass_costs(backbone), width=1, contexts=[0], num_logits=1)


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("split", [1, 7, 23])
def test_a_pass_in_two_parts_costs_as_much_but_for_entries_expanded_again(name: str, split: int) -> None:
    backbone = Backbone.attach(tiny.build(name))
    parts = pass_flops(backbone, num_positions=split, context=0)
    parts += pass_flops(backbone, num_positions=NUM_POSITIONS - split, context=split)
    # By hand: of the one layer with latent attention, 32 numbers an entry to keys and values of 4 heads.
    again = 2 * split * 32 * 4 * (16 + 16) if name in LATENT else 0
    assert parts == pass_flops(backbone, num_positions=NUM_POSITIONS, context=0) + again


@pytest.mark.parametrize("name", tiny.NAMES)
def test_logits_that_nobody_wants_are_not_counted(name: str) -> None:
    backbone = Backbone.attach(tiny.build(name))
    all_logits = pass_flops(backbone, num_positions=9, context=3)
    last_logits = pass_flops(backbone, num_positions=9, context=3, num_logits=1)
    assert all_logits - last_logits == 2 * 8 * backbone.hidden_size * backbone.vocab_size


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
    states = 3 * 4 * 2 * 16 * 16
    assert experts > 0
    assert routers > 0
    expected = 2 * (linears + experts + routers + latent_attention + states)
    assert pass_flops(backbone, num_positions=1, context=0) == expected


@pytest.mark.parametrize("name", NAMES)
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


BACKBONES = {
    (name, dtype): Backbone.attach(tiny.build(name, dtype=dtype))
    for name in tiny.NAMES
    for dtype in (torch.float32, torch.float64)
}


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(sorted(BACKBONES, key=str)),
    st.integers(1, 150),
    st.integers(1, 20),
    st.booleans(),
    st.data(),
)
@torch.no_grad()
def test_bytes_are_those_that_a_cache_holds(key, context: int, width: int, whole: bool, data: st.DataObject) -> None:
    """Of committed tokens, of a snapshot, and of a pass until its commit; stores keep room for more entries."""
    backbone = BACKBONES[key]
    cache = backbone.new_cache(batch_size=1, capacity=context + width)
    backbone.run(torch.arange(context)[None], cache, whole=True)
    cache.commit([context])
    assert committed_bytes(cache) == row_state_bytes(backbone, context=context)
    snapshot, room = cache.snapshot(), cache.num_bytes()
    kept = sum(tensor.nbytes for prefix in snapshot.states for tensor in prefix if tensor is not None)
    assert kept == row_state_bytes(backbone, context=0)
    backbone.run(torch.arange(width)[None], cache, whole=whole)
    held = cache.num_bytes() - room - row_state_bytes(backbone, context=0)
    columns = sum(m.in_channels for m in backbone.model.modules() if isinstance(m, nn.Conv1d)) * backbone.dtype.itemsize
    if whole:
        assert held == width * columns
    else:
        # Updates, 4 heads of 16 a layer, are kept as computed: over a power of two of positions.
        pads = (1 << (width - 1).bit_length()) - width
        of_pads = pads * len(backbone.recurrent_layers) * 4 * 16 * backbone.dtype.itemsize
        assert held == width * replay_bytes_per_token(backbone) + of_pads
    count = width if whole else data.draw(st.integers(0, width))
    cache.commit([count])
    assert committed_bytes(cache) == row_state_bytes(backbone, context=context + count)
    cache.rollback(snapshot)
    assert committed_bytes(cache) == row_state_bytes(backbone, context=context)
