"""The second protocol, optional: a model whose tokens are batched by depth, one recursion at a time.

Who batches holds the keys and values of all tokens and says which tokens run; the model says what running is. A token
enters, recurs until it goes on no more, and leaves; tokens of different depths run together wherever they run the same
weights. Letters: N tokens that run together, D hidden, H query heads, S heads of keys and values, E their width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

State = tuple[Tensor, ...]
"""What a model knows of N tokens between recursions, each tensor `[N, ...]`. Opaque to who batches."""


@dataclass(frozen=True)
class DepthLayout:
    """Layers of the unrolled depth by index: `before` all recursions, in each of them, and `after` them.

    entries     of each layer, that whose keys and values it reads; itself where it makes its own
    under       of each layer, that whose entries stand in for those of tokens that don't run it; None: these aren't
                seen
    groups      of each recursion; those of the same group run the same weights, and so in one call
    num_heads   S
    width       E
    scale       what scores are multiplied by; None is 1 / sqrt(E)

    Layers that are part of no recursion are of level 0, as the first recursion: every token runs them.
    """

    before: tuple[int, ...]
    recursions: tuple[tuple[int, ...], ...]
    after: tuple[int, ...]
    entries: tuple[int, ...]
    under: tuple[int | None, ...]
    groups: tuple[int, ...]
    num_heads: int
    width: int
    scale: float | None = None

    @property
    def num_layers(self) -> int:
        """Of the unrolled depth."""
        return len(self.entries)

    @property
    def num_levels(self) -> int:
        """Recursions that a token may run."""
        return len(self.recursions)

    @cached_property
    def ranked_at(self) -> tuple[int | None, ...]:
        """Of each layer, the level whose tokens alone have the entries that it reads; None where every token has one.

        There entries stand in the order of positions, elsewhere in the order in which tokens came to that level.
        """
        levels = {layer: level for level, layers in enumerate(self.recursions) for layer in layers}
        own = {layer: None if self.under[layer] is not None else levels.get(layer) or None for layer in self.makers}
        return tuple(own[source] for source in self.entries)

    @cached_property
    def makers(self) -> tuple[int, ...]:
        """Layers that make entries."""
        return tuple(layer for layer, source in enumerate(self.entries) if source == layer)


@dataclass(frozen=True, eq=False)
class Running:
    """N tokens that run together: those at the same level side by side, the lowest level first.

    `runs` has each level that is there with its number of tokens; `positions` `[N]` are those in the tokens' rows.
    """

    positions: Tensor
    runs: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.positions)

    def slices(self) -> list[tuple[int, slice]]:
        """Each level, and where its tokens are among the N."""
        found, start = [], 0
        for level, count in self.runs:
            found.append((level, slice(start, start + count)))
            start += count
        return found


class KeyValues(Protocol):
    """The keys and values of all requests, to a model that runs some of their tokens."""

    def attend(self, layers: Sequence[int], queries: Tensor, made: tuple[Tensor, Tensor] | None) -> Tensor:
        """What N tokens with `queries` `[N, H, E]` read of their rows' entries up to themselves, `[N, H, E]`.

        `layers` has the layer of each of the `runs`. Those that make entries are the first of them; `made` are the keys
        and values `[n, S, E]` of their tokens, None if there are none.
        """


@runtime_checkable
class Depthwise(Protocol):
    """A model whose tokens can be batched by depth."""

    def depth_layout(self) -> DepthLayout:
        """Its layers, and which entries they make and read."""

    def enter(self, ids: Tensor, running: Running, kv: KeyValues) -> State:
        """N tokens `[N]` up to their first recursion; all are at level 0."""

    def recur(self, state: State, running: Running, kv: KeyValues) -> tuple[State, Tensor]:
        """One recursion, that of each token's level; and which of them go on to the next, `[N]`.

        Levels are of one group. At the last level nobody goes on.
        """

    def leave(self, state: State, running: Running, kv: KeyValues) -> Tensor:
        """States `[N, D]` for the head, of tokens that have run all of their recursions; all are told as level 0."""

    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, V]` of what `leave` gave of some tokens."""


def stacked(states: Sequence[State]) -> State:
    """Those of several tokens behind each other."""
    return tuple(torch.cat(parts) for parts in zip(*states, strict=True))
