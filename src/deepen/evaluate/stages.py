"""One stage of an evaluation: a model, documents, figures, and a file that says exactly what was measured."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from deepen.checkpoint import Opened, open_model
from deepen.core.config import Config
from deepen.core.errors import CannotScore, DeepenError
from deepen.core.files import write_json
from deepen.core.hints import did_you_mean
from deepen.core.types import Batch
from deepen.data.batches import batch_of, document_rows
from deepen.data.split import Split, documents, split_of
from deepen.data.text import corpus
from deepen.evaluate.scoring import FIRST_SCORED, Scorer, evaluate
from deepen.generate.scoring import score_at_once

STAGES = ("baseline", "after_surgery")
LATER_STAGES = ("finetuned_vanilla", "finetuned_recursive")

_NUM_LOOKED_AT = 1000


@dataclass(frozen=True)
class StageConfig(Config):
    """What to measure on what.

    `baseline` is the base model alone, read by its own forward; for an adapter folder that is the adapter's base.
    `after_surgery` is the adapter, read as its method scores.
    """

    # A base model's address or an adapter folder.
    model: str
    stage: str
    # A corpus's name or path, and the part of it that is scored.
    data: str = "wiki"
    split: Split = "test"
    # Tokens read in all; the last document is cut to fit. Of a document at most `max_length`, or the model's context.
    max_tokens: int = 20_000
    max_length: int = 1024
    # Of the bootstrap.
    seed: int = 0
    output_dir: str = "eval_results"

    def validate(self) -> list[str]:
        """One message for each value that can't be measured with."""
        problems = [f"{name} must not be empty" for name in ("model", "data", "output_dir") if not getattr(self, name)]
        if self.stage in LATER_STAGES:
            problems.append(
                f"stage {self.stage} needs the training stages, which are not part of this version; "
                f"use {' or '.join(STAGES)}"
            )
        elif self.stage not in STAGES:
            problems.append(f'unknown stage "{self.stage}"{did_you_mean(self.stage, STAGES)}')
        for name, value in (("max_tokens", self.max_tokens), ("max_length", self.max_length)):
            if value <= FIRST_SCORED:
                problems.append(f"{name} must be above {FIRST_SCORED}, where scoring starts, not {value}")
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed must be between 0 and 2**63 - 1, not {self.seed}")
        return problems


def run_stage(
    config: StageConfig, *, advance: Callable[[int], object] = lambda num_tokens: None
) -> tuple[dict[str, Any], Path]:
    """The results of one stage and the file they are in, `{output_dir}/{stage}_results.json`.

    `advance` is called with the number of tokens of each document that is done. Raises `DeepenError` for what can't be
    measured: an adapter's stage asked of a plain base, a corpus without documents in the split, a scorer that sees
    the future.
    """
    config.check()
    opened = open_model(config.model)
    score = _scorer(config, opened)
    context = opened.backbone.context_length
    length = config.max_length if context is None else min(config.max_length, context)
    batches = _batches(config, opened, length)
    figures = evaluate(score, batches, tokenizer=opened.tokenizer, seed=config.seed, advance=advance)
    is_method = config.stage != "baseline"
    results = {
        "stage": config.stage,
        "figures": figures,
        "config": replace(config, max_length=length).to_dict(),
        "base": vars(opened.identity),
        "method": opened.method.name if is_method and opened.method else None,
        "method_config": opened.model.config.to_dict() if is_method and opened.model else None,
        "data": {"corpus": config.data, "split": config.split, "first_scored_token": FIRST_SCORED},
        "seed": config.seed,
    }
    path = Path(config.output_dir).expanduser() / f"{config.stage}_results.json"
    write_json(path, results)
    return results, path


def _scorer(config: StageConfig, opened: Opened) -> Scorer:
    if config.stage == "baseline":
        return partial(score_at_once, opened.backbone)
    if opened.model is None:
        raise CannotScore(
            f"{config.model} is a plain base model; stage {config.stage} measures an adapter folder, as `deepen graft` "
            "writes it (stage baseline measures the base)"
        )
    return opened.model.score


def _batches(config: StageConfig, opened: Opened, max_length: int) -> list[Batch]:
    """A document a batch: nothing is padded, and no document's score depends on another's length."""
    texts = documents(config.data, config.split)
    rows = document_rows(texts, opened.tokenizer, max_length=max_length, max_tokens=config.max_tokens)
    batches = [batch_of([row]) for row in rows if row]
    if not batches:
        raise DeepenError(
            f'{config.data} has no document in split "{config.split}"; {_found_splits(config.data)} (a document\'s '
            "split is told by its text); choose another split or give more documents"
        )
    return batches


def _found_splits(name: str) -> str:
    texts: Iterator[str] = islice(corpus(name), _NUM_LOOKED_AT)
    counts = Counter(map(split_of, texts))
    return "it has " + (", ".join(f"{count} in {split}" for split, count in sorted(counts.items())) or "none at all")
