"""Steps that keep no activations: the layers run again in the backward, where no pass lasts any more."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from deepen.backbones import tiny
from deepen.data.batches import batch_of
from deepen.methods.chunk.model import ChunkRefineWrapper
from deepen.train.config import RunConfig
from deepen.train.module import StepModule
from deepen.train.optim import freeze_base, make_optimizers
from deepen.train.run import train
from deepen.train.step import StepReport, Steps

SIZES = {"chunk_width": 6, "max_chunk_len": 8, "d_state": 16, "gate_hidden": 32, "max_inner_steps": 2}
ROWS = [list(range(5, 26)), [7, 1, 9, 9, 2, 200, 31, 4, 250, 11]]
TRAINED = [("exact", "a"), ("exact", "b"), *(("refined", phase) for phase in ("a", "b", "c", "c behind b"))]


class CountedRuns:
    """How often the layers of a model run."""

    def __init__(self, model: ChunkRefineWrapper) -> None:
        self.number = 0
        for layer in model.backbone.layers:
            next(layer.children()).register_forward_pre_hook(self._count)

    def _count(self, *call: object) -> None:
        self.number += 1


def first_step(name: str, mode: str, phase: str, *, recompute: bool) -> tuple[StepReport, dict[str, Tensor], int]:
    """What it says, its gradients, and how often layers ran in it; all of the sidecar is noise."""
    torch.manual_seed(0)
    base = tiny.build(name).eval()
    fields = {"recursive_enabled": True, "commit_mode": mode, "anchors_per_text": 3, **SIZES}
    model = ChunkRefineWrapper(base, phase=phase[0], **fields)
    if phase == "c behind b":
        model.load_saved_state(ChunkRefineWrapper(base, phase="b", **fields).saved_state())
    with torch.no_grad():
        for key, tensor in model.saved_state().items():
            tensor.add_(torch.randn(tensor.shape) * (0.02 if key.startswith("base_delta") else 0.2))
    freeze_base(model, base)
    module = StepModule(model, base)
    if recompute:
        module.checkpoint_activations()
    counted = CountedRuns(model)
    report = Steps(module, make_optimizers(model, base), lambda _: batch_of(ROWS), num_steps=3).take(0)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    return report, {key: each.grad for key, each in module.trained_parameters().items()}, counted.number


@pytest.mark.parametrize(("mode", "phase"), TRAINED)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_step_is_that_of_kept_activations_bit_for_bit(name, mode, phase):
    plain, expected, num_runs = first_step(name, mode, phase, recompute=False)
    again, found, num_runs_again = first_step(name, mode, phase, recompute=True)
    assert again == plain  # the work too: the ledger counts no second forward
    assert num_runs_again > num_runs
    assert found.keys() == expected.keys() and any(gradient.abs().max() > 0 for gradient in expected.values())
    for key, gradient in expected.items():
        assert torch.equal(found[key], gradient), key
    if "b" in phase:
        assert all(gradient.abs().max() > 0 for key, gradient in expected.items() if "lora" in key)


@pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next"])
def test_a_run_that_goes_on_is_the_whole_one(name, tmp_path):
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"less is more, {n} times" for n in range(30)))
    fields = {"recursive_enabled": True, "phase": "a", **SIZES}

    def end(folder: str, **settings: Any) -> dict[str, Tensor]:
        run = RunConfig(
            model=f"tiny:{name}", method="chunk", config=fields, data=str(tmp_path / "corpus.txt"),
            output_dir=str(tmp_path / folder), num_steps=2, batch_size=2, max_length=24, save_interval=1, **settings,
        )  # fmt: skip
        return load_file(train(run, show=lambda line: None) / "sidecar.safetensors")

    plain = end("plain")
    whole = end("whole", recompute=True)
    rest = end("rest", recompute=True, branch_from=str(tmp_path / "whole" / "step_1"))
    assert plain.keys() == whole.keys() == rest.keys()
    assert all(torch.equal(whole[key], tensor) and torch.equal(rest[key], tensor) for key, tensor in plain.items())
