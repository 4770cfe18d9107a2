"""The protocol between a method and everything that is written once.

A method is one folder in `deepen/methods` whose model meets `RecursiveModel`; data, training, generation, scoring,
checkpoints and commands know it through these members and nothing else.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, Self, runtime_checkable

from torch import Tensor, nn

from deepen.core.types import Advance, Batch, Progress, Prompt, Score, Spent, StepOutput, Unit, Work


class Sampler(Protocol):
    """Decides tokens from logits, the same way however many positions a pass covers."""

    def choose(self, row: int, logits: Tensor, history: Sequence[int], drafted: Sequence[int]) -> list[int]:
        """The token at each of W consecutive positions of `row`.

        `logits` `[W, V]` belong to the positions after `history`, `history + drafted[:1]`, ...; entry i is chosen
        as plain decoding would after `history + drafted[:i]`. `history` holds the row's ids without pads.
        """


@runtime_checkable
class Decoder(Protocol):
    """Continues prompts. A decoding is opaque to its caller, who only hands it back."""

    def open(self, prompt: Prompt) -> Any:
        """Read the prompt's rows and give the state of one decoding."""

    def advance(self, decoding: Any, sampler: Sampler) -> Advance:
        """One unit of recursion: every row commits 0..W tokens (at least one row commits one)."""

    def drop(self, decoding: Any, rows: Sequence[int]) -> None:
        """Forget finished rows (indices in the present order); the others keep their order and their state."""


@runtime_checkable
class RecursiveModel(Decoder, Protocol):
    """What a method's model is, beside being an `nn.Module` with a frozen `config`.

    `backbone` is the attached base that its passes run on; None for a method that brings its own trunk.
    `promises_base` says whether its decoding promises that base's own output, trained or not.
    """

    config: Any
    backbone: Any
    promises_base: bool

    @classmethod
    def build(cls, config: Any, backbone: Any, vocab_size: int) -> Self:
        """The model over an attached backbone (None for a method that brings its own trunk)."""

    def begin(self, batch: Batch) -> Any:
        """The first carry of a training run; None where nothing is carried."""

    def prepare(self, batch: Batch, progress: Progress) -> Batch:
        """Draw masks, depths and the like before the forward; the batch itself where nothing is drawn.

        It gets all rows of an optimizer step, on the CPU and from a seed of that step, whatever number of ranks and
        micro-batches they are divided over afterwards: so the same is drawn, and counted, however a step is divided.
        Raises `CannotTrain` as `train_step` does.
        """

    def count(self, batch: Batch) -> Mapping[Unit, int]:
        """Units in a prepared batch, known before the forward, to divide the summed losses by."""

    def train_step(self, batch: Batch, carry: Any, progress: Progress) -> StepOutput:
        """Loss sums with gradient, the next carry and metrics; raises `CannotTrain` where there is no training."""

    def step_work(self, batch: Batch) -> Work:
        """The matrix products of one `train_step` on this prepared batch, by how many operands get a gradient.

        Where that depends on what a forward decides, what is to be expected: its `StepOutput.work` then tells the rest.
        Pads up to the batch's longest row are counted, since they are computed. Raises as `train_step` does where that
        is not there.
        """

    def after_step(self, statistics: Mapping[str, Tensor]) -> None:
        """Move buffers (thresholds, balancing biases) from the `statistics` of `train_step`, summed over the step."""

    def score(self, batch: Batch) -> Score:
        """Leak-free log-probabilities per token; raises `CannotScore` where there are none."""

    def optim_groups(self) -> list[dict[str, Any]]:
        """Optimizer groups (`params`, `lr`, ...) that cover each trainable parameter exactly once.

        Parameters of the base in them are trained with the method's own. A `rate_factor` is what a group's rate is of
        a run's, where that gives one for all.
        """

    def shard_units(self) -> list[nn.Module]:
        """Modules to shard, compile and checkpoint one by one."""

    def saved_state(self) -> dict[str, Tensor]:
        """The tensors a checkpoint of this model holds (never a copy of the base)."""

    def load_saved_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back `saved_state`, strictly: a missing, unknown or misshapen tensor is an error."""

    def flops(self, *, num_positions: int, context: int, num_logits: int | None = None) -> int:
        """FLOPs (2 per multiply-add) of one row's pass over `num_positions` tokens after `context` tokens.

        `num_logits` positions go through the head, all of them when it is None.
        """

    def state_bytes(self, *, context: int) -> int:
        """Bytes of cache and state that one row holds after `context` tokens."""


@runtime_checkable
class Adapting(Protocol):
    """A model that lends its base other parts while it computes, as adapters that stand in the place of linears.

    What its decodings commit is then what this base, so changed, leaves of the committed tokens.
    """

    def adapted(self) -> AbstractContextManager[None]:
        """In the block, the base is as it is in the model's own passes."""


@runtime_checkable
class Joining(Decoder, Protocol):
    """A decoder whose rows come and go while it decodes, as requests that are served together do.

    What a row says depends neither on when it came nor on who was there before.
    """

    def check_joining(self) -> None:
        """Raises `CannotJoin` where the model's configuration lets no rows come; then so does what follows."""

    def feed(self, decoding: Any, ids: Sequence[int]) -> Spent:
        """Read more of the prompt of a decoding of one row that hasn't advanced, as if `open` had read all of it.

        Raises `PromptError` where it and the row's new tokens don't fit the prompt's `capacity`.
        """

    def join(self, decoding: Any, other: Any, *, most_rows: int) -> None:
        """Take the rows of `other`, which is used up, in behind those of `decoding`.

        Both were opened with the same `capacity`; memory for `most_rows` rows is taken at once. There may be no rows
        left to join, and the memory of those before is used again.
        """

    def keep(self, decoding: Any, rows: Sequence[int]) -> None:
        """Keep the rows with these indices, in this order, and forget the others.

        Only rows whose index changes are moved: a finished row's place is best filled by the last row.
        """

    def state_bytes(self, *, context: int) -> int:
        """Bytes of cache and state that one row holds after `context` tokens."""


@runtime_checkable
class Recurring(Protocol):
    """A model that runs some of its units several times in one forward, or as often as its rows need.

    Sharded, all other units must run equally often on every rank: each use of one waits for all ranks.
    """

    def recurring_units(self) -> list[nn.Module]:
        """Those of `shard_units`; sharded, their parameters are gathered when a step begins and kept until its end.

        So they are whole on every rank in a step, and sharding saves memory between steps alone.
        """


@runtime_checkable
class Fitting(Protocol):
    """A model that chooses something by the data that it will be trained on; what it chose is in `saved_state`."""

    def fit(self, counts: Tensor) -> None:
        """`counts` `[V]` says how often each id is learned in an epoch; told before the first step.

        A model that has learned already stays as it is. A run that goes on then takes back what it was fitted to.
        """


@runtime_checkable
class ByDifficulty(Protocol):
    """A model that may be trained by how difficult each document's record says it is."""

    def require_told(self, *, num_untold: int, num_documents: int) -> None:
        """Told before the first step of so many documents with something to learn, and how many of them don't say.

        Raises `CannotTrain` where they should.
        """


@runtime_checkable
class LookingAhead(Protocol):
    """A model that may be trained by decisions that look at later tokens, as none that generates can make them."""

    looks_ahead: bool
    """Whether this one is trained so."""

    def score_looking_ahead(self, batch: Batch) -> Score:
        """As `score`, by the decisions of training: no model's perplexity, and to be told apart from it."""


@runtime_checkable
class Deepening(Protocol):
    """A model whose recursions can be run more often, or less often, than they were trained to be."""

    num_recursions: int
    """How often, at most, a token runs them."""

    def at_depth(self, num_recursions: int) -> Self:
        """The same weights, shared and not copied, under another number of recursions.

        As many as there are gives the same bits. Raises `ConfigError` for a number that the model can't be run with.
        """


def adapted(model: object) -> AbstractContextManager[None]:
    """In the block, the base of `model` is as the model's own passes find it: itself, unless `model` is `Adapting`."""
    return model.adapted() if isinstance(model, Adapting) else nullcontext()
