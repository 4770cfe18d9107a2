"""The rows of each optimizer step, in an order that is a function of the seed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from deepen.core.errors import CheckpointError, ConfigError
from deepen.core.seeds import seed_at
from deepen.core.types import Batch
from deepen.data.rows import Rows


class Loader:
    """Gives the rows of any step: all rows once in an order drawn from `seed`, then in another, and so on.

    A step may hold the end of one epoch and the beginning of the next. The place in the data is the number of the step
    and nothing else. All ranks read whole steps, which are ids and no more, and take their share after the method has
    prepared them: so a step is the same for any number of ranks.
    """

    def __init__(self, rows: Rows, *, rows_per_step: int, seed: int) -> None:
        """Raises `ConfigError` where a step takes more rows than there are."""
        if rows_per_step > len(rows):
            raise ConfigError(
                f"a step takes {rows_per_step} rows, and the data has {len(rows)}; lower batch_size or give more data"
            )
        self._rows, self._rows_per_step, self._seed = rows, rows_per_step, seed
        self._epoch = -1
        self._order: list[int] = []

    @property
    def mean_tokens(self) -> float:
        """Of a step, over an epoch."""
        return self._rows_per_step * self._rows.corpus.num_tokens / len(self._rows)

    def counts(self, vocab_size: int) -> Tensor:
        """`[V]`: how often each id is learned in an epoch."""
        return self._rows.corpus.counts(vocab_size)

    def step(self, index: int) -> Batch:
        """All rows of the step `index`, counted from 0."""
        first = index * self._rows_per_step
        return self._rows.batch([self._index(place) for place in range(first, first + self._rows_per_step)])

    def _index(self, place: int) -> int:
        epoch, within = divmod(place, len(self._rows))
        if epoch != self._epoch:
            # A generator per epoch, so that no epoch needs those before it.
            source = torch.Generator().manual_seed(seed_at(self._seed, epoch))
            self._order = torch.randperm(len(self._rows), generator=source).tolist()
            self._epoch = epoch
        return self._order[within]

    def facts(self) -> dict[str, Any]:
        """What decides the steps, as plain JSON types."""
        rows = self._rows
        return {
            "seed": self._seed,
            "rows_per_step": self._rows_per_step,
            "cut": rows.cut,
            "num_rows": len(rows),
            "digest": rows.corpus.digest,
            "difficulties": rows.corpus.digest_of_difficulties,
        }

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Raises `CheckpointError` naming what differs from a loader whose `facts` these are: its steps were others."""
        # Runs of earlier versions, which no difficulty has decided, don't tell all of these.
        differing = [(name, facts[name], own) for name, own in self.facts().items() if facts.get(name, own) != own]
        if differing:
            told = "; ".join(f"{name} was {was} and is {own}" for name, was, own in differing)
            raise CheckpointError(f"the data is not what this run was on: {told}")
