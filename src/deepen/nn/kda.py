"""Kimi Delta Attention, and the gated delta rule it refines: attention whose memory is one matrix per head.

Each head keeps a state S `[K, V]`. A token t first lets it fade, then corrects what it answers to the token's key, then
reads it with the token's query:

    S' = diag(exp(g_t)) S_{t-1}
    u_t = beta_t (v_t - S'^T k_t)
    S_t = S' + k_t u_t^T
    o_t = S_t^T q_t / sqrt(K)

The log decay g <= 0 is one number per key channel in Kimi Linear (arXiv 2510.26692) and one per head in Gated DeltaNet
(arXiv 2412.06464); one implementation serves both by broadcasting.

Up to `RECURRENT_WIDTH` tokens are run one after the other. More are cut into blocks of `BLOCK`: inside a block, all u
follow from the state before it by one triangular solve (the WY form of Gated DeltaNet), so that only one step per block
is sequential. That needs the score of each pair of a block, sum_d q_id k_jd exp(g_(j+1)d + ... + g_id), whose decay
depends on i, j and d at once. Here it is built by doubling. Two neighbouring segments of which the scores are known
meet at a boundary: what fades between j in the first and i in the second fades before the boundary or after it, so that
a plain product of faded keys and faded queries gives the scores between them. Each factor is a product of decays, at
most 1: nothing can overflow, nothing is a difference of two large sums, and a decay of 0 (g = -inf) is an ordinary
number.

Sources: the equations are those of the two papers; building the scores by doubling is our own.

Letters: B rows, T tokens, H heads, K key width, V value width; P = B H states, N blocks of all states, C block size,
D decays of a token (K or 1).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from deepen.nn import kda_kernels

# Up to so many tokens are run one by one. Each costs a state's worth of new memory: where states are large, two tokens
# are as fast as one block; where all is small, either takes a fraction of a millisecond.
RECURRENT_WIDTH = 1
BLOCK = 64
# So many blocks, of all heads and rows together, are in work at once: more fall out of the processor's caches.
_BLOCKS_AT_ONCE = 32
# What keeps the norm of a zero vector from zero; part of the models' definition.
_NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class Replay:
    """What a pass wrote, so that the state after any number of its tokens can be had without running it again.

    A pass of up to `BLOCK` tokens has this one; a wider one may have `Replays`, which answers the same question.
    """

    key: Float[Tensor, "B H T K"]
    """k, normalized where the pass normalized; zero at pads."""
    update: Float[Tensor, "B H T V"]
    """u; zero at pads."""
    log_decay: Float[Tensor, "B H T D"]
    """g of each token, not accumulated; D is K or 1. Zero at pads."""

    def state_after(self, counts: Int[Tensor, "B"], initial: Float[Tensor, "B H K V"]) -> Float[Tensor, "B H K V"]:
        """The state once the first `counts[row]` positions of each row (0 .. T, pads counted) have been written.

        With h = counts[row]: exp(g_1 + ... + g_h) S_0 + sum_{j <= h} exp(g_{j+1} + ... + g_h) k_j u_j^T, S_0 being
        `initial`, the state before the pass. A count of 0 gives `initial` exactly. What stands behind the first
        `counts[row]` positions has no part in it, as long as it is finite.
        """
        is_written = (torch.arange(self.key.shape[2], device=counts.device) < counts[:, None])[:, None, :, None]
        log_decay = torch.where(is_written, self.log_decay, 0.0)
        # Summed from the end: what little decay the last tokens saw is not lost beside a large one before them.
        remaining = log_decay.flip(2).cumsum(2).flip(2)
        key = torch.where(is_written, self.key * F.pad(remaining[:, :, 1:], (0, 0, 0, 1)).exp(), 0.0)
        update = torch.where(is_written, self.update, 0.0)
        return initial.to(key.dtype) * remaining[:, :, :1].exp().mT + key.mT @ update

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return self.key, self.update, self.log_decay


@dataclass(frozen=True)
class Replays:
    """What a wide pass wrote, stretch by stretch: joined, it would be a copy that hardly anyone asks for."""

    parts: tuple[Replay, ...]

    def state_after(self, counts: Int[Tensor, "B"], initial: Float[Tensor, "B H K V"]) -> Float[Tensor, "B H K V"]:
        """As `Replay.state_after`, with T the width of all parts together."""
        state = initial
        for part in self.parts:
            state = part.state_after(counts, state)  # it stops at its own width, and below 0 is like 0
            counts = counts - part.key.shape[2]
        return state

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return tuple(tensor for part in self.parts for tensor in part.tensors())


# What a pass leaves behind, from which the state after any count of its tokens can be had.
Record = Replay | Replays | kda_kernels.KernelInputs


@dataclass(frozen=True)
class DeltaOutput:
    """What a pass answers, and the state it leaves."""

    out: Float[Tensor, "B T H V"]
    """o, in the dtype of the queries; zero at pads."""
    state: Float[Tensor, "B H K V"]
    """Each row's state after its last real token, in the dtype that was computed in."""
    record: Record
    """Gives the state after fewer tokens."""


def delta_attention(
    query: Float[Tensor, "B T N K"],
    key: Float[Tensor, "B T N K"],
    value: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H K"] | Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    *,
    initial: Float[Tensor, "B H K V"] | None = None,
    real: Bool[Tensor, "B T"] | None = None,
    normalize: bool = True,
) -> DeltaOutput:
    """The recurrence above over T >= 1 tokens from the state `initial` (None: zeros).

    `log_decay` is g <= 0 (-inf: forget), per channel `[B, T, H, K]` or per head `[B, T, H]`; `beta` is the share of the
    error that a token corrects. With N < H, key head n serves the value heads n H/N .. (n + 1) H/N - 1. `normalize`
    divides q and k by sqrt(|x|^2 + 1e-6) first; q is divided by sqrt(K) in any case.

    Where `real` is False (None: everywhere True) the position is a pad: it leaves the state as it is and answers zero,
    and nothing that stands there reaches a result or a gradient, be it NaN.

    All is computed in float64 if queries or values are, else in float32, whatever autocast says; on CUDA, queries of
    half width go to the kernels of flash-linear-attention if it is installed. Differentiable in all five inputs and in
    `initial`. ValueError if H is no multiple of N, or T is 0.
    """
    num_heads = value.shape[2]
    if num_heads % key.shape[2] or not key.shape[1]:
        raise ValueError(f"{num_heads} value heads over {key.shape[2]} key heads, {key.shape[1]} tokens")
    if kda_kernels.serves(query):
        out, state, record = kda_kernels.run(
            query, key, value, log_decay, beta, initial=initial, real=real, normalize=normalize
        )
        return DeltaOutput(out, state, record)
    dtype = torch.float64 if torch.float64 in (query.dtype, value.dtype) else torch.float32
    batch, width, _, key_width = key.shape
    if initial is None:
        initial = value.new_zeros(batch, num_heads, key_width, value.shape[-1])
    if log_decay.dim() == 3:
        log_decay = log_decay[..., None]
    stretches = _stretches(width, batch * num_heads)
    # Split at once: the gradient of a slice is as wide as what it was cut from.
    inputs = [x.split(stretches, 1) for x in (query, key, value, log_decay, beta[..., None])]
    reals = [None] * len(stretches) if real is None else real.split(stretches, 1)
    state = initial.to(dtype)
    outs, replays = [], []
    with torch.autocast(query.device.type, enabled=False):
        for *stretch, real_ in zip(*inputs, reals, strict=True):
            q, k, v, g, b = (_heads_first(x, dtype, real_) for x in stretch)
            q, k = _scaled(q, normalize, key_width**-0.5), _scaled(k, normalize, 1.0)
            if num_heads != key.shape[2]:
                q, k = (x.repeat_interleave(num_heads // key.shape[2], dim=1) for x in (q, k))
            algorithm = _recurrent if k.shape[2] <= RECURRENT_WIDTH else _chunked
            out, update, state = algorithm(q, k, v, g, b, state)
            outs.append(out.transpose(1, 2).to(query.dtype))
            replays.append(Replay(k, update, g))
    return DeltaOutput(_joined(outs), state, replays[0] if len(replays) == 1 else Replays(tuple(replays)))


def _stretches(width: int, num_states: int) -> list[int]:
    """Cuts `width` tokens into stretches that are run one after the other, so that each stays in the caches.

    All are whole blocks but the last, which has what is left behind those: 8 tokens cost what 8 tokens cost.
    """
    longest = max(1, _BLOCKS_AT_ONCE // num_states) * BLOCK
    whole = width // BLOCK * BLOCK
    stretches = [min(longest, whole - start) for start in range(0, whole, longest)]
    return [*stretches, width - whole] if width > whole else stretches


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _heads_first(x: Tensor, dtype: torch.dtype, real: Tensor | None) -> Tensor:
    """`[B, T, H, ..]` to `[B, H, T, ..]`, zero at pads."""
    x = x.to(dtype).transpose(1, 2)
    # Chosen, not multiplied: NaN times zero is NaN, in the gradient too.
    return x if real is None else torch.where(real[:, None, :, None], x, 0.0)


def _scaled(x: Tensor, normalize: bool, scale: float) -> Tensor:
    if not normalize:
        return x if scale == 1 else x * scale
    factor = (x.square().sum(-1, keepdim=True) + _NORM_EPSILON).rsqrt()
    return x * (factor if scale == 1 else factor * scale)


def _recurrent(
    query: Float[Tensor, "B H T K"],
    key: Float[Tensor, "B H T K"],
    value: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T D"],
    beta: Float[Tensor, "B H T 1"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """Outputs, updates and the last state, one token after the other."""
    decay = log_decay.exp()
    faded_key = key * decay
    outs, updates = [], []
    for t in range(key.shape[2]):
        now = slice(t, t + 1)
        update = beta[:, :, now] * (value[:, :, now] - faded_key[:, :, now] @ state)
        state = (state * decay[:, :, now].mT).addcmul_(key[:, :, now].mT, update)
        outs.append(query[:, :, now] @ state)
        updates.append(update)
    return torch.cat(outs, 2), torch.cat(updates, 2), state


def _chunked(
    query: Float[Tensor, "B H T K"],
    key: Float[Tensor, "B H T K"],
    value: Float[Tensor, "B H T V"],
    log_decay: Float[Tensor, "B H T D"],
    beta: Float[Tensor, "B H T 1"],
    state: Float[Tensor, "B H K V"],
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H T V"], Float[Tensor, "B H K V"]]:
    """As `_recurrent`, block after block; fewer tokens than a block are one of the next power of two."""
    width = key.shape[2]
    heads, size = key.shape[:2], min(BLOCK, 1 << (width - 1).bit_length())
    num_blocks = -(-width // size)
    num_pads = num_blocks * size - width
    query, key, value, log_decay, beta = (
        (F.pad(x, (0, 0, 0, num_pads)) if num_pads else x).reshape(-1, size, x.shape[-1])
        for x in (query, key, value, log_decay, beta)
    )
    state = state.flatten(0, 1)
    blocks = _meet(query, key, log_decay.exp())
    # Row i of the system: u_i + beta_i sum_{j < i} (k_i . k_j, faded) u_j = beta_i (v_i - k_i faded . state).
    solved = _unit_lower_inverse(beta * blocks.scores[:, :, 1]) @ (beta * torch.cat([value, blocks.rows[:, :, 1]], -1))
    given, reading = solved.split([value.shape[-1], key.shape[-1]], -1)
    # Queries and keys read the state together.
    readers = torch.cat([blocks.rows[:, :, 0], reading], 1)
    outs, updates = [], []
    for given_, readers_, scores, written, total in zip(
        *(
            x.unflatten(0, (-1, num_blocks)).unbind(1)
            for x in (given, readers, blocks.scores[:, :, 0], blocks.written, blocks.total)
        ),
        strict=True,
    ):
        answers, predicted = (readers_ @ state).split(size, 1)
        update = given_ - predicted
        outs.append(torch.baddbmm(answers, scores, update))
        updates.append(update)
        state = (state * total.mT).baddbmm_(written.mT, update)
    out, update = (_joined(parts)[:, :width].unflatten(0, heads) for parts in (outs, updates))
    return out, update, state.unflatten(0, heads)


def _unit_lower_inverse(lower: Float[Tensor, "N C C"]) -> Float[Tensor, "N C C"]:
    """Of the identity plus what `lower` holds below its diagonal.

    Solving for the wide right-hand side itself is slower: BLAS shares each such solve among threads that wait for each
    other. The product that comes instead has no such waits.
    """
    identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    # Transposed, since BLAS wants columns one after the other where we have rows.
    return torch.linalg.solve_triangular(lower.mT, identity, upper=True, unitriangular=True).mT


@dataclass(frozen=True)
class _Blocks:
    """The scores within blocks, and what leads from the state before a block to the one behind it."""

    scores: Float[Tensor, "N C 2 C"]
    """Of each token's query and of its key with the keys of earlier tokens, faded; the query's with its own key too."""
    rows: Float[Tensor, "N C 2 K"]
    """Each token's query and key, faded by all decays of the block up to its own."""
    written: Float[Tensor, "N C K"]
    """Each token's key, faded by all decays behind it."""
    total: Float[Tensor, "N 1 D"]
    """The product of all decays."""


def _meet(query: Float[Tensor, "N C K"], key: Float[Tensor, "N C K"], decay: Float[Tensor, "N C D"]) -> _Blocks:
    """The scores of blocks of C tokens, a power of two, built from those of single tokens by doubling."""
    size, width = key.shape[1:]
    # A segment of one token: its query meets its own key, its key meets no earlier one.
    own = (query * key).sum(-1).view(-1, 1, 1, 1)
    scores = torch.cat([own, torch.zeros_like(own)], 2)
    rows = (torch.stack([query, key], 2) * decay[:, :, None]).view(-1, 1, 2, width)
    written = key.reshape(-1, 1, width)
    total = decay.reshape(-1, 1, decay.shape[-1])
    half = 1
    while half < size:
        first, second = scores.view(-1, 2, half, 2, half).unbind(1)
        first_rows, second_rows = rows.view(-1, 2, half, 2, width).unbind(1)
        first_written, second_written = written.view(-1, 2, half, width).unbind(1)
        first_total, second_total = total.view(-1, 2, 1, total.shape[-1]).unbind(1)
        between = (second_rows.flatten(1, 2) @ first_written.mT).view_as(second)
        scores = torch.cat([F.pad(first, (0, half)), torch.cat([between, second], -1)], 1)
        rows = torch.cat([first_rows, second_rows * first_total[:, None]], 1)
        written = torch.cat([first_written * second_total, second_written], 1)
        total = first_total * second_total
        half *= 2
    return _Blocks(scores, rows, written, total)
