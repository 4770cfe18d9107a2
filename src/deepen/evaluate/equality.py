"""Whether a grafted model still is its base, told from the results of both stages.

| numbers | method | greedy ids | nats a token |
|---|---|---|---|
| float32, float64 | promises the base's output | equal | every document's sum equal to the last bit |
| float32, float64 | any other | equal | less than 1e-6 apart |
| coarser | any | told, not judged | less than 0.1 % apart |

Where the width of a pass changes its rounding (recurrent layers, GPUs), the second line stands for the first, too.

Free of torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deepen.evaluate.metrics import DOCUMENT_METRICS
from deepen.evaluate.results import Answer, StageResults

NLL_TOLERANCE = 1e-6
COARSE_NLL_SHARE = 1e-3

_FINE = ("float32", "float64")
_NLL = next(metric for metric in DOCUMENT_METRICS if metric.name == "nll")


@dataclass(frozen=True)
class Equality:
    """The verdict, what was asked, and what was found; `delta_nll` is in nats a token.

    `ids_equal` is None where there is nothing to compare. What asks for equal ids is then not judged, and `holds` is
    None, unless the scores differ, which is verdict enough.
    """

    holds: bool | None
    criterion: str
    ids_equal: bool | None
    ids: str
    delta_nll: float
    nll: str
    notes: tuple[str, ...]


def equality(baseline: StageResults, grafted: StageResults) -> Equality:
    """The verdict over two stages of one base that scored the same documents."""
    ids_equal, ids = _compare_ids(baseline, grafted)
    before, after = (_NLL.over(stage.documents) for stage in (baseline, grafted))
    assert before is not None and after is not None, "a results file has documents"
    delta = after - before
    num_moved, widest = _moved_documents(baseline, grafted)
    coarse = any(stage.environment.get("dtype") not in _FINE for stage in (baseline, grafted))
    if coarse:
        criterion = f"nats a token less than {COARSE_NLL_SHARE:.1%} apart, in this dtype"
        holds: bool | None = delta == 0 or abs(delta) < COARSE_NLL_SHARE * before
    elif _same_bits(grafted):
        criterion = "greedy ids equal, nats a token exactly equal"
        holds = ids_equal if delta == 0 and num_moved == 0 else False
    else:
        criterion = f"greedy ids equal, nats a token less than {NLL_TOLERANCE:g} apart"
        holds = ids_equal if abs(delta) < NLL_TOLERANCE else False
    nll = f"{delta:+.3g} nats a token ({delta / before:+.2g} of the baseline's)" if before else f"{delta:+.3g}"
    if num_moved:
        nll += f"; {num_moved} of {len(baseline.documents)} documents moved, one by {widest:.2g} nats a token"
    return Equality(holds, criterion, ids_equal, ids, delta, nll, _notes(baseline, grafted))


def _same_bits(grafted: StageResults) -> bool:
    """Whether the method promises the base's output, on a machine where a pass's width doesn't touch the rounding."""
    return grafted.exact and grafted.checks.get("pass_width_difference") == 0.0


def _moved_documents(baseline: StageResults, grafted: StageResults) -> tuple[int, float]:
    """How many documents' sums differ, and by how many nats a token the widest."""
    before, after = ({d.id: d for d in stage.documents} for stage in (baseline, grafted))
    moves = [abs(after[name].nll - before[name].nll) / before[name].num_tokens for name in before if name in after]
    return sum(move > 0 for move in moves), max(moves, default=0.0)


def _compare_ids(baseline: StageResults, grafted: StageResults) -> tuple[bool | None, str]:
    """Whether all greedy ids are equal, and in words how far."""
    before, after = ({answer.prompt: answer for answer in stage.answers} for stage in (baseline, grafted))
    if not before or not after:
        return None, "no greedy answers in one of the files; evaluate both with max_new_tokens above 0"
    lengths = [stage.config.get("max_new_tokens") for stage in (baseline, grafted)]
    if lengths[0] != lengths[1] or before.keys() != after.keys():
        return None, (
            f"not the same answers: {len(before)} prompts with max_new_tokens {lengths[0]}, and {len(after)} with "
            f"{lengths[1]}; evaluate both stages alike"
        )
    apart = [name for name in before if before[name].tokens != after[name].tokens]
    if not apart:
        return True, f"{len(before)} of {len(before)} answers equal"
    where = ", ".join(f"{name} at token {_first_difference(before, after, name)}" for name in apart)
    return False, f"{len(before) - len(apart)} of {len(before)} answers equal; DIFFERENT: {where}"


def _first_difference(before: Mapping[str, Answer], after: Mapping[str, Answer], name: str) -> int:
    pairs = zip(before[name].tokens, after[name].tokens, strict=False)
    shorter = min(len(before[name].tokens), len(after[name].tokens))
    return next((place for place, (one, other) in enumerate(pairs) if one != other), shorter)


def _notes(baseline: StageResults, grafted: StageResults) -> tuple[str, ...]:
    """What may explain a difference without there being a fault."""
    notes = []
    width = grafted.checks.get("pass_width_difference")
    if grafted.exact and width != 0.0:
        notes.append(f"the width of a pass moves logits by up to {_shown(width)} here, so bits are not expected equal")
    unlike = [
        f"{name} {_shown(baseline.environment.get(name))} and {_shown(value)}"
        for name, value in grafted.environment.items()
        if baseline.environment.get(name) != value
    ]
    if unlike:
        notes.append(f"the two stages were measured in different environments: {', '.join(unlike)}")
    return tuple(notes)


def _shown(value: Any) -> str:
    return f"{value:.2g}" if isinstance(value, float) else str(value)
