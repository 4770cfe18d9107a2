"""Runs requests tick by tick, whatever the depth their tokens are at.

A tick has three parts. Tokens enter: those that were committed last, and pieces of prompts. Then each group of
recursions that are one computation runs once, over every token that stands before one of them. Then tokens that are
done leave, all together, through the last layers, and those that were asked for through the head.

Tokens of a prompt go through in pieces. A piece recurs until none of its tokens goes on, and leaves as a whole: the
layers behind all recursions read what earlier tokens left there. The last token of a prompt enters as committed ones
do, alone.
"""

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from deepen.core.depthwise import Depthwise, Running, State, stacked
from deepen.core.types import RowAdvance, Spent

from .entries import CallEntries, Part
from .pool import EntryPool
from .request import Live
from .runner import Gain, Statistics


@dataclass(eq=False)
class _Span:
    """Tokens of one request that go through together, from position `start` on.

    `state` is that of all of them. Those at `going` run `level` next; the others wait. `ranks` has, of each level but
    the first, the places that they have among all of their row that came to it. `waited` counts ticks since all were
    done.
    """

    owner: "_Row"
    start: int
    state: State
    going: list[int]
    level: int = 0
    ranks: dict[int, dict[int, int]] = field(default_factory=dict)
    waited: int = 0
    is_prompt: bool = False

    @property
    def num_tokens(self) -> int:
        return len(self.state[0])

    @property
    def all_go(self) -> bool:
        return len(self.going) == self.num_tokens


@dataclass(eq=False)
class _Row:
    """A request in its slot: tokens that have entered, entries at each level, and the tokens that are on their way.

    `calls` are those that the next token to be committed comes of, a prompt's reading aside.
    """

    live: Live
    slot: int
    counts: list[int]
    num_entered: int = 0
    span: _Span | None = None
    calls: int = 0

    @property
    def num_of_prompt_left(self) -> int:
        return len(self.live.request.ids) - 1 - self.num_entered


class DepthRunner:
    """Batches the tokens of a `Depthwise` model by depth, over an `EntryPool`."""

    def __init__(
        self,
        model: Depthwise,
        pool: EntryPool,
        *,
        device: torch.device,
        prompt_width: int,
        exit_width: int,
    ) -> None:
        """Of prompts at most `prompt_width` tokens are on their way. Tokens leave once `exit_width` of them are done,
        or when one of them has waited as many ticks as there are recursions, or when no others are on their way.
        """
        self._model, self._layout, self._pool, self._device = model, pool.layout, pool, device
        self._prompt_width, self._exit_width = prompt_width, exit_width
        self._rows: dict[int, _Row] = {}
        self._recurring: list[_Span] = []
        self._done: deque[_Span] = deque()
        self.statistics = Statistics()

    @property
    def num_bytes(self) -> int:
        """Of the entries that are held."""
        return self._pool.num_bytes

    @property
    def most_bytes(self) -> int:
        """Of all entries."""
        return self._pool.most_bytes

    def refusal(self, num_tokens: int) -> str | None:
        """See `Runner`."""
        if num_tokens > self._pool.max_length:
            return f"a request may hold {self._pool.max_length} tokens, and this one {num_tokens}; raise max_length"
        if self._pool.needed(num_tokens) > self._pool.num_entries:
            needed = self._pool.needed(num_tokens) * self._pool.bytes_per_entry
            return (
                f"its {num_tokens} tokens may need {needed} bytes, and there are {self.most_bytes}; raise memory_bytes"
            )
        return None

    def has_room(self, num_tokens: int) -> bool:
        """See `Runner`."""
        return self._pool.has_room(num_tokens)

    def admit(self, live: Live) -> None:
        """See `Runner`."""
        slot = self._pool.open(live.request.most_tokens)
        self._rows[live.number] = _Row(live, slot, [0] * self._layout.num_levels)

    def remove(self, live: Live) -> None:
        """See `Runner`."""
        row = self._rows.pop(live.number)
        self._recurring = [span for span in self._recurring if span.owner is not row]
        self._done = deque(span for span in self._done if span.owner is not row)
        self._pool.close(row.slot)

    @torch.no_grad()
    def tick(self) -> list[Gain]:
        """See the top of this file. A request commits a token within twice as many ticks as there are recursions,
        pieces of its prompt aside.
        """
        self._enter(list(self._entering()))
        for span_group in self._by_group():
            self._recur(span_group)
        if not self._done:
            return []
        for span in self._done:
            span.waited += 1
        if not self._recurring or len(self._done) >= self._exit_width or self._is_overdue(self._done[0]):
            return self._leave()
        return []

    def _is_overdue(self, span: _Span) -> bool:
        return span.waited >= self._layout.num_levels

    # Tokens enter

    def _entering(self) -> Iterator[_Span]:
        """Committed tokens, and pieces of prompts, those of the requests that came first."""
        room = self._prompt_width - sum(
            row.span.num_tokens for row in self._rows.values() if row.span is not None and row.span.is_prompt
        )
        for row in self._rows.values():
            if row.span is None and row.num_of_prompt_left <= 0:
                yield self._new_span(row, 1)
            elif row.span is None and room > 0:
                num_tokens = min(row.num_of_prompt_left, room)
                room -= num_tokens
                yield self._new_span(row, num_tokens, is_prompt=True)
            if row.num_of_prompt_left > 0:
                # What becomes free is for the rest of it first.
                room = 0

    def _new_span(self, row: _Row, num_tokens: int, *, is_prompt: bool = False) -> _Span:
        row.span = _Span(row, row.num_entered, (), list(range(num_tokens)), is_prompt=is_prompt)
        row.num_entered += num_tokens
        return row.span

    def _enter(self, spans: Sequence[_Span]) -> None:
        if not spans:
            return
        ids = torch.tensor(
            [token for span in spans for token in span.owner.live.ids[span.start : span.start + len(span.going)]],
            device=self._device,
        )
        running, entries = self._call([(span, 0, range(len(span.going))) for span in spans])
        state = self._model.enter(ids, running, entries)
        start = 0
        for span in spans:
            width = len(span.going)
            span.state = tuple(part[start : start + width] for part in state)
            start += width
        self._recurring += spans
        self._spend(positions=len(ids), layers=len(ids) * len(self._layout.before))

    # Tokens recur

    def _by_group(self) -> Iterator[list[_Span]]:
        """Spans whose levels run the same weights, by level."""
        spans = sorted(self._recurring, key=lambda span: (self._layout.groups[span.level], span.level))
        for _, those in groupby(spans, key=lambda span: self._layout.groups[span.level]):
            yield list(those)

    def _recur(self, spans: Sequence[_Span]) -> None:
        """One recursion of all tokens of these that go on."""
        state = stacked([span.state if span.all_go else _at(span.state, span.going) for span in spans])
        running, entries = self._call([(span, span.level, span.going) for span in spans])
        state, goes_on = self._model.recur(state, running, entries)
        self.statistics.calls[len(running)] += 1
        applied = sum(len(self._layout.recursions[level]) * count for level, count in running.runs)
        self._spend(passes=1, layers=applied)
        start, decisions = 0, goes_on.tolist()
        self._stand_in(spans, decisions)
        for span in spans:
            end = start + len(span.going)
            self._advance(span, tuple(part[start:end] for part in state), decisions[start:end])
            start = end

    def _stand_in(self, spans: Sequence[_Span], goes_on: Sequence[bool]) -> None:
        """Where deeper recursions read tokens that don't run them, let them find these."""
        staying: dict[int, list[tuple[int, int]]] = {}
        tokens = ((span, place) for span in spans for place in span.going)
        for (span, place), goes in zip(tokens, goes_on, strict=True):
            if not goes:
                staying.setdefault(span.level, []).append((span.owner.slot, span.start + place))
        for level, places in staying.items():
            slots, positions = torch.tensor(places, device=self._device).T
            for layers in self._layout.recursions[level + 1 :]:
                if self._layout.under[layers[0]] is not None:
                    self._pool.stand_in(layers, slots, positions)

    def _advance(self, span: _Span, state: State, goes_on: Sequence[bool]) -> None:
        """Put back what a recursion made of those that ran it, and narrow the span to those that go on."""
        span.owner.counts[span.level] += len(span.going)
        span.owner.calls += not span.is_prompt
        span.state = state if span.all_go else _with(span.state, span.going, state)
        span.going = [place for place, goes in zip(span.going, goes_on, strict=True) if goes]
        span.level += 1
        if not span.going:
            self._recurring.remove(span)
            self._done.append(span)

    # Tokens leave

    def _leave(self) -> list[Gain]:
        """All that are done, in the order in which they were."""
        spans = list(self._done)
        self._done.clear()
        running, entries = self._call([(span, 0, range(span.num_tokens)) for span in spans])
        hidden = self._model.leave(stacked([span.state for span in spans]), running, entries)
        self._spend(layers=len(running) * len(self._layout.after))
        ends = torch.tensor([span.num_tokens for span in spans]).cumsum(0).tolist()
        for span in spans:
            span.owner.span = None
        asked = [(span.owner, end - 1) for span, end in zip(spans, ends, strict=True) if not span.is_prompt]
        if not asked:
            return []
        logits = self._model.logits(hidden[torch.tensor([place for _, place in asked], device=self._device)])
        logits = logits.cpu()  # one transfer instead of one a row
        self.statistics.heads[len(asked)] += 1
        return [self._gained(row, row_logits[None]) for (row, _), row_logits in zip(asked, logits, strict=True)]

    def _gained(self, row: _Row, logits: Tensor) -> Gain:
        self.statistics.tokens += 1
        calls, row.calls = row.calls, 0
        return Gain(row.live, RowAdvance(tuple(row.live.choose(logits))), calls)

    # One call of the model

    def _call(self, tokens: Sequence[tuple[_Span, int, Sequence[int]]]) -> tuple[Running, CallEntries]:
        """For tokens of spans that run a level, given by their places, the lowest levels first."""
        parts = [self._part(span, level, places) for span, level, places in tokens]
        positions = torch.tensor(
            [span.start + place for span, _, places in tokens for place in places], device=self._device
        )
        counts: Counter[int] = Counter()
        for _, level, places in tokens:
            counts[level] += len(places)
        running = Running(positions, tuple(sorted(counts.items())))
        return running, CallEntries(self._pool, running, parts)

    def _part(self, span: _Span, level: int, places: Sequence[int]) -> Part:
        if level and level not in span.ranks:
            first = span.owner.counts[level]
            span.ranks[level] = {place: first + rank for rank, place in enumerate(places)}
        positions = [span.start + place for place in places]
        ranks = {each: [found[place] for place in places] for each, found in span.ranks.items()} if level else {}
        return Part(span.owner.slot, level, positions, ranks)

    def _spend(self, *, passes: int = 0, positions: int = 0, layers: int = 0) -> None:
        self.statistics.spent += Spent(passes, positions, layers)


def _at(state: State, places: Sequence[int]) -> State:
    index = torch.tensor(places, device=state[0].device)
    return tuple(part[index] for part in state)


def _with(state: State, places: Sequence[int], new: State) -> State:
    index = torch.tensor(places, device=state[0].device)
    return tuple(part.index_copy(0, index, each) for part, each in zip(state, new, strict=True))
