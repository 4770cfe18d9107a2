"""What a refined model is trained by; all are sums over the tokens that are to be predicted.

final_ce      cross entropy of the next token behind the last outer step
earlier_ce    those behind the supervised steps before it
halt          binary cross entropy of the halting head with whether the likeliest token is right, after a step that was
              drawn, of the tokens that take it; it moves nothing but that head

Of k supervised steps each weighs 1 / k.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from deepen.core.types import Batch, LossTerm

from .config import TRMConfig
from .drawing import TRMBatch
from .halting import Says, halting_logits
from .refiner import Stepped, TRMRefiner

_NOT_PREDICTED = -100


@dataclass(frozen=True)
class Targets:
    """What is predicted after which `places`: `ids`, where they `are_predicted`."""

    places: Int[Tensor, "P"]
    ids: Int[Tensor, "B P"]
    are_predicted: Bool[Tensor, "B P"]

    @classmethod
    def of(cls, batch: Batch) -> "Targets":
        """At all places from which any row predicts."""
        predicted = batch.predicted()
        places = places_of(predicted)
        return cls(places, batch.input_ids[:, 1:][:, places], predicted[:, places])

    def cross_entropy(self, logits: Float[Tensor, "B P V"]) -> Tensor:
        """Summed, in fp32 at least."""
        ids = self.ids.masked_fill(~self.are_predicted, _NOT_PREDICTED)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide.flatten(0, 1), ids.flatten(), ignore_index=_NOT_PREDICTED, reduction="sum")


def places_of(predicted: Bool[Tensor, "B L"]) -> Int[Tensor, "P"]:
    """The positions after which a token is to be predicted in any row."""
    return predicted.any(dim=0).nonzero()[:, 0]


def watched_steps(config: TRMConfig, batch: TRMBatch) -> set[int]:
    """The steps before the last that take part in a loss."""
    supervised = range(batch.num_outer - num_supervised(config, batch) + 1, batch.num_outer)
    return {*supervised, *([batch.halting_step] if config.halt == "learned" else [])}


def num_supervised(config: TRMConfig, batch: TRMBatch) -> int:
    """The outer steps that are asked for the next token, the last one among them."""
    return min(config.supervise_steps, batch.num_outer)


def final_term(config: TRMConfig, batch: TRMBatch, targets: Targets, logits: Float[Tensor, "B P V"]) -> LossTerm:
    """Of what the model says."""
    return LossTerm(targets.cross_entropy(logits), "token", 1 / num_supervised(config, batch))


def earlier_term(
    config: TRMConfig, batch: TRMBatch, targets: Targets, logits: Tensor, watched: dict[int, Stepped], says: Says
) -> LossTerm:
    """Of what it would have said before, had it stopped; nothing, with a gradient, where one step was drawn."""
    count = num_supervised(config, batch)
    earlier = [watched[batch.num_outer - before] for before in range(1, count)]
    terms = [targets.cross_entropy(says(step.after)) for step in earlier]
    return LossTerm(torch.stack([0 * logits.sum(), *terms]).sum(), "token", 1 / count)


def halting_term(config: TRMConfig, targets: Targets, step: Stepped, refiner: TRMRefiner, says: Says) -> LossTerm:
    """Of what the halting head says of a step."""
    with torch.no_grad():
        is_right = says(step.after).argmax(dim=-1) == targets.ids
    said = halting_logits(refiner, step)
    terms = F.binary_cross_entropy_with_logits(said, is_right.to(said.dtype), reduction="none")
    asked = targets.are_predicted if step.rests is None else targets.are_predicted & ~step.rests
    return LossTerm((terms * asked).sum(), "token", config.halt_weight)
