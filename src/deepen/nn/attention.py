"""Causal attention of a pass over a committed prefix, whose rows round the same at any width of the pass.

A pass brings the W newest positions of each row; its keys and values are the row's first entries of a store, of which
each query sees those up to its own position. A matrix product rounds differently with the number of its rows and
columns, so both are made a function of the position alone: queries go through in blocks of `QUERY_BLOCK` positions
(times the heads that share a key), and the query at entry p reads the first p + 1 entries, rounded up to a multiple of
`KEY_BLOCK`. A pass is cut where that number changes. Position p then gets the same bits in a pass of one and in a pass
of W, alone and in a batch.

Letters: B rows, W positions, H query heads, N key/value heads, G = H / N, E key width, S stored entries.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

QUERY_BLOCK = 4
KEY_BLOCK = 128


def round_up(number: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


class Visibility:
    """What each position of one pass may see: stored entries 0 .. `offsets[row] + i` for its position i."""

    def __init__(
        self, offsets: Sequence[int], width: int, num_keys: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """`num_keys` is S, a multiple of KEY_BLOCK that covers every real position of the pass."""
        self.offsets, self.width, self.num_keys = tuple(offsets), width, num_keys
        # Elsewhere than on a CPU cuts don't give equal bits, and each would be as many kernels as the whole.
        divided = _sections if device.type == "cpu" else undivided
        self.sections = list(divided(offsets, width, num_keys, device, dtype))
        self.used = False
        """Whether any attention has asked for it: a model whose attention did not would see its own future."""


class Section:
    """Neighbouring rows and positions of a pass that read the same number of entries."""

    def __init__(self, rows: slice, positions: slice, num_keys: int, last_seen: Tensor, *, dtype: torch.dtype) -> None:
        """`last_seen` `[rows, positions]`: the last entry that each may see."""
        self.rows, self.positions, self.num_keys = rows, positions, num_keys
        self.num_blocks = round_up(last_seen.shape[1], QUERY_BLOCK) // QUERY_BLOCK
        self.num_pads = self.num_blocks * QUERY_BLOCK - last_seen.shape[1]
        if self.num_pads:
            # What a pad sees doesn't matter, but it must see something.
            last_seen = F.pad(last_seen, (0, self.num_pads))
        hidden = torch.arange(num_keys, device=last_seen.device) > last_seen[:, :, None]
        self._bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
        self._shaped: dict[tuple[int, int], Tensor] = {}

    def bias(self, num_key_heads: int, group: int) -> Tensor:
        """`[rows, N * blocks, G * QUERY_BLOCK, S]` to add to scores; every layer of a pass shares it."""
        shape = num_key_heads, group
        if shape not in self._shaped:
            rows, _, num_keys = self._bias.shape
            blocks = self._bias.view(rows, 1, self.num_blocks, 1, QUERY_BLOCK, num_keys)
            blocks = blocks.expand(rows, num_key_heads, self.num_blocks, group, QUERY_BLOCK, num_keys)
            self._shaped[shape] = blocks.reshape(rows, num_key_heads * self.num_blocks, group * QUERY_BLOCK, num_keys)
        return self._shaped[shape]


def _sections(
    offsets: Sequence[int], width: int, num_keys: int, device: torch.device, dtype: torch.dtype
) -> Iterator[Section]:
    first = 0
    for cuts, rows in groupby(_cuts(offset, width, num_keys) for offset in offsets):
        stop = first + len(list(rows))
        for start, end, seen in cuts:
            last_seen = torch.tensor([range(o + start, o + end) for o in offsets[first:stop]], device=device)
            yield Section(slice(first, stop), slice(start, end), seen, last_seen, dtype=dtype)
        first = stop


def undivided(
    offsets: Sequence[int], width: int, num_keys: int, device: torch.device, dtype: torch.dtype
) -> list[Section]:
    """All rows and positions as one section, which reads all entries."""
    last_seen = torch.tensor(offsets, device=device)[:, None] + torch.arange(width, device=device)
    return [Section(slice(0, len(offsets)), slice(0, width), num_keys, last_seen, dtype=dtype)]


def _cuts(offset: int, width: int, num_keys: int) -> tuple[tuple[int, int, int], ...]:
    """Positions `start .. end - 1` of a row that read the same number of entries, and that number."""
    cuts = []
    start = 0
    while start < width:
        seen = min(round_up(offset + start + 1, KEY_BLOCK), num_keys)
        # Only pads stand behind entry num_keys.
        end = width if seen == num_keys else min(width, seen - offset)
        cuts.append((start, end, seen))
        start = end
    return tuple(cuts)


def attend(
    query: Float[Tensor, "B H W E"],
    key: Float[Tensor, "B N S E"],
    value: Float[Tensor, "B N S V"],
    *,
    visibility: Visibility,
    scale: float | None,
) -> Float[Tensor, "B W H V"]:
    """softmax(scale q k^T + visibility) v for each position of the pass; `scale` None is 1 / sqrt(E)."""
    visibility.used = True
    if len(visibility.sections) == 1:
        return attend_section(query, key, value, visibility.sections[0], scale)
    batch, num_heads, width, _ = query.shape
    out = query.new_empty(batch, width, num_heads, value.shape[-1])
    for section in visibility.sections:
        rows, positions = section.rows, section.positions
        out[rows, positions] = attend_section(query[rows, :, positions], key[rows], value[rows], section, scale)
    return out


def attend_section(
    query: Float[Tensor, "B H W E"],
    key: Float[Tensor, "B N S E"],
    value: Float[Tensor, "B N S V"],
    section: Section,
    scale: float | None,
) -> Float[Tensor, "B W H V"]:
    """As `attend`, of rows and positions that are all of one section."""
    batch, num_heads, width, _ = query.shape
    num_key_heads = key.shape[1]
    group, num_blocks = num_heads // num_key_heads, section.num_blocks
    if section.num_pads:  # pad copies even where there is nothing to pad
        query = F.pad(query, (0, 0, 0, section.num_pads))
    # Heads that share a key become rows beside each other; blocks of positions become heads that share that key.
    query = query.view(batch, num_key_heads, group, num_blocks, QUERY_BLOCK, -1).transpose(2, 3)
    out = F.scaled_dot_product_attention(
        query.reshape(batch, num_key_heads * num_blocks, group * QUERY_BLOCK, -1),
        key[:, :, : section.num_keys],
        value[:, :, : section.num_keys],
        attn_mask=section.bias(num_key_heads, group),
        scale=scale,
        enable_gqa=num_blocks > 1,
    )
    out = out.view(batch, num_key_heads, num_blocks, group, QUERY_BLOCK, -1).permute(0, 2, 4, 1, 3, 5)
    return out.reshape(batch, num_blocks * QUERY_BLOCK, num_heads, -1)[:, :width]
