"""Memory for keys and values, entry by entry: an entry is what one layer holds of one token.

All there will ever be is allocated at once. A request has a slot; what it may come to need is set aside when it gets
one, so nothing that was begun ever lacks memory. What is held is what was made, and comes back when a slot is freed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepen.core.depthwise import DepthLayout
from deepen.nn.attention import KEY_BLOCK, round_up


class EntryPool:
    """C entries, `[C, S, E]` keys and as many values, and for each slot and layer where those of its tokens are.

    Bytes told are those of keys and values. Tables beside them take 8 for each layer, slot and token of `max_length`.
    """

    def __init__(
        self,
        layout: DepthLayout,
        *,
        num_slots: int,
        max_length: int,
        memory_bytes: int | None = None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """A slot's row holds at most `max_length` tokens; `memory_bytes` None is enough for all slots."""
        self.layout, self.max_length = layout, max_length
        self.bytes_per_entry = 2 * layout.num_heads * layout.width * dtype.itemsize
        enough = num_slots * self.needed(max_length)
        num_entries = enough if memory_bytes is None else min(enough, memory_bytes // self.bytes_per_entry)
        self.num_entries = num_entries
        # Entry 0 is nobody's. It is read, and hidden, where a row has none yet: what is hidden weighs nothing, but zero
        # times NaN would still be NaN. The others are empty, so that memory is taken as they are written.
        self._keys = torch.empty(num_entries + 1, layout.num_heads, layout.width, device=device, dtype=dtype)
        self._values = torch.empty_like(self._keys)
        self._keys[0], self._values[0] = 0, 0
        width = round_up(max_length, KEY_BLOCK)
        self._where = torch.zeros(layout.num_layers, num_slots, width, dtype=torch.long, device=device)
        self._owners = torch.full((num_entries + 1,), -1, device=device)
        self._free = torch.arange(num_entries, 0, -1, device=device)
        self._num_free = num_entries
        self._set_aside: dict[int, int] = {}
        self._free_slots = list(reversed(range(num_slots)))

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._keys.dtype

    @property
    def num_bytes(self) -> int:
        """Of the entries that are held."""
        return (self.num_entries - self._num_free) * self.bytes_per_entry

    @property
    def most_bytes(self) -> int:
        """That can ever be held."""
        return self.num_entries * self.bytes_per_entry

    def needed(self, num_tokens: int) -> int:
        """Entries that a row of so many tokens has if each runs every recursion."""
        return num_tokens * len(self.layout.makers)

    def has_room(self, num_tokens: int) -> bool:
        """Whether a row that may come to so many tokens can have a slot now."""
        set_aside = sum(self._set_aside.values())
        return bool(self._free_slots) and set_aside + self.needed(num_tokens) <= self.num_entries

    def open(self, num_tokens: int) -> int:
        """A slot for a row of at most so many tokens."""
        assert self.has_room(num_tokens), "has_room comes first"
        slot = self._free_slots.pop()
        self._set_aside[slot] = self.needed(num_tokens)
        return slot

    def close(self, slot: int) -> None:
        """Take back a slot and all that it holds."""
        found = (self._owners == slot).nonzero()[:, 0]
        self._owners[found] = -1
        self._free[self._num_free : self._num_free + len(found)] = found
        self._num_free += len(found)
        # The next row here must not come upon what this one has left, hidden or not.
        self._where[:, slot] = 0
        del self._set_aside[slot]
        self._free_slots.append(slot)

    def write(self, layers: Tensor, slots: Tensor, indices: Tensor, keys: Tensor, values: Tensor) -> None:
        """Entries `[n, S, E]`, each of a layer and a slot at an index of its row, all `[n]`."""
        count = len(keys)
        assert count <= self._num_free, "what a slot may need was set aside"
        self._num_free -= count
        places = self._free[self._num_free : self._num_free + count].clone()
        self._keys[places], self._values[places] = keys, values
        self._where[layers, slots, indices] = places
        self._owners[places] = slots

    def stand_in(self, layers: Sequence[int], slots: Tensor, positions: Tensor) -> None:
        """In `layers`, these tokens `[n]` are read where the layers under them have them."""
        upper = torch.tensor(layers, device=slots.device)[:, None]
        under = torch.tensor([self.layout.under[layer] for layer in layers], device=slots.device)[:, None]
        self._where[upper, slots, positions] = self._where[under, slots, positions]

    def read(self, layers: Tensor, slots: Tensor, num: int) -> tuple[Tensor, Tensor]:
        """The first `num` entries of R rows, each of a layer and a slot `[R]`: keys and values `[R, S, num, E]`.

        What stands behind a row's last entry is any number.
        """
        places = self._where[layers, slots, :num].flatten()
        shape = (len(layers), num, *self._keys.shape[1:])
        keys, values = (each.index_select(0, places).view(shape) for each in (self._keys, self._values))
        return keys.transpose(1, 2), values.transpose(1, 2)
