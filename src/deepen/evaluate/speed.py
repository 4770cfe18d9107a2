"""How long decoding takes along several paths: same prompts, same process, one path after the other, round by round."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

import torch

from deepen.backbones.hf import Backbone
from deepen.core.method import Decoder
from deepen.evaluate.recording import Recorder, passes_by_source
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.stop import StopConfig

PLAIN = "plain"
"""The path of plain decoding."""


@dataclass(frozen=True)
class Answered:
    """What one path said to one prompt; `passes` is None where the path doesn't tell.

    `passes_by_source` has the same passes by draft source and width.
    """

    tokens: list[int]
    passes: int | None
    passes_by_source: Mapping[str, Mapping[int, int]] = field(default_factory=dict)


# Continues a prompt's ids greedily.
Path = Callable[[Sequence[int]], Answered]


@dataclass
class Timing:
    """One path on one prompt: seconds of each round, and what it said."""

    answered: Answered
    seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_token(self) -> float:
        """Median over rounds, the prompt's reading included."""
        return median(self.seconds) / len(self.answered.tokens)


def decoder_path(decoder: Decoder, stop: StopConfig) -> Path:
    """Decoding by one of ours."""

    def run(ids: Sequence[int]) -> Answered:
        recorder = Recorder(decoder)
        result = complete(recorder, [ids], stop=stop)[0]
        return Answered(result.tokens, result.passes, passes_by_source(recorder.advances))

    return run


def transformers_path(model: Any, stop: StopConfig, **options: Any) -> Path:
    """transformers' greedy `generate` on a model that nothing of ours has touched, with these further options."""

    def run(ids: Sequence[int]) -> Answered:
        prompt = torch.tensor([list(ids)])
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=stop.max_new_tokens,
            do_sample=False,
            eos_token_id=list(stop.eos_ids),
            pad_token_id=stop.eos_ids[0],
            **options,
        )
        return Answered(output[0, len(ids) :].tolist(), None)

    return run


def time_paths(
    paths: Mapping[str, Path], prompts: Sequence[Sequence[int]], *, rounds: int, done: Callable[[int], None]
) -> list[dict[str, Timing]]:
    """Timings of each prompt by path. Every path runs once unmeasured; then rounds interleave the paths.

    The order turns by one each round, so that no path always stands behind the same other. `done` hears of each run.
    """
    names = list(paths)
    timings = []
    for ids in prompts:
        of_prompt = {}
        for name in names:
            of_prompt[name] = Timing(paths[name](ids))
            done(1)
        for turn in range(rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                began = perf_counter()
                answered = paths[name](ids)
                of_prompt[name].seconds.append(perf_counter() - began)
                assert answered.tokens == of_prompt[name].answered.tokens, f"{name} is not reproducible"
                done(1)
        timings.append(of_prompt)
    return timings


def ratios(timings: Sequence[Mapping[str, Timing]], *, path: str, against: str) -> dict[str, float]:
    """How many times as fast as `against` a path is over these prompts together, by seconds a token.

    `ratio` is that of the medians; `low` and `high` are the least and greatest ratio of a single round.
    """
    rounds = len(timings[0][path].seconds)
    of_rounds = [
        sum(_per_token(t[against], r) for t in timings) / sum(_per_token(t[path], r) for t in timings)
        for r in range(rounds)
    ]
    mine, theirs = (sum(t[name].seconds_per_token for t in timings) for name in (path, against))
    return {"ratio": theirs / mine, "low": min(of_rounds), "high": max(of_rounds)}


def _per_token(timing: Timing, turn: int) -> float:
    return timing.seconds[turn] / len(timing.answered.tokens)


def counted_cost(timings: Sequence[Mapping[str, Timing]], *, path: str) -> float | None:
    """Tokens per pass over these prompts: committed tokens over full-model passes, those that read prompts aside."""
    answers = [t[path].answered for t in timings]
    passes = [answer.passes for answer in answers]
    if any(count is None for count in passes):
        return None
    return sum(len(answer.tokens) for answer in answers) / sum(count for count in passes if count is not None)


def path_figures(timings: Sequence[Mapping[str, Timing]], *, path: str) -> dict[str, Any]:
    """What a table says of one path on these prompts: tokens per pass, milliseconds a token, ratio to plain.

    The ratio is None where no plain path was timed: a model that its method brings has none.
    """
    per_pass = counted_cost(timings, path=path)
    against = ratios(timings, path=path, against=PLAIN) if PLAIN in timings[0] else None
    return {
        "prompts": len(timings),
        "tokens": sum(len(timing[path].answered.tokens) for timing in timings),
        "tokens_per_pass": None if per_pass is None else round(per_pass, 3),
        "ms_per_token": round(sum(t[path].seconds_per_token for t in timings) / len(timings) * 1e3, 2),
        "against_plain": against and {name: round(value, 3) for name, value in against.items()},
    }


@torch.no_grad()
def pass_seconds(
    backbone: Backbone, widths: Sequence[int], *, context: int, rounds: int, done: Callable[[int], None]
) -> dict[int, list[float]]:
    """Seconds of passes of each width behind `context` tokens, widths interleaved; the first round isn't counted."""
    cache = backbone.new_cache(batch_size=1, capacity=context + max(widths))
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(backbone.vocab_size, (1, count), generator=generator).to(backbone.device)

    backbone.run(tokens(context), cache, keep="last")
    cache.commit([context])
    seconds: dict[int, list[float]] = {width: [] for width in widths}
    for turn in range(rounds + 1):
        for width in widths:
            chunk = tokens(width)
            began = perf_counter()
            backbone.run(chunk, cache)
            if turn:
                seconds[width].append(perf_counter() - began)
        done(1)
    return seconds


def read_bandwidth() -> float:
    """Bytes a second at which this machine reads memory: the best of several sums over half a gibibyte."""
    block = torch.ones(1 << 27)
    times = []
    for _ in range(5):
        began = perf_counter()
        block.sum()
        times.append(perf_counter() - began)
    return block.nbytes / min(times)


def our_paths(backbone: Backbone, models: Mapping[str, Decoder], stop: StopConfig) -> dict[str, Path]:
    """Plain decoding, where the base alone can decode, and decoding by each of these models."""
    plain: dict[str, Path] = {}
    if backbone.own_method is None:
        plain[PLAIN] = decoder_path(PlainDecoder(backbone), stop)
    return plain | {name: decoder_path(model, stop) for name, model in models.items()}
