"""A small recurrent net that drafts from what the base's layers held at the last token it read.

A pass that verifies a draft leaves, at the last position whose input is committed, the outputs of all layers. Those of
a few `read_layers` start the drafter's state; each token from the committed one on moves it, and it says the next:

    s_0   = rms_norm(h_top) + fuse([rms_norm(h_l) for read layers l]), top the uppermost of them
    s_j   = s_{j-1} + out(silu(inp([rms_norm(s_{j-1}), rms_norm(e(x_j))])))
    p_j+1 = softmax(N rows of the base's head . (scale * rms_norm(s_j)))

x_1 is the base's own next token, x_2 the first drafted one; e is the base's embedding. `fuse` and `out` start at zero
and `scale` at the base's last norm, so a new drafter that reads the last layer says again what the base has just said.
No pass of the base is spent on drafting: a step costs its two products and the head's rows. After Zhang et al. 2024
(arXiv 2403.09919), who draft by a recurrent net from the last layer, and Li et al. 2025 (arXiv 2503.01840), who read
several.

A text needs few of a vocabulary's tokens often, so only N can be drafted, the most frequent of what it learns from.

Letters: B rows, D hidden size, H width inside, L layers that are read, N tokens that can be drafted, V all tokens.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deepen.backbones.hf import Backbone
from deepen.backbones.kept_outputs import KeptOutputs
from deepen.core.errors import CheckpointError
from deepen.generate.drafts import Draft
from deepen.methods.chunk.modules import NORM_EPS
from deepen.nn.linear import version_of

# Told how sure a drafter is of all its tokens so far, row by row: whether there should be another.
GoesOn = Callable[[list[list[float]]], bool]


class ShallowDrafter(nn.Module):
    """The net; the base's embedding and head are its, too, and stay as they are."""

    tokens: Tensor | None
    """`[N]`, the ids that can be drafted, ascending; None where all can."""

    def __init__(self, backbone: Backbone, *, hidden: int, read_layers: Sequence[int], num_tokens: int) -> None:
        """`num_tokens` is N: until `fit` has chosen, the first so many of the vocabulary."""
        super().__init__()
        size = backbone.hidden_size
        self.read_layers, self.num_tokens = tuple(read_layers), num_tokens
        self._backbone = (backbone,)  # in a tuple, so that the base is no part of this module
        self.fuse = nn.Linear(len(self.read_layers) * size, size, bias=False)
        self.inp = nn.Linear(2 * size, hidden, bias=False)
        self.out = nn.Linear(hidden, size, bias=False)
        self.scale = nn.Parameter(torch.ones(size))
        self.register_buffer("tokens", torch.arange(num_tokens) if num_tokens < backbone.vocab_size else None)
        self._rows_of: tuple[Any, Tensor] | None = None
        nn.init.zeros_(self.fuse.weight)
        nn.init.zeros_(self.out.weight)
        weight = backbone.embedding_weight
        if not weight.is_meta:
            with torch.no_grad():
                # Some norms scale by their weight, others by one more.
                self.scale.copy_(backbone.final_norm(torch.ones(size, dtype=weight.dtype, device=weight.device)))

    def start(self, tops: Float[Tensor, "*n L D"]) -> Float[Tensor, "*n D"]:
        """The state before the first token; `tops` are the outputs of the read layers, the uppermost at the end."""
        normed = _normed(tops)
        return normed[..., -1, :] + _linear(self.fuse, normed.flatten(-2))

    def step(self, state: Float[Tensor, "*n D"], ids: Int[Tensor, "*n"]) -> Float[Tensor, "*n D"]:
        """The state once it has read these tokens."""
        embedded = self._backbone[0].embedding(ids).to(state.dtype)
        inner = F.silu(_linear(self.inp, torch.cat([_normed(state), _normed(embedded)], dim=-1)))
        return state + _linear(self.out, inner)

    def logits(self, state: Float[Tensor, "*n D"]) -> Float[Tensor, "*n N"]:
        """Of the token behind what was read, over the N tokens."""
        return F.linear(_normed(state) * self.scale.to(state.dtype), self.rows().to(state.dtype))

    def rows(self) -> Float[Tensor, "N D"]:
        """Of the base's head; gathered once, as a copy costs as much as a step."""
        weight: Tensor = self._backbone[0].head.weight  # type: ignore[assignment]
        if self.tokens is None:
            return weight
        state = [(tensor.data_ptr(), version_of(tensor), tensor.device) for tensor in (weight, self.tokens)]
        if self._rows_of is None or self._rows_of[0] != state:
            self._rows_of = state, weight[self.tokens].detach()
        return self._rows_of[1]

    def ids(self, chosen: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
        """The vocabulary's ids of these among the N."""
        return chosen if self.tokens is None else self.tokens[chosen]

    def among(self, logits: Float[Tensor, "*n V"]) -> Float[Tensor, "*n N"]:
        """Those of the tokens that can be drafted."""
        return logits if self.tokens is None else logits[..., self.tokens]

    @torch.no_grad()
    def fit(self, counts: Int[Tensor, "V"]) -> None:
        """Draft the N tokens that are most frequent by these counts; of equally frequent ones, those that come first.

        Nothing changes if it has learned to draft others.
        """
        if self.tokens is None or self.has_learned:
            return
        most = counts.argsort(descending=True, stable=True)[: len(self.tokens)]
        self.tokens.copy_(most.sort().values)

    @cached_property
    def kept_outputs(self) -> KeptOutputs:
        """Of the layers that are read, and of the last one at the end."""
        return KeptOutputs(self._backbone[0], self.read_layers)

    def require_tokens(self) -> None:
        """Raises `CheckpointError` if a file had ids that the base's vocabulary lacks."""
        size = self._backbone[0].vocab_size
        if self.tokens is None or self.tokens.is_meta:
            return
        outside = self.tokens[(self.tokens < 0) | (self.tokens >= size)]
        if len(outside):
            raise CheckpointError(f"drafter.tokens holds id {int(outside[0])}, outside the base's vocabulary of {size}")

    @torch.no_grad()
    def draft(
        self,
        tops: Float[Tensor, "B L D"],
        ids: Int[Tensor, "B"],
        length: int,
        *,
        goes_on: GoesOn | None = None,
    ) -> list[Draft]:
        """What comes behind the tokens `ids`, each the one that its row's base has just decided: one draft a row.

        It has `length` tokens, 1 or more, or fewer if `goes_on` says behind one of them that there should be no other.
        """
        state, tokens, sure = self.start(tops), list[Tensor](), list[Tensor]()
        for number in range(length):
            if number and goes_on is not None and not goes_on(torch.stack(sure, dim=1).tolist()):
                break
            state = self.step(state, ids)
            best = self.logits(state).softmax(dim=-1, dtype=torch.float32).max(dim=-1)
            ids = self.ids(best.indices)
            tokens.append(ids)
            sure.append(best.values.nan_to_num(nan=0.0))
        rows = zip(torch.stack(tokens, dim=1).tolist(), torch.stack(sure, dim=1).tolist(), strict=True)
        return [Draft(tuple(ids), source="shallow", evidence=0, confidence=tuple(each)) for ids, each in rows]

    @property
    def has_learned(self) -> bool:
        """Whether it learned anything."""
        # One row tells, and this is asked before every pass.
        return bool(self.out.weight[0].any())

    @property
    def flops_per_start(self) -> int:
        """FLOPs (2 per multiply-add) of a draft's beginning."""
        return 2 * self.fuse.weight.numel()

    @property
    def flops_per_token(self) -> int:
        """FLOPs of each drafted token."""
        return 2 * (self.inp.weight.numel() + self.out.weight.numel() + self.num_tokens * self.scale.numel())


def default_read_layers(num_layers: int) -> tuple[int, ...]:
    """A third and two thirds up, and the last: its output is what the head reads."""
    return tuple(sorted({num_layers // 3, 2 * num_layers // 3, num_layers - 1}))


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.to(x.dtype))
