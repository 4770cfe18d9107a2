"""Layers of the llama shape, computed in few large operations while a pass runs.

At the few positions of a decoding pass, a layer's time goes to reading its weights, and next to that to the number of
its operations: some 40 small ones and 11 modules called. Here queries, keys and values come from one product, gate and
up from another, queries and keys are rotated together, and no module but the layer is called. Values agree with the
layer's own forward to rounding; like packed linears (nn/linear.py), they have the same bits at any width of a pass.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from deepen.backbones.attention import visibility_of_pass
from deepen.backbones.cache import PrefixCache
from deepen.nn.attention import Visibility, attend
from deepen.nn.linear import Addition, PackedProduct, can_pack, wants_gradient

# What a layer is made of: another part may compute something else, whatever its parts are called.
_PARTS = {
    "self_attn": LlamaAttention,
    "mlp": LlamaMLP,
    "input_layernorm": LlamaRMSNorm,
    "post_attention_layernorm": LlamaRMSNorm,
}
_LINEARS = {"self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"}, "mlp": {"gate_proj", "up_proj", "down_proj"}}


def fuse_layers(layers: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Fuse those of `layers` that are exactly llama's and can be packed; parameters stay where and what they are."""
    fused = tuple(layer for layer in layers if _can_fuse(layer))
    for layer in fused:
        # On the instance, so that neither the class nor the module tree changes.
        layer.forward = FusedForward(layer)
    return fused


def unfuse_layers(layers: Iterable[nn.Module]) -> None:
    """Give fused layers their own forward back."""
    for layer in layers:
        del layer.forward


@contextmanager
def fused_pass(layers: Iterable[nn.Module]) -> Iterator[None]:
    """In the block, layers that were fused compute so if they can as it begins; otherwise each is itself."""
    forwards = [vars(layer).get("forward") for layer in layers]
    fused = [forward for forward in forwards if isinstance(forward, FusedForward)]
    rotation = _Rotation()
    for forward in fused:
        forward.begin(rotation)
    try:
        yield
    finally:
        for forward in fused:
            forward.end()


class FusedForward:
    """Stands in for the `forward` of one llama layer.

    It serves passes without gradients. In training, under autocast, with a hook on one of the layer's parts or with a
    part or its forward replaced (an adapter), the layer computes as before. Only hooks that are an `Addition` don't
    stand in the way: they act here as they would there.
    """

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._layer = layer
        # Looked up once: a module's attributes are slow to find, and `_changed` sees when a part is replaced.
        self._parts = [
            (parent._modules, name, part, part._forward_hooks, part._forward_pre_hooks)
            for parent in layer.modules()
            for name, part in parent.named_children()
        ]
        self._norms = layer.input_layernorm, layer.post_attention_layernorm
        self._activation = mlp.act_fn
        self._index = attention.layer_idx
        self._qkv = _Product(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = _Product(attention.o_proj)
        self._gate_up = _Product(mlp.gate_proj, mlp.up_proj)
        self._down = _Product(mlp.down_proj)
        self._head_dim = attention.head_dim
        self._num_values = attention.v_proj.out_features // attention.head_dim
        self._rotation: _Rotation | None = None

    def begin(self, rotation: "_Rotation") -> None:
        """Compute fused from now on, with the rotation that the layers of a pass share, if nothing is in the way."""
        if self._learns() or self._layer.training or torch.is_autocast_enabled("cpu") or self._changed():
            return
        if all(product.packed.refresh() for product in self._products):
            self._scale = self._layer.self_attn.scaling
            self._rotation = rotation

    def recheck(self) -> None:
        """Look for writes to the weights that leave no other trace; see `PackedProduct`."""
        for product in self._products:
            product.packed.recheck()

    @property
    def _products(self) -> tuple["_Product", ...]:
        return self._qkv, self._out, self._gate_up, self._down

    def _learns(self) -> bool:
        if not torch.is_grad_enabled():
            return False
        hooks = [hook for _, _, _, hooks, _ in self._parts for hook in hooks.values()]
        added = any(hook.learns for hook in hooks if isinstance(hook, Addition))
        return added or any(parameter.requires_grad for parameter in self._layer.parameters())

    def end(self) -> None:
        """Be the layer's own forward again."""
        self._rotation = None

    def _changed(self) -> bool:
        if _global_forward_hooks or _global_forward_pre_hooks:
            return True
        # Each layer asks before each pass, so this is a plain loop.
        for children, name, part, hooks, pre_hooks in self._parts:
            if children.get(name) is not part or pre_hooks or "forward" in part.__dict__:
                return True
            if hooks and not all(isinstance(hook, Addition) for hook in hooks.values()):
                return True
        return False

    def __call__(self, hidden_states: Tensor, **arguments: object) -> Tensor:
        visibility = visibility_of_pass()
        if self._rotation is None or visibility is None or wants_gradient(hidden_states):
            return type(self._layer).forward(self._layer, hidden_states, **arguments)
        return self._forward(hidden_states, visibility, self._rotation, **arguments)  # type: ignore[arg-type]

    def _forward(
        self,
        h: Tensor,
        visibility: Visibility,
        rotation: "_Rotation",
        *,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: PrefixCache,
        **_: object,
    ) -> Tensor:
        norm_attention, norm_mlp = self._norms
        heads = self._qkv(_normed(h, norm_attention)).unflatten(-1, (-1, self._head_dim))
        heads = rotation.turn(heads, self._num_values, position_embeddings).transpose(1, 2)
        q, kv = heads[:, : -2 * self._num_values], heads[:, -2 * self._num_values :]
        k, v = past_key_values.layers[self._index].update_both(kv)
        attended = attend(q, k, v, visibility=visibility, scale=self._scale)
        h = h + self._out(attended.flatten(-2))
        gate, up = self._gate_up(_normed(h, norm_mlp)).chunk(2, dim=-1)
        return h + self._down(self._activation(gate) * up)


class _Product:
    """The stacked product of some linears of a layer, with what additions make of each one's share."""

    def __init__(self, *linears: nn.Linear) -> None:
        self.packed = PackedProduct(*linears)
        ends = accumulate(linear.out_features for linear in linears)
        self._shares = [slice(start, end) for start, end in pairwise([0, *ends])]
        self._hooks = [linear._forward_hooks for linear in linears]

    def __call__(self, x: Tensor) -> Tensor:
        y = self.packed(x)
        if any(self._hooks):
            for share, hooks in zip(self._shares, self._hooks, strict=True):
                for addition in hooks.values():
                    assert isinstance(addition, Addition), "another hook makes the layer compute as itself"
                    addition.apply_(x, y[..., share])
        return y


class _Rotation:
    """Rotary positions of one pass, in the form that turns every head at once."""

    def __init__(self) -> None:
        self._given: tuple[Tensor, Tensor] | None = None

    def turn(self, heads: Tensor, num_values: int, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """`[B, W, H, E]` rotated by transformers' `(cos, sin)`, each `[B, W, E]`; the last `num_values` stay as is."""
        if position_embeddings is not self._given:
            self._prepare(*position_embeddings, heads.shape[2] - num_values, num_values)
            self._given = position_embeddings
        return torch.addcmul(heads * self._cos, heads.roll(self._half, dims=-1), self._sin)

    def _prepare(self, cos: Tensor, sin: Tensor, num_turned: int, num_values: int) -> None:
        self._half = cos.shape[-1] // 2
        # Halves swapped instead of rotated, so the sign of the first half moves into the sine.
        sin = torch.cat([-sin[..., : self._half], sin[..., self._half :]], dim=-1)
        # Values are rotated by nothing, so that they lie beside the keys and both are stored at once.
        self._cos = _for_heads(cos, num_turned, torch.ones_like(cos), num_values)
        self._sin = _for_heads(sin, num_turned, torch.zeros_like(sin), num_values)


def _for_heads(first: Tensor, num_first: int, others: Tensor, num_others: int) -> Tensor:
    """`[B, W, E]` each to `[B, W, H, E]`."""
    return torch.stack([first] * num_first + [others] * num_others, dim=2)


def _normed(x: Tensor, norm: LlamaRMSNorm) -> Tensor:
    # torch.rms_norm is nine operations on a CPU, each of which takes longer to start than to run; these are five.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    mean_square = torch.addcmul(_constant(norm.variance_epsilon), length, length, value=1 / x.shape[-1])
    return (x * mean_square.rsqrt_()).mul_(norm.weight)


@cache
def _constant(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _can_fuse(layer: nn.Module) -> bool:
    if type(layer) is not LlamaDecoderLayer or "forward" in vars(layer):
        return False
    if {name: type(part) for name, part in layer.named_children()} != _PARTS:
        return False
    return all(_has_only(layer.get_submodule(name), linears) for name, linears in _LINEARS.items())


def _has_only(part: nn.Module, linears: set[str]) -> bool:
    """Whether it is made of these linears, which can be packed, and maybe an activation."""
    children = {name: child for name, child in part.named_children() if name != "act_fn"}
    packable = (isinstance(c, nn.Linear) and type(c) is nn.Linear and can_pack(c.weight) for c in children.values())
    return children.keys() == linears and all(packable)
