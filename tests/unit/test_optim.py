"""Muon against torch's, which matrices it gets, averages, and trees of tensors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepen.backbones.resolve import load
from deepen.checkpoint import open_model
from deepen.core.errors import CheckpointError, DeepenError
from deepen.core.seeds import seed_at
from deepen.train.average import Average
from deepen.train.muon import Float32Muon, is_for_muon, orthogonalized
from deepen.train.optim import make_optimizers
from deepen.train.tree import flattened, unflattened


def matrices(*shapes: tuple[int, int]) -> list[nn.Parameter]:
    source = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(*shape, generator=source)) for shape in shapes]


class TestMuon:
    @given(st.integers(2, 24), st.integers(2, 24), st.integers(0, 1000))
    def test_singular_values_come_near_one_and_vectors_stay(self, rows, columns, seed):
        matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        found = left.T @ orthogonalized(matrix) @ right.T
        # Five iterations bring any value above a hundredth of the norm between these.
        is_large = values > 0.02 * values.norm()
        assert ((found.diagonal() > 0.6) & (found.diagonal() < 1.25))[is_large].all()
        torch.testing.assert_close(found, torch.diag(found.diagonal()), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("weight_decay", [0.0, 0.1])
    def test_steps_are_those_of_torch_but_for_the_rounding_of_its_iteration(self, weight_decay):
        ours, theirs = matrices((6, 4), (4, 9)), matrices((6, 4), (4, 9))
        settings = {"lr": 0.1, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
        optimizers = Float32Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
        for step in range(3):
            source = torch.Generator().manual_seed(step)
            for one, other in zip(ours, theirs, strict=True):
                one.grad = other.grad = torch.randn(one.shape, generator=source)
            for optimizer in optimizers:
                optimizer.step()
        for one, other in zip(ours, theirs, strict=True):
            # Five iterations in bfloat16 are off by a few hundredths of an update, of which there were three.
            assert (one - other).abs().max().item() < 3 * 0.05 * 0.1
            assert optimizers[0].state[one].keys() == optimizers[1].state[other].keys()
            momenta = (each.state[p]["momentum_buffer"] for each, p in zip(optimizers, (one, other), strict=True))
            torch.testing.assert_close(*momenta)

    def test_a_parameter_without_gradient_stays(self):
        (matrix,) = matrices((3, 3))
        before = matrix.detach().clone()
        Float32Muon([matrix], lr=0.1, weight_decay=0.5).step()
        assert torch.equal(matrix, before)

    def test_it_gets_matrices_but_no_table_and_no_vector(self):
        table, matrix, flat, vector = (nn.Parameter(torch.zeros(s)) for s in ((9, 4), (4, 4), (1, 4), (4,)))
        assert [is_for_muon(each, {table}) for each in (table, matrix, flat, vector)] == [False, True, False, False]


class Whole(nn.Module):
    """All of a base in two groups, each with its own rate."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.backbone = open_model(address).backbone
        self.base = self.backbone.model

    def optim_groups(self):
        layers = list(self.backbone.layers.parameters())
        rest = [each for each in self.base.parameters() if not any(each is layer for layer in layers)]
        return [
            {"params": layers, "lr": 0.1, "weight_decay": 0.2, "betas": (0.8, 0.9)},
            {"params": rest, "lr": 0.3, "weight_decay": 0.0},
        ]


class TestMakeOptimizers:
    def test_muon_and_adamw_hold_each_parameter_once(self):
        model = Whole("tiny:llama")
        optimizers = make_optimizers(model, model.base, name="muon")
        names = {parameter: name for name, parameter in model.base.named_parameters()}
        held = [names[parameter] for parameter in optimizers.parameters]
        assert sorted(held) == sorted(names.values())
        adamw, muon = optimizers._optimizers
        of_muon = {names[parameter] for group in muon.param_groups for parameter in group["params"]}
        assert of_muon == {name for name in names.values() if "_proj" in name}
        assert [group["lr"] for group in optimizers.groups] == [0.1, 0.3, 0.1]
        assert muon.param_groups[0]["weight_decay"] == 0.2 and adamw.param_groups[0]["betas"] == (0.8, 0.9)

    def test_one_rate_replaces_all_and_factors_begin_from_it(self):
        model = Whole("tiny:llama")
        optimizers = make_optimizers(model, model.base, name="muon", learning_rate=0.5)
        for factor in (0.5, 0.1, 1.0):
            optimizers.set_rates(factor)
            assert {group["lr"] for group in optimizers.groups} == {0.5 * factor}

    def test_muon_without_a_matrix_is_told(self):
        class Vector(nn.Module):
            backbone = None

            def __init__(self) -> None:
                super().__init__()
                self.scale = nn.Parameter(torch.ones(4))

            def optim_groups(self):
                return [{"params": [self.scale], "lr": 0.1}]

        with pytest.raises(DeepenError, match="optimizer is muon, but no matrix is trained; use adamw"):
            make_optimizers(Vector(), None, name="muon")

    def test_state_is_found_by_parameter(self):
        loaded = load("tiny:llama")
        model = Whole("tiny:llama")
        optimizers = make_optimizers(model, model.base, name="muon")
        for parameter in optimizers.parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizers.step()
        kinds = {name: set(optimizers.state_of(parameter)) for name, parameter in model.base.named_parameters()}
        assert kinds["model.embed_tokens.weight"] == {"step", "exp_avg", "exp_avg_sq"}
        assert kinds["model.layers.0.mlp.up_proj.weight"] == {"momentum_buffer"}
        with pytest.raises(KeyError):
            optimizers.state_of(next(loaded.model.parameters()))


class TestAverage:
    def test_it_is_the_weighted_sum_of_all_that_was(self):
        parameter = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        average = Average({"x": parameter}, decay=0.9)
        history = [parameter.detach().clone()]
        for step in range(5):
            with torch.no_grad():
                parameter.add_(step)
            history.append(parameter.detach().clone())
            average.update()
        expected = history[0] * 0.9**5 + sum(0.1 * 0.9 ** (5 - n) * history[n] for n in range(1, 6))
        torch.testing.assert_close(average.tensors["x"], expected)

    def test_it_stands_in_for_the_parameters_only_in_its_block(self):
        parameter = nn.Parameter(torch.ones(3))
        average = Average({"x": parameter}, decay=0.5)
        with torch.no_grad():
            parameter.fill_(3.0)
        average.update()
        with pytest.raises(RuntimeError, match="inside"), average.in_place():
            assert parameter.tolist() == [2.0] * 3
            raise RuntimeError("inside")
        assert parameter.tolist() == [3.0] * 3 and average.tensors["x"].tolist() == [2.0] * 3


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False), st.text(max_size=3),
    st.lists(st.integers(0, 9), max_size=4).map(torch.tensor),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(st.text(max_size=3), inner)
    ),
    max_leaves=8,
)


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


class TestTree:
    @given(trees)
    def test_what_is_taken_apart_comes_back(self, tree):
        outline, tensors = flattened(tree)
        assert same(tree, unflattened(outline, tensors))

    def test_what_has_no_place_is_named(self):
        with pytest.raises(CheckpointError, match=r"carry\.a\.1 is a set, which a checkpoint has no place for"):
            flattened({"a": [1, {2}]})


class TestSeeds:
    def test_places_don_t_share_seeds(self):
        places = [(seed, *place) for seed in range(4) for place in [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1, 0)]]
        assert len({seed_at(*place) for place in places}) == len(places)

    def test_neighbours_share_no_bits(self):
        seeds = [seed_at(0, step) for step in range(2000)]
        assert all(0 <= seed < 2**63 for seed in seeds)
        for bit in range(63):
            assert 0.4 < sum(seed >> bit & 1 for seed in seeds) / len(seeds) < 0.6
