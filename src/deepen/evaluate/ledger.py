"""What a model costs, from its modules and the method's own account: parameters, FLOPs, bytes of state."""

from collections.abc import Callable
from typing import Protocol

from torch import nn

from deepen.backbones.costs import pass_flops, row_state_bytes
from deepen.backbones.hf import Backbone
from deepen.core.method import RecursiveModel

CONTEXTS = (0, 1024)
"""Tokens of context for which FLOPs and bytes are told."""


class PassFlops(Protocol):
    """FLOPs of one row's pass."""

    def __call__(self, *, num_positions: int, context: int) -> int:
        """2 per multiply-add, over `num_positions` tokens behind `context` committed ones."""


def flops_of(backbone: Backbone, model: RecursiveModel | None) -> PassFlops:
    """How the passes of this model are counted: by the method, or those of the base alone."""
    if model is not None:
        return model.flops

    def of_base(*, num_positions: int, context: int) -> int:
        return pass_flops(backbone, num_positions=num_positions, context=context)

    return of_base


def ledger(backbone: Backbone, model: RecursiveModel | None) -> dict[str, int | float | None]:
    """By name: parameters, FLOPs of a token (2 per multiply-add) and bytes of one row's cache and states.

    `parameters_total` counts tied ones as often as they are used; `parameters_trainable` are those the method's
    optimizer would get, none for a base alone.
    """
    flops = flops_of(backbone, model)
    modules = [backbone.model, *([model] if isinstance(model, nn.Module) else [])]
    found: dict[str, int | float | None] = {
        "parameters_unique": _count(modules, once=True),
        "parameters_total": _count(modules, once=False),
        "parameters_added": _count(modules, once=True) - backbone.num_parameters,
        "parameters_trainable": _trainable(model),
        "layers": backbone.num_layers,
    }
    state_bytes: Callable[..., int] = (
        model.state_bytes if model is not None else lambda *, context: row_state_bytes(backbone, context=context)
    )
    found |= {f"flops_per_token_at_{context}": flops(num_positions=1, context=context) for context in CONTEXTS}
    return found | {f"state_bytes_at_{context}": state_bytes(context=context) for context in CONTEXTS}


def _count(modules: list[nn.Module], *, once: bool) -> int:
    """Parameters below these modules, which may hold each other; tied ones once, or under each of their names."""
    of_base, *others = modules
    base = {id(parameter) for parameter in of_base.parameters()}
    total = sum(p.numel() for _, p in of_base.named_parameters(remove_duplicate=once))
    for module in others:
        total += sum(p.numel() for _, p in module.named_parameters(remove_duplicate=once) if id(p) not in base)
    return total


def _trainable(model: RecursiveModel | None) -> int:
    if model is None:
        return 0
    parameters = {id(p): p.numel() for group in model.optim_groups() for p in group["params"]}
    return sum(parameters.values())
