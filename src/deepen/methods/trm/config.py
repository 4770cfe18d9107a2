"""What a refiner is made of, where it stands, and how it is trained."""

from dataclasses import dataclass, fields
from typing import Literal

from deepen.core.config import Config
from deepen.core.errors import ConfigError

Mixing = Literal["position", "evidence"]
Halting = Literal["none", "delta", "kl", "learned"]

DEFAULT_THRESHOLDS: dict[str, float] = {"delta": 0.05, "kl": 5e-4, "learned": 0.5}
"""Where `halt_threshold` is null."""

_AT_LEAST_ONE = (
    *("trm_d_latent", "trm_n", "trm_T", "trm_heads", "grad_outer_steps", "supervise_steps"),
    *("trm_hidden", "T_max"),
)
_OF_TRAINING = ("trains", "learning_rate", "refiner_rate_factor", "weight_decay", "betas")


@dataclass(frozen=True)
class TRMConfig(Config):
    """A refiner behind the trunk's final norm, or behind some of its layers; off by default.

    `trm_n` and `trm_T` are settings of a run: weights fit any of them.
    """

    use_trm: bool = False
    # Width of the latent z.
    trm_d_latent: int = 256
    # Updates of z in an outer step.
    trm_n: int = 6
    # Outer steps, each of which ends with an update of the residual.
    trm_T: int = 3
    # Width between the two linears of f_z, and of f_y; null: four times the latent.
    trm_hidden: int | None = None
    # "position": each position by itself. "evidence": queries from z read keys and values made of x, causally.
    mixing: Mixing = "position"
    # Of the reading that evidence does; they divide the latent.
    trm_heads: int = 4
    # "head": between final norm and head. A list: behind these layers, counted from 0, with one set of weights.
    placement: Literal["head"] | tuple[int, ...] = "head"

    # The last outer steps, through which gradients flow; those before run without.
    grad_outer_steps: int = 1
    # The last outer steps, each of which is asked for the next token; only those with gradient can learn from it.
    supervise_steps: int = 1
    # Outer steps of a training batch. fixed: trm_T. uniform: 1 to T_max. lognormal_poisson: 1 and a Poisson number
    # whose rate is log-normal, trm_T on average. By what each document tells of its difficulty, task: as many as that.
    # fixed_point: from so many to T_max.
    T_sampling: Literal["fixed", "uniform", "lognormal_poisson", "task", "fixed_point"] = "fixed"
    # The most that is drawn, which fixed_point must be told; null: for uniform 2 trm_T - 1, whose mean is trm_T,
    # otherwise there is no bound.
    T_max: int | None = None

    # When a position stops at inference. delta: its residual moves little. kl: its next-token distribution does.
    # learned: a head of its own says so.
    halt: Halting = "none"
    # Null: 0.05 for delta, 0.0005 nats for kl, 0.5 for learned.
    halt_threshold: float | None = None
    # Of the learned head's loss.
    halt_weight: float = 0.1

    # The refiner beside a frozen model, or the whole model with it.
    trains: Literal["refiner", "all"] = "refiner"
    learning_rate: float = 1e-3
    # The refiner's rate over that: its weights act n T times a step.
    refiner_rate_factor: float = 1.0
    # Of matrices; vectors are never decayed.
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)

    @property
    def hidden(self) -> int:
        """Width between the linears."""
        return 4 * self.trm_d_latent if self.trm_hidden is None else self.trm_hidden

    @property
    def threshold(self) -> float:
        """Of the halting rule; raises `KeyError` where there is none."""
        return DEFAULT_THRESHOLDS[self.halt] if self.halt_threshold is None else self.halt_threshold

    @property
    def draws_by_difficulty(self) -> bool:
        """Whether T follows the difficulty of each document in training."""
        return self.T_sampling in ("task", "fixed_point")

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The layers behind which the refiner stands, ascending; raises `ConfigError` for one that isn't there."""
        if isinstance(self.placement, str):
            return ()
        for layer in self.placement:
            if layer >= num_layers:
                raise ConfigError(
                    f"placement names layer {layer}, but the model has {num_layers} layers (0..{num_layers - 1})"
                )
        return tuple(sorted(self.placement))

    def validate(self) -> list[str]:
        """What is wrong with the values, one message each."""
        if not self.use_trm:
            return [*self._wrong_numbers(), *self._unread()]
        return [
            *self._wrong_numbers(),
            *self._wrong_placement(),
            *self._wrong_steps(),
            *self._wrong_drawing(),
            *self._wrong_halting(),
        ]

    def _wrong_numbers(self) -> list[str]:
        messages = [
            f"{name} must be at least 1, not {getattr(self, name)}"
            for name in _AT_LEAST_ONE
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
        messages += [
            f"{name} must be positive, not {getattr(self, name)}"
            for name in ("learning_rate", "refiner_rate_factor")
            if getattr(self, name) <= 0
        ]
        messages += [
            f"{name} must be 0 or more, not {getattr(self, name)}"
            for name in ("weight_decay", "halt_weight")
            if getattr(self, name) < 0
        ]
        if not all(0 <= beta < 1 for beta in self.betas):
            messages.append(f"betas must be in [0, 1), not {list(self.betas)}")
        if self.mixing == "evidence" and self.trm_heads > 0 and self.trm_d_latent % self.trm_heads:
            divisors = [each for each in range(1, self.trm_d_latent + 1) if self.trm_d_latent % each == 0]
            nearest = min(divisors, key=lambda each: abs(each - self.trm_heads))
            messages.append(
                f"trm_d_latent {self.trm_d_latent} can't be divided among trm_heads {self.trm_heads}; the nearest "
                f"number of heads that divides it is {nearest}"
            )
        return messages

    def _wrong_placement(self) -> list[str]:
        if isinstance(self.placement, str):
            return []
        if not self.placement:
            return ['placement must name at least one layer; for the place before the head write "head"']
        messages = []
        if len(set(self.placement)) < len(self.placement):
            messages.append(f"placement names a layer more than once: {', '.join(map(str, self.placement))}")
        if min(self.placement) < 0:
            messages.append(f"placement holds {min(self.placement)}; layers are counted from 0")
        if self.supervise_steps > 1:
            messages.append(
                f"supervise_steps is {self.supervise_steps}, but behind a layer no step says a token; leave it at 1, "
                'or set placement to "head"'
            )
        if self.halt in ("kl", "learned"):
            messages.append(
                f'halt {self.halt} goes by the tokens that a step says, and behind a layer none does; use "delta", or '
                'set placement to "head"'
            )
        return messages

    def _wrong_steps(self) -> list[str]:
        if self.supervise_steps > self.grad_outer_steps:
            return [
                f"supervise_steps is {self.supervise_steps}, but gradients flow through the last "
                f"{self.grad_outer_steps} outer steps alone; raise grad_outer_steps to {self.supervise_steps}"
            ]
        if self.draws_by_difficulty and self.supervise_steps > 1:
            return [
                f"supervise_steps is {self.supervise_steps}, but with T_sampling {self.T_sampling} steps before "
                "the last have come too soon for the answer; leave it at 1, or set T_sampling to uniform"
            ]
        if self.T_sampling == "fixed" and self.grad_outer_steps > self.trm_T:
            return [
                f"grad_outer_steps is {self.grad_outer_steps}, but there are {self.trm_T} outer steps; lower it, or "
                "raise trm_T"
            ]
        return []

    def _wrong_drawing(self) -> list[str]:
        if self.T_max is None:
            missing = self.T_sampling == "fixed_point"
            return ["T_sampling fixed_point draws up to T_max; set that to a number, as 16"] if missing else []
        if self.T_sampling == "fixed":
            return [
                f"T_max {self.T_max} has no effect with T_sampling fixed; leave it out, or set T_sampling to uniform"
            ]
        if self.T_sampling == "lognormal_poisson" and self.T_max < self.trm_T:
            return [f"T_max is {self.T_max}, below trm_T {self.trm_T}, the mean of what is drawn; raise it"]
        return []

    def _wrong_halting(self) -> list[str]:
        messages = []
        if self.halt == "none" and self.halt_threshold is not None:
            messages.append(
                f"halt_threshold {self.halt_threshold} has no effect with halt none; leave it out, or choose delta, kl "
                "or learned"
            )
        if self.halt == "learned" and not 0 < self.threshold < 1:
            messages.append(f"halt_threshold must be between 0 and 1 for halt learned, not {self.threshold}")
        if self.halt in ("delta", "kl") and self.threshold < 0:
            messages.append(f"halt_threshold must be 0 or more for halt {self.halt}, not {self.threshold}")
        if self.halt != "learned" and self.halt_weight != TRMConfig.halt_weight:
            messages.append(f"halt_weight {self.halt_weight} has no effect with halt {self.halt}; leave it out")
        return messages

    def _unread(self) -> list[str]:
        """Settings of a refiner that isn't there."""
        defaults = {field.name: field.default for field in fields(self)}
        return [
            f"{name} {getattr(self, name)} has no effect without a refiner; leave it out, or set use_trm to true"
            for name, default in defaults.items()
            if name not in ("use_trm", *_OF_TRAINING) and getattr(self, name) != default
        ]
