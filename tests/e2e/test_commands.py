"""The commands as a user runs them: a few in a process of their own, the rest through `main`."""

import importlib
import io
import json
import os
import subprocess
import sys
import warnings
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import torch

import deepen
from deepen.backbones.resolve import load
from deepen.checkpoint import MANIFEST, open_model
from deepen.cli import bench_delta, generate, graft, output, verification
from deepen.cli.main import VERBS, main
from deepen.cli.options import read_settings
from deepen.core.errors import CannotScore, ConfigError
from deepen.core.types import Score
from deepen.generate.loop import complete
from deepen.generate.stop import StopConfig
from deepen.methods.chunk.model import ChunkRefineWrapper

SMALL = ["--set", "d_state=8", "--set", "gate_hidden=8", "--set", "max_chunk_len=16", "--set", "chunk_width=16"]
# Behind it tiny:nanochat repeats itself, so that some copied drafts are right.
PROMPT = "hello hello hello"


def adapter(folder: Path, base: str = "tiny:llama", *settings: str) -> Path:
    given = [part for setting in settings for part in ("--set", setting)]
    assert main(["graft", base, "--config", "after_surgery", "--out", str(folder), *SMALL, *given]) == 0
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return adapter(tmp_path_factory.mktemp("adapters") / "llama")


@pytest.fixture(scope="module")
def nanochat(tmp_path_factory) -> Path:
    return adapter(tmp_path_factory.mktemp("adapters") / "nanochat", "tiny:nanochat")


def python(*arguments: str, stdin: str = "", **environment: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python ARGUMENTS` with deepen on its path, newlines as they came."""
    variables = {"PYTHONPATH": str(Path(deepen.__file__).parents[1]), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *arguments]
    ran = subprocess.run(
        command, env={**os.environ, **variables}, input=stdin.encode(), capture_output=True, check=False
    )
    return ran.returncode, ran.stdout.decode(), ran.stderr.decode()


def said(capsys, *arguments: str) -> tuple[str, str]:
    """stdout and stderr of a command that succeeds."""
    capsys.readouterr()
    status = main(arguments)
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out, captured.err


def refused(capsys, *arguments: str) -> str:
    """What a command that can't be run says on stderr."""
    assert main(arguments) == 2
    return capsys.readouterr().err


def plain_text(base: str, prompt: str, num_tokens: int) -> str:
    """The base's own continuation, by plain decoding."""
    opened = open_model(base)
    ids = opened.tokenizer.encode(prompt)
    stop = StopConfig(max_new_tokens=num_tokens, eos_ids=opened.eos_ids)
    return complete(opened.decoder, [ids], stop=stop, tokenizer=opened.tokenizer)[0].text


class TestFrame:
    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
    def test_help_lists_every_verb(self, arguments, capsys):
        out, _ = said(capsys, *arguments)
        for verb, summary in VERBS.items():
            assert f"  {verb}" in out and summary in out

    def test_version(self, capsys):
        assert said(capsys, "--version")[0] == f"deepen {deepen.__version__}\n"

    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_has_options_and_help(self, verb, capsys):
        module = importlib.import_module(f"deepen.cli.{verb}")
        assert is_dataclass(module.Options)
        out, _ = said(capsys, verb, "--help")
        assert out.startswith(f"usage: deepen {verb} ") and len(out.splitlines()) > 3

    @pytest.mark.parametrize(
        "arguments", [["--help"], ["--version"], ["methods"], ["graft", "--help"], ["generate", "--help"]], ids=" ".join
    )
    def test_torch_is_not_imported_for_it(self, arguments):
        status, _, report = python("-X", "importtime", "-m", "deepen", *arguments)
        imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in report.splitlines()}
        assert status == 0 and "deepen" in imported
        assert imported & {"torch", "transformers", "numpy"} == set()

    def test_an_interruption(self, monkeypatch, capsys):
        def interrupted(_: object) -> int:
            raise KeyboardInterrupt

        monkeypatch.setattr(generate, "run", interrupted)
        assert main(["generate", "tiny:llama"]) == 130
        assert capsys.readouterr().err == "\ndeepen generate: interrupted\n"

    def test_the_verdict_of_a_verb_is_the_exit_status(self, monkeypatch):
        monkeypatch.setattr(generate, "run", lambda options: 1)
        assert main(["generate", "tiny:llama"]) == 1

    def test_a_bug_of_ours_keeps_its_traceback(self, monkeypatch):
        def broken(_: object) -> int:
            raise ZeroDivisionError

        monkeypatch.setattr(generate, "run", broken)
        with pytest.raises(ZeroDivisionError):
            main(["generate", "tiny:llama"])

    @pytest.mark.filterwarnings("default")
    def test_a_warning_is_one_line(self, monkeypatch, capsys):
        def warned(_: object) -> int:
            warnings.warn("slow\n   here", stacklevel=1)
            return 0

        monkeypatch.setattr(generate, "run", warned)
        before = warnings.showwarning
        assert said(capsys, "generate", "tiny:llama")[1] == "deepen generate: warning: slow here\n"
        assert warnings.showwarning is before

    def test_a_reader_that_has_gone(self):
        reading, writing = os.pipe()
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            ran = subprocess.run(
                [sys.executable, "-m", "deepen", "methods"],
                env={**os.environ, "PYTHONPATH": str(Path(deepen.__file__).parents[1])},
                stdout=pipe,
                stderr=subprocess.PIPE,
                check=False,
            )
        assert (ran.returncode, ran.stderr) == (141, b"")


class TestSettings:
    def test_values_are_json_or_text(self):
        texts = ["a=3", "b=0.5", "c=true", "d=null", "e=[1, 2]", "f=lookup", 'g="3"', "h=a=b", "i="]
        assert read_settings(texts) == {
            "a": 3,
            "b": 0.5,
            "c": True,
            "d": None,
            "e": [1, 2],
            "f": "lookup",
            "g": "3",
            "h": "a=b",
            "i": "",
        }

    @pytest.mark.parametrize("texts", [["a"], ["=3"], [""]])
    def test_one_that_sets_nothing(self, texts):
        with pytest.raises(ConfigError, match="write it as KEY=VALUE"):
            read_settings(texts)

    def test_one_that_is_set_twice(self):
        with pytest.raises(ConfigError, match="--set a is given more than once"):
            read_settings(["a=1", "a=2"])


class TestOutput:
    def test_a_table(self, capsys):
        output.print_table(("name", "count"), [("a [red]b[/red]", 1234), ("c", 5)])
        assert capsys.readouterr().out == "name            count\na [red]b[/red]  1,234\nc                   5\n"

    def test_nothing_is_cut_where_there_is_no_terminal(self, capsys):
        output.print_facts({"key": "long " * 100})
        assert capsys.readouterr().out == f"key  {('long ' * 100).rstrip()}\n"

    @pytest.mark.parametrize(
        ("number", "unit", "text"),
        [
            *[(0, "", "0"), (999, "", "999"), (1000, "", "1 K"), (134_515_008, "", "135 M"), (1536, "B", "1.54 KB")],
            *[(269_028_864, "", "269 M"), (6.04e9, "B", "6.04 GB"), (2e18, "", "2000 P")],
        ],
    )
    def test_large_numbers(self, number, unit, text):
        assert output.quantity(number, unit) == text

    def test_progress_is_silent_at_first_and_then_says_a_line_now_and_then(self, monkeypatch, capsys):
        now = [0.0]
        monkeypatch.setattr(output, "perf_counter", lambda: now[0])
        with output.progress("reading", total=10) as advance:
            for seconds in (0.5, 1.9, 2.5, 10.0, 32.0, 33.0):
                now[0] = seconds
                advance(1)
        assert capsys.readouterr().err.splitlines() == [
            "deepen: reading: 3 of 10, 2 s",
            "deepen: reading: 6 of 10, 33 s",
        ]

    def test_a_terminal_gets_a_bar(self, monkeypatch, capsys):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        now = [0.0]
        monkeypatch.setattr(output, "perf_counter", lambda: now[0])
        with output.progress("reading", total=2) as advance:
            advance(1)
            assert capsys.readouterr().err == ""
            now[0] = 3.0
            advance(1)
        assert "reading" in capsys.readouterr().err


class TestMethods:
    def test_each_is_listed_with_its_presets(self, capsys):
        lines = said(capsys, "methods")[0].splitlines()
        assert lines[0].split() == ["method", "what", "it", "does", "presets"]
        assert any(line.startswith("chunk ") and "after_surgery, baseline" in line for line in lines)


class TestGraft:
    def test_the_configuration_the_budget_and_the_verdict_are_printed(self, tmp_path, capsys):
        out, _ = said(capsys, "graft", "tiny:llama", "--config", "after_surgery", "--out", str(tmp_path / "a"), *SMALL)
        printed = json.loads(out[out.index("{") : out.index("\n}") + 2])
        assert printed["d_state"] == 8 and printed["recursive_enabled"] is True
        facts = dict(line.strip().split("  ", 1) for line in out.splitlines() if "  " in line.strip())
        opened = open_model(str(tmp_path / "a"))
        assert facts["added parameters"].strip() == f"{opened.model.num_sidecar_parameters:,}"
        assert facts["base parameters"].strip() == f"{opened.backbone.num_parameters:,}"
        assert facts["layers refined"].strip() == "2 of 4 (2-3)"
        assert facts["greedy tokens"].strip() == f"{verification.NUM_TOKENS} of {verification.NUM_TOKENS} equal"
        assert facts["verdict"].strip() == "the grafted model is the base"
        assert {file.name for file in (tmp_path / "a").iterdir()} == {
            MANIFEST,
            "recursive_config.json",
            "sidecar.safetensors",
        }

    @pytest.mark.parametrize("base", ["tiny:nanochat", "tiny:qwen3"])
    def test_other_bases(self, base, tmp_path, capsys):
        adapter(tmp_path / "a", base)
        assert "the grafted model is the base" in capsys.readouterr().out
        assert open_model(str(tmp_path / "a")).identity.address == base

    @pytest.mark.parametrize("base", ["tiny:kimi_linear", "tiny:qwen3_next"])
    def test_a_recurrent_base_drafts_too(self, base, tmp_path, capsys):
        lookup = ["--out", str(tmp_path / "a"), *SMALL, "--set", "draft=lookup"]
        said(capsys, "graft", base, "--config", "after_surgery", *lookup)
        prompt = ["--prompt", "a b a b a b", "--no-chat", "--max-new-tokens", "12", "--stats"]
        out, err = said(capsys, "generate", str(tmp_path / "a"), *prompt)
        assert out.removesuffix("\n") == plain_text(base, "a b a b a b", 12).removesuffix("\n")
        assert "lookup" in err

    def test_a_configuration_file(self, tmp_path, capsys):
        file = tmp_path / "mine.json"
        file.write_text('{"recursive_enabled": true, "d_state": 4, "gate_hidden": 8}')
        said(capsys, "graft", "tiny:llama", "--config", str(file), "--out", str(tmp_path / "a"), "--method", "chunk")
        assert open_model(str(tmp_path / "a")).model.config.d_state == 4

    def test_half_precision_is_verified_to_its_own_rounding(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
        arguments = ["--config", "after_surgery", "--out", str(tmp_path / "a"), "--dtype", "bfloat16", *SMALL]
        out, _ = said(capsys, "graft", "tiny:llama", *arguments)
        assert "allowed 8e-03" in out and "the grafted model is the base" in out

    def test_a_graft_that_changes_tokens_is_not_saved(self, tmp_path, capsys, monkeypatch):
        honest = ChunkRefineWrapper.advance

        def dishonest(self, decoding, sampler):
            advance = honest(self, decoding, sampler)
            decoding.rows[0][-1] = 3
            return type(advance)(
                tuple(type(row)((*row.tokens[:-1], 3)) for row in advance.rows),
                advance.spent,
            )

        monkeypatch.setattr(ChunkRefineWrapper, "advance", dishonest)
        assert main(["graft", "tiny:llama", "--config", "after_surgery", "--out", str(tmp_path / "a"), *SMALL]) == 2
        captured = capsys.readouterr()
        assert "the grafted model is NOT the base" in captured.out
        assert "0 of 48 equal; then two tokens" in captured.err and "Nothing was saved" in captured.err
        assert list(tmp_path.iterdir()) == []

    def test_a_graft_that_changes_scores_is_not_saved(self, tmp_path, capsys, monkeypatch):
        honest = ChunkRefineWrapper.score

        def dishonest(self, batch):
            score = honest(self, batch)
            return Score(score.log_probs - 1e-4, score.scored, score.correct)

        monkeypatch.setattr(ChunkRefineWrapper, "score", dishonest)
        assert main(["graft", "tiny:llama", "--config", "after_surgery", "--out", str(tmp_path / "a"), *SMALL]) == 2
        assert "-1.0e-04 nats a token" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_a_model_that_cannot_score_is_judged_by_its_tokens(self, tmp_path, capsys, monkeypatch):
        def unable(self, batch):
            raise CannotScore("it has no scores")

        monkeypatch.setattr(ChunkRefineWrapper, "score", unable)
        out, _ = said(capsys, "graft", "tiny:llama", "--config", "after_surgery", "--out", str(tmp_path / "a"), *SMALL)
        assert "not compared: it has no scores" in out and "the grafted model is the base" in out


class TestChooseMethod:
    @pytest.fixture
    def methods(self, monkeypatch, tmp_path):
        """Three of them, two with a preset of one name."""
        from deepen.core.registry import Method

        (tmp_path / "file.json").write_text("{}")
        presets = {"one": ["a", "both"], "two": ["b", "both"], "three": ["c"]}
        monkeypatch.setattr(Method, "preset_paths", lambda self: {name: Path(name) for name in presets[self.name]})
        found = {name: Method(name, "", config="", model="") for name in presets}
        monkeypatch.setattr("deepen.core.registry.discover", lambda: found)
        return found

    @pytest.mark.parametrize(("config", "name"), [("a", "one"), ("b.json", "two"), ("c", "three")])
    def test_the_owner_of_the_preset(self, methods, config, name):
        assert graft.choose_method(None, config).name == name

    def test_the_one_that_is_named(self, methods):
        assert graft.choose_method("three", "a").name == "three"

    def test_several_that_could_be_meant(self, methods):
        with pytest.raises(ConfigError, match=r'"both" does not tell .* --method \(there are: one, two\)'):
            graft.choose_method(None, "both")

    def test_a_preset_of_none_of_them(self, methods):
        with pytest.raises(ConfigError, match='"bth" is neither a file nor a preset; did you mean "both"'):
            graft.choose_method(None, "bth")

    def test_a_file_says_nothing_of_its_method(self, methods, tmp_path):
        with pytest.raises(ConfigError, match="there are: one, two, three"):
            graft.choose_method(None, str(tmp_path / "file.json"))

    def test_the_only_one_there_is(self, methods):
        for name in ("one", "two"):
            del methods[name]
        assert graft.choose_method(None, "unknown").name == "three"


class TestVerdict:
    def make(self, **changes):
        values = {"num_tokens": 48, "agreed": 48, "margin": None, "near_tie": 1e-4, "score_difference": 0.0}
        return verification.Verdict(**{**values, "num_scored": 9, "tolerance": 1e-6, **changes})

    @pytest.mark.parametrize(
        ("changes", "identical"),
        [
            ({}, True),
            ({"agreed": 3, "margin": 9e-5}, True),
            ({"agreed": 3, "margin": 2e-4}, False),
            ({"score_difference": -2e-6}, False),
            ({"score_difference": None}, True),
        ],
    )
    def test_what_counts_as_identical(self, changes, identical):
        assert self.make(**changes).identical is identical

    def test_a_near_tie_is_told(self):
        assert "9e-05 apart in their logits, a near-tie" in self.make(agreed=3, margin=9e-5).facts()["greedy tokens"]


class TestGenerate:
    def test_in_a_process_of_its_own(self, llama):
        arguments = ["generate", str(llama), "--no-chat", "--max-new-tokens", "12"]
        status, out, err = python("-m", "deepen", *arguments, stdin=f"{PROMPT}\n")
        assert (status, err) == (0, "")
        assert out.removesuffix("\n") == plain_text("tiny:llama", PROMPT, 12).removesuffix("\n")

    def test_a_terminal_that_lacks_a_character(self, monkeypatch):
        terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", terminal)
        arguments = ["--no-chat", "--prompt", PROMPT, "--max-new-tokens", "24"]
        assert main(["generate", "tiny:nanochat", *arguments]) == 0
        text = plain_text("tiny:nanochat", PROMPT, 24)
        assert not text.isascii()
        assert terminal.buffer.getvalue().decode().removesuffix("\n") == text.encode("ascii", "replace").decode()

    @pytest.mark.parametrize("base", ["tiny:llama", "tiny:nanochat", "tiny:kimi_linear"])
    def test_a_plain_model(self, base, capsys):
        out, err = said(capsys, "generate", base, "--prompt", PROMPT, "--no-chat", "--max-new-tokens", "10")
        assert out.removesuffix("\n") == plain_text(base, PROMPT, 10).removesuffix("\n")
        assert "deepen" not in err

    @pytest.mark.parametrize("draft", ["ar", "lookup", "jacobi", "mask", "auto"])
    def test_an_adapter_says_what_its_base_says(self, llama, draft, capsys):
        arguments = ["--prompt", PROMPT, "--no-chat", "--max-new-tokens", "24", "--set", f"draft={draft}"]
        assert said(capsys, "generate", str(llama), *arguments)[0].removesuffix("\n") == plain_text(
            "tiny:llama", PROMPT, 24
        ).removesuffix("\n")

    def test_the_prompt_comes_from_flag_file_or_standard_input(self, tmp_path, capsys, monkeypatch):
        (tmp_path / "prompt.txt").write_bytes(PROMPT.encode() + b"\n")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode() + b"\n")))
        sources = [["--prompt", PROMPT], ["--prompt-file", str(tmp_path / "prompt.txt")], []]
        outs = {said(capsys, "generate", "tiny:llama", "--max-new-tokens", "6", *source)[0] for source in sources}
        assert len(outs) == 1

    def test_the_chat_template_is_the_default(self, tmp_path, capsys):
        said(
            capsys,
            *("generate", "tiny:llama", "--prompt", "hé", "--max-new-tokens", "2", "--json", str(tmp_path / "o.json")),
        )
        outcome = json.loads((tmp_path / "o.json").read_text())
        tokenizer = load("tiny:llama").tokenizer
        framed = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hé"}], add_generation_prompt=True, return_dict=True
        )
        assert outcome["chat"] is True and outcome["prompt_tokens"] == framed["input_ids"]

    def test_without_a_template_the_prompt_is_continued(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("deepen.data.tokenizer.CHAT_TEMPLATE", None)
        _, err = said(capsys, "generate", "tiny:llama", "--prompt", "abc", "--max-new-tokens", "2", "--stats")
        assert "prompt: 3 tokens (as it stands)" in err

    def test_sampling_follows_its_seed(self, capsys):
        def text(*arguments: str) -> str:
            flags = ["--prompt", PROMPT, "--max-new-tokens", "16", "--temperature", "1.5", "--top-k", "50"]
            return said(capsys, "generate", "tiny:llama", *flags, *arguments)[0]

        assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")

    def test_sampled_an_adapter_says_what_its_base_says(self, llama, capsys):
        flags = ["--prompt", PROMPT, "--max-new-tokens", "16", "--temperature", "0.8", "--min_p", "0.05", "--seed", "3"]
        flags += ["--repetition-penalty", "1.1"]
        assert said(capsys, "generate", str(llama), *flags)[0] == said(capsys, "generate", "tiny:llama", *flags)[0]

    def test_a_stop_string_ends_the_text(self, capsys):
        whole = plain_text("tiny:llama", PROMPT, 40)
        cut = whole[20:22]
        arguments = ["--prompt", PROMPT, "--no-chat", "--max-new-tokens", "40", "--stop", "never", "--stop", cut]
        out, err = said(capsys, "generate", "tiny:llama", *arguments, "--stats")
        assert out.removesuffix("\n") == whole[: whole.index(cut)].removesuffix("\n")
        assert "ended by stop_string" in err

    @pytest.mark.parametrize("flag", [["--chunk_width", "4"], ["--chunk-width", "4"], ["--set", "chunk_width=4"]])
    def test_fields_have_flags(self, llama, flag, tmp_path, capsys):
        file = tmp_path / "o.json"
        arguments = ["--prompt", PROMPT, "--max-new-tokens", "6", "--set", "draft=lookup", "--json", str(file)]
        said(capsys, "generate", str(llama), *arguments, *flag)
        outcome = json.loads(file.read_text())
        assert (outcome["config"]["chunk_width"], outcome["config"]["draft"]) == (4, "lookup")
        assert max(outcome["commits"]) <= 4

    def test_statistics_go_to_stderr(self, nanochat, capsys):
        arguments = ["--prompt", PROMPT, "--no-chat", "--max-new-tokens", "24", "--set", "draft=lookup", "--stats"]
        _, err = said(capsys, "generate", str(nanochat), *arguments)
        lines = err.splitlines()
        assert [line.partition(":")[0] for line in lines] == ["prompt", "new", "drafts", "time"]
        assert lines[1].startswith("new: 24 tokens in ") and lines[1].endswith("ended by length")
        assert lines[2].startswith("drafts: lookup: ") and "tokens/s" in lines[3]

    def test_the_json_file_has_all_of_it(self, nanochat, tmp_path, capsys):
        file = tmp_path / "out" / "o.json"
        arguments = ["--prompt", PROMPT, "--no-chat", "--max-new-tokens", "24", "--set", "draft=lookup"]
        out, _ = said(capsys, "generate", str(nanochat), *arguments, "--json", str(file))
        outcome = json.loads(file.read_text())
        assert outcome["text"] == out.removesuffix("\n") or outcome["text"] == out
        assert len(outcome["tokens"]) == sum(outcome["commits"]) == 24
        assert outcome["passes"] == len(outcome["commits"])
        assert outcome["accepted"]["lookup"] == 24 - outcome["passes"] > 0
        assert outcome["tokens_per_pass"] == 24 / outcome["passes"]
        assert outcome["method"] == "chunk" and outcome["base"]["address"] == "tiny:nanochat"
        assert outcome["stop"]["eos_ids"] == [258] and outcome["sampling"]["temperature"] == 0.0
        assert (outcome["dtype"], outcome["deepen_version"]) == ("float32", deepen.__version__)

    def test_no_new_tokens(self, llama, capsys):
        out, err = said(capsys, "generate", str(llama), "--prompt", PROMPT, "--max-new-tokens", "0", "--stats")
        assert out == ""
        assert "new: 0 tokens, because max_new_tokens is 0" in err

    def test_a_base_that_moved(self, tmp_path, capsys):
        model = load("tiny:llama")
        for part in (model.model, model.tokenizer):
            part.save_pretrained(tmp_path / "base")
        adapter(tmp_path / "a", str(tmp_path / "base"))
        (tmp_path / "base").rename(tmp_path / "moved")
        flags = ["--base", str(tmp_path / "moved"), "--prompt", PROMPT, "--no-chat", "--max-new-tokens", "8"]
        out, _ = said(capsys, "generate", str(tmp_path / "a"), *flags)
        assert out.removesuffix("\n") == plain_text("tiny:llama", PROMPT, 8).removesuffix("\n")


class TestInspect:
    def test_a_plain_model(self, capsys):
        findings = json.loads(said(capsys, "inspect", "tiny:llama", "--json")[0])
        assert findings["attach_points"] == {
            "embedding": "model.embed_tokens (Embedding)",
            "layers": "model.layers.0 to .3 (LlamaDecoderLayer)",
            "final norm": "model.norm (LlamaRMSNorm)",
            "head": "lm_head (Linear)",
        }
        assert (findings["num_layers"], findings["hidden_size"], findings["context_length"]) == (4, 64, 512)
        # Per layer 2 * 64 * (64 + 32) for attention and 3 * 64 * 176; the head 64 * 260; two norms and the last one.
        weights = 4 * (2 * 64 * 96 + 3 * 64 * 176) + 260 * 64
        assert findings["parameters"] == {"unique": weights + 260 * 64 + 9 * 64, "total": weights + 260 * 64 + 9 * 64}
        for context in (1024, 8192, 131_072, 1_048_576):
            costs = findings["costs"][str(context)]
            # A token sees itself and what is before it: in 4 layers 4 heads, two products of width 16.
            of_entry = 4 * 4 * 2 * 16
            assert costs["flops_per_token"] == 2 * (weights + (context + 1) * of_entry)
            # Passes over 256 tokens, each with logits at its last.
            seen, unread = context * (context + 1) // 2, context - context // 256
            reading = context * weights - unread * 260 * 64 + seen * of_entry
            assert costs["reading_flops"] == 2 * reading
            # Each product is done once forward and twice backward.
            assert costs["training_flops_per_token"] == 6 * (context * weights + seen * of_entry) // context
            # Keys and values of 2 heads of width 16, 4 bytes each, in 4 layers.
            assert costs["state_bytes"] == context * 4 * 2 * 2 * 16 * 4
            assert costs["advance_flops"] == {}
        assert findings["adapter"] is None

    def test_the_large_shape(self, capsys):
        shape = json.loads(said(capsys, "inspect", "shape:kimi-linear-48b", "--json")[0])
        assert (shape["parameters"]["unique"], shape["dtype"], shape["device"]) == (49_122_675_072, "bfloat16", "meta")
        assert shape["projection"] is None
        projection = json.loads(said(capsys, "inspect", "tiny:qwen3", "--json")[0])["projection"]
        assert projection["model"] == "shape:kimi-linear-48b" and projection["parameters"]["added"] == 0
        assert projection["costs"] == {n: shape["costs"][n] for n in ("131072", "1048576")}
        # By hand: 7 layers keep 512 + 64 numbers an entry; 20 keep 32 states of 128 x 128 and three inputs of the
        # convolutions of 3 * 32 * 128 channels.
        states = 20 * (4 * 32 * 128 * 128 + 2 * 3 * 3 * 32 * 128)
        assert projection["costs"]["131072"]["state_bytes"] == 2 * 7 * 576 * 131_072 + states

    @pytest.mark.parametrize("verb", ["generate", "graft", "evaluate", "train"])
    def test_a_shape_is_good_for_nothing_else(self, verb, tmp_path, capsys):
        shape = "shape:kimi-linear-48b"
        (tmp_path / "run.json").write_text(
            json.dumps({"model": shape, "data": "wiki", "method": "chunk", "num_steps": 1})
        )
        arguments = {
            "generate": [shape, "--prompt", "a"],
            "graft": [shape, "--config", "after_surgery", "--out", str(tmp_path / "out")],
            "evaluate": [shape, "--stage", "baseline"],
            "train": [str(tmp_path / "run.json"), "--output-dir", str(tmp_path / "out")],
        }
        assert "is a shape without weights" in refused(capsys, verb, *arguments[verb])

    def test_shapes_that_are_not_there(self, capsys):
        assert 'did you mean "shape:kimi-linear-48b"' in refused(capsys, "inspect", "shape:kimi-linear-48")
        assert "leave out dtype" in refused(capsys, "inspect", "shape:kimi-linear-48b", "--dtype", "float32")

    def test_tied_parameters_count_once(self, tmp_path, capsys):
        loaded = load("tiny:llama")
        loaded.model.config.tie_word_embeddings = True
        loaded.model.tie_weights()
        for part in (loaded.model, loaded.tokenizer):
            part.save_pretrained(tmp_path / "tied")
        parameters = json.loads(said(capsys, "inspect", str(tmp_path / "tied"), "--json")[0])["parameters"]
        assert parameters["total"] - parameters["unique"] == 260 * 64
        assert "with tied ones counted twice" in said(capsys, "inspect", str(tmp_path / "tied"))[0]

    def test_recurrent_layers(self, capsys):
        findings = json.loads(said(capsys, "inspect", "tiny:kimi_linear", "--json")[0])
        assert findings["recurrent_layers"] == [0, 1, 2]
        # By hand: 3 layers of 4 heads, 16 wide; windows of 3 tokens, each with queries, keys and values.
        assert findings["recurrent_bytes"] == {
            "snapshot": 3 * 4 * (4 * 16 * 16 + 3 * 3 * 4 * 16),
            "replay_per_token": 3 * 4 * (3 * 4 * 16 + 3 * 4 * 16),
        }

    def test_an_adapter(self, llama, capsys):
        findings = json.loads(said(capsys, "inspect", str(llama), "--json")[0])
        assert findings["model"] == str(llama) and findings["base"]["address"] == "tiny:llama"
        found = findings["adapter"]
        assert found["method"] == "chunk" and found["config"]["d_state"] == 8
        assert found["weights_bytes"] == (llama / "sidecar.safetensors").stat().st_size
        assert found["budget"]["added parameters"] == open_model(str(llama)).model.num_sidecar_parameters
        assert findings["costs"]["1024"]["training_flops_per_token"] is None
        assert len(findings["costs"]["1024"]["advance_flops"]) == 2
        assert findings["projection"]["parameters"]["added"] > 0

    def test_for_people(self, llama, capsys):
        out, _ = said(capsys, "inspect", str(llama))
        for part in (
            "model.embed_tokens (Embedding)",
            "8,192 (more than the model takes)",
            "adapter (chunk)",
            "projected to shape:kimi",
        ):
            assert part in out
        assert "draft " in out and " null" in out


class TestBench:
    TINY = (
        *("--delta.tokens", "70", "--delta.heads", "1", "--delta.decoding-heads", "2", "--delta.head-width", "8"),
        *("--delta.memory-tokens", "64", "--delta.hidden-size", "16", "--delta.model-heads", "1"),
        *("--delta.context", "20", "--delta.rounds", "1", "--delta.quick-rounds", "2"),
        *("--delta.cases", "5", "--delta.coarse-cases", "1"),
    )

    def test_delta_attention(self, tmp_path, capsys):
        out, _ = said(capsys, "bench", "delta", *self.TINY, "--out", str(tmp_path / "delta.json"))
        figures = json.loads((tmp_path / "delta.json").read_text())
        assert [line["rounds"] for line in figures["lines"]] == [1, 2, 2, 1, 2, 2]
        assert all(line["line"] in out and line["difference"] < 1e-3 for line in figures["lines"])
        assert figures["memory"]["saved"]["ours_bytes"] < figures["memory"]["saved"]["transformers_bytes"]
        found = figures["equality"]["float32"]
        assert {base: each["rows"] for base, each in found.items()} == {"tiny:kimi_linear": 3, "tiny:qwen3_next": 2}
        assert all(each["equal"] + each["near_ties"] == each["rows"] for each in found.values())
        assert figures["equality"]["bfloat16"]["tiny:kimi_linear"]["rows"] == 1
        assert "13x" in out and "25x" in out and "model" in figures and figures["options"]["tokens"] == 70

    def test_many_requests_at_once(self, tmp_path, capsys):
        out, _ = said(
            capsys,
            *("bench", "engine", "--engine.models", "tiny:llama", "--engine.slots", "1", "3", "--engine.rounds", "1"),
            *("--engine.drafts", "lookup", "--engine.new-tokens", "6", "--engine.prompt-tokens", "400"),
            *("--engine.load-requests", "4", "--out", str(tmp_path / "engine.json")),
        )
        figures = json.loads((tmp_path / "engine.json").read_text())
        assert [(line["slots"], line["model"]) for line in figures["throughput"]] == [
            (slots, model) for slots in (1, 3) for model in ("tiny:llama", "tiny:llama, exact, lookup")
        ]
        assert all(line["differing"] == [] for line in figures["throughput"])
        assert set(figures["agreement"].values()) == {"all equal"}
        assert [line["model"] for line in figures["latency"]] == [line["model"] for line in figures["best"]]
        assert "tiny:llama, exact, lookup" in out and "3 of 3" in out

    def test_a_row_that_parts_is_its_verdict(self, tmp_path, capsys, monkeypatch):
        found = {"rows": 1, "equal": 0, "match_rate": 0.0, "near_ties": 0, "others": ["case 0 (mask), row 0"]}
        found |= {"margin_median": 0.5, "margin_largest": 0.5, "tokens_per_pass": 1.0}
        monkeypatch.setattr(bench_delta, "_equality_on", lambda *_: found)
        assert main(["bench", "delta", *self.TINY, "--out", str(tmp_path / "delta.json")]) == 1
        assert "tiny:kimi_linear, case 0 (mask), row 0" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["delta", "--max-new-tokens", "8"], "--max-new-tokens is set, which `deepen bench delta` does not read"),
            (["--delta.heads", "2"], "--delta.* is set, which `deepen bench decoding` does not read; drop it, or give"),
            (["delta", "--delta.heads", "0"], "--delta.heads is 0; give a whole number from 1 on"),
            (["engine", "--engine.slots", "0"], "--engine.slots is 0; give whole numbers from 1 on"),
            (["engine", "--engine.rounds", "0"], "--engine.rounds is 0; give a whole number from 1 on"),
            (["engine", "--engine.load", "-1"], "--engine.load is -1.0; give a share above 0, or 0"),
            (["delta", "--engine.load", "0"], "--engine.* is set, which `deepen bench delta` does not read"),
        ],
    )
    def test_a_setting_that_means_nothing_is_refused(self, arguments, message, capsys):
        assert main(["bench", *arguments]) == 2
        assert message in capsys.readouterr().err
