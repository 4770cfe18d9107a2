"""A training run from its configuration to its last checkpoint, and on from wherever it was cut off."""

import json
import math
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from deepen.checkpoint import write_adapter
from deepen.core.errors import CheckpointError, ConfigError, DeepenError
from deepen.core.files import read_json, write_atomically, write_json
from deepen.core.types import Progress, Work
from deepen.data.formats import document_of
from deepen.data.loader import Loader
from deepen.data.rows import Rows, cut_rows
from deepen.data.split import records_of
from deepen.data.tokens import TokenCorpus
from deepen.metrics.ledger import RunLedger, count_parameters
from deepen.train.average import Average
from deepen.train.config import RunConfig
from deepen.train.module import StepModule, whole
from deepen.train.optim import freeze_base, make_optimizers
from deepen.train.precision import autocast_dtype
from deepen.train.ranks import Ranks, joined_ranks
from deepen.train.resume import TrainingState, checkpoints_in, load_carry, load_tensors, read_facts, save_checkpoint
from deepen.train.step import NotFinite, StepReport, Steps
from deepen.train.trainee import Trainee, open_trainee

LEDGER = "ledger.json"
"""Beside a saved model: its parameters, and what the run that made it has cost."""

# Steps that a budget in FLOPs is laid out by: a method may draw how much it computes, so one alone could mislead.
_NUM_STEPS_SURVEYED = 16

# What a run that goes on may be told differently: where it writes and how often, and how its steps are divided.
_FREE = {
    "output_dir",
    "log_interval",
    "save_interval",
    "keep_checkpoints",
    "branch_from",
    "parallel",
    "num_micro_batches",
}
# What a branch may do differently from the run it leaves.
_FREE_TO_BRANCH = _FREE | {
    "num_steps", "num_tokens", "flops", "schedule", "warmup_steps", "decay_steps", "divergence_factor", "learning_rate",
}  # fmt: skip


def train(config: RunConfig, *, show: Callable[[str], None] = print) -> Path:
    """Run it, or go on with it, and give the folder of the trained model, `output_dir/step_N`.

    `show` gets a line now and then. The same configuration on the same machine gives the same parameters, however often
    it was cut off and started again; torch's generators are seeded. Under torchrun every rank calls this.

    Raises `DeepenError` for what can't be run, and for a loss that is not finite once the last good state is saved.
    """
    config.check()
    with joined_ranks() as ranks:
        return _Run(config, ranks, show).finish()


class _Run:
    """One run, with everything that it moves."""

    def __init__(self, config: RunConfig, ranks: Ranks, show: Callable[[str], None]) -> None:
        self.config, self.ranks = config, ranks
        self.show = show if ranks.is_first else lambda line: None
        self.folder = Path(config.output_dir).expanduser()
        _claim(self.folder, config)
        torch.manual_seed(config.seed)
        self.trainee = open_trainee(config)
        self.trainee.model.train()
        base = self.trainee.backbone.model
        base.eval()  # a base's dropout would hide what it knows from what is trained on it
        self.module = StepModule(self.trainee.model, base)
        self.loader = Loader(rows_of_run(config, self.trainee), rows_per_step=config.batch_size, seed=config.seed)
        freeze_base(self.trainee.model, base)  # what is frozen decides what a step costs, and how it is sharded
        self.num_steps = self._planned_steps()
        self._wrap()
        self.optimizers = make_optimizers(
            self.trainee.model,
            base,
            name=config.optimizer,  # type: ignore[arg-type]  # it was checked
            learning_rate=config.learning_rate,
        )
        parameters = self.module.trained_parameters()
        decay = config.average_decay
        average = Average(parameters, decay=decay) if decay is not None else None
        self.state = TrainingState(self.module, self.optimizers, average)
        self.ledger = RunLedger()
        device = self.trainee.backbone.device
        self.steps = Steps(
            self.module,
            self.optimizers,
            self.loader.step,
            num_steps=self.num_steps,
            seed=config.seed,
            num_micro_batches=config.num_micro_batches,
            grad_clip=config.grad_clip,
            schedule=config.learning_rates(self.num_steps),
            autocast=autocast_dtype(config.precision, device),
            device=device,
            ranks=ranks,
        )
        self.log = _Log(self.folder / "train.jsonl", config, self.num_steps, self.show)
        self.last: StepReport | None = None

    def finish(self) -> Path:
        """Make the steps that are left, and save the last state."""
        first = self._restore()
        if first == self.num_steps:
            self.show(f"the run is finished: {self._step_folder(first)}")
            return self._step_folder(first)
        if self.ranks.is_first:
            self.log.begin_after(first)
        try:
            for index in range(first, self.num_steps):
                self._take(index)
        except NotFinite as stopped:
            if self.last is None:
                raise
            folder = self._save(self.last)
            raise NotFinite(f"{stopped}; the state after step {self.last.step} is in {folder}") from stopped
        return self._step_folder(self.num_steps)

    def _take(self, index: int) -> None:
        report = self.steps.take(index)
        self.last = report
        if self.state.average is not None:
            self.state.average.update()
        self.ledger.trained(report.work, num_tokens=report.num_tokens)
        if self.ranks.is_first:
            if not (self.folder / "run.json").exists():  # a run that can't make a step leaves nothing behind
                self.config.save(self.folder / "run.json")
            self.log.take(report, self.ledger.training)
        is_due = self.config.save_interval is not None and report.step % self.config.save_interval == 0
        if is_due or report.step == self.num_steps:
            self._save(report)

    # Before the first step

    def _wrap(self) -> None:
        if self.config.recompute:
            self.module.checkpoint_activations()
        if self.config.compile:
            self.module.compile_units()
        if self.config.parallel == "shard":
            if not self.ranks.are_many:
                raise ConfigError("parallel is shard, which needs several processes: start it with torchrun")
            self.module.shard()

    def _planned_steps(self) -> int:
        config = self.config
        if config.num_steps is not None:
            return config.num_steps
        if config.num_tokens is not None:
            return max(1, math.ceil(config.num_tokens / self.loader.mean_tokens))
        assert config.flops is not None, "a checked configuration has one budget"
        model, work = self.trainee.model, Work()
        for index in range(_NUM_STEPS_SURVEYED):
            torch.manual_seed(index)
            prepared = model.prepare(self.loader.step(index), Progress(index, _NUM_STEPS_SURVEYED))
            work += model.step_work(prepared)
        return max(1, int(config.flops * _NUM_STEPS_SURVEYED / work.flops))

    # Checkpoints

    def _step_folder(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _save(self, report: StepReport) -> Path:
        folder = self._step_folder(report.step)
        if self.ranks.from_first(folder.exists()):
            return folder
        tensors = {name: whole(tensor).detach().cpu() for name, tensor in self._saved_model().items()}
        facts = {
            "step": report.step,
            "num_steps": self.num_steps,
            "run": self.config.to_dict(),
            "method": self.trainee.method.name,
            "method_config": self.trainee.model.config.to_dict(),
            "base": self.trainee.identity.fingerprint,
            "tokenizer": self.trainee.identity.tokenizer,
            "data": self.loader.facts(),
            "ledger": _ledger_facts(self.ledger),
        }

        def write_model(begun: Path) -> None:
            trainee = self.trainee
            write_adapter(begun, method=trainee.method, model=trainee.model, identity=trainee.identity, tensors=tensors)
            write_json(begun / "metrics.json", {"step": report.step, **tagged(report)})
            parameters = count_parameters(trainee.backbone.model, trainee.model)
            figures = {f"parameters_{name}": count for name, count in vars(parameters).items()}
            write_json(begun / LEDGER, {**figures, **self.ledger.training_figures()})

        save_checkpoint(
            folder, state=self.state, facts=facts, carry=self.steps.carry, ranks=self.ranks, write_model=write_model
        )
        if self.ranks.is_first:
            self._rotate()
        return folder

    def _saved_model(self) -> Mapping[str, torch.Tensor]:
        """What the method saves: with averages for parameters, where there are some."""
        if self.state.average is None:
            return dict(self.trainee.model.saved_state())
        with self.state.average.in_place():
            return {name: tensor.detach().clone() for name, tensor in self.trainee.model.saved_state().items()}

    def _rotate(self) -> None:
        keep = self.config.keep_checkpoints
        for old in checkpoints_in(self.folder)[keep:] if keep is not None else ():
            # Under its name a checkpoint is whole, also while it goes away.
            going = old.with_name(f".{old.name}.old")
            old.rename(going)
            shutil.rmtree(going)

    def _restore(self) -> int:
        """Take back the newest checkpoint that is whole and of this run; gives the number of steps made."""
        if self.ranks.is_first and self.folder.is_dir():
            for left in self.folder.glob(".step_*"):  # by a kill while it was written or removed
                shutil.rmtree(left)
        self.ranks.wait()
        own = checkpoints_in(self.folder) if self.folder.is_dir() else []
        refused = []
        for folder in own:
            try:
                return self._load(folder, free=_FREE)
            except CheckpointError as cause:
                refused.append(str(cause))
                warnings.warn(f"{cause}; going back to the checkpoint before it", stacklevel=2)
        if refused:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be gone on from ({refused[0]}); choose another output_dir to "
                "begin anew"
            )
        if self.config.branch_from is not None:
            return self._load(Path(self.config.branch_from).expanduser(), free=_FREE_TO_BRANCH)
        return 0

    def _load(self, folder: Path, *, free: set[str]) -> int:
        facts = read_facts(folder)
        self._require_same(folder, facts, free)
        self.loader.require_same(facts["data"])
        load_tensors(folder, state=self.state, ranks=self.ranks)
        self.steps.carry = load_carry(folder, facts, device=self.trainee.backbone.device, ranks=self.ranks)
        self.steps.has_begun = True
        self.ledger = _ledger_from(facts["ledger"])
        step = int(facts["step"])
        if step > self.num_steps:
            raise CheckpointError(f"{folder} is at step {step}, and the run ends at {self.num_steps}")
        return step

    def _require_same(self, folder: Path, facts: Mapping[str, Any], free: set[str]) -> None:
        own = {
            "method": self.trainee.method.name,
            "method_config": self.trainee.model.config.to_dict(),
            "base": self.trainee.identity.fingerprint,
            "tokenizer": self.trainee.identity.tokenizer,
        }
        different = [name for name, value in own.items() if facts[name] != value]
        now = self.config.to_dict()
        different += [name for name in now if name not in free and facts["run"].get(name) != now[name]]
        if different:
            name = different[0]
            was, is_now = (each.get(name, own.get(name)) for each in ({**facts, **facts["run"]}, {**now, **own}))
            raise CheckpointError(f"{folder} is of another run: {name} was {was} and is {is_now}")


def _claim(folder: Path, config: RunConfig) -> None:
    """Raises `DeepenError` if the folder holds something else than this run."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "run.json").is_file():
        raise DeepenError(
            f"output_dir {config.output_dir} is not an empty folder, and holds no run; choose another, so that runs "
            "don't mix"
        )
    before = read_json(folder / "run.json")
    now = config.to_dict()
    different = [name for name in now if name not in _FREE and before.get(name) != now[name]]
    if different:
        name = different[0]
        raise DeepenError(
            f"output_dir {config.output_dir} holds another run: {name} is {json.dumps(before.get(name))} there, and "
            f"{json.dumps(now[name])} here; choose another, so that runs don't mix"
        )


def rows_of_run(config: RunConfig, trainee: Trainee) -> Rows:
    """The rows of the corpus that a run reads. Raises `DeepenError` if there are none, or they don't fit the model."""
    context = trainee.backbone.context_length
    if context is not None and config.max_length > context:
        raise ConfigError(f"max_length is {config.max_length}, but the model's context is {context}")
    documents = (document_of(record) for record in records_of(config.data, "train"))
    corpus = TokenCorpus.of(documents, trainee.tokenizer)
    if not corpus.num_tokens:
        raise DeepenError(
            f"{config.data} has no training document: 4 in 100 documents, told by their text, are kept for validation "
            "and test; give more or other text"
        )
    return cut_rows(corpus, max_length=config.max_length, cut=config.cut)  # type: ignore[arg-type]  # it was checked


def _ledger_facts(ledger: RunLedger) -> dict[str, Any]:
    counts = {"num_steps": ledger.num_steps, "num_trained_tokens": ledger.num_trained_tokens}
    return {**counts, "work": vars(ledger.training)}


def _ledger_from(facts: Mapping[str, Any]) -> RunLedger:
    return RunLedger(
        num_steps=facts["num_steps"], num_trained_tokens=facts["num_trained_tokens"], training=Work(**facts["work"])
    )


class _Log:
    """Writes figures as JSON lines, tags as TensorBoard has them, and shows the most important ones."""

    def __init__(self, path: Path, config: RunConfig, num_steps: int, show: Callable[[str], None]) -> None:
        self._path, self._interval, self._num_steps, self._show = path, config.log_interval, num_steps, show
        self._num_tokens, self._since = 0, time.perf_counter()

    def begin_after(self, step: int) -> None:
        """Drop the lines of later steps, which will be made again, and one that was torn."""
        self._since = time.perf_counter()
        if not self._path.is_file():
            return
        kept = [line for line in self._path.read_text(encoding="utf-8").split("\n") if _is_up_to(line, step)]
        with write_atomically(self._path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def take(self, report: StepReport, work: Work) -> None:
        """Write a step's figures if it is its turn; `work` is that of all steps so far."""
        self._num_tokens += report.num_tokens
        if report.step not in (1, self._num_steps) and report.step % self._interval:
            return
        figures = tagged(report)
        seconds = time.perf_counter() - self._since
        figures["train/performance/tokens_per_sec"] = self._num_tokens / seconds
        # Of all steps so far, whatever was logged: what a loss is plotted against.
        figures["train/performance/flops"] = work.flops
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": report.step, **figures}, allow_nan=False) + "\n")
        self._show(
            f"step {report.step}/{self._num_steps}  loss {report.total:.4f}  {self._num_tokens / seconds:,.0f} tokens/s"
        )
        self._num_tokens, self._since = 0, time.perf_counter()


def _is_up_to(line: str, step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= step)
    except json.JSONDecodeError:
        return False


def tagged(report: StepReport) -> dict[str, float | None]:
    """A step's figures by tag; a metric of the method's that is not finite becomes null, as JSON has no other."""
    metrics = {f"train/{name}": value if math.isfinite(value) else None for name, value in report.metrics.items()}
    return {
        "train/loss/total": report.total,
        **{f"train/loss/{name}": loss for name, loss in report.losses.items()},
        "train/learning_rate": report.learning_rate,
        "train/gradient_norm": report.gradient_norm,
        **metrics,
    }
