"""LoRA by peft, beside a model and not in it: its layers stand in the place of linears only while they are wanted.

    y = W x + (alpha / rank) B A dropout(x)

(Hu et al. 2021, arXiv 2106.09685). B starts at zero, so new adapters change nothing.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from deepen.backbones.hf import Backbone
from deepen.backbones.linears import is_transposed, linears_of, named
from deepen.core.tensors import fill

from .config import DenseConfig

_NAME = "default"
"""What peft calls the only adapter of a layer."""


class LoraAdapters(nn.Module):
    """peft's layers for some linears of a backbone, which stays as it is but within `in_place`."""

    def __init__(self, config: DenseConfig, backbone: Backbone) -> None:
        """Draws A from torch's generator; raises `ConfigError` for layers or targets that aren't there."""
        super().__init__()
        self._backbone = backbone
        layers = _made_by_peft(config, _targets(config, backbone))
        self.layers = nn.ModuleList(layers.values())
        self._paths = tuple(layers)
        self._places = tuple(_place(backbone.model, path) for path in layers)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block, the model computes with LoRA; blocks may be nested."""
        with self._backbone.held():
            before = [children[name] for children, name in self._places]
            try:
                self._put(self.layers)
                yield
            finally:
                self._put(before)

    def _put(self, modules: Iterable[nn.Module | None]) -> None:
        for (children, name), module in zip(self._places, modules, strict=True):
            children[name] = module

    def tensors(self) -> dict[str, nn.Parameter]:
        """A and B of each linear, by its path in the model."""
        return {
            f"{path}.{part}.weight": getattr(layer, part)[_NAME].weight
            for path, layer in zip(self._paths, self.layers, strict=True)
            for part in ("lora_A", "lora_B")
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take back `tensors`; a missing, unknown or misshapen one is a `CheckpointError` that names it."""
        fill(self.tensors(), state, what="the LoRA tensors don't fit this configuration on this base")


def _targets(config: DenseConfig, backbone: Backbone) -> dict[str, nn.Module]:
    """The linears that get LoRA, by path."""
    linears = linears_of(backbone, config.layers_of(backbone.num_layers))
    return linears if isinstance(config.lora_targets, str) else named(linears, config.lora_targets)


def _made_by_peft(config: DenseConfig, linears: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """A layer with LoRA for each of these linears, which is part of it; they stay as they are."""
    from peft import LoraConfig, inject_adapter_in_model

    trained = {each: each.requires_grad for linear in linears.values() for each in linear.parameters()}
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=r"\d+",
        fan_in_fan_out=any(map(is_transposed, linears.values())),
    )
    # Not in the model: there peft takes names like down_proj in a mixture of experts for stacked weights.
    apart = nn.ModuleList(linears.values())
    inject_adapter_in_model(settings, apart, adapter_name=_NAME)
    for parameter, is_trained in trained.items():
        parameter.requires_grad_(is_trained)
    for layer in apart:
        _widen(layer)
    return dict(zip(linears, apart, strict=True))


def _widen(layer: nn.Module) -> None:
    """Small updates of 16-bit numbers get lost, so A and B have float32 at least; peft casts around them."""
    for name, parameter in layer.named_parameters():
        if name.startswith("lora_"):
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def _place(model: nn.Module, path: str) -> tuple[dict[str, nn.Module | None], str]:
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent)._modules, name
