"""The losses of both modes, as sums: pure functions of tensors, with a mask that says what counts.

Where a mask is empty, a sum is zero and its gradient too. Letters: R chunks, W positions, V vocabulary, K passes,
L longest length that can be named. Sums and probabilities in fp32, or fp64 for fp64 logits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def cross_entropy(
    logits: Float[Tensor, "R W V"], ids: Int[Tensor, "R W"], counted: Bool[Tensor, "R W"]
) -> Float[Tensor, ""]:
    """Of `ids` where `counted`; `logits[r, i]` decide `ids[r, i]`, whatever place that is."""
    return F.cross_entropy(_wide(logits[counted]), ids[counted], reduction="sum")


def weighted_divergence(
    logits: Float[Tensor, "n V"], of_base: Float[Tensor, "n V"], weights: Float[Tensor, "n"]
) -> Float[Tensor, ""]:
    """Kullback-Leibler divergence of what the slots say from what the base says, each with its weight."""
    ours, theirs = _wide(logits).log_softmax(dim=-1), _wide(of_base).log_softmax(dim=-1)
    each = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)
    return (weights.to(each.dtype) * each).sum()


def slot_weights(number: Int[Tensor, "n"], gamma: float) -> Float[Tensor, "n"]:
    """exp(-(k - 1) / gamma) of the k-th slot: a later one is of use only if those before it were right."""
    return torch.exp(-(number - 1) / gamma)


def binary_cross_entropy(
    logit: Float[Tensor, "*n"], label: Bool[Tensor, "*n"], counted: Bool[Tensor, "*n"]
) -> Float[Tensor, ""]:
    """Of labels where `counted`; of the logit, since a head that is all but sure has no gradient in a probability."""
    return F.binary_cross_entropy_with_logits(logit[counted], label[counted].to(logit.dtype), reduction="sum")


def should_halt(losses: Sequence[Float[Tensor, "R"]], margin: float) -> Bool[Tensor, "R K"]:
    """Whether one more pass would not lower a chunk's loss by more than `margin`; `losses` are those after each pass.

    Behind the last pass there is none.
    """
    after = torch.stack(list(losses), dim=1)
    halts = after[:, :-1] - after[:, 1:] <= margin
    return torch.cat([halts, torch.ones_like(after[:, :1], dtype=torch.bool)], dim=1)


def expected_passes(p_commit: Float[Tensor, "R K"]) -> Float[Tensor, "R"]:
    """How many passes a chunk takes if after each it is committed with its probability, and after the last for sure."""
    goes_on = torch.cumprod(1 - p_commit[:, :-1], dim=1)
    return 1 + goes_on.sum(dim=1)


def length_loss(log_probs: Float[Tensor, "R L"], lengths: Int[Tensor, "R"]) -> Float[Tensor, ""]:
    """Cross entropy of the lengths 0 .. L - 1."""
    return F.nll_loss(log_probs, lengths, reduction="sum")


def divergence_between(
    before: Float[Tensor, "R W V"], now: Float[Tensor, "R W V"], counted: Bool[Tensor, "R W"]
) -> Float[Tensor, ""]:
    """Kullback-Leibler divergence of a pass from the one before it, where nothing should change; no gradient into that
    one.
    """
    return weighted_divergence(now[counted], before.detach()[counted], now.new_ones(int(counted.sum())))


def right_prefix(ids: Int[Tensor, "R W"], gold: Int[Tensor, "R W"], sizes: Int[Tensor, "R"]) -> Bool[Tensor, "R W"]:
    """Which positions are right together with all before them."""
    real = torch.arange(ids.shape[1], device=ids.device) < sizes[:, None]
    return ((ids == gold) & real).long().cumprod(dim=1).bool()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
