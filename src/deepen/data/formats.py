"""What a record is to a language model: a text to learn, or something asked of which the answers are learned.

| format | fields | becomes |
|---|---|---|
| text | `text` | a text |
| instruction | `instruction`, `output`, maybe `input` | user: instruction, empty line, input; assistant: output |
| messages | `messages`: a list of `role` and `content` | these |
| question | `question`, `answer` | user, assistant |
| prompt | `prompt`, `response` | user, assistant |
| asked | `prompt`, and no field of another format | user: a prompt without an answer, for a model to give one |
| tokens | `prompt_ids`, `response_ids`, `tokenizer` (the digest of theirs), maybe `further_ids` | these ids |

A record has the fields of exactly one format; others beside them (an id, a source) are no matter, but for
`difficulty` beside what is asked and answered: a whole number from 1 on says how hard that is. A record that fits
none, or two, is an error that shows its fields: nothing is guessed. `prompt` beside all fields of another format is one
of the others that are no matter, and beside some of them (an `answer`, say) it fits none.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from deepen.core.errors import DeepenError
from deepen.data.records import Record, require_text

ROLES = ("system", "user", "assistant")

_ID_LIMIT = 2**31  # ids are kept as int32


@dataclass(frozen=True)
class Text:
    """A text, all of which is learned."""

    text: str


@dataclass(frozen=True)
class Message:
    """One turn."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns, of which those of the assistant are learned; the last one is the assistant's."""

    messages: tuple[Message, ...]
    place: str = ""
    difficulty: int | None = None


@dataclass(frozen=True)
class Tokens:
    """What was asked and what was answered, as ids of the tokenizer with this digest; the answer's are learned.

    `further` is what was asked and answered behind that.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    tokenizer: str
    place: str = ""
    difficulty: int | None = None
    further: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Prompt:
    """What is asked, with nothing to learn from: the last turn is the user's."""

    messages: tuple[Message, ...]
    place: str = ""


Document = Text | Conversation | Prompt | Tokens


def difficulty_of(document: Document) -> int | None:
    """How hard it is to answer, where that is told."""
    return document.difficulty if isinstance(document, Conversation | Tokens) else None


def document_of(record: Record) -> Document:
    """The record in whichever format it has. Raises `DeepenError` naming its place and its fields."""
    fitting = [name for name, (required, _) in _FORMATS.items() if required <= record.fields.keys()]
    if not fitting and _is_only_asked(record):
        return _asked(record)
    if len(fitting) != 1:
        fields = ", ".join(record.fields) or "none"
        known = "; ".join("/".join(sorted(required)) for required, _ in _FORMATS.values())
        problem = "fits no known format" if not fitting else f"fits several formats ({', '.join(fitting)})"
        raise DeepenError(
            f"{record.place}: a record with the fields {fields} {problem}; known are {known}; or prompt alone"
        )
    _, read = _FORMATS[fitting[0]]
    document = read(record)
    if isinstance(document, Conversation | Tokens):
        return replace(document, difficulty=_difficulty(record))
    return document


def _difficulty(record: Record) -> int | None:
    """None where it is told in other ways, as in words: such fields are many datasets' own."""
    given = record.fields.get("difficulty")
    return given if type(given) is int and 1 <= given < _ID_LIMIT else None


def _text(record: Record) -> Document:
    return Text(record.text("text"))


def _instruction(record: Record) -> Document:
    instruction = _spoken(record, "instruction")
    # Many datasets have the field everywhere and nothing in it.
    extra = record.text("input") if record.fields.get("input") is not None else ""
    return _pair(f"{instruction}\n\n{extra}" if extra.strip() else instruction, _spoken(record, "output"), record)


def _question(record: Record) -> Document:
    return _pair(_spoken(record, "question"), _spoken(record, "answer"), record)


def _prompt(record: Record) -> Document:
    return _pair(_spoken(record, "prompt"), _spoken(record, "response"), record)


def _is_only_asked(record: Record) -> bool:
    others = frozenset[str]().union(*(required for required, _ in _FORMATS.values())) - {"prompt"}
    return "prompt" in record.fields and others.isdisjoint(record.fields)


def _asked(record: Record) -> Document:
    return Prompt((Message("user", _spoken(record, "prompt")),), record.place)


def _tokens(record: Record) -> Document:
    return Tokens(
        _token_ids(record, "prompt_ids", record.fields["prompt_ids"]),
        _token_ids(record, "response_ids", record.fields["response_ids"]),
        record.text("tokenizer"),
        record.place,
        further=_further_ids(record),
    )


def _further_ids(record: Record) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    name, given = "further_ids", record.fields.get("further_ids", [])
    if not isinstance(given, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in given):
        raise DeepenError(f'{record.place}: "{name}" must be a list of pairs, each of what is asked and answered')
    return tuple((_token_ids(record, name, asked), _token_ids(record, name, answered)) for asked, answered in given)


def _token_ids(record: Record, name: str, given: Any) -> tuple[int, ...]:
    if not isinstance(given, list) or not given:
        raise DeepenError(f'{record.place}: "{name}" must be a list of at least one token id')
    for token in given:
        if type(token) is not int or not 0 <= token < _ID_LIMIT:  # Python's bool is an int, a token is not
            raise DeepenError(f'{record.place}: "{name}" holds {token!r}, which is no token id')
    return tuple(given)


def _pair(asked: str, answered: str, record: Record) -> Conversation:
    return Conversation((Message("user", asked), Message("assistant", answered)), record.place)


def _spoken(record: Record, name: str) -> str:
    text = record.text(name)
    if not text.strip():
        raise DeepenError(f'{record.place}: "{name}" is empty')
    return text


def _messages(record: Record) -> Document:
    given = record.fields["messages"]
    if not isinstance(given, list) or not given:
        raise DeepenError(f'{record.place}: "messages" must be a list of at least one message')
    messages = tuple(_message(each, f"{record.place}, message {number}") for number, each in enumerate(given, start=1))
    if messages[-1].role != "assistant":
        raise DeepenError(
            f"{record.place}: the last message is the {messages[-1].role}'s, so there is no answer to learn"
        )
    if any(message.role == "system" for message in messages[1:]):
        raise DeepenError(f"{record.place}: a system message may only come first")
    spoken = [message.role for message in messages if message.role != "system"]
    if spoken != ["user", "assistant"] * (len(spoken) // 2):
        raise DeepenError(f"{record.place}: user and assistant must take turns, not {', '.join(spoken)}")
    return Conversation(messages, record.place)


def _message(given: Any, place: str) -> Message:
    if not isinstance(given, dict) or not {"role", "content"} <= given.keys():
        found = f"the fields {', '.join(map(str, given))}" if isinstance(given, dict) else type(given).__name__
        raise DeepenError(f'{place}: expected an object with "role" and "content", found {found}')
    if given["role"] not in ROLES:
        raise DeepenError(f"{place}: role is {given['role']!r}, not one of {', '.join(ROLES)}")
    if not isinstance(given["content"], str) or not given["content"].strip():
        raise DeepenError(f'{place}: "content" must be a text that is not empty')
    return Message(given["role"], require_text(given["content"], place, "content"))


_FORMATS: dict[str, tuple[frozenset[str], Callable[[Record], Document]]] = {
    "text": (frozenset({"text"}), _text),
    "instruction": (frozenset({"instruction", "output"}), _instruction),
    "messages": (frozenset({"messages"}), _messages),
    "question": (frozenset({"question", "answer"}), _question),
    "prompt": (frozenset({"prompt", "response"}), _prompt),
    "tokens": (frozenset({"prompt_ids", "response_ids"}), _tokens),
}
