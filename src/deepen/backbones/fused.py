"""Layers of the llama shape, computed in few large operations while a pass runs.

At the few positions of a decoding pass, a layer's time goes to reading its weights, and next to that to the number of
its operations: some 40 small ones and 11 modules called. Here queries, keys and values come from one product, gate and
up from another, queries and keys are rotated together, and no module but the layer is called. Values agree with the
layer's own forward to rounding; like packed linears (nn/linear.py), they have the same bits at any width of a pass.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from deepen.backbones.attention import visibility_of_pass
from deepen.nn.attention import Visibility, attend
from deepen.nn.linear import PackedProduct, can_pack, wants_gradient

_LINEARS_OF_A_LAYER = 7


class FusedLayers:
    """The layers of one model that compute fused; parameters stay where and what they are."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        """Fuse those that are exactly llama's and can be packed."""
        self.layers = tuple(layer for layer in layers if _can_fuse(layer))
        self._forwards = [_FusedForward(layer) for layer in self.layers]
        for layer, forward in zip(self.layers, self._forwards, strict=True):
            # On the instance, so that neither the class nor the module tree changes.
            layer.forward = forward

    @contextmanager
    def used(self) -> Iterator[None]:
        """In the block each layer is fused, if it can be as the block begins; otherwise, and outside, it is itself."""
        rotation = _Rotation()
        for forward in self._forwards:
            forward.begin(rotation)
        try:
            yield
        finally:
            for forward in self._forwards:
                forward.end()

    def remove(self) -> None:
        """Give every layer its own forward back."""
        for layer in self.layers:
            del layer.forward


class _FusedForward:
    """Stands in for the `forward` of one llama layer.

    It serves passes without gradients. In training, with a hook on one of the layer's parts or with a part replaced
    (an adapter), the layer computes as before.
    """

    def __init__(self, layer: LlamaDecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._layer = layer
        self._parts = [(m, name, part) for m in layer.modules() for name, part in m.named_children()]
        self._qkv = PackedProduct(attention.q_proj, attention.k_proj, attention.v_proj)
        self._out = PackedProduct(attention.o_proj)
        self._gate_up = PackedProduct(mlp.gate_proj, mlp.up_proj)
        self._down = PackedProduct(mlp.down_proj)
        self._head_dim = attention.head_dim
        self._num_values = attention.v_proj.out_features // attention.head_dim
        self._rotation: _Rotation | None = None

    def begin(self, rotation: "_Rotation") -> None:
        """Compute fused from now on, with the rotation that the layers of a pass share, if nothing is in the way."""
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in self._layer.parameters())
        if learning or self._layer.training or self._changed():
            return
        for product in (self._qkv, self._out, self._gate_up, self._down):
            product.refresh()
        self._rotation = rotation

    def end(self) -> None:
        """Be the layer's own forward again."""
        self._rotation = None

    def _changed(self) -> bool:
        return any(
            parent._modules[name] is not part or part._forward_hooks or part._forward_pre_hooks
            for parent, name, part in self._parts
        )

    def __call__(self, hidden_states: Tensor, **arguments: object) -> Tensor:
        visibility = visibility_of_pass()
        if self._rotation is None or visibility is None or wants_gradient(hidden_states):
            return type(self._layer).forward(self._layer, hidden_states, **arguments)
        return self._forward(hidden_states, visibility, self._rotation, **arguments)

    def _forward(
        self,
        h: Tensor,
        visibility: Visibility,
        rotation: "_Rotation",
        *,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: object,
        **_: object,
    ) -> Tensor:
        layer = self._layer
        heads = self._qkv(_norm(layer.input_layernorm, h)).unflatten(-1, (-1, self._head_dim))
        turned = rotation.turn(heads[:, :, : -self._num_values], position_embeddings).transpose(1, 2)
        q, k, v = turned[:, : -self._num_values], turned[:, -self._num_values :], heads[:, :, -self._num_values :]
        k, v = past_key_values.update(k, v.transpose(1, 2), layer.self_attn.layer_idx)  # type: ignore[attr-defined]
        attended = attend(q, k, v, visibility=visibility, scale=layer.self_attn.scaling)
        h = h + self._out(attended.flatten(-2))
        gate, up = self._gate_up(_norm(layer.post_attention_layernorm, h)).chunk(2, dim=-1)
        return h + self._down(layer.mlp.act_fn(gate) * up)


class _Rotation:
    """Rotary positions of one pass, in the form that turns every head at once."""

    def __init__(self) -> None:
        self._given: tuple[Tensor, Tensor] | None = None

    def turn(self, heads: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """`[B, W, H, E]` rotated by transformers' `(cos, sin)`, each `[B, W, E]`."""
        if position_embeddings is not self._given:
            cos, sin = position_embeddings
            half = cos.shape[-1] // 2
            # Halves swapped instead of rotated, so the sign of the first half moves into the sine.
            self._cos = cos[:, :, None]
            self._sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)[:, :, None]
            self._half, self._given = half, position_embeddings
        return torch.addcmul(heads * self._cos, heads.roll(self._half, dims=-1), self._sin)


def _norm(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _can_fuse(layer: nn.Module) -> bool:
    if type(layer) is not LlamaDecoderLayer or "forward" in vars(layer):
        return False
    linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    return len(linears) == _LINEARS_OF_A_LAYER and all(type(m) is nn.Linear and can_pack(m.weight) for m in linears)
