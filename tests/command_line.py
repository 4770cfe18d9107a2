"""Commands as a user types them, and a corpus for them to work on."""

import json
from pathlib import Path

from deepen.cli.main import main


def said(capsys, command: str) -> str:
    """What a command that succeeds prints."""
    assert main(command.split()) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys, command: str) -> str:
    """What a command that can't be run says on stderr."""
    assert main(command.split()) == 2
    return capsys.readouterr().err


def write_sentences(path: Path, number: int) -> None:
    """A corpus of so many documents that hardly differ."""
    texts = [f"{index}: it reads the same sentence again and again. " * 4 for index in range(number)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
