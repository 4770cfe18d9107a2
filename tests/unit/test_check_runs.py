"""How checks are run: in order, on what stands, and on a model that may fail in any way."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deepen
from deepen.check import suite
from deepen.check.effort import QUICK, THOROUGH, Effort
from deepen.check.outcome import Fault, NotApplicable, Passed
from deepen.check.place import place_of
from deepen.check.report import Finding, Report
from deepen.check.subject import Subject, subject_of
from deepen.check.suite import Check, check, run, selected
from deepen.core.errors import ConfigError, DeepenError


class Averages(nn.Module):
    """The next token depends on the mean of those so far."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 8), nn.Linear(8, 20)

    def forward(self, input_ids: Tensor) -> Tensor:
        counts = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.head(self.embedding(input_ids).cumsum(1) / counts)


class Raises(Averages):
    """Can't read more than two tokens."""

    def forward(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape[1] > 2:
            raise ValueError("too\n   long")  # this line is to be named
        return super().forward(input_ids)


class InTorch(Averages):
    """Fails inside of torch."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return super().forward(input_ids.expand(input_ids.shape[0], -1, 3) if input_ids.shape[1] > 2 else input_ids)


@pytest.fixture
def subject() -> Subject:
    return subject_of(Averages(), name="averages")


def passes(_: Subject, __: Effort) -> Passed:
    return Passed(3, 1e-6, 1e-5)


def fails(_: Subject, __: Effort) -> Passed:
    raise Fault("it was seen", cause="the reason")


def does_not_apply(_: Subject, __: Effort) -> Passed:
    raise NotApplicable("there is none")


def chain(*runs: Callable[[Subject, Effort], Passed]) -> tuple[Check, ...]:
    """Checks a, b, ..., each of which stands on the one before it."""
    names = "abcdef"[: len(runs)]
    needs = [(), *((name,) for name in names)]
    return tuple(
        Check(name, f"{name}?", each, needs=need) for name, each, need in zip(names, runs, needs, strict=False)
    )


def verdicts(report: Report) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in report.findings}


class TestOrder:
    def test_what_stands_on_a_failed_check_is_not_judged(self, subject):
        report = run(subject, QUICK, checks=chain(passes, fails, passes, passes))
        assert verdicts(report) == {"a": "passed", "b": "failed", "c": "not judged", "d": "not judged"}
        assert [finding.detail for finding in report.findings[2:]] == ["it stands on b", "it stands on c"]
        assert not report.passed and [finding.check for finding in report.failed] == ["b"]

    def test_what_stands_on_one_that_does_not_apply_is_judged(self, subject):
        report = run(subject, QUICK, checks=chain(does_not_apply, passes))
        assert verdicts(report) == {"a": "not applicable", "b": "passed"}
        assert report.findings[0].detail == "there is none"

    def test_all_reasons_are_named(self, subject):
        last = Check("c", "c?", passes, needs=("a", "b"))
        report = run(subject, QUICK, checks=(Check("a", "a?", fails), Check("b", "b?", fails), last))
        assert report.findings[2].detail == "it stands on a and b"

    def test_slow_ones_are_left_out_of_a_quick_run(self, subject):
        slow = Check("a", "a?", passes, slow=True)
        assert verdicts(run(subject, QUICK, checks=[slow])) == {"a": "left out"}
        assert verdicts(run(subject, THOROUGH, checks=[slow])) == {"a": "passed"}

    def test_each_is_told_when_it_is_done(self, subject):
        told = []
        report = run(subject, QUICK, checks=chain(passes, fails, passes), done=told.append)
        assert tuple(told) == report.findings

    def test_needs_stand_before_those_that_need_them(self):
        names = [each.name for each in suite.CHECKS]
        assert len(set(names)) == len(names)
        for index, each in enumerate(suite.CHECKS):
            assert set(each.needs) <= set(names[:index])
            assert each.question.endswith("?")


class TestSelected:
    CHECKS = (*chain(passes, passes, passes), Check("slow", "slow?", passes, needs=("a",), slow=True))

    def test_what_they_stand_on_comes_too(self):
        assert [each.name for each in selected(["c"], self.CHECKS)] == ["a", "b", "c"]
        assert [each.name for each in selected(["b", "a", "b"], self.CHECKS)] == ["a", "b"]

    def test_a_slow_one_that_is_named_runs(self, subject):
        report = run(subject, QUICK, checks=selected(["slow"], self.CHECKS))
        assert verdicts(report) == {"a": "passed", "slow": "passed"}

    def test_an_unknown_name(self):
        with pytest.raises(ConfigError, match=r'there is no check "slowe"; did you mean "slow"?'):
            selected(["a", "slowe"], self.CHECKS)

    def test_from_the_library(self):
        report = check(Averages(), quick=True, only=["causality"], name="mine")
        assert verdicts(report) == {"repeatability": "passed", "causality": "passed"}
        assert report.model == "mine"
        with pytest.raises(ConfigError, match="causality"):
            check(Averages(), only=["causalty"])


class TestCrash:
    def crash(self, model: nn.Module) -> Finding:
        (finding, *_) = check(model, quick=True, vocab_size=20, only=["repeatability"]).findings
        assert finding.verdict == "failed"
        return finding

    def test_is_a_finding_that_names_the_line(self):
        finding = self.crash(Raises())
        lines = Path(__file__).read_text().splitlines()
        (line,) = [number for number, text in enumerate(lines, start=1) if text.endswith("# this line is to be named")]
        assert finding.detail == "the model raised ValueError: too long"
        assert f"test_check_runs.py, line {line}, in forward" in finding.cause

    def test_inside_of_torch_it_names_the_models_own_line(self):
        finding = self.crash(InTorch())
        assert "RuntimeError" in finding.detail
        assert "test_check_runs.py, line" in finding.cause and "in forward" in finding.cause

    def test_outside_of_the_models_classes_it_names_the_last_line_that_is_not_ours(self):
        with pytest.raises(json.JSONDecodeError) as caught:
            json.loads("{")
        assert "decoder.py, line" in place_of(caught.value)
        with pytest.raises(RuntimeError) as caught:
            nn.Linear(2, 2)(torch.zeros(3))
        assert "test_check_runs.py, line" in place_of(caught.value)

    def test_an_error_of_ours_is_one_too(self, subject):
        def raises(_: Subject, __: Effort) -> Passed:
            raise DeepenError("no cache comes back")

        (finding,) = run(subject, QUICK, checks=[Check("a", "a?", raises)]).findings
        assert finding.detail == "the model raised DeepenError: no cache comes back"

    def test_an_interrupt_goes_through(self, subject):
        def interrupted(_: Subject, __: Effort) -> Passed:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(subject, QUICK, checks=[Check("a", "a?", interrupted)])


class TestReport:
    @pytest.fixture
    def report(self, subject) -> Report:
        checks = (*chain(passes, fails, passes), Check("none", "none?", does_not_apply))
        return run(subject, QUICK, checks=checks)

    def test_in_one_line(self, report, subject):
        assert report.summary == "1 of 2 checks failed: b (1 not judged, 1 not applicable)"
        assert run(subject, QUICK, checks=chain(passes)).summary == "1 check passed"
        assert run(subject, QUICK, checks=chain(passes, passes)).summary == "2 checks passed"
        assert run(subject, QUICK, checks=chain(does_not_apply)).summary == "no check was judged (1 not applicable)"

    def test_as_text(self, report):
        assert str(report).splitlines() == [
            "averages: 1 of 2 checks failed: b (1 not judged, 1 not applicable)",
            "passed          a",
            "failed          b: b?",
            "                seen: it was seen",
            "                likely cause: the reason",
            "not judged      c: it stands on b",
            "not applicable  none: there is none",
        ]

    def test_pytest_shows_its_short_form_whole(self, report):
        assert len(repr(report)) < 240 and "b" in repr(report) and "averages" in repr(report)

    def test_as_json(self, report):
        found = json.loads(json.dumps(report.to_dict()))
        assert found["model"] == "averages" and found["passed"] is False
        assert [each["verdict"] for each in found["findings"]] == ["passed", "failed", "not judged", "not applicable"]
        assert found["findings"][0]["largest"] == 1e-6 and found["findings"][1]["cause"] == "the reason"


def test_the_door_of_the_library():
    assert deepen.check.check is check and deepen.check.Report is Report
    assert {"check", "Report"} <= set(dir(deepen.check))
    with pytest.raises(AttributeError, match=r"module 'deepen\.check' has no attribute 'chekc'"):
        _ = deepen.check.chekc
