"""What training leaves behind. Adapters: folders that hold what a method added to a base, and say which base that is.

| file | holds |
|---|---|
| `deepen.json` | the folder's format, the method, the base's address and fingerprint, its tokenizer's digest |
| the method's `config_file` | its configuration, every field |
| the method's `weights_file` | the tensors of its `saved_state`, as safetensors; never a copy of the base |

`open_model` takes such a folder as it takes the address of a plain model, or says what about it doesn't fit. A model
that was trained as a whole is a plain model itself, which `save_model` writes as transformers has it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deepen import __version__
from deepen.backbones.hf import Backbone
from deepen.backbones.identity import BaseIdentity, fingerprint_of
from deepen.backbones.quiet import quiet_transformers
from deepen.backbones.resolve import Loaded, load
from deepen.backbones.shapes import build_shape
from deepen.core import registry
from deepen.core.checksums import require_unchanged
from deepen.core.config import Config
from deepen.core.errors import AddressError, CheckpointError, ConfigError
from deepen.core.files import read_json, write_folder_atomically, write_json
from deepen.core.method import Decoder, RecursiveModel
from deepen.core.registry import Method
from deepen.generate.plain import PlainDecoder

MANIFEST = "deepen.json"
FORMAT = 1
OWN_BASE = "./base"
"""The address of a base that was trained with the adapter, and lies in its folder."""


@dataclass(frozen=True)
class BaseRecord(Config):
    """The base model an adapter was made for: where it was, and what it was."""

    address: str
    fingerprint: str


@dataclass(frozen=True)
class Manifest(Config):
    """What `deepen.json` holds."""

    format: int
    method: str
    base: BaseRecord
    tokenizer: str
    deepen_version: str


@dataclass(frozen=True)
class Opened:
    """A model ready to decode: `decoder` is the method's model, or plain decoding where there is no method.

    `method` and `model` are None for a plain base. `backbone` is attached to the base, which is in evaluation mode
    with no parameter frozen.
    """

    decoder: Decoder
    backbone: Backbone
    tokenizer: Any
    identity: BaseIdentity
    method: Method | None = None
    model: RecursiveModel | None = None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text of this model: those it generates with, else the tokenizer's."""
        if self.backbone.eos_ids or self.tokenizer.eos_token_id is None:
            return self.backbone.eos_ids
        return (self.tokenizer.eos_token_id,)


def is_adapter(address: str | Path) -> bool:
    """Whether `address` is a folder that `save_adapter` wrote."""
    return bool(str(address)) and (Path(address).expanduser() / MANIFEST).is_file()


def save_adapter(
    folder: str | Path, *, method: Method, model: RecursiveModel, identity: BaseIdentity, replace: bool = False
) -> None:
    """Write `model`'s configuration and tensors to `folder`, beside the identity of its base; all of it or nothing.

    Raises `DeepenError` if the folder holds something already and `replace` is false, or can't be written.
    """
    with write_folder_atomically(folder, replace=replace) as begun:
        write_adapter(begun, method=method, model=model, identity=identity, tensors=model.saved_state())


def write_adapter(
    folder: Path, *, method: Method, model: RecursiveModel, identity: BaseIdentity, tensors: Mapping[str, Tensor]
) -> None:
    """The files of an adapter, into a folder that is there; `tensors` stand for the model's `saved_state`."""
    manifest = Manifest(
        format=FORMAT,
        method=method.name,
        base=BaseRecord(identity.address, identity.fingerprint),
        tokenizer=identity.tokenizer,
        deepen_version=__version__,
    )
    saved = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_json(folder / MANIFEST, manifest.to_dict())
    model.config.save(folder / method.config_file)
    save_file(saved, folder / method.weights_file, metadata={"format": "pt"})


def write_own_base(
    folder: Path, backbone: Backbone, tokenizer: Any, tensors: Mapping[str, Tensor], *, digest: str
) -> BaseIdentity:
    """A base that was trained with the adapter in `folder`, beside that; gives its identity, for the adapter to name.

    `tensors` stand for the base's `own_tensors`, and `digest` is its tokenizer's.
    """
    place = folder / OWN_BASE
    place.mkdir()
    write_whole_model(place, backbone=backbone, tokenizer=tokenizer, tensors=tensors)
    names = {id(tensor): name for name, tensor in own_tensors(backbone.model).items()}
    state = backbone.model.state_dict(keep_vars=True)
    # Under all names that the model has for a tensor, as it will have them when it is loaded.
    digested = fingerprint_of({name: tensors[names[id(tensor)]] for name, tensor in state.items()})
    return BaseIdentity(OWN_BASE, digested, digest)


def save_model(folder: str | Path, *, backbone: Backbone, tokenizer: Any, replace: bool = False) -> None:
    """Write the base itself to `folder` with its tokenizer, as transformers' own; all of it or nothing.

    Weights are safetensors in the dtype that the model has, tied ones once. Raises `DeepenError` if the folder holds
    something already and `replace` is false, or can't be written.
    """
    with write_folder_atomically(folder, replace=replace) as begun:
        write_whole_model(begun, backbone=backbone, tokenizer=tokenizer, tensors=own_tensors(backbone.model))


def write_whole_model(folder: Path, *, backbone: Backbone, tokenizer: Any, tensors: Mapping[str, Tensor]) -> None:
    """The files of a plain model, into a folder that is there; `tensors` stand for the base's `own_tensors`."""
    with quiet_transformers():
        backbone.model.save_pretrained(folder, state_dict=dict(tensors))
        tokenizer.save_pretrained(folder)


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of a plain model holds, by name: parameters, tied ones once, and buffers that are kept."""
    parameters = dict(model.named_parameters())
    kept = model.state_dict(keep_vars=True)
    return {**parameters, **{name: buffer for name, buffer in model.named_buffers() if name in kept}}


def open_model(
    address: str,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
    pack: bool = False,
) -> Opened:
    """Load the adapter in the folder `address` with its base, or the plain model at `address`.

    `dtype`, `device` and `trust_remote_code` are those of `backbones.resolve.load`. `overrides` are fields of the
    adapter's configuration to set differently. `base` says where the adapter's base is now, if it has moved. `pack`
    packs the base's linears for fast decoding on a CPU, at the cost of as much memory again.

    Raises `CheckpointError` if files are missing or damaged, don't fit each other, or belong to another base;
    `ConfigError` for a configuration that can't be; and what `load` raises.
    """

    def load_at(place: str) -> Loaded:
        return load(place, dtype=dtype, device=device, trust_remote_code=trust_remote_code)

    if is_adapter(address):
        return _Adapter(Path(address).expanduser(), overrides or {}).open_on(load_at, base, pack=pack)
    _refuse_headless(Path(address).expanduser())
    refuse_run(Path(address).expanduser())
    _refuse_changed(Path(address).expanduser())
    if base is not None:
        raise ConfigError(f"{address} is a plain model, which has no use for base {base}: that is for adapter folders")
    loaded = load_at(address)
    backbone = _attached(loaded, pack=pack)
    if backbone.own_method is not None:
        return _opened_own(loaded, backbone, backbone.own_method, overrides or {})
    if overrides:
        raise ConfigError(
            f"{address} is a plain model, which has no use for {_settings(overrides)}: that is for adapter folders"
        )
    return Opened(PlainDecoder(backbone), backbone, loaded.tokenizer, loaded.identity)


def _opened_own(loaded: Loaded, backbone: Backbone, method: Method, overrides: Mapping[str, Any]) -> Opened:
    """A model that its method brings, and that is nothing without it."""
    config = with_overrides(backbone.model.config, overrides, source=loaded.identity.address)
    model = method.load_model_type().build(config, backbone, backbone.vocab_size).eval()
    return Opened(model, backbone, loaded.tokenizer, loaded.identity, method, model)


def open_shape(address: str) -> Opened:
    """The shape `shape:NAME`, a model without weights: it can be attached to and counted, and nothing else.

    There is no tokenizer, and the identity is the address alone.
    """
    backbone = Backbone.attach(build_shape(address))
    return Opened(PlainDecoder(backbone), backbone, None, BaseIdentity(address, "none", "none"))


def base_address(folder: str | Path) -> str:
    """Where the base of the adapter in `folder` was; raises `CheckpointError` if it doesn't say."""
    place = Path(folder).expanduser()
    return _address_from(place, _read_manifest(place).base.address)


def read_adapter(
    folder: str | Path, backbone: Backbone, *, loaded: Loaded | None = None, overrides: Mapping[str, Any] | None = None
) -> RecursiveModel:
    """The model in an adapter folder on a base that is at hand; `overrides` are as for `open_model`.

    The base is taken to be the one that the adapter was made for, unless `loaded` is given, which is what it was
    attached to: that is compared. Raises `CheckpointError` if that is another, or if files are missing or damaged or
    don't fit each other.
    """
    adapter = _Adapter(Path(folder).expanduser(), overrides or {})
    if loaded is not None:
        adapter.check_base(loaded)
    return adapter.build_on(backbone)


def with_overrides(config: Any, overrides: Mapping[str, Any], *, source: str) -> Any:
    """`config` with some fields set differently, checked; `ConfigError` begins with `source` and what was set."""
    if not overrides:
        return config
    return type(config).from_dict({**config.to_dict(), **overrides}, source=f"{source} with {_settings(overrides)}")


class _Adapter:
    """What an adapter folder holds, read and found to be whole before the base, which takes longer, is loaded."""

    def __init__(self, folder: Path, overrides: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        self.method = _method_of(folder, self.manifest)
        for name in (self.method.config_file, self.method.weights_file):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} is incomplete: it lacks {name}; save or fetch it again")
        require_unchanged(folder, [self.method.weights_file])
        self.overrides = overrides
        config_file = folder / self.method.config_file
        saved = self.method.load_config_type().from_file(config_file)
        self.config = with_overrides(saved, overrides, source=str(config_file))
        self.weights = _read_weights(folder / self.method.weights_file)

    def open_on(self, load_at: Callable[[str], Loaded], base: str | None, *, pack: bool) -> Opened:
        """The model on the base that `load_at` gives for an address."""
        loaded = self._load_base(load_at, base)
        self.check_base(loaded)
        backbone = _attached(loaded, pack=pack)
        model = self.build_on(backbone)
        return Opened(model, backbone, loaded.tokenizer, loaded.identity, self.method, model)

    def build_on(self, backbone: Backbone) -> Any:
        """The model on a base, in evaluation mode."""
        model = self.method.load_model_type().build(self.config, backbone, backbone.vocab_size)
        self._fill(model)
        return model.eval()

    def _load_base(self, load_at: Callable[[str], Loaded], base: str | None) -> Loaded:
        try:
            return load_at(base if base is not None else _address_from(self.folder, self.manifest.base.address))
        except AddressError as cause:
            raise type(cause)(
                f"the base model of {self.folder} can't be had: {cause}. If it is elsewhere now, say where: "
                "base=ADDRESS (--base on the command line)"
            ) from cause

    def check_base(self, loaded: Loaded) -> None:
        """Raises `CheckpointError` if this is another base, or has another tokenizer, than it was made for."""
        expected, found = self.manifest.base, loaded.identity
        if found.fingerprint != expected.fingerprint:
            raise CheckpointError(
                f"{self.folder} was made for another base model: {expected.address} with fingerprint "
                f"{expected.fingerprint}, and {found.address} now has fingerprint {found.fingerprint}. "
                + self._way_to_the_base(loaded)
            )
        if found.tokenizer != self.manifest.tokenizer:
            raise CheckpointError(
                f"{self.folder} was made with another tokenizer: that of {expected.address} had digest "
                f"{self.manifest.tokenizer}, and that of {found.address} has {found.tokenizer}, so ids mean other "
                f"tokens. Put the tokenizer back that it was made with, or graft anew onto {found.address}"
            )

    def _way_to_the_base(self, loaded: Loaded) -> str:
        if next(loaded.model.parameters()).dtype == torch.float16:
            return "float16 holds other values than the base was saved with; choose dtype bfloat16 or float32"
        return (
            "Open it on the model that it was made for (base=ADDRESS, --base on the command line), "
            f"or graft anew onto {loaded.identity.address}"
        )

    def _fill(self, model: RecursiveModel) -> None:
        try:
            model.load_saved_state(self.weights)
        except CheckpointError as cause:
            # The folder alone may well be in order.
            blame = f". The configuration was changed by {_settings(self.overrides)}" if self.overrides else ""
            raise CheckpointError(f"{self.folder / self.method.weights_file}: {cause}{blame}") from cause


def _attached(loaded: Loaded, *, pack: bool) -> Backbone:
    backbone = Backbone.attach(loaded.model)
    if pack:
        backbone.pack()
    return backbone


def _address_from(folder: Path, address: str) -> str:
    """Where an adapter's base is, wherever its folder is now."""
    return str(folder / OWN_BASE) if address == OWN_BASE else address


def _read_manifest(folder: Path) -> Manifest:
    file = folder / MANIFEST
    content = read_json(file, error=CheckpointError)
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{file} does not say its format; save or fetch the folder again")
    if content["format"] != FORMAT:
        writer = content.get("deepen_version", "an unknown version")
        raise CheckpointError(
            f"{file} has format {content['format']!r}, and this version of deepen ({__version__}) reads format "
            f"{FORMAT}; use the version that wrote it ({writer}) or a later one"
        )
    try:
        return Manifest.from_dict(content, source=str(file))
    except ConfigError as cause:
        raise CheckpointError(f"{cause}; save or fetch the folder again") from cause


def _method_of(folder: Path, manifest: Manifest) -> Method:
    try:
        return registry.get(manifest.method)
    except AddressError as cause:
        raise CheckpointError(
            f"{folder} needs a method that is not here: {cause}. DEEPEN_METHODS_PATH may name folders with more methods"
        ) from cause


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as cause:
        raise CheckpointError(f"{file} is damaged or incomplete ({cause}); save or fetch it again") from cause


def _refuse_headless(folder: Path) -> None:
    """An adapter that lost its manifest would otherwise pass for a model folder without its config."""
    if not folder.is_dir() or (folder / "config.json").is_file():
        return
    for method in registry.discover().values():
        if (folder / method.weights_file).is_file() or (folder / method.config_file).is_file():
            raise CheckpointError(
                f"{folder} has files of the method {method.name} but no {MANIFEST}, which says what base they "
                "belong to; save or fetch it again"
            )


def refuse_run(folder: Path) -> None:
    """Raises `CheckpointError` for a run's folder, which holds checkpoints, and is none."""
    if (folder / "run.json").is_file() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} is the folder of a run; give one of its checkpoints, {folder}/step_N")


def _refuse_changed(folder: Path) -> None:
    """A plain model's weights are those that were saved, where that is known."""
    require_unchanged(folder, [path.name for path in sorted(folder.glob("*.safetensors"))])


def _settings(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in overrides.items())
