"""deepen distill"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from deepen.cli.options import Model, OptionalInteger, OptionalName
from deepen.cli.output import print_facts, progress

if TYPE_CHECKING:
    from deepen.train.distill import Distilled


@dataclass(frozen=True)
class Options:
    """Let a model answer the prompts of a corpus, greedily, and write its answers as a corpus to train on.

    Each line of OUT has a prompt's ids and the answer's ids, which `deepen train` reads as they are and of which it
    learns the answer's, with their texts and why the answer ended; OUT.json says what made the file. The same command
    goes on with a file that was cut off; a finished one is left as it is.
    """

    model: Model
    """A model's address, or an adapter folder, which decodes as its method does."""

    data: str
    """The corpus: chat-prompts, code-prompts, rewriting-prompts, or any other.

    Training documents are taken, of a text the beginning, of anything else what is asked first.
    """

    out: Annotated[str, tyro.conf.arg(metavar="FILE.jsonl")]
    """The file to write, and go on with."""

    num_prompts: OptionalInteger = None
    """Documents to take; left out, all."""

    max_new_tokens: int = 128
    """Tokens of an answer, at most."""

    batch_size: int = 8
    """Prompts that are answered together."""

    prompt_tokens: int = 64
    """Tokens of a text's beginning."""

    seed: int = 0
    """Of the order in which documents are taken."""

    base: OptionalName = None
    """Where the adapter's base model is, if it is no longer where it was."""

    dtype: OptionalName = None
    """float32, bfloat16, float16 or float64; left out, float32 on a CPU and the model's own elsewhere."""

    device: OptionalName = None
    """cpu, cuda, cuda:1, mps; left out, an accelerator if there is one."""

    trust_remote_code: bool = False
    """Run code that comes with the model."""


def run(options: Options) -> int:
    """Answer, write and sum up."""
    from deepen.train.distill import DistillConfig, distill

    config = DistillConfig.from_dict(asdict(options), source="options")
    distilled = distill(config, display=lambda total: progress("prompts answered", total=total))
    print_facts(_facts(distilled), title=f"answers of {config.model}")
    print(f"written to {distilled.path}")
    print(f"train on it: deepen train RUN.json --data {distilled.path}")
    return 0


def _facts(distilled: "Distilled") -> dict[str, Any]:
    figures, per_pass = distilled.figures, distilled.tokens_per_pass
    return {
        "answers": figures["num_answers"],
        "  made now": distilled.num_made,
        "tokens": figures["num_tokens"],
        "tokens per answer": figures["mean_length"],
        "tokens per pass": per_pass if per_pass is not None else "none was made now",
        **{f"distinct {size}-grams": figures[f"distinct_{size}"] for size in (1, 2, 3)},
        "answers that repeat themselves": f"{figures['num_repeating']} (half of their 4-grams or more)",
        "ended by": ", ".join(f"{reason} {count}" for reason, count in distilled.reasons.items()),
    }
