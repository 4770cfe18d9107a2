"""One request: what is asked, and what has become of it while it is answered."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from deepen.core.errors import PromptError
from deepen.core.types import RowAdvance
from deepen.generate.detokenize import Tokenizer
from deepen.generate.events import Committed, Event, Finished, FinishReason
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.generate.stop import StopConfig, StopWatch, StreamedText


@dataclass(frozen=True)
class Request:
    """Ids to continue, how tokens are chosen, and when it ends.

    `sampling.seed` makes it the same alone and beside any others.
    """

    ids: tuple[int, ...]
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    stop: StopConfig = field(default_factory=StopConfig)

    @property
    def most_tokens(self) -> int:
        """That it may come to hold."""
        return len(self.ids) + self.stop.max_new_tokens

    def check(self, *, vocab_size: int, context_length: int | None) -> None:
        """Raises `PromptError` for ids that are no prompt of the model's, `ConfigError` for impossible settings."""
        self.sampling.check()
        self.stop.check()
        if not self.ids:
            raise PromptError("the prompt is empty; give at least one token (a beginning-of-sequence id will do)")
        outside = [token for token in self.ids if not 0 <= token < vocab_size]
        if outside:
            raise PromptError(
                f"the prompt holds id {outside[0]}, outside this model's vocabulary of {vocab_size}; encode it with "
                "the model's own tokenizer"
            )
        if context_length is not None and self.most_tokens > context_length:
            raise PromptError(
                f"the prompt has {len(self.ids)} tokens; with max_new_tokens {self.stop.max_new_tokens} it exceeds "
                f"this model's context of {context_length}: shorten the prompt by "
                f"{self.most_tokens - context_length} tokens or lower max_new_tokens"
            )


class Live:
    """A request from when it is taken until it has ended. `ids` holds the prompt and what was committed.

    What goes wrong while its tokens are chosen or its text is made is its own: it ends with `error`, and others go on.
    """

    def __init__(self, number: int, request: Request, tokenizer: Tokenizer | None = None) -> None:
        self.number, self.request = number, request
        self.ids = list(request.ids)
        self.error: Exception | None = None
        self._sampler = BatchSampler([request.sampling])
        self._watch = StopWatch(request.stop, tokenizer, request.ids)
        self._text = None if tokenizer is None else StreamedText(tokenizer, request.stop.stop_strings)
        self._cancelled = False

    @property
    def reason(self) -> FinishReason | None:
        """Why it has ended; None while it goes on."""
        if self.error is not None:
            return "failed"
        return "cancelled" if self._cancelled else self._watch.reason

    def cancel(self) -> None:
        """End it."""
        self._cancelled = True

    def choose(self, logits: Tensor, drafted: Sequence[int] = ()) -> list[int]:
        """The tokens at positions `[W, V]` behind `ids` and what was drafted; where it fails, the first id."""
        if self.error is None:
            try:
                return self._sampler.choose(0, logits, self.ids, drafted)
            except Exception as error:  # whatever it is, it is of this row's logits and settings
                self.error = error
        return [0] * len(logits)

    def take(self, advance: RowAdvance, passes: int) -> Iterator[Event]:
        """The events of tokens that were committed; those behind its end are not among them."""
        if self.reason is None:
            try:
                yield from self._taken(advance, passes)
            except Exception as error:  # as a tokenizer's
                self.error = error
        if self.reason is not None:
            yield Finished(self.number, self.reason, self.error)

    def _taken(self, advance: RowAdvance, passes: int) -> Iterator[Event]:
        tokens = advance.tokens[: self._watch.feed(advance.tokens)]
        self.ids += tokens
        text = "" if self._text is None else self._text.feed(tokens, self._watch.reason)
        if tokens:
            yield Committed(self.number, tokens, text, advance, passes)
