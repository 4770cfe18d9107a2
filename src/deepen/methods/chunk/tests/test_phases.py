"""Runs of the phases, as `deepen train` makes them: what each trains, and how one goes on from the one before."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from deepen.backbones.identity import fingerprint
from deepen.checkpoint import open_model
from deepen.core.errors import CannotTrain, ConfigError
from deepen.core.method import adapted
from deepen.core.registry import get
from deepen.train import run
from deepen.train.config import RunConfig
from deepen.train.run import rows_of_run, train
from deepen.train.trainee import Trainee, open_trainee

SIZES = {"d_state": 8, "gate_hidden": 16, "max_inner_steps": 2}


@pytest.fixture
def run_config(tmp_path: Path) -> RunConfig:
    texts = (f"{n} apples and {3 * n % 11} pears are {n + 3 * n % 11} fruits." for n in range(120))
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return RunConfig(
        model="tiny:llama", method="chunk", config="recursive_phase_a", overrides=SIZES, num_steps=2, batch_size=4,
        data=str(tmp_path / "corpus.jsonl"), max_length=40, log_interval=1, output_dir=str(tmp_path / "run"),
    )  # fmt: skip


@dataclass(frozen=True)
class OwnBase:
    """The base that a run trains on, in its memory, and copies of what it held before the first step."""

    model: torch.nn.Module
    before: Mapping[str, torch.Tensor]
    fingerprint: str

    @classmethod
    def kept(cls, model: torch.nn.Module) -> "OwnBase":
        return cls(model, {name: tensor.clone() for name, tensor in model.state_dict().items()}, fingerprint(model))

    def assert_as_before(self) -> None:
        now = self.model.state_dict()
        assert now.keys() == self.before.keys()
        assert [name for name in now if not torch.equal(now[name], self.before[name])] == []
        assert fingerprint(self.model) == self.fingerprint


@pytest.fixture
def own_bases(monkeypatch: pytest.MonkeyPatch) -> list[OwnBase]:
    """Of the runs of a test, in their order."""
    kept: list[OwnBase] = []

    def opening(config: RunConfig) -> Trainee:
        trainee = open_trainee(config)
        kept.append(OwnBase.kept(trainee.backbone.model))
        return trainee

    monkeypatch.setattr(run, "open_trainee", opening)
    return kept


def trained(config: RunConfig) -> tuple[Path, list[str]]:
    shown: list[str] = []
    return train(config, show=shown.append), shown


def moved(before: dict[str, torch.Tensor], folder: Path) -> set[str]:
    after = load_file(folder / "sidecar.safetensors")
    return {name for name in after if name not in before or not torch.equal(before[name], after[name])}


def test_phase_a_trains_the_sidecar_and_says_so(run_config):
    folder, shown = trained(run_config)
    assert shown[0].startswith("trains ") and "refine_cells" in shown[0] and "lora" not in shown[0]
    saved = load_file(folder / "sidecar.safetensors")
    assert not any("lora" in name for name in saved)
    assert saved["refine_cells.0.out.weight"].any()
    assert json.loads((folder / "recursive_config.json").read_text())["phase"] == "a"


@pytest.mark.parametrize("base", ["tiny:llama", "tiny:kimi_linear"])
@pytest.mark.parametrize("preset", ["recursive_phase_a", "recursive_phase_b", "recursive_phase_c"])
def test_the_base_is_the_same_bit_for_bit(run_config, own_bases, preset, base):
    """The very one that the run computes with; in phase c it is there beside the layers that are tuned."""
    folder, _ = trained(replace(run_config, model=base, config=preset))
    (own,) = own_bases
    own.assert_as_before()
    assert own.fingerprint == fingerprint(open_model(base).backbone.model)
    assert load_file(folder / "sidecar.safetensors")["refine_cells.0.out.weight"].any()


def test_phase_b_goes_on_from_phase_a(run_config, own_bases, tmp_path):
    first, _ = trained(run_config)
    going_on = replace(
        run_config, model=str(first), method=None, config=None, overrides={"phase": "b"}, output_dir=str(tmp_path / "b")
    )
    second, shown = trained(going_on)
    assert "lora" in shown[0]
    before, after = (load_file(each / "sidecar.safetensors") for each in (first, second))
    assert moved(before, second) >= {name for name in after if name.startswith(("refine_cells.0.out", "lora."))}
    # What exact mode has no use for stays where it was.
    assert torch.equal(before["refine_cells.0.state_upd.weight_ih"], after["refine_cells.0.state_upd.weight_ih"])
    assert json.loads((second / "recursive_config.json").read_text())["phase"] == "b"
    of_first, of_second = own_bases
    of_second.assert_as_before()
    assert of_first.fingerprint == of_second.fingerprint


def test_phase_c_tunes_every_fourth_layer_beside_the_base(run_config, own_bases):
    config = replace(run_config, config="recursive_phase_c")
    folder, shown = trained(config)
    assert "tuned" in shown[0]
    (own_base,) = own_bases
    own_base.assert_as_before()
    base, opened = own_base.model, open_model(str(folder))
    assert fingerprint(opened.backbone.model) == own_base.fingerprint
    saved = load_file(folder / "sidecar.safetensors")
    own = dict(base.named_parameters())
    tuned = {
        name.removeprefix("base_delta."): tensor for name, tensor in saved.items() if name.startswith("base_delta.")
    }
    assert tuned.keys() == {name for name in own if name.startswith("model.layers.3.")}
    assert all((tensor - own[name]).abs().max() > 0 for name, tensor in tuned.items())
    (last,) = [json.loads(line) for line in (folder.parent / "train.jsonl").read_text().splitlines()][-1:]
    assert 0 < last["train/loss/pull"] < 1e-2 and 0 <= last["train/chunks/ngram_drift"] <= 1
    # What it generates is the tuned model's; taken off, the base is itself.
    ids = torch.arange(12)[None]
    before = base(ids).logits
    with adapted(opened.model):
        inside = opened.backbone.model(ids).logits
    assert not torch.equal(inside, before) and torch.equal(opened.backbone.model(ids).logits, before)


def trains(preset: str, **settings: Any) -> set[str]:
    """The parts that have trained parameters, of a preset on a tiny base."""
    method = get("chunk")
    backbone = open_model("tiny:llama").backbone
    model = method.load_model_type().build(method.load_config(preset), backbone, backbone.vocab_size)
    named = {id(parameter): name.split(".")[0] for name, parameter in model.named_parameters()}
    return {named[id(each)] for group in model.optim_groups() for each in group["params"]}


def test_presets_differ_in_what_they_train():
    assert trains("baseline") == trains("after_surgery") == set()
    assert trains("recursive_phase_a") == {"refine_cells", "boundary", "mask_token"}
    assert trains("recursive_phase_b") == {"refine_cells", "boundary", "mask_token", "lora"}
    assert trains("recursive_phase_c") == {"refine_cells", "boundary", "mask_token", "latent_token", "tuned"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [({"phase": "d"}, "phase must be none, a, b, or c"), ({"phases": "a"}, 'phases.*did you mean "?phase')],
)
def test_a_wrong_override_is_named(run_config, overrides, said):
    with pytest.raises(ConfigError, match=said):
        trained(replace(run_config, overrides=overrides))


def test_nothing_to_train_is_refused(run_config):
    with pytest.raises(CannotTrain, match="nothing to train"):
        trained(replace(run_config, config="after_surgery"))


class TestDrafter:
    """What draft "shallow" chooses by its data, and keeps."""

    @pytest.fixture
    def of_drafter(self, run_config: RunConfig) -> RunConfig:
        shape = {"draft": "shallow", "drafter_hidden": 8, "draft_vocab": 12, "chunk_width": 4}
        return replace(run_config, overrides={**SIZES, **shape})

    @staticmethod
    def tokens(folder: Path) -> list[int]:
        return load_file(folder / "sidecar.safetensors")["drafter.tokens"].tolist()

    def test_a_new_run_drafts_what_is_frequent_in_its_data(self, of_drafter):
        folder, _ = trained(of_drafter)
        trainee = open_trainee(of_drafter)
        ids = Counter(rows_of_run(of_drafter, trainee).corpus.ids.tolist())
        least = min(ids[token] for token in self.tokens(folder))
        assert len(set(self.tokens(folder))) == 12
        assert sorted(ids.values())[-12] == least > 5

    def test_a_run_that_was_cut_off_keeps_it(self, of_drafter, tmp_path):
        whole, _ = trained(replace(of_drafter, num_steps=4, save_interval=2))
        again = tmp_path / "again"
        trained(replace(of_drafter, num_steps=4, save_interval=2, output_dir=str(again)))
        shutil.rmtree(again / "step_4")
        resumed, _ = trained(replace(of_drafter, num_steps=4, save_interval=2, output_dir=str(again)))
        assert (whole / "sidecar.safetensors").read_bytes() == (resumed / "sidecar.safetensors").read_bytes()

    def test_going_on_with_other_data_keeps_it(self, of_drafter, tmp_path):
        first, _ = trained(of_drafter)
        other = tmp_path / "other.jsonl"
        other.write_text("".join(json.dumps({"text": f"XYZ {n} QQQQ WWWW"}) + "\n" for n in range(100)))
        second, _ = trained(
            replace(of_drafter, model=str(first), method=None, config=None, overrides={}, data=str(other),
                    output_dir=str(tmp_path / "second"))
        )  # fmt: skip
        assert self.tokens(second) == self.tokens(first)

    def test_a_run_goes_on_alike_with_what_was_kept_and_without(self, of_drafter, tmp_path, monkeypatch):
        """The texts are read by themselves, so nothing depends on which were kept."""
        config = replace(of_drafter, overrides={**of_drafter.overrides, "keep_outputs": True}, num_steps=4)
        config = replace(config, save_interval=2)
        monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path / "one"))
        whole, _ = trained(config)
        again = replace(config, output_dir=str(tmp_path / "again"))
        trained(again)
        shutil.rmtree(tmp_path / "again" / "step_4")
        monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path / "other"))
        resumed, _ = trained(again)
        assert (whole / "sidecar.safetensors").read_bytes() == (resumed / "sidecar.safetensors").read_bytes()


class TestAdapterDtype:
    def test_a_rounded_adapter_is_what_it_was_but_for_rounding(self, run_config, tmp_path):
        whole, _ = trained(run_config)
        rounded, _ = trained(replace(run_config, adapter_dtype="bfloat16", output_dir=str(tmp_path / "rounded")))
        before, after = (load_file(each / "sidecar.safetensors") for each in (whole, rounded))
        assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
        assert all(torch.equal(after[name], tensor.bfloat16()) for name, tensor in before.items())
        model = open_model(str(rounded)).model
        assert all(torch.equal(tensor, after[name].float()) for name, tensor in model.saved_state().items())

    def test_a_run_goes_on_from_what_was_not_rounded(self, run_config, tmp_path):
        settings = {"num_steps": 4, "save_interval": 2}
        whole, _ = trained(replace(run_config, **settings))
        again = replace(run_config, **settings, adapter_dtype="bfloat16", output_dir=str(tmp_path / "again"))
        trained(again)
        shutil.rmtree(tmp_path / "again" / "step_4")
        resumed, _ = trained(replace(again, adapter_dtype="float32"))
        assert (whole / "sidecar.safetensors").read_bytes() == (resumed / "sidecar.safetensors").read_bytes()

    def test_is_refused_where_there_is_no_adapter(self, run_config):
        with pytest.raises(ConfigError, match="what trains here is the whole model, no adapter"):
            train(replace(run_config, method="dense", config="full", overrides=None, adapter_dtype="bfloat16"))
