"""The rules by which one chunk is edited and committed, one by one."""

from typing import Any

from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.refinement import Chunk


def chunk_of(*draft: int) -> Chunk:
    return Chunk(tuple(draft))


def test_the_least_sure_share_is_edited_and_the_rest_are_anchors() -> None:
    chunk = chunk_of(1, 2, 3, 4, 5)
    chunk.edit([20, 30, 40, 50], old=[0.9, 0.1, 0.8, 0.2], new=[0.5, 0.6, 0.7, 0.8], rate=0.5)
    assert chunk.tokens == [1, 2, 30, 4, 50]
    assert chunk.confidence == [1.0, 0.9, 0.6, 0.8, 0.8]
    assert chunk.edited == [False, False, True, False, True]


def test_what_stands_behind_an_edit_is_editable_in_the_next_pass() -> None:
    chunk = chunk_of(1, 2, 3, 4, 5)
    chunk.edit([20, 3, 4, 5], old=[0.1, 0.9, 0.9, 0.9], new=[0.5] * 4, rate=0.25)
    assert chunk.tokens == [1, 20, 3, 4, 5]
    chunk.edit([2, 30, 40, 50], old=[0.9, 0.9, 0.9, 0.1], new=[0.5] * 4, rate=0.25)
    assert chunk.tokens == [1, 20, 30, 40, 50]
    # Position 3 is where that pass began to edit: the next one may change what stands behind it.
    chunk.edit([21, 31, 41, 51], old=[0.9, 0.9, 0.9, 0.9], new=[0.5] * 4, rate=0.0)
    assert chunk.tokens == [1, 20, 30, 41, 51]


def config_with(**fields: Any) -> RecursiveConfig:
    return RecursiveConfig(recursive_enabled=True, commit_mode="refined", **fields)


def test_a_forced_commit_stops_before_the_first_edit_below_the_floor() -> None:
    chunk = chunk_of(1, 2, 3, 4)
    chunk.edit([20, 3, 40], old=[0.1, 0.01, 0.1], new=[0.5, 0.01, 0.2], rate=1.0)
    rules = config_with(min_commit_threshold=0.3, commit_threshold=0.7)
    assert chunk.num_committed(rules, ends=(), pad=None) == 3
    chunk.p_commit = 0.7
    assert chunk.num_committed(rules, ends=(), pad=None) == 4


def test_the_first_token_is_always_committed() -> None:
    chunk = chunk_of(1, 2)
    chunk.length = 0
    assert chunk.num_committed(config_with(), ends=(), pad=None) == 1
    chunk.edit([20], old=[0.1], new=[0.1], rate=1.0)
    assert chunk.num_committed(config_with(enable_length_head=False), ends=(), pad=None) == 1


def test_the_length_head_is_clamped_to_the_chunk() -> None:
    chunk = chunk_of(1, 2, 3)
    chunk.length = 32
    assert chunk.num_committed(config_with(), ends=(2,), pad=3) == 3
    chunk.length = 2
    assert chunk.num_committed(config_with(), ends=(), pad=None) == 2


def test_without_a_length_head_trailing_blanks_stay_out() -> None:
    rules = config_with(enable_length_head=False)
    assert chunk_of(1, 9, 2, 9).num_committed(rules, ends=(9,), pad=None) == 2
    assert chunk_of(1, 0, 2, 0, 0).num_committed(rules, ends=(9,), pad=0) == 3
    assert chunk_of(0, 0).num_committed(rules, ends=(9,), pad=0) == 1


def test_the_tail_of_an_untouched_chunk_stays_as_draft() -> None:
    chunk = chunk_of(1, 2, 3, 4)
    assert chunk.tail(2) == (3, 4)
    chunk.edit([2, 3, 40], old=[0.1] * 3, new=[0.5] * 3, rate=1.0)
    assert chunk.tail(2) == ()
