"""Training the sidecar: what trains in which mode and phase, and one step of it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deepen.backbones.hf import Backbone
from deepen.core.errors import CannotTrain, DeepenError
from deepen.core.types import Batch, Mean, Progress, StepOutput, Unit
from deepen.methods.chunk import training_exact, training_refined
from deepen.methods.chunk.config import EXACT_LOSS_WEIGHTS, REFINED_LOSS_WEIGHTS, RecursiveConfig
from deepen.methods.chunk.passes import Sidecar
from deepen.methods.chunk.rows import ChunkBatch, draw_rows

SIDECAR_LEARNING_RATE = 3e-4
LEARNING_RATES = {"boundary": 5e-4, "lora": 1e-5, "base_delta": 1e-5}
"""Of parts that learn otherwise than the rest: the boundary head faster, what changes the base's products slower."""
WEIGHT_DECAY = 0.05


def is_trained(name: str, config: RecursiveConfig) -> bool:
    """Whether the sidecar's tensor of this name gets a gradient in the configuration's mode and phase.

    Exact mode drafts in one pass, without a state and without [Z], and names no length. In refined mode nothing leads
    from the top of [Z] to its bottom in a single pass, and slots are met in corrupted chunks alone. A head whose loss
    has no weight counts as trained all the same.
    """
    if config.phase == "none":
        return False
    if config.resolved_draft == "shallow":
        return name.startswith("drafter")
    if name.startswith("drafter"):
        return False
    if config.commit_mode == "exact":
        return not ("state_upd" in name or name.startswith("latent_token") or "len_head" in name)
    if "top_to_bottom" in name:
        return config.max_inner_steps > 1
    if name.startswith("mask_token"):
        return config.lambda_masked > 0
    return True


def train_only_these(sidecar: Mapping[str, nn.Module], config: RecursiveConfig) -> None:
    """Freeze what gets no gradient, so that it is neither counted as trained nor decayed."""
    for part, module in sidecar.items():
        for name, parameter in module.named_parameters():
            parameter.requires_grad_(is_trained(f"{part}.{name}", config))


def optim_groups(sidecar: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """The trained tensors, by learning rate and weight decay."""
    by_setting: dict[tuple[float, float], list[nn.Parameter]] = {}
    for part, module in sidecar.items():
        # Tuned layers are drawn to what they were, not to zero.
        setting = LEARNING_RATES.get(part, SIDECAR_LEARNING_RATE), 0.0 if part == "base_delta" else WEIGHT_DECAY
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        by_setting.setdefault(setting, []).extend(trained)
    return [
        {"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in by_setting.items() if params
    ]


def require_phase(config: RecursiveConfig) -> None:
    """Raises `CannotTrain` where nothing is to be trained."""
    if not config.recursive_enabled:
        raise CannotTrain("recursive_enabled is false: there is no sidecar to train; set it to true")
    if config.phase == "none":
        raise CannotTrain(
            'phase is "none", in which nothing is trained; set phase to "a" (the sidecar), or take the preset '
            "recursive_phase_a"
        )
    weights = EXACT_LOSS_WEIGHTS if config.commit_mode == "exact" else REFINED_LOSS_WEIGHTS
    if not any(getattr(config, name) for name in weights):
        raise CannotTrain(f"nothing can be learned with {' = '.join(weights)} = 0; give one of them a weight")
    if config.chunk_width == 1:
        raise CannotTrain(
            "chunk_width is 1, and a chunk's first token is never drafted or refined; set it to 2 or more"
        )
    if config.cache_reset_policy == "keep_all":
        raise CannotTrain(
            "cache_reset_policy keep_all is an ablation of generation: passes in training start from the prefix alone; "
            "set it to keep_kda_recurrent_reset_mla"
        )


def prepare(batch: Batch, config: RecursiveConfig, backbone: Backbone, progress: Progress) -> ChunkBatch:
    """The batch with chunks drawn in it."""
    require_phase(config)
    refines = config.commit_mode == "refined"
    context = backbone.context_length
    return draw_rows(
        batch,
        config,
        progress,
        vocab_size=backbone.vocab_size,
        least_anchor=training_refined.LEAST_ANCHOR if refines else training_exact.LEAST_ANCHOR,
        # [Z] stands behind a chunk.
        num_places=None if context is None else context - int(refines and config.use_latent_token),
    )


def drawn(batch: Batch) -> ChunkBatch:
    """The batch as `prepare` made it."""
    if not isinstance(batch, ChunkBatch):
        raise DeepenError("a training step takes a batch with chunks drawn in it, as prepare() makes it")
    return batch


def count(batch: ChunkBatch) -> dict[Unit, int]:
    """What the losses are summed over."""
    return {"token": batch.num_targets, "masked": batch.num_masked, "chunk": batch.num_chunks}


def step(
    backbone: Backbone, sidecar: Sidecar, config: RecursiveConfig, batch: ChunkBatch, trained: list[nn.Parameter]
) -> StepOutput:
    """Loss sums over the chunks; zeros, with a gradient of zeros, where there is no chunk."""
    make = _step_of(config)
    if batch.num_chunks:
        return make(backbone, sidecar, config, batch)
    nothing = sum((0.0 * parameter.sum() for parameter in trained), start=torch.zeros((), device=backbone.device))
    return _of_no_chunk(config, nothing)


def _step_of(config: RecursiveConfig) -> Callable[[Backbone, Sidecar, RecursiveConfig, ChunkBatch], StepOutput]:
    if config.commit_mode == "refined":
        return training_refined.refined_step
    return training_exact.shallow_step if config.resolved_draft == "shallow" else training_exact.exact_step


def _of_no_chunk(config: RecursiveConfig, nothing: Tensor) -> StepOutput:
    """The same names, units and weights as of any step, since parts of a step are summed by name."""
    if config.commit_mode == "refined":
        terms, names = training_refined.terms, training_refined.weights(config)
        metrics = training_refined.metric_names(config)
    else:
        terms, names = training_exact.terms, training_exact.weights(config)
        metrics = training_exact.metric_names(config.chunk_width)
    return StepOutput(
        losses=terms(dict.fromkeys(names, nothing), config), metrics={name: Mean(0.0, 0.0) for name in metrics}
    )
