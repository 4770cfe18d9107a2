"""Kimi Linear as it is published: a tiny model's folder in the format of the 48B model."""

import base64
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from deepen.backbones.shapes import KIMI_LINEAR_48B, read_config

# Behind the single bytes. Those of the last line are found, or not found, where text is cut up as published.
PIECES = (
    *(b"he", b" t", b"in", b"ll", b"lo", b" the", b"hello", b" hello", b"12", b"123", b"aa", b"aaa", b"aaaa"),
    *(b"\n\n", b"  ", b"'s", b"it", b"\xe4\xb8", b"\xe4\xb8\xad", b"\xe6\x96\x87", b"\xe4\xb8\xad\xe6\x96\x87", b"HE"),
    *(b"at", b"the", b"ca", b"cat"),
    *(b"c\xe4\xb8\xad", b"1234", b"eH", b"t's", b" !", b"A\xe4\xb8\xad", b"\xe4\xba\x8c\xe3\x80\x87"),
)
NUM_PIECES = 256 + len(PIECES)
# Place behind the pieces, text, and whether it is special; a few of the published ones, at their published places.
ADDED = (
    *((0, "[BOS]", True), (1, "[EOS]", True), (2, "<|im_end|>", True), (3, "<|im_user|>", True)),
    *((4, "<|im_assistant|>", True), (9, "[EOT]", True), (10, "<|im_system|>", True)),
    *((13, "<|tool_call_begin|>", False), (17, "<|im_middle|>", True), (254, "[UNK]", True), (255, "[PAD]", True)),
)
TEMPLATE = """\
{%- for message in messages -%}
<|im_{{ message['role'] }}|>{{ message['role'] }}<|im_middle|>{{ message['content'] }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|>{%- endif -%}"""

# Twelve experts: read in alphabetical order, the tenth would come before the second.
CONFIG_TINY: dict[str, Any] = KIMI_LINEAR_48B | {
    "bos_token_id": NUM_PIECES,
    "eos_token_id": NUM_PIECES + 2,
    "pad_token_id": NUM_PIECES + 255,
    "vocab_size": NUM_PIECES + 256,
    "head_dim": 16,
    "hidden_size": 64,
    "initializer_range": 0.2,
    "intermediate_size": 176,
    "kv_lora_rank": 32,
    "linear_attn_config": {
        "full_attn_layers": [3, 5],
        "head_dim": 16,
        "kda_layers": [1, 2, 4],
        "num_heads": 4,
        "short_conv_kernel_size": 4,
    },
    "model_max_length": 512,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_experts": 12,
    "num_experts_per_token": 2,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

# Parameters that the published files hold in fp32, in a model of bfloat16.
_IN_FP32 = ("A_log", "dt_bias", "e_score_correction_bias")


def build(config: Mapping[str, Any], device: str = "cpu") -> PreTrainedModel:
    """The random model of a published configuration, in bfloat16 but for what is published in fp32."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(read_config(config), dtype=torch.bfloat16).eval()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(_IN_FP32):
                tensor.data = tensor.data.float()
            if tensor.ndim == 1:
                # As built, all norms are alike, and all corrections of routers.
                tensor.data.add_(torch.randn_like(tensor) / 16)
    return model


def published_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as the published files name and divide them."""
    for name, tensor in model.state_dict().items():
        if ".conv1d." in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace(".conv1d.", f".{part}_conv1d."), piece
        elif name.endswith(".experts.gate_up_proj"):
            for part, halves in zip(("w1", "w3"), tensor.chunk(2, dim=1), strict=True):
                yield from _experts(name, part, halves)
        elif name.endswith(".experts.down_proj"):
            yield from _experts(name, "w2", tensor)
        else:
            sparse = ".mlp.gate." in name or ".mlp.shared_experts." in name
            placed = name.replace(".mlp.", ".block_sparse_moe.") if sparse else name
            yield placed.replace(".forget_gate.", "."), tensor


def _experts(name: str, part: str, stacked: Tensor) -> Iterator[tuple[str, Tensor]]:
    folder = name.rpartition(".")[0].replace(".mlp.", ".block_sparse_moe.")
    for expert, weight in enumerate(stacked):
        yield f"{folder}.{expert}.{part}.weight", weight


def write_published_folder(folder: Path) -> PreTrainedModel:
    """Write a tiny model as the large one is published; its Python files fail if they are run. Gives the model."""
    folder.mkdir(parents=True, exist_ok=True)
    model = build(CONFIG_TINY)
    _write_json(folder / "config.json", CONFIG_TINY)
    _write_json(folder / "generation_config.json", {"eos_token_id": CONFIG_TINY["eos_token_id"]})
    for name in ("configuration_kimi", "modeling_kimi", "tokenization_kimi"):
        (folder / f"{name}.py").write_text("raise SystemExit('the code that came with the model was run')\n")
    _write_shards(folder, dict(published_tensors(model)), num_shards=3)
    _write_tokenizer(folder)
    return model


def _write_shards(folder: Path, tensors: Mapping[str, Tensor], *, num_shards: int) -> None:
    files = [f"model-{shard:05}-of-{num_shards:05}.safetensors" for shard in range(1, num_shards + 1)]
    # One after another, so that a layer's experts and convolutions lie in different files.
    weight_map = {name: files[place % num_shards] for place, name in enumerate(tensors)}
    for file in files:
        held = {name: tensor.contiguous().clone() for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tokenizer(folder: Path) -> None:
    pieces = [*(bytes([byte]) for byte in range(256)), *PIECES]
    lines = [f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces)]
    (folder / "tiktoken.model").write_text("".join(lines))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        "added_tokens_decoder": {
            str(NUM_PIECES + place): {"content": text, **flags, "special": special} for place, text, special in ADDED
        },
        "additional_special_tokens": [text for place, text, special in ADDED if special and 1 < place < 254],
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "model_max_length": 512,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": "[UNK]",
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=2))
