"""The verdicts of all checks on one model."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["passed", "failed", "not judged", "not applicable", "left out"]

_WITHOUT_VERDICT: tuple[Verdict, ...] = ("not judged", "not applicable", "left out")


@dataclass(frozen=True)
class Finding:
    """One check's verdict.

    passed           `largest` and `allowed` are in logits, None where bits or ids were compared; `detail` says in
                     which of several ways
    failed           `detail` is what was seen, `cause` what in a model's code makes for that
    not judged       `detail` names the failed checks on whose result this one stands
    not applicable   `detail` says what the model lacks
    left out         the check takes longer than was asked for
    """

    check: str
    question: str
    verdict: Verdict
    seconds: float = 0.0
    num_cases: int = 0
    largest: float | None = None
    allowed: float | None = None
    detail: str = ""
    cause: str = ""


@dataclass(frozen=True)
class Report:
    """All findings on one model, in the order in which checks stand on each other."""

    model: str
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[Finding, ...]:
        """The checks that found a fault."""
        return tuple(finding for finding in self.findings if finding.verdict == "failed")

    @property
    def summary(self) -> str:
        """How many checks passed or failed, which failed, and how many were not judged."""
        counts = Counter(finding.verdict for finding in self.findings)
        judged = counts["passed"] + counts["failed"]
        others = [f"{counts[verdict]} {verdict}" for verdict in _WITHOUT_VERDICT if counts[verdict]]
        rest = f" ({', '.join(others)})" if others else ""
        if self.failed:
            names = ", ".join(finding.check for finding in self.failed)
            return f"{counts['failed']} of {judged} check{'s' * (judged > 1)} failed: {names}{rest}"
        return f"{'no check was judged' if not judged else _all_passed(judged)}{rest}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "model": self.model,
            "passed": self.passed,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        """The summary, and below it a line a check, under failed ones what was seen and the likely cause."""
        lines = [line for finding in self.findings for line in _lines(finding)]
        return "\n".join([f"{self.model}: {self.summary}", *lines])

    def __repr__(self) -> str:
        """Short, for pytest cuts what it shows of an object."""
        return f"<Report on {self.model}: {self.summary}; str() of it tells more>"


def _all_passed(judged: int) -> str:
    return "1 check passed" if judged == 1 else f"{judged} checks passed"


def _lines(finding: Finding) -> list[str]:
    if finding.verdict == "failed":
        return [
            f"{finding.verdict:14}  {finding.check}: {finding.question}",
            f"{'':14}  seen: {finding.detail}",
            f"{'':14}  likely cause: {finding.cause}",
        ]
    return [f"{finding.verdict:14}  {finding.check}{f': {finding.detail}' if finding.detail else ''}"]
