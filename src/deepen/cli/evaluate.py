"""deepen evaluate"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from deepen.cli.options import Model, OptionalInteger, OptionalName
from deepen.cli.output import print_facts, print_table, progress, quantity


@dataclass(frozen=True)
class Options:
    """Measure a model at one stage of its surgery: how well it predicts documents, what it answers, what that costs.

    Prints perplexity, bits per byte, accuracy and what greedy answers to fixed prompts cost, and writes them with all
    that led to them to OUTPUT_DIR/STAGE_results.json, for `deepen compare`. A scorer that sees the tokens it predicts
    is refused.
    """

    model: Model
    """A model's address, an adapter folder, or a checkpoint's folder."""

    stage: str
    """baseline (the base model alone), after_surgery (the adapter), finetuned_vanilla (what was trained without
    recursion) or finetuned_recursive (what was trained with it)."""

    data: str = "wiki"
    """The corpus: wiki, a generated task as task:pointer, a .txt or .jsonl file, or a folder of such files."""

    split: str = "test"
    """The part of the corpus to score: test, validation or train."""

    max_tokens: int = 20_000
    """Tokens to read in all."""

    max_length: int = 1024
    """Tokens to read of one document, at most."""

    max_samples: OptionalInteger = None
    """Documents to read, at most."""

    batch_size: int = 1
    """Documents to read together: more are sooner on an accelerator, and change scores by rounding."""

    first_scored: int = 32
    """The first token of a document to score, from 0; those before it are read."""

    recursions: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT")] = ()
    """Score the same documents with these numbers of recursions, too, as 1 2 3 4; for a model whose recursions can be
    run more often, or less often, than they were trained to be."""

    max_new_tokens: int = 64
    """Tokens of each greedy answer, at most; 0 asks no prompt."""

    speed: bool = False
    """Time the answers, too: plain decoding and the method's, interleaved, by domain."""

    rounds: int = 5
    """Times that --speed lets each path answer each prompt, after once unmeasured."""

    seed: int = 0
    """Of the bootstrap interval."""

    dtype: OptionalName = None
    """float32, bfloat16, float16 or float64; left out, float32 on a CPU and the model's own elsewhere."""

    device: OptionalName = None
    """cpu, cuda, cuda:1, mps; left out, an accelerator if there is one."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""

    output_dir: str = "eval_results"
    """Where the results are written."""


def run(options: Options) -> int:
    """Measure, write and print."""
    from deepen.evaluate.place import results_path, what_stands_at
    from deepen.evaluate.stages import StageConfig, run_stage

    config = StageConfig.from_dict(asdict(options), source="options")
    replaced = what_stands_at(results_path(config.output_dir, config.stage))
    with progress("tokens read and written", total=config.num_tokens) as advance:
        results, path = run_stage(config, advance=advance)
    print_facts(_facts(results["figures"], results["looking_ahead"]), title=f"{config.model}, {config.stage}")
    if config.stage == "baseline" and results["training"] is not None:
        print(_trained_before(config.model, results["training"]))
    if results["depths"] is not None:
        _print_depths(results["depths"])
    if results["by_difficulty"] is not None:
        print()
        print_table(_BY_DIFFICULTY, [_at_difficulty(line) for line in results["by_difficulty"]])
        print()
    if results["at_recursions"] is not None:
        print_table(_SWEPT, [_at_recursions(line) for line in results["at_recursions"]])
        print()
    if results["generation"] is not None:
        print_facts(_generation(results["generation"], results["left_out"]), title="greedy answers")
    elif results["left_out"]:
        print(f"no prompt fits into the model's context with max_new_tokens {config.max_new_tokens}")
    if results["speed"] is not None:
        print_table(("domain", "path", "tokens/pass", "ms a token", "against plain"), _speed(results["speed"]))
    print_facts(_costs(results["ledger"], results["training"], results["seconds"]), title="costs")
    print(f"written to {path}" + (f" in place of {replaced}" if replaced else ""))
    return 0


def _facts(figures: Mapping[str, Any], looking_ahead: Mapping[str, Any] | None) -> dict[str, Any]:
    interval = figures["nll_interval_95"]
    told = {} if looking_ahead is None else {"looking ahead, as in training": _looking_ahead(looking_ahead)}
    return {
        "perplexity": figures["perplexity"],
        "bits per byte": figures["bits_per_byte"],
        "token accuracy": figures["token_accuracy"],
        "nats per token": f"{figures['nll']:.6f}",
        "95 % interval of these": interval and f"{interval[0]:.4f} to {interval[1]:.4f}",
        "scored tokens": figures["num_tokens"],
        "documents": figures["num_documents"],
        "perturbation test": f"passed: nothing before a changed token moved by more than {figures['largest_move']:g}",
        **told,
    }


def _trained_before(model: str, training: Mapping[str, Any]) -> str:
    origin, steps = (training["run"] or {}).get("model"), training["figures"]["steps"]
    before, way_out = (f" from {origin}", f"; that of its own training is {origin}") if origin else ("", "")
    return f"{model} was trained{before}, in {steps} steps: this is the baseline of what is made of it{way_out}"


def _looking_ahead(figures: Mapping[str, Any]) -> str:
    return f"{figures['nll']:.6f} nats per token, by decisions that no model that generates can make"


def _print_depths(depths: Mapping[str, Any]) -> None:
    """How deep tokens ran: by recursion, and by class of token."""
    kept = (f"{share:.1%} ran {level}" for level, share in _numbered(depths["kept"]))
    facts = {
        "mean depth": f"{depths['mean']:.3f} recursions a token",
        "kept": ", ".join(kept),
        "dead, which ran the first alone": f"{depths['dead']:.1%}",
    }
    print_facts(facts, title="depth")
    print()
    rows = [(name, each["num_tokens"], _told(each["mean"], 3)) for name, each in depths["by_class"].items()]
    print_table(("class of token", "tokens", "mean depth"), rows)
    print()
    costs = [(depth, each["num_tokens"], _told(each["mean"], 4)) for depth, each in _numbered(depths["nll_by_depth"])]
    print_table(("predicted at depth", "scored tokens", "nats per token"), costs)
    print()


_BY_DIFFICULTY = ("difficulty", "documents", "all scored right", "tokens right", "a blind guess", "nats per token")


def _at_difficulty(line: Mapping[str, Any]) -> tuple[Any, ...]:
    shares = (line["all_correct"], line["token_accuracy"], line["chance"])
    told = ("" if share is None else f"{share:.1%}" for share in shares)
    return line["difficulty"], line["num_documents"], *told, _told(line["nll"], 4)


_SWEPT = ("recursions", "nats per token", "95 % interval", "token accuracy", "mean depth", "FLOPs a token, expected")


def _at_recursions(line: Mapping[str, Any]) -> tuple[Any, ...]:
    figures = line["figures"]
    interval = figures["nll_interval_95"]
    return (
        f"{line['num_recursions']}" + (" (as trained)" if line["as_trained"] else ""),
        f"{figures['nll']:.6f}",
        f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "",
        figures["token_accuracy"],
        f"{line['mean_depth']:.3f}",
        quantity(line["flops_per_token_at_0"]),
    )


def _numbered(entries: Sequence[Any]) -> Iterable[tuple[int, Any]]:
    return enumerate(entries, start=1)


def _told(value: float | None, digits: int) -> str:
    return "none" if value is None else f"{value:.{digits}f}"


def _generation(figures: Mapping[str, Any], left_out: Sequence[str]) -> dict[str, Any]:
    acceptance = figures["acceptance_by_source"]
    facts = {
        "answers": figures["num_answers"],
        "tokens": figures["num_tokens"],
        "tokens per pass": figures["tokens_per_pass"],
        "tokens a second": figures["tokens_per_second"],
        "accepted drafts by source": ", ".join(f"{source} {share:.1%}" for source, share in acceptance.items()) or None,
        "distinct 2-grams": figures["distinct_2"],
    }
    if left_out:
        facts["left out, as they don't fit into the context"] = ", ".join(left_out)
    return facts


def _costs(
    ledger: Mapping[str, Any], training: Mapping[str, Any] | None, seconds: Mapping[str, float]
) -> dict[str, Any]:
    trained = {} if training is None else {"training FLOPs": quantity(training["figures"]["training_flops"])}
    return trained | {
        "parameters": ledger["parameters_unique"],
        "of these added": ledger["parameters_added"],
        "FLOPs a token": quantity(ledger["flops_per_token_at_0"]),
        "state of a row of 1,024 tokens": quantity(ledger["state_bytes_at_1024"], "B"),
        "peak memory": quantity(ledger["peak_memory_bytes"], "B"),
        "seconds": ", ".join(f"{part} {spent:.1f}" for part, spent in seconds.items()),
    }


_RATIO = "{ratio:.2f}x ({low:.2f}-{high:.2f})"


def _speed(lines: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [
        (
            line["domain"],
            line["path"],
            line["tokens_per_pass"],
            line["ms_per_token"],
            "-" if line["against_plain"] is None else _RATIO.format(**line["against_plain"]),
        )
        for line in lines
    ]
