"""The walk-through of docs/check.md, step by step: `deepen check` prints what the page shows."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from deepen.check.suite import CHECKS
from deepen.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs/check.md").read_text()
(SCRIPT, SHOWN) = re.search(r"^## Walk-through.*?^```sh\n(.*?)^```\n(.*?)^## ", PAGE, re.M | re.S).groups()
(COMMAND,) = re.findall(r"^deepen (.*)$", SCRIPT, re.M)
# What is indented and stands together: first what a sound model gives, then each fault's command and what it gives.
SOUND, *FAULTS = [dedent(block) for block in re.findall(r"(?:^ {4}.*\n\n?)+", SHOWN, re.M)]
# Differences in logits and seconds, which no two machines have alike.
MEASURED = re.compile(r"(up\s+to|explains|,\s+in)\s+[\d.e+-]+")


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """The copy of a model class that the page makes."""
    folder = tmp_path_factory.mktemp("walk")
    sh(f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\ndeepen() {{ :; }}\n{SCRIPT}', folder)
    return folder / "good.py"


@pytest.fixture
def printed(good, tmp_path, monkeypatch, capsys):
    """Do one step in a folder of its own, check, and give the exit status and what is printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    shutil.copy(good, tmp_path)

    def after(step: str) -> tuple[int, str]:
        sh(step, tmp_path)
        status = main(shlex.split(COMMAND))
        return status, capsys.readouterr().out

    return after


def sh(script: str, folder: Path) -> None:
    subprocess.run(["sh", "-ec", script], cwd=folder, check=True)


def told(text: str) -> list[str]:
    """Paragraphs on one line each, without what is measured; of a table, each row's verdict, check, question, cases."""
    lines = []
    for paragraph in MEASURED.sub(r"\1", text).strip().split("\n\n"):
        if paragraph.startswith("verdict"):
            lines += ["  ".join(re.split(" {2,}", row)[:4]) for row in paragraph.splitlines()]
        else:
            lines.append(" ".join(paragraph.split()))
    return lines


def test_the_page_names_every_check_in_the_order_of_the_suite():
    (table,) = re.findall(r"^## The checks\n(.*?)^A check", PAGE, re.M | re.S)
    _, _, *names = re.findall(r"^\| ?(.*?) ?\|", table, re.M)
    assert names == [check.name for check in CHECKS]


def test_a_sound_model(printed):
    status, out = printed("cp good.py my_model.py")
    assert status == 0
    assert told(out) == told(SOUND)


@pytest.mark.parametrize("fault", FAULTS, ids=re.findall(r"^\*\*(.*?)\.?\*\*", SHOWN, re.M))
def test_a_planted_fault(printed, fault):
    step, shown = fault.split("\n\n", 1)
    status, out = printed(step)
    assert status == 1
    assert told(out[out.index("\n\nFAILED  ") :]) == told(shown)
