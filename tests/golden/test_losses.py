"""The first 20 losses of every method's presets, against those that were right when they were written down.

After a change that is meant to move them: `PYTHONPATH=src:tests python tests/golden/test_losses.py` writes them anew,
and the difference is there to be read.
"""

import json
import tempfile
from pathlib import Path

import pytest

from deepen.backbones.new import new_model, new_tokenizer, read_config
from deepen.checkpoint import save_model
from deepen.core import registry
from deepen.core.errors import CannotTrain
from deepen.core.registry import Method
from deepen.train.config import RunConfig
from deepen.train.run import train

FILE = Path(__file__).with_name("losses.json")
NUM_STEPS = 20
BASES = ("tiny:llama", "tiny:kimi_linear")
SEEDS = (0, 1)
# In the place of a base, where the model is the method's own: one is made, if its preset is as small as this.
NEW = "new"
WIDEST = 128
# Presets whose steps choose tokens: once a choice falls otherwise, which rounding can do, so do the losses behind it.
CHOOSING = {"recursive_phase_c", "mor-1m-nr2", "mor-1m-nr3"}
NUM_STEPS_CHOOSING = 4


def runs() -> list[tuple[str, str, str, int]]:
    """Method, preset, base and seed of each run."""
    return [
        (method.name, preset, base, seed)
        for method in registry.discover().values()
        for preset in method.preset_paths()
        for base in bases_of(method, preset)
        for seed in SEEDS
    ]


def bases_of(method: Method, preset: str) -> tuple[str, ...]:
    """What a preset is trained on; nothing if it is a model too large to be trained here."""
    if method.architecture is None:
        return BASES
    return (NEW,) if read_config(preset)["hidden_size"] <= WIDEST else ()


def losses(method: str, preset: str, base: str, seed: int, folder: Path) -> list[float] | None:
    """Of each step; None where the preset says that there is no training of it."""
    corpus = folder / "corpus.jsonl"
    texts = (f"{n} apples and {3 * n % 11} pears are {n + 3 * n % 11} fruits." for n in range(120))
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if base == NEW:
        made = new_model(read_config(preset), new_tokenizer("bytes"), seed=seed)
        save_model(folder / NEW, backbone=made.backbone, tokenizer=made.tokenizer)
        which = {"model": str(folder / NEW)}
    else:
        which = {"model": base, "method": method, "config": preset}
    config = RunConfig(
        **which, data=str(corpus), output_dir=str(folder / "run"), seed=seed,
        num_steps=NUM_STEPS, batch_size=4, max_length=32, learning_rate=3e-3, schedule="cosine", warmup_steps=4,
        log_interval=1,
    )  # fmt: skip
    try:
        train(config, show=lambda line: None)
    except CannotTrain:
        return None
    lines = (folder / "run" / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss/total"] for line in lines]


def name_of(run: tuple[str, str, str, int]) -> str:
    method, preset, base, seed = run
    return f"{method}-{preset}-{base.removeprefix('tiny:')}-{seed}"


def is_quick(run: tuple[str, str, str, int]) -> bool:
    """One base and seed of each preset; the others belong to the slow profile."""
    return run[2:] in ((BASES[0], SEEDS[0]), (NEW, SEEDS[0]))


@pytest.mark.parametrize(
    "run", [pytest.param(run, id=name_of(run), marks=[] if is_quick(run) else [pytest.mark.slow]) for run in runs()]
)
def test_losses_are_those_written_down(run, tmp_path):
    expected = json.loads(FILE.read_text())[name_of(run)]
    found = losses(*run, tmp_path)
    compared = NUM_STEPS if run[1] not in CHOOSING else NUM_STEPS_CHOOSING
    # Other processors add in another order; twenty steps make little of it.
    assert (found and found[:compared]) == (expected and pytest.approx(expected[:compared], rel=2e-4))


def test_every_preset_is_written_down_and_some_train():
    written = json.loads(FILE.read_text())
    assert sorted(written) == sorted(map(name_of, runs()))
    # A single batch may be a hard one.
    assert all(sum(values[-5:]) < sum(values[:5]) for values in written.values() if values is not None)
    assert any(values is not None for values in written.values())


if __name__ == "__main__":
    found = {}
    for each in runs():
        with tempfile.TemporaryDirectory() as place:
            found[name_of(each)] = losses(*each, Path(place))
    FILE.write_text(json.dumps(found, indent=1) + "\n")
