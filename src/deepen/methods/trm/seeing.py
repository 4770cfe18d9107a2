"""Which entries a position may read: those up to its own, but for what attention doesn't see either."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from deepen.core.errors import UnsupportedBackbone


def up_to(last: Int[Tensor, "B P"], num_entries: int) -> Bool[Tensor, "B 1 P {num_entries}"]:
    """Each position sees the entries up to its own, which is `last`."""
    return (torch.arange(num_entries, device=last.device) <= last[..., None])[:, None]


def unmasked(
    visible: Bool[Tensor, "#B 1 P S"], mask: Any, places: Int[Tensor, "P"], own: Int[Tensor, "P"]
) -> Bool[Tensor, "#B 1 P S"]:
    """`visible` without what `mask` hides, as transformers' models are given it for the T tokens of a pass.

    None hides nothing; `[B, S]` is 0 where a row has a pad; `[B, 1, T, S]` is what attention takes, False or very low
    where a position doesn't see an entry. Where there are several, by kind of attention, it is that of full attention.
    A position always sees its `own` entry, even a pad: nothing comes of it, but no NaN either.

    Raises `UnsupportedBackbone` where there are several and none of full attention.
    """
    if isinstance(mask, Mapping):
        if "full_attention" not in mask:
            raise UnsupportedBackbone(
                f"mixing evidence reads all tokens, and this model's masks are of {', '.join(map(str, mask))} alone; "
                "decode with deepen's generate, or without a static cache"
            )
        mask = mask["full_attention"]
    if mask is None:
        return visible
    seen = mask[:, None, None] if mask.ndim == 2 else mask[:, :, places]
    seen = seen if seen.dtype == torch.bool else seen > 0 if mask.ndim == 2 else seen >= 0
    num_entries = visible.shape[-1]
    hidden = seen.new_zeros((*seen.shape[:-1], max(0, num_entries - seen.shape[-1])))
    seen = torch.cat([seen, hidden], dim=-1)[..., :num_entries]
    return (visible & seen) | (torch.arange(num_entries, device=visible.device) == own[:, None])
