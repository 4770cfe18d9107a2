"""The attention of a pass, put in place of a transformers model's own while the pass lasts."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deepen.core.errors import UnsupportedBackbone
from deepen.nn.attention import Visibility, attend

_NAME = "deepen_pass"
_visibility: ContextVar[Visibility | None] = ContextVar("visibility", default=None)
_places: ContextVar["PassPlaces | None"] = ContextVar("places", default=None)


@dataclass(frozen=True)
class PassPlaces:
    """Where the positions of a pass stand among the entries that its layers read.

    Row r's position i, of `width`, is entry `offsets[r] + i` of `num_keys`.
    """

    offsets: tuple[int, ...]
    width: int
    num_keys: int


def visibility_of_pass() -> Visibility | None:
    """What the positions of the pass that is running may see; None outside of passes."""
    return _visibility.get()


def places_of_pass() -> PassPlaces | None:
    """Where the positions of the pass that is running stand; None outside of passes."""
    return _places.get()


@contextmanager
def at_places(places: PassPlaces) -> Iterator[None]:
    """A pass whose positions stand there lasts until the block ends."""
    token = _places.set(places)
    try:
        yield
    finally:
        _places.reset(token)


@contextmanager
def attention_of_pass(config: object, visibility: Visibility) -> Iterator[None]:
    """Attention of the model with this `config` goes by `visibility` until the block ends."""
    before = config._attn_implementation_internal  # type: ignore[attr-defined]
    token = _visibility.set(visibility)
    config._attn_implementation_internal = _NAME  # type: ignore[attr-defined]
    try:
        with at_places(PassPlaces(visibility.offsets, visibility.width, visibility.num_keys)):
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
