"""A training run from its configuration to its last checkpoint, and on from wherever it was cut off."""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepen.checkpoint import own_tensors, write_adapter, write_own_base, write_whole_model
from deepen.core.errors import CannotTrain, CheckpointError, ConfigError, DeepenError
from deepen.core.files import write_json
from deepen.core.memory import is_out_of_memory
from deepen.core.method import ByDifficulty, Fitting
from deepen.core.seeds import seed_at
from deepen.core.types import Progress, Work
from deepen.data.formats import document_of
from deepen.data.loader import Loader
from deepen.data.rows import Rows, cut_rows
from deepen.data.split import records_of
from deepen.data.tokens import TokenCorpus
from deepen.metrics.ledger import RunLedger, count_parameters
from deepen.train.average import Average
from deepen.train.config import RunConfig
from deepen.train.folder import checkpoints_in, claim, clear_leftovers, rotate, set_aside
from deepen.train.guard import Diverged, DivergenceGuard, GuardConfig
from deepen.train.module import StepModule, whole
from deepen.train.optim import freeze_base, make_optimizers
from deepen.train.precision import autocast_dtype
from deepen.train.progress import Display, Pace, display
from deepen.train.push import push
from deepen.train.ranks import Ranks, joined_ranks
from deepen.train.rate import rate_by_width
from deepen.train.record import Record
from deepen.train.resume import TrainingState, load_carry, load_tensors, read_facts, save_checkpoint
from deepen.train.signals import Signals
from deepen.train.step import NotFinite, StepReport, Steps
from deepen.train.trainee import Trainee, open_trainee
from deepen.train.validation import shown_evaluation
from deepen.train.watch import Watch

LEDGER = "ledger.json"
"""Beside a saved model: its parameters, and what the run that made it has cost."""

# Steps that a budget in FLOPs is laid out by: a method may draw how much it computes, so one alone could mislead.
_NUM_STEPS_SURVEYED = 16

# What a run that goes on may be told differently: where it writes and how often, and how its steps are divided.
_FREE = {
    "output_dir", "log_interval", "save_interval", "eval_interval", "keep_checkpoints", "branch_from", "parallel",
    "num_micro_batches", "tensorboard", "eval_tokens", "sample_prompts", "num_samples", "sample_tokens",
    "push_to_hub", "adapter_dtype",
}  # fmt: skip
# What a branch may do differently from the run it leaves.
_FREE_TO_BRANCH = _FREE | {
    "num_steps", "num_tokens", "flops", "schedule", "warmup_steps", "decay_steps", "divergence_factor", "learning_rate",
}  # fmt: skip


def train(config: RunConfig, *, show: Callable[[str], None] = print) -> Path:
    """Run it, or go on with it, and give the folder of the trained model, `output_dir/step_N`.

    `show` gets a line now and then. The same configuration on the same machine gives the same parameters, however often
    it was cut off and started again; torch's generators are seeded. Under torchrun every rank calls this.

    Raises `DeepenError` for what can't be run, for a loss that is not finite once the last good state is saved, and for
    a model that is saved and can't be pushed.
    """
    config.check()
    with joined_ranks() as ranks:
        folder = _Run(config, ranks, show).finish()
        if config.push_to_hub is not None and ranks.is_first:
            show(f"pushed to {push(folder, config.push_to_hub)}")
        return folder


class _Run:
    """One run, with everything that it moves."""

    def __init__(self, config: RunConfig, ranks: Ranks, show: Callable[[str], None]) -> None:
        self.config, self.ranks = config, ranks
        self.show = show if ranks.is_first else lambda line: None
        self.folder = Path(config.output_dir).expanduser()
        leaves_rate = config.learning_rate == "auto"
        # What is written there is a number, known once the model is.
        claim(self.folder, config, may_differ=_FREE | {"learning_rate"} if leaves_rate else _FREE)
        torch.manual_seed(config.seed)
        self.trainee = open_trainee(config)
        self.trainee.model.train()
        base = self.trainee.base
        if base is not None:
            base.eval()  # a base's dropout would hide what it knows from what is trained on it
        self.module = StepModule(self.trainee.model, base)
        rows = rows_of_run(config, self.trainee)
        if isinstance(self.trainee.model, ByDifficulty):
            corpus = rows.corpus
            counts = {"num_untold": corpus.num_untold, "num_documents": int(corpus.learned_documents.sum())}
            self.trainee.model.require_told(**counts)
        self.num_rows = len(rows)
        self.loader = Loader(rows, rows_per_step=config.batch_size, seed=config.seed)
        if isinstance(self.trainee.model, Fitting):
            self.trainee.model.fit(self.loader.counts(self.trainee.backbone.vocab_size))
        freeze_base(self.trainee.model, base)  # what is frozen decides what a step costs, and how it is sharded
        rate = self._learning_rate()
        if leaves_rate:
            self.config = config = replace(config, learning_rate=rate)
            claim(self.folder, config, may_differ=_FREE)
        self.num_steps = self._planned_steps()
        self._wrap()
        self.optimizers = make_optimizers(
            self.trainee.model,
            base,
            name=config.optimizer,  # type: ignore[arg-type]  # it was checked
            learning_rate=rate,
        )
        parameters = self.module.trained_parameters()
        decay = config.average_decay
        average = Average(parameters, decay=decay) if decay is not None else None
        self.state = TrainingState(self.module, self.optimizers, average)
        self.ledger = RunLedger()
        self.record: Record | None = None
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
        factor = config.divergence_factor
        self.guard = DivergenceGuard(GuardConfig(factor=factor)) if factor is not None else None
        self.watch = Watch(config, self.trainee, self.show) if config.eval_interval is not None else None
        self.last: StepReport | None = None
        self.is_between_steps = True  # then all that moves is what the last whole step has left
        self.pace = Pace()

    def finish(self) -> Path:
        """Make the steps that are left, and save the last state."""
        first = self._restore()
        if first == self.num_steps:
            self.show(f"the run is finished: {self._step_folder(first)}")
            return self._step_folder(first)
        self.show(self.module.what_trains())
        if first:
            self.show(f"going on behind step {first}")
        else:
            self._require_something_to_learn()
        self.pace = Pace()  # what came before was no step's time
        signals = Signals()
        try:
            with ExitStack() as stack:
                if not self.ranks.are_many:  # others would wait for one that stops behind another step
                    stack.enter_context(signals.held())
                shown = stack.enter_context(display(self.num_steps, done=first, show=self.show))
                for index in range(first, self.num_steps):
                    self.is_between_steps = False
                    self._take(index, shown)
                    self.is_between_steps = True
                    signals.deliver()
        except (KeyboardInterrupt, SystemExit):
            self._leave()
            raise
        except NotFinite as stopped:
            if self.last is None:
                raise
            folder = self._save(self.last)
            raise NotFinite(f"{stopped}; the state after step {self.last.step} is in {folder}") from stopped
        except Diverged as stopped:
            raise Diverged(f"{stopped}; {self._last_checkpoint()}") from stopped
        finally:
            if self.record is not None:
                self.record.close()
        return self._step_folder(self.num_steps)

    def _leave(self) -> None:
        """Interrupted: save what was made, if that is whole and this process alone holds it, and tell."""
        if self.last is not None and self.is_between_steps and not self.ranks.are_many:
            self._save(self.last)
            self.show(f"saved: step {self.last.step}; the same command goes on")
        else:
            kept = checkpoints_in(self.folder)
            self.show(f"the same command goes on from {kept[0]}" if kept else "no checkpoint was made")

    def _take(self, index: int, shown: Display) -> None:
        report = self._step(index)
        self.last = report
        if self.guard is not None:
            self.guard.take(report.total, step=report.step)
        if self.state.average is not None:
            self.state.average.update()
        self.ledger.trained(report.work, num_tokens=report.num_tokens)
        self.pace.count(report.num_tokens)
        record = self._record(index) if self.ranks.is_first else None
        if record is not None:
            shown.step(report.step)
        evaluated: dict[str, float | None] = {}
        if self._is_due(report.step, self.config.eval_interval):
            with self.pace.aside():
                evaluated = self._evaluate(report.step, record)
            if record is not None:
                shown.say(f"step {report.step}/{self.num_steps}  {shown_evaluation(evaluated)}")
        if record is not None and self._is_logged(report.step):
            record.write(report, self.ledger.training, shown, evaluated=evaluated)
        if self._is_due(report.step, self.config.save_interval) or report.step == self.num_steps:
            with self.pace.aside():
                self._save(report)

    def _step(self, index: int) -> StepReport:
        try:
            return self.steps.take(index)
        except RuntimeError as cause:
            if not is_out_of_memory(cause):
                raise
            raise self._out_of_memory(index + 1) from cause

    def _out_of_memory(self, step: int) -> DeepenError:
        config = self.config
        less = f"lower batch_size ({config.batch_size}) or max_length ({config.max_length})"
        if not config.recompute:
            less += ", or set recompute (false) to true"
        return DeepenError(
            f"out of memory on {self.trainee.backbone.device} at step {step} of {self.num_steps}: raise "
            f"num_micro_batches ({config.num_micro_batches}), with which the same run goes on; or begin another and "
            f"{less}; {self._last_checkpoint()}"
        )

    def _last_checkpoint(self) -> str:
        kept = checkpoints_in(self.folder)
        return f"the last checkpoint before it is {kept[0]}" if kept else "no checkpoint was made before it"

    def _is_due(self, step: int, interval: int | None) -> bool:
        return interval is not None and (step % interval == 0 or step == self.num_steps)

    def _is_logged(self, step: int) -> bool:
        config = self.config
        intervals = (config.log_interval, config.eval_interval, config.save_interval)
        return step == 1 or any(self._is_due(step, interval) for interval in intervals)

    def _record(self, first: int) -> Record:
        """Opened by the first step that is made: a run that can't make one leaves nothing behind."""
        if self.record is None:
            if not (self.folder / "run.json").exists():
                self.config.save(self.folder / "run.json")
            device = self.trainee.backbone.device
            self.record = Record(
                self.folder, pace=self.pace, tensorboard=self.config.tensorboard, resume_after=first, device=device
            )
        return self.record

    def _evaluate(self, step: int, record: Record | None) -> dict[str, float | None]:
        """Every rank does the same, so that none waits long for another; the first one writes it down."""
        assert self.watch is not None, "an interval has what it is for"
        average = self.state.average
        with average.in_place() if average is not None else nullcontext():
            figures = self.watch.validation.measure(Progress(step, self.num_steps))
            samples = self.watch.samples.draw() if self.watch.samples is not None else ()
        if self.watch.samples is not None:
            figures |= self.watch.samples.figures(samples)
        if record is not None:
            record.write_samples(samples, step=step)
            record.write_parameters(self.module.trained_parameters(), step=step)
        return figures

    # Before the first step

    def _learning_rate(self) -> float | None:
        """What the configuration says, or what it leaves to the model's width."""
        if self.config.learning_rate != "auto":
            return self.config.learning_rate
        backbone = self.trainee.backbone
        rate = rate_by_width(backbone)
        self.show(f"learning_rate auto: {rate:.6g}, for width {backbone.hidden_size}")
        return rate

    def _wrap(self) -> None:
        if self.config.adapter_dtype != "float32" and not self.trainee.model.saved_state():
            raise ConfigError(
                f"adapter_dtype is {self.config.adapter_dtype}, but what trains here is the whole model, no adapter; "
                "leave it out"
            )
        if self.config.recompute:
            self.module.checkpoint_activations()
        if self.config.compile:
            self.module.compile_units()
        if self.config.parallel == "shard":
            if not self.ranks.are_many:
                raise ConfigError("parallel is shard, which needs several processes: start it with torchrun")
            if self.config.eval_interval is not None:
                raise ConfigError("eval_interval has no use with parallel shard: evaluate the checkpoints instead")
            if self.config.optimizer == "muon":
                raise ConfigError("optimizer muon works on whole matrices; with parallel shard use adamw")
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

    def _require_something_to_learn(self) -> None:
        """Raises `CannotTrain` if nothing counts in any row of the run; the first step that counts something is enough.

        A step alone may be empty, but a run of such steps would end as if it had trained something.
        """
        model, config = self.trainee.model, self.config
        for index in range(min(self.num_steps, math.ceil(self.num_rows / config.batch_size))):
            torch.manual_seed(seed_at(config.seed, index))  # what the step itself will draw by
            counts = model.count(model.prepare(self.loader.step(index), Progress(index, self.num_steps)))
            if not counts or any(counts.values()):  # a method that counts no unit at all is told by the step
                return
        raise CannotTrain(
            f"no row of this run holds anything to learn: {config.data} gives rows of at most {config.max_length} "
            "tokens (max_length), in none of which the method, as it is configured, finds something to be measured by; "
            "raise max_length or give longer documents"
        )

    # Checkpoints

    def _step_folder(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _save(self, report: StepReport) -> Path:
        folder = self._step_folder(report.step)
        if self.ranks.from_first(folder.exists()):
            return folder
        saved = self._saved_model()
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
            "guard": self.guard.state() if self.guard is not None else None,
        }

        def write_model(begun: Path) -> None:
            self._write_model(begun, saved)
            assert self.record is not None, "a step was made"
            self.record.save_last(begun)
            parameters = count_parameters(self.trainee.backbone.model, self.trainee.model)
            figures = {f"parameters_{name}": count for name, count in vars(parameters).items()}
            write_json(begun / LEDGER, {**figures, **self.ledger.training_figures()})

        save_checkpoint(
            folder, state=self.state, facts=facts, carry=self.steps.carry, ranks=self.ranks, write_model=write_model
        )
        if self.ranks.is_first:
            rotate(self.folder, keep=self.config.keep_checkpoints)
        return folder

    def _saved_model(self) -> "_Saved":
        """What is saved, on the CPU, with averages for parameters where there are some.

        That is what the method adds to a base, and the base itself where that is trained.
        """
        average, trainee = self.state.average, self.trainee
        is_trained = any(parameter.requires_grad for parameter in trainee.backbone.model.parameters())
        rounded = torch.bfloat16 if self.config.adapter_dtype == "bfloat16" else None
        with average.in_place() if average is not None else nullcontext():
            added = {name: _as_saved(tensor, rounded) for name, tensor in trainee.model.saved_state().items()}
            base = own_tensors(trainee.backbone.model) if is_trained else {}
            return _Saved(added, {name: _as_saved(tensor) for name, tensor in base.items()})

    def _write_model(self, begun: Path, saved: "_Saved") -> None:
        trainee, identity = self.trainee, self.trainee.identity
        if not saved.added:
            write_whole_model(begun, backbone=trainee.backbone, tokenizer=trainee.tokenizer, tensors=saved.base)
            return
        if saved.base:
            identity = write_own_base(begun, trainee.backbone, trainee.tokenizer, saved.base, digest=identity.tokenizer)
        write_adapter(begun, method=trainee.method, model=trainee.model, identity=identity, tensors=saved.added)

    def _restore(self) -> int:
        """Take back the newest checkpoint that is whole and of this run; gives the number of steps made."""
        if self.ranks.is_first:
            clear_leftovers(self.folder)
        self.ranks.wait()
        refused: dict[Path, CheckpointError] = {}
        for folder in checkpoints_in(self.folder):
            try:
                step = self._load(folder, free=_FREE)
            except CheckpointError as cause:
                refused[folder] = cause
                warnings.warn(f"{cause}; going back to the checkpoint before it", stacklevel=2)
            else:
                self.ranks.wait()  # until all have read what there is
                if self.ranks.is_first:
                    set_aside(refused)
                return step
        if refused:
            reason = next(iter(refused.values()))
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be gone on from ({reason}); choose another output_dir"
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
        if self.guard is not None and facts["guard"] is not None:
            self.guard.load_state(facts["guard"])
        step = int(facts["step"])
        if step > self.num_steps or (step == self.num_steps and folder.parent != self.folder):
            raise CheckpointError(f"{folder} is at step {step}, and the run ends at {self.num_steps}; give more steps")
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
            way_out = f"; to train its model otherwise than that run, give model {folder} and no branch_from"
            is_branch = folder.parent != self.folder
            raise CheckpointError(
                f"{folder} is of another run: {name} was {was} and is {is_now}{way_out if is_branch else ''}"
            )


@dataclass(frozen=True)
class _Saved:
    """What a method has added to its base, and the base's own tensors where these are trained, too."""

    added: Mapping[str, Tensor]
    base: Mapping[str, Tensor]


def _as_saved(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """On the CPU and whole; where it has a fraction at all in `dtype`, if one is given."""
    to = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return whole(tensor).detach().to("cpu", to, copy=True)


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
    if int(corpus.ids.max()) >= trainee.backbone.vocab_size:
        raise DeepenError(
            f"{config.data} holds token id {corpus.ids.max()}, and the model has ids below "
            f"{trainee.backbone.vocab_size}; make the data with this model's tokenizer"
        )
    return cut_rows(corpus, max_length=config.max_length, cut=config.cut)  # type: ignore[arg-type]  # it was checked


def _ledger_facts(ledger: RunLedger) -> dict[str, Any]:
    counts = {"num_steps": ledger.num_steps, "num_trained_tokens": ledger.num_trained_tokens}
    return {**counts, "work": vars(ledger.training)}


def _ledger_from(facts: Mapping[str, Any]) -> RunLedger:
    return RunLedger(
        num_steps=facts["num_steps"], num_trained_tokens=facts["num_trained_tokens"], training=Work(**facts["work"])
    )
