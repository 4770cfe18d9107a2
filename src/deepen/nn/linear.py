"""Linear layers packed once for oneDNN: fast for the few rows of a decoding pass, and the same bits at any row count.

`F.linear` on a CPU is slow for 2 to 16 rows and rounds a row differently depending on how many rows stand beside it.
A weight reordered once into oneDNN's blocked layout costs little more for 8 rows than for one, and its blocked kernel
treats each row alone. Only its single-row kernel sums in another order, so fewer than `MIN_ROWS` rows are padded:
then a token's result depends on neither the width of its pass nor on its batch-mates ("batch-invariant" kernels).

The operators are private to torch and serve inference alone: where a gradient is wanted, and on other devices and
dtypes, a packed layer computes `F.linear` as before.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_ROWS = 4
# The row count the layout is chosen for; the packed weight serves any other count too. Eight is a usual chunk.
_PACKED_FOR_ROWS = 8
# One in so many weights is looked at for changes that leave no other trace. A prime, so that it hits every column.
_SAMPLED = 4099


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's packed product exists for this weight: fp32 on a CPU, in a torch built with oneDNN."""
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return False
    return all(_operator(name) is not None for name in ("_reorder_linear_weight", "_linear_pointwise"))


def _operator(name: str) -> Callable[..., Tensor] | None:
    return getattr(torch.ops.mkldnn, name, None)


class PackedProduct:
    """The product with the stacked weights of linears that read the same input, `[.., K]` to `[.., sum of N]`.

    It has the weights of its last `refresh`, which notices every write but those through `.data`; for these there is
    `recheck`.
    """

    def __init__(self, *linears: nn.Linear) -> None:
        self._linears = linears
        self._watched: list[_Watched] = []
        self._usable = False
        self.refresh()

    def refresh(self) -> bool:
        """Pack anew if a weight has moved or changed since (a device, an optimizer step); false if none can pack it."""
        # Each product of each layer asks before each pass, so nothing is built to find that nothing has changed.
        for owner, name, parameter, pointer, version in self._watched:
            if owner.get(name) is not parameter or parameter.data_ptr() != pointer or version_of(parameter) != version:
                break
        else:
            if self._watched:
                return self._usable
        self._watched = [_watch(linear, name) for linear in self._linears for name in _given_parameters(linear)]
        self._usable = all(can_pack(linear.weight) for linear in self._linears)
        if self._usable:
            self._pack()
        return self._usable

    def recheck(self) -> None:
        """Make the next `refresh` pack anew if a sample of the weights isn't what it was."""
        if self._usable and not torch.equal(self._sample(), self._seen):
            self._watched = []

    def _pack(self) -> None:
        weight = torch.cat([linear.weight.detach() for linear in self._linears])
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
        biases = [linear.bias for linear in self._linears]
        self._bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
        self._seen = self._sample()

    def _sample(self) -> Tensor:
        tensors = (parameter.detach() for _, _, parameter, _, _ in self._watched)
        return torch.cat([tensor.flatten()[::_SAMPLED] for tensor in tensors])

    def __getstate__(self) -> dict[str, Any]:
        # A packed weight can't be copied or saved; whoever gets this packs it anew.
        return {"_linears": self._linears, "_watched": [], "_usable": False}

    def __call__(self, x: Tensor) -> Tensor:
        num_rows = x.numel() // x.shape[-1]
        if num_rows >= MIN_ROWS:
            return self._product(x)
        rows = F.pad(x.reshape(num_rows, x.shape[-1]), (0, 0, 0, MIN_ROWS - num_rows))
        return self._product(rows)[:num_rows].view(*x.shape[:-1], -1)

    def _product(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")


class Addition(ABC):
    """A forward hook of a linear that changes its output at some positions and leaves the others' bits alone.

    Where linears are computed together, and none of them is called, whoever does so applies it to the linear's share
    of the result.
    """

    @property
    @abstractmethod
    def learns(self) -> bool:
        """Whether it has weights that get a gradient where gradients are computed."""

    @abstractmethod
    def apply_(self, x: Tensor, y: Tensor) -> None:
        """In place in `y` `[.., N]`, which the linear makes of `x` `[.., K]`."""

    def __call__(self, linear: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # A copy: the output may be held elsewhere, and a gradient may need it as it was.
        changed = output.clone(memory_format=torch.contiguous_format)
        self.apply_(inputs[0], changed)
        return changed


class PackedForward:
    """Stands in for the `forward` of one `nn.Linear`, whose parameters stay where and what they are."""

    def __init__(self, linear: nn.Linear) -> None:
        self._linear = linear
        self._product = PackedProduct(linear)

    def __call__(self, x: Tensor) -> Tensor:
        linear = self._linear
        if (
            x.dtype != torch.float32
            or torch.is_autocast_enabled("cpu")
            or wants_gradient(x, linear.weight)
            or not self._product.refresh()
        ):
            return F.linear(x, linear.weight, linear.bias)
        return self._product(x)

    def recheck(self) -> None:
        """As that of the product."""
        self._product.recheck()


def wants_gradient(*operands: Tensor) -> bool:
    """Whether what is computed from these is to be differentiated, which packed operators can't."""
    return torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)


# A parameter of a linear, by whom it is held, and where and what it was.
_Watched = tuple[dict[str, nn.Parameter | None], str, nn.Parameter, int, int]


def _given_parameters(linear: nn.Linear) -> list[str]:
    return [name for name, parameter in linear._parameters.items() if parameter is not None]


def _watch(linear: nn.Linear, name: str) -> _Watched:
    parameter = linear._parameters[name]
    assert parameter is not None
    return linear._parameters, name, parameter, parameter.data_ptr(), version_of(parameter)


def version_of(parameter: Tensor) -> int:
    # Tensors born in inference mode keep no version counter, and nothing can write to them afterwards.
    return 0 if parameter.is_inference() else parameter._version


@dataclass(frozen=True)
class Packing:
    """The layers of one module that compute packed; `remove` gives them their own forward back."""

    linears: tuple[nn.Linear, ...]

    def remove(self) -> None:
        """Undo the packing; parameters were never touched."""
        for linear in self.linears:
            del linear.forward


def pack_linears(module: nn.Module, *, but_in: Iterable[nn.Module] = ()) -> Packing:
    """Pack every plain `nn.Linear` below `module` that can be packed, but those in `but_in`, which pack their own.

    A layer that is packed already stays with whoever packed it.

    The packed copies cost as much memory again as the weights. State dicts, names and parameters do not change.
    """
    others = {m for part in but_in for m in part.modules()}
    linears = tuple(
        m
        for m in module.modules()
        if type(m) is nn.Linear and m not in others and can_pack(m.weight) and "forward" not in vars(m)
    )
    for linear in linears:
        # On the instance, so that neither the class nor the module tree changes.
        linear.forward = PackedForward(linear)  # type: ignore[method-assign, assignment]
    return Packing(linears)
