"""Plain decoding of a base model: one token a pass. The reference that every faster path must equal."""

from collections.abc import Sequence

from deepen.backbones.costs import pass_flops, row_state_bytes
from deepen.backbones.hf import Backbone
from deepen.core.method import Sampler
from deepen.core.types import Advance, Prompt, Spent
from deepen.generate.drafts import NO_DRAFT
from deepen.generate.verify import Decoding, feed, open_decoding, verify


class PlainDecoder:
    """The base's own output, token by token."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone

    def open(self, prompt: Prompt) -> Decoding:
        """Read the prompt."""
        return open_decoding(self._backbone, prompt)

    def advance(self, decoding: Decoding, sampler: Sampler) -> Advance:
        """One pass, one token a row."""
        return verify(self._backbone, decoding, [NO_DRAFT] * len(decoding.rows), sampler)

    def drop(self, decoding: Decoding, rows: Sequence[int]) -> None:
        """Forget finished rows."""
        decoding.drop(rows)

    def check_joining(self) -> None:
        """Rows may always come."""

    def feed(self, decoding: Decoding, ids: Sequence[int]) -> Spent:
        """Read more of the prompt of a decoding of one row."""
        return feed(self._backbone, decoding, ids)

    def join(self, decoding: Decoding, other: Decoding, *, most_rows: int) -> None:
        """Take the rows of `other` in."""
        decoding.join(other, most_rows=most_rows)

    def keep(self, decoding: Decoding, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        decoding.keep(rows)

    def flops(self, *, num_positions: int, context: int, num_logits: int | None = None) -> int:
        """Of the base's pass."""
        return pass_flops(self._backbone, num_positions=num_positions, context=context, num_logits=num_logits)

    def state_bytes(self, *, context: int) -> int:
        """Of the base's cache."""
        return row_state_bytes(self._backbone, context=context)
