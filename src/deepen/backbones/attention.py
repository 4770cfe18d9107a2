"""The attention of a pass, put in place of a transformers model's own while the pass lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deepen.core.errors import UnsupportedBackbone
from deepen.nn.attention import Visibility, attend

_NAME = "deepen_pass"
_visibility: ContextVar[Visibility | None] = ContextVar("visibility", default=None)


def visibility_of_pass() -> Visibility | None:
    """What the positions of the pass that is running may see; None outside of passes."""
    return _visibility.get()


@contextmanager
def attention_of_pass(config: object, visibility: Visibility) -> Iterator[None]:
    """Attention of the model with this `config` goes by `visibility` until the block ends."""
    before = config._attn_implementation_internal  # type: ignore[attr-defined]
    token = _visibility.set(visibility)
    config._attn_implementation_internal = _NAME  # type: ignore[attr-defined]
    try:
        yield
    finally:
        config._attn_implementation_internal = before  # type: ignore[attr-defined]
        _visibility.reset(token)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **features: object,
) -> tuple[Tensor, None]:
    visibility = visibility_of_pass()
    if visibility is None:
        raise UnsupportedBackbone("deepen's attention serves passes over a PrefixCache only: use Backbone.run")
    for name in ("softcap", "s_aux", "sliding_window", "position_bias"):
        if features.get(name) is not None:
            raise UnsupportedBackbone(
                f"{type(module).__name__} asks its attention for {name}={features[name]!r}, which passes don't know"
            )
    return attend(query, key, value, visibility=visibility, scale=scaling), None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attention_forward)
