"""Architectures that methods bring: models of transformers' form that transformers itself doesn't ship."""

from functools import cache
from typing import Any

from deepen.core.registry import Method, method_of_architecture


def method_of_model(model_type: Any) -> Method | None:
    """The method whose own model this is, by the `model_type` of a config.json; transformers then knows it, too.

    None for all others, which methods stand on.
    """
    return _loaded(model_type) if isinstance(model_type, str) else None


@cache
def _loaded(model_type: str) -> Method | None:
    method = method_of_architecture(model_type)
    if method is not None:
        method.load_model_type()
    return method
