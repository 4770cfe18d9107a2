"""Where the figures of a run are kept: a file of JSON lines, and TensorBoard."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from deepen.core.errors import DeepenError
from deepen.core.files import write_atomically

# TensorBoard's buckets end between this and 1e20; values beyond it would be in none.
_LARGEST_IN_BUCKETS = 9e19
_SECONDS_TO_FLUSH = 30


class JsonLines:
    """A file with one JSON object a line, the first of whose fields is `step`.

    Every line is on its way to the disk when `append` returns. A kill can leave half a line at the end, which is
    taken away before the next one is written.
    """

    def __init__(self, path: str | Path) -> None:
        """The file is made, with its folder, by the first line."""
        self.path = Path(path)
        self._mended = False

    def append(self, fields: Mapping[str, Any], *, step: int) -> None:
        """Add a line. Numbers that are not finite, which JSON lacks, become null, at any depth.

        Raises `DeepenError` if the file can't be written.
        """
        assert "step" not in fields, "the step is given apart"
        line = json.dumps({"step": step, **finite(fields)}, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._mend()
            with self.path.open("ab") as file:
                # Text may hold half of a surrogate pair, which UTF-8 lacks and JSON's escapes don't.
                file.write(line.encode("utf-8", "backslashreplace"))
        except OSError as cause:
            raise DeepenError(
                f"can't write {self.path}: {cause.strerror}; free some space, or mend the place"
            ) from cause

    def cut_after(self, step: int) -> None:
        """Leave out the lines of later steps and half a line at the end, atomically; without a file, do nothing.

        Raises `DeepenError`, naming the line, for one that `append` has not written.
        """
        if self.path.exists():
            self._rewrite([line for line, fields in self._lines() if fields["step"] <= step])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The object on each whole line; none without a file. Raises as `cut_after` does."""
        if self.path.exists():
            yield from (fields for _, fields in self._lines())

    def _mend(self) -> None:
        if self._mended or not self.path.exists():
            return
        with self.path.open("rb") as file:
            end = file.seek(0, 2)
            file.seek(max(0, end - 1))
            torn = file.read(1) not in (b"", b"\n")
        if torn:
            self._rewrite([line for line, _ in self._lines()])
        self._mended = True

    def _rewrite(self, lines: list[bytes]) -> None:
        with write_atomically(self.path) as temporary:
            temporary.write_bytes(b"".join(line + b"\n" for line in lines))
        self._mended = True

    def _lines(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Each whole line with what it holds; what is behind the last line feed counts if it is all there."""
        *lines, rest = self.path.read_bytes().split(b"\n")
        found = [(line, _object(line)) for line in [*lines, rest]]
        for number, (_, fields) in enumerate(found[:-1], start=1):
            if fields is None:
                raise DeepenError(
                    f"{self.path}, line {number} is not a JSON object with a whole number in step; take the line out, "
                    "or the file away"
                )
        return [(line, fields) for line, fields in found if fields is not None]


class TensorBoard:
    """Event files in a folder, for `tensorboard --logdir FOLDER`."""

    def __init__(self, log_dir: str | Path, *, purge_step: int | None = None) -> None:
        """`purge_step` hides what the folder's earlier files have of this step and later ones: a run goes on there.

        Raises `DeepenError` where TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as cause:
            raise DeepenError(
                f"TensorBoard can't be imported ({cause}): pip install deepen[tensorboard], or leave it out; "
                "train.jsonl has all figures too"
            ) from cause
        self._writer = SummaryWriter(str(log_dir), purge_step=purge_step, flush_secs=_SECONDS_TO_FLUSH)

    def scalars(self, figures: Mapping[str, float | None], *, step: int) -> None:
        """Figures by tag; None is left out."""
        for tag, value in figures.items():
            if value is not None:
                self._writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, values: Tensor | np.ndarray[Any, Any], *, step: int) -> None:
        """How values of any shape are distributed; those that no bucket holds (NaN, beyond 9e19) are left out."""
        flat = bounded(values)
        if flat.size:
            self._writer.add_histogram(tag, flat, step)

    def text(self, tag: str, text: str, *, step: int) -> None:
        """A text, which TensorBoard reads as Markdown."""
        self._writer.add_text(tag, text.encode("utf-8", "backslashreplace").decode(), step)

    def flush(self) -> None:
        """Write what was given so far; otherwise that is done every half a minute."""
        self._writer.flush()

    def close(self) -> None:
        """Write the rest."""
        self._writer.close()


def finite(value: Any) -> Any:
    """Plain JSON types with None for each number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def bounded(values: Tensor | np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The finite values up to 9e19 in size, flat, in float64."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()  # numpy has no bfloat16
    flat = values.astype(np.float64).reshape(-1)
    return flat[np.abs(flat) <= _LARGEST_IN_BUCKETS]


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:  # bad syntax and bad UTF-8
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None
