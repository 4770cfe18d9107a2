"""LoRA that acts at chosen positions of a pass; every other position stays the base's, bit for bit.

    y_i = W x_i + (alpha / rank) B A x_i    where the mask holds
    y_i = W x_i                             elsewhere

(Hu et al. 2021, arXiv 2106.09685). B starts at zero, so a new one changes nothing. It is in a model only while a block
of `acting_at` lasts, as hooks on linears: there it computes for the chosen positions and writes nowhere else, so that
whatever stands elsewhere, infinities too, reaches neither its results nor its gradients. Packed linears and fused
layers (nn/linear.py, fused.py) compute the others' rows with the kernels that they use without it.

What positions see of each other is the model's affair: a clean position stays as it is if those it sees are clean. In
a mixture of experts, changed positions may visit other experts; a product over more or fewer rows may then round the
clean ones among them differently.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn

from deepen.backbones.attention import places_of_pass
from deepen.backbones.hf import Backbone
from deepen.backbones.lasting import lasting
from deepen.backbones.linears import linears_of, named, sizes_of, visited_by_all
from deepen.core.errors import ConfigError, DeepenError, UnsupportedBackbone
from deepen.core.tensors import fill
from deepen.core.types import Work
from deepen.nn.linear import Addition


class GatedLora(nn.Module):
    """Low-rank additions to linears of some layers of a backbone, which act within `acting_at` alone.

    A and B have float32 at least, on the device of their linear, and compute in the dtype of what it reads.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        rank: int,
        alpha: float,
        layers: Sequence[int],
        targets: Sequence[str] | None = None,
    ) -> None:
        """Draws A from torch's generator; `layers` are counted from 0.

        `targets` are ends of names of linears, as q_proj or mlp.down_proj; None: all linears of these layers. The
        experts that tokens are routed to are never among them, nor the gates and routers of their mixture. Raises
        `ConfigError` for layers or targets that aren't there.
        """
        super().__init__()
        _check(backbone, rank, alpha, layers, targets)
        found = visited_by_all(linears_of(backbone, layers), backbone.model)
        self._linears = found if targets is None else named(found, targets)
        self.layers = tuple(layers)
        self._backbone = backbone
        self._scale = alpha / rank
        self.weights = nn.ModuleList(LowRank(linear, rank) for linear in self._linears.values())

    @contextmanager
    def acting_at(self, mask: Bool[Tensor, "B W"]) -> Iterator[None]:
        """In the block, passes of the backbone compute with LoRA at these positions; blocks in each other add up.

        A pass may be wider: what is behind the mask is clean. Forwards of the model that are no pass must have its
        width and no cache. A backward that runs parts of the forward again (activation checkpointing) belongs in
        the block, or does that in an `Again` (lasting.py). Other threads wait to pass until the block ends. An element
        to add that isn't finite is left out.
        """
        positions = _Positions(mask)
        gates = [
            (linear, _Gated(path, weights, self._scale, positions))  # type: ignore[arg-type]
            for (path, linear), weights in zip(self._linears.items(), self.weights, strict=True)
        ]
        with self._backbone.held(), lasting(_Hooks(gates if len(positions) else []).in_place):
            yield

    def tensors(self) -> dict[str, nn.Parameter]:
        """A and B of each linear, by its path in the model."""
        return {
            f"{path}.{name}": parameter
            for path, weights in zip(self._linears, self.weights, strict=True)
            for name, parameter in weights.named_parameters()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back `tensors`; a missing, unknown or misshapen one is a `CheckpointError` that names it."""
        fill(self.tensors(), state, what="the LoRA tensors don't fit this configuration on this base")

    @property
    def num_parameters(self) -> int:
        """Of all A and B."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def flops_per_position(self) -> int:
        """FLOPs (2 per multiply-add) of a pass at each position that the mask chooses; the others cost none."""
        return 2 * self.num_parameters

    @property
    def work_per_position(self) -> Work:
        """The same products in training, where a gradient reaches the lowest of the layers from below it.

        It does if what the base reads at these positions is learned, as the embedding of a slot.
        """
        return Work.of(self.num_parameters, operands=2)


class LowRank(nn.Module):
    """A and B of one linear."""

    def __init__(self, linear: nn.Module, rank: int) -> None:
        super().__init__()
        num_in, num_out = sizes_of(linear)
        weight: Tensor = linear.weight  # type: ignore[assignment]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        # Drawn on the CPU, the same for every device, but never drawn for "meta".
        device = torch.device("meta" if weight.is_meta else "cpu")
        self.lora_A = nn.Linear(num_in, rank, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(rank, num_out, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(self.lora_B.weight)
        self.to(weight.device)


class _Hooks:
    """Those of one block of `acting_at`."""

    def __init__(self, gates: Sequence[tuple[nn.Module, "_Gated"]]) -> None:
        self._gates, self._depth = gates, 0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block, each linear has its own; blocks may be nested."""
        with ExitStack() as hooks:
            for linear, gate in () if self._depth else self._gates:
                hooks.callback(linear.register_forward_hook(gate).remove)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1


class _Positions:
    """The chosen ones of a mask `[B, W]`."""

    def __init__(self, mask: Tensor) -> None:
        self._batch, self._width = mask.shape
        self._rows, self._columns = mask.nonzero(as_tuple=True)
        self._places: dict[tuple[tuple[int, ...], int], Tensor] = {}

    def __len__(self) -> int:
        return len(self._rows)

    def places(self, shape: torch.Size, path: str) -> Tensor:
        """`[N]`: which vectors of a tensor of this `shape` (without its last dimension) a linear reads there.

        Vectors are counted through all dimensions.
        """
        pass_ = places_of_pass()
        at_start = (0,) * self._batch
        offsets, width, num_entries = at_start, self._width, self._width
        if pass_ is not None:
            offsets, width, num_entries = pass_.offsets, pass_.width, pass_.num_keys
        if len(offsets) != self._batch or width < self._width:
            raise DeepenError(
                f"LoRA acts at positions of a mask {[self._batch, self._width]}, and the pass in its block is over "
                f"{len(offsets)} rows of {width} positions, pads included; give it a mask of the pass"
            )
        if shape in ((self._batch, width), (self._batch * width,)):
            return self._counted(at_start, width)
        if shape == (self._batch, 1, num_entries):
            # Latent attention expands stored entries, those of the pass behind the committed ones of their row.
            return self._counted(offsets, num_entries)
        raise UnsupportedBackbone(
            f"{path} reads {[*shape, '..']} in a forward that should be over {self._batch} rows of {width} positions, "
            "so which of them LoRA is to act at can't be told; give acting_at a mask of the forward's shape, or leave "
            "this linear out of lora_targets"
        )

    def _counted(self, offsets: tuple[int, ...], width: int) -> Tensor:
        """The places in rows of this width, in which the pass begins at these."""
        key = offsets, width
        if key not in self._places:
            columns = torch.tensor(offsets, device=self._rows.device)[self._rows] + self._columns
            # A pad of a long row has no entry, and its number is that of another row's.
            self._places[key] = (self._rows * width + columns)[columns < width]
        return self._places[key]


class _Gated(Addition):
    """Adds to a linear's output at the positions of one block."""

    def __init__(self, path: str, weights: LowRank, scale: float, positions: _Positions) -> None:
        self._path, self._scale, self._positions = path, scale, positions
        self._inner, self._outer = weights.lora_A.weight, weights.lora_B.weight

    @property
    def learns(self) -> bool:
        return self._inner.requires_grad or self._outer.requires_grad

    def apply_(self, x: Tensor, y: Tensor) -> None:
        places = self._positions.places(x.shape[:-1], self._path).to(x.device)
        # Chosen vectors alone, not a product over all: where x is infinite, a gradient of zero would still become NaN.
        chosen = x.reshape(-1, x.shape[-1]).index_select(0, places).to(self._inner.device)
        added = F.linear(F.linear(chosen, self._inner.to(x.dtype)), self._outer.to(x.dtype))
        # What isn't finite would reach positions that don't see it, weighed with zero by their attention.
        added = added.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        y.view(-1, y.shape[-1]).index_add_(0, places, added.to(y), alpha=self._scale)


def _check(backbone: Backbone, rank: int, alpha: float, layers: Sequence[int], targets: Sequence[str] | None) -> None:
    if rank < 1:
        raise ConfigError(f"lora_rank must be at least 1, not {rank}")
    if alpha <= 0:
        raise ConfigError(f"lora_alpha must be positive, not {alpha}")
    for name, given in (("lora_layers", layers), ("lora_targets", targets)):
        if given is not None and (not given or len(set(given)) < len(given)):
            raise ConfigError(f"{name} must name at least one, and each once, not {list(given)}")
    for layer in layers:
        if not 0 <= layer < backbone.num_layers:
            raise ConfigError(
                f"lora_layers names layer {layer}, but the model has {backbone.num_layers} layers "
                f"(0..{backbone.num_layers - 1})"
            )
