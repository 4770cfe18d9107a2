"""A causal LM as it is, trained on the next token: all of its parameters, or LoRA on it."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from deepen.backbones.costs import pass_costs, row_state_bytes, training_work
from deepen.backbones.hf import Backbone
from deepen.backbones.recurrence import use_delta_attention
from deepen.core.errors import CheckpointError
from deepen.core.method import Sampler
from deepen.core.types import Advance, Batch, LossTerm, Progress, Prompt, Score, Spent, StepOutput, Unit, Work
from deepen.generate.plain import PlainDecoder
from deepen.generate.scoring import score_at_once
from deepen.generate.verify import Decoding

from .config import DenseConfig
from .lora import LoraAdapters

_NOT_PREDICTED = -100


class DenseModel(nn.Module):
    """A base, or a base with LoRA. Where all is trained, the base itself changes, and nothing is beside it."""

    # Training is there to change the output.
    promises_base = False

    def __init__(self, config: DenseConfig, backbone: Backbone) -> None:
        """Use `build`."""
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.base = backbone.model
        self.lora = LoraAdapters(config, backbone) if config.trains == "lora" else None
        self._decoder = PlainDecoder(backbone)
        with self.adapted():
            self._costs = pass_costs(backbone)

    @classmethod
    def build(cls, config: DenseConfig, backbone: Backbone, vocab_size: int) -> Self:
        """Over an attached backbone."""
        return cls(config, backbone)

    def adapted(self) -> AbstractContextManager[None]:
        """In the block, the base computes with what was trained beside it.

        A training step whose backward runs parts of the forward again (activation checkpointing) must be inside with
        its backward, too.
        """
        return nullcontext() if self.lora is None else self.lora.in_place()

    # Decoding

    def open(self, prompt: Prompt) -> Decoding:
        """Read the prompt."""
        with self.adapted():
            return self._decoder.open(prompt)

    def advance(self, decoding: Decoding, sampler: Sampler) -> Advance:
        """One pass, one token a row."""
        with self.adapted():
            return self._decoder.advance(decoding, sampler)

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
        """One forward over the whole text."""
        with self.adapted():
            return score_at_once(self.backbone, batch)

    # Training

    def begin(self, batch: Batch) -> None:
        """Nothing is carried."""

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        """Nothing is drawn."""
        return batch

    def count(self, batch: Batch) -> dict[Unit, int]:
        """Predicted tokens."""
        return {"token": int(batch.predicted().sum())}

    def train_step(self, batch: Batch, carry: None, progress: Progress) -> StepOutput:
        """Cross entropy of the next token, summed over those that are to be predicted, in fp32 at least.

        Tokens see all before them in their row, other documents too, as in any model of transformers that is given
        nothing but ids.
        """
        batch = batch.to(self.backbone.device)
        predicted = batch.predicted()
        places = _places(predicted)
        logits = self._logits(batch.input_ids, places)
        targets = batch.input_ids[:, 1:].masked_fill(~predicted, _NOT_PREDICTED)[:, places]
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=_NOT_PREDICTED, reduction="sum")
        return StepOutput({"final_ce": LossTerm(total, "token")})

    def step_work(self, batch: Batch) -> Work:
        """A forward over each row, pads included, with the head at the places where any row predicts."""
        num_rows, num_positions = batch.input_ids.shape
        num_logits = len(_places(batch.predicted()))
        with self.adapted():
            of_row = training_work(self.backbone, num_positions=num_positions, num_logits=num_logits)
        return num_rows * of_row

    def after_step(self, statistics: Mapping[str, Tensor]) -> None:
        """No buffers move."""

    def optim_groups(self) -> list[dict[str, Any]]:
        """What is trained; vectors of the base apart, which are not decayed."""
        common = {"lr": self.config.learning_rate, "betas": self.config.betas}
        decayed = {**common, "weight_decay": self.config.weight_decay}
        if self.lora is not None:
            return [{"params": list(self.lora.tensors().values()), **decayed}]
        parameters = list(self.base.parameters())
        groups = [
            {"params": [each for each in parameters if not _is_vector(each)], **decayed},
            {"params": [each for each in parameters if _is_vector(each)], **common, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def shard_units(self) -> list[nn.Module]:
        """The base's layers."""
        return list(self.backbone.layers)

    def _logits(self, input_ids: Int[Tensor, "B T"], places: Int[Tensor, "P"]) -> Float[Tensor, "B P V"]:
        """At these positions; pads stand behind all that counts, and no position sees what is behind it."""
        use_delta_attention(self.base)
        with self.adapted():
            logits: Tensor = self.base(input_ids=input_ids, use_cache=False, logits_to_keep=places).logits
        return logits

    # What is saved, and what it costs

    def saved_state(self) -> dict[str, Tensor]:
        """LoRA's tensors; nothing where all is trained, as the trained model is the base then."""
        return {} if self.lora is None else dict(self.lora.tensors())

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back LoRA; a missing, unknown or misshapen tensor is a `CheckpointError` that names it."""
        if self.lora is not None:
            self.lora.load(state)
        elif state:
            raise CheckpointError(f"a model that is trained as a whole has nothing beside it; unknown {min(state)}")

    def flops(self, *, num_positions: int, context: int, num_logits: int | None = None) -> int:
        """Of the base's pass, and of LoRA in it."""
        return self._costs.flops(num_positions=num_positions, context=context, num_logits=num_logits)

    def state_bytes(self, *, context: int) -> int:
        """Of the base's cache."""
        return row_state_bytes(self.backbone, context=context)


def _places(predicted: Tensor) -> Tensor:
    """`[P]`: the positions after which a token is to be predicted in any row, of `[B, T - 1]`."""
    return predicted.any(dim=0).nonzero()[:, 0]


def _is_vector(parameter: Tensor) -> bool:
    """Whether it has but one dimension, whatever its shape is written as."""
    return sum(size > 1 for size in parameter.shape) <= 1
