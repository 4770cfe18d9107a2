"""An exponential moving average of the trained parameters."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """average <- decay * average + (1 - decay) * parameter, after every step; it begins as the parameters.

    Where a run is n steps long, about the last 1 / (1 - decay) of them count.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, decay: float) -> None:
        self._parameters = dict(parameters)
        self._decay = decay
        self.tensors: dict[str, Tensor] = {n: p.detach().clone() for n, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        current = [parameter.detach() for parameter in self._parameters.values()]
        torch._foreach_lerp_(list(self.tensors.values()), current, 1 - self._decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the averages for parameters while the block lasts."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self._parameters.items():
            held = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(held)
