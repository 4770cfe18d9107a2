"""Several processes of this machine, one a rank, that work through a list of jobs; and what they leave behind."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepen.train.config import RunConfig
from deepen.train.module import whole
from deepen.train.ranks import joined_ranks
from deepen.train.run import _Run

WORKER = Path(__file__).parent / "distributed" / "worker.py"


def start(folder: Path, jobs: list[dict[str, Any]], *, world_size: int) -> None:
    """Run worker.py's jobs on so many ranks; `folder` is where they are written down."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(WORKER), str(folder)], check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]


def silent(line: str) -> None:
    """Show nothing."""


class Gathers(TorchDispatchMode):
    """Counts how often ranks put their shards of something together."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += "allgather" in str(func)
        return func(*args, **kwargs or {})


def write_first_step(config: RunConfig, out: Path) -> None:
    """Make the first step of a run, on the ranks there are, and write its figures, gradients and buffers."""
    with joined_ranks() as ranks:
        run = _Run(config, ranks, silent)
        with Gathers() as gathers:
            report = run.steps.take(0)
        # Every rank takes part in putting a gradient together.
        gradients = {name: whole(p.grad).contiguous() for name, p in run.module.trained_parameters().items()}
        if ranks.is_first:
            save_file(gradients, out / "gradients.safetensors")
            save_file(run.module.own_buffers(), out / "buffers.safetensors")
            figures = {"losses": report.losses, "total": report.total, "work": report.work.flops}
            figures |= {"tokens": report.num_tokens, "metrics": report.metrics, "norm": report.gradient_norm}
            figures |= {"gathers": gathers.number}
            (out / "figures.json").write_text(json.dumps(figures))


@dataclass(frozen=True)
class Made:
    """What became of one run, and of its first step, which `write_first_step` wrote to the folder `first_step`."""

    run: RunConfig
    first_step: Path

    def figures(self) -> dict[str, Any]:
        figures: dict[str, Any] = json.loads((self.first_step / "figures.json").read_text())
        return figures

    def first(self, what: str) -> dict[str, Tensor]:
        """Its gradients, or its buffers."""
        return load_file(self.first_step / f"{what}.safetensors")

    def step(self, number: int) -> Path:
        """A checkpoint of the run."""
        return Path(self.run.output_dir) / f"step_{number}"

    def losses(self) -> list[float]:
        lines = (Path(self.run.output_dir) / "train.jsonl").read_text().splitlines()
        return [json.loads(line)["train/loss/total"] for line in lines]
