"""An HTML page read strictly: every tag closed in order, every reference within the page, nothing that runs."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Self

VOID = {"meta"}
_STYLES = {"style", "fill", "stroke", "filter", "mask", "clip-path", "marker-end", "cursor"}
_URL = re.compile(r"url\(\s*([^)]*)\)|@import")


class StrictPage(HTMLParser):
    """What is on the page: `elements` as (tag, attributes) in order, `text` without styles, `ids`."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.ids: set[str] = set()
        self._open: list[str] = []
        self._pieces: list[str] = []
        self._references: list[str] = []

    @classmethod
    def read(cls, page: str) -> Self:
        """Fails an assertion for whatever is not in order."""
        found = cls()
        assert page.startswith("<!DOCTYPE html>\n")
        found.feed(page)
        found.close()
        assert not found._open, f"left open: {found._open}"
        for reference in found._references:
            assert reference.startswith("#"), f"leads outside: {reference}"
            assert reference[1:] in found.ids, f"leads nowhere: {reference}"
        return found

    @classmethod
    def of(cls, path: Path) -> Self:
        """The page in a file."""
        return cls.read(path.read_text(encoding="utf-8"))

    @property
    def text(self) -> str:
        """All that is to be read, each piece on a line."""
        return "\n".join(piece for piece in map(str.strip, self._pieces) if piece)

    def all(self, tag: str, **attributes: str) -> list[dict[str, str]]:
        """The attributes of all elements of a tag that have these."""
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag} has an attribute twice: {names}"
        assert tag not in ("script", "iframe", "object", "embed", "link", "img", "base"), f"a page has no {tag}"
        found = {name: value for name, value in attrs if value is not None}
        assert len(found) == len(attrs), f"{tag} has an attribute without a value: {names}"
        assert not [name for name in names if name.startswith("on")], f"{tag} runs something: {names}"
        if "id" in found:
            assert found["id"] not in self.ids, f"two elements are called {found['id']}"
            self.ids.add(found["id"])
        self._references += [found[name] for name in ("src", "href", "xlink:href", "action", "data") if name in found]
        for name in found.keys() & _STYLES:
            self._references += [each.group(1) or "@import" for each in _URL.finditer(found[name])]
        self.elements.append((tag, found))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> inside {self._open}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            assert not _URL.search(data), "the style fetches something"
        else:
            self._pieces.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data}")
