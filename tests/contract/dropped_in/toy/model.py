"""One small block, shared by all recursions, between a base's last layer and its final norm.

    h <- h + up(silu(down(h)))        R times, with the same weights

`up` starts at zero, so that a new toy is its base. The block reads one position at a time, so nothing it does can show
a position what comes after it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from deepen.backbones.costs import gradient_reaches, pass_flops, row_state_bytes, training_work
from deepen.backbones.hf import Backbone
from deepen.core.errors import CheckpointError
from deepen.core.method import Sampler
from deepen.core.types import Advance, Batch, LossTerm, Mean, Progress, Prompt, Score, Spent, StepOutput, Unit, Work
from deepen.generate.drafts import NO_DRAFT
from deepen.generate.verify import Decoding, judge, open_decoding, pad_rows

from .config import ToyConfig

LEARNING_RATE = 1e-2


class ToyModel(nn.Module):
    """A base with the block behind its last layer."""

    def __init__(self, config: ToyConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        # A trained block changes the output.
        self.promises_base = config.num_recursions == 0
        self.backbone = backbone
        self.base = backbone.model
        self.down = nn.Linear(backbone.hidden_size, config.width, bias=False)
        self.up = nn.Linear(config.width, backbone.hidden_size, bias=False)
        nn.init.zeros_(self.up.weight)
        self.down.to(backbone.device, backbone.dtype)
        self.up.to(backbone.device, backbone.dtype)

    @classmethod
    def build(cls, config: ToyConfig, backbone: Backbone, vocab_size: int) -> Self:
        """A new toy on an attached backbone."""
        return cls(config, backbone)

    def recur(self, h: Float[Tensor, "B W D"]) -> Float[Tensor, "B W D"]:
        """All recursions."""
        for _ in range(self.config.num_recursions):
            h = h + self.up(F.silu(self.down(h)))
        return h

    def _edit(self, layer: int, h: Tensor) -> Tensor:
        return self.recur(h) if layer == self.backbone.num_layers - 1 else h

    def _logits(self, input_ids: Tensor) -> Tensor:
        """`[B, T, V]`, a pass from an empty prefix; pads on the right are behind everything that counts."""
        cache = self.backbone.new_cache(batch_size=input_ids.shape[0], capacity=input_ids.shape[1])
        return self.backbone.run(input_ids, cache, edit=self._edit)

    def open(self, prompt: Prompt) -> Decoding:
        """Read the prompt; the block leaves no trace in the cache, so this is the base's reading."""
        return open_decoding(self.backbone, prompt)

    def advance(self, decoding: Decoding, sampler: Sampler) -> Advance:
        """One pass, one token a row."""
        inputs = pad_rows([row[-1:] for row in decoding.rows], self.backbone.device)
        with torch.no_grad():
            logits = self.backbone.run(inputs, decoding.cache, edit=self._edit)
        rows = judge(decoding, [NO_DRAFT] * len(decoding.rows), logits, sampler)
        applications = len(rows) * (self.backbone.num_layers + self.config.num_recursions)
        return Advance(rows, Spent(1, len(rows), applications))

    def drop(self, decoding: Decoding, rows: Sequence[int]) -> None:
        """Forget finished rows."""
        decoding.drop(rows)

    def begin(self, batch: Batch) -> None:
        """Nothing is carried."""

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        """Nothing is drawn."""
        return batch

    def count(self, batch: Batch) -> dict[Unit, int]:
        """Predicted tokens."""
        return {"token": int(batch.predicted().sum())}

    def train_step(self, batch: Batch, carry: Any, progress: Progress) -> StepOutput:
        """Cross entropy of the next token."""
        total = -(self._log_probs(batch).gather(2, _targets(batch)[..., None])[..., 0] * batch.predicted()).sum()
        metrics = {"recursions": Mean(float(self.config.num_recursions))}
        return StepOutput({"next_token": LossTerm(total, "token")}, metrics=metrics)

    def step_work(self, batch: Batch) -> Work:
        """The base's pass over each row, pads included, and the recursions behind its last layer."""
        num_rows, num_positions = batch.input_ids.shape
        last = self.backbone.num_layers - 1
        recurs = last if self.config.num_recursions else None
        of_row = training_work(self.backbone, num_positions=num_positions, begins_after=recurs)
        for recursion in range(self.config.num_recursions):
            # The first may read what gets no gradient; all others read what the first one wrote.
            reads_gradient = recursion > 0 or gradient_reaches(self.backbone, last)
            of_row += Work.of(num_positions * self.down.weight.numel(), operands=1 + reads_gradient)
            of_row += Work.of(num_positions * self.up.weight.numel(), operands=2)
        return num_rows * of_row

    def _log_probs(self, batch: Batch) -> Tensor:
        """`[B, T - 1, V]` of the tokens after the first, in float32 or more."""
        logits = self._logits(batch.input_ids.to(self.backbone.device))[:, :-1]
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)

    def after_step(self, statistics: Mapping[str, Tensor]) -> None:
        """No buffers move."""

    @torch.no_grad()
    def score(self, batch: Batch) -> Score:
        """Teacher forcing: one forward over the text."""
        predictions = self._log_probs(batch).cpu()
        targets, counted = _targets(batch).cpu(), batch.predicted().cpu()
        log_probs = predictions.gather(2, targets[..., None])[..., 0] * counted
        correct = (predictions.argmax(dim=-1) == targets) & counted
        # The first token of a row has no prediction.
        return Score(F.pad(log_probs, (1, 0)), F.pad(counted, (1, 0)), F.pad(correct, (1, 0)))

    def optim_groups(self) -> list[dict[str, Any]]:
        """The block; the base is never trained."""
        return [{"params": [self.down.weight, self.up.weight], "lr": LEARNING_RATE, "weight_decay": 0.0}]

    def shard_units(self) -> list[nn.Module]:
        """The base's layers."""
        return list(self.backbone.layers)

    def saved_state(self) -> dict[str, Tensor]:
        """The block's two matrices."""
        return {"down.weight": self.down.weight, "up.weight": self.up.weight}

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Take them back."""
        own = self.saved_state()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [name for name in own if name in state and state[name].shape != own[name].shape]
        if wrong:
            raise CheckpointError(f"a toy's tensors are {', '.join(own)}; missing, unknown or misshapen: {wrong}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(state[name])

    def flops(self, *, num_positions: int, context: int, num_logits: int | None = None) -> int:
        """The base's pass and the recursions."""
        recursion = 2 * (self.down.weight.numel() + self.up.weight.numel())
        block = num_positions * self.config.num_recursions * recursion
        base = pass_flops(self.backbone, num_positions=num_positions, context=context, num_logits=num_logits)
        return base + block

    def state_bytes(self, *, context: int) -> int:
        """The base's cache."""
        return row_state_bytes(self.backbone, context=context)


def _targets(batch: Batch) -> Tensor:
    """`[B, T - 1]`: what each position but the last is followed by."""
    return batch.input_ids[:, 1:]
