"""All checks, in the order in which they stand on each other, and how they are run.

A check is only judged when none of those it needs has failed: that a cache gives what the whole text gives means
nothing where the whole text is read with an eye on the future. So one fault mostly makes one check fail, the one that
is about it, or two that don't need each other: a wrong cache slot shows in the model's own cache and in deepen's.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

from torch import nn

from deepen.backbones.quiet import quiet_transformers
from deepen.check import caching, commits, copies, counts, decoding, forward, passes, scoring, training
from deepen.check.effort import QUICK, THOROUGH, Effort
from deepen.check.outcome import Fault, NotApplicable, Passed
from deepen.check.place import place_of, said_by
from deepen.check.report import Finding, Report
from deepen.check.subject import Subject, subject_of
from deepen.core.errors import ConfigError
from deepen.core.hints import did_you_mean


@dataclass(frozen=True)
class Check:
    """One question to a model. `run` gives `Passed`, or raises `Fault` or `NotApplicable`."""

    name: str
    question: str
    run: Callable[[Subject, Effort], Passed]
    needs: tuple[str, ...] = ()
    slow: bool = False


CHECKS = (
    Check("repeatability", "Does the same input give the same bits?", forward.repeatability),
    Check("causality", "Is no logit moved by a later token?", forward.causality, needs=("repeatability",)),
    Check("batch", "Is a row's result its own, whoever is beside it?", forward.batch, needs=("repeatability",)),
    Check("padding", "Do pads on either side leave real tokens alone?", forward.padding, needs=("batch", "causality")),
    Check("precision", "Does it run in every dtype, as exact as that is?", copies.precision, needs=("repeatability",)),
    Check("compile", "Is it the same compiled?", copies.compilation, needs=("repeatability",), slow=True),
    Check("saving", "Is it the same saved and loaded?", copies.saving, needs=("repeatability",)),
    Check("cache", "Does a text read in pieces give what it gives whole?", caching.cache, needs=("causality",)),
    Check("cache rollback", "Can tokens be taken back from its cache?", caching.rollback, needs=("cache",)),
    Check("cache batch", "Are rows of a cache, behind left pads, as alone?", caching.batch, needs=("cache", "padding")),
    Check("generation", "Is generation reproducible, greedy the best?", caching.generation, needs=("cache",)),
    Check("passes", "Do deepen's passes give the model's own logits?", passes.passes, needs=("causality",)),
    Check(
        "passes batch",
        "Is a row of such passes its own, whoever is beside it?",
        passes.passes_batch,
        needs=("passes",),
    ),
    Check(
        "passes rollback",
        "Is nothing left of tokens that were forgotten?",
        passes.passes_rollback,
        needs=("passes", "passes batch"),
    ),
    Check(
        "sampling",
        "Is a token chosen alike, however wide the pass is?",
        decoding.sampling,
        needs=("repeatability",),
    ),
    Check(
        "commits",
        "Does a cache hold what was committed, and no more?",
        commits.commits,
        needs=("passes batch", "passes rollback", "sampling"),
    ),
    Check(
        "decoding",
        "Are a method's rows their own affair?",
        decoding.decoding,
        needs=("repeatability", "commits", "sampling"),
    ),
    Check(
        "exactness",
        "Is what is promised to be the base's output that?",
        decoding.exactness,
        needs=("decoding", "sampling"),
    ),
    Check("scores", "Are log-probabilities causal, and a distribution?", scoring.scores, needs=("decoding",)),
    Check("training", "Are losses sums over rows that know no pads?", training.training, needs=("passes batch",)),
    Check("adapter saving", "Is a saved method the same method?", training.adapter_saving, needs=("decoding",)),
    Check("flops", "Are the ledger's FLOPs those that torch counts?", counts.flops, needs=("passes", "decoding")),
    Check("bytes", "Are the ledger's bytes those that are held?", counts.num_bytes, needs=("passes", "cache")),
)


def check(
    model: nn.Module,
    *,
    quick: bool = False,
    vocab_size: int | None = None,
    name: str | None = None,
    only: Iterable[str] | None = None,
) -> Report:
    """Run every check on `model`, which is put into evaluation mode and otherwise comes back as it was.

    `quick` runs fewer and shorter cases and leaves out what takes minutes. `vocab_size` bounds the ids that the model
    is given, where its configuration doesn't tell. `name` is the model's in the report. `only` names checks to run,
    with those they stand on. Raises `ConfigError` for a name in it that no check has.
    """
    checks = CHECKS if only is None else selected(only, CHECKS)
    return run(subject_of(model, name=name, vocab_size=vocab_size), QUICK if quick else THOROUGH, checks=checks)


def run(
    subject: Subject,
    effort: Effort,
    *,
    checks: Iterable[Check] = CHECKS,
    done: Callable[[Finding], object] = lambda finding: None,
    before: Iterable[Finding] = (),
) -> Report:
    """The verdict of each of `checks` on `subject`; `done` is told each as it is found.

    Those `before` were found on this subject already, by another call.
    """
    effort = effort.within(subject.context_length)
    findings = {finding.check: finding for finding in before}
    for each in checks:
        with quiet_transformers():
            findings[each.name] = _finding(each, subject, effort, findings)
        done(findings[each.name])
    return Report(subject.name, tuple(findings.values()))


def selected(names: Iterable[str], checks: Sequence[Check]) -> tuple[Check, ...]:
    """Those of `checks` called `names`, with those that they stand on, in order; a slow one that is named runs, too.

    Raises `ConfigError` with the nearest name for one that is not there.
    """
    wanted = set(names)
    known = {each.name for each in checks}
    for name in sorted(wanted - known):
        raise ConfigError(f'there is no check "{name}"{did_you_mean(name, known)}')
    return tuple(replace(each, slow=False) if each.name in wanted else each for each in with_needs(wanted, checks))


def with_needs(names: Iterable[str], checks: Sequence[Check]) -> tuple[Check, ...]:
    """Those of `checks` called `names` and all that they stand on, in order."""
    wanted = set(names)
    for each in reversed(checks):  # a check comes behind those it needs
        if each.name in wanted:
            wanted.update(each.needs)
    return tuple(each for each in checks if each.name in wanted)


def _finding(each: Check, subject: Subject, effort: Effort, before: Mapping[str, Finding]) -> Finding:
    unsound = [name for name in each.needs if name in before and before[name].verdict in ("failed", "not judged")]
    if unsound:
        return Finding(each.name, each.question, "not judged", detail=f"it stands on {' and '.join(unsound)}")
    if each.slow and not effort.slow:
        return Finding(each.name, each.question, "left out", detail="takes longer; it is part of a run without quick")
    began = perf_counter()
    try:
        passed = each.run(subject, effort)
    except NotApplicable as reason:
        return Finding(each.name, each.question, "not applicable", detail=str(reason))
    except Fault as fault:
        return _failed(each, perf_counter() - began, fault)
    except Exception as error:  # a model under check can fail in any way, which is a finding, not the end of the run
        return _failed(each, perf_counter() - began, _crash(error, subject))
    seconds = perf_counter() - began
    figures = (passed.num_cases, passed.largest, passed.allowed, passed.note)
    return Finding(each.name, each.question, "passed", seconds, *figures)


def _failed(each: Check, seconds: float, fault: Fault) -> Finding:
    return Finding(each.name, each.question, "failed", seconds, detail=fault.seen, cause=fault.cause)


def _crash(error: Exception, subject: Subject) -> Fault:
    place = place_of(error, _files_of(subject.model))
    return Fault(
        f"the model raised {said_by(error)}",
        cause=f"the model can't take what this check gives it: see {place}",
    )


def _files_of(model: nn.Module) -> set[str]:
    """The files of the model's own classes: neither torch's nor deepen's."""
    kinds = {type(module) for module in model.modules()}
    theirs = [kind for kind in kinds if kind.__module__.partition(".")[0] not in ("torch", "deepen")]
    return {file for kind in theirs if (file := getattr(sys.modules.get(kind.__module__), "__file__", None))}
