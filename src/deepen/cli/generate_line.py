"""A line of `deepen generate --file`: what is asked, and what stands over the flags' settings. Free of torch."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deepen.cli.generate import refuse_idle
from deepen.cli.prompt import encode, encode_messages
from deepen.core.config import Config
from deepen.core.errors import ConfigError, PromptError
from deepen.data.records import read_records, require_text

if TYPE_CHECKING:
    from deepen.generate.sampling import SamplingConfig
    from deepen.generate.stop import StopConfig

_ASKED = ("prompt", "messages", "prompt_tokens")


@dataclass(frozen=True)
class Message(Config):
    """A turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Line(Config):
    """One of the first three fields asks; those that are null leave the flag's setting as it is."""

    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    prompt_tokens: tuple[int, ...] | None = None
    id: str | int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | tuple[str, ...] | None = None

    def validate(self) -> list[str]:
        """One message for what is asked in no way or in several, or is empty; settings are judged with the flags'."""
        given = [name for name in _ASKED if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"{' and '.join(given)} are given" if given else "none is given"
            return [f"one of {', '.join(_ASKED)} must ask, and {found}; keep one"]
        if not getattr(self, given[0]):
            return [f"{given[0]} is empty; give at least one {_piece(given[0])}, or take the line out"]
        if self.messages is not None and self.messages[-1].role == "assistant":
            return ["messages end with the assistant's, so that nothing is asked; end with the user's"]
        return []


def _piece(name: str) -> str:
    return {"prompt": "character", "messages": "message", "prompt_tokens": "id"}[name]


@dataclass(frozen=True)
class Asked:
    """A line and where it stands: `index` counts lines from 0, blank ones aside, and `place` is for errors."""

    line: Line
    index: int
    place: str

    def sampling(self, shared: "SamplingConfig") -> "SamplingConfig":
        """How its tokens are chosen, if flags say `shared`; raises `ConfigError` for what can't be."""
        from deepen.generate.random import SEED_LIMIT

        own = self._own([field.name for field in fields(shared)])
        seed = (shared.seed + self.index) % SEED_LIMIT
        sampling = type(shared).from_dict({**shared.to_dict(), "seed": seed, **own}, source=self.place)
        refuse_idle(type(shared)(**{**own, "temperature": sampling.temperature}), source=f"{self.place}: ")
        return sampling

    def stop(self, shared: "StopConfig") -> "StopConfig":
        """When it ends, if flags say `shared`; raises `ConfigError` for what can't be."""
        own = self._own(["max_new_tokens"])
        stop = self.line.stop
        if stop is not None:
            own["stop_strings"] = (stop,) if isinstance(stop, str) else stop
        if "" in own.get("stop_strings", ()):
            raise ConfigError(f'{self.place}: stop must hold at least one character, not ""; leave it out, or give []')
        return type(shared).from_dict({**shared.to_dict(), **own}, source=self.place)

    def _own(self, names: list[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self.line, name)) is not None}

    def ids(self, tokenizer: Any, *, chat: bool) -> tuple[int, ...]:
        """What is asked, encoded; raises `PromptError` where a chat template refuses it."""
        if self.line.prompt_tokens is not None:
            return self.line.prompt_tokens
        if self.line.messages is not None:
            messages = [message.to_dict() for message in self.line.messages]
            return tuple(encode_messages(tokenizer, messages, way_out="put the messages otherwise"))
        assert self.line.prompt is not None, "a line that was checked asks"
        return tuple(encode(tokenizer, self.line.prompt, chat=chat))

    def require_fit(self, tokenizer: Any, *, vocab_size: int, chat: bool) -> None:
        """Raises `PromptError` for a line of another kind of model: one that chats, or one of another vocabulary."""
        if self.line.messages is not None and not chat:
            without = "--no-chat does without" if tokenizer.chat_template else "this model has none"
            raise PromptError(f"{self.place}: messages need a chat template, and {without}; give a prompt")
        outside = [token for token in self.line.prompt_tokens or () if not 0 <= token < vocab_size]
        if outside:
            raise PromptError(
                f"{self.place}: prompt_tokens holds id {outside[0]}, outside this model's vocabulary of {vocab_size}; "
                "encode it with the model's own tokenizer"
            )


def read_lines(path: Path) -> Iterator[Asked]:
    """The lines of a file, each checked; raises `DeepenError` naming file, line, field and value."""
    if path.suffix != ".jsonl":
        raise PromptError(f"--file {path} must be a file of JSON lines whose name ends in .jsonl; rename it")
    for index, record in enumerate(read_records(path)):
        line = Line.from_dict(record.fields, source=record.place)
        for name, text in _texts(line):
            require_text(text, record.place, name)
        yield Asked(line, index, record.place)


def _texts(line: Line) -> Iterator[tuple[str, str]]:
    """All that a tokenizer is to take, and the field that has it."""
    if line.prompt is not None:
        yield "prompt", line.prompt
    for place, message in enumerate(line.messages or ()):
        yield f"messages[{place}].content", message.content
    for text in (line.stop,) if isinstance(line.stop, str) else line.stop or ():
        yield "stop", text
