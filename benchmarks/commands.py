"""What benchmarks that train share: commands of deepen in processes of their own, what their runs leave, intervals."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

T_OF_THREE = 4.303
"""Of Student's t with two degrees of freedom, as three seeds leave: 95 % lie within so many standard errors."""


def deepen(*arguments: str, log: Path, threads: int = 2) -> None:
    """A command of deepen in a process of its own, whose output goes to `log`; a failure ends the benchmark."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    with log.open("a") as file:
        command = [sys.executable, "-m", "deepen", *arguments]
        done = subprocess.run(command, stdout=file, stderr=file, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"`deepen {' '.join(arguments)}` failed; see {log}")
    print("done: deepen", *arguments, flush=True)


def checkpoints(folder: Path) -> list[Path]:
    """Of a run."""
    return list(folder.glob("step_*"))


def step_of(checkpoint: Path) -> int:
    """After which it was saved."""
    return int(checkpoint.name.removeprefix("step_"))


def last_checkpoint(folder: Path) -> Path:
    """Of a run."""
    return max(checkpoints(folder), key=step_of)


def interval_of(values: Sequence[float]) -> list[float] | None:
    """Of their mean, 95 %, by Student's t over three seeds; None for another number of them."""
    if len(values) != 3:
        return None
    half = T_OF_THREE * stdev(values) / len(values) ** 0.5
    return [fmean(values) - half, fmean(values) + half]
