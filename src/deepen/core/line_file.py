"""A file of JSON lines that is written a few lines at a time, and gone on with if that was cut off.

| file | holds |
|---|---|
| `FILE.jsonl` | a record a line |
| `FILE.jsonl.json` | what makes it: all that decides a record |
"""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepen.core.errors import DeepenError
from deepen.core.files import read_json, write_json


class LineFile:
    """At all times whole lines, but for the last one if a write was cut off."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.note = self.path.with_name(f"{self.path.name}.json")

    def claim(
        self, made_by: Mapping[str, Any], *, not_compared: Collection[str] = (), kinds: Mapping[str, str] | None = None
    ) -> None:
        """Say beside the file what makes it; raises `DeepenError` if it holds what something else has made.

        `made_by` are plain JSON types by name. `kinds` says of names what it is to differ in them, where that isn't
        "other settings".
        """
        if self._is_empty():
            write_json(self.note, made_by)
            return
        if not self.note.exists():
            raise DeepenError(
                f"out {self.path} exists, and no {self.note.name} beside it says what made it; choose another"
            )
        before = read_json(self.note)
        if not isinstance(before, dict):
            raise DeepenError(
                f"{self.note} doesn't say what made {self.path.name}; choose another out, or take both away"
            )
        for name, now in made_by.items():
            if name not in not_compared and before.get(name) != now:
                field, there, here = _difference(name, before.get(name), now)
                raise DeepenError(
                    f"out {self.path} was made by {(kinds or {}).get(name, 'other settings')}: {field} is "
                    f"{json.dumps(there)} there, and {json.dumps(here)} here; choose another out, or take it "
                    f"and {self.note.name} away"
                )

    def whole_lines(self, fits: Callable[[int, Any], bool]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Bytes and record of each line up to one that has no end.

        Raises `DeepenError` for a line that is no object, or for whose index and object `fits` is false.
        """
        if not self.path.exists():
            return
        try:
            with self.path.open("rb") as file:
                for index, line in enumerate(file):
                    if not line.endswith(b"\n"):
                        return
                    record = _object_on(line)
                    if record is None or not fits(index, record):
                        raise DeepenError(
                            f"{self.path}, line {index + 1} is no answer to the prompt it should answer; take the "
                            "file away to make it anew"
                        )
                    yield len(line), record
        except OSError as cause:
            raise DeepenError(f"can't read {self.path}: {cause.strerror}") from cause

    def cut(self, num_bytes: int) -> None:
        """Keep so many bytes, those of whole lines."""
        if not self.path.exists() or self.path.stat().st_size <= num_bytes:
            return
        try:
            os.truncate(self.path, num_bytes)
        except OSError as cause:
            raise self._unwritable(cause) from cause

    def append(self, records: Sequence[Mapping[str, Any]], *, flush: bool = True) -> None:
        """Add a line for each. With `flush` the disk holds them afterwards, without it the system does."""
        lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        try:
            with self.path.open("ab") as file:
                # Text may hold half of a surrogate pair, which UTF-8 lacks and JSON's escapes don't.
                file.write(lines.encode("utf-8", "backslashreplace"))
                file.flush()
                if flush:
                    os.fsync(file.fileno())
        except OSError as cause:
            raise self._unwritable(cause) from cause

    def _is_empty(self) -> bool:
        return not self.path.exists() or (self.path.is_file() and self.path.stat().st_size == 0)

    def _unwritable(self, cause: OSError) -> DeepenError:
        return DeepenError(f"can't write {self.path}: {cause.strerror}; free some space, or mend the place, and go on")


def _difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """The first field inside these two that differs, and what it is in each; the whole of them if they have none."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in {**before, **now}:
            if before.get(key) != now.get(key):
                return _difference(f"{name}.{key}", before.get(key), now.get(key))
    return name, before, now


def _object_on(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # bad syntax and bad UTF-8
        return None
    return record if isinstance(record, dict) else None
