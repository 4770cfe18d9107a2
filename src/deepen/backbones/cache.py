"""The committed prefix of a decoding: all that the project knows of transformers' caches stands here.

A `PrefixCache` holds, for each row, what the untouched base would hold after reading the row's committed tokens.
A pass starts from it (`begin`), writes its own keys and values behind the committed ones, and is forgotten unless
`commit` says how many of its tokens count. Rows begin at entry 0 of their store and have their own lengths, so a
ragged commit moves no data: entries behind a row's length are scratch that nothing may see and any pass may overwrite.

Recurrent layers have no entries to leave behind: a pass has folded its tokens into the state when it ends. Until
their replay is here, such a pass must be committed whole, by every row; anything else raises `RollbackError`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, LinearAttentionLayer

from deepen.core.errors import PromptError, RollbackError, UnsupportedBackbone
from deepen.nn.attention import KEY_BLOCK, round_up


@dataclass(frozen=True)
class PassWindow:
    """Where a pass stands: each row's committed length before it, and how many tokens the row brings."""

    offsets: tuple[int, ...]
    widths: tuple[int, ...]

    @cached_property
    def width(self) -> int:
        """Positions of the widest row; shorter rows are padded on their right to it."""
        return max(self.widths)

    @cached_property
    def even(self) -> bool:
        """Whether all rows have the same length and bring as many tokens."""
        return len(set(self.offsets)) == len(set(self.widths)) == 1

    @cached_property
    def num_keys(self) -> int:
        """Entries a layer hands to attention: enough for every row, in whole blocks."""
        return round_up(max(map(sum, zip(self.offsets, self.widths, strict=True))), KEY_BLOCK)


@dataclass(frozen=True)
class CacheSnapshot:
    """The lengths to come back to. Attention entries before them are never written again, so no copy is needed."""

    lengths: tuple[int, ...]


class AttentionStore(CacheLayerMixin):
    """Keys and values of one layer, `[B, N, capacity, E]`, allocated once at the first pass."""

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self._capacity = capacity
        self._both: Tensor | None = None
        self.window: PassWindow | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch, heads and widths of the first keys and values."""
        # Zeros, not empty: a masked entry weighs nothing, but zero times NaN would still be NaN.
        batch, heads = key_states.shape[:2]
        if key_states.shape == value_states.shape:
            self._hold(key_states.new_zeros(batch, 2 * heads, self._capacity, key_states.shape[-1]))
        else:
            self.keys = key_states.new_zeros(batch, heads, self._capacity, key_states.shape[-1])
            self.values = value_states.new_zeros(batch, heads, self._capacity, value_states.shape[-1])
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def _hold(self, both: Tensor) -> None:
        self._both = both
        num_heads = both.shape[1] // 2
        self.keys, self.values = both[:, :num_heads], both[:, num_heads:]

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
        for row, (offset, width) in enumerate(zip(window.offsets, window.widths, strict=True)):
            store[row, :, offset : offset + width] = states[row, :, :width]

    def keep_rows(self, rows: Tensor) -> None:
        """Keep the rows with these indices, in this order."""
        if self._both is not None:
            self._hold(self._both.index_select(0, rows))
        elif self.is_initialized:
            self.keys = self.keys.index_select(0, rows)
            self.values = self.values.index_select(0, rows)

    def num_bytes(self) -> int:
        """Bytes allocated."""
        return self.keys.nbytes + self.values.nbytes if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """transformers asks for masks; passes bring their own visibility, so this is the plain full width."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Committed entries of the longest row."""
        return max(self.window.offsets) if self.window is not None else 0

    def get_max_length(self) -> int:
        """Entries that fit."""
        return self._capacity


class PrefixCache(Cache):
    """What the base holds of the committed tokens of B rows, with room for `capacity` tokens a row."""

    def __init__(self, config: PreTrainedConfig, *, batch_size: int, capacity: int) -> None:
        super().__init__(layers=_layers_for(config, round_up(capacity, KEY_BLOCK)))
        self.capacity = capacity
        self.lengths: list[int] = [0] * batch_size
        self._window: PassWindow | None = None

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Indices of layers that hold a state instead of entries."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer, LinearAttentionLayer))

    def begin(self, widths: Sequence[int]) -> PassWindow:
        """Open a pass over the next `widths[row]` tokens of each row; an uncommitted pass before it is forgotten."""
        if self._window is not None and self.recurrent_layers:
            raise self._impossible("forget the pass before this one")
        window = PassWindow(tuple(self.lengths), tuple(widths))
        self._check_room(window)
        if self.recurrent_layers and len(set(widths)) > 1:
            raise self._impossible(f"read {sorted(set(widths))} tokens in different rows of one pass")
        self._window = window
        for layer in self.layers:
            if isinstance(layer, AttentionStore):
                layer.window = window
        return window

    def _check_room(self, window: PassWindow) -> None:
        for row, (offset, width) in enumerate(zip(window.offsets, window.widths, strict=True)):
            if offset + width > self.capacity:
                raise PromptError(
                    f"row {row} would hold {offset + width} tokens, but its cache was opened for {self.capacity}; "
                    "open the decoding with a larger max_new_tokens"
                )

    def commit(self, counts: Sequence[int]) -> None:
        """Make the first `counts[row]` tokens of the pass part of each row's prefix; the rest is forgotten."""
        if self._window is None:
            raise RollbackError("nothing to commit: no pass was begun since the last commit")
        for row, (count, width) in enumerate(zip(counts, self._window.widths, strict=True)):
            if not 0 <= count <= width:
                raise RollbackError(f"row {row}: can't commit {count} tokens of a pass over {width}")
            if count < width and self.recurrent_layers:
                raise self._impossible(f"keep {count} of the {width} tokens that row {row} has read")
        self.lengths = [offset + count for offset, count in zip(self._window.offsets, counts, strict=True)]
        self._window = None

    def snapshot(self) -> CacheSnapshot:
        """The present prefix, to come back to with `rollback`."""
        return CacheSnapshot(tuple(self.lengths))

    def rollback(self, snapshot: CacheSnapshot) -> None:
        """Forget every token committed since `snapshot`; a snapshot of more tokens than the rows hold is an error."""
        if snapshot.lengths == tuple(self.lengths) and self._window is None:
            return
        if self.recurrent_layers:
            raise self._impossible(f"go back from {self.lengths} to {list(snapshot.lengths)} tokens")
        if len(snapshot.lengths) != len(self.lengths):
            raise RollbackError(f"the snapshot has {len(snapshot.lengths)} rows, the cache {len(self.lengths)}")
        if any(then > now for then, now in zip(snapshot.lengths, self.lengths, strict=True)):
            raise RollbackError(f"can't go forward: snapshot {list(snapshot.lengths)}, cache {self.lengths}")
        self.lengths = list(snapshot.lengths)
        self._window = None

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep the rows with these indices, in this order, and drop the others."""
        for layer in self.layers:
            if isinstance(layer, AttentionStore) and layer.is_initialized:
                layer.keep_rows(torch.tensor(rows, dtype=torch.int64, device=layer.device))
            elif isinstance(layer, LinearAttentionLayer):
                layer.reorder_cache(torch.tensor(rows, dtype=torch.int64))
        self.lengths = [self.lengths[row] for row in rows]
        self._window = None

    def entries(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Committed keys and values `[N, length, E]` of one row of one attention layer, for comparison."""
        store, length = self.layers[layer], self.lengths[row]
        return store.keys[row, :, :length], store.values[row, :, :length]

    def num_bytes(self) -> int:
        """Bytes really held, by attention stores and recurrent states together."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, AttentionStore):
                total += layer.num_bytes()
            else:
                states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
                total += sum(state.nbytes for state in states if state is not None)
        return total

    def _impossible(self, wish: str) -> RollbackError:
        layers = ", ".join(map(str, self.recurrent_layers))
        return RollbackError(
            f"can't {wish}: layers {layers} hold a recurrent state, which can't be taken back to an earlier token; "
            "use plain decoding (draft 'ar') with rows of equal length on this model"
        )


def _layers_for(config: PreTrainedConfig, capacity: int) -> list[AttentionStore | LinearAttentionLayer]:
    """Our store for each full-attention layer, transformers' own state for each linear one."""
    layers: list[AttentionStore | LinearAttentionLayer] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicLayer:
            layers.append(AttentionStore(capacity))
        elif type(layer) is LinearAttentionLayer:
            layers.append(layer)
        else:
            raise UnsupportedBackbone(
                f"layer {index} of this {config.model_type} model keeps a {type(layer).__name__}; "
                "supported are full attention and linear attention layers (no sliding window, no sparse index)"
            )
    return layers
