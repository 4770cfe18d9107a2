"""How well a model predicts documents: one mean over all scored tokens, its interval, and a guard against peeking.

A figure is given only if the scorer passes a perturbation test first: a token that is changed may move no
log-probability before it, and tokens that could stand in one place share a probability of one.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deepen.core.errors import CannotScore
from deepen.core.types import Batch, Score
from deepen.data.batches import batch_of
from deepen.evaluate.depths import DepthTally
from deepen.evaluate.pieces import pieces_of
from deepen.evaluate.results import ScoredDocument
from deepen.generate.detokenize import Detokenizer, Tokenizer

# Leak-free log-probabilities of a batch, as `RecursiveModel.score` gives them.
Scorer = Callable[[Batch], Score]

# Unless asked otherwise, tokens of a document before this one are read and not scored, whatever the model: the first
# chunk of a method that works in chunks needs something to start from.
FIRST_SCORED = 32

NUM_RESAMPLES = 1000

_GUARD_LENGTH = 96
_NUM_PLACES = 4
_NUM_SUBSTITUTES = 2
# Equal shapes give equal bits in most models. Experts are not among them: how many tokens visit one depends on all of
# them, and with the shape of a product its rounding.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class Measured:
    """What was scored: the sums of each document, in order, the figures over all of them, and how deep tokens ran."""

    documents: tuple[ScoredDocument, ...]
    figures: dict[str, Any]
    depths: DepthTally


def measure(
    score: Scorer,
    batches: Iterable[Batch],
    *,
    tokenizer: Tokenizer,
    seed: int = 0,
    first_scored: int = FIRST_SCORED,
    advance: Callable[[int], object] = lambda num_tokens: None,
    looks_ahead: bool = False,
) -> Measured:
    """Sums and figures over all tokens from `first_scored` on in batches whose rows are documents.

    Of documents in which not all is learned, the learned tokens count alone.
    `advance` is called with the number of tokens of each batch that is done. A scorer that `looks_ahead`, and is said
    to, is spared the perturbation test, and has no `largest_move`.

    | figure | |
    |---|---|
    | nll | mean negative log-probability of a token, in nats, summed in float64 over the whole set |
    | nll_interval_95 | its 95 % bootstrap interval over documents, drawn from `seed`; null for one document |
    | perplexity | exp(nll) |
    | bits_per_byte | all bits over the UTF-8 bytes of the text that the scored tokens decode to |
    | token_accuracy | share of scored tokens that were the most probable |
    | num_tokens, num_bytes, num_documents | what was scored |
    | largest_move | what the perturbation test moved a log-probability before the changed token by: 0 is bit-equal |

    Raises `CannotScore` if the scorer fails the perturbation test, if no document is long enough, or if a
    log-probability is not finite.
    """
    every, depths = list(batches), DepthTally()
    documents: list[ScoredDocument] = []
    with torch.no_grad():
        row = None if looks_ahead else guard_row(every, first_scored=first_scored)
        passed = {} if row is None else {"largest_move": require_causal(score, row)}
        for batch in every:
            given = score(replace(batch, learned=None, difficulty=None))
            counted = given.scored & (torch.arange(given.scored.shape[1]) >= first_scored)
            if batch.learned is not None:
                counted = counted & batch.learned
            documents += _sums_of_rows(given, batch, counted, tokenizer)
            _tally_depths(depths, given, batch, counted, tokenizer)
            advance(int(batch.lengths.sum()))
    if not documents:
        raise CannotScore(f"the model has no log-probability for any token from {first_scored} on; start earlier")
    return Measured(tuple(documents), {**_figures(documents, seed), **passed}, depths)


def require_causal(score: Scorer, row: Sequence[int]) -> float:
    """The perturbation test on one row of at least two different ids; raises `CannotScore` if `score` fails it.

    Gives the largest change of a log-probability before a changed token. At the changed place itself, different
    tokens must have probabilities that sum to at most one, and at most one of them may be the most probable: a scorer
    that sees the token it predicts fails there.
    """
    original = score(batch_of([row]))
    moves = [0.0]
    for place in _places(len(row)):
        changed = [score(batch_of([variant])) for variant in _variants(row, place)]
        moves += [_move_before(place, original, other) for other in changed]
        _require_one_distribution(place, [original, *changed])
    return max(moves)


def _places(length: int) -> list[int]:
    """Indices after the first token, spread evenly up to the last."""
    return sorted({1 + (length - 2) * part // (_NUM_PLACES - 1) for part in range(_NUM_PLACES)})


def _variants(row: Sequence[int], place: int) -> list[list[int]]:
    """The row with other tokens at `place`: such as it has elsewhere, so that all are in the vocabulary."""
    others = sorted(set(row) - {row[place]})[:_NUM_SUBSTITUTES]
    return [[*row[:place], other, *row[place + 1 :]] for other in others]


def _move_before(place: int, original: Score, changed: Score) -> float:
    before = slice(0, place)
    if not torch.equal(original.scored[:, before], changed.scored[:, before]):
        raise CannotScore(f"the scorer leaks: which tokens it scores before token {place} depends on that token")
    ran = [each.depths[:, before] for each in (original, changed) if each.depths is not None]
    if ran and not torch.equal(ran[0], ran[-1]):
        raise CannotScore(f"the scorer leaks: how deep tokens before token {place} run depends on that token")
    difference = float((changed.log_probs[:, before] - original.log_probs[:, before]).abs().max())
    if not difference <= _ROUNDING:
        raise CannotScore(
            f"the scorer leaks: token {place} was changed, and a log-probability before it moved by {difference:.3g} "
            f"(at most {_ROUNDING:g} is rounding); a perplexity from it would mean nothing"
        )
    return difference


def _require_one_distribution(place: int, scores: Sequence[Score]) -> None:
    if not scores[0].scored[0, place]:
        return
    probability = sum(float(score.log_probs[0, place].exp()) for score in scores)
    num_best = sum(bool(score.correct[0, place]) for score in scores)
    if not probability <= 1 + len(scores) * _ROUNDING or num_best > 1:
        raise CannotScore(
            f"the scorer leaks: {len(scores)} different tokens in place {place} have probabilities that sum to "
            f"{probability:.3g}, and {num_best} of them are the most probable; it sees what it predicts"
        )


def guard_row(batches: Sequence[Batch], *, first_scored: int = FIRST_SCORED) -> list[int]:
    """The beginning of the first document that has a token to score, and two different ids."""
    for batch in batches:
        for ids in batch.unpadded():
            row = ids[: max(_GUARD_LENGTH, first_scored + 1)]
            if len(ids) > first_scored and len(set(row)) > 1:
                return row
    raise CannotScore(
        f"no document has more than {first_scored} tokens, where scoring starts; give longer documents or more tokens"
    )


def document_id(ids: Sequence[int]) -> str:
    """A digest of a document's tokens, those before the first scored one included."""
    return hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest()[:16]


def _sums_of_rows(score: Score, batch: Batch, counted: Tensor, tokenizer: Tokenizer) -> list[ScoredDocument]:
    """Of the rows that have a token to score, over those that are `counted` `[B, T]`."""
    documents = []
    for row, length in enumerate(batch.lengths.tolist()):
        mask = counted[row]
        if mask.any():
            ids = batch.input_ids[row, :length].tolist()
            num_bytes = _bytes_of_tokens(ids, tokenizer)
            documents.append(
                ScoredDocument(
                    id=document_id(ids),
                    nll=-float(score.log_probs[row][mask].double().sum()),
                    num_tokens=int(mask.sum()),
                    num_correct=int(score.correct[row][mask].sum()),
                    num_bytes=sum(num for num, counts in zip(num_bytes, mask.tolist(), strict=False) if counts),
                    difficulty=None if batch.difficulty is None else int(batch.difficulty[row, 0]) or None,
                )
            )
    return documents


def _tally_depths(tally: DepthTally, score: Score, batch: Batch, counted: Tensor, tokenizer: Tokenizer) -> None:
    """Of the same rows, all tokens that were read, and the costs of those that are counted."""
    if score.depths is None:
        return
    for row, ids in enumerate(batch.unpadded()):
        mask = counted[row].tolist()
        if any(mask):
            costs = (-score.log_probs[row].double()).tolist()
            nll = [cost if counts else None for cost, counts in zip(costs, mask, strict=True)][: len(ids)]
            tally.add(document_id(ids), pieces_of(ids, tokenizer), score.depths[row, : len(ids)].tolist(), nll)


def _bytes_of_tokens(ids: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """UTF-8 bytes that each token adds to the text; those of a character belong to the token that completes it."""
    detokenizer = Detokenizer(tokenizer)
    num_bytes = [len(detokenizer.feed([token]).encode()) for token in ids]
    num_bytes[-1] += len(detokenizer.pending.encode())
    return num_bytes


def _figures(documents: Sequence[ScoredDocument], seed: int) -> dict[str, Any]:
    nll = torch.tensor([document.nll for document in documents], dtype=torch.float64)
    tokens = torch.tensor([document.num_tokens for document in documents], dtype=torch.float64)
    num_tokens = sum(document.num_tokens for document in documents)
    num_bytes = sum(document.num_bytes for document in documents)
    mean = float(nll.sum()) / num_tokens
    perplexity = float(torch.tensor(mean, dtype=torch.float64).exp())
    if not math.isfinite(perplexity):
        raise CannotScore(f"the mean negative log-probability is {mean}: the model has no usable distribution")
    return {
        "nll": mean,
        "nll_interval_95": _interval(nll, tokens, seed),
        "perplexity": perplexity,
        "bits_per_byte": float(nll.sum()) / math.log(2) / num_bytes if num_bytes else None,
        "token_accuracy": sum(document.num_correct for document in documents) / num_tokens,
        "num_tokens": num_tokens,
        "num_bytes": num_bytes,
        "num_documents": len(documents),
    }


def _interval(nll: Tensor, tokens: Tensor, seed: int) -> list[float] | None:
    """Where 95 % of the means lie of sets drawn, with replacement, from the documents."""
    if len(nll) < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(NUM_RESAMPLES):
        drawn = torch.randint(len(nll), (len(nll),), generator=generator)
        means.append(nll[drawn].sum() / tokens[drawn].sum())
    low, high = torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [low, high]
