"""A refiner in the passes of a base: lent to it while a block lasts, as adapters are, and nowhere in it otherwise.

Before the head it refines what the final norm gives, at the positions that get logits. Behind a layer it reads the
residual h, brought to unit RMS, at every position, and what it makes of it is added to h itself:

    head     hidden <- hidden + d(hidden)            layer    h <- h + d(norm(h))

Evidence is of all positions. In a pass over a committed prefix its keys and values are kept in a store of the cache,
one for each place; whole rows without a cache have it all at hand. Pads stand on the right of a row.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from deepen.backbones.cache import PrefixCache
from deepen.backbones.hf import Backbone
from deepen.core.errors import UnsupportedBackbone

from .halting import Says
from .refiner import Evidence, Refined, Stop, TRMRefiner, to_unit_rms

# Gives the halting rule of one pass at one place, None where all steps are made.
NewStop = Callable[[Says], Stop | None]


@dataclass(frozen=True)
class Ask:
    """How passes are to refine: `T` outer steps (None: the refiner's own), of which each token takes `own_T` `[B, T]`
    (None: all), whether positions may halt before, which steps are to be looked at afterwards."""

    T: int | None = None
    own_T: Tensor | None = None
    halts: bool = True
    watch: Collection[int] = ()


@dataclass(frozen=True)
class _Pass:
    """The pass that is running: its cache, None without one, and the positions that get logits, None for all."""

    cache: PrefixCache | None = None
    kept: Tensor | int = 0

    def width(self, hidden: Tensor) -> int:
        """Positions without the pads that bring a pass to whole blocks."""
        return hidden.shape[1] if self.cache is None or self.cache.window is None else self.cache.window.width

    def places(self, hidden: Tensor) -> Int[Tensor, "P"]:
        """Those that get logits."""
        if isinstance(self.kept, Tensor):
            return self.kept
        width = self.width(hidden)
        return torch.arange(width - self.kept if self.kept else 0, width, device=hidden.device)


class LentRefiner:
    """`refiner` before the head, or behind `layers`."""

    def __init__(self, backbone: Backbone, refiner: TRMRefiner, layers: Collection[int], new_stop: NewStop) -> None:
        self._backbone, self._refiner, self._layers, self._new_stop = backbone, refiner, tuple(layers), new_stop
        self._depth = 0
        self._ask = Ask()
        self._pass = _Pass()
        self._is_aside = False
        self.refined: list[Refined] = []
        """What the last pass has refined, place by place."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """In the block, the model computes with it; blocks may be nested."""
        with self._backbone.held():
            handles = [] if self._depth else list(self._hooked())
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                for handle in handles:
                    handle.remove()

    @contextmanager
    def asked(self, ask: Ask) -> Iterator[None]:
        """In the block, passes refine as `ask` says."""
        before, self._ask = self._ask, ask
        try:
            yield
        finally:
            self._ask = before

    def says(self, hidden: Tensor) -> Tensor:
        """The model's logits where the head reads `hidden`, which isn't refined any further."""
        before, self._is_aside = self._is_aside, True
        try:
            return self._backbone.logits_of(hidden.to(self._backbone.dtype))
        finally:
            self._is_aside = before

    def _hooked(self) -> Iterator[Any]:
        model = self._backbone.model
        yield model.register_forward_pre_hook(self._begin, with_kwargs=True)
        if not self._layers:
            yield model.get_decoder().register_forward_hook(self._at_head)
        for layer in self._layers:
            yield self._backbone.layers[layer].register_forward_hook(self._behind(layer))

    def _begin(self, _model: nn.Module, _args: object, given: dict[str, Any]) -> None:
        if self._is_aside:
            return
        cache = given.get("past_key_values")
        if self._refiner.reader is not None:
            _require_whole_rows(cache, given.get("attention_mask"))
        own = cache if isinstance(cache, PrefixCache) else None
        self._pass, self.refined = _Pass(own, given.get("logits_to_keep", 0)), []

    def _at_head(self, _decoder: nn.Module, _args: object, output: Any) -> Any:
        if self._is_aside:
            return None
        hidden: Tensor = output[0]
        places = self._pass.places(hidden)
        refined = self._refine("the head", hidden, places)
        whole = hidden.index_copy(1, places, refined.hidden)
        return (whole, *output[1:]) if isinstance(output, tuple) else replace(output, last_hidden_state=whole)

    def _behind(self, layer: int) -> Callable[..., Any]:
        def hook(_layer: nn.Module, _args: object, output: Any) -> Any:
            h: Tensor = output if isinstance(output, Tensor) else output[0]
            places = torch.arange(self._pass.width(h), device=h.device)
            refined = self._refine(f"layer {layer}", to_unit_rms(h), places)
            whole = h.index_add(1, places, refined.d.to(h.dtype))
            return whole if isinstance(output, Tensor) else (whole, *output[1:])

        return hook

    def _refine(self, place: str, x: Tensor, places: Int[Tensor, "P"]) -> Refined:
        """`x` `[B, T, D]` at these positions."""
        stop = self._new_stop(self.says) if self._ask.halts else None
        evidence = self._evidence(place, x, places)
        ask = self._ask
        own_T = None if ask.own_T is None else ask.own_T[:, places]
        refined = self._refiner.refine(x[:, places], evidence, T=ask.T, own_T=own_T, stop=stop, watch=ask.watch)
        self.refined.append(refined)
        return refined

    def _evidence(self, place: str, x: Tensor, places: Int[Tensor, "P"]) -> Evidence | None:
        cache = self._pass.cache
        if self._refiner.reader is None or cache is None or cache.window is None:
            return self._refiner.evidence_of(x, _seen(places[None], x.shape[1]))
        offsets = torch.tensor(cache.window.offsets, device=x.device)
        store = cache.added_store(f"the refiner at {place}")
        entries = store.update(*self._refiner.entries_of(x[:, : cache.window.width]))
        # The store has room beyond the longest row.
        num_entries = max(map(sum, zip(cache.window.offsets, cache.window.widths, strict=True)))
        keys, values = (each[:, :, :num_entries] for each in entries)
        return Evidence(keys, values, _seen(offsets[:, None] + places, num_entries))


def _seen(last: Int[Tensor, "B P"], num_entries: int) -> Bool[Tensor, "B 1 P {num_entries}"]:
    """Each position sees the entries up to its own."""
    return (torch.arange(num_entries, device=last.device) <= last[..., None])[:, None]


def _require_whole_rows(cache: Any, mask: Any) -> None:
    """Evidence must hold every token that came before."""
    if cache is not None and not isinstance(cache, PrefixCache) and cache.get_seq_length() > 0:
        raise UnsupportedBackbone(
            f"mixing evidence reads entries of its own, which a {type(cache).__name__} of transformers has no place "
            "for; decode with deepen's generate, or give whole rows without a cache"
        )
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask[:, 0].all():
        raise UnsupportedBackbone("mixing evidence knows pads on the right of rows only, and a row begins with one")
