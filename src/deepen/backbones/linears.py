"""Which linears of a model an adapter is for: those of some layers, by the ends of their names."""

from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers.pytorch_utils import Conv1D  # a linear layer with its weight transposed

from deepen.backbones.hf import Backbone
from deepen.core.errors import ConfigError
from deepen.core.hints import did_you_mean

# What a mixture of experts has, and how the parts of it begin that every token visits.
_EXPERTS, _SHARED = "experts", "shared"


def linears_of(backbone: Backbone, layers: Iterable[int]) -> dict[str, nn.Module]:
    """Every linear of these layers, by its path in the model."""
    chosen = [backbone.layers[index] for index in layers]
    wanted = {module for layer in chosen for module in layer.modules() if _is_linear(module)}
    return {path: module for path, module in backbone.model.named_modules() if module in wanted}


def named(linears: Mapping[str, nn.Module], targets: Sequence[str]) -> dict[str, nn.Module]:
    """Those whose names end so, as q_proj or mlp.down_proj; raises `ConfigError` for a target that names none."""
    for target in targets:
        if not any(_ends(path, target) for path in linears):
            names = {path.rpartition(".")[2] for path in linears}
            raise ConfigError(f'lora_targets names "{target}", which is no linear there{did_you_mean(target, names)}')
    return {path: each for path, each in linears.items() if any(_ends(path, target) for target in targets)}


def visited_by_all(linears: Mapping[str, nn.Module], model: nn.Module) -> dict[str, nn.Module]:
    """Those but the experts that tokens are routed to, and the gates and routers of their mixtures."""
    return {path: each for path, each in linears.items() if not _is_routed(model, path)}


def is_transposed(module: nn.Module) -> bool:
    """Whether its weight is `[in, out]`, as GPT-2's."""
    return isinstance(module, Conv1D)


def sizes_of(linear: nn.Module) -> tuple[int, int]:
    """What it reads and what it gives."""
    if isinstance(linear, Conv1D):
        return tuple(linear.weight.shape)
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_transposed(module)


def _ends(path: str, target: str) -> bool:
    return f".{path}".endswith(f".{target}")


def _is_routed(model: nn.Module, path: str) -> bool:
    names = path.split(".")
    module = model
    for depth, name in enumerate(names[:-1], start=1):
        module = module.get_submodule(name)
        # A linear right in a mixture is a gate, a shared expert's too: the expert itself is a module of linears.
        is_gate = depth == len(names) - 1
        if _EXPERTS in module._modules and (is_gate or not names[depth].startswith(_SHARED)):
            return True
    return False
