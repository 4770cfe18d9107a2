"""A method is one folder: the toy beside this file is listed, grafted, trained, run, scored and reloaded by command.

Each process is told of it by DEEPEN_METHODS_PATH and by nothing else.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import deepen

DROPPED_IN = Path(__file__).parent / "dropped_in"
SOURCES = Path(deepen.__file__).parent
# One process runs several commands: importing torch takes longer than any of them.
RUN_COMMANDS = """
import json, sys
from deepen.cli.main import main
for arguments in json.load(sys.stdin):
    status = main(arguments)
    if status:
        sys.exit(f"deepen {' '.join(arguments)}: exit status {status}")
"""


def deepen_commands(folder: Path, *commands: str, methods: Path | None = DROPPED_IN) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "DEEPEN_METHODS_PATH"}
    environment |= {"PYTHONPATH": str(SOURCES.parent), "OMP_NUM_THREADS": "1"}
    if methods is not None:
        environment["DEEPEN_METHODS_PATH"] = str(methods)
    return subprocess.run(
        [sys.executable, "-c", RUN_COMMANDS],
        input=json.dumps([command.split() for command in commands]),
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the whole life of one toy has taken place, in two processes."""
    place = tmp_path_factory.mktemp("toy")
    text = "The toy reads this. " * 12
    (place / "corpus.jsonl").write_text("\n".join(json.dumps({"text": f"{number}. {text}"}) for number in range(8)))
    (place / "run.json").write_text(
        json.dumps({"model": "A", "data": "corpus.jsonl", "num_steps": 5, "max_length": 64, "output_dir": "run"})
    )
    scoring = "--data corpus.jsonl --split train --max_tokens 400"
    first = deepen_commands(
        place,
        "methods",
        "graft tiny:llama --method toy --config small --out A",
        f"evaluate A --stage baseline {scoring} --output_dir before",
        f"evaluate A --stage after_surgery {scoring} --output_dir before",
        "generate A --prompt Hello --max_new_tokens 8 --no-chat",
        "train run.json --num_steps 1",
        f"evaluate run/step_1 --stage finetuned_recursive {scoring} --output_dir trained",
    )
    (place / "first.txt").write_text(first.stdout)
    assert first.returncode == 0, first.stderr
    second = deepen_commands(
        place,
        "generate run/step_1 --prompt Hello --max_new_tokens 8 --no-chat",
        f"evaluate run/step_1 --stage finetuned_recursive {scoring} --output_dir reloaded",
        f"evaluate run/step_1 --stage baseline {scoring} --output_dir reloaded",
    )
    (place / "second.txt").write_text(second.stdout)
    assert second.returncode == 0, second.stderr
    return place


def results(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_it_is_listed(folder):
    assert re.search(r"^toy +runs one small shared block .* small$", (folder / "first.txt").read_text(), re.MULTILINE)


def test_it_is_its_base_until_it_is_trained(folder):
    before, after = (results(folder, f"before/{stage}_results.json") for stage in ("baseline", "after_surgery"))
    assert (before["method"], after["method"]) == (None, "toy")
    assert after["figures"]["nll"] == pytest.approx(before["figures"]["nll"], abs=1e-6)
    assert after["figures"]["num_tokens"] == before["figures"]["num_tokens"] > 100
    assert after["figures"]["largest_move"] == before["figures"]["largest_move"] == 0.0


def test_one_step_is_logged_and_moves_its_parameters(folder):
    (line,) = (folder / "run" / "train.jsonl").read_text().splitlines()
    logged = json.loads(line)
    assert logged["step"] == 1
    assert 0 < logged["train/loss/next_token"] == logged["train/loss/total"] < 20
    assert results(folder, "run/run.json")["num_steps"] == 1
    untrained, trained = (load_file(folder / name / "weights.safetensors") for name in ("A", "run/step_1"))
    assert untrained.keys() == trained.keys() == {"down.weight", "up.weight"}
    assert not untrained["up.weight"].any() and trained["up.weight"].any()


def test_the_base_is_as_it_was(folder):
    assert results(folder, "A/deepen.json") == results(folder, "run/step_1/deepen.json")
    before, reloaded = (results(folder, f"{name}/baseline_results.json") for name in ("before", "reloaded"))
    assert reloaded["base"] == before["base"]
    assert reloaded["figures"] == before["figures"]


def test_what_is_reloaded_scores_the_same_to_the_last_bit(folder):
    before, trained, reloaded = (
        results(folder, f"{name}_results.json")["figures"]
        for name in ("before/after_surgery", "trained/finetuned_recursive", "reloaded/finetuned_recursive")
    )
    assert reloaded == trained
    assert trained["nll"] < before["nll"]


def test_without_the_folder_there_is_no_such_method(folder):
    missing = deepen_commands(folder, "graft tiny:llama --method toy --config small --out B", methods=None)
    assert missing.returncode != 0
    assert 'there is no method "toy"' in missing.stderr


def test_no_other_file_knows_of_it():
    naming = [path for path in SOURCES.rglob("*.py") if re.search(r"\btoy\b", path.read_text(), re.IGNORECASE)]
    assert naming == []
