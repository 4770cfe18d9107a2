"""One stage of an evaluation: a model, documents, prompts, figures, and a file that says exactly what was measured."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import torch

from deepen import __version__
from deepen.checkpoint import Opened, open_model
from deepen.core.config import Config
from deepen.core.errors import DeepenError
from deepen.core.files import write_json
from deepen.core.hints import did_you_mean
from deepen.core.method import Deepening, LookingAhead, RecursiveModel
from deepen.core.types import Batch
from deepen.data.batches import batch_of
from deepen.data.measured import documents_of, measured_batch, measured_rows
from deepen.data.records import Split
from deepen.data.split import split_of_record
from deepen.data.text import records
from deepen.evaluate.agreement import widest_difference
from deepen.evaluate.answers import answer_all, fitting
from deepen.evaluate.difficulty import by_difficulty
from deepen.evaluate.environment import environment, peak_memory_bytes
from deepen.evaluate.metrics import generation_figures
from deepen.evaluate.place import require_writable, results_path
from deepen.evaluate.prompts import PROMPTS, Domain, DomainPrompt
from deepen.evaluate.recursions import at_each_depth, measure_each
from deepen.evaluate.results import FORMAT, STAGE_NAMES, Answer, AtRecursions, BaseOfStage, StageResults
from deepen.evaluate.scoring import FIRST_SCORED, Measured, Scorer, guard_row, measure
from deepen.evaluate.speed import our_paths, path_figures, time_paths
from deepen.evaluate.standing import has_own_base, require_recursion, require_standing
from deepen.evaluate.training import read_origin, read_training
from deepen.generate.plain import PlainDecoder
from deepen.generate.scoring import score_at_once, score_in_chunks
from deepen.generate.stop import StopConfig
from deepen.generate.verify import PREFILL_WIDTH
from deepen.metrics.ledger import count_parameters, model_figures

LEDGER_CONTEXTS = (0, 1024)
"""Tokens of context for which FLOPs and bytes are told."""

_NUM_LOOKED_AT = 1000
_CHECKED_TOKENS = 64


@dataclass(frozen=True)
class StageConfig(Config):
    """What to measure on what.

    `baseline` is the base model alone, read as plain decoding reads it; for an adapter folder that is the adapter's
    base. `after_surgery` is the adapter, read as its method scores, and so are the two stages behind a training run;
    standing.py says what may stand at which.
    """

    # A base model's address, an adapter folder, or the folder of a model that was trained as a whole.
    model: str
    stage: str
    # A corpus's name or path, and the part of it that is scored.
    data: str = "wiki"
    split: Split = "test"
    # Tokens read in all; the last document is cut to fit. Of a document at most `max_length`, or the model's context.
    max_tokens: int = 20_000
    max_length: int = 1024
    # Documents read, at most; null is as many as `max_tokens` takes.
    max_samples: int | None = None
    # Documents read together. One alone is padded by nothing, so no score depends on another's length, not even by
    # rounding; more of them are sooner on an accelerator.
    batch_size: int = 1
    # The first token of a document that is scored, counted from 0. Those before it are read.
    first_scored: int = FIRST_SCORED
    # Numbers of recursions to score the same documents with, too.
    recursions: tuple[int, ...] = ()
    # Of each greedy answer, at most; 0 asks no prompt.
    max_new_tokens: int = 64
    # Time plain decoding and the method's, `rounds` times each prompt, interleaved.
    speed: bool = False
    rounds: int = 5
    # Of the bootstrap.
    seed: int = 0
    # Null is float32 on a CPU and the model's own elsewhere; and an accelerator if there is one.
    dtype: str | None = None
    device: str | None = None
    trust_remote_code: bool = False
    output_dir: str = "eval_results"

    def validate(self) -> list[str]:
        """One message for each value that can't be measured with."""
        problems = [f"{name} must not be empty" for name in ("model", "data", "output_dir") if not getattr(self, name)]
        if self.stage not in STAGE_NAMES:
            problems.append(f'unknown stage "{self.stage}"{did_you_mean(self.stage, STAGE_NAMES)}')
        if self.first_scored < 1:
            problems.append(f"first_scored must be 1 or more, not {self.first_scored}: nothing predicts token 0")
        for name, value in (("max_tokens", self.max_tokens), ("max_length", self.max_length)):
            if value <= self.first_scored:
                problems.append(f"{name} must be above {self.first_scored}, where scoring starts, not {value}")
        if self.max_samples is not None and self.max_samples < 1:
            problems.append(f"max_samples must be 1 or more, not {self.max_samples}")
        if self.batch_size < 1:
            problems.append(f"batch_size must be 1 or more, not {self.batch_size}")
        for number in self.recursions:
            if number < 1 or self.recursions.count(number) > 1:
                problems.append(f"recursions must be different numbers of at least 1, and {number} is not one of these")
                break
        if self.max_new_tokens < 0:
            problems.append(f"max_new_tokens must be 0 or more, not {self.max_new_tokens}")
        if self.speed and self.max_new_tokens == 0:
            problems.append("speed times answers, and max_new_tokens 0 asks for none; raise it, or leave speed out")
        if self.rounds < 1:
            problems.append(f"rounds must be 1 or more, not {self.rounds}")
        if not 0 <= self.seed < 2**63:
            problems.append(f"seed must be between 0 and 2**63 - 1, not {self.seed}")
        return problems

    @property
    def num_tokens(self) -> int:
        """Tokens that may be read and written in all, for whoever shows how far the work is."""
        per_answer = len(PROMPTS) * self.max_new_tokens
        num_paths = 1 if self.stage == "baseline" else 2
        timed = self.speed * per_answer * num_paths * (self.rounds + 1)
        return self.max_tokens * (1 + len(self.recursions)) + per_answer + timed


def run_stage(
    config: StageConfig, *, advance: Callable[[int], object] = lambda num_tokens: None
) -> tuple[dict[str, Any], Path]:
    """The results of one stage and the file they are in, `{output_dir}/{stage}_results.json`.

    `advance` is called with the number of tokens of each document and answer that is done. Raises `DeepenError` for
    what can't be measured: a stage asked of a model that can't stand there, a corpus without documents in the split, a
    scorer that sees the future; and, before anything is loaded, for a file that can't be written.
    """
    config.check()
    path = results_path(config.output_dir, config.stage)
    require_writable(path)
    clock = _Clock()
    with clock("loading"):
        opened = open_model(
            config.model,
            dtype=config.dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code,
            pack=True,
        )
    stage = _Stage(config, opened, clock)
    results = stage.run(advance)
    write_json(path, results.to_dict())
    if config.speed:
        # What timing can't do must not cost the figures, which are there by now.
        results = replace(results, speed=stage.speed(advance))
        write_json(path, results.to_dict())
    return results.to_dict(), path


@dataclass
class _Clock:
    """Seconds by part of the work."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = perf_counter()
        yield
        self.seconds[part] = perf_counter() - began


class _Stage:
    """The measurements of one stage, on an opened model."""

    def __init__(self, config: StageConfig, opened: Opened, clock: _Clock) -> None:
        self._opened, self._clock = opened, clock
        self._backbone = opened.backbone
        context = self._backbone.context_length
        self._config = replace(config, max_length=min(config.max_length, context or config.max_length))
        of_base = config.stage == "baseline"
        # A run has made what a checkpoint has beside its adapter only where it trained that, too.
        is_own_base = has_own_base(opened, address=config.model)
        self._training = read_training(config.model) if is_own_base or not of_base else None
        self._origin = read_origin(config.model) if is_own_base and not of_base else None
        require_standing(config.stage, opened, address=config.model, training=self._training, origin=self._origin)
        # A model that its method brings is its own base: nothing is left of it without the method.
        is_own = self._backbone.own_method is not None
        self._model: RecursiveModel | None = None if of_base and not is_own else opened.model
        self._at_depths = at_each_depth(self._model, config.recursions, address=config.model)
        self._decoder = self._model if self._model is not None else PlainDecoder(self._backbone)
        self._stop = StopConfig(max_new_tokens=config.max_new_tokens, eos_ids=opened.eos_ids)
        self._prompts = self._fitting_prompts()

    def run(self, advance: Callable[[int], object]) -> StageResults:
        """All of them, but for speed."""
        config = self._config
        batches = _batches(config, self._opened)
        text = max((row for batch in batches for row in batch.unpadded()), key=len)
        require_recursion(config.stage, self._opened, address=config.model, text=text)
        with self._clock("scoring"):
            measured = self._measured(self._scorer(), batches, advance)
            ahead = self._looking_ahead(batches)
        swept = self._at_recursions(batches, advance) if self._at_depths else None
        with self._clock("answers"):
            answers = self._answers(advance)
        with self._clock("checks"):
            checks = self._checks(batches)
        return replace(self._results(measured, answers, checks), looking_ahead=ahead, at_recursions=swept)

    def speed(self, advance: Callable[[int], object]) -> tuple[dict[str, Any], ...]:
        """A line for each domain and path: how long its prompts' answers take, one path after the other."""
        models = {} if self._model is None or self._opened.method is None else {self._opened.method.name: self._model}
        paths = our_paths(self._backbone, models, self._stop)

        def done(count: int) -> None:
            advance(count * self._config.max_new_tokens)

        lines = []
        with self._clock("speed"):
            for domain in get_args(Domain):
                prompts = [prompt.encode(self._opened.tokenizer) for prompt in self._prompts if prompt.domain == domain]
                timings = time_paths(paths, prompts, rounds=self._config.rounds, done=done)
                if timings:
                    lines += [{"domain": domain, "path": path, **path_figures(timings, path=path)} for path in paths]
        return tuple(lines)

    def _measured(
        self,
        scorer: Scorer,
        batches: list[Batch],
        advance: Callable[[int], object] = lambda num_tokens: None,
        *,
        looks_ahead: bool = False,
    ) -> Measured:
        config = self._config
        return measure(
            scorer,
            batches,
            tokenizer=self._opened.tokenizer,
            seed=config.seed,
            first_scored=config.first_scored,
            advance=advance,
            looks_ahead=looks_ahead,
        )

    def _at_recursions(self, batches: list[Batch], advance: Callable[[int], object]) -> tuple[AtRecursions, ...]:
        with self._clock("recursions"):
            return measure_each(
                self._at_depths, self._num_recursions, lambda model: self._measured(model.score, batches, advance)
            )

    @property
    def _num_recursions(self) -> int:
        """Of the stage's own model; 1 for one that doesn't say."""
        model: object = self._model
        return model.num_recursions if isinstance(model, Deepening) else 1

    def _looking_ahead(self, batches: list[Batch]) -> dict[str, Any] | None:
        model: object = self._model
        if not isinstance(model, LookingAhead) or not model.looks_ahead:
            return None
        return self._measured(model.score_looking_ahead, batches, looks_ahead=True).figures

    def _scorer(self) -> Scorer:
        if self._model is not None:
            return self._model.score
        # As plain decoding reads: the base's own forward computes with other kernels, whose rounding would hide
        # whether a stage behind this one gives the base's very bits.
        return partial(score_in_chunks, self._backbone, width=PREFILL_WIDTH)

    def _fitting_prompts(self) -> list[DomainPrompt]:
        if self._config.max_new_tokens == 0:
            return []
        return fitting(
            PROMPTS,
            self._opened.tokenizer,
            context=self._backbone.context_length,
            max_new_tokens=self._config.max_new_tokens,
        )

    def _answers(self, advance: Callable[[int], object]) -> list[Answer]:
        return answer_all(
            self._decoder,
            self._prompts,
            tokenizer=self._opened.tokenizer,
            stop=self._stop,
            flops=self._decoder.flops,
            advance=advance,
        )

    @torch.no_grad()
    def _checks(self, batches: list[Batch]) -> dict[str, float | None]:
        row = guard_row(batches, first_scored=self._config.first_scored)[:_CHECKED_TOKENS]
        checks: dict[str, float | None] = {
            "pass_width_difference": None,
            "own_forward_difference": None,
        }
        if self._backbone.own_method is None:
            checks["pass_width_difference"] = widest_difference(self._backbone, row, width=len(row))
        if self._model is None:
            ours, theirs = self._scorer()(batch_of([row])), score_at_once(self._backbone, batch_of([row]))
            difference = (ours.log_probs - theirs.log_probs)[ours.scored]
            checks["own_forward_difference"] = float(difference.abs().max())
        return checks

    def _results(
        self,
        measured: Measured,
        answers: list[Answer],
        checks: dict[str, float | None],
    ) -> StageResults:
        config = self._config
        base, method, method_config = self._subject()
        return StageResults(
            format=FORMAT,
            deepen_version=__version__,
            stage=config.stage,
            base=base,
            method=method,
            method_config=method_config,
            exact=self._model is not None and self._model.promises_base,
            config=config.to_dict(),
            data={"corpus": config.data, "split": config.split, "first_scored_token": config.first_scored},
            seed=config.seed,
            environment=environment(self._backbone),
            figures=measured.figures,
            documents=measured.documents,
            answers=tuple(answers),
            left_out=self._left_out(),
            generation=_generation(answers, method_config),
            speed=None,
            ledger={
                **model_figures(
                    count_parameters(self._backbone.model, self._model),
                    self._decoder,
                    num_layers=self._backbone.num_layers,
                    contexts=LEDGER_CONTEXTS,
                ),
                "peak_memory_bytes": peak_memory_bytes(self._backbone.device),
            },
            checks=checks,
            seconds=self._clock.seconds,
            training=self._training,
            depths=measured.depths.result(num_recursions=self._num_recursions),
            by_difficulty=by_difficulty(measured.documents, config.data),
        )

    def _subject(self) -> tuple[BaseOfStage, str | None, dict[str, Any] | None]:
        """The base that this stage goes back to, and the method with its configuration, if there is one."""
        origin = self._origin
        base = BaseOfStage(**vars(self._opened.identity)) if origin is None else origin.base
        if self._model is not None and self._opened.method is not None:
            return base, self._opened.method.name, self._model.config.to_dict()
        return (base, None, None) if origin is None else (base, origin.method, origin.method_config)

    def _left_out(self) -> tuple[str, ...]:
        if self._config.max_new_tokens == 0:
            return ()
        answered = {prompt.name for prompt in self._prompts}
        return tuple(prompt.name for prompt in PROMPTS if prompt.name not in answered)


def _generation(answers: list[Answer], method_config: dict[str, Any] | None) -> dict[str, Any] | None:
    threshold = (method_config or {}).get("commit_threshold")
    return generation_figures(answers, commit_threshold=threshold) if answers else None


def _batches(config: StageConfig, opened: Opened) -> list[Batch]:
    """The documents in their own order, `batch_size` at a time; of those that ask something, the answers count."""
    documents = islice(documents_of(config.data, config.split), config.max_samples)
    rows = measured_rows(documents, opened.tokenizer, max_length=config.max_length, max_tokens=config.max_tokens)
    batches = [measured_batch(chosen) for chosen in iter(lambda: list(islice(rows, config.batch_size)), [])]
    if not batches:
        raise DeepenError(
            f'{config.data} has no document in split "{config.split}"; {_found_splits(config.data)} (a document\'s '
            "split is told by its text); choose another split or give more documents"
        )
    return batches


def _found_splits(name: str) -> str:
    counts = Counter(map(split_of_record, islice(records(name), _NUM_LOOKED_AT)))
    return "it has " + (", ".join(f"{count} in {split}" for split, count in sorted(counts.items())) or "none at all")
