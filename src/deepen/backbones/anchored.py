"""Passes with gradient behind several places of the same texts, for training.

A walk reads texts once, without gradient, and keeps what the base holds of each text before every *anchor*: entries of
attention layers once a text, of recurrent layers a state and a convolution window an anchor. Passes then start from
there as often as wanted. Each gets a cache of its own that puts its tokens behind the kept entries, in new tensors and
nothing in place: so gradients flow through any number of passes, and none sees another.

Letters: B texts, T tokens of the longest, R rows (one an anchor, in any order), W positions of a pass, D hidden size,
V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from deepen.backbones.cache import PrefixCache, RecurrentPrefix, RecurrentStore
from deepen.backbones.entries import AttentionStore
from deepen.backbones.window import PassWindow
from deepen.core.errors import RollbackError

WALK_WIDTH = 256
"""Positions of the texts that are read in one pass: wide enough to be compute-bound, narrow enough for its logits."""


@dataclass(frozen=True)
class Anchors:
    """Where passes start: row r behind the first `lengths[r]` tokens of text `texts[r]`. On the CPU."""

    texts: Int[Tensor, "R"]
    lengths: Int[Tensor, "R"]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class Asked:
    """Tokens of texts behind which logits are wanted: token `places[n]` of text `texts[n]`, also more than once."""

    texts: Int[Tensor, "n"]
    places: Int[Tensor, "n"]

    def mask(self, num_texts: int, num_tokens: int) -> Bool[Tensor, "{num_texts} {num_tokens}"]:
        """Which tokens of the texts these are."""
        mask = torch.zeros(num_texts, num_tokens, dtype=torch.bool)
        mask[self.texts, self.places] = True
        return mask


@dataclass(frozen=True)
class AnchoredPrefix:
    """What the base holds of the texts before each of R anchors; made by `Backbone.walk`, read by passes."""

    anchors: Anchors
    entries: tuple[tuple[Tensor, Tensor] | None, ...]
    """Keys and values `[B, N, T', E]` of each attention layer, T' the longest row; None for a recurrent one."""
    states: tuple[RecurrentPrefix | None, ...]
    """State and convolution window of each recurrent layer, of R rows; None for an attention layer."""

    @property
    def num_keys(self) -> int:
        """T', the kept entries of a text."""
        return int(self.anchors.lengths.max())

    def begin(self, widths: Sequence[int]) -> "AnchoredCache":
        """The cache of one pass over `widths[r]` tokens of each row."""
        return AnchoredCache(self, PassWindow(tuple(self.anchors.lengths.tolist()), tuple(widths), whole=True))

    def committed(self, cache: PrefixCache) -> PrefixCache:
        """`cache`, which is new and has R rows, with the tokens before each row's anchor committed."""
        for layer, entries, state in zip(cache.layers, self.entries, self.states, strict=True):
            if entries is not None:
                layer.hold(*(part[self.anchors.texts] for part in entries))
            else:
                layer.prefix = state
        cache.lengths = self.anchors.lengths.tolist()
        return cache

    def visible(self, width: int, *, device: torch.device) -> Bool[Tensor, "R 1 {width} S"]:
        """Which of the T' kept entries and the pass's own `width` each position sees; S is T' + `width`."""
        kept = torch.arange(self.num_keys, device=device) < self.anchors.lengths.to(device)[:, None]
        own = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        num_rows = len(self.anchors)
        return torch.cat([kept[:, None].expand(-1, width, -1), own.expand(num_rows, -1, -1)], dim=2)[:, None]


class AnchoredCache(Cache):
    """What transformers' layers ask for a pass behind anchors: kept entries with the pass's own behind them."""

    def __init__(self, prefix: AnchoredPrefix, window: PassWindow) -> None:
        super().__init__(layers=list(_layers(prefix, window)))

    # transformers would update the window of a convolution in place, one token at a time.
    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None, always."""

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state before the pass."""
        return self.layers[layer_idx].prefix.state


def _layers(prefix: AnchoredPrefix, window: PassWindow) -> Iterator["KeptEntries | RecurrentStore"]:
    for entries, state in zip(prefix.entries, prefix.states, strict=True):
        if entries is not None:
            yield KeptEntries(*entries, prefix.anchors.texts)
        else:
            assert state is not None, "a layer has entries or a state"
            store = RecurrentStore()
            store.begin(window)
            store.prefix = state
            yield store


class KeptEntries(CacheLayerMixin):
    """Entries of one layer, kept once a text and read by every row of it."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, texts: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self._texts = texts.to(keys.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """The kept entries of each row's text and the pass's own behind them."""
        return (
            torch.cat([self.keys[self._texts], key_states], dim=2),
            torch.cat([self.values[self._texts], value_states], dim=2),
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """transformers asks for masks; a pass brings its own, so this is the plain full width."""
        return self.keys.shape[2] + query_length, 0

    def get_seq_length(self) -> int:
        """Kept entries of the longest row."""
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        """No more is ever kept."""
        return self.keys.shape[2]


class AnchorKeeper:
    """Collects, while a `PrefixCache` reads texts pass by pass, what it holds before each anchor."""

    def __init__(self, cache: PrefixCache, anchors: Anchors) -> None:
        if int(anchors.lengths.min()) < 1:
            raise RollbackError("an anchor stands behind at least one token of its text")
        self._cache, self._anchors = cache, anchors
        self._found: dict[int, tuple[RecurrentPrefix, ...]] = {}

    def look(self, widths: Sequence[int]) -> None:
        """Take what a pass over `widths` tokens, that has ended and is not committed yet, leaves before its anchors."""
        if not self._cache.recurrent_layers:
            return
        for rows in self._together(widths):
            counts = [0] * len(widths)
            for row, count in rows.items():
                counts[int(self._anchors.texts[row])] = count
            states = self._cache.states_after(counts)
            for row in rows:
                text = int(self._anchors.texts[row])
                self._found[row] = tuple(_of_row(state, text) for state in states)

    def _together(self, widths: Sequence[int]) -> list[dict[int, int]]:
        """The rows whose anchors lie in the pass, with the tokens of it before them; of one text one at a time."""
        groups: list[dict[int, int]] = []
        of_text = [0] * len(widths)
        for row, (text, length) in enumerate(
            zip(self._anchors.texts.tolist(), self._anchors.lengths.tolist(), strict=True)
        ):
            count = length - self._cache.lengths[text]
            if 0 < count <= widths[text]:
                if of_text[text] == len(groups):
                    groups.append({})
                groups[of_text[text]][row] = count
                of_text[text] += 1
        return groups

    def prefix(self) -> AnchoredPrefix:
        """All that was kept, when every text was read as far as its last anchor."""
        num_keys = int(self._anchors.lengths.max())
        entries: list[tuple[Tensor, Tensor] | None] = []
        states: list[RecurrentPrefix | None] = []
        for index, layer in enumerate(self._cache.layers):
            if isinstance(layer, AttentionStore):
                entries.append((layer.keys[:, :, :num_keys], layer.values[:, :, :num_keys]))
                states.append(None)
            else:
                place = self._cache.recurrent_layers.index(index)
                entries.append(None)
                states.append(_stacked([self._found[row][place] for row in range(len(self._anchors))]))
        return AnchoredPrefix(self._anchors, tuple(entries), tuple(states))


def _of_row(state: RecurrentPrefix, row: int) -> RecurrentPrefix:
    # Clones: a slice would keep the other rows' states in memory.
    return RecurrentPrefix(*(None if part is None else part[row].clone() for part in state))


def _stacked(rows: Sequence[RecurrentPrefix]) -> RecurrentPrefix:
    parts = zip(*rows, strict=True)
    return RecurrentPrefix(*(torch.stack([each for each in part if each is not None]) for part in parts))


@dataclass(frozen=True)
class Walk:
    """What reading texts has given: `prefix` to start passes from, and the `logits` and outputs of layers asked for."""

    prefix: AnchoredPrefix
    logits: Float[Tensor, "n V"]
    tops: Float[Tensor, "B T L D"]
