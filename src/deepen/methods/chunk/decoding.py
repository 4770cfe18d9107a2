"""Exact-mode decoding: drafts from the chosen source, committed only where the base agrees.

Two kinds of pass alternate in each row. A draft pass (source "mask") reads the last committed token and empty slots
behind it, with cells acting at the slots alone: the clean position commits the base's next token, the slots propose
those after it. A verify pass reads that token and the proposals with the sidecar off. Copied drafts (source "lookup")
need no draft pass. Rows alternate on their own, so one pass may draft in one row and verify in another.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from deepen.backbones.hf import Backbone
from deepen.core.errors import ConfigError
from deepen.core.method import Sampler
from deepen.core.types import Advance, Prompt, Spent
from deepen.generate.drafts import NO_DRAFT, Draft, LookupDraft
from deepen.generate.policy import WidthPolicy
from deepen.generate.verify import Decoding, judge, open_decoding, pad_rows, verify

# Gives hidden states [B, W, D] of layer `index` with the slots [B, W] refined, everything else bit-equal.
RefineSlots = Callable[[int, Tensor, Tensor], Tensor]
# Gives embeddings [B, W, D] with those at the slots replaced.
EmbedSlots = Callable[[Tensor, Tensor], Tensor]


@dataclass
class ChunkDecoding(Decoding):
    """A decoding with what its drafts need: an index of each row's text, proposals not yet verified, measurements."""

    lookups: list[LookupDraft] = field(default_factory=list)
    pending: list[Draft | None] = field(default_factory=list)
    policy: WidthPolicy = field(default_factory=WidthPolicy)

    def drop(self, rows: Sequence[int]) -> None:
        """Forget these rows and their drafts."""
        kept = [row for row in range(len(self.rows)) if row not in set(rows)]
        super().drop(rows)
        self.lookups = [self.lookups[row] for row in kept]
        self.pending = [self.pending[row] for row in kept]


class ExactDecoder:
    """The base's own output from as few passes as its drafts allow. `draft` is a source; W is `chunk_width`."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        draft: str,
        chunk_width: int,
        refine_slots: RefineSlots,
        embed_slots: EmbedSlots,
    ) -> None:
        advances = {
            "ar": self._plain,
            "lookup": self._copy,
            "auto": self._copy_if_it_pays,
            "mask": self._alternate,
        }
        if draft not in advances:
            raise ConfigError(f"draft {draft!r} can't be used in exact mode yet; choose one of {', '.join(advances)}")
        self._advance = advances[draft]
        self._backbone = backbone
        self._chunk_width = chunk_width
        self._refine_slots = refine_slots
        self._embed_slots = embed_slots

    def open(self, prompt: Prompt) -> ChunkDecoding:
        """Read the prompt."""
        opened = open_decoding(self._backbone, prompt)
        return ChunkDecoding(
            **vars(opened), lookups=[LookupDraft() for _ in opened.rows], pending=[None] * len(opened.rows)
        )

    def advance(self, decoding: ChunkDecoding, sampler: Sampler) -> Advance:
        """One pass; every row commits at least one token and at most W."""
        return self._advance(decoding, sampler)

    def drop(self, decoding: ChunkDecoding, rows: Sequence[int]) -> None:
        """Forget finished rows."""
        decoding.drop(rows)

    def _most(self, decoding: ChunkDecoding, row: int) -> int:
        # A draft as long as the room would leave none for the base's own token behind it.
        return max(0, min(self._chunk_width, decoding.room(row)) - 1)

    def _plain(self, decoding: ChunkDecoding, sampler: Sampler) -> Advance:
        return verify(self._backbone, decoding, [NO_DRAFT] * len(decoding.rows), sampler)

    def _copy(self, decoding: ChunkDecoding, sampler: Sampler) -> Advance:
        return verify(self._backbone, decoding, self._copies(decoding), sampler)

    def _copies(self, decoding: ChunkDecoding) -> list[Draft]:
        return [
            lookup.propose(ids, self._most(decoding, row))
            for row, (lookup, ids) in enumerate(zip(decoding.lookups, decoding.rows, strict=True))
        ]

    def _copy_if_it_pays(self, decoding: ChunkDecoding, sampler: Sampler) -> Advance:
        if decoding.cache.recurrent_layers:
            # A rejected draft would have to be taken back out of a state, so none can pay.
            return self._plain(decoding, sampler)
        policy, copies = decoding.policy, self._copies(decoding)
        drafts = [_shortened(copy, policy.length(copy.evidence, len(copy.tokens))) for copy in copies]
        began = perf_counter()
        advance = verify(self._backbone, decoding, drafts, sampler)
        policy.observe(copies, advance.rows, perf_counter() - began)
        return advance

    def _alternate(self, decoding: ChunkDecoding, sampler: Sampler) -> Advance:
        drafts = [pending or NO_DRAFT for pending in decoding.pending]
        num_slots = [
            0 if pending is not None else self._most(decoding, row) for row, pending in enumerate(decoding.pending)
        ]
        inputs = [
            [ids[-1], *draft.tokens, *[0] * slots]
            for ids, draft, slots in zip(decoding.rows, drafts, num_slots, strict=True)
        ]
        widths = [len(row) for row in inputs]
        with torch.no_grad():
            logits = self._run_with_slots(decoding, inputs, widths, num_slots)
        decoding.pending = self._proposals(decoding, logits, num_slots)
        return Advance(judge(decoding, drafts, logits, sampler), Spent(1, sum(widths)))

    def _run_with_slots(
        self, decoding: ChunkDecoding, inputs: list[list[int]], widths: list[int], num_slots: list[int]
    ) -> Tensor:
        ids = pad_rows(inputs, self._backbone.device)
        if not any(num_slots):
            return self._backbone.run(ids, decoding.cache, widths=widths)
        # A row with slots holds one clean token and nothing else, so its slots are all positions from 1 on.
        ends = torch.tensor([1 + slots if slots else 1 for slots in num_slots], device=ids.device)
        positions = torch.arange(ids.shape[1], device=ids.device)
        slots = (positions >= 1) & (positions < ends[:, None])
        embeddings = self._embed_slots(self._backbone.embedding(ids), slots)
        return self._backbone.run(
            embeddings, decoding.cache, widths=widths, edit=lambda index, h: self._refine_slots(index, h, slots)
        )

    def _proposals(self, decoding: ChunkDecoding, logits: Tensor, num_slots: list[int]) -> list[Draft | None]:
        proposals: list[Draft | None] = []
        for row, slots in enumerate(num_slots):
            # One token is committed from this pass, so the verify pass behind it has room for one fewer.
            length = min(slots, max(0, decoding.room(row) - 2))
            best = logits[row, 1 : 1 + length].argmax(dim=-1).tolist()
            proposals.append(Draft(tuple(best), source="mask", evidence=0) if best else None)
        return proposals


def _shortened(draft: Draft, length: int) -> Draft:
    return Draft(draft.tokens[:length], draft.source, draft.evidence) if length else NO_DRAFT
