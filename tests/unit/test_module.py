"""What is put around a model's step changes nothing in it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import deepen.methods
from deepen.core.errors import CannotTrain, ConfigError, DeepenError
from deepen.core.types import Batch, LossTerm, Progress, StepOutput
from deepen.data.batches import batch_of
from deepen.train.config import RunConfig
from deepen.train.module import StepModule
from deepen.train.precision import autocast_dtype
from deepen.train.run import train

DROPPED_IN = Path(__file__).parents[1] / "contract" / "dropped_in"


class Stack(nn.Module):
    """Units that count how often they run."""

    backbone = None

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.units = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh()) for _ in range(3))
        self.num_runs = 0
        for unit in self.units:
            unit[0].register_forward_hook(self._count)

    def _count(self, *call: object) -> None:
        self.num_runs += 1

    def train_step(self, batch: Batch, carry: None, progress: Progress) -> StepOutput:
        hidden = batch.input_ids.float()
        for unit in self.units:
            hidden = unit(hidden)
        return StepOutput({"size": LossTerm(hidden.square().sum(), "sequence")})

    def shard_units(self) -> list[nn.Module]:
        return list(self.units)


def gradients(module: StepModule) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    output = module(batch_of([[1, 2, 3, 4], [2, 0, 1, 1]]), None, Progress(0, 1))
    output.losses["size"].total.backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


class TestRecompute:
    def test_gradients_are_the_same_bit_for_bit_and_units_run_twice(self):
        plain, saving = StepModule(Stack(), None), StepModule(Stack(), None)
        saving.checkpoint_activations()
        expected, found = gradients(plain), gradients(saving)
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
        assert (plain.model.num_runs, saving.model.num_runs) == (3, 6)

    def test_without_gradients_nothing_runs_twice(self):
        saving = StepModule(Stack(), None)
        saving.checkpoint_activations()
        with torch.no_grad():
            saving(batch_of([[1, 2, 3, 4]]), None, Progress(0, 1))
        assert saving.model.num_runs == 3


class TestBuffers:
    def test_those_that_a_checkpoint_keeps_are_the_methods_own(self):
        stack = Stack()
        stack.register_buffer("threshold", torch.zeros(2))
        stack.register_buffer("scratch", torch.zeros(2), persistent=False)
        stack.base = nn.BatchNorm1d(3)
        assert set(StepModule(stack, stack.base).own_buffers()) == {"model.threshold"}


class TestPrecision:
    def test_float32_is_no_autocast(self):
        assert autocast_dtype("float32", torch.device("cpu")) is None

    def test_a_cpu_without_the_instructions_is_told(self, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
        with pytest.raises(ConfigError, match="precision is bfloat16, which cpu has no instructions for"):
            autocast_dtype("bfloat16", torch.device("cpu"))
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
        assert autocast_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16


@pytest.fixture
def run_config(tmp_path, monkeypatch) -> RunConfig:
    monkeypatch.setattr(deepen.methods, "__path__", [*deepen.methods.__path__, str(DROPPED_IN)])
    (tmp_path / "corpus.txt").write_text("one two three four\n\n" * 30)
    texts = [f"{n} and {n + 1} are {2 * n + 1}" for n in range(30)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return RunConfig(
        model="tiny:llama", method="toy", data=str(tmp_path / "corpus.jsonl"), output_dir=str(tmp_path / "run"),
        num_steps=3, batch_size=4, max_length=24, log_interval=1,
    )  # fmt: skip


def losses(config: RunConfig) -> list[float]:
    train(config, show=lambda line: None)
    lines = (Path(config.output_dir) / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss/total"] for line in lines]


class TestRun:
    def test_recomputing_changes_no_loss(self, run_config, tmp_path):
        other = replace(run_config, recompute=True, output_dir=str(tmp_path / "other"))
        assert losses(other) == losses(run_config)

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
    @pytest.mark.parametrize("recompute", [False, True])
    def test_compiling_changes_losses_by_rounding_alone(self, run_config, recompute, tmp_path):
        config = replace(run_config, method="dense")
        other = replace(config, compile=True, recompute=recompute, output_dir=str(tmp_path / "other"))
        assert losses(other) == pytest.approx(losses(config), rel=1e-5)

    def test_memory_that_runs_out_in_compiled_layers_is_told_as_such(self, run_config, monkeypatch):
        def full(unit: nn.Module) -> None:
            def fail(*args: object, **kwargs: object) -> None:
                raise torch.OutOfMemoryError("no memory left")

            unit.forward = fail

        monkeypatch.setattr(nn.Module, "compile", full)
        with pytest.raises(DeepenError, match=r"out of memory on cpu at step 1 of \d+: raise num_micro_batches"):
            losses(replace(run_config, compile=True))

    def test_layers_that_cannot_be_compiled_are_told(self, run_config, monkeypatch):
        """Those of a method whose steps go through a cache, in torch 2.13; here any failure stands for theirs."""

        def failing(unit: nn.Module) -> None:
            def fail(*args: object, **kwargs: object) -> None:
                raise AssertionError("incorrect out shape")

            unit.forward = fail

        monkeypatch.setattr(nn.Module, "compile", failing)
        with pytest.raises(
            CannotTrain, match=r"compile is true, .*AssertionError: incorrect out shape.*set it to false"
        ):
            losses(replace(run_config, compile=True))

    @pytest.mark.parametrize("budget", ["num_tokens", "flops"])
    def test_a_budget_lays_out_the_steps(self, run_config, budget, tmp_path):
        """As many whole steps as it pays for, by the ledger of the run itself."""
        amount = {"num_tokens": 700, "flops": 2e9}[budget]
        config = replace(run_config, num_steps=None, cut="packed", output_dir=str(tmp_path / "budget"))
        num_steps = len(losses(replace(config, **{budget: amount})))
        folder = tmp_path / "budget" / f"step_{num_steps}"
        ledger = json.loads((folder / "ledger.json").read_text())
        spent = ledger["tokens"] if budget == "num_tokens" else ledger["training_flops"]
        of_step = spent / num_steps
        assert num_steps > 3 and abs(spent - amount) <= 1.1 * of_step
