"""What a run writes and shows of its steps: figures, histograms and samples."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from deepen.core.types import Work
from deepen.metrics.tracker import MetricsTracker
from deepen.train.progress import Display, Pace
from deepen.train.samples import Sample, SampleBook
from deepen.train.step import StepReport


class Record:
    """Of a run in `folder` that goes on after `resume_after` steps: what was written of later ones is made again."""

    def __init__(self, folder: Path, *, pace: Pace, tensorboard: bool, resume_after: int, device: torch.device) -> None:
        self._tracker = MetricsTracker(folder, use_tensorboard=tensorboard, resume_after=resume_after)
        self._samples = SampleBook(folder, tensorboard=self._tracker.tensorboard, resume_after=resume_after)
        self._pace, self._device = pace, device

    def write(self, report: StepReport, work: Work, display: Display, *, evaluated: Mapping[str, float | None]) -> None:
        """A step's figures and those of the interval that ends with it; `work` is that of all steps so far."""
        of_interval = self._pace.figures(self._device)
        figures = {
            **tagged(report),
            **of_interval,
            # Whatever was logged: what a loss is plotted against.
            "train/performance/flops": work.flops,
            **evaluated,
        }
        self._tracker.log(figures, report.step)
        tokens_per_sec = of_interval["train/performance/tokens_per_sec"]
        display.figures(report.step, loss=report.total, tokens_per_sec=tokens_per_sec)

    def write_samples(self, samples: tuple[Sample, ...], *, step: int) -> None:
        """Texts that the model wrote after this step."""
        self._samples.write(samples, step=step)

    def write_parameters(self, parameters: Mapping[str, nn.Parameter], *, step: int) -> None:
        """How each trained tensor's values are distributed, for TensorBoard; a file of lines has no use for it."""
        if self._tracker.tensorboard is not None:
            for name, parameter in parameters.items():
                self._tracker.tensorboard.histogram(f"parameters/{name}", parameter, step=step)

    def save_last(self, folder: Path) -> None:
        """The last value of every figure, into a checkpoint."""
        self._tracker.save_checkpoint_metrics(folder)

    def close(self) -> None:
        """Write the rest."""
        self._tracker.close()


def tagged(report: StepReport) -> dict[str, float | None]:
    """A step's figures by tag; a metric of the method's that is not finite is None."""
    metrics = {f"train/{name}": value if math.isfinite(value) else None for name, value in report.metrics.items()}
    return {
        "train/loss/total": report.total,
        **{f"train/loss/{name}": loss for name, loss in report.losses.items()},
        "train/learning_rate": report.learning_rate,
        "train/gradient_norm": report.gradient_norm,
        **metrics,
    }
