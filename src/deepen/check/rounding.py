"""How far a model's logits move when every operation rounds otherwise: the yardstick of all comparisons.

Two right ways to compute the same (in pieces, in a batch, with a cache) differ by rounding, and how much of that
arrives at the logits depends on the model. So it is measured: noise of one unit of rounding is put on what each
innermost module gives, and the logits are compared with those without it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

_NUM_DRAWS = 5


@torch.no_grad()
def rounding_noise(model: nn.Module, logits: Callable[[], Tensor]) -> float:
    """The largest difference in a logit, the median of several draws: a router's rare flip is not noise."""
    exact = logits().double()
    floor = torch.finfo(exact.dtype).tiny + _epsilon(model) * float(exact.abs().max())
    moved = []
    for seed in range(_NUM_DRAWS):
        with _noisy(model, torch.Generator().manual_seed(seed)):
            moved.append(float((logits().double() - exact).abs().max()))
    return max(median(moved), floor)


def _epsilon(model: nn.Module) -> float:
    return torch.finfo(next(p.dtype for p in model.parameters() if p.is_floating_point())).eps


@contextmanager
def _noisy(model: nn.Module, source: torch.Generator) -> Iterator[None]:
    """While it lasts, what each innermost module gives is off by one unit of rounding of its typical size."""

    def hook(_module: nn.Module, _inputs: object, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(_rounded_otherwise(part, source) for part in output)
        return _rounded_otherwise(output, source)

    innermost = [module for module in model.modules() if not any(True for _ in module.children())]
    handles = [module.register_forward_hook(hook) for module in innermost]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded_otherwise(value: Any, source: torch.Generator) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
        return value
    noise = torch.randn(value.shape, generator=source, dtype=torch.float32).to(value.device)
    size = value.double().square().mean(dim=-1, keepdim=True).sqrt()
    return (value.double() + torch.finfo(value.dtype).eps * size * noise).to(value.dtype)
