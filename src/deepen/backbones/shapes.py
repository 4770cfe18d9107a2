"""Published models as shapes: every module and parameter, and no memory, for what can be counted without weights."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, KimiLinearConfig, PreTrainedModel

from deepen.core.errors import AddressError
from deepen.core.hints import did_you_mean

PREFIX = "shape:"
"""Of the addresses of shapes."""

# config.json of moonshotai/Kimi-Linear-48B-A3B-Instruct. Layers are counted from 1.
KIMI_LINEAR_48B: dict[str, Any] = {
    "architectures": ["KimiLinearForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_kimi.KimiLinearConfig",
        "AutoModel": "modeling_kimi.KimiLinearModel",
        "AutoModelForCausalLM": "modeling_kimi.KimiLinearForCausalLM",
    },
    "bos_token_id": 163584,
    "dtype": "bfloat16",
    "eos_token_id": 163586,
    "first_k_dense_replace": 1,
    "head_dim": 72,
    "hidden_act": "silu",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "linear_attn_config": {
        "full_attn_layers": [4, 8, 12, 16, 20, 24, 27],
        "head_dim": 128,
        "kda_layers": [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 21, 22, 23, 25, 26],
        "num_heads": 32,
        "short_conv_kernel_size": 4,
    },
    "mla_use_nope": True,
    "model_max_length": 1048576,
    "model_type": "kimi_linear",
    "moe_intermediate_size": 1024,
    "moe_layer_freq": 1,
    "moe_renormalize": True,
    "moe_router_activation_func": "sigmoid",
    "num_attention_heads": 32,
    "num_expert_group": 1,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_hidden_layers": 27,
    "num_key_value_heads": 32,
    "num_nextn_predict_layers": 0,
    "num_shared_experts": 1,
    "pad_token_id": 163839,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.446,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "use_cache": True,
    "use_grouped_topk": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}

_SHAPES: dict[str, Mapping[str, Any]] = {"kimi-linear-48b": KIMI_LINEAR_48B}
SHAPE_NAMES = tuple(_SHAPES)
LARGE = "kimi-linear-48b"
"""The shape that costs are projected to."""


def is_shape(address: str) -> bool:
    """Whether this is the address of a shape, known or not."""
    return address.startswith(PREFIX)


def build_shape(name: str) -> PreTrainedModel:
    """The model called `name`, with or without "shape:", on the device "meta" and in its published dtype.

    Raises `AddressError`, with the nearest name, if there is none.
    """
    name = name.removeprefix(PREFIX)
    if name not in _SHAPES:
        nearest = did_you_mean(f"{PREFIX}{name}", [f"{PREFIX}{known}" for known in SHAPE_NAMES])
        raise AddressError(f'unknown shape "{PREFIX}{name}"{nearest}')
    config = read_config(_SHAPES[name])
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=config.dtype).eval()


def read_config(published: Mapping[str, Any]) -> KimiLinearConfig:
    """transformers' configuration from the fields of a published one."""
    fields = {name: value for name, value in published.items() if name != "rope_scaling"}  # whose name warns
    return KimiLinearConfig.from_dict(fields)
