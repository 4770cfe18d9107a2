"""What a plot in the report is, whatever it shows."""

from dataclasses import dataclass

from deepen.report.markup import Markup


@dataclass(frozen=True)
class Table:
    """Its head and its rows; the first cell of each row names it."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Plot:
    """A picture with its legend and its numbers, or, without a picture, the reason."""

    title: str
    caption: str
    picture: Markup | None = None
    numbers: Table | None = None
