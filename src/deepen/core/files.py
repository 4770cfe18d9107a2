"""Files and folders that are either whole or not there, and JSON that names the line where it goes wrong.

Everything is written beside its final place, flushed to the disk and renamed. An exception removes what was
begun; a kill can leave a hidden `.NAME.XXXXXXXX.tmp` behind, but never a half-written NAME.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from deepen.core.errors import DeepenError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes `path` if the block succeeds, and is removed if it fails.

    Missing parent folders are made. Raises `DeepenError` if the disk is full or the place can't be written to;
    what was at `path` before is then untouched.
    """
    target = Path(path).resolve()
    with _beside(target, shown=path) as temporary:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(target.parent)


@contextlib.contextmanager
def write_folder_atomically(folder: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary, empty folder to fill; it becomes `folder` if the block succeeds, and is removed if it fails.

    Raises `DeepenError` as `write_atomically` does, and before the block if `folder` holds something and `replace`
    is false. With `replace` the old folder is set aside until the new one has its name: a kill between the two
    renames leaves the old one, whole, as a hidden `.NAME.XXXXXXXX.old`.
    """
    target = Path(folder).resolve()
    if not replace and target.is_dir() and any(target.iterdir()):
        raise DeepenError(f"{folder} exists and is not empty; choose another folder, or ask to replace it")
    with _beside(target, shown=folder) as temporary:
        temporary.mkdir()
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            _flush(written)
        if replace and target.is_dir():
            _exchange(temporary, target)
        else:
            temporary.rename(target)
        _flush(target.parent)


def write_json(path: str | Path, data: Any) -> None:
    """Write `data` as indented JSON, atomically. NaN and infinities, which JSON lacks, raise `ValueError`."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with write_atomically(path) as temporary:
        # UTF-8 has no lone surrogates (undecodable file names hold some), but JSON's \udcXX escapes do.
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def read_json(path: str | Path, *, error: type[DeepenError] = DeepenError) -> Any:
    """What the JSON file at `path` holds.

    Raises `error`, naming the file and, for bad syntax, line and column. Stricter than the json module: NaN,
    infinities and a key given twice in one object are errors.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            twice = ", ".join(json.dumps(key) for key, count in counts.items() if count > 1)
            raise error(f"{path}: {twice} is given more than once in one object; keep one")
        return found

    def refuse(constant: str) -> NoReturn:
        raise error(f"{path}: {constant} is not a JSON number; write a finite number or null")

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except json.JSONDecodeError as cause:
        raise error(f"{path}, line {cause.lineno}, column {cause.colno}: {fault_of(cause)}") from cause
    except UnicodeDecodeError as cause:
        raise error(f"{path} is not UTF-8 text (byte {cause.start}); is it a JSON file?") from cause
    except RecursionError as cause:
        raise error(f"{path} is nested too deeply to be read") from cause
    except OSError as cause:
        raise error(f"can't read {path}: {cause.strerror}") from cause


def fault_of(cause: json.JSONDecodeError) -> str:
    """What is wrong with a JSON text, to stand behind its place: some of the module's messages lead up to one."""
    return cause.msg.removesuffix(" at").removesuffix(" starting")


@contextlib.contextmanager
def _beside(target: Path, *, shown: str | Path) -> Iterator[Path]:
    """A hidden name in `target`'s folder, gone after a failure; a failure to write is told in terms of `shown`."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except BaseException as cause:
        _remove(temporary)
        reason = _failure_to_write(cause, temporary)
        if reason is None:
            raise
        raise DeepenError(f"can't write {shown}: {reason}; nothing half-written was left") from cause


def _failure_to_write(cause: BaseException, temporary: Path) -> str | None:
    """Why the disk refused, with a way out; None for any other failure, which is the caller's own."""
    for code in _DISK_FULL:
        # Writers in other languages wrap the error: theirs has no errno, only the system's words for it.
        if getattr(cause, "errno", None) == code or os.strerror(code) in str(cause):
            return f"{os.strerror(code)}, {_free_space(temporary.parent)}. Free some space or write elsewhere"
    if isinstance(cause, OSError) and _concerns(cause, temporary):
        return f"{cause.strerror}. Choose another place or mend this one"
    return None


def _concerns(cause: OSError, temporary: Path) -> bool:
    """Whether the system complained about the temporary path, something in it, or a folder above it."""
    names = [Path(name) for name in (cause.filename, cause.filename2) if isinstance(name, str | Path)]
    return any(name == temporary or temporary in name.parents or name in temporary.parents for name in names)


def _free_space(folder: Path) -> str:
    existing = next(place for place in [folder, *folder.parents] if place.exists())
    return f"{shutil.disk_usage(existing).free / 1e6:,.1f} MB are free in {existing}"


def _exchange(new: Path, target: Path) -> None:
    """Give `target`'s name to the folder `new`, and remove the folder that had it."""
    old = new.with_suffix(".old")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old)


def _remove(path: Path) -> None:
    """Remove what is there; a failure to do so must not hide the failure that led here."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _flush(path: Path) -> None:
    """Wait until the disk holds `path`: else a power cut after the rename could leave the new name empty."""
    descriptor = os.open(path, os.O_RDONLY)
    # Some network file systems can't flush a folder; a file's failure to reach the disk must be heard of.
    tolerated = contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext()
    try:
        with tolerated:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
