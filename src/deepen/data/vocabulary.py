"""What tells whether ids of one tokenizer mean the same pieces in another."""

import hashlib
import json
from typing import Any, Protocol


class Vocabulary(Protocol):
    """What is needed of a tokenizer; transformers' have it."""

    def get_vocab(self) -> Any:
        """The id of each piece."""


def tokenizer_fingerprint(tokenizer: Vocabulary) -> str:
    """The sha256, in hex, of the vocabulary: equal for tokenizers whose ids mean the same pieces."""
    pieces = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()
