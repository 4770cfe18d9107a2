"""Documents as token ids, and which of these are learned."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

from deepen.core.errors import DeepenError
from deepen.data.batches import token_ids
from deepen.data.formats import Conversation, Document, Message, Prompt, Text, Tokens
from deepen.data.vocabulary import Vocabulary, tokenizer_fingerprint


class ChatEncoder(Vocabulary, Protocol):
    """What is needed of a tokenizer; transformers' have it."""

    eos_token_id: Any
    chat_template: Any
    all_special_tokens: Any

    def encode(self, text: str, **options: Any) -> Any:
        """The ids of a text."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The text of a conversation."""

    def __hash__(self) -> int:
        """Of the object, not of what it holds."""


@dataclass(frozen=True)
class Encoded:
    """A document's ids in parts, given and learned ones in turn. The first part is given, and empty for a text."""

    parts: tuple[tuple[int, ...], ...]

    @property
    def ids(self) -> list[int]:
        """All of them."""
        return [token for part in self.parts for token in part]

    @property
    def learned(self) -> list[bool]:
        """Of each id, whether it is predicted, or only read."""
        return [bool(index % 2) for index, part in enumerate(self.parts) for _ in part]


def encode(document: Document, tokenizer: ChatEncoder) -> Encoded:
    """A text with the end of sequence behind it; a conversation in the words of the tokenizer's chat template; or ids.

    Of a conversation, what the template makes of the assistant's turns is learned, with the mark that ends a turn.
    Ids stay what they are, and those of the response are learned. Raises `DeepenError`, naming the document's place,
    where a template is missing or can't be followed turn by turn, a message holds a special token written out, which
    would become that token, ids are another tokenizer's, or a prompt has no answer.
    """
    if isinstance(document, Prompt):
        raise DeepenError(
            f'{document.place}: a prompt without a "response" has nothing to learn; '
            "`deepen distill MODEL --data PROMPTS --out FILE.jsonl` lets a model answer prompts, to train on that"
        )
    if isinstance(document, Text):
        return Encoded(((), tuple(with_end(token_ids(document.text, tokenizer), tokenizer))))
    if isinstance(document, Tokens):
        _require_own(document, tokenizer)
        further = [part for pair in document.further for part in pair]
        return Encoded((document.prompt, document.response, *further))
    _require_plain(document, tokenizer)
    return Encoded(tuple(tuple(_ids(part, tokenizer)) for part in _turns(document, tokenizer)))


def encode_asked(document: Conversation | Prompt | Tokens, tokenizer: ChatEncoder) -> tuple[int, ...]:
    """The ids of what is asked first, as far as where the answer begins; raises what `encode` does, but of prompts."""
    if not isinstance(document, Prompt):
        return encode(document, tokenizer).parts[0]
    _require_plain(document, tokenizer)
    return tuple(_ids(_rendered(document.messages, tokenizer, document.place, add_generation_prompt=True), tokenizer))


def with_end(ids: list[int], tokenizer: Any) -> list[int]:
    """`ids` with the end of sequence behind them, if there is such an id and it isn't there."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _turns(conversation: Conversation, tokenizer: ChatEncoder) -> list[str]:
    """The conversation's text, cut before and behind each of the assistant's turns."""
    messages = conversation.messages
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    parts, done = [], ""
    for index in answers:
        asked = _rendered(messages[:index], tokenizer, conversation.place, add_generation_prompt=True)
        answered = _rendered(messages[: index + 1], tokenizer, conversation.place)
        if not asked.startswith(done) or not answered.startswith(asked):
            raise DeepenError(
                f"{conversation.place}: this tokenizer's chat template writes earlier turns otherwise once later ones "
                "follow, so that no place can be told where an answer begins; give conversations of one turn"
            )
        parts += [asked[len(done) :], answered[len(asked) :]]
        done = answered
    return parts


def _rendered(messages: Sequence[Message], tokenizer: ChatEncoder, place: str, **options: Any) -> str:
    if not tokenizer.chat_template:
        raise DeepenError(
            f"{place}: a conversation needs a chat template, which this tokenizer lacks; take an instruction-tuned "
            'model\'s tokenizer, or give the data as "text"'
        )
    given = [{"role": message.role, "content": message.content} for message in messages]
    try:
        rendered: str = tokenizer.apply_chat_template(given, tokenize=False, **options)
    except Exception as cause:  # a template is a program of its own, which may refuse a role or an order
        raise DeepenError(f"{place}: the tokenizer's chat template refuses it: {cause}") from cause
    return rendered


def _ids(text: str, tokenizer: ChatEncoder) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _require_own(document: Tokens, tokenizer: ChatEncoder) -> None:
    own = _fingerprint_of(tokenizer)
    if document.tokenizer != own:
        raise DeepenError(
            f"{document.place}: its ids are those of a tokenizer with digest {document.tokenizer}, and this model's "
            f"has {own}, so they mean other pieces; take the model that they were made for, or make them anew"
        )


@lru_cache(maxsize=1)  # every record asks, and a vocabulary takes a while
def _fingerprint_of(tokenizer: ChatEncoder) -> str:
    return tokenizer_fingerprint(tokenizer)


def _require_plain(conversation: Conversation | Prompt, tokenizer: ChatEncoder) -> None:
    for message in conversation.messages:
        written = [token for token in tokenizer.all_special_tokens if token in message.content]
        if written:
            raise DeepenError(
                f"{conversation.place}: the {message.role}'s message has {written[0]} written out, which would become "
                "that special token; take it out or write it otherwise"
            )
