"""What a training run is: one JSON file."""

import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from deepen.core.config import Config
from deepen.core.errors import ConfigError
from deepen.core.hints import did_you_mean
from deepen.core.types import Cut
from deepen.train.optim import OptimizerName
from deepen.train.schedule import Schedule, Shape

BUDGETS = "num_steps", "num_tokens", "flops"

_SEED_LIMIT = 2**63
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_CHOICES: dict[str, tuple[str, ...]] = {
    "schedule": get_args(Shape),
    "cut": get_args(Cut),
    "optimizer": get_args(OptimizerName),
    "precision": ("float32", "bfloat16"),
    "adapter_dtype": ("float32", "bfloat16"),
    "parallel": ("replicate", "shard"),
}
_LEAST = {
    "num_steps": 1, "num_tokens": 1, "batch_size": 1, "max_length": 2, "num_micro_batches": 1, "warmup_steps": 0,
    "decay_steps": 0, "log_interval": 1, "save_interval": 1, "keep_checkpoints": 1, "eval_interval": 1,
    "eval_tokens": 1, "num_samples": 0, "sample_tokens": 1,
}  # fmt: skip


@dataclass(frozen=True)
class RunConfig(Config):
    """A training run of one method's model on one corpus.

    `model`, `data` and a budget have no default. `output_dir` is empty, not there, or this run's own: no two mix.
    """

    # A base model's address, or an adapter folder to go on with.
    model: str
    # A corpus's name or path, in any of the formats that data/formats.py lists; its training documents are read.
    data: str
    # The method to put on a base model. Null for an adapter folder, which has its own, and its own configuration.
    method: str | None = None
    # The method's configuration: a preset's name, a file, or the fields themselves. Null takes its defaults.
    config: str | dict[str, Any] | None = None
    # Fields of that configuration, or of an adapter folder's own, to set differently: how a later phase goes on.
    overrides: dict[str, Any] | None = None

    # One of three budgets: optimizer steps; or tokens, or training FLOPs by the ledger, from which the number of steps
    # is laid out before the first one.
    num_steps: int | None = None
    num_tokens: int | None = None
    flops: float | None = None
    # Rows of a step, over all ranks and micro-batches, each of up to `max_length` tokens.
    batch_size: int = 8
    max_length: int = 256
    # Parts that each rank's rows are divided into, one forward and backward each: less memory, the same step.
    num_micro_batches: int = 1
    # "document": a row is one document, or a part of it; "packed": rows are full, and may hold several documents, whose
    # tokens see those of the documents before theirs.
    cut: str = "document"

    # "adamw" over the method's groups; "muon": the same with Muon for matrices, but for embedding and head.
    optimizer: str = "adamw"
    # For all parameters; null leaves each of the method's groups its own; "auto" follows the width of a nanochat
    # (backbones/dial.py), and is that number in what the run writes.
    learning_rate: float | Literal["auto"] | None = None
    # Of the learning rates: "constant", "linear", "cosine" or "trapezoid" (schedule.py), behind `warmup_steps`.
    schedule: str = "constant"
    warmup_steps: int = 0
    # The last steps of a trapezoid, in which it comes down.
    decay_steps: int = 0
    # Longest gradient (L2 norm over all parameters); null doesn't shorten it.
    grad_clip: float | None = 1.0
    # The run ends when its loss, smoothed, is so many times the lowest it has been; null lets it go on.
    divergence_factor: float | None = 3.0
    # Of a moving average of the parameters, which is then what is saved and evaluated; null keeps none.
    average_decay: float | None = None

    # "float32", or "bfloat16" for matrix products where the device has instructions for them.
    precision: str = "float32"
    # Several processes (torchrun): each holds all ("replicate"), or its part of every tensor ("shard", FSDP2).
    parallel: str = "replicate"
    # Keep no activations inside layers, and run each layer's forward again for its backward.
    recompute: bool = False
    # Compile layers: worth its minutes on long runs.
    compile: bool = False

    # Of new parameters, of what the method draws and of the order of the data.
    seed: int = 0

    # Where `run.json`, `train.jsonl` and `step_N/` are written. The same run goes on from its last checkpoint there.
    output_dir: str = "checkpoints"
    # A checkpoint of another run of the same model, data and seed to begin from, under this one's schedule: a cooldown
    # from a trapezoid's plateau.
    branch_from: str | None = None
    # Steps from one line of figures to the next; the first and the last step always have one.
    log_interval: int = 10
    # Steps from one checkpoint to the next; null saves the last state alone.
    save_interval: int | None = None
    # Newest checkpoints to keep; null keeps all.
    keep_checkpoints: int | None = 2
    # Of an adapter's tensors as they are saved: "bfloat16" takes half the space. What a run goes on from keeps float32.
    adapter_dtype: str = "float32"
    # Steps from one look at validation documents to the next, `eval_tokens` of them at most; null looks never.
    eval_interval: int | None = None
    eval_tokens: int = 20_000
    # What the model continues at the same steps: these texts, or the beginnings of so many validation documents.
    sample_prompts: tuple[str, ...] = ()
    num_samples: int = 0
    sample_tokens: int = 64
    # Also write event files for TensorBoard (pip install deepen[tensorboard]).
    tensorboard: bool = False
    # A repository of the model hub, OWNER/NAME, to upload the trained model to; made private if it isn't there.
    push_to_hub: str | None = None

    def validate(self) -> list[str]:
        """One message for each value that no run can have."""
        problems = [f"{name} must not be empty" for name in ("model", "data", "output_dir") if not getattr(self, name)]
        problems += self._numbers_out_of_range()
        if self.push_to_hub is not None and not _REPOSITORY.fullmatch(self.push_to_hub):
            problems.append(f'push_to_hub must be OWNER/NAME, a repository of the model hub, not "{self.push_to_hub}"')
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                problems.append(f'unknown {name} "{getattr(self, name)}"{did_you_mean(getattr(self, name), known)}')
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) != 1:
            problems.append(f"give one of {', '.join(BUDGETS)}, not {' and '.join(budgets) or 'none of them'}")
        if self.decay_steps and self.schedule != "trapezoid":
            problems.append(f"decay_steps is {self.decay_steps}, which is for the schedule trapezoid alone")
        if not 0 <= self.seed < _SEED_LIMIT:
            problems.append(f"seed must be between 0 and 2**63 - 1, not {self.seed}")
        if self.config is not None and self.method is None:
            problems.append("config is given without method; an adapter folder brings its own configuration")
        return problems

    def _numbers_out_of_range(self) -> list[str]:
        problems = []
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                problems.append(f"{name} must be at least {least}, not {value}")
        for name in ("learning_rate", "grad_clip", "flops"):
            value = getattr(self, name)
            if value not in (None, "auto") and value <= 0:
                problems.append(f"{name} must be above 0 or null, not {value}")
        if self.learning_rate == "auto" and self.optimizer != "muon":
            problems.append(
                f"learning_rate auto is for Muon's and AdamW's steps together, and optimizer is {self.optimizer}; set "
                "optimizer to muon, or learning_rate to a number"
            )
        if self.divergence_factor is not None and self.divergence_factor <= 1:
            problems.append(f"divergence_factor must be above 1 or null, not {self.divergence_factor}")
        if self.average_decay is not None and not 0 < self.average_decay < 1:
            problems.append(f"average_decay must be between 0 and 1, or null, not {self.average_decay}")
        if self.num_steps is not None:
            problems += [
                f"{name} must be at most num_steps, {self.num_steps}, not {getattr(self, name)}"
                for name in ("warmup_steps", "decay_steps")
                if getattr(self, name) > self.num_steps
            ] or self._overlap(self.num_steps, "num_steps")
        if self.eval_interval is None and (self.sample_prompts or self.num_samples):
            problems.append("samples are drawn every eval_interval steps, which is not given")
        return problems

    def _overlap(self, num_steps: int, called: str) -> list[str]:
        """A message if the rate would come down before it is up."""
        if self.warmup_steps + self.decay_steps <= num_steps:
            return []
        return [
            f"warmup_steps and decay_steps must be at most {called}, {num_steps}, together, not {self.warmup_steps} "
            f"and {self.decay_steps}"
        ]

    def learning_rates(self, num_steps: int) -> Schedule:
        """The schedule over a run of so many steps; raises `ConfigError` if these are too few for it.

        Of a budget in steps this is known before; of others, when they are laid out.
        """
        if too_few := self._overlap(num_steps, "the run's steps"):
            raise ConfigError(f"{too_few[0]}; give a larger budget or lower them")
        return Schedule(self.schedule, num_steps, self.warmup_steps, self.decay_steps)  # type: ignore[arg-type]
