"""All four stages by command: grafted, trained with recursion and without, compared, and put on a page."""

import json
import re
from pathlib import Path

import pytest
from strict_page import StrictPage

import deepen.methods
from deepen.cli.main import main

DROPPED_IN = Path(__file__).parents[1] / "contract" / "dropped_in"
STAGES = ["baseline", "after_surgery", "finetuned_vanilla", "finetuned_recursive"]
EVALUATION = ["--split", "train", "--max_tokens", "300", "--max_new_tokens", "8"]


@pytest.fixture(scope="module", autouse=True)
def toy_is_there():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepen.methods, "__path__", [*deepen.methods.__path__, str(DROPPED_IN)])
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    text = "Something is said here, and something else is said there. "
    path.write_text("\n".join(json.dumps({"text": f"{number}. {text}"}) for number in range(60)))
    return str(path)


def train(folder: Path, corpus: str, *, steps: int = 4, **run: object) -> Path:
    """A run on tiny:llama; gives its checkpoint."""
    settings = {"model": "tiny:llama", "data": corpus, "num_steps": steps, "batch_size": 2, "max_length": 64}
    watch = {"log_interval": 1, "eval_interval": 2, "eval_tokens": 100, "output_dir": str(folder)}
    (folder.parent / f"{folder.name}.json").write_text(json.dumps(settings | watch | run))
    assert main(["train", str(folder.parent / f"{folder.name}.json")]) == 0
    return folder / f"step_{steps}"


def evaluate(model: Path | str, stage: str, folder: Path, corpus: str, *options: str) -> int:
    arguments = ["evaluate", str(model), "--stage", stage, "--data", corpus, "--output_dir", str(folder)]
    return main([*arguments, *EVALUATION, *options])


@pytest.fixture(scope="module")
def made(tmp_path_factory, corpus) -> Path:
    """A folder with the results of all four stages, and the runs that two of them come from."""
    folder = tmp_path_factory.mktemp("made")
    assert main(["graft", "tiny:llama", "--method", "toy", "--config", "small", "--out", str(folder / "toy")]) == 0
    recursive = train(folder / "recursive", corpus, model=str(folder / "toy"))
    vanilla = train(folder / "vanilla", corpus, method="dense", config="lora")
    models = ["tiny:llama", folder / "toy", vanilla, recursive]
    for model, stage in zip(models, STAGES, strict=True):
        assert evaluate(model, stage, folder, corpus) == 0
    return folder


def results(made: Path, stage: str) -> dict:
    return json.loads((made / f"{stage}_results.json").read_text())


def test_a_stage_behind_training_says_what_it_cost(made):
    for stage, run in (("finetuned_vanilla", "vanilla"), ("finetuned_recursive", "recursive")):
        training = results(made, stage)["training"]
        assert training["figures"] == json.loads((made / run / "step_4" / "ledger.json").read_text())
        assert training["figures"]["steps"] == 4 and training["figures"]["training_flops"] > 0
        assert training["run"] == json.loads((made / run / "run.json").read_text())
    assert results(made, "baseline")["training"] is results(made, "after_surgery")["training"] is None


def test_four_stages_stand_side_by_side(made, capsys):
    out = made / "comparison.json"
    assert main(["compare", *STAGES, "--eval_dir", str(made), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["reference"] == "baseline"
    assert [file["stage"] for file in found["files"]] == STAGES
    nll = next(row for row in found["metrics"] if row["name"] == "nll")
    assert nll["differences"]["after_surgery"]["delta"] == pytest.approx(0, abs=1e-6)
    for stage in STAGES[2:]:
        low, high = nll["differences"][stage]["interval_95"]
        assert low <= nll["differences"][stage]["delta"] <= high != 0
    assert [verdict["label"] for verdict in found["equality"]] == ["after_surgery"]
    assert {row["name"] for row in found["training"]} >= {"steps", "training_flops"}
    assert {row["name"] for row in found["training_settings"]} >= {"model", "method", "output_dir"}
    measured, settings = shown.split("settings that differ", maxsplit=1)
    assert max(map(len, measured.splitlines())) <= 130
    assert measured.count("training_flops ") == 1 and "settings of training that differ" in settings


def test_the_page_makes_the_vanilla_run_of_a_recursive_runs_file(made, corpus, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
    (flags,) = re.findall(r"`deepen train run\.json (.*?)`", " ".join(page.split()))
    given = {"BASE": "tiny:llama", "runs/vanilla": str(tmp_path / "vanilla")}
    assert main(["train", str(made / "recursive.json"), *(given.get(flag, flag) for flag in flags.split())]) == 0
    assert evaluate(tmp_path / "vanilla" / "step_4", "finetuned_vanilla", tmp_path, corpus) == 0


def test_a_model_that_was_trained_as_a_whole_goes_back_to_its_base(made, corpus, tmp_path, capsys):
    whole = train(tmp_path / "whole", corpus, method="dense", config="full")
    assert evaluate(whole, "finetuned_vanilla", tmp_path, corpus) == 0
    found, before = results(tmp_path, "finetuned_vanilla"), results(made, "baseline")
    assert found["base"] == before["base"]
    assert found["method"] == "dense" and found["method_config"]["trains"] == "all"
    assert found["figures"]["nll"] != before["figures"]["nll"]
    files = [str(made / "baseline_results.json"), str(tmp_path / "finetuned_vanilla_results.json")]
    assert main(["compare", *files]) == 0
    # Measured as a base it is its own.
    assert evaluate(whole, "baseline", tmp_path, corpus) == 0
    assert results(tmp_path, "baseline")["documents"] == found["documents"]
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "baseline_results.json"), files[0]]) == 2
    assert "are of different bases" in capsys.readouterr().err


def test_a_base_that_was_trained_with_its_adapter_goes_back_to_what_it_was(made, corpus, tmp_path, capsys):
    both = train(tmp_path / "both", corpus, method="trm", config="trm-scratch")
    assert evaluate(both, "finetuned_recursive", tmp_path, corpus) == 0
    found, before = results(tmp_path, "finetuned_recursive"), results(made, "baseline")
    assert found["base"] == before["base"] and found["method"] == "trm"
    files = [str(made / "baseline_results.json"), str(tmp_path / "finetuned_recursive_results.json")]
    assert main(["compare", *files]) == 0
    # What is left without the adapter was trained, too.
    capsys.readouterr()
    assert evaluate(both, "baseline", tmp_path, corpus) == 0
    assert f"{both} was trained from tiny:llama, in 4 steps" in " ".join(capsys.readouterr().out.split())
    again = results(tmp_path, "baseline")
    assert again["training"] == found["training"] and again["base"]["address"] == str(both / "base")


@pytest.mark.parametrize(
    ("model", "stage", "message"),
    [
        ("recursive/step_4", "after_surgery", "was trained; measure it as finetuned_recursive"),
        ("vanilla/step_4", "finetuned_recursive", "decodes as a plain model does"),
        ("recursive/step_4", "finetuned_vanilla", "is not a base that was trained further"),
        ("toy", "finetuned_recursive", "has no ledger.json"),
        ("vanilla/step_4", "finetuned_vanila", 'did you mean "finetuned_vanilla"'),
    ],
)
def test_what_cannot_stand_there_is_refused(made, corpus, tmp_path, capsys, model, stage, message):
    capsys.readouterr()
    assert evaluate(made / model, stage, tmp_path, corpus) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def page(made) -> StrictPage:
    out, runs = made / "report.html", [str(made / name) for name in ("vanilla", "recursive")]
    compare = ["compare", *STAGES, "--eval_dir", str(made)]
    assert main([*compare, "--html", str(out), "--runs", *runs]) == 0
    assert not [path for path in made.iterdir() if path.name.startswith(".report")]
    return StrictPage.of(out)


class TestReport:
    def test_it_has_all_stages_and_verdicts_in_words(self, page):
        for name in STAGES:
            assert name in page.text
        assert "after_surgery is equal to baseline" in page.text
        assert "4 stages of tiny:llama" in page.text

    def test_it_has_plots_of_what_there_is(self, page):
        titles = {found["aria-label"] for found in page.all("svg", role="img")}
        assert titles == {
            "Quality against training FLOPs",
            "Passes per chunk",
            "Chunk lengths",
            "train/loss/total",
            "evaluation/validation/loss",
            "Validation loss against training FLOPs",
            *(title for title in titles if title.startswith("train/loss/")),
        }

    def test_it_says_what_is_not_there(self, page):
        assert "Left out: nothing was drafted in these stages' answers." in page.text

    def test_without_runs_it_says_so(self, made, tmp_path):
        out = tmp_path / "new" / "report.html"
        assert main(["compare", *STAGES[:2], "--eval_dir", str(made), "--html", str(out)]) == 0
        text = StrictPage.of(out).text
        assert "Left out: no training run was named (--runs DIR)." in text
        assert "Left out: no stage here was made by a training run" in text

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--runs", "vanilla"], "add --html FILE"),
            (["--runs", "toy", "--html", "x.html"], "toy holds no train.jsonl"),
            (["--runs", "vanilla", "vanilla", "--html", "x.html"], "more than once"),
            (["--html", "baseline_results.json/x.html"], "can't write"),
        ],
    )
    def test_bad_wishes_are_refused(self, made, monkeypatch, capsys, options, message):
        monkeypatch.chdir(made)
        capsys.readouterr()
        assert main(["compare", *STAGES[:2], "--eval_dir", ".", *options]) == 2
        assert message in capsys.readouterr().err
        assert not (made / "x.html").exists()
