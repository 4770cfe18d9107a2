"""A decoder that remembers: what each of its advances gained and cost, in a form that counts and prices are made of."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from deepen.core.method import Decoder, Sampler
from deepen.core.types import Advance, Prompt, RowAdvance

PLAIN = "none"
"""The source of a pass that reads one token and nothing that was drafted."""
DRAFTING = "drafting"
"""The source of a wider pass that reads no draft: it makes one."""


class Recorder:
    """Passes everything on to another decoder; `advances` has what came back."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.advances: list[Advance] = []

    def open(self, prompt: Prompt) -> Any:
        """Read the prompt."""
        return self._decoder.open(prompt)

    def advance(self, decoding: Any, sampler: Sampler) -> Advance:
        """One unit of recursion."""
        advance = self._decoder.advance(decoding, sampler)
        self.advances.append(advance)
        return advance

    def drop(self, decoding: Any, rows: Sequence[int]) -> None:
        """Forget finished rows."""
        self._decoder.drop(decoding, rows)


def pass_widths(advance: Advance) -> list[int]:
    """The positions of each of its passes, taken as equally wide as they can be."""
    each, more = divmod(advance.spent.positions, max(1, advance.spent.passes))
    return [each + (index < more) for index in range(advance.spent.passes)]


def passes_by_source(advances: Sequence[Advance]) -> dict[str, dict[int, int]]:
    """How many passes of which width each source of drafts had, for advances of one row."""
    found: dict[str, Counter[int]] = defaultdict(Counter)
    for advance in advances:
        for width in pass_widths(advance):
            found[_source(advance.rows[0], width)][width] += 1
    return {source: dict(sorted(found[source].items())) for source in sorted(found)}


def _source(row: RowAdvance, width: int) -> str:
    if row.drafted:
        return row.source
    return PLAIN if width <= 1 else DRAFTING


def drafted(advances: Sequence[Advance]) -> dict[str, int]:
    """Drafted tokens by source, for advances of one row."""
    counts: Counter[str] = Counter()
    for row in (advance.rows[0] for advance in advances):
        if row.drafted:
            counts[row.source] += row.drafted
    return dict(sorted(counts.items()))


def judged_by_place(advances: Sequence[Advance]) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """By source and place in the draft: tokens that were compared with what came, and those of them that were equal.

    What stands behind the first that differs tells nothing, so it counts as neither.
    """
    judged: dict[str, Counter[int]] = defaultdict(Counter)
    agreed: dict[str, Counter[int]] = defaultdict(Counter)
    for row in (advance.rows[0] for advance in advances):
        judged[row.source].update(range(min(row.accepted + 1, row.drafted)))
        agreed[row.source].update(range(row.accepted))
    sources = sorted(source for source in judged if judged[source])
    lengths = {source: max(judged[source]) + 1 for source in sources}
    return (
        {source: tuple(judged[source][place] for place in range(lengths[source])) for source in sources},
        {source: tuple(agreed[source][place] for place in range(lengths[source])) for source in sources},
    )
