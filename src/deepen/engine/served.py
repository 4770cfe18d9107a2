"""The engine for callers that wait: one thread runs it, and every request has its own stream of events."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Self

from deepen.core.errors import DeepenError
from deepen.generate.events import Event, Finished

from .engine import Engine
from .request import Request

_Asked = tuple[Callable[[], Any], Future[Any]]


class AsyncEngine:
    """`async with AsyncEngine(engine) as served: async for event in served.stream(request): ...`

    A stream that its reader leaves is cancelled. What goes wrong in the engine itself ends every stream with its
    error; leaving the block ends those that are there.
    """

    def __init__(self, engine: Engine) -> None:
        """`engine` is used by nobody else from now on."""
        self._engine = engine
        # Between two steps the thread does what it is asked here; nobody else touches the engine.
        self._asked: SimpleQueue[_Asked] = SimpleQueue()
        self._streams: dict[int, asyncio.Queue[Event | Exception]] = {}
        self._gate = Lock()
        self._closed: Exception | None = DeepenError("the engine doesn't run: ask inside `async with AsyncEngine(...)`")
        self._stops = False
        self._thread: Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __aenter__(self) -> Self:
        self._loop, self._closed, self._stops = asyncio.get_running_loop(), None, False
        self._thread = Thread(target=self._run, name="deepen engine", daemon=True)
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._thread is not None, "entered"
        with self._gate:
            if self._closed is None:
                self._asked.put((self._stop, Future()))
        await asyncio.to_thread(self._thread.join)

    async def stream(self, request: Request) -> AsyncIterator[Event]:
        """The events of one request, the last of them `Finished`. Raises what `Engine.submit` raises."""
        events: asyncio.Queue[Event | Exception] = asyncio.Queue()
        try:
            await asyncio.wrap_future(self._ask(partial(self._submit, request, events)))
            while True:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished):
                    return
        finally:
            with self._gate:
                if self._closed is None:
                    # Behind the submission, should its answer not have been waited for.
                    self._asked.put((partial(self._leave, events), Future()))

    def _ask(self, what: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._gate:
            if self._closed is not None:
                raise self._closed
            self._asked.put((what, future))
        return future

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        error: Exception = DeepenError("the engine was stopped before the request had ended; ask again")
        try:
            while not self._stops:
                for what, future in self._due():
                    _answer(what, future)
                for event in self._engine.step():
                    self._tell(event.row, event)
        except Exception as fault:  # whatever it is, those who wait must hear of it
            error = fault
        with self._gate:
            self._closed = error
        while not self._asked.empty():
            _, future = self._asked.get()
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        for number in list(self._streams):
            self._tell(number, error)

    def _due(self) -> Iterator[_Asked]:
        """What was asked since the last step; of an engine with nothing to do, after waiting for it."""
        if not self._engine.is_busy:
            yield self._asked.get()
        while not self._stops:
            try:
                yield self._asked.get_nowait()
            except Empty:
                return

    def _submit(self, request: Request, events: "asyncio.Queue[Event | Exception]") -> None:
        self._streams[self._engine.submit(request)] = events

    def _leave(self, events: "asyncio.Queue[Event | Exception]") -> None:
        for number in [number for number, each in self._streams.items() if each is events]:
            del self._streams[number]
            self._engine.cancel(number)

    def _stop(self) -> None:
        self._stops = True
        for number in self._streams:
            self._engine.cancel(number)

    def _tell(self, number: int, event: Event | Exception) -> None:
        events = self._streams.get(number)
        if events is None:
            return
        assert self._loop is not None, "entered"
        self._loop.call_soon_threadsafe(events.put_nowait, event)
        if isinstance(event, Finished):
            del self._streams[number]


def _answer(what: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return  # nobody waits for it any more
    try:
        future.set_result(what())
    except Exception as error:  # of what was asked: the one who asked gets it
        future.set_exception(error)
