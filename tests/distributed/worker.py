"""One rank of the tests beside this file: python -m torch.distributed.run --nproc_per_node N worker.py FOLDER.

FOLDER/jobs.json lists runs. Of a run with "gradients" the first step is made, and its losses, its gradients and what it
made of buffers are written; any other is run to its end. A rank that waits for another for good says where, and fails.
"""

import faulthandler
import json
import sys
from pathlib import Path

import torch
from several_ranks import silent, write_first_step

import deepen.methods
from deepen.train.config import RunConfig
from deepen.train.ranks import joined_ranks
from deepen.train.run import train

torch.set_num_threads(1)

LIMIT_SECONDS = 120
"""Of a job, many times what one takes."""

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    deepen.methods.__path__.append(str(Path(__file__).parents[1] / "contract" / "dropped_in"))
    faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
    with joined_ranks():  # once for all jobs
        for job in json.loads((folder / "jobs.json").read_text()):
            faulthandler.dump_traceback_later(LIMIT_SECONDS, exit=True)
            config = RunConfig.from_dict(job["run"])
            if job["gradients"]:
                write_first_step(config, Path(job["gradients"]))
            else:
                train(config, show=silent)
