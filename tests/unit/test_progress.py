"""Intervals of a clock that the test winds, and what is shown on a terminal and elsewhere."""

import io
import re
import sys
from contextlib import contextmanager
from unittest.mock import ANY

import pytest
import torch

from deepen.train.progress import Pace, display

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class TestPace:
    def test_figures_are_those_of_the_last_interval(self):
        clock = Clock()
        pace = Pace(clock)
        for num_tokens, seconds in ((100, 1.0), (300, 3.0)):
            pace.count(num_tokens)
            clock.now += seconds
        first = pace.figures(CPU)
        assert first["train/performance/tokens_per_sec"] == 100.0
        assert first["train/performance/steps_per_sec"] == 0.5
        pace.count(50)
        clock.now += 0.5
        second = pace.figures(CPU)
        assert second["train/performance/tokens_per_sec"] == 100.0
        assert second["train/performance/steps_per_sec"] == 2.0

    def test_what_is_done_aside_takes_no_time(self):
        clock = Clock()
        pace = Pace(clock)
        pace.count(10)
        clock.now += 1.0
        with pytest.raises(KeyError), pace.aside():
            clock.now += 50.0
            raise KeyError
        clock.now += 1.0
        assert pace.figures(CPU)["train/performance/tokens_per_sec"] == 5.0

    def test_no_time_is_no_speed(self):
        figures = Pace(Clock()).figures(CPU)
        assert figures["train/performance/tokens_per_sec"] is figures["train/performance/steps_per_sec"] is None

    @pytest.mark.parametrize(("platform", "expected"), [("linux", 2.048), ("darwin", 0.002)])
    def test_a_system_counts_memory_in_its_own_unit(self, monkeypatch, platform, expected):
        import resource

        usage = resource.getrusage(resource.RUSAGE_SELF)
        fields = list(usage)
        fields[2] = 2000  # ru_maxrss
        monkeypatch.setattr(resource, "getrusage", lambda who: resource.struct_rusage(fields))
        monkeypatch.setattr(sys, "platform", platform)
        assert Pace().figures(CPU)["train/performance/memory_mb"] == expected


class TestLines:
    def test_an_interval_is_a_line(self):
        lines = []
        with display(100, show=lines.append) as shown:
            for step in range(1, 11):
                shown.step(step)
            shown.figures(10, loss=2.1, tokens_per_sec=1234.4)
            shown.say("step 10: validation loss 3.0")
            shown.figures(11, loss=2.0, tokens_per_sec=None)
        assert lines == [
            "step 10/100  loss 2.1000  1,234 tokens/s",
            "step 10: validation loss 3.0",
            "step 11/100  loss 2.0000",
        ]


def without_colours(terminal: io.StringIO) -> str:
    return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", terminal.getvalue())


def test_a_terminal_that_can_draw_nothing_gets_lines(monkeypatch):
    lines = []
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    with display(5, show=lines.append) as shown:
        shown.figures(1, loss=2.0, tokens_per_sec=3.0)
    assert lines == ["step 1/5  loss 2.0000  3 tokens/s"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def shown_on_a_terminal(num_steps: int, *, done: int = 0):
    """The display with a terminal for stderr; put in place here, as pytest puts its own there before each test."""
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "120")
        with display(num_steps, done=done, show=pytest.fail) as shown:
            yield terminal, shown


class TestBar:
    def test_it_has_steps_loss_speed_and_time_left(self):
        with shown_on_a_terminal(100, done=40) as (terminal, shown):
            shown.step(41)
            shown.figures(50, loss=2.1, tokens_per_sec=1234.4)
        last = without_colours(terminal).rpartition("step")[2]
        assert last.split() == ["50/100", ANY, "loss", "2.1000", "1,234", "tokens/s", ANY]

    def test_texts_stand_above_it_as_they_are(self):
        with shown_on_a_terminal(10) as (terminal, shown):
            shown.say("the text [bold]is[/bold] kept")
        assert "the text [bold]is[/bold] kept\n" in without_colours(terminal)

    def test_it_ends_with_the_run_that_fails(self):
        with pytest.raises(KeyError), shown_on_a_terminal(10) as (terminal, shown):
            shown.step(1)
            raise KeyError
        hidden, shown_again = (terminal.getvalue().count(code) for code in ("\x1b[?25l", "\x1b[?25h"))
        assert hidden == shown_again == 1

    def test_what_is_printed_into_a_pipe_stays_there(self, capsys):
        with shown_on_a_terminal(10) as (terminal, shown):
            shown.step(1)
            print("for the pipe")
        assert capsys.readouterr().out == "for the pipe\n"
        assert "for the pipe" not in terminal.getvalue()
