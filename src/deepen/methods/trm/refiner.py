"""A tiny recursive network that improves a copy of what it reads.

    z <- norm(z + f_z(x, norm(x + d), z))        n times
    d <- d + f_y(norm(x + d), z)                 and both T times, from z = 0 and d = 0; gives x + d

    f_z(x, y, z) = out(silu(from_x x + from_y y + from_z z [+ from_evidence a]))
    f_y(y, z)    = out(silu(from_y y + from_z z))

("Less is More: Recursive Reasoning with Tiny Networks", arXiv 2510.04871, with the residual d = y - x carried in place
of the answer y: what is carried over steps without gradient must not be the path that the trunk learns by.) The norms
are without weights, to a root mean square of 1; without them z and d grow without bound over n T updates.

With evidence, a is what heads with queries from z read of keys and values from x, causally:

    a = softmax(scale / sqrt(E) norm(query z) . norm(key x)) value x

with a scale learned for each head. Without these norms readings may be so sharp that rounding, where two keys are
nearly as good as each other, grows with every one of them. Neither z nor d of another
position is ever read, so keys and values are made once, whatever n and T are, and where one position stops is nothing
to another. No position is encoded: what stands where is in x, as the trunk has written it there, and a length that was
never trained on has nothing to extrapolate.

Letters: B rows, P positions that are refined, S entries that may be read, D width of x, Z of z, H between linears,
N heads, E their width, N E = Z.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from deepen.core.errors import DeepenError

from .config import Mixing

NORM_EPS = 1e-8
"""Added to the mean square; so small that a vector of RMS 0.01 still comes out at 1 within 1e-4."""

HALT_BIAS = -3.0
"""With which a halting head begins: hardly any position stops before it has learned when to."""

# Of the positions, which have come to their end, told what a step has made of them.
Stop = Callable[["Stepped"], Bool[Tensor, "B P"]]


@dataclass(frozen=True)
class Stepped:
    """An outer step, counted from 1: the residuals `[B, P, D]` that it found and left, and the latent `[B, P, Z]`.

    `rests` `[B, P]` are positions that did not take it; None: all did.
    """

    number: int
    x: Tensor
    d_before: Tensor
    d: Tensor
    z: Tensor
    rests: Tensor | None = None

    @property
    def before(self) -> Tensor:
        """What stood for the answer before it."""
        return self.x + self.d_before

    @property
    def after(self) -> Tensor:
        """What stands for the answer behind it."""
        return self.x + self.d


@dataclass(frozen=True)
class Refined:
    """What has become of x after the `num_steps` outer steps that were computed; `watched` has what was asked for.

    `made` `[B, P]` are the steps of each position until it stopped; None: it was not asked.
    """

    x: Tensor
    d: Tensor
    num_steps: int
    watched: dict[int, Stepped] = field(default_factory=dict)
    made: Int[Tensor, "B P"] | None = None

    @property
    def hidden(self) -> Tensor:
        """x + d, in x's dtype."""
        return (self.x + self.d).to(self.x.dtype)


@dataclass(frozen=True)
class Evidence:
    """Keys and values that positions may read, and which each of them may."""

    keys: Float[Tensor, "B N S E"]
    values: Float[Tensor, "B N S E"]
    visible: Bool[Tensor, "#B 1 P S"]

    def read(self, queries: Float[Tensor, "B N P E"]) -> Float[Tensor, "B P Z"]:
        """What all heads together find."""
        found = F.scaled_dot_product_attention(queries, self.keys, self.values, attn_mask=self.visible)
        return found.transpose(1, 2).flatten(2)


class LatentUpdate(nn.Module):
    """f_z: three matrices for x, y and z, so that what stays the same is multiplied once."""

    def __init__(self, d_model: int, d_latent: int, hidden: int) -> None:
        super().__init__()
        self.from_x = nn.Linear(d_model, hidden, bias=False)
        self.from_y = nn.Linear(d_model, hidden, bias=False)
        self.from_z = nn.Linear(d_latent, hidden, bias=False)
        self.out = nn.Linear(hidden, d_latent, bias=False)


class AnswerUpdate(nn.Module):
    """f_y, whose last linear is zero at first."""

    def __init__(self, d_model: int, d_latent: int, hidden: int) -> None:
        super().__init__()
        self.from_y = nn.Linear(d_model, hidden, bias=False)
        self.from_z = nn.Linear(d_latent, hidden, bias=False)
        self.out = nn.Linear(hidden, d_model, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, y: Float[Tensor, "B P D"], z: Float[Tensor, "B P Z"]) -> Float[Tensor, "B P D"]:
        """What is added to the residual."""
        return self.out(F.silu(self.from_y(y) + self.from_z(z)))


class EvidenceReader(nn.Module):
    """What of z asks, what of x answers, and how f_z takes it in."""

    def __init__(self, d_model: int, d_latent: int, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = nn.Parameter(torch.ones(num_heads))
        self.query = nn.Linear(d_latent, d_latent, bias=False)
        self.key = nn.Linear(d_model, d_latent, bias=False)
        self.value = nn.Linear(d_model, d_latent, bias=False)
        self.out = nn.Linear(d_latent, hidden, bias=False)

    def entries(self, x: Float[Tensor, "B S D"]) -> tuple[Float[Tensor, "B N S E"], Float[Tensor, "B N S E"]]:
        """Keys and values of positions."""
        return to_unit_rms(self._heads(self.key(x))), self._heads(self.value(x))

    def forward(self, z: Float[Tensor, "B P Z"], evidence: Evidence) -> Float[Tensor, "B P H"]:
        """What is added to what f_z's first linears give."""
        queries = to_unit_rms(self._heads(self.query(z))) * self.scale[:, None, None]
        return self.out(evidence.read(queries))

    def _heads(self, together: Float[Tensor, "B P Z"]) -> Float[Tensor, "B N P E"]:
        return together.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class TRMRefiner(nn.Module):
    """x `[B, P, D]` -> x + d `[B, P, D]`, in x's dtype; untrained d is zero, and so x comes back bit for bit.

    `n` and `T` may be changed at any time: weights and their names are those of any n and T. What is computed is in the
    dtype of the weights, float32 as a rule.
    """

    def __init__(
        self,
        d_model: int,
        d_latent: int = 256,
        n: int = 6,
        T: int = 3,
        *,
        hidden: int | None = None,
        mixing: Mixing = "position",
        num_heads: int = 4,
        grad_outer_steps: int = 1,
        learns_to_halt: bool = False,
    ) -> None:
        """`hidden` is four times `d_latent` when not given. Raises `DeepenError` if heads don't divide the latent."""
        super().__init__()
        if mixing == "evidence" and d_latent % num_heads:
            raise DeepenError(f"d_latent {d_latent} can't be divided among num_heads {num_heads}; choose a divisor")
        hidden = 4 * d_latent if hidden is None else hidden
        self.n, self.T, self.grad_outer_steps = n, T, grad_outer_steps
        self.f_z = LatentUpdate(d_model, d_latent, hidden)
        self.f_y = AnswerUpdate(d_model, d_latent, hidden)
        self.reader = EvidenceReader(d_model, d_latent, hidden, num_heads) if mixing == "evidence" else None
        self.halt = _halting_head(d_latent) if learns_to_halt else None
        self.z_start: Tensor
        self.register_buffer("z_start", torch.zeros(d_latent))

    @property
    def d_latent(self) -> int:
        """Z."""
        return self.z_start.shape[0]

    def forward(self, x: Float[Tensor, "B P D"]) -> Float[Tensor, "B P D"]:
        """All positions of whole rows, T outer steps each."""
        width = x.shape[1]
        visible = torch.ones(width, width, dtype=torch.bool, device=x.device).tril()[None, None]
        return self.refine(x, self.evidence_of(x, visible)).hidden

    def evidence_of(self, x: Float[Tensor, "B S D"], visible: Bool[Tensor, "#B 1 P S"]) -> Evidence | None:
        """What may be read of whole rows; None where nothing is read."""
        return None if self.reader is None else Evidence(*self.entries_of(x), visible)

    def entries_of(self, x: Float[Tensor, "B S D"]) -> tuple[Float[Tensor, "B N S E"], Float[Tensor, "B N S E"]]:
        """Keys and values of positions."""
        assert self.reader is not None, "only evidence has entries"
        return self.reader.entries(self._own(x))

    def refine(
        self,
        x: Float[Tensor, "B P D"],
        evidence: Evidence | None = None,
        *,
        T: int | None = None,
        own_T: Int[Tensor, "B P"] | None = None,
        stop: Stop | None = None,
        watch: Collection[int] = (),
    ) -> Refined:
        """`T` outer steps at each position; the last `grad_outer_steps` of them with gradient.

        With `own_T`, at most `T`, each position takes so many of them: the last `grad_outer_steps` of its own together
        with those of all others, those before from the first on, and rests in between. Where `stop` says so a position
        stays as it is from then on, and the others never know. Steps in `watch` are kept to be looked at.
        """
        assert (self.reader is None) == (evidence is None), "evidence is for those that read it, and they need it"
        num_steps, wide = self.T if T is None else T, self._own(x)
        from_x = self.f_z.from_x(wide)
        d, z = torch.zeros_like(wide), self.z_start.expand(*wide.shape[:-1], -1)
        going: Tensor | None = None
        made = torch.ones(wide.shape[:-1], dtype=torch.int64, device=wide.device)
        watched: dict[int, Stepped] = {}
        for number in range(1, num_steps + 1):
            learns = torch.is_grad_enabled() and number > num_steps - self.grad_outer_steps
            with torch.set_grad_enabled(learns):
                new_d, new_z = self._outer_step(wide, from_x, d, z, evidence)
                rests = None if own_T is None else self._rests(number, num_steps, own_T)
                if rests is not None:
                    new_d = torch.where(rests[..., None], d, new_d)
                    new_z = torch.where(rests[..., None], z, new_z)
                if going is not None:
                    # Nobody else reads the z of a position that has stopped.
                    new_d = torch.where(going, new_d, d)
                    made = made + going[..., 0]
            stepped = Stepped(number, wide, d, new_d, new_z, rests)
            d, z = new_d, new_z
            if number in watch:
                watched[number] = stepped
            if stop is not None and number < num_steps:
                has_stopped = stop(stepped)[..., None]
                going = ~has_stopped if going is None else going & ~has_stopped
                if not going.any():
                    return Refined(x, d, number, watched, made)
        return Refined(x, d, num_steps, watched, None if stop is None else made)

    def _rests(self, number: int, num_steps: int, own_T: Int[Tensor, "B P"]) -> Bool[Tensor, "B P"]:
        """Which positions have made all steps but their last ones, whose turn has not come."""
        num_last = own_T.clamp(max=self.grad_outer_steps)
        return (number > own_T - num_last) & (number <= num_steps - num_last)

    def _outer_step(
        self, x: Tensor, from_x: Tensor, d: Tensor, z: Tensor, evidence: Evidence | None
    ) -> tuple[Tensor, Tensor]:
        y = to_unit_rms(x + d)
        from_x_and_y = from_x + self.f_z.from_y(y)
        for _ in range(self.n):
            inner = from_x_and_y + self.f_z.from_z(z)
            if self.reader is not None:
                inner = inner + self.reader(z, evidence)
            z = to_unit_rms(z + self.f_z.out(F.silu(inner)))
        return d + self.f_y(y, z), z

    def _own(self, x: Tensor) -> Tensor:
        return x.to(self.z_start.dtype)


def to_unit_rms(x: Float[Tensor, "*any D"]) -> Float[Tensor, "*any D"]:
    """x over its root mean square, in fp32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + NORM_EPS)).to(x.dtype)


def _halting_head(d_latent: int) -> nn.Linear:
    head = nn.Linear(d_latent, 1)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, HALT_BIAS)
    return head
