"""A model that a method brings, as a user meets it: made, trained, resumed, looked into, measured and continued."""

import json
import re
from pathlib import Path

import pytest
import torch
from command_line import refused, said, write_sentences
from safetensors.torch import load_file
from strict_page import StrictPage

from deepen.checkpoint import open_model
from deepen.core.errors import DeepenError
from deepen.data.batches import batch_of, document_rows
from deepen.data.split import documents
from deepen.train.config import RunConfig
from deepen.train.run import train

SMALL = {
    "model_type": "mor",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_recursions": 3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
BUFFERS = {
    "expert_choice": {"model.router.thresholds"},
    "token_choice": {"model.router.choice_bias", "model.router.loads"},
}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with configurations and a corpus."""
    monkeypatch.chdir(tmp_path)
    for routing in BUFFERS:
        (tmp_path / f"{routing}.json").write_text(json.dumps({**SMALL, "routing": routing}))
    write_sentences(tmp_path / "corpus.jsonl", 200)
    return tmp_path


def run_of(**fields) -> RunConfig:
    common = {"model": "m", "data": "corpus.jsonl", "max_length": 48, "batch_size": 4, "learning_rate": 2e-3}
    return RunConfig.from_dict({**common, **fields})


def trained(**fields) -> dict[str, torch.Tensor]:
    return load_file(train(run_of(**fields), show=lambda line: None) / "model.safetensors")


@pytest.mark.parametrize("routing", BUFFERS)
def test_a_run_that_was_cut_off_goes_on_to_the_same_bits(place, capsys, routing):
    said(capsys, f"new {routing}.json --out m")
    before = load_file("m/model.safetensors")
    whole = trained(num_steps=6, output_dir="whole")
    trained(num_steps=6, output_dir="cut", save_interval=3, keep_checkpoints=9)
    for file in sorted(Path("cut/step_6").rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    Path("cut/step_6").rmdir()
    assert trained(num_steps=6, output_dir="cut", save_interval=3).keys() == whole.keys()
    resumed = load_file("cut/step_6/model.safetensors")
    for name, tensor in whole.items():
        assert torch.equal(resumed[name], tensor), name
    assert whole.keys() >= BUFFERS[routing]
    assert any(not torch.equal(whole[name], before[name]) for name in BUFFERS[routing])


def test_neither_micro_batches_nor_recomputing_matter(place, capsys):
    said(capsys, "new expert_choice.json --out m")
    plain = trained(num_steps=3, output_dir="plain")
    for name, fields in {"parts": {"num_micro_batches": 4}, "recomputed": {"recompute": True}}.items():
        other = trained(num_steps=3, output_dir=name, **fields)
        for key, tensor in plain.items():
            torch.testing.assert_close(other[key], tensor, rtol=0, atol=1e-5)


def test_every_command_takes_it(place, capsys):
    out = said(capsys, "new expert_choice.json --tokenizer bpe:300 --data corpus.jsonl --out m")
    assert out.splitlines()[-1] == "train it: deepen train RUN.json --model m --data corpus.jsonl"
    (place / "run.json").write_text(
        json.dumps({"model": "m", "data": "corpus.jsonl", "num_steps": 3, "max_length": 32})
    )
    said(capsys, "train run.json --output_dir r --eval_interval 3")
    (line,) = [json.loads(each) for each in Path("r/train.jsonl").read_text().splitlines()][-1:]
    told = {"loss/final_ce", "loss/auxiliary", "loss/z", "router/kept_1", "router/depth", "router/dead"}
    assert {f"train/{name}" for name in told} <= line.keys()
    assert line["train/performance/flops"] > 0
    generated = said(capsys, "generate r/step_3 --prompt it --max_new_tokens 4 --no-chat")
    assert generated == said(capsys, "generate r/step_3 --prompt it --max_new_tokens 4 --no-chat")
    inspected = json.loads(said(capsys, "inspect r/step_3 --json"))
    assert (inspected["method"], inspected["num_layers"], inspected["adapter"]) == ("mor", 4, None)
    scoring = "--data corpus.jsonl --split train --max_tokens 300 --max_new_tokens 8 --output_dir e"
    for stage in ("baseline", "finetuned_recursive"):
        said(capsys, f"evaluate r/step_3 --stage {stage} {scoring}")
    results = [json.loads(Path(f"e/{stage}_results.json").read_text()) for stage in ("baseline", "finetuned_recursive")]
    assert results[0]["figures"]["nll"] == results[1]["figures"]["nll"] < 7
    assert results[1]["figures"]["largest_move"] < 1e-5
    assert results[1]["looking_ahead"] is None
    assert "failed" not in said(capsys, "check r/step_3 --quick")


SCORING = "--data corpus.jsonl --split train --max_tokens 300 --max_new_tokens 0"


def evaluated(capsys, model: str, options: str = "", *, stage: str = "baseline", folder: str = "e") -> tuple[str, dict]:
    """What `deepen evaluate` prints, and what it writes."""
    shown = said(capsys, f"evaluate {model} --stage {stage} {SCORING} --output_dir {folder} {options}")
    return shown, json.loads(Path(f"{folder}/{stage}_results.json").read_text())


def test_an_evaluation_says_how_deep_tokens_ran(place, capsys):
    said(capsys, "new expert_choice.json --tokenizer bpe:300 --data corpus.jsonl --out m")
    shown, results = evaluated(capsys, "m")
    found, opened = results["depths"], open_model("m")
    texts = documents("corpus.jsonl", "train")
    rows = list(document_rows(texts, opened.tokenizer, max_length=512, max_tokens=300))
    every = [
        depth
        for row in rows
        if len(row) > 32
        for depth in opened.model.base(torch.tensor([row]), use_cache=False).depths[0].tolist()
    ]
    assert found["histogram"] == [every.count(depth) for depth in (1, 2, 3)] and found["num_tokens"] == len(every)
    assert len({*every}) > 1
    assert found["texts"][0]["depths"] == every[: len(found["texts"][0]["depths"])]
    assert opened.tokenizer.decode(rows[0]).startswith("".join(found["texts"][0]["pieces"]))
    assert sum(each["num_tokens"] for each in found["by_class"].values()) == len(every)
    assert sum(each["num_tokens"] for each in found["nll_by_depth"]) == results["figures"]["num_tokens"]
    total = sum(each["num_tokens"] * (each["mean"] or 0) for each in found["nll_by_depth"])
    assert total / results["figures"]["num_tokens"] == pytest.approx(results["figures"]["nll"], rel=1e-6)
    assert f"{found['mean']:.3f} recursions a token" in shown and f"{found['dead']:.1%}" in shown
    assert re.search("^special +0 +none$", shown, re.MULTILINE)
    assert results["at_recursions"] is None


def test_timed_it_has_no_plain_path_to_be_compared_with(place, capsys):
    said(capsys, "new expert_choice.json --tokenizer bpe:300 --data corpus.jsonl --out m")
    shown, results = evaluated(capsys, "m", "--max_new_tokens 2 --speed --rounds 1")
    assert {line["path"] for line in results["speed"]} == {"mor"}
    assert all(line["against_plain"] is None and line["ms_per_token"] > 0 for line in results["speed"])
    assert re.search(r"^code +mor +1 +[0-9.]+ +-$", shown, re.MULTILINE)
    said(capsys, f"evaluate m --stage baseline {SCORING} --output_dir untimed")
    compared = said(capsys, "compare e/baseline_results.json untimed/baseline_results.json")
    assert "code, mor, ms_per_token" in compared and "against_plain" not in compared


def test_more_recursions_and_fewer_are_a_table(place, capsys):
    said(capsys, "new expert_choice.json --tokenizer bpe:300 --data corpus.jsonl --out m")
    shown, results = evaluated(capsys, "m", "--recursions 1 3 5")
    lines = results["at_recursions"]
    assert [line["num_recursions"] for line in lines] == [1, 3, 5]
    assert [line["as_trained"] for line in lines] == [False, True, False]
    assert lines[1]["figures"] == results["figures"] and lines[1]["mean_depth"] == results["depths"]["mean"]
    assert len({line["figures"]["nll"] for line in lines}) == 3
    assert lines[0]["mean_depth"] == 1 < lines[1]["mean_depth"] < lines[2]["mean_depth"]
    for line in lines:
        name = f"{line['num_recursions']}" + " (as trained)" * line["as_trained"]
        assert re.search(rf"^{re.escape(name)} +{line['figures']['nll']:.6f}", shown, re.MULTILINE), shown


def test_without_a_router_all_run_as_deep_as_is_asked(place, capsys):
    (place / "none.json").write_text(json.dumps({**SMALL, "routing": "none"}))
    said(capsys, "new none.json --tokenizer bpe:300 --data corpus.jsonl --out m")
    shown, results = evaluated(capsys, "m", "--recursions 2 4")
    assert results["depths"] is None and "mean depth, " not in shown and "class of token" not in shown
    assert [line["mean_depth"] for line in results["at_recursions"]] == [2.0, 4.0]


def test_a_text_is_continued_with_more_recursions(place, capsys):
    # Untrained, and yet layers say more than the embedding that they begin with.
    loud = {**SMALL, "routing": "none", "tie_word_embeddings": False, "initializer_range": 0.3}
    (place / "none.json").write_text(json.dumps(loud))
    said(capsys, "new none.json --tokenizer bpe:300 --data corpus.jsonl --out m")
    told = {}
    for options in ("", "--recursions 3", "--recursions 6"):
        said(capsys, f"generate m --prompt it --max_new_tokens 12 --no-chat --json g.json {options}")
        told[options] = json.loads(Path("g.json").read_text())
    plain, same, deeper = told.values()
    assert same["tokens"] == plain["tokens"] != deeper["tokens"]
    assert [each["config"]["num_recursions"] for each in told.values()] == [3, 3, 6]
    assert "a model runs 1 at least" in refused(capsys, "generate m --prompt it --recursions 0")
    assert "tiny:llama has no recursions" in refused(capsys, "generate tiny:llama --prompt it --recursions 2")


def test_depths_and_what_looks_ahead_stand_in_the_report(place, capsys):
    (place / "topk.json").write_text(json.dumps({**SMALL, "selection": "topk"}))
    said(capsys, "new topk.json --tokenizer bpe:300 --data corpus.jsonl --out m")
    (place / "run.json").write_text(
        json.dumps({"model": "m", "data": "corpus.jsonl", "num_steps": 1, "max_length": 32})
    )
    said(capsys, "train run.json --output_dir r")
    evaluated(capsys, "m")
    shown, results = evaluated(capsys, "r/step_1", "--recursions 3 4", stage="finetuned_recursive")
    assert f"{results['looking_ahead']['nll']:.6f} nats per token, by decisions that no model" in shown
    assert results["looking_ahead"]["nll"] != results["figures"]["nll"]
    assert "largest_move" in results["figures"] and "largest_move" not in results["looking_ahead"]
    compared = said(capsys, "compare baseline finetuned_recursive --eval_dir e --html report.html --out c.json")
    for heading in ("depth of tokens", "other numbers of recursions", "looking ahead, not causal"):
        assert heading in compared
    assert "config.recursions" not in compared
    page = StrictPage.of(Path("report.html"))
    assert {"depths", "at_recursions", "looking_ahead"} <= page.ids
    texts = results["depths"]["texts"]
    assert len(page.all("p", class_="tokens")) == 2 * len(texts)
    assert len(page.all("span", class_="token")) == 3 + 2 * sum(len(text["pieces"]) for text in texts)
    assert "Not causal: " in page.text


def test_a_trained_model_is_compared_with_what_it_was_trained_from(place, capsys):
    said(capsys, "new expert_choice.json --tokenizer bpe:300 --data corpus.jsonl --out m")
    (place / "run.json").write_text(
        json.dumps({"model": "m", "data": "corpus.jsonl", "num_steps": 2, "max_length": 32, "output_dir": "r"})
    )
    said(capsys, "train run.json")
    _, before = evaluated(capsys, "m")
    _, after = evaluated(capsys, "r/step_2", stage="finetuned_recursive")
    assert after["base"] == {**before["base"], "address": "m"}
    assert after["method"] == before["method"] == "mor"
    assert before["training"] is None and after["training"]["figures"]["steps"] == 2
    files = "e/baseline_results.json e/finetuned_recursive_results.json"
    assert f"{after['figures']['nll'] - before['figures']['nll']:+.3g}" in said(capsys, f"compare {files}")
    # As a baseline a trained model is its own base, of what is made of it, and says that it was trained.
    shown, again = evaluated(capsys, "r/step_2", folder="later")
    assert again["training"] == after["training"] and again["base"]["address"] == str(place / "r/step_2")
    assert "r/step_2 was trained from m, in 2 steps: this is the baseline of what is made of it" in shown
    message = refused(capsys, "compare later/baseline_results.json e/finetuned_recursive_results.json")
    assert "are of different bases" in message and "`deepen evaluate m --stage baseline`" in message


def test_recursions_that_cannot_be_run_are_refused(place, capsys):
    said(capsys, "new token_choice.json --tokenizer bpe:300 --data corpus.jsonl --out m")
    for options, message in {
        "m --recursions 4": "the token_choice router of this model has an output for each of 3 depths",
        "m --recursions 0": "recursions must be different numbers of at least 1, and 0 is not one of these",
        "tiny:llama --recursions 2": "tiny:llama has no recursions that could be run more often or less often",
    }.items():
        assert message in refused(capsys, f"evaluate {options} --stage baseline {SCORING} --output_dir e")
    assert not Path("e").exists()


def test_what_it_is_not_for_is_said(place, capsys):
    said(capsys, "new expert_choice.json --out m")
    (place / "run.json").write_text(
        json.dumps({"model": "m", "data": "corpus.jsonl", "num_steps": 1, "method": "dense"})
    )
    assert "m is a model of mor: leave out method and config" in refused(capsys, "train run.json")
    assert "nothing was grafted" in refused(capsys, "evaluate m --stage after_surgery --data corpus.jsonl")
    assert "is a model of its own" in refused(capsys, "graft tiny:llama --method mor --config mor-1m-nr3 --out g")
    bad = {**SMALL, "num_hidden_layers": 9}
    (place / "bad.json").write_text(json.dumps(bad))
    assert "nearest depths are 8 and 11" in refused(capsys, "new bad.json --out x")
    (place / "bad.json").write_text(json.dumps({**SMALL, "kv_mode": "shared"}))
    assert 'no "kv_mode"' in refused(capsys, "new bad.json --out x")


def test_a_setting_of_a_run_is_that_of_the_model(place, capsys):
    said(capsys, "new expert_choice.json --out m")
    folder = train(run_of(num_steps=1, output_dir="r", overrides={"selection": "topk"}), show=lambda line: None)
    assert open_model(str(folder)).model.config.selection == "topk"
    with pytest.raises(DeepenError, match="num_recursions is 3 in this model"):
        train(run_of(num_steps=1, output_dir="s", overrides={"num_recursions": 2}), show=lambda line: None)


def test_packed_it_scores_the_same(place, capsys):
    said(capsys, "new expert_choice.json --out m")
    batch = batch_of([[*range(40)], [*range(50, 71)]])
    plain, packed = (open_model("m", pack=each).model.score(batch).log_probs for each in (False, True))
    torch.testing.assert_close(packed, plain, rtol=0, atol=1e-4)
