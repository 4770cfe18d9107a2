"""deepen generate --file: many prompts at once, their answers a line each.

The answers' file is a prefix of all answers at any time: a line is written once those before it are there.
"""

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from deepen.cli.generate import Options, opened_for, overrides_of, refuse_idle, sampling_of, stop_of, with_eos
from deepen.cli.generate_line import Asked, read_lines
from deepen.cli.output import progress
from deepen.core.config import Config
from deepen.core.errors import ConfigError, DeepenError, PromptError
from deepen.core.line_file import LineFile

if TYPE_CHECKING:
    from deepen.checkpoint import Opened
    from deepen.engine.engine import Engine
    from deepen.engine.request import Request
    from deepen.generate.events import RowResult
    from deepen.generate.sampling import SamplingConfig
    from deepen.generate.stop import StopConfig

FORMAT = 1

_KINDS = {
    **dict.fromkeys(("num_prompts", "prompts"), "other prompts"),
    **dict.fromkeys(("model", "fingerprint", "tokenizer", "method", "method_weights"), "another model"),
}
"""What it is to differ in a field of what made a file."""

_FAILED = 1


@dataclass(frozen=True)
class Capacity(Config):
    """What the engine may hold: requests at once, memory for keys and values, tokens of a request."""

    slots: int = 8
    memory_gb: float | None = None
    max_length: int | None = None

    def validate(self) -> list[str]:
        """One message for each value that can't be."""
        problems = [
            f"{name} must be 1 or more, not {value}"
            for name, value in (("slots", self.slots), ("max_length", self.max_length))
            if value is not None and value < 1
        ]
        if self.memory_gb is not None and self.memory_gb <= 0:
            problems.append(f"memory_gb must be above 0, not {self.memory_gb}")
        return problems

    @property
    def memory_bytes(self) -> int | None:
        """None for enough."""
        return None if self.memory_gb is None else math.floor(self.memory_gb * 1e9)


@dataclass(frozen=True)
class _Prompts:
    """All lines of the file, how each is to be answered, and what a model makes of them."""

    lines: Sequence[Asked]
    samplings: Sequence["SamplingConfig"]
    stops: Sequence["StopConfig"]

    def request(self, index: int, opened: "Opened", *, chat: bool) -> "Request":
        """What the engine is asked; raises `PromptError` for messages that the chat template refuses."""
        from deepen.engine.request import Request

        ids = self.lines[index].ids(opened.tokenizer, chat=chat)
        return Request(ids, self.samplings[index], with_eos(self.stops[index], opened))

    @property
    def digest(self) -> str:
        """Of what the lines say, not of how they are written."""
        said = [asked.line.to_dict() for asked in self.lines]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def answer_file(options: Options, path: str) -> int:
    """Answer what is in the file `path` and not yet in `options.out`; 1 if an answer in there is an error."""
    out = _require_flags(options, path)
    capacity = _capacity(options)
    lines, overrides = list(read_lines(Path(path).expanduser())), overrides_of(options)
    prompts = _prompts(options, lines)
    opened = opened_for(options, overrides)
    chat = options.chat and opened.tokenizer.chat_template is not None
    for asked in lines:
        asked.require_fit(opened.tokenizer, vocab_size=opened.backbone.vocab_size, chat=chat)
    engine = _engine(opened, capacity)
    file = LineFile(out)
    file.claim(_made_by(options, opened, prompts, capacity, chat=chat), kinds=_KINDS)
    answers = _Answers(file, lines)
    left = range(answers.num_kept, len(lines))
    requests = ((index, partial(prompts.request, index, opened, chat=chat)) for index in left)
    began = perf_counter()
    with progress("prompts answered", total=len(lines)) as advance:
        advance(answers.num_kept)
        for index, result in _results(engine, requests, num_ahead=capacity.slots):
            answers.add(index, result)
            advance(1)
    for line in answers.summary(seconds=perf_counter() - began):
        print(line, file=sys.stderr)
    return _FAILED if answers.num_failed else 0


# What is asked


def _require_flags(options: Options, path: str) -> str:
    """Where the answers go; raises `ConfigError` for flags that don't go together."""
    for flag, value in (("prompt", options.prompt), ("prompt-file", options.prompt_file)):
        if value is not None:
            raise ConfigError(f'--{flag} "{value}" is one prompt, and --file {path} has its own; leave one of them out')
    if options.json is not None:
        raise ConfigError(f"--json {options.json} is for one prompt; with --file answers and tokens go to --out")
    if options.stats:
        raise ConfigError("--stats is for one prompt; with --file the figures are told anyway, so leave it out")
    if options.out is None:
        raise ConfigError(f"--file {path} needs a place for the answers: give --out FILE.jsonl")
    if Path(options.out).suffix != ".jsonl":
        raise ConfigError(f"--out {options.out} must be a file whose name ends in .jsonl")
    return options.out


def _capacity(options: Options) -> Capacity:
    given = {"slots": options.slots, "memory_gb": options.memory_gb, "max_length": options.max_length}
    return Capacity.from_dict({name: value for name, value in given.items() if value is not None}, source="capacity")


def _prompts(options: Options, lines: Sequence[Asked]) -> _Prompts:
    sampling, stop = sampling_of(options), stop_of(options)
    prompts = _Prompts(lines, [asked.sampling(sampling) for asked in lines], [asked.stop(stop) for asked in lines])
    if all(each.greedy for each in prompts.samplings):
        refuse_idle(sampling)
    return prompts


def _engine(opened: "Opened", capacity: Capacity) -> "Engine":
    from deepen.engine.engine import Engine

    return Engine(
        opened.decoder,
        backbone=opened.backbone,
        slots=capacity.slots,
        max_length=capacity.max_length,
        memory_bytes=capacity.memory_bytes,
        tokenizer=opened.tokenizer,
    )


def _made_by(
    options: Options, opened: "Opened", prompts: _Prompts, capacity: Capacity, *, chat: bool
) -> dict[str, Any]:
    """All that decides an answer, as plain JSON types; how many are answered at once doesn't."""
    import deepen
    from deepen.backbones.identity import fingerprint_of

    model = opened.model
    made_by = {
        "format": FORMAT,
        "deepen_version": deepen.__version__,
        "model": options.model,
        "fingerprint": opened.identity.fingerprint,
        "tokenizer": opened.identity.tokenizer,
        "method": opened.method.name if opened.method else None,
        "method_weights": fingerprint_of(model.saved_state()) if model else None,
        "num_prompts": len(prompts.lines),
        "prompts": prompts.digest,
        "chat": chat,
        **sampling_of(options).to_dict(),
        **with_eos(stop_of(options), opened).to_dict(),
        "recursions": options.recursions,
        "memory_gb": capacity.memory_gb,
        "max_length": capacity.max_length,
        "dtype": str(opened.backbone.dtype).removeprefix("torch."),
        "device": str(opened.backbone.device),
        # Last, as flags that set it differently are told first.
        "method_config": model.config.to_dict() if model else None,
    }
    as_read: dict[str, Any] = json.loads(json.dumps(made_by))
    return as_read


# What is answered


def _results(
    engine: "Engine", requests: Iterator[tuple[int, Callable[[], "Request"]]], *, num_ahead: int
) -> Iterator[tuple[int, "RowResult"]]:
    """Of each, by its index, as they end; one is made when fewer than `num_ahead` wait for their turn."""
    from deepen.generate.events import Finished, RowResult

    answered: dict[int, tuple[int, RowResult]] = {}
    while True:
        while engine.num_waiting < num_ahead and (coming := next(requests, None)) is not None:
            index, make = coming
            try:
                answered[engine.submit(make())] = index, RowResult()
            except PromptError as error:
                yield index, RowResult(reason="failed", error=error)
        if not engine.is_busy:
            return
        for event in engine.step():
            index, result = answered[event.row]
            result.add(event)
            if isinstance(event, Finished):
                del answered[event.row]
                yield index, result


class _Answers:
    """The file of answers, in which those of the first prompts are. `num_kept` were there at the beginning."""

    def __init__(self, file: LineFile, lines: Sequence[Asked]) -> None:
        """Cuts off a last line that isn't whole. Raises `DeepenError` for lines that are no answers to these."""
        self._file, self._lines = file, lines
        self._ready: dict[int, Mapping[str, Any]] = {}
        self._errors: list[str] = []
        self._num_tokens, num_bytes, self.num_kept = 0, 0, 0
        for size, record in file.whole_lines(self._answers_its_line):
            self._note_error(self.num_kept, record)
            num_bytes += size
            self.num_kept += 1
        file.cut(num_bytes)
        self._num_written = self.num_kept

    def add(self, index: int, result: "RowResult") -> None:
        """Write it as soon as those before it are there."""
        self._num_tokens += len(result.tokens)
        self._ready[index] = _record(self._lines[index], result)
        written = []
        while (record := self._ready.pop(self._num_written, None)) is not None:
            self._note_error(self._num_written, record)
            self._num_written += 1
            written.append(record)
        if written:
            # What the system holds outlives us; to wait for the disk each time would take longer than to answer.
            self._file.append(written, flush=self._num_written == len(self._lines))

    @property
    def num_failed(self) -> int:
        """Answers in the file that are errors."""
        return len(self._errors)

    def summary(self, *, seconds: float) -> list[str]:
        """Lines for whoever has waited so long."""
        before = f", {self.num_kept} of them answered before" if self.num_kept else ""
        lines = [
            f"requests: {len(self._lines)}{before}",
            f"new: {self._num_tokens} tokens in {seconds:.2f} s, {self._num_tokens / seconds:.1f} tokens/s",
            f"failures: {self.num_failed}",
        ]
        return [*lines, f"  the first: {self._errors[0]}"] if self._errors else lines

    def _answers_its_line(self, index: int, record: Mapping[str, Any]) -> bool:
        return index < len(self._lines) and "id" in record and record["id"] == self._lines[index].line.id

    def _note_error(self, index: int, record: Mapping[str, Any]) -> None:
        if "error" in record:
            self._errors.append(f"{self._lines[index].place}: {record['error']}")


def _record(asked: Asked, result: "RowResult") -> dict[str, Any]:
    record = {
        "id": asked.line.id,
        "text": result.text,
        "tokens": result.tokens,
        "reason": result.reason,
        "passes": result.passes,
    }
    return record if result.error is None else {**record, "error": _told(result.error)}


def _told(error: Exception) -> str:
    """Ours say what to do; of others the name is part of what they say."""
    return str(error) if isinstance(error, DeepenError) else f"{type(error).__name__}: {error}"
