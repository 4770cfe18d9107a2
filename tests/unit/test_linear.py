"""Packed linears: F.linear's values, and bits that do not depend on the rows beside."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepen.nn.linear import PackedForward, can_pack, pack_linears


def make_linear(out_features: int, in_features: int, *, bias: bool, seed: int) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(in_features, out_features, bias=bias).requires_grad_(False)


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    out_features=st.integers(1, 300),
    in_features=st.integers(1, 300),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    bias=st.booleans(),
)
def test_packed_equals_plain(out_features: int, in_features: int, shape: list[int], bias: bool) -> None:
    linear = make_linear(out_features, in_features, bias=bias, seed=1)
    x = inputs(*shape, in_features)
    expected = F.linear(x, linear.weight, linear.bias)
    with torch.no_grad():
        actual = PackedForward(linear)(x)
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@given(
    sizes=st.sampled_from([(576, 576), (192, 576), (576, 1536), (64, 64), (260, 64), (128, 96), (300, 2304)]),
    num_rows=st.integers(1, 200),
    start=st.integers(0, 199),
)
def test_a_row_has_the_same_bits_at_any_row_count(sizes: tuple[int, int], num_rows: int, start: int) -> None:
    linear = make_linear(*sizes, bias=False, seed=2)
    packed = PackedForward(linear)
    x = inputs(200, sizes[1])
    with torch.no_grad():
        everything = packed(x)
        some = packed(x[start : start + num_rows])
    assert torch.equal(some, everything[start : start + num_rows])


def test_a_model_without_packing_computes_f_linear() -> None:
    linear = make_linear(8, 8, bias=False, seed=3).double()
    assert not can_pack(linear.weight)
    packing = pack_linears(nn.Sequential(linear))
    assert packing.linears == ()
    x = inputs(2, 8).double()
    assert torch.equal(linear(x), F.linear(x, linear.weight))


def test_without_the_private_operators_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepen.nn.linear._operator", lambda name: None)
    linear = make_linear(8, 8, bias=True, seed=3)
    assert pack_linears(nn.Sequential(linear)).linears == ()
    x = inputs(2, 8)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))


def test_gradients_flow_as_if_nothing_were_packed() -> None:
    linear = nn.Linear(16, 8)
    pack_linears(nn.Sequential(linear))
    x = inputs(5, 16).requires_grad_()
    linear(x).square().sum().backward()
    expected_x = x.detach().requires_grad_()
    weight = linear.weight.detach().requires_grad_()
    F.linear(expected_x, weight, linear.bias.detach()).square().sum().backward()
    assert torch.equal(x.grad, expected_x.grad)
    assert torch.equal(linear.weight.grad, weight.grad)


def test_a_changed_weight_is_packed_anew() -> None:
    linear = make_linear(8, 16, bias=False, seed=4)
    pack_linears(nn.Sequential(linear))
    x = inputs(5, 16)
    with torch.no_grad():
        before = linear(x)
        linear.weight.mul_(2)
        torch.testing.assert_close(linear(x), 2 * before)


def test_packing_changes_no_name_and_is_undone() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packing = pack_linears(model)
    assert len(packing.linears) == 2
    assert model.state_dict().keys() == before.keys()
    packing.remove()
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_subclasses_keep_their_own_forward() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer = Doubling(4, 4)
    assert pack_linears(nn.Sequential(layer)).linears == ()


def test_a_second_packing_leaves_the_first_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    first = pack_linears(model)
    assert pack_linears(model).linears == ()
    first.remove()
    assert len(pack_linears(model).linears) == 1
