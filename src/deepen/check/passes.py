"""Checks of deepen's passes: a text read in pieces behind a committed prefix is the text read by the model itself."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache as memoize

import torch
from torch import Tensor

from deepen.backbones.cache import PrefixCache
from deepen.backbones.hf import Backbone
from deepen.check.effort import Effort
from deepen.check.gauge import Gauge
from deepen.check.outcome import Fault, Passed
from deepen.check.prefix import Comparison, Difference, Part, attached, fresh_reading, parts
from deepen.check.subject import Subject

# So many passes of one width, then the rest of the text in one.
_MOST_PIECES = 3
# A layer's output that is further off than this share of its typical size is off, not rounded.
_OFF = 1e-2
# Tokens read behind what was committed, to see whether it serves.
_NUM_BEHIND = 2


def passes(subject: Subject, effort: Effort) -> Passed:
    """Passes over a text cut in any way, each committed, must give the logits of the model's own forward."""
    backbone, gauge = attached(subject), Gauge(subject.allowed)
    for seed in range(effort.num_texts):
        ids = subject.text(effort.length, seed=seed)
        with _unpacked(backbone):
            whole = subject.logits(ids)
            for pieces in _splits(effort, seed):
                gauge.compare(
                    read_in(backbone, ids, pieces),
                    whole,
                    seen=f"{effort.length} tokens read in passes of {_said(pieces)}, against the model's own forward",
                    cause=lambda pieces=pieces, ids=ids: _cause_of_split(subject, backbone, ids, pieces),  # type: ignore[misc]
                )
        with _packed(backbone):
            for pieces in _splits(effort, seed + 1):
                gauge.compare(
                    read_in(backbone, ids, pieces),
                    whole,
                    seen=f"{effort.length} tokens read by the packed model in passes of {_said(pieces)}",
                    cause="packed linears (nn/linear.py) or fused layers (backbones/fused.py): unpacked the same "
                    "passes give the model's logits. A subclass that changes the forward of a linear or of a llama "
                    "layer without having a class of its own, or weights written past PyTorch's version counter",
                )
    return gauge.passed()


@torch.no_grad()
def read_in(backbone: Backbone, ids: Tensor, pieces: Sequence[int]) -> Tensor:
    """Logits `[B, T, V]` of passes over so many tokens of `ids` `[B, T]` each, all committed."""
    batch, length = ids.shape
    cache = backbone.new_cache(batch_size=batch, capacity=length)
    logits = []
    for piece in ids.split(list(pieces), dim=1):
        logits.append(backbone.run(piece, cache))
        cache.commit([piece.shape[1]] * batch)
    return torch.cat(logits, dim=1)


def _splits(effort: Effort, seed: int) -> Iterator[list[int]]:
    """Equal widths, and a prefill with single steps behind it."""
    for width in effort.widths:
        num_pieces = min(_MOST_PIECES, effort.length // width)
        yield _nonzero([width] * num_pieces + [effort.length - width * num_pieces])
    for cut in effort.cuts(seed)[::3]:
        yield _nonzero([cut, 1, effort.length - cut - 1])


def _nonzero(pieces: list[int]) -> list[int]:
    return [piece for piece in pieces if piece]


def _said(pieces: Sequence[int]) -> str:
    return ", ".join(map(str, pieces))


@contextmanager
def _packed(backbone: Backbone) -> Iterator[None]:
    was = backbone.packed
    backbone.pack()
    try:
        yield
    finally:
        if not was:
            backbone.unpack()


@contextmanager
def _unpacked(backbone: Backbone) -> Iterator[None]:
    was = backbone.packed
    backbone.unpack()
    try:
        yield
    finally:
        if was:
            backbone.pack()


def _cause_of_split(subject: Subject, backbone: Backbone, ids: Tensor, pieces: Sequence[int]) -> str:
    """The first layer whose output is off, and whether it is so in one piece, too."""
    own = _own_outputs(subject, backbone, ids)
    for split in ([ids.shape[1]], list(pieces)):
        layer = _first_off(_outputs_of_passes(backbone, ids, split), own)
        if layer is None:
            continue
        name = f"layer {layer} ({type(backbone.layers[layer]).__name__})"
        if len(split) == 1:
            return (
                f"{name} is the first that computes otherwise in a pass of deepen's than in the model's own forward, "
                "even over the whole text at once: it reads something that a pass doesn't bring (a bias or mask of its "
                "own beside transformers' attention interface, positions that it counts itself)"
            )
        return (
            f"{name} is the first whose output depends on where the text is cut: it carries something from pass to "
            "pass beside the keys, values, state and window that the cache holds, or counts positions itself"
        )
    return "what stands behind the last layer: the final norm, the head, or what is done to the logits"


@torch.no_grad()
def _own_outputs(subject: Subject, backbone: Backbone, ids: Tensor) -> list[Tensor]:
    outputs: list[Tensor] = []

    def hook(_layer: object, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    handles = [layer.register_forward_hook(hook) for layer in backbone.layers]
    try:
        subject.logits(ids)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


@torch.no_grad()
def _outputs_of_passes(backbone: Backbone, ids: Tensor, pieces: Sequence[int]) -> list[Tensor]:
    outputs: list[list[Tensor]] = [[] for _ in backbone.layers]

    def edit(layer: int, h: Tensor) -> Tensor:
        outputs[layer].append(h)
        return h

    cache = backbone.new_cache(batch_size=1, capacity=ids.shape[1])
    for piece in ids.split(list(pieces), dim=1):
        backbone.run(piece, cache, edit=edit)
        cache.commit([piece.shape[1]])
    return [torch.cat(each, dim=1) for each in outputs]


def _first_off(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> int | None:
    for layer, (ours, own) in enumerate(zip(actual, expected, strict=True)):
        size = own.double().square().mean().sqrt()
        if not (ours.double() - own.double()).abs().max() <= _OFF * size:
            return layer
    return None


# Rows side by side.


def passes_batch(subject: Subject, effort: Effort) -> Passed:
    """Rows of other lengths, pads, batch-mates, their order and rows dropped must leave each row as it is alone."""
    backbone, gauge = attached(subject), Gauge(subject.allowed)
    for seed in range(effort.num_texts):
        rows = subject.text(effort.length, seed=seed, batch=3)
        whole = [subject.logits(row[None])[0] for row in rows]
        for width in effort.widths:
            plan = _ragged_plan(width, effort.length)
            trip = _Trip(backbone, rows, plan, pads=subject.text(effort.length, seed=seed + 1000, batch=3))
            for order in ((0, 1, 2), (2, 0, 1)):
                for row, logits in zip(order, trip.logits(order), strict=True):
                    gauge.compare(
                        logits,
                        whole[row][: len(logits)],
                        seen=f"row {row} of three, read in passes over {_widths(plan, row)} of its tokens beside "
                        f"others (in the order {order})",
                        cause=lambda trip=trip, row=row: _cause_of_company(subject, trip, row),  # type: ignore[misc]
                    )
            for row, logits in zip((2, 0), trip.logits((0, 1, 2), keep=(2, 0)), strict=True):
                gauge.compare(
                    logits,
                    whole[row][: len(logits)],
                    seen=f"row {row} of three, after the first pass kept (with `keep_rows`) beside one other",
                    cause="the cache's rows are dropped or moved in some tensors and not in others (keep_rows)",
                )
    return gauge.passed()


def _ragged_plan(width: int, length: int) -> list[list[int]]:
    """Widths of passes over three rows: uneven prefixes, then each row in turn goes `width` and none."""
    prefixes = [max(1, length // part) for part in (3, 8, 5)]
    steps = [[width, 1, 0], [0, width, 1], [1, 0, width]]
    room = [length - prefix for prefix in prefixes]
    plan = [prefixes]
    for step in steps:
        taken = [min(each, left) for each, left in zip(step, room, strict=True)]
        room = [left - each for left, each in zip(room, taken, strict=True)]
        plan.append(taken)
    return plan


def _widths(plan: Sequence[Sequence[int]], row: int) -> str:
    return _said([widths[row] for widths in plan])


class _Trip:
    """A ragged reading of several rows: `plan[step][row]` tokens at a time, `pads` `[B, T]` standing at the pads."""

    def __init__(self, backbone: Backbone, rows: Tensor, plan: Sequence[Sequence[int]], *, pads: Tensor) -> None:
        self.backbone, self.rows, self.plan, self.pads = backbone, rows, plan, pads

    @torch.no_grad()
    def logits(self, order: Sequence[int], *, keep: Sequence[int] | None = None) -> list[Tensor]:
        """Logits `[n, V]` of each row in `order`, or in `keep`, to which the rows are cut down after the first pass."""
        found: dict[int, list[Tensor]] = {row: [] for row in order}
        cache = self.backbone.new_cache(batch_size=len(order), capacity=self.rows.shape[1])
        for step, of_rows in enumerate(self.plan):
            if step == 1 and keep is not None:
                cache.keep_rows([list(order).index(row) for row in keep])
                order = keep
            widths = [of_rows[row] for row in order]
            if not any(widths):
                continue
            logits = self.backbone.run(self._inputs(order, widths, cache), cache, widths=widths)
            cache.commit(widths)
            for place, row in enumerate(order):
                found[row].append(logits[place, : widths[place]])
        return [torch.cat(found[row]) for row in order]

    def with_pads(self, pads: Tensor) -> "_Trip":
        """The same with other ids at pads."""
        return _Trip(self.backbone, self.rows, self.plan, pads=pads)

    def with_mates(self, row: int, others: Tensor) -> "_Trip":
        """The same with other tokens in every row but `row`."""
        rows = others.clone()
        rows[row] = self.rows[row]
        return _Trip(self.backbone, rows, self.plan, pads=self.pads)

    def _inputs(self, order: Sequence[int], widths: Sequence[int], cache: PrefixCache) -> Tensor:
        ids = self.pads[list(order), : max(widths)].clone()
        for place, (row, width, start) in enumerate(zip(order, widths, cache.lengths, strict=True)):
            ids[place, :width] = self.rows[row, start : start + width]
        return ids


def _cause_of_company(subject: Subject, trip: _Trip, row: int) -> str:
    """By experiment: what of the company, when changed, moves the row."""

    def moved_by(other: _Trip) -> bool:
        before, after = (each.logits(range(len(trip.rows)))[row] for each in (trip, other))
        return bool((before - after).abs().max() > subject.allowed)

    if moved_by(trip.with_pads(subject.text(trip.rows.shape[1], seed=5000, batch=len(trip.rows)))):
        return (
            "tokens at pads reach the row: a sum, mean, maximum or routing over all positions of a pass, or a "
            "recurrence or convolution that reads on past the row's width"
        )
    if moved_by(trip.with_mates(row, subject.text(trip.rows.shape[1], seed=6000, batch=len(trip.rows)))):
        return (
            "another row's tokens reach this one: statistics or a capacity over the whole batch (a norm over the batch "
            "axis, experts that take a limited number of tokens), or a reshape that mixes rows"
        )
    return (
        "neither the tokens at pads nor those of other rows matter, so their lengths do: positions, or the entries "
        "that may be seen, are taken from one row (the first, the longest) for all of them"
    )


# Going back.


def passes_rollback(subject: Subject, effort: Effort) -> Passed:
    """Whatever count of a pass's tokens is committed, the cache must hold what reading just these tokens leaves."""
    backbone, comparison, gauge = attached(subject), Comparison(subject), Gauge(subject.allowed)
    for seed in range(effort.num_texts):
        prefixes = max(1, effort.length // 3), max(1, effort.length // 5)
        rows = subject.text(max(prefixes) + max(effort.widths) + _NUM_BEHIND, seed=seed, batch=len(prefixes))
        texts = _Texts(subject, backbone, rows)
        for width in (each for each in effort.widths if each > 1):
            # The second row's pass is shorter by one, so that it has a pad.
            _Rollbacks(texts, comparison, gauge, prefixes, (width, max(1, width - 1))).run()
    return gauge.passed()


class _Texts:
    """Rows of ids, and what each is alone: its logits, and what is held of it after any count of its tokens."""

    def __init__(self, subject: Subject, backbone: Backbone, rows: Tensor) -> None:
        self.backbone, self.rows = backbone, rows
        self.logits = [subject.logits(row[None])[0] for row in rows]
        self.held = memoize(self._held)

    def _held(self, row: int, length: int) -> list[Part]:
        return list(parts(fresh_reading(self.backbone, self.rows[row, :length].tolist()), 0))


class _Rollbacks:
    """Rows with prefixes of their own, one pass behind them, and every count of its tokens that can be kept."""

    def __init__(
        self, texts: _Texts, comparison: Comparison, gauge: Gauge, prefixes: Sequence[int], widths: Sequence[int]
    ) -> None:
        self._texts, self._backbone, self._rows = texts, texts.backbone, texts.rows
        self._comparison, self._gauge = comparison, gauge
        self._prefixes, self._widths = prefixes, widths

    @torch.no_grad()
    def run(self) -> None:
        """All of them, from one snapshot."""
        cache = self._backbone.new_cache(batch_size=len(self._rows), capacity=self._rows.shape[1] + max(self._widths))
        self._pass(cache, self._prefixes, whole=True)
        cache.commit(self._prefixes)
        before = cache.snapshot()
        for count in range(self._widths[0] + 1):
            counts = [count, *(max(0, width - count) for width in self._widths[1:])]
            self._pass(cache, self._widths)
            cache.commit(counts)
            self._check(cache, counts, f"{counts} of a pass over {self._widths} tokens were committed")
            cache.rollback(before)
        self._compare(cache, self._prefixes, "a snapshot was returned to")
        counts = [max(1, width // 2) for width in self._widths]
        self._pass(cache, self._widths, whole=True)
        cache.rollback(before)
        self._pass(cache, counts, whole=True)
        cache.commit(counts)
        self._check(cache, counts, f"a pass over {self._widths} tokens was forgotten and {counts} of them read again")

    def _pass(self, cache: PrefixCache, widths: Sequence[int], *, whole: bool = False) -> Tensor:
        starts = list(cache.lengths)
        longest = max(widths)
        chunks = [
            torch.nn.functional.pad(row[start : start + width], (0, longest - width))
            for row, start, width in zip(self._rows, starts, widths, strict=True)
        ]
        return self._backbone.run(torch.stack(chunks), cache, widths=widths, whole=whole)

    def _check(self, cache: PrefixCache, counts: Sequence[int], what: str) -> None:
        """What is held now, and what a pass behind it makes of it."""
        held = [start + count for start, count in zip(self._prefixes, counts, strict=True)]
        self._compare(cache, held, what)
        logits = self._pass(cache, [_NUM_BEHIND] * len(held))
        cache.commit([_NUM_BEHIND] * len(held))
        self._compare(cache, [length + _NUM_BEHIND for length in held], f"{what}, and {_NUM_BEHIND} behind them")
        for row, length in enumerate(held):
            self._gauge.compare(
                logits[row],
                self._texts.logits[row][length : length + _NUM_BEHIND],
                seen=f"once {what}, the tokens read next behind the {length} of row {row}",
                cause="something beside the keys, values, states and windows, which are right, goes from pass to pass: "
                "a counter or a buffer of the module's own, which nothing takes back",
            )

    def _compare(self, cache: PrefixCache, lengths: Sequence[int], what: str) -> None:
        for row, length in enumerate(lengths):
            differences = self._comparison.differences(list(parts(cache, row)), self._texts.held(row, length))
            if differences:
                raise Fault(
                    f"once {what}, row {row} of {len(lengths)}: {differences[0]} from that of a fresh reading of its "
                    f"{length} tokens (rounding explains {self._comparison.allowed:.1g})",
                    cause=self._cause(row, length, differences),
                )

    def _cause(self, row: int, length: int, differences: list[Difference]) -> str:
        first = differences[0].part
        return self._stale(row, length, first) or self._turned(row, differences) or _unknown(first)

    def _stale(self, row: int, length: int, odd: Part) -> str | None:
        """Which other count of tokens it would be right for."""
        if odd.is_entries:
            return None
        start, width = self._prefixes[row], self._widths[row]
        for other in (start + width, start, length - 1, length + 1, *range(1, self._rows.shape[1] + 1)):
            if not 0 < other <= self._rows.shape[1] or other == length:
                continue
            if any(part.layer == odd.layer and part.name == odd.name and self._comparison.equal(odd.tensor, part.tensor)
                   for part in self._texts.held(row, other)):  # fmt: skip
                return f"{odd} is that after {self._tokens_of(row, other)}: {_ROLLED[odd.name]}"
        return None

    def _tokens_of(self, row: int, count: int) -> str:
        start, width = self._prefixes[row], self._widths[row]
        if count == start + width:
            return f"all {width} tokens of the pass"
        return f"the {start} tokens before the pass" if count == start else f"{count} tokens"

    def _turned(self, row: int, differences: list[Difference]) -> str | None:
        """By how many positions keys are rotated too far, if that is what is wrong with them."""
        odd = differences[0].part
        if odd.name != "keys" or any(
            each.part.name == "values" and each.part.layer <= odd.layer for each in differences
        ):
            return None
        length, entry, width = odd.tensor.shape[1], differences[0].entry, self._widths[row]
        assert entry is not None
        for shift in sorted({*range(-width, width + 1)} - {0}, key=abs):
            shifted = self._shifted(row, length, shift)
            keys = next(part.tensor for part in shifted if (part.layer, part.name) == (odd.layer, "keys"))
            if self._comparison.equal(odd.tensor[:, entry:], keys[:, entry:]):
                return (
                    f"{odd} are those of tokens {abs(shift)} positions further {'on' if shift > 0 else 'back'}: the "
                    "positions they are rotated by did not go back with the forgotten tokens. The layer counts "
                    "positions itself instead of taking them from position_ids or the cache's length"
                )
        return None

    def _shifted(self, row: int, length: int, shift: int) -> list[Part]:
        """A fresh reading in which every token stands `shift` positions further on."""

        def hook(_model: object, _inputs: object, arguments: dict[str, object]) -> tuple[object, dict[str, object]]:
            positions = arguments["position_ids"]
            assert isinstance(positions, Tensor)
            # None may be negative: tables of positions begin at 0.
            return _inputs, {**arguments, "position_ids": (positions + shift).clamp(min=0)}

        handle = self._backbone.model.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            return list(parts(fresh_reading(self._backbone, self._rows[row, :length].tolist()), 0))
        finally:
            handle.remove()


_ROLLED = {
    "state": "the recurrent state is not taken back to the tokens that were committed (RecurrentStore.after)",
    "window": "the convolution's window is not that behind the tokens that were committed (RecurrentStore.after)",
}


def _unknown(odd: Part) -> str:
    if odd.is_entries:
        return (
            f"{odd} are first to differ: entries of forgotten tokens are left among them, or are written to the wrong "
            "place behind those that stay"
        )
    return f"{odd} is that after no beginning of the text: what a pass records to make it from is wrong or incomplete"
