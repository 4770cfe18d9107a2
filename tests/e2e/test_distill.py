"""`deepen distill` as a user runs it: answers by command, gone on with, and trained on."""

import json
from pathlib import Path

from deepen.cli.main import main


def test_answers_are_written_and_trained_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts = [f"{number}: it reads the same sentence again and again." for number in range(12)]
    Path("corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    options = "--data corpus.jsonl --out own/own.jsonl --num_prompts 6 --max_new_tokens 8"
    command = ["distill", "tiny:llama", *options.split()]
    assert main([*command, "--batch_size", "4"]) == 0
    out = capsys.readouterr().out
    assert "answers of tiny:llama" in out and "tokens per pass" in out and "repeat themselves" in out
    whole = Path("own/own.jsonl").read_bytes()
    Path("own/own.jsonl").write_bytes(whole[:-30])
    assert main([*command, "--batch_size", "4"]) == 0
    assert Path("own/own.jsonl").read_bytes() == whole
    assert main([*command, "--batch_size", "5"]) == 2
    assert "deepen distill: out own/own.jsonl was made by other settings: batch_size is 4 there" in (
        capsys.readouterr().err
    )
    run = {"model": "tiny:llama", "method": "dense", "config": "lora", "data": "own/own.jsonl", "num_steps": 2}
    Path("run.json").write_text(json.dumps({**run, "batch_size": 2, "max_length": 96, "output_dir": "r"}))
    assert main(["train", "run.json"]) == 0
    assert Path("r/step_2/deepen.json").is_file()
