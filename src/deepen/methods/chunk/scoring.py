"""Log-probabilities of given text under refined mode, none of which depends on the token it is of or a later one.

Text is cut into chunks of W tokens behind its first. For each, the model drafts and refines *its own* continuation of
the given prefix, exactly as it generates; that leaves refine states, a function of the prefix alone. One more pass
reads the given chunk with these states and causal pooling, so

    p(x_j | x_<j) = softmax(logits of x_{j-1} | prefix, states(prefix))

is a proper distribution, the base's own while cells start at zero. A chunk's first token is decided by the clean
prefix. Generation also edits, keeps anchors and truncates: this is not the likelihood of what it generates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepen.core.errors import CannotScore
from deepen.core.types import Batch, Prompt, Score
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.generate.scoring import ScoreSheet
from deepen.methods.chunk.refined import PassCounter, RefinedDecoder, RefinedDecoding


@torch.no_grad()
def score_refined(decoder: RefinedDecoder, batch: Batch) -> Score:
    """Score every token but each row's first.

    Raises `CannotScore` where a position would see what it predicts, or a row leaves no room for a draft behind it.
    """
    rows = batch.unpadded()
    decoding = decoder.open(Prompt(tuple(tuple(row[:1]) for row in rows), _room(decoder, max(map(len, rows)))))
    sampler = BatchSampler([SamplingConfig()] * len(rows))
    sheet = ScoreSheet(batch.input_ids.shape, decoder.backbone.dtype)
    alive = list(range(len(rows)))
    width = decoder.config.chunk_width
    for start in range(1, max(map(len, rows)), width):
        ended = [place for place, index in enumerate(alive) if len(rows[index]) <= start]
        if ended:
            decoder.drop(decoding, ended)
            sampler.drop(ended)
            alive = [index for index in alive if len(rows[index]) > start]
        given = [rows[index][start : start + width] for index in alive]
        for index, tokens, logits in zip(alive, given, _read(decoder, decoding, sampler, given), strict=True):
            sheet.put(index, start, tokens, logits)
    return sheet.score


def _room(decoder: RefinedDecoder, longest: int) -> int:
    """Tokens that a row may grow to behind its first: the longest given one, and a draft behind that if it fits."""
    if decoder.config.pooling != "causal":
        raise CannotScore(
            f"pooling is {decoder.config.pooling!r}: every position sees the whole chunk, its own target included; "
            "set pooling to causal"
        )
    wanted, context = longest + decoder.config.chunk_width, decoder.backbone.context_length
    if context is None:
        return wanted
    if longest > context - decoder.scratch:
        raise CannotScore(
            f"a text of {longest} tokens leaves no room for drafts in this model's context of {context}; "
            f"score at most {context - decoder.scratch} tokens at a time"
        )
    return min(wanted, context - decoder.scratch - 1)


def _read(
    decoder: RefinedDecoder, decoding: RefinedDecoding, sampler: BatchSampler, given: Sequence[Sequence[int]]
) -> list[Tensor]:
    """The logits `[n, V]` that decide each row's given tokens, which are committed then."""
    spent = PassCounter(decoder.backbone.num_layers)
    decoder.read_committed(decoding, spent)
    assert decoding.next_logits is not None
    deciding = decoding.next_logits[:, None]
    states = decoder.refine(decoding, decoder.draft(decoding, sampler, spent), sampler, spent)
    decoder.hand_on(decoding, states)
    inputs = [row[:-1] for row in given]
    if any(inputs):
        deciding = torch.cat([deciding, decoder.read_with(decoding, inputs, states)], dim=1)
    decoding.commit(given)
    return [logits[: len(row)] for logits, row in zip(deciding, given, strict=True)]
