"""Where rows end, against transformers' criteria; and what of a row's text is shown meanwhile."""

from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import EosTokenCriteria, MaxLengthCriteria, PreTrainedTokenizerFast, StopStringCriteria

from deepen.core.errors import ConfigError
from deepen.data.tokenizer import BOS_ID, EOS_ID, byte_tokenizer
from deepen.generate.stop import StopConfig, StopWatch, StreamedText

tokenizer = cache(byte_tokenizer)

# Few characters, so that stop strings occur: of one to four bytes, and cut anywhere.
ALPHABET = "ab\né👩"
token_lists = st.lists(st.sampled_from([*sorted(set(ALPHABET.encode())), *b"aabb", BOS_ID, EOS_ID, 0xFF]), max_size=40)
stop_lists = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3).map(tuple)
configs = st.builds(
    StopConfig,
    eos_ids=st.sampled_from([(), (EOS_ID,), (BOS_ID, EOS_ID)]),
    stop_strings=stop_lists,
    max_new_tokens=st.integers(0, 45),
)


@cache
def fallback_tokenizer():
    pieces = ["<unk>", "▁a", "b", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def parts_of(data, ids):
    places = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return [ids[start:end] for start, end in zip([0, *places], [*places, len(ids)], strict=True)]


def theirs(config, tokenizer, prompt, ids):
    """How many of `ids` transformers keeps, and the criteria that end the row there, by name."""
    criteria = {"length": MaxLengthCriteria(max_length=len(prompt) + config.max_new_tokens)}
    if config.stop_strings:
        criteria["stop_string"] = StopStringCriteria(tokenizer, list(config.stop_strings))
    if config.eos_ids:
        criteria["eos"] = EosTokenCriteria(list(config.eos_ids))
    for count in range(1, len(ids) + 1):
        read = torch.tensor([[*prompt, *ids[:count]]])
        met = {name for name, criterion in criteria.items() if criterion(read, None).all()}
        if met:
            return count, met
    return len(ids), set()


def feed_in_parts(watch, parts):
    kept = []
    for part in parts:
        kept += part[: watch.feed(part)]
    return kept


@given(data=st.data(), config=configs, prompt=token_lists, ids=token_lists)
def test_rows_end_where_transformers_ends_them(data, config, prompt, ids):
    prompt = [BOS_ID, *prompt]
    watch = StopWatch(config, tokenizer(), prompt)
    kept = feed_in_parts(watch, parts_of(data, ids))
    if config.max_new_tokens == 0:  # transformers decides only behind a token
        assert (kept, watch.reason) == ([], "length")
        return
    count, met = theirs(config, tokenizer(), prompt, ids)
    assert kept == ids[:count]
    assert watch.reason == next((reason for reason in ("eos", "stop_string", "length") if reason in met), None)


characters = st.sampled_from([("▁a",), ("b",), ("<0x0A>",), ("<0xC3>", "<0xA9>")])


@given(
    pieces=st.lists(characters, max_size=30).map(lambda parts: [piece for part in parts for piece in part]),
    stop_string=st.sampled_from(["\n", "b\n", "\n\n", "é", "éb", "\né", " a\n"]),
)
def test_byte_tokens_complete_a_stop_string_at_once(pieces, stop_string):
    prompt, ids = (fallback_tokenizer().convert_tokens_to_ids(part) for part in (["<s>", "b"], pieces))
    config = StopConfig(stop_strings=(stop_string,), max_new_tokens=100)
    watch = StopWatch(config, fallback_tokenizer(), prompt)
    assert watch.feed(ids) == theirs(config, fallback_tokenizer(), prompt, ids)[0]


def test_the_token_that_completes_a_stop_string_is_kept_and_ends_the_row():
    watch = StopWatch(StopConfig(stop_strings=("STOP",), max_new_tokens=100), tokenizer())
    assert watch.feed(b"on and on, ST") == 13
    assert not watch.finished
    assert watch.feed(b"OPPED") == 2
    assert watch.reason == "stop_string"
    assert watch.feed(b"more") == 0


def test_a_stop_string_may_begin_in_the_prompt_but_not_lie_in_it():
    config = StopConfig(stop_strings=("\n\n",), max_new_tokens=9)
    assert StopWatch(config, tokenizer(), list(b"x\n")).feed(b"\nx") == 1
    assert StopWatch(config, tokenizer(), list(b"x\n\n")).feed(b"x\nx") == 3


def test_a_stop_string_may_be_a_special_token():
    watch = StopWatch(StopConfig(stop_strings=("<|eos|>",), max_new_tokens=9), tokenizer())
    assert watch.feed([97, EOS_ID, 97]) == 2
    assert watch.reason == "stop_string"


def test_the_end_of_sequence_is_kept_as_last_token_and_named_before_other_reasons():
    config = StopConfig(eos_ids=(EOS_ID,), stop_strings=("<|eos|>",), max_new_tokens=3)
    watch = StopWatch(config, tokenizer())
    assert watch.feed([97, 98, EOS_ID, 99]) == 3
    assert watch.reason == "eos"


def test_never_more_than_the_most_new_tokens():
    watch = StopWatch(StopConfig(max_new_tokens=5))
    assert [watch.feed([1, 2, 3]), watch.feed([4, 5, 6]), watch.feed([7])] == [3, 2, 0]
    assert watch.reason == "length"
    nothing = StopWatch(StopConfig(max_new_tokens=0))
    assert nothing.finished
    assert nothing.feed([1]) == 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"eos_ids": (2, -1)}, "eos_ids must hold token ids of 0 or more, not -1"),
        ({"stop_strings": ("a", "")}, 'stop_strings must hold strings of at least one character, not ""'),
        ({"max_new_tokens": -3}, "max_new_tokens must be 0 or more, not -3"),
    ],
    ids=str,
)
def test_an_impossible_value_is_named(setting, message):
    with pytest.raises(ConfigError, match=message):
        StopWatch(StopConfig(**setting), tokenizer())


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ConfigError, match="pass `tokenizer`"):
        StopWatch(StopConfig(stop_strings=("x",)))


# Streamed text.


@given(data=st.data(), config=configs, ids=token_lists)
def test_streamed_text_is_the_text_of_the_kept_tokens_up_to_the_stop_string(data, config, ids):
    watch = StopWatch(config, tokenizer())
    text = StreamedText(tokenizer(), config.stop_strings)
    kept, shown = [], ""
    for part in parts_of(data, ids):
        new = part[: watch.feed(part)]
        kept += new
        shown += text.feed(new, watch.reason)
        whole = tokenizer().decode(kept, skip_special_tokens=True)
        assert whole.startswith(shown)
        if watch.reason == "stop_string":
            starts = [whole.find(stop) for stop in config.stop_strings if stop in whole]
            assert shown == whole[: min(starts, default=len(whole))]
        if watch.finished:
            break
    if watch.reason in ("eos", "length"):
        assert shown == whole
    if not watch.finished:
        assert shown + text.feed([], "length") == whole


@given(stop_strings=stop_lists, text=st.text(ALPHABET + "c", max_size=30))
def test_what_can_not_begin_a_stop_string_is_shown_at_once(stop_strings, text):
    stream = StreamedText(tokenizer(), stop_strings)
    shown = "".join(stream.feed([token]) for token in text.encode())
    held = text[len(shown) :]
    assert shown + held == text
    assert held == "" or any(stop.startswith(held) for stop in stop_strings)


def test_a_beginning_is_held_back_until_it_goes_on_otherwise_or_the_row_ends():
    text = StreamedText(tokenizer(), ("END",))
    assert [text.feed([byte]) for byte in b"xENxE"] == ["x", "", "", "ENx", ""]
    assert text.feed(b"N", "length") == "EN"


def test_text_before_a_hidden_stop_string_is_shown_whole():
    text = StreamedText(tokenizer(), ("a<|eos|>",))
    assert text.feed(b"ba") == "b"
    assert text.feed([EOS_ID], "stop_string") == "a"
