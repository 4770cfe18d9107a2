"""Runs requests as rows of one decoding: what serves any model whose rows come and go.

A row advances with all others, pass by pass, whatever each of them is at: one reads a draft while another has none. A
prompt is read apart, a piece a tick, and its row joins the others once it is read.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from deepen.core.errors import ConfigError
from deepen.core.method import Joining
from deepen.core.types import Prompt
from deepen.nn.attention import KEY_BLOCK, round_up

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

    def __init__(
        self, decoder: Joining, *, slots: int, max_length: int, memory_bytes: int | None, prompt_width: int
    ) -> None:
        """As many of the `slots` as `memory_bytes` has room for, None for all; `ConfigError` if that is none.

        In a tick at most `prompt_width` tokens of prompts are read.
        """
        self._decoder, self._max_length, self._prompt_width = decoder, max_length, prompt_width
        self._bytes_per_row = decoder.state_bytes(context=round_up(max_length, KEY_BLOCK))
        fitting = slots if memory_bytes is None else memory_bytes // self._bytes_per_row
        if fitting < 1:
            raise ConfigError(
                f"memory_bytes is {memory_bytes}, too little for a request of max_length {max_length}, which takes "
                f"{self._bytes_per_row}; lower max_length or raise memory_bytes"
            )
        if memory_bytes is not None and fitting > 1:
            # Beside several rows there must be room for one that is being read.
            fitting -= 1
        self._slots = min(slots, fitting)
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
        """Of caches of `max_length` tokens: all slots' at once, from when a second row has come."""
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
