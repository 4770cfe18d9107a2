"""deepen compare"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from deepen.cli.options import OptionalFile
from deepen.cli.output import print_facts, print_table
from deepen.core.errors import DeepenError
from deepen.report.words import cell, interval, is_long_list, signed


@dataclass(frozen=True)
class Options:
    """Compare stages of one base side by side, and judge whether the grafted model still is its base.

    Prints every metric with its difference from the baseline and a 95 % interval of it (bootstrap over the documents
    or prompts that both have), costs, and the settings that differ. Exit status 1 if an after_surgery stage is not
    equal to the baseline, 2 if that can't be judged, as the two didn't answer the same.
    """

    stages: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="STAGE|FILE")]
    """Results files as `deepen evaluate` writes them, or names of stages in EVAL_DIR; at least two."""

    eval_dir: str = "eval_results"
    """Where the results of stages are that are given by name."""

    out: OptionalFile = None
    """Write the comparison here, as JSON."""

    html: OptionalFile = None
    """Write a report here: one HTML file with all tables and with plots, which needs no network and no script."""

    runs: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DIR")] = ()
    """Folders of training runs whose losses the report shows."""

    seed: int = 0
    """Of the bootstrap intervals."""


def run(options: Options) -> int:
    """Read, compare, print; 1 if an equality verdict fails, 2 if there is none where there should be."""
    from deepen.core.files import write_json
    from deepen.evaluate.comparison import columns, compare_stages
    from deepen.evaluate.results import StageResults
    from deepen.report.page import write_report
    from deepen.report.runs import read_runs

    if options.seed < 0:
        raise DeepenError(f"--seed must be 0 or more, not {options.seed}")
    if options.runs and options.html is None:
        raise DeepenError(
            "--runs is for the report alone, which is not asked for; add --html FILE, or leave --runs out"
        )
    paths = [_path(given, options.eval_dir) for given in options.stages]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        raise DeepenError(f"{twice} is given more than once; name different results files")
    given = columns({path: StageResults.read(path) for path in paths})
    comparison = compare_stages(given, seed=options.seed)
    runs = read_runs(options.runs)
    # Before anything is printed, which a pipe that ends early would cut off.
    if options.out is not None:
        write_json(options.out, comparison)
    if options.html is not None:
        write_report(options.html, comparison, given, runs=runs)
    _print(comparison)
    for written in filter(None, (options.out, options.html)):
        print(f"written to {written}")
    return _status([verdict["holds"] for verdict in comparison["equality"]])


def _status(verdicts: Sequence[bool | None]) -> int:
    if False in verdicts:
        return 1
    return 2 if None in verdicts else 0


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
    _print_metrics(comparison["metrics"], labels, reference)
    for noted in (row for row in comparison["metrics"] if "note" in row):
        print(f"{noted['name']}: {noted['note']}")
    for part in ("counts", "ledger", "training", "speed", "seconds"):
        _print_rows(part, labels, comparison[part])
    _print_rows("depth of tokens", labels, comparison["depths"])
    _print_rows("other numbers of recursions", labels, comparison["at_recursions"])
    _print_rows("looking ahead, not causal", labels, comparison["looking_ahead"])
    _print_rows("settings that differ", labels, comparison["settings"])
    _print_rows("settings of training that differ", labels, comparison["training_settings"])
    for verdict in comparison["equality"]:
        print()
        print_facts(_verdict(verdict), title=f"{verdict['label']} against {reference}")


def _print_metrics(rows: Sequence[Mapping[str, Any]], labels: Sequence[str], reference: str) -> None:
    """Values and differences: in one table for two stages, else in two, which are narrow enough for a terminal."""
    others = [label for label in labels if label != reference]
    if len(others) == 1:
        (other,) = others
        cells = [[*_values(row, labels), *_difference(row["differences"][other])] for row in rows]
        print_table(("metric", *labels, "difference", "95 % interval"), cells)
        return
    print_table(("metric", *labels), [_values(row, labels) for row in rows])
    print()
    print_table(
        ("difference, 95 % interval", *others),
        [[row["name"], *(_in_brackets(row["differences"][label]) for label in others)] for row in rows],
    )


def _values(row: Mapping[str, Any], labels: Sequence[str]) -> list[str]:
    return [row["name"], *(cell(row["values"][label]) for label in labels)]


def _difference(difference: Mapping[str, Any]) -> tuple[str, str]:
    return signed(difference["delta"]), interval(difference["interval_95"])


def _in_brackets(difference: Mapping[str, Any]) -> str:
    delta, ends = _difference(difference)
    return f"{delta} ({ends})" if ends else delta


def _print_rows(title: str, labels: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """A table, and below it those rows whose values are too long for one, a line a stage."""
    cells = [
        [row["name"], *(cell(row["values"][label]) if label in row["values"] else "-" for label in labels)]
        for row in rows
        if not _has_long_lists(row)
    ]
    if cells:
        print()
        print_table((title, *labels), cells)
    for row in filter(_has_long_lists, rows):
        print()
        print_facts({label: cell(value) for label, value in row["values"].items()}, title=row["name"])


def _has_long_lists(row: Mapping[str, Any]) -> bool:
    return any(map(is_long_list, row["values"].values()))


def _verdict(verdict: Mapping[str, Any]) -> dict[str, str]:
    facts = {"asked": verdict["criterion"], "greedy ids": verdict["ids"], "scores": verdict["nll"]}
    facts |= {f"note {number}": note for number, note in enumerate(verdict["notes"], start=1)}
    return facts | {"verdict": _VERDICTS[verdict["holds"]]}


_VERDICTS = {
    True: "the grafted model is the base",
    False: "NOT EQUAL to the base",
    None: "NOT JUDGED: there are no greedy ids to compare, and the scores don't tell",
}
