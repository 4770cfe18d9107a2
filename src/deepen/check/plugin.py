"""pytest's door to the suite: `pytest --deepen-model ADDRESS [--deepen-quick]` runs each check as a test.

The items `deepen::check[NAME]` stand beside whatever else is collected, also where nothing is. The model is opened
when the first of them runs, once a process. pytest itself, `-k`, `-x` and pytest-xdist do with them as with any test;
checks that a selected one stands on are run for it, selected or not.

Without the option nothing is done, and nothing of deepen but this file is imported. It stays so for the whole file:
every pytest run where deepen is installed loads it.
"""

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from deepen.check.report import Finding
    from deepen.check.subject import Subject
    from deepen.check.suite import Check

_WIDTH = 100


def pytest_addoption(parser: pytest.Parser) -> None:
    """The two options."""
    group = parser.getgroup("deepen", "deepen: hold a causal language model to what such a model must do")
    group.addoption(
        "--deepen-model",
        metavar="ADDRESS",
        help="model to check: a hub id, folder, pypi:NAME, tiny:NAME, an adapter's folder, or path/to/file.py:NAME or "
        "package.module:NAME, a function or class that gives the model (runs the file)",
    )
    group.addoption("--deepen-quick", action="store_true", help="fewer and shorter cases, nothing that takes minutes")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Which model is checked."""
    address = config.getoption("deepen_model")
    return f"deepen: checks {address}{', quick' * config.getoption('deepen_quick')}" if address else None


# Before pytest's own, which take away what -k and the like don't select.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the checks behind the tests that were found."""
    address = config.getoption("deepen_model")
    if not address:
        if config.getoption("deepen_quick"):
            raise pytest.UsageError("--deepen-quick without --deepen-model ADDRESS says nothing; give the model, too")
        return
    items.extend(session.genitems(Suite.from_parent(session, name="deepen", nodeid="deepen")))


class Suite(pytest.Collector):
    """All checks of one model, with the findings so far."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._subject: Subject | None = None
        self._why_not = ""
        self._findings: dict[str, Finding] = {}

    def collect(self) -> Iterator["CheckItem"]:
        """An item a check."""
        from deepen.check.suite import CHECKS

        for each in CHECKS:
            yield CheckItem.from_parent(self, name=f"check[{each.name}]", check=each)

    def subject(self) -> "Subject":
        """The model; where it can't be opened, the first test errs and the others are skipped, with the reason."""
        if self._why_not:
            pytest.skip(self._why_not)
        if self._subject is None:
            self._subject, self._why_not = self._opened()
        if self._subject is None:
            pytest.fail(self._why_not, pytrace=False)
        return self._subject

    def _opened(self) -> "tuple[Subject, str] | tuple[None, str]":
        from deepen.check.opening import open_subject
        from deepen.core.errors import DeepenError

        try:
            return open_subject(self.config.getoption("deepen_model")), ""
        except DeepenError as error:
            return None, f"the model can't be opened: {error}"

    def finding(self, check: "Check") -> "Finding":
        """The finding of `check`, after those it needs have been found, each once."""
        from deepen.check.effort import QUICK, THOROUGH
        from deepen.check.suite import CHECKS, run, with_needs

        effort = QUICK if self.config.getoption("deepen_quick") else THOROUGH
        missing = [each for each in with_needs([check.name], CHECKS) if each.name not in self._findings]
        report = run(self.subject(), effort, checks=missing, before=self._findings.values())
        self._findings = {finding.check: finding for finding in report.findings}
        return self._findings[check.name]


class CheckItem(pytest.Item):
    """One check."""

    def __init__(self, *, check: "Check", **given: Any) -> None:
        super().__init__(**given)
        self._check = check
        self.user_properties.append(("question", check.question))

    @property
    def _suite(self) -> Suite:
        assert isinstance(self.parent, Suite)
        return self.parent

    def setup(self) -> None:
        """Open the model, if it isn't yet."""
        self._suite.subject()

    def runtest(self) -> None:
        """Run the check; what it found becomes the test's outcome."""
        finding = self._suite.finding(self._check)
        if finding.verdict == "failed":
            pytest.fail(_explained(finding), pytrace=False)
        if finding.verdict != "passed":
            pytest.skip(f"{finding.check}: {finding.verdict}: {finding.detail}")
        self.add_report_section("call", "deepen", _figures(finding))

    def reportinfo(self) -> tuple[str, None, str]:
        """What stands above a failure."""
        return "deepen", None, self.name


def _explained(finding: "Finding") -> str:
    parts = (finding.question, f"seen: {finding.detail}", f"likely cause: {finding.cause}")
    return "\n".join(textwrap.fill(part, _WIDTH, subsequent_indent="  ", break_on_hyphens=False) for part in parts)


def _figures(finding: "Finding") -> str:
    figures = f"{finding.num_cases} cases"
    if finding.largest is not None and finding.allowed is not None:
        figures += f", largest difference in a logit {finding.largest:.2g} (rounding explains {finding.allowed:.2g})"
    return f"{finding.question}\n{figures}"
