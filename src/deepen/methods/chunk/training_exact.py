"""A training step of exact mode: slots learn to say what the base will say.

A row is a draft pass as decoding makes it: the anchor, which is the last committed token, and slots behind it. What the
base says at the slots' places once it has read the tokens there is known from the walk that reads the texts. Slot k is
drawn to that with the weight exp(-(k - 1) / distill_gamma), and at each slot the boundary head learns whether the draft
is accepted up to here. Right data is the base's own greedy text: there an accepted slot is one that agrees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from deepen.backbones.anchored import Anchors, Asked, Walk
from deepen.backbones.hf import Backbone
from deepen.core.types import LossTerm, Mean, StepOutput, Unit
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.drafter import ShallowDrafter
from deepen.methods.chunk.losses import binary_cross_entropy, slot_weights, weighted_divergence
from deepen.methods.chunk.passes import Sidecar, run_slots
from deepen.methods.chunk.rows import ChunkBatch, Chunks

LEAST_ANCHOR = 1
"""A pass starts behind at least one token, and the anchor is the pass's own first."""

UNITS: Mapping[str, Unit] = {"distill": "token", "accept": "token"}


def terms(totals: Mapping[str, Tensor], config: RecursiveConfig) -> dict[str, LossTerm]:
    """The losses of a step from their sums."""
    return {name: LossTerm(totals[name], UNITS[name], weight) for name, weight in weights(config).items()}


def weights(config: RecursiveConfig) -> dict[str, float]:
    """Of the losses of a step: the shallow drafter has no boundary head to learn."""
    found = {"distill": config.lambda_distill}
    return found if config.resolved_draft == "shallow" else {**found, "accept": config.lambda_distill}


def exact_step(backbone: Backbone, sidecar: Sidecar, config: RecursiveConfig, batch: ChunkBatch) -> StepOutput:
    """Loss sums over the slots of a batch that has chunks."""
    chunks = batch.chunks()
    walk = _walk(backbone, batch, chunks)
    run = partial(backbone.run_behind, walk.prefix, keep=range(1, chunks.width))
    rows, num_slots = _draft_rows(chunks)
    said = run_slots(backbone, sidecar, run, rows, num_slots)
    targets = chunks.targets[:, 1:].to(said.logits.device)
    ours = said.logits[targets]
    judged = _judged(ours, walk.logits, ours.argmax(dim=-1) == walk.logits.argmax(dim=-1), targets)
    advice = _advice(backbone, sidecar, said.top[:, 1:][targets])
    accept = binary_cross_entropy(advice, judged.accepted[targets], torch.ones_like(advice, dtype=torch.bool))
    return StepOutput(
        losses=terms({"distill": judged.divergence(config.distill_gamma), "accept": accept}, config),
        metrics=judged.metrics(config.chunk_width),
    )


def shallow_step(backbone: Backbone, sidecar: Sidecar, config: RecursiveConfig, batch: ChunkBatch) -> StepOutput:
    """Loss sums of the shallow drafter, which reads each chunk from what the base held at its anchor."""
    assert sidecar.drafter is not None, "a checked configuration has a drafter"
    drafter, chunks = sidecar.drafter, batch.chunks()
    read = _read_kept(drafter, batch, chunks) if config.keep_outputs else _read_anew(backbone, drafter, batch, chunks)
    targets, ids = chunks.targets[:, 1:].to(read.tops.device), chunks.ids.to(read.tops.device)
    state = drafter.start(read.tops)
    states = []
    for place in range(chunks.width - 1):
        state = drafter.step(state, ids[:, place])
        states.append(state)
    ours = drafter.logits(torch.stack(states, dim=1)[targets])
    judged = _judged(ours, read.logits, drafter.ids(ours.argmax(dim=-1)) == read.said, targets)
    return StepOutput(
        losses=terms({"distill": judged.divergence(config.distill_gamma)}, config),
        metrics=judged.metrics(config.chunk_width),
    )


@dataclass(frozen=True)
class _Read:
    """What the base held at the anchors of R chunks, and what it says at the places of n slots.

    tops    `[R, L, D]`, outputs of the layers that the drafter reads
    logits  `[n, N]`, of the tokens that can be drafted
    said    `[n]`, the likeliest id of all
    """

    tops: Tensor
    logits: Tensor
    said: Tensor


def _read_anew(backbone: Backbone, drafter: ShallowDrafter, batch: ChunkBatch, chunks: Chunks) -> _Read:
    walk = _walk(backbone, batch, chunks, read_layers=drafter.read_layers)
    return _Read(walk.tops[chunks.texts, chunks.anchors], drafter.among(walk.logits), walk.logits.argmax(dim=-1))


def _read_kept(drafter: ShallowDrafter, batch: ChunkBatch, chunks: Chunks) -> _Read:
    """From each text by itself, read now or before; what the head says is made anew, once a place."""
    texts = batch.unpadded()
    kept = drafter.kept_outputs
    outputs = [kept.of(ids) for ids in texts]
    starts = torch.tensor([0, *map(len, texts)]).cumsum(dim=0)
    tops, said = torch.cat([each.tops for each in outputs]), torch.cat([each.said for each in outputs])
    asked = places_of_slots(chunks)
    places, of_slot = (starts[asked.texts] + asked.places).unique(return_inverse=True)
    with torch.no_grad():
        logits = kept.logits(tops[places, -1], drafter.rows())
    at_anchors = tops[starts[chunks.texts.cpu()] + chunks.anchors.cpu()]
    read = [kept.layers.index(layer) for layer in drafter.read_layers]
    return _Read(at_anchors[:, read], logits[of_slot], said[places][of_slot])


@dataclass(frozen=True)
class _Judged:
    """What a draft says of its n tokens, beside what the base says of those that can be drafted.

    `targets` `[R, W - 1]` are where they stand. `agrees` and `accepted` are like `targets`: where both choose the same
    token, here, and here and before.
    """

    ours: Tensor
    theirs: Tensor
    targets: Tensor
    agrees: Tensor
    accepted: Tensor

    def divergence(self, gamma: float) -> Tensor:
        """Of all of them, a later one weighing less."""
        weights = slot_weights(self.targets.nonzero()[:, 1] + 1, gamma)
        return weighted_divergence(self.ours, self.theirs, weights)

    def metrics(self, chunk_width: int) -> dict[str, Mean]:
        """Accepted tokens a draft, and the share that agrees at the first, second, fourth ... place."""
        found = {"drafts/accepted": Mean(self.accepted.sum(), self.targets.any(dim=1).sum())}
        for number in _places_told(chunk_width):
            # No draft of these may be as long, and then there is nothing at this place.
            here = slice(number - 1, number)
            found[f"drafts/agreement_{number}"] = Mean(self.agrees[:, here].sum(), self.targets[:, here].sum())
        return found


def _judged(ours: Tensor, theirs: Tensor, is_same: Tensor, targets: Tensor) -> _Judged:
    agrees = torch.zeros_like(targets)
    agrees[targets] = is_same
    return _Judged(ours, theirs, targets, agrees, agrees.long().cumprod(dim=1).bool())


def _walk(backbone: Backbone, batch: ChunkBatch, chunks: Chunks, *, read_layers: Sequence[int] = ()) -> Walk:
    """The texts read once, with what the base says at the slots' places."""
    return backbone.walk(
        batch.input_ids.to(backbone.device),
        batch.lengths.tolist(),
        Anchors(chunks.texts.cpu(), chunks.anchors.cpu()),
        asked=places_of_slots(chunks),
        read_layers=read_layers,
    )


def places_of_slots(chunks: Chunks) -> Asked:
    """Text and place of each slot, in the order of `targets[:, 1:].nonzero()`; slot k says what token k + 1 is."""
    rows, behind = chunks.targets[:, 1:].cpu().nonzero(as_tuple=True)
    return Asked(chunks.texts.cpu()[rows], chunks.anchors.cpu()[rows] + behind + 1)


def _draft_rows(chunks: Chunks) -> tuple[list[list[int]], list[int]]:
    """The anchor and its slots, whose ids nobody reads; there are as many slots as targets."""
    sizes = chunks.sizes.tolist()
    rows = [[given, *[0] * (size - 1)] for given, size in zip(chunks.given.tolist(), sizes, strict=True)]
    return rows, [size - 1 for size in sizes]


def _advice(backbone: Backbone, sidecar: Sidecar, top: Tensor) -> Tensor:
    """`[n]`: the boundary head's logit that the draft is accepted up to each of these slots `[n, D]`."""
    return sidecar.boundary.logits(backbone.final_norm(top)[:, None])[0]


def metric_names(chunk_width: int) -> list[str]:
    """Of the figures that a step gives."""
    return ["drafts/accepted", *(f"drafts/agreement_{number}" for number in _places_told(chunk_width))]


def _places_told(chunk_width: int) -> Sequence[int]:
    return [number for number in (1, 2, 4, 8, 16, 32, 64) if number < chunk_width]
