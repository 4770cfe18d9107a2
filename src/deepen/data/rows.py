"""How a corpus is cut into the rows of batches; every token is in exactly one row."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deepen.core.errors import DeepenError
from deepen.core.types import Batch, Cut
from deepen.data.tokens import TokenCorpus


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a corpus: row r has its tokens `bounds[r]` to before `bounds[r + 1]`."""

    corpus: TokenCorpus
    bounds: np.ndarray[Any, Any]
    cut: Cut

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def batch(self, indices: list[int]) -> Batch:
        """These rows, `[B, T]` with T the longest; packed ones say which document each token belongs to."""
        spans = [(int(self.bounds[index]), int(self.bounds[index + 1])) for index in indices]
        corpus = self.corpus
        return Batch(
            _padded([corpus.tokens(*span) for span in spans]),
            torch.tensor([end - start for start, end in spans]),
            documents=_padded([corpus.documents_of(*span) for span in spans]) if self.cut == "packed" else None,
            learned=_padded([corpus.learned_of(*span) for span in spans]) if corpus.learned is not None else None,
            difficulty=(
                _padded([corpus.difficulty_of(*span) for span in spans]) if corpus.difficulties is not None else None
            ),
        )


def cut_rows(corpus: TokenCorpus, *, max_length: int, cut: Cut) -> Rows:
    """Rows of at most `max_length` tokens, 2 or more. Raises `DeepenError` for a corpus without tokens.

    Cut by document, a longer document goes on in the next row. With `max_length` above 2, a row is one token only where
    its document is: the last cut moves so that what is left at the end has something to be predicted from.
    """
    if corpus.num_tokens == 0:
        raise DeepenError("there is nothing to make rows of: the corpus has no token")
    if cut == "packed":
        bounds = np.append(np.arange(0, corpus.num_tokens, max_length), corpus.num_tokens)
    else:
        starts = np.concatenate([[0], corpus.ends[:-1]])
        pieces = [_bounds(int(start), int(end), max_length) for start, end in zip(starts, corpus.ends, strict=True)]
        bounds = np.append(np.concatenate(pieces), corpus.num_tokens)
    return Rows(corpus, bounds.astype(np.int64), cut)


def _bounds(start: int, end: int, max_length: int) -> np.ndarray[Any, Any]:
    """Where the rows of one document begin."""
    begins = np.arange(start, end, max_length)
    if len(begins) > 1 and end - begins[-1] == 1:
        begins[-1] -= 1
    return begins


def _padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
