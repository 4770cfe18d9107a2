"""Chunk refinement: a trainable sidecar lets a pretrained model go over its next chunk again before it commits."""

from deepen.core.registry import Method

METHOD = Method(
    "chunk",
    "drafts a pretrained model's next tokens in chunks and refines them in full-depth passes with a small sidecar",
    config="config:RecursiveConfig",
    model="model:ChunkRefineWrapper",
    config_file="recursive_config.json",
    weights_file="sidecar.safetensors",
)
