"""Own versions of some layers' parameters, which stand in the base's place only while a block lasts.

So a base can be tuned and stay itself: its parameters are never written to, and what has become of them is saved apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deepen.backbones.hf import Backbone
from deepen.core.errors import ConfigError
from deepen.core.tensors import fill


class TunedLayers(nn.Module):
    """All parameters of some layers of a backbone, once more; at first the same.

    They have float32 at least, and are rounded to the base's dtype where they stand in.
    """

    def __init__(self, backbone: Backbone, layers: Sequence[int]) -> None:
        """`layers` are counted from 0. Raises `ConfigError` for one that isn't there, and for none."""
        super().__init__()
        _check(backbone, layers)
        self.layers = tuple(layers)
        self._backbone = backbone
        chosen = {parameter for layer in layers for parameter in backbone.layers[layer].parameters()}
        self._places = {
            f"{path}.{name}": (module, name, parameter)
            for path, module in backbone.model.named_modules()
            for name, parameter in module.named_parameters(recurse=False)
            if parameter in chosen
        }
        self.weights = nn.ParameterList(_copied(parameter) for _, _, parameter in self._places.values())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block, the model computes with them; blocks may be nested."""
        own = [
            weight if weight.dtype == parameter.dtype else weight.to(parameter.dtype)
            for weight, (_, _, parameter) in zip(self.weights, self._places.values(), strict=True)
        ]
        with self._standing(own):
            yield

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """In the block, which may be inside one of `in_place`, the model computes with the base's own."""
        with self._standing([parameter for _, _, parameter in self._places.values()]):
            yield

    @contextmanager
    def _standing(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        with self._backbone.held():
            before = [module._parameters[name] for module, name, _ in self._places.values()]
            try:
                self._put(tensors)
                yield
            finally:
                self._put(before)

    def _put(self, tensors: Sequence[Tensor | None]) -> None:
        for (module, name, _), tensor in zip(self._places.values(), tensors, strict=True):
            # Past `register_parameter`, which would refuse what was rounded: that is no parameter.
            module._parameters[name] = tensor

    def distance(self) -> Tensor:
        """The squared distance from the base's own parameters, with gradient: an L2 pull back to them."""
        parts = [
            (weight - parameter.detach().to(weight.dtype)).square().sum()
            for weight, (_, _, parameter) in zip(self.weights, self._places.values(), strict=True)
        ]
        return torch.stack(parts).sum()

    def tensors(self) -> dict[str, nn.Parameter]:
        """Each by its path in the model."""
        return dict(zip(self._places, self.weights, strict=True))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back `tensors`; a missing, unknown or misshapen one is a `CheckpointError` that names it."""
        fill(self.tensors(), state, what="the tuned layers don't fit this configuration on this base")


def _copied(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32)).clone())


def _check(backbone: Backbone, layers: Sequence[int]) -> None:
    if not layers or len(set(layers)) < len(layers):
        raise ConfigError(f"tuned layers must be at least one, and each once, not {list(layers)}")
    for layer in layers:
        if not 0 <= layer < backbone.num_layers:
            raise ConfigError(f"layer {layer} can't be tuned: the model has layers 0..{backbone.num_layers - 1}")
