"""Which token a position gets from its logits: greedy, or sampled with transformers' meaning of each setting.

A decision depends on that position's logits, the row's ids before it, its configuration and nothing else: not on the
other positions of the pass, the other rows, or what was drafted and thrown away. Chunked decoding that samples then
gives the tokens of plain decoding.

Letters: W positions, V vocabulary, R positions looked at together, C candidates at each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from deepen.core.config import Config
from deepen.core.errors import DeepenError
from deepen.generate.random import SEED_LIMIT, gumbel

# Below, float32 logits divided by the temperature may overflow.
MIN_TEMPERATURE = 1e-6

# How many of the best tokens are looked at before the whole vocabulary is sorted, and how many beyond the k-th, to see
# where its ties end.
_NUM_CANDIDATES = 256, 4096
_TIE_ALLOWANCE = 32
# How much noise is computed at a time, where all tokens may survive; bounds the memory for it.
_NUM_NOISY = 2**16
# A cut nearer to a token than this (in probability; in log-probability for min-p) could fall on its other side with
# another order of summation. At least ten times what sums over a vocabulary differ by.
_ROUNDING = {torch.float32: 1e-5, torch.float64: 1e-12}
# The same for a min-p below this: the probabilities that it divides are 0 in float32.
_UNDERFLOW = 1e-20


@dataclass(frozen=True)
class SamplingConfig(Config):
    """How the tokens of one row are chosen; each setting means what it means in transformers.

    temperature         0 takes the most probable token; above 0, logits are divided by it and a token is drawn
    top_k               keep the k most probable tokens, and those tied with the last of them; 0 keeps all
    top_p               keep the most probable tokens that together reach this probability; 1 keeps all
    min_p               keep tokens at least this share as probable as the most probable one; 0 keeps all
    repetition_penalty  divides positive and multiplies negative logits of tokens that the row already has; 1 is off
    seed                key of the row's noise

    The filters act in this order, each on what the one before left, and only where a token is drawn.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken and nothing is drawn."""
        return self.temperature == 0.0

    def validate(self) -> list[str]:
        """One message for each value out of range."""
        warm = self.temperature >= MIN_TEMPERATURE
        ranges = (
            ("temperature", f"0 (greedy) or at least {MIN_TEMPERATURE}", self.greedy or warm),
            ("top_k", "0 (off) or more", self.top_k >= 0),
            ("top_p", "between 0 and 1 (off)", 0.0 <= self.top_p <= 1.0),
            ("min_p", "between 0 (off) and 1", 0.0 <= self.min_p <= 1.0),
            ("repetition_penalty", "above 0 (1 is off)", self.repetition_penalty > 0.0),
            ("seed", "between 0 and 2**64 - 1", 0 <= self.seed < SEED_LIMIT),
        )
        return [f"{name} must be {wanted}, not {getattr(self, name)}" for name, wanted, fits in ranges if not fits]


class BatchSampler:
    """Chooses tokens for a batch of rows, each by its own configuration; a `core.method.Sampler`."""

    def __init__(self, configs: Sequence[SamplingConfig]) -> None:
        """Raises `ConfigError` if a configuration holds an impossible value."""
        for config in configs:
            config.check()
        self.configs = list(configs)

    def drop(self, rows: Sequence[int]) -> None:
        """Forget finished rows (indices in the present order); the others keep their order."""
        gone = set(rows)
        self.configs = [config for row, config in enumerate(self.configs) if row not in gone]

    def choose(
        self, row: int, logits: Float[Tensor, "W V"], history: Sequence[int], drafted: Sequence[int]
    ) -> list[int]:
        """The token at each of W consecutive positions of `row`; of equals, that with the lowest id.

        `logits` belong to the positions after `history`, `history + drafted[:1]`, ...; entry i is chosen as plain
        decoding would after `history + drafted[:i]`. `history` holds the row's ids without pads, the prompt's
        included. Raises `DeepenError` where logits have no finite maximum.
        """
        config = self.configs[row]
        if config.greedy and config.repetition_penalty == 1.0:
            return _best_ids(logits)
        _require_maximum(logits)
        scores = processed_scores(logits, history, drafted, config)
        if config.greedy:
            return _best_ids(scores)
        return [int(token) for token in _draw(scores, config, first_position=len(history)).tolist()]

    def margins(
        self,
        row: int,
        logits: Float[Tensor, "W V"],
        history: Sequence[int],
        drafted: Sequence[int],
        chosen: Sequence[int],
    ) -> list[float]:
        """How far the choice of `chosen[i]` is from being another; the first arguments are those of `choose`.

        Another token takes over if it survives the filters and beats the chosen one. Its distance is the larger of
        the gap between the two scores (processed logits, with their noise where tokens are drawn) and what it lacks
        to survive. The margin is the least distance of any token, or what the chosen one has to spare to survive
        itself if that is less. For a greedy choice that is the best score less the second.

        What a token lacks or has to spare is measured in processed logits at the top-k and min-p cuts. At the top-p
        cut it is either that (tokens trade ranks across the cut) or the probability by which the cumulative one
        passes the threshold, which moves by less than e when each processed logit moves by at most e.

        Negative: these logits would have to change by so much for `chosen[i]` to be their choice.
        """
        config = self.configs[row]
        _require_maximum(logits)
        scores = processed_scores(logits, history, drafted, config).double().cpu()
        decisions = zip(scores, range(len(history), len(history) + len(scores)), chosen, strict=True)
        return [_margin(position_scores, config, position, token) for position_scores, position, token in decisions]


def processed_scores(
    logits: Float[Tensor, "W V"], history: Sequence[int], drafted: Sequence[int], config: SamplingConfig
) -> Float[Tensor, "W V"]:
    """Logits after repetition penalty and temperature, before any filter: float32, or float64 for float64 logits.

    At position i the penalty is on the tokens of `history` and `drafted[:i]`, once each.
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if config.repetition_penalty != 1.0:
        scores = _penalized(scores, history, drafted, config.repetition_penalty)
    return scores if config.greedy else scores / config.temperature


def filtered_scores(scores: Float[Tensor, "V"], config: SamplingConfig) -> Float[Tensor, "V"]:
    """One position's processed scores with -inf for what top-k, top-p and min-p remove: their definition.

    The operations are transformers', in its order, so that a cut falls where its rounding on a CPU puts it. Of tokens
    tied across the top-p cut the higher ids stay, as they do there wherever its sort is stable.
    """
    if config.top_k:
        kth = scores.topk(min(config.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < kth, -math.inf)
    if config.top_p < 1.0:
        ascending, order = scores.sort(stable=True)
        removed = ascending.softmax(dim=-1).cumsum(dim=-1) <= 1 - config.top_p
        removed[-1] = False
        scores = scores.index_fill(0, order[removed], -math.inf)
    if config.min_p > 0.0:
        probabilities = scores.softmax(dim=-1)
        scores = scores.masked_fill(probabilities < config.min_p * probabilities.amax(), -math.inf)
    return scores


def _require_maximum(logits: Tensor) -> None:
    if not logits.amax(dim=-1).isfinite().all():
        raise _no_maximum(logits.dtype)


def _best_ids(scores: Tensor) -> list[int]:
    """The best token at each position; with the check for a finite maximum in one transfer, as each is waited for."""
    best, is_finite = torch.stack([scores.argmax(dim=-1), scores.amax(dim=-1).isfinite().long()]).tolist()
    if not all(is_finite):
        raise _no_maximum(scores.dtype)
    return [int(token) for token in best]


def _no_maximum(dtype: torch.dtype) -> DeepenError:
    return DeepenError(
        f"the model's logits are NaN or infinite (in {dtype}): its weights are damaged, or it overflows in "
        "a precision lower than it was made for; load it with dtype float32"
    )


def _penalized(scores: Tensor, history: Sequence[int], drafted: Sequence[int], penalty: float) -> Tensor:
    width, vocab_size = scores.shape
    first_index = dict.fromkeys(history, 0)
    for index, token in enumerate(drafted[: width - 1], start=1):
        first_index.setdefault(token, index)
    # An embedding may know more ids than the head gives logits for.
    penalized_from = {token: index for token, index in first_index.items() if token < vocab_size}

    ids = torch.tensor(list(penalized_from), dtype=torch.int64, device=scores.device)
    starts = torch.tensor(list(penalized_from.values()), dtype=torch.int64, device=scores.device)
    present = torch.arange(width, device=scores.device)[:, None] >= starts
    before = scores[:, ids]
    after = torch.where(before < 0, before * penalty, before / penalty)
    return scores.index_copy(1, ids, torch.where(present, after, before))


# Drawing. Gumbel-max: the argmax of scores plus Gumbel noise is distributed as the scores' softmax. Noise is computed
# on the CPU and for surviving tokens only: for a whole vocabulary it costs as much as a small model's pass.


class _Candidates(NamedTuple):
    """Some of the tokens at each of R positions, by ascending id: processed scores and ids, `[R, C]`."""

    scores: Tensor
    ids: Tensor


def _draw(scores: Tensor, config: SamplingConfig, *, first_position: int) -> Tensor:
    """Tokens `[W]` drawn at consecutive positions from processed scores `[W, V]`.

    As a rule the best few tokens tell which survive, and the vocabulary needs no sorting. Where they can't tell for
    sure, more are looked at, and at last all.
    """
    width, vocab_size = scores.shape
    positions = torch.arange(first_position, first_position + width)
    masses = _masses(scores) if config.top_p < 1.0 and not config.top_k else None
    chosen = torch.empty(width, dtype=torch.int64)
    pending = torch.arange(width)
    for num_candidates in _candidate_counts(config, vocab_size):
        rows = pending.to(scores.device)
        candidates = _best(scores[rows], num_candidates)
        survivors, sure = _filter(candidates, None if masses is None else masses[pending], config)
        decided = pending[sure]
        chosen[decided] = _draw_among(
            _Candidates(survivors[sure], candidates.ids[sure]), config.seed, positions[decided]
        )
        pending = pending[~sure]
        if not len(pending):
            return chosen
    for part in pending.split(max(1, _NUM_NOISY // vocab_size)):
        rows = scores[part.to(scores.device)].cpu()
        everything = torch.arange(vocab_size).expand_as(rows)
        survivors = torch.stack([filtered_scores(row, config) for row in rows])
        chosen[part] = _draw_among(_Candidates(survivors, everything), config.seed, positions[part])
    return chosen


def _candidate_counts(config: SamplingConfig, vocab_size: int) -> list[int]:
    """How many of the best tokens to look at, one number after the other, before looking at all."""
    if config.top_k:
        counts: tuple[int, ...] = (config.top_k + _TIE_ALLOWANCE,)
    else:
        counts = _NUM_CANDIDATES if config.top_p < 1.0 or config.min_p > 0.0 else ()
    return [count for count in counts if count < vocab_size]


def _best(scores: Tensor, count: int) -> _Candidates:
    """The `count` best of `[R, V]`, on the CPU; which of those tied with the last of them is left open."""
    values, ids = (best.cpu() for best in scores.topk(count, sorted=False))
    order = ids.argsort(dim=-1)
    return _Candidates(values.gather(-1, order), ids.gather(-1, order))


def _masses(scores: Tensor) -> Tensor:
    """Sums `[W]` over the vocabulary of each token's probability relative to the best one's; on the CPU."""
    return (scores - scores.amax(dim=-1, keepdim=True)).exp().sum(dim=-1).cpu()


def _filter(candidates: _Candidates, masses: Tensor | None, config: SamplingConfig) -> tuple[Tensor, Tensor]:
    """What `filtered_scores` leaves, told from the best tokens alone: scores `[R, C]`, and where they are sure `[R]`.

    `masses` `[R]` are those of the whole vocabulary, None where top-p sees no more than top-k leaves. A position is
    unsure if a cut is so near to a token that rounding decides, or if it isn't above the last candidate.
    """
    rounding = _ROUNDING[candidates.scores.dtype]
    scores = candidates.scores.double()
    scores = scores - scores.amax(dim=-1, keepdim=True)
    last = scores.amin(dim=-1, keepdim=True)
    kept = torch.ones_like(scores, dtype=torch.bool)
    sure = torch.ones(len(scores), dtype=torch.bool)
    if config.top_k:
        kth = scores.topk(config.top_k).values[:, -1:]
        kept = scores >= kth
        sure = (kth > last).squeeze(-1)
    if config.top_p < 1.0:
        shares = torch.where(kept, scores.exp(), 0.0)
        inside = shares.sum(dim=-1, keepdim=True)
        total = inside if masses is None else masses.double()[:, None].maximum(inside)
        order = scores.argsort(dim=-1, stable=True)
        cumulative = (total - inside + shares.gather(-1, order).cumsum(dim=-1)) / total
        spare = cumulative - (1 - config.top_p)
        spare[:, -1] = math.inf  # the best token always stays
        kept &= torch.zeros_like(kept).scatter(-1, order, spare > 0)
        sure &= (spare.abs() > rounding).all(dim=-1)
    if config.min_p > 0.0:
        spare = scores - math.log(config.min_p)
        kept &= spare >= 0
        sure &= (spare.abs() > rounding).all(dim=-1) & (config.min_p > _UNDERFLOW)
    sure &= ~(kept & (scores == last)).any(dim=-1)
    return candidates.scores.masked_fill(~kept, -math.inf), sure


def _draw_among(survivors: _Candidates, seed: int, positions: Tensor) -> Tensor:
    """The token `[R]` with the best perturbed score; scores of -inf take no part. By ids, so the lowest of equals."""
    alive = survivors.scores > -math.inf
    rows, columns = alive.nonzero(as_tuple=True)
    perturbed = survivors.scores.to(torch.float64, copy=True)
    perturbed[rows, columns] += gumbel(seed, positions[rows], survivors.ids[rows, columns])
    return survivors.ids.gather(-1, perturbed.argmax(dim=-1, keepdim=True)).squeeze(-1)


# Margins, of one position and in float64.


def _margin(scores: Tensor, config: SamplingConfig, position: int, chosen: int) -> float:
    """How far processed scores `[V]` are from choosing another token than `chosen`; see `BatchSampler.margins`."""
    if config.greedy:
        perturbed, spare = scores, torch.full_like(scores, math.inf)
    else:
        perturbed = scores + gumbel(config.seed, position, torch.arange(len(scores)))
        spare = _spare(scores, config)
    distance = (perturbed[chosen] - perturbed).maximum(-spare)
    distance[chosen] = spare[chosen]
    return float(distance.min())


def _spare(scores: Tensor, config: SamplingConfig) -> Tensor:
    """What each token `[V]` has to spare to survive the filters; below 0, what it lacks."""
    lowest = torch.finfo(scores.dtype).min
    scores = scores.clamp(min=lowest)  # the difference of two -inf would be NaN
    spare = torch.full_like(scores, math.inf)
    within_k = scores
    if 0 < config.top_k < len(scores):
        kth, next_best = scores.topk(config.top_k + 1).values[-2:]
        spare = _above_cut(scores, kth, next_best)
        within_k = scores.masked_fill(scores < kth, lowest)
    if config.top_p < 1.0:
        ascending = within_k.sort().values
        mass = ascending.softmax(dim=-1).cumsum(dim=-1) - (1 - config.top_p)
        mass[-1] = math.inf  # the best token always stays
        # So that there is one below the cut even if all stay.
        ascending, mass = F.pad(ascending, (1, 0), value=lowest), F.pad(mass, (1, 0), value=-math.inf)
        cut = int((mass <= 0).sum())
        above = _above_cut(scores, ascending[cut], ascending[cut - 1], stay_mass=mass[cut], go_mass=-mass[cut - 1])
        spare = spare.minimum(above)
    if config.min_p > 0.0:
        best = scores.topk(min(2, len(scores))).values
        rival = best[0].repeat(len(scores))
        rival[scores.argmax()] = best[-1]
        spare = spare.minimum(scores - rival - math.log(config.min_p))
    return spare


def _above_cut(
    scores: Tensor,
    stays: Tensor,
    goes: Tensor,
    *,
    stay_mass: float | Tensor = math.inf,
    go_mass: float | Tensor = math.inf,
) -> Tensor:
    """How far tokens `[V]` are above a cut between two neighbours in rank, `stays` and `goes`; negative below it.

    A token changes sides by passing the neighbour on the other side. Or by reaching the one on its own side, whose
    change of sides takes a change of `stay_mass` or `go_mass` in the cumulative probability.
    """
    spare = (scores - goes).minimum((scores - stays).clamp(min=stay_mass))
    lack = (stays - scores).minimum((goes - scores).clamp(min=go_mass))
    return torch.where(scores >= stays, spare, -lack)
