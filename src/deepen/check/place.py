"""Where an error of a user's code arose, said in terms of that code and not of ours."""

import os
import traceback
from collections.abc import Collection
from pathlib import Path

import torch

import deepen

_NOT_THEIRS = tuple(f"{Path(package.__file__ or '').parent}{os.sep}" for package in (deepen, torch))


def place_of(error: BaseException, own_files: Collection[str] = ()) -> str:
    """`FILE, line N, in NAME` of the innermost frame in one of `own_files`, else of the last outside deepen and torch.

    If there is neither, it is where the error was raised.
    """
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename in own_files]
    others = [frame for frame in frames if not frame.filename.startswith((*_NOT_THEIRS, "<"))]
    chosen = (own or others or list(frames))[-1]
    return f"{shown_path(chosen.filename)}, line {chosen.lineno}, in {chosen.name}"


def shown_path(path: str | Path) -> str:
    """`path` as one would type it here: relative to the working directory if it lies in it."""
    whole = Path(path)
    try:
        return str(whole.relative_to(Path.cwd()))
    except ValueError:
        return str(whole)


def said_by(error: BaseException) -> str:
    """The kind of error and its message, on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
