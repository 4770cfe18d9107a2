"""What tokens that run together read and write of the pool: the model's door to it in one call.

A query reads its row's entries in whole blocks and goes through in whole blocks (nn/attention.py), row by row: on a
CPU it gets the same bits whoever runs beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from deepen.core.depthwise import Running
from deepen.nn.attention import KEY_BLOCK, Section, attend_section, round_up

from .pool import EntryPool


@dataclass(frozen=True)
class Part:
    """Tokens of one slot that run at one level, by position, and by rank among those that came to each level."""

    slot: int
    level: int
    positions: Sequence[int]
    ranks: Mapping[int, Sequence[int]]

    def indices(self, ranked_at: int | None) -> Sequence[int]:
        """Where the entry of each stands among its row's, and so the last that it sees."""
        return self.positions if ranked_at is None else self.ranks[ranked_at]


@dataclass(frozen=True)
class _Rectangle:
    """R rows with W queries each, which read the same number of entries: `tokens` `[R W]` of all that run.

    `runs` `[R]` has the run of each row, and so its layer.
    """

    tokens: Tensor
    runs: Tensor
    slots: Tensor
    section: Section


@dataclass(frozen=True)
class _Queries:
    """Tokens of one row by their places among all that run, the run that they are part of, and what they see."""

    tokens: Sequence[int]
    run: int
    slot: int
    last_seen: Sequence[int]


_Ranking = tuple[int | None, ...]
"""Of each run, by what the entries that it reads are ranked."""


class CallEntries:
    """A `KeyValues` over a pool for one call; `parts` are in the order of its tokens."""

    def __init__(self, pool: EntryPool, running: Running, parts: Sequence[Part]) -> None:
        self._pool, self._device, self._parts = pool, running.positions.device, parts
        self._levels = [level for level, _ in running.runs]
        self._counts = [count for _, count in running.runs]
        self._slots = self._tensor([part.slot for part in parts for _ in part.positions])
        self._indices: dict[_Ranking, Tensor] = {}
        self._rectangles: dict[_Ranking, list[_Rectangle]] = {}

    def attend(self, layers: Sequence[int], queries: Tensor, made: tuple[Tensor, Tensor] | None) -> Tensor:
        """See `KeyValues`."""
        ranking = tuple(self._pool.layout.ranked_at[layer] for layer in layers)
        if made is not None:
            self._write(layers, ranking, *made)
        sources = self._tensor([self._pool.layout.entries[layer] for layer in layers])
        out = torch.empty_like(queries)
        for each in self._cut(ranking):
            keys, values = self._pool.read(sources[each.runs], each.slots, each.section.num_keys)
            asked = queries[each.tokens].unflatten(0, (len(each.slots), -1)).transpose(1, 2)
            answer = attend_section(asked, keys, values, each.section, self._pool.layout.scale)
            out[each.tokens] = answer.flatten(0, 1)
        return out

    def _write(self, layers: Sequence[int], ranking: _Ranking, keys: Tensor, values: Tensor) -> None:
        makers = [
            layer
            for layer, count in zip(layers, self._counts, strict=True)
            if self._pool.layout.entries[layer] == layer
            for _ in range(count)
        ]
        if ranking not in self._indices:
            ranked_at = dict(zip(self._levels, ranking, strict=True))
            self._indices[ranking] = self._tensor(
                [index for part in self._parts for index in part.indices(ranked_at[part.level])]
            )
        num = len(makers)
        self._pool.write(self._tensor(makers), self._slots[:num], self._indices[ranking][:num], keys, values)

    def _cut(self, ranking: _Ranking) -> list[_Rectangle]:
        """Tokens that are alone in their slot stand in one rectangle where they read as much; others have their own."""
        if ranking not in self._rectangles:
            rows, start = [], 0
            for part in self._parts:
                run = self._levels.index(part.level)
                last_seen = part.indices(ranking[run])
                rows.append(_Queries(range(start, start + len(last_seen)), run, part.slot, last_seen))
                start += len(last_seen)
            alone = [row for row in rows if len(row.tokens) == 1]
            found = list(self._beside_each_other(alone))
            for row in rows:
                if len(row.tokens) > 1:
                    found += self._behind_each_other(row)
            self._rectangles[ranking] = found
        return self._rectangles[ranking]

    def _beside_each_other(self, rows: Sequence[_Queries]) -> Iterator[_Rectangle]:
        widest = max((self._width(row.last_seen[0]) for row in rows), default=0)
        widths = [self._width(row.last_seen[0]) if self._cuts else widest for row in rows]
        for width in sorted(set(widths)):
            yield self._rectangle([row for row, own in zip(rows, widths, strict=True) if own == width], width)

    def _behind_each_other(self, row: _Queries) -> Iterator[_Rectangle]:
        widest = self._width(row.last_seen[-1])
        both = zip(row.tokens, row.last_seen, strict=True)
        for width, group in groupby(both, key=lambda each: self._width(each[1]) if self._cuts else widest):
            tokens, last_seen = zip(*group, strict=True)
            yield self._rectangle([_Queries(tokens, row.run, row.slot, last_seen)], width)

    @property
    def _cuts(self) -> bool:
        # Elsewhere cuts don't give equal bits, and each would be as many kernels as the whole.
        return self._device.type == "cpu"

    def _width(self, last_seen: int) -> int:
        return round_up(last_seen + 1, KEY_BLOCK)

    def _rectangle(self, rows: Sequence[_Queries], width: int) -> _Rectangle:
        last_seen = self._tensor([row.last_seen for row in rows])
        section = Section(slice(0, len(rows)), slice(0, last_seen.shape[1]), width, last_seen, dtype=self._pool.dtype)
        tokens, runs, slots = zip(*((row.tokens, row.run, row.slot) for row in rows), strict=True)
        return _Rectangle(self._tensor(tokens).flatten(), self._tensor(runs), self._tensor(slots), section)

    def _tensor(self, numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long, device=self._device)
