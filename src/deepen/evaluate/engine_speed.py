"""What an engine brings: tokens a second of many requests at once, latencies under load, and what it held meanwhile."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles
from time import perf_counter, sleep
from typing import Any

from deepen.backbones.hf import Backbone
from deepen.engine.engine import Engine
from deepen.engine.request import Request
from deepen.engine.runner import Statistics
from deepen.generate.events import Committed, Finished

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Arm:
    """A model that answers."""

    name: str
    decoder: Any
    backbone: Backbone

    def engine(self, requests: Sequence[Request], *, slots: int, exit_width: int | None = None) -> Engine:
        """For requests like these."""
        longest = max(request.most_tokens for request in requests)
        return Engine(self.decoder, backbone=self.backbone, slots=slots, max_length=longest, exit_width=exit_width)


@dataclass(frozen=True)
class Answers:
    """All requests answered once: seconds from the first step to the last, and the most bytes held between steps."""

    tokens: tuple[tuple[int, ...], ...]
    seconds: float
    statistics: Statistics
    most_bytes: int

    @property
    def num_tokens(self) -> int:
        """Committed."""
        return sum(map(len, self.tokens))

    @property
    def speed(self) -> float:
        """Tokens a second, prompts' reading included."""
        return self.num_tokens / self.seconds


def answer(arm: Arm, requests: Sequence[Request], *, slots: int, exit_width: int | None = None) -> Answers:
    """Answer all of these, which come at once."""
    engine = arm.engine(requests, slots=slots, exit_width=exit_width)
    places = {engine.submit(request): place for place, request in enumerate(requests)}
    tokens: list[list[int]] = [[] for _ in requests]
    most_bytes, began = 0, perf_counter()
    while engine.is_busy:
        for event in engine.step():
            if isinstance(event, Committed):
                tokens[places[event.row]] += event.tokens
        most_bytes = max(most_bytes, engine.num_bytes)
    seconds = perf_counter() - began
    return Answers(tuple(map(tuple, tokens)), seconds, engine.statistics, most_bytes)


def time_arms(
    arms: Sequence[Arm], requests: Sequence[Request], *, slots: int, rounds: int, done: Callable[[int], None]
) -> dict[str, list[Answers]]:
    """Every arm once unmeasured, then rounds that interleave them, each in another order. `done` hears of each run."""
    found: dict[str, list[Answers]] = {arm.name: [] for arm in arms}
    for turn in range(rounds + 1):
        first = turn % len(arms)
        for arm in (*arms[first:], *arms[:first]):
            answers = answer(arm, requests, slots=slots)
            if turn:
                found[arm.name].append(answers)
            done(1)
    return found


def figures(rounds: Sequence[Answers], *, slots: int) -> dict[str, Any]:
    """What a table says of one arm: medians with the least and greatest; counts are the same in every round.

    `utilisation` is how many tokens a call of the model runs, on average, for each slot: above 1 where prompts are read
    in it or tokens are drafted. `applications` are those of a layer to a token, for each token that entered.
    """
    speeds, last = [each.speed for each in rounds], rounds[-1].statistics
    calls = sum(last.calls.values())
    rows = sum(size * times for size, times in last.calls.items())
    return {
        "tokens_per_second": {"median": median(speeds), "low": min(speeds), "high": max(speeds)},
        "tokens_per_call": last.tokens / calls,
        "utilisation": rows / calls / slots,
        "applications": last.spent.layer_applications / last.spent.positions,
        "tokens_per_head": last.tokens / sum(last.heads.values()) if last.heads else None,
        "most_bytes": rounds[-1].most_bytes,
    }


def ratio(mine: Sequence[Answers], plain: Sequence[Answers]) -> dict[str, float]:
    """How many times as fast as `plain`: that of the medians, and the least and greatest of one round."""
    of_rounds = [a.speed / b.speed for a, b in zip(mine, plain, strict=True)]
    whole = median(each.speed for each in mine) / median(each.speed for each in plain)
    return {"ratio": whole, "low": min(of_rounds), "high": max(of_rounds)}


def ideal_ratio(arm: Answers, plain_arm: Arm, plain: Answers, *, context: int) -> float:
    """How many times as fast an arm would be if time went by FLOPs: layers at this context, and the head.

    A layer costs what one of the plain model does, which has the same sizes.
    """
    given = {"num_positions": 1, "context": context}
    layers = plain_arm.decoder.flops(**given, num_logits=0)
    head = plain_arm.decoder.flops(**given, num_logits=1) - layers
    whole, shortened = (_applications(each) for each in (plain, arm))
    return float((layers + head) / (layers * shortened / whole + head))


def _applications(answers: Answers) -> float:
    return answers.statistics.spent.layer_applications / answers.statistics.spent.positions


def under_load(
    arm: Arm, requests: Sequence[Request], *, slots: int, per_second: float, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Seconds to the first token and to the last, and of each token between, by percentile.

    Requests come as a Poisson process does: independently, `per_second` of them on average.
    """
    source = random.Random(seed)
    comes, now = [], 0.0
    for _ in requests:
        now += source.expovariate(per_second)
        comes.append(now)
    engine = arm.engine(requests, slots=slots)
    began, arrived, first, last = perf_counter(), dict[int, float](), dict[int, float](), dict[int, float]()
    waiting = list(zip(comes, requests, strict=True))
    while waiting or engine.is_busy:
        now = perf_counter() - began
        while waiting and waiting[0][0] <= now:
            at, request = waiting.pop(0)
            arrived[engine.submit(request)] = at
        if not engine.is_busy:
            sleep(max(0.0, waiting[0][0] - now))
            continue
        for event in engine.step():
            now = perf_counter() - began
            if isinstance(event, Finished) and event.error is not None:
                raise event.error
            if isinstance(event, Finished):
                last[event.row] = now
            else:
                first.setdefault(event.row, now)
    num_tokens = requests[0].stop.max_new_tokens
    measured = {
        "to_first": [first[number] - arrived[number] for number in arrived],
        "to_last": [last[number] - arrived[number] for number in arrived],
        "per_token": [(last[number] - first[number]) / max(1, num_tokens - 1) for number in arrived],
    }
    return {name: _percentiles(values) for name, values in measured.items()}


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    cuts = quantiles(values, n=100, method="inclusive")
    return {"mean": fmean(values), **{f"p{percent}": cuts[percent - 1] for percent in PERCENTILES}}
