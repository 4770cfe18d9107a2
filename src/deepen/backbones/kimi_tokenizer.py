"""The tokenizer of Kimi Linear checkpoints, from the files they are published with.

They have no tokenizer.json. `tiktoken.model` holds byte strings, the pieces, in the order in which to merge;
`tokenizer_config.json` names the tokens behind them; Python code (`TikTokenTokenizer`) cuts text up and looks for
pieces with the package tiktoken. transformers reads such a file as well, but cuts text up as another model does, which
gives other ids. Here a byte-level BPE gives the published ids, and no code of the model runs.
"""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepen.core.errors import CheckpointError
from deepen.core.files import read_json
from deepen.data.tokenizer import NUM_BYTES, byte_characters

PIECES_FILE = "tiktoken.model"
NUM_ADDED = 256
"""Tokens behind the pieces; those that tokenizer_config.json doesn't name are reserved."""

_MODEL_TYPE = "kimi_linear"
_CLASS = "TikTokenTokenizer"
_SETTINGS_FILE = "tokenizer_config.json"
_TEMPLATE_FILE = "chat_template.jinja"
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")

_BEFORE_A_WORD = r"[^\r\n\p{L}\p{N}]?"
_CAPITAL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_SMALL = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
# What a piece may not reach across. The order decides: at each place the first form that fits is taken.
_FORMS = (
    r"[\p{Han}]+",
    f"{_BEFORE_A_WORD}{_CAPITAL}*{_SMALL}+{_CONTRACTION}",
    f"{_BEFORE_A_WORD}{_CAPITAL}+{_SMALL}*{_CONTRACTION}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)


def is_published_format(folder: Path) -> bool:
    """Whether `folder` is a Kimi Linear model with its tokenizer as published, and not as transformers saves one."""
    if not (folder / PIECES_FILE).is_file() or (folder / "tokenizer.json").exists():
        return False
    return _field(folder / "config.json", "model_type") == _MODEL_TYPE and _class_of(folder) == _CLASS


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`, with the ids of the published code, its named tokens and its chat template.

    One thing is left out: that code also cuts where 25,000 characters, all blank or none, or 400,000 of any kind end.

    Raises `CheckpointError` if a file is damaged, or the two don't belong together.
    """
    pieces = _read_pieces(folder / PIECES_FILE)
    settings = read_json(folder / _SETTINGS_FILE, error=CheckpointError)
    try:
        added = _added_tokens(settings, len(pieces))
        named = {name: _content(settings[name]) for name in _NAMED_TOKENS if settings.get(name) is not None}
    except (KeyError, TypeError, ValueError, AttributeError) as cause:
        raise CheckpointError(f"{folder / _SETTINGS_FILE} has tokens that can't be read ({cause!r})") from cause
    template = folder / _TEMPLATE_FILE
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(pieces, added),
        model_max_length=settings.get("model_max_length"),
        chat_template=template.read_text("utf-8") if template.is_file() else settings.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )
    _check_ids(folder, tokenizer, len(pieces), added)
    return tokenizer


def _read_pieces(file: Path) -> dict[bytes, int]:
    """The pieces with their ranks, which are their ids: a line each, base64 and a number."""
    pieces: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            piece, rank = line.split()
            pieces[base64.b64decode(piece, validate=True)] = int(rank)
        except ValueError as cause:
            raise CheckpointError(f"{file}, line {number}, is no piece with its rank; fetch it again") from cause
    if sorted(pieces.values()) != list(range(len(pieces))):
        raise CheckpointError(f"{file} is damaged: {len(pieces)} pieces don't have the ranks from 0 on; fetch it again")
    if missing := [byte for byte in range(NUM_BYTES) if bytes([byte]) not in pieces]:
        raise CheckpointError(f"{file} has no piece for byte {missing[0]}, without which some texts have no ids")
    return pieces


def _added_tokens(settings: Mapping[str, Any], first_id: int) -> list[AddedToken]:
    """The tokens with the ids from `first_id` on."""
    named = {int(id_): fields for id_, fields in settings["added_tokens_decoder"].items()}
    if min(named) != first_id or max(named) >= first_id + NUM_ADDED:
        raise CheckpointError(
            f"{_SETTINGS_FILE} names tokens {min(named)} to {max(named)}, but {PIECES_FILE} has {first_id} pieces, "
            f"behind which the {NUM_ADDED} added ones begin; fetch both again"
        )
    reserved = {id_: f"<|reserved_token_{id_}|>" for id_ in range(first_id, first_id + NUM_ADDED)}
    return [_added_token(named.get(id_, {"content": content})) for id_, content in reserved.items()]


def _added_token(fields: Mapping[str, Any]) -> AddedToken:
    flags = {name: bool(fields.get(name, False)) for name in ("lstrip", "rstrip", "single_word", "normalized")}
    return AddedToken(fields["content"], special=bool(fields.get("special", True)), **flags)


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _backend(pieces: Mapping[bytes, int], added: list[AddedToken]) -> Tokenizer:
    characters = byte_characters()

    def text(piece: bytes) -> str:
        return "".join(characters[byte] for byte in piece)

    backend = Tokenizer(
        models.BPE(
            vocab={text(piece): rank for piece, rank in pieces.items()},
            merges=[(text(left), text(right)) for left, right in _merges(pieces)],
            # A word that is a piece is that piece, whether or not merges lead there.
            ignore_merges=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(_FORMS)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added)
    return backend


def _merges(pieces: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Pairs of pieces that make a piece, first those that make the lowest one.

    tiktoken knows no pairs: of all neighbours it joins those that make the lowest piece, whatever they are.
    """
    merges = []
    for whole in sorted(pieces, key=lambda piece: pieces[piece]):
        pairs = [(whole[:cut], whole[cut:]) for cut in range(1, len(whole))]
        known = [(left, right) for left, right in pairs if left in pieces and right in pieces]
        merges += sorted(known, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))
    return merges


def _check_ids(folder: Path, tokenizer: PreTrainedTokenizerFast, first_id: int, added: list[AddedToken]) -> None:
    """An added token that is written like a piece or like another one would move all behind it."""
    for id_, token in enumerate(added, start=first_id):
        found = tokenizer.convert_tokens_to_ids(token.content)
        if found != id_:
            raise CheckpointError(
                f'{folder / _SETTINGS_FILE} names token {id_} "{token.content}", as {found} is called'
            )
    if len(tokenizer) != first_id + len(added):
        raise CheckpointError(
            f"{folder / _SETTINGS_FILE} has a {' or '.join(_NAMED_TOKENS)} that is none of its added_tokens_decoder"
        )


def _class_of(folder: Path) -> object:
    file = folder / _SETTINGS_FILE
    return _field(file, "tokenizer_class") if file.is_file() else None


def _field(file: Path, name: str) -> object:
    content = read_json(file, error=CheckpointError)
    return content.get(name) if isinstance(content, dict) else None
