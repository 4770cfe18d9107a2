"""Requests whose rows come to a running decoding and leave it, in an order that hypothesis draws; and each alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from deepen.core.method import Joining
from deepen.core.types import Prompt
from deepen.generate.loop import complete
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.generate.stop import StopConfig
from deepen.generate.verify import agreement

CAPACITY = 160
MOST_ROWS = 3

# Some lie on both sides of a block of entries (128).
_prompts = st.one_of(
    st.lists(st.integers(0, 255), min_size=1, max_size=12),
    # Text that repeats itself, so that copied drafts are often accepted.
    st.builds(lambda unit, times: unit * times, st.lists(st.integers(0, 255), min_size=1, max_size=4), st.just(6)),
    st.builds(lambda length, step: [step * i % 251 for i in range(length)], st.integers(120, 134), st.integers(1, 9)),
)


@dataclass
class Request:
    """What is asked for; and the tokens that came of it, each with the logits that it was chosen by."""

    prompt: list[int]
    num_new: int
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return len(self.tokens) >= self.num_new

    def again(self) -> "Request":
        """The same, and nothing has come of it yet."""
        return Request(self.prompt, self.num_new, self.sampling)


requests = st.lists(
    st.builds(
        Request,
        _prompts,
        st.integers(1, 7),
        st.sampled_from([SamplingConfig(), SamplingConfig(temperature=0.8, top_k=50, seed=3)]),
    ),
    min_size=2,
    max_size=5,
)


class _Listening:
    """Chooses for each row as its request says, and notes the logits of what will be committed."""

    def __init__(self, running: Sequence[Request]) -> None:
        self._running = running

    def choose(self, row: int, logits: Tensor, history: Sequence[int], drafted: Sequence[int]) -> list[int]:
        request = self._running[row]
        chosen = BatchSampler([request.sampling]).choose(0, logits, history, drafted)
        request.logits += logits[: 1 + agreement(drafted, chosen)].clone()
        return chosen


def advance(decoder: Any, decoding: Any, running: Sequence[Request]) -> None:
    """One advance, of which every row takes what it has asked for; rows that came together have one limit."""
    rows = decoder.advance(decoding, _Listening(running)).rows
    assert len(rows) == len(running)
    for request, gained in zip(running, rows, strict=True):
        request.tokens += gained.tokens[: request.num_new - len(request.tokens)]


def alone(decoder: Any, request: Request) -> Request:
    """It in a decoding of its own, whose tokens are those of `complete`."""
    answer = request.again()
    decoding = decoder.open(Prompt((tuple(request.prompt),), request.num_new))
    while not answer.is_done:
        advance(decoder, decoding, [answer])
    stop = StopConfig(max_new_tokens=request.num_new)
    (result,) = complete(decoder, [request.prompt], sampling=[request.sampling], stop=stop)
    assert answer.tokens == result.tokens
    return answer


def served(decoder: Joining, asked: Sequence[Request], data: st.DataObject) -> list[Request]:
    """All of them in one decoding; some leave before they are done."""
    return _Service(decoder, [request.again() for request in asked], data).run()


class _Service:
    def __init__(self, decoder: Joining, asked: list[Request], data: st.DataObject) -> None:
        self._decoder, self._asked, self._data = decoder, asked, data
        self._waiting, self._running = list(asked), list[Request]()
        self._decoding: Any = None

    def run(self) -> list[Request]:
        while self._waiting or self._running:
            getattr(self, self._draw(st.sampled_from(self._possible)))()
        return self._asked

    def _draw(self, strategy: st.SearchStrategy[Any]) -> Any:
        return self._data.draw(strategy)

    @property
    def _possible(self) -> list[str]:
        coming = ["_come"] if self._waiting and len(self._running) < MOST_ROWS else []
        # Named often, since each takes but a token.
        return [*coming, *(["_advance"] * 6 + ["_turn", "_leave"] if self._running else [])]

    def _come(self) -> None:
        num_free = MOST_ROWS - len(self._running)
        coming = self._waiting[: self._draw(st.integers(1, num_free))]
        self._waiting = self._waiting[len(coming) :]
        decoding = self._open(coming)
        self._running = [*self._running, *coming]
        if self._decoding is None:
            self._decoding = decoding
        else:
            self._decoder.join(self._decoding, decoding, most_rows=MOST_ROWS)

    def _open(self, coming: Sequence[Request]) -> Any:
        num_new = max(request.num_new for request in coming)
        prompts = [tuple(request.prompt) for request in coming]
        if len(coming) > 1:
            return self._decoder.open(Prompt(tuple(prompts), num_new, CAPACITY))
        (prompt,) = prompts
        cuts = self._draw(st.lists(st.integers(1, len(prompt)), max_size=3).map(sorted))
        first, *others = [prompt[start:end] for start, end in zip([0, *cuts], [*cuts, len(prompt)], strict=True)]
        decoding = self._decoder.open(Prompt((first,), num_new, CAPACITY))
        for piece in others:
            spent = self._decoder.feed(decoding, piece)
            assert spent.positions == len(piece)
        return decoding

    def _advance(self) -> None:
        advance(self._decoder, self._decoding, self._running)
        done = [row for row, request in enumerate(self._running) if request.is_done]
        if done:
            self._without(done)

    def _leave(self) -> None:
        self._without([self._draw(st.integers(0, len(self._running) - 1))])

    def _without(self, rows: Sequence[int]) -> None:
        left = [row for row in range(len(self._running)) if row not in rows]
        if self._draw(st.booleans()):
            self._decoder.drop(self._decoding, rows)
            self._running = [self._running[row] for row in left]
        else:
            self._keep(_filled(left))

    def _turn(self) -> None:
        self._keep(self._draw(st.permutations(range(len(self._running)))))

    def _keep(self, order: Sequence[int]) -> None:
        self._decoder.keep(self._decoding, order)
        self._running = [self._running[row] for row in order]


def _filled(left: Sequence[int]) -> list[int]:
    """These rows, in an order in which only those stand elsewhere that have come up from behind them all."""
    places = range(len(left))
    behind = [row for row in left if row not in places]
    return [place if place in left else behind.pop() for place in places]


def assert_bits(ours: Request, theirs: Request) -> None:
    """As far as ours has come, the tokens and their logits are the others'."""
    assert ours.tokens == theirs.tokens[: len(ours.tokens)]
    for actual, expected in zip(ours.logits, theirs.logits, strict=False):
        assert torch.equal(actual, expected)


def assert_close(ours: Request, theirs: Request, *, tolerance: float) -> None:
    """As `assert_bits`, up to rounding."""
    assert ours.tokens == theirs.tokens[: len(ours.tokens)]
    for actual, expected in zip(ours.logits, theirs.logits, strict=False):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
