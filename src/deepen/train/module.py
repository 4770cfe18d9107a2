"""A method's model as the one module whose `forward` is a training step, and what is put around it.

Sharding, compiling and activation checkpointing hang on `forward`, which the protocol's `train_step` is not.
"""

import textwrap
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from deepen.backbones.lasting import Again
from deepen.core.errors import CannotTrain, DeepenError
from deepen.core.memory import is_out_of_memory
from deepen.core.method import Recurring
from deepen.core.types import Batch, Progress, StepOutput


class StepModule(nn.Module):
    """The model, and the base it stands on where that is no part of it; parameters have one name each here."""

    def __init__(self, model: Any, base: nn.Module | None) -> None:
        super().__init__()
        self.model = model
        self.base = base
        self.is_sharded = self.is_compiled = False
        self._gathered: list[FSDPModule] = []

    def forward(self, batch: Batch, carry: Any, progress: Progress) -> StepOutput:
        """`RecursiveModel.train_step`."""
        try:
            output: StepOutput = self.model.train_step(batch, carry, progress)
        except DeepenError:
            raise
        except Exception as cause:  # a compiler fails in any way
            if not self.is_compiled or is_out_of_memory(cause):
                raise
            raise CannotTrain(
                "compile is true, and the compiled layers failed in a training step of this method "
                f"({type(cause).__name__}: {textwrap.shorten(str(cause), 160, placeholder=' ...')}); set it to false"
            ) from cause
        return output

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """By name, those that an optimizer moves."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def what_trains(self) -> str:
        """The parts of the model that an optimizer moves, with their parameters, for people to read."""
        sizes: dict[str, int] = {}
        for name, parameter in self.trained_parameters().items():
            part = name.split(".")[1]
            sizes[part] = sizes.get(part, 0) + parameter.numel()
        total = sum(parameter.numel() for parameter in self.parameters())
        parts = ", ".join(f"{part} {size:,}" for part, size in sizes.items())
        return f"trains {sum(sizes.values()):,} of {total:,} parameters: {parts}"

    def own_buffers(self) -> dict[str, Tensor]:
        """By name, the buffers of the method that a checkpoint keeps, such as thresholds; the base's never move."""
        of_base = {id(buffer) for buffer in self.base.buffers()} if self.base is not None else set()
        kept = self.model.state_dict(keep_vars=True)
        return {
            f"model.{name}": buffer
            for name, buffer in self.model.named_buffers()
            if name in kept and id(buffer) not in of_base
        }

    def shard(self) -> None:
        """Shard parameters over ranks (FSDP2), unit by unit; gradients are summed, as losses are divided already.

        Units that recur are gathered once a step (`gather`), and not before and behind each of their uses.
        """
        # Values come out of layers as views of projections; nobody writes to them.
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        recurring = self.model.recurring_units() if isinstance(self.model, Recurring) else []
        for unit in self.model.shard_units():
            fully_shard(unit, reshard_after_forward=unit not in recurring)
        fully_shard(self)
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
                module.set_reshard_after_backward(module not in recurring, recurse=False)
        self._gathered = [unit for unit in recurring if isinstance(unit, FSDPModule)]
        self.is_sharded = True

    def gather(self) -> None:
        """Put together what is in no unit, and the units that recur, from all ranks' shards; what is whole stays.

        Every rank does so before each forward, in the same order. How often such a unit runs in the forward is a rank's
        own affair, and it may be never, so that one that waited there for the others could wait for good. And what a
        method puts in its base's place meanwhile (`adapted`) is then whole.
        """
        if isinstance(self, FSDPModule):
            self.unshard()
        for unit in self._gathered:
            unit.unshard()

    def release(self) -> None:
        """Let go of units that were gathered for a step: after its last backward, before their parameters move."""
        for unit in self._gathered:
            unit.reshard()

    def compile_units(self) -> None:
        """Compile the model unit by unit, in place: equal units share their code."""
        for unit in self.model.shard_units():
            unit.compile()
        self.is_compiled = True

    def checkpoint_activations(self) -> None:
        """Keep no activations inside units: the backward runs each unit's forward again, in what lasted the first time.

        See backbones/lasting.py. What is `adapted` in a model must last until the backward ends.
        """
        for unit in self.model.shard_units():
            unit.forward = _recomputing(unit.forward)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def recomputing(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # A compiler traces a forward with all that acts on it, once for both runs, and knows no contexts.
        contexts: dict[str, Any] = {} if torch.compiler.is_compiling() else {"context_fn": _of_both_runs}
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    return recomputing


def _of_both_runs() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a unit's forward runs in: the first time what is there, and in the backward the same again."""
    return nullcontext(), Again()


def whole(tensor: Tensor) -> Tensor:
    """A tensor with its shards from all ranks, which all must ask for; any other is itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
