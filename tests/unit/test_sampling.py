"""Sampling against transformers' processors, against a position-by-position oracle, and against the softmax."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from deepen.core.errors import ConfigError, DeepenError
from deepen.generate import sampling
from deepen.generate.random import gumbel
from deepen.generate.sampling import BatchSampler, SamplingConfig, filtered_scores, processed_scores

seeds = st.integers(0, 2**64 - 1)
probabilities = st.one_of(st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.floats(0.0, 1.0))
configs = st.builds(
    SamplingConfig,
    temperature=st.one_of(st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.floats(0.05, 3.0)),
    top_k=st.one_of(st.just(0), st.integers(1, 60), st.integers(1, 6000)),
    top_p=probabilities,
    min_p=probabilities,
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2.0)),
    seed=seeds,
)
sampled_configs = configs.map(lambda config: dataclasses.replace(config, temperature=config.temperature or 1.0))


@st.composite
def logit_rows(draw, *, max_width=5, max_vocab=6000, dtypes=(torch.float32, torch.float64)):
    """Random logits `[W, V]`: flat or peaked, and in half of the cases on a coarse grid, so that many are equal."""
    width = draw(st.integers(1, max_width))
    vocab_size = draw(st.one_of(st.integers(1, 40), st.integers(257, max_vocab)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = torch.randn(width, vocab_size, generator=generator, dtype=torch.float64) * draw(
        st.sampled_from([0.1, 2.0, 6.0])
    )
    if draw(st.booleans()):
        logits = (logits * 2).round() / 2
    return logits.to(draw(st.sampled_from(dtypes)))


def ids_strategy(vocab_size, *, min_size=0, max_size=12):
    return st.lists(st.integers(0, vocab_size - 1), min_size=min_size, max_size=max_size)


def theirs(config, logits, context):
    """What transformers leaves of one position's logits `[V]` after the ids in `context`."""
    processors = LogitsProcessorList()
    if config.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    if config.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1.0:
        processors.append(TopPLogitsWarper(config.top_p))
    if config.min_p:
        processors.append(MinPLogitsWarper(config.min_p))
    return processors(torch.tensor([context], dtype=torch.int64), logits[None].clone())[0]


def choose_in_order(config, logits, history, drafted):
    """The oracle: plain decoding, one position after the other, each with the whole vocabulary filtered and drawn."""
    tokens = []
    for index, position_logits in enumerate(logits):
        context = [*history, *drafted[:index]]
        scores = processed_scores(position_logits[None], context, [], config)[0]
        if not config.greedy:
            kept = filtered_scores(scores, config)
            scores = kept.double() + gumbel(config.seed, len(context), torch.arange(len(kept)))
        tokens.append(scores.tolist().index(scores.max().item()))
    return tokens


@given(data=st.data(), logits=logit_rows(), config=sampled_configs)
def test_each_position_is_processed_as_in_transformers(data, logits, config):
    width, vocab_size = logits.shape
    history = data.draw(ids_strategy(vocab_size))
    drafted = data.draw(ids_strategy(vocab_size, min_size=width - 1, max_size=width - 1))
    scores = processed_scores(logits, history, drafted, config)
    for index in range(width):
        expected = theirs(config, logits[index], [*history, *drafted[:index]])
        kept = filtered_scores(scores[index], config)
        assert kept.dtype == logits.dtype
        # Which of the tokens tied across the top-p cut stay is open in transformers: its sort isn't stable.
        assert torch.equal(kept.sort().values, expected.sort().values)
        differing = (kept != expected).nonzero().flatten()
        assert len(set(scores[index, differing].tolist())) <= 1


@given(data=st.data(), logits=logit_rows(), config=configs)
def test_choosing_many_is_choosing_one_after_the_other(data, logits, config):
    width, vocab_size = logits.shape
    history = data.draw(ids_strategy(vocab_size))
    drafted = data.draw(ids_strategy(vocab_size, min_size=width - 1, max_size=width + 2))
    chosen = BatchSampler([config]).choose(0, logits, history, drafted)
    assert chosen == choose_in_order(config, logits, history, drafted)


@given(data=st.data(), logits=logit_rows(max_width=6), config=configs)
def test_a_chunk_chosen_in_parts_is_the_same(data, logits, config):
    width, vocab_size = logits.shape
    history = data.draw(ids_strategy(vocab_size))
    drafted = data.draw(ids_strategy(vocab_size, min_size=width, max_size=width))
    cut = data.draw(st.integers(0, width))
    sampler = BatchSampler([config])
    whole = sampler.choose(0, logits, history, drafted)
    parts = []
    for start, end in ((0, cut), (cut, width)):
        if end > start:
            parts += sampler.choose(0, logits[start:end], [*history, *drafted[:start]], drafted[start:end])
    assert parts == whole


@given(data=st.data(), row_configs=st.lists(configs, min_size=1, max_size=4), logits=logit_rows(max_width=3))
def test_rows_keep_their_tokens_in_any_order_and_after_drops(data, row_configs, logits):
    drafted = [0] * len(logits)
    alone = [BatchSampler([config]).choose(0, logits, [1, 2], drafted) for config in row_configs]
    order = data.draw(st.permutations(range(len(row_configs))))
    sampler = BatchSampler([row_configs[row] for row in order])
    assert [sampler.choose(place, logits, [1, 2], drafted) for place in range(len(order))] == [alone[r] for r in order]

    dropped = data.draw(st.sets(st.integers(0, len(order) - 1)))
    sampler.drop(sorted(dropped))
    left = [row for place, row in enumerate(order) if place not in dropped]
    assert [sampler.choose(place, logits, [1, 2], drafted) for place in range(len(left))] == [alone[r] for r in left]


def survivors_of(config, logits, *, num_candidates=(256, 4096), tie_allowance=32):
    """The ids among which each position of `logits` is drawn."""
    found = {}

    def note(survivors, seed, positions):
        for scores, ids, position in zip(survivors.scores, survivors.ids, positions.tolist(), strict=True):
            found[position] = ids[scores > -math.inf].tolist()
        return draw_among(survivors, seed, positions)

    draw_among = sampling._draw_among
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_draw_among", note)
        patch.setattr(sampling, "_NUM_CANDIDATES", num_candidates)
        patch.setattr(sampling, "_TIE_ALLOWANCE", tie_allowance)
        BatchSampler([config]).choose(0, logits, [], [0] * (len(logits) - 1))
    return [found[position] for position in range(len(logits))]


def survivors_by_definition(config, logits):
    kept = [filtered_scores(scores, config) for scores in processed_scores(logits, [], [0] * (len(logits) - 1), config)]
    return [(scores > -math.inf).nonzero().flatten().tolist() for scores in kept]


@pytest.mark.parametrize("num_candidates", [(8, 64), (300, 400)])
@given(logits=logit_rows(max_width=4, max_vocab=500), config=sampled_configs)
def test_the_best_few_candidates_tell_the_survivors(num_candidates, logits, config):
    """With so few candidates every outcome occurs: sure at once, sure among more, never sure."""
    found = survivors_of(config, logits, num_candidates=num_candidates, tie_allowance=2)
    assert found == survivors_by_definition(config, logits)


@given(num_equal=st.integers(1, 20), num_kept=st.integers(1, 20), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_rounding_decides_at_a_cut_as_it_does_in_transformers(num_equal, num_kept, dtype):
    """Cumulative probabilities that are, but for rounding, the threshold."""
    logits = torch.full((1, 600), -1e4, dtype=dtype)
    logits[0, 10 : 10 + num_equal] = 1.0
    config = SamplingConfig(temperature=1.0, top_p=min(1.0, num_kept / num_equal))
    expected = theirs(config, logits[0], []) > -math.inf
    (found,) = survivors_of(config, logits)
    assert len(found) == int(expected.sum())
    assert found == survivors_by_definition(config, logits)[0]


@given(share=st.floats(1e-6, 1.0), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_rounding_decides_at_min_p_as_it_does_in_transformers(share, dtype):
    logits = torch.full((1, 600), -1e4, dtype=dtype)
    logits[0, 10:12] = torch.tensor([0.0, math.log(share)])
    config = SamplingConfig(temperature=1.0, min_p=share)
    expected = theirs(config, logits[0], []) > -math.inf
    assert survivors_of(config, logits) == [expected.nonzero().flatten().tolist()]


def test_a_min_p_below_what_float32_can_tell_apart_is_treated_as_in_transformers():
    logits = torch.tensor([[0.0, -130.0, -150.0] + [-160.0] * 597])
    config = SamplingConfig(temperature=1.0, min_p=1e-60)
    expected = theirs(config, logits[0], []) > -math.inf
    assert expected.all()
    assert survivors_of(config, logits) == [list(range(600))]


def test_ties_of_the_kth_that_go_on_beyond_the_candidates_count_for_top_p():
    logits = torch.full((1, 600), -9.0)
    logits[0, 300:400] = 0.0
    logits[0, 5] = 2.0
    config = SamplingConfig(temperature=1.0, top_k=3, top_p=0.5)
    found = survivors_of(config, logits, tie_allowance=2)
    assert found == survivors_by_definition(config, logits)
    assert len(found[0]) > 40


def test_few_survivors_are_found_without_looking_at_the_whole_vocabulary(monkeypatch):
    def refuse(*_):
        raise AssertionError("the whole vocabulary was filtered")

    logits = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)) * 6
    settings = [
        {"top_k": 40},
        {"top_p": 0.9},
        {"top_p": 0.0},
        {"min_p": 0.05},
        {"top_k": 100, "top_p": 0.9, "min_p": 0.01},
    ]
    rows = [SamplingConfig(temperature=0.7, seed=3, **setting) for setting in settings]
    expected = [choose_in_order(config, logits, [], [0] * 3) for config in rows]
    monkeypatch.setattr(sampling, "filtered_scores", refuse)
    sampler = BatchSampler(rows)
    assert [sampler.choose(row, logits, [], [0] * 3) for row in range(len(rows))] == expected


@pytest.mark.parametrize(
    ("setting", "seed"),
    [
        ({}, 1),
        ({"top_k": 5}, 2),
        ({"top_p": 0.8}, 3),
        ({"min_p": 0.1}, 4),
        ({"top_k": 8, "top_p": 0.9, "min_p": 0.05}, 5),
    ],
    ids=str,
)
def test_tokens_are_as_frequent_as_their_probabilities_say(setting, seed):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(seed))
    config = SamplingConfig(temperature=0.8, seed=seed, **setting)
    num_draws = 4000
    # One position after the other, each with the same logits.
    sampler = BatchSampler([config])
    drawn = torch.tensor(sampler.choose(0, logits.expand(num_draws, -1), [], [0] * (num_draws - 1)))
    counts = torch.bincount(drawn, minlength=12).double()
    expected = theirs(config, logits[0], []).double().softmax(dim=-1) * num_draws

    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = ((counts - expected)[possible].square() / expected[possible]).sum().item()
    degrees = int(possible.sum()) - 1
    # Wilson and Hilferty's approximation of the chi-square quantile that is exceeded with probability 0.001.
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3


def test_other_seeds_give_other_tokens():
    logits = torch.zeros(1, 1000)
    tokens = {
        tuple(BatchSampler([SamplingConfig(temperature=1.0, seed=s)]).choose(0, logits, [], [])) for s in range(20)
    }
    assert len(tokens) >= 18


def test_a_position_counts_the_history():
    config = SamplingConfig(temperature=1.0, seed=9)
    logits = torch.zeros(1, 1000)
    tokens = [BatchSampler([config]).choose(0, logits, [1] * length, [])[0] for length in range(20)]
    assert len(set(tokens)) >= 18
    assert BatchSampler([config]).choose(0, logits.expand(20, -1), [], [1] * 19) == tokens


# Greedy.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 2, 16])
def test_the_lowest_id_wins_among_equals(dtype, width):
    logits = torch.full((width, 4099), -1.0, dtype=dtype)
    firsts = [(index * 523 + 7) % 4000 for index in range(width)]
    for index, first in enumerate(firsts):
        logits[index, [first, first + 1, first + 64, 4098]] = 3.0
    sampler = BatchSampler([SamplingConfig(), SamplingConfig(repetition_penalty=1.5)])
    assert sampler.choose(0, logits, [], [0] * width) == firsts
    assert sampler.choose(1, logits, [4097], [4096] * width) == firsts
    # Not contiguous, either.
    assert sampler.choose(0, logits.T.contiguous().T, [], [0] * width) == firsts


def test_greedy_ignores_what_concerns_drawing():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    config = SamplingConfig(top_k=1, top_p=0.1, min_p=0.9, seed=5)
    assert BatchSampler([config]).choose(0, logits, [0], []) == [1]


def test_a_repeated_token_is_penalized_once_and_from_where_it_appears():
    logits = torch.tensor([[4.0, 3.9, -1.0]] * 4)
    config = SamplingConfig(repetition_penalty=1.1)
    scores = processed_scores(logits, [2, 2], [0, 0, 1], config)
    expected = [[4.0, 3.9, -1.1], [4 / 1.1, 3.9, -1.1], [4 / 1.1, 3.9, -1.1], [4 / 1.1, 3.9 / 1.1, -1.1]]
    assert torch.allclose(scores, torch.tensor(expected))
    assert BatchSampler([config]).choose(0, logits, [2, 2], [0, 0, 1]) == [0, 1, 1, 0]
    assert torch.equal(logits, torch.tensor([[4.0, 3.9, -1.0]] * 4))


def test_ids_beyond_the_heads_vocabulary_are_not_penalized():
    logits = torch.tensor([[1.0, 0.5]])
    assert BatchSampler([SamplingConfig(repetition_penalty=1.5)]).choose(0, logits, [7, 100], []) == [0]


# Cuts.


@pytest.mark.parametrize(
    ("setting", "logits", "kept"),
    [
        ({"top_k": 2}, [1.0, 3.0, 2.0, 2.0, 0.0], [1, 2, 3]),
        ({"top_k": 9}, [1.0, 3.0], [0, 1]),
        ({"top_p": 0.5}, [0.5, 0.25, 0.25], [0]),
        ({"top_p": 0.51}, [0.5, 0.25, 0.25], [0, 2]),
        ({"top_p": 0.0}, [0.25, 0.25, 0.5], [2]),
        ({"min_p": 0.5}, [0.5, 0.25, 0.125], [0, 1]),
        ({"min_p": 1.0}, [0.25, 0.5, 0.5], [1, 2]),
        ({"top_k": 2, "top_p": 0.7}, [0.4, 0.3, 0.2, 0.1], [0, 1]),
        ({"top_p": 0.7, "min_p": 0.9}, [0.4, 0.3, 0.2, 0.1], [0]),
    ],
    ids=str,
)
def test_cuts_fall_where_they_should(setting, logits, kept):
    scores = torch.tensor(logits, dtype=torch.float64)
    scores = scores if "top_k" in setting and len(setting) == 1 else scores.log()
    survivors = filtered_scores(scores, SamplingConfig(temperature=1.0, **setting)).isfinite().nonzero().flatten()
    assert survivors.tolist() == kept


# Margins.


def test_a_greedy_margin_is_the_best_score_less_the_second():
    logits = torch.tensor([[1.0, 4.0, 3.5], [2.0, 2.0, 1.0]])
    sampler = BatchSampler([SamplingConfig()])
    assert sampler.margins(0, logits, [], [0], [1, 0]) == [0.5, 0.0]
    assert sampler.margins(0, logits, [], [0], [0, 2]) == [-3.0, -1.0]


def test_a_greedy_margin_is_of_penalized_logits():
    logits = torch.tensor([[1.0, 4.0, 3.5]], dtype=torch.float64)
    config = SamplingConfig(repetition_penalty=1.25)
    assert BatchSampler([config]).choose(0, logits, [1], []) == [2]
    assert BatchSampler([config]).margins(0, logits, [1], [], [2]) == pytest.approx([3.5 - 3.2])


@given(data=st.data(), logits=logit_rows(max_width=3, max_vocab=400, dtypes=(torch.float64,)), config=configs)
def test_margins_are_positive_for_what_is_chosen_and_negative_for_all_else(data, logits, config):
    width, vocab_size = logits.shape
    drafted = [0] * (width - 1)
    sampler = BatchSampler([config])
    chosen = sampler.choose(0, logits, [1], drafted)
    margins = sampler.margins(0, logits, [1], drafted, chosen)
    assert all(margin > -1e-9 for margin in margins)
    others = [data.draw(st.integers(0, vocab_size - 1)) for _ in range(width)]
    for token, other, margin in zip(chosen, others, sampler.margins(0, logits, [1], drafted, others), strict=True):
        assert margin < 1e-9 or token == other


@given(
    logits=logit_rows(max_width=1, max_vocab=400, dtypes=(torch.float64,)),
    config=sampled_configs,
    share=st.floats(0.01, 0.9),
    noise_seed=st.integers(0, 2**32),
)
def test_no_change_of_scores_below_the_margin_changes_the_choice(logits, config, share, noise_seed):
    config = dataclasses.replace(config, repetition_penalty=1.0)
    sampler = BatchSampler([config])
    chosen = sampler.choose(0, logits, [1], [])
    (margin,) = sampler.margins(0, logits, [1], [], chosen)
    # A gap between two scores closes twice as fast as each of them moves; at a cut, as the best one moves, too.
    most = min(margin, 10.0) / 2 * share * config.temperature
    generator = torch.Generator().manual_seed(noise_seed)
    change = (torch.rand(logits.shape, generator=generator, dtype=torch.float64) * 2 - 1) * max(0.0, most - 1e-9)
    assert sampler.choose(0, logits + change, [1], []) == chosen


@pytest.mark.parametrize(
    ("setting", "logits", "expected"),
    [
        # Tokens by probability: the second would be drawn if it survived.
        ({"top_p": 0.6}, [0.6 + 1e-6, 0.4 - 1e-6], 1e-6),
        ({"min_p": 0.5}, [1 / 1.5, 0.5 / 1.5 * (1 - 1e-6)], 1e-6),
        ({"min_p": 1.0}, [0.75, 0.25], math.log(3)),
        ({"top_k": 1}, [0.5 + 1e-6, 0.5 - 1e-6], 4e-6),
        ({"top_p": 0.1}, [0.5 + 1e-6, 0.5 - 1e-6], 4e-6),
    ],
    ids=str,
)
def test_a_margin_sees_the_token_just_beyond_a_cut(setting, logits, expected):
    scores = torch.tensor([logits], dtype=torch.float64).log()
    noise = [gumbel(seed, 0, torch.arange(2)) for seed in range(50)]
    seed = next(seed for seed, (first, second) in enumerate(noise) if second > first + 2)
    sampler = BatchSampler([SamplingConfig(temperature=1.0, seed=seed, **setting)])
    assert sampler.choose(0, scores, [], []) == [0]
    assert sampler.margins(0, scores, [], [], [0]) == pytest.approx([expected], rel=1e-3)
    assert sampler.margins(0, scores, [], [], [1]) == pytest.approx([-expected], rel=1e-3)


def test_a_cut_that_lets_in_a_loser_is_no_margin():
    scores = torch.tensor([[0.6 + 1e-6, 0.4 - 1e-6]], dtype=torch.float64).log()
    noise = [gumbel(seed, 0, torch.arange(2)) for seed in range(50)]
    seed = next(seed for seed, (first, second) in enumerate(noise) if first > second + 2)
    config = SamplingConfig(temperature=1.0, top_p=0.6, seed=seed)
    # It takes the two to trade ranks, so that the other is all that survives.
    expected = math.log(0.6 / 0.4)
    assert BatchSampler([config]).margins(0, scores, [], [], [0]) == pytest.approx([expected], rel=1e-4)


# Errors.


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": -1.0}, r"temperature must be 0 \(greedy\) or at least 1e-06, not -1.0"),
        ({"temperature": 1e-9}, r"temperature must be 0 \(greedy\) or at least 1e-06, not 1e-09"),
        ({"top_k": -1}, r"top_k must be 0 \(off\) or more, not -1"),
        ({"top_p": 1.5}, r"top_p must be between 0 and 1 \(off\), not 1.5"),
        ({"min_p": -0.1}, r"min_p must be between 0 \(off\) and 1, not -0.1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be above 0 \(1 is off\), not 0.0"),
        ({"seed": 2**64}, r"seed must be between 0 and 2\*\*64 - 1, not 18446744073709551616"),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_named_with_its_range(setting, message):
    with pytest.raises(ConfigError, match=message):
        BatchSampler([SamplingConfig(), SamplingConfig(**setting)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(value, temperature):
    logits = torch.zeros(3, 50)
    logits[1, 7] = value
    sampler = BatchSampler([SamplingConfig(temperature=temperature)])
    with pytest.raises(DeepenError, match=r"NaN or infinite \(in torch\.float32\)"):
        sampler.choose(0, logits, [], [0, 0])


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((50, 600), -math.inf)
    logits[:, [3, 500]] = 0.0
    for setting in ({}, {"top_k": 10}, {"top_p": 0.99}, {"min_p": 0.01}):
        sampler = BatchSampler([SamplingConfig(temperature=1.0, **setting)])
        chosen = sampler.choose(0, logits, [], [0] * 49)
        assert set(chosen) == {3, 500}
        assert all(margin > 0 for margin in sampler.margins(0, logits, [], [0] * 49, chosen))
