"""What a pass of a base model costs, computed from its modules and configuration without running it."""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D  # a linear layer with its weight transposed

from deepen.backbones.hf import Backbone


def pass_flops(backbone: Backbone, *, num_positions: int, context: int) -> int:
    """FLOPs (2 per multiply-add) of one row's pass over `num_positions` tokens behind `context` committed ones.

    Counted: products with weights (of a mixture of experts those a token visits), the head at every position, and
    attention over the entries that each position may see. Not counted: norms, activations, and the arithmetic of a
    recurrent layer's state.
    """
    per_position = sum(_weight_products(module, backbone) for module in backbone.model.modules())
    visible = sum(context + position + 1 for position in range(num_positions))
    per_entry = sum(_entry_products(backbone, layer) for layer in range(backbone.num_layers))
    return 2 * (num_positions * per_position + visible * per_entry)


def _weight_products(module: nn.Module, backbone: Backbone) -> int:
    """Multiply-adds with this module's own weights at one position."""
    if isinstance(module, nn.Linear | nn.Conv1d | Conv1D):
        return module.weight.numel()
    own = dict(module.named_parameters(recurse=False))
    stacked = [weight for weight in own.values() if weight.ndim == 3]
    if stacked and "Experts" in type(module).__name__:
        # transformers stacks a layer's experts: [experts, out, in].
        return backbone.config.num_experts_per_tok * sum(weight[0].numel() for weight in stacked)
    if "Router" in type(module).__name__ and "weight" in own:
        return own["weight"].numel()
    return 0


def _entry_products(backbone: Backbone, layer: int) -> int:
    """Multiply-adds per visible entry: a score and a weighted value in each head of an attention layer."""
    if layer in backbone.recurrent_layers:
        return 0
    config = backbone.config
    return config.num_attention_heads * sum(_head_widths(backbone))


def _head_widths(backbone: Backbone) -> tuple[int, int]:
    """Width of a head's keys and of its values."""
    config = backbone.config
    latent = getattr(config, "kv_lora_rank", None)
    if latent is not None:
        return config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return width, width


def row_state_bytes(backbone: Backbone, *, context: int) -> int:
    """Bytes of committed entries and states that one row of `context` tokens needs (stores are rounded up)."""
    config = backbone.config
    size = backbone.dtype.itemsize
    total = 0
    for layer in range(backbone.num_layers):
        if layer in backbone.recurrent_layers:
            heads = _DeltaHeads.of(config)
            # A convolution window in the model's dtype; the state itself in fp32, or wider.
            total += size * heads.num_columns * (config.linear_conv_kernel_dim - 1)
            total += max(4, size) * heads.num_values * heads.key_width * heads.value_width
        elif getattr(config, "kv_lora_rank", None) is not None:
            total += size * context * (config.kv_lora_rank + config.qk_rope_head_dim)
        else:
            num_key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            total += size * context * num_key_heads * sum(_head_widths(backbone))
    return total


def replay_bytes_per_token(backbone: Backbone) -> int:
    """Bytes that one token of a pass holds until its commit, so that a state after any count of them can be had.

    Of each recurrent layer: the inputs of its convolution in the model's dtype; key, update and decay in fp32 or wider.
    """
    size = backbone.dtype.itemsize
    total = 0
    for layer in range(backbone.num_layers):
        if layer in backbone.recurrent_layers:
            heads = _DeltaHeads.of(backbone.config)
            written = heads.num_values * (heads.key_width + heads.value_width + heads.decay_width)
            total += size * heads.num_columns + max(4, size) * written
    return total


@dataclass(frozen=True)
class _DeltaHeads:
    """The heads of a model's delta attention."""

    num_keys: int
    num_values: int
    key_width: int
    value_width: int
    decay_width: int
    """Numbers that say how a head's state fades with a token."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "_DeltaHeads":
        if hasattr(config, "linear_num_value_heads"):
            return cls(
                config.linear_num_key_heads,
                config.linear_num_value_heads,
                config.linear_key_head_dim,
                config.linear_value_head_dim,
                1,
            )
        heads, width = config.linear_num_heads, config.linear_head_dim
        return cls(heads, heads, width, width, width)

    @property
    def num_columns(self) -> int:
        """Channels of the short convolution: queries, keys and values."""
        return 2 * self.num_keys * self.key_width + self.num_values * self.value_width
