"""Whether two decodings say the same, and if not, whether rounding alone may have decided."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepen.backbones.hf import Backbone
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.generate.verify import read

# Two kernels may round a decision apart only where its margin (in processed logits) is below this.
NEAR_TIE_MARGIN = 1e-4
# The same for models with recurrent layers, which round by the width of a pass, and more coarsely.
NEAR_TIE_MARGIN_RECURRENT = 1e-3


@dataclass(frozen=True)
class Agreement:
    """Two rows of ids compared. `position` is where they first differ; None for equal rows.

    `margin` is by how much the base's logits there would have to change for both tokens to be its choice, which they
    are if rounding alone decided; None for equal rows, infinite where one row has ended.
    """

    position: int | None = None
    margin: float | None = None

    @property
    def equal(self) -> bool:
        """Token for token the same."""
        return self.position is None

    @property
    def near_tie(self) -> bool:
        """Different, at a position where two tokens were as good as equally likely."""
        return self.margin is not None and self.margin < NEAR_TIE_MARGIN

    def __str__(self) -> str:
        if self.equal:
            return "equal"
        kind = "near-tie" if self.near_tie else "DIFFERENT"
        return f"{kind} at token {self.position} (margin {self.margin:.1e})"


@torch.no_grad()
def compare(
    backbone: Backbone,
    prompt: Sequence[int],
    ours: Sequence[int],
    theirs: Sequence[int],
    *,
    sampling: SamplingConfig | None = None,
) -> Agreement:
    """Compare two continuations of `prompt`; at the first difference ask the base what it makes of the two.

    `sampling` is the configuration of both; None is greedy.
    """
    longest = max(len(ours), len(theirs))
    position = next((i for i in range(longest) if list(ours[i : i + 1]) != list(theirs[i : i + 1])), None)
    if position is None:
        return Agreement()
    if position in (len(ours), len(theirs)):
        return Agreement(position, math.inf)
    history = [*prompt, *ours[:position]]
    cache = backbone.new_cache(batch_size=1, capacity=len(history))
    read(backbone, cache, [history[:-1]])
    logits = backbone.run(torch.tensor([history[-1:]], device=backbone.device), cache)[0]
    sampler = BatchSampler([sampling if sampling is not None else SamplingConfig()])
    margins = [sampler.margins(0, logits, history, [], [token])[0] for token in (ours[position], theirs[position])]
    return Agreement(position, max(map(abs, margins)))


@torch.no_grad()
def widest_difference(backbone: Backbone, ids: Sequence[int], *, width: int) -> float:
    """Largest difference between logits from passes of `width` positions and from one-token passes; 0.0: same bits."""
    logits = [_logits_in_passes(backbone, ids, each) for each in (width, 1)]
    return float((logits[0] - logits[1]).abs().max())


def _logits_in_passes(backbone: Backbone, ids: Sequence[int], width: int) -> torch.Tensor:
    cache = backbone.new_cache(batch_size=1, capacity=len(ids))
    parts = []
    for chunk in torch.tensor([list(ids)], device=backbone.device).split(width, dim=1):
        parts.append(backbone.run(chunk, cache))
        cache.commit([chunk.shape[1]])
    return torch.cat(parts, dim=1)
