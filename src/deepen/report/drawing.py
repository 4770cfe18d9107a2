"""Lines, points and bars as SVG, with axes; a figure with its legend around them.

Series are told apart three ways: by colour, by dashes or hatching, and by the shape of their points.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from deepen.report.markup import Markup, element, together
from deepen.report.scale import Linear, MakeScale, Scale, linear
from deepen.report.words import amounts

NUM_COLOURS = 7
"""Custom properties --series-0 ... of the style sheet."""
_DASHES = (None, "7 4", "2 3", "9 3 2 3", "14 4", "4 2 1 2")
_SHAPES = 4
_HATCHES = ("", "M0 8L8 0", "M0 4H8", "M0 0L8 8", "M4 0V8", "M0 8L8 0M0 0L8 8")

_WIDTH, _HEIGHT = 540, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 14, 12, 50
_FEW_POINTS = 60
_FEW_LABELS = 9
_WIDEST_BAR = 36


@dataclass(frozen=True)
class Series:
    """A line through points (x, y); where y is None it is interrupted. `number` decides how it looks.

    `intervals` has for each point the ends of a bar through it, or None.
    """

    name: str
    number: int
    points: tuple[tuple[float, float | None], ...]
    intervals: tuple[tuple[float, float] | None, ...] = ()

    @property
    def told(self) -> list[tuple[float, float]]:
        """The points that there are."""
        return [(x, y) for x, y in self.points if y is not None]


@dataclass(frozen=True)
class Bars:
    """A value for each category, or None where there is none."""

    name: str
    number: int
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class Level:
    """A value without a place on the x axis: a line across."""

    name: str
    number: int
    value: float


def lines(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    levels: Sequence[Level] = (),
    x_scale: MakeScale = linear,
    y_reaches: Sequence[float] = (),
) -> Markup:
    """Series that have at least one point together, and levels; the y axis reaches some values in any case."""
    points = [point for each in series for point in each.told]
    ends = [end for each in series for pair in each.intervals if pair is not None for end in pair]
    x = x_scale([place for place, _ in points], start=_LEFT, end=_WIDTH - _RIGHT)
    values = [*(value for _, value in points), *(level.value for level in levels), *ends, *y_reaches]
    y = linear(values, start=_HEIGHT - _BOTTOM, end=_TOP)
    return _svg(
        _axes(x, y, x_label=x_label, y_label=y_label),
        (_level(level, y) for level in levels),
        (_line(each, x, y) for each in series),
        title=title,
    )


def bars(groups: Sequence[Bars], categories: Sequence[str], *, title: str, x_label: str, y_label: str) -> Markup:
    """For each category a bar of each group."""
    values = [value for each in groups for value in each.values if value is not None]
    y = linear([*values, 0.0], start=_HEIGHT - _BOTTOM, end=_TOP)
    band = (_WIDTH - _RIGHT - _LEFT) / len(categories)
    width = min(band * 0.8 / len(groups), _WIDEST_BAR)
    left = _LEFT + (band - width * len(groups)) / 2
    every = -(-len(categories) // _FEW_LABELS)
    drawn = [
        element(
            "g",
            element("title", each.name),
            (
                _bar(left + place * band + index * width, width, value, y, each.number)
                for place, value in enumerate(each.values)
                if value is not None
            ),
        )
        for index, each in enumerate(groups)
    ]
    labels = [
        _text(category, _LEFT + (place + 0.5) * band, _HEIGHT - _BOTTOM + 18, anchor="middle")
        for place, category in enumerate(categories)
        if place % every == 0
    ]
    return _svg(_y_axis(y, y_label), drawn, _frame(), labels, _x_label(x_label), title=title)


def legend(entries: Iterable[tuple[str, Markup]]) -> Markup:
    """Names, each beside a sample of what it looks like."""
    return element("ul", (element("li", sample, name) for name, sample in entries), class_="legend")


def hatches() -> Markup:
    """What bars are filled with: once a page, in a picture of no size."""
    patterns = (
        element(
            "pattern",
            element("rect", width=8, height=8, fill=_colour(number)),
            element("path", d=path, stroke="var(--page)", stroke_width=1.6) if path else None,
            id=f"hatch-{number}",
            width=8,
            height=8,
            patternUnits="userSpaceOnUse",
        )
        for number in range(NUM_COLOURS * len(_HATCHES))
        for path in [_HATCHES[number % len(_HATCHES)]]
    )
    return element("svg", element("defs", patterns), width=0, height=0, class_="hatches", aria_hidden="true")


def _svg(*content: Iterable[Markup], title: str) -> Markup:
    return element(
        "svg",
        element("title", title),
        (together(part) for part in content),
        viewBox=f"0 0 {_WIDTH} {_HEIGHT}",
        role="img",
        aria_label=title,
        class_="plot",
    )


# Axes


def _axes(x: Scale, y: Linear, *, x_label: str, y_label: str) -> Iterator[Markup]:
    yield from _y_axis(y, y_label)
    for tick, label in _labelled(x):
        place = x.place(tick)
        yield _stroke(place, _HEIGHT - _BOTTOM, place, _HEIGHT - _BOTTOM + 4, class_="axis")
        yield _text(label, place, _HEIGHT - _BOTTOM + 18, anchor="middle")
    yield from _frame()
    yield from _x_label(x_label)


def _y_axis(y: Linear, label: str) -> Iterator[Markup]:
    for tick, text in _labelled(y):
        place = y.place(tick)
        yield _stroke(_LEFT, place, _WIDTH - _RIGHT, place, class_="grid")
        yield _text(text, _LEFT - 8, place + 4, anchor="end")
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    yield element(
        "text", label, x=16, y=middle, text_anchor="middle", transform=f"rotate(-90 16 {middle})", class_="label"
    )


def _labelled(scale: Scale) -> Iterator[tuple[float, str]]:
    ticks = scale.ticks()
    return zip(ticks, amounts(ticks), strict=True)


def _x_label(label: str) -> Iterator[Markup]:
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    yield element("text", label, x=middle, y=_HEIGHT - 8, text_anchor="middle", class_="label")


def _frame() -> Iterator[Markup]:
    yield _stroke(_LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, class_="axis")
    yield _stroke(_LEFT, _TOP, _LEFT, _HEIGHT - _BOTTOM, class_="axis")


def _text(text: str, x: float, y: float, *, anchor: str) -> Markup:
    return element("text", text, x=_shown(x), y=_shown(y), text_anchor=anchor)


def _stroke(x1: float, y1: float, x2: float, y2: float, *, class_: str) -> Markup:
    return element("path", d=f"M{_shown(x1)} {_shown(y1)}L{_shown(x2)} {_shown(y2)}", class_=class_)


def _shown(place: float) -> str:
    return f"{place:.1f}"


# Series


def _colour(number: int) -> str:
    return f"var(--series-{number % NUM_COLOURS})"


def _hatch(number: int) -> str:
    return f"url(#hatch-{number % (NUM_COLOURS * len(_HATCHES))})"


def _across(path: str, number: int) -> Markup:
    return element("path", d=path, stroke_dasharray=_DASHES[number % len(_DASHES)], class_="line")


def _line(series: Series, x: Scale, y: Linear) -> Markup:
    places = [(x.place(at), None if value is None else y.place(value)) for at, value in series.points]
    return element(
        "g",
        element("title", series.name),
        _across(_path(places), series.number),
        (_error(series, index, x, y) for index in range(len(series.intervals))),
        (_point(at, value, series.number) for at, value in _marked(places) if value is not None),
        style=f"--own: {_colour(series.number)}",
    )


def _path(places: Sequence[tuple[float, float | None]]) -> str:
    """Moves and lines; a gap where a value is missing."""
    parts = []
    for is_there, run in groupby(places, key=lambda place: place[1] is not None):
        if is_there:
            parts.append("M" + "L".join(f"{_shown(at)} {_shown(value)}" for at, value in run if value is not None))
    return "".join(parts)


def _marked(places: Sequence[tuple[float, float | None]]) -> Sequence[tuple[float, float | None]]:
    """Many points would hide their line: then only those that no line leads to are drawn."""
    if len(places) <= _FEW_POINTS:
        return places
    alone = [None, *(value for _, value in places), None]
    return [place for index, place in enumerate(places) if alone[index] is None and alone[index + 2] is None]


def _error(series: Series, index: int, x: Scale, y: Linear) -> Markup | None:
    ends = series.intervals[index]
    if ends is None:
        return None
    place = x.place(series.points[index][0])
    return _stroke(place, y.place(ends[0]), place, y.place(ends[1]), class_="error")


def _point(x: float, y: float, number: int) -> Markup:
    shapes = (
        f"M{_shown(x - 4)} {_shown(y)}a4 4 0 1 0 8 0a4 4 0 1 0 -8 0",
        f"M{_shown(x - 3.5)} {_shown(y - 3.5)}h7v7h-7z",
        f"M{_shown(x)} {_shown(y - 5)}l5 8.5h-10z",
        f"M{_shown(x)} {_shown(y - 5.5)}l4.5 5.5l-4.5 5.5l-4.5 -5.5z",
    )
    return element("path", d=shapes[number % _SHAPES], class_="point")


def _level(level: Level, y: Linear) -> Markup:
    place = _shown(y.place(level.value))
    return element(
        "g",
        element("title", level.name),
        _across(f"M{_LEFT} {place}H{_WIDTH - _RIGHT}", level.number),
        style=f"--own: {_colour(level.number)}",
    )


def _bar(x: float, width: float, value: float, y: Linear, number: int) -> Markup:
    top, bottom = sorted((y.place(value), y.place(0.0)))
    return element(
        "rect",
        x=_shown(x),
        y=_shown(top),
        width=f"{width:.2f}",
        height=_shown(bottom - top),
        fill=_hatch(number),
        stroke=_colour(number),
        class_="bar",
    )


# Samples for a legend


def line_sample(number: int) -> Markup:
    """A piece of a series' line, with a point."""
    return _sample(_across("M1 7H35", number), _point(18, 7, number), number=number)


def level_sample(number: int) -> Markup:
    """A piece of a level."""
    return _sample(_across("M1 7H35", number), number=number)


def bar_sample(number: int) -> Markup:
    """A small bar."""
    box = element("rect", x=1, y=1, width=14, height=12, fill=_hatch(number), stroke=_colour(number), class_="bar")
    return element("svg", box, width=16, height=14, aria_hidden="true")


def _sample(*parts: Markup, number: int) -> Markup:
    return element("svg", parts, width=36, height=14, style=f"--own: {_colour(number)}", aria_hidden="true")
