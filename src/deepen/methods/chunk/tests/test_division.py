"""How a step is divided into micro-batches moves no loss and no gradient, whatever rows each of them gets."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deepen.backbones import tiny
from deepen.data.batches import batch_of
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.model import ChunkRefineWrapper
from deepen.train.module import StepModule
from deepen.train.optim import freeze_base, make_optimizers
from deepen.train.step import StepReport, Steps

SIZES = {"chunk_width": 6, "max_chunk_len": 8, "d_state": 16, "gate_hidden": 32, "max_inner_steps": 3}

STEPS: dict[str, dict[str, Any]] = {
    "exact": {"commit_mode": "exact", "lambda_distill": 0.3},
    "refined": {"commit_mode": "refined"},
    "soft tokens": {"commit_mode": "refined", "use_soft_tokens": True},
    "states carried on": {"commit_mode": "refined", "carry_state": True},
    "phase c": {"commit_mode": "refined", "phase": "c"},
}

# The last text has no room for a chunk, so a part that holds it alone has none.
TEXTS = {"chunks in every part": (21, 15, 33), "no chunk in the last part": (21, 15, 2)}


def step_of(settings: dict[str, Any], lengths: tuple[int, ...], num_parts: int) -> tuple[StepReport, dict[str, Tensor]]:
    """One step on a base of its own, whose sidecar is noise, and the gradients it has made."""
    torch.manual_seed(0)
    base = tiny.build("llama").double().eval()
    fields = {"recursive_enabled": True, "phase": "a", "anchors_per_text": 3, **SIZES, **settings}
    model = ChunkRefineWrapper(base, RecursiveConfig(**fields))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.saved_state().values():
            if tensor.is_floating_point():
                tensor.add_(torch.randn(tensor.shape, generator=source, dtype=tensor.dtype) * 0.1)
    freeze_base(model, base)
    rows = [torch.randint(0, 256, (length,), generator=source).tolist() for length in lengths]
    steps = Steps(
        StepModule(model, base),
        make_optimizers(model, base, learning_rate=0.0),
        lambda index: batch_of(rows),
        num_steps=1,
        num_micro_batches=num_parts,
    )
    report = steps.take(0)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return report, {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.parametrize("lengths", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
def test_a_step_in_parts_is_the_whole_step(settings, lengths):
    whole, expected = step_of(settings, lengths, 1)
    parts, found = step_of(settings, lengths, len(lengths))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6)
    assert parts.total == pytest.approx(whole.total, rel=1e-6)
    assert parts.metrics == pytest.approx(whole.metrics, nan_ok=True)
    assert found.keys() == expected.keys() and len(found) > 5
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= 1e-6 * max(1.0, float(gradient.abs().max()))


def test_soft_tokens_take_part():
    """Otherwise the case above would be that of the drafts' own tokens."""
    hard, _ = step_of(STEPS["refined"], TEXTS["chunks in every part"], 1)
    soft, _ = step_of(STEPS["soft tokens"], TEXTS["chunks in every part"], 1)
    assert soft.losses["final_ce"] != pytest.approx(hard.losses["final_ce"], rel=1e-6)
