"""Documents as a model is measured on them: their beginnings, in their own order, and what of them counts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from deepen.core.types import Batch
from deepen.data.batches import batch_of, token_ids
from deepen.data.encoding import ChatEncoder, encode
from deepen.data.formats import Document, Text, difficulty_of, document_of
from deepen.data.records import Split
from deepen.data.split import records_of


@dataclass(frozen=True)
class MeasuredRow:
    """The ids of a document, or of its beginning, which of them are predicted (None: all), and how hard it is."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...] | None
    difficulty: int | None = None


def documents_of(data: str, split: Split) -> Iterator[Document]:
    """Those of one split of a corpus, in whatever format, that are not empty, in its order."""
    for document in map(document_of, records_of(data, split)):
        if not isinstance(document, Text) or document.text.strip():
            yield document


def measured_rows(
    documents: Iterator[Document], tokenizer: ChatEncoder, *, max_length: int, max_tokens: int
) -> Iterator[MeasuredRow]:
    """The beginning of each document, until there are `max_tokens`; the last one is cut to fit."""
    num_left = max_tokens
    for document in documents:
        row = _row(document, tokenizer, max_length=min(max_length, num_left))
        if row.ids:
            yield row
        num_left -= len(row.ids)
        if num_left == 0:
            return


def measured_batch(rows: Sequence[MeasuredRow]) -> Batch:
    """Rows as one batch; `learned` is None where all of them are texts."""
    batch = batch_of([row.ids for row in rows])
    if all(row.learned is None for row in rows):
        return batch
    learned = torch.zeros_like(batch.input_ids, dtype=torch.bool)
    for place, row in enumerate(rows):
        learned[place, : len(row.ids)] = torch.tensor(row.learned if row.learned is not None else True)
    difficulty = torch.zeros_like(batch.input_ids)
    difficulty[:] = torch.tensor([[row.difficulty or 0] for row in rows])
    return replace(batch, learned=learned, difficulty=difficulty if difficulty.any() else None)


def _row(document: Document, tokenizer: ChatEncoder, *, max_length: int) -> MeasuredRow:
    if isinstance(document, Text):
        # Without the end of sequence, which training puts behind it and which is no part of the text.
        return MeasuredRow(tuple(token_ids(document.text, tokenizer)[:max_length]), None)
    encoded = encode(document, tokenizer)
    return MeasuredRow(tuple(encoded.ids[:max_length]), tuple(encoded.learned[:max_length]), difficulty_of(document))
