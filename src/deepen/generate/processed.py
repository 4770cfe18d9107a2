"""Decoding from logits that go through processors first: functions of a row's ids and its scores.

A position is processed with the ids it has before it, the drafted ones included, so what is committed is what plain
decoding would give under the same processors.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepen.core.method import Decoder, Sampler
from deepen.core.types import Advance, Prompt


class RowProcessors(NamedTuple):
    """What one row's scores go through, on which device, and the pads that its ids are shown with."""

    processors: Callable[[Tensor, Tensor], Tensor]
    pads: Sequence[int]
    device: torch.device


class _ProcessedSampler:
    """A sampler whose logits go through processors first, position by position."""

    def __init__(self, sampler: Sampler, rows: Sequence[RowProcessors]) -> None:
        self._sampler = sampler
        self._rows = rows

    def choose(self, row: int, logits: Tensor, history: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """As the sampler would, after `history + drafted[:i]` at position i."""
        processors, pads, device = self._rows[row]
        ids = torch.tensor([[*pads, *history, *drafted]], device=device)
        chosen: list[int] = []
        for index in range(len(logits)):
            # A copy, since processors may write into it.
            scores = logits[index : index + 1].to(device=device, dtype=torch.float32, copy=True)
            scores = processors(ids[:, : len(pads) + len(history) + index], scores)
            chosen += self._sampler.choose(row, scores, [*history, *drafted[:index]], [])
        return chosen


class ProcessedDecoder:
    """A decoder whose samplers' logits go through processors first."""

    def __init__(self, decoder: Decoder, rows: Sequence[RowProcessors]) -> None:
        self._decoder = decoder
        self._rows = list(rows)

    def open(self, prompt: Prompt) -> Any:
        """Read the prompt."""
        return self._decoder.open(prompt)

    def advance(self, decoding: Any, sampler: Sampler) -> Advance:
        """What the decoder does, with processed logits."""
        return self._decoder.advance(decoding, _ProcessedSampler(sampler, self._rows))

    def drop(self, decoding: Any, rows: Sequence[int]) -> None:
        """Forget finished rows."""
        self._decoder.drop(decoding, rows)
        self._rows = [kept for row, kept in enumerate(self._rows) if row not in set(rows)]
