"""The delta rule on CUDA by the kernels of flash-linear-attention (`fla`), if it is installed.

They answer and give the last state, but keep no updates, so that a state after fewer tokens is had by running again.
Where there is no GPU, tests check what is handed to these kernels; tests/cuda checks what comes back.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Wider keys the chunked kernel refuses.
_MAX_KEY_WIDTH = 256
# Up to so many tokens the kernel that runs them one by one is the faster one; it has no backward.
_RECURRENT_WIDTH = 16
# The chunked kernel takes differences of decays summed over a block, where -inf becomes NaN and a large number swallows
# small ones. Of what a token fades by so much there is nothing left in float32.
_LEAST_LOG_DECAY = -30.0


def serves(query: Float[Tensor, "B T N K"]) -> bool:
    """Whether the kernels compute this: wider than half width they would multiply in TF32, not in float32."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and is_half and query.shape[-1] <= _MAX_KEY_WIDTH and _is_installed()


@cache
def _is_installed() -> bool:
    return find_spec("fla") is not None


@dataclass(frozen=True)
class KernelInputs:
    """The inputs of a pass, heads already repeated, to run its first tokens again."""

    key: Float[Tensor, "B T H K"]
    value: Float[Tensor, "B T H V"]
    log_decay: Float[Tensor, "B T H K"]
    beta: Float[Tensor, "B T H"]
    normalize: bool

    def state_after(self, counts: Int[Tensor, "B"], initial: Float[Tensor, "B H K V"]) -> Float[Tensor, "B H K V"]:
        """The state once the first `counts[row]` positions of each row (0 .. T) have been written, from `initial`."""
        is_written = torch.arange(self.key.shape[1], device=counts.device) < counts[:, None]
        _, state, _ = run(
            self.key,  # what is read doesn't matter
            self.key,
            self.value,
            self.log_decay,
            self.beta,
            initial=initial,
            real=is_written,
            normalize=self.normalize,
        )
        return state

    def tensors(self) -> tuple[Tensor, ...]:
        """What is held."""
        return self.key, self.value, self.log_decay, self.beta


def run(
    query: Float[Tensor, "B T N K"],
    key: Float[Tensor, "B T N K"],
    value: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H K"] | Float[Tensor, "B T H"],
    beta: Float[Tensor, "B T H"],
    *,
    initial: Float[Tensor, "B H K V"] | None,
    real: Bool[Tensor, "B T"] | None,
    normalize: bool,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"], KernelInputs]:
    """As `delta_attention`, whose arguments these are: outputs, the last state in float32, and what runs it again."""
    group = value.shape[2] // key.shape[2]
    if group > 1:  # only later releases of the kernels know grouped heads
        query, key = (x.repeat_interleave(group, dim=2) for x in (query, key))
    if log_decay.dim() == 3:
        log_decay = log_decay[..., None].expand(*log_decay.shape, key.shape[-1])
    if real is not None:
        # A pad has no decay and corrects nothing; the rest is cleared so that no NaN can spread.
        query, key, value, log_decay = (
            torch.where(real[:, :, None, None], x, 0.0) for x in (query, key, value, log_decay)
        )
        beta = torch.where(real[:, :, None], beta, 0.0)
    log_decay = log_decay.clamp(min=_LEAST_LOG_DECAY)
    # Copies where these are slices of wider tensors, which would be kept for them.
    query, key, value, log_decay, beta = (x.contiguous() for x in (query, key, value, log_decay, beta))
    inputs = (query, key, value, log_decay, beta)
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, initial) if x is not None)
    kernels = import_module("fla.ops.kda")  # here, since it starts a compiler
    recurrent = key.shape[1] <= _RECURRENT_WIDTH and not wants_gradient
    kernel = kernels.fused_recurrent_kda if recurrent else kernels.chunk_kda
    out, state = kernel(
        *inputs,
        initial_state=None if initial is None else initial.float(),
        output_final_state=True,
        use_qk_l2norm_in_kernel=normalize,
    )
    return out, state, KernelInputs(key, value, log_decay, beta, normalize)
