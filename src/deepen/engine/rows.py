"""Runs requests as rows of one decoding: what serves any model whose rows come and go.

A row advances with all others, pass by pass, whatever each of them is at: one reads a draft while another has none. A
prompt is read apart, a piece a tick, and its row joins the others once it is read.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deepen.core.method import Joining
from deepen.core.types import Prompt

from .request import Live
from .runner import Gain, Statistics


class _RowSampler:
    """Lets each row choose for itself."""

    def __init__(self, rows: Sequence[Live]) -> None:
        self._rows = rows

    def choose(self, row: int, logits: Tensor, history: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """As the request of this row does."""
        return self._rows[row].choose(logits, drafted)


class RowRunner:
    """Advances the rows of a `Joining` decoder together; each has memory for `max_length` tokens.

    A prompt that is being read has its own, beside that of the rows: there is one such at a time.
    """

    def __init__(self, decoder: Joining, *, slots: int, max_length: int, bytes_per_row: int, prompt_width: int) -> None:
        """`prompt_width` tokens of prompts are read in a tick, at most; `bytes_per_row` are those of `max_length`."""
        self._decoder, self._slots, self._max_length = decoder, slots, max_length
        self._bytes_per_row, self._prompt_width = bytes_per_row, prompt_width
        self._decoding: Any = None
        self._rows: list[Live] = []
        self._has_joined = False
        self._unread: deque[Live] = deque()
        # Of the first of those.
        self._reading: Any = None
        self._num_read = 0
        self.statistics = Statistics()

    @property
    def num_bytes(self) -> int:
        """Of caches as they are allocated: all slots' at once, from when a second row has come."""
        num_rows = self._slots if self._has_joined else len(self._rows)
        return (num_rows + (self._reading is not None)) * self._bytes_per_row

    @property
    def most_bytes(self) -> int:
        """Of all slots, and a prompt that is being read."""
        return (self._slots + (self._slots > 1)) * self._bytes_per_row

    def refusal(self, num_tokens: int) -> str | None:
        """See `Runner`."""
        if num_tokens <= self._max_length:
            return None
        return f"a request may hold {self._max_length} tokens, and this one {num_tokens}; raise max_length"

    def has_room(self, num_tokens: int) -> bool:
        """See `Runner`."""
        return len(self._rows) + len(self._unread) < self._slots

    def admit(self, live: Live) -> None:
        """See `Runner`."""
        self._unread.append(live)

    def remove(self, live: Live) -> None:
        """See `Runner`. The last row takes the place of one that goes, so that no others move."""
        if live in self._unread:
            if live is self._unread[0]:
                self._reading, self._num_read = None, 0
            self._unread.remove(live)
            return
        place, last = self._rows.index(live), len(self._rows) - 1
        if not last:
            self._decoding, self._rows, self._has_joined = None, [], False
            return
        order = [last if row == place else row for row in range(last)]
        self._decoder.keep(self._decoding, order)
        self._rows = [self._rows[row] for row in order]

    def tick(self) -> list[Gain]:
        """Read of prompts, then one pass over all rows: each commits a token or more."""
        self._read()
        if not self._rows:
            return []
        advance = self._decoder.advance(self._decoding, _RowSampler(self._rows))
        self.statistics.spent += advance.spent
        self.statistics.calls[advance.spent.positions] += 1
        gains = [Gain(live, row, advance.spent.passes) for live, row in zip(self._rows, advance.rows, strict=True)]
        self.statistics.tokens += sum(len(gain.advance.tokens) for gain in gains)
        return gains

    def _read(self) -> None:
        """The next tokens of prompts, those of the requests that came first."""
        room = self._prompt_width
        while self._unread and room:
            live = self._unread[0]
            piece = live.request.ids[self._num_read : self._num_read + room]
            self._read_piece(live, piece)
            room -= len(piece)
            self._num_read += len(piece)
            if self._num_read == len(live.request.ids):
                self._join()

    def _read_piece(self, live: Live, piece: Sequence[int]) -> None:
        if self._reading is not None:
            self._decoder.feed(self._reading, piece)
            return
        most = live.request.stop.max_new_tokens
        self._reading = self._decoder.open(Prompt((tuple(piece),), most, capacity=self._max_length))

    def _join(self) -> None:
        """A prompt is read: its row advances with the others from now on."""
        if self._decoding is None:
            self._decoding = self._reading
        else:
            self._decoder.join(self._decoding, self._reading, most_rows=self._slots)
            self._has_joined = True
        self._rows.append(self._unread.popleft())
        self._reading, self._num_read = None, 0
