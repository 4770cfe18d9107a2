"""Who waits and who is answered: first come, first served, and nobody is overtaken."""

from collections import deque
from collections.abc import Iterator

from .request import Live
from .runner import Runner


class Scheduler:
    """Requests in the order in which they came. One that there is no room for lets those behind it wait, too.

    Every request that is answered commits something within a bounded number of ticks, and holds a bounded number of
    tokens; so it ends, its room comes back, and the first that waits gets its turn.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._waiting: deque[Live] = deque()
        self._answered: dict[int, Live] = {}

    @property
    def num_waiting(self) -> int:
        """Requests without room yet."""
        return len(self._waiting)

    @property
    def num_answered(self) -> int:
        """Requests that are being answered."""
        return len(self._answered)

    def submit(self, live: Live) -> None:
        """Behind all others."""
        self._waiting.append(live)

    def find(self, number: int) -> Live | None:
        """The request of this number; None if it has ended, or never was."""
        waiting = {live.number: live for live in self._waiting}
        return self._answered.get(number) or waiting.get(number)

    def everybody(self) -> Iterator[Live]:
        """In the order in which they came."""
        yield from self._answered.values()
        yield from self._waiting

    def admit(self) -> None:
        """Begin with as many as there is room for."""
        while self._waiting and self._runner.has_room(self._waiting[0].request.most_tokens):
            live = self._waiting.popleft()
            self._answered[live.number] = live
            self._runner.admit(live)

    def release(self, live: Live) -> None:
        """Forget one that has ended."""
        if self._answered.pop(live.number, None) is not None:
            self._runner.remove(live)
        else:
            self._waiting.remove(live)
