"""What verbs print: tables and facts on stdout, progress on stderr. Free of torch."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_QUICK_SECONDS = 2.0  # what takes less needs no progress shown
_SECONDS_BETWEEN_LINES = 30.0
_WIDTH_OF_FILES = 10_000  # of what is no terminal: nothing is wrapped there

_PREFIXES = (("", 1), ("K", 10**3), ("M", 10**6), ("G", 10**9), ("T", 10**12), ("P", 10**15))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on stdout; columns that hold nothing but numbers are set flush right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(cell)) for cell in row))
    _print(table)


def print_facts(facts: Mapping[str, Any], *, title: str = "") -> None:
    """One fact a line on stdout, labels aligned, under a title if there is one."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in facts.items():
        table.add_row(Text(("  " if title else "") + label), Text(shown(value)))
    if title:
        _print(Text(title, style="bold"))
    _print(table)


def shown(value: Any) -> str:
    """A value as tables show it: whole numbers with separators, yes and no, "none"."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def quantity(number: float, unit: str = "") -> str:
    """A large number in three digits or so: 1.23 M; with a unit 45.6 MFLOPs."""
    prefix, size = next((entry for entry in reversed(_PREFIXES) if abs(number) >= entry[1]), _PREFIXES[0])
    digits = f"{number / size:.3g}" if abs(number) < 1000 * size else f"{number / size:.0f}"
    return f"{digits} {prefix}{unit}".rstrip()


@contextlib.contextmanager
def progress(description: str, *, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how far something is; call what it gives with each number of units done.

    Nothing is shown in the first two seconds. Then there is a bar if stderr is a terminal, and one line at a time, at
    least half a minute apart, if it is not.
    """
    shower = _Bar(description, total) if sys.stderr.isatty() else _Lines(description, total)
    began, done = perf_counter(), 0

    def advance(count: int = 1) -> None:
        nonlocal done
        done += count
        seconds = perf_counter() - began
        if seconds >= _QUICK_SECONDS:
            shower.show(done, seconds)

    try:
        yield advance
    finally:
        shower.close()


class _Bar:
    """A bar on the terminal, begun when there is something to show."""

    def __init__(self, description: str, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(description, total=total)
        self._started = False

    def show(self, done: int, seconds: float) -> None:
        if not self._started:
            self._progress.start()
            self._started = True
        self._progress.update(self._task, completed=done)

    def close(self) -> None:
        if self._started:
            self._progress.stop()


class _Lines:
    """A plain line now and then, for logs."""

    def __init__(self, description: str, total: int) -> None:
        self._description, self._total = description, total
        self._next = _QUICK_SECONDS

    def show(self, done: int, seconds: float) -> None:
        if seconds >= self._next and done < self._total:
            print(f"deepen: {self._description}: {done} of {self._total}, {seconds:.0f} s", file=sys.stderr, flush=True)
            self._next = seconds + _SECONDS_BETWEEN_LINES

    def close(self) -> None:
        """Nothing is left on the screen."""


def _print(renderable: Any) -> None:
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)
    with console.capture() as capture:
        console.print(renderable)
    # rich fills every line up to the table's width.
    lines = (line.rstrip() for line in capture.get().splitlines())
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()  # minutes of work may follow
