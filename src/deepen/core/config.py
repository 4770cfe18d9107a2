"""Configuration: frozen dataclasses that are read strictly, say all that is wrong at once, and save as JSON."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Self, Union, get_args, get_origin, get_type_hints

from deepen.core.errors import ConfigError
from deepen.core.files import read_json, write_json
from deepen.core.hints import did_you_mean


@dataclass(frozen=True)
class Config:
    """Base of every configuration; a subclass is a frozen dataclass that overrides `validate`.

    A field is annotated with bool, int, float (finite), str, None, a Literal, `tuple[X, ...]`, `tuple[X, Y]`,
    `dict[str, X]`, another Config, Any (plain JSON), or a union of these. `from_dict` and `from_file` give only
    configurations that have passed `check`; one made in code may hold anything until it is checked.
    """

    def __post_init__(self) -> None:
        # Lists become tuples and ints floats where declared, so that equal settings are equal values. What doesn't
        # fit its field stays as it is, for `check` to tell.
        for name, hint in _hints(type(self)).items():
            problems: list[_Problem] = []
            value = _read(hint, getattr(self, name), name, problems)
            if not problems:
                object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, source: str = "") -> Self:
        """The configuration that `data`, as read from JSON, describes; fields it leaves out have their defaults.

        Raises `ConfigError` with every unknown key, missing key, wrong type and impossible value; the message
        begins with `source` (default: the class's name).
        """
        return cls._from_json(data, source or cls.__name__)

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The configuration in a JSON file; raises `ConfigError`, naming the file, as `from_dict` does."""
        return cls._from_json(read_json(path, error=ConfigError), str(path))

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain JSON types; `from_dict` gives the same configuration back."""
        return {name: _plain(getattr(self, name)) for name in _hints(type(self))}

    def save(self, path: str | Path) -> None:
        """Write the configuration to a JSON file, atomically. Raises `ConfigError` if it could not be read back."""
        self.check()
        write_json(path, self.to_dict())

    def validate(self) -> list[str]:
        """What is wrong with the values, one message each; called only when each value has its field's type."""
        return []

    def check(self) -> None:
        """Raise `ConfigError` with every ill-typed field and every message of `validate`, inner ones included."""
        _complain(type(self).__name__, _faults(self))

    @classmethod
    def _from_json(cls, data: Any, source: str) -> Self:
        problems: list[_Problem] = []
        config = _read_config(cls, data, "", problems)
        _complain(source, [problem.text for problem in problems] or _faults(config))
        checked: Self = config
        return checked


class _Problem(NamedTuple):
    path: str
    text: str


_Problems = list[_Problem]


def _complain(source: str, messages: list[str]) -> None:
    if len(messages) == 1:
        raise ConfigError(f"{source}: {messages[0]}")
    if messages:
        raise ConfigError("\n  - ".join([f"{source} has {len(messages)} problems:", *messages]))


def _hints(kind: type[Config]) -> dict[str, Any]:
    """Each field's annotation, in order, with strings and `Annotated` resolved."""
    resolved = get_type_hints(kind)
    return {field.name: resolved[field.name] for field in fields(kind)}


def _faults(config: Config, path: str = "") -> list[str]:
    """What is wrong with a configuration and those inside it; values are judged where all types are right."""
    problems: _Problems = []
    for name, hint in _hints(type(config)).items():
        _read(hint, getattr(config, name), _join(path, name), problems)
    messages = [problem.text for problem in problems]
    if not messages:
        messages = [f"{path}: {message}" if path else message for message in config.validate()]
    for name in _hints(type(config)):
        for inner_path, inner in _inner_configs(getattr(config, name), _join(path, name)):
            messages += _faults(inner, inner_path)
    return messages


def _inner_configs(value: Any, path: str) -> Iterator[tuple[str, Config]]:
    if isinstance(value, Config):
        yield path, value
    elif isinstance(value, tuple | list):
        for index, entry in enumerate(value):
            yield from _inner_configs(entry, f"{path}[{index}]")
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _inner_configs(entry, _join(path, key))


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, tuple | list):
        return [_plain(entry) for entry in value]
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return value


# Reading. Each `_read...` gives `value` as its annotation `hint` wants it; where it doesn't fit, it adds to `problems`
# and what it gives is of no use.


def _read(hint: Any, value: Any, path: str, problems: _Problems) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin in (Union, UnionType):
        return _read_union(hint, value, path, problems)
    if origin is Literal:
        # 1 == True == 1.0, but only one of them is the choice.
        fits = any(type(value) is type(choice) and value == choice for choice in get_args(hint))
        return value if fits else _mismatch(hint, value, path, problems)
    if origin is tuple:
        return _read_tuple(hint, value, path, problems)
    if origin is dict:
        return _read_dict(hint, value, path, problems)
    if isinstance(hint, type) and issubclass(hint, Config):
        return _read_config(hint, value, path, problems)
    if hint in _SCALARS:
        return _read_scalar(hint, value, path, problems)
    raise TypeError(f"{path}: a configuration's field can't be annotated with {hint}")


def _read_scalar(hint: type, value: Any, path: str, problems: _Problems) -> Any:
    if isinstance(value, bool) and hint is not bool:  # Python's bool is an int, a user's is not
        return _mismatch(hint, value, path, problems)
    if hint is float and isinstance(value, int | float):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        return number if math.isfinite(number) else _mismatch(hint, value, path, problems)
    return value if isinstance(value, hint) else _mismatch(hint, value, path, problems)


def _read_union(hint: Any, value: Any, path: str, problems: _Problems) -> Any:
    """The first alternative that fits; if none does, the problems inside the one whose shape fits."""
    for alternative in get_args(hint):
        found: _Problems = []
        result = _read(alternative, value, path, found)
        if not found:
            return result
        if all(problem.path != path for problem in found):
            problems += found
            return None
    return _mismatch(hint, value, path, problems)


def _read_tuple(hint: Any, value: Any, path: str, problems: _Problems) -> Any:
    entry_hints = get_args(hint)
    if not isinstance(value, list | tuple):
        return _mismatch(hint, value, path, problems)
    if len(entry_hints) == 2 and entry_hints[1] is Ellipsis:
        entry_hints = entry_hints[:1] * len(value)
    if len(entry_hints) != len(value):
        return _mismatch(hint, value, path, problems)
    entries = zip(entry_hints, value, strict=True)
    return tuple(_read(each, entry, f"{path}[{index}]", problems) for index, (each, entry) in enumerate(entries))


def _read_dict(hint: Any, value: Any, path: str, problems: _Problems) -> Any:
    _, entry_hint = get_args(hint)
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return _mismatch(hint, value, path, problems)
    return {key: _read(entry_hint, entry, _join(path, key), problems) for key, entry in value.items()}


def _read_config(kind: type[Config], value: Any, path: str, problems: _Problems) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        return _mismatch(kind, value, path, problems)
    hints, found = _hints(kind), []
    for key in value:
        if key not in hints:
            where = _join(path, str(key))
            found.append(_Problem(where, f'unknown key "{where}"{did_you_mean(str(key), hints)}'))
    for field in fields(kind):
        if field.name not in value and field.default is MISSING and field.default_factory is MISSING:
            where = _join(path, field.name)
            found.append(_Problem(where, f"{where} is missing and has no default"))
    given = {name: _read(hints[name], value[name], _join(path, name), found) for name in hints if name in value}
    problems += found
    return None if found else kind(**given)


def _mismatch(hint: Any, value: Any, path: str, problems: _Problems) -> None:
    subject = path or "a configuration"
    problems.append(_Problem(path, f"{subject} must be {_described(hint)}, not {_shown(value)}"))


_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "a string", NoneType: "null"}


def _described(hint: Any) -> str:
    """What an annotation wants, in a user's words: "an integer or null"; "linear, cosine, or none"."""
    *others, last = _alternatives(hint)
    if len(others) > 1:
        return ", ".join([*others, f"or {last}"])
    return " or ".join([*others, last])


def _alternatives(hint: Any) -> list[str]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return [words for argument in arguments for words in _alternatives(argument)]
    if origin is Literal:
        return [str(choice) for choice in arguments] if len(arguments) > 1 else [_shown(arguments[0])]
    if origin is tuple:
        entries = ("..." if argument is Ellipsis else _described(argument) for argument in arguments)
        return [f"a list [{', '.join(entries)}]"]
    if origin is dict:
        return [f"an object with {_described(arguments[1])} for each key"]
    if isinstance(hint, type) and issubclass(hint, Config):
        return ["an object"]
    return [_SCALARS.get(hint, "anything")]


def _shown(value: Any) -> str:
    """A value as its JSON file shows it, cut to a line."""
    try:
        text = json.dumps(_plain(value), ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
