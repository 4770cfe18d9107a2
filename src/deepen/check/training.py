"""Checks of a method's training step, and of what is saved of it."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepen.backbones.identity import BaseIdentity, fingerprint
from deepen.check.effort import Effort
from deepen.check.methods import GREEDY, SAMPLED, decode, filled, filled_by, method_of, prompts_of
from deepen.check.outcome import Fault, NotApplicable, Passed
from deepen.check.subject import Subject
from deepen.checkpoint import read_adapter, save_adapter
from deepen.core import registry
from deepen.core.errors import CannotTrain
from deepen.core.method import RecursiveModel
from deepen.core.registry import Method
from deepen.core.types import Batch, Progress, StepOutput
from deepen.data.batches import batch_of

_PROGRESS = Progress(0, 10)


def training(subject: Subject, effort: Effort) -> Passed:
    """Losses must be sums over rows and know no pads; all that is to be trained, and only that, has a gradient."""
    method = method_of(subject)
    try:
        step = _Step(subject, method)
        with filled_by(subject, 0):
            return step.check(effort)
    except CannotTrain as reason:
        raise NotApplicable(f"the method has no training: {reason}") from reason


class _Step:
    """Training steps over the same few rows, together and alone."""

    def __init__(self, subject: Subject, method: RecursiveModel) -> None:
        self._subject, self._method = subject, method

    def check(self, effort: Effort) -> Passed:
        """All of it; raises `Fault`."""
        text = self._subject.text(effort.length, seed=61, batch=2).tolist()
        rows = [text[0], text[1][: effort.length // 2]]
        batch = batch_of(rows)
        whole = self._output(batch)
        self._check_pads(batch, whole)
        self._check_sums(batch, whole)
        self._check_gradients(whole)
        return Passed(3)

    def _prepared(self, batch: Batch) -> Batch:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._method.prepare(batch, _PROGRESS)

    def _output(self, batch: Batch) -> StepOutput:
        return self._step_on(self._prepared(batch))

    def _step_on(self, prepared: Batch) -> StepOutput:
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            there = prepared.to(self._subject.device)
            return self._method.train_step(there, self._method.begin(there), _PROGRESS)

    def _check_pads(self, batch: Batch, whole: StepOutput) -> None:
        pads = torch.arange(batch.input_ids.shape[1], device=batch.lengths.device) >= batch.lengths[:, None]
        garbage = self._subject.text(batch.input_ids.shape[1], seed=62, batch=len(batch.lengths)).cpu()
        other = self._output(replace(batch, input_ids=torch.where(pads, garbage, batch.input_ids)))
        self._compare(
            _totals(other),
            _totals(whole),
            "with other ids at the pads",
            "pads are counted: they are known from `lengths` alone, and may hold any id",
        )

    def _check_sums(self, batch: Batch, whole: StepOutput) -> None:
        """However the rows of a step, which is prepared as a whole, are divided."""
        prepared = self._prepared(batch)
        rows = [prepared.rows([index]) for index in range(len(batch.lengths))]
        parts = [self._step_on(row) for row in rows]
        sums = {
            name: sum((_totals(part)[name] for part in parts), start=torch.zeros((), dtype=torch.float64))
            for name in whole.losses
        }
        self._compare(
            sums,
            _totals(whole),
            f"summed over {len(rows)} rows alone, against the rows as one batch",
            "a term is a mean, not a sum with its unit, or rows of the batch reach each other: the trainer divides "
            "once, by the count over all ranks and micro-batches",
        )
        counts = [dict(self._method.count(each)) for each in (prepared, *rows)]
        for unit, count in counts[0].items():
            if count != sum(part.get(unit, 0) for part in counts[1:]):
                raise Fault(
                    f"count() gives {count} of unit {unit} for two rows together and "
                    f"{[part.get(unit, 0) for part in counts[1:]]} for each alone",
                    cause="units at pads are counted, or counts are capped for the whole batch",
                )
        missing = {term.unit for term in whole.losses.values()} - counts[0].keys()
        if missing:
            raise Fault(
                f"losses are per {', '.join(sorted(missing))}, but count() gives {', '.join(counts[0])}",
                cause="count() must know every unit that a loss term names",
            )

    def _compare(self, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str, cause: str) -> None:
        for name, total in expected.items():
            # A summed loss moves with every logit that it is made of.
            allowed = self._subject.allowed * 100 + 1e-4 * float(total.abs())
            difference = float((actual[name] - total).abs())
            if not difference <= allowed:
                raise Fault(f'the loss "{name}" {what}: {difference:.2g} apart, of {float(total):.4g}', cause=cause)

    def _check_gradients(self, whole: StepOutput) -> None:
        names = {id(parameter): name for name, parameter in _named_parameters(self._method)}
        grouped = [parameter for group in self._method.optim_groups() for parameter in group["params"]]
        if len({id(parameter) for parameter in grouped}) < len(grouped):
            raise Fault("a parameter is in optim_groups() twice", cause="it would be moved twice in each step")
        wanted = [parameter for parameter in grouped if parameter.requires_grad]
        total = torch.stack([term.weight * term.total for term in whole.losses.values()]).sum()
        gradients = torch.autograd.grad(total, wanted, allow_unused=True, retain_graph=True)
        without = [names.get(id(p), "?") for p, gradient in zip(wanted, gradients, strict=True) if gradient is None]
        if without:
            raise Fault(
                f"{len(without)} parameters in optim_groups() get no gradient, {without[0]} for one",
                cause="they take no part in any loss: leave them out of the groups, or look for a `detach` or "
                "`no_grad` between them and the loss",
            )
        of_base = {id(parameter) for parameter in self._subject.model.parameters()}
        known = {id(parameter) for parameter in grouped} | of_base
        others = [p for _, p in _named_parameters(self._method) if p.requires_grad and id(p) not in known]
        if others:
            raise Fault(
                f"{names[id(others[0])]} is trainable and in no group of optim_groups()",
                cause="it would never be trained; add it to a group or freeze it",
            )


def _totals(output: StepOutput) -> dict[str, Tensor]:
    return {name: term.total.detach().double().cpu() for name, term in output.losses.items()}


def _named_parameters(method: RecursiveModel) -> list[tuple[str, nn.Parameter]]:
    assert isinstance(method, nn.Module), "a method's model is a module"
    return list(method.named_parameters())


# What is saved.


def adapter_saving(subject: Subject, effort: Effort) -> Passed:
    """A model built anew from what was saved, on the same base, must give the same ids."""
    method = method_of(subject)
    kind = next((each for each in registry.discover().values() if each.load_model_type() is type(method)), None)
    with filled(subject):
        again = _built_anew(subject, method) if kind is None or subject.backbone is None else _reread(subject, kind)
        for name, tensor in method.saved_state().items():
            if not torch.equal(again.saved_state()[name], tensor):
                raise Fault(f"{name} comes back with other values", cause="load_saved_state leaves it as it was built")
        prompts, configs = prompts_of(subject, effort.length), [GREEDY, SAMPLED, GREEDY]
        ours, theirs = (decode(each, prompts, configs, num_tokens=8).tokens for each in (method, again))
    if ours != theirs:
        row = next(row for row in range(len(prompts)) if ours[row] != theirs[row])
        raise Fault(
            f"saved and built anew, row {row} is {theirs[row]} where it was {ours[row]}",
            cause="something that matters is not in saved_state() or in the configuration: a tensor that is drawn when "
            "the model is built, a buffer that isn't persistent, an attribute set from outside",
        )
    return Passed(len(prompts))


def _built_anew(subject: Subject, method: Any) -> RecursiveModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # what is drawn when a model is built shall be drawn otherwise
        again: RecursiveModel = type(method).build(method.config, method.backbone, subject.vocab_size)
    again.load_saved_state({name: tensor.detach().clone() for name, tensor in method.saved_state().items()})
    return _evaluating(again)


def _reread(subject: Subject, kind: Method) -> RecursiveModel:
    """Through a folder, as adapters are saved and opened, but for the base, which is the one we have."""
    method, backbone = method_of(subject), subject.backbone
    assert backbone is not None
    identity = BaseIdentity(address=subject.name, fingerprint=fingerprint(backbone.model), tokenizer="")
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # what is drawn when a model is built shall be drawn otherwise
        save_adapter(Path(folder) / "adapter", method=kind, model=method, identity=identity)
        return _evaluating(read_adapter(Path(folder) / "adapter", backbone))


def _evaluating(model: RecursiveModel) -> RecursiveModel:
    assert isinstance(model, nn.Module), "a method's model is a module"
    model.eval()
    return model
