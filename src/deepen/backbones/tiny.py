"""Random models of five architectures, small enough for tests, that behave like trained ones where it matters.

Greedy text from a model as transformers initialises it soon repeats one token, and then a wrong cache or a wrong
position goes unnoticed. These weights are larger: the next token depends on the whole context, and the best logit
mostly leads by a thousand times float32's rounding error or more.
"""

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    KimiLinearConfig,
    LlamaConfig,
    NanoChatConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3NextConfig,
)

from deepen.core.errors import AddressError
from deepen.core.hints import did_you_mean
from deepen.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE

CONTEXT_LENGTH = 512

_NUM_LAYERS = 4
_SHARED = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": _NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT_LENGTH,
    # 0.2 = 1.6 / sqrt(hidden_size): every layer writes more than it was given, and logits have a spread of 1.6.
    "initializer_range": 0.2,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}


def build(name: str, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The random model `name` (one of `NAMES`) on the CPU; the same weights for the same seed, rounded to `dtype`.

    Its vocabulary is that of `byte_tokenizer`. The global random state stays as it was.
    """
    if name not in _CONFIGS:
        raise AddressError(f'unknown tiny model "{name}"{did_you_mean(name, NAMES)}')
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _random_model(name, torch.float32)
        if name == "nanochat":
            _undo_damping(model)
        if dtype != torch.float32:
            # Not `model.to(dtype)`: that would round the rotary frequencies too, which no loaded checkpoint does.
            rounded = _random_model(name, dtype)
            rounded.load_state_dict(model.state_dict())
            model = rounded
    return model.eval()


def _random_model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    # Experts one after another: the grouped matrix product takes no float64, in which tests compare.
    return AutoModelForCausalLM.from_config(_CONFIGS[name](), dtype=dtype, experts_implementation="eager")


@torch.no_grad()
def _undo_damping(model: PreTrainedModel) -> None:
    """Give attention its full weight: nanochat begins training with it damped, which leaves random text in loops."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_((2 * _NUM_LAYERS) ** 0.5)


def _llama() -> PreTrainedConfig:
    return LlamaConfig(**_SHARED, num_key_value_heads=2, intermediate_size=176)


def _qwen3() -> PreTrainedConfig:
    return Qwen3Config(**_SHARED, num_key_value_heads=2, head_dim=16, intermediate_size=176)


def _nanochat() -> PreTrainedConfig:
    return NanoChatConfig(**_SHARED, num_key_value_heads=2, intermediate_size=256)


def _kimi_linear() -> PreTrainedConfig:
    """Three layers of Kimi Delta Attention, one of latent attention; a dense layer, then experts, top 2 of 4 plus 1."""
    return KimiLinearConfig(
        **_SHARED,
        num_key_value_heads=4,
        intermediate_size=176,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        linear_num_heads=4,
        linear_head_dim=16,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
        moe_intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
    )


def _qwen3_next() -> PreTrainedConfig:
    """Three layers of gated delta net, two value heads to a key head, one of gated attention; experts, top 2 of 4."""
    # Smaller weights: with the others, transformers' own recurrence rounds too coarsely for what is promised above.
    return Qwen3NextConfig(
        **_SHARED | {"initializer_range": 0.15},
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=176,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        mlp_only_layers=[0],
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
    )


_CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "nanochat": _nanochat,
    "kimi_linear": _kimi_linear,
    "qwen3_next": _qwen3_next,
}

NAMES = tuple(_CONFIGS)
