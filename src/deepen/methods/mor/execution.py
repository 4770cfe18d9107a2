"""How a pass runs only some of its tokens through a recursion: gathered, or all of them under a mask.

Both know which tokens are still running, hand out their states, take back what became of them, and make the grids of
attention. Gathering skips what isn't run. A mask keeps all shapes the same, so that compiled code fits every batch, and
skips nothing.
"""

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from .cache import DepthStore, Entries
from .packing import Grid, Places, masked_grid, packed_grid


class Gathered:
    """The real tokens of a pass behind each other; those that a router doesn't keep are left out of what follows."""

    def __init__(self, real: Bool[Tensor, "B T"], store: DepthStore) -> None:
        self.num_rows, self._width = real.shape
        self.flat = real.flatten().nonzero()[:, 0]
        self.num_tokens = len(self.flat)
        self.places = Places(self.flat // self._width, self.flat % self._width + store.num_columns)
        self.row_lengths = real.sum(dim=1)
        # Of all tokens, those that are real.
        self.real = torch.ones(self.num_tokens, dtype=torch.bool, device=real.device)
        self._store = store
        self._active: Tensor | None = None
        self._whole: dict[int, Places] = {0: self._behind_cached(0, self.places)}
        self._grids: dict[tuple[int, int], Grid] = {}
        self._indices: dict[int, Tensor] = {}

    @property
    def index(self) -> Tensor | None:
        """Of those that run, among all; None where all do."""
        return self._active

    alive = None
    """All states that are handed out count."""

    @property
    def is_idle(self) -> bool:
        """Whether nobody runs."""
        return self._active is not None and not len(self._active)

    @property
    def rows(self) -> Tensor:
        """Of those that run."""
        return self._running.rows

    @property
    def _running(self) -> Places:
        return self.places if self._active is None else self.places.at(self._active)

    def packed(self, spread: Shaped[Tensor, "B T *rest"]) -> Shaped[Tensor, "M *rest"]:
        """The real tokens' part of what is given for all positions."""
        flat = spread.flatten(0, 1)
        return flat if len(self.flat) == len(flat) else flat[self.flat]

    def spread(self, packed: Shaped[Tensor, "M *rest"]) -> Shaped[Tensor, "B T *rest"]:
        """The reverse; zero at pads."""
        num_places = self.num_rows * self._width
        if len(self.flat) < num_places:
            packed = packed.new_zeros(num_places, *packed.shape[1:]).index_copy(0, self.flat, packed)
        return packed.view(self.num_rows, self._width, *packed.shape[1:])

    def narrow(self, level: int, kept: Bool[Tensor, "m"]) -> None:
        """Of those that run, only these enter `level`."""
        chosen = kept.nonzero()[:, 0]
        self._active = chosen if self._active is None else self._active[chosen]
        self._whole[level] = self._behind_cached(level, self._running)

    def stay(self, level: int) -> None:
        """All that run enter `level`."""
        self._whole[level] = self._behind_cached(level, self._running)

    def widen(self) -> None:
        """All run again."""
        self._active = None

    def read(self, whole: Shaped[Tensor, "M *rest"]) -> Shaped[Tensor, "m *rest"]:
        """The part of those that run."""
        return whole if self._active is None else whole[self._active]

    def write(self, whole: Float[Tensor, "M D"], part: Float[Tensor, "m D"]) -> Float[Tensor, "M D"]:
        """`whole`, with the states of those that run replaced."""
        return part if self._active is None else whole.index_copy(0, self._active, part.to(whole.dtype))

    def full(self, part: Shaped[Tensor, "m"], running: Tensor | None) -> Shaped[Tensor, "M"]:
        """Of those that ran at `running` in their places among all; zero elsewhere."""
        return part if running is None else part.new_zeros(self.num_tokens).index_copy(0, running, part)

    def grid(self, level: int, entries_level: int) -> Grid:
        """For those that run `level`, and entries of `entries_level`, a cache's too."""
        if (level, entries_level) not in self._grids:
            entries = self._whole[entries_level]
            self._grids[level, entries_level] = packed_grid(self._running, entries, num_rows=self.num_rows)
        return self._grids[level, entries_level]

    def entry_places(self, num_levels: int) -> list[Places | None]:
        """By level, of all entries there are now; None where the pass didn't come."""
        return [self._whole.get(level) for level in range(num_levels)]

    def over(self, level: int, under: Entries, own: Entries) -> Entries:
        """Entries of all tokens, of which those of `level` stand in the place of those `under` them."""
        if level not in self._indices:
            self._indices[level] = self._whole[level].index_in(self._whole[0])
        index = self._indices[level]
        keys, values = (
            below.index_copy(0, index, each.to(below.dtype)) for below, each in zip(under, own, strict=True)
        )
        return keys, values

    def _behind_cached(self, level: int, new: Places) -> Places:
        cached = self._store.places(level)
        return new if cached is None else cached.joined(new)


class Masked:
    """All positions of a batch, pads too; which of them count is a mask. There is no cache."""

    index = None

    def __init__(self, real: Bool[Tensor, "B T"]) -> None:
        self.num_rows, self._width = real.shape
        self.num_tokens = real.numel()
        self.row_lengths = real.sum(dim=1)
        self.rows = torch.arange(self.num_rows, device=real.device).repeat_interleave(self._width)
        self.real = real.flatten()
        self.alive: Tensor = self.real
        self._shown: dict[int, Tensor] = {0: self.real}
        self._grids: dict[int, Grid] = {}

    is_idle = False

    def packed(self, spread: Shaped[Tensor, "B T *rest"]) -> Shaped[Tensor, "M *rest"]:
        """All of it."""
        return spread.flatten(0, 1)

    def spread(self, packed: Shaped[Tensor, "M *rest"]) -> Shaped[Tensor, "B T *rest"]:
        """The reverse."""
        return packed.view(self.num_rows, self._width, *packed.shape[1:])

    def narrow(self, level: int, kept: Bool[Tensor, "M"]) -> None:
        """Only these count from `level` on."""
        self.alive = self.alive & kept
        self._shown[level] = self.alive

    def stay(self, level: int) -> None:
        """All that count enter `level`."""
        self._shown[level] = self.alive

    def widen(self) -> None:
        """All real tokens count again."""
        self.alive = self.real

    def read(self, whole: Shaped[Tensor, "M *rest"]) -> Shaped[Tensor, "M *rest"]:
        """All of it."""
        return whole

    def write(self, whole: Float[Tensor, "M D"], part: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        """`whole`, with the states of those that count replaced."""
        return torch.where(self.alive[:, None], part.to(whole.dtype), whole)

    def full(self, part: Shaped[Tensor, "M"], running: Tensor | None) -> Shaped[Tensor, "M"]:
        """Itself."""
        return part

    def grid(self, level: int, entries_level: int) -> Grid:
        """For all positions, and entries of those that count at `entries_level`."""
        if entries_level not in self._grids:
            self._grids[entries_level] = masked_grid(self._shown[entries_level].view(self.num_rows, self._width))
        return self._grids[entries_level]

    def entry_places(self, num_levels: int) -> list[Places | None]:
        """None is kept."""
        return [None] * num_levels

    def over(self, level: int, under: Entries, own: Entries) -> Entries:
        """Entries of all positions, of which those that count at `level` stand in the place of those `under` them."""
        shown = self._shown[level][:, None, None]
        keys, values = (torch.where(shown, each, below) for below, each in zip(under, own, strict=True))
        return keys, values
