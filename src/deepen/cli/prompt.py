"""Prompts of the command line: read from a flag, a file or standard input, and encoded for a model."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepen.core.errors import PromptError


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt's text; raises `PromptError` if there is none, more than one, an empty one, or it is not UTF-8."""
    if prompt is not None and prompt_file is not None:
        raise PromptError(f"--prompt and --prompt-file {prompt_file} are two prompts; give one of them")
    if prompt is not None:
        source, text = "--prompt", prompt
    elif prompt_file is not None:
        source, text = prompt_file, _decoded(_file(prompt_file), prompt_file)
    elif sys.stdin is None or sys.stdin.isatty():
        raise PromptError("there is no prompt: pass --prompt TEXT or --prompt-file FILE, or pipe one in")
    else:
        source, text = "standard input", _decoded(sys.stdin.buffer.read(), "standard input")
    if not text:
        raise PromptError(f"the prompt ({source}) is empty; give at least one character")
    try:
        text.encode()
    except UnicodeEncodeError as cause:  # arguments may hold bytes that no encoding explains
        raise PromptError(f"the prompt ({source}) is not UTF-8 text; convert it first") from cause
    return text


def _file(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as cause:
        raise PromptError(f"--prompt-file {path} can't be read: {cause.strerror}") from cause


def _decoded(content: bytes, source: str) -> str:
    """The text, less the newline that ends the last line of every file and of every `echo`."""
    try:
        return content.decode("utf-8-sig").removesuffix("\n")
    except UnicodeDecodeError as cause:
        raise PromptError(f"the prompt ({source}) is not UTF-8 text (byte {cause.start}); convert it first") from cause


def encode(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    """The ids of the prompt, as it stands or as a user's message that asks for an answer."""
    if not chat:
        return [int(token) for token in tokenizer.encode(text, verbose=False)]
    return encode_messages(tokenizer, [{"role": "user", "content": text}], way_out="--no-chat does without")


def encode_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, way_out: str) -> list[int]:
    """The ids of a conversation (`role` and `content` of each message) that asks for an answer.

    Raises `PromptError`, which ends with `way_out`, where the tokenizer's template refuses it.
    """
    try:
        framed = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    except Exception as cause:  # a template is a program that comes with the model
        raise PromptError(f"the model's chat template refuses the prompt: {cause}; {way_out}") from cause
    # The template has written the special tokens that belong there.
    return [int(token) for token in tokenizer.encode(framed, add_special_tokens=False, verbose=False)]
