"""Losses of both modes against plain loops in float64, with empty, partial and full masks."""

import math
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepen.methods.chunk.losses import (
    binary_cross_entropy,
    cross_entropy,
    divergence_between,
    expected_passes,
    length_loss,
    right_prefix,
    should_halt,
    slot_weights,
    weighted_divergence,
)

NUM_CHUNKS, NUM_PLACES, VOCAB_SIZE, NUM_PASSES = 3, 4, 5, 4

MASKS = {
    "empty": torch.zeros(NUM_CHUNKS, NUM_PLACES, dtype=torch.bool),
    "partial": torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]).bool(),
    "full": torch.ones(NUM_CHUNKS, NUM_PLACES, dtype=torch.bool),
}
every_mask = pytest.mark.parametrize("counted", MASKS.values(), ids=MASKS.keys())
seeds = st.integers(0, 2**31 - 1)


def noise(*shape: int, seed: int, std: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(*shape, generator=generator, dtype=torch.float64)


def logits_of(seed: int) -> Tensor:
    return noise(NUM_CHUNKS, NUM_PLACES, VOCAB_SIZE, seed=seed)


def ids_of(seed: int) -> Tensor:
    return torch.randint(VOCAB_SIZE, (NUM_CHUNKS, NUM_PLACES), generator=torch.Generator().manual_seed(seed))


def log_probabilities(logits: Sequence[float]) -> list[float]:
    total = math.log(sum(math.exp(logit) for logit in logits))
    return [logit - total for logit in logits]


def divergence_of_rows(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Of what is ours from what is theirs: the mean, by their probabilities, of how much likelier they hold a token."""
    pairs = zip(log_probabilities(theirs), log_probabilities(ours), strict=True)
    return sum(math.exp(their) * (their - our) for their, our in pairs)


def value_and_gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor]:
    leaf = at.clone().requires_grad_()
    value = loss(leaf)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def assert_gradient_is_of(
    gradient: Tensor, loss: Callable[[Tensor], Tensor], at: Tensor, *, step: float = 1e-5
) -> None:
    """Against central differences."""
    for place in product(*map(range, at.shape)):
        nudge = torch.zeros_like(at)
        nudge[place] = step
        slope = (loss(at + nudge).sum() - loss(at - nudge).sum()) / (2 * step)
        assert gradient[place].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-8)


# Cross entropy


@every_mask
def test_cross_entropy_is_a_sum_over_what_counts(counted: Tensor) -> None:
    logits, ids = logits_of(0), ids_of(1)
    value, gradient = value_and_gradient(lambda x: cross_entropy(x, ids, counted), logits)
    expected = sum(
        -log_probabilities(logits[row, place].tolist())[ids[row, place]] for row, place in counted.nonzero().tolist()
    )
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(float(expected), rel=1e-12, abs=0)
    assert (gradient[~counted] == 0).all()
    one_hot = torch.nn.functional.one_hot(ids, VOCAB_SIZE)
    torch.testing.assert_close(gradient[counted], (logits.softmax(dim=-1) - one_hot)[counted])


def test_cross_entropy_takes_each_places_logits_for_its_own_id() -> None:
    ids = torch.tensor([[0, 1, 2, 3]])
    logits = 100.0 * torch.nn.functional.one_hot(ids, VOCAB_SIZE).double()
    counted = torch.ones(1, 4, dtype=torch.bool)
    assert cross_entropy(logits, ids, counted) < 1e-30
    assert cross_entropy(logits[:, :-1], ids[:, 1:], counted[:, 1:]) == pytest.approx(300.0)


@pytest.mark.parametrize("outside", [float("nan"), float("inf")])
def test_what_does_not_count_may_be_anything(outside: float) -> None:
    counted, ids = MASKS["partial"], ids_of(1)
    logits = logits_of(0)
    broken = torch.where(counted[..., None], logits, outside)
    for loss in (
        lambda x: cross_entropy(x, ids, counted),
        lambda x: divergence_between(broken, x, counted),
    ):
        value, gradient = value_and_gradient(loss, broken)
        assert value.isfinite() and gradient.isfinite().all()
    assert cross_entropy(broken, ids, counted) == cross_entropy(logits, ids, counted)
    before = logits_of(2)
    expected = divergence_between(before, logits, counted)
    assert divergence_between(torch.where(counted[..., None], before, outside), broken, counted) == expected


# Divergence from the base


@pytest.mark.parametrize("number", [0, 1, 6])
def test_weighted_divergence_is_of_the_slots_from_the_base(number: int) -> None:
    ours, theirs = noise(number, VOCAB_SIZE, seed=0), noise(number, VOCAB_SIZE, seed=1)
    weights = torch.arange(number).double() / 2
    value, gradient = value_and_gradient(lambda x: weighted_divergence(x, theirs, weights), ours)
    rows = zip(ours.tolist(), theirs.tolist(), weights.tolist(), strict=True)
    expected = sum(weight * divergence_of_rows(our, their) for our, their, weight in rows)
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(float(expected), rel=1e-12, abs=0)
    # At weight zero exactly zero.
    torch.testing.assert_close(
        gradient, weights[:, None] * (ours.softmax(dim=-1) - theirs.softmax(dim=-1)), rtol=1e-10, atol=1e-15
    )
    assert (gradient[weights == 0] == 0).all()


def test_weighted_divergence_is_zero_where_both_say_the_same() -> None:
    """However their logits are shifted."""
    theirs = noise(6, VOCAB_SIZE, seed=1)
    value, gradient = value_and_gradient(lambda x: weighted_divergence(x, theirs, torch.ones(6)), theirs + 3)
    assert abs(value.item()) < 1e-14 and gradient.abs().max() < 1e-14


@given(st.lists(st.integers(1, 127), max_size=8), st.sampled_from([0.5, 1.0, 4.0, 30.0]))
def test_slot_weights_fall_by_e_over_gamma_slots(numbers: list[int], gamma: float) -> None:
    found = slot_weights(torch.tensor(numbers, dtype=torch.long), gamma)
    assert found.tolist() == pytest.approx([math.exp(-(number - 1) / gamma) for number in numbers], rel=1e-5)
    assert found.dtype == torch.float32
    assert slot_weights(torch.tensor([1]), gamma).item() == 1.0


# Halting


@every_mask
def test_binary_cross_entropy_is_a_sum_over_what_counts(counted: Tensor) -> None:
    logit = noise(NUM_CHUNKS, NUM_PLACES, seed=0)
    label = noise(NUM_CHUNKS, NUM_PLACES, seed=1) > 0
    value, gradient = value_and_gradient(lambda x: binary_cross_entropy(x, label, counted), logit)
    expected = 0.0
    for row, place in counted.nonzero().tolist():
        p = 1 / (1 + math.exp(-float(logit[row, place])))
        expected -= math.log(p if label[row, place] else 1 - p)
    assert value.shape == () and value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, rel=1e-12, abs=0)
    assert (gradient[~counted] == 0).all()
    torch.testing.assert_close(gradient[counted], (logit.sigmoid() - label.to(logit.dtype))[counted])


def test_binary_cross_entropy_takes_a_list_as_well() -> None:
    logit, label = torch.tensor([0.25, 0.5, 0.125]).logit(), torch.tensor([True, False, False])
    found = binary_cross_entropy(logit, label, torch.tensor([True, True, False]))
    assert found.item() == pytest.approx(math.log(4) + math.log(2))


@pytest.mark.parametrize("label", [False, True])
def test_a_head_that_is_sure_and_wrong_still_learns(label: bool) -> None:
    logit = torch.tensor([200.0 if not label else -200.0], dtype=torch.float32)
    labels = torch.tensor([label])
    value, gradient = value_and_gradient(lambda x: binary_cross_entropy(x, labels, torch.tensor([True])), logit)
    assert value.item() == pytest.approx(200)
    assert gradient.abs().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("margin", "expected"),
    [
        (0.25, [True, True, True, True]),
        (0.2499, [False, True, True, True]),
        (0.125, [False, True, True, True]),
        (0.1249, [False, False, True, True]),
        (0.0, [False, False, True, True]),
    ],
)
def test_a_chunk_should_halt_where_one_more_pass_lowers_its_loss_by_no_more_than_the_margin(
    margin: float, expected: list[bool]
) -> None:
    """Losses that fall by 1/4 and 1/8, then rise: all of them exact in float32."""
    after = [torch.tensor([loss]) for loss in (1.0, 0.75, 0.625, 0.6875)]
    assert should_halt(after, margin).tolist() == [expected]


def test_a_loss_that_stays_does_not_ask_for_another_pass() -> None:
    assert should_halt([torch.tensor([0.5]), torch.tensor([0.5])], 0.0).tolist() == [[True, True]]


@given(
    st.lists(st.lists(st.integers(0, 8), min_size=3, max_size=3), min_size=1, max_size=5), st.sampled_from([0, 1, 3])
)
def test_should_halt_judges_each_chunk_and_pass_for_itself(eighths: list[list[int]], margin: int) -> None:
    """`eighths[pass][chunk]`; behind the last pass there is none."""
    found = should_halt([torch.tensor(of_pass) / 8 for of_pass in eighths], margin / 8)
    expected = [
        [
            number + 1 == len(eighths) or eighths[number][chunk] - eighths[number + 1][chunk] <= margin
            for number in range(len(eighths))
        ]
        for chunk in range(3)
    ]
    assert found.dtype == torch.bool and found.tolist() == expected


def passes_by_enumeration(p_commit: Tensor) -> Tensor:
    """`[R]`: over all outcomes of the coins thrown after each pass, the first head's number, or K without one."""
    num_passes = p_commit.shape[1]
    total = torch.zeros_like(p_commit[:, 0])
    for heads in product([False, True], repeat=num_passes):
        probability = torch.ones_like(total)
        for number, is_head in enumerate(heads):
            probability = probability * (p_commit[:, number] if is_head else 1 - p_commit[:, number])
        total = total + probability * (heads.index(True) + 1 if any(heads) else num_passes)
    return total


@pytest.mark.parametrize("num_passes", [1, 2, 5])
@pytest.mark.parametrize("num_chunks", [0, 3])
def test_expected_passes_are_those_of_all_halting_histories(num_passes: int, num_chunks: int) -> None:
    p_commit = noise(num_chunks, num_passes, seed=0).sigmoid()
    value, gradient = value_and_gradient(expected_passes, p_commit)
    expected, slopes = value_and_gradient(passes_by_enumeration, p_commit)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, slopes)
    # Whatever the last pass says, it is the last.
    assert (gradient[:, -1] == 0).all() and (gradient[:, :-1] < 0).all()


def test_expected_passes_of_heads_that_are_sure() -> None:
    p_commit = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    value, gradient = value_and_gradient(expected_passes, p_commit)
    assert value.tolist() == [1.0, 3.0, 4.0, 1.0]
    # With a little less at a place, all passes behind it that are sure to come are as much likelier.
    expected = [[-3.0, 0.0, 0.0, 0.0], [-2.0, -1.0, -1.0, 0.0], [-3.0, -2.0, -1.0, 0.0], [-1.0, 0.0, 0.0, 0.0]]
    assert gradient.tolist() == expected


# Lengths


def test_length_loss_is_a_sum_over_chunks() -> None:
    lengths = torch.tensor([0, VOCAB_SIZE - 1, 2, 2])
    log_probs = noise(4, VOCAB_SIZE, seed=0).log_softmax(dim=-1)
    value, gradient = value_and_gradient(lambda x: length_loss(x, lengths), log_probs)
    expected = -sum(float(log_probs[row, length]) for row, length in enumerate(lengths.tolist()))
    assert value.shape == () and value.item() == pytest.approx(expected, rel=1e-12)
    assert torch.equal(gradient, -torch.nn.functional.one_hot(lengths, VOCAB_SIZE).double())


def test_length_loss_of_no_chunk_is_zero() -> None:
    value, gradient = value_and_gradient(
        lambda x: length_loss(x, torch.zeros(0, dtype=torch.long)), torch.zeros(0, VOCAB_SIZE)
    )
    assert value.item() == 0.0 and gradient.shape == (0, VOCAB_SIZE)


@given(
    st.lists(
        st.tuples(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), min_size=6, max_size=6), st.integers(0, 6)),
        min_size=1,
        max_size=4,
    )
)
def test_right_prefix_is_what_a_loop_finds(chunks: list[tuple[list[tuple[int, int]], int]]) -> None:
    """One token in three is made wrong; what stands behind a chunk is not right, even where it is the same."""
    gold = torch.tensor([[token for _, token in tokens] for tokens, _ in chunks])
    ids = torch.tensor([[token if kept else 1 - token for kept, token in tokens] for tokens, _ in chunks])
    found = right_prefix(ids, gold, torch.tensor([size for _, size in chunks]))
    expected = []
    for row, (_, size) in enumerate(chunks):
        length = 0
        while length < size and ids[row, length] == gold[row, length]:
            length += 1
        expected.append([True] * length + [False] * (6 - length))
    assert found.dtype == torch.bool and found.tolist() == expected


# Between passes


@every_mask
def test_divergence_between_passes_is_a_sum_over_what_counts(counted: Tensor) -> None:
    before, now = logits_of(0), logits_of(1)
    value, gradient = value_and_gradient(lambda x: divergence_between(before, x, counted), now)
    expected = sum(
        divergence_of_rows(now[row, place].tolist(), before[row, place].tolist())
        for row, place in counted.nonzero().tolist()
    )
    assert value.shape == () and value.item() == pytest.approx(float(expected), rel=1e-12, abs=0)
    assert (gradient[~counted] == 0).all()
    torch.testing.assert_close(gradient[counted], (now.softmax(dim=-1) - before.softmax(dim=-1))[counted])


def test_no_gradient_goes_into_the_pass_before() -> None:
    before, now = logits_of(0).requires_grad_(), logits_of(1).requires_grad_()
    total = divergence_between(before, now, MASKS["partial"])
    of_before, of_now = torch.autograd.grad(total, [before, now], allow_unused=True)
    assert of_before is None and of_now.any()
    # Nor where both are made of the same: only what is done now is moved.
    shared = logits_of(2).requires_grad_()
    (of_shared,) = torch.autograd.grad(divergence_between(shared, shared * 2, MASKS["full"]), shared)
    (alone,) = torch.autograd.grad(divergence_between(shared.detach(), shared * 2, MASKS["full"]), shared)
    assert torch.equal(of_shared, alone)


# Precision


LOSSES_OF_LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": lambda ours, theirs: cross_entropy(ours, ids_of(1), MASKS["partial"]),
    "weighted_divergence": lambda ours, theirs: weighted_divergence(
        ours.flatten(0, 1), theirs.flatten(0, 1), slot_weights(torch.arange(1, NUM_CHUNKS * NUM_PLACES + 1), 4.0)
    ),
    "divergence_between": lambda ours, theirs: divergence_between(theirs, ours, MASKS["partial"]),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LOSSES_OF_LOGITS)
def test_short_logits_are_widened_before_anything_is_summed(name: str, dtype: torch.dtype) -> None:
    loss = LOSSES_OF_LOGITS[name]
    ours, theirs = logits_of(3).to(dtype), logits_of(4).to(dtype)
    value, gradient = value_and_gradient(lambda x: loss(x, theirs), ours)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(value, loss(ours.float(), theirs.float()))
    assert value.item() == pytest.approx(loss(ours.double(), theirs.double()).item(), rel=1e-5)


@pytest.mark.parametrize("name", LOSSES_OF_LOGITS)
def test_float64_stays_float64(name: str) -> None:
    loss, theirs = LOSSES_OF_LOGITS[name], logits_of(4)
    value, gradient = value_and_gradient(lambda x: loss(x, theirs), logits_of(3))
    assert value.dtype == torch.float64
    assert_gradient_is_of(gradient, lambda x: loss(x, theirs), logits_of(3))
