"""deepen compare"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from deepen.cli.options import OptionalFile
from deepen.cli.output import print_facts, print_table, shown
from deepen.core.errors import DeepenError


@dataclass(frozen=True)
class Options:
    """Compare stages of one base side by side, and judge whether the grafted model still is its base.

    Prints every metric with its difference from the baseline and a 95 % interval of it (bootstrap over the documents
    or prompts that both have), costs, and the settings that differ. Exit status 1 if an after_surgery stage is not
    equal to the baseline.
    """

    stages: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STAGE|FILE")]
    """Results files as `deepen evaluate` writes them, or names of stages in EVAL_DIR; at least two."""

    eval_dir: str = "eval_results"
    """Where the results of stages are that are given by name."""

    out: OptionalFile = None
    """Write the comparison here, as JSON."""

    seed: int = 0
    """Of the bootstrap intervals."""


def run(options: Options) -> int:
    """Read, compare, print; 1 if an equality verdict fails."""
    from deepen.core.files import write_json
    from deepen.evaluate.comparison import columns, compare_stages
    from deepen.evaluate.results import StageResults

    if options.seed < 0:
        raise DeepenError(f"--seed must be 0 or more, not {options.seed}")
    paths = [_path(given, options.eval_dir) for given in options.stages]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise DeepenError(f"{twice} is given more than once; name different results files")
    comparison = compare_stages(columns({path: StageResults.read(path) for path in paths}), seed=options.seed)
    _print(comparison)
    if options.out is not None:
        write_json(options.out, comparison)
        print(f"written to {options.out}")
    return 0 if all(verdict["holds"] for verdict in comparison["equality"]) else 1


def _path(given: str, folder: str) -> str:
    """The file that was named itself, or the one of a stage; a file of a stage's name comes first."""
    from deepen.evaluate.results import STAGE_NAMES

    if given in STAGE_NAMES and not Path(given).is_file():
        return str(Path(folder) / f"{given}_results.json")
    return given


def _print(comparison: Mapping[str, Any]) -> None:
    labels = [file["label"] for file in comparison["files"]]
    reference = comparison["reference"]
    print(f"differences are from {reference}")
    print()
    print_table(
        ("metric", *labels, *_difference_columns(labels, reference)),
        [_metric(row, labels, reference) for row in comparison["metrics"]],
    )
    for part in ("counts", "ledger", "speed", "seconds"):
        _print_rows(part, labels, comparison[part])
    if comparison["settings"]:
        _print_rows("settings that differ", labels, comparison["settings"])
    for verdict in comparison["equality"]:
        print()
        print_facts(_verdict(verdict), title=f"{verdict['label']} against {reference}")


def _difference_columns(labels: Sequence[str], reference: str) -> list[str]:
    if len(labels) == 2:
        return ["difference", "95 % interval"]
    others = [label for label in labels if label != reference]
    return [title for label in others for title in (f"{label} - {reference}", "95 % interval")]


def _metric(row: Mapping[str, Any], labels: Sequence[str], reference: str) -> list[str]:
    cells = [row["name"], *(_cell(row["values"][label]) for label in labels)]
    for label in labels:
        if label != reference:
            difference = row["differences"][label]
            cells += [_signed(difference["delta"]), _interval(difference["interval_95"])]
    return cells


def _print_rows(title: str, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        cells = [
            [row["name"], *(_cell(row["values"][label]) if label in row["values"] else "-" for label in labels)]
            for row in rows
        ]
        print()
        print_table((title, *labels), cells)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_cell(each)}" for key, each in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(_cell, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return shown(value)


def _signed(value: float | None) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:+.4g}"


def _interval(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{_signed(interval[0])} to {_signed(interval[1])}"


def _verdict(verdict: Mapping[str, Any]) -> dict[str, str]:
    facts = {"asked": verdict["criterion"], "greedy ids": verdict["ids"], "scores": verdict["nll"]}
    facts |= {f"note {number}": note for number, note in enumerate(verdict["notes"], start=1)}
    return facts | {"verdict": "the grafted model is the base" if verdict["holds"] else "NOT EQUAL to the base"}
