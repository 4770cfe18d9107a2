"""Attention of a pass: equal to softmax over what is visible, with bits that depend on nothing else."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from deepen.nn.attention import KEY_BLOCK, Visibility, attend, round_up, undivided

STORED = 1024


def visibility(offsets: list[int], width: int, dtype: torch.dtype = torch.float32) -> Visibility:
    num_keys = round_up(max(offsets) + width, KEY_BLOCK)
    return Visibility(offsets, width, num_keys, device=torch.device("cpu"), dtype=dtype)


def stored(batch: int, heads: int, dim: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, heads, STORED, dim, generator=generator, dtype=dtype)


def one_by_one(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, offsets: list[int], scale: float
) -> torch.Tensor:
    """The plain oracle: a softmax per row, head and position over the entries it may see."""
    batch, num_heads, width, _ = query.shape
    group = num_heads // key.shape[1]
    out = torch.empty(batch, width, num_heads, value.shape[-1], dtype=query.dtype)
    for row in range(batch):
        for head in range(num_heads):
            for i in range(width):
                seen = offsets[row] + i + 1
                scores = key[row, head // group, :seen] @ query[row, head, i] * scale
                out[row, i, head] = scores.softmax(0) @ value[row, head // group, :seen]
    return out


@given(
    offsets=st.lists(st.integers(0, 600), min_size=1, max_size=3),
    width=st.integers(1, 11),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2), (3, 1)]),
    dims=st.sampled_from([(16, 16), (24, 16)]),
)
def test_equals_the_plain_oracle(offsets: list[int], width: int, heads: tuple[int, int], dims: tuple[int, int]) -> None:
    num_heads, num_key_heads = heads
    batch, scale = len(offsets), 0.3
    query = stored(batch, num_heads, dims[0], 1, torch.float64)[:, :, :width]
    key = stored(batch, num_key_heads, dims[0], 2, torch.float64)
    value = stored(batch, num_key_heads, dims[1], 3, torch.float64)
    num_keys = round_up(max(offsets) + width, KEY_BLOCK)
    stores = key[:, :, :num_keys], value[:, :, :num_keys]
    expected = one_by_one(query, key, value, offsets, scale)
    divided, whole = visibility(offsets, width, torch.float64), visibility(offsets, width, torch.float64)
    # As on an accelerator, where a section would be as many kernels as the whole.
    whole.sections = undivided(offsets, width, num_keys, torch.device("cpu"), torch.float64)
    for view in (divided, whole):
        actual = attend(query, *stores, visibility=view, scale=scale)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_only_on_a_cpu_is_a_pass_cut_where_rows_read_more() -> None:
    ragged, num_keys = [5, 300, 5], 3 * KEY_BLOCK
    cut = Visibility(ragged, 4, num_keys, device=torch.device("cpu"), dtype=torch.float32)
    whole = Visibility(ragged, 4, num_keys, device=torch.device("meta"), dtype=torch.float32)
    assert [section.num_keys for section in cut.sections] == [KEY_BLOCK, num_keys, KEY_BLOCK]
    assert [section.num_keys for section in whole.sections] == [num_keys]


def test_the_default_scale_is_one_over_root_width() -> None:
    query, key, value = stored(1, 2, 16, 1)[:, :, :3], stored(1, 2, 16, 2), stored(1, 2, 16, 3)
    first = key[:, :, :KEY_BLOCK], value[:, :, :KEY_BLOCK]
    view = visibility([5], 3)
    by_default = attend(query, *first, visibility=view, scale=None)
    assert torch.equal(by_default, attend(query, *first, visibility=view, scale=1 / math.sqrt(16)))


@given(offset=st.integers(0, 800), width=st.integers(1, 200), heads=st.sampled_from([(9, 3), (4, 2), (4, 4)]))
def test_a_position_has_the_same_bits_at_any_width(offset: int, width: int, heads: tuple[int, int]) -> None:
    query, key, value = stored(1, heads[0], 64, 1), stored(1, heads[1], 64, 2), stored(1, heads[1], 64, 3)

    def run(start: int, count: int) -> torch.Tensor:
        num_keys = round_up(start + count, KEY_BLOCK)
        return attend(
            query[:, :, start : start + count],
            key[:, :, :num_keys],
            value[:, :, :num_keys],
            visibility=visibility([start], count),
            scale=None,
        )

    together = run(offset, width)
    alone = torch.cat([run(offset + i, 1) for i in range(width)], dim=1)
    assert torch.equal(together, alone)


@given(offsets=st.lists(st.integers(0, 600), min_size=2, max_size=5), width=st.integers(1, 9))
def test_a_row_has_the_same_bits_in_any_batch(offsets: list[int], width: int) -> None:
    batch = len(offsets)
    query, key, value = stored(batch, 4, 32, 1)[:, :, :width], stored(batch, 2, 32, 2), stored(batch, 2, 32, 3)
    num_keys = round_up(max(offsets) + width, KEY_BLOCK)
    stores = key[:, :, :num_keys], value[:, :, :num_keys]
    together = attend(query, *stores, visibility=visibility(offsets, width), scale=None)
    for row, offset in enumerate(offsets):
        own_keys = round_up(offset + width, KEY_BLOCK)
        alone = attend(
            query[row : row + 1],
            key[row : row + 1, :, :own_keys],
            value[row : row + 1, :, :own_keys],
            visibility=visibility([offset], width),
            scale=None,
        )
        assert torch.equal(together[row], alone[0])


def test_what_stands_behind_a_position_changes_nothing() -> None:
    query, key, value = stored(1, 2, 16, 1)[:, :, :4], stored(1, 2, 16, 2), stored(1, 2, 16, 3)
    stores = key[:, :, :KEY_BLOCK], value[:, :, :KEY_BLOCK]
    before = attend(query, *stores, visibility=visibility([10], 4), scale=None)
    key[:, :, 12:] += 100
    value[:, :, 12:] -= 100
    after = attend(query, *stores, visibility=visibility([10], 4), scale=None)
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2:], after[:, 2:])
