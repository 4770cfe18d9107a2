"""What transformers itself does with a whole model: save and load it, generate, and cast it as loading would."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from deepen.backbones.quiet import quiet_transformers


def is_pretrained_kind(model: nn.Module) -> TypeGuard[PreTrainedModel]:
    """Whether transformers can save, load and generate with `model`."""
    return isinstance(model, PreTrainedModel)


def saved_and_loaded(model: PreTrainedModel, folder: Path) -> nn.Module:
    """`model` as `from_pretrained` gives it back from what `save_pretrained` wrote to `folder`.

    In evaluation mode, on the same device, by the same kernels.
    """
    with quiet_transformers(), _own_randomness():
        model.save_pretrained(folder)
        with _fresh_memory_marked():
            loaded = type(model).from_pretrained(
                folder,
                dtype=model.dtype,
                attn_implementation=model.config._attn_implementation,
                experts_implementation=model.config._experts_implementation,
                local_files_only=True,
            )
    return loaded.to(model.device).eval()


@contextlib.contextmanager
def _fresh_memory_marked() -> Iterator[None]:
    """In the block, tensors that nobody has written to hold NaN.

    They would else hold what was in their memory before: now and then just what `model` has there.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def generate_alone(model: PreTrainedModel, ids: Tensor, *, num_new: int, seed: int | None = None) -> Tensor:
    """Ids `[B, T + num_new]` of transformers' `generate`: greedy, or sampled from the whole distribution with `seed`.

    The model's own settings (penalties, ids that end a text) don't take part, but for its kind of cache, and are as
    they were afterwards; so is the state of the random generators.
    """
    own = model.generation_config
    settings = GenerationConfig(pad_token_id=0)
    settings.cache_implementation = getattr(own, "cache_implementation", None)
    sampled = {"do_sample": False} if seed is None else {"do_sample": True, "temperature": 1.0, "top_k": 0}
    with quiet_transformers(), _own_randomness(), torch.no_grad():
        torch.manual_seed(seed or 0)
        try:
            model.generation_config = settings
            return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, **sampled)
        finally:
            model.generation_config = own


def kept_in_float32(model: nn.Module, dtype: torch.dtype) -> frozenset[str]:
    """Names of the parameters that stay in float32 when a checkpoint of `model` is loaded in `dtype`."""
    if not isinstance(model, PreTrainedModel) or dtype not in (torch.float16, torch.bfloat16):
        return frozenset()
    patterns = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    names = [name for name, _ in model.named_parameters()]
    return frozenset(name for name in names if any(re.search(rf"(^|\.){each}(\.|$)", name) for each in patterns))


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    with torch.random.fork_rng():
        yield
