"""What a run of `dense` leaves behind and watches on the way: whole models, LoRA, validation, samples, TensorBoard."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deepen.checkpoint import open_model
from deepen.core.errors import ConfigError, DeepenError
from deepen.core.types import Progress
from deepen.methods.dense.config import DenseConfig
from deepen.methods.dense.model import DenseModel
from deepen.train import run
from deepen.train.config import RunConfig
from deepen.train.folder import checkpoints_in
from deepen.train.guard import Diverged, GuardConfig
from deepen.train.run import train
from deepen.train.validation import Validation


@pytest.fixture
def run_config(tmp_path) -> RunConfig:
    texts = [f"Line {n}: {n} boats lie at {n % 5} bridges, and the lamp of boat {n} is lit again." for n in range(120)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return RunConfig(
        model="tiny:llama", method="dense", config="full", data=str(tmp_path / "corpus.jsonl"),
        output_dir=str(tmp_path / "run"), num_steps=6, batch_size=4, max_length=64, log_interval=2, learning_rate=2e-3,
    )  # fmt: skip


def silent(line: str) -> None:
    pass


def logged(config: RunConfig) -> list[dict]:
    lines = (Path(config.output_dir) / "train.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


class TestWholeModel:
    def test_it_is_a_plain_model_that_goes_on_being_trained(self, run_config, tmp_path):
        folder = train(replace(run_config, save_interval=3), show=silent)
        opened = open_model(str(folder))
        assert opened.method is None
        held = load_file(next((folder / "training").glob("shard-*.safetensors")))
        for name, parameter in opened.backbone.model.named_parameters():
            assert torch.equal(parameter, held[f"parameter.model.base.{name}"])
        start = open_model("tiny:llama").backbone.model
        assert not torch.equal(start.lm_head.weight, opened.backbone.model.lm_head.weight)
        again = train(replace(run_config, model=str(folder), output_dir=str(tmp_path / "again")), show=silent)
        assert (
            logged(replace(run_config, output_dir=str(again.parent)))[-1]["train/loss/total"]
            < (logged(run_config)[0]["train/loss/total"])
        )

    def test_it_resumes_from_where_its_training_was(self, run_config, tmp_path):
        whole = train(replace(run_config, save_interval=3, output_dir=str(tmp_path / "whole")), show=silent)
        part = replace(run_config, save_interval=3, num_steps=3, output_dir=str(tmp_path / "part"))
        train(part, show=silent)
        rest = replace(run_config, branch_from=str(tmp_path / "part" / "step_3"), output_dir=str(tmp_path / "rest"))
        end = train(rest, show=silent)
        assert (end / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()

    def test_averages_are_what_is_saved_and_measured(self, run_config):
        config = replace(run_config, average_decay=0.5, eval_interval=6, eval_tokens=300)
        folder = train(config, show=silent)
        held = load_file(next((folder / "training").glob("shard-*.safetensors")))
        head = open_model(str(folder)).backbone.model.lm_head.weight
        assert torch.equal(head, held["average.model.base.lm_head.weight"])
        assert not torch.equal(head, held["parameter.model.base.lm_head.weight"])
        last = logged(config)[-1]["evaluation/validation/loss"]
        assert last == pytest.approx(validation_loss(folder, config), rel=1e-5)


def validation_loss(folder: Path, config: RunConfig) -> float:
    """Of the saved model, by a validation of its own."""
    opened = open_model(str(folder))
    model = DenseModel.build(DenseConfig(), opened.backbone, opened.backbone.vocab_size)
    validation = Validation(
        model, opened.tokenizer, config.data, max_length=config.max_length, max_tokens=config.eval_tokens
    )
    return validation.measure(Progress(0, 1))["evaluation/validation/loss"]


class TestWatching:
    def test_validation_samples_and_histograms_are_written(self, run_config):
        config = replace(run_config, eval_interval=3, eval_tokens=400, num_samples=1, sample_tokens=8, tensorboard=True)
        train(config, show=silent)
        folder = Path(config.output_dir)
        lines = {line["step"]: line for line in logged(config)}
        assert set(lines) == {1, 2, 3, 4, 6}
        evaluated = {step for step, line in lines.items() if "evaluation/validation/bits_per_byte" in line}
        assert evaluated == {3, 6}
        assert lines[6]["evaluation/validation/loss"] < lines[3]["evaluation/validation/loss"]
        samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert [sample["step"] for sample in samples] == [3, 6] and all(len(s["tokens"]) == 8 for s in samples)
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
        events.Reload()
        tags = events.Tags()
        known = {"train/loss/total", "train/loss/final_ce", "train/learning_rate", "train/performance/steps_per_sec"}
        assert known | {"train/performance/tokens_per_sec", "train/performance/memory_mb"} <= set(tags["scalars"])
        assert [event.step for event in events.Scalars("evaluation/validation/perplexity")] == [3, 6]
        assert "parameters/model.base.lm_head.weight" in tags["histograms"]

    def test_looking_leaves_no_trace(self, run_config, tmp_path):
        looking = replace(
            run_config, eval_interval=2, eval_tokens=300, num_samples=1, sample_tokens=4,
            output_dir=str(tmp_path / "two"), log_interval=1,
        )  # fmt: skip
        ends = [train(config, show=silent) / "model.safetensors" for config in (run_config, looking)]
        assert ends[0].read_bytes() == ends[1].read_bytes()

    def test_the_figures_are_told_as_they_are_written(self, run_config):
        config, lines = replace(run_config, eval_interval=3, eval_tokens=300), []
        train(config, show=lines.append)
        written = {line["step"]: line.get("evaluation/validation/bits_per_byte") for line in logged(config)}
        told = [line for line in lines if "validation: loss" in line]
        assert [line.split("  ")[0] for line in told] == ["step 3/6", "step 6/6"]
        assert all(f"bits_per_byte {written[step]:.4f}" in line for step, line in zip((3, 6), told, strict=True))

    def test_samples_without_an_interval_are_told(self, run_config):
        with pytest.raises(ConfigError, match="samples are drawn every eval_interval steps, which is not given"):
            train(replace(run_config, num_samples=1), show=silent)


def guard_of_two_steps(factor: float) -> GuardConfig:
    return GuardConfig(window=2, factor=factor)


class TestDivergence:
    def test_the_last_checkpoint_before_it_stays(self, run_config, monkeypatch):
        """The rate is a thousand times too high, and the guard looks at few steps."""
        monkeypatch.setattr(run, "GuardConfig", guard_of_two_steps)
        config = replace(run_config, num_steps=40, learning_rate=3.0, grad_clip=None, save_interval=2)
        with pytest.raises(Diverged, match=r"the loss has diverged: .*; the last checkpoint before it is .*step_"):
            train(config, show=silent)
        kept = checkpoints_in(Path(config.output_dir))
        assert kept and open_model(str(kept[0])).backbone.num_parameters > 0

    def test_null_lets_it_go_on(self, run_config, monkeypatch):
        monkeypatch.setattr(run, "GuardConfig", guard_of_two_steps)
        train(replace(run_config, learning_rate=3.0, grad_clip=None, divergence_factor=None), show=silent)


class TestMemory:
    """Main memory runs out by itself: what is asked for is more than there is."""

    def spoil(self, monkeypatch: pytest.MonkeyPatch, *, step: int, error: Exception | None = None) -> None:
        original = DenseModel.train_step

        def spoiled(self, batch, carry, progress):
            if progress.step + 1 == step:
                if error is not None:
                    raise error
                torch.empty(2**60, dtype=torch.uint8)
            return original(self, batch, carry, progress)

        monkeypatch.setattr(DenseModel, "train_step", spoiled)

    @pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory")])
    def test_the_ways_out_are_told_with_their_values(self, run_config, monkeypatch, error):
        self.spoil(monkeypatch, step=3, error=error)
        told = (
            r"out of memory on cpu at step 3 of 6: raise num_micro_batches \(1\), .* lower batch_size \(4\) or "
            r"max_length \(64\), or set recompute \(false\) to true; the last checkpoint before it is .*step_2$"
        )
        with pytest.raises(DeepenError, match=told):
            train(replace(run_config, save_interval=2), show=silent)

    def test_what_is_used_already_is_no_way_out(self, run_config, monkeypatch):
        self.spoil(monkeypatch, step=1)
        with pytest.raises(DeepenError, match=r"max_length \(64\); no checkpoint was made before it$"):
            train(replace(run_config, recompute=True), show=silent)

    def test_another_failure_stays_what_it_is(self, run_config, monkeypatch):
        self.spoil(monkeypatch, step=1, error=RuntimeError("something else"))
        with pytest.raises(RuntimeError, match=r"^something else$"):
            train(run_config, show=silent)


class TestLora:
    def test_it_goes_on_exactly(self, run_config, tmp_path):
        config = replace(run_config, config={"trains": "lora", "lora_dropout": 0.1}, recompute=True, save_interval=3)
        whole = train(replace(config, output_dir=str(tmp_path / "whole")), show=silent)
        train(replace(config, num_steps=3, output_dir=str(tmp_path / "part")), show=silent)
        branch = replace(config, branch_from=str(tmp_path / "part" / "step_3"))
        end = train(branch, show=silent)
        ends = [load_file(folder / "weights.safetensors") for folder in (whole, end)]
        assert ends[0].keys() == ends[1].keys() and len(ends[0]) > 20
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())

    def test_recomputing_changes_nothing(self, run_config, tmp_path):
        config = replace(run_config, config={"trains": "lora", "lora_dropout": 0.1})
        other = replace(config, recompute=True, output_dir=str(tmp_path / "other"))
        ends = [load_file(train(each, show=silent) / "weights.safetensors") for each in (config, other)]
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
