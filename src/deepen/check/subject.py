"""The model under check, reduced to what checks ask of it: logits of ids, with or without a cache of its own.

Any `nn.Module` will do whose `forward` takes `input_ids` `[B, T]` and gives logits `[B, T, V]`, bare, as the first of
a tuple, or as `.logits`. What else it takes is read from its signature:

| argument | gives it |
|---|---|
| `attention_mask` `[B, T so far]` | the checks of padding |
| `position_ids` `[B, T]` | right positions behind left pads |
| `past_key_values`, `use_cache` | those of caches; the cache comes back as `.past_key_values`, or behind the logits |

A cache whose `crop(-n)` takes the last n tokens back (transformers' way) is held to that, too. A transformers model
that deepen can attach to is checked through deepen's passes as well, and a model of one of deepen's methods through
the protocol of core/method.py.
"""

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from deepen.backbones.hf import Backbone
from deepen.check.rounding import rounding_noise
from deepen.core.errors import DeepenError, UnsupportedBackbone
from deepen.core.method import RecursiveModel

# Differences above this many times the noise that rounding makes are not rounding.
ROUNDING_FACTOR = 8.0
_ARGUMENTS = ("attention_mask", "position_ids", "past_key_values", "use_cache")


@dataclass(frozen=True)
class Read:
    """What a cached step gives: logits `[B, T, V]` of its tokens, and the cache that has them."""

    logits: Tensor
    cache: Any


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and what is known of it. `backbone` is None where deepen can't attach, for the reason `unattached`."""

    name: str
    model: nn.Module
    vocab_size: int
    context_length: int | None
    backbone: Backbone | None = None
    unattached: str = ""
    method: RecursiveModel | None = None

    @property
    def device(self) -> torch.device:
        """Where its ids go."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its first floating parameter."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @cached_property
    def takes(self) -> frozenset[str]:
        """Which of the optional arguments its forward takes."""
        parameters = dict(inspect.signature(self.model.forward).parameters)
        if self.backbone is not None:
            # transformers' heads hand on to the decoder what they don't name themselves.
            parameters |= inspect.signature(self.backbone.model.get_decoder().forward).parameters
        return frozenset(name for name in _ARGUMENTS if name in parameters)

    @cached_property
    def allowed(self) -> float:
        """The largest difference in a logit that rounding explains on this model."""
        length = min(48, self.context_length or 48)
        noise = rounding_noise(self.model, lambda: self.logits(self.text(length, seed=7)))
        return ROUNDING_FACTOR * noise

    def text(self, length: int, *, seed: int, batch: int = 1) -> Tensor:
        """Ids `[batch, length]` drawn from the whole vocabulary; the same for the same seed."""
        source = torch.Generator().manual_seed(seed)
        return torch.randint(0, self.vocab_size, (batch, length), generator=source).to(self.device)

    @torch.no_grad()
    def logits(self, ids: Tensor, *, mask: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """`[B, T, V]` of a forward over all of `ids` `[B, T]`, without a cache."""
        return logits_of(self.model(**self._arguments(ids, mask, positions, {"use_cache": False})))

    @torch.no_grad()
    def read(
        self, ids: Tensor, cache: Any = None, *, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Read:
        """Logits of `ids` behind what `cache` has read, and the cache with them in it; None is an empty cache."""
        given = {"past_key_values": cache, "use_cache": True}
        output = self.model(**self._arguments(ids, mask, positions, given))
        return Read(logits_of(output), _cache_of(output))

    def _arguments(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, others: dict[str, Any]
    ) -> dict[str, Any]:
        named = {"attention_mask": mask, "position_ids": positions, **others}
        return {"input_ids": ids} | {
            name: value for name, value in named.items() if value is not None and name in self.takes
        }


def subject_of(
    model: nn.Module, *, name: str | None = None, vocab_size: int | None = None, method: RecursiveModel | None = None
) -> Subject:
    """What checks need to know of `model`, which is put into evaluation mode.

    A model of one of deepen's methods, given as `model` or beside its base as `method`, is checked through the protocol
    of core/method.py, and the base that it was built over as any model is.

    `vocab_size` (ids are drawn below it) is found out from a configuration that has one, else from a forward.
    """
    model.eval()
    if not any(parameter.is_floating_point() for parameter in model.parameters()):
        raise DeepenError(f"{name or type(model).__name__} has no parameters (of a floating dtype), so it is no model")
    if method is None and isinstance(model, RecursiveModel):
        method = model
    if method is not None and method.backbone is not None:
        model = method.backbone.model.eval()
        backbone, unattached = _usable(method.backbone)
    else:
        backbone, unattached = _attached(model)
    config = getattr(model, "config", None)
    if vocab_size is None:
        vocab_size = backbone.vocab_size if backbone is not None else getattr(config, "vocab_size", None)
    if vocab_size is None:
        vocab_size = _vocab_size_by_forward(model)
    context = backbone.context_length if backbone is not None else getattr(config, "max_position_embeddings", None)
    return Subject(name or type(method or model).__name__, model, vocab_size, context, backbone, unattached, method)


def _attached(model: nn.Module) -> tuple[Backbone | None, str]:
    try:
        return _usable(Backbone.attach(model))
    except UnsupportedBackbone as reason:
        return None, str(reason)


def _usable(backbone: Backbone) -> tuple[Backbone | None, str]:
    """The backbone if passes can run on it, or why not."""
    try:
        backbone.new_cache(batch_size=1, capacity=1)  # tells whether its kind of cache is known
    except UnsupportedBackbone as reason:
        return None, str(reason)
    return backbone, ""


@torch.no_grad()
def _vocab_size_by_forward(model: nn.Module) -> int:
    device = next(model.parameters()).device
    return logits_of(model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=device))).shape[-1]


def logits_of(output: Any) -> Tensor:
    """Logits `[B, T, V]` in whatever form a forward gives them."""
    logits = output if isinstance(output, Tensor) else output[0] if isinstance(output, tuple) else output.logits
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DeepenError(f"the model's forward gives {shape} where logits [batch, tokens, vocabulary] are expected")
    return logits


def _cache_of(output: Any) -> Any:
    cache = output[1] if isinstance(output, tuple) and len(output) > 1 else getattr(output, "past_key_values", None)
    if cache is None:
        raise DeepenError("the model's forward takes past_key_values, but gives none back with use_cache=True")
    return cache
