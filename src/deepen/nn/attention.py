"""Causal attention of a pass over a committed prefix, whose rows round the same at any width of the pass.

A pass brings the W newest positions of each row; its keys and values are the row's first entries of a store, of which
each query sees those up to its own position. A matrix product rounds differently with the number of its rows and
columns, so their numbers are held fixed: queries go through in blocks of `QUERY_BLOCK` positions (times the heads that
share a key), keys in multiples of `KEY_BLOCK`, the inner block of torch's CPU kernel. A block without a visible key
adds exact zeros. Position i then gets the same bits in a pass of one and in a pass of W, alone and in a batch.

Letters: B rows, W positions, H query heads, N key/value heads, G = H / N, E key width, S stored entries.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

QUERY_BLOCK = 4
KEY_BLOCK = 512


def round_up(number: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least `number`."""
    return -(-number // multiple) * multiple


class Visibility:
    """What each position of one pass may see: stored entries 0 .. `offsets[row] + i` for its position i."""

    def __init__(
        self, offsets: Sequence[int], width: int, num_keys: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        """`num_keys` is S, a multiple of KEY_BLOCK that covers every real position of the pass."""
        self.num_blocks = round_up(width, QUERY_BLOCK) // QUERY_BLOCK
        positions = torch.arange(self.num_blocks * QUERY_BLOCK, device=device)
        last_seen = torch.tensor(offsets, device=device)[:, None] + positions
        hidden = torch.arange(num_keys, device=device) > last_seen[:, :, None]
        self._bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        self._shaped: dict[tuple[int, int], Tensor] = {}

    @property
    def used(self) -> bool:
        """Whether any attention has asked for it: a model whose attention did not would see its own future."""
        return bool(self._shaped)

    def bias(self, num_key_heads: int, group: int) -> Tensor:
        """`[B, N * blocks, G * QUERY_BLOCK, S]` to add to scores; every layer of a pass shares it."""
        shape = num_key_heads, group
        if shape not in self._shaped:
            batch, _, num_keys = self._bias.shape
            blocks = self._bias.view(batch, 1, self.num_blocks, 1, QUERY_BLOCK, num_keys)
            blocks = blocks.expand(batch, num_key_heads, self.num_blocks, group, QUERY_BLOCK, num_keys)
            self._shaped[shape] = blocks.reshape(batch, num_key_heads * self.num_blocks, group * QUERY_BLOCK, num_keys)
        return self._shaped[shape]


def attend(
    query: Float[Tensor, "B H W E"],
    key: Float[Tensor, "B N S E"],
    value: Float[Tensor, "B N S V"],
    *,
    visibility: Visibility,
    scale: float | None,
) -> Float[Tensor, "B W H V"]:
    """softmax(scale q k^T + visibility) v for each position of the pass; `scale` None is 1 / sqrt(E)."""
    batch, num_heads, width, _ = query.shape
    num_key_heads = key.shape[1]
    group, num_blocks = num_heads // num_key_heads, visibility.num_blocks
    if width % QUERY_BLOCK:  # pad copies even where there is nothing to pad
        query = F.pad(query, (0, 0, 0, num_blocks * QUERY_BLOCK - width))
    # Heads that share a key become rows beside each other; blocks of positions become heads that share that key.
    query = query.view(batch, num_key_heads, group, num_blocks, QUERY_BLOCK, -1).transpose(2, 3)
    out = F.scaled_dot_product_attention(
        query.reshape(batch, num_key_heads * num_blocks, group * QUERY_BLOCK, -1),
        key,
        value,
        attn_mask=visibility.bias(num_key_heads, group),
        scale=scale,
        enable_gqa=num_blocks > 1,
    )
    out = out.view(batch, num_key_heads, num_blocks, group, QUERY_BLOCK, -1).permute(0, 2, 4, 1, 3, 5)
    return out.reshape(batch, num_blocks * QUERY_BLOCK, num_heads, -1)[:, :width]
