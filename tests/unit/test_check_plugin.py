"""The checks as tests of somebody's pytest."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import deepen
from deepen.check import suite
from deepen.check.effort import Effort
from deepen.check.outcome import Fault, NotApplicable, Passed
from deepen.check.subject import Subject
from deepen.check.suite import Check

pytest_plugins = ["pytester"]

PLUGIN = ("-p", "deepen.check.plugin", "-p", "no:cacheprovider")

MODEL = """
    import torch
    from torch import nn

    class Averages(nn.Module):
        def __init__(self):
            super().__init__()
            with open("opened", "a") as file:
                file.write("x")
            self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

        def forward(self, input_ids):
            return self.head(self.embedding(input_ids).cumsum(1))
"""

ENTRY_POINTS = "[pytest11]\ndeepen.check.plugin = deepen.check.plugin\n"


def passes(_: Subject, __: Effort) -> Passed:
    return Passed(3, 1e-6, 1e-5)


def fails(_: Subject, __: Effort) -> Passed:
    raise Fault("this was seen", cause="that is the reason")


def does_not_apply(_: Subject, __: Effort) -> Passed:
    raise NotApplicable("there is none")


@pytest.fixture
def folder(pytester, monkeypatch) -> pytest.Pytester:
    """An empty folder with a model in it, and a suite with every verdict."""
    checks = (
        Check("good", "Is it good?", passes),
        Check("bad", "Is it not bad?", fails, needs=("good",)),
        Check("behind it", "Is it judged?", passes, needs=("bad",)),
        Check("other", "Does it apply?", does_not_apply),
        Check("long", "Is it left out?", passes, slow=True),
    )
    monkeypatch.setattr(suite, "CHECKS", checks)
    pytester.makepyfile(mine=MODEL)
    return pytester


def pytest_in(folder: pytest.Pytester, *options: str) -> pytest.RunResult:
    return folder.runpytest_inprocess(*PLUGIN, *options)


ASKED = ("--deepen-model", "mine.py:Averages", "--deepen-quick")


class TestOutcomes:
    def test_each_check_is_a_test(self, folder):
        result = pytest_in(folder, *ASKED, "-v", "-rs")
        result.assert_outcomes(passed=1, failed=1, skipped=3)
        assert result.ret == 1
        result.stdout.fnmatch_lines(
            [
                "deepen: checks mine.py:Averages, quick",
                "*collected 5 items",
                "deepen::check[[]good[]] PASSED*",
                "deepen::check[[]bad[]] FAILED*",
                "deepen::check[[]behind it[]] SKIPPED*",
                "deepen::check[[]other[]] SKIPPED*",
                "deepen::check[[]long[]] SKIPPED*",
            ]
        )
        result.stdout.fnmatch_lines_random(
            [
                "SKIPPED*behind it: not judged: it stands on bad",
                "SKIPPED*other: not applicable: there is none",
                "SKIPPED*long: left out: takes longer*",
            ]
        )

    def test_a_failure_says_what_was_seen_and_no_traceback(self, folder):
        result = pytest_in(folder, *ASKED)
        shown = result.outlines
        start = next(number for number, line in enumerate(shown) if line.endswith("check[bad] " + "_" * 34))
        assert shown[start + 1 : start + 4] == [
            "Is it not bad?",
            "seen: this was seen",
            "likely cause: that is the reason",
        ]
        assert "plugin.py" not in "".join(shown[start : start + 5])

    def test_a_pass_keeps_its_question_and_figures(self, folder):
        result = pytest_in(folder, *ASKED, "-rP")
        result.stdout.fnmatch_lines(["Is it good?", "3 cases, largest difference in a logit 1e-06 (rounding explains*"])

    def test_thorough_runs_the_slow_ones(self, folder):
        pytest_in(folder, *ASKED[:2]).assert_outcomes(passed=2, failed=1, skipped=2)

    def test_the_model_is_opened_once(self, folder):
        pytest_in(folder, *ASKED)
        assert (folder.path / "opened").read_text() == "x"


class TestSelection:
    def test_a_check_alone_still_stands_on_others(self, folder):
        result = pytest_in(folder, *ASKED, "-k", "behind", "-rs")
        result.assert_outcomes(skipped=1, deselected=4)
        result.stdout.fnmatch_lines(["collected 5 items / 4 deselected / 1 selected", "SKIPPED*it stands on bad"])

    def test_the_first_failure_ends_the_run(self, folder):
        pytest_in(folder, *ASKED, "-x").assert_outcomes(passed=1, failed=1)

    def test_collecting_opens_nothing(self, folder):
        result = pytest_in(folder, *ASKED, "--collect-only", "-q")
        assert result.ret == 0 and not (folder.path / "opened").exists()
        result.stdout.fnmatch_lines(["deepen::check[[]good[]]", "5 tests collected*"])

    def test_beside_other_tests(self, folder):
        folder.makepyfile(test_mine="def test_one(): pass")
        pytest_in(folder, *ASKED).assert_outcomes(passed=2, failed=1, skipped=3)


class TestBadInput:
    def test_a_model_that_is_not_there(self, folder):
        result = pytest_in(folder, "--deepen-model", "mine.py:Average")
        result.assert_outcomes(errors=1, skipped=4)
        result.stdout.fnmatch_lines(
            ['the model can\'t be opened: mine.py:Average: there is no "Average"; did you mean "Averages"[?]']
        )
        assert "Traceback" not in result.stdout.str() and "During handling" not in result.stdout.str()

    def test_quick_without_a_model(self, folder):
        result = pytest_in(folder, "--deepen-quick")
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines(["ERROR: --deepen-quick without --deepen-model*"])


class TestProcesses:
    """What only a process of its own shows: what is imported, and plugins as installed."""

    @pytest.fixture
    def installed(self, pytester, monkeypatch) -> pytest.Pytester:
        """An empty folder in which deepen is installed, entry point and all."""
        place = pytester.mkdir("installed") / "deepen-0.dist-info"
        place.mkdir()
        (place / "METADATA").write_text("Metadata-Version: 2.1\nName: deepen\nVersion: 0\n")
        (place / "entry_points.txt").write_text(ENTRY_POINTS)
        paths = [place.parent, Path(deepen.__file__).parents[1]]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))
        return pytester

    def test_the_entry_point_is_the_one_of_this_project(self):
        project = Path(__file__).parents[2] / "pyproject.toml"
        declared = tomllib.loads(project.read_text())["project"]["entry-points"]["pytest11"]
        assert [f"{name} = {place}" for name, place in declared.items()] == ENTRY_POINTS.splitlines()[1:]

    @pytest.mark.parametrize("again", [(), ("-p", "deepen.check.plugin")])
    def test_without_its_option_it_costs_nothing(self, installed, again):
        installed.makepyfile(
            test_it="""
            import sys

            def test_it():
                assert "deepen.check.plugin" in sys.modules
                assert not {"torch", "transformers", "deepen.check.suite", "deepen.core"} & set(sys.modules)
            """
        )
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", *again],
            capture_output=True,
            check=False,
        )
        assert ran.returncode == 0 and b"1 passed" in ran.stdout, ran.stdout.decode() + ran.stderr.decode()

    @pytest.mark.slow
    def test_workers(self, installed):
        installed.makepyfile(mine=MODEL)
        command = [sys.executable, "-m", "pytest", "-n", "2", "-k", "causality or repeatability", *ASKED]
        ran = subprocess.run(command, capture_output=True, check=False)
        assert ran.returncode == 0 and b"2 passed" in ran.stdout, ran.stdout.decode() + ran.stderr.decode()
        assert len((installed.path / "opened").read_text()) <= 2
