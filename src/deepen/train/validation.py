"""What a model in training makes of documents that it is not trained on: the figures of `deepen evaluate`."""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from deepen.core.errors import CannotScore, DeepenError
from deepen.core.method import RecursiveModel
from deepen.core.types import LossTerm, Progress, Unit
from deepen.data.measured import documents_of, measured_batch, measured_rows
from deepen.evaluate.scoring import FIRST_SCORED, measure
from deepen.train.untouched import untouched

TAG = "evaluation/validation"
MAX_TOKENS = 20_000

# Tags of the figures that `measure` gives.
_FIGURES = {
    "loss": "nll",
    "perplexity": "perplexity",
    "bits_per_byte": "bits_per_byte",
    "token_accuracy": "token_accuracy",
}


def shown_evaluation(figures: Mapping[str, float | None]) -> str:
    """Those of `Validation.measure` that there are, on a line for people to read."""
    own = {tag.removeprefix(f"{TAG}/"): value for tag, value in figures.items() if tag.startswith(f"{TAG}/")}
    return "validation: " + "  ".join(f"{name} {value:.4f}" for name, value in own.items() if value is not None)


class Validation:
    """Measures a model on the validation documents of its corpus, the same ones each time.

    On texts the figures are those of `deepen evaluate --split validation` with the same limits: one document at a time,
    by the model's leak-free `score`, from token `first_scored` on; to the last bit where the base is packed, as it is
    there, and to rounding otherwise. Of what asks something the answers count alone, as in training.
    """

    def __init__(
        self,
        model: RecursiveModel,
        tokenizer: Any,
        data: str,
        *,
        max_length: int,
        max_tokens: int = MAX_TOKENS,
        batch_size: int = 1,
        first_scored: int = FIRST_SCORED,
        seed: int = 0,
        say: Callable[[str], None] = print,
    ) -> None:
        """Reads `max_tokens` tokens at most, `max_length` of a document at most.

        `batch_size` is that of training losses, where a model has no score; `seed` is what these are drawn from. `say`
        is told why there is no score, once. Raises `DeepenError` if the corpus has no validation document.
        """
        self._model, self._tokenizer = model, tokenizer
        self._batch_size, self._first_scored, self._seed, self._say = batch_size, first_scored, seed, say
        self._rows = list(
            measured_rows(documents_of(data, "validation"), tokenizer, max_length=max_length, max_tokens=max_tokens)
        )
        self._said: set[str] = set()
        if not self._rows:
            raise DeepenError(
                f"{data} has no validation document: 2 in 100 documents, told by their text, are kept for that; give "
                "more or other text, or leave validation out"
            )

    def measure(self, progress: Progress) -> dict[str, float | None]:
        """Figures by tag: `evaluation/validation/{loss,perplexity,bits_per_byte,token_accuracy}`, loss in nats a token.

        Where the model has no leak-free score: its training losses on these documents, at this `progress` of its
        schedules, as `evaluation/validation/loss/{name}` and `evaluation/validation/loss/total`. They are not
        comparable with those of another method.
        """
        with untouched(self._model, seed=self._seed):
            try:
                return self._scored()
            except CannotScore as cause:
                self._tell(f"no validation perplexity: {cause}; the training's losses are measured instead")
                return self._training_losses(progress)

    def _scored(self) -> dict[str, float | None]:
        batches = [measured_batch([row]) for row in self._rows]
        measured = measure(self._model.score, batches, tokenizer=self._tokenizer, first_scored=self._first_scored)
        return {f"{TAG}/{name}": measured.figures[figure] for name, figure in _FIGURES.items()}

    def _training_losses(self, progress: Progress) -> dict[str, float | None]:
        losses = _Sums()
        carry: Any = None
        for start in range(0, len(self._rows), self._batch_size):
            batch = measured_batch(self._rows[start : start + self._batch_size]).to(_device(self._model))
            if start == 0:
                carry = self._model.begin(batch)
            prepared = self._model.prepare(batch, progress)
            counts = self._model.count(prepared)
            output = self._model.train_step(prepared, carry, progress)
            losses.add(output.losses, counts)
            carry = output.carry
        return {f"{TAG}/loss/{name}": value for name, value in losses.means().items()}

    def _tell(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            self._say(text)


class _Sums:
    """Loss sums and counts over batches."""

    def __init__(self) -> None:
        self._terms: dict[str, LossTerm] = {}
        self._totals: dict[str, float] = {}
        self._counts: Counter[Unit] = Counter()

    def add(self, losses: Mapping[str, LossTerm], counts: Mapping[Unit, int]) -> None:
        """Those of one batch."""
        self._terms |= losses
        for name, term in losses.items():
            self._totals[name] = self._totals.get(name, 0.0) + float(term.total)
        self._counts.update(counts)

    def means(self) -> dict[str, float]:
        """Of each term per unit, and of their weighted sum as `total`."""
        means = {name: total / max(1, self._counts[self._terms[name].unit]) for name, total in self._totals.items()}
        return {**means, "total": sum(self._terms[name].weight * mean for name, mean in means.items())}


def _device(model: Any) -> torch.device:
    if model.backbone is not None:
        device: torch.device = model.backbone.device
        return device
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
