"""From documents to batches: flat tokens, rows, and the order in which they are drawn."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepen.core.errors import CheckpointError, ConfigError, DeepenError
from deepen.core.types import Batch
from deepen.data.formats import Conversation, Message, Text
from deepen.data.loader import Loader
from deepen.data.rows import cut_rows
from deepen.data.tokenizer import EOS_ID, byte_tokenizer
from deepen.data.tokens import TokenCorpus

TOKENIZER = byte_tokenizer()
lengths_of_documents = st.lists(st.integers(1, 30), min_size=1, max_size=12)
cuts = st.sampled_from(["document", "packed"])


def numbered(lengths: list[int]) -> TokenCorpus:
    """Documents of so many tokens; every token has an id of its own."""
    ends = np.cumsum(lengths)
    return TokenCorpus(np.arange(ends[-1], dtype=np.int32), ends.astype(np.int64))


def real_rows(batch: Batch) -> list[list[int]]:
    return [row[:length] for row, length in zip(batch.input_ids.tolist(), batch.lengths.tolist(), strict=True)]


class TestTokenCorpus:
    def test_documents_stand_behind_each_other(self):
        corpus = TokenCorpus.of([Text("ab"), Text("c")], TOKENIZER)
        assert corpus.ids.tolist() == [*b"ab", EOS_ID, *b"c", EOS_ID]
        assert corpus.ends.tolist() == [3, 5] and corpus.learned is None
        assert (corpus.num_tokens, corpus.num_documents) == (5, 2)

    def test_empty_texts_are_left_out_and_told_about(self):
        with pytest.warns(UserWarning, match="2 empty documents were left out"):
            corpus = TokenCorpus.of([Text(""), Text("c"), Text(" \n")], TOKENIZER)
        assert corpus.ids.tolist() == [*b"c", EOS_ID]

    def test_what_is_not_learned_is_marked(self):
        pair = Conversation((Message("user", "a"), Message("assistant", "b")))
        corpus = TokenCorpus.of([Text("x"), pair], TOKENIZER)
        assert corpus.learned is not None
        assert corpus.learned_of(0, 2).all() and not corpus.learned_of(2, corpus.num_tokens).all()
        assert corpus.learned.sum() == 2 + 3

    def test_another_token_end_or_mark_is_another_corpus(self):
        corpus = numbered([3, 4])
        others = [
            TokenCorpus(corpus.ids[::-1].copy(), corpus.ends),
            numbered([4, 3]),
            TokenCorpus(corpus.ids, corpus.ends, np.array([True] * 6 + [False])),
        ]
        assert len({each.digest for each in [corpus, *others]}) == 4
        assert numbered([3, 4]).digest == corpus.digest


class TestRows:
    @given(lengths_of_documents, st.integers(2, 9), cuts)
    def test_every_token_is_in_exactly_one_row_in_order(self, lengths, max_length, cut):
        corpus = numbered(lengths)
        rows = cut_rows(corpus, max_length=max_length, cut=cut)
        found = [row for index in range(len(rows)) for row in real_rows(rows.batch([index]))]
        assert [token for row in found for token in row] == list(range(corpus.num_tokens))
        assert all(1 <= len(row) <= max_length for row in found)

    @given(lengths_of_documents, st.integers(3, 9))
    def test_a_row_of_a_document_holds_no_other_and_has_something_to_predict(self, lengths, max_length):
        corpus = numbered(lengths)
        rows = cut_rows(corpus, max_length=max_length, cut="document")
        for index in range(len(rows)):
            (row,) = real_rows(rows.batch([index]))
            (document,) = set(corpus.documents_of(row[0], row[-1] + 1).tolist())
            assert len(row) > 1 or lengths[document] == 1

    @given(lengths_of_documents, st.integers(2, 9))
    def test_packed_rows_are_full_and_know_their_documents(self, lengths, max_length):
        corpus = numbered(lengths)
        rows = cut_rows(corpus, max_length=max_length, cut="packed")
        batch = rows.batch(list(range(len(rows))))
        assert set(batch.lengths.tolist()[:-1]) <= {max_length}
        owner = [document for document, length in enumerate(lengths) for _ in range(length)]
        pairs = {
            (int(batch.input_ids[row, place]), int(batch.input_ids[row, place + 1]))
            for row, place in batch.predicted().nonzero().tolist()
        }
        in_a_row = {(t, t + 1) for t in range(corpus.num_tokens - 1) if (t + 1) % max_length}
        assert pairs == {(a, b) for a, b in in_a_row if owner[a] == owner[b]}

    def test_what_is_not_learned_is_not_predicted(self):
        corpus = TokenCorpus(np.arange(5, dtype=np.int32), np.array([5]), np.array([False, False, True, True, False]))
        batch = cut_rows(corpus, max_length=9, cut="document").batch([0])
        assert batch.predicted().tolist() == [[False, True, True, False]]

    def test_pads_are_not_predicted(self):
        batch = cut_rows(numbered([4, 2]), max_length=9, cut="document").batch([0, 1])
        assert batch.predicted().tolist() == [[True] * 3, [True, False, False]]

    def test_an_empty_corpus_is_an_error(self):
        with pytest.raises(DeepenError, match="no token"):
            cut_rows(TokenCorpus.of([], TOKENIZER), max_length=4, cut="packed")


def loader(num_rows: int, *, rows_per_step: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> Loader:
    rows = cut_rows(numbered([2] * num_rows), max_length=4, cut="document")
    return Loader(rows, rows_per_step=rows_per_step, seed=seed, rank=rank, world_size=world_size)


def drawn(source: Loader, *, num_steps: int, num_batches: int = 1) -> list[list[int]]:
    """The first token of each row, step by step."""
    return [
        [row[0] for batch in source.next_step(num_batches=num_batches) for row in real_rows(batch)]
        for _ in range(num_steps)
    ]


class TestLoader:
    @given(st.integers(1, 30), st.integers(1, 3), st.data())
    def test_every_row_is_seen_once_an_epoch_over_any_number_of_ranks(self, num_rows, world_size, data):
        rows_per_step = data.draw(st.integers(min(world_size, num_rows), num_rows))
        if rows_per_step < world_size:
            return
        num_steps = 2 * num_rows  # a whole number of epochs
        counts: Counter[int] = Counter()
        for rank in range(world_size):
            source = loader(num_rows, rows_per_step=rows_per_step, rank=rank, world_size=world_size)
            counts.update(token for step in drawn(source, num_steps=num_steps) for token in step)
        assert set(counts.values()) == {2 * rows_per_step} and len(counts) == num_rows

    @given(st.integers(3, 20), st.integers(0, 2**31))
    def test_each_epoch_is_a_permutation_and_another_one(self, num_rows, seed):
        source = loader(num_rows, rows_per_step=1, seed=seed)
        epochs = [[step[0] for step in drawn(source, num_steps=num_rows)] for _ in range(4)]
        assert all(sorted(epoch) == list(range(0, 2 * num_rows, 2)) for epoch in epochs)
        assert num_rows < 6 or len(set(map(tuple, epochs))) > 1

    @given(st.integers(3, 20), st.integers(3, 9), st.integers(1, 3))
    def test_the_ranks_share_a_step_that_does_not_depend_on_their_number(self, num_rows, rows_per_step, world_size):
        rows_per_step = min(rows_per_step, num_rows)
        alone = drawn(loader(num_rows, rows_per_step=rows_per_step), num_steps=5)
        ranks = [
            drawn(loader(num_rows, rows_per_step=rows_per_step, rank=rank, world_size=world_size), num_steps=5)
            for rank in range(world_size)
        ]
        for step, expected in enumerate(alone):
            assert sorted(token for rank in ranks for token in rank[step]) == sorted(expected)

    @given(st.integers(2, 20), st.integers(1, 5), st.integers(0, 40), st.integers(0, 2**40))
    def test_it_goes_on_at_any_step_with_the_same_stream(self, num_rows, rows_per_step, num_before, seed):
        rows_per_step = min(rows_per_step, num_rows)
        source = loader(num_rows, rows_per_step=rows_per_step, seed=seed)
        drawn(source, num_steps=num_before)
        state = source.state()
        expected = drawn(source, num_steps=12)
        other = loader(num_rows, rows_per_step=rows_per_step, seed=seed)
        other.load_state(state)
        assert drawn(other, num_steps=12) == expected

    @given(st.integers(1, 12), st.integers(1, 5))
    def test_batches_of_a_step_are_even_and_lose_nothing(self, rows_per_step, num_batches):
        whole = drawn(loader(12, rows_per_step=rows_per_step), num_steps=1)[0]
        batches = loader(12, rows_per_step=rows_per_step).next_step(num_batches=num_batches)
        assert len(batches) == min(num_batches, rows_per_step)
        sizes = [len(batch.lengths) for batch in batches]
        assert max(sizes) - min(sizes) <= 1
        assert sorted(row[0] for batch in batches for row in real_rows(batch)) == sorted(whole)

    def test_seeds_differ_also_where_they_are_neighbours(self):
        streams = {
            tuple(token for step in drawn(loader(9, rows_per_step=3, seed=seed), num_steps=12) for token in step)
            for seed in range(20)
        }
        assert len(streams) == 20

    def test_the_global_random_state_stays(self):
        before = torch.get_rng_state()
        drawn(loader(9, rows_per_step=3), num_steps=5)
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"seed": 1}, "seed was 1 and is 0"),
            ({"digest": "x"}, "digest was x and is"),
            ({"rows_per_step": 7}, "rows_per_step was 7 and is 3"),
            ({"cut": "packed"}, "cut was packed and is document"),
        ],
    )
    def test_other_data_is_refused(self, change, told):
        source = loader(9, rows_per_step=3)
        with pytest.raises(CheckpointError, match=told):
            source.load_state(source.state() | change)
        assert source.steps_drawn == 0

    def test_fewer_rows_than_a_step_takes_are_refused(self):
        with pytest.raises(ConfigError, match="a step takes 10 rows, and the data has 9"):
            loader(9, rows_per_step=10)

    def test_fewer_rows_than_ranks_are_refused(self):
        with pytest.raises(ConfigError, match="none for some of 3 ranks"):
            loader(9, rows_per_step=2, world_size=3)
