"""`deepen bench delta`: delta attention against transformers', what it keeps, whether tokens are equal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from deepen.cli.output import print_facts, print_table, progress, quantity
from deepen.core.errors import ConfigError

if TYPE_CHECKING:
    from deepen.evaluate.delta_speed import DeltaModel

_METHOD = "chunk"
_PRESET = "after_surgery"
_DRAFTS = ("lookup", "mask", "jacobi", "auto")
_WIDTH = 8
_MAY_BE_NONE = ("cases", "coarse_cases", "bases")


@dataclass(frozen=True)
class DeltaOptions:
    """Read by `deepen bench delta` only."""

    tokens: int = 2048
    """Tokens of a training step, of the op and of the model."""
    heads: int = 8
    """Heads of the op where it is trained."""
    decoding_heads: int = 32
    """Heads of the op where it decodes, and where what it saves is counted; the 48B model has 32."""
    head_width: int = 128
    """Width of keys and of values, in the op and in the model."""
    memory_tokens: int = 512
    """Tokens over which bytes saved for a backward are counted."""
    hidden_size: int = 512
    """Of the random model, which has four layers."""
    model_heads: int = 4
    """Heads of the random model."""
    context: int = 256
    """Tokens before the model's pass."""
    rounds: int = 3
    """Rounds of what takes seconds, after one unmeasured."""
    quick_rounds: int = 40
    """Rounds of what takes milliseconds, after one unmeasured."""
    bases: tuple[str, ...] = ("tiny:kimi_linear", "tiny:qwen3_next")
    """Models on which exact decoding is compared with plain decoding."""
    cases: int = 200
    """Random decodings compared in float32, all bases together."""
    coarse_cases: int = 40
    """Those in bfloat16, which are told and not judged."""

    def check(self) -> None:
        """Raises `ConfigError` for a number below 1 where that means nothing."""
        for name, value in asdict(self).items():
            least = 0 if name in _MAY_BE_NONE else 1
            if isinstance(value, int) and value < least:
                raise ConfigError(f"--delta.{name.replace('_', '-')} is {value}; give a whole number from {least} on")


def run(options: DeltaOptions) -> tuple[dict[str, Any], int]:
    """Measure and print; the figures, and 1 if a row in float32 differs from plain decoding's but for near-ties."""
    from deepen.evaluate.delta_speed import DeltaModel

    model = DeltaModel(hidden_size=options.hidden_size, heads=options.model_heads, head_width=options.head_width)
    lines = _race(options, model)
    print_table(("line", "ours, ms", "transformers, ms", "ratio", "spread", "difference", "bars"), _shown(lines))
    memory = _memory(options, model)
    print_table(("memory", "ours", "transformers", "ratio"), _shown_memory(memory))
    equality = {
        "float32": _equality(options, "float32", options.cases),
        "bfloat16": _equality(options, "bfloat16", options.coarse_cases),
    }
    columns = ("base", "dtype", "rows", "equal", "near-ties", "others", "margins", "tokens/pass")
    print_table(columns, _shown_equality(equality))
    others = {
        f"{base}, {other}": "DIFFERENT" for base, found in equality["float32"].items() for other in found["others"]
    }
    if others:
        print_facts(others, title="rows that part elsewhere than at a near-tie")
    figures = {"model": model.size, "lines": lines, "memory": memory, "equality": equality}
    return figures, 1 if others else 0


def _race(options: DeltaOptions, model: "DeltaModel") -> list[dict[str, Any]]:
    from deepen.evaluate.delta_speed import op_races, run_race

    races = op_races(
        tokens=options.tokens,
        heads=options.heads,
        decoding_heads=options.decoding_heads,
        head_width=options.head_width,
    )
    races += model.races(tokens=options.tokens, context=options.context)
    rounds = [options.rounds if race.slow else options.quick_rounds for race in races]
    with progress("runs", total=sum(2 * (each + 1) for each in rounds)) as done:
        return [run_race(race, rounds=each, done=done).figures() for race, each in zip(races, rounds, strict=True)]


def _memory(options: DeltaOptions, model: "DeltaModel") -> dict[str, Any]:
    from deepen.evaluate.delta_speed import op_memory

    saved = op_memory(tokens=options.memory_tokens, heads=options.decoding_heads, head_width=options.head_width)
    return {"saved": saved, "model": model.memory()}


def _equality(options: DeltaOptions, dtype: str, count: int) -> dict[str, dict[str, Any]]:
    """What was found on each base."""
    found = {}
    for number, base in enumerate(options.bases):
        share = count // len(options.bases) + (number < count % len(options.bases))
        if share:
            found[base] = _equality_on(base, dtype, share)
    return found


def _equality_on(base: str, dtype: str, count: int) -> dict[str, Any]:
    from dataclasses import replace

    from deepen.backbones import resolve
    from deepen.backbones.hf import Backbone
    from deepen.core.registry import get
    from deepen.evaluate.delta_equality import PARTLY_RIGHT, draw_cases, tally_cases
    from deepen.evaluate.noise import fill_with_noise

    backbone = Backbone.attach(resolve.load(base, dtype=dtype, device="cpu").model)
    backbone.pack()
    method = get(_METHOD)
    models = {}
    for draft in _DRAFTS:
        config = replace(method.load_config(_PRESET), draft=draft, chunk_width=_WIDTH)
        models[draft] = method.load_model_type().build(config, backbone, backbone.vocab_size)
        fill_with_noise(models[draft])
    cases = draw_cases(count, (*_DRAFTS, PARTLY_RIGHT))
    with progress(f"decodings of {base} in {dtype}", total=count) as done:
        return tally_cases(backbone, models, cases, done=done).figures()


def _shown(lines: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (
            line["line"],
            f"{line['ours_ms']:.2f}",
            f"{line['transformers_ms']:.2f}",
            f"{line['ratio']:.2f}x",
            f"{line['low']:.2f}-{line['high']:.2f}",
            f"{line['difference']:.0e}",
            ", ".join(_bar(line[name]) for name in ("bar", "stretch") if line[name] is not None),
        )
        for line in lines
    ]


def _bar(bar: Mapping[str, Any]) -> str:
    return f"{bar['ratio']:g}x {'met' if bar['met'] else 'MISSED'}"


def _shown_memory(memory: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    saved, model = memory["saved"], memory["model"]
    ours, theirs = (quantity(saved[name], "B") for name in ("ours_bytes", "transformers_bytes"))
    return [
        (f"{saved['line']}; inputs are {quantity(saved['inputs_bytes'], 'B')}", ours, theirs, f"{saved['ratio']:.2f}x"),
        ("model, recurrent states and windows of a row", quantity(model["snapshot_bytes_per_row"], "B"), "", ""),
        ("model, held by a token until its commit", quantity(model["replay_bytes_per_token"], "B"), "", ""),
    ]


def _shown_equality(equality: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[tuple[Any, ...]]:
    return [
        (
            base,
            dtype,
            found["rows"],
            f"{found['equal']} ({found['match_rate']:.1%})",
            found["near_ties"],
            len(found["others"]),
            "" if found["margin_median"] is None else _margins(found),
            found["tokens_per_pass"],
        )
        for dtype, bases in equality.items()
        for base, found in bases.items()
    ]


def _margins(found: Mapping[str, Any]) -> str:
    return f"median {found['margin_median']:.1e}, largest {found['margin_largest']:.1e}"
