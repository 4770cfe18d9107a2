"""Where a pass over a committed prefix stands."""

from dataclasses import dataclass
from functools import cached_property

from deepen.nn.attention import KEY_BLOCK, round_up


@dataclass(frozen=True)
class PassWindow:
    """Where a pass stands: each row's committed length before it, and how many tokens the row brings."""

    offsets: tuple[int, ...]
    widths: tuple[int, ...]
    whole: bool = False
    """Whether it will be committed to its end or not at all."""

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
        return round_up(max(1, *map(sum, zip(self.offsets, self.widths, strict=True))), KEY_BLOCK)
