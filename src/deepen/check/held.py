"""What a cache of any kind holds: its tensors and counters by name, found by walking through the object."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Held = Mapping[str, Tensor]
"""By where they are, such as `layers[3].keys`; numbers as tensors without axes."""

_OPAQUE = (str, bytes, bool, type, nn.Module, torch.dtype, torch.device)


def held_by(cache: object) -> Held:
    """Copies, since a cache may write in place."""
    return dict(_walk(cache, "", set()))


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path.lstrip(".") or "the cache", value.detach().clone()
        return
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield path.lstrip("."), torch.tensor(float(value), dtype=torch.float64)
        return
    if value is None or isinstance(value, _OPAQUE) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, list | tuple):
        parts: Iterator[tuple[str, Any]] = ((f"[{index}]", each) for index, each in enumerate(value))
    elif isinstance(value, Mapping):
        parts = ((f"[{key}]", each) for key, each in value.items())
    else:
        # A configuration or a callable that a cache knows is nothing that it holds.
        parts = ((f".{name}", each) for name, each in getattr(value, "__dict__", {}).items() if name != "config")
    for name, each in parts:
        yield from _walk(each, path + name, seen)


def first_difference(actual: Held, expected: Held) -> str:
    """Names the first that differs beyond rounding, and how; empty if none does.

    Those that differ in shape come last: a record of what was read last is as long as that was, and rightly so.
    """
    said = [*_other_values(actual, expected), *_other_shapes(actual, expected)]
    return said[0] if said else ""


def _other_values(actual: Held, expected: Held) -> Iterator[str]:
    for name, right in expected.items():
        wrong = actual.get(name)
        if wrong is None or wrong.shape != right.shape:
            continue
        apart = _beyond_rounding(wrong, right)
        if apart and right.ndim:
            yield f"{name} (it differs by {apart:.2g} of its size)"
        elif apart:
            yield f"{name} (it is {float(wrong):g} in place of {float(right):g})"


def _other_shapes(actual: Held, expected: Held) -> Iterator[str]:
    for name, right in expected.items():
        if name not in actual:
            yield f"{name} (it is missing)"
        elif actual[name].shape != right.shape:
            yield f"{name} (it is {list(actual[name].shape)} in place of {list(right.shape)})"


def _beyond_rounding(wrong: Tensor, right: Tensor) -> float:
    if not right.is_floating_point() or not right.ndim:
        return float((wrong != right).any())
    apart = (wrong.double() - right.double()).abs().max() if right.numel() else torch.zeros(())
    relative = float(apart / right.double().abs().max().clamp(min=1e-30)) if right.numel() else 0.0
    return relative if relative > torch.finfo(right.dtype).eps ** 0.5 else 0.0


def slots_at_odds(after_one: Held, after_two: Held | None) -> str:
    """Names slots that hold more or fewer entries than tokens were read, or than their like; empty if none does."""
    crowded = [] if after_two is None else [*_grown_by_others(after_one, after_two)]
    crowded = crowded or [*_unlike_others(after_one)]
    return "; ".join([*crowded[:1], *_empty(after_one)])


def _grown_by_others(before: Held, after: Held) -> Iterator[str]:
    """Of tensors that grow with each token, those that grow by more than one entry."""
    for name, tensor in before.items():
        if name in after and after[name].ndim == tensor.ndim:
            growth = [new - old for old, new in zip(tensor.shape, after[name].shape, strict=True)]
            if sum(map(bool, growth)) == 1 and max(growth) > 1:
                yield f"{name} grows by {max(growth)} entries with each token"


def _unlike_others(held: Held) -> Iterator[str]:
    for members in _alike(held).values():
        usual, count = Counter(tuple(held[name].shape) for name in members).most_common(1)[0]
        for name in members:
            shape = tuple(held[name].shape)
            unlike = [axis for axis in range(min(len(shape), len(usual))) if shape[axis] != usual[axis]]
            if count > 1 and len(shape) == len(usual) and len(unlike) == 1 and usual[unlike[0]] == 1:
                yield f"after one token {name} holds {shape[unlike[0]]} entries"


def _empty(held: Held) -> Iterator[str]:
    """Numbered slots between others that hold nothing."""
    numbered = [re.match(r"(.*?)\[(\d+)\]", name) for name, tensor in held.items() if tensor.ndim]
    slots = {(match[1], int(match[2])) for match in numbered if match}
    for container in dict.fromkeys(name for name, _ in slots):
        indices = sorted(index for name, index in slots if name == container)
        for missing in sorted(set(range(indices[-1])) - set(indices)):
            yield f"{container}[{missing}] holds nothing"


def _alike(held: Held) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, tensor in held.items():
        if tensor.ndim:
            groups.setdefault(re.sub(r"\[\d+\]", "[]", name), []).append(name)
    return groups
