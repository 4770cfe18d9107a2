"""How long delta attention takes and how much it keeps, ours against transformers' own: the op alone and in a model.

Both run in one process, one after the other, round by round, on the same inputs; what they answer is compared in the
round that isn't measured, so that no time is reported for something else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from deepen.backbones.costs import replay_bytes_per_token, row_state_bytes
from deepen.backbones.delta_reference import (
    ReferencePrefix,
    chunk_reference,
    random_kimi_linear,
    recurrent_reference,
)
from deepen.backbones.hf import Backbone
from deepen.backbones.recurrence import stop_using_delta_attention, use_delta_attention
from deepen.nn.kda import delta_attention

CHUNK = 8
"""Tokens of a pass that verifies a draft."""
KEPT = 5
"""Those of them that are committed."""

# What is measured; gives the tensors that both sides must agree on.
Work = Callable[[], Sequence[Tensor]]
# Called before each run, unmeasured.
Prepare = Callable[[], Work]


@dataclass(frozen=True)
class Bars:
    """How many times as fast ours is to be: what it has to be, and what would be better still."""

    wanted: float
    stretch: float


@dataclass(frozen=True)
class Race:
    """One line: the same done by ours and by transformers."""

    name: str
    ours: Prepare
    theirs: Prepare
    slow: bool = False
    """Takes seconds, and so few rounds."""
    bars: Bars | None = None


@dataclass
class Raced:
    """Seconds of each round, and by how much the answers differ, as a share of the largest entry."""

    race: Race
    difference: float
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Plain JSON types. `ratio` is that of the medians, `low` and `high` the least and greatest of one round."""
        ratio = median(self.theirs) / median(self.ours)
        of_rounds = [theirs / ours for ours, theirs in zip(self.ours, self.theirs, strict=True)]
        bars = self.race.bars
        return {
            "line": self.race.name,
            "ours_ms": round(median(self.ours) * 1e3, 3),
            "transformers_ms": round(median(self.theirs) * 1e3, 3),
            "ratio": round(ratio, 2),
            "low": round(min(of_rounds), 2),
            "high": round(max(of_rounds), 2),
            "rounds": len(of_rounds),
            "difference": self.difference,
            "bar": None if bars is None else {"ratio": bars.wanted, "met": ratio >= bars.wanted},
            "stretch": None if bars is None else {"ratio": bars.stretch, "met": ratio >= bars.stretch},
        }


def run_race(race: Race, *, rounds: int, done: Callable[[int], None]) -> Raced:
    """Each side once unmeasured, then in turns, the other one first in every second round; `done` hears of each run."""
    answers = []
    for prepare in (race.ours, race.theirs):
        answers.append([tensor.detach() for tensor in prepare()()])
        done(1)
    raced = Raced(race, max(_difference(*pair) for pair in zip(*answers, strict=True)))
    answers.clear()
    sides = [(race.ours, raced.ours), (race.theirs, raced.theirs)]
    for turn in range(rounds):
        for prepare, seconds in sides if turn % 2 == 0 else sides[::-1]:
            work = prepare()
            began = perf_counter()
            answer = work()
            seconds.append(perf_counter() - began)
            del answer  # freed here, not within the time of what comes next
            done(1)
    return raced


def _difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


# The op alone.


def op_races(*, tokens: int, heads: int, decoding_heads: int, head_width: int) -> list[Race]:
    """Forward and backward over `tokens` tokens; a chunk's forward and one token's, both from a state."""

    def normalized(function: Callable[..., Any], x: "_Operands", **more: Any) -> Sequence[Tensor]:
        out, state = function(x.query, x.key, x.value, g=x.log_decay, beta=x.beta, use_qk_l2norm_in_kernel=True, **more)
        return [out] if state is None else [out, state]

    @torch.no_grad()
    def our_forward(x: "_Operands") -> Sequence[Tensor]:
        output = delta_attention(*x.inputs, initial=x.initial)
        return output.out, output.state

    @torch.no_grad()
    def their_forward(x: "_Operands", function: Callable[..., Any]) -> Sequence[Tensor]:
        return normalized(function, x, initial_state=x.initial, output_final_state=True)

    def with_gradients(out: Tensor, x: "_Operands") -> Sequence[Tensor]:
        return out, *torch.autograd.grad(out, x.inputs, x.cotangent)

    long = _Operands.drawn(tokens, heads, head_width, seed=0).with_gradient()
    chunk = _Operands.drawn(CHUNK, decoding_heads, head_width, seed=1)
    one = _Operands.drawn(1, decoding_heads, head_width, seed=2)
    size = f"K = V = {head_width}"
    return [
        Race(
            f"op, forward and backward, T {tokens}, H {heads}, {size}",
            ours=lambda: lambda: with_gradients(delta_attention(*long.inputs).out, long),
            theirs=lambda: lambda: with_gradients(normalized(chunk_reference, long)[0], long),
            slow=True,
            bars=Bars(13, 25),
        ),
        Race(
            f"op, forward of W {CHUNK} from a state, H {decoding_heads}, {size}",
            ours=lambda: lambda: our_forward(chunk),
            theirs=lambda: lambda: their_forward(chunk, chunk_reference),
            bars=Bars(8, 15),
        ),
        Race(
            f"op, forward of W 1 from a state, H {decoding_heads}, {size}",
            ours=lambda: lambda: our_forward(one),
            theirs=lambda: lambda: their_forward(one, recurrent_reference),
        ),
    ]


@dataclass(frozen=True)
class _Operands:
    """One row's inputs, a state before them, and a gradient of the output."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    beta: Tensor
    initial: Tensor
    cotangent: Tensor

    @classmethod
    def drawn(cls, tokens: int, heads: int, width: int, *, seed: int) -> "_Operands":
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(1, *shape, generator=generator)

        query, key, value, gate, cotangent = (normal(tokens, heads, width) for _ in range(5))
        log_decay = -torch.nn.functional.softplus(gate)
        return cls(
            query, key, value, log_decay, normal(tokens, heads).sigmoid(), normal(heads, width, width), cotangent
        )

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.log_decay, self.beta

    def with_gradient(self) -> "_Operands":
        for x in self.inputs:
            x.requires_grad_()
        return self


def saved_bytes(function: Callable[[], object]) -> int:
    """Bytes that a backward of what `function` computes would keep, every storage counted once, inputs included."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # held until all is counted: what is freed could lend its address to another
    del result
    return sum(storages.values())


def op_memory(*, tokens: int, heads: int, head_width: int) -> dict[str, Any]:
    """What the op keeps for its backward, ours and transformers'; plain JSON types."""
    x = _Operands.drawn(tokens, heads, head_width, seed=3).with_gradient()
    ours = saved_bytes(lambda: delta_attention(*x.inputs))
    theirs = saved_bytes(
        lambda: chunk_reference(x.query, x.key, x.value, g=x.log_decay, beta=x.beta, use_qk_l2norm_in_kernel=True)
    )
    inputs = sum(tensor.nbytes for tensor in x.inputs)
    return {
        "line": f"op, saved for backward, T {tokens}, H {heads}, K = V = {head_width}",
        "ours_bytes": ours,
        "transformers_bytes": theirs,
        "ratio": round(theirs / ours, 2),
        "inputs_bytes": inputs,
    }


# In a model.


class DeltaModel:
    """A random Kimi Linear of four layers, twice: one model for our passes, one that nothing of ours has touched."""

    def __init__(self, *, hidden_size: int, heads: int, head_width: int) -> None:
        def build() -> Any:
            return random_kimi_linear(hidden_size=hidden_size, num_heads=heads, head_width=head_width)

        self._trained, self._theirs = build(), build()
        self._plain, self._packed = (Backbone.attach(build().requires_grad_(False)) for _ in range(2))
        self._packed.pack()
        self.size = f"hidden {hidden_size}, {heads} heads of {head_width}"

    def races(self, *, tokens: int, context: int) -> list[Race]:
        """A training step over `tokens` tokens; a pass of a chunk behind `context`, of which ours keeps a part."""
        return [
            Race(
                f"model, training step, T {tokens}",
                ours=lambda: self._step(tokens, ours=True),
                theirs=lambda: self._step(tokens, ours=False),
                slow=True,
            ),
            *(
                Race(
                    f"model, pass of {CHUNK} behind {context}, {KEPT} kept by ours{note}",
                    ours=self._our_pass(backbone, context),
                    theirs=self._their_pass(context),
                )
                for backbone, note in ((self._plain, ""), (self._packed, ", packed"))
            ),
        ]

    def memory(self) -> dict[str, int]:
        """Bytes of one row's recurrent states and windows, and those that a token of a pass holds until its commit."""
        return {
            "snapshot_bytes_per_row": row_state_bytes(self._plain, context=0),
            "replay_bytes_per_token": replay_bytes_per_token(self._plain),
        }

    def _step(self, tokens: int, *, ours: bool) -> Work:
        model = self._trained
        stop_using_delta_attention(model)
        if ours:
            use_delta_attention(model)
        model.train().zero_grad(set_to_none=True)
        ids = self._ids(tokens, seed=4)

        def step() -> Sequence[Tensor]:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            return (loss,)

        return step

    def _our_pass(self, backbone: Backbone, context: int) -> Prepare:
        cache = backbone.new_cache(batch_size=1, capacity=context + CHUNK)
        with torch.no_grad():
            backbone.run(self._ids(context, seed=5), cache, keep="last")
        cache.commit([context])
        before, chunk = cache.snapshot(), self._ids(CHUNK, seed=6)

        @torch.no_grad()
        def run() -> Sequence[Tensor]:
            logits = backbone.run(chunk, cache)
            cache.commit([KEPT])
            return (logits,)

        def prepare() -> Work:
            cache.rollback(before)
            return run

        return prepare

    def _their_pass(self, context: int) -> Prepare:
        prefix, chunk = ReferencePrefix(self._theirs, self._ids(context, seed=5)), self._ids(CHUNK, seed=6)

        def prepare() -> Work:
            run = prefix.fork()
            return lambda: (run(chunk),)

        return prepare

    def _ids(self, count: int, *, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(self._plain.vocab_size, (1, count), generator=generator)
