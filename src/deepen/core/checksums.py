"""SHA-256 of a folder's files, in a list beside them: what was written is what is read."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from deepen.core.errors import CheckpointError
from deepen.core.files import read_json

CHECKSUMS = "checksums.json"


def checksums(folder: Path) -> dict[str, str]:
    """Of every file in the folder, at any depth, but the list itself."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {str(path.relative_to(folder)): digest(path) for path in files}


def digest(path: Path) -> str:
    """Of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_unchanged(folder: Path, names: Iterable[str]) -> None:
    """Raises `CheckpointError` for one of these files that isn't as the folder's list has it.

    A folder without a list, and files that aren't in it, are taken as they are.
    """
    if not (folder / CHECKSUMS).is_file():
        return
    expected = read_json(folder / CHECKSUMS, error=CheckpointError)
    for name in names:
        if name in expected and digest(folder / name) != expected[name]:
            raise CheckpointError(
                f"{folder / name} is not what was saved: its SHA-256 is another than {CHECKSUMS} has; take another "
                f"checkpoint, or fetch it again. If you changed it on purpose, delete {CHECKSUMS}"
            )
