"""Muon for matrices: momentum made orthogonal (Jordan et al. 2024; Liu et al. 2025, arXiv:2502.16982)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Of Jordan's quintic, whose slope at zero is as steep as five iterations allow; torch.optim.Muon's defaults.
_COEFFICIENTS = 3.4445, -4.7750, 2.0315
_NUM_ITERATIONS = 5
_EPSILON = 1e-7


class Float32Muon(torch.optim.Muon):
    """`torch.optim.Muon`, whose iteration runs in bfloat16, with the iteration in float32.

    For devices without bfloat16 products, where each of them is some 70 times slower. The state is the same.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step down the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group)
        return loss

    def _move(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None, "only parameters with gradient are moved"
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        # As large as AdamW's updates (Liu et al.), so that one learning rate serves both.
        scale = 0.2 * math.sqrt(max(parameter.shape))
        parameter.add_(orthogonalized(update.float()).to(parameter.dtype), alpha=-group["lr"] * scale)


def orthogonalized(matrix: Tensor) -> Tensor:
    """About U V^T of `matrix` `[M, N]` = U S V^T: the same singular vectors, singular values near 1 (0.7 to 1.2)."""
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if is_tall else matrix
    x = x / x.norm().clamp(min=_EPSILON)
    for _ in range(_NUM_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if is_tall else x


def make_muon(groups: Sequence[dict[str, Any]], device: torch.device) -> torch.optim.Muon:
    """Over groups of matrices on `device`; each group has its `lr` and `weight_decay`."""
    optimizer = torch.optim.Muon if device.type == "cuda" else Float32Muon
    return optimizer(groups, adjust_lr_fn="match_rms_adamw")


def is_for_muon(parameter: nn.Parameter, tables: set[nn.Parameter]) -> bool:
    """Whether it is a matrix between hidden states: `tables` (embedding and head) have a row for each token instead."""
    return parameter.ndim == 2 and min(parameter.shape) > 1 and parameter not in tables
