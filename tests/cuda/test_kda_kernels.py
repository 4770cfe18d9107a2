"""The delta rule by the real kernels of flash-linear-attention: what our own op says of the same inputs in float64."""

import math
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from deepen.nn import kda_kernels
from deepen.nn.kda import DeltaOutput, delta_attention

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA reaches"),
    pytest.mark.skipif(find_spec("fla") is None, reason="needs flash-linear-attention"),
    # What Triton and the kernels' package deprecate in themselves and each other is not ours.
    pytest.mark.filterwarnings("ignore"),
]

WIDTHS = (1, 2, 8, 16, 17, 63, 64, 65, 200)
# The largest |g| of a token: hardly any decay, much, and more than exp can tell from forgetting all.
DECAYS = (1e-3, 1.0, 50.0, 1e4)
# Relative to the largest entry: a few roundings of each dtype.
FORWARD = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
BACKWARD = {torch.bfloat16: 3e-2, torch.float16: 5e-3}
INPUTS = ("query", "key", "value", "log_decay", "beta", "initial")

every_width = pytest.mark.parametrize("width", WIDTHS)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
both_rules = pytest.mark.parametrize("per_head", [False, True], ids=["kimi delta", "gated delta"])


@dataclass
class Pass:
    """The tensors of one pass over 3 rows, and which of its positions are real."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    beta: Tensor
    initial: Tensor
    real: Tensor

    def leaves(self, dtype: torch.dtype | None = None) -> "Pass":
        """To take gradients of; in the dtypes they have, or all in one."""
        return replace(
            self, **{n: getattr(self, n).detach().to(dtype or getattr(self, n).dtype, copy=True) for n in INPUTS}
        ).requiring()

    def requiring(self) -> "Pass":
        for name in INPUTS:
            getattr(self, name).requires_grad_()
        return self

    def run(self, **options: Any) -> DeltaOutput:
        return delta_attention(
            self.query, self.key, self.value, self.log_decay, self.beta,
            initial=self.initial, real=self.real, **options,
        )  # fmt: skip


def draw_pass(
    width: int,
    dtype: torch.dtype,
    *,
    strength: float = 1.0,
    heads: tuple[int, int] = (4, 4),
    sizes: tuple[int, int] = (16, 16),
    per_head: bool = False,
    ragged: bool = False,
    seed: int = 0,
) -> Pass:
    """`heads`: those of values and those of keys; `sizes`: K and V. As a model hands them over: decays in float32."""
    generator = torch.Generator("cuda").manual_seed(seed)
    (num_heads, num_key_heads), (key_width, value_width) = heads, sizes

    def normal(*shape: int) -> Tensor:
        return torch.randn(3, *shape, generator=generator, device="cuda")

    def uniform(*shape: int) -> Tensor:
        return torch.rand(3, *shape, generator=generator, device="cuda")

    log_decay = -strength * uniform(width, num_heads, *[key_width] * (not per_head))
    # Some tokens decay much less than others: a large sum must not swallow them.
    log_decay *= 10 ** (-4 * uniform(width, num_heads, *[1] * (not per_head)))
    return Pass(
        query=normal(width, num_key_heads, key_width).to(dtype),
        key=normal(width, num_key_heads, key_width).to(dtype),
        value=normal(width, num_heads, value_width).to(dtype),
        log_decay=log_decay,
        beta=uniform(width, num_heads).to(dtype),
        initial=normal(num_heads, key_width, value_width),
        real=uniform(width) < 0.7 if ragged else torch.ones(3, width, dtype=torch.bool, device="cuda"),
    )


def gradients(given: Pass, out: Tensor, state: Tensor) -> dict[str, Tensor]:
    """Of a loss that every output and every entry of the state takes part in."""
    generator = torch.Generator("cuda").manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator, device="cuda").to(x.dtype) for x in (out, state)]
    loss = (out * weights[0]).sum().double() + (state * weights[1]).sum().double()
    inputs = [getattr(given, name) for name in INPUTS]
    return dict(zip(INPUTS, torch.autograd.grad(loss, inputs, materialize_grads=True), strict=True))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Within `tolerance` of the largest entry, or of 1 where all are small."""
    assert actual.isfinite().all(), f"{name} is not finite"
    error = (actual.double() - expected.double()).abs().max().item()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    assert error <= allowed, f"{name} is off by {error:.2g}, allowed {allowed:.2g}"


def assert_equals_ours(drawn: Pass, *, options: dict[str, Any] | None = None) -> None:
    """Outputs, last states and gradients."""
    dtype = drawn.query.dtype
    assert kda_kernels.serves(drawn.query)
    with torch.no_grad():
        inferred = drawn.run(**options or {})
    theirs, ours = drawn.leaves(), drawn.leaves(torch.float64)
    trained, expected = theirs.run(**options or {}), ours.run(**options or {})
    for result, name in ((inferred, "without gradient"), (trained, "with gradient")):
        assert isinstance(result.record, kda_kernels.KernelInputs)
        assert result.out.dtype == dtype and result.state.dtype == torch.float32
        assert not result.out[~drawn.real].any()
        assert_near(result.out, expected.out, FORWARD[dtype], f"out {name}")
        assert_near(result.state, expected.state, FORWARD[dtype], f"state {name}")
    actual = gradients(theirs, trained.out, trained.state)
    for name, gradient in gradients(ours, expected.out, expected.state).items():
        assert_near(actual[name], gradient, BACKWARD[dtype], f"gradient of {name}")


@every_dtype
@both_rules
@every_width
def test_equals_our_own_op(width: int, per_head: bool, dtype: torch.dtype) -> None:
    assert_equals_ours(draw_pass(width, dtype, per_head=per_head))


@both_rules
@every_width
def test_grouped_heads_and_pads(width: int, per_head: bool) -> None:
    assert_equals_ours(draw_pass(width, torch.bfloat16, heads=(4, 2), per_head=per_head, ragged=True))


@pytest.mark.parametrize("strength", DECAYS)
@pytest.mark.parametrize("width", [2, 16, 65, 200])
def test_decays_of_any_strength(width: int, strength: float) -> None:
    assert_equals_ours(draw_pass(width, torch.bfloat16, strength=strength))


@pytest.mark.parametrize("width", [2, 16, 65, 200])
def test_forgetting_all_is_an_ordinary_decay(width: int) -> None:
    drawn = draw_pass(width, torch.bfloat16)
    drawn.log_decay[:, width // 2] = -math.inf
    drawn.log_decay[:, -1, :, ::2] = -math.inf
    assert_equals_ours(drawn)


@pytest.mark.parametrize("sizes", [(8, 5), (24, 40), (128, 128), (256, 64)], ids=str)
@pytest.mark.parametrize("width", [2, 70])
def test_heads_of_any_size(width: int, sizes: tuple[int, int]) -> None:
    assert_equals_ours(draw_pass(width, torch.bfloat16, sizes=sizes))


@pytest.mark.parametrize("width", [2, 70])
def test_unnormalized_keys_are_taken_as_they_are(width: int) -> None:
    drawn = draw_pass(width, torch.bfloat16)
    drawn.key /= 8
    assert_equals_ours(drawn, options={"normalize": False})


@pytest.mark.parametrize("width", [2, 70])
def test_without_a_state_it_starts_from_zeros(width: int) -> None:
    drawn = draw_pass(width, torch.bfloat16)
    drawn.initial[:] = 0
    started = drawn.run()
    nothing = delta_attention(drawn.query, drawn.key, drawn.value, drawn.log_decay, drawn.beta)
    assert_near(nothing.out, started.out, FORWARD[torch.bfloat16], "out")
    assert_near(nothing.state, started.state, FORWARD[torch.bfloat16], "state")


@pytest.mark.parametrize("width", [1, 8, 70])
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_what_stands_at_a_pad_reaches_nothing(width: int, garbage: float) -> None:
    clean = draw_pass(width, torch.bfloat16, ragged=True)
    clean.real[0] = False
    dirty = replace(clean)
    for name in ("query", "key", "value", "log_decay", "beta"):
        pads = ~clean.real.view(3, width, *[1] * (getattr(clean, name).dim() - 2))
        setattr(dirty, name, getattr(clean, name).masked_fill(pads, garbage))
    results = []
    for drawn in (clean, dirty):
        leaves = drawn.leaves()
        result = leaves.run()
        assert torch.equal(result.state[0], leaves.initial[0])
        results.append([result.out, result.state, *gradients(leaves, result.out, result.state).values()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@torch.no_grad()
@both_rules
@every_width
def test_the_state_after_any_number_of_tokens(width: int, per_head: bool) -> None:
    drawn = draw_pass(width, torch.bfloat16, per_head=per_head, ragged=True)
    record, exact = drawn.run().record, drawn.leaves(torch.float64).run().record
    for count in range(width + 1):
        counts = torch.tensor([count, width - count, (2 * count) % (width + 1)], device="cuda")
        after = record.state_after(counts, drawn.initial)
        assert_near(after, exact.state_after(counts, drawn.initial.double()), FORWARD[torch.bfloat16], f"after {count}")
        assert torch.equal(after[counts == 0], drawn.initial[counts == 0])
