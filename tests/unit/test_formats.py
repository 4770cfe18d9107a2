"""The formats of records, and their ids; token ids as a format are in test_distill.py."""

import pytest

from deepen.core.errors import DeepenError
from deepen.data.encoding import encode, encode_asked, with_end
from deepen.data.formats import Conversation, Message, Prompt, Text, difficulty_of, document_of
from deepen.data.records import Record
from deepen.data.tokenizer import BOS_ID, EOS_ID, byte_tokenizer

TOKENIZER = byte_tokenizer()


def document(**fields):
    return document_of(Record(fields, "data, line 7"))


def turns(*contents: str) -> tuple[Message, ...]:
    return tuple(Message("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(contents))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "a b"}, Text("a b")),
        ({"text": "a b", "id": 3, "input": "no matter"}, Text("a b")),
        ({"instruction": "do", "output": "done"}, ("do", "done")),
        ({"instruction": "do", "input": "it", "output": "done"}, ("do\n\nit", "done")),
        ({"instruction": "do", "input": " ", "output": "done"}, ("do", "done")),
        ({"instruction": "do", "input": None, "output": "done"}, ("do", "done")),
        ({"question": "q", "answer": "a"}, ("q", "a")),
        ({"prompt": "p", "response": "r", "source": "s"}, ("p", "r")),
        ({"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}, ("u", "a")),
    ],
)
def test_a_record_becomes_what_its_fields_say(fields, expected):
    found = document(**fields)
    if isinstance(expected, tuple):
        assert isinstance(found, Conversation) and found.messages == turns(*expected)
    else:
        assert found == expected


@pytest.mark.parametrize(("told", "expected"), [(3, 3), (0, None), ("hard", None), (True, None), (2.0, None)])
def test_an_answer_may_tell_how_hard_it_is(told, expected):
    for fields in ({"prompt": "p", "response": "r"}, {"prompt_ids": [1], "response_ids": [2], "tokenizer": "t"}):
        assert difficulty_of(document(**fields, difficulty=told)) == expected
    assert difficulty_of(document(text="a", difficulty=3)) is None


def test_a_prompt_alone_is_asked_and_not_answered():
    asked = document(prompt="p", id=3)
    assert asked == Prompt((Message("user", "p"),), "data, line 7")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": "a", "prompt": "what made it"}, Text("a")),
        ({"question": "q", "answer": "a", "prompt": "p"}, Conversation(turns("q", "a"), "data, line 7")),
    ],
)
def test_beside_another_format_a_prompt_is_no_matter(fields, expected):
    assert document(**fields) == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "x", "answer": "y"}, "the fields prompt, answer fits no known format"),
        ({"prompt": "x", "output": "y"}, "fits no known format; known are text;"),
        ({"prompt": " "}, '"prompt" is empty'),
        ({"prompt": ["x"]}, 'a string in "prompt"; it holds list'),
        ({"content": "x", "title": "y"}, "the fields content, title fits no known format; known are text;"),
        ({}, "the fields none fits no known format"),
        ({"instruction": "x"}, "fits no known format"),
        ({"text": "x", "messages": []}, "fits several formats (text, messages)"),
        ({"prompt": "x", "response": "y", "question": "x", "answer": "y"}, "fits several formats (question, prompt)"),
        ({"text": 3}, "it holds int"),
        ({"prompt": "x", "response": " "}, '"response" is empty'),
        ({"prompt": "x", "response": ["y"]}, "it holds list"),
        ({"instruction": "x", "input": 3, "output": "y"}, 'a string in "input"; it holds int'),
        ({"messages": []}, '"messages" must be a list of at least one message'),
        ({"messages": "x"}, '"messages" must be a list'),
        ({"messages": ["x"]}, 'message 1: expected an object with "role" and "content", found str'),
        ({"messages": [{"from": "human", "value": "x"}]}, "found the fields from, value"),
        ({"messages": [{"role": "human", "content": "x"}]}, "role is 'human', not one of system, user, assistant"),
        ({"messages": [{"role": "user", "content": None}]}, 'message 1: "content" must be a text'),
        ({"messages": [{"role": "user", "content": "x"}]}, "the last message is the user's"),
        (
            {"messages": [{"role": role, "content": "x"} for role in ("user", "user", "assistant")]},
            "user and assistant must take turns, not user, user, assistant",
        ),
        (
            {"messages": [{"role": role, "content": "x"} for role in ("user", "system", "assistant")]},
            "a system message may only come first",
        ),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must take turns"),
    ],
)
def test_nothing_is_guessed(fields, message):
    with pytest.raises(DeepenError) as raised:
        document(**fields)
    assert str(raised.value).startswith("data, line 7") and message in str(raised.value)


class TestEncoding:
    def test_a_text_is_learned_with_its_end(self):
        encoded = encode(Text("hé"), TOKENIZER)
        assert encoded.ids == [*"hé".encode(), EOS_ID] and encoded.learned == [True] * 4

    def test_no_end_is_added_where_there_is_one_or_none_is_known(self):
        assert with_end([1, EOS_ID], TOKENIZER) == [1, EOS_ID]
        assert with_end([EOS_ID, 1], TOKENIZER) == [EOS_ID, 1, EOS_ID]
        endless = byte_tokenizer()
        endless.eos_token = None
        assert with_end([1], endless) == [1]

    def test_answers_are_learned_and_nothing_else(self):
        found = document(
            messages=[{"role": role, "content": role[:1]} for role in ("system", *["user", "assistant"] * 2)]
        )
        encoded = encode(found, TOKENIZER)
        whole = TOKENIZER.apply_chat_template(
            [{"role": message.role, "content": message.content} for message in found.messages], tokenize=False
        )
        assert encoded.ids == TOKENIZER.encode(whole, add_special_tokens=False)
        learned = [token for token, is_learned in zip(encoded.ids, encoded.learned, strict=True) if is_learned]
        assert learned == [*b"a", EOS_ID, *b"\n"] * 2
        assert encoded.ids[0] == BOS_ID and not encoded.learned[0]

    @pytest.mark.parametrize("answer", [{}, {"response": "it"}], ids=["alone", "answered"])
    def test_what_is_asked_is_what_a_prompt_of_generation_is(self, answer):
        found = document(prompt="say it", **answer)
        asked = TOKENIZER.apply_chat_template(
            [{"role": "user", "content": "say it"}], add_generation_prompt=True, tokenize=False
        )
        assert list(encode_asked(found, TOKENIZER)) == TOKENIZER.encode(asked, add_special_tokens=False)
        if answer:
            assert encode(found, TOKENIZER).parts[0] == encode_asked(found, TOKENIZER)

    def test_a_prompt_without_an_answer_has_nothing_to_learn(self):
        with pytest.raises(DeepenError, match=r'^data, line 7: a prompt without a "response" .* `deepen distill MODEL'):
            encode(document(prompt="say it"), TOKENIZER)

    def test_a_prompt_with_a_special_token_written_out_is_refused(self):
        with pytest.raises(DeepenError, match=r"the user's message has <\|eos\|> written out"):
            encode_asked(document(prompt="say <|eos|>"), TOKENIZER)

    def test_a_special_token_written_out_is_refused_in_a_conversation_and_text_in_a_text(self):
        with pytest.raises(DeepenError, match=r"line 7: the user's message has <\|eos\|> written out"):
            encode(document(prompt="say <|eos|>", response="it"), TOKENIZER)
        assert encode(Text("<|eos|>"), TOKENIZER).ids == [*b"<|eos|>", EOS_ID]

    def test_a_conversation_needs_a_template(self):
        bare = byte_tokenizer()
        bare.chat_template = None
        with pytest.raises(DeepenError, match="line 7: a conversation needs a chat template"):
            encode(document(prompt="a", response="b"), bare)

    def test_a_template_that_refuses_is_named(self):
        strict = byte_tokenizer()
        strict.chat_template = "{{ raise_exception('no system message, please') }}"
        with pytest.raises(DeepenError, match=r"line 7: .* refuses it: no system message, please"):
            encode(document(prompt="a", response="b"), strict)

    def test_a_template_that_rewrites_earlier_turns_is_refused(self):
        forgetful = byte_tokenizer()
        forgetful.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
        with pytest.raises(DeepenError, match="conversations of one turn"):
            encode(document(prompt="a", response="b"), forgetful)
