"""Greedy answers to the fixed prompts, with all that their decoding spent."""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

from deepen.core.method import Decoder
from deepen.core.types import Advance, Spent
from deepen.evaluate.prompts import DomainPrompt
from deepen.evaluate.recording import Recorder, drafted, judged_by_place, pass_widths, passes_by_source
from deepen.evaluate.results import Answer
from deepen.generate.loop import complete
from deepen.generate.stop import StopConfig
from deepen.generate.verify import PREFILL_WIDTH
from deepen.metrics.ledger import PassFlops, RunLedger, reading_flops


def fitting(
    prompts: Sequence[DomainPrompt], tokenizer: Any, *, context: int | None, max_new_tokens: int
) -> list[DomainPrompt]:
    """Those whose tokens, with as many new ones, fit into a context."""
    return [
        prompt for prompt in prompts if context is None or len(prompt.encode(tokenizer)) + max_new_tokens <= context
    ]


def answer_all(
    decoder: Decoder,
    prompts: Sequence[DomainPrompt],
    *,
    tokenizer: Any,
    stop: StopConfig,
    flops: PassFlops,
    advance: Callable[[int], object],
) -> list[Answer]:
    """An answer to each prompt, one after the other; `advance` is called with the most tokens each could have had."""
    answers = []
    for prompt in prompts:
        ids = prompt.encode(tokenizer)
        answers.append(
            answer(decoder, ids, name=prompt.name, domain=prompt.domain, tokenizer=tokenizer, stop=stop, flops=flops)
        )
        advance(stop.max_new_tokens)
    return answers


def answer(
    decoder: Decoder,
    ids: Sequence[int],
    *,
    name: str,
    domain: str,
    tokenizer: Any,
    stop: StopConfig,
    flops: PassFlops,
) -> Answer:
    """The greedy continuation of a prompt's `ids`, called `name` and `domain` in what is given."""
    recorder = Recorder(decoder)
    began = perf_counter()
    result = complete(recorder, [ids], stop=stop, tokenizer=tokenizer)[0]
    seconds = perf_counter() - began
    advances = recorder.advances
    judged, agreed = judged_by_place(advances)
    ledger = _ledger(advances, len(ids), flops)
    return Answer(
        prompt=name,
        domain=domain,
        num_prompt_tokens=len(ids),
        tokens=tuple(result.tokens),
        text=result.text,
        reason=result.reason,
        seconds=seconds,
        passes=ledger.decoding.passes,
        positions=ledger.decoding.positions,
        flops=ledger.decoding_flops,
        commits=tuple(result.commits),
        passes_of_commits=tuple(each.spent.passes for each in advances),
        drafted=drafted(advances),
        judged=judged,
        agreed=agreed,
        passes_by_source={
            source: {str(width): count for width, count in widths.items()}
            for source, widths in passes_by_source(advances).items()
        },
        edits=sum(each.rows[0].edits for each in advances),
        p_commit=tuple(each.rows[0].p_commit for each in advances if each.rows[0].p_commit is not None),
        layer_applications=ledger.decoding.layer_applications,
        prompt_flops=ledger.reading_flops,
    )


def _ledger(advances: Sequence[Advance], num_prompt_tokens: int, flops: PassFlops) -> RunLedger:
    """What one row has cost; a pass reads the last committed token first, and what is behind."""
    ledger, context = RunLedger(), num_prompt_tokens - 1
    ledger.read(Spent(), flops=reading_flops(flops, num_tokens=context, width=PREFILL_WIDTH))
    for advance in advances:
        cost = sum(flops(num_positions=width, context=context) for width in pass_widths(advance))
        num_tokens = len(advance.rows[0].tokens)
        ledger.decoded(advance.spent, num_tokens=num_tokens, flops=cost)
        context += num_tokens
    return ledger
