"""When a row ends, and how much of its text may be shown before it is clear that it goes on."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deepen.core.config import Config
from deepen.core.errors import ConfigError
from deepen.generate.detokenize import Detokenizer, Tokenizer
from deepen.generate.events import FinishReason

_MAX_BYTES_OF_CHARACTER = 4


@dataclass(frozen=True)
class StopConfig(Config):
    """What ends a row: one of these tokens, one of these strings in its text, or its number of new tokens."""

    eos_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int = 256

    def validate(self) -> list[str]:
        """One message for each value out of range."""
        problems = []
        if any(token < 0 for token in self.eos_ids):
            problems.append(f"eos_ids must hold token ids of 0 or more, not {min(self.eos_ids)}")
        if "" in self.stop_strings:
            problems.append('stop_strings must hold strings of at least one character, not ""')
        if self.max_new_tokens < 0:
            problems.append(f"max_new_tokens must be 0 or more, not {self.max_new_tokens}")
        return problems


class StopWatch:
    """Watches the tokens of one row and says where it ends. `reason` is None until then.

    Stop strings have transformers' meaning: the token that completes one is the row's last, whatever it holds behind
    the string. One may begin in the prompt; special tokens count by their names. Where a token ends the row in more
    than one way, the reason is that named first: "eos", "stop_string", "length".
    """

    def __init__(self, config: StopConfig, tokenizer: Tokenizer | None = None, prompt: Sequence[int] = ()) -> None:
        """`prompt` holds the row's ids so far. Raises `ConfigError` if there are stop strings and no tokenizer."""
        config.check()
        if config.stop_strings and tokenizer is None:
            raise ConfigError("stop_strings can't be found in tokens without the model's tokenizer; pass `tokenizer`")
        self._eos_ids = frozenset(config.eos_ids)
        self._num_left = config.max_new_tokens
        self._search = _Search(config.stop_strings, tokenizer, prompt) if config.stop_strings and tokenizer else None
        self.reason: FinishReason | None = None if self._num_left else "length"

    @property
    def finished(self) -> bool:
        """Whether the row has ended; tokens fed from then on are not kept."""
        return self.reason is not None

    def feed(self, ids: Iterable[int]) -> int:
        """How many of the row's next tokens are kept: all, or those up to the one that ends it."""
        num_kept = 0
        for token in ids:
            if self.finished:
                break
            num_kept += 1
            self._num_left -= 1
            self.reason = self._reason_to_end(token)
        return num_kept

    def _reason_to_end(self, token: int) -> FinishReason | None:
        if token in self._eos_ids:
            return "eos"
        if self._search and self._search.completed_by(token):
            return "stop_string"
        return None if self._num_left else "length"


class StreamedText:
    """The text of one row as it may be shown: what might be the beginning of a stop string is held back until it isn't.

    A row that ends with a stop string is shown up to that string, though its tokens hold all of it.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
        self._stop_strings = tuple(stop_strings)
        self._held = ""

    def feed(self, ids: Iterable[int], reason: FinishReason | None = None) -> str:
        """The text that may be shown now that these tokens were kept; all the rest of it if the row has ended."""
        text = self._held + self._detokenizer.feed(ids)
        if reason is None:
            end = len(text) - _length_of_beginning(text, self._stop_strings)
        else:
            text += self._detokenizer.finish()
            end = _start(text, self._stop_strings) if reason == "stop_string" else len(text)
        self._held = text[end:] if reason is None else ""
        return text[:end]


class _Search:
    """Finds the token that completes a stop string, in the text that ends with the tokens seen so far."""

    def __init__(self, stop_strings: Sequence[str], tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._stop_strings = stop_strings
        self._longest = max(map(len, stop_strings))
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
        self._text = self._detokenizer.feed(prompt[-self._longest * _MAX_BYTES_OF_CHARACTER :])
        self._num_old = len(self._text + self._detokenizer.pending)

    def completed_by(self, token: int) -> bool:
        """Whether a stop string ends in the text of `token`, the next one."""
        self._text += self._detokenizer.feed((token,))
        text = self._text + self._detokenizer.pending
        found = any(
            text.find(stop_string, max(0, self._num_old + 1 - len(stop_string))) >= 0
            for stop_string in self._stop_strings
        )
        num_past = max(0, len(self._text) - self._longest)
        self._text = self._text[num_past:]
        self._num_old = len(text) - num_past
        return found


def _length_of_beginning(text: str, stop_strings: Sequence[str]) -> int:
    """Length of the longest end of `text` with which a stop string begins that isn't all there."""
    lengths = (
        length
        for stop_string in stop_strings
        for length in range(1, len(stop_string))
        if text.endswith(stop_string[:length])
    )
    return max(lengths, default=0)


def _start(text: str, stop_strings: Sequence[str]) -> int:
    """Where the first stop string in `text` begins; its end if none does (one may consist of special tokens)."""
    starts = (text.find(stop_string) for stop_string in stop_strings)
    return min((start for start in starts if start >= 0), default=len(text))
