"""Checks of a model against itself in another form: in another dtype, compiled, saved and loaded."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from deepen.backbones.whole import is_pretrained_kind, kept_in_float32, saved_and_loaded
from deepen.check.effort import Effort
from deepen.check.gauge import Gauge
from deepen.check.outcome import Fault, NotApplicable, Passed
from deepen.check.rounding import rounding_noise
from deepen.check.subject import ROUNDING_FACTOR, Subject, logits_of

_LENGTH = 24
# How torch says that it has no kernel, rather than that a model mixes dtypes.
_NO_KERNEL = ("not implemented for", "Expected mat_a to be")


def precision(subject: Subject, effort: Effort) -> Passed:
    """In every dtype that torch has kernels for: finite, causal, and as near to a wider dtype as rounding explains.

    Each is compared with the widest, with weights that hold the same (already rounded) values, so that only what is
    computed differs. Of the widest itself, it is only asked that it is finite and causal.
    """
    ids = subject.text(min(_LENGTH, effort.length), seed=0)
    causal = _reads_ahead(subject, ids) <= subject.allowed
    widest = _widest(subject, ids, effort)
    largest, allowed, tried = 0.0, subject.allowed, []
    for dtype in effort.dtypes:
        cast = _runnable(subject, ids, dtype)
        if cast is None:
            continue
        tried.append(_name(dtype))
        logits = _sound_logits(cast, ids, dtype)
        explained = _explained(cast, ids, dtype)
        ahead = _reads_ahead(cast, ids)
        if causal and ahead > explained:
            raise Fault(
                f"in {_name(dtype)} later tokens move a logit by {ahead:.2g} (rounding explains {explained:.1g}), "
                f"in {_name(subject.dtype)} they don't",
                cause=f"a mask that doesn't close in {_name(dtype)}: a constant like -1e4 in place of "
                "torch.finfo(dtype).min, or a kernel for this dtype that is given no mask",
            )
        if dtype == widest:
            continue
        _cast(cast.model, widest)
        error = float((logits.double() - cast.logits(ids).double()).abs().max())
        if error > explained:
            raise Fault(
                f"in {_name(dtype)} logits are off by {error:.2g} from those that the same weights give in "
                f"{_name(widest)} (rounding explains {explained:.1g})",
                cause=f"something needs more than {_name(dtype)} has: positions or counts above what it can tell "
                "apart, a long sum, an exponential, a difference of large numbers; compute it in float32",
            )
        if error / explained >= largest / allowed:
            largest, allowed = error, explained
    if not tried:
        raise NotApplicable(f"torch has no kernels for it in {', '.join(map(_name, effort.dtypes))} on this device")
    return Passed(len(tried), largest, allowed, note=f"in {', '.join(tried)}")


def _explained(cast: Subject, ids: Tensor, dtype: torch.dtype) -> float:
    explained = ROUNDING_FACTOR * rounding_noise(cast.model, lambda: cast.logits(ids))
    if dtype != torch.float64:
        return explained
    # Parts of a model may be computed in float32 whatever its dtype, and jump when that rounds otherwise.
    return explained * torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps


def _widest(subject: Subject, ids: Tensor, effort: Effort) -> torch.dtype:
    for dtype in sorted(effort.dtypes, key=lambda each: -torch.finfo(each).bits):
        if _runnable(subject, ids, dtype) is not None:
            return dtype
    return subject.dtype


def _runnable(subject: Subject, ids: Tensor, dtype: torch.dtype) -> Subject | None:
    """A copy in `dtype` that runs; None if torch lacks kernels for it."""
    try:
        copy = replace(subject, model=deepcopy(subject.model))
    except Exception as error:
        raise NotApplicable(f"the model can't be copied to cast the copy ({type(error).__name__}: {error})") from error
    _cast(copy.model, dtype)
    try:
        copy.logits(ids)
    except Exception as error:
        if any(words in str(error) for words in _NO_KERNEL):
            return None
        # Tables that aren't saved keep their dtype when a checkpoint is loaded, but not in `model.to(dtype)`, and a
        # model that was written for the latter may rest on it.
        copy.model.to(dtype)
        try:
            copy.logits(ids)
        except Exception:
            raise Fault(
                f"in {_name(dtype)} the forward raises {type(error).__name__}: {error}",
                cause=f"a tensor made in float32 (torch.ones, torch.arange(...).float(), a plain attribute) meets "
                f"{_name(dtype)} ones; make it in the dtype of what it is combined with",
            ) from error
    return copy


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """In place: what a checkpoint saves is cast, what a constructor computes (rotary frequencies) is kept."""
    kept = kept_in_float32(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32 if name in kept else dtype)
    for buffer in _saved_buffers(model):
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


def _saved_buffers(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield buffer


def _sound_logits(cast: Subject, ids: Tensor, dtype: torch.dtype) -> Tensor:
    logits = cast.logits(ids)
    if not torch.isfinite(logits).all():
        position = int((~torch.isfinite(logits)).any(dim=-1).any(dim=0).nonzero()[0])
        raise Fault(
            f"in {_name(dtype)} logits are not finite, first at position {position}",
            cause=f"something exceeds {torch.finfo(dtype).max:.2g}, the largest number of {_name(dtype)} (a sum of "
            f"squares, an exponential, an activation){_first_infinite(cast, ids)}; compute that in float32",
        )
    if logits.dtype not in (dtype, torch.float32):
        raise Fault(
            f"in {_name(dtype)} logits come in {_name(logits.dtype)}",
            cause="a cast to a fixed dtype behind or in the head, or a constant of a wider one that promotes",
        )
    return logits


def _first_infinite(cast: Subject, ids: Tensor) -> str:
    """Names the first module that gives something infinite."""
    names: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            parts = output if isinstance(output, tuple) else (output,)
            if any(isinstance(part, Tensor) and not torch.isfinite(part).all() for part in parts):
                names.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in cast.model.named_modules() if name]
    try:
        cast.logits(ids)
    finally:
        for handle in handles:
            handle.remove()
    return f", first in what {names[0]} gives" if names else ""


def _reads_ahead(subject: Subject, ids: Tensor) -> float:
    """How far other later tokens move the logits of the first half."""
    half = ids.shape[1] // 2
    changed = torch.cat([ids[:, :half], subject.text(ids.shape[1], seed=1)[:, half:]], dim=1)
    difference = subject.logits(changed)[:, :half].double() - subject.logits(ids)[:, :half].double()
    return float(difference.abs().max())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compilation(subject: Subject, effort: Effort) -> Passed:
    """Under torch.compile it gives what it gives without, at two lengths."""
    backend = "inductor" if _is_built_in_seconds(subject) else "aot_eager"
    gauge = Gauge(subject.allowed)  # measured before: compiled code must not see the hooks
    # Short: code that loops over blocks of positions is unrolled, and takes minutes to compile as it is.
    longest = min(_LENGTH, effort.length)
    texts = [subject.text(length, seed=length, batch=2) for length in (longest, max(1, longest // 2))]
    expected = [subject.logits(ids) for ids in texts]
    given = {"use_cache": False} if "use_cache" in subject.takes else {}

    def forward(**inputs: Any) -> Any:
        return subject.model(**inputs)

    with _compiler() as compiler, torch.no_grad():
        # The function, not the module: of that torch would leave its mark on the model.
        compiled = compiler(forward, backend=backend)
        for ids, logits in zip(texts, expected, strict=True):
            gauge.compare(
                logits_of(compiled(input_ids=ids, **given)),
                logits,
                seen=f"compiled with {backend}, at {ids.shape[1]} tokens",
                cause="code that runs when the model is traced and not when the compiled model is called: a branch "
                "or number taken from values (.item(), int(), a cached length), a tensor made once and kept",
            )
    return replace(gauge.passed(), note=f"with the {backend} backend")


def _is_built_in_seconds(subject: Subject) -> bool:
    """Whether there is what builds kernels, and no recurrence that is traced token by token into endless ones."""
    if subject.backbone is not None and subject.backbone.recurrent_layers:
        return False
    if subject.device.type != "cpu":
        return True
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


@contextmanager
def _compiler() -> Iterator[Callable[..., Any]]:
    """torch.compile, of which nothing is left behind."""
    torch._dynamo.reset()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield torch.compile
    finally:
        torch._dynamo.reset()


def saving(subject: Subject, effort: Effort) -> Passed:
    """Saved as safetensors and loaded, it gives the same bits."""
    _refuse_hidden_parameters(subject.model)
    with tempfile.TemporaryDirectory() as folder:
        if is_pretrained_kind(subject.model):
            loaded, way = saved_and_loaded(subject.model, Path(folder)), "save_pretrained and from_pretrained"
        else:
            loaded, way = _restored(subject.model, Path(folder)), "its state dict"
        ids = subject.text(effort.length, seed=0)
        expected, actual = subject.logits(ids), replace(subject, model=loaded).logits(ids)
    if not torch.equal(actual, expected):
        lost = _differing(subject.model, loaded)
        names = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise Fault(
            f"after {way} logits differ by up to {float((actual.double() - expected.double()).abs().max()):.2g}"
            + (f"; not restored: {names}" if lost else ""),
            cause="a tensor that isn't in the state dict (a buffer with persistent=False, a plain attribute, a key "
            "that a hook or _keys_to_ignore_on_save drops), or is initialised again after loading"
            if lost
            else "something other than tensors: a setting that isn't in the configuration, a counter, a module "
            "swapped after construction",
        )
    return Passed(1, note=f"through {way}")


def _refuse_hidden_parameters(model: nn.Module) -> None:
    registered = {id(parameter) for parameter in model.parameters()}
    hidden = [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if not name.startswith("_") and any(id(each) not in registered for each in _parameters_in(value))
    ]
    if hidden:
        raise Fault(
            f"parameters in {', '.join(hidden)} are not in the state dict",
            cause="a plain list or dict holds them, where torch doesn't look: use nn.ParameterList or nn.ModuleList",
        )


def _parameters_in(value: object) -> list[nn.Parameter]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    found = [each for each in values if isinstance(each, nn.Parameter)]
    modules = [each for each in values if isinstance(each, nn.Module)]
    return found + [parameter for module in modules for parameter in module.parameters()]


def _restored(model: nn.Module, folder: Path) -> nn.Module:
    """A copy that has its saved tensors from a file, and had noise in them before."""
    try:
        copy = deepcopy(model)
    except Exception as error:
        raise NotApplicable(f"the model can't be copied to load the copy ({type(error).__name__}: {error})") from error
    source = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*copy.parameters(), *_saved_buffers(copy)]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=source, dtype=torch.float32))
            elif tensor.dtype != torch.bool:
                tensor.zero_()
    save_model(model, str(folder / "model.safetensors"))
    missing, unexpected = load_model(copy, str(folder / "model.safetensors"), strict=False)
    if missing or unexpected:
        raise Fault(
            f"its state dict lacks {', '.join(sorted(missing)) or 'nothing'} that loading asks for, and has "
            f"{', '.join(sorted(unexpected)) or 'nothing'} that loading doesn't know",
            cause="state_dict and load_state_dict (or hooks of theirs) don't agree on names",
        )
    return copy


def _differing(model: nn.Module, loaded: nn.Module) -> list[str]:
    others = dict([*loaded.named_parameters(), *loaded.named_buffers()])
    return [
        name
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if name not in others or not _same(tensor, others[name])
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
