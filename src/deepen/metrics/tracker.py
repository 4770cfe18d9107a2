"""The figures of a training run, by TensorBoard's tags."""

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsFloat

import numpy as np
from torch import Tensor

from deepen.core.errors import DeepenError
from deepen.core.files import write_json
from deepen.metrics.sinks import JsonLines, TensorBoard, bounded, finite

FIGURES = "train.jsonl"
TEXTS = "texts.jsonl"
CHECKPOINT_METRICS = "metrics.json"

_QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}


class MetricsTracker:
    """Writes figures to `log_dir/train.jsonl`, and for TensorBoard beside it.

    Each call is a line `{"step": 3, "train/loss/total": 2.1}`, so a step may have several. A figure is anything that
    `float` takes, a tensor of one element included, or None for one that there is not.
    """

    def __init__(self, log_dir: str | Path, use_tensorboard: bool = True, *, resume_after: int | None = None) -> None:
        """With `resume_after`, figures of later steps, which an interrupted run left, are forgotten.

        Raises `DeepenError` if TensorBoard is wanted and not installed.
        """
        folder = Path(log_dir)
        self._figures, self._texts = JsonLines(folder / FIGURES), JsonLines(folder / TEXTS)
        if resume_after is not None:
            self._figures.cut_after(resume_after)
            self._texts.cut_after(resume_after)
        self.tensorboard: TensorBoard | None = None
        if use_tensorboard:
            self.tensorboard = TensorBoard(folder, purge_step=None if resume_after is None else resume_after + 1)
        self._last: dict[str, Any] = {}
        for line in self._figures:
            self._last |= line

    def log(self, figures: Mapping[str, SupportsFloat | None], step: int) -> None:
        """Figures of a step by their full tags; one that is not finite is null in the file."""
        numbers = {tag: _number(tag, value) for tag, value in figures.items()}
        self._write(numbers, step)
        if self.tensorboard is not None:
            self.tensorboard.scalars(numbers, step=step)

    def log_losses(self, losses: Mapping[str, SupportsFloat | None], step: int, prefix: str = "train") -> None:
        """Losses by name, as `{prefix}/loss/{name}`."""
        self.log({f"{prefix}/loss/{name}": loss for name, loss in losses.items()}, step)

    def log_generation_metrics(
        self,
        avg_steps: SupportsFloat | None,
        commit_rate: SupportsFloat | None,
        avg_chunk_len: SupportsFloat | None,
        step: int,
    ) -> None:
        """Passes for a chunk, share of chunks committed by threshold, and committed tokens of a chunk."""
        figures = {"avg_refine_steps": avg_steps, "commit_rate": commit_rate, "avg_chunk_length": avg_chunk_len}
        self.log({f"train/generation/{name}": value for name, value in figures.items()}, step)

    def log_histogram(self, tag: str, values: Tensor, step: int) -> None:
        """How values of any shape are distributed; the file gets `{tag}/min`, `q25`, `median`, `q75`, `max`, `num`.

        NaN, infinities and what is beyond 9e19 are left out; if there are any, `{tag}/num_left_out` says how many.
        """
        flat = bounded(values)
        summary: dict[str, float] = {"num": flat.size}
        if flat.size:
            at = np.quantile(flat, list(_QUANTILES.values())).tolist()
            summary |= dict(zip(_QUANTILES, at, strict=True))
        if flat.size < values.numel():
            summary["num_left_out"] = values.numel() - flat.size
        self._write({f"{tag}/{name}": value for name, value in summary.items()}, step)
        if self.tensorboard is not None:
            self.tensorboard.histogram(tag, flat, step=step)

    def log_text(self, tag: str, text: str, step: int) -> None:
        """A text: a line in `texts.jsonl`; TensorBoard reads it as Markdown."""
        self._texts.append({tag: text}, step=step)
        if self.tensorboard is not None:
            self.tensorboard.text(tag, text, step=step)

    def save_checkpoint_metrics(self, folder: str | Path) -> Path:
        """Write `metrics.json` in a checkpoint's folder: the last step, and the last value of each tag up to it.

        That includes what was logged in this `log_dir` before the run was resumed.
        """
        path = Path(folder) / CHECKPOINT_METRICS
        write_json(path, self._last)
        return path

    def close(self) -> None:
        """Write the rest."""
        if self.tensorboard is not None:
            self.tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, numbers: Mapping[str, float | None], step: int) -> None:
        self._figures.append(numbers, step=step)
        self._last |= {"step": step, **finite(numbers)}


def _number(tag: str, value: SupportsFloat | None) -> float | None:
    if value is None or isinstance(value, int):
        return value  # counts stay whole
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as cause:
        raise DeepenError(f"{tag} is not one number ({cause}); give a float or a tensor of one element") from cause
