"""Whether a grafted model still says what its base says: token for token, and in what it finds likely."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from deepen.backbones.hf import Backbone
from deepen.cli.output import progress
from deepen.core.errors import CannotScore
from deepen.core.method import Decoder, RecursiveModel
from deepen.core.types import Batch
from deepen.evaluate.agreement import NEAR_TIE_MARGIN, NEAR_TIE_MARGIN_RECURRENT, compare
from deepen.generate.events import Committed
from deepen.generate.loop import stream
from deepen.generate.plain import PlainDecoder
from deepen.generate.scoring import score_at_once
from deepen.generate.stop import StopConfig

# It repeats itself, so that drafts copied from it are accepted in part and rejected in part.
PROMPT = (
    "The lamp is lit. The boat comes in. The lamp is lit again, the boat goes out, and the keeper writes: the lamp is "
    "lit, the boat comes in. The next day the lamp is"
)
NUM_TOKENS = 48

SCORE_TOLERANCE = 1e-6
"""Nats a token, in float32 and above; in a coarser dtype its own rounding step."""

# Logits reach some tens, and it is at that size that a dtype coarser than float32 rounds them.
_LARGEST_LOGIT = 64


@dataclass(frozen=True)
class Verdict:
    """What the comparison found. `agreed` of `num_tokens` greedy tokens are equal before the first that differs.

    `margin` is how nearly the base would have chosen the other token there; None where all are equal, and at most
    `near_tie` where rounding may have decided. `score_difference` is in nats a token over `num_scored` tokens, None
    (with `unscored`, the reason) for a model that can't score.
    """

    num_tokens: int
    agreed: int
    margin: float | None
    near_tie: float
    score_difference: float | None
    num_scored: int
    tolerance: float
    unscored: str = ""

    @property
    def identical(self) -> bool:
        """Whether the tokens are the base's, up to a near-tie, and so are the scores, up to rounding."""
        tokens_fit = self.margin is None or self.margin <= self.near_tie
        return tokens_fit and (self.score_difference is None or abs(self.score_difference) <= self.tolerance)

    def summary(self) -> str:
        """The reason for the verdict."""
        return "; ".join(f"{label}: {what}" for label, what in self.facts().items() if label != "verdict")

    def facts(self) -> dict[str, str]:
        """By label, for people."""
        tokens = f"{self.agreed} of {self.num_tokens} equal"
        if self.margin is not None:
            tied = "a near-tie" if self.margin <= self.near_tie else "no near-tie"
            tokens += f"; then two tokens {self.margin:.2g} apart in their logits, {tied} (at most {self.near_tie:.2g})"
        scores = f"not compared: {self.unscored}"
        if self.score_difference is not None:
            scores = f"{self.score_difference:+.1e} nats a token over {self.num_scored}, allowed {self.tolerance:.0e}"
        verdict = "the grafted model is the base" if self.identical else "the grafted model is NOT the base"
        return {"greedy tokens": tokens, "chunked scores against the base's": scores, "verdict": verdict}


def verify_identity(backbone: Backbone, model: RecursiveModel, tokenizer: Any) -> Verdict:
    """Compare greedy continuations of a built-in prompt, and the scores of prompt and continuation."""
    prompt = [int(token) for token in tokenizer.encode(PROMPT)]
    with progress("verifying", total=2 * NUM_TOKENS) as advance:
        theirs = _continue(PlainDecoder(backbone), prompt, advance)
        ours = _continue(model, prompt, advance)
    agreement = compare(backbone, prompt, ours, theirs)
    difference, unscored = _score_difference(backbone, model, [*prompt, *theirs])
    recurrent = bool(backbone.recurrent_layers)
    step = torch.finfo(backbone.dtype).eps
    return Verdict(
        num_tokens=NUM_TOKENS,
        agreed=NUM_TOKENS if agreement.position is None else agreement.position,
        margin=agreement.margin,
        near_tie=max(NEAR_TIE_MARGIN_RECURRENT if recurrent else NEAR_TIE_MARGIN, _LARGEST_LOGIT * step),
        score_difference=difference,
        num_scored=len(prompt) + NUM_TOKENS - 1,
        tolerance=max(SCORE_TOLERANCE, step),
        unscored=unscored,
    )


def _continue(decoder: Decoder, prompt: Sequence[int], advance: Any) -> list[int]:
    tokens: list[int] = []
    for event in stream(decoder, [prompt], stop=StopConfig(max_new_tokens=NUM_TOKENS)):
        if isinstance(event, Committed):
            tokens += event.tokens
            advance(len(event.tokens))
    return tokens


@torch.no_grad()
def _score_difference(backbone: Backbone, model: RecursiveModel, ids: Sequence[int]) -> tuple[float | None, str]:
    """The model's log-probability per token less the base's own forward's; or None, and why there is none."""
    batch = Batch(torch.tensor([list(ids)]), torch.tensor([len(ids)]))
    try:
        ours = model.score(batch)
    except CannotScore as cause:
        return None, str(cause)
    theirs = score_at_once(backbone, batch)
    both = ours.scored & theirs.scored
    difference = ours.log_probs.double() - theirs.log_probs.double()
    return float(difference[both].mean()), ""
