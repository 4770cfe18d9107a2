"""Chunks, their batches and their corruption."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepen.core.errors import ConfigError, DeepenError
from deepen.data.chunks import ChunkCollator, Example, FlywheelDataset, corruption_rate_at, create_corruption_mask
from deepen.data.records import Record
from deepen.data.split import split_of, split_of_record
from deepen.data.tokenizer import EOS_ID, byte_tokenizer

TOKENIZER = byte_tokenizer()


def dataset(tmp_path, *records, **options) -> FlywheelDataset:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return FlywheelDataset(str(file), tokenizer=TOKENIZER, **options)


def in_split(split: str, make, count: int = 1) -> list:
    """The first `count` records of a split."""
    found = (make(number) for number in range(10_000))
    return [record for record in found if split_of_record(Record(record, "")) == split][:count]


class TestExample:
    @given(st.lists(st.integers(0, 9), max_size=30), st.integers(0, 30), st.integers(1, 9))
    def test_chunks_begin_where_the_prompt_ends_and_lose_nothing(self, ids, prompt_length, width):
        prompt_length = min(prompt_length, len(ids))
        chunks = Example(tuple(ids), prompt_length).chunks(width)
        assert [token for chunk in chunks for token in chunk] == ids[prompt_length:]
        assert all(len(chunk) == width for chunk in chunks[:-1])
        assert not chunks or 1 <= len(chunks[-1]) <= width


class TestFlywheelDataset:
    def test_a_text_goes_on_in_the_next_example_and_keeps_its_tail_and_its_end(self, tmp_path):
        (record,) = in_split("train", lambda number: {"text": f"{number:07}"})
        found = dataset(tmp_path, record, max_length=5)
        ids = [*record["text"].encode(), EOS_ID]
        assert [found[index].input_ids for index in range(len(found))] == [tuple(ids[:5]), tuple(ids[5:])]
        assert {found[index].prompt_length for index in range(len(found))} == {0}

    def test_prompts_without_answers_are_refused(self, tmp_path):
        with pytest.raises(DeepenError, match=r'line 1: a prompt without a "response" has nothing to learn'):
            dataset(tmp_path, *in_split("train", lambda number: {"prompt": f"What is {number}?"}))

    def test_an_answer_is_an_example_behind_all_that_was_said(self, tmp_path):
        def conversation(number):
            said = [("user", f"{number}"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
            return {"messages": [{"role": role, "content": content} for role, content in said]}

        (record,) = in_split("train", conversation)
        first, second = dataset(tmp_path, record)
        assert list(first.input_ids[first.prompt_length :]) == [*b"b", EOS_ID, *b"\n"]
        assert second.input_ids[: len(first.input_ids)] == first.input_ids
        assert list(second.input_ids[second.prompt_length :]) == [*b"d", EOS_ID, *b"\n"]

    def test_a_long_conversation_loses_its_beginning_never_its_answer(self, tmp_path):
        (record,) = in_split("train", lambda number: {"prompt": f"{number:0200}", "response": "answer"})
        (example,) = dataset(tmp_path, record, max_length=20)
        assert len(example.input_ids) == 20
        assert example.input_ids[example.prompt_length :] == (*b"answer", EOS_ID, *b"\n")

    def test_answers_too_long_are_counted(self, tmp_path):
        records = in_split("train", lambda number: {"prompt": f"{number}", "response": "x" * 40}, 2)
        records += in_split("train", lambda number: {"prompt": f"{number}", "response": "x"}, 1)
        found = dataset(tmp_path, *records, max_length=30)
        assert (len(found), found.num_left_out) == (1, 2)
        with pytest.raises(DeepenError, match=r"no example of at most 30 tokens in split train \(2 answers"):
            dataset(tmp_path, *records[:2], max_length=30)

    def test_each_record_is_in_one_split(self, tmp_path):
        records = [{"prompt": f"{number}", "response": "x"} for number in range(300)]
        sizes = [len(dataset(tmp_path, *records, split=split)) for split in ("train", "validation", "test")]
        assert sum(sizes) == 300 and min(sizes) > 0

    def test_a_texts_split_is_that_of_its_text_alone(self):
        for number in range(100):
            assert split_of_record(Record({"id": number, "text": f"{number}"}, "")) == split_of(f"{number}")

    def test_no_more_documents_are_read_than_asked_for(self, tmp_path):
        records = in_split("train", lambda number: {"text": f"{number}"}, 3)
        assert len(dataset(tmp_path, *records, {"bad": 1}, max_documents=3)) == 3


class TestChunkCollator:
    @given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=20), min_size=1, max_size=4), st.integers(1, 9))
    def test_rows_are_padded_to_whole_chunks(self, rows, width):
        batch = ChunkCollator(width, pad_token_id=7)(rows)
        longest = max(map(len, rows))
        assert batch["input_ids"].shape == (len(rows), math.ceil(longest / width) * width)
        for index, row in enumerate(rows):
            assert batch["input_ids"][index].tolist() == row + [7] * (batch["input_ids"].shape[1] - len(row))
            assert batch["attention_mask"][index].tolist() == [1] * len(row) + [0] * (
                batch["input_ids"].shape[1] - len(row)
            )
        assert batch["lengths"].tolist() == list(map(len, rows))

    def test_without_a_pad_the_end_fills_and_is_still_told_apart(self):
        batch = ChunkCollator(4, eos_token_id=2)([[5, 2]])
        assert batch["input_ids"].tolist() == [[5, 2, 2, 2]] and batch["attention_mask"].tolist() == [[1, 1, 0, 0]]

    def test_examples_and_mappings_are_taken(self):
        batch = ChunkCollator(2)([Example((1, 2, 3), 1), {"input_ids": torch.tensor([4])}])
        assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]
        assert batch["prompt_lengths"].tolist() == [1, 0]

    @pytest.mark.parametrize("examples", [[], [[]], [[1], []]])
    def test_an_empty_one_is_an_error(self, examples):
        with pytest.raises(DeepenError, match="at least one"):
            ChunkCollator()(examples)


class TestCorruption:
    @given(st.integers(0, 60), st.floats(0, 1), st.sampled_from(["random", "span"]), st.integers(0, 99))
    def test_the_share_is_the_rate(self, length, rate, strategy, seed):
        mask = create_corruption_mask(length, rate, strategy, generator=torch.Generator().manual_seed(seed))
        assert mask.shape == (length,) and mask.dtype == torch.bool
        assert abs(int(mask.sum()) - rate * length) <= 0.5 + 1e-9

    def test_spans_are_longer_than_chance_makes_them(self):
        def mean_run(strategy):
            masks = [
                create_corruption_mask(90, 0.3, strategy, generator=torch.Generator().manual_seed(seed)).int()
                for seed in range(50)
            ]
            begins = sum(int((mask.diff(prepend=torch.zeros(1, dtype=torch.int32)) == 1).sum()) for mask in masks)
            return sum(int(mask.sum()) for mask in masks) / begins

        assert mean_run("span") > 2.5 > 1.8 > mean_run("random")

    @pytest.mark.parametrize("strategy", ["random", "span"])
    def test_every_position_is_met(self, strategy):
        masks = [
            create_corruption_mask(20, 0.3, strategy, generator=torch.Generator().manual_seed(seed))
            for seed in range(400)
        ]
        shares = torch.stack(masks).double().mean(dim=0)
        assert shares.min() > 0.15 and shares.max() < 0.45

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((3, 1.5), r"corruption_rate must be in \[0, 1\], not 1.5"),
            ((3, float("nan")), "corruption_rate must be"),
            ((-1, 0.5), "length must be 0 or more"),
            ((3, 0.5, "spann"), 'unknown strategy "spann"; did you mean "span"'),
        ],
    )
    def test_impossible_values_are_named(self, arguments, message):
        with pytest.raises(ConfigError, match=message):
            create_corruption_mask(*arguments)

    @given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
    def test_schedules_go_from_start_to_final(self, start, final, fraction):
        for schedule in ("linear", "cosine"):
            assert corruption_rate_at(0.0, start=start, final=final, schedule=schedule) == start
            assert corruption_rate_at(1.0, start=start, final=final, schedule=schedule) == pytest.approx(final)
            between = corruption_rate_at(fraction, start=start, final=final, schedule=schedule)
            assert min(start, final) - 1e-12 <= between <= max(start, final) + 1e-12
        assert corruption_rate_at(fraction, start=start, final=final, schedule="none") == start

    def test_the_middle_of_cosine_is_that_of_linear_and_its_quarter_is_not(self):
        at = [corruption_rate_at(0.5, start=0.4, final=0.0, schedule=each) for each in ("linear", "cosine")]
        assert at == pytest.approx([0.2, 0.2])
        assert corruption_rate_at(0.25, start=0.4, final=0.0, schedule="cosine") == pytest.approx(
            0.4 * (2 + 2**0.5) / 4
        )
