"""deepen check"""

import contextlib
import json
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from deepen.cli.options import Model, OptionalFile, OptionalName
from deepen.cli.output import quantity

if TYPE_CHECKING:
    from deepen.check.effort import Effort
    from deepen.check.report import Finding, Report
    from deepen.check.subject import Subject
    from deepen.check.suite import Check

_STDOUT = "-"
_WIDTH_OF_TEXT = 100
_LEAST_WIDTH_OF_QUESTION = 40  # narrower, questions get a line of their own
_VERDICT_WIDTH = 14
_FIGURES = (("cases", 5), ("largest", 7), ("rounding", 8), ("seconds", 7))
_STYLES = {"passed": "green", "failed": "bold red", "not judged": "yellow"}
_WITHOUT_FIGURES = ("not judged", "not applicable", "left out")


@dataclass(frozen=True)
class Options:
    """Hold a causal language model to what such a model must do, and name the likely cause where it doesn't.

    Causality, batches, padding, caches, generation, and what deepen does with the model: what must be equal is
    compared, up to the rounding measured on this very model. Any nn.Module will do that gives logits for input_ids;
    what else its forward takes is held to what that means. Exit status 1 if a check fails.
    """

    model: Model
    """A model (hub id, folder, pypi:NAME, tiny:NAME), the folder of an adapter, or your own code: path/to/file.py:NAME
    or package.module:NAME, where NAME is a module, or a function or class that gives one when called without
    arguments. Naming a file runs it."""
    quick: bool = False
    """Shorter texts, fewer cases, and nothing that takes minutes."""
    only: tuple[str, ...] = ()
    """Names of checks to run, with those they stand on; left out, all."""
    json: OptionalFile = None
    """Write the findings here, as JSON; - is standard output, and the table then goes to standard error."""
    base: OptionalName = None
    """Where the adapter's base model is, if it is no longer where it was."""
    dtype: OptionalName = None
    """float32, bfloat16, float16 or float64; left out, float32 on a CPU and the model's own elsewhere. Models of your
    own code stay as they are made."""
    device: OptionalName = None
    """cpu, cuda, cuda:1, mps; left out, an accelerator if there is one. Models of your own code stay where they are
    made."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


def run(options: Options) -> int:
    """Open, check and print; 1 if a check fails."""
    from deepen.check import suite
    from deepen.check.effort import QUICK, THOROUGH

    checks = suite.selected(options.only, suite.CHECKS) if options.only else suite.CHECKS
    effort = QUICK if options.quick else THOROUGH
    with _paper(beside_json=options.json == _STDOUT) as paper:
        subject, report = _checked(options, checks, effort, paper)
    _write(options.json, {**report.to_dict(), **_circumstances(options, subject, effort)})
    paper.verdict(report)
    return 0 if report.passed else 1


def _checked(
    options: Options, checks: Sequence["Check"], effort: "Effort", paper: "_Paper"
) -> tuple["Subject", "Report"]:
    from deepen.check import suite
    from deepen.check.opening import open_subject

    subject = open_subject(
        options.model,
        base=options.base,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
    )
    paper.text(_description(subject, options.quick))
    needed = [each.name for each in checks if options.only and each.name not in options.only]
    if needed:
        paper.text(f"with what these stand on: {', '.join(needed)}")
    table = _Table(paper, checks)
    report = suite.run(subject, effort, checks=checks, done=table.add)
    paper.remarks(report)
    for finding in report.failed:
        paper.failure(finding)
    return subject, report


@contextlib.contextmanager
def _paper(*, beside_json: bool) -> Iterator["_Paper"]:
    """Where people read: stdout, or stderr if stdout is for JSON. Then what the model's code prints goes there, too."""
    if not beside_json:
        yield _Paper(sys.stdout)
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield _Paper(sys.stderr)


def _write(place: str | None, record: dict[str, Any]) -> None:
    from deepen.core.files import write_json

    if place == _STDOUT:
        print(json.dumps(record, indent=2, ensure_ascii=False), flush=True)
    elif place is not None:
        write_json(place, record)
        print(f"\nwritten to {place}")


def _circumstances(options: Options, subject: "Subject", effort: "Effort") -> dict[str, Any]:
    """What the findings depend on beside the model."""
    import torch

    return {
        "architecture": type(subject.model).__name__,
        "method": None if subject.method is None else type(subject.method).__name__,
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": str(subject.device),
        "quick": options.quick,
        "effort": _plain(asdict(effort)),
        # torch's own word: its package's metadata may leave out which build it is.
        "versions": {"torch": torch.__version__, "transformers": version("transformers"), "deepen": _our_version()},
    }


def _plain(value: Any) -> Any:
    """JSON types; a dtype is its name."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, int | float | str | None) else str(value).removeprefix("torch.")


def _our_version() -> str:
    import deepen

    return deepen.__version__


def _description(subject: "Subject", quick: bool) -> str:
    num_parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    method = "" if subject.method is None else f" with {type(subject.method).__name__} on it"
    return (
        f"{subject.name}: {type(subject.model).__name__}{method}, {quantity(num_parameters)} parameters, vocabulary "
        f"{subject.vocab_size:,}, {str(subject.dtype).removeprefix('torch.')} on {subject.device}"
        f"{', quick' if quick else ''}"
    )


class _Paper:
    """What people read: wrapped to the terminal, in colour only there."""

    def __init__(self, stream: Any) -> None:
        """`stream` is one of text, like `sys.stdout`."""
        self.stream = stream
        self.is_terminal = stream.isatty()
        console = Console(file=stream, force_terminal=self.is_terminal, highlight=False, emoji=False)
        self._console = console
        self.width = console.width if self.is_terminal else 10_000

    def line(self, *parts: tuple[str, str]) -> None:
        """One line of (text, style)s, as it is."""
        text = Text.assemble(*((part, style) for part, style in parts))
        text.rstrip()
        self._console.print(text, soft_wrap=True)
        self.stream.flush()  # minutes of work may follow

    def text(self, text: str, *, label: str = "", style: str = "") -> None:
        """A paragraph, its lines indented by the label's width."""
        width = min(self.width, _WIDTH_OF_TEXT) - len(label)
        lines = textwrap.wrap(text, max(20, width), break_on_hyphens=False) or [""]
        for number, line in enumerate(lines):
            self.line((label if number == 0 else " " * len(label), style), (line, ""))

    def begun(self, text: str) -> None:
        """Text of what is under way, which the next line replaces; on a terminal only."""
        if self.is_terminal:
            self.stream.write(f"\r{text[: self.width - 1]}")
            self.stream.flush()

    def forget_begun(self) -> None:
        """Clear what `begun` has written."""
        if self.is_terminal:
            self.stream.write("\r\x1b[K")

    def remarks(self, report: "Report") -> None:
        """Why checks have no verdict, and how those passed of which there is more to say; one reason, one line."""
        groups: dict[tuple[str, str], list[str]] = {}
        for finding in report.findings:
            if finding.detail and finding.verdict != "failed":
                # Which one each stands on is in the report; a person wants the failures first, which follow.
                reason = "they stand on what failed" if finding.verdict == "not judged" else finding.detail
                groups.setdefault((finding.verdict, reason), []).append(finding.check)
        if groups:
            self.line()
        for (verdict, reason), names in groups.items():
            self.text(f"{', '.join(names)}: {reason}", label=f"{verdict:{_VERDICT_WIDTH}}  ")

    def failure(self, finding: "Finding") -> None:
        """What was seen, and the likely cause."""
        self.line()
        self.line(("FAILED", _STYLES["failed"]), (f"  {finding.check}: {finding.question}", "bold"))
        self.text(finding.detail, label=f"{'  seen':{_VERDICT_WIDTH}}  ")
        self.text(finding.cause, label=f"{'  likely cause':{_VERDICT_WIDTH}}  ")

    def verdict(self, report: "Report") -> None:
        """The last line."""
        seconds = sum(finding.seconds for finding in report.findings)
        self.line()
        word, style = ("PASSED", _STYLES["passed"]) if report.passed else ("FAILED", _STYLES["failed"])
        self.text(f"{report.model}: {report.summary}, in {seconds:.1f} s", label=f"{word}  ", style=style)


class _Table:
    """One line a check, written as checks are done: columns are as wide as what is known beforehand."""

    def __init__(self, paper: _Paper, checks: Sequence["Check"]) -> None:
        self._paper = paper
        self._waiting = [each.name for each in checks]
        self._name = max(len("check"), *(len(each.name) for each in checks))
        needed = max(len("question"), *(len(each.question) for each in checks))
        fixed = _VERDICT_WIDTH + 2 + self._name + 2 + sum(2 + width for _, width in _FIGURES)
        self._beside = paper.width - fixed >= min(needed, _LEAST_WIDTH_OF_QUESTION)
        self._question = min(needed, paper.width - fixed) if self._beside else 0
        paper.line()
        self._row(("verdict", "bold"), "check", "question" if self._beside else "", [name for name, _ in _FIGURES])
        self._next()

    def add(self, finding: "Finding") -> None:
        """Write the line of a check that is done."""
        self._paper.forget_begun()
        word = "FAILED" if finding.verdict == "failed" else finding.verdict
        self._row((word, _STYLES.get(finding.verdict, "dim")), finding.check, finding.question, _figures(finding))
        self._waiting.remove(finding.check)
        self._next()

    def _next(self) -> None:
        if self._waiting:
            self._paper.begun(f"{'...':{_VERDICT_WIDTH}}  {self._waiting[0]}")

    def _row(self, verdict: tuple[str, str], name: str, question: str, figures: Sequence[str]) -> None:
        word, style = verdict
        shown = "".join(f"  {text:>{width}}" for text, (_, width) in zip(figures, _FIGURES, strict=True))
        start = f"  {name:{self._name}}"
        header = "bold" if style == "bold" else ""
        first, *more = textwrap.wrap(question, self._question) if self._beside else [""]
        asked = f"  {first:{self._question}}" if self._beside else ""
        self._paper.line((f"{word:{_VERDICT_WIDTH}}", style), (start + asked + shown, header))
        below = " " * (_VERDICT_WIDTH + 2)
        if not self._beside and question:
            more = textwrap.wrap(question, self._paper.width - len(below))
        else:
            below += " " * (self._name + 2)
        for line in more:
            self._paper.line((below + line, "" if self._beside else "dim"))


def _figures(finding: "Finding") -> list[str]:
    if finding.verdict in _WITHOUT_FIGURES:
        return [""] * len(_FIGURES)
    cases = str(finding.num_cases) if finding.verdict == "passed" else ""
    return [cases, _number(finding.largest), _number(finding.allowed), f"{finding.seconds:.1f}"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value else "0"
