"""The rules by which positions stop: what they compare, their limits, and that nobody minds another's halting."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from deepen.methods.trm.halting import DeltaRule, KLRule, LearnedRule, halting_logits
from deepen.methods.trm.refiner import Evidence, Refined, Stepped, TRMRefiner

D, Z, V = 6, 4, 9
HEAD = torch.randn(V, D, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def refiner(mixing: str = "position") -> TRMRefiner:
    torch.manual_seed(0)
    made = TRMRefiner(D, Z, n=2, T=5, hidden=5, num_heads=2, mixing=mixing, learns_to_halt=True).double()
    nn.init.normal_(made.f_y.out.weight)
    assert made.halt is not None
    nn.init.normal_(made.halt.weight, std=2.0)
    nn.init.zeros_(made.halt.bias)
    return made


def rule(kind: str, threshold: float, made: TRMRefiner) -> DeltaRule | KLRule | LearnedRule:
    if kind == "delta":
        return DeltaRule(threshold)
    return KLRule(threshold, lambda hidden: hidden @ HEAD.T) if kind == "kl" else LearnedRule(threshold, made)


def some_x(rows: int = 3, *, seed: int = 1) -> Tensor:
    return torch.randn(rows, 7, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def refined(made: TRMRefiner, x: Tensor, kind: str, threshold: float) -> Refined:
    visible = torch.ones(7, 7, dtype=torch.bool).tril()[None, None]
    evidence: Evidence | None = made.evidence_of(x, visible)
    return made.refine(x, evidence, stop=rule(kind, threshold, made))


KINDS = ("delta", "kl", "learned")
MIDDLE = {"delta": 0.3, "kl": 0.3, "learned": 0.5}
"""At which some positions stop early and others late."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixing", ["position", "evidence"])
def test_at_its_limits_a_rule_makes_all_steps_or_one(kind, mixing):
    made, x = refiner(mixing), some_x()
    never, at_once = (math.inf, -math.inf) if kind == "learned" else (-math.inf, math.inf)
    all_steps, one_step = refined(made, x, kind, never), refined(made, x, kind, at_once)
    with torch.no_grad():
        assert torch.equal(all_steps.hidden, made(x))
        made.T = 1
        assert torch.equal(one_step.hidden, made(x))
    assert (all_steps.num_steps, one_step.num_steps) == (5, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixing", ["position", "evidence"])
def test_a_row_stops_as_it_does_alone(kind, mixing):
    made, x = refiner(mixing), some_x()
    together = refined(made, x, kind, MIDDLE[kind])
    alone = [refined(made, x[row : row + 1], kind, MIDDLE[kind]) for row in range(3)]
    torch.testing.assert_close(together.hidden, torch.cat([each.hidden for each in alone]), rtol=1e-9, atol=1e-11)
    assert together.num_steps == max(each.num_steps for each in alone)


@pytest.mark.parametrize("kind", KINDS)
def test_each_position_stops_after_the_first_step_of_which_the_rule_says_so(kind):
    made, x, threshold = refiner(), some_x(), MIDDLE[kind]
    with torch.no_grad():
        answers = [x, *(made.refine(x, T=T).hidden for T in range(1, 6))]
        latents = [made.refine(x, watch={T}).watched[T].z for T in range(1, 6)]
    said = [(answer @ HEAD.T).log_softmax(dim=-1) for answer in answers]
    assert made.halt is not None
    expected, steps = torch.empty_like(x), torch.zeros(3, 7, dtype=torch.int64)
    for row in range(3):
        for place in range(7):
            for number in range(1, 6):
                before, after = (answers[number - back][row, place] for back in (1, 0))
                p, q = (said[number - back][row, place] for back in (0, 1))
                stops = {
                    "delta": (after - before).norm() / after.norm() < threshold,
                    "kl": (p.exp() * (p - q)).sum() < threshold,
                    "learned": made.halt(latents[number - 1][row, place]).sigmoid() >= threshold,
                }[kind]
                if stops or number == 5:
                    expected[row, place] = after
                    steps[row, place] = number
                    break
    found = refined(made, x, kind, threshold)
    torch.testing.assert_close(found.hidden, expected, rtol=1e-9, atol=1e-11)
    assert found.made is not None and torch.equal(found.made, steps)
    assert len(steps.unique()) > 2


def test_without_a_rule_nobody_is_asked_how_many_steps_a_position_has_made():
    assert refiner().refine(some_x()).made is None


@given(st.sampled_from(KINDS), st.integers(0, 6), st.integers(0, 6), st.integers(0, 9))
def test_a_position_stops_whatever_later_ones_do(kind, place, other, seed):
    made, x = refiner("evidence"), some_x(1, seed=seed)
    changed = x.clone()
    changed[0, max(place, other)] += 1.0
    before = max(place, other)
    one, another = (refined(made, each, kind, MIDDLE[kind]).hidden for each in (x, changed))
    torch.testing.assert_close(one[:, :before], another[:, :before], rtol=1e-9, atol=1e-11)


def step(number: int = 1, *, d_before: float = 0.0) -> Stepped:
    source = torch.Generator().manual_seed(number)
    x, d, z = (torch.randn(2, 3, width, generator=source, dtype=torch.float64) for width in (D, D, Z))
    return Stepped(number, x, torch.full_like(d, d_before), d, z)


def test_delta_compares_the_change_with_the_answer():
    made = step(d_before=0.25)
    for row in range(2):
        for place in range(3):
            moved = (made.d - 0.25)[row, place].norm() / (made.x + made.d)[row, place].norm()
            for factor in (0.99, 1.01):
                assert bool(DeltaRule(float(moved) * factor)(made)[row, place]) == (factor > 1)


def test_delta_of_nothing_at_all_has_not_moved():
    nothing = torch.zeros(1, 1, D)
    assert DeltaRule(0.1)(Stepped(1, nothing, nothing, nothing, nothing)).all()


def test_kl_compares_the_next_token_after_a_step_with_that_before_it():
    def says(hidden: Tensor) -> Tensor:
        return hidden @ HEAD.T

    made = step()
    before, after = (torch.distributions.Categorical(logits=says(each)) for each in (made.before, made.after))
    divergence = torch.distributions.kl_divergence(after, before)
    for factor in (0.99, 1.01):
        for row in range(2):
            for place in range(3):
                threshold = float(divergence[row, place]) * factor
                assert bool(KLRule(threshold, says)(made)[row, place]) == (factor > 1)


def test_kl_asks_the_head_once_a_step():
    asked: list[Tensor] = []

    def says(hidden: Tensor) -> Tensor:
        asked.append(hidden)
        return hidden @ HEAD.T

    made = refiner()
    with torch.no_grad():
        made.refine(some_x(), stop=KLRule(-math.inf, says))
    # What the trunk says, and each of the four steps after which there is another.
    assert len(asked) == 5 and torch.equal(asked[0], some_x())


def test_the_learned_head_reads_the_latent_and_moves_nothing_else():
    made, where = refiner(), step()
    z = where.z.requires_grad_()
    logits = halting_logits(made, where)
    assert made.halt is not None
    torch.testing.assert_close(logits, z.detach() @ made.halt.weight[0] + made.halt.bias)
    logits.sum().backward()
    assert z.grad is None and made.halt.weight.grad is not None


def test_a_new_head_lets_no_position_stop():
    fresh = TRMRefiner(D, Z, learns_to_halt=True)
    with torch.no_grad():
        where = Stepped(1, *(torch.randn(2, 3, width) for width in (D, D, D, Z)))
        assert (halting_logits(fresh, where).sigmoid() < 0.05).all()
