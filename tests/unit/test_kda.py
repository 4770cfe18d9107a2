"""The delta rule: equal to a plain loop over tokens, with its gradients, whatever the width, the decay and the pads."""

import inspect
import math
import sys
from dataclasses import dataclass, fields
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepen.nn import kda, kda_kernels
from deepen.nn.kda import DeltaOutput, Replay, delta_attention

BOUNDARIES = (*range(1, 10), 31, 32, 33, 63, 64, 65, 127, 128, 129, 200)
# The largest |g| of a token: hardly any decay, much, and more than exp can tell from forgetting all.
DECAYS = (1e-3, 1.0, 50.0, 1e4)
FLOAT64 = 1e-12
# Sums of up to 200 rounded terms, relative to the largest entry.
FLOAT32 = 2e-5

every_width = pytest.mark.parametrize("width", BOUNDARIES)
every_decay = pytest.mark.parametrize("strength", DECAYS)


@dataclass
class Pass:
    """The tensors of one pass, and which of its positions are real."""

    query: Tensor
    key: Tensor
    value: Tensor
    log_decay: Tensor
    beta: Tensor
    initial: Tensor
    real: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """What gradients are taken of."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "real"}

    def leaves(self, dtype: torch.dtype) -> "Pass":
        return Pass(**{n: x.to(dtype, copy=True).requires_grad_() for n, x in self.tensors().items()}, real=self.real)

    def part(self, start: int, stop: int, initial: Tensor) -> "Pass":
        now = {n: x[:, start:stop] for n, x in self.tensors().items()} | {"initial": initial}
        return Pass(**now, real=self.real[:, start:stop])

    def run(self, **options: Any) -> DeltaOutput:
        return delta_attention(**self.tensors(), **options)


def draw_pass(
    width: int,
    strength: float,
    *,
    seed: int = 0,
    batch: int = 1,
    heads: tuple[int, int] = (2, 2),
    sizes: tuple[int, int] = (8, 5),
    per_head: bool = False,
    ragged: bool = False,
) -> Pass:
    """`heads`: those of values and those of keys; `sizes`: K and V."""
    generator = torch.Generator().manual_seed(seed)
    (num_heads, num_key_heads), (key_width, value_width) = heads, sizes

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    decay_shape = (batch, width, num_heads) if per_head else (batch, width, num_heads, key_width)
    # Some tokens decay much less than others: a large sum must not swallow them.
    log_decay = (
        -strength
        * uniform(*decay_shape)
        * 10 ** (-4 * uniform(batch, width, num_heads).view(batch, width, num_heads, *[1] * (not per_head)))
    )
    return Pass(
        query=normal(batch, width, num_key_heads, key_width),
        key=normal(batch, width, num_key_heads, key_width),
        value=normal(batch, width, num_heads, value_width),
        log_decay=log_decay,
        beta=uniform(batch, width, num_heads),
        initial=normal(batch, num_heads, key_width, value_width),
        real=uniform(batch, width) < 0.7 if ragged else torch.ones(batch, width, dtype=torch.bool),
    )


def one_by_one(given: Pass) -> tuple[Tensor, Tensor]:
    """The plain oracle: outputs and last states by the equations, row by row and token by token, pads left out."""
    batch, width, num_heads, value_width = given.value.shape
    group = num_heads // given.key.shape[2]
    outs, states = [], []
    for row in range(batch):
        state = given.initial[row]
        for t in range(width):
            if not given.real[row, t]:
                outs.append(state.new_zeros(num_heads, value_width))
                continue
            query, key = (unit(x[row, t]).repeat_interleave(group, 0) for x in (given.query, given.key))
            log_decay = given.log_decay[row, t]
            state = (log_decay if log_decay.dim() == 2 else log_decay[:, None]).exp()[:, :, None] * state
            predicted = (state * key[:, :, None]).sum(1)
            update = given.beta[row, t, :, None] * (given.value[row, t] - predicted)
            state = state + key[:, :, None] * update[:, None, :]
            outs.append((state * query[:, :, None]).sum(1) / math.sqrt(query.shape[-1]))
        states.append(state)
    return torch.stack(outs).view(batch, width, num_heads, value_width), torch.stack(states)


def unit(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def gradients(given: Pass, out: Tensor, state: Tensor) -> dict[str, Tensor]:
    """Of a loss that every output and every entry of the state takes part in."""
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(x.shape, generator=generator).to(x) for x in (out, state)]
    loss = (out * weights[0]).sum() + (state * weights[1]).sum()
    inputs = given.tensors()
    # Of pads alone nothing is used.
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True), strict=True))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Within `tolerance` of the largest entry, or of 1 where all are small."""
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance * max(1.0, expected.abs().max().item()), f"{name} is off by {error:.2g}"


def assert_equals_the_oracle(drawn: Pass, **options: Any) -> None:
    """Outputs, states and all gradients, in both precisions."""
    exact = drawn.leaves(torch.float64)
    expected = dict(zip(("out", "state"), one_by_one(exact), strict=True))
    expected |= gradients(exact, **expected)
    for dtype, tolerance in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
        ours = drawn.leaves(dtype)
        result = ours.run(**options)
        assert result.out.dtype == result.state.dtype == dtype
        actual = {"out": result.out, "state": result.state} | gradients(ours, result.out, result.state)
        for name, value in expected.items():
            assert_near(actual[name], value, tolerance, f"{name} in {dtype}")


@every_decay
@every_width
def test_equals_the_plain_oracle_at_every_boundary(width: int, strength: float) -> None:
    assert_equals_the_oracle(draw_pass(width, strength))


@given(
    width=st.integers(1, 200),
    strength=st.sampled_from(DECAYS),
    seed=st.integers(0, 1000),
    batch=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    # No narrower keys: float32 knows the gradient of a norm near zero only roughly.
    sizes=st.sampled_from([(8, 5), (4, 12), (16, 16), (4, 1)]),
    per_head=st.booleans(),
    ragged=st.booleans(),
)
def test_equals_the_plain_oracle(width: int, strength: float, ragged: bool, **shape: Any) -> None:
    drawn = draw_pass(width, strength, ragged=ragged, **shape)
    assert_equals_the_oracle(drawn, real=drawn.real if ragged else None)


@given(width=st.integers(1, 150), strength=st.sampled_from(DECAYS), seed=st.integers(0, 1000), per_head=st.booleans())
def test_both_algorithms_agree(width: int, strength: float, seed: int, per_head: bool) -> None:
    drawn = draw_pass(width, strength, seed=seed, batch=2, per_head=per_head).leaves(torch.float64)
    log_decay = drawn.log_decay[..., None] if per_head else drawn.log_decay
    inputs = (drawn.query, drawn.key / 3, drawn.value, log_decay, drawn.beta[..., None])
    inputs = tuple(x.transpose(1, 2) for x in inputs)
    by_token, by_block = kda._recurrent(*inputs, drawn.initial), kda._chunked(*inputs, drawn.initial)
    for name, one, other in zip(("out", "update", "state"), by_token, by_block, strict=True):
        assert_near(other, one.detach(), FLOAT64, name)


@given(width=st.integers(2, 150), cut=st.integers(1, 149), strength=st.sampled_from(DECAYS), seed=st.integers(0, 1000))
def test_a_pass_may_be_cut_anywhere(width: int, cut: int, strength: float, seed: int) -> None:
    cut = min(cut, width - 1)
    drawn = draw_pass(width, strength, seed=seed).leaves(torch.float64)
    whole = drawn.run()
    head = drawn.part(0, cut, drawn.initial).run()
    tail = drawn.part(cut, width, head.state).run()
    assert_near(torch.cat([head.out, tail.out], 1), whole.out.detach(), FLOAT64, "out")
    assert_near(tail.state, whole.state.detach(), FLOAT64, "state")


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 9, 33, 64, 65, 70])
@pytest.mark.parametrize("per_head", [False, True])
@every_decay
def test_the_state_after_any_number_of_tokens(width: int, per_head: bool, strength: float) -> None:
    drawn = draw_pass(width, strength, batch=3, per_head=per_head, ragged=True).leaves(torch.float64)
    record = drawn.run(real=drawn.real).record
    stopped = [drawn.initial, *(stop_after(drawn, count) for count in range(1, width + 1))]
    for count in range(width + 1):
        counts = torch.tensor([count, width - count, (2 * count) % (width + 1)])
        actual = record.state_after(counts, drawn.initial)
        expected = torch.stack([stopped[each][row] for row, each in enumerate(counts)])
        assert_near(actual, expected.detach(), FLOAT64, f"state after {counts.tolist()}")
    assert torch.equal(record.state_after(torch.zeros(3, dtype=torch.long), drawn.initial), drawn.initial)


def stop_after(drawn: Pass, count: int) -> Tensor:
    part = drawn.part(0, count, drawn.initial)
    return part.run(real=part.real).state


def test_a_state_after_few_tokens_keeps_small_decays_behind_a_large_one() -> None:
    drawn = draw_pass(6, 1e-3)
    drawn.log_decay[:, 1] = -1e6
    record = drawn.run().record
    exact = drawn.part(0, 5, drawn.initial).leaves(torch.float64)
    actual = record.state_after(torch.tensor([5]), drawn.initial)
    assert_near(actual, one_by_one(exact)[1].detach(), 1e-6, "state")


@pytest.mark.parametrize("width", [1, 3, 4, 5, 8, 64, 65, 130])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_what_stands_at_a_pad_reaches_nothing(width: int, garbage: float) -> None:
    clean = draw_pass(width, 1.0, batch=3, ragged=True)
    clean.real[0] = False
    dirty = Pass(**clean.tensors(), real=clean.real)
    for name in ("query", "key", "value", "log_decay", "beta"):
        pads = ~clean.real.view(3, width, *[1] * (getattr(clean, name).dim() - 2))
        setattr(dirty, name, getattr(clean, name).masked_fill(pads, garbage))
    results = []
    for drawn in (clean, dirty):
        leaves = drawn.leaves(torch.float32)
        result = leaves.run(real=leaves.real)
        after = result.record.state_after(torch.tensor([width, width // 2, width]), leaves.initial)
        results.append([result.out, result.state, after, *gradients(leaves, result.out, result.state).values()])
        assert torch.equal(result.state[0], leaves.initial[0])
        assert not result.out[~leaves.real].any()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("width", [3, 8, 64, 70, 129])
def test_forgetting_all_is_an_ordinary_decay(width: int) -> None:
    drawn = draw_pass(width, 1.0)
    drawn.log_decay[:, width // 2] = -math.inf
    drawn.log_decay[:, -1, :, ::2] = -math.inf
    assert_equals_the_oracle(drawn)


@pytest.mark.parametrize("strength", [1e4, 1e30])
def test_gradients_stay_finite_however_strong_the_decay(strength: float) -> None:
    drawn = draw_pass(130, strength).leaves(torch.float32)
    result = drawn.run()
    assert result.out.isfinite().all() and result.state.isfinite().all()
    assert all(x.isfinite().all() for x in gradients(drawn, result.out, result.state).values())


def test_identical_keys_that_never_fade_are_solved_exactly() -> None:
    drawn = draw_pass(100, 0.0)
    drawn.key[:] = drawn.key[:, :1]
    drawn.beta[:] = 1.0
    assert_equals_the_oracle(drawn)


@pytest.mark.parametrize("width", [2, 20])
def test_unnormalized_keys_are_taken_as_they_are(width: int) -> None:
    drawn = draw_pass(width, 1.0).leaves(torch.float64)
    by_us = drawn.run().out
    unscaled = Pass(**drawn.tensors() | {"query": unit(drawn.query), "key": unit(drawn.key)}, real=drawn.real)
    assert_near(unscaled.run(normalize=False).out, by_us.detach(), FLOAT64, "out")


@pytest.mark.parametrize("width", [2, 20])
def test_without_a_state_it_starts_from_zeros(width: int) -> None:
    drawn = draw_pass(width, 1.0)
    drawn.initial[:] = 0
    started = drawn.run()
    nothing = delta_attention(drawn.query, drawn.key, drawn.value, drawn.log_decay, drawn.beta)
    assert torch.equal(nothing.out, started.out) and torch.equal(nothing.state, started.state)


@pytest.mark.parametrize("width", [3, 20])
def test_half_width_inputs_are_computed_in_float32(width: int) -> None:
    drawn = draw_pass(width, 1.0)
    halves = Pass(**{n: x.bfloat16() for n, x in drawn.tensors().items()}, real=drawn.real)
    expected = Pass(**{n: x.float() for n, x in halves.tensors().items()}, real=drawn.real).run()
    with torch.autocast("cpu", torch.bfloat16):
        actual = halves.run()
    assert actual.out.dtype == torch.bfloat16 and actual.state.dtype == torch.float32
    assert torch.equal(actual.out, expected.out.bfloat16()) and torch.equal(actual.state, expected.state)


def test_decays_may_come_in_float32_beside_float64() -> None:
    drawn = draw_pass(9, 1.0).leaves(torch.float64)
    mixed = Pass(**drawn.tensors() | {"log_decay": drawn.log_decay.float()}, real=drawn.real)
    assert mixed.run().state.dtype == torch.float64
    assert torch.equal(mixed.run().out, drawn.run().out)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="3 value heads over 2 key heads"):
        draw_pass(4, 1.0, heads=(3, 2)).run()
    with pytest.raises(ValueError, match="0 tokens"):
        draw_pass(0, 1.0).run()


def test_a_pass_costs_what_its_width_costs() -> None:
    for width in BOUNDARIES:
        assert sum(kda._stretches(width, 1)) == width
    assert kda._stretches(8, 1) == [8]
    assert kda._stretches(129, 1) == [128, 1]
    assert kda._stretches(129, kda._BLOCKS_AT_ONCE) == [64, 64, 1]


class FakeKernels:
    """Stands in for `fla.ops.kda`: takes what its kernels take, and answers by the torch form."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        module = ModuleType("fla.ops.kda")
        for name in ("chunk_kda", "fused_recurrent_kda"):
            setattr(module, name, self._kernel(name))
        monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
        monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
        monkeypatch.setitem(sys.modules, "fla.ops.kda", module)

    def _kernel(self, name: str) -> Any:
        def kernel(
            q: Tensor,
            k: Tensor,
            v: Tensor,
            g: Tensor,
            beta: Tensor,
            scale: float | None = None,
            initial_state: Tensor | None = None,
            output_final_state: bool = False,
            use_qk_l2norm_in_kernel: bool = False,
        ) -> tuple[Tensor, Tensor]:
            self.calls.append(name)
            assert q.shape == k.shape == g.shape and beta.shape == v.shape[:3] and scale is None
            assert all(x.isfinite().all() for x in (q, k, v, g, beta))
            assert output_final_state
            assert initial_state is None or initial_state.dtype == torch.float32
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kda_kernels, "serves", lambda query: False)
                result = delta_attention(q, k, v, g, beta, initial=initial_state, normalize=use_qk_l2norm_in_kernel)
            return result.out, result.state

        return kernel


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_kernels_get_what_they_take(monkeypatch: pytest.MonkeyPatch, per_head: bool, normalize: bool) -> None:
    drawn = draw_pass(20, 1.0, batch=3, heads=(4, 2), per_head=per_head, ragged=True)
    drawn.query[~drawn.real] = math.nan
    drawn.beta[~drawn.real] = math.inf
    if not normalize:
        drawn.key /= 4
    expected = drawn.run(real=drawn.real, normalize=normalize)
    fake = FakeKernels(monkeypatch)
    monkeypatch.setattr(kda_kernels, "serves", lambda query: True)
    actual = drawn.run(real=drawn.real, normalize=normalize)
    assert fake.calls == ["chunk_kda"]
    assert_near(actual.out, expected.out, 1e-6, "out")
    assert_near(actual.state, expected.state, 1e-6, "state")
    for count in (0, 1, 7, 20):
        counts = torch.tensor([count, 20 - count, 5])
        assert isinstance(expected.record, Replay) and not isinstance(actual.record, Replay)
        after = [result.record.state_after(counts, drawn.initial) for result in (actual, expected)]
        assert_near(*after, 1e-6, "state after")
    assert torch.equal(actual.record.state_after(torch.zeros(3, dtype=torch.long), drawn.initial), drawn.initial)


def test_kernels_get_no_decay_that_they_can_not_subtract(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw_pass(20, 1e4)
    drawn.log_decay[:, 7] = -math.inf
    expected = drawn.run()
    FakeKernels(monkeypatch)
    monkeypatch.setattr(kda_kernels, "serves", lambda query: True)
    actual = drawn.run()
    assert_near(actual.out, expected.out, 1e-6, "out")
    assert_near(actual.state, expected.state, 1e-6, "state")


def test_the_recurrent_kernel_runs_short_passes_that_want_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeKernels(monkeypatch)
    monkeypatch.setattr(kda_kernels, "serves", lambda query: True)
    drawn = draw_pass(3, 1.0)
    drawn.initial = drawn.initial.double()
    drawn.run()
    drawn.leaves(torch.float32).run()
    assert fake.calls == ["fused_recurrent_kda", "chunk_kda"]


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "width", "installed", "served"),
    [
        (True, torch.bfloat16, 128, True, True),
        (False, torch.bfloat16, 128, True, False),
        (True, torch.float32, 128, True, False),
        (True, torch.bfloat16, 512, True, False),
        (True, torch.bfloat16, 128, False, False),
    ],
)
def test_kernels_serve_half_width_on_cuda(
    monkeypatch: pytest.MonkeyPatch, is_cuda: bool, dtype: torch.dtype, width: int, installed: bool, served: bool
) -> None:
    monkeypatch.setattr(kda_kernels, "_is_installed", lambda: installed)
    query: Any = SimpleNamespace(is_cuda=is_cuda, dtype=dtype, shape=(1, 1, 1, width))
    # Without the checks of annotations: no tensor here is on a GPU.
    assert inspect.unwrap(kda_kernels.serves)(query) is served


def test_without_a_gpu_no_kernel_is_looked_for() -> None:
    assert not kda_kernels.serves(torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16))
