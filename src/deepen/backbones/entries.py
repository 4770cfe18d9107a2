"""What an attention layer holds of the committed tokens: keys and values, in a place of its own for each row."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from deepen.backbones.window import PassWindow
from deepen.core.errors import RollbackError


class Move(NamedTuple):
    """A row goes from one place to another, which may be of another store: its first `length` entries do."""

    source: int
    place: int
    length: int


class AttentionStore(CacheLayerMixin):
    """Keys and values of one layer, `[B, N, capacity, E]`, allocated at the first pass.

    Row b stands in place b. Where rows come and go there are more places than rows, and what stands in the places
    behind the last row is nobody's.
    """

    is_sliding = False

    def __init__(self, capacity: int, *, num_places: int = 0) -> None:
        """`num_places` is the least number of rows to allocate for."""
        super().__init__()
        self._capacity, self._num_places = capacity, num_places
        # [places, 2 N, capacity, E] of keys and values of one shape, otherwise one of each.
        self._memory: tuple[Tensor, ...] = ()
        self._both: Tensor | None = None
        self.window: PassWindow | None = None

    def begin(self, window: PassWindow) -> None:
        """A pass begins."""
        self.window = window

    def close(self) -> None:
        """It is committed or forgotten."""
        self.window = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads and widths of the first keys and values."""
        num_rows, heads = key_states.shape[:2]
        parts = [(key_states, heads), (value_states, heads)]
        if key_states.shape == value_states.shape:
            parts = [(key_states, 2 * heads)]
        num_places = max(num_rows, self._num_places)
        self._be(tuple(part.new_zeros(num_places, n, self._capacity, part.shape[-1]) for part, n in parts), num_rows)

    def _be(self, memory: tuple[Tensor, ...], num_rows: int) -> None:
        self._memory = memory
        self.dtype, self.device = memory[0].dtype, memory[0].device
        self.is_initialized = True
        self._show(num_rows)

    def _show(self, num_rows: int) -> None:
        parts = [part[:num_rows] for part in self._memory]
        if len(parts) == 1:
            self._both = parts[0]
            num_heads = self._both.shape[1] // 2
            parts = [self._both[:, :num_heads], self._both[:, num_heads:]]
        self.keys, self.values = parts

    def hold(self, keys: Tensor, values: Tensor) -> None:
        """Be a new store whose first entries are these, `[B, N, T, E]`."""
        self.lazy_initialization(keys, values)
        self.keys[:, :, : keys.shape[2]] = keys
        self.values[:, :, : values.shape[2]] = values

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write the pass behind each row's committed entries; give the first S entries, S a multiple of KEY_BLOCK."""
        window = self._open_window()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._write(self.keys, key_states, window)
        self._write(self.values, value_states, window)
        return self.keys[:, :, : window.num_keys], self.values[:, :, : window.num_keys]

    def update_both(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """As `update`, of keys and values of one shape behind each other: `[B, 2 N, W, E]`, and so with one write."""
        window = self._open_window()
        if not self.is_initialized:
            self.lazy_initialization(*states.chunk(2, dim=1))
        assert self._both is not None, "keys and values of one shape are held together"
        self._write(self._both, states, window)
        return self.keys[:, :, : window.num_keys], self.values[:, :, : window.num_keys]

    def _open_window(self) -> PassWindow:
        if self.window is None:
            raise RollbackError("this cache was used outside of a pass: call PrefixCache.begin before the model")
        return self.window

    @staticmethod
    def _write(store: Tensor, states: Tensor, window: PassWindow) -> None:
        if window.even:
            first = window.offsets[0]
            store[:, :, first : first + window.width] = states[:, :, : window.width]
            return
        # A row's pads are not written: behind a long row there may be no room for them.
        if store.device.type != "cpu":
            write_at_once(store, states, window)
            return
        for row, (offset, width) in enumerate(zip(window.offsets, window.widths, strict=True)):
            store[row, :, offset : offset + width] = states[row, :, :width]

    def reserve(self, num_places: int, lengths: Sequence[int]) -> None:
        """Have memory for so many rows at least; those that there are keep their first `lengths` entries."""
        if num_places <= self._num_places:
            return
        self._num_places = num_places
        if self.is_initialized:
            before, rows = self._memory, range(len(lengths))
            self._be(_zeros_like(before, num_places), len(lengths))
            self._put(before, [Move(row, row, lengths[row]) for row in rows], reach=0)

    def join(self, other: "AttentionStore", moves: Sequence[Move], *, num_rows: int, reach: int) -> None:
        """Take rows of `other` in, and be `num_rows` rows; see `_put`."""
        if not self.is_initialized and other.is_initialized:
            self._be(_zeros_like(other._memory, self._num_places), num_rows)
        if self.is_initialized:
            # A store that no pass was run on has rows without entries.
            self._put(other._memory or self._memory, moves, reach)
            self._show(num_rows)

    def keep_rows(self, rows: Sequence[int], lengths: Sequence[int], *, reach: int) -> None:
        """Keep the rows with these indices, in this order; row b had `lengths[b]` entries, which is all that moves.

        Where there are no more places than rows, there will be no more afterwards.
        """
        if self._num_places:
            self.reserve(len(rows), lengths)
        if not self.is_initialized:
            return
        if self._num_places:
            moves = [Move(row, place, lengths[row]) for place, row in enumerate(rows) if row != place]
            self._put(self._memory, moves, reach)
            self._show(len(rows))
        else:
            self._be(tuple(part[list(rows)] for part in self._memory), len(rows))

    def _put(self, memory: Sequence[Tensor], moves: Sequence[Move], reach: int) -> None:
        """Copy the moved rows' entries out of `memory`; those behind them, up to entry `reach`, become zeros.

        What another row has left there would weigh nothing, but zero times NaN is NaN.
        """
        is_in_the_way = memory is self._memory and any(move.place > move.source for move in moves)
        for part, source in zip(self._memory, memory, strict=True):
            found = [source[move.source, :, : move.length] for move in moves]
            if is_in_the_way:
                found = [entries.clone() for entries in found]
            for move, entries in zip(moves, found, strict=True):
                part[move.place, :, : move.length] = entries
                part[move.place, :, move.length : reach] = 0

    def num_bytes(self) -> int:
        """Bytes allocated."""
        return sum(part.nbytes for part in self._memory)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """transformers asks for masks; passes bring their own visibility, so this is the plain full width."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Committed entries of the longest row, in a pass."""
        return max(self.window.offsets) if self.window is not None else 0

    def get_max_length(self) -> int:
        """Entries that fit."""
        return self._capacity


def _zeros_like(memory: Sequence[Tensor], num_places: int) -> tuple[Tensor, ...]:
    # Zeros, not empty: a masked entry weighs nothing, but zero times NaN would still be NaN.
    return tuple(part.new_zeros(num_places, *part.shape[1:]) for part in memory)


def write_at_once(store: Tensor, states: Tensor, window: PassWindow) -> None:
    """Put the tokens `[B, N, W, E]` of a pass into `[B, N, capacity, E]` by one kernel, however rows differ."""
    rows, places, steps = _places(window, store.device)
    store[rows, :, places] = states[rows, :, steps]


@lru_cache(maxsize=1)  # all layers of a pass ask for the same
def _places(window: PassWindow, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`[n]` each: row, place in the store and step in the pass of every token that the rows bring."""
    rows = torch.arange(len(window.widths)).repeat_interleave(torch.tensor(window.widths))
    steps = torch.cat([torch.arange(width) for width in window.widths])
    return rows.to(device), (torch.tensor(window.offsets)[rows] + steps).to(device), steps.to(device)
