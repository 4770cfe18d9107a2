"""Passes with the sidecar on, behind the prefix: over chunks that are refined, or over slots that draft.

Letters: B rows, W positions of the longest chunk, D hidden size, S size of a refine state, V vocabulary, L longest
length the boundary head can name.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from deepen.backbones.gated_lora import GatedLora
from deepen.backbones.hf import Backbone, LayerEdit
from deepen.backbones.tuned_layers import TunedLayers
from deepen.generate.verify import pad_rows
from deepen.methods.chunk.config import Pooling
from deepen.methods.chunk.drafter import ShallowDrafter
from deepen.methods.chunk.modules import BoundaryHead, LatentToken, MaskToken, RefineCell, sanitize

# The refine state `[B, S]` of each refined layer, by its index.
States = Mapping[int, Tensor]


class Pass(Protocol):
    """One pass of the base behind a prefix that it leaves as it is: `Backbone.run` or `Backbone.run_behind`."""

    def __call__(self, tokens: Tensor, *, widths: Sequence[int], edit: LayerEdit) -> Tensor:
        """Logits of embeddings `[B, W, D]`."""


@dataclass(frozen=True)
class Sidecar:
    """What passes need of a sidecar; `cell_of(layer)` is None for a layer without a cell."""

    cell_of: Callable[[int], RefineCell | None]
    boundary: BoundaryHead
    latent_token: LatentToken | None
    mask_token: MaskToken
    pooling: Pooling
    lora: GatedLora | None = None
    tuned: TunedLayers | None = None
    drafter: ShallowDrafter | None = None

    def acting_at(self, positions: Tensor) -> AbstractContextManager[None]:
        """In the block, passes compute with LoRA, if there is one, at these positions `[B, W]`."""
        return nullcontext() if self.lora is None else self.lora.acting_at(positions)

    def draft_flops(self, num_layers: int, widths: Sequence[int], *, num_slots: int) -> int:
        """FLOPs (2 per multiply-add) of cells and LoRA in a pass over so many positions of each row, with these slots.

        Cells compute at every position; what they make of those that are no slots is dropped. LoRA computes at slots.
        """
        return self._flops_of_cells(num_layers, widths) + num_slots * self._lora_flops

    def _flops_of_cells(self, num_layers: int, widths: Sequence[int]) -> int:
        return sum(self._positions_of_a_cell(widths) * cell.flops_per_token for cell in self._cells(num_layers))

    @property
    def lora_layers(self) -> tuple[int, ...]:
        """The layers that have it."""
        return () if self.lora is None else self.lora.layers

    @property
    def _lora_flops(self) -> int:
        return 0 if self.lora is None else self.lora.flops_per_position

    def refined_flops(self, num_layers: int, widths: Sequence[int], *, is_first: bool) -> int:
        """FLOPs of the whole sidecar in a refined pass over so many positions of each row, [Z]'s too; 0 takes no part.

        In the first pass over a chunk nothing leads from the top of [Z] to its bottom.
        """
        num_rows = sum(width > 0 for width in widths)
        per_row = self.boundary.flops_per_row
        per_row += sum(cell.flops_per_row + cell.flops_per_state_update for cell in self._cells(num_layers))
        if self.latent_token is not None and not is_first:
            per_row += self.latent_token.flops_per_row
        num_tokens = sum(widths) - (num_rows if self.latent_token is not None else 0)
        return self._flops_of_cells(num_layers, widths) + num_rows * per_row + num_tokens * self._lora_flops

    def _cells(self, num_layers: int) -> list[RefineCell]:
        """The cell of each refined layer: a shared one as often as it is used."""
        cells = map(self.cell_of, range(num_layers))
        return [cell for cell in cells if cell is not None]

    def _positions_of_a_cell(self, widths: Sequence[int]) -> int:
        """One mean over a whole chunk is one vector to a row."""
        return sum(min(width, 1) if self.pooling == "chunk" else width for width in widths)


@dataclass(frozen=True)
class RefinedPass:
    """What one pass says.

    logits       `[B, W, V]`: entry i of a row decides its chunk's position i + 1
    edge         `[B, D]`, the normed top of the stack at each row's right edge: [Z], or its last token without one
    commit_logit `[B]`, the boundary head's, that the chunk should be committed now; `p_commit` is its probability
    length       `[B, L + 1]`, its log-probabilities of the lengths 0 .. L
    states       the refine states for the next pass

    A row without a chunk keeps its states, and what else it has means nothing.
    """

    logits: Tensor
    edge: Tensor
    commit_logit: Tensor
    length: Tensor
    states: States

    @property
    def p_commit(self) -> Tensor:
        """`[B]`"""
        return self.commit_logit.sigmoid()


@dataclass(frozen=True)
class SlotPass:
    """What a draft pass says: `logits` `[B, W, V]`, and `top` `[B, W, D]`, the last layer's output before its norm."""

    logits: Tensor
    top: Tensor


def run_slots(
    backbone: Backbone, sidecar: Sidecar, run: Pass, rows: Sequence[Sequence[int]], num_slots: Sequence[int]
) -> SlotPass:
    """A pass over `rows` whose last `num_slots[row]` positions are slots; cells act on those.

    Nothing is committed. What isn't a slot is as in a clean pass, bit for bit.
    """
    widths = torch.tensor([len(row) for row in rows], device=backbone.device)
    ids = pad_rows(rows, backbone.device)
    positions = torch.arange(ids.shape[1], device=ids.device)
    firsts = widths - torch.tensor(num_slots, device=ids.device)
    slots = (positions >= firsts[:, None]) & (positions < widths[:, None])
    top: list[Tensor] = []

    def edit(layer: int, h: Tensor) -> Tensor:
        h = refine_slots(sidecar.cell_of(layer), h, slots, sidecar.pooling)
        if layer == backbone.num_layers - 1:
            top.append(h)
        return h

    embeddings = sanitize(sidecar.mask_token(backbone.embedding(ids), slots), slots)
    with sidecar.acting_at(slots):
        logits = run(embeddings, widths=widths.tolist(), edit=edit)
    return SlotPass(logits, top[0])


def refine_slots(cell: RefineCell | None, h: Tensor, slots: Tensor, pooling: Pooling) -> Tensor:
    """A layer's output `[B, W, D]` with its cell, if it has one, acting on `slots` `[B, W]`.

    Everything but the slots comes back bit-equal. A slot that isn't finite becomes zero, at every layer: weighed
    with zero by a masked softmax further up, infinity would still spread as NaN.
    """
    if cell is not None:
        device = cell.out.weight.device
        h = cell.refine(h.to(device), mask=slots.to(device), pooling=pooling).to(h.device)
    return sanitize(h, slots.to(h.device))


def run_refined(
    backbone: Backbone,
    sidecar: Sidecar,
    run: Pass,
    chunks: Sequence[Sequence[int]],
    states: States,
    edge: Tensor | None,
) -> RefinedPass:
    """Run a pass over `chunks` (an empty one takes no part), from the states and right edges of the pass before.

    `states` lacks a layer, and `edge` is None, before the first pass. Nothing is committed.
    """
    lengths = torch.tensor([len(chunk) for chunk in chunks], device=backbone.device)
    embeddings = backbone.embedding(pad_rows(chunks, backbone.device))
    return run_refined_embeddings(backbone, sidecar, run, embeddings, lengths, states, edge)


def run_refined_embeddings(
    backbone: Backbone,
    sidecar: Sidecar,
    run: Pass,
    embeddings: Tensor,
    lengths: Tensor,
    states: States,
    edge: Tensor | None,
) -> RefinedPass:
    """As `run_refined`, over embeddings `[B, W, D]` of which each row has its length."""
    widths = lengths
    if sidecar.latent_token is not None:
        latent = sidecar.latent_token.embed(len(lengths), base_embedding_weight=backbone.embedding_weight, top=edge)
        embeddings = _with_latent(embeddings, lengths, latent)
        widths = torch.where(lengths > 0, lengths + 1, 0)
    positions = torch.arange(embeddings.shape[1], device=backbone.device)
    moved: dict[int, Tensor] = {}
    top: list[Tensor] = []

    def edit(layer: int, h: Tensor) -> Tensor:
        cell = sidecar.cell_of(layer)
        if cell is not None:
            h, moved[layer] = _refine(cell, h, states.get(layer), positions < lengths[:, None], widths, sidecar.pooling)
        if layer == backbone.num_layers - 1:
            top.append(h)
        return h

    with sidecar.acting_at(positions < lengths[:, None]):
        logits = run(embeddings, widths=widths.tolist(), edit=edit)
    last = (widths - 1).clamp(min=0).to(top[0].device)
    at_edge = top[0][torch.arange(len(lengths), device=last.device), last]
    right_edge = backbone.final_norm(at_edge[:, None])
    commit_logit, length_logits = sidecar.boundary.logits(right_edge)
    return RefinedPass(logits, right_edge[:, 0], commit_logit, length_logits.log_softmax(dim=-1), moved)


def _with_latent(embeddings: Tensor, lengths: Tensor, latent: Tensor) -> Tensor:
    """`[B, W + 1, D]`: [Z] `[B, 1, D]` stands behind the last token of each row."""
    is_latent = torch.arange(embeddings.shape[1] + 1, device=embeddings.device) == lengths[:, None]
    return torch.where(is_latent[..., None], latent, F.pad(embeddings, (0, 0, 0, 1)))


def _refine(
    cell: RefineCell, h: Tensor, state: Tensor | None, in_chunk: Tensor, widths: Tensor, pooling: Pooling
) -> tuple[Tensor, Tensor]:
    """Layer output `[B, W, D]` refined where `in_chunk`, and the next state, which reads [Z] too; on h's device."""
    device = cell.out.weight.device
    here = h.to(device)
    state = cell.initial_state(here) if state is None else state
    refined = cell.refine(here, state, in_chunk.to(device), pooling)
    read = torch.arange(h.shape[1], device=device) < widths.to(device)[:, None]
    return refined.to(h.device), cell.next_state(refined, state, read)
