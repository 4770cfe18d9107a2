"""Layers of delta attention (Kimi Delta Attention, gated delta net) whose recurrence is computed by deepen's own op.

transformers' layers call one of two functions of their module for the recurrence. Here a layer gets a copy of its own
forward in which these names mean `delta_attention`; everything else is as it was, and neither the class nor the
library changes. Inside a pass the op also starts from the state that a `PrefixCache` holds, lets no pad reach it, and
leaves in the cache what a commit needs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CellType, FunctionType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from deepen.backbones.cache import PrefixCache, RecurrentStore, recurrent_layers
from deepen.core.errors import UnsupportedBackbone
from deepen.nn.kda import delta_attention

# The functions that a kind of layer calls for its recurrence, by the name of its class.
_KERNELS = {
    "KimiLinearDeltaAttention": ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
    "Qwen3NextGatedDeltaNet": ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
}


def delta_forwards(layers: nn.ModuleList, config: PreTrainedConfig) -> tuple["DeltaForward", ...]:
    """A forward for the delta-attention part of each recurrent layer, to be put there with `recurrence_of_pass`.

    Raises `UnsupportedBackbone` naming a layer that has no such part.
    """
    return tuple(DeltaForward(_delta_part(index, layers[index])) for index in recurrent_layers(config))


def _delta_part(index: int, layer: nn.Module) -> nn.Module:
    for part in layer.modules():
        if type(part).__name__ in _KERNELS:
            return part
    parts = ", ".join(type(part).__name__ for part in layer.children())
    raise UnsupportedBackbone(
        f"layer {index} is recurrent, and none of its parts ({parts}) is one whose state can be taken back to an "
        f"earlier token; supported are {' and '.join(_KERNELS)}"
    )


def use_delta_attention(model: nn.Module) -> int:
    """Let every layer of delta attention in `model` compute with deepen's op from now on, wherever it is called.

    For training, and for transformers' own `generate`; passes of a `Backbone` do so unasked. Parameters, state dict
    and class stay what they were. Returns the number of layers; `stop_using_delta_attention` undoes it.
    """
    parts = [part for part in model.modules() if type(part).__name__ in _KERNELS]
    for part in parts:
        part.forward = DeltaForward(part)
    return len(parts)


def stop_using_delta_attention(model: nn.Module) -> None:
    """Give the layers their own forward back."""
    for part in model.modules():
        if isinstance(vars(part).get("forward"), DeltaForward):
            del part.forward


@contextmanager
def recurrence_of_pass(forwards: Iterable["DeltaForward"]) -> Iterator[None]:
    """In the block, the parts that these belong to compute by them, from the `PrefixCache` that they are given."""
    before = [(forward.part, vars(forward.part).get("forward")) for forward in forwards]
    for forward in forwards:
        forward.part.forward = forward
    try:
        yield
    finally:
        for part, own in before:
            if own is None:
                del part.forward
            else:
                part.forward = own


class DeltaForward:
    """Stands in for the `forward` of one layer of delta attention: the layer's own, but for the recurrence."""

    def __init__(self, part: nn.Module) -> None:
        self.part = part
        kernels = dict.fromkeys(_KERNELS[type(part).__name__], self._attend)
        self._forward = rebound(type(part).forward, kernels)
        self._store: RecurrentStore | None = None

    def __call__(self, *args: Any, cache_params: Any = None, **kwargs: Any) -> Tensor:
        self._store = cache_params.layers[self.part.layer_idx] if isinstance(cache_params, PrefixCache) else None
        try:
            return self._forward(self.part, *args, cache_params=cache_params, **kwargs)
        finally:
            self._store = None

    def __reduce__(self) -> tuple[type["DeltaForward"], tuple[nn.Module]]:
        # A copy of the function would still call this one's `_attend`.
        return DeltaForward, (self.part,)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor | None = None,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, Tensor]:
        """In place of transformers' functions; the final state is given wanted or not."""
        if cu_seqlens is not None:
            raise UnsupportedBackbone(
                "deepen's delta attention does not keep sequences packed into one row apart; give each its own row"
            )
        store = self._store
        output = delta_attention(
            query,
            key,
            value,
            g,
            beta,
            initial=initial_state,
            real=store.real if store is not None else None,
            normalize=use_qk_l2norm_in_kernel,
        )
        if store is not None:
            store.record(output)
        return output.out, output.state


def rebound(function: Callable[..., Any], meanings: Mapping[str, Any]) -> Callable[..., Any]:
    """`function`, and what it decorates, with these meanings of the module's names; raises if none of them is used."""
    inner = getattr(function, "__wrapped__", None)
    closure = function.__closure__ or ()
    if inner is not None:
        again = rebound(inner, meanings)
        closure = tuple(CellType(again) if cell.cell_contents is inner else cell for cell in closure)
    elif unused := meanings.keys() - set(function.__code__.co_names):
        raise UnsupportedBackbone(
            f"{function.__qualname__} of this transformers release does not call {', '.join(sorted(unused))}"
        )
    code, globals_ = function.__code__, function.__globals__
    copy = FunctionType(code, {**globals_, **meanings}, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
