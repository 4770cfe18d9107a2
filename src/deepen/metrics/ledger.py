"""The ledger: what a model is made of and what a run of it has cost, counted and not measured.

Everything here follows from parameters, from a model's own account of its passes (`Costed`) and from what a run says
that it did (`Spent`, `Work`); nothing is run to find it. What a layer of a base costs is known in backbones/costs.py.
docs/ledger.md defines every figure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from deepen.core.types import Spent, Work


class PassFlops(Protocol):
    """FLOPs of one row's pass."""

    def __call__(self, *, num_positions: int, context: int, num_logits: int | None = None) -> int:
        """2 per multiply-add, over `num_positions` tokens behind `context` committed ones.

        The head is counted at `num_logits` positions, all of them when it is None.
        """


class Costed(Protocol):
    """What tells the cost of its own passes: plain decoding, or a method's model."""

    def flops(self, *, num_positions: int, context: int, num_logits: int | None = None) -> int:
        """See `PassFlops`."""

    def state_bytes(self, *, context: int) -> int:
        """Bytes of cache and state that one row holds after `context` tokens."""


def reading_flops(flops: PassFlops, *, num_tokens: int, width: int) -> int:
    """FLOPs of reading a prompt in passes of at most `width` tokens, of which only the last gets logits."""
    starts = range(0, num_tokens, width)
    return sum(flops(num_positions=min(width, num_tokens - start), context=start, num_logits=1) for start in starts)


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has.

    unique     each once
    total      tied ones as often as they are used
    trainable  those that an optimizer gets
    added      those that are not the base's, each once
    """

    unique: int
    total: int
    trainable: int = 0
    added: int = 0


def count_parameters(base: nn.Module, model: Any = None) -> Parameters:
    """Of a base, and of a method's `model` over it, which may hold the base; a base alone has nothing to train."""
    modules = [base, *([model] if isinstance(model, nn.Module) else [])]
    unique = _count(modules, once=True)
    return Parameters(
        unique=unique,
        total=_count(modules, once=False),
        trainable=_trainable(model),
        added=unique - sum(parameter.numel() for parameter in base.parameters()),
    )


def _count(modules: Sequence[nn.Module], *, once: bool) -> int:
    """Parameters below these modules; what is below the first counts there. Tied ones once, or under each name."""
    of_base, *others = modules
    base = set(of_base.parameters())
    total = sum(p.numel() for _, p in of_base.named_parameters(remove_duplicate=once))
    for module in others:
        total += sum(p.numel() for _, p in module.named_parameters(remove_duplicate=once) if p not in base)
    return total


def _trainable(model: Any) -> int:
    if model is None:
        return 0
    parameters = {parameter for group in model.optim_groups() for parameter in group["params"]}
    return sum(parameter.numel() for parameter in parameters)


def model_figures(
    parameters: Parameters, costed: Costed, *, num_layers: int, contexts: Sequence[int]
) -> dict[str, int | float | None]:
    """The ledger of a model, by name: parameters, and FLOPs of one token and bytes of one row at these contexts."""
    figures: dict[str, int | float | None] = {
        "parameters_unique": parameters.unique,
        "parameters_total": parameters.total,
        "parameters_added": parameters.added,
        "parameters_trainable": parameters.trainable,
        "layers": num_layers,
    }
    figures |= {f"flops_per_token_at_{context}": costed.flops(num_positions=1, context=context) for context in contexts}
    return figures | {f"state_bytes_at_{context}": costed.state_bytes(context=context) for context in contexts}


@dataclass
class RunLedger:
    """What a run has spent so far; its events are told to `read`, `decoded` and `trained`.

    `reading` and `decoding` are kept apart: the passes that read prompts, and those that brought tokens.
    """

    reading: Spent = field(default_factory=Spent)
    reading_flops: int = 0
    decoding: Spent = field(default_factory=Spent)
    decoding_flops: int = 0
    num_tokens: int = 0
    """Tokens that decoding brought."""
    num_steps: int = 0
    num_trained_tokens: int = 0
    training: Work = field(default_factory=Work)

    def read(self, spent: Spent, *, flops: int) -> None:
        """A prompt was read."""
        self.reading += spent
        self.reading_flops += flops

    def decoded(self, spent: Spent, *, num_tokens: int, flops: int) -> None:
        """Passes brought `num_tokens` tokens. `flops` are those of their positions, without `spent.added_flops`."""
        self.decoding += spent
        self.decoding_flops += flops + spent.added_flops
        self.num_tokens += num_tokens

    def trained(self, work: Work, *, num_tokens: int) -> None:
        """An optimizer step was made from `num_tokens` tokens."""
        self.training += work
        self.num_trained_tokens += num_tokens
        self.num_steps += 1

    @property
    def tokens_per_pass(self) -> float | None:
        """Of decoding, every pass counted; None before the first."""
        return _ratio(self.num_tokens, self.decoding.passes)

    @property
    def layer_applications_per_token(self) -> float | None:
        """Applications of one layer to one position, for each token that decoding brought; None before the first."""
        return _ratio(self.decoding.layer_applications, self.num_tokens)

    def training_figures(self) -> Mapping[str, int | float | None]:
        """What training has cost, by name."""
        return {
            "steps": self.num_steps,
            "tokens": self.num_trained_tokens,
            "training_flops": self.training.flops,
            "forward_flops": self.training.forward_flops,
            "backward_flops": self.training.backward_flops,
            "training_flops_per_token": _ratio(self.training.flops, self.num_trained_tokens),
        }

    def inference_figures(self) -> Mapping[str, int | float | None]:
        """What reading and decoding have cost, by name."""
        return {
            "tokens": self.num_tokens,
            "passes": self.decoding.passes,
            "positions": self.decoding.positions,
            "layer_applications": self.decoding.layer_applications,
            "decoding_flops": self.decoding_flops,
            "reading_flops": self.reading_flops,
            "tokens_per_pass": self.tokens_per_pass,
            "layer_applications_per_token": self.layer_applications_per_token,
        }


def _ratio(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None
