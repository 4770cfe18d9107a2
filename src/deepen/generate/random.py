"""Randomness without a state: the noise of a token at a position is a function of the seed, the position and the token.

Nothing is drawn in order, so sampling gives the same tokens alone and in any batch, one position at a time and many,
and after a draft that was thrown away. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as
easy as 1, 2, 3", 2011) with the seed as key and (position, token id) as counter.
"""

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

SEED_LIMIT = 2**64

Words = tuple[Tensor, Tensor, Tensor, Tensor]

_LOW = 0xFFFFFFFF
_NUM_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10: four random 32-bit words for each counter of four 32-bit words, and a key of two.

    Words are int64 tensors that hold 0 .. 2**32 - 1; those of the counter broadcast against each other.
    """
    # In place: fresh memory for each of a hundred small operations would cost more than their arithmetic.
    first, second, third, fourth = (word.clone() for word in torch.broadcast_tensors(*counter))
    high = torch.empty_like(first)
    for round_index in range(_NUM_ROUNDS):
        left, right = ((word + round_index * step) & _LOW for word, step in zip(key, _KEY_STEPS, strict=True))
        # Products of 64 bits, wrapped into int64. Their low half is cut out only where the next round multiplies it;
        # the same cut removes what the shift drags down of the sign.
        first.mul_(_MULTIPLIERS[0])
        third.mul_(_MULTIPLIERS[1])
        torch.bitwise_right_shift(third, 32, out=high)
        second.bitwise_xor_(high).bitwise_xor_(left).bitwise_and_(_LOW)
        torch.bitwise_right_shift(first, 32, out=high)
        fourth.bitwise_xor_(high).bitwise_xor_(right).bitwise_and_(_LOW)
        first, second, third, fourth = second, third, fourth, first
    return first, second.bitwise_and_(_LOW), third, fourth.bitwise_and_(_LOW)


def gumbel(seed: int, position: int | Int64[Tensor, "..."], token_ids: Int64[Tensor, "..."]) -> Float64[Tensor, "..."]:
    """Standard Gumbel noise of each token at each position; `position` and `token_ids` broadcast.

    `seed` lies in [0, 2**64), positions in [0, 2**63), token ids in [0, 2**32). Finite: within (-3.7, 36.8).
    """
    position = torch.as_tensor(position, dtype=torch.int64, device=token_ids.device)
    counter = position & _LOW, position >> 32, token_ids, torch.zeros_like(position)
    first, second, _, _ = philox(counter, (seed & _LOW, seed >> 32))
    # 52 bits and a half: an odd multiple of 2**-53, exact in float64, never 0 and never 1.
    uniform = ((first << 20 | second >> 12).double() + 0.5) * 2.0**-52
    return -torch.log(-torch.log(uniform))
