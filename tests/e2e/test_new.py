"""`deepen new` as a user runs it: what it writes is opened, trained on and looked into by the other commands."""

import json
from pathlib import Path

import pytest
from command_line import refused, said, write_sentences
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepen.data.tokenizer import VOCAB_SIZE

SMALL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": True}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder to work in, with a configuration and a corpus."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    write_sentences(tmp_path / "corpus.jsonl", 60)
    return tmp_path


def test_a_model_of_bytes(place, capsys):
    out = said(capsys, "new small.json --out m --seed 3 --context_length 48")
    facts = dict(line.strip().split("  ", 1) for line in out.splitlines()[1:-1])
    parameters = sum(each.numel() for each in AutoModelForCausalLM.from_pretrained("m").parameters())
    assert facts["parameters"].strip() == f"{parameters:,}"
    assert facts["embedding"].strip() == f"{32 * VOCAB_SIZE:,}" and facts["head"].strip() == "the embedding's"
    assert facts["context"].strip() == "48" and facts["vocabulary"].strip() == f"{VOCAB_SIZE} (bytes)"
    assert out.splitlines()[-1].startswith("train it: deepen train RUN.json --model m ")
    assert AutoTokenizer.from_pretrained("m").encode("hi") == [ord("h"), ord("i")]
    generated = said(capsys, "generate m --prompt hi --max_new_tokens 4 --no-chat")
    assert generated == said(capsys, "generate m --prompt hi --max_new_tokens 4 --no-chat")


def test_a_model_of_pairs_is_trained(place, capsys):
    assert "300 (bpe:300)" in said(capsys, "new small.json --tokenizer bpe:300 --data corpus.jsonl --out m")
    run = {"data": "corpus.jsonl", "num_steps": 3, "max_length": 32, "batch_size": 2, "config": "lora"}
    (place / "run.json").write_text(json.dumps({**run, "model": "m", "method": "dense", "output_dir": "r"}))
    said(capsys, "train run.json")
    report = said(capsys, "check r/step_3 --quick")
    assert "failed" not in report


def test_a_shipped_configuration(place, capsys):
    assert "llama, 5 layers of width 128" in said(capsys, "new llama-1m --out m")


def test_an_adapter_on_it_by_graft(place, capsys):
    said(capsys, "new small.json --out m --context_length 256")
    said(capsys, "graft m --method dense --config vanilla --out a")
    assert json.loads((place / "a" / "deepen.json").read_text())["method"] == "dense"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("new small.json", "--out"),
        ("new smal.json --out m", "neither a file nor a shipped configuration"),
        ("new small.json --tokenizer bpe:300 --out m", "--data"),
        ("new small.json --tokenizer bpe:300 --data nowhere --out m", 'unknown corpus "nowhere"'),
        ("new small.json --out small.json", "is a file"),
        ("new small.json --out .", "exists and is not empty"),
    ],
)
def test_what_cannot_be_made(place, capsys, command, words):
    message = refused(capsys, command)
    assert words in message
    assert sorted(path.name for path in place.iterdir()) == ["corpus.jsonl", "small.json"]
