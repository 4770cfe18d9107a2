"""What acts in a model while a block lasts, such as hooks or the forwards of a pass, and may be entered once more.

A layer that keeps no activations (activation checkpointing) runs again in the backward, where the blocks that its
forward stood in have ended. What they open through `lasting` it finds there again.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar

Opening = Callable[[], AbstractContextManager[None]]

_lasting: ContextVar[tuple[Opening, ...]] = ContextVar("lasting", default=())


@contextmanager
def lasting(*openings: Opening) -> Iterator[None]:
    """Enter what these open until the block ends; an `Again` that is made meanwhile enters it anew.

    What is open already must not change when it is opened once more. An opening takes no lock: autograd may open it on
    a thread of its own while the one that waits for the backward holds that lock.
    """
    token = _lasting.set((*_lasting.get(), *openings))
    try:
        with _opened(openings):
            yield
    finally:
        _lasting.reset(token)


class Again(AbstractContextManager[None]):
    """Enters what lasts where it is made: later, on any thread, and as often as it is asked to."""

    def __init__(self) -> None:
        self._openings = _lasting.get()
        self._entered: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._entered.append(_opened(self._openings))
        self._entered[-1].__enter__()

    def __exit__(self, *raised: object) -> None:
        self._entered.pop().__exit__(*raised)  # type: ignore[arg-type]


@contextmanager
def _opened(openings: tuple[Opening, ...]) -> Iterator[None]:
    with ExitStack() as stack:
        for opening in openings:
            stack.enter_context(opening())
        yield
