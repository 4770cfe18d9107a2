"""Configuration of a chunk sidecar, its five presets, and the shape its cells take on a given base."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from deepen.core.config import Config
from deepen.core.errors import ConfigError
from deepen.methods.chunk import METHOD

CommitMode = Literal["exact", "refined"]
Draft = Literal["auto", "ar", "lookup", "mask", "jacobi", "shallow"]
CacheResetPolicy = Literal["keep_kda_recurrent_reset_mla", "keep_all", "reset_all"]
CorruptionSchedule = Literal["linear", "cosine", "none"]
CorruptionStrategy = Literal["random", "span"]
Pooling = Literal["causal", "chunk"]
Phase = Literal["none", "a", "b", "c"]

SMALL_BASE_PARAMETERS = 1_000_000_000
"""Bases below this many parameters get the small shape of cells by default."""

DRAFTS_OF_MODE: dict[str, tuple[Draft, ...]] = {
    "exact": ("auto", "ar", "lookup", "mask", "jacobi", "shallow"),
    "refined": ("ar", "mask"),
}
"""The sources a draft may come from; the first one is the mode's default."""

REFINED_LOSS_WEIGHTS = (
    "lambda_final",
    "lambda_masked",
    "lambda_halt",
    "lambda_len",
    "lambda_ponder",
    "lambda_stability",
)
"""Weights of the losses that only refined mode has."""

EXACT_LOSS_WEIGHTS = ("lambda_distill",)
"""Weights of the losses that only exact mode has."""

FIELDS_OF_ONE_MODE: dict[str, tuple[str, ...]] = {
    "exact": (*EXACT_LOSS_WEIGHTS, "distill_gamma", "drafter_hidden", "drafter_layers", "draft_vocab", "keep_outputs"),
    "refined": (
        *REFINED_LOSS_WEIGHTS,
        "keep_better",
        "carry_state",
        "grad_passes",
        "corruption_strategy",
        "own_draft_share",
        "halt_margin",
        "use_soft_tokens",
    ),
}
"""Fields that the other mode has no use for."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "commit_mode": get_args(CommitMode),
    "cache_reset_policy": get_args(CacheResetPolicy),
    "corruption_schedule": get_args(CorruptionSchedule),
    "corruption_strategy": get_args(CorruptionStrategy),
    "pooling": get_args(Pooling),
    "phase": get_args(Phase),
}


@dataclass(frozen=True)
class RecursiveConfig(Config):
    """What a sidecar is made of, how chunks are generated with it, and what its training weighs.

    `{"recursive_enabled": false}` is a complete file: every field has a default. A field that the chosen
    `commit_mode` does not read must keep its default (a loss weight may also be 0): a setting is refused rather than
    skipped. A weight written out at its default can't be told from one left alone; neither asks for anything.
    """

    # The sidecar. Off means the base model itself, with no component built.
    recursive_enabled: bool = False

    # Generation. Widths count tokens; 64 suits chat, 128 code and mathematics.
    chunk_width: int = 128
    # K, the most refined passes over one chunk before it is committed.
    max_inner_steps: int = 4
    # Commit as soon as p_commit is at least this.
    commit_threshold: float = 0.7
    # Confidence floor for edited positions when passes have run out.
    min_commit_threshold: float = 0.3

    # Shape. These three are independent of each other, and each has a value that leaves it to the base's size
    # (`resolve_for_base`): "all" here, null in the other two. "all" is every layer that gets a cell by default on that
    # base: all of a large one's, the last third of a small one's. A list names layers, counted from 0, and is taken
    # at its word.
    layers_to_refine: Literal["all"] | tuple[int, ...] = "all"
    # [Z] at the chunk's right edge, in refined mode.
    use_latent_token: bool = True
    # S, the size of the refine state.
    d_state: int = 512
    # Width of the boundary head.
    gate_hidden: int = 1024
    # The longest chunk that the length head can name.
    max_chunk_len: int = 128

    # Corruption of training chunks, from `corruption_rate` to `corruption_rate_final` along the schedule. The first
    # is also the share of positions that one refined pass may edit.
    corruption_rate: float = 0.3
    corruption_schedule: CorruptionSchedule = "linear"
    corruption_rate_final: float = 0.1

    # Loss weights of refined mode.
    lambda_final: float = 1.0
    lambda_masked: float = 0.5
    lambda_halt: float = 0.5
    lambda_len: float = 0.05
    lambda_ponder: float = 0.01
    lambda_stability: float = 0.01

    # What passes over the same chunk may see of each other. "keep_all" is an ablation.
    cache_reset_policy: CacheResetPolicy = "keep_kda_recurrent_reset_mla"
    enable_length_head: bool = True
    # Gumbel-softmax token updates between refined training passes.
    use_soft_tokens: bool = False

    # Beyond the 22 fields known from the first formulation.

    # "exact": the base's own output, token for token, sooner. "refined": the sidecar's output.
    commit_mode: CommitMode = "exact"
    # Where a draft comes from; null is the mode's own choice, `resolved_draft`.
    draft: Draft | None = None
    # "chunk" shows every position the whole chunk: an ablation.
    pooling: Pooling = "causal"
    # Width inside a cell, and whether all layers share one cell; null goes by the base's size.
    refine_hidden: int | None = None
    share_cells: bool | None = None
    # Logit at which an untrained boundary head starts: -2 is p_commit 0.119.
    commit_bias_init: float = -2.0
    # Keep the draft where the base finds it likelier than what refinement made of it.
    keep_better: bool = False
    # Hand the refine state on to the next chunk instead of starting from zero.
    carry_state: bool = False
    # Back-propagate through the last so many passes; 0 is all of them.
    grad_passes: int = 0
    corruption_strategy: CorruptionStrategy = "random"
    # Share of corrupted positions that get the model's own draft.
    own_draft_share: float = 0.0
    # One more pass is worth it if it lowers the chunk's loss by more than this, in nats.
    halt_margin: float = 0.01
    # Distillation from the base on the slots, and the slots over which its position weight falls by a factor e.
    lambda_distill: float = 1.0
    distill_gamma: float = 4.0
    # The shallow drafter, which draft "shallow" needs: the width inside it; null is none.
    drafter_hidden: int | None = None
    # Layers whose outputs it starts from, the last of them last; null is a third and two thirds up, and the last.
    drafter_layers: tuple[int, ...] | None = None
    # It drafts only so many tokens of the vocabulary, the most frequent of what it learns from; 0 is all of them.
    draft_vocab: int = 0
    # Whether its training keeps what the base's layers gave for each text, in the cache folder.
    keep_outputs: bool = False
    # Rank of phase b's LoRA, on the linears of the last third of the layers.
    lora_rank: int = 8
    # Chunks drawn of each text of a training batch, at most.
    anchors_per_text: int = 8
    # What trains: nothing, "a" the sidecar, "b" LoRA too, "c" every fourth layer of the base too.
    phase: Phase = "none"

    @property
    def resolved_draft(self) -> Draft:
        """The source of drafts, with null resolved: "auto" in exact mode, "ar" in refined mode."""
        return DRAFTS_OF_MODE[self.commit_mode][0] if self.draft is None else self.draft

    def validate(self) -> list[str]:
        """What is wrong with the values, one message each; an empty list if nothing is."""
        wrong_choices = self._wrong_choices()
        return [
            *self._wrong_sizes(),
            *self._wrong_thresholds(),
            *self._wrong_layers(),
            *self._wrong_weights(),
            *wrong_choices,
            # Which fields a mode reads can be judged only where the mode is one.
            *([] if wrong_choices else self._wrong_for_mode()),
        ]

    def _wrong_sizes(self) -> list[str]:
        sizes = (
            "chunk_width",
            "max_inner_steps",
            "max_chunk_len",
            "d_state",
            "gate_hidden",
            "anchors_per_text",
            "lora_rank",
        )
        messages = [f"{name} must be positive" for name in sizes if getattr(self, name) <= 0]
        if self.refine_hidden is not None and self.refine_hidden <= 0:
            messages.append("refine_hidden must be positive, or null for a width by the base's size")
        if self.drafter_hidden is not None and self.drafter_hidden <= 0:
            messages.append("drafter_hidden must be positive, or null for no drafter")
        layers = self.drafter_layers
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            messages.append(f"drafter_layers must name at least one layer, ascending, not {list(layers)}")
        if self.draft_vocab < 0:
            messages.append(f"draft_vocab must be 0 (all tokens) or more, not {self.draft_vocab}")
        if self.chunk_width > self.max_chunk_len > 0:
            messages.append("chunk_width must be <= max_chunk_len")
        if self.grad_passes < 0 or self.grad_passes == 1:
            # One pass alone reaches neither the state update nor the link from top to bottom.
            messages.append(f"grad_passes must be 0 (all passes) or at least 2, not {self.grad_passes}")
        return messages

    def _wrong_thresholds(self) -> list[str]:
        shares = (
            "commit_threshold",
            "min_commit_threshold",
            "corruption_rate",
            "corruption_rate_final",
            "own_draft_share",
        )
        messages = [f"{name} must be in [0, 1]" for name in shares if not 0 <= getattr(self, name) <= 1]
        if self.commit_threshold < self.min_commit_threshold:
            messages.append("commit_threshold must be >= min_commit_threshold")
        return messages

    def _wrong_layers(self) -> list[str]:
        layers = self.layers_to_refine
        if isinstance(layers, str):
            return []
        if not layers:
            return ['layers_to_refine must name at least one layer; "all" leaves the choice to the base\'s size']
        distinct = sorted(set(layers))
        return [
            *(f"layers_to_refine holds {layer}; layers are counted from 0" for layer in distinct if layer < 0),
            *(f"layers_to_refine holds {layer} more than once" for layer in distinct if layers.count(layer) > 1),
        ]

    def _wrong_weights(self) -> list[str]:
        not_negative = (*REFINED_LOSS_WEIGHTS, *EXACT_LOSS_WEIGHTS, "halt_margin")
        messages = [f"{name} must be >= 0, not {value}" for name in not_negative if (value := getattr(self, name)) < 0]
        if self.distill_gamma <= 0:
            messages.append(f"distill_gamma must be positive, not {self.distill_gamma}")
        return messages

    def _wrong_choices(self) -> list[str]:
        return [
            f"{name} must be {_one_of(choices)}"
            for name, choices in _CHOICES.items()
            if getattr(self, name) not in choices
        ]

    def _wrong_for_mode(self) -> list[str]:
        mode = self.commit_mode
        messages = []
        if self.resolved_draft not in DRAFTS_OF_MODE[mode]:
            allowed = _one_of(DRAFTS_OF_MODE[mode])
            messages.append(f"draft must be {allowed} in commit_mode {mode}, not {self.draft}")
        if self.draft == "shallow" and self.drafter_hidden is None:
            messages.append("draft shallow needs a drafter; set drafter_hidden to its width, such as twice the base's")
        if self.drafter_hidden is None:
            unread = {name: getattr(self, name) for name in ("drafter_layers", "draft_vocab", "keep_outputs")}
            messages += [
                f"{name} {value} has no effect without a drafter; set drafter_hidden, or leave it out"
                for name, value in unread.items()
                if value
            ]
        if self.draft == "shallow" and self.phase == "b":
            messages.append("phase b trains LoRA at slots, which draft shallow has none of; set phase to a")
        if self.phase == "c" and mode == "exact":
            messages.append(
                "phase c changes the base, whose output commit_mode exact promises; "
                "set commit_mode to refined, or phase to a or b"
            )
        if self.cache_reset_policy == "keep_all" and mode == "exact":
            messages.append(
                "cache_reset_policy keep_all lets a pass see what others left, and then its output isn't the base's; "
                "set commit_mode to refined, or cache_reset_policy to keep_kda_recurrent_reset_mla"
            )
        other: CommitMode = "refined" if mode == "exact" else "exact"
        return messages + [
            f"{name} {value} has no effect in commit_mode {mode}; leave it out, or set commit_mode to {other}"
            for name, value in self._set_for(other)
        ]

    def _set_for(self, mode: CommitMode) -> list[tuple[str, Any]]:
        """Fields that only `mode` reads and that ask for something: name and value."""
        defaults = {field.name: field.default for field in fields(self)}
        values = {name: getattr(self, name) for name in FIELDS_OF_ONE_MODE[mode]}
        return [
            (name, value)
            for name, value in values.items()
            # A loss switched off asks for nothing; any other setting does as soon as it differs.
            if value != defaults[name] and not (name.startswith("lambda_") and value == 0)
        ]


@dataclass(frozen=True)
class CellPlan:
    """The cells a base gets: the refined layers in ascending order, a cell's width, and whether there is but one."""

    layers: tuple[int, ...]
    hidden: int
    shared: bool

    @property
    def num_cells(self) -> int:
        """How many cells are built."""
        return 1 if self.shared else len(self.layers)


def resolve_for_base(config: RecursiveConfig, *, num_layers: int, hidden_size: int, num_parameters: int) -> CellPlan:
    """The shape of the cells on a base of this size.

    By default a base under `SMALL_BASE_PARAMETERS` gets one shared cell of width hidden_size / 4 on the last third of
    its layers (rounded up), a larger one a cell of width 4 * hidden_size on every layer. `layers_to_refine`,
    `refine_hidden` and `share_cells` each override their own part and no other, so that an ablation changes one thing.

    Raises `ConfigError` if a listed layer does not exist.
    """
    small = num_parameters < SMALL_BASE_PARAMETERS
    if isinstance(config.layers_to_refine, str):
        first_layer = num_layers - -(-num_layers // 3) if small else 0
        layers = tuple(range(first_layer, num_layers))
    else:
        layers = tuple(sorted(config.layers_to_refine))
        _check_layers_exist(layers, num_layers)
    default_hidden = max(1, hidden_size // 4) if small else 4 * hidden_size
    return CellPlan(
        layers=layers,
        hidden=default_hidden if config.refine_hidden is None else config.refine_hidden,
        shared=small if config.share_cells is None else config.share_cells,
    )


def get_baseline_config() -> RecursiveConfig:
    """The base alone: recursion off."""
    return _preset("baseline")


def get_after_surgery_config() -> RecursiveConfig:
    """A sidecar grafted and untrained: the output is still the base's."""
    return _preset("after_surgery")


def get_phase_a_config() -> RecursiveConfig:
    """Trains the sidecar alone."""
    return _preset("recursive_phase_a")


def get_phase_b_config() -> RecursiveConfig:
    """Trains the sidecar and LoRA on the top third of the base."""
    return _preset("recursive_phase_b")


def get_phase_c_config() -> RecursiveConfig:
    """Trains the sidecar and every fourth layer of the base, held near its pretrained weights; refined mode."""
    return _preset("recursive_phase_c")


def _preset(name: str) -> RecursiveConfig:
    return RecursiveConfig.from_file(METHOD.preset_paths()[name])


def _check_layers_exist(layers: tuple[int, ...], num_layers: int) -> None:
    for layer in layers:
        if not 0 <= layer < num_layers:
            raise ConfigError(
                f"layers_to_refine names layer {layer}, but the base has {num_layers} layers (0..{num_layers - 1})"
            )


def _one_of(choices: tuple[str, ...]) -> str:
    *others, last = choices
    return f"{', '.join(others)}, or {last}" if len(others) > 1 else f"{others[0]} or {last}"
