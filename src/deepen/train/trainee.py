"""What a run trains: a method's model over its base, with all that a checkpoint needs to know of it."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from deepen.backbones.hf import Backbone
from deepen.backbones.identity import BaseIdentity
from deepen.checkpoint import is_adapter, open_model, with_overrides
from deepen.core.errors import ConfigError
from deepen.core.registry import Method, get
from deepen.data.encoding import ChatEncoder
from deepen.train.config import RunConfig
from deepen.train.ranks import device_of_rank


@dataclass(frozen=True)
class Trainee:
    """A method's model over its base."""

    method: Method
    model: Any
    backbone: Backbone
    tokenizer: ChatEncoder
    identity: BaseIdentity

    @property
    def base(self) -> nn.Module | None:
        """What the method stands on; None where the model is the method's own."""
        return None if self.method.architecture is not None else self.backbone.model


def open_trainee(config: RunConfig) -> Trainee:
    """The adapter that `config.model` names, or a new model of `config.method` over that base."""
    overrides = config.overrides or {}
    has_method = is_adapter(config.model) or config.method is None
    opened = open_model(config.model, device=device_of_rank(), overrides=overrides if has_method else None)
    if opened.method is not None:
        if config.method is not None:
            kind = "an adapter" if opened.method.architecture is None else "a model"
            raise ConfigError(
                f"{config.model} is {kind} of {opened.method.name}: leave out method and config, which it has"
            )
        return Trainee(opened.method, opened.model, opened.backbone, opened.tokenizer, opened.identity)
    if config.method is None:
        raise ConfigError(f"{config.model} is a plain base model: say which method to train on it (`deepen methods`)")
    method = get(config.method)
    backbone = opened.backbone
    method_config = with_overrides(_method_config(method, config), overrides, source="config")
    model = method.load_model_type().build(method_config, backbone, backbone.vocab_size)
    return Trainee(method, model, backbone, opened.tokenizer, opened.identity)


def _method_config(method: Method, config: RunConfig) -> Any:
    if isinstance(config.config, str):
        return method.load_config(config.config)
    return method.load_config_type().from_dict(config.config or {}, source="config")
