"""The committed prefix of a decoding: all that the project knows of transformers' caches stands here.

A `PrefixCache` holds, for each row, what the untouched base would hold after reading the row's committed tokens.
A pass starts from it (`begin`), leaves beside it what its own tokens would add, and is forgotten unless `commit` says
how many of them count in each row. Rows have their own lengths, may join those that are there, and be dropped; none is
moved but by `keep_rows`, and what its entries and state are doesn't depend on where it stands.

Attention layers keep entries. A pass writes its keys and values behind the committed ones, so entries behind a row's
length are scratch that nothing may see and any pass may overwrite, and a ragged commit moves no data.

Recurrent layers keep a state and a convolution window, into which a token is folded for good. Both are read-only: a
pass computes from them and keeps apart what it wrote (nn/kda.py), from which a commit makes the state after each row's
count of tokens. Nothing is in place, so a snapshot is the tensors themselves. A pass that will be committed whole or
not at all (`whole`) keeps no such record; to keep a part of it after all, go back to a snapshot and run that part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from deepen.backbones.entries import AttentionStore, Move
from deepen.backbones.window import PassWindow
from deepen.core.errors import PromptError, RollbackError, UnsupportedBackbone
from deepen.nn.attention import KEY_BLOCK, round_up
from deepen.nn.kda import DeltaOutput, Record


class RecurrentPrefix(NamedTuple):
    """What a recurrent layer holds of each row's committed tokens; None before the first commit."""

    state: Tensor | None = None
    """`[B, H, K, V]`"""
    columns: Tensor | None = None
    """`[B, C, kernel - 1]`: the last inputs of the short convolution."""


@dataclass(frozen=True, eq=False)
class CacheSnapshot:
    """Where to come back to: no copy, since states are never written in place, nor entries before `lengths`."""

    lengths: tuple[int, ...]
    states: tuple[RecurrentPrefix, ...]


class RecurrentStore(LinearAttentionCacheLayerMixin):
    """State and convolution window of one layer, and what the running pass would make of them."""

    def __init__(self) -> None:
        super().__init__()
        self.window: PassWindow | None = None
        self.prefix = RecurrentPrefix()
        self._num_before = 0
        self._columns: Tensor | None = None
        self._state: Tensor | None = None
        self._record: Record | None = None

    def begin(self, window: PassWindow) -> None:
        """A pass begins; the one before it, if it wasn't committed, is forgotten."""
        self.close()
        self.window = window

    @property
    def real(self) -> Tensor | None:
        """`[B, W]`, False where a row of the pass has a pad; None if none has."""
        assert self.window is not None and self._columns is not None
        width = self._columns.shape[-1] - self._num_before
        if set(self.window.widths) == {width}:
            return None
        widths = torch.tensor(self.window.widths, device=self._columns.device)
        return torch.arange(width, device=widths.device) < widths[:, None]

    def update_conv_state(
        self, conv_states: Tensor, state_idx: int = 0, conv_kernel_size: int | None = None, **kwargs: object
    ) -> Tensor:
        """The pass's inputs of the convolution `[B, C, W]` behind the last of the prefix."""
        if self.window is None:
            raise RollbackError("this cache was used outside of a pass: call PrefixCache.begin before the model")
        assert conv_kernel_size is not None and not state_idx, (
            "the layers that recurrence.py knows have one convolution"
        )
        before = self.prefix.columns
        if before is None:
            before = conv_states.new_zeros(*conv_states.shape[:2], conv_kernel_size - 1)
        self._num_before = before.shape[-1]
        self._columns = torch.cat([before, conv_states], dim=-1)
        return self._columns

    def record(self, output: DeltaOutput) -> None:
        """Take what the recurrence of the pass gave."""
        self._state = output.state
        assert self.window is not None
        self._record = None if self.window.whole else output.record

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: object) -> Tensor:
        """transformers hands the last state over, rounded; `record` has it already."""
        return recurrent_states

    def lazy_initialization(self, *args: object, **kwargs: object) -> None:
        """Nothing is allocated ahead."""

    def after(self, counts: Sequence[int]) -> RecurrentPrefix:
        """The prefix with the first `counts[row]` tokens of the pass folded in."""
        if not any(counts):
            return self.prefix
        return RecurrentPrefix(self._state_after(counts), self._columns_after(counts))

    def _state_after(self, counts: Sequence[int]) -> Tensor:
        assert self.window is not None and self._state is not None
        if tuple(counts) == self.window.widths:
            return self._state
        assert self._record is not None
        before = self.prefix.state if self.prefix.state is not None else torch.zeros_like(self._state)
        return self._record.state_after(torch.tensor(counts, device=before.device), before)

    def _columns_after(self, counts: Sequence[int]) -> Tensor:
        assert self._columns is not None
        if len(set(counts)) == 1:
            # A copy: a slice would keep the whole pass in memory.
            return self._columns[:, :, counts[0] : counts[0] + self._num_before].clone()
        places = [range(count, count + self._num_before) for count in counts]
        index = torch.tensor(places, device=self._columns.device)[:, None]
        return self._columns.gather(2, index.expand(-1, self._columns.shape[1], -1))

    def close(self) -> None:
        """The pass is committed or forgotten: drop what it has left."""
        self.window = self._columns = self._state = self._record = None

    def join(self, other: "RecurrentStore", num_rows: int, num_others: int) -> None:
        """The `num_others` rows of `other` behind the `num_rows` that there are."""
        pairs = zip(self.prefix, other.prefix, strict=True)
        self.prefix = RecurrentPrefix(*(_behind_each_other(*pair, num_rows, num_others) for pair in pairs))

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep the rows with these indices, in this order."""
        self.prefix = RecurrentPrefix(*(None if part is None else part[list(rows)] for part in self.prefix))

    def num_bytes(self) -> int:
        """Bytes of the prefix, and of what a pass has left that is neither committed nor forgotten."""
        held = [*self.prefix, self._columns, self._state, *(self._record.tensors() if self._record is not None else ())]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in held if each is not None}
        return sum(storage.nbytes() for storage in storages.values())


def _behind_each_other(first: Tensor | None, second: Tensor | None, num_first: int, num_second: int) -> Tensor | None:
    if first is None and second is None:
        return None
    like = first if first is not None else second
    assert like is not None
    # What was not read yet starts from zeros.
    first = like.new_zeros(num_first, *like.shape[1:]) if first is None else first
    second = like.new_zeros(num_second, *like.shape[1:]) if second is None else second
    return torch.cat([first, second])


class PrefixCache(Cache):
    """What the base holds of the committed tokens of B rows, with room for `capacity` tokens a row."""

    def __init__(self, config: PreTrainedConfig, *, batch_size: int, capacity: int) -> None:
        super().__init__(layers=_layers_for(config, round_up(capacity, KEY_BLOCK)))
        self.capacity = capacity
        self.lengths: list[int] = [0] * batch_size
        self._num_layers = len(self.layers)
        self._added: dict[str, AttentionStore] = {}
        self._num_places = 0
        # No pass has written further in any place.
        self._reach = 0
        self._window: PassWindow | None = None
        self._ended = False
        self._snapshots: WeakSet[CacheSnapshot] = WeakSet()

    @property
    def window(self) -> PassWindow | None:
        """Where the last pass stands, until it is committed or taken back."""
        return self._window

    def added_store(self, name: str) -> AttentionStore:
        """Entries of a method's own module, kept as those of a layer are and behind all layers'.

        It is made when a pass first asks for it. Raises `RollbackError` if tokens were committed before that, of which
        it would lack the entries.
        """
        if name not in self._added:
            if self._window is None or any(self.lengths):
                raise RollbackError(
                    f"entries of {name} are to be kept, but this cache holds {self.lengths} tokens that were read "
                    "without them; open the decoding with the model that it goes on with"
                )
            self._add(name).begin(self._window)
        return self._added[name]

    def _add(self, name: str) -> AttentionStore:
        store = AttentionStore(round_up(self.capacity, KEY_BLOCK), num_places=self._num_places)
        self._added[name] = store
        self.layers.append(store)
        return store

    @property
    def _recurrent(self) -> list[RecurrentStore]:
        return [layer for layer in self.layers if isinstance(layer, RecurrentStore)]

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Indices of layers that hold a state instead of entries."""
        return tuple(i for i, layer in enumerate(self.layers) if isinstance(layer, RecurrentStore))

    def begin(self, widths: Sequence[int], *, whole: bool = False) -> PassWindow:
        """Open a pass over the next `widths[row]` tokens of each row; an uncommitted pass before it is forgotten.

        Of a `whole` pass each row will be committed to its end, or none at all: so it needs no record.
        """
        if len(widths) != len(self.lengths) or min(widths) < 0:
            raise RollbackError(
                f"a pass over {list(widths)} tokens of {len(self.lengths)} rows: give each row 0 or more"
            )
        window = PassWindow(tuple(self.lengths), tuple(widths), whole)
        self._check_room(window)
        self._window, self._ended = window, False
        self._reach = max(self._reach, window.num_keys)
        for layer in self.layers:
            layer.begin(window)
        return window

    def end(self) -> None:
        """The model has read the pass to its end; one that it has not can't be committed."""
        self._ended = True

    def _close(self) -> None:
        self._window, self._ended = None, False
        for layer in self.layers:
            layer.close()

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None, always: transformers would update the window in place, one token at a time."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state before the pass."""
        return self.layers[layer_idx].prefix.state

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
        if not self._ended:
            raise RollbackError("nothing to commit: the pass did not come to its end; begin and run it again")
        self._check_counts(counts, self._window)
        # All of them first: if one fails, nothing was committed.
        prefixes = [layer.after(counts) for layer in self._recurrent]
        for layer, prefix in zip(self._recurrent, prefixes, strict=True):
            layer.prefix = prefix
        self.lengths = [offset + count for offset, count in zip(self._window.offsets, counts, strict=True)]
        self._close()

    def states_after(self, counts: Sequence[int]) -> tuple[RecurrentPrefix, ...]:
        """Of each recurrent layer, the prefix that `commit(counts)` would make; nothing is committed."""
        if self._window is None or not self._ended:
            raise RollbackError("no pass has come to its end since the last commit")
        self._check_counts(counts, self._window)
        return tuple(layer.after(counts) for layer in self._recurrent)

    def _check_counts(self, counts: Sequence[int], window: PassWindow) -> None:
        if len(counts) != len(window.widths):
            raise RollbackError(f"{len(counts)} counts for a pass over {len(window.widths)} rows")
        for row, (count, width) in enumerate(zip(counts, window.widths, strict=True)):
            if not 0 <= count <= width:
                raise RollbackError(f"row {row}: can't commit {count} tokens of a pass over {width}")
            if window.whole and self._recurrent and any(counts) and count < width:
                raise RollbackError(
                    f"row {row}: can't commit {count} of {width} tokens: the pass was begun as one to be committed "
                    f"whole, and layers {', '.join(map(str, self.recurrent_layers))}, which hold a state, have no "
                    "record of it; go back to a snapshot and run these tokens alone"
                )

    def snapshot(self) -> CacheSnapshot:
        """The present prefix, to come back to with `rollback`; it holds on to the states there are now."""
        snapshot = CacheSnapshot(tuple(self.lengths), tuple(layer.prefix for layer in self._recurrent))
        self._snapshots.add(snapshot)
        return snapshot

    def rollback(self, snapshot: CacheSnapshot) -> None:
        """Forget every token committed since `snapshot`, any number of times.

        Impossible, and an error, for a snapshot of another cache, of rows that were dropped, moved or joined
        since, and of tokens that an earlier rollback has forgotten: others stand in their entries.
        """
        if snapshot not in self._snapshots:
            raise RollbackError(
                f"can't return from {self.lengths} to {list(snapshot.lengths)} tokens: the snapshot is of another "
                "cache, or of rows or tokens that were dropped since it was taken"
            )
        self.lengths = list(snapshot.lengths)
        for layer, prefix in zip(self._recurrent, snapshot.states, strict=True):
            layer.prefix = prefix
        self._close()
        self._snapshots = WeakSet(each for each in self._snapshots if self._still_hold(each))

    def _still_hold(self, snapshot: CacheSnapshot) -> bool:
        return all(then <= now for then, now in zip(snapshot.lengths, self.lengths, strict=True))

    def join(self, other: "PrefixCache", *, most_rows: int) -> None:
        """The rows of `other` behind those that there are; `other` is used up.

        The first time, memory for `most_rows` rows is taken, which from then on is enough for as many to come and go.
        Raises `RollbackError` where rows have room for other numbers of tokens, are more than `most_rows`, or were read
        without the entries that a method keeps.
        """
        self._check_joins(other, most_rows)
        num_rows, num_others = len(self.lengths), len(other.lengths)
        self._reserve(most_rows)
        self._reach = max(self._reach, other._reach)
        moves = [Move(row, num_rows + row, length) for row, length in enumerate(other.lengths)]
        for store, joined in self._pairs(other):
            if isinstance(store, RecurrentStore):
                store.join(joined, num_rows, num_others)
            else:
                store.join(joined, moves, num_rows=num_rows + num_others, reach=self._reach)
        self.lengths = [*self.lengths, *other.lengths]
        self._forget_passes()

    def _check_joins(self, other: "PrefixCache", most_rows: int) -> None:
        if other.capacity != self.capacity:
            raise RollbackError(
                f"rows with room for {other.capacity} tokens can't join those with room for {self.capacity}; open both "
                "decodings with the same capacity"
            )
        num_rows = len(self.lengths) + len(other.lengths)
        if num_rows > most_rows:
            raise RollbackError(f"{num_rows} rows are more than most_rows, {most_rows}; join fewer or raise it")
        for one, two in ((self, other), (other, self)):
            missing = sorted(one._added.keys() - two._added.keys())
            if missing and any(two.lengths):
                raise RollbackError(
                    f"entries of {missing[0]} are to be kept, but some of the rows to be joined were read without "
                    "them; open both decodings with the same model"
                )

    def _reserve(self, most_rows: int) -> None:
        self._num_places = max(self._num_places, most_rows)
        for layer in self.layers:
            if isinstance(layer, AttentionStore):
                layer.reserve(most_rows, self.lengths)

    def _pairs(self, other: "PrefixCache") -> list[tuple[Any, Any]]:
        """Stores of the same layer or name; rows that have read nothing may lack one."""
        for name in other._added.keys() - self._added.keys():
            self._add(name)
        own_layers, others = self.layers[: self._num_layers], other.layers[: self._num_layers]
        nothing = AttentionStore(0)
        added = [(store, other._added.get(name, nothing)) for name, store in self._added.items()]
        return [*zip(own_layers, others, strict=True), *added]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Keep the rows with these indices, in this order, and drop the others.

        In a cache that others have joined, only rows whose index changes are moved; otherwise memory is given back.
        """
        for layer in self.layers:
            if isinstance(layer, RecurrentStore):
                layer.keep_rows(rows)
            else:
                layer.keep_rows(rows, self.lengths, reach=self._reach)
        self._num_places = max(self._num_places, len(rows)) if self._num_places else 0
        self.lengths = [self.lengths[row] for row in rows]
        self._forget_passes()

    def _forget_passes(self) -> None:
        self._close()
        self._snapshots = WeakSet()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed tokens of the longest row."""
        return max(self.lengths)

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise RollbackError("a PrefixCache is changed by commit, rollback, join and keep_rows only")

    # transformers' own ways would leave lengths, entries and states at odds.
    reset = reorder_cache = crop = batch_repeat_interleave = batch_select_indices = _refuse

    def entries(self, layer: int, row: int) -> tuple[Tensor, Tensor]:
        """Committed keys and values `[N, length, E]` of one row of one attention layer, for comparison."""
        store, length = self.layers[layer], self.lengths[row]
        return store.keys[row, :, :length], store.values[row, :, :length]

    def state(self, layer: int) -> RecurrentPrefix:
        """What one recurrent layer holds of the committed tokens."""
        return self.layers[layer].prefix

    def num_bytes(self) -> int:
        """Bytes really held, by attention stores and recurrent states together."""
        return sum(layer.num_bytes() for layer in self.layers)


def recurrent_layers(config: PreTrainedConfig) -> tuple[int, ...]:
    """Indices of the layers that hold a state instead of entries, in a model with this `config`."""
    return tuple(i for i, layer in enumerate(DynamicCache(config=config).layers) if type(layer) is LinearAttentionLayer)


def _layers_for(config: PreTrainedConfig, capacity: int) -> list[AttentionStore | RecurrentStore]:
    layers: list[AttentionStore | RecurrentStore] = []
    for index, layer in enumerate(DynamicCache(config=config).layers):
        if type(layer) is DynamicLayer:
            layers.append(AttentionStore(capacity))
        elif type(layer) is LinearAttentionLayer:
            layers.append(RecurrentStore())
        else:
            raise UnsupportedBackbone(
                f"layer {index} of this {config.model_type} model keeps a {type(layer).__name__}; "
                "supported are full attention and linear attention layers (no sliding window, no sparse index)"
            )
    return layers
