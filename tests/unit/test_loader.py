"""From documents to batches: flat tokens, rows, and the order in which they are drawn."""

from collections import Counter
from dataclasses import replace

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
from deepen.train.ranks import Ranks

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

    @pytest.mark.parametrize("cut", ["document", "packed"])
    def test_every_token_has_the_difficulty_of_its_document(self, cut):
        corpus = replace(numbered([4, 2, 3]), difficulties=np.array([7, 0, 2], dtype=np.int32))
        rows = cut_rows(corpus, max_length=5, cut=cut)
        batch = rows.batch(list(range(len(rows))))
        found = [told for row, length in enumerate(batch.lengths) for told in batch.difficulty[row, :length].tolist()]
        assert found == [7, 7, 7, 7, 0, 0, 2, 2, 2]
        assert cut_rows(numbered([4]), max_length=5, cut=cut).batch([0]).difficulty is None

    def test_documents_with_something_to_predict_are_asked_for_their_difficulty(self):
        told, learned = np.array([7, 0, 0, 0], np.int32), np.ones(10, bool)
        corpus = numbered([4, 2, 3, 1])
        # Nothing is predicted of a document of one token.
        assert corpus.learned_documents.tolist() == [True, True, True, False]
        assert corpus.num_untold == 3 and replace(corpus, difficulties=told).num_untold == 2
        learned[[5, 6, 7, 8]] = False
        assert replace(corpus, difficulties=told, learned=learned).num_untold == 0
        learned[7] = True
        assert replace(corpus, difficulties=told, learned=learned).num_untold == 1

    def test_pads_are_not_predicted(self):
        batch = cut_rows(numbered([4, 2]), max_length=9, cut="document").batch([0, 1])
        assert batch.predicted().tolist() == [[True] * 3, [True, False, False]]

    def test_an_empty_corpus_is_an_error(self):
        with pytest.raises(DeepenError, match="no token"):
            cut_rows(TokenCorpus.of([], TOKENIZER), max_length=4, cut="packed")


def loader(num_rows: int, *, rows_per_step: int, seed: int = 0) -> Loader:
    rows = cut_rows(numbered([2] * num_rows), max_length=4, cut="document")
    return Loader(rows, rows_per_step=rows_per_step, seed=seed)


def first_tokens(batch: Batch) -> list[int]:
    return [row[0] for row in real_rows(batch)]


class TestCounts:
    def test_are_those_of_every_id(self):
        rows = cut_rows(TokenCorpus.of([Text("abba"), Text("b")], TOKENIZER), max_length=3, cut="packed")
        counts = Loader(rows, rows_per_step=1, seed=0).counts(300)
        ids = rows.corpus.ids.tolist()
        assert counts.tolist() == [ids.count(each) for each in range(300)]

    def test_are_those_of_what_is_learned(self):
        corpus = TokenCorpus(np.array([5, 6, 5, 7], np.int32), np.array([4]), np.array([False, True, True, False]))
        assert corpus.counts(9).tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0]


class TestLoader:
    @given(st.integers(1, 30), st.integers(1, 3), st.integers(1, 3), st.data())
    def test_every_row_is_seen_once_an_epoch_over_any_number_of_ranks_and_parts(
        self, num_rows, world_size, num_parts, data
    ):
        least = world_size * num_parts
        num_rows = max(num_rows, least)
        rows_per_step = data.draw(st.integers(least, num_rows))
        num_steps = 2 * num_rows  # a whole number of epochs
        counts: Counter[int] = Counter()
        for rank in range(world_size):
            source = loader(num_rows, rows_per_step=rows_per_step)
            for index in range(num_steps):
                for part in Ranks(rank, world_size).share(source.step(index), num_parts=num_parts):
                    counts.update(first_tokens(part))
        assert set(counts.values()) == {2 * rows_per_step} and len(counts) == num_rows

    @given(st.integers(3, 20), st.integers(0, 2**31))
    def test_each_epoch_is_a_permutation_and_another_one(self, num_rows, seed):
        source = loader(num_rows, rows_per_step=1, seed=seed)
        epochs = [
            [first_tokens(source.step(epoch * num_rows + index))[0] for index in range(num_rows)] for epoch in range(4)
        ]
        assert all(sorted(epoch) == list(range(0, 2 * num_rows, 2)) for epoch in epochs)
        assert num_rows < 6 or len(set(map(tuple, epochs))) > 1

    @given(st.integers(2, 20), st.integers(1, 5), st.integers(0, 40), st.integers(0, 2**40))
    def test_a_step_is_the_same_from_wherever_it_is_read(self, num_rows, rows_per_step, num_before, seed):
        rows_per_step = min(rows_per_step, num_rows)
        source = loader(num_rows, rows_per_step=rows_per_step, seed=seed)
        stream = [first_tokens(source.step(index)) for index in range(num_before + 12)]
        other = loader(num_rows, rows_per_step=rows_per_step, seed=seed)
        assert [first_tokens(other.step(num_before + index)) for index in range(12)] == stream[num_before:]

    @given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 4))
    def test_parts_of_a_step_are_even_and_lose_nothing(self, rows_per_step, world_size, num_parts):
        rows_per_step = max(rows_per_step, world_size * num_parts)
        step = loader(rows_per_step, rows_per_step=rows_per_step).step(0)
        shares = [Ranks(rank, world_size).share(step, num_parts=num_parts) for rank in range(world_size)]
        sizes = [len(part.lengths) for share in shares for part in share]
        assert len(sizes) == world_size * num_parts and max(sizes) - min(sizes) <= 2
        assert sorted(row for share in shares for part in share for row in first_tokens(part)) == sorted(
            first_tokens(step)
        )

    def test_a_step_with_too_few_rows_for_all_is_told(self):
        step = loader(9, rows_per_step=5).step(0)
        message = "a step of 5 rows can't be divided over 3 ranks and 2 micro-batches; raise batch_size to 6 or more"
        with pytest.raises(ConfigError, match=message):
            Ranks(0, 3).share(step, num_parts=2)

    def test_more_rows_than_there_are_is_told(self):
        with pytest.raises(ConfigError, match="a step takes 4 rows, and the data has 3; lower batch_size"):
            loader(3, rows_per_step=4)

    def test_seeds_differ_also_where_they_are_neighbours(self):
        streams = {
            tuple(row for index in range(12) for row in first_tokens(loader(9, rows_per_step=3, seed=seed).step(index)))
            for seed in range(20)
        }
        assert len(streams) == 20

    def test_the_global_random_state_stays(self):
        before = torch.get_rng_state()
        loader(9, rows_per_step=3).step(4)
        assert torch.equal(torch.get_rng_state(), before)

    def test_tokens_of_a_step_are_told_on_average(self):
        rows = cut_rows(numbered([2, 4, 3, 5]), max_length=9, cut="document")
        source = Loader(rows, rows_per_step=2, seed=0)
        assert source.mean_tokens == sum(int(source.step(index).lengths.sum()) for index in range(2)) / 2

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"seed": 1}, "seed was 1 and is 0"),
            ({"digest": "x"}, "digest was x and is"),
            ({"rows_per_step": 7}, "rows_per_step was 7 and is 3"),
            ({"cut": "packed"}, "cut was packed and is document"),
            ({"difficulties": "x"}, "difficulties was x and is None"),
        ],
    )
    def test_other_data_is_refused(self, change, told):
        source = loader(9, rows_per_step=3)
        source.require_same(source.facts())
        # As runs of earlier versions have them.
        source.require_same({name: fact for name, fact in source.facts().items() if name != "difficulties"})
        with pytest.raises(CheckpointError, match=told):
            source.require_same(source.facts() | change)
