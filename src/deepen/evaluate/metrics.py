"""Every metric that is one sum over another: over documents or over answers, in one file or in resamples of both.

Free of torch.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deepen.evaluate.results import Answer, ScoredDocument

_LN_2 = math.log(2)


def _unchanged(ratio: Any) -> Any:
    return ratio


def _exp(ratio: Any) -> Any:
    with np.errstate(over="ignore"):  # infinity is what is meant, and `over` and resamples leave it out
        return np.exp(ratio)


@dataclass(frozen=True)
class Metric:
    """`finish(sum of numerators / sum of denominators)`: a mean over all that was counted, never a mean of means.

    One that is `clocked` is of seconds: how it varies tells of the machine, and documents or prompts say nothing of it.
    """

    name: str
    numerator: Callable[[Any], float]
    denominator: Callable[[Any], float]
    finish: Callable[[Any], Any] = _unchanged
    clocked: bool = False

    def over(self, units: Sequence[Any]) -> float | None:
        """Its value over these documents or answers; None where nothing was counted, or it is too large for a number.

        Sums are in float64, in the units' order.
        """
        denominator = sum(map(self.denominator, units))
        if not denominator:
            return None
        value = float(self.finish(sum(map(self.numerator, units)) / denominator))
        return value if math.isfinite(value) else None


def _tokens(document: ScoredDocument) -> float:
    return document.num_tokens


DOCUMENT_METRICS: tuple[Metric, ...] = (
    Metric("nll", lambda document: document.nll, _tokens),
    Metric("perplexity", lambda document: document.nll, _tokens, _exp),
    Metric("bits_per_byte", lambda document: document.nll / _LN_2, lambda document: document.num_bytes),
    Metric("token_accuracy", lambda document: document.num_correct, _tokens),
)


def _length(answer: Answer) -> float:
    return len(answer.tokens)


def _num_grams(size: int) -> Callable[[Answer], float]:
    return lambda answer: max(0, len(answer.tokens) - size + 1)


def _num_distinct(size: int) -> Callable[[Answer], float]:
    return lambda answer: len({answer.tokens[i : i + size] for i in range(len(answer.tokens) - size + 1)})


def _distinct(size: int) -> Metric:
    """Different n-grams of an answer over all its n-grams: a text that loops has few."""
    return Metric(f"distinct_{size}", _num_distinct(size), _num_grams(size))


def _where_told(field: str, name: str, denominator: Callable[[Answer], float]) -> Metric:
    """Of the answers that have this field: files of earlier versions lack it."""

    def told(answer: Answer) -> bool:
        return getattr(answer, field) is not None

    return Metric(
        name,
        lambda answer: getattr(answer, field) if told(answer) else 0,
        lambda answer: denominator(answer) if told(answer) else 0,
    )


ANSWER_METRICS: tuple[Metric, ...] = (
    Metric("mean_length", _length, lambda answer: 1),
    Metric("tokens_per_pass", _length, lambda answer: answer.passes),
    Metric("avg_refine_steps", lambda answer: sum(answer.passes_of_commits), lambda answer: len(answer.commits)),
    Metric("avg_chunk_length", _length, lambda answer: len(answer.commits)),
    Metric("positions_per_token", lambda answer: answer.positions, _length),
    _where_told("layer_applications", "layer_applications_per_token", _length),
    Metric("decode_flops_per_token", lambda answer: answer.flops, _length),
    _where_told("prompt_flops", "prompt_flops_per_token", lambda answer: answer.num_prompt_tokens),
    Metric("tokens_per_second", _length, lambda answer: answer.seconds, clocked=True),
    Metric(
        "acceptance",
        lambda answer: sum(map(sum, answer.agreed.values())),
        lambda answer: sum(answer.drafted.values()),
    ),
    Metric("edits_per_token", lambda answer: answer.edits, _length),
    Metric("mean_p_commit", lambda answer: sum(answer.p_commit), lambda answer: len(answer.p_commit)),
    _distinct(1),
    _distinct(2),
    _distinct(3),
    # The share of tokens that end a 4-gram which the answer has had before.
    Metric("repetition", lambda answer: _num_grams(4)(answer) - _num_distinct(4)(answer), _num_grams(4)),
)


def generation_figures(answers: Sequence[Answer], *, commit_threshold: float | None = None) -> dict[str, Any]:
    """Every metric over these answers, with counts by draft source and histograms.

    `commit_rate` is the share of chunks that the method held to be done with at least `commit_threshold`; None for a
    method that doesn't judge its chunks. `acceptance_by_source` is the share of drafted tokens that were committed,
    `acceptance_by_place` that of the tokens at each place of the draft that were compared. Histograms have their values
    as texts, as JSON keys are.
    """
    judged, agreed = (_summed(getattr(answer, name) for answer in answers) for name in ("judged", "agreed"))
    num_drafted = Counter[str]()
    for answer in answers:
        num_drafted.update(answer.drafted)
    return {
        "num_answers": len(answers),
        "num_tokens": sum(len(answer.tokens) for answer in answers),
        **{metric.name: metric.over(answers) for metric in ANSWER_METRICS},
        "commit_rate": _commit_rate(answers, commit_threshold),
        "acceptance_by_source": {source: sum(agreed[source]) / num_drafted[source] for source in judged},
        "acceptance_by_place": {
            source: [good / all_ for good, all_ in zip(agreed[source], judged[source], strict=True)]
            for source in judged
        },
        "drafted": dict(sorted(num_drafted.items())),
        "passes_by_source": _passes(answers),
        "chunk_lengths": _histogram(length for answer in answers for length in answer.commits),
        "passes_per_chunk": _histogram(count for answer in answers for count in answer.passes_of_commits),
    }


def _commit_rate(answers: Sequence[Answer], threshold: float | None) -> float | None:
    judged = [p for answer in answers for p in answer.p_commit]
    if not judged or threshold is None:
        return None
    return sum(p >= threshold for p in judged) / len(judged)


def _summed(counts: Any) -> dict[str, list[int]]:
    """Counts by source and place, put together."""
    found: dict[str, list[int]] = {}
    for by_source in counts:
        for source, places in by_source.items():
            sums = found.setdefault(source, [])
            sums += [0] * (len(places) - len(sums))
            for place, count in enumerate(places):
                sums[place] += count
    return dict(sorted(found.items()))


def _passes(answers: Sequence[Answer]) -> dict[str, int]:
    totals: Counter[str] = Counter()
    for answer in answers:
        for source, widths in answer.passes_by_source.items():
            totals[source] += sum(widths.values())
    return dict(sorted(totals.items()))


def _histogram(values: Any) -> dict[str, int]:
    counts: Mapping[int, int] = Counter(values)
    return {str(value): counts[value] for value in sorted(counts)}
