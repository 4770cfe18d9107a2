"""Layers that recur over other tokens on each rank: the same steps as in one process, replicated or sharded.

All ranks share a model that is made so that in the first step no token of one of them goes on.
"""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from string import ascii_letters
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from several_ranks import Made, silent, start, write_first_step
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from deepen.backbones.new import new_model
from deepen.checkpoint import save_model
from deepen.core.types import Batch
from deepen.data.tokenizer import byte_tokenizer
from deepen.train.config import RunConfig
from deepen.train.ranks import ALONE, Ranks
from deepen.train.run import _Run, train

NUM_STEPS = 4
SIZES = {
    "model_type": "mor", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_recursions": 3, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
QUICK = ("frozen in sequence", "token choice")
MODELS: dict[str, dict[str, Any]] = {
    "expert choice": {"num_hidden_layers": 8, "tie_word_embeddings": True},
    "frozen in sequence": {"num_hidden_layers": 14, "kv": "frozen", "sharing": "middle_sequence"},
    "frozen in cycles": {"num_hidden_layers": 6, "kv": "frozen", "sharing": "cycle", "tie_word_embeddings": True},
    "shared, masked": {"num_hidden_layers": 8, "kv": "shared", "execution": "mask"},
    "token choice": {
        "num_hidden_layers": 8, "routing": "token_choice", "router": "mlp", "kv": "shared",
        "tie_word_embeddings": True,
    },
    "token choice by bias": {
        "num_hidden_layers": 6, "routing": "token_choice", "kv": "frozen", "sharing": "sequence",
        "balancing": "bias", "bias_rate": 0.01,
    },
}  # fmt: skip
# How a step is divided: kind of parallelism, micro-batches, recomputed activations.
WAYS = {
    "replicated": ("replicate", 1, False),
    "replicated in parts": ("replicate", 2, False),
    "sharded": ("shard", 1, False),
    "sharded in parts": ("shard", 2, False),
    "sharded and recomputed": ("shard", 1, True),
}
TO_THE_END = ("replicated", "sharded", "gone on")


def margins(model: Any, batch: Batch) -> Tensor:
    """By how much the logit of each token's second recursion is above what leaves it at one, if nothing is biased."""
    real = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    routed = model.model.read(batch.input_ids, real=real).routed
    if routed.choices is None:
        return routed.levels[0].logits
    return routed.choices[:, 1:].amax(dim=1) - routed.choices[:, 0]


@torch.no_grad()
def stop_one_rank(model: Any, steps: Batch) -> None:
    """Set the router so that no token of one of two ranks recurs in this step, and some of the other do."""
    highest = sorted(float(margins(model, Ranks(rank, 2).share(steps, num_parts=1)[0]).max()) for rank in (0, 1))
    between = sum(highest) / 2
    router = model.model.router
    if model.config.routing == "token_choice":
        router.choice_bias[0] = between
    else:
        router.thresholds[0] = between


# Processes are started once for the quick ones, and once for the rest.
CASES = [("quick", name) if name in QUICK else pytest.param("slow", name, marks=pytest.mark.slow) for name in MODELS]


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory) -> dict[str, RunConfig]:
    """Of each model one, in one process."""
    folder = tmp_path_factory.mktemp("recursions")
    # Ragged rows: shares of ranks and micro-batches hold very different numbers of tokens. They begin differently, or
    # the deepest token would be in all of them.
    source = Random(0)
    texts = ["".join(source.choices(ascii_letters, k=3 + 9 * (n % 6))) for n in range(40)]
    (folder / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    configs = {}
    for place, name in enumerate(name for name in MODELS if (name in QUICK) == (request.param == "quick")):
        made = new_model({**SIZES, **MODELS[name]}, byte_tokenizer(), seed=place)
        configs[name] = RunConfig(
            model=str(folder / f"model_{place}"),
            data=str(folder / "corpus.jsonl"),
            output_dir=str(folder / f"run_{place}"),
            save_interval=2,
            keep_checkpoints=9,
            num_steps=NUM_STEPS,
            batch_size=7,
            max_length=48,
            learning_rate=1e-3,
            grad_clip=None,
        )
        for _ in range(2):  # the rows of the first step are known once there is a model to make them for
            save_model(configs[name].model, backbone=made.backbone, tokenizer=made.tokenizer, replace=True)
            stop_one_rank(made.backbone.model, _Run(configs[name], ALONE, silent).loader.step(0))
    return configs


def tensors(made: Made, step: int = NUM_STEPS) -> dict[str, Tensor]:
    return load_file(made.step(step) / "model.safetensors")


def divided(config: RunConfig, way: tuple[str, int, bool]) -> RunConfig:
    kind, num_parts, recompute = way
    output_dir = f"{config.output_dir}_{kind}_{num_parts}_{recompute}"
    return replace(config, parallel=kind, num_micro_batches=num_parts, recompute=recompute, output_dir=output_dir)


def gone_on(config: RunConfig) -> RunConfig:
    """The same run from the middle."""
    middle = Path(config.output_dir) / f"step_{NUM_STEPS // 2}"
    return replace(config, branch_from=str(middle), output_dir=f"{config.output_dir}_on")


@pytest.fixture(scope="module")
def made(runs, tmp_path_factory) -> dict[tuple[str, str], Made]:
    """By name and way, in one process and divided over two."""
    folder = tmp_path_factory.mktemp("made")
    found: dict[tuple[str, str], Made] = {}
    jobs = []
    for name, config in runs.items():
        ways = {"alone": config, **{way: divided(config, fields) for way, fields in WAYS.items()}}
        for way, run in {**ways, "gone on": gone_on(ways["sharded"])}.items():
            place = folder / str(len(found))
            place.mkdir()
            found[name, way] = Made(run, place)
            first = replace(run, output_dir=str(place / "run"))
            if way == "alone":
                write_first_step(first, place)
                train(run, show=silent)
            jobs += [{"run": first.to_dict(), "gradients": str(place)}] if way in WAYS else []
            jobs += [{"run": run.to_dict(), "gradients": None}] if way in TO_THE_END else []
    start(folder / "jobs", jobs, world_size=2)
    return found


@pytest.mark.parametrize(("runs", "name"), CASES, indirect=["runs"], scope="module")
class TestSteps:
    def test_one_rank_s_tokens_leave_early(self, runs, name):
        config = runs[name]
        model = AutoModelForCausalLM.from_pretrained(config.model)
        deepest = []
        for rank in (0, 1):
            (share,) = Ranks(rank, 2).share(_Run(config, ALONE, silent).loader.step(0), num_parts=1)
            real = torch.arange(share.input_ids.shape[1]) < share.lengths[:, None]
            deepest.append(int(model(share.input_ids, attention_mask=real).depths.max()))
        assert min(deepest) == 1 < max(deepest)

    @pytest.mark.parametrize("way", WAYS)
    def test_the_first_is_that_of_one_process(self, made, name, way):
        expected, found = made[name, "alone"], made[name, way]
        for part in ("losses", "total", "norm", "metrics"):
            assert found.figures()[part] == pytest.approx(expected.figures()[part], rel=1e-6)
        assert found.first("gradients").keys() == expected.first("gradients").keys()
        for key, gradient in expected.first("gradients").items():
            difference = found.first("gradients")[key] - gradient
            assert float(difference.abs().max()) <= 1e-6 * max(1.0, float(gradient.abs().max())), key
        before = load_file(Path(found.run.model) / "model.safetensors")
        for key, buffer in expected.first("buffers").items():
            assert torch.equal(found.first("buffers")[key], buffer)
            assert key.endswith("choice_bias") or not torch.equal(buffer, before[key.removeprefix("model.base.")])

    @pytest.mark.parametrize("way", TO_THE_END[:2])
    def test_those_after_it_go_the_same_way(self, made, name, way):
        expected, found = made[name, "alone"], made[name, way]
        assert found.losses() == pytest.approx(expected.losses(), rel=1e-5)
        assert tensors(found).keys() == tensors(expected).keys()
        before = tensors(expected, NUM_STEPS // 2)
        for key, tensor in tensors(expected).items():
            # What AdamW makes of a gradient near zero is mostly rounding.
            moved = float((tensor - before[key]).abs().max())
            assert float((tensors(found)[key] - tensor).abs().max()) <= max(0.05 * moved, 1e-5), key

    @pytest.mark.parametrize("way", [way for way in WAYS if way.startswith("sharded")])
    def test_layers_that_recur_are_gathered_once_a_step(self, made, name, way):
        found = made[name, way]
        uses = Counter(AutoConfig.from_pretrained(found.run.model).layout.unique).values()
        others = 1 + 2 * sum(num == 1 for num in uses)  # before and behind each; the rest of the model's before alone
        assert found.figures()["gathers"] == sum(num > 1 for num in uses) + others * found.run.num_micro_batches

    def test_from_shards_it_goes_on_to_the_same_bits(self, made, name):
        whole, rest = made[name, "sharded"], made[name, "gone on"]
        assert rest.losses() == whole.losses()[NUM_STEPS // 2 :]
        for file in sorted(whole.step(NUM_STEPS).rglob("*.safetensors")):
            other = load_file(rest.step(NUM_STEPS) / file.relative_to(whole.step(NUM_STEPS)))
            for key, tensor in load_file(file).items():
                assert torch.equal(other[key], tensor), key

    def test_what_shards_were_put_together_to_generates(self, made, name):
        run = made[name, "sharded"]
        model = AutoModelForCausalLM.from_pretrained(run.step(NUM_STEPS))
        tokenizer = AutoTokenizer.from_pretrained(run.step(NUM_STEPS))
        config = model.config
        assert len(model.model.layers) == config.num_unique_layers < config.num_hidden_layers
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == config.tie_word_embeddings
        assert ("lm_head.weight" in tensors(run)) != config.tie_word_embeddings
        alone = AutoModelForCausalLM.from_pretrained(made[name, "alone"].step(NUM_STEPS))
        prompt = tokenizer("less is", return_tensors="pt")
        texts = [each.generate(**prompt, max_new_tokens=6, do_sample=False) for each in (model, alone)]
        assert torch.equal(*texts)
