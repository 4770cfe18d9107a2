"""Drives a decoder until every row has ended: counts, stops each row on its own, streams, drops what is done."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from deepen.core.errors import ConfigError
from deepen.core.method import Decoder
from deepen.core.types import Prompt, RowAdvance
from deepen.generate.detokenize import Tokenizer
from deepen.generate.events import Committed, Event, Finished, RowResult
from deepen.generate.random import SEED_LIMIT
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.generate.stop import StopConfig, StopWatch, StreamedText


@dataclass
class _Row:
    """One row while it lives: where it stands in the caller's order, when it ends, and its text if anybody reads it."""

    index: int
    watch: StopWatch
    text: StreamedText | None

    def take(self, advance: RowAdvance, passes: int) -> Iterator[Event]:
        """The events of one advance; tokens behind the row's end are not among them."""
        tokens = advance.tokens[: self.watch.feed(advance.tokens)]
        reason = self.watch.reason
        text = self.text.feed(tokens, reason) if self.text else ""
        if tokens:
            yield Committed(self.index, tokens, text, advance, passes)
        if reason is not None:
            yield Finished(self.index, reason)


def stream(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sequence[SamplingConfig] | SamplingConfig | None = None,
    stop: StopConfig | None = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Event]:
    """Continue each row of ids in `prompts`, event by event; the text of events is empty without a `tokenizer`.

    One `sampling` for all gives row r the seed `seed + r`; a sequence gives each row its own, so that a row can be
    reproduced alone. Default: greedy, and the defaults of `StopConfig`. Raises `PromptError` and `ConfigError` before
    the first event.
    """
    stop = stop if stop is not None else StopConfig()
    configs = _sampling_of_rows(sampling, len(prompts))
    rows = [
        _Row(
            index,
            StopWatch(stop, tokenizer, prompt),
            StreamedText(tokenizer, stop.stop_strings) if tokenizer is not None else None,
        )
        for index, prompt in enumerate(prompts)
    ]
    sampler = BatchSampler(configs)
    decoding = decoder.open(Prompt(tuple(map(tuple, prompts)), stop.max_new_tokens))
    if stop.max_new_tokens == 0:
        yield from (Finished(row.index, "length") for row in rows)
        return
    while rows:
        advance = decoder.advance(decoding, sampler)
        for row, gained in zip(rows, advance.rows, strict=True):
            yield from row.take(gained, advance.spent.passes)
        ended = [place for place, row in enumerate(rows) if row.watch.finished]
        if ended:
            rows = [row for row in rows if not row.watch.finished]
        if ended and rows:
            decoder.drop(decoding, ended)
            sampler.drop(ended)


def complete(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sequence[SamplingConfig] | SamplingConfig | None = None,
    stop: StopConfig | None = None,
    tokenizer: Tokenizer | None = None,
) -> list[RowResult]:
    """The outcome of each row, in the order of `prompts`; arguments and errors as `stream`."""
    results = [RowResult() for _ in prompts]
    for event in stream(decoder, prompts, sampling=sampling, stop=stop, tokenizer=tokenizer):
        results[event.row].add(event)
    return results


def _sampling_of_rows(
    sampling: Sequence[SamplingConfig] | SamplingConfig | None, num_rows: int
) -> list[SamplingConfig]:
    if sampling is None or isinstance(sampling, SamplingConfig):
        shared = sampling if sampling is not None else SamplingConfig()
        return [replace(shared, seed=(shared.seed + row) % SEED_LIMIT) for row in range(num_rows)]
    if len(sampling) != num_rows:
        raise ConfigError(f"{len(sampling)} sampling configurations for {num_rows} prompts; give one, or one each")
    return list(sampling)
