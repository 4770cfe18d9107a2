"""What a training step of the sidecar is said to cost, against what torch counts, in both modes and on every base."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from deepen.backbones import hf, tiny
from deepen.backbones.cache import PrefixCache, RecurrentPrefix
from deepen.backbones.costs import pass_costs
from deepen.backbones.kept_outputs import KeptOutputs
from deepen.check.counted import counted_flops, passes_of
from deepen.core.types import Batch, Progress
from deepen.data.batches import batch_of
from deepen.methods.chunk import work
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.model import ChunkRefineWrapper
from deepen.nn import kda
from deepen.train.optim import freeze_base

SETTINGS: list[dict[str, Any]] = [
    {"commit_mode": "exact"},
    {"commit_mode": "exact", "phase": "b"},
    {"commit_mode": "exact", "draft": "shallow", "drafter_hidden": 24, "draft_vocab": 200},
    {"commit_mode": "exact", "draft": "shallow", "drafter_hidden": 24, "keep_outputs": True},
    {"commit_mode": "exact", "pooling": "chunk", "share_cells": False},
    {"commit_mode": "refined"},
    {"commit_mode": "refined", "phase": "b"},
    {"commit_mode": "refined", "phase": "c"},
    {"commit_mode": "refined", "use_latent_token": False},
    {"commit_mode": "refined", "grad_passes": 2, "share_cells": False},
    {"commit_mode": "refined", "lambda_masked": 0.0, "draft": "mask"},
    {"commit_mode": "refined", "carry_state": True},
    {"commit_mode": "refined", "max_inner_steps": 1},
    {"commit_mode": "refined", "max_inner_steps": 1, "carry_state": True},
    {"commit_mode": "refined", "grad_passes": 4},
    {"commit_mode": "refined", "grad_passes": 2, "carry_state": True},
]
NUM_BEFORE = 3
"""Inputs of a short convolution that stand before those of a pass."""


@pytest.fixture(autouse=True)
def recurrent_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delta attention runs token by token, as it is counted; making a state after some of them isn't counted."""
    monkeypatch.setattr(kda, "RECURRENT_WIDTH", 10**6)
    own = PrefixCache.states_after

    def states_after(self: PrefixCache, counts: Sequence[int]) -> tuple[RecurrentPrefix, ...]:
        with _disable_current_modes():
            return own(self, counts)

    monkeypatch.setattr(PrefixCache, "states_after", states_after)


def wrapper(name: str, **settings: Any) -> ChunkRefineWrapper:
    torch.manual_seed(0)
    base = tiny.build(name).eval()
    base.generation_config.eos_token_id = None  # a draft is counted to the end of its chunk
    sizes = {"chunk_width": 6, "max_chunk_len": 8, "d_state": 16, "gate_hidden": 32, "max_inner_steps": 3}
    shape = {"anchors_per_text": 3, "layers_to_refine": (1, 2), "phase": "a"}
    fields = {"recursive_enabled": True, **sizes, **shape, **settings}
    model = ChunkRefineWrapper(base, RecursiveConfig(**fields))
    freeze_base(model, base)
    return model


def some_batch(model: ChunkRefineWrapper) -> Batch:
    torch.manual_seed(0)
    texts = [torch.randint(0, 256, (length,)).tolist() for length in (20, 13)]
    return model.prepare(batch_of(texts), Progress(0, 10))


def step(model: ChunkRefineWrapper, batch: Batch) -> None:
    output = model.train_step(batch, model.begin(batch), Progress(0, 10))
    torch.stack([term.total for term in output.losses.values()]).sum().backward()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing was kept yet, and nothing is compared, which is done once in a run and isn't counted."""
    monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path))
    monkeypatch.setattr(KeptOutputs, "_compare", lambda *_: None)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_step_costs_what_is_told(name: str, settings: dict[str, Any]) -> None:
    check_costs(wrapper(name, **settings))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_step_costs_what_is_told_with_lora_and_tuned_layers(name: str) -> None:
    model = wrapper(name, commit_mode="refined", phase="c")
    model.load_saved_state(wrapper(name, commit_mode="refined", phase="b").saved_state())
    freeze_base(model, model.base)
    check_costs(model)


def check_costs(model: ChunkRefineWrapper) -> None:
    """What is told of a step is what torch counts."""
    batch, costs = some_batch(model), pass_costs(model.backbone)
    told = model.step_work(batch)
    with passes_of(model.backbone) as passes:
        counted = counted_flops(lambda: step(model, batch), positions_before=NUM_BEFORE)
    hidden = sum(ran.flops_computed(model.backbone, costs) - ran.flops_told(costs) for ran in passes)
    assert counted - hidden == told.flops


def test_a_walk_in_several_passes_costs_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (hf, work):
        monkeypatch.setattr(module, "WALK_WIDTH", 4)
    for name in ("llama", "kimi_linear"):
        test_a_step_costs_what_is_told(name, {"commit_mode": "exact"})


def test_a_step_without_chunks_costs_nothing() -> None:
    for mode in ("exact", "refined"):
        model = wrapper("llama", commit_mode=mode)
        batch = model.prepare(batch_of([[5], [6]]), Progress(0, 10))
        assert model.step_work(batch).flops == 0
