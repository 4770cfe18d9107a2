"""Where drafts came from, what their passes cost counted instead of timed, and what choosing among sources lost.

A pass is priced by what one of its width costs relative to a pass over one token, as measured on the same machine in
the same run. The clock's noise over whole answers is then no part of the comparison; nor is what a method computes in
a pass beside the base's layers.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from deepen.evaluate.speed import Timing


def price(width: int, prices: Mapping[int, float]) -> float:
    """What a pass of `width` costs relative to a pass of one, from `prices` of some widths.

    Between two of them on the line through both, beyond the widest in proportion to its width. There must be a price
    for width 1 or less.
    """
    if width in prices:
        return prices[width]
    widths = sorted(prices)
    assert widths and widths[0] <= width, f"no price is known for a pass as narrow as {width}"
    for below, above in pairwise(widths):
        if below < width < above:
            share = (width - below) / (above - below)
            return prices[below] * (1 - share) + prices[above] * share
    return prices[widths[-1]] * width / widths[-1]


def counted_passes(
    timings: Sequence[Mapping[str, Timing]], prices: Mapping[int, float], *, path: str
) -> dict[str, Any]:
    """One path's passes on these prompts by draft source, what they cost together, and tokens for that price.

    `tokens_per_priced_pass` is how many times as fast as plain decoding the path is, were passes all that takes time.
    """
    by_source: Counter[str] = Counter()
    cost = 0.0
    for timing in timings:
        for source, widths in timing[path].answered.passes_by_source.items():
            by_source[source] += sum(widths.values())
            cost += sum(count * price(width, prices) for width, count in widths.items())
    tokens = sum(len(timing[path].answered.tokens) for timing in timings)
    return {
        "passes_by_source": dict(sorted(by_source.items())),
        "tokens": tokens,
        "priced_passes": cost,
        "tokens_per_priced_pass": tokens / cost if cost else None,
    }


def regret(
    timings: Sequence[Mapping[str, Timing]], prices: Mapping[int, float], *, path: str, fixed: Sequence[str]
) -> dict[str, Any]:
    """By how much a token costs more on `path`, which chooses its source, than on the best of the `fixed` paths.

    `regret` is a share of the best one's price: 0.05 is 5 % dearer, and below 0 choosing was worth it. It is None
    where no path spent anything.
    """
    cost_of = {
        name: 1 / counted["tokens_per_priced_pass"]
        for name in (path, *fixed)
        if (counted := counted_passes(timings, prices, path=name))["tokens_per_priced_pass"]
    }
    choices = [name for name in fixed if name in cost_of]
    if path not in cost_of or not choices:
        return {"path": path, "best_fixed": None, "regret": None}
    best = min(choices, key=lambda name: cost_of[name])
    return {"path": path, "best_fixed": best, "regret": cost_of[path] / cost_of[best] - 1}
