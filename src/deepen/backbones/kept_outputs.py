"""What a base's layers gave for whole texts, kept on the disk: a base that doesn't change reads a text once.

    $DEEPEN_CACHE/outputs/FINGERPRINT-DTYPE-DEVICE-LAYERS/TEXT.safetensors

FINGERPRINT is the base's, TEXT a digest of the ids. Each text is read by itself, so what is kept of it doesn't depend
on what stood beside it, and training that was cut off goes on with the same numbers. Nothing is ever deleted here: of
SmolLM2-135M three layers take 7 kB a token.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from deepen.backbones.anchored import WALK_WIDTH
from deepen.backbones.hf import Backbone, LayerOutputs
from deepen.backbones.identity import fingerprint
from deepen.core.errors import CannotTrain, DeepenError
from deepen.core.files import write_atomically
from deepen.data.download import cache_folder

_DIGITS = 32
# Far above what rounding does, in bfloat16 as well.
_TOLERANCE = 0.1


@dataclass(frozen=True)
class TextOutputs:
    """Of one text of T tokens: outputs of L layers, and the id that the base finds likeliest behind each token."""

    tops: Float[Tensor, "T L D"]
    said: Int[Tensor, "T"]


class KeptOutputs:
    """Reads texts through a base, or what was kept of them."""

    def __init__(self, backbone: Backbone, layers: Sequence[int]) -> None:
        """Raises `CannotTrain` if the base is divided over ranks, which don't read the same texts at the same time."""
        if any(isinstance(parameter, DTensor) for parameter in backbone.model.parameters()):
            raise CannotTrain(
                "keep_outputs reads texts one by one, and each rank others, which a base that is divided over ranks "
                "can't do; leave keep_outputs out, or train without dividing the base"
            )
        self._backbone = backbone
        self.layers = tuple(sorted({*layers, backbone.num_layers - 1}))
        """Those that were asked for and the last, of which `logits` are made."""
        self._says_as_the_base: bool | None = None

    def of(self, ids: Sequence[int]) -> TextOutputs:
        """From the disk if it is there; raises `DeepenError` for a file that can't be read."""
        path = self._folder / f"{hashlib.sha256(repr(list(ids)).encode()).hexdigest()[:_DIGITS]}.safetensors"
        if not path.exists():
            read = self._read(ids)
            with write_atomically(path) as temporary:
                save_file(vars(read), temporary)
            return read
        try:
            return TextOutputs(**load_file(path, device=str(self._backbone.device)))
        except (SafetensorError, TypeError) as error:
            raise DeepenError(f"{path} is damaged ({error}); delete it, and it is made again") from error

    def logits(self, top: Float[Tensor, "*n D"], rows: Float[Tensor, "N D"]) -> Float[Tensor, "*n N"]:
        """What the base says of the tokens with these rows of its head where its last layer gives `top`."""
        backbone = self._backbone
        said = F.linear(backbone.final_norm(top), rows)
        cap: float | None = getattr(backbone.config, "final_logit_softcapping", None)
        return said if cap is None else cap * torch.tanh(said / cap)

    @cached_property
    def _folder(self) -> Path:
        base, dtype = fingerprint(self._backbone.model)[:_DIGITS], str(self._backbone.dtype).removeprefix("torch.")
        kind = f"{dtype}-{self._backbone.device.type}"
        return cache_folder() / "outputs" / f"{base}-{kind}-{'-'.join(map(str, self.layers))}"

    @torch.no_grad()
    def _read(self, ids: Sequence[int]) -> TextOutputs:
        cache = self._backbone.new_cache(batch_size=1, capacity=len(ids))
        tops, said = LayerOutputs(self.layers), list[Tensor]()
        device = self._backbone.device
        for start in range(0, len(ids), WALK_WIDTH):
            slab = torch.tensor([ids[start : start + WALK_WIDTH]], device=device)
            # In whatever precision a step computes: what is kept is for other runs, too.
            with torch.autocast(device.type, enabled=False):
                logits = self._backbone.run(slab, cache, edit=tops.read, whole=True)[0]
            cache.commit([slab.shape[1]])
            self._compare(tops.stacked()[0, start:, -1], logits)
            said.append(logits.argmax(dim=-1))
        return TextOutputs(tops.stacked()[0], torch.cat(said))

    def _compare(self, top: Tensor, logits: Tensor) -> None:
        """Once, that `logits` are the base's: a model may do more behind its head than is known here."""
        if self._says_as_the_base is None:
            made = self.logits(top, self._backbone.head.weight)  # type: ignore[arg-type]
            self._says_as_the_base = torch.allclose(made.float(), logits.float(), rtol=_TOLERANCE, atol=_TOLERANCE)
        if not self._says_as_the_base:
            raise CannotTrain(
                f"keep_outputs can't make the logits of {type(self._backbone.model).__name__} from what its last layer "
                "gives; leave keep_outputs out"
            )
