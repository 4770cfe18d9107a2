"""Chunks of other lengths on each rank, so that each makes passes of its own number: the same steps as in one process.

A step has two rows, one of each document, or two of each in two parts.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from string import ascii_letters
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from several_ranks import Made, silent, start, write_first_step

from deepen.core.seeds import seed_at
from deepen.core.types import Progress
from deepen.data.split import split_of
from deepen.methods.chunk.rows import ChunkBatch
from deepen.train.config import RunConfig
from deepen.train.ranks import ALONE, Ranks
from deepen.train.run import _Run, train

NUM_STEPS = 2
SMALL = {
    "recursive_enabled": True, "chunk_width": 5, "max_chunk_len": 8, "d_state": 8, "gate_hidden": 16,
    "max_inner_steps": 2, "anchors_per_text": 3,
}  # fmt: skip
REFINED = {"commit_mode": "refined", "corruption_schedule": "none"}


@dataclass(frozen=True)
class Case:
    """What two ranks train on documents of so many letters, and a number that they then don't have in common."""

    lengths: tuple[int, ...]
    config: dict[str, Any]
    number: Callable[[ChunkBatch], int]
    run: dict[str, Any] = field(default_factory=dict)


def num_chunks(share: ChunkBatch) -> int:
    return share.num_chunks


def width(share: ChunkBatch) -> int:
    return share.chunks().width


def num_columns(share: ChunkBatch) -> int:
    return len(set(share.chunks().numbers.tolist()))


def num_passes_of_walk(share: ChunkBatch) -> int:
    return -(-share.input_ids.shape[1] // 256)


CASES = {
    "exact, one text beyond the first pass": Case((40, 300), {"phase": "a"}, num_passes_of_walk),
    "exact, LoRA recomputed, one rank without a chunk": Case((1, 30), {"phase": "b"}, num_chunks, {"recompute": True}),
    "refined, one rank's chunks shorter": Case((4, 30), {"phase": "a", **REFINED}, width),
    "refined, one rank without a chunk": Case((30, 1), {"phase": "a", **REFINED}, num_chunks),
    "refined, states carried on": Case((4, 30), {"phase": "a", "carry_state": True, **REFINED}, num_columns),
    "refined, layers tuned": Case((4, 30), {"phase": "c", **REFINED}, width),
    "refined, layers tuned and recomputed, in parts": Case(
        (30, 1, 4, 300), {"phase": "c", **REFINED}, num_passes_of_walk, {"recompute": True, "num_micro_batches": 2}
    ),
}  # fmt: skip
TO_THE_END = ("refined, layers tuned", "refined, layers tuned and recomputed, in parts")


def text_of(length: int) -> str:
    """One that is trained on."""
    texts = ((letter + "less is more, " * 30)[:length] for letter in ascii_letters)
    return next(text for text in texts if split_of(text) == "train")


def shares(config: RunConfig) -> list[ChunkBatch]:
    """What each of two ranks has of the first step."""
    run = _Run(config, ALONE, silent)
    torch.manual_seed(seed_at(config.seed, 0))
    prepared = run.trainee.model.prepare(run.loader.step(0), Progress(0, NUM_STEPS))
    return [share for rank in (0, 1) for share in Ranks(rank, 2).share(prepared, num_parts=1)]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[tuple[str, str], Made]:
    """By case and way."""
    folder = tmp_path_factory.mktemp("chunks")
    found, jobs = {}, []
    for number, (name, case) in enumerate(CASES.items()):
        corpus = folder / f"{number}.jsonl"
        corpus.write_text("\n".join(json.dumps({"text": text_of(length)}) for length in case.lengths))
        alone = RunConfig(
            model="tiny:llama", method="chunk", config={**SMALL, **case.config}, data=str(corpus), num_steps=NUM_STEPS,
            batch_size=len(case.lengths), max_length=320, grad_clip=None, log_interval=1, output_dir="",
        )  # fmt: skip
        for way, fields in {"one process": {}, "sharded": {"parallel": "shard", **case.run}}.items():
            place = folder / f"{number} {way}"
            place.mkdir()
            run = replace(alone, output_dir=str(place / "run"), **fields)
            found[name, way] = Made(run, place)
            first = replace(run, output_dir=str(place / "first"))
            if way == "sharded":
                jobs.append({"run": first.to_dict(), "gradients": str(place)})
                jobs += [{"run": run.to_dict(), "gradients": None}] if name in TO_THE_END else []
                continue
            write_first_step(first, place)
            if name in TO_THE_END:
                train(run, show=silent)
    start(folder / "jobs", jobs, world_size=2)
    return found


@pytest.mark.parametrize("name", CASES)
class TestFirstStep:
    def test_ranks_have_passes_of_their_own_number(self, name, made):
        numbers = [CASES[name].number(share) for share in shares(made[name, "one process"].run)]
        assert numbers[0] != numbers[1], numbers

    def test_it_is_that_of_one_process(self, name, made):
        expected, found = made[name, "one process"], made[name, "sharded"]
        for part in ("losses", "total", "norm", "metrics", "tokens"):
            assert found.figures()[part] == pytest.approx(expected.figures()[part], rel=1e-6)
        ours, theirs = (each.first("gradients") for each in (found, expected))
        assert ours.keys() == theirs.keys()
        # The base stays as it is: what is tuned are copies beside it.
        assert not any(key.startswith(("base.", "model.base.")) for key in ours)
        for key, gradient in theirs.items():
            assert float((ours[key] - gradient).abs().max()) <= 1e-6 * max(1.0, float(gradient.abs().max())), key
        assert any(float(gradient.abs().max()) > 0 for gradient in theirs.values())


@pytest.mark.parametrize("name", TO_THE_END)
def test_those_after_it_go_the_same_way(name, made):
    expected, found = made[name, "one process"], made[name, "sharded"]
    assert found.losses() == pytest.approx(expected.losses(), rel=1e-5)
    ours, theirs = (load_file(each.step(NUM_STEPS) / "sidecar.safetensors") for each in (found, expected))
    assert ours.keys() == theirs.keys() and any(key.startswith("base_delta.") for key in ours)
    for key, tensor in theirs.items():
        # What AdamW makes of a gradient near zero is mostly rounding.
        assert float((ours[key] - tensor).abs().max()) <= 3e-4, key
