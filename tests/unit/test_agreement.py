"""Two decodings compared: equal, parted by rounding, or different."""

import math

import pytest
import torch

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.evaluate.agreement import NEAR_TIE_MARGIN, compare, widest_difference
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.stop import StopConfig

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture
def backbone() -> Backbone:
    return Backbone.attach(tiny.build("llama").requires_grad_(False))


def greedy(backbone: Backbone, count: int) -> list[int]:
    return complete(PlainDecoder(backbone), [PROMPT], stop=StopConfig(max_new_tokens=count))[0].tokens


def runner_up(backbone: Backbone, history: list[int]) -> tuple[int, float]:
    """The second-best token behind `history`, and by how much the best one beats it."""
    with torch.no_grad():
        best = backbone.model(torch.tensor([history])).logits[0, -1].topk(2)
    return int(best.indices[1]), float(best.values[0] - best.values[1])


def test_equal_rows_have_no_position(backbone: Backbone) -> None:
    tokens = greedy(backbone, 6)
    agreement = compare(backbone, PROMPT, tokens, list(tokens))
    assert agreement.equal
    assert not agreement.near_tie
    assert str(agreement) == "equal"


def test_a_difference_is_measured_where_it_begins(backbone: Backbone) -> None:
    tokens = greedy(backbone, 6)
    second, gap = runner_up(backbone, [*PROMPT, *tokens[:3]])
    agreement = compare(backbone, PROMPT, tokens, [*tokens[:3], second, 0, 0])
    assert agreement.position == 3
    assert agreement.margin == pytest.approx(gap, abs=1e-5)
    assert gap > NEAR_TIE_MARGIN
    assert not agreement.near_tie
    assert str(agreement).startswith("DIFFERENT at token 3")


def test_a_tie_is_near_only_if_both_tokens_are_as_good(backbone: Backbone) -> None:
    """The head's rows of the best two tokens are made the same, so that rounding alone decides between them."""
    tokens = greedy(backbone, 1)
    second, _ = runner_up(backbone, PROMPT)
    with torch.no_grad():
        weight = backbone.model.lm_head.weight
        weight[second] = weight[tokens[0]]
    tied = compare(backbone, PROMPT, tokens, [second])
    assert tied.near_tie
    assert str(tied).startswith("near-tie at token 0")
    other = next(token for token in range(256) if token not in (tokens[0], second))
    assert not compare(backbone, PROMPT, tokens, [other]).near_tie


def test_a_row_that_ends_sooner_is_different(backbone: Backbone) -> None:
    tokens = greedy(backbone, 5)
    agreement = compare(backbone, PROMPT, tokens, tokens[:3])
    assert (agreement.position, agreement.margin) == (3, math.inf)
    assert not agreement.near_tie


@pytest.mark.parametrize("width", [2, 5, 16])
def test_packed_passes_of_any_width_give_the_same_bits(backbone: Backbone, width: int) -> None:
    backbone.pack()
    assert widest_difference(backbone, list(range(40)), width=width) == 0.0


def test_a_width_that_changes_logits_shows(backbone: Backbone) -> None:
    backbone.pack()
    head = backbone.model.lm_head
    plain_forward = head.forward
    head.forward = lambda x: plain_forward(x) + x.shape[1]
    assert widest_difference(backbone, list(range(40)), width=4) == pytest.approx(3.0, abs=1e-3)
