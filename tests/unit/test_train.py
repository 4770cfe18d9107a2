"""A training run against a plain loop, and what it refuses."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deepen.methods
from deepen.backbones.identity import fingerprint
from deepen.checkpoint import open_model
from deepen.cli import train as cli_train
from deepen.cli.main import main
from deepen.core.errors import CannotTrain, ConfigError, DeepenError
from deepen.core.method import RecursiveModel
from deepen.core.types import LossTerm, Mean, Progress, StepOutput, Work
from deepen.data.batches import batch_of
from deepen.data.loader import Loader
from deepen.train.config import RunConfig
from deepen.train.module import StepModule
from deepen.train.optim import make_optimizers
from deepen.train.run import rows_of_run, train
from deepen.train.step import NotFinite, Steps
from deepen.train.trainee import open_trainee

DROPPED_IN = Path(__file__).parents[1] / "contract" / "dropped_in"
ROWS = [[1, 5, 2], [3, 3], [4, 0, 1, 2, 5], [2, 4, 4, 1]]


class Bigram(nn.Module, RecursiveModel):
    """A model of the next token from the last one, with a second loss in another unit and a carry that counts."""

    promises_base = False

    def __init__(self, vocab_size: int = 6, spoil_step: int | None = None, spoiled: str = "loss") -> None:
        super().__init__()
        self.config = self.backbone = None
        self.table = nn.Parameter(torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(3)))
        self.spoil_step, self.spoiled = spoil_step, spoiled
        self.order: list[str] = []
        self.progress: list[Progress] = []
        self.carries: list[object] = []
        self.statistics: list[dict[str, torch.Tensor]] = []

    def begin(self, batch):
        return 0

    def prepare(self, batch, progress):
        self.order.append("prepare")
        return batch

    def count(self, batch):
        self.order.append("count")
        return {"token": int((batch.lengths - 1).sum()), "sequence": len(batch.lengths)}

    def train_step(self, batch, carry, progress):
        self.order.append("train_step")
        self.progress.append(progress)
        self.carries.append(carry)
        log_probs = self.table.log_softmax(dim=-1)[batch.input_ids[:, :-1]]
        picked = log_probs.gather(2, batch.input_ids[:, 1:, None])[..., 0]
        real = torch.arange(1, batch.input_ids.shape[1]) < batch.lengths[:, None]
        first = self.table[batch.input_ids[:, 0]].square().sum()
        if progress.step == self.spoil_step:
            # The square root of nothing has a finite value, and no finite slope.
            first = first * math.nan if self.spoiled == "loss" else first + (self.table * 0).sum().sqrt()
        losses = {"next": LossTerm(-(picked * real).sum(), "token"), "size": LossTerm(first, "sequence", weight=0.25)}
        rows = Mean(float(batch.lengths.sum()), len(batch.lengths))
        return StepOutput(losses, carry + 1, {"generation/tokens_of_row": rows}, {"lengths": batch.lengths.sum()})

    def step_work(self, batch):
        return Work(one_gradient=batch.input_ids.numel())

    def after_step(self, statistics):
        self.order.append("after_step")
        self.statistics.append(dict(statistics))

    def optim_groups(self):
        return [{"params": [self.table], "lr": 0.1, "weight_decay": 0.01}]


def plain_loss(table, rows):
    """The mean over tokens, and the mean over sequences times its weight, token by token."""
    log_probs = table.log_softmax(dim=-1)
    pairs = [(before, after) for row in rows for before, after in pairwise(row)]
    next_token = -sum(log_probs[before, after] for before, after in pairs) / len(pairs)
    size = sum(table[row[0]].square().sum() for row in rows) / len(rows)
    return next_token, size


def run(model, batches, *, num_steps, grad_clip=None, **options):
    batches = list(batches)
    optimizers = make_optimizers(model, None)
    steps = Steps(
        StepModule(model, None), optimizers, batches.__getitem__, num_steps=num_steps, grad_clip=grad_clip, **options
    )
    return [steps.take(index) for index in range(num_steps)]


class TestSteps:
    @given(
        st.lists(
            st.lists(st.lists(st.integers(0, 5), min_size=2, max_size=6), min_size=1, max_size=4),
            min_size=1,
            max_size=4,
        ),
        st.sampled_from([None, 0.05, 10.0]),
    )
    def test_they_are_those_of_a_plain_loop(self, batches, grad_clip):
        model = Bigram()
        table = nn.Parameter(model.table.detach().clone())
        optimizer = torch.optim.AdamW([table], lr=0.1, weight_decay=0.01)
        reports = run(model, map(batch_of, batches), num_steps=len(batches), grad_clip=grad_clip)
        for rows, report in zip(batches, reports, strict=True):
            next_token, size = plain_loss(table, rows)
            optimizer.zero_grad()
            (next_token + 0.25 * size).backward()
            norm = float(table.grad.norm())
            if grad_clip is not None and norm > grad_clip:
                table.grad *= grad_clip / norm
            optimizer.step()
            assert report.losses == pytest.approx({"next": next_token.item(), "size": size.item()}, rel=1e-5)
            assert report.total == pytest.approx((next_token + 0.25 * size).item(), rel=1e-5)
            assert report.gradient_norm == pytest.approx(norm, rel=1e-4)
            assert report.num_tokens == sum(map(len, rows))
            assert report.work == Work(one_gradient=len(rows) * max(map(len, rows)))
        # AdamW divides by the gradient's size, so a parameter it hardly touches carries rounding on.
        torch.testing.assert_close(model.table, table, rtol=1e-3, atol=1e-3)

    def test_members_are_called_in_order_and_the_carry_is_handed_on(self):
        model = Bigram()
        reports = run(model, [batch_of(ROWS)] * 3, num_steps=3)
        assert model.order == ["prepare", "count", "train_step", "after_step"] * 3
        assert model.carries == [0, 1, 2]
        assert model.progress == [Progress(0, 3), Progress(1, 3), Progress(2, 3)]
        assert [dict(given) for given in model.statistics] == [{"lengths": torch.tensor(14)}] * 3
        assert [report.metrics for report in reports] == [{"generation/tokens_of_row": 3.5}] * 3

    @pytest.mark.parametrize(
        ("spoiled", "message"),
        [
            ("loss", r'the loss "size" is nan at step 3 of 5; try a lower learning_rate'),
            ("gradient", r"the gradient's norm is (nan|inf) at step 3 of 5; try a lower learning_rate"),
        ],
    )
    def test_a_step_that_is_not_finite_is_not_made(self, spoiled, message):
        model, good = Bigram(spoil_step=2, spoiled=spoiled), Bigram()
        run(good, [batch_of(ROWS)] * 2, num_steps=2)
        with pytest.raises(NotFinite, match=message):
            run(model, [batch_of(ROWS)] * 5, num_steps=5)
        assert torch.equal(model.table, good.table)
        assert model.order.count("after_step") == 2

    @pytest.mark.parametrize("spoiled", ["loss", "gradient"])
    def test_what_is_carried_is_what_the_last_good_step_left(self, spoiled):
        model = Bigram(spoil_step=2, spoiled=spoiled)
        batches = [batch_of(ROWS)] * 5
        steps = Steps(StepModule(model, None), make_optimizers(model, None), batches.__getitem__, num_steps=5)
        for index in range(2):
            steps.take(index)
        with pytest.raises(NotFinite):
            steps.take(2)
        assert steps.carry == 2

    def test_a_unit_that_is_not_counted_is_told(self):
        model = Bigram()
        model.count = lambda batch: {"token": 3}
        with pytest.raises(DeepenError, match=r'the loss "size" is per sequence, but .* count\(\) gives token'):
            run(model, [batch_of(ROWS)], num_steps=1)

    def test_a_loss_that_weighs_otherwise_in_one_part_is_told(self):
        class Weighs(Bigram):
            def train_step(self, batch, carry, progress):
                output = super().train_step(batch, carry, progress)
                size = replace(output.losses["size"], weight=float(len(batch.lengths)))
                return replace(output, losses={**output.losses, "size": size})

        with pytest.raises(DeepenError, match=r'the loss "size" has weight 1.0 .* weight 2.0'):
            run(Weighs(), [batch_of(ROWS[:3])], num_steps=1, num_micro_batches=2)

    def test_a_unit_that_a_batch_lacks_adds_nothing(self):
        model = Bigram()
        (report,) = run(model, [batch_of([[1], [2]])], num_steps=1)
        assert float(report.losses["next"]) == 0.0 and float(report.losses["size"]) > 0.0

    def test_a_loss_that_nothing_trainable_moves_is_told(self):
        model = Bigram()
        optimizers = make_optimizers(model, None)
        model.table.requires_grad_(False)
        steps = Steps(StepModule(model, None), optimizers, [batch_of(ROWS)].__getitem__, num_steps=1)
        with pytest.raises(DeepenError, match="no loss depends on a trainable parameter"):
            steps.take(0)


class Grouped(nn.Module):
    """A base and three parameters of its own, in whatever groups."""

    def __init__(self, *groups: tuple[str, ...]) -> None:
        super().__init__()
        self.base = nn.Linear(2, 2)
        self.a, self.b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.stranger = [nn.Parameter(torch.zeros(5))]
        self.groups = groups

    def optim_groups(self):
        known = {**dict(self.named_parameters()), "stranger": self.stranger[0]}
        return [{"params": (known[name] for name in group), "lr": 0.1 * (1 + i)} for i, group in enumerate(self.groups)]


class TestOptimizer:
    @pytest.mark.parametrize(
        ("groups", "message"),
        [
            ([("a",)], "b is trainable but in no group"),
            ([("a", "b"), ("a",)], r"a is in groups 0 and 1 of optim_groups\(\)"),
            ([("a", "b", "b")], r"b is in groups 0 and 0 of optim_groups\(\)"),
            ([("a", "b", "stranger")], r"group 0 of optim_groups\(\) holds a parameter \[5\] that the model lacks"),
        ],
    )
    def test_wrong_groups_name_the_parameter(self, groups, message):
        model = Grouped(*groups)
        with pytest.raises(DeepenError, match=message):
            make_optimizers(model, model.base)

    def test_nothing_to_train_is_told(self):
        model = Grouped()
        for parameter in (model.a, model.b):
            parameter.requires_grad_(False)
        with pytest.raises(DeepenError, match="there is nothing to train"):
            make_optimizers(model, model.base)

    def test_the_base_is_frozen_but_for_what_a_group_names(self):
        model = Grouped(("a",), ("b", "base.bias"))
        make_optimizers(model, model.base)
        trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trainable == {"a", "b", "base.bias"}

    def test_learning_rates_are_the_groups_unless_one_is_given_for_all(self):
        model = Grouped(("a",), ("b",))
        own, given = (make_optimizers(model, model.base, learning_rate=rate) for rate in (None, 0.5))
        assert [group["lr"] for group in own.groups] == [0.1, 0.2]
        assert [group["lr"] for group in given.groups] == [0.5, 0.5]


@pytest.fixture
def run_config(tmp_path, monkeypatch) -> RunConfig:
    monkeypatch.setattr(deepen.methods, "__path__", [*deepen.methods.__path__, str(DROPPED_IN)])
    lines = [json.dumps({"text": f"Document {n} says that {n} is less than {n + 1}, and much else."}) for n in range(9)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return RunConfig(
        model="tiny:llama", method="toy", data=str(tmp_path / "corpus.jsonl"), output_dir=str(tmp_path / "run"),
        num_steps=3, batch_size=2, max_length=24, log_interval=2,
    )  # fmt: skip


def weights(folder):
    return {name: tensor.detach().clone() for name, tensor in open_model(str(folder)).model.saved_state().items()}


def loader_of(config: RunConfig) -> Loader:
    return Loader(rows_of_run(config, open_trainee(config)), rows_per_step=config.batch_size, seed=config.seed)


def silent(line: str) -> None:
    pass


class TestTrain:
    def test_a_run_leaves_an_adapter_figures_and_its_configuration(self, run_config):
        lines = []
        folder = train(run_config, show=lines.append)
        assert folder == Path(run_config.output_dir) / "step_3"
        trained = open_model(str(folder))
        assert trained.method.name == "toy"
        assert trained.model.up.weight.any()
        assert fingerprint(trained.backbone.model) == trained.identity.fingerprint
        assert RunConfig.from_file(folder.parent / "run.json") == run_config
        logged = [json.loads(line) for line in (folder.parent / "train.jsonl").read_text().splitlines()]
        assert [figures["step"] for figures in logged] == [1, 2, 3]
        assert logged[0].keys() == {
            "step", "train/loss/total", "train/loss/next_token", "train/learning_rate", "train/recursions",
            "train/gradient_norm", "train/performance/tokens_per_sec", "train/performance/steps_per_sec",
            "train/performance/memory_mb", "train/performance/flops",
        }  # fmt: skip
        assert logged[0]["train/learning_rate"] == 1e-2 and logged[0]["train/recursions"] == 2.0
        assert json.loads((folder / "metrics.json").read_text()) == logged[-1]
        assert re.fullmatch(r"trains [\d,]+ of [\d,]+ parameters: down \d+, up \d+", lines[0])
        assert [line.split("  ")[0] for line in lines[1:]] == ["step 1/3", "step 2/3", "step 3/3"]

    def test_a_run_leaves_its_ledger(self, run_config):
        folder = train(replace(run_config, log_interval=3), show=silent)
        ledger = json.loads((folder / "ledger.json").read_text())
        model = open_model(str(folder)).model
        added = sum(parameter.numel() for parameter in (model.down.weight, model.up.weight))
        assert ledger["parameters_trainable"] == ledger["parameters_added"] == added
        assert ledger["parameters_unique"] == model.backbone.num_parameters + added
        assert ledger["steps"] == 3 and ledger["tokens"] > 0
        assert ledger["training_flops"] == ledger["forward_flops"] + ledger["backward_flops"]
        # The base is frozen, so little more than its head goes backward.
        assert 0 < ledger["backward_flops"] < ledger["forward_flops"] / 2
        assert ledger["training_flops_per_token"] == ledger["training_flops"] / ledger["tokens"]
        logged = [json.loads(line) for line in (folder.parent / "train.jsonl").read_text().splitlines()]
        flops = [figures["train/performance/flops"] for figures in logged]
        assert flops == sorted(flops) and flops[-1] == ledger["training_flops"]

    def test_steps_in_between_are_logged_by_their_interval(self, run_config):
        train(replace(run_config, num_steps=7, log_interval=3), show=silent)
        logged = (Path(run_config.output_dir) / "train.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in logged] == [1, 3, 6, 7]

    def test_the_seed_decides_everything(self, run_config, tmp_path):
        states = []
        for name, seed in (("one", 4), ("two", 4), ("three", 5)):
            torch.manual_seed(len(name))
            states.append(weights(train(replace(run_config, seed=seed, output_dir=str(tmp_path / name)), show=silent)))
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert not torch.equal(states[0]["down.weight"], states[2]["down.weight"])

    def test_it_learns(self, run_config):
        config = replace(run_config, num_steps=40, batch_size=8, log_interval=1)
        train(config, show=silent)
        logged = (Path(run_config.output_dir) / "train.jsonl").read_text().splitlines()
        losses = [json.loads(line)["train/loss/total"] for line in logged]
        assert losses[-1] < losses[0] - 0.5

    def test_an_adapter_goes_on_from_where_it_was(self, run_config, tmp_path):
        first = train(run_config, show=silent)
        later = replace(run_config, model=str(first), method=None, output_dir=str(tmp_path / "later"))
        trainee = open_trainee(later)
        assert all(torch.equal(tensor, weights(first)[name]) for name, tensor in trainee.model.saved_state().items())
        second = train(later, show=silent)
        assert not torch.equal(weights(second)["up.weight"], weights(first)["up.weight"])

    def test_the_last_good_state_is_kept(self, run_config, tmp_path, monkeypatch):
        good = train(replace(run_config, num_steps=2, output_dir=str(tmp_path / "good")), show=silent)
        from deepen.core import registry

        toy = registry.get("toy").load_model_type()
        original = toy.train_step

        def spoiled(self, batch, carry, progress):
            output = original(self, batch, carry, progress)
            if progress.step < 2:
                return output
            return replace(output, losses={name: replace(t, total=t.total / 0) for name, t in output.losses.items()})

        monkeypatch.setattr(toy, "train_step", spoiled)
        message = r'the loss "next_token" is inf at step 3 of 5; .*; the state after step 2 is in .*step_2'
        with pytest.raises(DeepenError, match=message):
            train(replace(run_config, num_steps=5), show=silent)
        kept = weights(Path(run_config.output_dir) / "step_2")
        assert all(torch.equal(kept[name], tensor) for name, tensor in weights(good).items())

    def test_a_run_that_makes_no_step_leaves_nothing(self, run_config, monkeypatch):
        from deepen.core import registry

        toy = registry.get("toy").load_model_type()

        def refused(self, batch, carry, progress):
            raise DeepenError("not part of this version")

        monkeypatch.setattr(toy, "train_step", refused)
        with pytest.raises(DeepenError, match="not part of this version"):
            train(run_config, show=silent)
        assert not Path(run_config.output_dir).exists()

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"method": None}, "tiny:llama is a plain base model: say which method to train on it"),
            ({"method": "toi"}, 'there is no method "toi"; did you mean "toy"'),
            ({"config": "smal"}, 'neither a file nor a preset of toy; did you mean "small"'),
            ({"config": {"widht": 3}}, 'config: unknown key "widht"; did you mean "width"'),
            ({"config": {"num_recursions": 0}}, "no loss depends on a trainable parameter"),
            ({"max_length": 513}, "max_length is 513, but the model's context is 512"),
            ({"data": "no/such.txt"}, 'unknown corpus "no/such.txt"'),
            ({"schedule": "cosin"}, 'unknown schedule "cosin"; did you mean "cosine"'),
            ({"warmup_steps": 4}, "warmup_steps must be at most num_steps, 3, not 4"),
            (
                {"schedule": "trapezoid", "warmup_steps": 2, "decay_steps": 2},
                "warmup_steps and decay_steps must be at most num_steps, 3, together, not 2 and 2",
            ),
            (
                {"schedule": "trapezoid", "warmup_steps": 1, "decay_steps": 1, "num_steps": None, "num_tokens": 9},
                "warmup_steps and decay_steps must be at most the run's steps, 1, together, not 1 and 1; give a larger",
            ),
            (
                {"warmup_steps": 2, "num_steps": None, "flops": 10.0},
                "must be at most the run's steps, 1, together, not 2 and 0; give a larger budget",
            ),
            ({"num_tokens": 9}, "give one of num_steps, num_tokens, flops, not num_steps and num_tokens"),
            ({"num_micro_batches": 3}, "a step of 2 rows can't be divided over 1 ranks and 3 micro-batches"),
            ({"parallel": "shard"}, "parallel is shard, which needs several processes: start it with torchrun"),
            ({"optimizer": "mouon"}, 'unknown optimizer "mouon"; did you mean "muon"'),
            ({"decay_steps": 2}, "decay_steps is 2, which is for the schedule trapezoid alone"),
            ({"cut": "pakced"}, 'unknown cut "pakced"; did you mean "packed"'),
            ({"batch_size": 10_000}, "a step takes 10000 rows, and the data has"),
        ],
    )
    def test_what_cannot_be_run_is_told(self, run_config, fields, message):
        with pytest.raises(DeepenError, match=message):
            train(replace(run_config, **fields), show=silent)

    def test_a_run_that_can_learn_nothing_is_told_before_its_first_step(self, run_config):
        """A chunk of any width takes more than two tokens."""
        config = replace(run_config, method="chunk", config="recursive_phase_a", max_length=2)
        with pytest.raises(CannotTrain, match=r"no row of this run holds anything to learn: .* at most 2 tokens"):
            train(config, show=silent)
        assert not Path(run_config.output_dir).exists()

    @pytest.mark.parametrize("num_full", [0, 1])
    def test_a_step_alone_may_have_nothing_to_learn(self, run_config, monkeypatch, num_full):
        """Short rows count nothing here, and there may be a full one behind them."""
        from deepen.core import registry

        config = replace(run_config, batch_size=1, num_steps=9, seed=1)
        texts = ["short"] * 8 + ["as long as a row can be, and a bit"] * num_full
        Path(config.data).write_text("\n".join(json.dumps({"text": text, "n": n}) for n, text in enumerate(texts)))
        monkeypatch.setattr(
            registry.get("toy").load_model_type(),
            "count",
            lambda self, batch: {"token": int(batch.predicted()[batch.lengths > 20].sum())},
        )
        assert int(loader_of(config).step(0).lengths) < 20
        if num_full:
            assert train(config, show=silent).name == "step_9"
        else:
            with pytest.raises(CannotTrain, match="no row of this run holds anything to learn"):
                train(config, show=silent)

    def test_an_adapter_with_a_method_is_told(self, run_config, tmp_path):
        folder = train(run_config, show=silent)
        with pytest.raises(ConfigError, match="is an adapter of toy: leave out method and config"):
            train(replace(run_config, model=str(folder), output_dir=str(tmp_path / "later")), show=silent)

    def test_a_corpus_without_training_documents_is_told(self, run_config, tmp_path):
        (tmp_path / "corpus.jsonl").write_text("\n")
        with (
            pytest.warns(UserWarning, match="is empty"),
            pytest.raises(DeepenError, match="has no training document"),
        ):
            train(run_config, show=silent)

    def test_runs_never_mix(self, run_config, tmp_path):
        train(run_config, show=silent)
        with pytest.raises(DeepenError, match=r"holds another run: num_steps is 3 there, and 4 here; choose another"):
            train(replace(run_config, num_steps=4), show=silent)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "notes.txt").write_text("mine")
        with pytest.raises(DeepenError, match="is not an empty folder, and holds no run; choose another"):
            train(replace(run_config, output_dir=str(tmp_path / "full")), show=silent)

    @pytest.mark.parametrize(
        ("config", "width"), [(None, 8), ("small", 8), ({"width": 3}, 3)], ids=["defaults", "preset", "inline"]
    )
    def test_the_methods_configuration_may_be_written_in_three_ways(self, run_config, config, width):
        assert open_trainee(replace(run_config, config=config)).model.config.width == width


class TestRunConfig:
    def test_every_impossible_value_has_its_message(self):
        config = RunConfig(
            model="", data="wiki", config="small", num_steps=0, batch_size=0, max_length=1, learning_rate=0.0,
            grad_clip=-1.0, seed=-1, output_dir="", log_interval=0,
        )  # fmt: skip
        assert config.validate() == [
            "model must not be empty",
            "output_dir must not be empty",
            "num_steps must be at least 1, not 0",
            "batch_size must be at least 1, not 0",
            "max_length must be at least 2, not 1",
            "log_interval must be at least 1, not 0",
            "learning_rate must be above 0 or null, not 0.0",
            "grad_clip must be above 0 or null, not -1.0",
            "seed must be between 0 and 2**63 - 1, not -1",
            "config is given without method; an adapter folder brings its own configuration",
        ]

    @pytest.mark.parametrize("budget", [{"num_steps": 1}, {"num_tokens": 100}, {"flops": 1e12}])
    def test_a_run_needs_a_model_data_and_a_budget_and_no_more(self, budget):
        assert RunConfig.from_dict({"model": "tiny:llama", "data": "wiki", **budget}).validate() == []
        with pytest.raises(ConfigError, match="model is missing"):
            RunConfig.from_dict({"data": "wiki", **budget})
        with pytest.raises(ConfigError, match="give one of num_steps, num_tokens, flops, not none of them"):
            RunConfig.from_dict({"model": "tiny:llama", "data": "wiki"}).check()

    def test_inline_configurations_come_back_from_a_file(self, tmp_path):
        config = RunConfig(model="a", data="b", method="toy", config={"width": 3}, num_steps=1)
        config.save(tmp_path / "run.json")
        assert RunConfig.from_file(tmp_path / "run.json") == config


class TestCommand:
    def test_flags_go_over_the_file(self, run_config, tmp_path, capsys):
        run_config.save(tmp_path / "run.json")
        command = cli_train.Options(run=str(tmp_path / "run.json"), num_steps=1, learning_rate=0.5)
        assert cli_train.run(command) == 0
        resolved = RunConfig.from_file(Path(run_config.output_dir) / "run.json")
        assert resolved == replace(run_config, num_steps=1, learning_rate=0.5)
        printed = capsys.readouterr().out
        assert json.loads(printed[: printed.index("trains ")]) == resolved.to_dict()
        assert printed.rstrip().endswith(f"trained model: {Path(run_config.output_dir) / 'step_1'}")

    @pytest.mark.parametrize(
        ("content", "message"),
        [("[]", "must hold one JSON object"), ("{", "line 1"), ('{"modle": "a"}', 'unknown key "modle"; did you mean')],
    )
    def test_a_file_that_is_no_run_is_told(self, tmp_path, content, message):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ConfigError, match=message) as refusal:
            cli_train.run(cli_train.Options(run=str(tmp_path / "run.json"), num_steps=1))
        assert str(tmp_path / "run.json") in str(refusal.value)


@pytest.fixture
def resolved(run_config, tmp_path, monkeypatch):
    """The configuration that `deepen train` comes to with these flags over a file with these fields; nothing runs."""

    def resolve(*flags: str, **fields: object) -> RunConfig:
        found: list[RunConfig] = []
        monkeypatch.setattr("deepen.train.run.train", lambda config: found.append(config) or tmp_path)
        (tmp_path / "run.json").write_text(json.dumps({**run_config.to_dict(), **fields}))
        assert main(["train", str(tmp_path / "run.json"), *flags]) == 0
        return found[0]

    return resolve


@pytest.fixture
def refused(run_config, tmp_path, capsys):
    """What `deepen train` says of flags that it must refuse."""

    def run(*flags: str, **fields: object) -> str:
        (tmp_path / "run.json").write_text(json.dumps({**run_config.to_dict(), **fields}))
        capsys.readouterr()
        assert main(["train", str(tmp_path / "run.json"), *flags]) == 2
        return capsys.readouterr().err

    return run


class TestFieldsOfTheMethod:
    def test_a_switch_has_three_states(self, resolved):
        assert resolved().overrides is None
        for flags in (["--enable-recursive"], ["--enable_recursive"]):
            assert resolved(*flags).overrides == {"recursive_enabled": True}
        for flags in (["--no-enable-recursive"], ["--no_enable_recursive"]):
            assert resolved(*flags).overrides == {"recursive_enabled": False}

    def test_a_control_without_recursion_is_never_a_run_with_it(self, refused, run_config):
        of_chunk = {"method": "chunk", "config": "recursive_phase_b", "max_length": 64}
        message = refused("--no-enable-recursive", **of_chunk)
        assert "nothing to train" in message or "recursive_enabled is false" in message
        assert not Path(run_config.output_dir).exists()

    def test_flags_and_overrides_are_merged(self, resolved):
        set_too = ["--set", 'overrides={"width": 3}']
        assert resolved("--phase", "c", *set_too).overrides == {"phase": "c", "width": 3}
        assert resolved("--phase", "c", overrides={"width": 4}).overrides == {"phase": "c", "width": 4}
        assert resolved("--phase", "c", overrides={"phase": "b"}).overrides == {"phase": "c"}
        assert resolved("--phase", "c", "--set", "overrides=null").overrides == {"phase": "c"}

    def test_one_field_in_two_flags_is_told(self, refused):
        message = refused("--enable-recursive", "--set", 'overrides={"recursive_enabled": false}')
        assert '--set overrides holds "recursive_enabled", which --enable_recursive sets too; keep one' in message

    def test_a_field_of_the_method_in_the_runs_place_is_shown_its_own(self, refused, run_config):
        told = """width is a field of toy's configuration, not of a run; give it in overrides, as --set 'overrides="""
        assert told + """{"width": 3}'""" in refused("--set", "width=3")
        assert told in refused(width=3)
        assert 'unknown key "widht"' in refused("--set", "widht=3")

    def test_also_where_the_model_brings_the_method(self, refused, run_config, tmp_path):
        folder = train(run_config, show=silent)
        message = refused("--set", "width=3", model=str(folder), method=None)
        assert "width is a field of toy's configuration" in message

    @pytest.mark.parametrize("text", ['{"a":', "[1, 2"])
    def test_what_begins_as_json_and_is_none_is_told(self, refused, text):
        assert f"--set overrides={text} is not JSON: Expecting" in refused("--set", f"overrides={text}")


def test_the_order_of_data_is_the_runs_seed(run_config):
    first, again, other = (
        [loader_of(config).step(index).input_ids.tolist() for index in range(4)]
        for config in (run_config, run_config, replace(run_config, seed=1))
    )
    assert first == again != other


def test_a_run_learns_the_answers_of_conversations_alone(run_config, tmp_path):
    (tmp_path / "chat.jsonl").write_text(
        "".join(json.dumps({"prompt": f"question {n}", "response": f"answer {n}"}) + "\n" for n in range(40))
    )
    config = replace(run_config, data=str(tmp_path / "chat.jsonl"), max_length=200)
    batch = loader_of(config).step(0)
    learned = [
        bytes(token for token in row[1:][counted].tolist() if token < 256)
        for row, counted in zip(batch.input_ids, batch.predicted(), strict=True)
    ]
    assert all(answer.startswith(b"answer ") for answer in learned)
    assert train(config, show=silent).is_dir()


def test_packed_rows_are_full(run_config):
    config = replace(run_config, cut="packed", max_length=24)
    batch = loader_of(config).step(0)
    num_tokens = sum(len(json.loads(line)["text"]) + 1 for line in Path(run_config.data).read_text().splitlines())
    assert set(batch.lengths.tolist()) <= {24, num_tokens % 24} and batch.documents is not None
    assert train(config, show=silent).is_dir()


def test_learning_rates_follow_the_schedule(run_config):
    config = replace(run_config, num_steps=4, learning_rate=0.1, schedule="linear", warmup_steps=2, log_interval=1)
    train(config, show=silent)
    lines = (Path(run_config.output_dir) / "train.jsonl").read_text().splitlines()
    assert [json.loads(line)["train/learning_rate"] for line in lines] == pytest.approx([0.05, 0.1, 0.1, 0.05])
