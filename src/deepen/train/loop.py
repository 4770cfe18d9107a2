"""The training loop, over the protocol alone: one process, one optimizer step a batch.

A step draws what the method draws, counts the units, asks for loss sums, divides each once by its count, and moves the
parameters that the method's groups name. A loss or a gradient that is not finite ends the run before it can reach a
parameter, so what is saved then is the state after the last good step.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepen.backbones.hf import Backbone
from deepen.backbones.identity import BaseIdentity
from deepen.checkpoint import open_model, save_adapter
from deepen.core.errors import ConfigError, DeepenError
from deepen.core.files import write_json
from deepen.core.method import RecursiveModel
from deepen.core.registry import Method, get
from deepen.core.types import Batch, LossTerm, Progress, Unit, Work
from deepen.data.encoding import ChatEncoder
from deepen.data.formats import document_of
from deepen.data.loader import Loader
from deepen.data.rows import cut_rows
from deepen.data.split import records_of
from deepen.data.tokens import TokenCorpus
from deepen.metrics.ledger import RunLedger, count_parameters
from deepen.train.config import RunConfig
from deepen.train.schedule import Schedule

LEDGER = "ledger.json"
"""Beside a saved adapter: its parameters, and what the run that made it has cost."""


class NotFinite(DeepenError):
    """A loss or a gradient became infinite or no number; the parameters are still those of the step before."""


@dataclass(frozen=True)
class Trainee:
    """A method's model over its base, with all that a saved adapter needs to know."""

    method: Method
    model: Any
    backbone: Backbone
    tokenizer: ChatEncoder
    identity: BaseIdentity


@dataclass(frozen=True)
class StepReport:
    """One finished optimizer step, counted from 1.

    `losses` are means per unit of each term, unweighted; `total` is what was differentiated. Both stay on the model's
    device until somebody logs them. `num_tokens` counts the batch's real tokens, `work` all that was computed.
    """

    step: int
    losses: Mapping[str, Tensor]
    total: Tensor
    learning_rate: float
    num_tokens: int
    work: Work
    metrics: Mapping[str, float]


def train(config: RunConfig, *, show: Callable[[str], None] = print) -> Path:
    """Run it and give the folder of the trained adapter, `output_dir/step_N`; `show` gets a line now and then.

    Seeds torch's generators: the same configuration on the same machine gives the same parameters. Raises
    `DeepenError` for what can't be run, and for a loss that is not finite once the last good state is saved.
    """
    config.check()
    output_dir = _new_folder(config.output_dir)
    torch.manual_seed(config.seed)
    trainee = open_trainee(config)
    trainee.model.train()
    trainee.backbone.model.eval()  # a base's dropout would hide what it knows from what is trained on it
    optimizer = make_optimizer(trainee.model, trainee.backbone.model, learning_rate=config.learning_rate)
    batches = _batches(config, trainee)
    reports = steps(
        trainee.model,
        optimizer,
        batches,
        num_steps=config.num_steps,
        grad_clip=config.grad_clip,
        schedule=config.learning_rates,
    )
    log = _Log(output_dir / "train.jsonl", config, show)
    last: StepReport | None = None
    try:
        for last in reports:
            if last.step == 1:  # a run that can't make a step leaves nothing behind
                config.save(output_dir / "run.json")
            log.take(last)
    except NotFinite as stopped:
        if last is None:
            raise
        folder = _save(output_dir, trainee, last, log.ledger)
        raise NotFinite(f"{stopped}; the state after step {last.step} is in {folder}") from stopped
    assert last is not None, "a checked configuration has at least one step"
    return _save(output_dir, trainee, last, log.ledger)


def steps(
    model: RecursiveModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Batch],
    *,
    num_steps: int,
    grad_clip: float | None,
    schedule: Schedule | None = None,
) -> Iterator[StepReport]:
    """Make `num_steps` optimizer steps, a batch each, with the groups' learning rates as `schedule` has them.

    Raises `NotFinite`, naming the step, before a bad one is made.
    """
    carry: Any = None
    full_rates = [group["lr"] for group in optimizer.param_groups]
    for index in range(num_steps):
        for group, rate in zip(optimizer.param_groups, full_rates, strict=True):
            group["lr"] = rate * (schedule.factor(index) if schedule is not None else 1.0)
        batch = next(batches)
        if index == 0:
            carry = model.begin(batch)
        progress, where = Progress(index, num_steps), f"at step {index + 1} of {num_steps}"
        prepared = model.prepare(batch, progress)
        counts = model.count(prepared)
        output = model.train_step(prepared, carry, progress)
        losses = {name: _mean(name, term, counts) for name, term in output.losses.items()}
        total = torch.stack([output.losses[name].weight * loss for name, loss in losses.items()]).sum()
        _require_finite({**losses, "total": total}, where)
        _move(optimizer, total, grad_clip, where)
        # One process and one batch a step: its figures are the step's sums.
        model.after_step({name: torch.tensor(value) for name, value in output.metrics.items()})
        carry = output.carry
        yield StepReport(
            step=index + 1,
            losses={name: loss.detach() for name, loss in losses.items()},
            total=total.detach(),
            learning_rate=optimizer.param_groups[0]["lr"],
            num_tokens=int(batch.lengths.sum()),
            work=model.step_work(prepared),
            metrics=output.metrics,
        )


def make_optimizer(model: Any, base: nn.Module, *, learning_rate: float | None) -> torch.optim.AdamW:
    """AdamW over the model's groups; the base's parameters that are in none of them are frozen.

    `learning_rate` replaces that of every group. Raises `DeepenError`, naming the parameter, unless each trainable
    parameter of the method's own is in exactly one group.
    """
    groups = freeze_base(model, base)
    if learning_rate is not None:
        groups = [{**group, "lr": learning_rate} for group in groups]
    return torch.optim.AdamW(groups)


def freeze_base(model: Any, base: nn.Module) -> list[dict[str, Any]]:
    """Freeze the base's parameters that are in none of the model's groups, and give those, checked."""
    groups = [{**group, "params": list(group["params"])} for group in model.optim_groups()]
    _check_groups(groups, model, base)
    grouped = {parameter for group in groups for parameter in group["params"]}
    for parameter in base.parameters():
        if parameter not in grouped:
            parameter.requires_grad_(False)
    return groups


def open_trainee(config: RunConfig) -> Trainee:
    """The adapter that `config.model` names, or a new model of `config.method` over that base."""
    opened = open_model(config.model)
    if opened.method is not None:
        if config.method is not None:
            raise ConfigError(
                f"{config.model} is an adapter of {opened.method.name}: leave out method and config, which it has"
            )
        return Trainee(opened.method, opened.model, opened.backbone, opened.tokenizer, opened.identity)
    if config.method is None:
        raise ConfigError(f"{config.model} is a plain base model: say which method to train on it (`deepen methods`)")
    method = get(config.method)
    backbone = opened.backbone
    model = method.load_model_type().build(_method_config(method, config), backbone, backbone.vocab_size)
    return Trainee(method, model, backbone, opened.tokenizer, opened.identity)


def _method_config(method: Method, config: RunConfig) -> Any:
    if isinstance(config.config, str):
        return method.load_config(config.config)
    return method.load_config_type().from_dict(config.config or {}, source="config")


# Data


def _batches(config: RunConfig, trainee: Trainee) -> Iterator[Batch]:
    """Batches without end, on the base's device."""
    context, device = trainee.backbone.context_length, trainee.backbone.device
    if context is not None and config.max_length > context:
        raise ConfigError(f"max_length is {config.max_length}, but the model's context is {context}")
    documents = (document_of(record) for record in records_of(config.data, "train"))
    corpus = TokenCorpus.of(documents, trainee.tokenizer)
    if not corpus.num_tokens:
        raise DeepenError(
            f"{config.data} has no training document: 4 in 100 documents, told by their text, are kept for validation "
            "and test; give more or other text"
        )
    rows = cut_rows(corpus, max_length=config.max_length, cut=config.cut)  # type: ignore[arg-type]  # it was checked
    loader = Loader(rows, rows_per_step=config.batch_size, seed=config.seed)
    while True:
        (batch,) = loader.next_step()
        yield batch.to(device)


# Losses and gradients


def _mean(name: str, term: LossTerm, counts: Mapping[Unit, int]) -> Tensor:
    """The term per unit; a batch without that unit has nothing to divide."""
    if term.unit not in counts:
        raise DeepenError(
            f'the loss "{name}" is per {term.unit}, but the model\'s count() gives {", ".join(counts) or "nothing"}'
        )
    return term.total / max(counts[term.unit], 1)


def _require_finite(losses: Mapping[str, Tensor], where: str) -> None:
    if torch.stack(list(losses.values())).isfinite().all():
        return
    name, value = next((name, loss.item()) for name, loss in losses.items() if not loss.isfinite())
    raise NotFinite(f'the loss "{name}" is {value} {where}; try a lower learning_rate or grad_clip')


def _move(optimizer: torch.optim.Optimizer, total: Tensor, grad_clip: float | None, where: str) -> None:
    """Take one step down the gradient of `total`, unless that is not finite."""
    if not total.requires_grad:
        raise DeepenError("no loss depends on a trainable parameter; does the method's config switch it off?")
    optimizer.zero_grad()
    total.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, math.inf if grad_clip is None else grad_clip)
    if not norm.isfinite():
        raise NotFinite(f"the gradient's norm is {norm.item()} {where}; try a lower learning_rate or grad_clip")
    optimizer.step()


def _check_groups(groups: list[dict[str, Any]], model: nn.Module, base: nn.Module) -> None:
    of_base = set(base.parameters())
    names = {parameter: name for name, parameter in [*base.named_parameters(), *model.named_parameters()]}
    owner: dict[nn.Parameter, int] = {}
    for index, group in enumerate(groups):
        for parameter in group["params"]:
            if parameter not in names:
                raise DeepenError(
                    f"group {index} of optim_groups() holds a parameter {list(parameter.shape)} that the model lacks"
                )
            if parameter in owner:
                raise DeepenError(
                    f"{names[parameter]} is in groups {owner[parameter]} and {index} of optim_groups(); keep it in one"
                )
            owner[parameter] = index
    for parameter, name in names.items():
        if parameter.requires_grad and parameter not in owner and parameter not in of_base:
            raise DeepenError(f"{name} is trainable but in no group of optim_groups(); add or freeze it")
    if not owner:
        raise DeepenError("there is nothing to train: the model's optim_groups() hold no parameter")


# What a run leaves behind


class _Log:
    """Writes figures as JSON lines, tags as TensorBoard has them, and shows the most important ones.

    `ledger` has every step, logged or not.
    """

    def __init__(self, path: Path, config: RunConfig, show: Callable[[str], None]) -> None:
        self._path, self._config, self._show = path, config, show
        self._num_tokens, self._since = 0, time.perf_counter()
        self.ledger = RunLedger()

    def take(self, report: StepReport) -> None:
        """Count a step's tokens and work, and write its figures if it is its turn."""
        self.ledger.trained(report.work, num_tokens=report.num_tokens)
        self._num_tokens += report.num_tokens
        if report.step not in (1, self._config.num_steps) and report.step % self._config.log_every:
            return
        figures = tagged(report)
        seconds = time.perf_counter() - self._since
        figures["train/performance/tokens_per_sec"] = self._num_tokens / seconds
        # Of all steps so far, whatever was logged: what a loss is plotted against.
        figures["train/performance/flops"] = self.ledger.training.flops
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": report.step, **figures}, allow_nan=False) + "\n")
        self._show(
            f"step {report.step}/{self._config.num_steps}  loss {figures['train/loss/total']:.4f}  "
            f"{self._num_tokens / seconds:,.0f} tokens/s"
        )
        self._num_tokens, self._since = 0, time.perf_counter()


def tagged(report: StepReport) -> dict[str, float | None]:
    """A step's figures by tag; a metric of the method's that is not finite becomes null, as JSON has no other."""
    metrics = {f"train/{name}": value if math.isfinite(value) else None for name, value in report.metrics.items()}
    return {
        "train/loss/total": float(report.total),
        **{f"train/loss/{name}": float(loss) for name, loss in report.losses.items()},
        "train/learning_rate": report.learning_rate,
        **metrics,
    }


def _new_folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DeepenError(f"output_dir {path} is not an empty folder; choose another, so that runs don't mix")
    return folder


def _save(output_dir: Path, trainee: Trainee, report: StepReport, ledger: RunLedger) -> Path:
    folder = output_dir / f"step_{report.step}"
    save_adapter(folder, method=trainee.method, model=trainee.model, identity=trainee.identity)
    write_json(folder / "metrics.json", {"step": report.step, **tagged(report)})
    parameters = count_parameters(trainee.backbone.model, trainee.model)
    figures = {f"parameters_{name}": count for name, count in vars(parameters).items()}
    write_json(folder / LEDGER, {**figures, **ledger.training_figures()})
    return folder
