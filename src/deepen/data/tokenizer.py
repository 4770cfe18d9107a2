"""A tokenizer of raw bytes, for random models and for tests: no file, no training, every text round-trips."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NUM_BYTES = 256
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|unk|>")
VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)
PAD_ID, BOS_ID, EOS_ID, UNK_ID = range(NUM_BYTES, VOCAB_SIZE)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|bos|>{{ message['role'] }}
{{ message['content'] }}<|eos|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|bos|>assistant
{% endif -%}"""


def byte_tokenizer(*, context_length: int = 512) -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 0..255 are the bytes of the text's UTF-8, followed by pad, bos, eos and unk.

    `decode(encode(text))` is `text` for every text. As with any tokenizer of transformers, a special token that is
    written out in the text becomes that token's id unless `split_special_tokens=True` is passed.
    """
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        unk_token="<|unk|>",
        clean_up_tokenization_spaces=False,
        model_max_length=context_length,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table), in byte order.

    Bytes that print as themselves keep their character; the others take the characters from U+0100 on.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    substitutes = iter(range(NUM_BYTES, 2 * NUM_BYTES))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(NUM_BYTES)]
