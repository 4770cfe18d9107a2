"""Prompts made from questions, functions and passages, and those that an evaluation draws from them."""

import ast
import json
import random
import re
import warnings
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from package_index import add_wheel, use_index

from deepen.core.errors import DeepenError
from deepen.data import corpora, prompts
from deepen.data.records import Record
from deepen.data.split import records_of, split_of, split_of_record
from deepen.data.text import records
from deepen.evaluate.prompts import held_out_prompts

WORDS = ("river", "runs", "through", "a", "wide", "valley", "and", "its", "banks", "are", "known", "for", "mills")


def passage(number: int, *, num_words: int = 60) -> str:
    """About a subject of its own."""
    source = random.Random(number)
    return f"Place {number} -- {' '.join(source.choice(WORDS) for _ in range(num_words))}."


def made(found) -> list[str]:
    return [record.fields["prompt"] for record in found]


def as_records(field: str, *values: str) -> list[Record]:
    return [Record({field: value}, f"line {number}") for number, value in enumerate(values, start=1)]


def jsonl(*fields: dict[str, object]) -> bytes:
    return "".join(json.dumps(each) + "\n" for each in fields).encode()


class TestChat:
    def test_each_subject_is_asked_about_once_and_in_the_split_of_its_passage(self):
        passages = [
            Record({"passage": passage(number), "question": f"is place {number} old"}, f"line {number}")
            for number in range(400)
        ]
        found = list(prompts.chat_prompts([*passages, *passages], [], []))
        assert len(found) == 400
        for number, record in enumerate(found):
            assert record.fields.keys() == {"prompt"} and record.place == f"line {number}"
            assert re.search(rf"[Pp]lace {number}\b", record.fields["prompt"])
            assert split_of_record(record) == split_of(passage(number))
        about_question = [text for text in made(found) if "Is place" in text]
        assert 100 < len(about_question) < 300
        forms = Counter(re.sub(r"\d+", "N", text) for text in made(found))
        assert len(forms) == len(prompts._OF_SUBJECT) + len(prompts._OF_YES_OR_NO)

    def test_a_list_is_about_what_it_lists(self):
        (text,) = made(
            prompts.chat_prompts([Record({"passage": "List of old mills -- x", "question": "mills"}, "")], [], [])
        )
        assert "old mills" in text and "List of" not in text

    def test_questions_are_put_as_one_writes_them_and_only_what_is_one_is_asked(self):
        facts = as_records("question", "who built the mill", "mill on the river cast", "who built the mill ?")
        questions = as_records("question", "Why do mills turn?", "WHY " + "long " * 50)
        texts = made(prompts.chat_prompts([], facts, questions))
        assert len(texts) == 2
        assert "Who built the mill?" in texts[0] and texts[0] != "Who built the mill?"
        assert "Why do mills turn?" in texts[1]

    @pytest.mark.parametrize("word", ["<|im_start|>", "<s>", "<filename>"])
    def test_what_a_tokenizer_may_take_for_a_special_token_is_left_out(self, word):
        assert made(prompts.chat_prompts([], as_records("question", f"what is {word} for"), [])) == []


FUNCTION = '''
import os


def rest(numbers, *,
         first=1):
    """Give all but the first numbers.

    More about it.
    """
    # A comment stays.
    kept = []
    for number in numbers[first:]:
        kept.append(number)
    return kept
'''


class TestCode:
    def test_a_prompt_holds_the_function_or_what_it_begins_with(self):
        texts = [
            FUNCTION.replace("rest", f"rest_{number}").replace("first=1", f"first={number}") for number in range(300)
        ]
        found = list(prompts.code_prompts(as_records("text", *texts)))
        assert len(found) == 300
        forms, splits = Counter(), Counter()
        for number, record in enumerate(found):
            assert record.place == f"line {number + 1}"
            asked = record.fields["prompt"]
            splits[split_of_record(record)] += 1
            forms[asked.partition("\n")[0].replace(str(number), "N")] += 1
            block = re.search(r"```python\n(.*)\n```", asked, re.DOTALL)
            if block is None:
                assert f"`rest_{number}`" in asked and asked.endswith("Give all but the first numbers.")
                continue
            (function,) = ast.parse(block[1]).body
            assert function.name == f"rest_{number}"
            is_started = "for number" not in block[1]
            assert is_started == (ast.get_docstring(function) == "Give all but the first numbers.")
            assert is_started or (block[1].count("\n") == 6 and "# A comment stays." in block[1])
        assert len(forms) == len(prompts._OF_FUNCTION)
        assert len(splits) == 3

    def test_methods_stand_at_the_margin(self):
        lines = "".join(f"    {line}\n" if line else "\n" for line in FUNCTION.splitlines()[3:])
        (text,) = made(prompts.code_prompts(as_records("text", f"class Numbers:\n{lines}")))
        assert "def rest" in text or "`rest`" in text
        assert "\n    def rest" not in text

    @pytest.mark.parametrize(
        "change",
        [
            ('"""Give', 'x = """Give'),  # no docstring
            ('"""Give all but the first numbers.', '"""Rest.'),
            ("rest(", "__call__("),
            ("return kept", "return kept + " + "x" * prompts.FUNCTION_CHARACTERS),
            ("    for number in numbers[first:]:\n        kept.append(number)\n    return kept\n", ""),
            ("import os", "def test_it(): pass"),
            ("import os", "import = os"),
            ("A comment stays", "A ```"),
        ],
        ids=lambda change: change[1][:15],
    )
    def test_what_is_left_out(self, change):
        assert change[0] in FUNCTION
        assert made(prompts.code_prompts(as_records("text", FUNCTION.replace(*change)))) == []

    def test_a_special_token_is_not_shown(self):
        texts = [FUNCTION.replace("A comment stays", f"A <filename> {number}") for number in range(30)]
        found = made(prompts.code_prompts(as_records("text", *texts)))
        assert 0 < len(found) < 30 and not any("<filename>" in each for each in found)

    def test_functions_that_differ_in_their_name_alone_come_once(self):
        text = FUNCTION + FUNCTION.replace("rest", "tail")
        assert len(made(prompts.code_prompts(as_records("text", text, text + "# a copy")))) == 1

    def test_a_file_with_many_functions_gives_some_of_them(self):
        many = "".join(FUNCTION.replace("first=1", f"first={number}") for number in range(prompts.PER_FILE + 5))
        found = made(prompts.code_prompts(as_records("text", many)))
        # Some forms show only how a function begins, and these all begin the same; no prompt comes twice.
        assert 0.8 * prompts.PER_FILE < len(found) <= prompts.PER_FILE

    def test_escapes_in_other_peoples_strings_are_no_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(made(prompts.code_prompts(as_records("text", FUNCTION + 'pattern = "\\d"\n')))) == 1


class TestRewriting:
    def test_a_prompt_is_a_task_and_the_passage_without_its_title(self):
        texts = [passage(number) for number in range(600)]
        found = list(prompts.rewriting_prompts(as_records("text", *texts)))
        assert len(found) == 600
        tasks = Counter()
        for number, (text, record) in enumerate(zip(texts, found, strict=True)):
            assert split_of_record(record) == split_of(text) and record.place == f"line {number + 1}"
            task, shown = record.fields["prompt"].split("\n\n")
            tasks[re.sub("'.*'", "'WORD'", task)] += 1
            body = text.partition(" -- ")[2]
            assert (shown != body) == task.startswith("Correct the spelling")
            word = re.search("'(.*)'", task)
            assert word is None or re.search(rf"\b{word[1]}\b", body)
        assert len(tasks) == len(set(prompts._OF_PASSAGE))

    @pytest.mark.parametrize(("num_words", "is_asked"), [(39, False), (40, True), (120, True), (121, False)])
    def test_only_passages_of_middle_length(self, num_words, is_asked, monkeypatch):
        monkeypatch.setattr(prompts, "PASSAGE_CHARACTERS", 10_000)
        found = list(prompts.rewriting_prompts(as_records("text", passage(0, num_words=num_words))))
        assert len(found) == is_asked

    def test_a_passage_of_long_words_is_too_long(self):
        text = "Words -- " + " ".join(["incomprehensible"] * 100)
        assert list(prompts.rewriting_prompts(as_records("text", text))) == []

    def test_quotation_marks_are_those_one_writes(self):
        text = passage(3).replace("Place 3 -- ", "Place 3 -- ``Mill'' ")
        (asked,) = made(prompts.rewriting_prompts(as_records("text", text)))
        assert "``" not in asked and '"' in asked

    @given(st.lists(st.sampled_from((*WORDS, "is", "the", "of", "1907,", "aaaaaa", "x-ray", "")), min_size=1))
    def test_errors_are_made_and_made_again_the_same(self, words):
        text = " ".join(words)
        wrong = prompts.with_errors(text, random.Random(1))
        assert wrong != text
        assert wrong == prompts.with_errors(text, random.Random(1))

    def test_errors_are_in_some_words_and_leave_numbers_and_names_with_signs(self):
        text = "The mills of 1907, were known to x-ray through the valley " * 20
        wrong = prompts.with_errors(text.strip(), random.Random(0))
        assert wrong.count("1907,") == wrong.count("x-ray") == 20
        kept = [wrong.split(" ").count(word) for word in ("mills", "of", "were", "through")]
        assert min(kept) >= 10 and 48 <= sum(kept) <= 72  # of 80, of which a fifth is wrong


class TestByName:
    @pytest.fixture
    def wheel(self, tmp_path: Path, isolated_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        passages = ({"passage": passage(number), "question": f"is place {number} old"} for number in range(30))
        members = {
            corpora.WIKI_MEMBER: jsonl(*passages),
            corpora.FACTS_MEMBER: jsonl({"question": "who built the mill", "answer": ["nobody"]}),
            corpora.QUESTIONS_MEMBER: jsonl({"question": "Why do mills turn?", "answer": ["wind"]}),
        }
        monkeypatch.setattr(corpora, "WIKI", add_wheel(tmp_path, corpora.WIKI.package, corpora.WIKI.version, members))
        use_index(monkeypatch, tmp_path)

    def test_chat_and_rewriting_prompts_come_from_one_wheel(self, wheel):
        chat, rewriting = made(records("chat-prompts")), made(records("rewriting-prompts"))
        assert len(chat) == 32 and "Who built the mill?" in chat[-2] and "Why do mills turn?" in chat[-1]
        assert len(rewriting) == 30
        assert chat == made(records("chat-prompts")) and rewriting == made(records("rewriting-prompts"))

    def test_code_prompts_come_from_the_corpus_python(self, monkeypatch):
        monkeypatch.setattr(corpora, "python", lambda: iter(as_records("text", FUNCTION)))
        assert len(made(records("code-prompts"))) == 1


class TestHeldOut:
    @pytest.fixture
    def corpus(self, tmp_path) -> str:
        path = tmp_path / "asked.jsonl"
        path.write_bytes(jsonl(*({"prompt": f"What is {number}?"} for number in range(1000))))
        return str(path)

    def test_they_are_of_the_test_split_and_the_same_each_time(self, corpus):
        found = held_out_prompts(corpus, domain="chat", count=10)
        assert found == held_out_prompts(corpus, domain="chat", count=12)[:10]
        assert len({prompt.name for prompt in found}) == len({prompt.text for prompt in found}) == 10
        assert {prompt.text for prompt in found} <= {record.fields["prompt"] for record in records_of(corpus, "test")}
        other = held_out_prompts(corpus, domain="chat", count=10, split="validation")
        assert not {prompt.text for prompt in found} & {prompt.text for prompt in other}

    def test_the_order_of_the_corpus_is_no_matter(self, corpus, tmp_path):
        lines = Path(corpus).read_text().splitlines(keepends=True)
        (tmp_path / "other.jsonl").write_text("".join(lines[::-1]))
        other = held_out_prompts(str(tmp_path / "other.jsonl"), domain="chat", count=10)
        assert other == held_out_prompts(corpus, domain="chat", count=10)

    def test_too_few_are_told(self, corpus):
        with pytest.raises(DeepenError, match=r"asks \d+ things in its test documents, and 500 are wanted"):
            held_out_prompts(corpus, domain="chat", count=500)

    def test_a_text_asks_nothing(self, tmp_path):
        path = tmp_path / "texts.jsonl"
        path.write_bytes(jsonl(*({"text": f"Text {number}"} for number in range(300))))
        with pytest.raises(DeepenError, match=r"texts\.jsonl, line \d+: nothing is asked here"):
            held_out_prompts(str(path), domain="chat", count=1)

    def test_of_a_conversation_it_is_what_is_asked_first(self, tmp_path):
        path = tmp_path / "chats.jsonl"
        path.write_bytes(jsonl(*({"question": f"What is {number}?", "answer": "A."} for number in range(300))))
        assert all(prompt.text.startswith("What is") for prompt in held_out_prompts(str(path), domain="chat", count=3))


def test_splits_part_the_prompts_of_a_source_as_they_part_the_source():
    texts = [passage(number) for number in range(300)]
    by_split = {split: {text for text in texts if split_of(text) == split} for split in ("train", "validation", "test")}
    passages = [Record({"passage": text, "question": "is it old"}, text) for text in texts]
    everything = chain(
        prompts.rewriting_prompts(Record({"text": text}, text) for text in texts),
        prompts.chat_prompts(passages, [], []),
    )
    assert all(record.place in by_split[split_of_record(record)] for record in everything)
