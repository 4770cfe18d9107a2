"""Fused layers: the layer's own values, and the layer itself wherever fusing would miss something."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from deepen.backbones import fused, tiny
from deepen.backbones.hf import Backbone


def ids(batch: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, width), generator=torch.Generator().manual_seed(seed))


def logits_of(backbone: Backbone, tokens: Tensor) -> Tensor:
    return backbone.run(tokens, backbone.new_cache(batch_size=len(tokens), capacity=tokens.shape[1]))


@pytest.fixture
def packed() -> Backbone:
    backbone = Backbone.attach(tiny.build("llama"))
    backbone.pack()
    return backbone


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Inputs of the layers that computed fused."""
    seen: list[Tensor] = []
    forward: Callable[..., Tensor] = fused.FusedForward._forward

    def counted(self: object, h: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(h)
        return forward(self, h, *args, **kwargs)

    monkeypatch.setattr(fused.FusedForward, "_forward", counted)
    return seen


@torch.no_grad()
@given(
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    bias=st.booleans(),
    activation=st.sampled_from(["silu", "gelu"]),
    rope=st.sampled_from([{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}]),
    eps=st.sampled_from([1e-6, 0.1]),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 20)),
)
def test_fused_equals_the_model_itself(
    heads: tuple[int, int], bias: bool, activation: str, rope: dict[str, object], eps: float, shape: tuple[int, int]
) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=heads[0],
        num_key_value_heads=heads[1], head_dim=16, max_position_embeddings=64, initializer_range=0.2,
        attention_bias=bias, mlp_bias=bias, hidden_act=activation, rms_norm_eps=eps,
        rope_parameters={"rope_theta": 1e4, **rope}, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.normal_()
    tokens = ids(*shape) % 64
    expected = model(tokens).logits
    backbone = Backbone.attach(model)
    backbone.pack()
    assert all(isinstance(layer.forward, fused.FusedForward) for layer in backbone.layers)
    torch.testing.assert_close(logits_of(backbone, tokens), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_any_backbone_of_a_packed_model_computes_fused(packed: Backbone, calls: list[Tensor]) -> None:
    expected = logits_of(packed, ids(1, 6))
    other = Backbone.attach(packed.model)
    assert torch.equal(logits_of(other, ids(1, 6)), expected)
    assert len(calls) == 2 * packed.num_layers


@torch.no_grad()
def test_outside_of_passes_the_model_is_itself(packed: Backbone, calls: list[Tensor]) -> None:
    tokens = ids(1, 6)
    actual = packed.model(tokens).logits
    assert not calls
    torch.testing.assert_close(actual, tiny.build("llama")(tokens).logits, rtol=1e-4, atol=1e-4)


def test_unpacking_gives_every_layer_its_forward_back(packed: Backbone) -> None:
    packed.unpack()
    assert not any("forward" in vars(module) for module in packed.model.modules())


@torch.no_grad()
def test_changed_weights_are_read_anew(packed: Backbone, calls: list[Tensor]) -> None:
    logits_of(packed, ids(1, 6))
    for parameter in packed.layers[1].parameters():
        parameter.mul_(1.5)
    packed.layers[2].mlp.down_proj.weight = nn.Parameter(packed.layers[2].mlp.down_proj.weight * 2)
    actual = logits_of(packed, ids(1, 6))
    assert len(calls) == 2 * packed.num_layers
    packed.unpack()
    torch.testing.assert_close(actual, logits_of(packed, ids(1, 6)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_hook_on_a_part_is_called(packed: Backbone, calls: list[Tensor]) -> None:
    seen = []
    packed.layers[1].mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits_of(packed, ids(1, 6))
    assert len(seen) == 1
    assert len(calls) == packed.num_layers - 1


@torch.no_grad()
def test_a_replaced_part_is_used(packed: Backbone, calls: list[Tensor]) -> None:
    class Adapter(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + 1

    before = logits_of(packed, ids(1, 6))
    packed.layers[0].self_attn.q_proj = Adapter(packed.layers[0].self_attn.q_proj)
    assert not torch.allclose(logits_of(packed, ids(1, 6)), before, atol=1e-2)
    assert len(calls) == 2 * packed.num_layers - 1


def test_gradients_flow_as_if_nothing_were_fused(packed: Backbone, calls: list[Tensor]) -> None:
    own = Backbone.attach(tiny.build("llama"))
    for backbone in (packed, own):
        logits_of(backbone, ids(1, 6)).square().mean().backward()
    assert not calls
    for mine, theirs in zip(packed.model.parameters(), own.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_gradients_reach_the_input_of_frozen_layers(packed: Backbone, calls: list[Tensor]) -> None:
    packed.model.requires_grad_(False)
    embedded = packed.embedding(ids(1, 6)).requires_grad_()
    logits_of(packed, embedded).sum().backward()
    assert embedded.grad.abs().sum() > 0
    assert not calls


@pytest.mark.parametrize("name", ["qwen3", "nanochat", "kimi_linear"])
def test_other_layers_are_left_alone(name: str) -> None:
    backbone = Backbone.attach(tiny.build(name))
    assert fused.fuse_layers(backbone.layers) == ()


def test_float64_layers_are_left_alone() -> None:
    backbone = Backbone.attach(tiny.build("llama", dtype=torch.float64))
    assert fused.fuse_layers(backbone.layers) == ()


@torch.no_grad()
def test_writes_through_data_are_noticed_when_a_decoding_opens(packed: Backbone, calls: list[Tensor]) -> None:
    logits_of(packed, ids(1, 6))
    for parameter in packed.model.parameters():
        parameter.data *= 1.25
    actual = logits_of(packed, ids(1, 6))
    assert len(calls) == 2 * packed.num_layers
    packed.unpack()
    torch.testing.assert_close(actual, logits_of(packed, ids(1, 6)), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_forward_put_on_a_part_is_called(packed: Backbone, calls: list[Tensor]) -> None:
    part = packed.layers[0].self_attn
    own = part.forward
    part.forward = own
    logits_of(packed, ids(1, 6))
    assert len(calls) == packed.num_layers - 1


@torch.no_grad()
def test_a_global_hook_sees_every_part(packed: Backbone, calls: list[Tensor]) -> None:
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: seen.add(type(module)))
    try:
        logits_of(packed, ids(1, 6))
    finally:
        handle.remove()
    assert not calls and type(packed.layers[0].mlp) in seen


@torch.no_grad()
def test_a_changed_scale_acts(packed: Backbone) -> None:
    before = logits_of(packed, ids(1, 6))
    packed.layers[0].self_attn.scaling = 1.0
    assert not torch.allclose(logits_of(packed, ids(1, 6)), before, atol=1e-3)


@torch.no_grad()
def test_a_packed_model_may_change_its_dtype(packed: Backbone, calls: list[Tensor]) -> None:
    expected = logits_of(packed, ids(1, 6))
    packed.model.double()
    torch.testing.assert_close(logits_of(packed, ids(1, 6)).float(), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == packed.num_layers
    packed.model.float()
    torch.testing.assert_close(logits_of(packed, ids(1, 6)), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2 * packed.num_layers


@torch.no_grad()
def test_autocast_is_the_models_own_affair(packed: Backbone, calls: list[Tensor]) -> None:
    own = Backbone.attach(tiny.build("llama"))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits_of(packed, ids(1, 6)), logits_of(own, ids(1, 6)))
    assert not calls


@torch.no_grad()
def test_a_copy_of_a_packed_model_is_packed_too(packed: Backbone, calls: list[Tensor]) -> None:
    expected = logits_of(packed, ids(1, 6))
    copied = Backbone.attach(copy.deepcopy(packed.model))
    for parameter in packed.model.parameters():
        parameter.zero_()
    assert torch.equal(logits_of(copied, ids(1, 6)), expected)
    assert len(calls) == 2 * packed.num_layers


class Doubled(nn.Module):
    """An MLP around another, and so with as many linears in it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


class Silent(LlamaAttention):
    """Has llama's parts and another forward."""

    def forward(self, *args: object, **kwargs: object) -> tuple[Tensor, object]:
        out, weights = super().forward(*args, **kwargs)
        return out * 0.5, weights


class Centred(LlamaRMSNorm):
    """A norm that takes the mean away."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=-1, keepdim=True))


def _with_another_mlp(layer: nn.Module) -> None:
    layer.mlp = Doubled(layer.mlp)


def _with_another_attention(layer: nn.Module) -> None:
    layer.self_attn.__class__ = Silent


def _with_another_norm(layer: nn.Module) -> None:
    layer.input_layernorm.__class__ = Centred


@torch.no_grad()
@pytest.mark.parametrize("change", [_with_another_mlp, _with_another_attention, _with_another_norm])
def test_a_layer_with_a_part_of_another_class_is_itself(change: Callable[[nn.Module], None]) -> None:
    """Also if that is so before the model is packed."""
    model = tiny.build("llama")
    change(model.model.layers[1])
    backbone, tokens = Backbone.attach(model), ids(2, 12)
    expected = model(tokens).logits
    backbone.pack()
    forwards = [isinstance(vars(layer).get("forward"), fused.FusedForward) for layer in backbone.layers]
    assert forwards == [True, False, True, True]
    torch.testing.assert_close(logits_of(backbone, tokens), expected, atol=1e-4, rtol=1e-4)
