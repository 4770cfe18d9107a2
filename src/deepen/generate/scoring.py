"""Log-probabilities of given text, read the way decoding reads it: chunk after chunk behind a committed prefix."""

from collections.abc import Sequence

import torch
from torch import Tensor

from deepen.backbones.hf import Backbone
from deepen.core.types import Batch, Score
from deepen.generate.verify import pad_rows


def score_in_chunks(backbone: Backbone, batch: Batch, *, width: int) -> Score:
    """Score every token but each row's first, in passes of `width` positions, each committed before the next.

    The prediction of token t comes from a pass that reads up to token t - 1 behind a cache that earlier passes left:
    what a verify pass computes, not the base's own forward over the text.
    """
    rows = batch.unpadded()
    cache = backbone.new_cache(batch_size=len(rows), capacity=max(map(len, rows)))
    sheet = ScoreSheet(batch.input_ids.shape, backbone.dtype)
    for start in range(0, max(map(len, rows)) - 1, width):
        # The last token of a row predicts nothing that is given, so it is not read.
        chunks = [row[:-1][start : start + width] for row in rows]
        widths = [len(chunk) for chunk in chunks]
        logits = backbone.run(pad_rows(chunks, backbone.device), cache, widths=widths)
        cache.commit(widths)
        for index, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            sheet.put(index, start + 1, row[start + 1 : start + 1 + len(chunk)], logits[index, : len(chunk)])
    return sheet.score


def score_at_once(backbone: Backbone, batch: Batch) -> Score:
    """The same by the base's own forward over the whole text, with no cache: the reference before surgery."""
    width = batch.input_ids.shape[1]
    is_real = torch.arange(width) < batch.lengths[:, None].cpu()
    inputs = batch.input_ids.to(backbone.device)
    logits = backbone.model(input_ids=inputs, attention_mask=is_real.long().to(backbone.device)).logits
    sheet = ScoreSheet(batch.input_ids.shape, backbone.dtype)
    for index, ids in enumerate(batch.unpadded()):
        sheet.put(index, 1, ids[1:], logits[index, : max(0, len(ids) - 1)])
    return sheet.score


class ScoreSheet:
    """Log-probabilities of a batch's tokens, noted as they come in."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Of ids `[B, T]` under a model of `dtype`."""
        self.score = Score(
            torch.zeros(*shape, dtype=_wide(dtype)),
            scored=torch.zeros(*shape, dtype=torch.bool),
            correct=torch.zeros(*shape, dtype=torch.bool),
        )

    def put(self, row: int, start: int, targets: Sequence[int], logits: Tensor) -> None:
        """Tokens `targets` of `row`, from position `start` on, were decided by `logits` `[n, V]`."""
        if not targets:
            return
        span = slice(start, start + len(targets))
        self.score.log_probs[row, span], self.score.correct[row, span] = _of_targets(logits, targets)
        self.score.scored[row, span] = True


def log_probs_of(logits: Tensor, ids: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities `[n, m]`, in fp32 at least, of the m ids asked of each row of `logits` `[n, V]`."""
    wide = logits.to(_wide(logits.dtype)).log_softmax(dim=-1)
    asked = torch.tensor(ids, dtype=torch.int64, device=logits.device)
    return wide.gather(1, asked.view(len(ids), len(ids[0]) if ids else 0))


def _of_targets(logits: Tensor, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under its logits `[n, V]`, and whether it was the argmax; on the CPU."""
    ids = torch.tensor(targets, device=logits.device)
    return log_probs_of(logits, [(target,) for target in targets])[:, 0].cpu(), (logits.argmax(dim=-1) == ids).cpu()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
