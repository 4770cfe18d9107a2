"""deepen inspect"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepen.cli.options import Model, OptionalName
from deepen.cli.output import print_facts, print_table, quantity

if TYPE_CHECKING:
    from torch import nn

    from deepen.backbones.hf import Backbone
    from deepen.checkpoint import Opened

_CONTEXTS_OF_FLOPS = (0, 1024)
_CONTEXTS_OF_STATE = (1024, 8192, 131_072)


@dataclass(frozen=True)
class Options:
    """Tell what a model is made of, where a method attaches to it, and what a pass of it costs.

    Of an adapter also its method, its configuration and its size. FLOPs count 2 per multiply-add and are those of one
    token; state is what the cache of one row holds.
    """

    model: Model
    """A model (hub id, folder, pypi:NAME, tiny:NAME) or the folder of an adapter."""
    json: bool = False
    """Print JSON instead of tables."""
    base: OptionalName = None
    """Where the adapter's base model is, if it is no longer where it was."""
    dtype: OptionalName = None
    """float32, bfloat16, float16 or float64; left out, float32 on a CPU and the model's own elsewhere."""
    device: OptionalName = None
    """cpu, cuda, cuda:1, mps; left out, an accelerator if there is one."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


def run(options: Options) -> int:
    """Inspect."""
    from deepen.checkpoint import open_model

    opened = open_model(
        options.model,
        dtype=options.dtype,
        device=options.device,
        base=options.base,
        trust_remote_code=options.trust_remote_code,
    )
    findings = inspect(options.model, opened)
    if options.json:
        print(json.dumps(findings, indent=2, ensure_ascii=False))
    else:
        _print(findings)
    return 0


def inspect(address: str, opened: "Opened") -> dict[str, Any]:
    """What there is to know, as plain JSON types and full numbers."""
    from deepen.backbones.costs import pass_flops, replay_bytes_per_token, row_state_bytes

    backbone, model = opened.backbone, opened.model
    parameters = dict(backbone.model.named_parameters(remove_duplicate=False))
    # Making a cache tells whether passes are possible on this model at all.
    recurrent = backbone.new_cache(batch_size=1, capacity=1).recurrent_layers
    return {
        "model": address,
        "base": asdict(opened.identity),
        "architecture": type(backbone.model).__name__,
        "attach_points": _attach_points(backbone),
        "num_layers": backbone.num_layers,
        "recurrent_layers": list(recurrent),
        "recurrent_bytes": {
            "snapshot": row_state_bytes(backbone, context=0),
            "replay_per_token": replay_bytes_per_token(backbone),
        },
        "hidden_size": backbone.hidden_size,
        "vocab_size": backbone.vocab_size,
        "context_length": backbone.context_length,
        "parameters": {
            "unique": backbone.num_parameters,
            "total": sum(parameter.numel() for parameter in parameters.values()),
        },
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "flops_per_token": {
            str(context): model.flops(num_positions=1, context=context)
            if model is not None
            else pass_flops(backbone, num_positions=1, context=context)
            for context in _CONTEXTS_OF_FLOPS
        },
        "state_bytes": {
            str(context): model.state_bytes(context=context)
            if model is not None
            else row_state_bytes(backbone, context=context)
            for context in _CONTEXTS_OF_STATE
        },
        "adapter": _adapter(Path(address).expanduser(), opened),
    }


def _attach_points(backbone: "Backbone") -> dict[str, str]:
    names: dict[int, str] = {}
    for name, module in backbone.model.named_modules():
        names[id(module)] = name

    def place(module: "nn.Module") -> str:
        return f"{names[id(module)]} ({type(module).__name__})"

    layers = backbone.layers
    return {
        "embedding": place(backbone.embedding),
        "layers": f"{names[id(layers)]}.0 to .{len(layers) - 1} ({type(layers[0]).__name__})",
        "final norm": place(backbone.final_norm),
        "head": place(backbone.head),
    }


def _adapter(folder: Path, opened: "Opened") -> dict[str, Any] | None:
    if opened.method is None or opened.model is None:
        return None
    from deepen.cli.budget import budget

    return {
        "method": opened.method.name,
        "weights_bytes": (folder / opened.method.weights_file).stat().st_size,
        "budget": budget(opened.model, opened.backbone),
        "config": opened.model.config.to_dict(),
    }


def _print(findings: dict[str, Any]) -> None:
    base, parameters = findings["base"], findings["parameters"]
    recurrent, context_length = findings["recurrent_layers"], findings["context_length"]
    print_facts(
        {
            "address": base["address"],
            "fingerprint": base["fingerprint"],
            "architecture": findings["architecture"],
            **findings["attach_points"],
            "number of layers": findings["num_layers"],
            "recurrent layers": ", ".join(map(str, recurrent)) or None,
            **(_recurrent_facts(findings["recurrent_bytes"]) if recurrent else {}),
            "hidden size": findings["hidden_size"],
            "vocabulary": findings["vocab_size"],
            "context": context_length,
            "parameters": f"{parameters['unique']:,} ({parameters['total']:,} with tied ones counted twice)"
            if parameters["total"] > parameters["unique"]
            else parameters["unique"],
            "dtype and device": f"{findings['dtype']}, {findings['device']}",
        },
        title="base",
    )
    flops, state = findings["flops_per_token"], findings["state_bytes"]
    print()
    print_table(
        ("tokens of context", "FLOPs a token", "state of a row"),
        [
            (
                _context(int(context), context_length),
                quantity(flops[context]) if context in flops else "",
                quantity(state[context], "B") if context in state else "",
            )
            for context in sorted({*flops, *state}, key=int)
        ],
    )
    if findings["adapter"] is not None:
        _print_adapter(findings["adapter"])


def _recurrent_facts(num_bytes: dict[str, int]) -> dict[str, str]:
    """What it takes to go back to an earlier token: a copy of the states, or a record of each token of a pass."""
    return {
        "a snapshot of their states": f"{quantity(num_bytes['snapshot'], 'B')} a row",
        "their record of a pass": f"{quantity(num_bytes['replay_per_token'], 'B')} a token",
    }


def _context(tokens: int, context_length: int | None) -> str:
    beyond = context_length is not None and tokens > context_length
    return f"{tokens:,}" + " (more than the model takes)" * beyond


def _print_adapter(adapter: dict[str, Any]) -> None:
    print()
    title = f"adapter ({adapter['method']})"
    print_facts({"bytes of its weights": adapter["weights_bytes"], **adapter["budget"]}, title=title)
    print()
    # As its file has them: null and false are not "none" and "no".
    config = {name: json.dumps(value, ensure_ascii=False) for name, value in adapter["config"].items()}
    print_facts(config, title="configuration")
