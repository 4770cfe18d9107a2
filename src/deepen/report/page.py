"""The report: one HTML file that needs nothing else, no network, no script and no font."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepen.core.files import write_atomically
from deepen.evaluate.comparison import Column
from deepen.report.depth_map import depth_maps
from deepen.report.drawing import hatches
from deepen.report.markup import Markup, element, own, together
from deepen.report.plots import Plot, Table
from deepen.report.run_plots import run_plots
from deepen.report.runs import Run
from deepen.report.stage_plots import recursions_plot, stage_plots
from deepen.report.style import STYLE
from deepen.report.tables import metrics_table, table, values_table

_MEANINGS = {
    "baseline": "the base model alone",
    "after_surgery": "the adapter as it was grafted",
    "finetuned_vanilla": "the base, trained further without recursion",
    "finetuned_recursive": "the adapter with its recursion, trained",
}

_OF_DEPTHS = (
    "Recursions that tokens ran, over all that were read. kept: the share that ran recursion 1, 2, ...; dead: the "
    "share that ran the first alone; nll after N: of scored tokens that a token of depth N predicted; "
    "docs/evaluation.md defines the classes."
)
_OF_RECURSIONS = "Nats per token of the same weights run with so many recursions."
_OF_LOOKING_AHEAD = (
    "Not causal: these figures come of decisions that look at later tokens, as in training. No model that generates "
    "can make them, so they are no model's perplexity; the metrics above are without."
)

# Nothing may be fetched or run, whatever a text in here holds.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(
    path: str | Path, comparison: Mapping[str, Any], columns: Sequence[Column], *, runs: Sequence[Run] = ()
) -> None:
    """Write the page about a comparison, its stages and some training runs; all of it or nothing.

    Raises `DeepenError` if the place can't be written to.
    """
    page = report(comparison, columns, runs=runs)
    with write_atomically(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def report(comparison: Mapping[str, Any], columns: Sequence[Column], *, runs: Sequence[Run] = ()) -> str:
    """The page."""
    base = next(column for column in columns if column.label == comparison["reference"]).results.base.address
    title = f"{len(columns)} stages of {base}"
    sections = _sections(comparison, columns, runs)
    links = (element("li", element("a", name, href=f"#{anchor}")) for anchor, name, _ in sections)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", own(STYLE)),
    )
    body = element(
        "body",
        element("h1", title),
        element("p", f"Compared by deepen {comparison['deepen_version']}.", class_="faint"),
        element("nav", element("ul", links), aria_label="Parts of this report"),
        hatches(),
        element("main", (_section(*each) for each in sections)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


_Section = tuple[str, str, Markup]


def _sections(comparison: Mapping[str, Any], columns: Sequence[Column], runs: Sequence[Run]) -> list[_Section]:
    labels = [column.label for column in columns]
    reference = comparison["reference"]
    parts = [
        ("stages", "Stages", _stages(columns)),
        ("equality", "Equality", _equality(comparison["equality"], reference)),
        ("metrics", "Metrics", metrics_table(comparison["metrics"], labels, reference=reference)),
        ("plots", "Plots of the stages", _plots(stage_plots(comparison, columns))),
        ("runs", "Training runs", _plots(run_plots(runs))),
    ]
    for key, name, caption in (
        ("depths", "Depth of tokens", _OF_DEPTHS),
        ("at_recursions", "Other numbers of recursions", _OF_RECURSIONS),
        ("looking_ahead", "Looking ahead, not causal", _OF_LOOKING_AHEAD),
        ("ledger", "Ledger", "What a model is made of and what a token costs, counted; docs/ledger.md defines each."),
        ("training", "Cost of training", "Of the run that made a stage's model."),
        ("settings", "Settings that differ", "Everything else is equal."),
        ("training_settings", "Settings of training that differ", "Between the runs that made these stages."),
        ("speed", "Speed", "By domain and path: tokens per pass, milliseconds a token, ratio to plain decoding."),
        ("counts", "Counts and checks", "Sizes, histograms, acceptance, and what the figures rest on."),
        ("seconds", "Seconds", "That each part of an evaluation took."),
    ):
        if comparison[key]:
            content = values_table(comparison[key], labels, caption=caption)
            parts.append((key, name, together((content, _pictured(key, columns)))))
    return parts


def _pictured(key: str, columns: Sequence[Column]) -> Markup | None:
    """What is shown below a table."""
    if key == "depths":
        return depth_maps(columns)
    return _plots([recursions_plot(columns)]) if key == "at_recursions" else None


def _section(anchor: str, name: str, content: Markup) -> Markup:
    return element(
        "section", element("h2", name, id=f"{anchor}-title"), content, id=anchor, aria_labelledby=f"{anchor}-title"
    )


def _stages(columns: Sequence[Column]) -> Markup:
    rows = tuple(
        (
            column.label,
            _MEANINGS[column.results.stage],
            column.results.method or "none",
            str(column.results.config.get("model", "")),
            ", ".join(str(column.results.environment.get(name, "")) for name in ("device", "dtype")),
            column.path,
        )
        for column in columns
    )
    head = ("stage", "what it measures", "method", "model", "device, dtype", "file")
    return table(Table(head, rows), caption="All of them scored the same documents.")


# Verdicts


def _equality(verdicts: Sequence[Mapping[str, Any]], reference: str) -> Markup:
    if not verdicts:
        return element(
            "p",
            "Nothing was judged: only a stage after_surgery can be equal to the baseline, and one of both is not here.",
        )
    return together(_verdict(verdict, reference) for verdict in verdicts)


def _verdict(verdict: Mapping[str, Any], reference: str) -> Markup:
    relation = {True: "is equal to", False: "is NOT equal to", None: "was NOT JUDGED against"}[verdict["holds"]]
    facts = [("asked", verdict["criterion"]), ("greedy ids", verdict["ids"]), ("scores", verdict["nll"])]
    facts += [("note", note) for note in verdict["notes"]]
    return element(
        "div",
        element("h3", f"{verdict['label']} {relation} {reference}"),
        element("dl", ((element("dt", name), element("dd", value)) for name, value in facts)),
        class_="verdict fails" if verdict["holds"] is False else "verdict",
    )


# Plots


def _plots(plots: Iterable[Plot]) -> Markup:
    drawn = [plot for plot in plots if plot.picture is not None]
    left_out = [plot for plot in plots if plot.picture is None]
    return together(
        (
            element("div", map(_figure, drawn), class_="plots") if drawn else None,
            (element("p", element("strong", plot.title), ". ", plot.caption, class_="faint") for plot in left_out),
        )
    )


def _figure(plot: Plot) -> Markup:
    numbers = plot.numbers
    return element(
        "figure",
        element("h3", plot.title),
        plot.picture,
        element("figcaption", plot.caption),
        None
        if numbers is None
        else element("details", element("summary", "Its numbers"), table(numbers, caption=plot.title)),
    )
