"""The protocol over a base with a refiner: how it is trained, decoded, scored, saved and counted."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from deepen.backbones.costs import pass_costs, row_state_bytes, training_work
from deepen.backbones.hf import Backbone
from deepen.backbones.recurrence import use_delta_attention
from deepen.core.errors import CannotTrain
from deepen.core.method import Sampler
from deepen.core.tensors import fill
from deepen.core.types import Advance, Batch, LossTerm, Mean, Progress, Prompt, Score, Spent, StepOutput, Unit, Work
from deepen.generate import door
from deepen.generate.plain import PlainDecoder
from deepen.generate.scoring import score_at_once
from deepen.generate.verify import Decoding

from .config import TRMConfig
from .costs import RefinedCosts
from .drawing import TRMBatch, drawn_for, untold
from .halting import Says, stop_of
from .losses import Targets, earlier_term, final_term, halting_term, places_of, watched_steps
from .placing import Ask, LentRefiner
from .refiner import Stop, TRMRefiner


class TRMModel(nn.Module):
    """A base with a refiner before its head or behind some of its layers; without one, the base itself."""

    def __init__(self, config: TRMConfig, backbone: Backbone) -> None:
        """Use `build`."""
        super().__init__()
        self.config = config
        self.promises_base = not config.use_trm
        self.backbone = backbone
        self.base = backbone.model
        self._layers = config.layers_of(backbone.num_layers)
        self.refiner = _new_refiner(config, backbone) if config.use_trm else None
        self._decoder = PlainDecoder(backbone)
        self._costs = pass_costs(backbone)
        self._lent: LentRefiner | None = None
        self._refined_costs: RefinedCosts | None = None
        if self.refiner is not None:
            self._lent = LentRefiner(backbone, self.refiner, self._layers, self._new_stop)
            self._refined_costs = RefinedCosts(config, backbone, self._costs, self.refiner, self._layers)

    @classmethod
    def build(cls, config: TRMConfig, backbone: Backbone, vocab_size: int) -> Self:
        """Over an attached backbone; the refiner is drawn from torch's generator."""
        return cls(config, backbone)

    def forward(self, *args: Any, **given: Any) -> Any:
        """The base's forward with the refiner in it: its arguments and its output."""
        with self.adapted():
            return self.base(*args, **given)

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, **arguments: Any) -> Any:
        """transformers' `generate`: its arguments and results, and what `door.generate` adds."""
        return door.generate(self, self.base, inputs, generation_config, **arguments)

    def adapted(self) -> AbstractContextManager[None]:
        """In the block, the base computes with the refiner."""
        return nullcontext() if self._lent is None else self._lent.in_place()

    def _new_stop(self, says: Says) -> Stop | None:
        assert self.refiner is not None, "only a refiner stops"
        return stop_of(self.config, self.refiner, says)

    # Decoding

    def open(self, prompt: Prompt) -> Decoding:
        """Read the prompt."""
        with self.adapted():
            return self._decoder.open(prompt)

    def advance(self, decoding: Decoding, sampler: Sampler) -> Advance:
        """One pass, one token a row; rows whose positions all halt early take fewer outer steps."""
        contexts = decoding.cache.lengths
        with self.adapted():
            advance = self._decoder.advance(decoding, sampler)
            # Before another thread's pass: what was refined is known of the last one.
            return replace(advance, spent=advance.spent + self._spent(contexts))

    def _spent(self, contexts: Sequence[int]) -> Spent:
        if self._lent is None or self._refined_costs is None:
            return Spent()
        return self._refined_costs.spent([refined.num_steps for refined in self._lent.refined], contexts)

    def drop(self, decoding: Decoding, rows: Sequence[int]) -> None:
        """Forget finished rows."""
        decoding.drop(rows)

    def check_joining(self) -> None:
        """Rows may always come."""

    def feed(self, decoding: Decoding, ids: Sequence[int]) -> Spent:
        """Read more of the prompt of a decoding of one row."""
        with self.adapted():
            return self._decoder.feed(decoding, ids)

    def join(self, decoding: Decoding, other: Decoding, *, most_rows: int) -> None:
        """Take the rows of `other` in."""
        decoding.join(other, most_rows=most_rows)

    def keep(self, decoding: Decoding, rows: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        decoding.keep(rows)

    @torch.no_grad()
    def score(self, batch: Batch) -> Score:
        """One forward over the whole text; positions halt as they do in decoding, and `depths` are the outer steps that
        they have made."""
        with self.adapted():
            score = score_at_once(self.backbone, batch)
        made = None if self._lent is None else self._lent.steps_made
        if made is None:
            return score
        is_real = torch.arange(made.shape[1]) < batch.lengths[:, None].cpu()
        return replace(score, depths=made.cpu() * is_real)

    # Training

    def require_told(self, *, num_untold: int, num_documents: int) -> None:
        """How difficult all documents are must be told where that decides on their outer steps."""
        if self.config.draws_by_difficulty and num_untold:
            raise untold(self.config, f"{num_untold} of {num_documents} documents don't tell")

    def begin(self, batch: Batch) -> None:
        """Nothing is carried."""

    def prepare(self, batch: Batch, progress: Progress) -> TRMBatch:
        """Draw the number of outer steps, and after which the halting head is asked."""
        self._require_training()
        return drawn_for(self.config, batch)

    def count(self, batch: Batch) -> dict[Unit, int]:
        """Predicted tokens."""
        return {"token": int(batch.predicted().sum())}

    def train_step(self, batch: Batch, carry: None, progress: Progress) -> StepOutput:
        """Cross entropy of the next token behind the last outer steps, summed over tokens, in fp32 at least.

        With `halt` learned, also that of the halting head. Tokens see all before them in their row, other documents
        too, as in any model of transformers that is given nothing but ids.
        """
        drawn, targets = _drawn(batch).to(self.backbone.device), Targets.of(batch.to(self.backbone.device))
        use_delta_attention(self.base)
        ask = Ask(drawn.num_outer, drawn.own_outer, halts=False, watch=watched_steps(self.config, drawn))
        with self.adapted(), self._asked(ask):
            given = {"input_ids": drawn.input_ids, "use_cache": False, "logits_to_keep": targets.places}
            logits: Tensor = self.base(**given).logits
            losses = self._losses(drawn, logits, targets)
        return StepOutput(losses, metrics=self._metrics(drawn))

    def _losses(self, drawn: TRMBatch, logits: Tensor, targets: Targets) -> dict[str, LossTerm]:
        losses = {"final_ce": final_term(self.config, drawn, targets, logits)}
        if self.refiner is None or self._lent is None or self._layers:
            return losses
        watched, says = self._lent.refined[0].watched, self._lent.says
        if self.config.supervise_steps > 1:
            losses["earlier_ce"] = earlier_term(self.config, drawn, targets, logits, watched, says)
        if self.config.halt == "learned":
            losses["halt"] = halting_term(self.config, targets, watched[drawn.halting_step], self.refiner, says)
        return losses

    def _metrics(self, drawn: TRMBatch) -> dict[str, Mean]:
        return {} if self.refiner is None else {"refiner/outer_steps": drawn.mean_outer}

    def step_work(self, batch: Batch) -> Work:
        """The base's, and the refiner's in it; see costs.py."""
        self._require_training()
        if self._refined_costs is not None:
            return self._refined_costs.step_work(_drawn(batch))
        num_rows, num_positions = batch.input_ids.shape
        num_logits = len(places_of(batch.predicted()))
        return num_rows * training_work(self.backbone, num_positions=num_positions, num_logits=num_logits)

    def after_step(self, statistics: Mapping[str, Tensor]) -> None:
        """No buffers move."""

    def optim_groups(self) -> list[dict[str, Any]]:
        """What is trained: the refiner at a rate of its own, and the base's parameters where all are; vectors, which
        are not decayed, apart."""
        groups = []
        if self.refiner is not None:
            groups += self._groups(self.refiner, factor=self.config.refiner_rate_factor)
        if self.config.trains == "all":
            groups += self._groups(self.base, factor=1.0)
        return groups

    def _groups(self, module: nn.Module, *, factor: float) -> list[dict[str, Any]]:
        config, parameters = self.config, list(module.parameters())
        common = {"lr": config.learning_rate * factor, "rate_factor": factor, "betas": config.betas}
        groups = [
            {
                "params": [each for each in parameters if not _is_vector(each)],
                **common,
                "weight_decay": config.weight_decay,
            },
            {"params": [each for each in parameters if _is_vector(each)], **common, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def shard_units(self) -> list[nn.Module]:
        """The base's layers; the refiner, which none of them calls, is with the rest."""
        return list(self.backbone.layers)

    def _require_training(self) -> None:
        if self.refiner is None and self.config.trains == "refiner":
            raise CannotTrain(
                'use_trm is false, and so there is no refiner to train; set it to true, or trains to "all" to train '
                "the model without one"
            )

    def _asked(self, ask: Ask) -> AbstractContextManager[None]:
        return nullcontext() if self._lent is None else self._lent.asked(ask)

    # What is saved, and what it costs

    def saved_state(self) -> dict[str, Tensor]:
        """The refiner's tensors, whose names are those of any n, T and placement; a base that was trained is saved
        beside it, as what it is."""
        return {} if self.refiner is None else self.refiner.state_dict(keep_vars=True)

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back a refiner; a missing, unknown or misshapen tensor is a `CheckpointError` that names it.

        One that has learned to halt may be run by another rule: its halting head is left out then.
        """
        own = self.saved_state()
        state = {name: tensor for name, tensor in state.items() if name in own or not name.startswith("halt.")}
        fill(own, state, what="the refiner's tensors don't fit its configuration on this base")

    def flops(self, *, num_positions: int, context: int, num_logits: int | None = None) -> int:
        """Of the base's pass, and of all outer steps at the positions that get logits (behind layers: at all)."""
        num_logits = num_positions if num_logits is None else num_logits
        base = self._costs.flops(num_positions=num_positions, context=context, num_logits=num_logits)
        if self._refined_costs is None:
            return base
        return base + self._refined_costs.flops(num_positions=num_positions, context=context, num_logits=num_logits)

    def halted_flops(self, num_outer: int, *, context: int) -> int:
        """Of a pass of one token behind `context` others that halting has left so many outer steps at each place."""
        spent = Spent()
        if self._refined_costs is not None:
            spent = self._refined_costs.spent([num_outer] * max(1, len(self._layers)), [context])
        return self.flops(num_positions=1, context=context) + spent.added_flops

    def describe(self) -> dict[str, str | int | float]:
        """What stands where and what it costs, by label, for people to read; FLOPs count 2 per multiply-add."""
        if self.refiner is None:
            return {"refiner": "none: use_trm is false"}
        base = self._costs.flops(num_positions=1, context=0)
        own = self.flops(num_positions=1, context=0) - base
        place = f"behind layers {', '.join(map(str, self._layers))}" if self._layers else "before the head"
        return {
            "refiner": f"{place}, mixing {self.config.mixing}",
            "outer steps, of so many updates of the latent": f"{self.config.trm_T} of {self.config.trm_n}",
            "extra FLOPs per token": own,
            "extra FLOPs, share of the base's": round(own / base, 6),
        }

    def state_bytes(self, *, context: int) -> int:
        """Of the base's cache, and of the keys and values that evidence adds at each place."""
        if self._refined_costs is None:
            return row_state_bytes(self.backbone, context=context)
        return self._refined_costs.state_bytes(context=context)


def _drawn(batch: Batch) -> TRMBatch:
    assert isinstance(batch, TRMBatch), "a step is made from what `prepare` gave"
    return batch


def _new_refiner(config: TRMConfig, backbone: Backbone) -> TRMRefiner:
    """Drawn on the CPU, the same for every device; small updates of 16-bit numbers get lost, so it has 32 at least."""
    place = backbone.device
    with place if place.type == "meta" else torch.device("cpu"):
        refiner = TRMRefiner(
            backbone.hidden_size,
            config.trm_d_latent,
            config.trm_n,
            config.trm_T,
            hidden=config.trm_hidden,
            mixing=config.mixing,
            num_heads=config.trm_heads,
            grad_outer_steps=config.grad_outer_steps,
            learns_to_halt=config.halt == "learned",
        )
    return refiner.to(place, torch.promote_types(backbone.dtype, torch.float32))


def _is_vector(parameter: Tensor) -> bool:
    """Whether it has but one dimension, whatever its shape is written as."""
    return sum(size > 1 for size in parameter.shape) <= 1
