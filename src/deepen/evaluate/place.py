"""Where the results of a stage go: their file, whether it can be written, and what stands there already.

Free of torch.
"""

from pathlib import Path
from tempfile import TemporaryFile

from deepen.core.errors import DeepenError
from deepen.evaluate.results import StageResults


def results_path(output_dir: str, stage: str) -> Path:
    """The file of a stage."""
    return Path(output_dir).expanduser() / f"{stage}_results.json"


def require_writable(path: Path) -> None:
    """Raises `DeepenError` if nothing can be written there, to be told before the work and not behind it.

    Nothing is left there, nor is any folder made.
    """
    if path.is_dir():
        raise DeepenError(f"can't write {path}: it is a folder. Choose another place")
    try:
        nearest = next(place for place in path.resolve().parents if place.exists())
        with TemporaryFile(dir=nearest):
            pass
    except OSError as cause:
        raise DeepenError(f"can't write {path}: {cause.strerror}. Choose another place or mend this one") from cause


def what_stands_at(path: Path) -> str | None:
    """What new results would replace, in words; None where there is nothing."""
    if not path.is_file():
        return None
    try:
        return f"the results of {StageResults.read(path).config.get('model')}"
    except DeepenError:
        # It is replaced all the same, so what is wrong with it is of no account.
        return "a file that is no results file"
