"""A corpus as one flat array of token ids, with the places where documents end."""

import hashlib
import warnings
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepen.data.encoding import ChatEncoder, encode
from deepen.data.formats import Document, Text, difficulty_of


@dataclass(frozen=True, eq=False)
class TokenCorpus:
    """Documents behind each other.

    `ids` `[N]`, int32; `learned` `[N]`, bool, None where all are; `ends` `[M]`: document m has the ids from
    `ends[m - 1]` (0 for the first) to before `ends[m]`, at least one; `difficulties` `[M]`, int32, 0 for a document
    that tells none, None where no document does.
    """

    ids: np.ndarray[Any, Any]
    ends: np.ndarray[Any, Any]
    learned: np.ndarray[Any, Any] | None = None
    difficulties: np.ndarray[Any, Any] | None = None

    @classmethod
    def of(cls, documents: Iterable[Document], tokenizer: ChatEncoder) -> "TokenCorpus":
        """Encode `documents` one by one; empty texts are left out, and counted in a warning."""
        num_empty = 0
        ids, learned, ends, difficulties = array("i"), bytearray(), array("q"), array("i")
        for document in documents:
            if isinstance(document, Text) and not document.text.strip():
                num_empty += 1
                continue
            encoded = encode(document, tokenizer)
            ids.extend(encoded.ids)
            learned.extend(encoded.learned)
            if encoded.ids:
                ends.append(len(ids))
                difficulties.append(difficulty_of(document) or 0)
        if num_empty:
            warnings.warn(f"{num_empty} empty documents were left out", stacklevel=2)
        flags = np.frombuffer(bytes(learned), dtype=bool)
        return cls(
            np.frombuffer(ids, dtype=np.int32) if ids else np.zeros(0, np.int32),
            np.frombuffer(ends, dtype=np.int64) if ends else np.zeros(0, np.int64),
            None if flags.all() else flags,
            np.frombuffer(difficulties, dtype=np.int32) if any(difficulties) else None,
        )

    @property
    def num_tokens(self) -> int:
        """N."""
        return len(self.ids)

    @property
    def num_documents(self) -> int:
        """M."""
        return len(self.ends)

    @cached_property
    def learned_documents(self) -> np.ndarray[Any, Any]:
        """`[M]`, bool: which documents have a token to be predicted. Nothing comes before the first one of each."""
        learned = np.ones(len(self.ids), bool) if self.learned is None else self.learned.copy()
        starts = np.concatenate([[0], self.ends[:-1]]).astype(np.int64)
        learned[starts] = False
        return np.logical_or.reduceat(learned, starts)

    @property
    def num_untold(self) -> int:
        """How many of these don't tell their difficulty."""
        told = np.zeros(len(self.ends), bool) if self.difficulties is None else self.difficulties > 0
        return int((self.learned_documents & ~told).sum())

    @cached_property
    def digest(self) -> str:
        """Of ids, ends and what is learned: what a run that goes on must find again."""
        found = hashlib.sha256()
        for part in (self.ids, self.ends, self.learned):
            found.update(b"" if part is None else part.tobytes())
            found.update(b"|")
        return found.hexdigest()

    @cached_property
    def digest_of_difficulties(self) -> str | None:
        """None where no document tells its own."""
        return None if self.difficulties is None else hashlib.sha256(self.difficulties.tobytes()).hexdigest()

    def counts(self, vocab_size: int) -> Tensor:
        """`[V]`: how often each id is learned."""
        ids = self.ids if self.learned is None else self.ids[self.learned]
        return torch.from_numpy(np.bincount(ids, minlength=vocab_size))

    def tokens(self, start: int, end: int) -> Tensor:
        """The ids from `start` to before `end`."""
        return torch.from_numpy(self.ids[start:end].astype(np.int64))

    def documents_of(self, start: int, end: int) -> Tensor:
        """The number of the document that each of these tokens belongs to."""
        return torch.from_numpy(np.searchsorted(self.ends, np.arange(start, end), side="right"))

    def difficulty_of(self, start: int, end: int) -> Tensor:
        """The difficulty of the document that each of these tokens belongs to."""
        if self.difficulties is None:
            return torch.zeros(end - start, dtype=torch.long)
        return torch.from_numpy(self.difficulties[self.documents_of(start, end).numpy()].astype(np.int64))

    def learned_of(self, start: int, end: int) -> Tensor:
        """Whether each of these tokens is learned."""
        if self.learned is None:
            return torch.ones(end - start, dtype=torch.bool)
        return torch.from_numpy(self.learned[start:end].copy())
