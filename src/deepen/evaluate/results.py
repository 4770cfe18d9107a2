"""The file of one stage: what was measured, of what, under which configuration, in parts that can be compared later.

Free of torch, so that files can be read and compared at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from deepen import __version__
from deepen.core.config import Config
from deepen.core.errors import ConfigError, DeepenError
from deepen.core.files import read_json
from deepen.core.hints import did_you_mean
from deepen.evaluate.depths import DepthsOfStage

FORMAT = 1
STAGE_NAMES = ("baseline", "after_surgery", "finetuned_vanilla", "finetuned_recursive")

_WAY_OUT = "`deepen evaluate MODEL --stage STAGE` writes such files"


@dataclass(frozen=True)
class BaseOfStage(Config):
    """The pretrained model that a stage goes back to, also where its weights were trained further since."""

    address: str
    fingerprint: str
    tokenizer: str


@dataclass(frozen=True)
class ScoredDocument(Config):
    """Sums over the scored tokens of one document; `id` is a digest of all its tokens that were read.

    `nll` is in nats. `num_bytes` are those of the scored text's UTF-8. `difficulty` is what its record says; None where
    it says nothing, and in files of earlier versions.
    """

    id: str
    nll: float
    num_tokens: int
    num_correct: int
    num_bytes: int
    difficulty: int | None = None

    def validate(self) -> list[str]:
        """Counts that can't be."""
        problems = [] if self.num_tokens > 0 else [f"num_tokens must be positive, not {self.num_tokens}"]
        if not 0 <= self.num_correct <= max(0, self.num_tokens):
            problems.append(f"num_correct must be between 0 and num_tokens, not {self.num_correct}")
        if self.num_bytes < 0:
            problems.append(f"num_bytes must be 0 or more, not {self.num_bytes}")
        return problems


@dataclass(frozen=True)
class Answer(Config):
    """The greedy continuation of one prompt, and what it cost.

    `seconds` are end to end, the prompt's reading included; passes, positions and FLOPs are without it. `commits` and
    `passes_of_commits` have an entry for each advance: tokens committed, passes run. By draft source: `drafted` counts
    tokens, `judged` and `agreed` count by place in the draft those that were compared with what came and those that
    were equal, `passes_by_source` counts passes by their width (a JSON object's keys are texts). `edits` are committed
    tokens that differ from the draft's; `p_commit` has an entry for each advance whose method gives one.

    `layer_applications` are those of one layer to one position, without the prompt's reading; `prompt_flops` are those
    of that reading. Files of earlier versions have neither: None.
    """

    prompt: str
    domain: str
    num_prompt_tokens: int
    tokens: tuple[int, ...]
    text: str
    reason: str | None
    seconds: float
    passes: int
    positions: int
    flops: int
    commits: tuple[int, ...]
    passes_of_commits: tuple[int, ...]
    drafted: dict[str, int]
    judged: dict[str, tuple[int, ...]]
    agreed: dict[str, tuple[int, ...]]
    passes_by_source: dict[str, dict[str, int]]
    edits: int
    p_commit: tuple[float, ...]
    layer_applications: int | None = None
    prompt_flops: int | None = None


@dataclass(frozen=True)
class TrainingOfStage(Config):
    """What the run that made a model has cost (its checkpoint's ledger), and its settings; None where they are gone."""

    figures: dict[str, int | float | None]
    run: dict[str, Any] | None


@dataclass(frozen=True)
class AtRecursions(Config):
    """The model of a stage run with so many recursions: its figures, and the FLOPs of a token behind no other.

    `as_trained` marks the number that the model was trained with, or was made for.
    """

    num_recursions: int
    as_trained: bool
    mean_depth: float
    flops_per_token_at_0: int
    figures: dict[str, Any]


@dataclass(frozen=True)
class AtDifficulty(Config):
    """Documents of one difficulty: the share of them in which every scored token was the most probable, the share of
    tokens that were, and nats a token; `chance` is the share of tokens that a blind guess gets, where that is known."""

    difficulty: int
    num_documents: int
    all_correct: float
    token_accuracy: float
    nll: float
    chance: float | None = None


@dataclass(frozen=True)
class StageResults(Config):
    """What `{stage}_results.json` holds.

    `exact` says that the method promises the base's own output. `config` is the evaluation's configuration,
    `method_config` the method's with every field, None for a base alone. `figures` are over `documents`, `generation`
    over `answers` (None without any); `left_out` names the prompts that don't fit into the model's context. `speed`
    has a line for each domain and path, None where nothing was timed; its `against_plain` is None where the base alone
    can't decode. `checks` are what the figures' meaning rests on. `training` is None for what no run of `deepen train`
    made, and in files of earlier versions; a baseline has one where its own weights come of a run. `looking_ahead` has
    the figures of a model that is trained by decisions that look at later tokens, by such decisions; None for all
    others. `depths` is None where all tokens run the same depth, and `at_recursions`, the same model run with other
    numbers of recursions, where none were asked for; both in files of earlier versions. `by_difficulty` has a line for
    each difficulty, None where no document tells its own, and in files of earlier versions.

    Behind the baseline, `base` is what a run began from, also where it trained all weights and nothing of them is left;
    for a plain model `method` is then what trained it.
    """

    format: int
    deepen_version: str
    stage: str
    base: BaseOfStage
    method: str | None
    method_config: dict[str, Any] | None
    exact: bool
    config: dict[str, Any]
    data: dict[str, Any]
    seed: int
    environment: dict[str, Any]
    figures: dict[str, Any]
    documents: tuple[ScoredDocument, ...]
    answers: tuple[Answer, ...]
    left_out: tuple[str, ...]
    generation: dict[str, Any] | None
    speed: tuple[dict[str, Any], ...] | None
    ledger: dict[str, int | float | None]
    checks: dict[str, float | None]
    seconds: dict[str, float]
    training: TrainingOfStage | None = None
    looking_ahead: dict[str, Any] | None = None
    depths: DepthsOfStage | None = None
    at_recursions: tuple[AtRecursions, ...] | None = None
    by_difficulty: tuple[AtDifficulty, ...] | None = None

    def validate(self) -> list[str]:
        """One message for each value that no stage can have."""
        problems = []
        if self.stage not in STAGE_NAMES:
            problems.append(f'unknown stage "{self.stage}"{did_you_mean(self.stage, STAGE_NAMES)}')
        if not self.documents:
            problems.append("documents must not be empty")
        names = [answer.prompt for answer in self.answers]
        if len(set(names)) < len(names):
            problems.append("answers has more than one answer to a prompt")
        return problems

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """The results in a file; `DeepenError` names the file, the field and a way out if it has none."""
        if not Path(path).is_file():
            raise DeepenError(f"there is no results file at {path}; {_WAY_OUT}")
        content = read_json(path)
        for field in ("format", "stage", "base"):
            if not isinstance(content, dict) or field not in content:
                raise DeepenError(f'{path} is not a results file: it has no field "{field}"; {_WAY_OUT}')
        _check_format(path, content["format"], content.get("deepen_version", "an unknown version"))
        try:
            return cls.from_dict(content, source=str(path))
        except ConfigError as cause:
            raise DeepenError(f"{cause}; the file is damaged or was changed, so evaluate again: {_WAY_OUT}") from cause


def _check_format(path: str | Path, found: Any, writer: Any) -> None:
    if isinstance(found, bool) or not isinstance(found, int):
        raise DeepenError(f'{path} is not a results file: its "format" must be a whole number; {_WAY_OUT}')
    if found > FORMAT:
        raise DeepenError(
            f'{path} has "format" {found}, and this version of deepen ({__version__}) reads format {FORMAT}; '
            f"use the version that wrote it ({writer}) or a later one"
        )
    if found < FORMAT:
        raise DeepenError(f'{path} has "format" {found}, which no version has written; evaluate again: {_WAY_OUT}')
