"""Rows and batches of token ids."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from deepen.data.batches import batch_of, batches_of, document_rows, token_ids
from deepen.data.tokenizer import BOS_ID, EOS_ID, byte_tokenizer

TOKENIZER = byte_tokenizer()
texts = st.lists(st.text(min_size=1, max_size=40), max_size=6)


class TestTokenIds:
    @given(st.text(max_size=30))
    def test_they_are_the_text(self, text):
        assert token_ids(text, TOKENIZER) == list(text.encode())

    def test_a_special_token_written_out_is_text(self):
        assert EOS_ID not in token_ids("to <|eos|> or not", TOKENIZER)

    def test_what_the_tokenizer_puts_around_a_text_stays(self):
        class WithBeginning:
            eos_token_id = EOS_ID

            def encode(self, text, **options):
                return [BOS_ID, *TOKENIZER.encode(text, **options)]

        assert token_ids("a", WithBeginning()) == [BOS_ID, ord("a")]

    def test_a_text_beyond_the_models_context_is_no_reason_to_warn(self, capfd):
        assert len(token_ids("x" * 1000, byte_tokenizer(context_length=8))) == 1000
        assert capfd.readouterr().err == ""


class TestDocumentRows:
    @given(texts, st.integers(1, 12), st.integers(1, 60))
    def test_beginnings_of_documents_within_the_budget(self, documents, max_length, max_tokens):
        rows = list(document_rows(documents, TOKENIZER, max_length=max_length, max_tokens=max_tokens))
        beginnings = [list(document.encode())[:max_length] for document in documents]
        assert sum(map(len, rows)) == min(max_tokens, sum(map(len, beginnings)))
        assert rows[:-1] == beginnings[: len(rows)][:-1]
        assert all(row == whole[: len(row)] for row, whole in zip(rows, beginnings, strict=False))

    def test_documents_behind_the_budget_are_not_asked_for(self):
        def documents():
            yield "abc"
            raise AssertionError("one document too many")

        assert list(document_rows(documents(), TOKENIZER, max_length=9, max_tokens=3)) == [[97, 98, 99]]


class TestBatchOf:
    @given(st.lists(st.lists(st.integers(0, 259), min_size=1, max_size=9), min_size=1, max_size=5))
    def test_rows_come_back_and_pads_are_told_by_lengths(self, rows):
        batch = batch_of(rows)
        assert batch.unpadded() == rows
        assert batch.input_ids.shape == (len(rows), max(map(len, rows)))
        assert batch.input_ids.dtype == batch.lengths.dtype == torch.long
        behind = torch.arange(batch.input_ids.shape[1]) >= batch.lengths[:, None]
        assert not batch.input_ids[behind].any()


class TestBatchesOf:
    @given(st.lists(st.lists(st.integers(0, 259), min_size=1, max_size=9), max_size=7), st.integers(1, 4))
    def test_rows_come_in_their_order_so_many_at_a_time(self, rows, size):
        batches = batches_of(iter(rows), size=size)
        assert [row for batch in batches for row in batch.unpadded()] == rows
        assert all(len(batch.lengths) == size for batch in batches[:-1])
        assert all(1 <= len(batch.lengths) <= size for batch in batches)
