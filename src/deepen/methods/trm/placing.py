"""A refiner in the passes of a base: lent to it while a block lasts, as adapters are, and nowhere in it otherwise.

Before the head it refines what the final norm gives, at the positions that get logits. Behind a layer it reads the
residual h, brought to unit RMS, at every position, and what it makes of it is added to h itself:

    head     hidden <- hidden + d(hidden)            layer    h <- h + d(norm(h))

Evidence is of all positions. Its keys and values are kept in the pass's cache, one store for each place; whole rows
without a cache have it all at hand. In a cache of ours pads stand on the right of a row and are no part of it; in one
of transformers' they stand where the mask says.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from deepen.backbones.added import added_entries, num_tokens, with_cache
from deepen.backbones.cache import PrefixCache
from deepen.backbones.hf import Backbone

from .halting import Says
from .refiner import Evidence, Refined, Stop, TRMRefiner, to_unit_rms
from .seeing import unmasked, up_to

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
    """The pass that is running: its cache, None without one, how many tokens that had before it, which positions get
    logits, and the mask of attention."""

    cache: Any = None
    num_before: int = 0
    kept: Tensor | int = 0
    mask: Any = None

    def width(self, hidden: Tensor) -> int:
        """Positions without the pads that bring a pass to whole blocks."""
        is_ours = isinstance(self.cache, PrefixCache) and self.cache.window is not None
        return self.cache.window.width if is_ours else hidden.shape[1]

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

    @property
    def steps_made(self) -> Int[Tensor, "B P"] | None:
        """Outer steps of each position that the last pass has refined, at all places; None where none could stop."""
        made = [refined.made for refined in self.refined if refined.made is not None]
        return torch.stack(made).sum(dim=0) if made else None

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

    def _begin(self, model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        if self._is_aside:
            return None
        reads = self._refiner.reader is not None
        if reads:
            # What the model would make itself, too late for the entries of this pass.
            args, given = with_cache(model, args, given)
        cache = given.get("past_key_values")
        counts = reads and cache is not None and not isinstance(cache, PrefixCache)
        num_before = num_tokens(cache) if counts else 0
        self._pass = _Pass(cache, num_before, given.get("logits_to_keep", 0), given.get("attention_mask"))
        self.refined = []
        return args, given

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
        if self._refiner.reader is None:
            return None
        cache, name = self._pass.cache, f"the refiner at {place}"
        if isinstance(cache, PrefixCache) and cache.window is not None:
            return self._evidence_behind(cache, name, x, places)
        entries = self._refiner.entries_of(x)
        if cache is not None:
            entries = added_entries(
                cache, name, *entries, num_layers=self._backbone.num_layers, num_before=self._pass.num_before
            )
        last = self._pass.num_before + places
        return Evidence(*entries, unmasked(up_to(last[None], entries[0].shape[2]), self._pass.mask, places, last))

    def _evidence_behind(self, cache: PrefixCache, name: str, x: Tensor, places: Int[Tensor, "P"]) -> Evidence:
        assert cache.window is not None, "a pass is open"
        offsets = torch.tensor(cache.window.offsets, device=x.device)
        entries = cache.added_store(name).update(*self._refiner.entries_of(x[:, : cache.window.width]))
        # The store has room beyond the longest row.
        num_entries = max(map(sum, zip(cache.window.offsets, cache.window.widths, strict=True)))
        keys, values = (each[:, :, :num_entries] for each in entries)
        return Evidence(keys, values, up_to(offsets[:, None] + places, num_entries))
