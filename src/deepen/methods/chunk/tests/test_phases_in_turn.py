"""One phase after the other on the same sidecar, and what a folder of a later one is for an earlier one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepen.checkpoint import open_model
from deepen.core.errors import CannotTrain, CheckpointError
from deepen.data.batches import batch_of
from deepen.train.config import RunConfig
from deepen.train.run import train

SHAPE = {"d_state": 8, "gate_hidden": 16, "max_inner_steps": 2, "chunk_width": 6, "lora_rank": 2}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    place = tmp_path_factory.mktemp("phases")
    texts = (f"{n} apples and {3 * n % 11} pears are {n + 3 * n % 11} fruits." for n in range(120))
    (place / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = {"recursive_enabled": True, "commit_mode": "refined", "phase": "a", **SHAPE}
    return RunConfig(
        model="tiny:llama", method="chunk", config=config, num_steps=2, batch_size=4, max_length=40, log_interval=1,
        data=str(place / "corpus.jsonl"), output_dir=str(place / "a"),
    )  # fmt: skip


def gone_on(config: RunConfig, folder: Path, phase: str, **fields: Any) -> tuple[Path, str]:
    """What this phase makes of a folder, and what it says it trains."""
    shown: list[str] = []
    out = Path(config.output_dir).parent / f"{folder.parent.name}{phase}"
    run = replace(
        config, model=str(folder), method=None, config=None, overrides={"phase": phase}, output_dir=str(out), **fields
    )
    return train(run, show=shown.append), shown[0]


def tensors(folder: Path, part: str = "") -> dict[str, torch.Tensor]:
    return {name: each for name, each in load_file(folder / "sidecar.safetensors").items() if name.startswith(part)}


@pytest.fixture(scope="module")
def folders(first: RunConfig) -> dict[str, Path]:
    """Of phases a, b and c, each begun from the one before."""
    a = train(first, show=lambda line: None)
    b, _ = gone_on(first, a, "b")
    c, said = gone_on(first, b, "c")
    assert "lora" in said and "tuned" in said
    return {"a": a, "b": b, "c": c}


def test_phase_c_goes_on_with_what_phase_b_has_learned(folders):
    before, after = tensors(folders["b"], "lora."), tensors(folders["c"], "lora.")
    assert before.keys() == after.keys() and before
    # Two steps at 1e-5 move what was learned a little, and something of it.
    steps = [float((after[name] - tensor).abs().max()) for name, tensor in before.items()]
    assert 0 < max(steps) < 1e-3
    assert tensors(folders["c"], "base_delta.")


def test_a_run_from_phase_b_that_was_cut_off_goes_on(first, folders, tmp_path):
    longer = replace(first, output_dir=str(tmp_path / "run"), num_steps=4, save_interval=2)
    whole, _ = gone_on(longer, folders["b"], "c")
    expected = (whole / "sidecar.safetensors").read_bytes()
    shutil.rmtree(whole)
    again, _ = gone_on(longer, folders["b"], "c")
    assert again == whole and (again / "sidecar.safetensors").read_bytes() == expected


def with_settings(folder: Path, to: Path, **fields: Any) -> Path:
    """A copy of a folder whose configuration says otherwise."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("checksums.json", "training"))
    path = to / "recursive_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return to


@pytest.mark.parametrize("phase", ["b", "c"])
def test_without_a_phase_all_is_used_and_nothing_trains(folders, phase, tmp_path):
    ids = torch.arange(30)[None] % 200
    trained = open_model(str(folders[phase])).model
    used = open_model(str(with_settings(folders[phase], tmp_path / "used", phase="none"))).model
    assert trained.optim_groups() and not used.optim_groups()
    assert used.saved_state().keys() == trained.saved_state().keys()
    assert torch.equal(used.generate_chunks(ids, 12), trained.generate_chunks(ids, 12))
    batch = batch_of(ids.tolist())
    assert torch.equal(used.score(batch).log_probs, trained.score(batch).log_probs)


@pytest.mark.parametrize(
    ("phase", "onto", "message"),
    [
        ("b", {"phase": "a"}, 'holds LoRA of phase b, and phase "a" is without it; set phase to "b" or "c"'),
        ("c", {"phase": "a"}, 'that phase c has tuned, and phase "a" .* set phase to "c" to train on, or to "none"'),
        ("c", {"phase": "b"}, 'that phase c has tuned, and phase "b"'),
        ("c", {"phase": "none", "commit_mode": "exact"}, 'in commit_mode "exact" is without them'),
    ],
)
def test_what_would_be_left_out_is_told(folders, phase, onto, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        open_model(str(with_settings(folders[phase], tmp_path / "other", **onto)))


def test_a_run_that_would_leave_something_out_is_told(first, folders):
    with pytest.raises(CheckpointError, match='phase "a" is without it'):
        gone_on(first, folders["b"], "a")


def test_exact_mode_keeps_its_lora_and_says_what_the_base_says(first, tmp_path):
    config = {**first.config, "commit_mode": "exact", "draft": "mask", "phase": "b"}
    folder = train(replace(first, config=config, output_dir=str(tmp_path / "exact")), show=lambda line: None)
    model = open_model(str(with_settings(folder, tmp_path / "used", phase="none"))).model
    assert model.lora is not None and not model.optim_groups()
    written = model.generate_chunks(torch.arange(30)[None] % 200, 20, eos_token_id=None)
    said = open_model("tiny:llama").backbone.model(written).logits.argmax(dim=-1)
    assert torch.equal(said[0, 29:-1], written[0, 30:]) and written.shape == (1, 50)


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        ("exact", {"lambda_distill": 0.0}),
        ("refined", dict.fromkeys(("lambda_final", "lambda_masked", "lambda_halt", "lambda_len"), 0.0)
         | {"lambda_ponder": 0.0, "lambda_stability": 0.0}),
    ],
)  # fmt: skip
def test_a_run_without_a_loss_is_refused(first, mode, weights, tmp_path):
    config = {**first.config, "commit_mode": mode, **weights}
    with pytest.raises(CannotTrain, match=r"nothing can be learned with lambda_.* = 0; give one of them a weight"):
        train(replace(first, config=config, output_dir=str(tmp_path / "run")), show=lambda line: None)
