"""Layers of delta attention (Kimi Delta Attention, gated delta net) whose recurrence is computed by deepen's own op.

transformers' layers call one of two functions of their module for the recurrence. Here a layer gets a copy of its own
forward in which these names mean `delta_attention`; everything else is as it was, and neither the class nor the
library changes. Inside a pass the op also starts from the state that a `PrefixCache` holds, lets no pad reach it, and
leaves in the cache what a commit needs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from deepen.backbones.cache import RecurrentStore, recurrent_layers
from deepen.core.errors import UnsupportedBackbone
from deepen.nn.kda import delta_attention

# The functions that a kind of layer calls for its recurrence, by the name of its class.
_KERNELS = {
    "KimiLinearDeltaAttention": ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention"),
    "Qwen3NextGatedDeltaNet": ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"),
}
# Arguments that say where one of several sequences in a row ends.
_PACKED = ("cu_seqlens", "cu_seq_lens_q", "seq_idx")
# What a `PrefixCache` holds of the layer that is being computed; None outside of passes.
_store: ContextVar[RecurrentStore | None] = ContextVar("store", default=None)


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
        forward = vars(part).get(_slot(part))
        if not isinstance(forward, DeltaForward):
            setattr(part, _slot(part), DeltaForward(part, before=forward))
    return len(parts)


def stop_using_delta_attention(model: nn.Module) -> None:
    """Give the layers their own forward back."""
    for part in model.modules():
        forward = vars(part).get(_slot(part))
        if isinstance(forward, DeltaForward):
            _put(part, forward.before)


@contextmanager
def recurrence_of_pass(forwards: Iterable["DeltaForward"]) -> Iterator[None]:
    """In the block, the parts that these belong to compute by them, from the `PrefixCache` that they are given."""
    before = [(forward.part, vars(forward.part).get(_slot(forward.part))) for forward in forwards]
    for forward in forwards:
        _put(forward.part, forward)
    try:
        yield
    finally:
        for part, own in before:
            _put(part, own)


def _slot(part: nn.Module) -> str:
    """The attribute of the instance that is called for the layer's own forward: accelerate's hooks stand before it."""
    return "_old_forward" if "_old_forward" in vars(part) else "forward"


def _put(part: nn.Module, forward: object) -> None:
    """None is the forward of the class."""
    slot = _slot(part)
    if forward is not None or slot != "forward":
        setattr(part, slot, forward if forward is not None else MethodType(type(part).forward, part))
    else:
        del part.forward


class DeltaForward:
    """Stands in for the `forward` of one layer of delta attention: the layer's own, but for the recurrence."""

    def __init__(self, part: nn.Module, before: object = None) -> None:
        """`before` is what the instance has in this place; None if it has the forward of its class."""
        self.part, self.before = part, before
        self.layer: int = part.layer_idx  # type: ignore[assignment]
        self._forward = rebound(type(part).forward, dict.fromkeys(_KERNELS[type(part).__name__], _attend))

    def __call__(self, *args: Any, cache_params: Any = None, **kwargs: Any) -> Tensor:
        if any(kwargs.get(name) is not None for name in _PACKED):
            raise UnsupportedBackbone(
                "deepen's delta attention does not keep sequences packed into one row apart; give each its own row"
            )
        held = cache_params.layers[self.layer] if cache_params is not None else None
        token = _store.set(held if isinstance(held, RecurrentStore) else None)
        try:
            return self._forward(self.part, *args, cache_params=cache_params, **kwargs)
        finally:
            _store.reset(token)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **_: object,
) -> tuple[Tensor, Tensor]:
    """In place of transformers' functions; the final state is given wanted or not."""
    store = _store.get()
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
    """A copy of `function`, and of what it decorates, in which these names of its module have these meanings.

    Its other names mean what they mean now. Raises `UnsupportedBackbone` if a name is not used, or if what is decorated
    can't be reached.
    """
    inner = getattr(function, "__wrapped__", None)
    closure = function.__closure__ or ()
    if inner is not None:
        if not any(cell.cell_contents is inner for cell in closure):
            raise UnsupportedBackbone(
                f"{function.__qualname__} of this transformers release is decorated in another way"
            )
        again = rebound(inner, meanings)
        closure = tuple(CellType(again) if cell.cell_contents is inner else cell for cell in closure)
    elif unused := meanings.keys() - set(function.__code__.co_names):
        raise UnsupportedBackbone(
            f"{function.__qualname__} of this transformers release does not call {', '.join(sorted(unused))}"
        )
    globals_ = {**function.__globals__, **meanings}
    copy = FunctionType(function.__code__, globals_, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
