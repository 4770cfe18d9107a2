"""What checks of a method's model stand on: decodings that are watched, and weights that stand for trained ones."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from deepen.backbones.hf import Backbone
from deepen.check.outcome import Fault, NotApplicable
from deepen.check.subject import Subject
from deepen.core.errors import DeepenError
from deepen.core.method import Adapting, Decoder, RecursiveModel
from deepen.core.types import Advance, Prompt
from deepen.generate.sampling import BatchSampler, SamplingConfig

GREEDY = SamplingConfig()
SAMPLED = SamplingConfig(temperature=0.9, top_k=40, top_p=0.95, seed=11)
PENALIZED = SamplingConfig(temperature=1.1, min_p=0.01, repetition_penalty=1.2, seed=12)

# Of noise in place of untrained weights, each of other strength: relative to what it is added to.
_STRENGTHS = (4.0, 16.0, 8.0, 1.0, 4.0, 16.0)
_draws: WeakKeyDictionary[Subject, int] = WeakKeyDictionary()
# Room behind what is asked for; little, so that rows come to their last chunks at different times, with pads.
_SLACK = 2

AS_IT_IS = "with its weights as they are"
FILLED = "with noise in what was never trained"


def method_of(subject: Subject) -> RecursiveModel:
    """The method's model under check."""
    if subject.method is None:
        raise NotApplicable("it is a model alone, without one of deepen's methods on it")
    return subject.method


# Weights.


@contextmanager
def filled(subject: Subject) -> Iterator[None]:
    """While it lasts, what the method added and is all zeros is noise, as large as what it is added to.

    An untrained graft changes nothing, and so would hide whatever is wrong with how it is applied.
    """
    with filled_by(subject, _telling_draw(subject)):
        yield


@contextmanager
def filled_by(subject: Subject, draw: int) -> Iterator[None]:
    """`filled` with one draw of noise, whatever it does to the output."""
    method = method_of(subject)
    size = _STRENGTHS[draw] * _size_of_what_is_added_to(subject)
    source = torch.Generator().manual_seed(draw)
    empty = untrained(method)
    before = {name: tensor.detach().clone() for name, tensor in empty.items()}
    try:
        with torch.no_grad():
            for tensor in empty.values():
                scale = size / math.sqrt(tensor.shape[-1]) if tensor.ndim > 1 else 0.3 * size
                tensor.copy_(scale * torch.randn(tensor.shape, generator=source))
        yield
    finally:
        with torch.no_grad():
            for name, tensor in empty.items():
                tensor.copy_(before[name])


def _telling_draw(subject: Subject) -> int:
    """Of a few draws of noise, the one that changes the most rows: one may happen to commit nothing but base tokens."""
    method = method_of(subject)
    if method.promises_base or not untrained(method):
        return 0
    if subject not in _draws:
        try:
            _draws[subject] = _most_telling(method, subject)
        except DeepenError:
            # A decoding that fails is for the checks of decodings, which say more of it.
            return 0
    return _draws[subject]


def _most_telling(method: RecursiveModel, subject: Subject) -> int:
    prompts = prompts_of(subject, 40)
    before = _greedily(method, prompts)
    moved = {}
    for draw in range(len(_STRENGTHS)):
        with filled_by(subject, draw):
            after = _greedily(method, prompts)
        moved[draw] = sum(one != other for one, other in zip(before, after, strict=True))
        if moved[draw] == len(prompts):
            break
    return max(moved, key=lambda draw: moved[draw])


def _greedily(method: RecursiveModel, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each prompt alone: what becomes of rows side by side is for the checks to find."""
    return [decode(method, [prompt], [GREEDY], num_tokens=8).tokens[0] for prompt in prompts]


def untrained(method: RecursiveModel) -> Mapping[str, Tensor]:
    """Those of the tensors that the method adds that are all zeros."""
    return {
        name: tensor
        for name, tensor in sorted(method.saved_state().items())
        if tensor.is_floating_point() and tensor.numel() and not tensor.any()
    }


@contextmanager
def _as_it_is(_subject: Subject) -> Iterator[None]:
    yield


def weights_of(method: RecursiveModel) -> dict[str, Any]:
    """Contexts by what they make of the weights: as they are, and filled where there is anything to fill."""
    return {AS_IT_IS: _as_it_is, **({FILLED: filled} if untrained(method) else {})}


def _size_of_what_is_added_to(subject: Subject) -> float:
    """Of an element: of hidden states, or of what a linear inside a layer gives, which reads what was normed."""
    if subject.backbone is None or isinstance(subject.method, Adapting):
        return 1.0
    return _size_of_hidden_states(subject.backbone, subject.text(16, seed=3))


@torch.no_grad()
def _size_of_hidden_states(backbone: Backbone, ids: Tensor) -> float:
    """Of an element of the last layer's output, the median over positions: some tokens are a thousand times larger."""
    sizes: list[Tensor] = []

    def edit(layer: int, h: Tensor) -> Tensor:
        if layer == backbone.num_layers - 1:
            sizes.append(h.double().square().mean(dim=-1).sqrt())
        return h

    backbone.run(ids, backbone.new_cache(batch_size=1, capacity=ids.shape[1]), edit=edit)
    return float(sizes[0].median())


# Decodings.


@dataclass(frozen=True)
class Choice:
    """What one call of a sampler chose: `chosen[i]` from `logits[i]`, for the position `len(history) + i`."""

    config: SamplingConfig
    logits: Tensor
    history: tuple[int, ...]
    drafted: tuple[int, ...]
    chosen: tuple[int, ...]

    def margins(self) -> dict[int, float]:
        """By position, how far the choice was from being another. Takes time, so only asked where rows part."""
        margins = BatchSampler([self.config]).margins(0, self.logits, self.history, self.drafted, self.chosen)
        return dict(enumerate(margins, start=len(self.history)))


class WatchedSampler(BatchSampler):
    """Chooses as `BatchSampler`, and remembers every choice, by the place that its row had in the beginning."""

    def __init__(self, configs: Sequence[SamplingConfig]) -> None:
        super().__init__(configs)
        self._rows = list(range(len(configs)))
        self.choices: list[list[Choice]] = [[] for _ in configs]

    def drop(self, rows: Sequence[int]) -> None:
        """Forget finished rows."""
        super().drop(rows)
        self._rows = [row for place, row in enumerate(self._rows) if place not in set(rows)]

    def choose(self, row: int, logits: Tensor, history: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """As that of `BatchSampler`."""
        chosen = super().choose(row, logits, history, drafted)
        choice = Choice(self.configs[row], logits, tuple(history), tuple(drafted), tuple(chosen))
        self.choices[self._rows[row]].append(choice)
        return chosen

    def drafted_at(self, row: int, position: int) -> set[int]:
        """The tokens that drafts of a row had in one place."""
        choices = ((each.drafted, position - len(each.history)) for each in self.choices[row])
        return {drafted[index] for drafted, index in choices if 0 <= index < len(drafted)}


@dataclass
class Told:
    """What a decoding gave: the new tokens of each row, by its place in the prompts, and how they were chosen."""

    tokens: list[list[int]]
    choices: list[list[Choice]]
    advances: list[Advance] = field(default_factory=list)

    def part(self, row: int, other: "Told", other_row: int) -> int | None:
        """Where the tokens of two rows of one prompt part; None if one begins with the other."""
        pairs = zip(self.tokens[row], other.tokens[other_row], strict=False)
        return next((place for place, (one, another) in enumerate(pairs) if one != another), None)

    def margins(self, row: int, positions: range) -> list[float]:
        """Of all choices that a row had in these positions; some may have been thrown away."""
        return [
            margin
            for choice in self.choices[row]
            for position, margin in choice.margins().items()
            if position in positions
        ]


@torch.no_grad()
def decode(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    configs: Sequence[SamplingConfig],
    *,
    num_tokens: int,
    dropped: Sequence[int] = (),
) -> Told:
    """Continue each prompt by `num_tokens`; the rows `dropped` are forgotten after the first advance.

    Rows are dropped as they end. Raises `Fault` for an advance that brings no row any further.
    """
    decoding = decoder.open(Prompt(tuple(map(tuple, prompts)), num_tokens + _SLACK))
    sampler = WatchedSampler(configs)
    told = Told([[] for _ in prompts], sampler.choices)
    alive = list(range(len(prompts)))
    while alive:
        advance = decoder.advance(decoding, sampler)
        told.advances.append(advance)
        if not any(row.tokens for row in advance.rows):
            raise Fault(
                f"an advance over {len(alive)} rows committed no token in any of them",
                cause="a draft of which nothing is accepted must still bring the token that stands in its place",
            )
        for row, gained in zip(alive, advance.rows, strict=True):
            told.tokens[row] += gained.tokens
        first = len(told.advances) == 1
        ended = [
            place
            for place, row in enumerate(alive)
            if len(told.tokens[row]) >= num_tokens or (first and row in dropped)
        ]
        alive = [row for place, row in enumerate(alive) if place not in ended]
        if ended and alive:
            decoder.drop(decoding, ended)
            sampler.drop(ended)
    told.tokens = [tokens[:num_tokens] for tokens in told.tokens]
    return told


def is_near_tie(subject: Subject, margins: Sequence[float], config: SamplingConfig) -> bool:
    """Whether rounding alone may have decided: logits move by `allowed`, so the gap of two by twice that."""
    return min(margins, default=math.inf) <= 2 * subject.allowed / (config.temperature or 1.0)


def prompts_of(subject: Subject, effort_length: int) -> list[list[int]]:
    """A text, a single token, and one that repeats itself, which copying from the text goes on with."""
    text = subject.text(effort_length, seed=21)[0].tolist()
    unit = subject.text(4, seed=22)[0].tolist()
    return [text[: max(2, effort_length // 4)], text[-1:], unit * max(2, effort_length // 8) + unit[:2]]
