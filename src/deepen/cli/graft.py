"""deepen graft"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from deepen.cli.options import Model, OptionalName, Settings, read_settings, require_new_folder
from deepen.cli.output import print_facts
from deepen.core import registry
from deepen.core.errors import ConfigError, DeepenError
from deepen.core.hints import did_you_mean
from deepen.core.registry import Method


@dataclass(frozen=True)
class Options:
    """Add a method to a model: print its budget, verify that the model's output is unchanged, save the adapter.

    The base model is neither changed nor copied: the folder holds what was added, and says which base it belongs to.
    Nothing is saved if the grafted model's output differs from the base's.
    """

    model: Model
    """The base: a hub id, a folder, pypi:NAME or tiny:NAME."""
    config: Annotated[str, tyro.conf.arg(metavar="PRESET|FILE")]
    """The method's configuration: a preset's name (see `deepen methods`) or a JSON file."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The adapter's folder, new or empty."""
    method: OptionalName = None
    """The method; left out, it is the one with a preset of that name, or the only one there is."""
    set: Settings = ()
    """A configuration field to set on top."""
    dtype: OptionalName = None
    """float32, bfloat16, float16 or float64; left out, float32 on a CPU and the model's own elsewhere."""
    device: OptionalName = None
    """cpu, cuda, cuda:1, mps; left out, an accelerator if there is one."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


def run(options: Options) -> int:
    """Graft, verify, save."""
    method = choose_method(options.method, options.config)
    settings = read_settings(options.set)
    require_new_folder(options.out)
    # From here on things take a while.
    from deepen.backbones.hf import Backbone
    from deepen.backbones.resolve import load
    from deepen.checkpoint import is_adapter, save_adapter, with_overrides
    from deepen.cli.budget import budget
    from deepen.cli.verification import verify_identity

    config = with_overrides(method.load_config(options.config), settings, source=options.config)
    if is_adapter(options.model):
        raise DeepenError(f"{options.model} is an adapter; graft onto its base model, which its deepen.json names")
    loaded = load(
        options.model, dtype=options.dtype, device=options.device, trust_remote_code=options.trust_remote_code
    )
    backbone = Backbone.attach(loaded.model)
    backbone.pack()
    model = method.load_model_type().build(config, backbone, backbone.vocab_size).eval()
    _print_configuration(method, config)
    print_facts(budget(model, backbone), title="budget")
    verdict = verify_identity(backbone, model, loaded.tokenizer)
    print_facts(verdict.facts(), title="identity")
    if not verdict.identical:
        raise DeepenError(
            f"{options.model} grafted with {options.config} does not give the base's output ({verdict.summary()}). "
            "Nothing was saved; choose a configuration that leaves the output alone until it is trained"
        )
    save_adapter(options.out, method=method, model=model, identity=loaded.identity)
    print_facts(_saved(options.out), title=f"saved to {options.out}")
    return 0


def choose_method(name: str | None, config: str) -> Method:
    """The method `name`; without one that which has the preset `config`, or the only one installed.

    Raises `AddressError` for an unknown name, `ConfigError` where no method or several could be meant.
    """
    if name is not None:
        return registry.get(name)
    candidates = list(registry.discover().values())
    # A file comes before a preset of its name, and says nothing about its method.
    if len(candidates) > 1 and not Path(config).is_file():
        preset, presets = config.removesuffix(".json"), {name for each in candidates for name in each.preset_paths()}
        if preset not in presets:
            raise ConfigError(f'"{config}" is neither a file nor a preset{did_you_mean(preset, presets)}')
        candidates = [method for method in candidates if preset in method.preset_paths()]
    if len(candidates) == 1:
        return candidates[0]
    names = ", ".join(method.name for method in candidates)
    raise ConfigError(f'"{config}" does not tell which method is meant; name one with --method (there are: {names})')


def _print_configuration(method: Method, config: Any) -> None:
    print(f"configuration ({method.name})")
    print(json.dumps(config.to_dict(), indent=2, ensure_ascii=False))


def _saved(folder: Path) -> dict[str, str]:
    return {file.name: f"{file.stat().st_size:,} bytes" for file in sorted(folder.iterdir())}
