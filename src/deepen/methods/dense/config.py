"""What of a model is trained, and how."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from deepen.core.config import Config
from deepen.core.errors import ConfigError

LORA_FIELDS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_layers", "lora_targets")


@dataclass(frozen=True)
class DenseConfig(Config):
    """Trains all parameters of a model, or LoRA at some of its linears.

    Fields of LoRA keep their defaults where all is trained: a setting is refused rather than skipped.
    """

    trains: Literal["all", "lora"] = "all"
    lora_rank: int = 8
    # What LoRA adds is scaled by lora_alpha / lora_rank.
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    # "top_third" is the last third of the layers, rounded up. A list names layers, counted from 0.
    lora_layers: Literal["all", "top_third"] | tuple[int, ...] = "all"
    # Every linear of these layers, or those whose names end so, as q_proj or mlp.down_proj.
    lora_targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    learning_rate: float = 3e-4
    # Of matrices; vectors (norms, biases) are never decayed.
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)

    def validate(self) -> list[str]:
        """What is wrong with the values, one message each."""
        return [*self._wrong_lora(), *self._wrong_optimizer(), *self._unread()]

    def layers_of(self, num_layers: int) -> tuple[int, ...]:
        """The layers that get LoRA in a model of so many, ascending; raises `ConfigError` for one that isn't there."""
        if self.lora_layers == "all":
            return tuple(range(num_layers))
        if self.lora_layers == "top_third":
            return tuple(range(num_layers - math.ceil(num_layers / 3), num_layers))
        for layer in self.lora_layers:
            if layer >= num_layers:
                raise ConfigError(
                    f"lora_layers names layer {layer}, but the model has {num_layers} layers (0..{num_layers - 1})"
                )
        return tuple(sorted(self.lora_layers))

    def _wrong_lora(self) -> list[str]:
        messages = []
        if self.lora_rank < 1:
            messages.append(f"lora_rank must be at least 1, not {self.lora_rank}")
        if self.lora_alpha <= 0:
            messages.append(f"lora_alpha must be positive, not {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            messages.append(f"lora_dropout must be in [0, 1), not {self.lora_dropout}")
        for name in ("lora_layers", "lora_targets"):
            value = getattr(self, name)
            if isinstance(value, tuple) and not value:
                messages.append(f'{name} must name at least one; leave it out for all, or set trains to "all"')
            if isinstance(value, tuple) and len(set(value)) < len(value):
                messages.append(f"{name} names one more than once: {', '.join(map(str, value))}")
        if isinstance(self.lora_layers, tuple) and min(self.lora_layers, default=0) < 0:
            messages.append(f"lora_layers holds {min(self.lora_layers)}; layers are counted from 0")
        return messages

    def _wrong_optimizer(self) -> list[str]:
        messages = []
        if self.learning_rate <= 0:
            messages.append(f"learning_rate must be positive, not {self.learning_rate}")
        if self.weight_decay < 0:
            messages.append(f"weight_decay must be 0 or more, not {self.weight_decay}")
        if not all(0 <= beta < 1 for beta in self.betas):
            messages.append(f"betas must be in [0, 1), not {list(self.betas)}")
        return messages

    def _unread(self) -> list[str]:
        if self.trains == "lora":
            return []
        defaults = {field.name: field.default for field in fields(self)}
        return [
            f"{name} {getattr(self, name)} has no effect where all is trained; leave it out, or set trains to lora"
            for name in LORA_FIELDS
            if getattr(self, name) != defaults[name]
        ]
