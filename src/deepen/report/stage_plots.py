"""What stages tell in pictures: quality against training FLOPs, chunks, and drafts."""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

from deepen.evaluate.comparison import Column
from deepen.evaluate.results import AtRecursions, TrainingOfStage
from deepen.report.drawing import Bars, Level, Series, bar_sample, bars, legend, level_sample, line_sample, lines
from deepen.report.markup import together
from deepen.report.plots import Plot, Table
from deepen.report.scale import by_range
from deepen.report.words import amount, cell

_MOST_BARS = 24


def stage_plots(comparison: Mapping[str, Any], columns: Sequence[Column]) -> list[Plot]:
    """Quality against training FLOPs, and what the answers tell of chunks and drafts."""
    return [
        _quality(comparison, columns),
        _histogram(
            columns,
            "passes_per_chunk",
            title="Passes per chunk",
            x_label="passes through the layers until a chunk was committed",
            caption="Chunks are what one advance of the decoder commits.",
        ),
        _histogram(
            columns,
            "chunk_lengths",
            title="Chunk lengths",
            x_label="tokens committed at once",
            caption="Where a chunk takes one pass, as in exact decoding, these are the tokens committed per pass.",
        ),
        _acceptance_by_place(columns),
        _acceptance_by_source(columns),
    ]


def recursions_plot(columns: Sequence[Column]) -> Plot:
    """What stages make of the same documents with other numbers of recursions, of those that were run so."""
    title = "Quality against recursions"
    swept = [
        (column.label, number, column.results.at_recursions)
        for number, column in enumerate(columns)
        if column.results.at_recursions
    ]
    series = [
        Series(label, number, tuple((each.num_recursions, each.figures["nll"]) for each in _ascending(given)))
        for label, number, given in swept
    ]
    picture = lines(series, title=title, x_label="recursions", y_label="nats per token, lower is better")
    rows = tuple(
        (
            f"{label}, {each.num_recursions}" + " (as trained)" * each.as_trained,
            *(cell(value) for value in (each.figures["nll"], each.mean_depth, each.flops_per_token_at_0)),
        )
        for label, _, given in swept
        for each in _ascending(given)
    )
    return Plot(
        title,
        "The same weights, run more often or less often. Who runs recursions that were not trained is for the method "
        "to say; FLOPs are those that are expected.",
        together((picture, legend((each.name, line_sample(each.number)) for each in series))),
        Table(("stage, recursions", "nats per token", "mean depth", "FLOPs a token"), rows),
    )


def _ascending(given: Sequence[AtRecursions]) -> list[AtRecursions]:
    return sorted(given, key=lambda each: each.num_recursions)


def _quality(comparison: Mapping[str, Any], columns: Sequence[Column]) -> Plot:
    title = "Quality against training FLOPs"
    reference = comparison["reference"]
    nll = next(row for row in comparison["metrics"] if row["name"] == "nll")
    trained = [
        _trained(number, column.label, cost, nll, reference)
        for number, column in enumerate(columns)
        if (cost := _cost(column)) is not None
    ]
    others = [
        Level(f"{column.label} ({_before(column)})", number, nll["values"][column.label])
        for number, column in enumerate(columns)
        if _cost(column) is None
    ]
    if not trained:
        return Plot(
            title,
            "Left out: no stage here was made by a training run whose ledger.json says what it cost, baselines aside.",
        )
    picture = lines(
        trained,
        title=title,
        x_label="training FLOPs",
        y_label="nats per token, lower is better",
        levels=others,
        x_scale=by_range,
    )
    names = [(each.name, line_sample(each.number)) for each in trained]
    names += [(each.name, level_sample(each.number)) for each in others]
    rows = [
        (each.name, amount(each.points[0][0]), cell(each.points[0][1]), _ends(each.intervals[0])) for each in trained
    ] + [(level.name, "", cell(level.value), "") for level in others]
    return Plot(
        title,
        f"A bar is the 95 % interval of the difference from {reference}, which it is drawn beside. Lines across are "
        "baselines, and models that no run of ours has trained. FLOPs are those of the run that made the checkpoint, "
        "without any run before it.",
        together((picture, legend(names))),
        Table(("stage", "training FLOPs", "nats per token", "bar"), tuple(rows)),
    )


def _cost(column: Column) -> TrainingOfStage | None:
    """Of the training that the plot is about: that of a baseline lies before all that is compared with it."""
    return None if column.results.stage == "baseline" else column.results.training


def _before(column: Column) -> str:
    return "not trained" if column.results.training is None else "trained before"


def _trained(number: int, label: str, training: TrainingOfStage, nll: Mapping[str, Any], reference: str) -> Series:
    """One point; through it the interval of its difference from the reference, beginning at the reference's value."""
    flops = float(training.figures["training_flops"] or 0)
    ends = None if label == reference else nll["differences"][label]["interval_95"]
    start = nll["values"][reference]
    bar = None if ends is None else (start + ends[0], start + ends[1])
    return Series(label, number, ((flops, nll["values"][label]),), (bar,))


def _ends(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.4f} to {ends[1]:.4f}"


def _histogram(columns: Sequence[Column], name: str, *, title: str, x_label: str, caption: str) -> Plot:
    found = _of_answers(columns, name)
    if not found:
        return Plot(title, "Left out: none of these files has greedy answers (max_new_tokens 0).")
    ranges = _ranges({int(value) for _, _, counts in found for value in counts})
    groups = [Bars(label, number, _shares(counts, ranges)) for label, number, counts in found]
    categories = [str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in ranges]
    return _bar_plot(groups, categories, title=title, x_label=x_label, y_label="share of chunks, %", caption=caption)


def _of_answers(columns: Sequence[Column], name: str) -> list[tuple[str, int, dict[str, Any]]]:
    """The stages whose answers have this figure, by label; the number that a stage looks by is the same everywhere."""
    figures = [(column.results.generation or {}).get(name) for column in columns]
    return [
        (column.label, number, found)
        for number, (column, found) in enumerate(zip(columns, figures, strict=True))
        if isinstance(found, dict) and found
    ]


def _shares(counts: Mapping[str, int], ranges: Sequence[range]) -> tuple[float, ...]:
    """Of all that was counted, in percent."""
    total = sum(counts.values())
    return tuple(100 * sum(counts.get(str(value), 0) for value in each) / total for each in ranges)


def _ranges(values: set[int]) -> list[range]:
    """Each number from the least value to the greatest, or, where they are many, ranges that grow with what is in them.

    Those are 1, 2, ... 8, 9-12, 13-16, 17-24, 25-32, 33-48 and so on: two of a size, then two that are twice as wide.
    """
    low, high = min(values), max(values)
    if high - low < _MOST_BARS:
        return [range(value, value + 1) for value in range(low, high + 1)]
    found, start = [], low
    while start <= high:
        width = 1 if start <= 8 else 1 << ((start - 1).bit_length() - 2)
        found.append(range(start, start + width))
        start += width
    return found


def _acceptance_by_place(columns: Sequence[Column]) -> Plot:
    title = "Acceptance by draft position"
    # A stage's first source looks as the stage does elsewhere, its others as no stage.
    others = count(len(columns))
    found = [
        (f"{label}, {source}", number if index == 0 else next(others), shares)
        for label, number, by_source in _of_answers(columns, "acceptance_by_place")
        for index, (source, shares) in enumerate(each for each in by_source.items() if each[1])
    ]
    if not found:
        return Plot(title, "Left out: nothing was drafted in these stages' answers.")
    series = [
        Series(name, number, tuple((place, 100 * share) for place, share in enumerate(shares, start=1)))
        for name, number, shares in found
    ]
    picture = lines(
        series,
        title=title,
        x_label="position in the draft, from 1",
        y_label="accepted of those compared, %",
        y_reaches=(0.0, 100.0),
    )
    longest = max(len(shares) for _, _, shares in found)
    rows = tuple(
        (str(place + 1), *(f"{shares[place]:.1%}" if place < len(shares) else "" for _, _, shares in found))
        for place in range(longest)
    )
    return Plot(
        title,
        "Of the drafted tokens in each position compared with what came; what stands behind a rejected one is not.",
        together((picture, legend((each.name, line_sample(each.number)) for each in series))),
        Table(("position", *(name for name, _, _ in found)), rows),
    )


def _acceptance_by_source(columns: Sequence[Column]) -> Plot:
    title = "Acceptance by draft source"
    found = _of_answers(columns, "acceptance_by_source")
    if not found:
        return Plot(title, "Left out: nothing was drafted in these stages' answers.")
    sources = sorted({source for _, _, by_source in found for source in by_source})
    groups = [
        Bars(label, number, tuple(_percent(by_source.get(source)) for source in sources))
        for label, number, by_source in found
    ]
    return _bar_plot(
        groups,
        sources,
        title=title,
        x_label="source of the draft",
        y_label="committed, %",
        caption="Of all drafted tokens, those behind a rejected one included.",
    )


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _bar_plot(
    groups: Sequence[Bars], categories: Sequence[str], *, title: str, x_label: str, y_label: str, caption: str
) -> Plot:
    picture = bars(groups, categories, title=title, x_label=x_label, y_label=y_label)
    rows = tuple(
        (category, *("" if (value := group.values[place]) is None else f"{value:.3g}" for group in groups))
        for place, category in enumerate(categories)
    )
    return Plot(
        title,
        caption,
        together((picture, legend((group.name, bar_sample(group.number)) for group in groups))),
        Table((x_label, *(f"{group.name}, %" for group in groups)), rows),
    )
