"""A transformers causal LM as the rest of the project sees it: where it can be attached to, and how a pass runs.

`Backbone.attach` finds the embedding, the layers, the final norm and the head, or says which is missing. Nothing in
the model is changed: a pass borrows the model's own forward, swapping the attention for ours while it lasts.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from deepen.backbones.anchored import WALK_WIDTH, AnchoredPrefix, AnchorKeeper, Anchors, Asked, Walk
from deepen.backbones.architectures import method_of_model
from deepen.backbones.attention import PassPlaces, at_places, attention_of_pass
from deepen.backbones.cache import PrefixCache
from deepen.backbones.fused import FusedForward, fuse_layers, fused_pass, unfuse_layers
from deepen.backbones.identity import BaseIdentity, fingerprint
from deepen.backbones.lasting import lasting
from deepen.backbones.recurrence import delta_forwards, recurrence_of_pass
from deepen.backbones.window import PassWindow
from deepen.core.errors import PromptError, UnsupportedBackbone
from deepen.core.registry import Method
from deepen.nn.attention import QUERY_BLOCK, Visibility, round_up
from deepen.nn.linear import PackedForward, Packing, pack_linears

# Called with a layer's index and its output [B, W, D]; gives what the next layer reads instead.
LayerEdit = Callable[[int, Tensor], Tensor]
# Which positions of a pass get logits: all of them, only the last real one of each row, or these.
Keep = Literal["all", "last"] | Sequence[int]

# transformers returns a mask that is 4-D already as it is, and asks nothing of the cache; ours travels apart.
_NO_MASK = torch.zeros(1, 1, 1, 1)
_LOCK = threading.Lock()
_locks: WeakKeyDictionary[nn.Module, "threading.RLock"] = WeakKeyDictionary()


class LayerOutputs:
    """Reads the outputs of some layers while passes run."""

    def __init__(self, layers: Sequence[int]) -> None:
        self._layers = tuple(layers)
        self._found: dict[int, list[Tensor]] = {layer: [] for layer in layers}

    def read(self, layer: int, h: Tensor) -> Tensor:
        """A `LayerEdit` that changes nothing."""
        if layer in self._found:
            self._found[layer].append(h)
        return h

    def stacked(self) -> Tensor:
        """`[B, T, L, D]` of all passes one behind the other; of no layer an empty tensor."""
        if not self._layers:
            return torch.empty(0, 0, 0, 0)
        return torch.stack([torch.cat(self._found[layer], dim=1) for layer in self._layers], dim=2)


@dataclass(frozen=True)
class AttachPoints:
    """The modules that a method can read from or write to."""

    embedding: nn.Module
    layers: nn.ModuleList
    final_norm: nn.Module
    head: nn.Module


class Backbone:
    """A transformers causal LM with its attach points, and passes over a committed prefix."""

    def __init__(self, model: PreTrainedModel, points: AttachPoints) -> None:
        """Use `attach`."""
        self.model = model
        self.config = model.config.get_text_config(decoder=True)
        self.embedding, self.layers = points.embedding, points.layers
        self.final_norm, self.head = points.final_norm, points.head
        self._delta_forwards = delta_forwards(self.layers, self.config)
        self._packing: Packing | None = None
        self._fused: tuple[nn.Module, ...] = ()

    @classmethod
    def attach(cls, model: nn.Module) -> "Backbone":
        """Find the attach points of `model`; raises `UnsupportedBackbone` that names what is missing."""
        if not isinstance(model, PreTrainedModel):
            raise UnsupportedBackbone(f"{type(model).__name__} is not a transformers model (PreTrainedModel)")
        _refuse_changing_rotation(model)
        return cls(model, _find_points(model))

    @property
    def own_method(self) -> Method | None:
        """The method that this model belongs to, and that alone can run it; None for a model that methods stand on."""
        return method_of_model(self.config.model_type)

    @property
    def num_layers(self) -> int:
        """Layers with weights of their own."""
        return len(self.layers)

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Indices of the layers that hold a state instead of entries."""
        return tuple(forward.layer for forward in self._delta_forwards)

    @property
    def hidden_size(self) -> int:
        """D, the width of a layer's output."""
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        return self.config.vocab_size

    @property
    def context_length(self) -> int | None:
        """Most tokens a row may hold; None where the model sets no bound."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def embedding_weight(self) -> Tensor:
        """`[V, D]`, the vectors of the tokens."""
        return next(self.embedding.parameters())

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a text, as the model's generation configuration has them."""
        ids: Any = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)

    @property
    def device(self) -> torch.device:
        """Where the first layer reads its input."""
        return self.embedding_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding, and so of what flows between layers."""
        return self.embedding_weight.dtype

    @property
    def num_parameters(self) -> int:
        """Unique parameters: tied ones count once."""
        return sum(p.numel() for p in self.model.parameters())

    def identify(self, address: str, tokenizer: str) -> BaseIdentity:
        """What a saved sidecar remembers of its base."""
        return BaseIdentity(address=address, fingerprint=fingerprint(self.model), tokenizer=tokenizer)

    @property
    def packed(self) -> bool:
        """Whether `pack` is in force."""
        return self._packing is not None

    def pack(self) -> None:
        """Pack the linears for decoding and fuse what can be; idempotent, undone by `unpack`.

        See nn/linear.py and fused.py. The packed copies cost as much memory again as the weights.
        """
        if self._packing is None:
            self._fused = fuse_layers(self.layers)
            self._packing = pack_linears(self.model, but_in=self._fused)

    def unpack(self) -> None:
        """Give every linear and every layer its own forward back."""
        if self._packing is not None:
            self._packing.remove()
            self._packing = None
            unfuse_layers(self._fused)
            self._fused = ()

    def new_cache(self, *, batch_size: int, capacity: int) -> PrefixCache:
        """An empty prefix for rows of up to `capacity` tokens."""
        if self.context_length is not None and capacity > self.context_length:
            raise PromptError(
                f"{capacity} tokens (prompt and new ones) exceed this model's context of {self.context_length}; "
                "shorten the prompt or lower max_new_tokens"
            )
        if (method := self.own_method) is not None:
            raise UnsupportedBackbone(
                f"a {type(self.model).__name__} is run by the method {method.name}, whose caches are its own; passes "
                "over a committed prefix are for models that run every layer once"
            )
        self._recheck()
        return PrefixCache(self.config, batch_size=batch_size, capacity=capacity)

    @contextmanager
    def held(self) -> Iterator[None]:
        """In the block only this thread makes passes of the model: for who lends it other parts meanwhile."""
        with _lock_of(self.model):
            yield

    def _recheck(self) -> None:
        # Writes through `.data` leave no trace that a pass could look for; once a decoding is often enough.
        for module in self.model.modules():
            forward = vars(module).get("forward")
            if isinstance(forward, PackedForward | FusedForward):
                forward.recheck()

    def run(
        self,
        tokens: Tensor,
        cache: PrefixCache,
        *,
        widths: Sequence[int] | None = None,
        keep: Keep = "all",
        edit: LayerEdit | None = None,
        whole: bool = False,
    ) -> Tensor:
        """One pass: all layers over `tokens` behind the committed prefix, which stays as it is until `cache.commit`.

        `tokens` are ids `[B, W]`, or embeddings `[B, W, D]`, of which row r's first `widths[r]` are real (default:
        all). Gives logits `[B, W, V]`; with keep "last" `[B, 1, V]`, each row's last real position, and with positions
        those. `edit` replaces layer outputs while the pass runs.
        """
        batch, width = tokens.shape[:2]
        if not width or (widths is not None and max(widths, default=0) > width):
            raise PromptError(f"a pass over {list(tokens.shape)} tokens can't read {widths} of them")
        window = cache.begin(widths if widths is not None else [width] * batch, whole=whole)
        # Elementwise kernels treat the last few elements of a tensor apart, with other rounding, so passes come in
        # whole blocks of positions. The kernels of recurrent layers round by width in any case, and a pad would cost
        # a mixture of experts as much as a token.
        num_pads = 0 if cache.recurrent_layers else round_up(width, QUERY_BLOCK) - width
        visibility = Visibility(window.offsets, width + num_pads, window.num_keys, device=self.device, dtype=self.dtype)
        last = [max(0, real - 1) for real in window.widths]
        kept = sorted(set(last)) if keep == "last" else range(width) if keep == "all" else list(keep)
        fused = fused_pass(self.layers)
        attention = attention_of_pass(self.config, visibility)
        recurrence = recurrence_of_pass(self._delta_forwards)
        with _lock_of(self.model), attention, recurrence, fused, _layer_edits(self.layers, edit, width):
            logits = self.model(
                **{"input_ids" if tokens.ndim == 2 else "inputs_embeds": _pad_positions(tokens, num_pads)},
                attention_mask=_NO_MASK,
                position_ids=self._positions(window, width, num_pads),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.tensor(kept, dtype=torch.long, device=self.device),
            ).logits
        if not visibility.used:
            raise UnsupportedBackbone(
                f"no attention of {type(self.model).__name__} goes through transformers' attention interface, "
                "so a pass can't tell it which entries are committed"
            )
        cache.end()
        if keep != "last":
            return logits
        return logits[range(batch), [kept.index(position) for position in last]][:, None]

    def logits_of(self, hidden: Tensor) -> Tensor:
        """What the model says, `[B, T, V]`, where its final norm gives `hidden` `[B, T, D]`.

        By the model's own forward: it may do more behind its decoder than multiply with the head.
        """
        decoder = self.model.get_decoder()
        with _lock_of(self.model), _given_by(decoder, hidden):
            logits: Tensor = self.model(inputs_embeds=hidden, use_cache=False).logits
        return logits

    @torch.no_grad()
    def walk(
        self,
        input_ids: Tensor,
        lengths: Sequence[int],
        anchors: Anchors,
        *,
        asked: Asked,
        read_layers: Sequence[int] = (),
    ) -> Walk:
        """Read texts `[B, T]`, of which row b has `lengths[b]` tokens, and keep what stands before each anchor.

        The head runs for what is asked alone, and the outputs of `read_layers` are kept.
        """
        cache = self.new_cache(batch_size=len(lengths), capacity=input_ids.shape[1])
        tops = LayerOutputs(read_layers)
        keeper, found = AnchorKeeper(cache, anchors), list[Tensor]()
        mask = asked.mask(*input_ids.shape)
        for start in range(0, input_ids.shape[1], WALK_WIDTH):
            widths = [min(max(0, length - start), WALK_WIDTH) for length in lengths]
            slab = slice(start, start + max(widths))
            kept = mask[:, slab].any(dim=0).nonzero()[:, 0]
            edit = tops.read if read_layers else None
            logits = self.run(input_ids[:, slab], cache, widths=widths, keep=kept.tolist(), edit=edit)
            # By place, then by text.
            found.append(logits.transpose(0, 1)[mask[:, slab][:, kept].T])
            keeper.look(widths)
            cache.commit(widths)
        order = mask.T.flatten().long().cumsum(0).view(mask.T.shape) - 1
        logits = torch.cat(found)[order[asked.places, asked.texts].to(self.device)]
        return Walk(keeper.prefix(), logits, tops.stacked())

    def run_behind(
        self,
        prefix: AnchoredPrefix,
        tokens: Tensor,
        *,
        widths: Sequence[int],
        edit: LayerEdit | None = None,
        keep: Sequence[int] | None = None,
    ) -> Tensor:
        """One pass with gradient over `tokens` behind each of R anchors, which leaves nothing behind.

        `tokens` are ids `[R, W]` or embeddings `[R, W, D]`, of which row r's first `widths[r]` are real. Gives logits
        `[R, W, V]`, or those of the positions in `keep` alone. `edit` is as in `run`. A layer that runs again in the
        backward (activation checkpointing) must do so in an `Again` of lasting.py; what edits its output isn't in it.
        """
        width = tokens.shape[1]
        cache, kept = prefix.begin(widths), range(width) if keep is None else list(keep)
        positions = prefix.anchors.lengths[:, None] + torch.arange(width).clamp(max=_last(widths)[:, None])
        recurrence = partial(recurrence_of_pass, self._delta_forwards)
        places = partial(at_places, PassPlaces((prefix.num_keys,) * len(widths), width, prefix.num_keys + width))
        with _lock_of(self.model), lasting(recurrence, places), _layer_edits(self.layers, edit, width):
            logits: Tensor = self.model(
                **{"input_ids" if tokens.ndim == 2 else "inputs_embeds": tokens},
                attention_mask=_bias(prefix.visible(width, device=self.device), self.dtype),
                position_ids=positions.to(self.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=torch.tensor(kept, dtype=torch.long, device=self.device),
            ).logits
        return logits

    def _positions(self, window: PassWindow, width: int, num_pads: int) -> Tensor:
        # Pads repeat the last position of their row: one further on might lie outside a table of positions.
        rows = [
            [offset + min(step, max(0, real - 1)) for step in range(width + num_pads)]
            for offset, real in zip(window.offsets, window.widths, strict=True)
        ]
        return torch.tensor(rows, device=self.device)


@dataclass
class _Given(ModelOutput):
    """What decoders of any kind give, with nothing in it but hidden states."""

    last_hidden_state: Tensor | None = None
    past_key_values: None = None
    hidden_states: None = None
    attentions: None = None
    cross_attentions: None = None
    router_logits: None = None


@contextmanager
def _given_by(decoder: nn.Module, hidden: Tensor) -> Iterator[None]:
    """In the block, `decoder` computes nothing and gives `hidden`."""
    before = vars(decoder).get("forward")
    decoder.forward = lambda *_args, **_kwargs: _Given(last_hidden_state=hidden)
    try:
        yield
    finally:
        del decoder.forward
        if before is not None:
            decoder.forward = before


def _last(widths: Sequence[int]) -> Tensor:
    return torch.tensor([max(0, width - 1) for width in widths])


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def _lock_of(model: nn.Module) -> "threading.RLock":
    """While a pass lasts the model isn't quite itself, so there is one at a time."""
    with _LOCK:
        return _locks.setdefault(model, threading.RLock())


def _pad_positions(tokens: Tensor, num_pads: int) -> Tensor:
    if num_pads == 0:
        return tokens
    return F.pad(tokens, (0, num_pads) if tokens.ndim == 2 else (0, 0, 0, num_pads))


@contextmanager
def _layer_edits(layers: nn.ModuleList, edit: LayerEdit | None, width: int) -> Iterator[None]:
    if edit is None:
        yield
        return
    handles = [layer.register_forward_hook(_edit_hook(index, edit, width)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _edit_hook(index: int, edit: LayerEdit, width: int) -> Callable[..., object]:
    """`edit` sees the pass's own positions, never the pads behind them."""

    def hook(_layer: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
        h = output if isinstance(output, Tensor) else output[0]
        own = h[:, :width]
        edited = edit(index, own)
        if edited is own:
            return None  # the output stays as it is
        whole = torch.cat([edited, h[:, width:]], dim=1)
        return whole if isinstance(output, Tensor) else (whole, *output[1:])

    return hook


def _refuse_changing_rotation(model: PreTrainedModel) -> None:
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    for kind in (str(each.get("rope_type")) for each in kinds):
        if kind == "longrope" or "dynamic" in kind:
            raise UnsupportedBackbone(
                f"rope_type {kind!r} takes other rotary frequencies once a pass reaches far enough, so that what is "
                "committed would depend on the pass that computed it; set rope_type to a fixed one (default, linear, "
                "llama3, yarn) if the model allows it"
            )


def _find_points(model: PreTrainedModel) -> AttachPoints:
    decoder = model.get_decoder()
    config = model.config.get_text_config(decoder=True)
    # A model that uses layers more than once says how many it has.
    depth = getattr(config, "num_unique_layers", getattr(config, "num_hidden_layers", None))
    stacks = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == depth]
    norms = [m for m in decoder.children() if "norm" in type(m).__name__.lower()]
    found = {
        "an input embedding (get_input_embeddings)": model.get_input_embeddings(),
        f"a list of its {depth} layers in {type(decoder).__name__}": stacks[0] if len(stacks) == 1 else None,
        f"one final norm in {type(decoder).__name__}": norms[0] if len(norms) == 1 else None,
        "a language-model head (get_output_embeddings)": model.get_output_embeddings(),
    }
    missing = [name for name, module in found.items() if module is None]
    if missing:
        raise UnsupportedBackbone(f"{type(model).__name__} can't be attached to: missing {', and '.join(missing)}")
    embedding, layers, final_norm, head = found.values()
    return AttachPoints(embedding, layers, final_norm, head)
