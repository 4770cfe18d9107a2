"""Tasks by address: `task:NAME`, and settings behind it, `task:pointer,hops=1-8,examples=20000`."""

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from deepen.core.errors import AddressError
from deepen.core.hints import did_you_mean
from deepen.data.records import Record, Split
from deepen.data.tasks.addition import Addition
from deepen.data.tasks.map import IteratedMap
from deepen.data.tasks.maze import Maze
from deepen.data.tasks.phop import PHop
from deepen.data.tasks.pointer import Pointer
from deepen.data.tasks.sudoku import Sudoku
from deepen.data.tasks.task import Example, Task

PREFIX = "task:"

TASKS: dict[str, type[Task]] = {task.name: task for task in (Pointer, PHop, IteratedMap, Addition, Sudoku, Maze)}

ADDRESSES = tuple(PREFIX + name for name in TASKS)


def task_named(name: str) -> type[Task]:
    """The task of this name. Raises `AddressError`."""
    if name not in TASKS:
        raise AddressError(f'unknown task "{name}"{did_you_mean(name, TASKS)} (as in {PREFIX}{next(iter(TASKS))})')
    return TASKS[name]


def read_task(address: str) -> Task:
    """The task that an address says, which begins with `task:`.

    A setting is a whole number, or for those with a range two of them, as in `hops=1-8`; one alone is a range of one.
    Raises `AddressError` for an unknown task or what is no setting, `ConfigError` for unknown settings and values that
    are not possible.
    """
    name, *settings = address.removeprefix(PREFIX).split(",")
    kind = task_named(name)
    ranges = {field.name for field in fields(kind) if isinstance(field.default, tuple)}
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not (key and equals and value):
            raise AddressError(f'{address}: "{setting}" sets nothing; write it as NAME=VALUE, as in examples=5000')
        if key in given:
            raise AddressError(f"{address}: {key} is given more than once; keep one")
        given[key] = _range(key, value, address) if key in ranges else _value(value)
    return kind.from_dict(given, source=address)


def _range(key: str, text: str, address: str) -> list[int]:
    numbers = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", text)
    if numbers is None:
        raise AddressError(f"{address}: {key} is a range of whole numbers, as 1-8, or one of them, not {text}")
    low, high = numbers.groups()
    return [int(low), int(low if high is None else high)]


def _value(text: str) -> Any:
    """A whole number where it is one; any other text is for the configuration to take or to refuse."""
    return int(text) if re.fullmatch(r"\d{1,18}", text) else text


def examples(address: str, split: Split) -> Iterator[Example]:
    """The examples of one split in their order, one by one. Raises as `read_task` does, at once."""
    return _examples_of(read_task(address), split)


def task_records(address: str, split: Split) -> Iterator[Record]:
    """The same as records of token ids (formats.py), each with `task` and `difficulty` beside them."""
    task = read_task(address)
    words = task.vocabulary()
    ids, digest = words.get_vocab(), words.digest

    def ids_of(told: tuple[str, ...]) -> list[int]:
        return [ids[word] for word in told]

    return (
        Record(
            {
                "prompt_ids": ids_of(example.prompt),
                "response_ids": ids_of(example.answer),
                **({"further_ids": [list(map(ids_of, pair)) for pair in example.further]} if example.further else {}),
                "tokenizer": digest,
                "task": task.name,
                "difficulty": example.difficulty,
            },
            f"{address}, {split} example {number}",
            split=split,
        )
        for number, example in enumerate(_examples_of(task, split), start=1)
    )


def _examples_of(task: Task, split: Split) -> Iterator[Example]:
    return (task.example(split, index) for index in range(task.num_examples(split)))
