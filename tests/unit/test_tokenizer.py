import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from deepen.core.errors import ConfigError
from deepen.data.tokenizer import (
    BOS_ID,
    EOS_ID,
    NUM_BYTES,
    PAD_ID,
    UNK_ID,
    VOCAB_SIZE,
    byte_characters,
    byte_tokenizer,
    train_bpe,
)

TOKENIZER = byte_tokenizer()

MESSAGES = [{"role": "user", "content": "Hi <3"}, {"role": "assistant", "content": "Hello."}]

texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(texts)
def test_ids_are_the_bytes_and_every_text_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


@given(texts, texts, st.sampled_from(["<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>"]))
def test_special_tokens_in_the_text_come_back_too(before, after, special):
    text = before + special + after
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    plain = TOKENIZER.encode(text, split_special_tokens=True)
    assert plain == list(text.encode())


@pytest.mark.parametrize(
    "text", ["", " ", "  a  b ", "\r\n\t\x00", "don 't stop .", "日本 🎉", "\ufeff\u200b", "a" * 5000]
)
def test_texts_that_tokenizers_like_to_tidy_up(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text, truncation=False)) == text


def test_special_tokens_have_the_ids_after_the_bytes():
    assert (PAD_ID, BOS_ID, EOS_ID, UNK_ID, VOCAB_SIZE) == (256, 257, 258, 259, 260)
    assert TOKENIZER.pad_token_id == PAD_ID
    assert TOKENIZER.bos_token_id == BOS_ID
    assert TOKENIZER.eos_token_id == EOS_ID
    assert TOKENIZER.unk_token_id == UNK_ID
    assert len(TOKENIZER) == VOCAB_SIZE


def test_single_ids_decode_to_their_byte_or_name():
    assert TOKENIZER.decode([72, 105, EOS_ID]) == "Hi<|eos|>"
    assert TOKENIZER.decode([72, 105, EOS_ID], skip_special_tokens=True) == "Hi"
    assert TOKENIZER.decode([0xE2, 0x82]) == "\ufffd"  # two thirds of a euro sign


def test_the_chat_template_marks_roles_and_ends():
    text = TOKENIZER.apply_chat_template(MESSAGES, tokenize=False)
    assert text == "<|bos|>user\nHi <3<|eos|>\n<|bos|>assistant\nHello.<|eos|>\n"
    prompt = TOKENIZER.apply_chat_template(MESSAGES[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("<|bos|>assistant\n")


def test_it_is_saved_and_loaded_like_any_other(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.encode("é <|eos|>") == TOKENIZER.encode("é <|eos|>") == [195, 169, 32, EOS_ID]
    assert loaded.apply_chat_template(MESSAGES) == TOKENIZER.apply_chat_template(MESSAGES)
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.model_max_length) == (EOS_ID, PAD_ID, 512)


def test_batches_are_padded_with_the_pad_token():
    batch = TOKENIZER(["ab", "a"], padding=True)
    assert batch["input_ids"] == [[97, 98], [97, PAD_ID]]
    assert batch["attention_mask"] == [[1, 1], [1, 0]]


TO_TRAIN_ON = ("the cat sat on the mat; the hat", "that the cat ate the rat", "é the théâtre") * 5
TRAINED = train_bpe(TO_TRAIN_ON, vocab_size=285)


class TestBpe:
    def test_it_has_the_ids_of_bytes_and_marks_and_merges_behind_them(self):
        assert len(TRAINED) == 285 == TRAINED.vocab_size
        assert TRAINED.eos_token_id == EOS_ID and TRAINED.pad_token_id == PAD_ID
        assert TRAINED.convert_tokens_to_ids(byte_characters()) == list(range(NUM_BYTES))
        (merged,) = TRAINED.encode(" the")
        assert merged >= VOCAB_SIZE

    @given(texts)
    def test_every_text_round_trips(self, text):
        assert TRAINED.decode(TRAINED.encode(text, split_special_tokens=True)) == text

    def test_it_is_shorter_than_bytes(self):
        text = TO_TRAIN_ON[0]
        assert len(TRAINED.encode(text)) < 0.6 * len(byte_tokenizer().encode(text))

    def test_it_is_the_same_for_the_same_texts(self):
        again = train_bpe(TO_TRAIN_ON, vocab_size=285)
        assert again.backend_tokenizer.to_str() == TRAINED.backend_tokenizer.to_str()

    def test_it_comes_back_from_a_folder(self, tmp_path):
        TRAINED.save_pretrained(tmp_path)
        again = AutoTokenizer.from_pretrained(tmp_path)
        text = "the théâtre <|eos|> \n x"
        assert again.encode(text) == TRAINED.encode(text)

    def test_a_vocabulary_without_room_is_refused(self):
        with pytest.raises(ConfigError, match="vocab_size must be above 260"):
            train_bpe(TO_TRAIN_ON, vocab_size=260)
