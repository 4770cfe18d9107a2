"""Options that several verbs share: how they are written, and what is read from them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from deepen.core.errors import ConfigError, DeepenError
from deepen.core.files import fault_of

Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
"""A model's address, the first argument without a flag."""

Settings = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")]
"""Configuration fields, one a flag."""

Texts = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TEXT")]
"""Texts, one a flag."""

OptionalText = Annotated[str | None, tyro.conf.arg(metavar="TEXT")]
OptionalFile = Annotated[str | None, tyro.conf.arg(metavar="FILE")]
OptionalName = Annotated[str | None, tyro.conf.arg(metavar="NAME")]
OptionalInteger = Annotated[int | None, tyro.conf.arg(metavar="INT")]
OptionalNumber = Annotated[float | None, tyro.conf.arg(metavar="FLOAT")]


def read_settings(texts: Sequence[str]) -> dict[str, Any]:
    """The fields that `KEY=VALUE` texts set; a value is JSON if it can be read so, else the text itself.

    Raises `ConfigError` for a text without "=", a list or an object that is no JSON, or a key that is set twice.
    Whether there is such a field, and what it may hold, is for its configuration to say.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError(f'--set "{text}" sets nothing; write it as KEY=VALUE, as in --set draft=lookup')
        if key in settings:
            raise ConfigError(f"--set {key} is given more than once; keep one")
        settings[key] = _value(key, value)
    return settings


def require_new_folder(folder: Path) -> None:
    """Raises `DeepenError` if --out is taken: saving would refuse it too, but only after minutes of work."""
    if folder.is_dir() and any(folder.iterdir()):
        raise DeepenError(f"--out {folder} exists and is not empty; choose another folder, or remove it first")
    if folder.exists() and not folder.is_dir():
        raise DeepenError(f"--out {folder} is a file; choose a folder, which may be new")


def _value(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as cause:
        if text.lstrip().startswith(("{", "[")):  # no field's text begins so: it was meant as JSON
            raise ConfigError(f"--set {key}={text} is not JSON: {fault_of(cause)} at column {cause.colno}") from cause
        return text
