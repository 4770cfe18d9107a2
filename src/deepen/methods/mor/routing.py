"""Which tokens run which recursions, decided by routers in fp32 at least.

A router reads a token's state divided by its root mean square, so that its logits don't grow with the state. What is
decided about a token depends on that token alone, unless `TopK` decides, which is for training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .config import MoRConfig

_EPSILON = 1e-6


@dataclass(frozen=True, eq=False)
class Level:
    """What was decided at one recursion about each of a pass's M tokens.

    `logits` and `probabilities` (of being kept) mean something where a token had `entered` the recursion before.
    """

    logits: Float[Tensor, "M"]
    probabilities: Float[Tensor, "M"]
    entered: Bool[Tensor, "M"]
    kept: Bool[Tensor, "M"]
    above: Bool[Tensor, "M"]
    """Of those that entered, whether the threshold would have kept them."""


@dataclass(eq=False)
class Routed:
    """What was decided in one pass: levels 1 to Nr - 1, and with token_choice the logits `[M, Nr]` of each depth."""

    levels: list[Level] = field(default_factory=list)
    choices: Float[Tensor, "M Nr"] | None = None
    chosen: Int[Tensor, "M"] | None = None
    num_sure: int = 1
    """Recursions that nothing is decided about."""

    def depths(self, real: Bool[Tensor, "M"]) -> Int[Tensor, "M"]:
        """Recursions that each real token ran; 0 for others."""
        depths = self.num_sure * real
        for level in self.levels:
            depths = depths + level.kept
        return depths


@dataclass(frozen=True, eq=False)
class Asked:
    """Tokens that have run the recursion before `level`: their states, their rows, and their index among the pass's M.

    `row_lengths` counts the tokens of each row that the pass began with. `alive` is None where all of them have; otherwise those of the states that count.
    """

    level: int
    hidden: Float[Tensor, "m D"]
    rows: Int[Tensor, "m"]
    row_lengths: Int[Tensor, "B"]
    index: Int[Tensor, "m"] | None
    alive: Bool[Tensor, "m"] | None


@dataclass(frozen=True, eq=False)
class Answer:
    """For the same m tokens: logit and probability of being kept, who is, and who is by the threshold."""

    logits: Float[Tensor, "m"]
    probabilities: Float[Tensor, "m"]
    kept: Bool[Tensor, "m"]
    above: Bool[Tensor, "m"]


class ExpertChoice(nn.Module):
    """One linear router at each recursion after the first, and the threshold that its logit must reach."""

    def __init__(self, hidden_size: int, wanted_shares: Sequence[float]) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Linear(hidden_size, 1, bias=False) for _ in wanted_shares[1:])
        self._wanted = tuple(wanted_shares)
        self.register_buffer("thresholds", torch.zeros(len(self.levels), dtype=torch.float32))
        self.thresholds: Tensor
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Thresholds at 0; where all are wanted, nothing is to be reached."""
        self.thresholds.zero_()
        for place, ratio in enumerate(self._ratios()):
            if ratio >= 1:
                self.thresholds[place] = -torch.inf

    def _ratios(self) -> list[float]:
        """Of those that enter each recursion after the first, the share that is to be kept."""
        return [after / before for before, after in pairwise(self._wanted)]

    def begin(self, hidden: Float[Tensor, "M D"], routed: Routed) -> None:
        """Nothing is decided before the recursions."""

    def decide(self, asked: Asked, routed: Routed, *, topk: bool) -> Answer:
        """Who goes on. With `topk`, of each row the best, as many as its share of the row's tokens is."""
        weight = self.levels[asked.level - 1].weight
        logits = _linear(_normed(asked.hidden), weight)[:, 0]
        above = logits >= self.thresholds[asked.level - 1].to(logits.dtype)
        if asked.alive is not None:
            above = above & asked.alive
        kept = above if not topk else _best_of_rows(logits, asked, share=self._wanted[asked.level])
        return Answer(logits, logits.sigmoid(), kept, above)

    @torch.no_grad()
    def move(self, statistics: Mapping[str, Tensor], *, rate: float) -> None:
        """Each threshold by `rate` times how much larger a share of those that entered reached it than is wanted.

        `statistics` has `entered` and `above` `[Nr - 1]`, counted over a step; a level that nobody entered stays.
        """
        entered, above = (statistics[name].double().cpu() for name in ("entered", "above"))
        wanted = torch.tensor(self._ratios(), dtype=torch.float64)
        excess = torch.where(entered > 0, above / entered.clamp(min=1) - wanted, 0.0)
        self.thresholds.add_((rate * excess).to(self.thresholds))


class TokenChoice(nn.Module):
    """One router, asked once, before the first recursion: of Nr depths a token runs the one with the largest logit."""

    def __init__(self, hidden_size: int, num_recursions: int, *, kind: str) -> None:
        super().__init__()
        widths = [hidden_size, num_recursions] if kind == "linear" else [hidden_size, 2 * hidden_size, num_recursions]
        self.layers = nn.ModuleList(
            nn.Linear(before, after, bias=False) for before, after in pairwise(widths)
        )
        self.register_buffer("choice_bias", torch.zeros(num_recursions, dtype=torch.float32))
        self.register_buffer("loads", torch.ones(num_recursions, dtype=torch.float32))
        self.choice_bias: Tensor
        self.loads: Tensor
        """Nr times the share of tokens that chose each depth in the step before."""

    def reset_buffers(self) -> None:
        """As if all depths had been chosen equally often."""
        self.choice_bias.zero_()
        self.loads.fill_(1.0)

    def begin(self, hidden: Float[Tensor, "M D"], routed: Routed) -> None:
        """Choose a depth for each token; of equal logits the smaller depth."""
        logits = _normed(hidden)
        for place, layer in enumerate(self.layers):
            logits = _linear(F.silu(logits) if place else logits, layer.weight)
        routed.choices = logits
        routed.chosen = (logits + self.choice_bias.to(logits.dtype)).argmax(dim=-1)

    def decide(self, asked: Asked, routed: Routed, *, topk: bool) -> Answer:
        """Who chose a greater depth than what is behind it."""
        assert routed.choices is not None and routed.chosen is not None, "begin comes first"
        choices, chosen = (each if asked.index is None else each[asked.index] for each in (routed.choices, routed.chosen))
        kept = chosen >= asked.level
        if asked.alive is not None:
            kept = kept & asked.alive
        own = chosen[:, None]
        return Answer(choices.gather(1, own)[:, 0], choices.softmax(dim=-1).gather(1, own)[:, 0], kept, kept)

    @torch.no_grad()
    def move(self, statistics: Mapping[str, Tensor], *, rate: float) -> None:
        """Remember the loads of a step, and move each depth's bias by `rate` towards equal ones.

        `statistics` has `chosen` `[Nr]`, tokens counted over the step.
        """
        chosen = statistics["chosen"].double().cpu()
        if not chosen.sum():
            return
        loads = len(chosen) * chosen / chosen.sum()
        self.loads.copy_(loads)
        self.choice_bias.add_((rate * (1 - loads).sign()).to(self.choice_bias))


class AllRecur(nn.Module):
    """No router: every token runs every recursion."""

    def __init__(self, num_recursions: int) -> None:
        super().__init__()
        self._num_recursions = num_recursions

    def begin(self, hidden: Float[Tensor, "M D"], routed: Routed) -> None:
        """Nothing is decided."""
        routed.num_sure = self._num_recursions

    def decide(self, asked: Asked, routed: Routed, *, topk: bool) -> None:
        """Nothing is decided."""

    def move(self, statistics: Mapping[str, Tensor], *, rate: float) -> None:
        """No buffers."""


def make_router(config: MoRConfig) -> ExpertChoice | TokenChoice | AllRecur:
    """That of a `MoRConfig`; one recursion leaves nothing to decide."""
    routing, num_recursions = config.routing, config.num_recursions
    if routing == "none" or num_recursions == 1:
        return AllRecur(num_recursions)
    if routing == "expert_choice":
        return ExpertChoice(config.hidden_size, config.wanted_shares)
    return TokenChoice(config.hidden_size, num_recursions, kind=config.router)


def _normed(hidden: Tensor) -> Tensor:
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + _EPSILON)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight.to(x.dtype))


def _best_of_rows(logits: Tensor, asked: Asked, *, share: float) -> Tensor:
    """Of each row as many as `share` of its tokens, rounded down but one at least; of equal ones the first."""
    entered = torch.ones_like(logits, dtype=torch.bool) if asked.alive is None else asked.alive
    order = logits.masked_fill(~entered, -torch.inf).argsort(descending=True, stable=True)
    by_row = order[asked.rows[order].argsort(stable=True)]
    rows = asked.rows[by_row]
    counts = torch.bincount(rows, minlength=len(asked.row_lengths))
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    # A share like 2 / 3 is a little less than that.
    quotas = (share * asked.row_lengths.double() + 1e-6).floor().clamp(min=1)
    kept = torch.zeros_like(entered)
    kept[by_row] = places < quotas[rows]
    return kept & entered
