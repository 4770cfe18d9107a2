"""Requests in, events out: each request gets the tokens that it would get alone.

    engine = Engine(model, backbone=model.backbone, slots=16)
    for event in engine.stream([Request(ids) for ids in prompts]):
        ...

or request by request: `submit`, `step` as long as there `is_busy`, `cancel`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

from deepen.backbones.hf import Backbone
from deepen.core.depthwise import Depthwise
from deepen.core.errors import ConfigError, DeepenError, PromptError
from deepen.core.method import Joining
from deepen.generate.detokenize import Tokenizer
from deepen.generate.events import Event, Finished, RowResult

from .depths import DepthRunner
from .pool import EntryPool
from .request import Live, Request
from .rows import RowRunner
from .runner import Runner, Statistics
from .scheduler import Scheduler

DEFAULT_LENGTH = 2048
"""Tokens that a request may hold, where the model could hold more."""


class Engine:
    """Answers many requests at once."""

    def __init__(
        self,
        decoder: Any,
        *,
        backbone: Backbone,
        slots: int = 8,
        max_length: int | None = None,
        memory_bytes: int | None = None,
        prompt_width: int = 256,
        exit_width: int | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        """`decoder` is a `Depthwise` model, or one whose rows come and go (`Joining`).

        slots         requests that are answered at once
        max_length    tokens that one may hold, its prompt's among them; default: the context, at most DEFAULT_LENGTH
        memory_bytes  for keys and values; default: enough for all slots
        prompt_width  tokens of prompts that go through at once
        exit_width    of a model that is batched by depth, tokens that leave together where none has waited for long
                      (DepthRunner); default: as many as there are slots
        tokenizer     for the text of events, and for stop strings

        Raises `ConfigError` for a number that can't be, and for a decoder that can't serve; `CannotJoin` for one that
        can't as it is configured.
        """
        self._refuse_numbers(
            slots=slots,
            max_length=max_length,
            memory_bytes=memory_bytes,
            prompt_width=prompt_width,
            exit_width=exit_width,
        )
        self._backbone, self._tokenizer = backbone, tokenizer
        self._runner = make_runner(
            decoder,
            backbone,
            slots=slots,
            max_length=max_length or min(backbone.context_length or DEFAULT_LENGTH, DEFAULT_LENGTH),
            memory_bytes=memory_bytes,
            prompt_width=prompt_width,
            exit_width=exit_width or slots,
        )
        self._scheduler = Scheduler(self._runner)
        self._numbers = count()
        self._fault: BaseException | None = None

    @staticmethod
    def _refuse_numbers(**numbers: int | None) -> None:
        for name, number in numbers.items():
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be 1 or more, not {number}")

    @property
    def is_busy(self) -> bool:
        """Whether any request is left to answer."""
        return bool(self._scheduler.num_waiting or self._scheduler.num_answered)

    @property
    def num_waiting(self) -> int:
        """Requests that there is no room for yet."""
        return self._scheduler.num_waiting

    @property
    def num_answered(self) -> int:
        """Requests that are being answered."""
        return self._scheduler.num_answered

    @property
    def num_bytes(self) -> int:
        """Of keys and values that are held now, and of states that stand in their place."""
        return self._runner.num_bytes

    @property
    def most_bytes(self) -> int:
        """That can ever be held."""
        return self._runner.most_bytes

    @property
    def statistics(self) -> Statistics:
        """What was run since the beginning."""
        return self._runner.statistics

    def submit(self, request: Request) -> int:
        """Let a request wait for its turn; gives the number by which events name it.

        Raises `PromptError` for ids that are no prompt of the model's, and for a request that could never be held.
        """
        live = self._accepted(request)
        self._scheduler.submit(live)
        return live.number

    def _accepted(self, request: Request) -> Live:
        self._refuse_faulty()
        request.check(vocab_size=self._backbone.vocab_size, context_length=self._backbone.context_length)
        refusal = self._runner.refusal(request.most_tokens)
        if refusal is not None:
            raise PromptError(
                f"the request can never be answered: {refusal}, shorten the prompt or lower max_new_tokens"
            )
        return Live(next(self._numbers), request, self._tokenizer)

    def _refuse_faulty(self) -> None:
        if self._fault is not None:
            raise DeepenError(
                f"the engine broke off in the middle of a step ({type(self._fault).__name__}: {self._fault}), so what "
                "its requests hold can't be relied on; make a new one, and ask again"
            ) from self._fault

    def cancel(self, number: int) -> None:
        """End a request at the next step, with the reason "cancelled"; one that has ended already stays as it is."""
        live = self._scheduler.find(number)
        if live is not None:
            live.cancel()

    def step(self) -> list[Event]:
        """One unit of work, and what came of it.

        An exception here is none of a request's. It leaves the engine of no more use: from then on it refuses.
        """
        self._refuse_faulty()
        try:
            return self._step()
        except BaseException as fault:
            self._fault = fault
            raise

    def _step(self) -> list[Event]:
        events = [event for live in list(self._scheduler.everybody()) for event in self._ended(live)]
        self._scheduler.admit()
        if self._scheduler.num_answered:
            for gain in self._runner.tick():
                events += gain.live.take(gain.advance, gain.passes)
                if gain.live.reason is not None:
                    self._scheduler.release(gain.live)
        return events

    def _ended(self, live: Live) -> Iterator[Event]:
        """Of requests that ended otherwise than by a token: cancelled, or with nothing to add."""
        if live.reason is not None:
            self._scheduler.release(live)
            yield Finished(live.number, live.reason, live.error)

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Submit all of these, and give events until each has ended; `row` is a request's index here.

        If one is refused, none is submitted; those that haven't ended when a reader leaves are forgotten. Raises
        `ConfigError` while requests are there that were submitted otherwise, whose events would be lost.
        """
        num_others = self.num_waiting + self.num_answered
        if num_others:
            raise ConfigError(
                f"the engine has {num_others} requests to answer, whose events would be lost: go on with step until it "
                "isn't busy, or submit these, too"
            )
        lives = [self._accepted(request) for request in requests]
        rows = {live.number: row for row, live in enumerate(lives)}
        for live in lives:
            self._scheduler.submit(live)
        try:
            while self.is_busy:
                for event in self.step():
                    yield replace(event, row=rows[event.row])
        finally:
            for live in list(self._scheduler.everybody()):
                self._scheduler.release(live)

    def complete(self, requests: Sequence[Request]) -> list[RowResult]:
        """The outcome of each, in this order."""
        results = [RowResult() for _ in requests]
        for event in self.stream(requests):
            results[event.row].add(event)
        return results


def make_runner(
    decoder: Any,
    backbone: Backbone,
    *,
    slots: int,
    max_length: int,
    memory_bytes: int | None,
    prompt_width: int,
    exit_width: int,
) -> Runner:
    """The one that fits a decoder."""
    if isinstance(decoder, Depthwise):
        pool = EntryPool(
            decoder.depth_layout(),
            num_slots=slots,
            max_length=max_length,
            memory_bytes=memory_bytes,
            device=backbone.device,
            dtype=backbone.dtype,
        )
        if not pool.has_room(1):
            raise ConfigError(
                f"memory_bytes is {memory_bytes}, too little for a single token, which may take "
                f"{pool.needed(1) * pool.bytes_per_entry}; raise memory_bytes"
            )
        return DepthRunner(decoder, pool, device=backbone.device, prompt_width=prompt_width, exit_width=exit_width)
    if not isinstance(decoder, Joining):
        raise ConfigError(
            f"a {type(decoder).__name__} answers its rows together and can't take any on its way; its rows would have "
            "to come and go (core/method.py, Joining)"
        )
    decoder.check_joining()
    return RowRunner(decoder, slots=slots, max_length=max_length, memory_bytes=memory_bytes, prompt_width=prompt_width)
