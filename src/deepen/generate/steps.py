"""Rows that grow unevenly, told step by step."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# A verdict `[B]` on each row of ids `[B, S]`; the second argument is for scores, of which there are none.
Criteria = Callable[[Tensor, None], Tensor]


class Steps:
    """Tells rows as transformers' loop does: at each step one token of every row, then who has ended.

    A step is told once every row that goes on has its token. So criteria see rows of one length, each length once and
    in order, however many tokens a row gains at a time.
    """

    def __init__(
        self,
        prompt: Tensor,
        *,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        criteria: Criteria | None = None,
    ) -> None:
        """`prompt` is `[B, S]`. Rows end with one of `eos_ids` or when `criteria` say so; then `pad_id` takes their
        place, or they go on without end if that is None.
        """
        self._ids = prompt
        self._eos_ids = frozenset(eos_ids)
        self._pad_id = pad_id
        self._criteria = criteria
        self._waiting: list[deque[int]] = [deque() for _ in prompt]
        self._running = [True] * len(prompt)

    @property
    def ended(self) -> bool:
        """Whether every row has."""
        return not any(self._running)

    def after(self, row: int, tokens: Sequence[int]) -> Iterator[Tensor]:
        """The steps `[B]`, on the CPU, that can be told once `row` has gained `tokens`; none once all rows ended."""
        self._waiting[row].extend(tokens)
        while not self.ended and all(
            waiting for waiting, goes_on in zip(self._waiting, self._goes_on(), strict=True) if goes_on
        ):
            yield self._step()

    def _goes_on(self) -> list[bool]:
        return [running or self._pad_id is None for running in self._running]

    def _step(self) -> Tensor:
        tokens = [
            waiting.popleft() if goes_on else self._pad_id
            for waiting, goes_on in zip(self._waiting, self._goes_on(), strict=True)
        ]
        column = torch.tensor(tokens)
        verdicts = self._verdicts(column)
        self._running = [
            running and token not in self._eos_ids and not verdict
            for running, token, verdict in zip(self._running, tokens, verdicts, strict=True)
        ]
        return column

    def _verdicts(self, column: Tensor) -> list[bool]:
        if not self._criteria:
            return [False] * len(column)
        self._ids = torch.cat([self._ids, column[:, None].to(self._ids)], dim=1)
        return [bool(verdict) for verdict in self._criteria(self._ids, None).tolist()]
