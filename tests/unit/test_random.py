"""The generator against its published vectors, and what makes the noise independent of how it is asked for."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepen.generate.random import gumbel, philox

ALL_ONES = 0xFFFFFFFF

# Known answers of the Random123 library, "kat_vectors", philox4x32 10.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

seeds = st.integers(0, 2**64 - 1)
positions = st.integers(0, 2**63 - 1)
token_lists = st.lists(st.integers(0, ALL_ONES), min_size=1, max_size=40)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


def test_philox_takes_many_counters_at_once_and_leaves_them_alone():
    counters = tuple(torch.tensor(column) for column in zip(*(counter for counter, _, _ in KNOWN_ANSWERS), strict=True))
    before = [words.clone() for words in counters]
    for index, (_, key, expected) in enumerate(KNOWN_ANSWERS):
        assert tuple(int(words[index]) for words in philox(counters, key)) == expected
    assert all(torch.equal(now, then) for now, then in zip(counters, before, strict=True))


@given(words=st.tuples(*[st.integers(0, ALL_ONES)] * 4), key=st.tuples(*[st.integers(0, ALL_ONES)] * 2))
def test_philox_agrees_with_unbounded_integers(words, key):
    state, (left, right) = list(words), key
    for _ in range(10):
        product, other = state[0] * 0xD2511F53, state[2] * 0xCD9E8D57
        state = [
            (other >> 32) ^ state[1] ^ left,
            other & ALL_ONES,
            (product >> 32) ^ state[3] ^ right,
            product & ALL_ONES,
        ]
        left, right = (left + 0x9E3779B9) & ALL_ONES, (right + 0xBB67AE85) & ALL_ONES
    assert [int(word) for word in philox(tuple(torch.tensor(word) for word in words), key)] == state


@given(seed=seeds, position=positions, tokens=token_lists)
def test_noise_of_a_token_is_the_same_alone_and_among_others(seed, position, tokens):
    together = gumbel(seed, position, torch.tensor(tokens))
    assert together.dtype == torch.float64
    assert [gumbel(seed, position, torch.tensor([token])).item() for token in tokens] == together.tolist()


@given(seed=seeds, first=st.integers(0, 2**62), tokens=token_lists)
def test_positions_broadcast_against_tokens(seed, first, tokens):
    rows = torch.arange(first, first + 3)
    grid = gumbel(seed, rows[:, None], torch.tensor(tokens))
    assert grid.shape == (3, len(tokens))
    for row, position in zip(grid, rows.tolist(), strict=True):
        assert torch.equal(row, gumbel(seed, position, torch.tensor(tokens)))


@pytest.mark.parametrize("other", [(1 << 32, 7, 3), (0, 7 + (1 << 32), 3), (0, 8, 3), (1, 7, 3), (0, 7, 4)], ids=str)
def test_every_part_of_the_key_counts(other):
    seed, position, token = other
    assert gumbel(0, 7, torch.tensor([3])).item() != gumbel(seed, position, torch.tensor([token])).item()


@given(seed=seeds, position=positions)
def test_noise_is_finite_and_within_the_documented_bounds(seed, position):
    noise = gumbel(seed, position, torch.arange(1000))
    assert -3.7 < noise.min().item() <= noise.max().item() < 36.8


def test_bounds_hold_for_the_extreme_words(monkeypatch):
    for word, bound in ((0, -3.7), (ALL_ONES, 36.8)):
        monkeypatch.setattr("deepen.generate.random.philox", lambda counter, key, w=word: (torch.tensor([w]),) * 4)
        noise = gumbel(0, 0, torch.tensor([0])).item()
        assert math.isfinite(noise)
        assert abs(noise - bound) < 0.1


def test_noise_has_a_gumbel_distribution():
    noise = gumbel(20, torch.arange(200)[:, None], torch.arange(1000)).flatten().sort().values
    expected = torch.exp(-torch.exp(-noise))
    steps = torch.arange(1, len(noise) + 1, dtype=torch.float64) / len(noise)
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is exceeded with probability 0.001.
    assert (expected - steps).abs().max().item() < 1.95 / math.sqrt(len(noise))


def test_neighbours_in_seed_position_and_token_are_uncorrelated():
    tokens = torch.arange(5000)
    base = gumbel(5, 11, tokens)
    for other in (gumbel(6, 11, tokens), gumbel(5, 12, tokens), gumbel(5, 11, tokens + 1)):
        correlation = torch.corrcoef(torch.stack([base, other]))[0, 1].item()
        assert abs(correlation) < 4 / math.sqrt(len(tokens))
