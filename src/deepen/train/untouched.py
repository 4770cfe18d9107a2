"""Looking at a model in the middle of its training, without a trace."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: Any, *, seed: int) -> Iterator[None]:
    """In the block, no gradients, evaluation mode everywhere, and torch's generators drawn from `seed`.

    Behind it, whatever happened, each module is in the mode it was in, each buffer has its values, and the generators
    go on as if nothing had been drawn. `model` is a method's; its base counts as part of it.
    """
    modules = _modules(model)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_seeded(seed))
        stack.enter_context(_evaluating(modules))
        stack.enter_context(_kept_buffers(modules))
        yield


def _modules(model: Any) -> list[nn.Module]:
    """Each module once; a method may hold its base aside, where `modules()` does not find it."""
    roots = [model, *([] if model.backbone is None else [model.backbone.model])]
    return list(dict.fromkeys(module for root in roots for module in root.modules()))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # Not torch.manual_seed: it would seed a GPU, too, that somebody begins to use only behind the block.
    cuda, mps = torch.cuda.is_initialized(), torch.backends.mps.is_available()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else ()):
        state_of_mps = torch.mps.get_rng_state() if mps else None
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        if mps:
            torch.mps.manual_seed(seed)
        try:
            yield
        finally:
            if state_of_mps is not None:
                torch.mps.set_rng_state(state_of_mps)


@contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    # Each by itself: a base may rest in evaluation mode inside a model that is in training mode.
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


@contextmanager
def _kept_buffers(modules: list[nn.Module]) -> Iterator[None]:
    kept: list[tuple[nn.Module, dict[str, Tensor | None], dict[str, Tensor]]] = [
        (module, dict(module._buffers), {name: b.clone() for name, b in module._buffers.items() if b is not None})
        for module in modules
    ]
    try:
        yield
    finally:
        for module, buffers, values in kept:
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, value in values.items():
                _put_back(module._buffers[name], value)


def _put_back(buffer: Tensor | None, value: Tensor) -> None:
    # A write, even of the same values, would be one that others may watch for.
    if buffer is not None and not torch.equal(buffer, value):
        buffer.copy_(value)
