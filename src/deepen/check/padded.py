"""Rows of different lengths in one batch, with pads on either side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PadSide = Literal["left", "right"]


@dataclass(frozen=True)
class Padded:
    """Ids `[B, T]` with garbage at the pads, and what tells them apart."""

    ids: Tensor
    mask: Tensor
    """`[B, T]`, 1 at real tokens."""
    positions: Tensor | None
    """`[B, T]`, counted over real tokens; None where the model's own count (from the left end) is right."""
    real: tuple[slice, ...]
    """Where each row's own tokens are."""


def pad(rows: Sequence[Tensor], side: PadSide, garbage: Tensor) -> Padded:
    """`rows` of ids as one batch as wide as `garbage` `[T]`, ids that stand in the pads."""
    width = len(garbage)
    ids, mask = garbage.repeat(len(rows), 1), torch.zeros(len(rows), width, dtype=torch.int64, device=garbage.device)
    real = tuple(slice(0, len(row)) if side == "right" else slice(width - len(row), width) for row in rows)
    for row, (own, where) in enumerate(zip(rows, real, strict=True)):
        ids[row, where], mask[row, where] = own, 1
    return Padded(ids, mask, positions_of(mask) if side == "left" else None, real)


def positions_of(mask: Tensor) -> Tensor:
    """`[B, T]`: each real token's place among its row's real tokens; 0 at pads before them."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)
