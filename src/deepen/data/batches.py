"""Rows of token ids from documents, and batches of them, in their own order: to measure with."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

import torch

from deepen.core.types import Batch


class Encoder(Protocol):
    """What is needed of a tokenizer; transformers' have it."""

    eos_token_id: Any

    def encode(self, text: str, **options: Any) -> Any:
        """The ids of a text."""


def document_rows(texts: Iterable[str], tokenizer: Encoder, *, max_length: int, max_tokens: int) -> Iterator[list[int]]:
    """The first `max_length` tokens of each document, until there are `max_tokens`; the last row is cut to fit."""
    num_left = max_tokens
    for text in texts:
        row = token_ids(text, tokenizer)[: min(max_length, num_left)]
        yield row
        num_left -= len(row)
        if num_left == 0:
            return


def token_ids(text: str, tokenizer: Encoder) -> list[int]:
    """The text's ids, with what the tokenizer puts around every text; a special token written out in it is text."""
    return list(tokenizer.encode(text, split_special_tokens=True, verbose=False))


def batch_of(rows: Sequence[Sequence[int]]) -> Batch:
    """Rows as one batch, `[B, T]` with T the longest; the pads on the right are id 0, told by `lengths` alone."""
    width = max(map(len, rows))
    return Batch(
        torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long),
        torch.tensor([len(row) for row in rows]),
    )


def batches_of(rows: Iterable[Sequence[int]], *, size: int) -> list[Batch]:
    """Batches of `size` rows in their order; the last has what is left."""
    waiting = iter(rows)
    return [batch_of(chosen) for chosen in iter(lambda: list(islice(waiting, size)), [])]
