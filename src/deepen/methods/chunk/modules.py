"""The trainable parts of a chunk sidecar: refine cell, boundary head, latent token, slot embedding.

Pure torch: nothing here knows a configuration, a base model or a cache. Letters: B batch, T tokens, D hidden
size of the base, S size of the refine state, V vocabulary, L longest chunk.

Master weights may have any floating dtype (fp32 as a rule); every module computes in the dtype of the hidden states
it is given, with norms, means and probabilities in fp32 (fp64 for fp64 input). Weights are cast on use, which is a
no-op once a module has been moved to the base's dtype: do that for inference.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from deepen.core.errors import ConfigError, DeepenError
from deepen.methods.chunk.config import Pooling

NORM_EPS = 1e-6
"""Added to the mean square inside the parameter-free norms."""

EMBEDDING_STD = 0.02
"""Standard deviation of a new token's embedding: the initialiser range of the bases we graft onto."""

UNTRAINED_WHOLE_CHUNK_PROBABILITY = 0.999
"""What an untrained length head gives to its last class, "the whole chunk"."""


class RefineCell(nn.Module):
    """Edits the hidden states of a chunk at one layer's output, from what the chunk says so far and a state s.

        pooled_i = rms_norm(mean of h_j over chunk positions j <= i)
        h_i     <- h_i + out(silu(inp([pooled_i, s])))
        s_next   = GRUCell(rms_norm(mean of the refined h over chunk positions), s)

    `out` starts at zero, so a new cell returns h unchanged, every element equal. The norm of the pooled vector is
    what keeps cells of successive layers from multiplying their magnitudes: each adds at most what its weights make
    of a vector of unit RMS, however large h already is.

    A `mask` names the chunk positions: the cell edits and pools those alone, and the rest of h comes back bit-equal,
    whatever it holds. Without a mask every position belongs to the chunk.
    """

    def __init__(self, d_model: int, d_state: int = 512, hidden: int | None = None) -> None:
        """`hidden` is the width between `inp` and `out`; four times `d_model` when not given."""
        super().__init__()
        hidden = 4 * d_model if hidden is None else hidden
        self.d_model = d_model
        self.d_state = d_state
        self.hidden = hidden
        self.inp = nn.Linear(d_model + d_state, hidden, bias=False)
        self.act = nn.SiLU()
        self.out = nn.Linear(hidden, d_model, bias=False)
        self.state_upd = nn.GRUCell(d_model, d_state)
        nn.init.zeros_(self.out.weight)

    def forward(
        self,
        h: Float[Tensor, "B T D"],
        s: Float[Tensor, "B S"],
        mask: Bool[Tensor, "B T"] | None = None,
        pooling: Pooling = "causal",
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B S"]]:
        """The refined hidden states and the state for the next pass, both in h's dtype.

        Raises `DeepenError` where sizes, dtypes or devices don't fit.
        """
        refined = self.refine(h, s, mask, pooling)
        return refined, self.next_state(refined, s, mask)

    def refine(
        self,
        h: Float[Tensor, "B T D"],
        s: Float[Tensor, "B S"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        pooling: Pooling = "causal",
    ) -> Float[Tensor, "B T D"]:
        """h with the chunk positions refined; the state is read, not moved.

        Draft passes need no more than this. `s` None is the zero state, whose product is then left out.
        """
        self._check(h, s)
        pooled_part, state_part = self.inp.weight.to(h.dtype).split([self.d_model, self.d_state], dim=1)
        pre_activation = F.linear(pooled_mean(h, mask, pooling), pooled_part)
        if s is not None:
            # One product per row instead of one per position: s is the same at all of them.
            pre_activation = pre_activation + F.linear(s.to(h.dtype), state_part).unsqueeze(1)
        refined = h + F.linear(self.act(pre_activation), self.out.weight.to(h.dtype))
        return refined if mask is None else torch.where(mask.unsqueeze(-1), refined, h)

    def next_state(
        self,
        h: Float[Tensor, "B T D"],
        s: Float[Tensor, "B S"],
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B S"]:
        """The state after a pass whose refined hidden states are h.

        `mask` names the positions the state reads: the chunk's and, where there is one, the latent token's. A row
        with no such position keeps its state.
        """
        self._check(h, s)
        s = s.to(h.dtype)
        gru = self.state_upd
        weights = (gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh)
        summary = pooled_mean(h, mask, "chunk").squeeze(1)
        moved = torch.gru_cell(summary, s, *(weight.to(h.dtype) for weight in weights))
        return moved if mask is None else torch.where(mask.any(dim=1, keepdim=True), moved, s)

    def initial_state(self, h: Float[Tensor, "B T D"]) -> Float[Tensor, "B {self.d_state}"]:
        """The state before the first pass over h: zeros on h's device, in its dtype."""
        return h.new_zeros(h.shape[0], self.d_state)

    @property
    def num_parameters(self) -> int:
        """Parameters of the cell, state update included."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def flops_per_token(self) -> int:
        """FLOPs (2 per multiply-add) of the linears at one position; elementwise work and means are not counted.

        With `pooling="chunk"` they run once per row instead.
        """
        return 2 * 2 * self.d_model * self.hidden

    @property
    def flops_per_row(self) -> int:
        """FLOPs of the state's share of `inp`, once per row and pass; none where `refine` is given no state."""
        return 2 * self.d_state * self.hidden

    @property
    def flops_per_state_update(self) -> int:
        """FLOPs of one `next_state` per row: three gates, each reading the summary and the state."""
        return 2 * 3 * self.d_state * (self.d_model + self.d_state)

    def _check(self, h: Tensor, s: Tensor | None) -> None:
        _check_hidden("RefineCell", h, expected_size=self.d_model, device=self.out.weight.device)
        if s is None:
            return
        if s.shape[-1] != self.d_state:
            raise DeepenError(
                f"RefineCell was built for states of size {self.d_state} and got one of size {s.shape[-1]}; "
                "start from initial_state(h), or set d_state to the size the sidecar was trained with"
            )
        if s.device != h.device:
            raise DeepenError(
                f"RefineCell got hidden states on {h.device} and its state on {s.device}; move the state to {h.device}"
            )


class BoundaryHead(nn.Module):
    """Reads the right edge of a chunk: shall it be committed now, and how many of its tokens?

    Untrained it commits late and whole: p_commit is sigmoid(`commit_bias_init`) and the length is the longest one,
    for any input. Both follow from zero weights in the last layers, which still receive a gradient.
    """

    def __init__(
        self, d_model: int, gate_hidden: int = 1024, max_len: int = 128, *, commit_bias_init: float = -2.0
    ) -> None:
        """`max_len` is the longest chunk; the length classes are 0..`max_len`."""
        super().__init__()
        self.d_model = d_model
        self.max_len = max_len
        self.mlp = nn.Sequential(
            nn.Linear(d_model, gate_hidden), nn.SiLU(), nn.Linear(gate_hidden, gate_hidden), nn.SiLU()
        )
        self.commit = nn.Linear(gate_hidden, 1)
        self.len_head = nn.Linear(gate_hidden, max_len + 1)
        nn.init.zeros_(self.commit.weight)
        nn.init.constant_(self.commit.bias, commit_bias_init)
        nn.init.zeros_(self.len_head.weight)
        nn.init.zeros_(self.len_head.bias)
        odds_of_last_class = UNTRAINED_WHOLE_CHUNK_PROBABILITY / (1 - UNTRAINED_WHOLE_CHUNK_PROBABILITY)
        with torch.no_grad():
            # Against max_len classes at logit zero, so that the probability is the same for every max_len.
            self.len_head.bias[-1] = math.log(odds_of_last_class * max_len)

    def forward(
        self, h_block: Float[Tensor, "B T D"], lengths: Int[Tensor, "B"] | None = None
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B {self.max_len+1}"]]:
        """p_commit in [0, 1] and the log-probabilities of the lengths 0..`max_len`, in fp32 (fp64 for fp64 input).

        `lengths` says how many positions of each row are valid, 1..T: the row's last valid one is its right edge.
        Without it the edge is position T - 1. (A row of length 0 has no edge; what it gets means nothing.)
        """
        commit_logit, length_logits = self.logits(h_block, lengths)
        return commit_logit.sigmoid(), length_logits.log_softmax(dim=-1)

    def logits(
        self, h_block: Float[Tensor, "B T D"], lengths: Int[Tensor, "B"] | None = None
    ) -> tuple[Float[Tensor, "B"], Float[Tensor, "B {self.max_len+1}"]]:
        """What `forward` turns into probabilities; a loss is steadier on these."""
        _check_hidden("BoundaryHead", h_block, expected_size=self.d_model, device=self.commit.weight.device)
        features = _right_edge(h_block, lengths)
        for layer in self.mlp:
            features = _linear(layer, features) if isinstance(layer, nn.Linear) else layer(features)
        wide = _norm_dtype(h_block.dtype)
        return _linear(self.commit, features).squeeze(-1).to(wide), _linear(self.len_head, features).to(wide)

    @property
    def num_parameters(self) -> int:
        """Parameters of the head."""
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def flops_per_row(self) -> int:
        """FLOPs (2 per multiply-add) of the linears for one right edge."""
        linears = (module for module in self.modules() if isinstance(module, nn.Linear))
        return sum(2 * linear.in_features * linear.out_features for linear in linears)


class LatentToken(nn.Module):
    """[Z], a token at the right edge of a chunk: it sees the whole chunk and, by causality, nobody sees it.

    From pass to pass its input is `embedding + top_to_bottom(h_top at [Z] of the previous pass)`, the link from the
    top of the stack back to its bottom; `top_to_bottom` starts at zero. With `token_id` the embedding is that of an
    existing token, read from the base and not trained here (`embedding` is None).
    """

    def __init__(self, vocab_size: int, hidden_size: int, token_id: int | None = None) -> None:
        super().__init__()
        if token_id is not None and not 0 <= token_id < vocab_size:
            raise ConfigError(
                f"token_id {token_id} is outside the vocabulary of {vocab_size} tokens; "
                f"choose one of 0..{vocab_size - 1}, or leave token_id out for a learned embedding"
            )
        self.token_id = token_id
        self.hidden_size = hidden_size
        self.embedding = _new_embedding(hidden_size) if token_id is None else None
        self.top_to_bottom = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.zeros_(self.top_to_bottom.weight)

    def embed(
        self,
        batch_size: int,
        *,
        base_embedding_weight: Float[Tensor, "V D"] | None = None,
        top: Float[Tensor, "B D"] | None = None,
    ) -> Float[Tensor, "{batch_size} 1 D"]:
        """[Z]'s input embedding for each row; `top` is h_top at [Z] of the previous pass (None at the first).

        The result has the dtype of `base_embedding_weight`, else of `top`, else of the parameter.
        """
        like = base_embedding_weight if base_embedding_weight is not None else top
        embedding = self._token_embedding(base_embedding_weight)
        if like is not None:
            _check_hidden("LatentToken", like, expected_size=self.hidden_size, device=self.top_to_bottom.weight.device)
            embedding = embedding.to(like.dtype)
        rows = embedding.expand(batch_size, 1, self.hidden_size)
        if top is None:
            return rows
        _check_hidden("LatentToken", top, expected_size=self.hidden_size, device=self.top_to_bottom.weight.device)
        return rows + _linear(self.top_to_bottom, top).unsqueeze(1).to(rows.dtype)

    def _token_embedding(self, base_embedding_weight: Tensor | None) -> Tensor:
        if self.embedding is not None:
            return self.embedding
        if base_embedding_weight is None:
            raise DeepenError(
                f"LatentToken uses the embedding of token {self.token_id} and needs the base's embedding weight"
            )
        return base_embedding_weight[self.token_id]

    @property
    def flops_per_row(self) -> int:
        """FLOPs (2 per multiply-add) of `top_to_bottom`, once per row and pass but the first."""
        return 2 * self.hidden_size * self.hidden_size


class MaskToken(nn.Module):
    """The embedding of a slot: a position whose token is not known yet."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.embedding = _new_embedding(hidden_size)

    @torch.no_grad()
    def initialise_from(self, embedding_weight: Float[Tensor, "V D"]) -> None:
        """Start at the mean of the base's token embeddings: no token in particular, yet on the base's scale."""
        _check_hidden("MaskToken", embedding_weight, expected_size=self.hidden_size)
        self.embedding.copy_(embedding_weight.mean(dim=0, dtype=_norm_dtype(embedding_weight.dtype)))

    def forward(self, embeddings: Float[Tensor, "B T D"], slots: Bool[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """`embeddings` with the slots' replaced; the others bit-equal."""
        _check_hidden("MaskToken", embeddings, expected_size=self.hidden_size, device=self.embedding.device)
        return torch.where(slots.unsqueeze(-1), self.embedding.to(embeddings.dtype), embeddings)


def sanitize(h: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
    """h with non-finite elements at the masked positions set to zero; everything else bit-equal.

    A masked softmax gives a hidden slot weight zero, and zero times infinity is NaN: without this one infinite slot
    reaches the clean positions that must not see it.
    """
    return torch.where(mask.unsqueeze(-1) & ~h.isfinite(), torch.zeros_like(h), h)


def pooled_mean(
    h: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"] | None = None, pooling: Pooling = "causal"
) -> Float[Tensor, "B P D"]:
    """Mean of h over the masked positions, brought to unit RMS, in h's dtype.

    "causal": P = T, entry i is the mean over positions j <= i. "chunk": P = 1, one mean over all, which shows every
    position what stands to its right: an ablation, never on tokens whose prediction counts. A mean over no position
    is zero. Sums and norm in fp32 (fp64 for fp64 h): meant for |h| below 1e18, whose squares fp32 still holds.
    """
    wide = h.to(_norm_dtype(h.dtype))
    if mask is not None:
        # where, not a product: outside the mask h may be infinite.
        wide = torch.where(mask.unsqueeze(-1), wide, torch.zeros_like(wide))
        ones = mask.to(wide.dtype)
    else:
        ones = wide.new_ones(1, h.shape[1])
    match pooling:
        case "causal":
            total, count = wide.cumsum(dim=1), ones.cumsum(dim=1)
        case "chunk":
            total, count = wide.sum(dim=1, keepdim=True), ones.sum(dim=1, keepdim=True)
        case _:
            raise ConfigError(f'pooling is {pooling!r}; it must be "causal" or "chunk"')
    mean = total / count.clamp(min=1).unsqueeze(-1)
    return F.rms_norm(mean, mean.shape[-1:], eps=NORM_EPS).to(h.dtype)


def _right_edge(h_block: Tensor, lengths: Tensor | None) -> Tensor:
    """The last valid position of each row, `[B, D]`."""
    if lengths is None:
        return h_block[:, -1]
    rows = torch.arange(h_block.shape[0], device=h_block.device)
    return h_block[rows, (lengths.to(h_block.device) - 1).clamp(min=0)]


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear` computed in the dtype of x, whatever dtype its master weights have."""
    bias = None if linear.bias is None else linear.bias.to(x.dtype)
    return F.linear(x, linear.weight.to(x.dtype), bias)


def _new_embedding(hidden_size: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(hidden_size) * EMBEDDING_STD)


def _norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, means and probabilities for hidden states of `dtype`."""
    return torch.promote_types(dtype, torch.float32)


def _check_hidden(owner: str, h: Tensor, *, expected_size: int, device: torch.device | None = None) -> None:
    """Refuse what torch would refuse later, in words that name the module and both sides."""
    if h.shape[-1] != expected_size:
        raise DeepenError(
            f"{owner} was built for hidden size {expected_size} and got hidden states of size {h.shape[-1]}; "
            "use the sidecar with the base it was made for"
        )
    if device is not None and h.device != device:
        raise DeepenError(f"{owner} is on {device} and got hidden states on {h.device}; move it to {h.device}")
