"""Checks of a method's log-probabilities: what they may depend on, and that they are a distribution's."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepen.check.effort import Effort
from deepen.check.gauge import Gauge
from deepen.check.methods import method_of, weights_of
from deepen.check.outcome import Fault, NotApplicable, Passed
from deepen.check.subject import Subject
from deepen.core.errors import CannotScore
from deepen.core.method import RecursiveModel
from deepen.core.types import Score
from deepen.data.batches import batch_of

# Every token of a vocabulary up to this is tried in one place; of a larger one the likeliest few.
_SMALL_VOCABULARY = 512
_NUM_LIKELIEST = 8
# The vocabulary is tried at one of the last of so many tokens.
_SUM_LENGTH = 12


def scores(subject: Subject, effort: Effort) -> Passed:
    """Scores must be causal, of a proper distribution, and the same in any company."""
    method = method_of(subject)
    # A log-probability moves by at most twice what logits do.
    gauge = Gauge(2 * subject.allowed)
    try:
        # Trained, or as if: an untrained method's scores are the base's.
        said, weights = list(weights_of(method).items())[-1]
        with weights(subject):
            for seed in range(effort.num_texts):
                _Scores(subject, method, gauge, said).check(effort, seed)
    except CannotScore as reason:
        raise NotApplicable(f"the method gives no scores: {reason}") from reason
    return gauge.passed()


class _Scores:
    """One model's scores of one text and of what stands beside it."""

    def __init__(self, subject: Subject, method: RecursiveModel, gauge: Gauge, said: str) -> None:
        self._subject, self._method, self._gauge, self._said = subject, method, gauge, said

    def check(self, effort: Effort, seed: int) -> None:
        """All of it; raises `Fault`."""
        text = self._subject.text(effort.length, seed=seed)[0].tolist()
        alone = self._score([text])
        self._check_scored(alone, [len(text)])
        self._check_causality(alone, text, effort.cuts(seed))
        # A row that ends early is a row with another future, so this stands on the check before it.
        self._check_company(alone, text)
        self._check_sum(text[:_SUM_LENGTH])

    def _score(self, rows: Sequence[Sequence[int]]) -> Score:
        batch = batch_of(rows)
        device = self._subject.device
        score = self._method.score(type(batch)(batch.input_ids.to(device), batch.lengths.to(device)))
        return Score(score.log_probs.cpu(), score.scored.cpu(), score.correct.cpu())

    def _compare(self, actual: Tensor, expected: Tensor, what: str, cause: str) -> None:
        self._gauge.compare(
            actual[..., None], expected[..., None], seen=f"{self._said}, log-probabilities {what}", cause=cause
        )

    def _check_scored(self, score: Score, lengths: Sequence[int]) -> None:
        places = torch.arange(score.scored.shape[1])
        wanted = torch.stack([(places > 0) & (places < length) for length in lengths])
        if not torch.equal(score.scored, wanted) or score.log_probs[~wanted].any() or score.correct[~wanted].any():
            raise Fault(
                f"{self._said}, of rows of {list(lengths)} tokens {score.scored.sum(dim=1).tolist()} are scored",
                cause="every token but a row's first is to be scored, and nothing at pads: they are known from "
                "`lengths`, not by an id",
            )
        if (score.log_probs > 0).any():
            raise Fault(
                f"{self._said}, a log-probability is {float(score.log_probs.max()):.2g}",
                cause="it is above 0: a logit was taken for a log-probability, or a softmax over part of the tokens",
            )

    def _check_company(self, alone: Score, text: list[int]) -> None:
        mates = self._subject.text(len(text), seed=51, batch=2).tolist()
        rows = [text[: len(text) // 2], text, mates[0], mates[1][:1]]
        together = self._score(rows)
        self._check_scored(together, list(map(len, rows)))
        for row in (0, 1):
            length = len(rows[row])
            self._compare(
                together.log_probs[row : row + 1, :length],
                alone.log_probs[:, :length],
                f"of a row of {length} tokens beside rows of {[len(mate) for mate in rows]}, against the text alone",
                "pads are counted in a mean or a state, or other rows are: they end within a chunk, and what is "
                "pooled over a chunk takes positions that are not the row's",
            )

    def _check_causality(self, alone: Score, text: list[int], cuts: Sequence[int]) -> None:
        other = self._subject.text(len(text), seed=52)[0].tolist()
        # As rows of one batch: they are of one length, and that company doesn't matter `decoding` has seen.
        changed = self._score([[*text[:cut], *other[cut:]] for cut in cuts])
        for row, cut in enumerate(cuts):
            self._compare(
                changed.log_probs[row : row + 1, :cut],
                alone.log_probs[:, :cut],
                f"of the tokens before {cut}, with other tokens from there on",
                "a token's prediction sees what comes after it: given (gold) tokens pooled over a whole chunk, a mean "
                "that isn't causal, or states and drafts made from the text that is scored",
            )

    def _check_sum(self, text: list[int]) -> None:
        place = len(text) - 3
        tokens, whole = self._tried(text[:place])
        score = self._score([[*text[:place], token, *text[place + 1 :]] for token in tokens])
        total = float(score.log_probs[:, place].double().exp().sum())
        # Each of the probabilities is off by as much as its logarithm.
        tolerance = 2 * self._gauge.allowed + 1e-6
        what = f"probabilities of {len(tokens)} tokens in one place sum to {total:.6g}"
        if total > 1 + tolerance or (whole and total < 1 - tolerance):
            raise Fault(
                f"{self._said}, {what}",
                cause="the prediction of a token depends on the token itself, so each has a distribution of its own: "
                "gold tokens are pooled with their own position, or their target is read",
            )

    def _tried(self, prefix: list[int]) -> tuple[list[int], bool]:
        """Tokens to try behind `prefix`, and whether they are all there are."""
        if self._subject.vocab_size <= _SMALL_VOCABULARY:
            return list(range(self._subject.vocab_size)), True
        logits = self._subject.logits(torch.tensor([prefix], device=self._subject.device))[0, -1]
        return logits.topk(_NUM_LIKELIEST).indices.tolist(), False
