"""Entries of a method's own module in a cache of transformers: a layer of that cache, behind those of the model.

So what is done to a cache's layers (rows put into another order, repeated, chosen; tokens taken back; all forgotten) is
done to these entries, too.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer, StaticSlidingWindowLayer

from deepen.core.errors import UnsupportedBackbone

_PLACES = "_deepen_places"


def with_cache(
    model: nn.Module, args: tuple[Any, ...], given: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A forward's arguments, by name, with the cache that the model would make for itself if it is given none."""
    given = {**signature(model.forward).bind_partial(*args).arguments, **given}
    config: Any = model.config
    wants = given.get("use_cache")
    if wants is None:
        wants = getattr(config.get_text_config(decoder=True), "use_cache", False)
    if wants and given.get("past_key_values") is None:
        given["past_key_values"] = DynamicCache(config=config)
    return (), given


def num_tokens(cache: Cache) -> int:
    """Tokens of each row that were read, pads included."""
    return int(cache.get_seq_length())


def added_entries(
    cache: Cache,
    name: str,
    keys: Float[Tensor, "B N T E"],
    values: Float[Tensor, "B N T E"],
    *,
    num_layers: int,
    num_before: int,
) -> tuple[Float[Tensor, "B N S E"], Float[Tensor, "B N S E"]]:
    """All entries of `name`, behind which `keys` and `values` of T new tokens are put.

    `num_before` tokens were read before. A cache that has room for tokens to come gives that, too: S is T and those
    before at least. Raises `UnsupportedBackbone` where tokens were read before without such entries, and for a cache
    that moves its layers between devices, or has no room for all tokens.
    """
    places: dict[str, int] = vars(cache).setdefault(_PLACES, {})
    held = int(cache.layers[places[name]].get_seq_length()) if name in places else 0
    if held != num_before:
        raise UnsupportedBackbone(
            f"this {type(cache).__name__} holds {num_before} tokens, of which {num_before - held} were read without "
            f"{name}; begin with a cache that is new, or reset, and read them anew"
        )
    if name not in places:
        places[name] = _append(cache, name, num_layers)
    return cache.layers[places[name]].update(keys, values)


def _append(cache: Cache, name: str, num_layers: int) -> int:
    """The index of a new layer, of the kind that the others are."""
    if cache.offloading:
        raise UnsupportedBackbone(
            f"this {type(cache).__name__} moves its layers between devices one after the other, in which {name} has no "
            "turn; take one without offloading"
        )
    # A cache may make the model's layers as they come, and by their number.
    while cache.layer_class_to_replicate is not None and len(cache.layers) < num_layers:
        cache.layers.append(cache.layer_class_to_replicate())
    static = [layer for layer in cache.layers if isinstance(layer, StaticLayer)]
    rooms = [layer.max_cache_len for layer in static if not isinstance(layer, StaticSlidingWindowLayer)]
    if static and not rooms:
        raise UnsupportedBackbone(
            f"all layers of this {type(cache).__name__} hold a sliding window, and {name} reads all tokens; take a "
            "DynamicCache"
        )
    cache.layers.append(StaticLayer(max(rooms)) if rooms else DynamicLayer())
    return len(cache.layers) - 1
