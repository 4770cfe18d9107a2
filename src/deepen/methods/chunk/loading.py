"""From an address and a configuration to a model with its sidecar, from a saved folder back to one, and off again."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepen.backbones.resolve import load
from deepen.checkpoint import MANIFEST, is_adapter, open_model
from deepen.core.errors import CheckpointError, ConfigError, DeepenError
from deepen.core.hints import did_you_mean
from deepen.methods.chunk import METHOD
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.model import ChunkRefineWrapper

_SPREADING = ("balanced", "balanced_low_0", "sequential")
_LOADER_ARGUMENTS = ("device",)

_log = logging.getLogger(__name__)


def load_model_with_config(
    model_path: str | Path,
    config: RecursiveConfig | None = None,
    config_path: str | Path | None = None,
    recursive_enabled: bool | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: str | int | torch.device | Mapping[str, Any] | None = "auto",
    trust_remote_code: bool = False,
    **kw: Any,
) -> tuple[nn.Module, Any, RecursiveConfig]:
    """The base model at an address with an untrained sidecar, its tokenizer, and the configuration in force.

    The configuration is `config`, else the file or preset `config_path`, else the defaults; `recursive_enabled`, if
    given, then overrides that one field, and the log says so. With recursion disabled the base object itself is
    returned. `device_map` "auto" (or None) chooses one device; it may name one ("cpu", 0, {"": "cuda:1"}). `kw` may
    hold `device`, which says the same.

    Raises `ConfigError` for a configuration or an argument that can't be, and what `backbones.resolve.load` raises.
    """
    if is_adapter(model_path):
        raise ConfigError(
            f"{model_path} is a saved sidecar, which has a configuration and a base of its own: use load_checkpoint"
        )
    chosen = _configuration(config, config_path, recursive_enabled)
    loaded = load(str(model_path), dtype=dtype, device=_device(device_map, kw), trust_remote_code=trust_remote_code)
    if not chosen.recursive_enabled:
        return loaded.model, loaded.tokenizer, chosen
    return ChunkRefineWrapper(loaded.model, chosen).eval(), loaded.tokenizer, chosen


def load_checkpoint(
    dir: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, RecursiveConfig]:
    """The model saved in a folder, rebuilt on its base, and its configuration; the base itself if that disables it.

    Raises `CheckpointError` if the folder is incomplete, damaged, another method's, or its base is another model now.
    """
    if not is_adapter(dir):
        raise CheckpointError(f"{dir} is no saved sidecar: it has no {MANIFEST}")
    opened = open_model(str(dir), dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if not isinstance(opened.model, ChunkRefineWrapper):
        name = opened.method.name if opened.method else "none"
        raise CheckpointError(f"{dir} was saved by the method {name}; deepen.checkpoint.open_model opens it")
    config = opened.model.config
    return (opened.model if config.recursive_enabled else remove(opened.model)), config


def remove(wrapper: ChunkRefineWrapper) -> nn.Module:
    """Undo the surgery: the base object that was wrapped, which nothing has changed."""
    wrapper.backbone.unpack()
    return wrapper.base


def _configuration(
    config: RecursiveConfig | None, config_path: str | Path | None, recursive_enabled: bool | None
) -> RecursiveConfig:
    if config is not None and config_path is not None:
        _log.warning("config_path %s is not read: the configuration object that was passed comes first", config_path)
    if config is not None:
        chosen, source = config, "the configuration object"
    elif config_path is not None:
        chosen, source = METHOD.load_config(config_path), str(config_path)
    else:
        chosen, source = RecursiveConfig(), "the defaults"
    if recursive_enabled is not None and recursive_enabled != chosen.recursive_enabled:
        _log.info(
            "recursive_enabled is %s, as the argument says; %s said %s",
            recursive_enabled,
            source,
            chosen.recursive_enabled,
        )
        chosen = replace(chosen, recursive_enabled=recursive_enabled)
    chosen.check()
    return chosen


def _device(
    device_map: str | int | torch.device | Mapping[str, Any] | None, kw: Mapping[str, Any]
) -> torch.device | str | None:
    """The one device asked for; None where the choice is free."""
    for name in kw:
        if name not in _LOADER_ARGUMENTS:
            known = (*load_model_with_config.__annotations__, *_LOADER_ARGUMENTS)
            raise ConfigError(f'load_model_with_config has no use for "{name}"{did_you_mean(name, known)}')
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if isinstance(device_map, Mapping) or device_map in _SPREADING:
        raise DeepenError(
            f"device_map {device_map} spreads a model over several devices, which is not supported; leave it out, "
            'or name one device, as "cpu" or "cuda:0"'
        )
    if device_map in (None, "auto"):
        return kw.get("device")
    if kw.get("device") is not None:
        raise ConfigError(f"device_map {device_map} and device {kw['device']} both name a place; give one")
    if isinstance(device_map, int):
        accelerator = torch.accelerator.current_accelerator()
        return f"{accelerator.type if accelerator else 'cuda'}:{device_map}"
    return device_map
