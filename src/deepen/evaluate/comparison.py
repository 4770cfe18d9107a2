"""Stages side by side: every metric with its difference and interval, costs, settings, and whether one is the other.

Free of torch.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepen import __version__
from deepen.core.errors import DeepenError
from deepen.evaluate.depths import DepthsOfStage
from deepen.evaluate.equality import equality
from deepen.evaluate.metrics import ANSWER_METRICS, DOCUMENT_METRICS, Metric
from deepen.evaluate.results import StageResults, TrainingOfStage

FORMAT = 1
NUM_RESAMPLES = 1000

_CLOCKED = "the machine's speed in one run of each stage, so without an interval; `evaluate --speed` times it"

_DRAWN_AT_ONCE = 1_000_000

# Documents or answers of a column, by name.
_OfColumn = list[tuple[str, Any]]

# They say where the results are, what the column is called already, or what was measured beside all that is compared.
_NO_SETTINGS = ("stage", "output_dir", "recursions")


@dataclass(frozen=True)
class Difference:
    """One metric of a stage less that of the reference, and where 95 % of it lies over resampled documents or prompts.

    The interval tells how far other documents would move the difference; nothing of how a machine's speed varies, which
    has none. It is None, too, for a single document, and where the two stages didn't answer the same prompts, or not
    with as many tokens at most.
    """

    delta: float | None
    interval_95: tuple[float, float] | None


@dataclass(frozen=True)
class Column:
    """One file of the comparison: its path, how it is called in tables, and what is in it."""

    path: str
    label: str
    results: StageResults


def columns(files: Mapping[str, StageResults]) -> list[Column]:
    """The files by path, each called by its stage, and by what tells its path apart where several have that stage."""
    labels: dict[str, str] = {}
    for stage in {results.stage for results in files.values()}:
        paths = [path for path, results in files.items() if results.stage == stage]
        names = _told_apart(paths)
        labels |= {path: stage if len(paths) == 1 else f"{stage} ({names[path]})" for path in paths}
    return [Column(path, labels[path], results) for path, results in files.items()]


def _told_apart(paths: Sequence[str]) -> dict[str, str]:
    """Each path without the folders before, and the folders and name behind, that all have in common."""
    parts = {path: list(Path(path).parts) for path in paths}
    for end in (0, -1):
        while all(parts.values()) and len({each[end] for each in parts.values()}) == 1:
            for each in parts.values():
                each.pop(end)
    return {path: str(Path(*each)) if all(parts.values()) else path for path, each in parts.items()}


def compare_stages(given: Sequence[Column], *, seed: int = 0) -> dict[str, Any]:
    """The comparison as plain JSON types; the reference is the first column of stage baseline, else the first of all.

    Raises `DeepenError` for fewer than two columns, for stages of different bases, and where they didn't score the
    same documents.
    """
    if len(given) < 2:
        raise DeepenError(f"a comparison needs at least two results files, not {len(given)}; name more of them")
    reference = next((column for column in given if column.results.stage == "baseline"), given[0])
    others = [column for column in given if column is not reference]
    for column in others:
        _require_one_base(reference, column)
        _require_same_documents(reference, column)
    asked = {column.label: column.results.config.get("max_new_tokens") for column in given}
    alike = {label for label, number in asked.items() if number == asked[reference.label]}
    documents, answers = (
        {column.label: by_name(column.results) for column in given} for by_name in (_by_id, _by_prompt)
    )
    return {
        "format": FORMAT,
        "deepen_version": __version__,
        "reference": reference.label,
        "seed": seed,
        "files": [
            {"label": c.label, "path": c.path, "stage": c.results.stage, "method": c.results.method} for c in given
        ],
        "metrics": [
            *_metrics(DOCUMENT_METRICS, documents, reference.label, seed, alike={*documents}),
            *_metrics(ANSWER_METRICS, answers, reference.label, seed, alike=alike),
        ],
        "counts": _rows({c.label: _counts(c.results) for c in given}),
        "depths": _rows({c.label: _depths(c.results.depths) for c in given if c.results.depths is not None}),
        "at_recursions": _rows({c.label: _at_recursions(c.results) for c in given}),
        "looking_ahead": _rows({c.label: c.results.looking_ahead or {} for c in given}),
        "ledger": _rows({c.label: c.results.ledger for c in given}),
        "speed": _rows({c.label: _speed(c.results) for c in given}),
        "seconds": _rows({c.label: c.results.seconds for c in given}),
        "settings": _different({c.label: _settings(c.results) for c in given}),
        "training": _rows({label: training.figures for label, training in _trained(given).items()}),
        "training_settings": _different(
            {label: _flat(training.run) for label, training in _trained(given).items() if training.run is not None}
        ),
        "equality": [
            {"label": column.label, **asdict(equality(reference.results, column.results))}
            for column in others
            if column.results.stage == "after_surgery" and reference.results.stage == "baseline"
        ],
    }


def _require_one_base(reference: Column, other: Column) -> None:
    for field in ("fingerprint", "tokenizer"):
        mine, theirs = (getattr(column.results.base, field) for column in (reference, other))
        if mine != theirs:
            raise DeepenError(
                f"{other.path} and {reference.path} are of different bases: base.{field} is {theirs} "
                f"({other.results.base.address}) and {mine} ({reference.results.base.address}); compare stages of one "
                f"base model{_way_to_its_baseline(reference, other)}"
            )


def _way_to_its_baseline(reference: Column, other: Column) -> str:
    """For whoever takes a trained model for the baseline of its own training."""
    if reference.results.stage != "baseline" or other.results.stage == "baseline":
        return ""
    return (
        f". The baseline of {other.path} is what `deepen evaluate {other.results.base.address} --stage baseline` says"
    )


def _require_same_documents(reference: Column, other: Column) -> None:
    """The same tokens of the same documents, whatever their order."""
    mine, theirs = (
        Counter((document.id, document.num_tokens) for document in column.results.documents)
        for column in (reference, other)
    )
    if mine == theirs:
        return
    unlike = _different({c.path: c.results.config for c in (reference, other)})
    names = ("data", "split", "max_tokens", "max_length", "max_samples", "first_scored")
    reasons = [
        f"config.{row['name']} is {row['values'].get(other.path)} and {row['values'].get(reference.path)}"
        for row in unlike
        if row["name"] in names
    ]
    raise DeepenError(
        f"{other.path} and {reference.path} don't score the same documents: in documents, "
        f"{(theirs - mine).total()} of {theirs.total()} and {(mine - theirs).total()} of {mine.total()} are not in the "
        f"other one ({'; '.join(reasons) or 'their settings are equal, so the corpus has changed'}). Evaluate both "
        "stages on the same data"
    )


def _by_id(results: StageResults) -> _OfColumn:
    """Sorted, so that those of two files pair up; two of one id hold the same text."""
    return sorted(((document.id, document) for document in results.documents), key=lambda entry: entry[0])


def _by_prompt(results: StageResults) -> _OfColumn:
    return sorted(((answer.prompt, answer) for answer in results.answers), key=lambda entry: entry[0])


def _metrics(
    metrics: Sequence[Metric], units: Mapping[str, _OfColumn], reference: str, seed: int, *, alike: Set[str]
) -> list[dict[str, Any]]:
    """Those that at least one column has a value for; the units of `alike` were asked as the reference's were."""
    rows = []
    for metric in metrics:
        values = {label: metric.over([unit for _, unit in of_column]) for label, of_column in units.items()}
        differences = {
            label: asdict(_difference(metric, units[reference], units[label], seed, alike=label in alike))
            for label in units
            if label != reference
        }
        if any(value is not None for value in values.values()):
            note = {"note": _CLOCKED} if metric.clocked else {}
            rows.append({"name": metric.name, "values": values, "differences": differences, **note})
    return rows


def _difference(metric: Metric, reference: _OfColumn, other: _OfColumn, seed: int, *, alike: bool) -> Difference:
    mine, theirs = ([unit for _, unit in side] for side in (reference, other))
    before, after = metric.over(mine), metric.over(theirs)
    if before is None or after is None:
        return Difference(None, None)
    paired = alike and not metric.clocked and [name for name, _ in reference] == [name for name, _ in other]
    return Difference(after - before, _interval(metric, mine, theirs, seed) if paired else None)


def _interval(metric: Metric, reference: Sequence[Any], other: Sequence[Any], seed: int) -> tuple[float, float] | None:
    """Where 95 % of the differences lie of sets drawn, with replacement, from the pairs."""
    if len(reference) < 2:
        return None
    numerators, denominators = (
        np.array([[count(unit) for unit in side] for side in (reference, other)], dtype=np.float64)
        for count in (metric.numerator, metric.denominator)
    )
    differences = np.concatenate(
        [
            _resampled(metric, numerators[:, drawn].sum(axis=-1), denominators[:, drawn].sum(axis=-1))
            for drawn in _draws(len(reference), seed)
        ]
    )
    if not differences.size or not np.isfinite(differences).all():
        return None
    low, high = np.quantile(differences, (0.025, 0.975))
    return float(low), float(high)


def _draws(num_units: int, seed: int) -> Iterator[np.ndarray]:
    """`NUM_RESAMPLES` rows of as many indices as there are units, `[rows, units]` at a time to bound the memory."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // num_units)
    for start in range(0, NUM_RESAMPLES, at_once):
        yield generator.integers(num_units, size=(min(at_once, NUM_RESAMPLES - start), num_units))


def _resampled(metric: Metric, numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """The difference in each resample, from sums `[2, rows]`, but where nothing was counted in one of the two."""
    counted = denominators.all(axis=0)
    before, after = metric.finish(numerators[:, counted] / denominators[:, counted])
    return np.asarray(after - before)


def _counts(results: StageResults) -> dict[str, Any]:
    """What is neither a metric nor a setting: sizes, histograms, acceptance by source and place, checks."""
    found: dict[str, Any] = {
        "num_documents": len(results.documents),
        "num_scored_tokens": sum(document.num_tokens for document in results.documents),
        "largest_move": results.figures.get("largest_move"),
        **results.checks,
    }
    metrics = {metric.name for metric in ANSWER_METRICS}
    return found | {name: value for name, value in (results.generation or {}).items() if name not in metrics}


def _depths(depths: DepthsOfStage) -> dict[str, Any]:
    """Everything but the texts, by a name each."""
    return {
        "mean depth": depths.mean,
        "dead": depths.dead,
        "kept": list(depths.kept),
        "tokens by depth": list(depths.histogram),
        **{f"mean depth, {name}": each.mean for name, each in depths.by_class.items()},
        **{f"nll after {depth}": each.mean for depth, each in enumerate(depths.nll_by_depth, start=1)},
    }


def _at_recursions(results: StageResults) -> dict[str, Any]:
    """The number that was trained, if it is one of them, and the nll with each."""
    swept = results.at_recursions or ()
    told: dict[str, Any] = {f"nll with {each.num_recursions}": each.figures["nll"] for each in swept}
    trained = next((each.num_recursions for each in swept if each.as_trained), None)
    return told if trained is None else {"as trained": trained, **told}


def _speed(results: StageResults) -> dict[str, Any]:
    """By domain and path: tokens per pass, milliseconds a token, and the ratio to plain decoding in the same run."""
    return {
        f"{line['domain']}, {line['path']}, {name}": value["ratio"] if isinstance(value, dict) else value
        for line in results.speed or ()
        for name, value in line.items()
        if name in ("tokens_per_pass", "ms_per_token", "against_plain") and value is not None
    }


def _settings(results: StageResults) -> dict[str, Any]:
    """Everything that was set or found and that figures depend on, by dotted name."""
    nested = {
        "method": results.method,
        "method_config": results.method_config or {},
        "config": {name: value for name, value in results.config.items() if name not in _NO_SETTINGS},
        "environment": results.environment,
        "base": {"address": results.base.address},
        "left_out": list(results.left_out),
    }
    return _flat(nested)


def _trained(given: Sequence[Column]) -> dict[str, TrainingOfStage]:
    """What training cost, of the stages that have any."""
    return {column.label: column.results.training for column in given if column.results.training is not None}


def _flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _rows(tables: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a name, in the order of their first mention; a column that has no such name is not among its values."""
    names = dict.fromkeys(name for table in tables.values() for name in table)
    return [
        {"name": name, "values": {label: table[name] for label, table in tables.items() if name in table}}
        for name in names
    ]


def _different(tables: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose values are not all the same."""
    found = []
    for row in _rows(tables):
        first, *others = row["values"].values()
        same = all(value == first and type(value) is type(first) for value in others)
        if not same or len(row["values"]) < len(tables):
            found.append(row)
    return found
