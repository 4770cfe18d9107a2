"""Tensors by name, put into the places that a model has for them."""

from collections.abc import Mapping

import torch
from torch import Tensor

from deepen.core.errors import CheckpointError

_MOST_TOLD = 5


def fill(own: Mapping[str, Tensor], given: Mapping[str, Tensor], *, what: str) -> None:
    """Copy `given` into `own`; raises as `require_fit` does, before anything is copied."""
    require_fit(
        {name: tensor.shape for name, tensor in own.items()},
        {name: tensor.shape for name, tensor in given.items()},
        what=what,
    )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])


def require_fit(own: Mapping[str, torch.Size], given: Mapping[str, torch.Size], *, what: str) -> None:
    """Raises `CheckpointError`, which begins with `what`, for missing or unknown names and for other shapes."""
    problems = [f"missing {name}" for name in own if name not in given]
    problems += [f"unknown {name}" for name in given if name not in own]
    problems += [
        f"{name} is {list(given[name])}, expected {list(shape)}"
        for name, shape in own.items()
        if name in given and given[name] != shape
    ]
    if problems:
        more = f"; and {len(problems) - _MOST_TOLD} more" if len(problems) > _MOST_TOLD else ""
        raise CheckpointError(f"{what}: {'; '.join(problems[:_MOST_TOLD])}{more}")
