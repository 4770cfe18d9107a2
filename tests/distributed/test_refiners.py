"""A refiner on several ranks, beside a frozen base or with it: the same steps as in one process.

Each token takes outer steps of its own, or all take those that were drawn, the same on all ranks.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from several_ranks import silent, start, write_first_step

from deepen.backbones.new import new_model, new_tokenizer
from deepen.checkpoint import open_model, save_model
from deepen.train.config import RunConfig
from deepen.train.run import train

TASK = "task:pointer,nodes=8,hops=1-3,examples=80,held_out=10"
SIZES = {
    "model_type": "nanochat", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
REFINER = {"use_trm": True, "trm_d_latent": 8, "trm_n": 2, "trm_heads": 2, "mixing": "evidence", "grad_outer_steps": 2}
REFINERS: dict[str, dict[str, Any]] = {
    "alone, as the task needs": {"T_sampling": "task"},
    "with all, to a fixed point, learning to halt": {
        "T_sampling": "fixed_point", "T_max": 4, "halt": "learned", "trains": "all",
    },
    "with all, behind layers": {"T_sampling": "uniform", "placement": [0, 2], "trains": "all"},
}  # fmt: skip
WAYS = {"replicated": ("replicate", 1), "replicated in parts": ("replicate", 2), "sharded": ("shard", 1)}


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """By refiner and way: the folder of a first step, and in it that of a whole run."""
    folder = tmp_path_factory.mktemp("refiners")
    made = new_model(SIZES, new_tokenizer(TASK), seed=3)
    save_model(folder / "model", backbone=made.backbone, tokenizer=made.tokenizer)
    found, jobs = {}, []
    for number, (name, fields) in enumerate(REFINERS.items()):
        alone = RunConfig(
            model=str(folder / "model"), method="trm", config={**REFINER, **fields}, data=TASK, num_steps=3,
            batch_size=8, max_length=32, learning_rate=3e-3, output_dir="",
        )  # fmt: skip
        for way, (kind, num_parts) in {"one process": ("replicate", 1), **WAYS}.items():
            place = folder / f"{number} {way}"
            place.mkdir()
            found[name, way] = place
            run = replace(alone, parallel=kind, num_micro_batches=num_parts, output_dir=str(place / "run"))
            first = replace(run, output_dir=str(place / "first"))
            if way == "one process":
                write_first_step(first, place)
                train(run, show=silent)
            else:
                jobs.append({"run": first.to_dict(), "gradients": str(place)})
                jobs.append({"run": run.to_dict(), "gradients": None})
    start(folder / "jobs", jobs, world_size=2)
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REFINERS)
class TestSteps:
    def test_the_first_is_that_of_one_process(self, places, name, way):
        expected, found = (
            json.loads((places[name, each] / "figures.json").read_text()) for each in ("one process", way)
        )
        for part in ("losses", "total", "norm", "metrics", "work"):
            assert found[part] == pytest.approx(expected[part], rel=1e-6)
        ours, theirs = (load_file(places[name, each] / "gradients.safetensors") for each in (way, "one process"))
        assert ours.keys() == theirs.keys()
        for key, gradient in theirs.items():
            largest = float(gradient.abs().max())
            assert float((ours[key] - gradient).abs().max()) <= 1e-6 * max(1.0, largest), key
            # All else of an untrained refiner has none.
            assert largest > 0 or not key.endswith("f_y.out.weight")

    def test_what_is_saved_is_what_one_process_saves(self, places, name, way):
        ours, theirs = (places[name, each] / "run" / "step_3" for each in (way, "one process"))
        files = sorted(
            each.relative_to(theirs) for each in theirs.rglob("*.safetensors") if "training" not in str(each)
        )
        assert [str(each) for each in files] == [
            *(["base/model.safetensors"] if REFINERS[name].get("trains") == "all" else []), "refiner.safetensors",
        ]  # fmt: skip
        for file in files:
            for key, tensor in load_file(theirs / file).items():
                # What AdamW makes of a gradient near zero is mostly rounding.
                assert float((load_file(ours / file)[key] - tensor).abs().max()) <= 3e-4, key
        opened = open_model(str(ours))
        assert opened.model is not None and opened.method is not None and opened.method.name == "trm"
