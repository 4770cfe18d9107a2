"""What a grafted model adds to its base: parameters and compute, from the protocol and from its own description."""

from typing import Any, Protocol, runtime_checkable

from deepen.backbones.costs import pass_flops
from deepen.backbones.hf import Backbone
from deepen.metrics.ledger import count_parameters


@runtime_checkable
class Described(Protocol):
    """A model that has more to say about itself than the protocol asks for."""

    def describe(self) -> dict[str, str | int | float]:
        """Facts by label."""


def budget(model: Any, backbone: Backbone) -> dict[str, str | int | float]:
    """Facts by label, in full numbers; FLOPs count 2 per multiply-add, bytes are of one row's cache and states."""
    added, of_base = count_parameters(backbone.model, model).added, backbone.num_parameters
    facts: dict[str, str | int | float] = {
        "base parameters": of_base,
        "added parameters": added,
        "added parameters, share of the base's": round(added / of_base, 6),
        "base FLOPs per token": pass_flops(backbone, num_positions=1, context=0),
        "grafted FLOPs per token, without drafting": model.flops(num_positions=1, context=0),
    }
    return facts | (model.describe() if isinstance(model, Described) else {})
