"""HTML and SVG put together from elements, in which every text is escaped unless it is markup of ours."""

import html
import re
from collections.abc import Iterable
from typing import Any

_VOID = frozenset({"meta"})
# What no HTML text may hold: control characters other than tab and line feed, and halves of surrogate pairs.
_UNFIT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Markup(str):
    """Finished HTML. Only this module makes it from texts, and it escapes them."""

    __slots__ = ()


def element(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """`<name attributes>children</name>`.

    Children are markup, texts (escaped), numbers, None (nothing), or iterables of these. An attribute that is None is
    left out; `class_` is written class, `stroke_width` stroke-width.
    """
    opened = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{opened}>")
    return Markup(f"<{name}{opened}>{together(children)}</{name}>")


def together(children: Iterable[Any]) -> Markup:
    """One after the other."""
    return Markup("".join(map(_of, children)))


def own(text: str) -> Markup:
    """A text that is markup already, or a style sheet: constants of ours, never anything from data."""
    return Markup(text)


def _of(child: Any) -> str:
    if child is None:
        return ""
    if isinstance(child, Markup):
        return child
    if isinstance(child, str | int | float):
        return _escaped(child)
    return together(child)


def _escaped(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return html.escape(_UNFIT.sub("\ufffd", text), quote=True)
