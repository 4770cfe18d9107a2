"""Checkpoints that a run goes on from, exactly.

A folder `step_N` holds what the method saves (an adapter, or a model), and beside it:

| file | holds |
|---|---|
| `training/state.json` | the step, the run's configuration, the data's position, the ledger, the guard |
| `training/shard-*.safetensors` | trained parameters, optimizer state, averages, the method's buffers |
| `training/carry_R.safetensors` | what rank R carries from step to step, where a method carries something |
| `checksums.json` | SHA-256 of every other file |

The folder gets its name when all of it is on the disk. The shards are torch's distributed checkpoint in safetensors:
each rank writes what it holds, and any number of ranks reads what it needs. No generator's state is there: what a step
draws is a function of seed and step.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from deepen.checkpoint import refuse_run
from deepen.core.checksums import CHECKSUMS, checksums
from deepen.core.errors import CheckpointError
from deepen.core.files import read_json, write_folder_atomically, write_json
from deepen.core.tensors import require_fit
from deepen.train.average import Average
from deepen.train.module import StepModule
from deepen.train.optim import Optimizers
from deepen.train.ranks import Ranks
from deepen.train.tree import flattened, unflattened

FORMAT = 1
TRAINING = "training"
_STATE = "state.json"


@dataclass(frozen=True)
class TrainingState:
    """Everything that moves while a run goes on, but for the loader and what is JSON already."""

    module: StepModule
    optimizers: Optimizers
    average: Average | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By name; the optimizer's are there once it has made a step."""
        parameters = self.module.trained_parameters()
        found = {f"parameter.{name}": parameter.detach() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            for key, value in self.optimizers.state_of(parameter).items():
                found[f"optimizer.{key}.{name}"] = value
        found |= {f"buffer.{name}": buffer for name, buffer in self.module.own_buffers().items()}
        if self.average is not None:
            found |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        return found

    def make_room(self, sizes: Mapping[str, TensorStorageMetadata]) -> None:
        """Give the optimizer the state that a checkpoint has tensors for, to be filled."""
        for name, parameter in self.module.trained_parameters().items():
            for saved, metadata in sizes.items():
                kind, _, rest = saved.partition(".")
                key, _, owner = rest.partition(".")
                if kind == "optimizer" and owner == name:
                    self.optimizers.state_of(parameter)[key] = _room(parameter, metadata)


def _room(parameter: Tensor, metadata: TensorStorageMetadata) -> Tensor:
    """A tensor for one of a parameter's moments, laid over ranks as the parameter is; or for a count."""
    if metadata.size == parameter.shape:
        return torch.zeros_like(parameter, dtype=metadata.properties.dtype)
    return torch.zeros(metadata.size, dtype=metadata.properties.dtype)


def save_checkpoint(
    folder: Path,
    *,
    state: TrainingState,
    facts: Mapping[str, Any],
    carry: Any,
    ranks: Ranks,
    write_model: Callable[[Path], None],
) -> None:
    """Write `folder`, all of it or nothing; every rank calls this at the same step.

    `facts` is JSON, and comes back from `read_facts`. `write_model` puts the model's own files into the
    folder that it is given, on the first rank. Raises `DeepenError` where the disk refuses.
    """
    if not ranks.is_first:
        _write_shards(Path(ranks.from_first(None)), state, carry, ranks)
        ranks.wait()
        return
    with write_folder_atomically(folder) as begun:
        ranks.from_first(str(begun))
        _write_shards(begun, state, carry, ranks)
        write_json(begun / TRAINING / _STATE, {"format": FORMAT, "world_size": ranks.world_size, **facts})
        write_model(begun)
        ranks.wait()
        write_json(begun / CHECKSUMS, checksums(begun))


def _write_shards(begun: Path, state: TrainingState, carry: Any, ranks: Ranks) -> None:
    place = begun / TRAINING
    place.mkdir(exist_ok=True)
    with _quiet():
        save_shards(
            state.tensors(),
            storage_writer=HuggingFaceStorageWriter(str(place), save_distributed=True),
            no_dist=not ranks.are_many,
        )
    if carry is not None:
        outline, tensors = flattened(carry)
        save_file(tensors, place / f"carry_{ranks.rank}.safetensors")
        write_json(place / f"carry_{ranks.rank}.json", outline)


def read_facts(folder: Path) -> dict[str, Any]:
    """What `state.json` of a whole checkpoint holds. Raises `CheckpointError`, naming what is missing or changed."""
    _check_files(folder)
    facts: dict[str, Any] = read_json(folder / TRAINING / _STATE, error=CheckpointError)
    if facts.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has training state of format {facts.get('format')}, and this reads {FORMAT}")
    return facts


def load_tensors(folder: Path, *, state: TrainingState, ranks: Ranks) -> None:
    """Fill the trained parameters, the optimizers, averages and buffers; raises `CheckpointError` if they don't fit."""
    place = folder / TRAINING
    reader = HuggingFaceStorageReader(str(place))
    entries = reader.read_metadata().state_dict_metadata
    sizes = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    state.make_room(sizes)
    tensors = state.tensors()
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    require_fit(shapes, {name: size.size for name, size in sizes.items()}, what=f"{folder} doesn't fit this run")
    with _quiet():
        load_shards(tensors, storage_reader=reader, no_dist=not ranks.are_many)


def load_carry(folder: Path, facts: Mapping[str, Any], *, device: torch.device, ranks: Ranks) -> Any:
    """What this rank carried; None where nothing was. Raises `CheckpointError` if there are other ranks now."""
    place = folder / TRAINING
    if not (place / "carry_0.json").is_file():
        return None
    if facts["world_size"] != ranks.world_size:
        raise CheckpointError(
            f"{folder} was saved by {facts['world_size']} ranks, each of which carries something from step to step; "
            f"go on with as many, not {ranks.world_size}"
        )
    tensors = load_file(place / f"carry_{ranks.rank}.safetensors")
    outline = read_json(place / f"carry_{ranks.rank}.json", error=CheckpointError)
    return unflattened(outline, {name: tensor.to(device) for name, tensor in tensors.items()})


def _check_files(folder: Path) -> None:
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint {folder}")
    refuse_run(folder)
    if not (folder / CHECKSUMS).is_file() and not (folder / TRAINING).is_dir():
        raise CheckpointError(f"{folder} is no checkpoint of a run: it has no {TRAINING}/, which training goes on from")
    if not (folder / CHECKSUMS).is_file():
        raise CheckpointError(f"{folder} is torn: it has no {CHECKSUMS}")
    expected = read_json(folder / CHECKSUMS, error=CheckpointError)
    found = checksums(folder)
    missing = [name for name in expected if name not in found]
    changed = [name for name, digest in expected.items() if found.get(name, digest) != digest]
    if missing or changed:
        told = [f"it lacks {name}" for name in missing] + [f"{name} was changed" for name in changed]
        raise CheckpointError(f"{folder} is torn: {'; '.join(told[:3])}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that one process saves alone, and its notes on what it still calls experimental."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        yield
