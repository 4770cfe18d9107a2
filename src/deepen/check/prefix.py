"""What a `PrefixCache` holds of a row, against what a fresh reading of the row's ids leaves, tensor by tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepen.backbones.cache import PrefixCache
from deepen.backbones.hf import Backbone
from deepen.check.outcome import NotApplicable
from deepen.check.rounding import rounding_noise
from deepen.check.subject import ROUNDING_FACTOR, Subject
from deepen.generate.verify import read

_NUM_MEASURED = 48


@dataclass(frozen=True)
class Part:
    """One tensor of one row in one layer: keys and values `[N, length, E]`, a state, or a convolution's window."""

    layer: int
    name: str
    tensor: Tensor

    @property
    def is_entries(self) -> bool:
        """Whether it has an entry a token, rather than being what all tokens together left."""
        return self.name in ("keys", "values")

    def __str__(self) -> str:
        return f"layer {self.layer}'s {self.name}"


@dataclass(frozen=True)
class Difference:
    """A part that isn't as a fresh reading leaves it; `size` in units of that part's typical element.

    `entry` is the first that differs; None where there are no entries.
    """

    part: Part
    size: float
    entry: int | None

    def __str__(self) -> str:
        place = "" if self.entry is None else f", from entry {self.entry} on,"
        return f"{self.part}{place} differs by {self.size:.2g} of its typical size"


def attached(subject: Subject) -> Backbone:
    """The backbone that passes run on."""
    if subject.backbone is None:
        raise NotApplicable(f"deepen can't run its passes on this model: {subject.unattached}")
    return subject.backbone


@torch.no_grad()
def fresh_reading(backbone: Backbone, ids: Sequence[int]) -> PrefixCache:
    """A new cache of one row that has read just these ids."""
    cache = backbone.new_cache(batch_size=1, capacity=max(1, len(ids)))
    if len(ids):
        read(backbone, cache, [ids])
    return cache


def parts(cache: PrefixCache, row: int) -> Iterator[Part]:
    """All that `cache` holds of `row`, layer by layer; nothing of a row without tokens."""
    if not cache.lengths[row]:
        return
    for layer in range(len(cache.layers)):
        if layer in cache.recurrent_layers:
            state, columns = cache.state(layer)
            assert state is not None and columns is not None, "a row with tokens has a state"
            yield Part(layer, "state", state[row])
            yield Part(layer, "window", columns[row])
        else:
            keys, values = cache.entries(layer, row)
            yield Part(layer, "keys", keys)
            yield Part(layer, "values", values)


class Comparison:
    """Holds what is held to a fresh reading, up to the rounding measured on this model."""

    def __init__(self, subject: Subject) -> None:
        self._backbone = attached(subject)
        ids = subject.text(_num_measured(subject), seed=7)[0].tolist()
        exact = [part.tensor for part in parts(fresh_reading(self._backbone, ids), 0)]

        def held() -> Tensor:
            again = parts(fresh_reading(self._backbone, ids), 0)
            scaled = [(part.tensor / _size(then)).flatten() for part, then in zip(again, exact, strict=True)]
            # All on one device, as one row of "logits".
            return torch.cat([tensor.cpu() for tensor in scaled])[None, None]

        self.allowed = ROUNDING_FACTOR * rounding_noise(self._backbone.model, held)

    def differences(self, actual: Sequence[Part], expected: Sequence[Part]) -> list[Difference]:
        """Those of the `actual` parts that aren't the `expected` ones, by layer; both of as many tokens."""
        compared = (self._difference(*pair) for pair in zip(actual, expected, strict=True))
        return [difference for difference in compared if difference is not None]

    def equal(self, actual: Tensor, expected: Tensor) -> bool:
        """Whether rounding explains what is between them."""
        return actual.shape == expected.shape and bool(_distance(actual, expected).max() <= self.allowed)

    def _difference(self, actual: Part, expected: Part) -> Difference | None:
        if self.equal(actual.tensor, expected.tensor):
            return None
        distance = _distance(actual.tensor, expected.tensor)
        entry = None
        if actual.is_entries:
            entry = int((distance > self.allowed).any(dim=-1).any(dim=0).nonzero()[0])
        return Difference(actual, float(distance.max()), entry)


def _num_measured(subject: Subject) -> int:
    return min(_NUM_MEASURED, subject.context_length or _NUM_MEASURED)


def _distance(actual: Tensor, expected: Tensor) -> Tensor:
    # What is not finite is as far away as can be.
    distance = (actual.double() - expected.double()).abs() / _size(expected)
    return torch.where(distance.isfinite(), distance, torch.inf)


def _size(tensor: Tensor) -> Tensor:
    size = tensor.double().square().mean().sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))
