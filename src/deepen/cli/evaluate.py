"""deepen evaluate"""

from dataclasses import asdict, dataclass
from typing import Any

from deepen.cli.options import Model
from deepen.cli.output import print_facts, progress


@dataclass(frozen=True)
class Options:
    """Measure how well a model predicts documents, at one stage of its surgery.

    Prints perplexity, bits per byte and accuracy, and writes them with all that led to them to
    OUTPUT_DIR/STAGE_results.json. A scorer that sees the tokens it predicts is refused.
    """

    model: Model
    """A model's address, or an adapter folder."""

    stage: str
    """baseline (the base model alone) or after_surgery (the adapter)."""

    data: str = "wiki"
    """The corpus: wiki, a .txt or .jsonl file, or a folder of such files."""

    split: str = "test"
    """The part of the corpus to score: test, validation or train."""

    max_tokens: int = 20_000
    """Tokens to read in all."""

    max_length: int = 1024
    """Tokens to read of one document, at most."""

    seed: int = 0
    """Of the bootstrap interval."""

    output_dir: str = "eval_results"
    """Where the results are written."""


def run(options: Options) -> int:
    """Measure, write and print."""
    from deepen.evaluate.stages import StageConfig, run_stage

    config = StageConfig.from_dict(asdict(options), source="options")
    with progress("scoring tokens", total=config.max_tokens) as advance:
        results, path = run_stage(config, advance=advance)
    print_facts(_facts(results["figures"]), title=f"{config.model}, {config.stage}")
    print(f"written to {path}")
    return 0


def _facts(figures: dict[str, Any]) -> dict[str, Any]:
    interval = figures["nll_interval_95"]
    return {
        "perplexity": figures["perplexity"],
        "bits per byte": figures["bits_per_byte"],
        "token accuracy": figures["token_accuracy"],
        "nats per token": f"{figures['nll']:.6f}",
        "95 % interval of these": interval and f"{interval[0]:.4f} to {interval[1]:.4f}",
        "scored tokens": figures["num_tokens"],
        "documents": figures["num_documents"],
        "perturbation test": f"passed: nothing before a changed token moved by more than {figures['largest_move']:g}",
    }
