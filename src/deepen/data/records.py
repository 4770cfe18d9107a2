"""Records from files: what a line of JSON or a text file holds, and where it stands.

| file | its records |
|---|---|
| `.txt` | one, `{"text": all of it}` |
| `.jsonl` | the object on each line |

Nothing is left out in silence. A file that can't be read as what it claims to be is an error that names file and
line; what can be read and holds nothing is told about once, with how often it came.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepen.core.errors import DeepenError
from deepen.core.files import fault_of

Split = Literal["train", "validation", "test"]

MAX_LINE_BYTES = 64 * 2**20
"""A longer line is no record but a file without line breaks; tokenizing it would take hours and most of the memory."""

# JSON's escapes can write one; no tokenizer and no UTF-8 file takes it.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Record:
    """An object with named fields, and the place to name if something is wrong with it.

    `made_from` is the text that it was made from, if it was: this decides the split then (split.py). `split` is the
    one that it was made for, if it was made for one: nothing else decides then.
    """

    fields: Mapping[str, Any]
    place: str
    made_from: str | None = None
    split: Split | None = None

    def text(self, name: str) -> str:
        """The string in field `name`; raises `DeepenError` naming the place if there is none that is text."""
        value = self.fields.get(name)
        if not isinstance(value, str):
            found = f"it holds {type(value).__name__}" if name in self.fields else f"its fields are {_listed(self)}"
            raise DeepenError(f'{self.place}: expected an object with a string in "{name}"; {found}')
        return require_text(value, self.place, name)


def require_text(value: str, place: str, name: str) -> str:
    """`value`, unless it holds half of a surrogate pair, which is no text."""
    if _LONE_SURROGATE.search(value):
        raise DeepenError(f'{place}: "{name}" holds half of a surrogate pair, which is no text')
    return value


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file that `READERS` knows. Raises `DeepenError` naming file and line; warns of an empty file."""
    count = 0
    try:
        for record in READERS[path.suffix](path):
            count += 1
            yield record
    except UnicodeDecodeError as cause:
        raise DeepenError(f"{path} is not UTF-8 text (byte {cause.start}); convert it, as with iconv") from cause
    except OSError as cause:
        raise DeepenError(f"can't read {path}: {cause.strerror}") from cause
    if count == 0:
        warnings.warn(f"{path} is empty: it has no record", stacklevel=2)


def _read_txt(path: Path) -> Iterator[Record]:
    text = path.read_text(encoding="utf-8-sig")
    if text:
        yield Record({"text": text}, str(path))


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        yield from json_records(_lines(file, source=str(path)), source=str(path))


def _lines(file: Any, *, source: str) -> Iterator[str]:
    """Lines of UTF-8, none of which is read beyond the bound; only a line feed ends a line."""
    number = offset = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DeepenError(
                f"{source}, line {number} is longer than {MAX_LINE_BYTES // 2**20} MiB; is it one JSON document? "
                "A .jsonl file has one object a line: split it, or give text as .txt files"
            )
        yield _decoded(line, offset).removeprefix("\ufeff" if number == 1 else "")
        offset += len(line)


def _decoded(line: bytes, offset: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as cause:  # its position, counted in the file
        raise UnicodeDecodeError("utf-8", line, cause.start + offset, cause.end + offset, cause.reason) from None


def json_records(lines: Iterable[str], *, source: str) -> Iterator[Record]:
    """The object on each line that is not blank."""
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        place = f"{source}, line {number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as cause:
            raise DeepenError(f"{place}, column {cause.colno}: {fault_of(cause)}") from cause
        except RecursionError as cause:
            raise DeepenError(f"{place}: brackets are nested too deep") from cause
        if not isinstance(fields, dict):
            raise DeepenError(f"{place}: expected an object in braces, found {type(fields).__name__}")
        yield Record(fields, place)


def _listed(record: Record) -> str:
    return ", ".join(record.fields) or "none"


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {".txt": _read_txt, ".jsonl": _read_jsonl}
