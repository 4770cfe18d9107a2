"""transformers' own delta rules say what ours says: Kimi Linear's and Qwen3-Next's, each run both ways.

All is float32. Most of what they differ by is theirs, who take differences of summed decays: against float64, their
chunked forms are off by up to 8e-6 of the largest entry, ours by 1e-6.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import (
    chunk_kimi_delta_attention,
    recurrent_kimi_delta_attention,
)
from transformers.models.qwen3_next.modeling_qwen3_next import (
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from deepen.nn.kda import delta_attention

ROUNDING = 5e-5
KEY_WIDTH, VALUE_WIDTH = 16, 12

per_channel = pytest.mark.parametrize("theirs", [recurrent_kimi_delta_attention, chunk_kimi_delta_attention])
per_head = pytest.mark.parametrize("theirs", [torch_recurrent_gated_delta_rule, torch_chunk_gated_delta_rule])
widths = st.one_of(st.integers(1, 9), st.integers(60, 70), st.integers(1, 150))


def draw(width: int, seed: int, *, num_key_heads: int, num_heads: int, per_head: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    gate = normal(width, num_heads) if per_head else normal(width, num_heads, KEY_WIDTH)
    return {
        "query": normal(width, num_key_heads, KEY_WIDTH),
        "key": normal(width, num_key_heads, KEY_WIDTH),
        "value": normal(width, num_heads, VALUE_WIDTH),
        "decay": -torch.nn.functional.softplus(gate),
        "beta": normal(width, num_heads).sigmoid(),
        "initial": normal(num_heads, KEY_WIDTH, VALUE_WIDTH),
    }


def assert_same(drawn: dict[str, Tensor], theirs: Callable[..., Any], *, with_state: bool) -> None:
    """Outputs, states and gradients."""
    if not with_state:
        drawn["initial"] = torch.zeros_like(drawn["initial"])
    results = []
    for is_ours in (True, False):
        x = {name: tensor.clone().requires_grad_() for name, tensor in drawn.items()}
        initial = x["initial"] if with_state else None
        operands = (x["query"], x["key"], x["value"])
        if is_ours:
            result = delta_attention(*operands, x["decay"], x["beta"], initial=initial)
            out, state = result.out, result.state
        else:
            out, state = theirs(
                *operands,
                g=x["decay"],
                beta=x["beta"],
                initial_state=initial,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
        grads = torch.autograd.grad(out.square().sum() + state.square().sum(), list(x.values()), materialize_grads=True)
        results.append(dict(zip(["out", "state", *x], [out, state, *grads], strict=True)))
    ours, expected = results
    for name, tensor in expected.items():
        error = (ours[name] - tensor).abs().max().item()
        assert error <= ROUNDING * max(1.0, tensor.abs().max().item()), f"{name} is off by {error:.2g}"


@per_channel
@given(width=widths, seed=st.integers(0, 1000), with_state=st.booleans())
def test_kimi_linear(theirs: Callable[..., Any], width: int, seed: int, with_state: bool) -> None:
    drawn = draw(width, seed, num_key_heads=2, num_heads=2, per_head=False)
    assert_same(drawn, theirs, with_state=with_state)


@per_head
@given(width=widths, seed=st.integers(0, 1000), with_state=st.booleans(), num_key_heads=st.sampled_from([1, 2, 4]))
def test_qwen3_next(theirs: Callable[..., Any], width: int, seed: int, with_state: bool, num_key_heads: int) -> None:
    drawn = draw(width, seed, num_key_heads=num_key_heads, num_heads=4, per_head=True)
    assert_same(drawn, theirs, with_state=with_state)
