"""The folder of a run: whose it is, and which checkpoints are in it."""

import json
import re
import shutil
from collections.abc import Container, Iterable
from pathlib import Path

from deepen.core.errors import DeepenError
from deepen.core.files import read_json
from deepen.train.config import RunConfig


def claim(folder: Path, config: RunConfig, *, may_differ: Container[str]) -> None:
    """Raises `DeepenError` if the folder holds something else than this run; some fields may differ from its own."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "run.json").is_file():
        raise DeepenError(
            f"output_dir {config.output_dir} is not an empty folder, and holds no run; choose another, so that runs "
            "don't mix"
        )
    before = read_json(folder / "run.json")
    now = config.to_dict()
    different = [name for name in now if name not in may_differ and before.get(name) != now[name]]
    if different:
        name = different[0]
        raise DeepenError(
            f"output_dir {config.output_dir} holds another run: {name} is {json.dumps(before.get(name))} there, and "
            f"{json.dumps(now[name])} here; choose another, so that runs don't mix"
        )


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a run, the last one first; none where the folder isn't there."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := re.fullmatch(r"step_(\d+)", path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def rotate(folder: Path, *, keep: int | None) -> None:
    """Remove all checkpoints but the newest `keep`; None removes none."""
    for old in checkpoints_in(folder)[keep:] if keep is not None else ():
        # Under its name a checkpoint is whole, also while it goes away.
        going = old.with_name(f".{old.name}.old")
        old.rename(going)
        shutil.rmtree(going)


def clear_leftovers(folder: Path) -> None:
    """Remove what a kill left of a checkpoint that was being written or removed."""
    for left in folder.glob(".step_*"):
        shutil.rmtree(left)


def set_aside(refused: Iterable[Path]) -> None:
    """Give bad checkpoints other names: the run comes by their steps again, and they are not its newest."""
    for folder in refused:
        aside = folder.with_name(f"{folder.name}.refused")
        if aside.exists():
            shutil.rmtree(aside)
        folder.rename(aside)
