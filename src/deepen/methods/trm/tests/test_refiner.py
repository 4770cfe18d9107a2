"""The refiner against plain loops, and what holds for any weights and any number of steps."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import deepen
from deepen.core.errors import DeepenError
from deepen.methods.trm.refiner import NORM_EPS, Stepped, TRMRefiner, to_unit_rms

D, Z, HEADS = 6, 4, 2
MIXINGS = ("position", "evidence")
NEAR = {"rtol": 1e-9, "atol": 1e-11}


def refiner(*, zero_init: bool = False, seed: int = 0, scale: float = 1.0, **settings: Any) -> TRMRefiner:
    """In float64, with noise where a new one has zeros."""
    torch.manual_seed(seed)
    made = TRMRefiner(D, Z, **{"num_heads": HEADS, "hidden": 5, **settings}).double()
    if not zero_init:
        nn.init.normal_(made.f_y.out.weight, std=0.7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(scale)
        if made.reader is not None:
            nn.init.normal_(made.reader.scale, std=2.0)
    return made


def some_x(rows: int = 2, positions: int = 7, *, seed: int = 1, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(rows, positions, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def oracle(made: TRMRefiner, x: Tensor, *, T: int, first_learning: int = 1) -> Tensor:
    """Row by row, position by position, head by head, with nothing computed ahead."""
    weights = dict(made.named_parameters())

    def norm(v: Tensor) -> Tensor:
        return v / (v.square().mean() + NORM_EPS).sqrt()

    def silu(v: Tensor) -> Tensor:
        return v / (1 + (-v).exp())

    def evidence(row: Tensor, place: int, z: Tensor) -> Tensor:
        query, width = weights["reader.query.weight"] @ z, Z // HEADS
        found = []
        for head in range(HEADS):
            part = slice(head * width, (head + 1) * width)
            keys = [norm((weights["reader.key.weight"] @ row[j])[part]) for j in range(place + 1)]
            values = [(weights["reader.value.weight"] @ row[j])[part] for j in range(place + 1)]
            asked = weights["reader.scale"][head] * norm(query[part])
            scores = torch.stack([asked @ key / width**0.5 for key in keys]).exp()
            found.append(sum(s * v for s, v in zip(scores / scores.sum(), values, strict=True)))
        return weights["reader.out.weight"] @ torch.cat(found)

    rows = []
    for row in x:
        places = []
        for place, at in enumerate(row):
            d, z = torch.zeros(D, dtype=x.dtype), torch.zeros(Z, dtype=x.dtype)
            for number in range(1, T + 1):
                if number == first_learning:
                    d, z = d.detach(), z.detach()
                for _ in range(made.n):
                    inner = weights["f_z.from_x.weight"] @ at + weights["f_z.from_y.weight"] @ norm(at + d)
                    inner = inner + weights["f_z.from_z.weight"] @ z
                    if made.reader is not None:
                        inner = inner + evidence(row, place, z)
                    z = norm(z + weights["f_z.out.weight"] @ silu(inner))
                y = weights["f_y.from_y.weight"] @ norm(at + d) + weights["f_y.from_z.weight"] @ z
                d = d + weights["f_y.out.weight"] @ silu(y)
            places.append(at + d)
        rows.append(torch.stack(places))
    return torch.stack(rows)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize(("n", "T", "grad_outer_steps"), [(2, 1, 1), (3, 2, 2), (2, 3, 1), (2, 3, 2), (1, 2, 3)])
def test_values_and_gradients_are_those_of_plain_loops(mixing, n, T, grad_outer_steps):
    made = refiner(n=n, T=T, mixing=mixing, grad_outer_steps=grad_outer_steps)
    x = some_x(2, 4).requires_grad_()
    given_x = x.detach().clone().requires_grad_()
    weight = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    actual, expected = made(x), oracle(made, given_x, T=T, first_learning=max(1, T - grad_outer_steps + 1))
    torch.testing.assert_close(actual, expected, **NEAR)
    parameters = dict(made.named_parameters())
    ours = torch.autograd.grad((actual * weight).sum(), [x, *parameters.values()])
    theirs = torch.autograd.grad((expected * weight).sum(), [given_x, *parameters.values()])
    for name, one, other in zip(["x", *parameters], ours, theirs, strict=True):
        assert other.any(), f"{name} gets no gradient"
        torch.testing.assert_close(one, other, **NEAR, msg=lambda said, name=name: f"{name}: {said}")


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("grad_outer_steps", [1, 2, 4])
def test_each_position_takes_the_steps_that_are_its_own(mixing, grad_outer_steps):
    made = refiner(n=2, mixing=mixing, grad_outer_steps=grad_outer_steps)
    own_T = torch.tensor([[1, 3, 2, 4], [2, 1, 1, 3]])
    x = some_x(2, 4).requires_grad_()
    given_x = x.detach().clone().requires_grad_()
    weight = some_x(2, 4, seed=2)
    evidence = made.evidence_of(x, torch.ones(4, 4, dtype=torch.bool).tril()[None, None])
    actual = made.refine(x, evidence, T=5, own_T=own_T)
    by_T = {T: oracle(made, given_x, T=T, first_learning=max(1, T - grad_outer_steps + 1)) for T in range(1, 5)}
    expected = sum((own_T == T)[..., None] * found for T, found in by_T.items())
    torch.testing.assert_close(actual.hidden, expected, **NEAR)
    ours = torch.autograd.grad((actual.hidden * weight).sum(), [x, *made.parameters()])
    theirs = torch.autograd.grad((expected * weight).sum(), [given_x, *made.parameters()])
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **NEAR)


class TestUntrained:
    @pytest.mark.parametrize("mixing", MIXINGS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_it_gives_back_what_it_reads(self, mixing, dtype):
        x = some_x().to(dtype)
        assert torch.equal(refiner(zero_init=True, mixing=mixing).to(torch.float32)(x), x)

    @pytest.mark.parametrize("mixing", MIXINGS)
    def test_what_is_below_learns_as_without_it(self, mixing):
        trunk = nn.Linear(D, D).double()
        weight = some_x(seed=5)
        without = torch.autograd.grad((trunk(some_x()) * weight).sum(), list(trunk.parameters()))
        beneath = refiner(zero_init=True, mixing=mixing)(trunk(some_x()))
        within = torch.autograd.grad((beneath * weight).sum(), list(trunk.parameters()))
        assert all(torch.equal(one, other) for one, other in zip(within, without, strict=True))


class TestSteps:
    def test_what_is_saved_for_the_backward_does_not_grow_with_T(self):
        def saved(T: int) -> int:
            sizes: dict[int, int] = {}

            def note(tensor: Tensor) -> Tensor:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                return tensor

            with saved_tensors_hooks(note, lambda tensor: tensor):
                held = refiner(T=T, mixing="evidence")(some_x().requires_grad_())
            assert held.requires_grad
            return sum(sizes.values())

        assert saved(2) == saved(3) == saved(12)
        assert saved(1) <= saved(2)

    def test_n_and_T_are_told_at_any_time(self):
        made, x = refiner(n=2, T=3), some_x()
        before = made(x)
        made.n, made.T = 4, 5
        torch.testing.assert_close(made(x), oracle(made, x, T=5), **NEAR)
        torch.testing.assert_close(made.refine(x, T=1).hidden, oracle(made, x, T=1), **NEAR)
        made.n, made.T = 2, 3
        assert torch.equal(made(x), before)

    @pytest.mark.parametrize("mixing", MIXINGS)
    @pytest.mark.parametrize("learns_to_halt", [False, True])
    def test_weights_of_one_n_and_T_are_those_of_any(self, mixing, learns_to_halt):
        kind = {"mixing": mixing, "learns_to_halt": learns_to_halt}
        one, other = refiner(n=2, T=3, **kind), refiner(n=7, T=1, seed=9, **kind)
        assert one.state_dict().keys() == other.state_dict().keys()
        other.load_state_dict(one.state_dict(), strict=True)
        other.n, other.T = 2, 3
        assert torch.equal(other(some_x()), one(some_x()))

    def test_watched_steps_are_what_fewer_steps_give(self):
        made, x = refiner(T=4), some_x()
        refined = made.refine(x, watch={1, 3})
        assert refined.num_steps == 4 and refined.watched.keys() == {1, 3}
        for number, step in refined.watched.items():
            torch.testing.assert_close(step.after, made.refine(x, T=number).hidden, **NEAR)
            assert step.number == number
        assert torch.equal(refined.watched[1].before, x)

    def test_another_start_of_the_latent_is_a_buffer(self):
        made, x = refiner(), some_x()
        before = made(x)
        assert "z_start" in made.state_dict() and "z_start" not in dict(made.named_parameters())
        made.z_start.fill_(0.5)
        assert not torch.allclose(made(x), before)


class TestPositions:
    @given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 20))
    def test_by_themselves_they_know_of_no_other(self, place, T, seed):
        made, x = refiner(T=T, seed=seed), some_x(seed=seed)
        torch.testing.assert_close(made(x[:, place : place + 1]), made(x)[:, place : place + 1], **NEAR)

    @given(st.integers(0, 6), st.integers(1, 4), st.integers(0, 20))
    def test_with_evidence_they_know_of_those_before(self, place, T, seed):
        made, x = refiner(T=T, seed=seed, mixing="evidence"), some_x(seed=seed)
        other = x.clone()
        other[0, place] += 1.0
        moved = (made(other) - made(x)).abs().amax(dim=-1)
        assert (moved[0, :place] == 0).all() and (moved[1] == 0).all()
        assert (moved[0, place:] > 0).all()

    @given(st.lists(st.integers(0, 6), min_size=1, unique=True), st.integers(0, 20))
    def test_some_of_them_are_refined_as_among_all(self, places, seed):
        made, x = refiner(seed=seed, mixing="evidence"), some_x(seed=seed)
        visible = torch.ones(7, 7, dtype=torch.bool).tril()[places][None, None]
        refined = made.refine(x[:, places], made.evidence_of(x, visible))
        torch.testing.assert_close(refined.hidden, made(x)[:, places], **NEAR)

    def test_heads_that_do_not_divide_the_latent(self):
        with pytest.raises(DeepenError, match="d_latent 4 can't be divided among num_heads 3"):
            TRMRefiner(D, Z, mixing="evidence", num_heads=3)


class TestBounds:
    @given(
        st.integers(1, 6), st.integers(1, 12), st.sampled_from([1e-3, 1.0, 10.0, 1e4]), st.sampled_from(MIXINGS),
        st.integers(0, 1000),
    )  # fmt: skip
    def test_of_the_latent_and_the_residual_for_any_weights(self, n, T, scale, mixing, seed):
        made = refiner(n=n, T=T, scale=scale, mixing=mixing, seed=seed).float()
        steps = made.refine(some_x(seed=seed).float(), _all(made, some_x(seed=seed).float()), watch=range(1, T + 1))
        for step in steps.watched.values():
            assert step.z.square().mean(dim=-1).sqrt().max() <= 1 + 1e-6
            assert step.d.isfinite().all()
        # Each step adds no more than weights make of vectors of unit size.
        norms = {name: float(torch.linalg.matrix_norm(each.detach(), 2)) for name, each in made.f_y.named_parameters()}
        reads = norms["from_y.weight"] * D**0.5 + norms["from_z.weight"] * Z**0.5
        assert steps.watched[T].d.norm(dim=-1).max() <= T * norms["out.weight"] * reads * (1 + 1e-5) + 1e-6

    @given(st.floats(-2, 15), st.integers(1, 300), st.integers(0, 1000))
    @example(-2.0, 300, 0)
    def test_of_the_norm(self, magnitude, width, seed):
        x = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
        x = x / x.square().mean(dim=-1, keepdim=True).sqrt() * 10.0**magnitude
        rms = to_unit_rms(x).square().mean(dim=-1).sqrt()
        assert (rms <= 1 + 1e-6).all()
        assert (rms > 1 - 1e-3).all()

    def test_of_the_norm_of_nothing(self):
        assert torch.equal(to_unit_rms(torch.zeros(2, 3)), torch.zeros(2, 3))


def _all(made: TRMRefiner, x: Tensor) -> Any:
    return made.evidence_of(x, torch.ones(7, 7, dtype=torch.bool).tril()[None, None])


class TestStopping:
    """With rules told position by position; those that go by what was computed are in test_halting.py."""

    @given(st.lists(st.integers(1, 5), min_size=14, max_size=14), st.sampled_from(MIXINGS))
    def test_each_position_is_what_it_was_when_it_stopped(self, steps, mixing):
        made, x = refiner(T=5, mixing=mixing), some_x()
        last = torch.tensor(steps).view(2, 7)

        def stop(step: Stepped) -> Tensor:
            return step.number >= last

        found = made.refine(x, _all(made, x) if mixing == "evidence" else None, stop=stop)
        assert found.num_steps == max(steps)
        alone = {T: made.refine(x, _all(made, x) if mixing == "evidence" else None, T=T).hidden for T in set(steps)}
        for row in range(2):
            for place in range(7):
                assert torch.equal(found.hidden[row, place], alone[int(last[row, place])][row, place])

    def test_a_position_that_has_stopped_stays_so(self):
        made, x = refiner(T=4), some_x()
        asked = iter([True, False, False])

        def stop(step: Stepped) -> Tensor:
            first = torch.zeros(2, 7, dtype=torch.bool)
            first[0, 0] = next(asked)
            return first

        found = made.refine(x, stop=stop).hidden
        assert torch.equal(found[0, 0], made.refine(x, T=1).hidden[0, 0])
        assert torch.equal(found[1], made(x)[1])


def test_a_copy_learns_by_itself():
    made = refiner()
    other = copy.deepcopy(made)
    assert torch.equal(made(some_x()), other(some_x()))


COMPILED = """
import sys
import torch
from deepen.methods.trm.refiner import TRMRefiner

backend, *mixings = sys.argv[1:]
for mixing in mixings:
    torch.manual_seed(0)
    made = TRMRefiner(6, 4, n=2, T=2, hidden=5, num_heads=2, mixing=mixing).double()
    torch.nn.init.normal_(made.f_y.out.weight)
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    whole = [x, *made.parameters()]
    compiled = torch.compile(made, fullgraph=True, backend=backend)
    for T in (2, 1) if backend == "inductor" else (2,):
        made.T = T
        results = [kind(x) for kind in (made, compiled)]
        gradients = [torch.autograd.grad(each.square().sum(), whole) for each in results]
        torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-11)
    assert torch._dynamo.utils.counters["graph_break"] == {}, torch._dynamo.utils.counters["graph_break"]
    print(mixing)
"""


@pytest.mark.parametrize(
    ("backend", "mixings"), [("aot_eager", MIXINGS[1:]), pytest.param("inductor", MIXINGS, marks=pytest.mark.slow)]
)
def test_compiled_as_one_graph_it_is_the_same(backend, mixings):
    """In a process of its own: the compiler can't see through what checks annotations here."""
    source = str(Path(deepen.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", COMPILED, backend, *mixings],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": source},
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == list(mixings)
