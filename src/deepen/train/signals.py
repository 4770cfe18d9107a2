"""Ctrl-C and SIGTERM, held back until a run can stop with nothing lost."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_STDERR = 2
# What stops a program that has no handler of its own; a program's own handlers stay.
_STOPPING = (signal.default_int_handler, signal.SIG_DFL)


class Signals:
    """Holds the first one back until `deliver`; a second one stops at once."""

    def __init__(self) -> None:
        self._held: int | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """While the block lasts; a thread other than the main one gets no signals, and holds none."""
        is_main = threading.current_thread() is threading.main_thread()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM) if is_main}
        replaced = {number: handler for number, handler in handlers.items() if handler in _STOPPING}
        for number in replaced:
            signal.signal(number, self._take)
        try:
            yield
        finally:
            for number, handler in replaced.items():
                signal.signal(number, handler)

    def deliver(self) -> None:
        """Raises `KeyboardInterrupt` for Ctrl-C, or `SystemExit` for SIGTERM, if one came."""
        if self._held is not None:
            _stop(self._held)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._held is not None:
            _stop(number)
        self._held = number
        # Past Python's buffers, which may be in the middle of a write.
        os.write(_STDERR, b"\nstopping when this step is made; once more stops at once\n")


def _stop(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)  # what a shell reports for a program that this signal has ended
