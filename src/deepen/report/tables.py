"""A comparison's tables as HTML."""

from collections.abc import Mapping, Sequence
from typing import Any

from deepen.report.markup import Markup, element
from deepen.report.plots import Table
from deepen.report.words import cell, interval, signed


def table(content: Table, *, caption: str) -> Markup:
    """A table that scrolls by itself where it is wider than the page."""
    return _scrolling(
        caption,
        element("thead", element("tr", (element("th", each, scope="col") for each in content.head))),
        element("tbody", (_row(first, rest) for first, *rest in content.rows)),
    )


def values_table(rows: Sequence[Mapping[str, Any]], labels: Sequence[str], *, caption: str) -> Markup:
    """A row a name, a column a stage; a dash where a stage has none."""
    cells = tuple(
        (row["name"], *(cell(row["values"][label]) if label in row["values"] else "-" for label in labels))
        for row in rows
    )
    return table(Table(("", *labels), cells), caption=caption)


def metrics_table(rows: Sequence[Mapping[str, Any]], labels: Sequence[str], *, reference: str) -> Markup:
    """Each metric of each stage; below it the difference from the reference and its interval."""
    meaning = f"Below each value: its difference from {reference} and, in brackets, the 95 % interval of that."
    notes = (f"{row['name']}: {row['note']}." for row in rows if "note" in row)
    return _scrolling(
        " ".join((meaning, *notes)),
        element("thead", element("tr", (element("th", each, scope="col") for each in ("metric", *labels)))),
        element("tbody", (_metric(row, labels, reference) for row in rows)),
    )


def _metric(row: Mapping[str, Any], labels: Sequence[str], reference: str) -> Markup:
    values = row["values"]
    return _row(
        row["name"],
        [(cell(values[label]), None if label == reference else _change(row["differences"][label])) for label in labels],
    )


def _change(difference: Mapping[str, Any]) -> Markup | None:
    if difference["delta"] is None:
        return None
    ends = interval(difference["interval_95"])
    return element("span", " ", signed(difference["delta"]), f" ({ends})" if ends else None, class_="change")


def _row(first: Any, rest: Sequence[Any]) -> Markup:
    return element("tr", element("th", first, scope="row"), (element("td", each) for each in rest))


def _scrolling(caption: str, *parts: Markup) -> Markup:
    return element(
        "div",
        element("table", element("caption", caption), parts),
        class_="scroll",
        role="region",
        aria_label=caption,
        tabindex=0,
    )
