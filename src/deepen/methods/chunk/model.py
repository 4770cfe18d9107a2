"""A pretrained causal LM with a chunk sidecar: recursion grafted on, the base untouched.

Everything trainable is the sidecar (cells, boundary head, [Z], slot embedding); it is saved, loaded and removed on its
own. `forward` is the base's. Decoding goes chunk by chunk through the committed prefix.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Self
from warnings import warn

import torch
from torch import Tensor, nn

from deepen.backbones.costs import pass_costs, pass_flops, row_state_bytes
from deepen.backbones.gated_lora import GatedLora
from deepen.backbones.hf import Backbone
from deepen.backbones.tuned_layers import TunedLayers
from deepen.core.errors import CannotJoin, CheckpointError, ConfigError, PromptError
from deepen.core.method import Sampler
from deepen.core.tensors import fill
from deepen.core.types import Advance, Batch, Progress, Prompt, Score, Spent, StepOutput, Unit, Work
from deepen.generate import door
from deepen.generate.loop import complete
from deepen.generate.sampling import SamplingConfig
from deepen.generate.scoring import score_in_chunks
from deepen.generate.stop import StopConfig
from deepen.generate.verify import Decoding
from deepen.methods.chunk import training
from deepen.methods.chunk.config import CellPlan, RecursiveConfig, resolve_for_base
from deepen.methods.chunk.decoding import ExactDecoder, reads_ahead
from deepen.methods.chunk.drafter import ShallowDrafter, default_read_layers
from deepen.methods.chunk.modules import BoundaryHead, LatentToken, MaskToken, RefineCell
from deepen.methods.chunk.passes import Sidecar, refine_slots
from deepen.methods.chunk.refined import RefinedDecoder
from deepen.methods.chunk.rows import ChunkBatch
from deepen.methods.chunk.scoring import score_refined
from deepen.methods.chunk.work import step_work

TUNED_EVERY = 4
"""Phase c tunes the base's fourth layer, the eighth, and so on."""


class ChunkRefineWrapper(nn.Module):
    """`base_model` with a sidecar as `config` says; configuration fields may be given as keywords instead.

    Components (`refine_cells`, `boundary`, `latent_token`, `mask_token`) are None when `recursive_enabled` is false:
    then everything passes through to the base.
    """

    def __init__(self, base_model: nn.Module, config: RecursiveConfig | None = None, **fields: Any) -> None:
        super().__init__()
        # Whoever names fields without a configuration wants the recursion, whose switch is off in an empty file.
        start = config if config is not None else RecursiveConfig(recursive_enabled=True)
        self.config = replace(start, **fields) if fields else start
        self.config.check()
        # Refined mode changes the output once it is trained.
        self.promises_base = not self._refines
        self.base = base_model
        self.backbone = Backbone.attach(base_model)
        self.plan: CellPlan | None = None
        self.refine_cells: nn.ModuleList | None = None
        self.boundary: BoundaryHead | None = None
        self.latent_token: LatentToken | None = None
        self.mask_token: MaskToken | None = None
        self.lora: GatedLora | None = None
        self.tuned: TunedLayers | None = None
        self.drafter: ShallowDrafter | None = None
        if self.config.recursive_enabled:
            self._add_sidecar()
            if self.config.cache_reset_policy == "keep_all":
                warn(
                    "cache_reset_policy keep_all lets a refined pass see the entries of the passes before it, at later "
                    "positions: an ablation, comparable with no other setting",
                    stacklevel=2,
                )

    def _add_sidecar(self) -> None:
        config, backbone = self.config, self.backbone
        hidden_size = backbone.hidden_size
        self.plan = resolve_for_base(
            config,
            num_layers=backbone.num_layers,
            hidden_size=hidden_size,
            num_parameters=backbone.num_parameters,
        )
        self.refine_cells = nn.ModuleList(self._new_cell(layer) for layer in self.plan.layers[: self.plan.num_cells])
        with _built_on(backbone.device):
            self.boundary = BoundaryHead(
                hidden_size, config.gate_hidden, config.max_chunk_len, commit_bias_init=config.commit_bias_init
            ).to(backbone.device)
            if config.use_latent_token:
                self.latent_token = LatentToken(backbone.vocab_size, hidden_size).to(backbone.device)
            self.mask_token = MaskToken(hidden_size).to(backbone.device)
        if config.drafter_hidden is not None:
            self.drafter = self._new_drafter(config.drafter_hidden)
        if config.phase == "b":
            self.lora = self._new_lora()
        if config.phase == "c":
            self.tuned = self._new_tuned_layers()
        if not backbone.embedding_weight.is_meta:
            self.mask_token.initialise_from(backbone.embedding_weight)
        training.train_only_these(self._sidecar(), config)

    def _new_lora(self) -> GatedLora:
        num_layers, rank = self.backbone.num_layers, self.config.lora_rank
        layers = range(num_layers - math.ceil(num_layers / 3), num_layers)
        return GatedLora(self.backbone, rank=rank, alpha=2.0 * rank, layers=layers)

    def _new_tuned_layers(self) -> TunedLayers:
        return TunedLayers(self.backbone, range(TUNED_EVERY - 1, self.backbone.num_layers, TUNED_EVERY))

    def _new_drafter(self, hidden: int) -> ShallowDrafter:
        backbone, config = self.backbone, self.config
        layers = config.drafter_layers
        if layers is None:
            layers = default_read_layers(backbone.num_layers)
        for layer in layers:
            if not 0 <= layer < backbone.num_layers:
                raise ConfigError(f"drafter_layers names layer {layer}, but the base has {backbone.num_layers} layers")
        if config.draft_vocab > backbone.vocab_size:
            raise ConfigError(f"draft_vocab is {config.draft_vocab}, but the base's vocabulary {backbone.vocab_size}")
        with _built_on(backbone.device):
            num_tokens = config.draft_vocab or backbone.vocab_size
            return ShallowDrafter(backbone, hidden=hidden, read_layers=layers, num_tokens=num_tokens).to(
                backbone.device
            )

    def _new_cell(self, layer: int) -> RefineCell:
        # A model spread over devices runs each cell where its layer is; a shared cell stays with the first one.
        assert self.plan is not None
        place = next(self.backbone.layers[layer].parameters()).device
        with _built_on(place):
            return RefineCell(self.backbone.hidden_size, self.config.d_state, self.plan.hidden).to(place)

    def _sidecar(self) -> dict[str, nn.Module]:
        parts = {
            "refine_cells": self.refine_cells,
            "boundary": self.boundary,
            "latent_token": self.latent_token,
            "mask_token": self.mask_token,
            "lora": self.lora,
            "base_delta": self.tuned,
            "drafter": self.drafter,
        }
        return {name: module for name, module in parts.items() if module is not None}

    @classmethod
    def build(cls, config: RecursiveConfig, backbone: Backbone, vocab_size: int) -> Self:
        """Graft onto an attached backbone, whose vocabulary it keeps."""
        if vocab_size != backbone.vocab_size:
            raise ConfigError(f"vocab_size is {vocab_size}, but the base model's is {backbone.vocab_size}")
        return cls(backbone.model, config)

    @property
    def _refines(self) -> bool:
        return self.config.recursive_enabled and self.config.commit_mode == "refined"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's forward: the sidecar acts in decoding, on chunk positions, never here."""
        return self.base(*args, **kwargs)

    def refine_slots(self, layer: int, h: Tensor, slots: Tensor) -> Tensor:
        """Layer `layer`'s output `[B, W, D]` with its cell, if it has one, acting on `slots` `[B, W]` alone."""
        return refine_slots(self._cell_of(layer), h, slots, self.config.pooling)

    def _cell_of(self, layer: int) -> RefineCell | None:
        if self.plan is None or self.refine_cells is None or layer not in self.plan.layers:
            return None
        return self.refine_cells[0 if self.plan.shared else self.plan.layers.index(layer)]  # type: ignore[return-value]

    def adapted(self) -> AbstractContextManager[None]:
        """In the block, the base computes with the layers that phase c has tuned, if it has."""
        return nullcontext() if self.tuned is None else self.tuned.in_place()

    def open(self, prompt: Prompt) -> Decoding:
        """Read the prompt."""
        with self.adapted():
            return self._decoder(self.config).open(prompt)

    def advance(self, decoding: Any, sampler: Sampler) -> Advance:
        """The next chunk: one pass in exact mode, drafting and refining in refined mode; 1 to W tokens of each row."""
        with self.adapted():
            return self._decoder(self.config).advance(decoding, sampler)

    def drop(self, decoding: Decoding, rows: Sequence[int]) -> None:
        """Forget finished rows."""
        decoding.drop(rows)

    def check_joining(self) -> None:
        """Raises `CannotJoin` in refined mode."""
        _ = self._joining

    def feed(self, decoding: Any, ids: Sequence[int]) -> Spent:
        """Read more of the prompt of a decoding of one row; raises `CannotJoin` in refined mode."""
        with self.adapted():
            return self._joining.feed(decoding, ids)

    def join(self, decoding: Any, other: Any, *, most_rows: int) -> None:
        """Take the rows of `other` in; raises `CannotJoin` in refined mode."""
        self._joining.join(decoding, other, most_rows=most_rows)

    def keep(self, decoding: Decoding, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        decoding.keep(rows)

    @property
    def _joining(self) -> ExactDecoder:
        decoder = self._decoder(self.config)
        if isinstance(decoder, RefinedDecoder):
            raise CannotJoin(
                'commit_mode is "refined", in which rows begin and refine their chunks together, so that none can join '
                'on the way in this version; set commit_mode to "exact", or decode these rows as a batch of their own'
            )
        return decoder

    def _decoder(self, config: RecursiveConfig) -> ExactDecoder | RefinedDecoder:
        config.check()
        if config.recursive_enabled and config.commit_mode == "refined":
            return self._refined(config)
        return ExactDecoder(
            self.backbone,
            draft=config.resolved_draft if config.recursive_enabled else "ar",
            chunk_width=config.chunk_width,
            sidecar=self._parts(config) if config.recursive_enabled else None,
            reset_all=config.recursive_enabled and config.cache_reset_policy == "reset_all",
        )

    def _refined(self, config: RecursiveConfig) -> RefinedDecoder:
        return RefinedDecoder(self.backbone, config, self._parts(config))

    def _parts(self, config: RecursiveConfig) -> Sidecar:
        assert self.boundary is not None and self.mask_token is not None, "an enabled sidecar has all its parts"
        return Sidecar(
            self._cell_of,
            self.boundary,
            self.latent_token,
            self.mask_token,
            config.pooling,
            lora=self.lora,
            tuned=self.tuned,
            drafter=self.drafter,
        )

    @torch.no_grad()
    def generate_chunks(
        self,
        input_ids: Tensor,
        max_new_tokens: int = 512,
        chunk_width: int | None = None,
        max_inner_steps: int | None = None,
        commit_threshold: float | None = None,
        min_commit_threshold: float | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        **generation_kwargs: Any,
    ) -> Tensor:
        """`input_ids` `[B, S]` and what follows them, `[B, S + new]`; a row that ends early is padded with its end.

        Fields left None are those of the configuration. `generation_kwargs`: `top_k`, `min_p`, `repetition_penalty`,
        `seed` (row r uses seed + r), `eos_token_id`.
        """
        overrides: dict[str, Any] = {
            "chunk_width": chunk_width,
            "max_inner_steps": max_inner_steps,
            "commit_threshold": commit_threshold,
            "min_commit_threshold": min_commit_threshold,
        }
        eos = generation_kwargs.pop("eos_token_id", self.backbone.eos_ids)
        eos_ids = () if eos is None else tuple(eos) if isinstance(eos, list | tuple) else (eos,)
        with self.adapted():
            results = complete(
                self._decoder(replace(self.config, **{name: v for name, v in overrides.items() if v is not None})),
                _rows_of(input_ids),
                sampling=SamplingConfig.from_dict({"temperature": temperature, "top_p": top_p, **generation_kwargs}),
                stop=StopConfig(max_new_tokens=max_new_tokens, eos_ids=eos_ids),
            )
        longest = max((len(result.tokens) for result in results), default=0)
        fill = eos_ids[0] if eos_ids else 0
        new = [[*result.tokens, *[fill] * (longest - len(result.tokens))] for result in results]
        return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **arguments: Any) -> Any:
        """transformers' `generate`, decoded in chunks: its arguments and results, and what `door.generate` adds."""
        return door.generate(self, self.base, inputs, generation_config, **arguments)

    def as_custom_generate(self, streamer: door.Streamer | None = None) -> door.Door:
        """What the base's own `generate` takes as `custom_generate=` to decode in chunks; see `door.Door`."""
        return door.Door(self, self.base, streamer)

    def fit(self, counts: Tensor) -> None:
        """The drafter, if it is what trains, drafts the most frequent tokens from now on; see drafter.py."""
        if self.drafter is not None and training.is_trained("drafter", self.config):
            self.drafter.fit(counts)

    def begin(self, batch: Batch) -> None:
        """Nothing is carried from batch to batch."""

    def prepare(self, batch: Batch, progress: Progress) -> ChunkBatch:
        """Draw chunks, and in refined mode how they are corrupted."""
        return training.prepare(batch, self.config, self.backbone, progress)

    def count(self, batch: Batch) -> dict[Unit, int]:
        """Predicted and corrupted tokens of the chunks, and chunks."""
        return training.count(training.drawn(batch))

    def train_step(self, batch: Batch, carry: None, progress: Progress) -> StepOutput:
        """Loss sums of the mode; see training_exact.py and training_refined.py."""
        training.require_phase(self.config)
        rows = training.drawn(batch)
        trained = [parameter for group in self.optim_groups() for parameter in group["params"]]
        with self.adapted():
            return training.step(self.backbone, self._parts(self.config), self.config, rows, trained)

    def step_work(self, batch: Batch) -> Work:
        """The walk's, the drafts' and all passes'; see work.py."""
        training.require_phase(self.config)
        with self.adapted():
            return step_work(self.backbone, self._parts(self.config), self.config, training.drawn(batch))

    def after_step(self, statistics: Mapping[str, Tensor]) -> None:
        """No buffers move."""

    @torch.no_grad()
    def score(self, batch: Batch) -> Score:
        """Leak-free log-probabilities: the base's in exact mode, from verify passes over W tokens; see scoring.py."""
        if self._refines:
            with self.adapted():
                return score_refined(self._refined(self.config), batch)
        return score_in_chunks(self.backbone, batch, width=self.config.chunk_width)

    def optim_groups(self) -> list[dict[str, Any]]:
        """What the mode and the phase train; the base is in none."""
        return training.optim_groups(self._sidecar())

    def shard_units(self) -> list[nn.Module]:
        """The base's layers. The cells, which no layer calls, are with the rest of the sidecar."""
        return list(self.backbone.layers)

    def recurring_units(self) -> list[nn.Module]:
        """All of these: how many passes a step makes depends on how long its rows are, and their chunks."""
        return self.shard_units()

    def saved_state(self) -> dict[str, Tensor]:
        """The sidecar's tensors; the base's are never among them."""
        return {
            f"{part}.{name}": tensor
            for part, module in self._sidecar().items()
            for name, tensor in _tensors(module).items()
        }

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back a sidecar; a missing, unknown or misshapen tensor is a `CheckpointError` that names it.

        One of an earlier phase is gone on with: LoRA and tuned layers that it lacks stay as they were built, and change
        nothing; LoRA that it has trains on in phase c. In phase none all that it has is used.
        """
        self._add_parts_of(state)
        own = self.saved_state()
        for part in ("lora.", "base_delta."):
            if not _has(state, part):
                own = {name: tensor for name, tensor in own.items() if not name.startswith(part)}
        fill(own, state, what="the sidecar's tensors don't fit its configuration on this base")
        if self.drafter is not None:
            self.drafter.require_tokens()

    def _add_parts_of(self, state: Mapping[str, Tensor]) -> None:
        """What the state holds and this phase doesn't make by itself; raises `CheckpointError` if it can't be kept."""
        if not self.config.recursive_enabled:
            return
        phase = self.config.phase
        if _has(state, "base_delta.") and self.tuned is None:
            if phase != "none" or not self._refines:
                raise CheckpointError(
                    f'the sidecar holds layers of the base that phase c has tuned, and phase "{phase}" in commit_mode '
                    f'"{self.config.commit_mode}" is without them; set phase to "c" to train on, or to "none" to use '
                    'it, in commit_mode "refined"'
                )
            self.tuned = self._new_tuned_layers()
        if _has(state, "lora.") and self.lora is None:
            if phase == "a":
                raise CheckpointError(
                    'the sidecar holds LoRA of phase b, and phase "a" is without it; set phase to "b" or "c" to train '
                    'on, or to "none" to use it'
                )
            self.lora = self._new_lora()
        training.train_only_these(self._sidecar(), self.config)

    def flops(self, *, num_positions: int, context: int, num_logits: int | None = None) -> int:
        """Of a verify pass, which is the base's; other passes add `sidecar_flops` or `refined_flops`."""
        return pass_flops(self.backbone, num_positions=num_positions, context=context, num_logits=num_logits)

    def sidecar_flops(self, *, num_positions: int) -> int:
        """Of one row's draft pass over a clean position and slots: cells compute at all, LoRA at the slots."""
        if not self.config.recursive_enabled:
            return 0
        parts = self._parts(self.config)
        return parts.draft_flops(self.backbone.num_layers, [num_positions], num_slots=num_positions - 1)

    def refined_flops(self, *, num_positions: int, is_first: bool) -> int:
        """Of the whole sidecar in one row's refined pass over a chunk and [Z]; `is_first` if none went before it."""
        if not self.config.recursive_enabled:
            return 0
        return self._parts(self.config).refined_flops(self.backbone.num_layers, [num_positions], is_first=is_first)

    def advance_flops(self, *, context: int) -> dict[str, int]:
        """FLOPs of the passes that one chunk of `chunk_width` may take behind `context` tokens, by label."""
        config = self.config
        if config.recursive_enabled and config.commit_mode == "refined":
            return self._refined_advance_flops(context)
        width = config.chunk_width if config.recursive_enabled and config.resolved_draft != "ar" else 1
        found = {f"verify pass over {width}": self.flops(num_positions=width, context=context)}
        if self.drafter is not None and reads_ahead(config.resolved_draft, self.drafter):
            drafting = self.drafter.flops_per_start + (width - 1) * self.drafter.flops_per_token
            found[f"drafting {width - 1} tokens"] = drafting
        elif config.recursive_enabled and config.resolved_draft in ("mask", "auto"):
            cells = self.sidecar_flops(num_positions=width)
            label = f"draft pass over 1 and {width - 1} slots"
            found[label] = self.flops(num_positions=width, context=context) + cells
        return found

    def _refined_advance_flops(self, context: int) -> dict[str, int]:
        config, width = self.config, self.config.chunk_width
        costs = pass_costs(self.backbone)
        clean = costs.flops(num_positions=width, context=max(0, context - width), num_logits=1)
        if config.resolved_draft == "mask":
            drafting = costs.flops(num_positions=width - 1, context=context)
            drafting += self.sidecar_flops(num_positions=width - 1)
        else:
            drafting = sum(costs.flops(num_positions=1, context=context + place) for place in range(width - 1))
        num_positions = width + (self.latent_token is not None)
        refining = sum(
            costs.flops(num_positions=num_positions, context=context)
            + self.refined_flops(num_positions=num_positions, is_first=step == 0)
            for step in range(config.max_inner_steps)
        )
        return {
            f"clean pass over the {width} tokens before": clean,
            f"drafting {width} tokens ({config.resolved_draft})": drafting,
            f"{config.max_inner_steps} refined passes": refining,
            "all of them, per token of a whole chunk": (clean + drafting + refining) // width,
        }

    def state_bytes(self, *, context: int) -> int:
        """The base's cache, and the refine states where they are carried from chunk to chunk."""
        states = len(self.plan.layers) * self.config.d_state if self.plan and self.config.carry_state else 0
        return row_state_bytes(self.backbone, context=context) + states * self.backbone.dtype.itemsize

    def describe(self) -> dict[str, str | int | float]:
        """What was grafted and what it costs, by label, for people to read; FLOPs count 2 per multiply-add."""
        if self.plan is None or self.refine_cells is None:
            return {"layers refined": "none: recursive_enabled is false"}
        base_flops = self.flops(num_positions=1, context=0)
        drafted_flops = self.sidecar_flops(num_positions=1) + (self.lora.flops_per_position if self.lora else 0)
        return {
            "layers refined": f"{len(self.plan.layers)} of {self.backbone.num_layers} ({_spans(self.plan.layers)})",
            "cells": "one, shared by these layers" if self.plan.shared else f"{self.plan.num_cells}, one a layer",
            "cell width": self.plan.hidden,
            **{
                f"parameters of {part}": sum(parameter.numel() for parameter in module.parameters())
                for part, module in self._sidecar().items()
            },
            "extra FLOPs per drafted token": drafted_flops,
            "extra FLOPs, share of the base's": round(drafted_flops / base_flops, 6),
        }

    @property
    def num_sidecar_parameters(self) -> int:
        """Trainable parameters of the sidecar; a shared cell counts once."""
        return sum(parameter.numel() for module in self._sidecar().values() for parameter in module.parameters())


def _has(state: Mapping[str, Tensor], part: str) -> bool:
    return any(name.startswith(part) for name in state)


def _tensors(module: nn.Module) -> Mapping[str, Tensor]:
    """What is saved of a part: of what stands in the base, by the paths there."""
    return module.tensors() if isinstance(module, GatedLora | TunedLayers) else module.state_dict()


def _built_on(place: torch.device) -> torch.device:
    """Where a part for `place` is built: drawn on the CPU, the same for every device, but never drawn for "meta"."""
    return place if place.type == "meta" else torch.device("cpu")


def _rows_of(input_ids: Tensor) -> list[tuple[int, ...]]:
    if input_ids.ndim != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise PromptError(
            f"input_ids must be whole numbers [B, S], not {input_ids.dtype} {list(input_ids.shape)}; a tokenizer "
            'called with return_tensors="pt" gives them so'
        )
    return [tuple(row) for row in input_ids.tolist()]


def _spans(layers: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: "0, 3-5"."""
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return ", ".join(str(start) if start == end else f"{start}-{end}" for start, end in zip(starts, ends, strict=True))
