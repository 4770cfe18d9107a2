"""Stages evaluated and compared by command: an untouched graft, one filled with noise, one that is not its base."""

import json
from pathlib import Path

import pytest
import torch

import deepen.methods
from deepen.checkpoint import open_model, save_adapter
from deepen.cli.main import main

DROPPED_IN = Path(__file__).parents[1] / "contract" / "dropped_in"
SMALL = ["--set", "d_state=8", "--set", "gate_hidden=8", "--set", "max_chunk_len=8", "--set", "chunk_width=8"]
SCORING = ["--split", "train", "--max_tokens", "300", "--max_new_tokens", "8"]


@pytest.fixture(scope="module", autouse=True)
def toy_is_there():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepen.methods, "__path__", [*deepen.methods.__path__, str(DROPPED_IN)])
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    text = "Something is said here, and something else is said there. "
    path.write_text("\n".join(json.dumps({"text": f"{number}. {text}"}) for number in range(8)))
    return str(path)


def evaluate(model: Path, stage: str, folder: Path, corpus: str, *options: str) -> None:
    arguments = ["evaluate", str(model), "--stage", stage, "--data", corpus, "--output_dir", str(folder)]
    assert main([*arguments, *SCORING, *options]) == 0


@pytest.fixture(scope="module")
def stages(tmp_path_factory, corpus) -> Path:
    """Results of a grafted model and its base."""
    folder = tmp_path_factory.mktemp("stages")
    adapter = folder / "adapter"
    graft = ["graft", "tiny:llama", "--method", "chunk", "--config", "after_surgery", "--set", "draft=mask"]
    assert main([*graft, *SMALL, "--out", str(adapter)]) == 0
    for stage in ("baseline", "after_surgery"):
        evaluate(adapter, stage, folder, corpus)
    return folder


def noisy(adapter: Path, folder: Path, std: float) -> Path:
    """The same adapter with every parameter drawn at random."""
    opened = open_model(str(adapter))
    generator = torch.Generator().manual_seed(0)
    noise = {
        name: torch.randn(tensor.shape, generator=generator) * std
        for name, tensor in opened.model.saved_state().items()
    }
    opened.model.load_saved_state(noise)
    save_adapter(folder, method=opened.method, model=opened.model, identity=opened.identity)
    return folder


def test_a_graft_is_its_base_to_the_last_bit(stages, capsys):
    out = stages / "comparison.json"
    assert main(["compare", "baseline", "after_surgery", "--eval_dir", str(stages), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "greedy ids equal, nats a token exactly equal" in shown
    assert "the grafted model is the base" in shown
    assert "method_config.chunk_width" in shown and "parameters_added" in shown
    found = json.loads(out.read_text())
    (verdict,) = found["equality"]
    assert verdict["holds"] and verdict["delta_nll"] == 0
    (nll,) = [row for row in found["metrics"] if row["name"] == "nll"]
    assert nll["values"]["baseline"] == nll["values"]["after_surgery"] > 0
    assert nll["differences"]["after_surgery"] == {"delta": 0.0, "interval_95": [0.0, 0.0]}


def test_exact_decoding_with_noise_in_its_sidecar_still_is_the_base(stages, corpus, tmp_path, capsys):
    evaluate(noisy(stages / "adapter", tmp_path / "noisy", 5.0), "after_surgery", tmp_path, corpus)
    files = [str(stages / "baseline_results.json"), str(tmp_path / "after_surgery_results.json")]
    assert main(["compare", *files]) == 0
    assert "the grafted model is the base" in capsys.readouterr().out


def test_a_graft_that_is_not_its_base_fails(stages, corpus, tmp_path, capsys):
    assert main(["graft", "tiny:llama", "--method", "toy", "--config", "small", "--out", str(tmp_path / "toy")]) == 0
    evaluate(noisy(tmp_path / "toy", tmp_path / "noisy", 0.3), "after_surgery", tmp_path, corpus)
    files = [str(stages / "baseline_results.json"), str(tmp_path / "after_surgery_results.json")]
    out = tmp_path / "comparison.json"
    assert main(["compare", *files, "--out", str(out)]) == 1
    shown = capsys.readouterr().out
    assert "NOT EQUAL to the base" in shown and "DIFFERENT: " in shown
    (verdict,) = json.loads(out.read_text())["equality"]
    assert not verdict["holds"] and verdict["ids_equal"] is False and abs(verdict["delta_nll"]) > 1e-3


@pytest.mark.parametrize(
    ("num_tokens", "reason"),
    [("4", "with max_new_tokens 8, and"), ("0", "evaluate both with max_new_tokens above 0")],
)
def test_answers_that_cannot_be_compared_are_no_verdict(stages, corpus, tmp_path, capsys, num_tokens, reason):
    evaluate(stages / "adapter", "after_surgery", tmp_path, corpus, "--max_new_tokens", num_tokens)
    capsys.readouterr()
    files = [str(stages / "baseline_results.json"), str(tmp_path / "after_surgery_results.json")]
    assert main(["compare", *files]) == 2
    shown = capsys.readouterr().out
    assert "NOT JUDGED: " in shown and reason in shown and "NOT EQUAL" not in shown
    assert "tokens_per_second: the machine's speed in one run of each stage" in shown


def test_results_that_are_replaced_are_named(stages, corpus, tmp_path, capsys):
    file = tmp_path / "baseline_results.json"
    for model, told in {
        "tiny:llama": f"written to {file}\n",
        "tiny:qwen3": f"written to {file} in place of the results of tiny:llama\n",
    }.items():
        capsys.readouterr()
        evaluate(Path(model), "baseline", tmp_path, corpus, "--max_new_tokens", "0")
        assert capsys.readouterr().out.endswith(told)
    file.write_text("{}")
    evaluate(Path("tiny:llama"), "baseline", tmp_path, corpus, "--max_new_tokens", "0")
    assert "in place of a file that is no results file\n" in capsys.readouterr().out


def test_in_bfloat16_figures_count(stages, corpus, tmp_path, capsys):
    for stage in ("baseline", "after_surgery"):
        evaluate(stages / "adapter", stage, tmp_path, corpus, "--dtype", "bfloat16")
    assert main(["compare", "baseline", "after_surgery", "--eval_dir", str(tmp_path)]) == 0
    assert "nats a token less than 0.1% apart, in this dtype" in capsys.readouterr().out


@pytest.fixture
def refused(capsys):
    """Run `compare` so that it must be refused, and give the message."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["compare", *arguments]) == 2
        message = capsys.readouterr().err
        assert message.startswith("deepen compare: ") and "Traceback" not in message
        return message

    return run


class TestBadInput:
    def test_files_that_are_not_there(self, refused, stages, tmp_path):
        assert f"there is no results file at {tmp_path}/baseline_results.json" in refused(
            "baseline", "after_surgery", "--eval_dir", str(tmp_path)
        )
        assert "needs at least two results files, not 1" in refused(str(stages / "baseline_results.json"))
        assert "needs at least two results files, not 0" in refused()
        twice = [str(stages / "baseline_results.json")] * 2
        assert "is given more than once" in refused(*twice)

    def test_files_of_something_else(self, refused, stages, tmp_path):
        manifest = str(stages / "adapter" / "deepen.json")
        message = refused(str(stages / "baseline_results.json"), manifest)
        assert f'{manifest} is not a results file: it has no field "stage"' in message

    def test_files_of_another_version(self, refused, stages, tmp_path):
        content = json.loads((stages / "after_surgery_results.json").read_text())
        later = tmp_path / "later.json"
        later.write_text(json.dumps({**content, "format": 99, "deepen_version": "9.0"}))
        message = refused(str(stages / "baseline_results.json"), str(later))
        assert f'{later} has "format" 99' in message and "use the version that wrote it (9.0)" in message

    def test_stages_of_other_bases(self, refused, stages, corpus, tmp_path):
        evaluate(Path("tiny:qwen3"), "baseline", tmp_path, corpus, "--max_new_tokens", "0")
        message = refused(str(tmp_path / "baseline_results.json"), str(stages / "after_surgery_results.json"))
        assert "are of different bases: base.fingerprint is" in message and "tiny:qwen3" in message

    def test_stages_of_other_documents(self, refused, stages, corpus, tmp_path):
        evaluate(stages / "adapter", "after_surgery", tmp_path, corpus, "--max_samples", "2", "--max_new_tokens", "0")
        message = refused(str(stages / "baseline_results.json"), str(tmp_path / "after_surgery_results.json"))
        assert "don't score the same documents" in message and "config.max_samples is 2 and None" in message

    def test_a_seed_that_cannot_be(self, refused, stages):
        assert "--seed must be 0 or more, not -1" in refused("baseline", "after_surgery", "--seed", "-1")

    def test_an_unwritable_place(self, refused, stages, tmp_path):
        (tmp_path / "file").write_text("")
        message = refused(
            "baseline", "after_surgery", "--eval_dir", str(stages), "--out", str(tmp_path / "file" / "x.json")
        )
        assert "can't write" in message
