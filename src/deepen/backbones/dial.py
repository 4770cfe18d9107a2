"""A nanochat model by one number, its depth, from which all sizes follow (Karpathy 2025, github.com/karpathy/nanochat).

Layers are 64 wide for each that there is, in whole heads of 128; so `nanochat-d20` has 20 layers of width 1280 and ten
heads.
"""

import re
from typing import Any

from deepen.core.errors import ConfigError

WIDTH_PER_LAYER, HEAD_WIDTH, CONTEXT = 64, 128, 2048
MOST = 128
_NAME = re.compile(r"nanochat-d(\d+)", re.ASCII)


def config_by_depth(name: str) -> dict[str, Any] | None:
    """The config.json of `nanochat-dN`; None for another name. Raises `ConfigError` for an N that can't be."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    depth = int(found[1])
    if not 1 <= depth <= MOST:
        raise ConfigError(f'"{name}" has {depth} layers; give 1 to {MOST}, as in nanochat-d4')
    num_heads = -(-depth * WIDTH_PER_LAYER // HEAD_WIDTH)
    return {
        "model_type": "nanochat",
        "hidden_size": num_heads * HEAD_WIDTH,
        "intermediate_size": 4 * num_heads * HEAD_WIDTH,
        "num_hidden_layers": depth,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
    }
