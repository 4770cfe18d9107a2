"""What training runs tell in pictures: how losses went down, by steps and by what they cost."""

from collections.abc import Sequence

from deepen.report.drawing import Series, legend, line_sample, lines
from deepen.report.markup import together
from deepen.report.plots import Plot, Table
from deepen.report.runs import STEP, Run
from deepen.report.words import amount, cell

_TOTAL = "train/loss/total"
_TERMS = "train/loss/"
_VALIDATION = "evaluation/validation/loss"
_TRAINING_FLOPS = "train/performance/flops"

_MOST_POINTS = 400


def run_plots(runs: Sequence[Run]) -> list[Plot]:
    """Loss curves, one plot a loss and one line a run; and the validation loss against what training had cost."""
    if not runs:
        return [Plot("Loss curves", "Left out: no training run was named (--runs DIR).")]
    tags = dict.fromkeys(tag for run in runs for tag in run.tags)
    terms = [tag for tag in tags if tag.startswith(_TERMS) and tag != _TOTAL]
    same = [tag for tag in terms if all(run.points(STEP, tag) in ((), run.points(STEP, _TOTAL)) for run in runs)]
    note = f" It is {' or '.join(same)} alone." if same else ""
    return [
        _by_step(runs, _TOTAL, note=note),
        *(_by_step(runs, tag) for tag in terms if tag not in same),
        _by_step(runs, _VALIDATION),
        *(_by_step(runs, tag) for tag in tags if tag.startswith(f"{_VALIDATION}/")),  # of what has no score
        _by_flops(runs),
    ]


def _by_step(runs: Sequence[Run], tag: str, *, note: str = "") -> Plot:
    caption = f"At the steps that were logged.{note}"
    return _curves(runs, STEP, tag, title=tag, x_label="optimizer steps", caption=caption)


def _by_flops(runs: Sequence[Run]) -> Plot:
    title = "Validation loss against training FLOPs"
    caption = "By the ledger, at the steps that were evaluated."
    return _curves(runs, _TRAINING_FLOPS, _VALIDATION, title=title, x_label="training FLOPs", caption=caption)


def _curves(runs: Sequence[Run], x: str, y: str, *, title: str, x_label: str, caption: str) -> Plot:
    series = [Series(run.label, number, run.points(x, y)) for number, run in enumerate(runs)]
    drawn = [each for each in series if each.told]
    if not drawn:
        both = y if x == STEP else f"{x} and {y}"
        return Plot(title, f"Left out: no run has {both} in its train.jsonl.")
    y_label = "nats per token" if y == _VALIDATION else "loss"
    picture = lines([_thinned(each) for each in drawn], title=title, x_label=x_label, y_label=y_label)
    return Plot(
        title,
        caption + _told_thinning(drawn) + _told_missing(series),
        together((picture, legend((each.name, line_sample(each.number)) for each in drawn))),
        Table(("run", "figures", "first", "lowest", "last", f"{x_label} at the last"), tuple(map(_summary, drawn))),
    )


def _summary(series: Series) -> tuple[str, ...]:
    values = [value for _, value in series.told]
    last = series.told[-1]
    figures = (values[0], min(values), last[1])
    return (series.name, cell(len(values)), *(f"{value:.4f}" for value in figures), amount(last[0]))


def _stride(series: Series) -> int:
    return -(-len(series.points) // _MOST_POINTS)


def _thinned(series: Series) -> Series:
    """Every so many points of a long line, its last and all gaps."""
    every, last = _stride(series), len(series.points) - 1
    kept = [
        point for index, point in enumerate(series.points) if index % every == 0 or index == last or point[1] is None
    ]
    return Series(series.name, series.number, tuple(kept))


def _told_thinning(drawn: Sequence[Series]) -> str:
    most = max(map(_stride, drawn))
    return "" if most == 1 else f" Of many figures one in {most} is drawn."


def _told_missing(series: Sequence[Series]) -> str:
    without = [each.name for each in series if not each.told]
    gaps = any(value is None for each in series for _, value in each.points)
    told = f" Not in {', '.join(without)}." if without else ""
    return told + (" Gaps are figures that were not finite." if gaps else "")
