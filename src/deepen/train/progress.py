"""How far a run is and how fast: a bar on a terminal, a line now and then elsewhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from deepen.evaluate.environment import peak_memory_bytes

_BYTES_PER_MB = 10**6


class Pace:
    """Counts steps and tokens over intervals of the wall clock."""

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        """`clock` gives seconds. The first interval begins now."""
        self._clock = clock
        self._begin()

    def count(self, num_tokens: int) -> None:
        """One optimizer step over so many tokens was made."""
        self._num_steps += 1
        self._num_tokens += num_tokens

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done in the block (evaluating, saving) takes no time of the interval."""
        began = self._clock()
        try:
            yield
        finally:
            self._began += self._clock() - began

    def figures(self, device: torch.device) -> dict[str, float | None]:
        """Of the interval that ends now, by tag; the next one begins. None for what takes no measurable time.

        A GPU works on after the call that gave it work: read a loss first. `memory_mb` is the most that was held so
        far, in 10^6 bytes: by tensors on a GPU, by the whole process in main memory otherwise.
        """
        seconds = self._clock() - self._began
        figures = {
            "tokens_per_sec": self._num_tokens / seconds if seconds > 0 else None,
            "steps_per_sec": self._num_steps / seconds if seconds > 0 else None,
            "memory_mb": peak_memory_bytes(device) / _BYTES_PER_MB,
        }
        self._begin()
        return {f"train/performance/{name}": value for name, value in figures.items()}

    def _begin(self) -> None:
        self._num_steps = self._num_tokens = 0
        self._began = self._clock()


class Display(Protocol):
    """What shows how far a run is."""

    def step(self, step: int) -> None:
        """Optimizer step `step`, counted from 1, is made."""

    def figures(self, step: int, *, loss: float, tokens_per_sec: float | None) -> None:
        """Those of the interval that ends with this step."""

    def say(self, text: str) -> None:
        """Something else that happened."""


@contextmanager
def display(num_steps: int, *, done: int = 0, show: Callable[[str], None] = print) -> Iterator[Display]:
    """Shows a run of `num_steps`, of which `done` were made before, while the block lasts.

    A bar if stderr is a terminal that can draw one; otherwise `show` gets a line for each interval.
    """
    console = Console(stderr=True)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield _Lines(num_steps, show)
        return
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    # Where only stderr is a terminal, what is printed on stdout belongs to the file or pipe behind it.
    bar = Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty())
    with bar:
        yield _Bar(bar, num_steps, done)


class _Bar:
    """A bar; texts scroll by above it."""

    def __init__(self, bar: Progress, num_steps: int, done: int) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=num_steps, completed=done, figures="")

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def figures(self, step: int, *, loss: float, tokens_per_sec: float | None) -> None:
        self._bar.update(self._task, completed=step, figures=_shown(loss, tokens_per_sec))

    def say(self, text: str) -> None:
        self._bar.console.print(Text(text))


class _Lines:
    """A line for each interval."""

    def __init__(self, num_steps: int, show: Callable[[str], None]) -> None:
        self._num_steps, self._show = num_steps, show

    def step(self, step: int) -> None:
        """Told with the interval."""

    def figures(self, step: int, *, loss: float, tokens_per_sec: float | None) -> None:
        self._show(f"step {step}/{self._num_steps}  {_shown(loss, tokens_per_sec)}")

    def say(self, text: str) -> None:
        self._show(text)


def _shown(loss: float, tokens_per_sec: float | None) -> str:
    return f"loss {loss:.4f}" + ("" if tokens_per_sec is None else f"  {tokens_per_sec:,.0f} tokens/s")
