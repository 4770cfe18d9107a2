"""Whether a language model does what a causal language model must: a suite for any model, with a verdict a check.

    from deepen.check import check
    report = check(model)          # an nn.Module, one of transformers' or your own
    assert report.passed, str(report)

subject.py says what is asked of a model, suite.py lists the checks, each of which is a function in the file of its
subject matter. A check compares what must be equal, up to the rounding measured on this very model (rounding.py).

The names below are loaded when first used, so that `import deepen.check` stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepen.check.opening import open_subject as open_subject
    from deepen.check.report import Finding as Finding
    from deepen.check.report import Report as Report
    from deepen.check.suite import check as check

_HOME_OF = {
    "Finding": "deepen.check.report",
    "Report": "deepen.check.report",
    "check": "deepen.check.suite",
    "open_subject": "deepen.check.opening",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
