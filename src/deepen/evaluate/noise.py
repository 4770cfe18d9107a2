"""Noise in the place of what was learnt, for claims that must hold whatever that is."""

import torch

from deepen.core.method import RecursiveModel

NOISE_STD = 5.0


@torch.no_grad()
def fill_with_noise(model: RecursiveModel, *, seed: int = 0) -> None:
    """Noise in every tensor of floats that a checkpoint of `model` would hold."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.saved_state().values():
        if tensor.is_floating_point():
            # Drawn on the CPU: the same on every device.
            tensor.copy_(torch.empty_like(tensor, device="cpu").normal_(std=NOISE_STD, generator=generator))
