"""A training step of exact mode: slots learn to say what the base will say.

A row is a draft pass as decoding makes it: the anchor, which is the last committed token, and slots behind it. What the
base says at the slots' places once it has read the tokens there is known from the walk that reads the texts. Slot k is
drawn to that with the weight exp(-(k - 1) / distill_gamma), and at each slot the boundary head learns whether the draft
is accepted up to here. Right data is the base's own greedy text: there an accepted slot is one that agrees.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from deepen.backbones.anchored import Anchors, Walk
from deepen.backbones.hf import Backbone
from deepen.core.types import LossTerm, Mean, StepOutput, Unit
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.losses import binary_cross_entropy, slot_weights, weighted_divergence
from deepen.methods.chunk.passes import Sidecar, run_slots
from deepen.methods.chunk.rows import ChunkBatch, Chunks

LEAST_ANCHOR = 1
"""A pass starts behind at least one token, and the anchor is the pass's own first."""

UNITS: Mapping[str, Unit] = {"distill": "token", "accept": "token"}


def units(config: RecursiveConfig) -> Mapping[str, Unit]:
    """Of the losses of a step: the shallow drafter has no boundary head to learn."""
    return {"distill": "token"} if config.resolved_draft == "shallow" else UNITS


def exact_step(backbone: Backbone, sidecar: Sidecar, config: RecursiveConfig, batch: ChunkBatch) -> StepOutput:
    """Loss sums over the slots of a batch that has chunks."""
    chunks = batch.chunks()
    walk = _walk(backbone, batch, chunks)
    run = partial(backbone.run_behind, walk.prefix, keep=range(1, chunks.width))
    rows, num_slots = _draft_rows(chunks)
    said = run_slots(backbone, sidecar, run, rows, num_slots)
    targets = chunks.targets[:, 1:].to(said.logits.device)
    ours, theirs = said.logits[targets], walk.logits[_place_of_targets(batch, chunks).to(walk.logits.device)]
    numbers = targets.nonzero()[:, 1] + 1
    divergence = weighted_divergence(ours, theirs, slot_weights(numbers, config.distill_gamma))
    agrees = torch.zeros_like(targets)
    agrees[targets] = ours.argmax(dim=-1) == theirs.argmax(dim=-1)
    accepted = agrees.long().cumprod(dim=1).bool()
    advice = _advice(backbone, sidecar, said.top[:, 1:][targets])
    return StepOutput(
        losses={
            "distill": LossTerm(divergence, UNITS["distill"], config.lambda_distill),
            "accept": LossTerm(
                binary_cross_entropy(advice, accepted[targets], torch.ones_like(advice, dtype=torch.bool)),
                UNITS["accept"],
                config.lambda_distill,
            ),
        },
        metrics=_metrics(agrees, accepted, targets, chunk_width=config.chunk_width),
    )


def shallow_step(backbone: Backbone, sidecar: Sidecar, config: RecursiveConfig, batch: ChunkBatch) -> StepOutput:
    """Loss sums of the shallow drafter, which reads each chunk from what the base held at its anchor."""
    assert sidecar.drafter is not None, "a checked configuration has a drafter"
    drafter, chunks = sidecar.drafter, batch.chunks()
    walk = _walk(backbone, batch, chunks, read_layers=drafter.read_layers)
    targets, ids = chunks.targets[:, 1:].to(walk.tops.device), chunks.ids.to(walk.tops.device)
    theirs = walk.logits[_place_of_targets(batch, chunks).to(walk.logits.device)]
    state = drafter.start(walk.tops[chunks.texts, chunks.anchors])
    states = []
    for place in range(chunks.width - 1):
        state = drafter.step(state, ids[:, place])
        states.append(state)
    ours = drafter.logits(torch.stack(states, dim=1)[targets])
    numbers = targets.nonzero()[:, 1] + 1
    weights = slot_weights(numbers, config.distill_gamma)
    divergence = weighted_divergence(ours, theirs[:, : drafter.num_tokens], weights)
    agrees = torch.zeros_like(targets)
    agrees[targets] = ours.argmax(dim=-1) == theirs.argmax(dim=-1)
    accepted = agrees.long().cumprod(dim=1).bool()
    return StepOutput(
        losses={"distill": LossTerm(divergence, "token", config.lambda_distill)},
        metrics=_metrics(agrees, accepted, targets, chunk_width=config.chunk_width),
    )


def _walk(backbone: Backbone, batch: ChunkBatch, chunks: Chunks, *, read_layers: Sequence[int] = ()) -> Walk:
    """The texts read once, with what the base says at the slots' places."""
    return backbone.walk(
        batch.input_ids.to(backbone.device),
        batch.lengths.tolist(),
        Anchors(chunks.texts.cpu(), chunks.anchors.cpu()),
        wanted=_wanted(batch, chunks),
        read_layers=read_layers,
    )


def _wanted(batch: ChunkBatch, chunks: Chunks) -> Tensor:
    """`[B, T]`: the tokens at the slots' places, of any chunk."""
    wanted = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    rows, places = _slot_places(chunks)
    wanted[rows, places] = True
    return wanted


def _slot_places(chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Text and place of each slot, in the order of `targets[:, 1:].nonzero()`; slot k says what token k + 1 is."""
    rows, behind = chunks.targets[:, 1:].cpu().nonzero(as_tuple=True)
    return chunks.texts.cpu()[rows], chunks.anchors.cpu()[rows] + behind + 1


def _place_of_targets(batch: ChunkBatch, chunks: Chunks) -> Tensor:
    """Which of the walk's logits belongs to each slot: several chunks may ask for the same."""
    order = _wanted(batch, chunks).flatten().long().cumsum(0).view(batch.input_ids.shape) - 1
    texts, places = _slot_places(chunks)
    return order[texts, places]


def _draft_rows(chunks: Chunks) -> tuple[list[list[int]], list[int]]:
    """The anchor and its slots, whose ids nobody reads; there are as many slots as targets."""
    sizes = chunks.sizes.tolist()
    rows = [[given, *[0] * (size - 1)] for given, size in zip(chunks.given.tolist(), sizes, strict=True)]
    return rows, [size - 1 for size in sizes]


def _advice(backbone: Backbone, sidecar: Sidecar, top: Tensor) -> Tensor:
    """`[n]`: the boundary head's logit that the draft is accepted up to each of these slots `[n, D]`."""
    return sidecar.boundary.logits(backbone.final_norm(top)[:, None])[0]


def _metrics(agrees: Tensor, accepted: Tensor, targets: Tensor, *, chunk_width: int) -> dict[str, Mean]:
    """Accepted slots a draft, and the share of slots that agree at the first, second, fourth ... place."""
    found = {"drafts/accepted": Mean(accepted.sum(), targets.any(dim=1).sum())}
    for number in _places_told(chunk_width):
        is_there = targets[:, number - 1] if number <= targets.shape[1] else targets[:, :0].sum(dim=1)
        right = agrees[:, number - 1] if number <= targets.shape[1] else targets[:, :0].sum(dim=1)
        found[f"drafts/agreement_{number}"] = Mean(right.sum(), is_there.sum())
    return found


def metric_names(chunk_width: int) -> list[str]:
    """Of the figures that a step gives."""
    return ["drafts/accepted", *(f"drafts/agreement_{number}" for number in _places_told(chunk_width))]


def _places_told(chunk_width: int) -> Sequence[int]:
    return [number for number in (1, 2, 4, 8, 16, 32, 64) if number < chunk_width]
