"""From an address to the model under check, one that deepen knows or one that a user's own code makes.

| address | model |
|---|---|
| what `backbones/resolve.py` knows | a hub id, a folder, `pypi:NAME`, `tiny:NAME` |
| an adapter's folder | its base, and the method's model on it |
| `path/to/file.py:NAME`, `package.module:NAME` | what NAME is, or gives when called without arguments |

NAME is a function, a class or a module (`nn.Module`). Naming a file means running it, as `python FILE` would: its
folder comes first on Python's path. Random weights come out the same every time, for torch's generator is seeded.
"""

import ast
import contextlib
import difflib
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from deepen.backbones.resolve import KNOWN_ADDRESSES, placed
from deepen.check.place import place_of, said_by, shown_path
from deepen.check.subject import Subject, subject_of
from deepen.checkpoint import is_adapter, open_model
from deepen.core.errors import AddressError, ConfigError, DeepenError
from deepen.core.hints import did_you_mean

_SCHEMES = ("pypi", "tiny")
_NAME = r"[^\W\d]\w*"
_OBJECT = re.compile(rf"(?P<place>.+\.py|{_NAME}(\.{_NAME})*):(?P<name>{_NAME}(\.{_NAME})*)")
_SEED = 0


def open_subject(
    address: str,
    *,
    base: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> Subject:
    """The model at `address`, ready to be checked.

    `dtype`, `device`, `base` and `trust_remote_code` are those of `checkpoint.open_model`; a model that a user's code
    makes stays in the dtype and on the device it is made on where these are left out.

    Raises `AddressError` for an address that leads nowhere, `DeepenError` for code that fails or gives no model (the
    message names the place in that code), and what `open_model` raises.
    """
    found = _OBJECT.fullmatch(address)
    if found is not None and found["place"] not in _SCHEMES:
        _refuse_settings(address, base=base, trust_remote_code=trust_remote_code)
        return _subject_of_object(address, found["place"], found["name"], dtype, device)
    if address.endswith(".py") and Path(address).is_file():
        raise AddressError(f"{address} is a file: say what in it gives the model, {address}:NAME{_names_in(address)}")
    if is_adapter(address):
        opened = open_model(address, base=base, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return subject_of(opened.backbone.model, name=address, method=opened.model)
    if base is not None:
        raise ConfigError(f"{address} is a plain model, which has no use for base {base}: that is for adapter folders")
    loaded = open_model(address, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    return subject_of(loaded.backbone.model, name=address, method=loaded.model)


def _refuse_settings(address: str, *, base: str | None, trust_remote_code: bool) -> None:
    if base is not None:
        raise ConfigError(f"{address} is a model of yours, which has no use for base {base}: that is for adapters")
    if trust_remote_code:
        raise ConfigError(f"{address} is your own code, which runs in any case; leave trust_remote_code out")


def _subject_of_object(
    address: str, place: str, name: str, dtype: torch.dtype | str | None, device: torch.device | str | None
) -> Subject:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        module = _run_file(place) if place.endswith(".py") else _import(address, place)
        model = _model(address, _member(address, module, name))
    with _told(f"{address} gives a {type(model).__name__} that can't be checked", module.__file__):
        return subject_of(placed(model, dtype=dtype, device=device), name=address)


# The code


def _run_file(place: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise AddressError(f'there is no file "{place}"{_nearest(path)}')
    # A name that no module has: the file may be called like one that is there already.
    spec = spec_from_file_location(f"checked_by_deepen_{path.stem}", path)
    assert isinstance(spec, ModuleSpec)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses, pickle and torch.compile look for a class's module there
    _put_first_on_path(path.parent)
    with _told(f"{place} can't be run", str(path)):
        # Not the loader's way: compiled files are told apart by size and second only, and edits can come faster.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module


def _import(address: str, place: str) -> ModuleType:
    _put_first_on_path(Path.cwd())
    try:
        with _told(f"{place} can't be imported", None):
            return importlib.import_module(place)
    except DeepenError as failure:
        missing = failure.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{place}.".startswith(f"{missing.name}."):
            nearest = difflib.get_close_matches(address, KNOWN_ADDRESSES, n=1)
            hint = f'; did you mean "{nearest[0]}"?' if nearest else "; a file is named as path/to/file.py:NAME"
            raise AddressError(f'there is no module "{missing.name}" to find {address} in{hint}') from missing
        raise


def _put_first_on_path(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _nearest(path: Path) -> str:
    beside = [each.name for each in path.parent.glob("*.py")] if path.parent.is_dir() else []
    return "".join(f'; did you mean "{name}"?' for name in difflib.get_close_matches(path.name, beside, n=1))


def _names_in(file: str) -> str:
    """The functions and classes that a file defines, found without running it."""
    try:
        body = ast.parse(Path(file).read_bytes()).body
    except (SyntaxError, ValueError):
        return ""
    names = [each.name for each in body if isinstance(each, ast.FunctionDef | ast.ClassDef) and each.name[0] != "_"]
    return f" (it defines {', '.join(names)})" if names else ""


# What it gives


def _member(address: str, module: ModuleType, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            raise AddressError(f'{address}: there is no "{part}"{did_you_mean(part, _callables_of(value, module))}')
        value = getattr(value, part)
    return value


def _callables_of(value: Any, module: ModuleType) -> list[str]:
    """Names in `value` of what may give a model: of the module's own, what can be called."""
    return [
        key
        for key, each in vars(value).items()
        if callable(each) and not key.startswith("_") and getattr(each, "__module__", None) == module.__name__
    ]


def _model(address: str, value: Any) -> nn.Module:
    if not isinstance(value, nn.Module) and callable(value):
        value = _called(address, value)
    if not isinstance(value, nn.Module):
        raise DeepenError(
            f"{address} gives {_kind(value)}, not an nn.Module; name the model, or a function or class that gives it "
            "when called without arguments"
        )
    return value


def _called(address: str, function: Callable[[], Any]) -> Any:
    try:
        inspect.signature(function).bind()
    except TypeError as missing:
        raise DeepenError(
            f"{address} is called without arguments, which it can't be: {missing}. Write a function that gives the "
            "model, and name that: def build(): return ..."
        ) from missing
    except ValueError:  # some callables of C have no signature
        pass
    code = inspect.unwrap(function)
    with _told(f"{address} fails when called", _file_of(code)):
        return function()


def _file_of(code: Any) -> str | None:
    try:
        return inspect.getsourcefile(code)
    except TypeError:
        return None


def _kind(value: Any) -> str:
    if value is None:
        return "None"
    return f"a {type(value).__name__}" if not isinstance(value, tuple) else f"a tuple of {len(value)}"


@contextlib.contextmanager
def _told(what: str, file: str | None) -> Iterator[None]:
    """What the user's code raises in the block becomes a `DeepenError` that begins with `what` and names the place."""
    try:
        yield
    except DeepenError:
        raise
    except SyntaxError as error:
        place = f"{shown_path(error.filename)}, line {error.lineno}" if error.filename else "somewhere in it"
        raise DeepenError(f"{what}: {type(error).__name__}: {error.msg} ({place})") from error
    # A script may end itself when run; an interrupt is not the script's.
    except (Exception, SystemExit) as error:
        way_out = "; name it within its package instead: PACKAGE.MODULE:NAME" if _is_relative(error) else ""
        where = place_of(error, () if file is None else (file,))
        raise DeepenError(f"{what}: {said_by(error)} ({where}){way_out}") from error


def _is_relative(error: BaseException) -> bool:
    return isinstance(error, ImportError) and "relative import" in str(error)
