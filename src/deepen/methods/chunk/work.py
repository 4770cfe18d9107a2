"""The matrix products of a training step, told from its chunks without running it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from deepen.backbones.anchored import WALK_WIDTH, Asked
from deepen.backbones.costs import PassCosts, pass_costs, training_costs
from deepen.backbones.hf import Backbone
from deepen.core.types import Work
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.modules import RefineCell
from deepen.methods.chunk.passes import Sidecar
from deepen.methods.chunk.rows import ChunkBatch, Chunks
from deepen.methods.chunk.training_exact import places_of_slots
from deepen.methods.chunk.training_refined import columns_of


def step_work(backbone: Backbone, sidecar: Sidecar, config: RecursiveConfig, batch: ChunkBatch) -> Work:
    """Of one step over a batch with chunks; none without any.

    A draft is counted to the end of its chunk, though it may end before; soft tokens are not counted. In refined mode
    with LoRA, a gradient is taken to reach the lowest of its layers from below: that counts the gradients of what this
    layer's attention reads, in the passes that begin there, which are not computed.
    """
    if not batch.num_chunks:
        return Work()
    works = _Works(backbone, sidecar, config)
    if config.resolved_draft == "shallow":
        return works.of_shallow_step(batch, batch.chunks())
    if config.commit_mode == "exact":
        return works.of_exact_step(batch, batch.chunks())
    columns = list(columns_of(batch.chunks(), config))
    return sum(
        (works.of_refined_step(batch, chunks, has_states=number > 0) for number, chunks in enumerate(columns)), Work()
    )


@dataclass(frozen=True)
class _Begins:
    """Where gradients begin in a pass: `layer` as in `training_costs`, None for a pass without any."""

    layer: int | None


class _Works:
    """Work of the passes of a step; costs of the base are looked up once."""

    def __init__(self, backbone: Backbone, sidecar: Sidecar, config: RecursiveConfig) -> None:
        self._backbone, self._sidecar, self._config = backbone, sidecar, config
        cells = [(layer, sidecar.cell_of(layer)) for layer in range(backbone.num_layers)]
        self._cells = [(layer, cell) for layer, cell in cells if cell is not None]
        # A layer with LoRA is taken to learn from what the one below gives.
        lowest = min([self._cells[0][0], *(layer - 1 for layer in sidecar.lora_layers)])
        self._lowest_tuned = backbone.num_layers if sidecar.tuned is None else min(sidecar.tuned.layers)
        self._at_first_cell = _Begins(lowest)
        self._at_start = _Begins(-1)
        self._never = _Begins(None)
        self._clean = pass_costs(backbone)

    def _costs(self, begins: _Begins) -> PassCosts:
        if begins.layer is None:
            return self._clean
        return training_costs(self._backbone, begins_after=begins.layer)

    # Exact mode

    def of_exact_step(self, batch: ChunkBatch, chunks: Chunks) -> Work:
        """A walk with the logits of slots' places, and a draft pass."""
        base = self._costs(self._at_start).behind(
            num_rows=len(chunks),
            num_positions=chunks.width,
            num_kept=int(chunks.anchors.max()),
            num_logits=chunks.width - 1,
        )
        cells = sum((self._edits(cell, len(chunks), chunks.width, operands=2) for _, cell in self._cells), Work())
        num_slots = int(chunks.targets.sum())
        walk = self._walk_of_slots(batch, chunks)
        return walk + base + cells + self._lora(num_slots, learns=True) + self._advice(num_slots)

    def of_shallow_step(self, batch: ChunkBatch, chunks: Chunks) -> Work:
        """The same walk, or texts read to be kept, and the drafter's steps over the chunks."""
        drafter = self._sidecar.drafter
        assert drafter is not None, "a checked configuration has a drafter"
        num_rows, num_steps = len(chunks), chunks.width - 1
        # What it starts from gets no gradient, nor do the head's rows.
        fused = num_rows * Work.of(drafter.fuse.weight.numel(), operands=1)
        steps = num_rows * num_steps * Work.of(drafter.inp.weight.numel() + drafter.out.weight.numel(), operands=2)
        said = int(chunks.targets.sum()) * Work.of(drafter.num_tokens * self._backbone.hidden_size, operands=1)
        read = self._read_and_kept(batch, chunks) if self._config.keep_outputs else self._walk_of_slots(batch, chunks)
        return read + fused + steps + said

    def _read_and_kept(self, batch: ChunkBatch, chunks: Chunks) -> Work:
        """Each text by itself, with the logits of every place, and the drafted tokens' again where slots stand.

        It is counted where the text was kept before, too: a count that knew would be another one in a run that was cut
        off and goes on elsewhere.
        """
        drafter = self._sidecar.drafter
        assert drafter is not None, "a checked configuration has a drafter"
        total = Work()
        for length in batch.lengths.tolist():
            for start in range(0, length, WALK_WIDTH):
                width = min(WALK_WIDTH, length - start)
                total += self._clean.over(num_positions=width, context=start, num_logits=width)
        num_places = int(places_of_slots(chunks).mask(*batch.input_ids.shape).sum())
        return total + num_places * Work.of(drafter.num_tokens * self._backbone.hidden_size)

    def _walk_of_slots(self, batch: ChunkBatch, chunks: Chunks) -> Work:
        return self._walk(places_of_slots(chunks).mask(*batch.input_ids.shape), batch.lengths)

    def _lora(self, num_positions: int, *, learns: bool) -> Work:
        lora = self._sidecar.lora
        if lora is None:
            return Work()
        return num_positions * (lora.work_per_position if learns else lora.work_per_position.detached)

    def _advice(self, num_slots: int) -> Work:
        """The boundary head at each slot; the lengths that it names besides are not used."""
        head = self._sidecar.boundary
        unused = head.len_head.weight.numel()
        return num_slots * (Work.of(head.flops_per_row // 2 - unused, operands=2) + Work.of(unused))

    # Refined mode

    def of_refined_step(self, batch: ChunkBatch, chunks: Chunks, *, has_states: bool) -> Work:
        """A walk to the anchors, a draft, K passes over it, K that score, and K over what is corrupted."""
        config, num_passes = self._config, self._config.max_inner_steps
        last = int(chunks.anchors.max()) + 1
        wanted = Asked(chunks.texts, chunks.anchors).mask(len(batch.lengths), last)
        read_and_drafted = self._walk(wanted, batch.lengths.clamp(max=last)) + self._draft(chunks)
        # Where layers are tuned the base as it was drafts, too, to tell how far they have drifted.
        total = read_and_drafted * (1 if self._sidecar.tuned is None else 2)
        first = max(0, num_passes - (config.grad_passes or num_passes))
        begins = self._at_start if self._sidecar.latent_token is not None else self._at_first_cell
        for number in range(num_passes):
            learns = number >= first
            total += self._refined_pass(
                chunks,
                begins if learns else self._never,
                state_learns=learns and (number > first or (has_states and number == 0)),
                edge_learns=learns and number > first,
                is_first=number == 0,
                state_is_used=True,
                decides=True,
                # What the first pass says is only compared with.
                says=number > 0,
            )
            total += self._scoring_pass(chunks, learns=number == num_passes - 1)
        for number in range(num_passes if config.lambda_masked else 0):
            total += self._refined_pass(
                chunks,
                self._at_start,
                state_learns=number > 0,
                edge_learns=number > 0,
                is_first=number == 0,
                state_is_used=number < num_passes - 1,
                decides=False,
                says=True,
            )
        return total

    def _draft(self, chunks: Chunks) -> Work:
        if self._config.resolved_draft == "mask":
            total = self._clean_pass((chunks.anchors + 1).tolist(), width=chunks.width - 1)
            cells = [self._edits(cell, len(chunks), chunks.width - 1, operands=0) for _, cell in self._cells]
            return total + sum(cells, Work()) + self._lora(int((chunks.sizes - 2).clamp(min=0).sum()), learns=False)
        total = Work()
        for place in range(chunks.width - 1):
            contexts = (chunks.anchors + 1 + (chunks.sizes - 1).clamp(max=place)).tolist()
            total += self._clean_pass(contexts, width=1)
        return total

    def _clean_pass(self, contexts: Sequence[int], *, width: int) -> Work:
        """Over so many positions of every row."""
        return sum((self._clean.over(num_positions=width, context=context) for context in contexts), Work())

    def _refined_pass(
        self,
        chunks: Chunks,
        begins: _Begins,
        *,
        state_learns: bool,
        edge_learns: bool,
        is_first: bool,
        state_is_used: bool,
        decides: bool,
        says: bool,
    ) -> Work:
        """One pass over the chunks and [Z], with all that the sidecar does in it.

        Whether a state, or what comes from the top of [Z], brings a gradient from the pass before; whether the state
        that is made, what the boundary head decides and what the base's head says is learned from.
        """
        latent = self._sidecar.latent_token
        num_rows, width = len(chunks), chunks.width + (latent is not None)
        learns = begins.layer is not None
        total = self._base_behind(chunks, begins, width=width, says=says)
        for layer, cell in self._cells:
            h_learns = self._h_learns(layer, begins)
            total += self._edits(cell, num_rows, width, operands=(1 + h_learns) if learns else 0)
            total += num_rows * Work.of(cell.flops_per_row // 2, operands=(1 + state_learns) if learns else 0)
            total += self._next_state(cell, num_rows, learns=learns and state_is_used, state_learns=state_learns)
        head = Work.of(self._sidecar.boundary.flops_per_row // 2, operands=2 if learns and decides else 0)
        total += num_rows * head
        total += self._lora(int(chunks.sizes.sum()), learns=learns)
        if latent is not None and not is_first:
            total += num_rows * Work.of(latent.flops_per_row // 2, operands=(1 + edge_learns) if learns else 0)
        return total

    def _scoring_pass(self, chunks: Chunks, *, learns: bool) -> Work:
        """The given tokens behind the states: gradients begin at the first cell, which reads one."""
        begins = self._at_first_cell if learns else self._never
        num_rows = len(chunks)
        total = self._base_behind(chunks, begins, width=chunks.width, says=True)
        for layer, cell in self._cells:
            h_learns = self._h_learns(layer, begins)
            total += self._edits(cell, num_rows, chunks.width, operands=(1 + h_learns) if learns else 0)
            total += num_rows * Work.of(cell.flops_per_row // 2, operands=2 if learns else 0)
            total += self._next_state(cell, num_rows, learns=False, state_learns=False)
        total += self._lora(int(chunks.sizes.sum()), learns=learns)
        return total + num_rows * Work.of(self._sidecar.boundary.flops_per_row // 2)

    def _h_learns(self, layer: int, begins: _Begins) -> bool:
        """Whether what a layer gives has a gradient before its cell acts."""
        return begins.layer is not None and (layer > begins.layer or layer >= self._lowest_tuned)

    def _base_behind(self, chunks: Chunks, begins: _Begins, *, width: int, says: bool) -> Work:
        costs = self._costs(begins)
        if not says:
            costs = replace(costs, per_logit=costs.per_logit.detached)
        return costs.behind(
            num_rows=len(chunks), num_positions=width, num_kept=int(chunks.anchors.max()) + 1, num_logits=width
        )

    def _edits(self, cell: RefineCell, num_rows: int, width: int, *, operands: int) -> Work:
        """What a cell reads of its hidden states, with so many operands that learn, and what it adds to them."""
        num_read = num_rows * (1 if self._config.pooling == "chunk" else width)
        half = num_read * cell.flops_per_token // 4
        return Work.of(half, operands=operands) + Work.of(half, operands=2 if operands else 0)

    @staticmethod
    def _next_state(cell: RefineCell, num_rows: int, *, learns: bool, state_learns: bool) -> Work:
        reads = num_rows * 3 * cell.d_state * cell.d_model
        keeps = num_rows * 3 * cell.d_state * cell.d_state
        if not learns:
            return Work.of(reads + keeps)
        return Work.of(reads, operands=2) + Work.of(keeps, operands=1 + state_learns)

    def _walk(self, wanted: Tensor, lengths: Tensor) -> Work:
        """Texts `[B, T]` of these lengths read pass by pass, with the logits of every place that any text wants."""
        total = Work()
        for start in range(0, wanted.shape[1], WALK_WIDTH):
            slab = wanted[:, start : start + WALK_WIDTH]
            num_logits = int(slab.any(dim=0).sum())
            for length in lengths.tolist():
                # What is padding of a text that has ended stands behind its last token.
                context = min(start, length)
                total += self._clean.over(num_positions=slab.shape[1], context=context, num_logits=num_logits)
        return total
