"""deepen train"""

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from deepen.cli.options import OptionalInteger, OptionalName, OptionalNumber, OptionalText
from deepen.core.errors import ConfigError
from deepen.core.files import read_json


@dataclass(frozen=True)
class Options:
    """Train a method's model as a run file says; a flag goes over what the file has.

    The resolved configuration is printed and written to OUTPUT_DIR/run.json, figures to OUTPUT_DIR/train.jsonl, the
    adapter to OUTPUT_DIR/step_N, with what the run has cost in ledger.json.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN.json")]
    """The run's configuration."""

    model: OptionalText = None
    """A base model's address, or an adapter folder to go on with."""

    data: OptionalText = None
    """The corpus: wiki, a .txt or .jsonl file, or a folder of such files."""

    method: OptionalName = None
    """The method to put on a base model."""

    config: OptionalText = None
    """The method's configuration: a preset or a file."""

    num_steps: OptionalInteger = None
    """Optimizer steps."""

    batch_size: OptionalInteger = None
    """Rows a step reads."""

    max_length: OptionalInteger = None
    """Tokens of a row, at most."""

    learning_rate: OptionalNumber = None
    """For all parameters, in place of the method's own."""

    grad_clip: OptionalNumber = None
    """Longest gradient."""

    seed: OptionalInteger = None
    """Of new parameters, of what the method draws and of the order of the data."""

    output_dir: OptionalText = None
    """Where the run is written; empty or not there yet."""

    log_interval: OptionalInteger = None
    """Steps from one line of figures to the next."""


def run(options: Options) -> int:
    """Train, and print where the adapter is."""
    from deepen.train.config import RunConfig
    from deepen.train.run import train

    config = RunConfig.from_dict(_with_flags(options), source=options.run)
    print(json.dumps(config.to_dict(), indent=2))
    print(f"trained adapter: {train(config)}")
    return 0


def _with_flags(options: Options) -> dict[str, Any]:
    """The file's fields, with those that were given as flags over them."""
    content = read_json(options.run, error=ConfigError)
    if not isinstance(content, dict):
        raise ConfigError(f"{options.run} must hold one JSON object, the fields of a run")
    flags = asdict(options)
    del flags["run"]
    return {**content, **{name: value for name, value in flags.items() if value is not None}}
