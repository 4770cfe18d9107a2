"""What a training run is: one JSON file."""

from dataclasses import dataclass
from typing import Any, get_args

from deepen.core.config import Config
from deepen.core.hints import did_you_mean
from deepen.core.types import Cut
from deepen.train.schedule import Schedule, Shape

_SEED_LIMIT = 2**63


@dataclass(frozen=True)
class RunConfig(Config):
    """A training run of one method's model on one corpus.

    `model` and `data` have no default, and `output_dir` must be empty or not there: a run never mixes with another.
    """

    # A base model's address, or an adapter folder to go on with.
    model: str
    # A corpus's name or path, in any of the formats that data/formats.py lists; its training documents are read.
    data: str
    # The method to put on a base model. Null for an adapter folder, which has its own, and its own configuration.
    method: str | None = None
    # The method's configuration: a preset's name, a file, or the fields themselves. Null takes its defaults.
    config: str | dict[str, Any] | None = None

    # Optimizer steps; each reads `batch_size` rows of up to `max_length` tokens.
    num_steps: int = 100
    batch_size: int = 8
    max_length: int = 256
    # "document": a row is one document, or a part of it; "packed": rows are full, and may hold several documents, whose
    # tokens see those of the documents before theirs.
    cut: str = "document"
    # For all parameters; null leaves each of the method's groups its own.
    learning_rate: float | None = None
    # Of the learning rates: "constant", "linear", "cosine" or "trapezoid" (schedule.py), behind `warmup_steps`.
    schedule: str = "constant"
    warmup_steps: int = 0
    # The last steps of a trapezoid, in which it comes down.
    decay_steps: int = 0
    # Longest gradient (L2 norm over all parameters); null doesn't shorten it.
    grad_clip: float | None = 1.0
    # Of new parameters, of what the method draws and of the order of the data.
    seed: int = 0

    # Where `run.json`, `train.jsonl` and `step_N/` are written.
    output_dir: str = "checkpoints"
    # Steps from one line of figures to the next; the first and the last step always have one.
    log_every: int = 10

    def validate(self) -> list[str]:
        """One message for each value that no run can have."""
        problems = [f"{name} must not be empty" for name in ("model", "data", "output_dir") if not getattr(self, name)]
        for name, least in (("num_steps", 1), ("batch_size", 1), ("max_length", 2), ("log_every", 1)):
            if getattr(self, name) < least:
                problems.append(f"{name} must be at least {least}, not {getattr(self, name)}")
        for name in ("learning_rate", "grad_clip"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                problems.append(f"{name} must be above 0 or null, not {value}")
        if self.schedule not in get_args(Shape):
            problems.append(f'unknown schedule "{self.schedule}"{did_you_mean(self.schedule, get_args(Shape))}')
        if self.decay_steps and self.schedule != "trapezoid":
            problems.append(f"decay_steps is {self.decay_steps}, which is for the schedule trapezoid alone")
        for name in ("warmup_steps", "decay_steps"):
            if not 0 <= getattr(self, name) <= self.num_steps:
                problems.append(f"{name} must be between 0 and num_steps, not {getattr(self, name)}")
        if self.cut not in get_args(Cut):
            problems.append(f'unknown cut "{self.cut}"{did_you_mean(self.cut, get_args(Cut))}')
        if not 0 <= self.seed < _SEED_LIMIT:
            problems.append(f"seed must be between 0 and 2**63 - 1, not {self.seed}")
        if self.config is not None and self.method is None:
            problems.append("config is given without method; an adapter folder brings its own configuration")
        return problems

    @property
    def learning_rates(self) -> Schedule:
        """The schedule, over the whole run."""
        return Schedule(self.schedule, self.num_steps, self.warmup_steps, self.decay_steps)  # type: ignore[arg-type]
