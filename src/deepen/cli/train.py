"""deepen train"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from deepen.cli.options import OptionalInteger, OptionalName, OptionalNumber, OptionalText, Settings, read_settings
from deepen.core import registry
from deepen.core.errors import ConfigError
from deepen.core.files import read_json

# Of a run; train/config.py has them too, and torch with it.
_BUDGETS = "num_steps", "num_tokens", "flops"
# Flags for fields of a method's configuration, which not every method has.
_OF_METHOD = {"enable_recursive": "recursive_enabled", "phase": "phase"} | {
    name: name for name in ("chunk_width", "max_inner_steps")
}

# --flag or --no-flag; neither sets nothing.
OptionalSwitch = tyro.conf.DisallowNone[bool | None]
OptionalRate = Annotated[float | Literal["auto"] | None, tyro.conf.arg(metavar="FLOAT|auto", aliases=["--lr"])]


@dataclass(frozen=True)
class Options:
    """Train a method's model as a run file says; a flag goes over what the file has.

    The resolved configuration is printed and written to OUTPUT_DIR/run.json, figures to OUTPUT_DIR/train.jsonl, the
    trained model to OUTPUT_DIR/step_N, with what the run has cost in ledger.json. The same command goes on with a run
    that was cut off. On several devices: torchrun --nproc-per-node=N -m deepen train RUN.json.
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN.json")]
    """The run's configuration."""

    model: Annotated[str | None, tyro.conf.arg(metavar="TEXT", aliases=["--model_name"])] = None
    """A base model's address, or an adapter folder to go on with."""

    data: OptionalText = None
    """The corpus: wiki, books, python, a generated task as task:pointer, a hub dataset's name, a .txt or .jsonl file,
    or a folder of such files."""

    method: OptionalName = None
    """The method to put on a base model."""

    config: Annotated[str | None, tyro.conf.arg(metavar="TEXT", aliases=["--recursive-config"])] = None
    """The method's configuration: a preset or a file."""

    enable_recursive: OptionalSwitch = None
    """Set the field recursive_enabled of the method's configuration."""

    phase: OptionalName = None
    """The field of that name in the method's configuration, as the next two: what trains."""

    chunk_width: OptionalInteger = None
    """Tokens of a chunk."""

    max_inner_steps: OptionalInteger = None
    """Passes over a chunk, at most."""

    num_steps: OptionalInteger = None
    """Optimizer steps."""

    batch_size: OptionalInteger = None
    """Rows of a step, over all devices."""

    max_length: OptionalInteger = None
    """Tokens of a row, at most."""

    learning_rate: OptionalRate = None
    """For all parameters, in place of the method's own; auto follows the width of a nanochat model."""

    warmup_steps: OptionalInteger = None
    """Steps in which the learning rate rises."""

    grad_clip: OptionalNumber = None
    """Longest gradient."""

    seed: OptionalInteger = None
    """Of new parameters, of what the method draws and of the order of the data."""

    output_dir: OptionalText = None
    """Where the run is written: empty, not there yet, or the same run's."""

    branch_from: OptionalText = None
    """A checkpoint of another run of the same model and data to begin from, as for a cooldown."""

    log_interval: OptionalInteger = None
    """Steps from one line of figures to the next."""

    save_interval: OptionalInteger = None
    """Steps from one checkpoint to the next."""

    eval_interval: OptionalInteger = None
    """Steps from one look at validation documents to the next."""

    push_to_hub: Annotated[str | None, tyro.conf.arg(metavar="OWNER/NAME")] = None
    """A repository of the model hub to upload the trained model to; made private if it isn't there."""

    set: Settings = ()
    """Any other field of the run: --set optimizer=muon --set schedule=cosine."""


def run(options: Options) -> int:
    """Train, and print where the trained model is."""
    from deepen.train.config import RunConfig
    from deepen.train.run import train

    fields = _with_flags(options)
    _require_fields_of_a_run(fields, [field.name for field in dataclass_fields(RunConfig)])
    config = RunConfig.from_dict(fields, source=options.run)
    print(json.dumps(config.to_dict(), indent=2))
    print(f"trained model: {train(config)}")
    return 0


def _with_flags(options: Options) -> dict[str, Any]:
    """The file's fields, with those that were given as flags over them."""
    content = read_json(options.run, error=ConfigError)
    if not isinstance(content, dict):
        raise ConfigError(f"{options.run} must hold one JSON object, the fields of a run")
    given = read_settings(options.set)
    flags = {
        name: value
        for name, value in asdict(options).items()
        if value is not None and name not in ("run", "set", *_OF_METHOD)
    }
    if twice := sorted(given.keys() & flags.keys()):
        raise ConfigError(f"--set {twice[0]} is given as --{twice[0]} too; keep one")
    run = {**_without_other_budgets(content, {**flags, **given}), **flags, **given}
    if of_method := _of_method(options):
        run["overrides"] = _with_those_of_flags(run.get("overrides"), of_method, is_set="overrides" in given)
    return run


def _of_method(options: Options) -> dict[str, Any]:
    """By flag, what sets a field of the method's configuration."""
    given = {flag: getattr(options, flag) for flag in _OF_METHOD}
    return {flag: value for flag, value in given.items() if value is not None}


def _with_those_of_flags(overrides: Any, given: Mapping[str, Any], *, is_set: bool) -> Any:
    """The method's fields with those of flags over them; those that --set holds (`is_set`) no flag may set too."""
    if overrides is not None and not isinstance(overrides, dict):
        return overrides  # for the configuration to refuse
    held = overrides or {}
    for flag in given if is_set else ():
        if _OF_METHOD[flag] in held:
            raise ConfigError(f'--set overrides holds "{_OF_METHOD[flag]}", which --{flag} sets too; keep one')
    return {**held, **{_OF_METHOD[flag]: value for flag, value in given.items()}}


def _require_fields_of_a_run(fields: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises `ConfigError` for a field of the method's configuration among those of the run, with its place."""
    unknown = [name for name in fields if name not in known]
    method = _method_of(fields) if unknown else None
    if method is None:
        return
    of_method = inspect.signature(method.load_config_type()).parameters
    if misplaced := {name: fields[name] for name in unknown if name in of_method}:
        kind = "is a field" if len(misplaced) == 1 else "are fields"
        raise ConfigError(
            f"{', '.join(misplaced)} {kind} of {method.name}'s configuration, not of a run; give it in overrides, as "
            f"--set 'overrides={json.dumps(misplaced)}'"
        )


def _method_of(fields: Mapping[str, Any]) -> registry.Method | None:
    """The method that a run trains, as far as its fields and its model's folder tell."""
    from deepen.checkpoint import MANIFEST, is_adapter

    if isinstance(fields.get("method"), str):
        return registry.get(fields["method"])
    folder = Path(str(fields.get("model", ""))).expanduser()
    if is_adapter(folder):
        return registry.get(str(read_json(folder / MANIFEST).get("method")))
    if (folder / "config.json").is_file():
        return registry.method_of_architecture(str(read_json(folder / "config.json").get("model_type")))
    return None


def _without_other_budgets(content: dict[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The file's fields, but for its budget where a flag gives one of another kind."""
    if not any(name in flags for name in _BUDGETS):
        return content
    return {name: value for name, value in content.items() if name not in _BUDGETS}
