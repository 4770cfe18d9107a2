"""Nested containers of tensors as flat named tensors and JSON, and back: for what a file format can't nest."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deepen.core.errors import CheckpointError


def flattened(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """`tree` (tensors, JSON values, and dicts with text keys, lists and tuples of them) as JSON, and its tensors.

    Raises `CheckpointError`, naming the place, for anything else.
    """
    tensors: dict[str, Tensor] = {}
    return _outline(tree, "carry", tensors), tensors


def unflattened(outline: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `flattened` took apart."""
    kind, content = next(iter(outline.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {name: unflattened(value, tensors) for name, value in content.items()}
    if kind in ("list", "tuple"):
        values = [unflattened(value, tensors) for value in content]
        return values if kind == "list" else tuple(values)
    return content


def _outline(tree: Any, place: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(tree, Tensor):
        tensors[place] = tree.detach().cpu().contiguous()
        return {"tensor": place}
    if isinstance(tree, Mapping) and all(isinstance(name, str) for name in tree):
        return {"dict": {name: _outline(value, f"{place}.{name}", tensors) for name, value in tree.items()}}
    if type(tree) in (list, tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [_outline(value, f"{place}.{index}", tensors) for index, value in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise CheckpointError(f"{place} is a {type(tree).__name__}, which a checkpoint has no place for; carry tensors")
