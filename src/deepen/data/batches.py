"""Rows of token ids from documents, and batches of rows: in a seeded order to train on, in their own to measure with.

A row holds tokens of one document only. Nothing in a `Batch` could keep documents that share a row from attending to
each other, and a method may divide a document from its first token on.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from deepen.core.types import Batch


class Encoder(Protocol):
    """What is needed of a tokenizer; transformers' have it."""

    eos_token_id: Any

    def encode(self, text: str, **options: Any) -> Any:
        """The ids of a text."""


def training_rows(texts: Iterable[str], tokenizer: Encoder, *, max_length: int) -> list[list[int]]:
    """The documents' tokens, each followed by the end of sequence, in rows of 2 to `max_length` tokens.

    A longer document goes on in the next row. What is left at its end is a row of its own, unless it is one token,
    which nothing would predict.
    """
    rows = []
    for text in texts:
        ids = token_ids(text, tokenizer)
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids.append(tokenizer.eos_token_id)
        rows += [ids[start : start + max_length] for start in range(0, len(ids), max_length)]
    return [row for row in rows if len(row) > 1]


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


def shuffled_batches(rows: Sequence[Sequence[int]], *, batch_size: int, seed: int) -> Iterator[Batch]:
    """Batches of `batch_size` rows without end: every row once, in an order drawn from `seed`, then in another.

    A batch may hold the end of one round and the beginning of the next. There must be at least one row.
    """
    stream = _shuffled_rounds(rows, torch.Generator().manual_seed(seed))
    while True:
        yield batch_of([next(stream) for _ in range(batch_size)])


def batch_of(rows: Sequence[Sequence[int]]) -> Batch:
    """Rows as one batch, `[B, T]` with T the longest; the pads on the right are id 0, told by `lengths` alone."""
    width = max(map(len, rows))
    return Batch(
        torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.long),
        torch.tensor([len(row) for row in rows]),
    )


def _shuffled_rounds(rows: Sequence[Sequence[int]], generator: torch.Generator) -> Iterator[Sequence[int]]:
    while True:
        for index in torch.randperm(len(rows), generator=generator).tolist():
            yield rows[index]
