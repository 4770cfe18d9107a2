"""Chunks drawn from texts, and their corruption: against a slow walk along each text, and by counting many draws."""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, groupby
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from deepen.core.types import Batch, Progress
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.rows import (
    CLEAN,
    OWN_DRAFT,
    RANDOM,
    SLOT,
    ChunkBatch,
    draw_rows,
    own_draft_share_at,
)

VOCAB_SIZE = 11
BEGINNING = Progress(0, 10)
MODES: tuple[dict[str, Any], ...] = (
    {"commit_mode": "exact"},
    {"commit_mode": "refined"},
    {"commit_mode": "refined", "carry_state": True},
)
modes = st.sampled_from(MODES)
seeds = st.integers(0, 2**31 - 1)
chunk_widths = st.integers(2, 17)
nums_anchors = st.integers(1, 9)
least_anchors = st.integers(0, 2)
nums_places = st.none() | st.integers(0, 44)


def batch_of(
    lengths: Sequence[int], *, seed: int, num_pads: int = 0, new_document: float | None, learned: float | None
) -> Batch:
    """Random ids; so many pads behind the longest text; the shares of tokens that begin a document, and are learned.

    What stands at pads looks like a text that goes on: only `lengths` tell.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + num_pads)
    begins, draws = torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
    return Batch(
        torch.randint(0, VOCAB_SIZE, shape, generator=generator),
        torch.tensor(lengths),
        documents=None if new_document is None else (begins < new_document).long().cumsum(dim=1),
        learned=None if learned is None else draws < learned,
    )


batches = st.builds(
    batch_of,
    st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seed=seeds,
    num_pads=st.integers(0, 3),
    new_document=st.sampled_from([None, 0.05, 0.3]),
    learned=st.sampled_from([None, 0.95, 0.8, 0.3]),
)


def config_of(**fields: Any) -> RecursiveConfig:
    return RecursiveConfig(recursive_enabled=True, **{"phase": "a", **fields})


def drawn(
    batch: Batch,
    *,
    seed: int,
    progress: Progress = BEGINNING,
    least_anchor: int = 0,
    num_places: int | None = None,
    **fields: Any,
) -> ChunkBatch:
    """Chunks of the batch, all that is random from one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return draw_rows(
            batch,
            config_of(**fields),
            progress,
            vocab_size=VOCAB_SIZE,
            least_anchor=least_anchor,
            num_places=num_places,
        )


def chunks_of(batch: ChunkBatch, text: int) -> list[tuple[int, int]]:
    """Anchor and size of each chunk of a text, in the order of their numbers."""
    pairs = zip(batch.anchors[text].tolist(), batch.sizes[text].tolist(), strict=True)
    return [(anchor, size) for anchor, size in pairs if size > 0]


def all_chunks(batch: ChunkBatch) -> list[tuple[int, int, int]]:
    """Text, anchor and size of every chunk."""
    return [(text, *chunk) for text in range(len(batch.lengths)) for chunk in chunks_of(batch, text)]


def longest_chunk(batch: Batch, text: int, anchor: int, *, chunk_width: int, num_places: int | None) -> int:
    """Tokens of the chunk that may stand behind a token, found by walking along the text: 0 if not even two may."""
    end = min(int(batch.lengths[text]), anchor + 1 + chunk_width)
    end = end if num_places is None else min(end, num_places)
    size = 0
    for place in range(anchor + 1, end):
        if batch.documents is not None and batch.documents[text, place] != batch.documents[text, anchor]:
            break
        if size > 0 and batch.learned is not None and not batch.learned[text, place]:
            break
        size += 1
    return size if size >= 2 else 0


def possible_chunks(
    batch: Batch, text: int, *, chunk_width: int, least_anchor: int = 0, num_places: int | None = None
) -> dict[int, int]:
    """Anchor to size of every chunk that may be drawn of a text."""
    sizes = {
        anchor: longest_chunk(batch, text, anchor, chunk_width=chunk_width, num_places=num_places)
        for anchor in range(least_anchor, int(batch.lengths[text]))
    }
    return {anchor: size for anchor, size in sizes.items() if size > 0}


# Where chunks are


@given(batches, modes, chunk_widths, nums_anchors, seeds, least_anchors, nums_places)
def test_a_chunk_is_learned_text_of_one_document_behind_a_given_token(
    batch: Batch,
    mode: dict[str, Any],
    chunk_width: int,
    num_anchors: int,
    seed: int,
    least_anchor: int,
    num_places: int | None,
) -> None:
    rows = drawn(
        batch, seed=seed, least_anchor=least_anchor, num_places=num_places,
        chunk_width=chunk_width, anchors_per_text=num_anchors, **mode,
    )  # fmt: skip
    for text, anchor, size in all_chunks(rows):
        end = anchor + 1 + size
        assert anchor >= least_anchor
        assert 2 <= size <= chunk_width
        assert end <= batch.lengths[text]
        assert num_places is None or end <= num_places
        assert batch.documents is None or len(batch.documents[text, anchor:end].unique()) == 1
        assert batch.learned is None or batch.learned[text, anchor + 2 : end].all()
    for text in range(len(batch.lengths)):
        anchors = [anchor for anchor, _ in chunks_of(rows, text)]
        assert anchors == sorted(set(anchors)) and len(anchors) <= num_anchors


@given(batches, modes, chunk_widths, nums_anchors, seeds, least_anchors, nums_places)
def test_chunks_are_those_that_a_walk_along_the_text_finds(
    batch: Batch,
    mode: dict[str, Any],
    chunk_width: int,
    num_anchors: int,
    seed: int,
    least_anchor: int,
    num_places: int | None,
) -> None:
    """As many of them as were asked for, if there are; with carried states one behind the other."""
    rows = drawn(
        batch, seed=seed, least_anchor=least_anchor, num_places=num_places,
        chunk_width=chunk_width, anchors_per_text=num_anchors, **mode,
    )  # fmt: skip
    for text in range(len(batch.lengths)):
        possible = possible_chunks(
            batch, text, chunk_width=chunk_width, least_anchor=least_anchor, num_places=num_places
        )
        found = chunks_of(rows, text)
        assert found == [(anchor, possible[anchor]) for anchor, _ in found]
        if not mode.get("carry_state"):
            assert len(found) == min(num_anchors, len(possible))
        else:
            assert bool(found) == bool(possible)
            assert found == (consecutive(found[0][0], possible, chunk_width, num_anchors) if found else [])


def consecutive(first: int, possible: dict[int, int], chunk_width: int, at_most: int) -> list[tuple[int, int]]:
    """Chunks from an anchor on, each behind the last token of the one before it, which is a full one."""
    found, anchor = [(first, possible[first])], first
    while len(found) < at_most and possible[anchor] == chunk_width and anchor + chunk_width in possible:
        anchor += chunk_width
        found.append((anchor, possible[anchor]))
    return found


def test_carried_states_go_from_a_chunk_to_the_one_behind_it_and_no_further_than_the_document() -> None:
    """By hand: documents of 12 and 8 tokens, chunks of 3; an anchor drawn at 0 leads to 3 and 6, with 2 tokens left."""
    batch = Batch(torch.zeros(1, 20).long(), torch.tensor([20]), documents=torch.tensor([[0] * 12 + [1] * 8]))
    found = {
        first: chunks_of(rows, 0)
        for rows in (drawn(batch, seed=seed, chunk_width=3, anchors_per_text=5, **MODES[2]) for seed in range(200))
        for first in [int(rows.anchors[0, 0])]
    }
    assert sorted(found) == [*range(10), *range(12, 18)]
    assert found[0] == [(0, 3), (3, 3), (6, 3), (9, 2)]
    assert found[2] == [(2, 3), (5, 3), (8, 3)]
    assert found[13] == [(13, 3), (16, 3)]
    assert found[17] == [(17, 2)]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_text_without_room_has_no_chunk(mode: dict[str, Any]) -> None:
    learned = torch.ones(4, 6, dtype=torch.bool)
    learned[3] = torch.tensor([True, True, False, True, False, True])
    learned[3, 2:] = False
    documents = torch.tensor([[0] * 6, [0] * 6, [0, 0, 1, 1, 2, 2], [0] * 6])
    batch = Batch(torch.zeros(4, 6).long(), torch.tensor([1, 2, 6, 6]), documents, learned)
    rows = drawn(batch, seed=0, chunk_width=4, **mode)
    assert not rows.sizes.any() and len(rows.chunks()) == 0
    assert (rows.num_chunks, rows.num_targets, rows.num_masked) == (0, 0, 0)


def test_the_first_token_of_a_chunk_may_be_one_that_is_not_learned() -> None:
    """The clean prefix decides it; so it is with the first chunk behind a prompt, and where two answers touch."""
    learned = torch.tensor([[False, False, False, True, True, False, True, True]])
    batch = Batch(torch.zeros(1, 8).long(), torch.tensor([8]), learned=learned)
    rows = drawn(batch, seed=0, chunk_width=4, anchors_per_text=8, commit_mode="exact")
    assert chunks_of(rows, 0) == [(1, 3), (2, 2), (4, 3), (5, 2)]


@pytest.mark.parametrize("num_places", [None, 5])
def test_chunks_of_one_token_predict_nothing_and_are_not_drawn(num_places: int | None) -> None:
    """Whether or not the base has a longest context."""
    batch = Batch(torch.zeros(2, 9).long(), torch.tensor([9, 7]))
    for mode in MODES:
        rows = drawn(batch, seed=0, chunk_width=1, num_places=num_places, **mode)
        assert rows.num_chunks == 0


# A text with gaps: possible anchors 0, 1, 4, 5 and 9.
GAPS = {
    "documents": [0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 2],
    "learned": [1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1],
}
NUM_TEXTS = 4000


def same_texts(**fields: list[int]) -> Batch:
    """One text many times, so that one draw is many."""
    per_token = {name: torch.tensor([values] * NUM_TEXTS) for name, values in fields.items()}
    documents, learned = per_token["documents"], per_token["learned"].bool()
    return Batch(torch.zeros_like(documents), torch.full((NUM_TEXTS,), documents.shape[1]), documents, learned)


def assert_equally_often(counts: Counter[Any], possible: Sequence[Any]) -> None:
    """Each within five standard deviations of its share of `NUM_TEXTS` draws."""
    share = 1 / len(possible)
    expected, deviation = NUM_TEXTS * share, (NUM_TEXTS * share * (1 - share)) ** 0.5
    assert sum(counts.values()) == NUM_TEXTS and set(counts) == set(possible)
    assert {each: count for each, count in counts.items() if abs(count - expected) > 5 * deviation} == {}


@pytest.mark.parametrize("commit_mode", ["exact", "refined"])
def test_every_pair_of_anchors_is_drawn_about_equally_often(commit_mode: str) -> None:
    batch = same_texts(**GAPS)
    possible = sorted(possible_chunks(batch, 0, chunk_width=3))
    assert possible == [0, 1, 4, 5, 9]
    rows = drawn(batch, seed=3, chunk_width=3, anchors_per_text=2, commit_mode=commit_mode)
    counts = Counter(tuple(pair) for pair in rows.anchors.tolist())
    assert_equally_often(counts, list(combinations(possible, 2)))


def test_chains_begin_at_every_anchor_about_equally_often() -> None:
    rows = drawn(same_texts(**GAPS), seed=3, chunk_width=3, anchors_per_text=2, **MODES[2])
    assert_equally_often(Counter(rows.anchors[:, 0].tolist()), [0, 1, 4, 5, 9])


@given(batches, modes, seeds)
def test_the_same_torch_seed_gives_the_same_rows(batch: Batch, mode: dict[str, Any], seed: int) -> None:
    one, other = (drawn(batch, seed=seed, chunk_width=5, **mode) for _ in range(2))
    assert tensors(one).keys() == tensors(other).keys()
    assert all(torch.equal(tensor, tensors(other)[name]) for name, tensor in tensors(one).items())


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_another_torch_seed_gives_other_rows(mode: dict[str, Any]) -> None:
    batch = batch_of([40] * 5, seed=0, new_document=None, learned=None)
    one, other = (tensors(drawn(batch, seed=seed, chunk_width=9, anchors_per_text=2, **mode)) for seed in (1, 2))
    same = {name for name in one if torch.equal(one[name], other[name])}
    assert same <= {"input_ids", "lengths", "sizes"}


def tensors(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in vars(batch).items() if value is not None}


# Chunks as rows


@given(batches, modes, chunk_widths, nums_anchors, seeds)
def test_chunks_as_rows_hold_the_tokens_of_their_texts(
    batch: Batch, mode: dict[str, Any], chunk_width: int, num_anchors: int, seed: int
) -> None:
    rows = drawn(batch, seed=seed, chunk_width=chunk_width, anchors_per_text=num_anchors, **mode)
    chunks, expected = rows.chunks(), all_chunks(rows)
    assert len(chunks) == len(expected) == rows.num_chunks
    assert chunks.width == max((size for _, _, size in expected), default=0)
    for row, (text, anchor, size) in enumerate(expected):
        number = int(chunks.numbers[row])
        assert (int(chunks.texts[row]), int(chunks.anchors[row]), int(chunks.sizes[row])) == (text, anchor, size)
        assert (int(rows.anchors[text, number]), int(rows.sizes[text, number])) == (anchor, size)
        assert chunks.given[row] == batch.input_ids[text, anchor]
        assert chunks.ids[row, :size].tolist() == batch.input_ids[text, anchor + 1 : anchor + 1 + size].tolist()
        assert chunks.targets[row].tolist() == [0 < place < size for place in range(chunks.width)]
    assert int(chunks.targets.sum()) == rows.num_targets == sum(size - 1 for _, _, size in expected)


@given(batches, modes, chunk_widths, seeds)
def test_of_number_is_one_chunk_of_each_text_that_has_so_many(
    batch: Batch, mode: dict[str, Any], chunk_width: int, seed: int
) -> None:
    rows = drawn(batch, seed=seed, chunk_width=chunk_width, anchors_per_text=3, **mode)
    for number in range(4):
        expected = [
            (text, *found[number]) for text in range(len(batch.lengths)) if len(found := chunks_of(rows, text)) > number
        ]
        chunks = rows.chunks().of_number(number)
        columns = chunks.texts.tolist(), chunks.anchors.tolist(), chunks.sizes.tolist()
        assert list(zip(*columns, strict=True)) == expected
        assert chunks.numbers.tolist() == [number] * len(expected)
        assert chunks.width == max((size for _, _, size in expected), default=0)
        for row, (text, anchor, size) in enumerate(expected):
            assert chunks.given[row] == batch.input_ids[text, anchor]
            assert chunks.ids[row, :size].tolist() == batch.input_ids[text, anchor + 1 : anchor + 1 + size].tolist()


# What each chunk is, with what belongs to it but not to its place in a batch: ids, then corruption.
Described = tuple[list[int], ...]


def described(batch: ChunkBatch) -> list[Described]:
    chunks = batch.chunks()
    of_positions = [batch.passes_corrupted, batch.corruptions, batch.random_ids]
    found = []
    for row, size in enumerate(chunks.sizes.tolist()):
        text, number = int(chunks.texts[row]), int(chunks.numbers[row])
        of_chunk = [each[text, number].tolist() for each in of_positions if each is not None]
        place = [number, int(chunks.anchors[row]), size, int(chunks.given[row])]
        found.append((place, chunks.ids[row, :size].tolist(), chunks.targets[row, :size].tolist(), *of_chunk))
    return found


@given(batches, modes, chunk_widths, nums_anchors, seeds, st.randoms(use_true_random=False))
def test_chunks_of_parts_are_the_chunks_of_the_whole(
    batch: Batch, mode: dict[str, Any], chunk_width: int, num_anchors: int, seed: int, order: Any
) -> None:
    """Texts one by one, and in parts that were mixed."""
    rows = drawn(batch, seed=seed, chunk_width=chunk_width, anchors_per_text=num_anchors, **mode)
    singles = [rows.rows([text]) for text in range(len(batch.lengths))]
    assert [chunk for part in singles for chunk in described(part)] == described(rows)
    texts = list(range(len(batch.lengths)))
    order.shuffle(texts)
    halves = [rows.rows(half) for half in (texts[::2], texts[1::2]) if half]
    expected = [chunk for text in [*texts[::2], *texts[1::2]] for chunk in described(singles[text])]
    assert [chunk for part in halves for chunk in described(part)] == expected
    for name in ("num_chunks", "num_targets", "num_masked"):
        whole = getattr(rows, name)
        assert whole == sum(getattr(part, name) for part in singles) == sum(getattr(part, name) for part in halves)
    assert (rows.passes_corrupted is None) == (mode["commit_mode"] == "exact")


# Corruption


def corruption(rows: ChunkBatch) -> tuple[Tensor, Tensor, Tensor]:
    """In how many passes each position is corrupted, by what, and the random ids."""
    assert rows.passes_corrupted is not None and rows.corruptions is not None and rows.random_ids is not None
    return rows.passes_corrupted, rows.corruptions, rows.random_ids


@given(
    batches,
    st.booleans(),
    chunk_widths,
    nums_anchors,
    seeds,
    st.integers(1, 5),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from(["random", "span"]),
)
@example(batch_of([40, 3, 17], seed=0, new_document=None, learned=None), False, 9, 4, 0, 3, 1.0, "random")
@example(batch_of([40, 3, 17], seed=0, new_document=None, learned=None), True, 9, 4, 0, 3, 1.0, "span")
def test_only_tokens_behind_a_chunks_first_are_corrupted(
    batch: Batch,
    carries: bool,
    chunk_width: int,
    num_anchors: int,
    seed: int,
    num_passes: int,
    rate: float,
    strategy: str,
) -> None:
    rows = drawn(
        batch, seed=seed, commit_mode="refined", carry_state=carries, chunk_width=chunk_width,
        anchors_per_text=num_anchors, max_inner_steps=num_passes, corruption_rate=rate, corruption_strategy=strategy,
    )  # fmt: skip
    times, kinds, random_ids = corruption(rows)
    assert times.shape == kinds.shape == random_ids.shape == (*rows.sizes.shape, chunk_width)
    for text, number, place in (times > 0).nonzero().tolist():
        assert 0 < place < rows.sizes[text, number]
    for text, number in (rows.sizes > 0).nonzero().tolist():
        num_targets = int(rows.sizes[text, number]) - 1
        assert int((times[text, number] > 0).sum()) == int(rate * num_targets + 0.5)
    assert times.min() >= 0 and times.max() <= num_passes
    assert torch.equal(kinds == CLEAN, times == 0)
    assert set(kinds.unique().tolist()) <= {CLEAN, SLOT, RANDOM, OWN_DRAFT}
    assert random_ids.min() >= 0 and random_ids.max() < VOCAB_SIZE
    assert rows.num_masked == sum(times.flatten().tolist())


def long_chunks(num_texts: int, *, progress: Progress = BEGINNING, **fields: Any) -> tuple[Tensor, ...]:
    """What `corruption` says of chunks of 101 tokens, so that a rate shows in percent; nearly one of each text."""
    batch = Batch(torch.zeros(num_texts, 1000).long(), torch.full((num_texts,), 1000))
    config = {"commit_mode": "refined", "chunk_width": 101, "anchors_per_text": 1, **fields}
    rows = drawn(batch, seed=5, progress=progress, **config)
    is_full = rows.sizes == 101
    assert int(is_full.sum()) > 0.8 * num_texts
    return tuple(each[is_full] for each in corruption(rows))


@pytest.mark.parametrize(
    ("schedule", "percent"),
    [("linear", (80, 65, 50, 20)), ("cosine", (80, 71, 50, 20)), ("none", (80, 80, 80, 80))],
)
def test_the_rate_follows_the_schedule(schedule: str, percent: Sequence[int]) -> None:
    """At the beginning, after a quarter, half, and all of the training."""
    for step, expected in zip((0, 5, 10, 20), percent, strict=True):
        for strategy in ("random", "span"):
            times, _, _ = long_chunks(
                10, progress=Progress(step, 20), corruption_schedule=schedule, corruption_rate=0.8,
                corruption_rate_final=0.2, corruption_strategy=strategy,
            )  # fmt: skip
            assert set((times > 0).sum(dim=1).tolist()) == {expected}


def assert_shares(values: Tensor, expected: dict[int, float]) -> None:
    """Each value's share within five standard deviations of what is expected."""
    number = values.numel()
    assert set(values.unique().tolist()) == {value for value, share in expected.items() if share > 0}
    for value, share in expected.items():
        found = int((values == value).sum()) / number
        assert abs(found - share) <= 5 * (share * (1 - share) / number) ** 0.5, (value, found, share)


@pytest.mark.parametrize("own_draft_share", [0.0, 0.25, 1.0])
def test_corrupted_positions_are_drafts_slots_and_random_tokens_in_these_shares(own_draft_share: float) -> None:
    """A fifth of what is not the model's own draft is random."""
    rest = 1 - own_draft_share
    times, kinds, _ = long_chunks(300, corruption_rate=1.0, own_draft_share=own_draft_share)
    assert_shares(kinds[times > 0], {OWN_DRAFT: own_draft_share, RANDOM: 0.2 * rest, SLOT: 0.8 * rest})


@pytest.mark.parametrize("num_passes", [1, 4])
def test_a_corrupted_position_stays_so_for_any_number_of_passes_equally_often(num_passes: int) -> None:
    times, _, _ = long_chunks(300, corruption_rate=1.0, max_inner_steps=num_passes)
    assert_shares(times[times > 0], dict.fromkeys(range(1, num_passes + 1), 1 / num_passes))


def test_random_ids_are_any_of_the_vocabulary_equally_often() -> None:
    _, _, random_ids = long_chunks(300)
    assert_shares(random_ids, dict.fromkeys(range(VOCAB_SIZE), 1 / VOCAB_SIZE))


@pytest.mark.parametrize("strategy", ["random", "span"])
def test_each_place_behind_the_first_is_corrupted_equally_often_and_by_the_same_kinds(strategy: str) -> None:
    times, kinds, _ = long_chunks(1000, corruption_rate=0.3, corruption_strategy=strategy)
    for chosen, share in ((times > 0, 0.3), (kinds == RANDOM, 0.06), (times == 1, 0.075)):
        by_place = chosen.double().mean(dim=0)
        assert by_place[0] == 0
        assert (by_place[1:] - share).abs().max() <= 5 * (share * (1 - share) / len(times)) ** 0.5


@pytest.mark.parametrize(("strategy", "fewest", "most"), [("span", 1, 11), ("random", 13, 30)])
def test_spans_are_few_runs_and_random_positions_many(strategy: str, fewest: int, most: int) -> None:
    """Thirty of a hundred: in ten spans, of which one may go over the end; else in some twenty runs."""
    times, _, _ = long_chunks(50, corruption_rate=0.3, corruption_strategy=strategy)
    for of_chunk in (times > 0).tolist():
        assert fewest <= sum(is_corrupted for is_corrupted, _ in groupby(of_chunk)) <= most


@pytest.mark.parametrize("phase", ["none", "a", "b", "c"])
def test_the_own_drafts_share_rises_in_phases_b_and_c_only(phase: str) -> None:
    config = config_of(phase=phase, commit_mode="refined", own_draft_share=0.2)
    shares = [own_draft_share_at(config, Progress(step, 10)) for step in (0, 5, 10)]
    expected = [0.2, 0.6, 1.0] if phase in ("b", "c") else [0.2] * 3
    assert shares == pytest.approx(expected)
    for step, share in zip((0, 5, 10), expected, strict=True):
        times, kinds, _ = long_chunks(
            100, progress=Progress(step, 10), phase=phase, own_draft_share=0.2, corruption_rate=1.0,
            corruption_schedule="none",
        )  # fmt: skip
        rest = 1 - share
        assert_shares(kinds[times > 0], {OWN_DRAFT: share, RANDOM: 0.2 * rest, SLOT: 0.8 * rest})


def test_exact_mode_corrupts_nothing() -> None:
    rows = drawn(batch_of([40, 20], seed=0, new_document=None, learned=None), seed=0, commit_mode="exact")
    assert rows.num_chunks > 0
    assert (rows.passes_corrupted, rows.corruptions, rows.random_ids, rows.num_masked) == (None, None, None, 0)
