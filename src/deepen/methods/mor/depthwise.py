"""The model as one that is batched by depth: the same layers, routers and gates, told to run tokens of several depths.

Between recursions a token is its state and what its router said of it: with expert_choice at the level that it enters
next, with token_choice once and for all.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from deepen.core.depthwise import DepthLayout, KeyValues, Running, State

from .config import MoRConfig
from .gates import gated
from .model import MoRModel, RecursiveLayer
from .routing import Answer, Asked, Routed


def depth_layout(config: MoRConfig) -> DepthLayout:
    """Which layers there are, and which entries they make and read."""
    layout, num_layers = config.layout, config.num_hidden_layers
    below: dict[int, int] = {}
    if config.kv == "frozen":
        for lower, upper in zip(layout.recursions, layout.recursions[1:], strict=False):
            below.update(zip(upper, lower, strict=True))
    weights = [tuple(layout.unique[layer] for layer in layers) for layers in layout.recursions]
    shared = config.kv == "shared"
    return DepthLayout(
        before=layout.before,
        recursions=layout.recursions,
        after=layout.after,
        entries=tuple(layout.first_use(layer) if shared else layer for layer in range(num_layers)),
        under=tuple(below.get(layer) for layer in range(num_layers)),
        groups=tuple(weights.index(each) for each in weights),
        num_heads=config.num_key_value_heads,
        width=config.head_dim,
    )


class DepthwiseModel:
    """Runs tokens of a `MoRModel` recursion by recursion."""

    def __init__(self, model: MoRModel) -> None:
        self._model = model
        self._layout = depth_layout(model.config)

    def enter(self, ids: Tensor, running: Running, kv: KeyValues) -> State:
        """Embedding, the layers before all recursions, and what a router says once."""
        hidden = self._run(self._model.embed_tokens(ids), [self._layout.before], running, kv)
        routed = Routed()
        self._model.router.begin(hidden, routed)
        nothing = _zeros(hidden)
        chosen = nothing.long() if routed.chosen is None else routed.chosen
        choices = nothing[:, None] if routed.choices is None else routed.choices
        return hidden, nothing, nothing, choices, chosen

    def recur(self, state: State, running: Running, kv: KeyValues) -> tuple[State, Tensor]:
        """A recursion of each, gated from the second on, and the router's decision about the next."""
        hidden, logits, probabilities, choices, chosen = state
        layers = [self._layout.recursions[level] for level, _ in running.runs]
        output = self._run(hidden, layers, running, kv)
        first = running.runs[0][1] if running.runs[0][0] == 0 else 0
        if self._model.router.has_gate and first < len(hidden):
            later = slice(first, None)
            kept = gated(
                self._model.config.gate,
                hidden[later],
                output[later],
                logits[later],
                probabilities[later],
                alpha=self._model.config.gate_alpha,
            )
            output = torch.cat([output[:first], kept])
        answers = [
            self._asked(level + 1, output[place], running.positions[place], choices[place], chosen[place])
            for level, place in running.slices()
        ]
        logits, probabilities, kept = (torch.cat(parts) for parts in zip(*answers, strict=True))
        return (output, logits, probabilities, choices, chosen), kept

    def leave(self, state: State, running: Running, kv: KeyValues) -> Tensor:
        """The layers after all recursions, and the final norm."""
        hidden: Tensor = self._model.norm(self._run(state[0], [self._layout.after], running, kv))
        return hidden

    def _asked(
        self, level: int, hidden: Tensor, positions: Tensor, choices: Tensor, chosen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, probabilities and who goes on, of tokens that have run all recursions before `level`."""
        nothing = _zeros(hidden)
        if level == self._layout.num_levels:
            return nothing, nothing, nothing.bool()
        # Rows are for those that look along them, which no decoding can.
        rows, lengths = torch.zeros_like(positions), torch.ones_like(positions[:1])
        asked = Asked(level, hidden, positions, rows, lengths, None, None)
        answer: Answer | None = self._model.router.decide(asked, Routed(choices=choices, chosen=chosen), topk=False)
        if answer is None:
            return nothing, nothing, torch.ones_like(nothing, dtype=torch.bool)
        return answer.logits.to(nothing), answer.probabilities.to(nothing), answer.kept

    def _run(self, hidden: Tensor, layers: Sequence[Sequence[int]], running: Running, kv: KeyValues) -> Tensor:
        """Layers of each of the runs, which have the same weights, one after the other."""
        cos, sin = self._model.rotary_emb(hidden, running.positions[None])
        for at_each in zip(*layers, strict=True):
            module = self._model.layers[self._model.layout.unique[at_each[0]]]
            assert isinstance(module, RecursiveLayer)
            makes = [count for (_, count), layer in zip(running.runs, at_each, strict=True) if self._makes(layer)]
            hidden = module.run_with(hidden, (cos[0], sin[0]), sum(makes) or None, partial(kv.attend, at_each))
        return hidden

    def _makes(self, layer: int) -> bool:
        return self._layout.entries[layer] == layer


def _zeros(hidden: Tensor) -> Tensor:
    """One for each token, as wide as a router's logits are."""
    return hidden.new_zeros(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
