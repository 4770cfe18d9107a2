"""Checks that the ledger's figures are what torch counts and what is really held."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from deepen.backbones.costs import pass_costs, row_state_bytes, training_costs, uncounted
from deepen.backbones.hf import Backbone
from deepen.check.counted import Ran, committed_bytes, counted_flops, pass_flops_computed, passes_of
from deepen.check.effort import Effort
from deepen.check.held import held_by
from deepen.check.methods import GREEDY, prompts_of
from deepen.check.outcome import Fault, Passed
from deepen.check.prefix import attached, fresh_reading, parts
from deepen.check.subject import Subject
from deepen.core.method import RecursiveModel, adapted
from deepen.core.types import Prompt
from deepen.generate.sampling import BatchSampler

_LENGTH = 12
_CONTEXTS = 0, 5
_NUM_ADVANCES = 3


def flops(subject: Subject, effort: Effort) -> Passed:
    """The ledger's FLOPs must be torch's, of deepen's passes, of the model's own forward and backward, of a method.

    Over several tokens a recurrent layer is computed in another form than it is counted in (nn/kda.py), so such models
    are held to passes of one token.
    """
    backbone = attached(subject)
    ledger = _Ledger(backbone, subject)
    widths = (1,) if backbone.recurrent_layers else (1, _LENGTH)
    for width in widths:
        for context in _CONTEXTS:
            ledger.hold_pass(width, context)
    if not backbone.recurrent_layers:
        ledger.hold_forward_and_backward()
    num_cases = ledger.num_cases
    if subject.method is not None:
        with adapted(subject.method):
            of_method = _Ledger(backbone, subject)
            of_method.hold_advances(subject.method)
        num_cases += of_method.num_cases
    return Passed(num_cases, note="by torch's FlopCounterMode")


def num_bytes(subject: Subject, effort: Effort) -> Passed:
    """The ledger's bytes of a row must be those of the tensors that its cache holds."""
    backbone = attached(subject)
    num_cases = 0
    for length in (1, _LENGTH, effort.length):
        ids = subject.text(length, seed=length)
        cache = fresh_reading(backbone, ids[0].tolist())
        _require_equal(
            committed_bytes(cache),
            row_state_bytes(backbone, context=length),
            f"bytes of {length} tokens in a PrefixCache",
            cause="a layer keeps keys or values of other widths than the configuration says, or in another dtype",
        )
        num_cases += 1
        if not backbone.recurrent_layers and "past_key_values" in subject.takes:
            held = held_by(subject.read(ids).cache)
            _require_equal(
                sum(tensor.nbytes for tensor in held.values() if tensor.ndim > 2),
                row_state_bytes(backbone, context=length),
                f"bytes of {length} tokens in the model's own cache",
                cause="the model keeps more than keys and values of each token, or room for tokens to come",
            )
            num_cases += 1
    return Passed(num_cases)


class _Ledger:
    """What deepen's ledger tells of a model, held to what torch counts."""

    def __init__(self, backbone: Backbone, subject: Subject) -> None:
        self._backbone, self._subject = backbone, subject
        self._costs = pass_costs(backbone)
        self.num_cases = 0

    def hold_pass(self, width: int, context: int) -> None:
        """One of deepen's passes, which computes positions and entries in blocks."""
        backbone, ids = self._backbone, self._subject.text(context + width, seed=width)
        cache = backbone.new_cache(batch_size=1, capacity=context + width)
        with torch.no_grad():
            if context:
                backbone.run(ids[:, :context], cache)
                cache.commit([context])
            counted = counted_flops(
                lambda: backbone.run(ids[:, context:], cache), positions_before=self._columns_before
            )
        told = pass_flops_computed(backbone, self._costs, width=width, contexts=[context], num_logits=width)
        self._hold(counted, told, f"a pass over {width} tokens behind {context}")

    @cached_property
    def _columns_before(self) -> int:
        """Inputs of a short convolution that stand before those of a pass, zeros before the first."""
        held = parts(fresh_reading(self._backbone, [0]), 0)
        return next((part.tensor.shape[-1] for part in held if part.name == "window"), 0)

    def hold_forward_and_backward(self) -> None:
        """The model's own, over a text; the gradients are thrown away."""
        model, ids = self._backbone.model, self._subject.text(_LENGTH, seed=1)
        # Attention computes all T x T scores, of which the upper triangle is hidden.
        hidden = _LENGTH * (_LENGTH - 1) // 2
        logits: list[torch.Tensor] = []

        def forward() -> None:
            logits.append(model(input_ids=ids, use_cache=False).logits)

        costs = training_costs(self._backbone)
        told = costs.over(num_positions=_LENGTH) + hidden * costs.per_visible
        with torch.enable_grad():
            self._hold(counted_flops(forward), told.forward_flops, f"a forward over {_LENGTH} tokens")
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            if not logits[0].requires_grad:
                return
            loss = logits[0].square().mean()
            backward = lambda: torch.autograd.grad(loss, trained, allow_unused=True)  # noqa: E731
            self._hold(counted_flops(backward), told.backward_flops, f"a backward over {_LENGTH} tokens")

    def hold_advances(self, method: RecursiveModel) -> None:
        """A method's advances, by what they say that they have spent, as long as there is room for another."""
        (prompt, *_) = prompts_of(self._subject, _LENGTH)
        decoding = method.open(Prompt((tuple(prompt),), _LENGTH))
        room = _LENGTH
        for number in range(1, _NUM_ADVANCES + 1):
            if not room:
                break
            gained: list[Any] = []
            with passes_of(self._backbone) as passes, torch.no_grad():
                counted = counted_flops(lambda: gained.append(method.advance(decoding, BatchSampler([GREEDY]))))  # noqa: B023
            spent, when = gained[0].spent, f"advance {number}"
            room -= len(gained[0].rows[0].tokens)
            positions = sum(sum(ran.widths) for ran in passes)
            _require_equal(len(passes), spent.passes, f"passes of {when}", cause=_SPENT)
            _require_equal(positions, spent.positions, f"positions of {when}", cause=_SPENT)
            if not self._backbone.recurrent_layers:
                told = sum(ran.flops_computed(self._backbone, self._costs) for ran in passes) + spent.added_flops
                told += sum(self._added(method, ran) for ran in passes)
                _require_equal(counted, told, f"FLOPs of {when}", cause=_SPENT)
            self.num_cases += 1

    def _added(self, method: RecursiveModel, ran: Ran) -> int:
        """What the method tells of a pass of one row beyond the base's part of it."""
        ((width,), (context,)) = ran.widths, ran.contexts
        own = method.flops(num_positions=width, context=context)
        return own - self._costs.flops(num_positions=width, context=context)

    def _hold(self, counted: int, told: int, what: str) -> None:
        _require_equal(counted, told, f"FLOPs of {what}", cause=self._cause)
        self.num_cases += 1

    def _cause(self) -> str:
        weights = uncounted(self._backbone)
        if weights:
            return f"products with {', '.join(weights[:3])}: the ledger doesn't know that kind of module"
        return "a module is used more or less often than once a token, or attention has other widths than configured"


_SPENT = "the method's `Spent` or `flops` leaves out something that it runs, or tells of something that it doesn't"


def _require_equal(counted: int, told: int, what: str, *, cause: str | Callable[[], str]) -> None:
    if counted != told:
        raise Fault(
            f"{what}: counted {counted:,}, the ledger tells {told:,}",
            cause=cause if isinstance(cause, str) else cause(),
        )
