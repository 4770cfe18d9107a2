"""Refined-mode decoding: a chunk is drafted, refined in up to K passes through the full depth, then committed.

The cache holds every committed token, read by the untouched base, but those of the last commit: one clean pass reads
them when the next chunk begins, and its last logits decide that chunk's first token. Then the rest is drafted, either
token by token ("ar") or by one pass over slots ("mask"), and refined passes let cells change what the passes before
them proposed. Passes but the clean one start from the same prefix and leave nothing behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from deepen.backbones.cache import PrefixCache
from deepen.backbones.hf import Backbone
from deepen.core.method import Sampler
from deepen.core.types import Advance, Prompt, RowAdvance, Spent
from deepen.generate.scoring import log_probs_of
from deepen.generate.verify import Decoding, open_decoding, pad_rows, read
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.passes import RefinedPass, Sidecar, States, run_refined, run_slots
from deepen.methods.chunk.refinement import Chunk


@dataclass
class RefinedDecoding(Decoding):
    """A decoding between two chunks.

    `unread` holds committed tokens that the cache doesn't yet; `tails` what is left of a draft; `next_logits` `[B, V]`
    the clean logits behind the last committed token, once it is read; `states` the refine states handed on.
    """

    unread: list[list[int]] = field(default_factory=list)
    tails: list[tuple[int, ...]] = field(default_factory=list)
    next_logits: Tensor | None = None
    states: States = field(default_factory=dict)

    def commit(self, tokens: Sequence[Sequence[int]]) -> None:
        """Each row gains its tokens, which the next clean pass reads."""
        self.unread = [list(gained) for gained in tokens]
        for row, gained in zip(self.rows, tokens, strict=True):
            row.extend(gained)

    def keep(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order, and all that belongs to them."""
        super().keep(rows)
        self.unread = [self.unread[row] for row in rows]
        self.tails = [self.tails[row] for row in rows]
        self.states = {layer: state[list(rows)] for layer, state in self.states.items()}
        if self.next_logits is not None:
            self.next_logits = self.next_logits[list(rows)]


class PassCounter:
    """Counts passes through `num_layers` layers, and the positions run in them."""

    def __init__(self, num_layers: int) -> None:
        self.total = Spent()
        self._num_layers = num_layers

    def add(self, widths: Sequence[int], *, added_flops: int = 0) -> None:
        """One pass over so many positions of each row, and what the sidecar did in it."""
        positions = sum(widths)
        self.add_passes(Spent(1, positions, positions * self._num_layers, added_flops))

    def add_passes(self, spent: Spent) -> None:
        """Several passes."""
        self.total += spent


class RefinedDecoder:
    """The sidecar's output, chunk by chunk, as `config` says."""

    def __init__(self, backbone: Backbone, config: RecursiveConfig, sidecar: Sidecar) -> None:
        self.backbone = backbone
        self.config = config
        self._sidecar = sidecar

    def open(self, prompt: Prompt) -> RefinedDecoding:
        """Read the prompt."""
        decoding = open_decoding(self.backbone, prompt, scratch=self.scratch)
        return RefinedDecoding(
            **vars(decoding),
            unread=[row[-1:] for row in decoding.rows],
            tails=[()] * len(decoding.rows),
        )

    @property
    def scratch(self) -> int:
        """Positions behind the last token that a pass may need: [Z], and what earlier passes leave there."""
        latent = int(self._sidecar.latent_token is not None)
        if self.config.cache_reset_policy != "keep_all":
            return latent
        return latent + self.config.max_inner_steps * self.config.chunk_width

    @torch.no_grad()
    def advance(self, decoding: RefinedDecoding, sampler: Sampler) -> Advance:
        """One chunk: every row commits 1 to W tokens."""
        spent = PassCounter(self.backbone.num_layers)
        self.read_committed(decoding, spent)
        chunks = self.draft(decoding, sampler, spent)
        states = self.refine(decoding, chunks, sampler, spent)
        self.hand_on(decoding, states)
        return Advance(self._commit(decoding, chunks, spent), spent.total)

    def drop(self, decoding: RefinedDecoding, rows: Sequence[int]) -> None:
        """Forget finished rows."""
        decoding.drop(rows)

    def read_committed(self, decoding: RefinedDecoding, spent: PassCounter) -> None:
        """The clean pass over what the last chunk committed; its last logits decide the next chunk's first token."""
        widths = [len(tokens) for tokens in decoding.unread]
        ids = pad_rows(decoding.unread, self.backbone.device)
        logits = self.backbone.run(ids, decoding.cache, widths=widths, keep="last", whole=True)
        decoding.cache.commit(widths)
        spent.add(widths)
        decoding.next_logits = logits[:, 0]
        decoding.unread = [[] for _ in widths]

    def draft(self, decoding: RefinedDecoding, sampler: Sampler, spent: PassCounter) -> list[Chunk]:
        """A chunk for each row: up to W tokens, up to the row's room, and no further than an end of the text."""
        firsts = [self._choose(decoding, sampler, row, _next_logits(decoding, row), ())[0] for row in _rows(decoding)]
        # What is left of an earlier draft goes on only behind the token that the prefix now decides.
        starts = [
            [first, *(tail[1:] if tail[:1] == (first,) else ())]
            for first, tail in zip(firsts, decoding.tails, strict=True)
        ]
        wanted = [min(self.config.chunk_width, decoding.room(row)) for row in _rows(decoding)]
        starts = [start[:most] for start, most in zip(starts, wanted, strict=True)]
        if self.config.resolved_draft == "mask":
            self._draft_slots(decoding, starts, wanted, spent)
        else:
            self._draft_tokens(decoding, sampler, starts, wanted, spent)
        return [Chunk(tuple(tokens)) for tokens in starts]

    def _draft_tokens(
        self,
        decoding: RefinedDecoding,
        sampler: Sampler,
        drafts: list[list[int]],
        wanted: list[int],
        spent: PassCounter,
    ) -> None:
        """Extend `drafts` token by token with the base's own choices; the prefix comes back as it was."""
        before = decoding.cache.snapshot()
        unread = [list(draft) for draft in drafts]
        while True:
            open_rows = [not self._is_full(draft, most) for draft, most in zip(drafts, wanted, strict=True)]
            if not any(open_rows):
                break
            reading = [tokens if is_open else [] for tokens, is_open in zip(unread, open_rows, strict=True)]
            widths = [len(tokens) for tokens in reading]
            ids = pad_rows(reading, self.backbone.device)
            logits = self.backbone.run(ids, decoding.cache, widths=widths, keep="last", whole=True)
            decoding.cache.commit(widths)
            spent.add(widths)
            logits = logits.cpu()  # one transfer a pass instead of one a row
            for row in _where(open_rows):
                token = self._choose(decoding, sampler, row, logits[row], drafts[row])[0]
                drafts[row].append(token)
                unread[row] = [token]
        decoding.cache.rollback(before)

    def _is_full(self, draft: Sequence[int], most: int) -> bool:
        return len(draft) >= most or draft[-1] in self.backbone.eos_ids

    def _draft_slots(
        self, decoding: RefinedDecoding, drafts: list[list[int]], wanted: list[int], spent: PassCounter
    ) -> None:
        """Extend `drafts` by one pass over slots; what was left of an earlier draft is proposed anew."""
        rows = [[] if most == 1 else [draft[0], *[0] * (most - 2)] for draft, most in zip(drafts, wanted, strict=True)]
        if not any(rows):
            return
        num_slots = [max(0, len(row) - 1) for row in rows]
        run = partial(self.backbone.run, cache=decoding.cache)
        logits = run_slots(self.backbone, self._sidecar, run, rows, num_slots).logits
        widths = [len(row) for row in rows]
        added = self._sidecar.draft_flops(self.backbone.num_layers, widths, num_slots=sum(num_slots))
        spent.add(widths, added_flops=added)
        for row in _where([bool(ids) for ids in rows]):
            best = logits[row, : wanted[row] - 1].argmax(dim=-1).tolist()
            drafts[row][1:] = [int(token) for token in best]

    def refine(self, decoding: RefinedDecoding, chunks: list[Chunk], sampler: Sampler, spent: PassCounter) -> States:
        """Refined passes over the chunks until each is done; gives the states they leave."""
        states, edge = decoding.states, None
        before = decoding.cache.snapshot()
        for step in range(self.config.max_inner_steps):
            tokens = [[] if chunk.done else chunk.tokens for chunk in chunks]
            if not any(tokens):
                break
            run = partial(self.backbone.run, cache=self._cache_of_pass(decoding, spent))
            result = run_refined(self.backbone, self._sidecar, run, tokens, states, edge)
            widths = [len(row) + self._latents(row) for row in tokens]
            added = self._sidecar.refined_flops(self.backbone.num_layers, widths, is_first=step == 0)
            spent.add(widths, added_flops=added)
            states, edge = result.states, result.edge
            for row in _where([bool(ids) for ids in tokens]):
                self.take(decoding, sampler, row, chunks[row], result)
                chunks[row].done = chunks[row].p_commit >= self.config.commit_threshold
            if self.config.cache_reset_policy == "keep_all" and step + 1 < self.config.max_inner_steps:
                decoding.cache.commit([len(row) for row in tokens])
        decoding.cache.rollback(before)
        return states

    def hand_on(self, decoding: RefinedDecoding, states: States) -> None:
        """Leave the next chunk these states, if states are carried."""
        decoding.states = states if self.config.carry_state else {}

    def read_with(self, decoding: RefinedDecoding, chunks: Sequence[Sequence[int]], states: States) -> Tensor:
        """Logits `[B, W, V]` of a refined pass over `chunks`, to score them; [Z], which no token sees, is left out."""
        run = partial(self.backbone.run, cache=decoding.cache)
        return run_refined(self.backbone, replace(self._sidecar, latent_token=None), run, chunks, states, None).logits

    def _latents(self, chunk: Sequence[int]) -> int:
        return int(bool(chunk) and self._sidecar.latent_token is not None)

    def _cache_of_pass(self, decoding: RefinedDecoding, spent: PassCounter) -> PrefixCache:
        """The prefix a refined pass starts from: the one we have, or under `reset_all` one read anew."""
        if self.config.cache_reset_policy != "reset_all":
            return decoding.cache
        fresh = self.backbone.new_cache(batch_size=len(decoding.rows), capacity=decoding.cache.capacity)
        spent.add_passes(read(self.backbone, fresh, decoding.rows))
        return fresh

    def take(self, decoding: RefinedDecoding, sampler: Sampler, row: int, chunk: Chunk, result: RefinedPass) -> None:
        """What one pass says of one row's chunk: edits, and whether and where it ends."""
        logits = result.logits[row, : len(chunk.tokens) - 1]
        chosen = self._choose(decoding, sampler, row, logits, chunk.tokens[:1], chunk.tokens[1:])
        old, new = log_probs_of(logits, [*zip(chunk.tokens[1:], chosen, strict=True)]).exp().T.tolist() or ([], [])
        chunk.edit(chosen, old, new, rate=self.config.corruption_rate)
        chunk.p_commit = float(result.p_commit[row])
        chunk.length = int(result.length[row].argmax())

    def _choose(
        self,
        decoding: RefinedDecoding,
        sampler: Sampler,
        row: int,
        logits: Tensor,
        behind: Sequence[int],
        drafted: Sequence[int] = (),
    ) -> list[int]:
        """The sampler's tokens for `logits` `[n, V]` at the positions after the committed tokens and `behind`."""
        return sampler.choose(row, logits, [*decoding.rows[row], *behind], drafted) if len(logits) else []

    def _commit(self, decoding: RefinedDecoding, chunks: Sequence[Chunk], spent: PassCounter) -> tuple[RowAdvance, ...]:
        pad = getattr(self.backbone.config, "pad_token_id", None)
        counts = [chunk.num_committed(self.config, ends=self.backbone.eos_ids, pad=pad) for chunk in chunks]
        for row in self._vetoed(decoding, chunks, counts, spent):
            chunks[row].restore()
        decoding.commit([chunk.tokens[:count] for chunk, count in zip(chunks, counts, strict=True)])
        decoding.tails = [chunk.tail(count) for chunk, count in zip(chunks, counts, strict=True)]
        return tuple(self._gained(chunk, count) for chunk, count in zip(chunks, counts, strict=True))

    def _gained(self, chunk: Chunk, count: int) -> RowAdvance:
        edits = sum(chunk.edited[:count])
        return RowAdvance(
            tuple(chunk.tokens[:count]),
            drafted=len(chunk.draft),
            accepted=count - edits,
            source=self.config.resolved_draft,
            edits=edits,
            p_commit=chunk.p_commit,
        )

    def _vetoed(
        self, decoding: RefinedDecoding, chunks: Sequence[Chunk], counts: Sequence[int], spent: PassCounter
    ) -> list[int]:
        """Rows whose draft the base finds likelier than what refinement made of it, both as long as the commit."""
        in_doubt = [
            self.config.keep_better and any(chunk.edited[:count]) for chunk, count in zip(chunks, counts, strict=True)
        ]
        if not any(in_doubt):
            return []

        def log_probs(versions: list[Sequence[int]]) -> list[float]:
            compared = zip(versions, counts, in_doubt, strict=True)
            return self._log_probs(
                decoding, [tokens[:count] if doubt else () for tokens, count, doubt in compared], spent
            )

        drafted = log_probs([chunk.draft for chunk in chunks])
        refined = log_probs([chunk.tokens for chunk in chunks])
        return [row for row in _where(in_doubt) if drafted[row] > refined[row]]

    def _log_probs(
        self, decoding: RefinedDecoding, versions: Sequence[Sequence[int]], spent: PassCounter
    ) -> list[float]:
        """The base's log-probability of each row's tokens behind its prefix, by one clean pass that is forgotten."""
        ids = pad_rows(versions, self.backbone.device)
        widths = [len(version) for version in versions]
        logits = self.backbone.run(ids, decoding.cache, widths=widths)
        spent.add(widths)
        totals = []
        for row, version in enumerate(versions):
            behind = torch.cat([_next_logits(decoding, row), logits[row, : max(0, len(version) - 1)]])[: len(version)]
            totals.append(float(log_probs_of(behind, [(token,) for token in version]).sum()))
        return totals


def _next_logits(decoding: RefinedDecoding, row: int) -> Tensor:
    assert decoding.next_logits is not None, "the committed tokens were not read yet"
    return decoding.next_logits[row : row + 1]


def _rows(decoding: RefinedDecoding) -> range:
    return range(len(decoding.rows))


def _where(flags: Sequence[bool]) -> list[int]:
    return [index for index, flag in enumerate(flags) if flag]
