"""The figures that training runs wrote down, one JSON object a line in `train.jsonl`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepen.core.errors import DeepenError

FIGURES = "train.jsonl"
STEP = "step"


@dataclass(frozen=True)
class Run:
    """A run's folder, what it is called, and its lines, each with a whole number `step`."""

    path: str
    label: str
    lines: tuple[dict[str, Any], ...]

    def points(self, x: str, y: str) -> tuple[tuple[float, float | None], ...]:
        """One for each line that has both figures, in the file's order; a y that was not finite is None."""
        found = ((_finite(line.get(x)), _finite(line[y])) for line in self.lines if y in line)
        return tuple((at, value) for at, value in found if at is not None)

    @property
    def tags(self) -> tuple[str, ...]:
        """The names of all figures, in the order in which they came."""
        return tuple(dict.fromkeys(tag for line in self.lines for tag in line if tag != STEP))


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Each folder's run, called by the folder's name, and by its whole path where two have one name.

    Raises `DeepenError` for a folder that is given twice or holds no run's figures.
    """
    places = [Path(folder).expanduser() for folder in folders]
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise DeepenError(f"--runs has {twice} more than once; name different runs")
    names = [place.resolve().name for place in places]
    labels = [name if names.count(name) == 1 else str(place) for name, place in zip(names, places, strict=True)]
    return [Run(str(place), label, _lines(place)) for place, label in zip(places, labels, strict=True)]


def _lines(folder: Path) -> tuple[dict[str, Any], ...]:
    path = folder / FIGURES
    if not path.is_file():
        raise DeepenError(
            f"--runs {folder} holds no {FIGURES}; give the folder that `deepen train` wrote to, its output_dir"
        )
    try:
        *whole, rest = path.read_bytes().split(b"\n")
    except OSError as cause:
        raise DeepenError(f"can't read {path}: {cause.strerror}") from cause
    found = [_figures(line) for line in whole]
    if None in found:
        raise DeepenError(
            f"{path}, line {found.index(None) + 1} is not a JSON object of numbers with a whole number in {STEP}; take "
            "the line out, or leave the run out"
        )
    last = _figures(rest)  # a run that is going on, or was killed, may have written half of it
    return tuple(line for line in [*found, last] if line is not None)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _figures(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    if not isinstance(content, dict) or not isinstance(content.get(STEP), int):
        return None
    return content if all(isinstance(value, int | float | None) for value in content.values()) else None
