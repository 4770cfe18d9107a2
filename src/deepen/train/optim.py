"""What moves the parameters: AdamW over the method's groups, with Muon for matrices where a run asks for it."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deepen.core.errors import CannotTrain, DeepenError
from deepen.train.muon import is_for_muon, make_muon

OptimizerName = Literal["adamw", "muon"]

# AdamW's betas mean nothing to it.
_MUON_FIELDS = "params", "lr", "weight_decay"


class Optimizers:
    """One or two optimizers that together hold each trained parameter once, and move as one.

    Groups keep the learning rate they began with; a step gets it times the schedule's factor.
    """

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers
        self._full_rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    @property
    def groups(self) -> list[dict[str, Any]]:
        """All of them."""
        return [group for optimizer in self._optimizers for group in optimizer.param_groups]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that are moved, in the groups' order."""
        return [parameter for group in self.groups for parameter in group["params"]]

    @property
    def learning_rate(self) -> float:
        """Of the first group."""
        return float(self.groups[0]["lr"])

    def set_rates(self, factor: float) -> None:
        """Each group's own learning rate times `factor`."""
        for optimizer, rates in zip(self._optimizers, self._full_rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = factor * rate

    def clear(self) -> None:
        """Forget all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for optimizer in self._optimizers:
            optimizer.step()

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What is remembered of a parameter (moments and counts); empty before its first step. Writable."""
        for optimizer in self._optimizers:
            if any(parameter is each for group in optimizer.param_groups for each in group["params"]):
                state: dict[str, Tensor] = optimizer.state[parameter]
                return state
        raise KeyError("this parameter is in no group")


def make_optimizers(
    model: Any, base: nn.Module | None, *, name: OptimizerName = "adamw", learning_rate: float | None = None
) -> Optimizers:
    """Over the model's groups; the base's parameters that are in none of them are frozen.

    `learning_rate` replaces that of every group, times the group's `rate_factor` if it has one. Raises `DeepenError`,
    naming the parameter, unless each trainable parameter of the method's own is in exactly one group.
    """
    groups = freeze_base(model, base)
    if learning_rate is not None:
        groups = [{**group, "lr": learning_rate * group.get("rate_factor", 1.0)} for group in groups]
    if name == "adamw":
        return Optimizers(torch.optim.AdamW(groups))
    tables = set(_tables(model, base))
    matrices = list(_selected(groups, tables, for_muon=True))
    others = list(_selected(groups, tables, for_muon=False))
    if not matrices:
        raise DeepenError("optimizer is muon, but no matrix is trained; use adamw")
    device = matrices[0]["params"][0].device
    taken = [{name: group[name] for name in _MUON_FIELDS if name in group} for group in matrices]
    muon = make_muon(taken, device)
    return Optimizers(*([torch.optim.AdamW(others)] if others else []), muon)


def freeze_base(model: Any, base: nn.Module | None) -> list[dict[str, Any]]:
    """Freeze the base's parameters that are in none of the model's groups, and give those, checked."""
    groups = [{**group, "params": list(group["params"])} for group in model.optim_groups()]
    _check_groups(groups, model, base)
    grouped = {parameter for group in groups for parameter in group["params"]}
    for parameter in base.parameters() if base is not None else ():
        if parameter not in grouped:
            parameter.requires_grad_(False)
    return groups


def _selected(groups: list[dict[str, Any]], tables: set[nn.Parameter], *, for_muon: bool) -> Iterator[dict[str, Any]]:
    """The groups with only those of their parameters that Muon moves, or with only the others."""
    for group in groups:
        if chosen := [p for p in group["params"] if is_for_muon(p, tables) == for_muon]:
            yield {**group, "params": chosen}


def _tables(model: Any, base: nn.Module | None) -> Iterator[nn.Parameter]:
    for holder in (base, model):
        for module in holder.modules() if isinstance(holder, nn.Module) else ():
            if isinstance(module, nn.Embedding):
                yield from module.parameters()
    if model.backbone is not None:
        yield from model.backbone.head.parameters()


def _check_groups(groups: list[dict[str, Any]], model: nn.Module, base: nn.Module | None) -> None:
    named_of_base = list(base.named_parameters()) if base is not None else []
    of_base = {parameter for _, parameter in named_of_base}
    names = {parameter: name for name, parameter in [*named_of_base, *model.named_parameters()]}
    owner: dict[nn.Parameter, int] = {}
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            if parameter not in names:
                raise DeepenError(
                    f"group {index} of optim_groups() holds a parameter {list(parameter.shape)} that the model lacks"
                )
            if parameter in owner:
                raise DeepenError(
                    f"{names[parameter]} is in groups {owner[parameter]} and {index} of optim_groups(); keep it in one"
                )
            owner[parameter] = index
    for parameter, name in names.items():
        if parameter.requires_grad and parameter not in owner and parameter not in of_base:
            raise DeepenError(f"{name} is trainable but in no group of optim_groups(); add or freeze it")
    if not owner:
        raise CannotTrain(
            "there is nothing to train: the model's optim_groups() hold no parameter; do fields of "
            "the method's config (what is enabled, which phase it is) switch it off?"
        )
