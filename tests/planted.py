"""Small language models with one fault each, at a place of choice, beside their sound counterparts.

`with_module` puts a module in front of the feed-forward of one layer of a tiny model; the other classes are models of
their own: a looped one, recurrent ones with a cache that can be cropped, ones that count positions themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel, Qwen3ForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask

from deepen.backbones import tiny

VOCAB_SIZE = 64


class Mask:
    """Where modules inside a model find the attention mask of the forward that is running."""

    def __init__(self) -> None:
        self.of_forward: Tensor | None = None

    def for_(self, x: Tensor) -> Tensor:
        """`[B, T, 1]`, 1 at real tokens."""
        mask = self.of_forward
        return x.new_ones(*x.shape[:2], 1) if mask is None else mask[:, -x.shape[1] :, None].to(x.dtype)


class _Before(nn.Module):
    """A module behind another."""

    def __init__(self, first: nn.Module, then: nn.Module) -> None:
        super().__init__()
        self.first, self.then = first, then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.first(x))


class Cached(nn.Module):
    """A tiny model behind a signature of one's own, with its cache."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = tiny.build(name)
        self.mask = Mask()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        self.mask.of_forward = attention_mask
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )


class Uncached(nn.Module):
    """The same without a cache: for modules that would need room in it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = Cached(name)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        return self.inner(input_ids, attention_mask, position_ids).logits


def with_module(model: Cached | Uncached, site: int, module: Callable[[Mask], nn.Module]) -> nn.Module:
    """`model`, in layer `site` of which the feed-forward reads what `module` makes of its input."""
    inner = model.inner if isinstance(model, Uncached) else model
    layer = inner.model.model.layers[site]
    layer.mlp = _Before(module(inner.mask), layer.mlp)
    return model


class Routed(nn.Module):
    """Expert-choice routing: the expert picks the best half of all positions, and so sees the future."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.linspace(-1, 1, 64))

    def chosen(self, scores: Tensor) -> Tensor:
        """`[B, T]`, True at the positions that are let through."""
        best = scores.topk(max(1, scores.shape[1] // 2), dim=1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.chosen(x @ self.score)[..., None]


class RoutedByToken(Routed):
    """Sound: each position is let through or not by its own score."""

    def chosen(self, scores: Tensor) -> Tensor:
        return scores > 0


class RunningMean(nn.Module):
    """Sound: adds the mean of what was there up to here, of real tokens."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x)
        return x + (x * weights).cumsum(dim=1) / self.counts(x).clamp(min=1)

    def weights(self, x: Tensor) -> Tensor:
        """`[B, T, 1]`, what each position weighs."""
        return self.mask.for_(x)

    def counts(self, x: Tensor) -> Tensor:
        """`[B, T, 1]`, by how many to divide."""
        return self.weights(x).cumsum(dim=1)


class MeanCountsPads(RunningMean):
    """Divides by the number of all positions."""

    def counts(self, x: Tensor) -> Tensor:
        return torch.ones_like(x[..., :1]).cumsum(dim=1)


class MeanSeesPads(RunningMean):
    """Pads are part of the mean."""

    def weights(self, x: Tensor) -> Tensor:
        return torch.ones_like(x[..., :1])


class MixesRows(nn.Module):
    """Centres over the batch."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return x - 0.1 * x.mean(dim=0)


class ScalesByPlace(MixesRows):
    """A row's scale goes by its index."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * torch.arange(len(x), device=x.device, dtype=x.dtype)[:, None, None])


class ScalesByNumber(MixesRows):
    """All rows' scale goes by how many there are."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * len(x))


class AlwaysDrops(MixesRows):
    """Dropout left on."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.1, training=True)


class MovesWithEachForward(MixesRows):
    """A buffer that every forward moves."""

    def __init__(self, mask: Mask) -> None:
        super().__init__(mask)
        self.register_buffer("average", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.average.add_(0.1)
        return x + self.average


class Float32Constant(MixesRows):
    """Meets everything with a constant made in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.full((x.shape[-1],), 1.5)


class Overflows(MixesRows):
    """Goes through numbers that float16 doesn't have."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 1e5) / 1e5


class Cancels(MixesRows):
    """Loses what half precision can't tell apart from a large number."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + 2e3) - 2e3


class OtherWhenCompiled(MixesRows):
    """Leaves a step out when it is compiled."""

    def forward(self, x: Tensor) -> Tensor:
        return x if torch.compiler.is_compiling() else 1.1 * x


class InPlainList(MixesRows):
    """Holds a parameter where torch doesn't look."""

    def __init__(self, mask: Mask) -> None:
        super().__init__(mask)
        self.gains = [nn.Parameter(torch.tensor(1.5))]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gains[0]


class DropsKey(MixesRows):
    """Leaves its parameter out of the state dict."""

    def __init__(self, mask: Mask) -> None:
        super().__init__(mask)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.register_state_dict_post_hook(self._drop)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain

    @staticmethod
    def _drop(_module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
        del state[f"{prefix}gain"]


def not_saved(name: str, site: int) -> PreTrainedModel:
    """A transformers model of its own class, one layer of which has a tensor that isn't saved."""
    kind = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}[name]

    class Gain(nn.Module):
        def __init__(self, then: nn.Module) -> None:
            super().__init__()
            self.then = then
            self.register_buffer("gain", torch.rand(64), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.then(x * self.gain)

    class NotSaved(kind):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model.layers[site].mlp = Gain(self.model.layers[site].mlp)

    return _with_weights_of(NotSaved, name)


def wrong_when_generating(name: str) -> PreTrainedModel:
    """Its steps in `generate` are given positions that are one too far."""
    kind = {"llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}[name]

    class WrongWhenGenerating(kind):
        def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
            inputs = super().prepare_inputs_for_generation(*args, **kwargs)
            if inputs["input_ids"].shape[1] == 1:
                inputs["position_ids"] = inputs["position_ids"] + 1
            return inputs

    return _with_weights_of(WrongWhenGenerating, name)


def _with_weights_of(kind: type[PreTrainedModel], name: str) -> PreTrainedModel:
    sound = tiny.build(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = kind(sound.config)
    state = sound.state_dict()
    model.load_state_dict({key: state[key.replace("mlp.then", "mlp")] for key in model.state_dict()})
    return model.eval()


class Looped(nn.Module):
    """The layers of a tiny model applied `num_recursions` times, with a slot of the cache for each application.

    The application `wrong` (layer, recursion), if there is one, uses the slot of the recursion before.
    """

    def __init__(self, name: str, *, num_recursions: int = 2, wrong: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.model = tiny.build(name)
        self.num_recursions, self.wrong = num_recursions, wrong

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, ...]:
        decoder = self.model.model
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        num_past = past_key_values.get_seq_length(len(decoder.layers) - 1) if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(num_past, num_past + input_ids.shape[1], device=input_ids.device)[None]
        h = decoder.embed_tokens(input_ids)
        mask = create_causal_mask(
            config=self.model.config,
            inputs_embeds=h,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        rotary = decoder.rotary_emb(h, position_ids)
        for recursion in range(self.num_recursions):
            for index, layer in enumerate(decoder.layers):
                shared = (index, recursion) == self.wrong
                layer.self_attn.layer_idx = index + len(decoder.layers) * (recursion - shared)
                h = layer(
                    h,
                    attention_mask=mask,
                    position_embeddings=rotary,
                    position_ids=position_ids,
                    past_key_values=past_key_values,
                )
        return self.model.lm_head(decoder.norm(h)), past_key_values


class CountingCache(DynamicCache):
    """Counts tokens itself."""

    def __init__(self, *, config: Any, winds_back: bool) -> None:
        super().__init__(config=config)
        self.num_read, self._winds_back = 0, winds_back

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back, and the counter if it is a sound one."""
        super().crop(tokens_to_remove)
        if self._winds_back:
            self.num_read += tokens_to_remove


class CountsPositions(Cached):
    """Counts positions of a step on from what its cache says was read."""

    def __init__(self, name: str, *, winds_back: bool) -> None:
        super().__init__(name)
        self.winds_back = winds_back

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        if use_cache and past_key_values is None:
            past_key_values = CountingCache(config=self.model.config, winds_back=self.winds_back)
        if past_key_values is not None:
            if position_ids is None:
                position_ids = past_key_values.num_read + torch.arange(input_ids.shape[1])[None]
            past_key_values.num_read += input_ids.shape[1]
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, use_cache)


class PositionsFromCache(Cached):
    """In a step behind a cache, takes positions from its length, whatever positions are given."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        if past_key_values is not None:
            position_ids = past_key_values.get_seq_length() + torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, use_cache)


class ForgetsMask(Cached):
    """In a step behind a cache, attends to all that it holds, pads too."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        mask = attention_mask if past_key_values is None else None
        return super().forward(input_ids, mask, position_ids, past_key_values, use_cache)


class RestartingPositions(Cached):
    """Counts the positions of each step from 0 unless they are given."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool = False,
    ) -> Any:
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None]
        return super().forward(input_ids, attention_mask, position_ids, past_key_values, use_cache)


class RecurrentLayer(nn.Module):
    """A short convolution and a gated recurrence behind it: `state = gate * state + write`, read out by the layer.

    `num_keys` 1 is a gated sum of channels; more make an associative memory, `write` an outer product.
    """

    def __init__(self, width: int, num_keys: int, kernel: int = 3) -> None:
        super().__init__()
        self.num_keys, self.kernel = num_keys, kernel
        self.norm = nn.RMSNorm(width)
        self.conv = nn.Parameter(torch.randn(width, kernel) * 0.5)
        self.gate, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key, self.query = (nn.Linear(width, num_keys) for _ in range(2))

    def forward(self, h: Tensor, real: Tensor, held: "Slot") -> Tensor:
        """`h` `[B, T, D]`; `real` `[B, T, 1]`, 0 at pads, which leave state and window as they would be without."""
        x = self.norm(h) * real
        window = held.window if held.window is not None else x.new_zeros(len(x), self.kernel - 1, x.shape[-1])
        inputs = torch.cat([window, x], dim=1)
        x = F.silu(sum(inputs[:, lag : lag + h.shape[1]] * self.conv[:, lag] for lag in range(self.kernel)))
        gate = torch.where(real > 0, torch.sigmoid(self.gate(x)), torch.ones_like(x))[:, :, None]
        write = F.normalize(self.key(x), dim=-1)[..., None] * (self.value(x) * real)[:, :, None] * (1 - gate)
        state = held.state if held.state is not None else torch.zeros_like(write[:, 0])
        states = [state]
        for step in range(h.shape[1]):
            states.append(gate[:, step] * states[-1] + write[:, step])
        held.take(torch.stack(states, dim=1), inputs)
        return h + self.out((self.query(x)[..., None] * torch.stack(states[1:], dim=1)).sum(dim=2))


class Slot:
    """State and convolution window of one layer, and of each token of the last reading what they were after it."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.window: Tensor | None = None
        self._states: Tensor | None = None
        self._inputs: Tensor | None = None

    def take(self, states: Tensor, inputs: Tensor) -> None:
        """`states` `[B, T + 1, K, D]` from before the reading on; `inputs` `[B, kernel - 1 + T, D]`."""
        self._states, self._inputs = states, inputs
        self._num_before = inputs.shape[1] - states.shape[1] + 1
        self.state_back(0)
        self.window_back(0)

    def state_back(self, count: int) -> None:
        """The state without the last `count` tokens."""
        self.state = self._states[:, self._states.shape[1] - 1 - count]

    def window_back(self, count: int) -> None:
        """The window without the last `count` tokens."""
        end = self._inputs.shape[1] - count
        self.window = self._inputs[:, end - self._num_before : end]


class RecurrentCache:
    """A slot a layer; of the layers `stale_state` and `stale_window`, crop forgets to roll that part back."""

    def __init__(self, num_layers: int, stale_state: int | None, stale_window: int | None) -> None:
        self.slots = [Slot() for _ in range(num_layers)]
        self._stale_state, self._stale_window = stale_state, stale_window

    def crop(self, count: int) -> None:
        """Takes the last `-count` tokens of the last reading back."""
        for index, slot in enumerate(self.slots):
            if index != self._stale_state:
                slot.state_back(-count)
            if index != self._stale_window:
                slot.window_back(-count)


class RecurrentModel(nn.Module):
    """A recurrent language model with a cache that can be cropped."""

    def __init__(
        self, num_keys: int, *, stale_state: int | None = None, stale_window: int | None = None, num_layers: int = 3
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embedding = nn.Embedding(VOCAB_SIZE, 32)
            self.layers = nn.ModuleList(RecurrentLayer(32, num_keys) for _ in range(num_layers))
            self.head = nn.Linear(32, VOCAB_SIZE, bias=False)
            self.head.weight = self.embedding.weight
        self.stale_state, self.stale_window = stale_state, stale_window

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: RecurrentCache | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor, ...]:
        cache = past_key_values or RecurrentCache(len(self.layers), self.stale_state, self.stale_window)
        h = self.embedding(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        for layer, slot in zip(self.layers, cache.slots, strict=True):
            h = layer(h, mask[..., None].to(h.dtype), slot)
        return (self.head(h), cache) if use_cache else (self.head(h),)
