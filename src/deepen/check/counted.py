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
from deepen.backbones.hf import Backbone
from deepen.nn.attention import KEY_BLOCK, QUERY_BLOCK, Visibility, round_up


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
    """One pass of a `Backbone`: what each row held before it, and how many positions it brought."""

    contexts: tuple[int, ...]
    widths: tuple[int, ...]
    keep: str

    def flops_computed(self, backbone: Backbone, costs: PassCosts) -> int:
        """What the pass of a single row computes, in blocks of positions and entries."""
        ((context,), (width,)) = self.contexts, self.widths
        num_logits = 1 if self.keep == "last" else width
        return pass_flops_computed(backbone, costs, width=width, context=context, num_logits=num_logits)


@contextmanager
def passes_of(backbone: Backbone) -> Iterator[list[Ran]]:
    """The passes that `backbone` makes in the block."""
    ran: list[Ran] = []
    own = backbone.run

    def run(tokens: Any, cache: Any, *, widths: Any = None, keep: Any = "all", **options: Any) -> Any:
        given = [tokens.shape[1]] * tokens.shape[0] if widths is None else widths
        ran.append(Ran(tuple(cache.lengths), tuple(given), keep))
        return own(tokens, cache, widths=widths, keep=keep, **options)

    backbone.run = run  # type: ignore[method-assign]
    try:
        yield ran
    finally:
        del backbone.run


def pass_flops_computed(backbone: Backbone, costs: PassCosts, *, width: int, context: int, num_logits: int) -> int:
    """What a pass of one row computes when its positions and entries come in blocks, by the costs of each."""
    positions = width if backbone.recurrent_layers else round_up(width, QUERY_BLOCK)
    num_keys = round_up(context + width, KEY_BLOCK)
    visibility = Visibility([context], positions, num_keys, device=backbone.device, dtype=backbone.dtype)
    seen = sum(section.num_blocks * QUERY_BLOCK * section.num_keys for section in visibility.sections)
    work = positions * costs.per_position + num_logits * costs.per_logit + seen * costs.per_visible
    return (work + num_keys * costs.per_entry).forward_flops


def committed_bytes(cache: PrefixCache, row: int = 0) -> int:
    """Of the tensors themselves, cut from stores that have room for more entries."""
    total = 0
    for layer in range(len(cache.layers)):
        if layer in cache.recurrent_layers:
            total += sum(part[row].nbytes for part in cache.state(layer) if part is not None)
        else:
            total += sum(part.nbytes for part in cache.entries(layer, row))
    return total
