"""What a grafted model adds to its base: parameters and compute, from the protocol and from its own description."""

from typing import Any, Protocol, runtime_checkable

from deepen.backbones.costs import pass_flops
from deepen.backbones.hf import Backbone


@runtime_checkable
class Described(Protocol):
    """A model that has more to say about itself than the protocol asks for."""

    def describe(self) -> dict[str, str | int | float]:
        """Facts by label."""


def budget(model: Any, backbone: Backbone) -> dict[str, str | int | float]:
    """Facts by label, in full numbers; FLOPs count 2 per multiply-add, bytes are of one row's cache and states."""
    of_base = {id(parameter) for parameter in backbone.model.parameters()}
    added = sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in of_base)
    base_flops = pass_flops(backbone, num_positions=1, context=0)
    facts: dict[str, str | int | float] = {
        "base parameters": backbone.num_parameters,
        "added parameters": added,
        "added parameters, share of the base's": round(added / backbone.num_parameters, 6),
        "base FLOPs per token": base_flops,
        "grafted FLOPs per token, without drafting": model.flops(num_positions=1, context=0),
    }
    return facts | (model.describe() if isinstance(model, Described) else {})
