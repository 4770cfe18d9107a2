"""Counts of parameters, work and runs, by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepen.backbones import tiny
from deepen.backbones.costs import pass_costs
from deepen.backbones.hf import Backbone
from deepen.core.types import Spent, Work
from deepen.generate.plain import PlainDecoder
from deepen.metrics.ledger import RunLedger, count_parameters, model_figures, reading_flops

counts = st.integers(0, 10**15)
works = st.builds(Work, counts, counts, counts)


class TestWork:
    def test_a_product_is_done_again_for_each_operand_with_gradient(self):
        assert Work(5, 0, 0).flops == Work.of(5).flops == 10
        assert Work(0, 5, 0) == Work.of(5, operands=1)
        assert (Work(0, 5, 0).forward_flops, Work(0, 5, 0).backward_flops) == (10, 10)
        assert (Work(0, 0, 5).forward_flops, Work(0, 0, 5).backward_flops) == (10, 20)
        assert Work(1, 10, 100).flops == 2 * 111 + 2 * 210

    @given(works, works, st.integers(0, 1000))
    def test_it_adds_up(self, first, second, times):
        for figure in ("multiply_adds", "forward_flops", "backward_flops", "flops"):
            assert getattr(first + second, figure) == getattr(first, figure) + getattr(second, figure)
            assert getattr(times * first, figure) == times * getattr(first, figure)
        assert first * times == times * first
        assert sum([first, second], Work()) == first + second

    @given(works)
    def test_recomputing_adds_a_forward_and_no_gradient(self, work):
        assert work.detached.flops == work.forward_flops == work.detached.forward_flops
        assert work.recomputed.flops == 2 * work.forward_flops + work.backward_flops
        assert work.recomputed.backward_flops == work.backward_flops


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight


class Grafted(nn.Module):
    """Holds its base, a layer of its own, and that layer's weight once more."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base, self.own, self.again = base, nn.Linear(2, 5), nn.Linear(2, 5, bias=False)
        self.again.weight = self.own.weight

    def optim_groups(self):
        return [{"params": [self.own.weight]}, {"params": [self.own.weight, self.base.head.weight]}]


class TestParameters:
    def test_of_a_base(self):
        found = count_parameters(Tied())
        assert vars(found) == {"unique": 21, "total": 42, "trainable": 0, "added": 0}

    def test_of_a_method(self):
        base = Tied()
        found = count_parameters(base, Grafted(base))
        assert vars(found) == {"unique": 21 + 15, "total": 42 + 25, "trainable": 10 + 21, "added": 15}


def test_figures_of_a_model():
    backbone = Backbone.attach(tiny.build("llama"))
    decoder, parameters = PlainDecoder(backbone), count_parameters(backbone.model)
    assert model_figures(parameters, decoder, num_layers=4, contexts=(0, 9)) == {
        "parameters_unique": backbone.num_parameters,
        "parameters_total": backbone.num_parameters,
        "parameters_added": 0,
        "parameters_trainable": 0,
        "layers": 4,
        "flops_per_token_at_0": decoder.flops(num_positions=1, context=0),
        "flops_per_token_at_9": decoder.flops(num_positions=1, context=9),
        "state_bytes_at_0": 0,
        "state_bytes_at_9": 9 * 4 * 2 * 2 * 16 * 4,
    }


@pytest.mark.parametrize(("num_tokens", "passes"), [(0, []), (3, [(3, 0)]), (8, [(4, 0), (4, 4)]), (9, None)])
def test_a_prompt_is_read_in_passes(num_tokens, passes):
    flops = pass_costs(Backbone.attach(tiny.build("kimi_linear"))).flops
    passes = [(4, 0), (4, 4), (1, 8)] if passes is None else passes
    expected = sum(flops(num_positions=width, context=context, num_logits=1) for width, context in passes)
    assert reading_flops(flops, num_tokens=num_tokens, width=4) == expected


class TestRun:
    def test_its_events_are_summed(self):
        run = RunLedger()
        assert run.tokens_per_pass is None and run.layer_applications_per_token is None
        run.read(Spent(2, 300, 1200), flops=7)
        run.decoded(Spent(1, 5, 20, 3), num_tokens=4, flops=50)
        run.decoded(Spent(2, 2, 8), num_tokens=1, flops=60)
        assert run.inference_figures() == {
            "tokens": 5,
            "passes": 3,
            "positions": 7,
            "layer_applications": 28,
            "decoding_flops": 113,
            "reading_flops": 7,
            "tokens_per_pass": 5 / 3,
            "layer_applications_per_token": 28 / 5,
        }

    def test_training_is_told_forward_and_backward(self):
        run = RunLedger()
        run.trained(Work(0, 10, 1), num_tokens=6)
        run.trained(Work(5), num_tokens=2)
        assert run.training_figures() == {
            "steps": 2,
            "tokens": 8,
            "training_flops": 2 * 16 + 2 * 12,
            "forward_flops": 32,
            "backward_flops": 24,
            "training_flops_per_token": 7.0,
        }
        assert RunLedger().training_figures()["training_flops_per_token"] is None


def test_truncated_back_propagation_is_counted_as_what_it_is():
    """Two recursions of one block without gradient, a third with: torch counts the same."""
    from deepen.check.counted import counted_flops

    block, h = nn.Linear(8, 8, bias=False), torch.randn(5, 8)

    def step() -> None:
        state = h
        with torch.no_grad():
            for _ in range(2):
                state = block(state)
        block(state).sum().backward()

    once = 5 * 8 * 8
    assert (2 * Work.of(once) + Work.of(once, operands=1)).flops == counted_flops(step)
