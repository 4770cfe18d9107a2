"""One rank of test_ranks.py, started by torchrun: python -m torch.distributed.run --nproc_per_node N worker.py FOLDER.

FOLDER/jobs.json lists runs. Of a run with "gradients" the first step is made, and its losses and gradients are written;
any other is run to its end.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import deepen.methods
from deepen.train.config import RunConfig
from deepen.train.module import whole
from deepen.train.ranks import joined_ranks
from deepen.train.run import _Run, train

torch.set_num_threads(1)


def silent(line: str) -> None:
    pass


def write_first_step(config: RunConfig, out: Path) -> None:
    with joined_ranks() as ranks:
        run = _Run(config, ranks, silent)
        report = run.steps.take(0)
        # Every rank takes part in putting a gradient together.
        gradients = {name: whole(p.grad).contiguous() for name, p in run.module.trained_parameters().items()}
        if ranks.is_first:
            save_file(gradients, out / "gradients.safetensors")
            figures = {"losses": report.losses, "total": report.total, "work": report.work.flops}
            figures |= {"tokens": report.num_tokens, "metrics": report.metrics, "norm": report.gradient_norm}
            (out / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    deepen.methods.__path__.append(str(Path(__file__).parents[1] / "contract" / "dropped_in"))
    with joined_ranks():  # once for all jobs
        for job in json.loads((folder / "jobs.json").read_text()):
            config = RunConfig.from_dict(job["run"])
            if job["gradients"]:
                write_first_step(config, Path(job["gradients"]))
            else:
                train(config, show=silent)
