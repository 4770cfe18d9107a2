"""A generated task as a user meets it: a model in its words, trained and evaluated on it, without a file of text."""

import json

from command_line import refused, said

SMALL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
SMALL |= {"num_attention_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": True}
TASK = "task:pointer,nodes=16,hops=1-2,examples=40,held_out=20"


def test_a_model_is_made_trained_and_evaluated(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    out = said(capsys, f"new small.json --tokenizer task:pointer --data {TASK} --out m")
    assert "134 (task:pointer)" in out and f"--data {TASK}" in out
    run = {"data": TASK, "num_steps": 2, "max_length": 64, "batch_size": 4, "eval_interval": 2, "num_samples": 1}
    run |= {"model": "m", "method": "dense", "config": "full", "output_dir": "r", "save_interval": 2}
    (tmp_path / "run.json").write_text(json.dumps(run | {"sample_tokens": 1}))
    said(capsys, "train run.json")
    lines = [json.loads(line) for line in (tmp_path / "r" / "train.jsonl").read_text().splitlines()]
    watched = [line for line in lines if "evaluation/validation/token_accuracy" in line]
    assert len(watched) == 1 and 0 <= watched[0]["evaluation/validation/token_accuracy"] <= 1
    out = said(capsys, f"evaluate r/step_2 --stage baseline --data {TASK} --max-new-tokens 0 --output_dir e")
    assert "a blind guess" in out and "6.2%" in out
    results = json.loads((tmp_path / "e" / "baseline_results.json").read_text())
    easy, hard = results["by_difficulty"]
    assert (easy["difficulty"], hard["difficulty"]) == (1, 2)
    assert easy["num_documents"] + hard["num_documents"] == 20
    assert (easy["chance"], hard["chance"]) == (1 / 16, 2 / 16)
    # One answer each, of which the prompt is not scored.
    assert results["figures"]["num_documents"] == results["figures"]["num_tokens"] == 20
    assert 'unknown key "hop"' in refused(capsys, "evaluate m --stage baseline --data task:pointer,hop=3")
    out = said(capsys, f"new small.json --tokenizer {TASK} --data {TASK} --out same")
    assert (tmp_path / "same" / "tokenizer.json").read_bytes() == (tmp_path / "m" / "tokenizer.json").read_bytes()
    assert 'unknown task "pointr"' in refused(capsys, "new small.json --tokenizer task:pointr --out n")
