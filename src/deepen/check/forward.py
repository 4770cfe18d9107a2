"""Checks of a model's own forward, without any cache."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from deepen.check.effort import Effort
from deepen.check.gauge import Gauge
from deepen.check.outcome import Fault, NotApplicable, Passed
from deepen.check.padded import PadSide, pad
from deepen.check.subject import Subject

_FUTURE = (
    "something mixes positions without looking at their order: attention without a causal mask, top-k or a mean over "
    "the whole sequence (expert-choice routing), a convolution padded on both sides"
)


def repeatability(subject: Subject, effort: Effort) -> Passed:
    """The same input must give the same bits, whatever the state of the random generators."""
    ids = subject.text(effort.length, seed=0, batch=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = subject.logits(ids)
        torch.manual_seed(1)
        second = subject.logits(ids)
    if not torch.equal(first, second):
        raise Fault(
            f"two forwards over the same ids differ by up to {float((first - second).abs().max()):.2g}",
            cause="dropout or noise that evaluation mode doesn't switch off, or a buffer or counter that a forward "
            "moves and the next one reads",
        )
    return Passed(1)


def causality(subject: Subject, effort: Effort) -> Passed:
    """Other tokens behind position t, or none at all, must leave the logits up to t as they are."""
    gauge = Gauge(subject.allowed)
    for seed in range(effort.num_texts):
        ids = subject.text(effort.length, seed=seed)
        whole = subject.logits(ids)
        for end in effort.cuts(seed):
            changed = torch.cat([ids[:, :end], subject.text(effort.length, seed=seed + 1000)[:, end:]], dim=1)
            gauge.compare(
                subject.logits(changed)[:, :end],
                whole[:, :end],
                seen=f"with other tokens from position {end} on, of {effort.length}",
                cause=_FUTURE,
            )
            gauge.compare(
                subject.logits(ids[:, :end]),
                whole[:, :end],
                seen=f"with the text cut to its first {end} of {effort.length} tokens",
                cause=_FUTURE + "; or something depends on the length of the input (a capacity, a scale)",
            )
    return gauge.passed()


def batch(subject: Subject, effort: Effort) -> Passed:
    """A row among others of its length gives what it gives alone, with other mates and at another place too."""
    gauge = Gauge(subject.allowed)
    for seed in range(effort.num_texts):
        ids = subject.text(effort.length, seed=seed, batch=3)
        others = subject.text(effort.length, seed=seed + 1000, batch=3)
        alone = torch.cat([subject.logits(row[None]) for row in ids])
        among = subject.logits(ids)
        elsewhere = subject.logits(ids[[2, 0, 1]])[[1, 2, 0]]
        with_others = subject.logits(torch.cat([ids[:1], others[1:]]))[:1]
        gauge.compare(
            among[:1],
            with_others,
            seen="the first of three rows, when the two others hold other tokens",
            cause="a row depends on who stands beside it: something mixes or counts over the batch (statistics, "
            "routing or capacity over all tokens, a reshape or transpose that takes rows for positions)",
        )
        gauge.compare(
            elsewhere,
            among,
            seen="three rows in another order",
            cause="a row depends on its place in the batch: an index into rows or a per-row buffer that is off, a "
            "reshape or broadcast along the wrong axis, a capacity that earlier rows use up",
        )
        gauge.compare(
            among,
            alone,
            seen="three rows together, each against itself alone",
            cause="a row depends on how many rows there are: a capacity or scale counted over the batch, or a case "
            "of its own for one row (a squeeze, a broadcast)",
        )
    return gauge.passed()


def padding(subject: Subject, effort: Effort) -> Passed:
    """Rows of different lengths, padded on the right or on the left with any ids, each give what they give alone."""
    if "attention_mask" not in subject.takes:
        raise NotApplicable("its forward takes no attention_mask, so it can't be told which tokens are pads")
    gauge = Gauge(subject.allowed)
    for seed in range(effort.num_texts):
        length = effort.length
        rows = [subject.text(each, seed=seed + each)[0] for each in (length, length - 1, length // 2, 1)]
        alone = [subject.logits(row[None])[0] for row in rows]
        for side in ("right", "left"):
            _compare_padded(subject, gauge, rows, alone, side)
    return gauge.passed()


def _compare_padded(
    subject: Subject, gauge: Gauge, rows: Sequence[Tensor], alone: Sequence[Tensor], side: PadSide
) -> None:
    padded = pad(rows, side, subject.text(len(rows[0]), seed=99)[0])
    logits = subject.logits(padded.ids, mask=padded.mask, positions=padded.positions)
    for row, real in enumerate(padded.real):
        gauge.compare(
            logits[row, real],
            alone[row],
            seen=f"a row of {len(rows[row])} tokens with {len(rows[0]) - len(rows[row])} pads on its {side}",
            cause=partial(_why_pads_matter, subject, rows[row], side),
        )


def _why_pads_matter(subject: Subject, row: Tensor, side: PadSide) -> str:
    """Finds out by experiment on `row` alone: other ids at the pads, and twice as many pads."""

    def logits(num_pads: int, garbage: int) -> Tensor:
        padded = pad([row], side, subject.text(len(row) + num_pads, seed=garbage)[0])
        given = {"mask": padded.mask, "positions": padded.positions}
        return subject.logits(padded.ids, **given)[0, padded.real[0]]

    few, other, many = logits(4, 1), logits(4, 2), logits(8, 1)
    if not torch.isfinite(few).all():
        return (
            f"pads on the {side} make something infinite or undefined: a softmax over no visible key (give rows "
            "without any the diagonal), a mean over none"
        )
    if _apart(few, other) > subject.allowed:
        return (
            f"pads on the {side} are seen: what stands in them moves the real tokens; attention_mask is not applied "
            "somewhere (attention, a convolution or state that runs through pads, a mean, a router's capacity)"
        )
    if side == "left" and "position_ids" not in subject.takes and _apart(few, many) > subject.allowed:
        return (
            "pads on the left are counted, though what stands in them doesn't matter: either positions, which are "
            "not counted from attention_mask, nor given (forward takes no position_ids), or a mean or capacity"
        )
    if _apart(few, many) > subject.allowed:
        return (
            f"pads on the {side} are counted, though what stands in them doesn't matter: a mean over real tokens "
            "divided by all, a capacity or scale by the padded length" + _unless_positions(side)
        )
    return (
        f"the mere presence of pads on the {side}, not their ids or number, matters: look at the path taken only "
        "with an attention_mask that has zeros, and at the first and last real token"
    )


def _unless_positions(side: PadSide) -> str:
    return ", or position_ids that forward takes but doesn't use" if side == "left" else ""


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())
