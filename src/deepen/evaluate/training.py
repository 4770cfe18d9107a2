"""What a checkpoint of `deepen train` says of the run that made it: from which base, at what cost, with which settings.

Free of torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepen.core.errors import CheckpointError
from deepen.core.files import read_json
from deepen.evaluate.results import BaseOfStage, TrainingOfStage

LEDGER = "ledger.json"
STATE = "training/state.json"

_MADE_BY = "`deepen train` writes it; give a checkpoint's folder (OUTPUT_DIR/step_N) as it was written"


@dataclass(frozen=True)
class Origin:
    """What a model that was trained as a whole comes from, and by which method it was trained."""

    base: BaseOfStage
    method: str
    method_config: dict[str, Any]


def read_training(address: str) -> TrainingOfStage | None:
    """What it cost to train the model in the folder `address`, and the run's settings where they are still there.

    None where there is no ledger: nothing was trained there, or by something else. Raises `CheckpointError` for files
    that `deepen train` has not written.
    """
    folder = Path(address).expanduser()
    if not address or not (folder / LEDGER).is_file():
        return None
    ledger = _object(folder / LEDGER)
    figures = {name: value for name, value in ledger.items() if isinstance(value, int | float | None)}
    for name in ("steps", "training_flops"):
        if figures.get(name) is None:
            raise CheckpointError(f"{folder / LEDGER} has no {name}; {_MADE_BY}")
    state = _object(folder / STATE) if (folder / STATE).is_file() else {}
    run = state.get("run")
    return TrainingOfStage(figures=figures, run=run if isinstance(run, dict) else None)


def read_origin(address: str) -> Origin | None:
    """What the whole model in the folder `address` was trained from; None where the folder doesn't say.

    A trained model has a digest of its own, so only the run that made it can tell the base that it goes back to. Raises
    `CheckpointError` for a file that `deepen train` has not written.
    """
    path = Path(address).expanduser() / STATE
    if not address or not path.is_file():
        return None
    state = _object(path)
    run, config = state.get("run"), state.get("method_config")
    texts = [run.get("model") if isinstance(run, dict) else None, *map(state.get, ("base", "tokenizer", "method"))]
    model, base, tokenizer, method = texts
    if not all(isinstance(text, str) for text in texts) or not isinstance(config, dict):
        raise CheckpointError(f"{path} doesn't say model, base, tokenizer and method of its run; {_MADE_BY}")
    return Origin(BaseOfStage(str(model), str(base), str(tokenizer)), str(method), config)


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path, error=CheckpointError)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; {_MADE_BY}")
    return content
