"""One decoding and its one kind of step: a pass that checks a draft and commits what the base agrees with.

A decoding holds the committed ids of each row; its cache holds all of them but the last, which the next pass reads
first. That pass also reads a draft behind it, so its logits say what the base emits after the last committed token
and after every drafted one. The longest prefix of the draft that equals what the base emits is committed, plus the
base's next token. An empty draft makes this plain decoding: there is no other plain loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from deepen.backbones.cache import PrefixCache
from deepen.backbones.hf import Backbone, LayerEdit
from deepen.core.errors import PromptError, RollbackError
from deepen.core.method import Sampler
from deepen.core.types import Advance, Prompt, RowAdvance, Spent
from deepen.generate.drafts import Draft

# Positions of a prompt read in one pass: wide enough to be compute-bound, narrow enough to keep masks small.
PREFILL_WIDTH = 256


@dataclass
class Decoding:
    """Rows being continued; `rows` holds committed ids, `limits` the number of ids each row may grow to."""

    cache: PrefixCache
    rows: list[list[int]]
    limits: list[int]
    prefill: Spent = field(default_factory=Spent)

    def room(self, row: int) -> int:
        """Tokens that `row` may still gain."""
        return self.limits[row] - len(self.rows[row])

    def drop(self, rows: Sequence[int]) -> None:
        """Forget these rows; the others keep their order."""
        gone = set(rows)
        self.keep([row for row in range(len(self.rows)) if row not in gone])

    def keep(self, rows: Sequence[int]) -> None:
        """Keep the rows with these indices, in this order, and forget the others."""
        self.cache.keep_rows(rows)
        self.rows = [self.rows[row] for row in rows]
        self.limits = [self.limits[row] for row in rows]

    def join(self, other: Self, *, most_rows: int) -> None:
        """Take the rows of `other`, which is used up, in behind those there are; see `PrefixCache.join`."""
        self.cache.join(other.cache, most_rows=most_rows)
        self.rows = [*self.rows, *other.rows]
        self.limits = [*self.limits, *other.limits]
        self.prefill += other.prefill


def open_decoding(backbone: Backbone, prompt: Prompt, *, scratch: int = 0) -> Decoding:
    """Read every row but its last token into a new cache with room for `prompt.max_new_tokens` more, or as its capacity
    says.

    Passes may go `scratch` positions further than the last token.

    Raises `PromptError` for an empty row, an id outside the vocabulary, or more tokens than the context or the capacity
    holds.
    """
    check_prompt(backbone, prompt)
    rows = [list(row) for row in prompt.rows]
    capacity = prompt.capacity if prompt.capacity is not None else max(map(len, rows)) + prompt.max_new_tokens
    cache = backbone.new_cache(batch_size=len(rows), capacity=capacity + scratch)
    decoding = Decoding(cache, rows, [len(row) + prompt.max_new_tokens for row in rows])
    decoding.prefill = read(backbone, cache, [row[:-1] for row in rows])
    return decoding


def feed(backbone: Backbone, decoding: Decoding, ids: Sequence[int]) -> Spent:
    """Read more of the prompt of a decoding of one row that hasn't advanced, as if `open_decoding` had read all of it.

    Raises `PromptError` for an id outside the vocabulary, or more tokens than there is room for beside the new ones.
    """
    if len(decoding.rows) != 1:
        raise RollbackError(f"a prompt is read on alone: this decoding has {len(decoding.rows)} rows; feed, then join")
    ids = list(ids)
    _check_ids(backbone, 0, ids)
    limit, capacity = decoding.limits[0] + len(ids), decoding.cache.capacity
    if limit > capacity:
        raise PromptError(
            f"with {len(ids)} tokens more the prompt and its new ones are {limit}, but the decoding was opened with a "
            f"capacity of {capacity}: raise capacity or lower max_new_tokens"
        )
    row = decoding.rows[0]
    spent = read(backbone, decoding.cache, [[*row, *ids][len(row) - 1 : -1]])
    row.extend(ids)
    decoding.limits = [limit]
    decoding.prefill += spent
    return spent


def read(backbone: Backbone, cache: PrefixCache, rows: Sequence[Sequence[int]]) -> Spent:
    """Commit `rows` to the cache as they are, in passes of at most PREFILL_WIDTH positions."""
    passes = 0
    for start in range(0, max(map(len, rows)), PREFILL_WIDTH):
        slabs = [list(row[start : start + PREFILL_WIDTH]) for row in rows]
        widths = [len(slab) for slab in slabs]
        with torch.no_grad():
            backbone.run(pad_rows(slabs, backbone.device), cache, widths=widths, keep="last", whole=True)
        cache.commit(widths)
        passes += 1
    positions = sum(map(len, rows))
    return Spent(passes, positions, positions * backbone.num_layers)


def verify(backbone: Backbone, decoding: Decoding, drafts: Sequence[Draft], sampler: Sampler) -> Advance:
    """Check `drafts[row]` behind each row's last token; every row commits at least one token, the base's own."""
    logits = run_drafts(backbone, decoding, drafts)
    return Advance(judge(decoding, drafts, logits, sampler), spent_on(backbone, drafts))


@torch.no_grad()
def run_drafts(
    backbone: Backbone, decoding: Decoding, drafts: Sequence[Draft], *, edit: LayerEdit | None = None
) -> Tensor:
    """Logits `[B, W, V]` of one pass over each row's last token and its draft; W is the longest draft's length + 1.

    Entry i of a row is about the token behind its draft's first i. Nothing is committed: that is for `judge`.
    """
    inputs = [[row[-1], *draft.tokens] for row, draft in zip(decoding.rows, drafts, strict=True)]
    ids = pad_rows(inputs, backbone.device)
    return backbone.run(ids, decoding.cache, widths=[len(row) for row in inputs], edit=edit)


def spent_on(backbone: Backbone, drafts: Sequence[Draft]) -> Spent:
    """What one pass over each row's last token and its draft costs."""
    positions = sum(1 + len(draft.tokens) for draft in drafts)
    return Spent(1, positions, positions * backbone.num_layers)


def judge(decoding: Decoding, drafts: Sequence[Draft], logits: Tensor, sampler: Sampler) -> tuple[RowAdvance, ...]:
    """Commit, from a pass over each row's last token and its draft, what the base's logits `[B, W, V]` agree with.

    Logits behind a row's draft are not looked at, so a pass may go on to other positions there.
    """
    advances = []
    logits = logits.cpu()  # one transfer a pass instead of one a row
    for row, draft in enumerate(drafts):
        emitted = sampler.choose(row, logits[row, : 1 + len(draft.tokens)], decoding.rows[row], draft.tokens)
        accepted = agreement(draft.tokens, emitted)
        tokens = tuple(emitted[: accepted + 1])
        advances.append(RowAdvance(tokens, drafted=len(draft.tokens), accepted=accepted, source=draft.source))
    decoding.cache.commit([len(advance.tokens) for advance in advances])
    for ids, advance in zip(decoding.rows, advances, strict=True):
        ids.extend(advance.tokens)
    return tuple(advances)


def agreement(draft: Sequence[int], emitted: Sequence[int]) -> int:
    """How many leading tokens of `draft` are what was emitted in their place."""
    for count, (proposed, token) in enumerate(zip(draft, emitted, strict=False)):
        if proposed != token:
            return count
    return len(draft)


def pad_rows(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """`[B, W]` ids, right-padded with id 0: positions behind a row's width are neither stored nor read."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def check_prompt(backbone: Backbone, prompt: Prompt) -> None:
    if not prompt.rows:
        raise PromptError("no prompt: give at least one row of token ids")
    if prompt.max_new_tokens < 0:
        raise PromptError(f"max_new_tokens is {prompt.max_new_tokens}; it must be 0 or more")
    context = backbone.context_length
    if context is not None and prompt.capacity is not None and prompt.capacity > context:
        raise PromptError(
            f"capacity is {prompt.capacity}, but this model's context is {context}; lower capacity to that"
        )
    for index, row in enumerate(prompt.rows):
        if not row:
            raise PromptError(f"prompt {index} is empty; give at least one token (a beginning-of-sequence id will do)")
        _check_ids(backbone, index, row)
        if context is not None and len(row) + prompt.max_new_tokens > context:
            raise PromptError(
                f"prompt {index} has {len(row)} tokens; with max_new_tokens {prompt.max_new_tokens} it exceeds this "
                f"model's context of {context}: shorten the prompt by {len(row) + prompt.max_new_tokens - context} "
                "tokens or lower max_new_tokens"
            )
        if prompt.capacity is not None and len(row) + prompt.max_new_tokens > prompt.capacity:
            raise PromptError(
                f"prompt {index} has {len(row)} tokens; with max_new_tokens {prompt.max_new_tokens} it exceeds the "
                f"capacity of {prompt.capacity}: raise capacity or lower max_new_tokens"
            )


def _check_ids(backbone: Backbone, index: int, row: Sequence[int]) -> None:
    outside = [token for token in row if not 0 <= token < backbone.vocab_size]
    if outside:
        raise PromptError(
            f"prompt {index} holds id {outside[0]}, outside this model's vocabulary of {backbone.vocab_size}; "
            "encode it with the model's own tokenizer"
        )
