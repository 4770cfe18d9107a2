"""The transformers model: Llama's own layers, run over the tokens that a router keeps, with caches that know of it.

    H_0 = before(embedding)             layers that are part of no recursion
    H_{r+1} = gate(H_r, f_r(H_r))       for tokens that recursion r keeps; the others stay as they are
    logits = head(norm(after(H_Nr)))

Mixture-of-Recursions: Bae et al. 2025, arXiv 2507.10524.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GenerationMixin, StaticCache
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, slice_logits_to_keep
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from deepen.core.errors import ConfigError

from .cache import DepthStore, Entries
from .config import MoRConfig
from .execution import Gathered, Masked
from .gates import gated
from .initialization import initial_weights
from .keeping import Attended, Keeping
from .losses import router_terms
from .routing import INITIAL_SPREAD, Asked, ExpertChoice, Level, Routed, TokenChoice, make_router
from .static import StaticStore
from .work import Ran


class _Store(Protocol):
    """What both stores can do."""

    @property
    def num_rows(self) -> int: ...
    @property
    def num_columns(self) -> int: ...
    def keep_rows(self, rows: Sequence[int]) -> None: ...
    def drop_columns(self, num_columns: int) -> None: ...
    def clear(self) -> None: ...


class _StoreCache(Cache):
    """A store by transformers' names for what a cache does."""

    is_croppable = True

    @property
    def is_initialized(self: _Store) -> bool:
        """Whether anything was read."""
        return bool(self.num_columns)

    @property
    def batch_size(self: _Store) -> int:
        """Rows."""
        return self.num_rows

    def get_seq_length(self: _Store, layer_idx: int = 0) -> int:
        """Columns that were read, pads too."""
        return self.num_columns

    def get_query_offset(self: _Store, layer_idx: int = 0) -> int:
        """Where the next pass begins."""
        return self.num_columns

    def reset(self: _Store) -> None:
        """Forget everything."""
        self.clear()

    def crop(self: _Store, tokens_to_remove: int) -> None:
        """Take the last -`tokens_to_remove` columns back."""
        if tokens_to_remove > 0:
            raise ConfigError(f"crop takes a negative number of tokens, not {tokens_to_remove}; as crop(-3)")
        self.drop_columns(-tokens_to_remove)

    def reorder_cache(self: _Store, beam_idx: Tensor) -> None:
        """Rows in another order."""
        self.keep_rows(beam_idx.tolist())

    def batch_select_indices(self: _Store, indices: Tensor) -> None:
        """Only these rows."""
        self.keep_rows(torch.arange(self.num_rows, device=indices.device)[indices].tolist())

    def batch_repeat_interleave(self: _Store, repeats: int) -> None:
        """Each row so many times."""
        self.keep_rows([row for row in range(self.num_rows) for _ in range(repeats)])

    def activate_past_recording(self) -> None:
        """Nothing is ever folded in for good, so any token can be taken back."""


class DepthCache(DepthStore, _StoreCache):
    """What `generate` hands from pass to pass."""

    is_compileable = False

    def __init__(self) -> None:
        DepthStore.__init__(self)
        Cache.__init__(self, layers=[])

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """No bound."""
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As wide as all that was read."""
        return self.num_columns + query_length, 0


class StaticDepthCache(StaticStore, _StoreCache):
    """The same in memory for `max_cache_len` tokens of each row, pads too: for code that is compiled once.

    A pass that reads it computes every position at every recursion, whatever `execution` says.
    """

    is_compileable = True

    def __init__(self, max_cache_len: int) -> None:
        StaticStore.__init__(self, max_cache_len)
        Cache.__init__(self, layers=[])

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tokens that a row has room for."""
        return self.max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """As wide as there is room."""
        return self.max_length, 0


@dataclass
class MoROutput(CausalLMOutputWithPast):
    """As any causal model's, and how many recursions each token ran, `[B, T]`; 0 at pads."""

    depths: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Reading:
    """One pass: states `[M, D]` of its M real tokens behind the final norm, what was decided of them, what it ran.

    `run` leads from packed tokens to positions and back.
    """

    hidden: Float[Tensor, "M D"]
    run: Gathered | Masked
    routed: Routed
    ran: Ran


class RecursiveLayer(LlamaDecoderLayer):
    """A layer of Llama's over packed tokens, beside which stand the entries that they see.

    Its forward changes nothing but places of a static cache that are not shown yet, so it can be run again to find its
    activations.
    """

    def forward(
        self, hidden_states: Float[Tensor, "M D"], rotary: tuple[Tensor, Tensor], attended: Attended
    ) -> tuple[Tensor, tuple[Entries, Entries] | None]:
        """States `[M, D]` behind the layer, and `Attended.merged` of what it made, None where entries were given."""
        num_makers = None if attended.given is not None else len(hidden_states)
        made: tuple[Entries, Entries] | None = None

        # Quoted: a compiler that traces this would evaluate it.
        def attend(queries: Tensor, new: "Entries | None") -> Tensor:
            nonlocal made
            made = None if new is None else attended.merged(new)
            seen = made[1] if made is not None else attended.given
            assert seen is not None, "a layer makes entries where it isn't given any"
            return self._attend(queries, seen, attended)

        return self.run_with(hidden_states, rotary, num_makers, attend), made

    def run_with(
        self,
        hidden_states: Float[Tensor, "M D"],
        rotary: tuple[Tensor, Tensor],
        num_makers: int | None,
        attend: Callable[[Tensor, Entries | None], Tensor],
    ) -> Float[Tensor, "M D"]:
        """The layer around any `attend`, which gets queries `[M, H, E]` and what the first `num_makers` tokens make.

        None: nobody makes any.
        """
        normed = self.input_layernorm(hidden_states)
        queries, new = self._project(normed, rotary, num_makers)
        hidden_states = hidden_states + self.self_attn.o_proj(attend(queries, new).flatten(1))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))

    def _project(
        self, normed: Float[Tensor, "M D"], rotary: tuple[Tensor, Tensor], num_makers: int | None
    ) -> tuple[Float[Tensor, "M H E"], Entries | None]:
        attention, (cos, sin) = self.self_attn, rotary
        queries = attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim))
        if num_makers is None:
            return apply_rotary_pos_emb(queries, queries[:, :0], cos, sin)[0], None
        makers = normed if num_makers == len(normed) else normed[:num_makers]
        keys, values = (
            project(makers).unflatten(-1, (-1, attention.head_dim)) for project in (attention.k_proj, attention.v_proj)
        )
        if num_makers == len(normed):
            queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
            return queries, (keys, values)
        queries = apply_rotary_pos_emb(queries, queries[:, :0], cos, sin)[0]
        keys = apply_rotary_pos_emb(keys, keys[:, :0], cos[:num_makers], sin[:num_makers])[0]
        return queries, (keys, values)

    def _attend(self, queries: Float[Tensor, "M H E"], seen: Entries, attended: Attended) -> Float[Tensor, "M HE"]:
        attention, grid = self.self_attn, attended.grid
        if not grid.num_rows:
            # Nothing, of everything: a rank without tokens here has gradients for the same parameters as the others.
            return queries.flatten(1) + torch.cat([each[:0].flatten() for each in seen]).sum()
        spread = [grid.spread_queries(queries), *(grid.spread_entries(each) for each in seen)]
        # Under autocast rotation leaves queries and keys wider than values.
        queries, keys, values = (each.transpose(1, 2).to(seen[1].dtype) for each in spread)
        name = attention.config._attn_implementation
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
        dropout = attention.attention_dropout if self.training else 0.0
        mask = _bias(grid.mask, grid, queries) if name == "eager" else grid.mask
        output, _ = attend(attention, queries, keys, values, mask, dropout=dropout, scaling=attention.scaling)
        return grid.pack(output).flatten(1)


def _bias(mask: Tensor | None, grid: Any, like: Tensor) -> Tensor:
    """What is added to scores: eager attention knows no other mask, and none for no mask."""
    if mask is None:
        shape = (grid.num_queries, grid.num_entries)
        mask = torch.ones(shape, dtype=torch.bool, device=like.device).tril(grid.num_entries - grid.num_queries)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, torch.finfo(like.dtype).min)


class MoRPreTrainedModel(LlamaPreTrainedModel):
    """What transformers asks of both classes below."""

    config_class = MoRConfig
    config: MoRConfig
    base_model_prefix = "model"
    _no_split_modules = ("RecursiveLayer",)
    _supports_flash_attn = False
    _supports_flex_attn = False
    _can_compile_fullgraph = True
    _can_record_outputs = None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # transformers' functions leave alone what was loaded.
        if isinstance(module, ExpertChoice | TokenChoice):
            for output in module.outputs:
                init.normal_(output.weight, std=INITIAL_SPREAD)
            for name, buffer in module.untrained_buffers().items():
                init.copy_(getattr(module, name), buffer)


class MoRModel(MoRPreTrainedModel):
    """Embedding, the layers with weights of their own, a router and the final norm."""

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        layout = config.layout
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(RecursiveLayer(config, index) for index in range(layout.num_unique))
        self.router = make_router(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.layout = layout
        self.post_init()

    def read(
        self,
        input_ids: Int[Tensor, "B T"] | None,
        *,
        embeddings: Float[Tensor, "B T D"] | None = None,
        real: Bool[Tensor, "B T"] | None = None,
        positions: Int[Tensor, "_ T"] | None = None,
        cache: DepthStore | StaticStore | None = None,
        topk: bool = False,
    ) -> Reading:
        """One pass over ids or `embeddings`, behind what `cache` holds, which then has this pass, too.

        `real` tells tokens from pads, which take no part. Positions are counted without pads where they aren't given.
        With `topk` routers look at the whole row.
        """
        embedded = self.embed_tokens(input_ids) if embeddings is None else embeddings
        if real is None:
            real = torch.ones(embedded.shape[:2], dtype=torch.bool, device=embedded.device)
        run = self._run(real, cache)
        if positions is None:
            positions = (run.lengths_before[:, None] + real.long().cumsum(dim=1) - 1).clamp(min=0)
        hidden = run.packed(embedded)
        packed_positions = run.packed(positions.expand(real.shape))
        cos, sin = self.rotary_emb(hidden, packed_positions[None])
        walk = _Walk(self, run, packed_positions, (cos[0], sin[0]), Keeping(self.config.kv, self.layout, run))
        hidden = walk.recur(walk.apply(hidden, self.layout.before, level=0), topk=topk)
        hidden = self.norm(walk.apply(hidden, self.layout.after, level=0))
        if cache is not None:
            run.keep(walk.keeping.own)
        return Reading(hidden, run, walk.routed, walk.ran)

    def _run(self, real: Tensor, cache: DepthStore | StaticStore | None) -> Gathered | Masked:
        """Shapes need to be the same in training and before a static cache; what is computed is the same in both."""
        if isinstance(cache, StaticStore):
            return Masked(real, cache)
        if self.config.execution == "mask" and torch.is_grad_enabled() and cache is None:
            return Masked(real)
        return Gathered(real, DepthStore() if cache is None else cache)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "_ T"] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Reading:
        """`read` by transformers' names; `attention_mask` is `[B, T]`, or `[B, tokens so far]` behind a cache."""
        given = input_ids if input_ids is not None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give either input_ids or inputs_embeds")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}: it must be [batch, tokens], True where a token is "
                "no pad; which tokens see which is for the router to say"
            )
        real = None if attention_mask is None else attention_mask[:, -given.shape[1] :].bool()
        topk = self.training and self.config.selection == "topk" and past_key_values is None
        return self.read(
            input_ids,
            embeddings=inputs_embeds,
            real=real,
            positions=position_ids,
            cache=past_key_values,
            topk=topk,
        )


class _Walk:
    """One pass through the unrolled depth."""

    def __init__(
        self,
        model: MoRModel,
        run: Gathered | Masked,
        positions: Int[Tensor, "M"],
        rotary: tuple[Tensor, Tensor],
        keeping: Keeping,
    ) -> None:
        self._model, self._run, self._positions, self._rotary, self.keeping = model, run, positions, rotary, keeping
        self.routed, self.ran = Routed(), Ran()

    def apply(self, hidden: Float[Tensor, "m D"], layers: tuple[int, ...], *, level: int) -> Float[Tensor, "m D"]:
        """These layers, over the tokens that run."""
        rotary = (self._run.read(self._rotary[0]), self._run.read(self._rotary[1]))
        for layer in layers:
            attended = self.keeping.attended(layer, level)
            hidden, made = self._model.layers[self._model.layout.unique[layer]](hidden, rotary, attended)
            if made is not None:
                self.keeping.take(layer, level, *made)
            self.ran.layer(len(hidden), attended.grid, makes_entries=made is not None)
        return hidden

    def recur(self, hidden: Float[Tensor, "M D"], *, topk: bool) -> Float[Tensor, "M D"]:
        """All recursions, each over the tokens that it keeps of those the one before kept."""
        run, router = self._run, self._model.router
        router.begin(hidden, self.routed)
        self.ran.began(self.routed, len(hidden))
        for level, layers in enumerate(self._model.layout.recursions):
            answer = self._enter(level, hidden, topk=topk) if level else None
            # Where gradients flow the layers run in any case, over nothing: ranks that share them wait for each other.
            if run.is_idle and not torch.is_grad_enabled():
                continue
            entering = run.read(hidden)
            output = self.apply(entering, layers, level=level)
            if answer is not None:
                output = gated(self._model.config.gate, entering, output, *answer, alpha=self._model.config.gate_alpha)
            hidden = run.write(hidden, output)
        run.widen()
        return hidden

    def _enter(self, level: int, hidden: Float[Tensor, "M D"], *, topk: bool) -> tuple[Tensor, Tensor] | None:
        """Leave out who doesn't enter `level`; gives logits and probabilities of those who do, None without a gate."""
        run = self._run
        positions = run.read(self._positions)
        asked = Asked(level, run.read(hidden), positions, run.rows, run.row_lengths, run.index, run.alive)
        answer = self._model.router.decide(asked, self.routed, topk=topk)
        if answer is None:
            run.stay(level)
            return None
        self.ran.asked(self._model.router, len(asked.hidden))
        before = run.index
        entered = run.full(torch.ones_like(answer.kept) if asked.alive is None else asked.alive, before)
        logits, probabilities = (run.full(each, before) for each in (answer.logits, answer.probabilities))
        self.routed.levels.append(Level(logits, probabilities, entered, run.full(answer.kept, before)))
        run.narrow(level, answer.kept)
        return (run.read(logits), run.read(probabilities)) if self._model.router.has_gate else None


class MoRForCausalLM(MoRPreTrainedModel, GenerationMixin):
    """The model with its head, as transformers' causal models are."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MoRConfig) -> None:
        super().__init__(config)
        self.model = MoRModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._static_length = 0
        self.post_init()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """`generate` lets the first pass make the cache, but for a static one."""
        return False

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """A cache of our own where a static one is asked for."""
        is_static = generation_config.cache_implementation == "static" and generation_config.use_cache is not False
        if not is_static or model_kwargs.get("past_key_values") is not None:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
            return
        # Never shorter than one before: then what was compiled for that is of use again.
        self._static_length = max(max_cache_length, generation_config.max_cache_len or 0, self._static_length)
        model_kwargs["past_key_values"] = StaticDepthCache(self._static_length)

    def create_masks_for_generate(
        self, *, inputs_embeds: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor | None:
        """Which tokens of the pass itself are no pads: of those before it the static cache knows, and shapes stay."""
        return None if attention_mask is None else attention_mask[:, -inputs_embeds.shape[1] :]

    @classmethod
    def from_llama(cls, model: Any, config: MoRConfig, *, initialization: str = "stepwise") -> "MoRForCausalLM":
        """A model whose weights begin as those of a `LlamaForCausalLM` of the same depth and sizes.

        Shared layers are made from the layers that they stand for: see initialization.py. Only with one recursion is
        the new model the old one. Routers are drawn from torch's generator. Raises `ConfigError` where sizes differ.
        """
        made = cls(config).to(dtype=model.dtype, device=model.device)
        made.load_state_dict(initial_weights(model, made, initialization), strict=False)
        made.generation_config = model.generation_config
        return made.train(model.training)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "_ T"] | None = None,
        past_key_values: Any = None,
        inputs_embeds: Float[Tensor, "B T D"] | None = None,
        labels: Int[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoROutput:
        """Logits `[B, T, V]`. Tokens that attention_mask calls pads are not computed, and have the logits of a zero.

        With `labels` also the mean cross entropy; in training with the routers' terms, weighted as configured.
        """
        _refuse_outputs(kwargs)
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        cache = _depth_cache(past_key_values, use_cache=bool(use_cache))
        reading = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            inputs_embeds=inputs_embeds,
        )
        spread = reading.run.spread(reading.hidden)
        logits = self.lm_head(slice_logits_to_keep(spread, logits_to_keep))
        return MoROutput(
            loss=None if labels is None else self._loss(logits, labels, reading, **kwargs),
            logits=logits,
            past_key_values=cache,
            depths=reading.run.spread(reading.routed.depths(reading.run.real)),
        )

    def _loss(self, logits: Tensor, labels: Tensor, reading: Reading, **kwargs: Any) -> Tensor:
        loss: Tensor = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        if not self.training:
            return loss
        counted = reading.run.packed(torch.ones_like(labels, dtype=torch.bool))
        terms = router_terms(self.config, self.model.router, reading.routed, counted)
        return loss + sum(weight * total for total, weight in terms.values()) / max(1, int(counted.sum()))


def _depth_cache(given: Any, *, use_cache: bool) -> DepthCache | StaticDepthCache | None:
    """The cache to read and write; an empty one of another kind is replaced."""
    if isinstance(given, DepthCache | StaticDepthCache):
        return given
    if given is not None and given.get_seq_length():
        raise ConfigError(
            f"past_key_values is a {type(given).__name__} that holds tokens; this model goes on from its own "
            "DepthCache or StaticDepthCache"
        )
    if isinstance(given, StaticCache):
        return StaticDepthCache(given.get_max_length())
    return DepthCache() if use_cache else None


def _refuse_outputs(kwargs: dict[str, Any]) -> None:
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.pop(name, None):
            raise ConfigError(f"{name} is not given by this model: its layers don't run all tokens; leave it out")


AutoConfig.register("mor", MoRConfig, exist_ok=True)
AutoModelForCausalLM.register(MoRConfig, MoRForCausalLM, exist_ok=True)
