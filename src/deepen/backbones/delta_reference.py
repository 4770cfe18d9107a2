"""What deepen's delta attention is measured against: transformers' own functions, model and cache, as they come."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, KimiLinearConfig, PreTrainedModel
from transformers.models.kimi_linear.modeling_kimi_linear import (
    chunk_kimi_delta_attention,
    recurrent_kimi_delta_attention,
)

# The functions in torch themselves: what wraps them would call other kernels where those are installed.
chunk_reference: Callable[..., tuple[Tensor, Tensor | None]] = inspect.unwrap(chunk_kimi_delta_attention)
recurrent_reference: Callable[..., tuple[Tensor, Tensor | None]] = inspect.unwrap(recurrent_kimi_delta_attention)

_VOCAB_SIZE = 4096


def random_kimi_linear(*, hidden_size: int, num_heads: int, head_width: int, seed: int = 0) -> PreTrainedModel:
    """Three layers of Kimi Delta Attention and one of latent attention, all dense, with random weights in float32.

    The proportions are those of the published 48B model where they don't depend on its size. The global random state
    stays as it was.
    """
    config = KimiLinearConfig(
        vocab_size=_VOCAB_SIZE,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=4,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
        mlp_layer_types=["dense"] * 4,
        linear_num_heads=num_heads,
        linear_head_dim=head_width,
        kv_lora_rank=max(1, hidden_size // 4),
        qk_nope_head_dim=head_width,
        qk_rope_head_dim=max(2, head_width // 2),
        v_head_dim=head_width,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class ReferencePrefix:
    """A prefix that `model` has read into transformers' own cache, which can't be taken back to an earlier token."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self._model: Any = model
        self._cache = DynamicCache(config=self._model.config)
        self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def fork(self) -> Callable[[Tensor], Tensor]:
        """Gives logits `[B, W, V]` of tokens `[B, W]` behind the prefix; for one call, since that changes the cache."""
        cache = copy.deepcopy(self._cache)

        @torch.no_grad()
        def run(tokens: Tensor) -> Tensor:
            logits: Tensor = self._model(tokens, past_key_values=cache, use_cache=True).logits
            return logits

        return run
