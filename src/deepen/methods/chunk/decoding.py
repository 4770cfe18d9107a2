"""Exact-mode decoding: drafts from the chosen source, committed only where the base agrees.

Two kinds of pass alternate in each row. A draft pass (source "mask") reads the last committed token and empty slots
behind it, with cells acting at the slots alone: the clean position commits the base's next token, the slots propose
those after it. A verify pass reads that token and the proposals with the sidecar off. Copied drafts (source "lookup")
and what a verify pass predicted behind a rejected token (source "jacobi") need no draft pass, nor do those of a drafter
(source "shallow"), which reads what layers held at the last token that was read. Source "auto" chooses between plain
decoding, copies, and what the sidecar proposes (its drafter, if that has learned anything, else slots), row by row and
pass by pass, by what each was measured to bring and to cost. Rows alternate on their own, so one pass may draft in one
row and verify in another.

Slots don't ride on verify passes: behind a draft they are of use only where all of it is accepted, and they cost their
width every time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Self

import torch
from torch import Tensor

from deepen.backbones.hf import Backbone, LayerOutputs
from deepen.core.method import Sampler
from deepen.core.types import Advance, Prompt, RowAdvance, Spent
from deepen.generate.drafts import NO_DRAFT, Draft, JacobiDraft, LookupDraft
from deepen.generate.policy import Choice, DraftPolicy, Offer
from deepen.generate.verify import Decoding, feed, judge, open_decoding, read, run_drafts, spent_on, verify
from deepen.methods.chunk.drafter import GoesOn, ShallowDrafter
from deepen.methods.chunk.passes import Sidecar, run_slots


@dataclass
class ChunkDecoding(Decoding):
    """A decoding with what its drafts need, of each row and of all.

    lookups  indices of the rows' texts, to copy from
    guesses  what the last pass predicted behind what it committed
    pending  what slots proposed, as far as nothing committed since differs from it; `NO_DRAFT` where there is nothing
    tops     `[L, D]` each, what the layers that the drafter reads gave at the last token read; None before a first pass
    policy   measurements; of the rows that come, none are taken over
    """

    lookups: list[LookupDraft] = field(default_factory=list)
    guesses: list[JacobiDraft] = field(default_factory=list)
    pending: list[Draft] = field(default_factory=list)
    tops: list[Tensor | None] = field(default_factory=list)
    policy: DraftPolicy = field(default_factory=DraftPolicy)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, and their drafts."""
        super().keep(rows)
        self.lookups = [self.lookups[row] for row in rows]
        self.guesses = [self.guesses[row] for row in rows]
        self.pending = [self.pending[row] for row in rows]
        self.tops = [self.tops[row] for row in rows]

    def join(self, other: Self, *, most_rows: int) -> None:
        """Take the rows of `other` in, and their drafts."""
        super().join(other, most_rows=most_rows)
        self.lookups = [*self.lookups, *other.lookups]
        self.guesses = [*self.guesses, *other.guesses]
        self.pending = [*self.pending, *other.pending]
        self.tops = [*self.tops, *other.tops]


class ExactDecoder:
    """The base's own output from as few passes as its drafts allow. `draft` is a source; W is `chunk_width`."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        draft: str,
        chunk_width: int,
        sidecar: Sidecar | None,
        reset_all: bool = False,
    ) -> None:
        """`sidecar` may be None where it never drafts: draft "ar". `reset_all` reads the prefix anew for each pass."""
        advances = {
            "ar": self._plain,
            "lookup": self._copy,
            "jacobi": self._guess,
            "mask": self._alternate,
            "shallow": self._read_ahead,
            "auto": self._do_what_pays,
        }
        self._advance = advances[draft]
        self._backbone = backbone
        self._chunk_width = chunk_width
        self._sidecar = sidecar
        self._reset_all = reset_all
        self._reads_ahead = reads_ahead(draft, sidecar.drafter if sidecar is not None else None)

    def open(self, prompt: Prompt) -> ChunkDecoding:
        """Read the prompt."""
        opened = open_decoding(self._backbone, prompt)
        return ChunkDecoding(
            **vars(opened),
            lookups=[LookupDraft() for _ in opened.rows],
            guesses=[JacobiDraft() for _ in opened.rows],
            pending=[NO_DRAFT for _ in opened.rows],
            tops=[None for _ in opened.rows],
        )

    @torch.no_grad()
    def advance(self, decoding: ChunkDecoding, sampler: Sampler) -> Advance:
        """One pass; every row commits at least one token and at most W."""
        if not self._reset_all:
            return self._advance(decoding, sampler)
        fresh = self._backbone.new_cache(batch_size=len(decoding.rows), capacity=decoding.cache.capacity)
        reading = read(self._backbone, fresh, [row[:-1] for row in decoding.rows])
        decoding.cache = fresh
        advance = self._advance(decoding, sampler)
        return Advance(advance.rows, advance.spent + reading)

    def drop(self, decoding: ChunkDecoding, rows: Sequence[int]) -> None:
        """Forget finished rows."""
        decoding.drop(rows)

    def feed(self, decoding: ChunkDecoding, ids: Sequence[int]) -> Spent:
        """Read more of the prompt of a decoding of one row."""
        return feed(self._backbone, decoding, ids)

    def join(self, decoding: ChunkDecoding, other: ChunkDecoding, *, most_rows: int) -> None:
        """Take the rows of `other` in."""
        decoding.join(other, most_rows=most_rows)

    def keep(self, decoding: ChunkDecoding, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        decoding.keep(rows)

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

    def _guess(self, decoding: ChunkDecoding, sampler: Sampler) -> Advance:
        drafts = [
            guess.propose(ids, self._most(decoding, row))
            for row, (guess, ids) in enumerate(zip(decoding.guesses, decoding.rows, strict=True))
        ]
        logits = run_drafts(self._backbone, decoding, drafts)
        gained = judge(decoding, drafts, logits, sampler)
        for row, guess in enumerate(decoding.guesses):
            behind = logits[row, len(gained[row].tokens) : 1 + len(drafts[row].tokens)]
            guess.keep(behind.argmax(dim=-1).tolist())
        return Advance(gained, spent_on(self._backbone, drafts))

    def _read_ahead(self, decoding: ChunkDecoding, sampler: Sampler) -> Advance:
        """Verify as much as the drafter can propose."""
        drafts, drafting = self._ask(decoding, self._most_drafted(decoding))
        advance = self._do([Choice(draft) for draft in drafts], decoding, sampler)
        return Advance(advance.rows, advance.spent + drafting)

    def _ask(
        self,
        decoding: ChunkDecoding,
        most: Sequence[int],
        goes_on: GoesOn | None = None,
    ) -> tuple[list[Draft], Spent]:
        """What the drafter proposes for rows that want any, so many tokens at most."""
        drafts = [NO_DRAFT] * len(most)
        asked = {row: top for row, top in enumerate(decoding.tops) if most[row] and top is not None}
        if not asked:
            return drafts, Spent()
        drafter, tops = self._drafter, torch.stack(list(asked.values()))
        ids = torch.tensor([decoding.rows[row][-1] for row in asked], device=tops.device)
        found = drafter.draft(tops, ids, max(most), goes_on=goes_on)
        for row, draft in zip(asked, found, strict=True):
            drafts[row] = draft.shortened(most[row])
        num_drafted = len(found[0].tokens)
        flops = len(asked) * (drafter.flops_per_start + num_drafted * drafter.flops_per_token)
        return drafts, Spent(added_flops=flops)

    @property
    def _drafter(self) -> ShallowDrafter:
        assert self._sidecar is not None and self._sidecar.drafter is not None, "a checked configuration has a drafter"
        return self._sidecar.drafter

    def _alternate(self, decoding: ChunkDecoding, sampler: Sampler) -> Advance:
        choices = [
            Choice(draft=pending) if pending.tokens else Choice(num_slots=self._most_slots(decoding, row))
            for row, pending in enumerate(decoding.pending)
        ]
        return self._do(choices, decoding, sampler)

    def _do_what_pays(self, decoding: ChunkDecoding, sampler: Sampler) -> Advance:
        policy, copies = decoding.policy, self._copies(decoding)
        drafted, drafting = self._drafted_if_it_pays(decoding, copies)
        offers = [
            Offer(
                copies[row],
                pending.shortened(self._most(decoding, row)),
                0 if self._reads_ahead else self._most_slots(decoding, row),
                drafted[row],
            )
            for row, pending in enumerate(decoding.pending)
        ]
        choices = policy.choose(offers)
        began = perf_counter()
        advance = self._do(choices, decoding, sampler)
        policy.observe(offers, choices, advance.rows, perf_counter() - began)
        return Advance(advance.rows, advance.spent + drafting)

    def _drafted_if_it_pays(self, decoding: ChunkDecoding, copies: Sequence[Draft]) -> tuple[list[Draft], Spent]:
        policy, nothing = decoding.policy, [NO_DRAFT] * len(copies)
        room = self._most_drafted(decoding)
        if not self._reads_ahead or not any(room):
            return nothing, Spent()
        most = policy.ask(copies, room)
        if not any(most):
            return nothing, Spent()
        began = perf_counter()
        drafts, spent = self._ask(decoding, most, policy.goes_on)
        policy.drafted(drafts, perf_counter() - began)
        return drafts, spent

    def _most_drafted(self, decoding: ChunkDecoding) -> list[int]:
        # The drafter starts from what a pass has left, so a row's first pass is without it.
        return [0 if top is None else self._most(decoding, row) for row, top in enumerate(decoding.tops)]

    def _most_slots(self, decoding: ChunkDecoding, row: int) -> int:
        # A pass with slots commits one token, so the verify pass behind it has room for one fewer.
        return max(0, min(self._chunk_width, decoding.room(row) - 1) - 1)

    def _do(self, choices: Sequence[Choice], decoding: ChunkDecoding, sampler: Sampler) -> Advance:
        """One pass that verifies a draft in some rows and fills slots in others."""
        num_slots = [choice.num_slots for choice in choices]
        drafts = [choice.draft for choice in choices]
        read = [_empty(slots) if slots else draft for slots, draft in zip(num_slots, drafts, strict=True)]
        outputs = LayerOutputs(self._drafter.read_layers if self._reads_ahead else ())
        logits = self._run(decoding, read, num_slots, outputs)
        gained = judge(decoding, drafts, logits, sampler)
        if self._reads_ahead:
            decoding.tops = list(_at_last_read(outputs.stacked(), gained))
        decoding.pending = [
            _proposed(logits[row, 1 : 1 + slots]) if slots else pending.behind(gained[row].tokens)
            for row, (slots, pending) in enumerate(zip(num_slots, decoding.pending, strict=True))
        ]
        spent = spent_on(self._backbone, read)
        if any(num_slots):
            spent += self._spent_in_sidecar([1 + len(draft.tokens) for draft in read], num_slots=sum(num_slots))
        return Advance(gained, spent)

    def _spent_in_sidecar(self, widths: Sequence[int], *, num_slots: int) -> Spent:
        assert self._sidecar is not None, "slots are drafted by an enabled sidecar only"
        flops = self._sidecar.draft_flops(self._backbone.num_layers, widths, num_slots=num_slots)
        return Spent(added_flops=flops)

    def _run(
        self, decoding: ChunkDecoding, read: Sequence[Draft], num_slots: Sequence[int], outputs: LayerOutputs
    ) -> Tensor:
        if not any(num_slots):
            return run_drafts(self._backbone, decoding, read, edit=outputs.read if self._reads_ahead else None)
        assert self._sidecar is not None, "slots are drafted by an enabled sidecar only"
        # A row with slots holds one clean token and nothing else.
        inputs = [[ids[-1], *draft.tokens] for ids, draft in zip(decoding.rows, read, strict=True)]
        run = partial(self._backbone.run, cache=decoding.cache)
        return run_slots(self._backbone, self._sidecar, run, inputs, num_slots).logits


def reads_ahead(draft: str, drafter: ShallowDrafter | None) -> bool:
    """Whether the drafter is asked: where there is a choice, not one that has learned nothing."""
    return drafter is not None and (draft == "shallow" or (draft == "auto" and drafter.has_learned))


def _empty(num_slots: int) -> Draft:
    """Holds the place of slots, whose ids nobody reads."""
    return Draft((0,) * num_slots, source="mask", evidence=0)


def _at_last_read(outputs: Tensor, gained: Sequence[RowAdvance]) -> Tensor:
    """`[B, L, D]` of `[B, W, L, D]`: the base's own token at the end of what was gained was not read yet."""
    last = torch.tensor([len(row.tokens) - 1 for row in gained], device=outputs.device)
    return outputs[torch.arange(len(gained), device=last.device), last]


def _proposed(logits: Tensor) -> Draft:
    """What slots with these logits `[W, V]` propose."""
    return Draft(tuple(logits.argmax(dim=-1).tolist()), source="mask", evidence=0)
