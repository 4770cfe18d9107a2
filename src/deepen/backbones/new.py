"""New models: a configuration of transformers' and a tokenizer made here give one with random weights to train.

The configuration says the architecture (`model_type`) and its sizes; vocabulary and special ids are the tokenizer's.
Some architectures can begin with the weights of a pretrained model instead, which then says all of these.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deepen.backbones.architectures import method_of_model
from deepen.backbones.dial import config_by_depth
from deepen.backbones.hf import Backbone
from deepen.backbones.quiet import no_deprecations
from deepen.backbones.resolve import Loaded
from deepen.core.errors import ConfigError
from deepen.core.files import read_json
from deepen.core.hints import did_you_mean
from deepen.core.registry import discover
from deepen.data.formats import Text, Tokens, document_of
from deepen.data.split import records_of
from deepen.data.tasks.address import PREFIX as TASK_PREFIX
from deepen.data.tasks.address import read_task
from deepen.data.tokenizer import byte_tokenizer, train_bpe, word_tokenizer

_SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


@dataclass(frozen=True)
class NewModel:
    """An untrained model in evaluation mode on the CPU, with its tokenizer."""

    backbone: Backbone
    tokenizer: Any


def new_model(
    config: Mapping[str, Any], tokenizer: Any, *, seed: int = 0, context_length: int | None = None
) -> NewModel:
    """The causal LM that `config` describes, in float32; the same weights for the same seed.

    `config` has the fields of a config.json but `vocab_size` and special ids, which are those of `tokenizer`.
    `context_length` goes before its `max_position_embeddings`, and is told to the tokenizer. The global random state
    stays as it was.

    Raises `ConfigError` for an architecture that isn't known, a field that it doesn't have, ids that differ from the
    tokenizer's and sizes that don't fit each other; `UnsupportedBackbone` for a model that can't be attached to.
    """
    made = _transformers_config(config, tokenizer, context_length)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _built(made)
    backbone = Backbone.attach(model)
    tokenizer.model_max_length = backbone.context_length or tokenizer.model_max_length
    return NewModel(backbone, tokenizer)


def derived_model(
    config: Mapping[str, Any],
    base: Loaded,
    *,
    initialization: str | None = None,
    seed: int = 0,
    context_length: int | None = None,
) -> NewModel:
    """The model that `config` describes, with the weights of `base` where it has equals of them, and its tokenizer.

    `config` has an architecture that a method brings, and those of its fields that `base` doesn't settle.
    `initialization` is one of the method's ways to make the other weights, None its own choice; what is random in them
    is drawn from `seed`. `context_length` goes before the base's, and is told to its tokenizer. The global random state
    stays as it was.

    Raises `ConfigError` for an architecture that can't be made so, and as the method does.
    """
    derive = _way_to_derive(config)
    settings = {name: value for name, value in config.items() if name != "model_type"}
    if context_length is not None:
        settings["max_position_embeddings"] = _checked_length(context_length)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = derive(base.model, settings, initialization)
    backbone = Backbone.attach(model.eval())
    tokenizer = base.tokenizer
    tokenizer.model_max_length = backbone.context_length or tokenizer.model_max_length
    return NewModel(backbone, tokenizer)


def new_tokenizer(name: str, *, corpus: str | None = None) -> Any:
    """`bytes`; `task:NAME`, the words of a task, whatever settings are behind that; or `bpe:N`, N ids made of the
    training documents of `corpus`.

    Raises `ConfigError` for another name, and for a corpus that is missing or of no use; what `read_task` raises for an
    unknown task or setting; and what reading the corpus raises.
    """
    if name == "bytes":
        return byte_tokenizer()
    if name.startswith(TASK_PREFIX):
        return word_tokenizer(read_task(name).vocabulary().words)
    size = re.fullmatch(r"bpe:(\d{1,7})", name)
    if size is None:
        raise ConfigError(
            f'unknown tokenizer "{name}"; it is bytes, or bpe:N with the number of its ids, as in bpe:4096, '
            f"or {TASK_PREFIX}NAME with the words of a task"
        )
    if corpus is None:
        raise ConfigError(f"tokenizer {name} is trained on text: say on which, as in --data wiki")
    return train_bpe(_training_texts(corpus), vocab_size=int(size[1]))


def config_paths() -> dict[str, Path]:
    """The shipped configurations by name, sorted: transformers' architectures, and those that methods bring."""
    folder = Path(str(resources.files("deepen.backbones"))) / "presets"
    paths = {path.stem: path for path in folder.glob("*.json")}
    for method in discover().values():
        if method.architecture is not None:
            paths |= method.preset_paths()
    return dict(sorted(paths.items()))


def read_config(name_or_path: str | Path) -> dict[str, Any]:
    """The configuration in a file, else the shipped one of that name, or by depth, as `nanochat-d4` (dial.py).

    Raises `ConfigError` if there is none.
    """
    path, shipped = Path(name_or_path).expanduser(), config_paths()
    if not path.is_file():
        name = str(name_or_path).removesuffix(".json")
        by_depth = config_by_depth(name)
        if by_depth is not None:
            return by_depth
        if name not in shipped:
            raise ConfigError(
                f'"{name_or_path}" is neither a file nor a shipped configuration{did_you_mean(name, shipped)}'
            )
        path = shipped[name]
    content = read_json(path, error=ConfigError)
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold one JSON object, the fields of a transformers configuration")
    return content


def parameters_by_part(backbone: Backbone) -> dict[str, int]:
    """How many parameters each part has; a head that shares the embedding's has none of its own."""
    parts = {
        "embedding": backbone.embedding,
        "layers": backbone.layers,
        "final norm": backbone.final_norm,
        "head": backbone.head,
        "others": backbone.model,
    }
    seen: set[torch.nn.Parameter] = set()
    counts = {}
    for name, part in parts.items():
        own = set(part.parameters()) - seen
        counts[name] = sum(parameter.numel() for parameter in own)
        seen |= own
    return counts


def _training_texts(corpus: str) -> Iterator[str]:
    count = 0
    for record in records_of(corpus, "train"):
        document = document_of(record)
        count += 1
        if isinstance(document, Tokens):
            raise ConfigError(f"{document.place}: token ids are no text to make a tokenizer from; give texts")
        yield from [document.text] if isinstance(document, Text) else (each.content for each in document.messages)
    if not count:
        raise ConfigError(
            f"{corpus} has no training document: 4 in 100 documents, told by their text, are kept for validation and "
            "test; give more or other text"
        )


# The configuration


def _transformers_config(given: Mapping[str, Any], tokenizer: Any, context_length: int | None) -> PreTrainedConfig:
    kind = _config_type(given)
    settings = {name: value for name, value in given.items() if name != "model_type"}
    for name, value in _ids_of(tokenizer).items():
        if name in settings and settings[name] != value:
            raise ConfigError(
                f"{name} is {settings[name]}, but the tokenizer's is {value}; leave it out, it comes from the tokenizer"
            )
        settings[name] = value
    if context_length is not None:
        settings.pop(kind.attribute_map.get("max_position_embeddings", ""), None)
        settings["max_position_embeddings"] = _checked_length(context_length)
    try:
        with no_deprecations():
            config = kind(**settings)
    except (StrictDataclassError, ValueError, TypeError, KeyError, ZeroDivisionError) as cause:
        raise ConfigError(f"a {kind.model_type} configuration can't be made of this: {_one_line(cause)}") from cause
    _refuse_unknown(given, config)
    _refuse_uneven_heads(config)
    return config


def _checked_length(context_length: int) -> int:
    if context_length < 1:
        raise ConfigError(f"context_length must be at least 1, not {context_length}")
    return context_length


def _way_to_derive(given: Mapping[str, Any]) -> Callable[..., Any]:
    name = _config_type(given).model_type
    method = method_of_model(name)
    derive = None if method is None else method.load_derive()
    if derive is None:
        able = [each.architecture for each in discover().values() if each.derive is not None]
        raise ConfigError(
            f"a {name} model can't begin with another's weights; those of model_type {', '.join(map(str, able))} can. "
            "To train a pretrained model on as it is, give its address to `deepen train`"
        )
    return derive


def _config_type(given: Mapping[str, Any]) -> type[PreTrainedConfig]:
    if "model_type" not in given:
        raise ConfigError('model_type is missing: it says the architecture, as in "model_type": "llama"')
    name = given["model_type"]
    if method_of_model(name) is not None:
        own: type[PreTrainedConfig] = CONFIG_MAPPING[name]
        return own
    if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        nearest = did_you_mean(str(name), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        hint = nearest if "did you mean" in nearest else "; as those of transformers' causal models, llama for one"
        raise ConfigError(f'model_type "{name}" is no causal language model of transformers{hint}')
    kind: type[PreTrainedConfig] = CONFIG_MAPPING[name]
    return kind


def _ids_of(tokenizer: Any) -> dict[str, int]:
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in _SPECIAL_IDS}}


def _refuse_unknown(given: Mapping[str, Any], config: PreTrainedConfig) -> None:
    """transformers keeps whatever it is given as an attribute; names of earlier releases it takes in."""
    known = {field.name for field in fields(config)} | config.attribute_map.keys()
    for name in given:
        if name != "model_type" and name not in known and name in vars(config):
            raise ConfigError(f'a {config.model_type} configuration has no "{name}"{did_you_mean(name, known)}')


def _refuse_uneven_heads(config: PreTrainedConfig) -> None:
    hidden, heads = config.hidden_size, getattr(config, "num_attention_heads", None)
    if not heads:
        return
    if getattr(config, "head_dim", None) is None and hidden % heads:
        raise ConfigError(f"hidden_size {hidden} can't be divided among {heads} heads (num_attention_heads)")
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % key_heads:
        raise ConfigError(
            f"num_attention_heads {heads} is no multiple of num_key_value_heads {key_heads}, so they can't share these"
        )


def _built(config: PreTrainedConfig) -> PreTrainedModel:
    """The model, once it has computed something."""
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            model(input_ids=torch.zeros(1, min(2, _context_of(config)), dtype=torch.int64), use_cache=False)
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as cause:
        raise ConfigError(f"a {config.model_type} model like this can't be built: {_one_line(cause)}") from cause
    return model


def _context_of(config: PreTrainedConfig) -> int:
    return getattr(config, "max_position_embeddings", None) or 2


def _one_line(cause: BaseException) -> str:
    return " ".join(str(cause).split()) or type(cause).__name__
