"""Batches without end, in an order that is a function of the seed, from any place in it and for any number of ranks."""

from collections.abc import Mapping
from typing import Any

import torch

from deepen.core.errors import CheckpointError, ConfigError
from deepen.core.types import Batch
from deepen.data.rows import Rows

_STATE = ("seed", "rows_per_step", "steps_drawn", "cut", "num_rows", "digest")


class Loader:
    """Draws the rows of each optimizer step: all rows once in an order drawn from `seed`, then in another, and so on.

    A step takes `rows_per_step` rows over all ranks, and rank r of R those at r, r + R, ... of them, so the steps are
    the same whatever R is. A step may hold the end of one epoch and the beginning of the next.
    """

    def __init__(self, rows: Rows, *, rows_per_step: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        """Raises `ConfigError` where a step has no row for some rank, or more rows than there are."""
        if rows_per_step < world_size:
            raise ConfigError(f"a step of {rows_per_step} rows leaves none for some of {world_size} ranks; raise it")
        if rows_per_step > len(rows):
            raise ConfigError(
                f"a step takes {rows_per_step} rows, and the data has {len(rows)}; lower batch_size or the number of "
                "accumulated batches, or give more data"
            )
        self._rows, self._rows_per_step, self._seed = rows, rows_per_step, seed
        self._rank, self._world_size = rank, world_size
        self.steps_drawn = 0
        self._epoch = -1
        self._order: list[int] = []

    def next_step(self, *, num_batches: int = 1) -> list[Batch]:
        """This rank's rows of the next step in `num_batches` even batches, or fewer if it has fewer rows."""
        mine = self._indices(self.steps_drawn)[self._rank :: self._world_size]
        self.steps_drawn += 1
        num_batches = min(num_batches, len(mine))
        return [self._rows.batch(mine[part::num_batches]) for part in range(num_batches)]

    def _indices(self, step: int) -> list[int]:
        """The rows of a step, over all ranks."""
        first = step * self._rows_per_step
        return [self._index(place) for place in range(first, first + self._rows_per_step)]

    def _index(self, place: int) -> int:
        epoch, within = divmod(place, len(self._rows))
        if epoch != self._epoch:
            # A generator per epoch, so that no epoch needs those before it.
            source = torch.Generator().manual_seed(_mixed(self._seed, epoch))
            self._order = torch.randperm(len(self._rows), generator=source).tolist()
            self._epoch = epoch
        return self._order[within]

    def state(self) -> dict[str, Any]:
        """Where it stands, and of which data, as plain JSON types."""
        rows = self._rows
        values = self._seed, self._rows_per_step, self.steps_drawn, rows.cut, len(rows), rows.corpus.digest
        return dict(zip(_STATE, values, strict=True))

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises `CheckpointError` naming what differs: other data, rows, seed or steps."""
        own = self.state()
        differing = [name for name in _STATE if name != "steps_drawn" and state.get(name) != own[name]]
        if differing:
            told = "; ".join(f"{name} was {state.get(name)} and is {own[name]}" for name in differing)
            raise CheckpointError(f"the data is not what this run was on: {told}")
        self.steps_drawn = int(state["steps_drawn"])


def _mixed(seed: int, epoch: int) -> int:
    """A seed of its own for each epoch of each seed: neighbouring seeds must not share epochs."""
    return (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + 1) % 2**63
