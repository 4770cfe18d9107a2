"""How what a recursion computed is put into a token's state, by what its router said.

    delta   lerp(h, f(h), g)        g = sigmoid(logit + 4); bit-exact at 0 and 1, and near 1 before training
    paper   h + alpha p f(h)        p = sigmoid(logit), or the probability of the depth that was chosen
    one     f(h)

The first recursion has no router and no gate.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_NEAR_ONE = 4.0


def gated(
    kind: str,
    h: Float[Tensor, "M D"],
    output: Float[Tensor, "M D"],
    logits: Float[Tensor, "M"],
    probabilities: Float[Tensor, "M"],
    *,
    alpha: float,
) -> Float[Tensor, "M D"]:
    """The state of M tokens behind a recursion that read `h` and gave `output`; the gate is made in fp32 at least."""
    if kind == "one":
        return output
    if kind == "paper":
        return h + (alpha * probabilities)[:, None].to(h.dtype) * output
    return torch.lerp(h, output.to(h.dtype), (logits + _NEAR_ONE).sigmoid()[:, None].to(h.dtype))
