"""The commands on a model in the format of moonshotai/Kimi-Linear-48B-A3B-Instruct, its own tokenizer included."""

import json
from pathlib import Path

import published_kimi
import pytest

from deepen.checkpoint import open_model
from deepen.cli.main import main
from deepen.generate.loop import complete
from deepen.generate.stop import StopConfig

SMALL = ["--set", "d_state=8", "--set", "gate_hidden=8", "--set", "max_chunk_len=16", "--set", "chunk_width=16"]
PROMPT = "hello 中文 hello"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "model"
    published_kimi.write_published_folder(folder)
    return folder


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    status = main(arguments)
    captured = capsys.readouterr()
    assert status == 0, captured.err
    assert "warning" not in captured.err
    return captured.out


def test_inspect(base, capsys):
    findings = json.loads(said(capsys, "inspect", str(base), "--json"))
    assert findings["architecture"] == "KimiLinearForCausalLM"
    assert findings["recurrent_layers"] == [0, 1, 3]
    assert (findings["num_layers"], findings["context_length"]) == (5, 512)
    assert findings["vocab_size"] == published_kimi.NUM_PIECES + 256
    assert findings["attach_points"]["layers"] == "model.layers.0 to .4 (KimiLinearDecoderLayer)"


def test_graft_and_generate(base, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    out = said(capsys, "graft", str(base), "--config", "after_surgery", "--out", str(adapter), *SMALL)
    assert "the grafted model is the base" in out
    file = tmp_path / "outcome.json"
    said(capsys, "generate", str(adapter), "--prompt", PROMPT, "--max-new-tokens", "8", "--json", str(file))
    outcome = json.loads(file.read_text())
    opened = open_model(str(base))
    framed = f"<|im_user|>user<|im_middle|>{PROMPT}<|im_end|><|im_assistant|>assistant<|im_middle|>"
    assert outcome["prompt_tokens"] == opened.tokenizer.encode(framed)
    assert outcome["stop"]["eos_ids"] == [published_kimi.NUM_PIECES + 2]
    stop = StopConfig(max_new_tokens=8, eos_ids=opened.eos_ids)
    expected = complete(opened.decoder, [outcome["prompt_tokens"]], stop=stop, tokenizer=opened.tokenizer)[0]
    assert outcome["tokens"] == list(expected.tokens) and len(expected.tokens) == 8
    assert outcome["text"] == expected.text
