"""What a run really takes: FLOPs as torch's FlopCounterMode counts them, and bytes of the tensors that are held.

A pass computes positions and entries in blocks, and attention computes scores that it then hides; how much more that is
than the products of real positions and visible entries, which the ledger counts, is told here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from deepen.backbones.cache import PrefixCache
from deepen.backbones.costs import PassCosts
from deepen.backbones.hf import Backbone, Keep
from deepen.nn.attention import KEY_BLOCK, QUERY_BLOCK, Section, Visibility, round_up


def counted_flops(run: Callable[[], object], *, positions_before: int = 0) -> int:
    """FLOPs of `run`, forward and backward.

    Two things are put right. A short convolution is computed over positions that are no tokens, too: kernel - 1 pads
    in front, behind which may stand `positions_before` inputs of earlier tokens, and as many behind. And torch counts
    the gradient of the weights of a convolution with one filter a channel as if each filter read every channel.
    """

    def convolution(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
        assert weight[1] == 1, "a filter reads one channel"
        return 2 * x[0] * prod(weight) * (x[2] - positions_before)

    def backward(out: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **__: Any) -> int:
        (needed,) = (each for each in rest if isinstance(each, list) and len(each) == 3 and isinstance(each[0], bool))
        return sum(needed[:2]) * convolution(x, weight)

    aten = torch.ops.aten
    mapping = {aten.convolution: convolution, aten.convolution_backward: backward}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        run()
    return counter.get_total_flops()


@dataclass(frozen=True)
class Ran:
    """One pass of a `Backbone`: what each row held before it, how many positions it brought, which got logits."""

    contexts: tuple[int, ...]
    widths: tuple[int, ...]
    keep: Keep

    @property
    def num_logits(self) -> int:
        """Positions that the head is applied to, in each row."""
        if self.keep == "all":
            return max(self.widths)
        return len(set(self.widths)) if self.keep == "last" else len(self.keep)

    def flops_computed(self, backbone: Backbone, costs: PassCosts) -> int:
        """What the pass computes, in blocks of positions and entries; every row is as wide as the widest."""
        return pass_flops_computed(
            backbone, costs, width=max(self.widths), contexts=self.contexts, num_logits=self.num_logits
        )

    def flops_told(self, costs: PassCosts) -> int:
        """What the ledger counts of it: real positions, each with the entries that it sees, pads included."""
        width = max(self.widths)
        rows = (
            costs.flops(num_positions=width, context=context, num_logits=self.num_logits) for context in self.contexts
        )
        return sum(rows)


@contextmanager
def passes_of(backbone: Backbone) -> Iterator[list[Ran]]:
    """The passes that `backbone` makes in the block."""
    ran: list[Ran] = []
    own = backbone.run

    def run(tokens: Any, cache: Any, *, widths: Any = None, keep: Any = "all", **options: Any) -> Any:
        given = [tokens.shape[1]] * tokens.shape[0] if widths is None else widths
        kept: Keep = keep if isinstance(keep, str) else tuple(keep)  # type: ignore[assignment]
        ran.append(Ran(tuple(cache.lengths), tuple(given), kept))
        return own(tokens, cache, widths=widths, keep=keep, **options)

    backbone.run = run  # type: ignore[method-assign]
    try:
        yield ran
    finally:
        del backbone.run


def pass_flops_computed(
    backbone: Backbone, costs: PassCosts, *, width: int, contexts: Sequence[int], num_logits: int
) -> int:
    """What a pass of rows behind `contexts` computes when its positions and entries come in blocks."""
    positions = width if backbone.recurrent_layers else round_up(width, QUERY_BLOCK)
    num_keys = round_up(max(contexts) + width, KEY_BLOCK)
    visibility = Visibility(contexts, positions, num_keys, device=backbone.device, dtype=backbone.dtype)
    sections = visibility.sections
    seen = QUERY_BLOCK * sum(_num_rows(each, contexts) * each.num_blocks * each.num_keys for each in sections)
    of_row = positions * costs.per_position + num_logits * costs.per_logit + num_keys * costs.per_entry
    return (len(contexts) * of_row + seen * costs.per_visible).forward_flops


def _num_rows(section: Section, contexts: Sequence[int]) -> int:
    return len(range(len(contexts))[section.rows])


def committed_bytes(cache: PrefixCache, row: int = 0) -> int:
    """Of the tensors themselves, cut from stores that have room for more entries."""
    total = 0
    for layer in range(len(cache.layers)):
        if layer in cache.recurrent_layers:
            total += sum(part[row].nbytes for part in cache.state(layer) if part is not None)
        else:
            total += sum(part.nbytes for part in cache.entries(layer, row))
    return total
