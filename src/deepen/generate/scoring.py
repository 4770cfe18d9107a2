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
    rows = [ids[:length] for ids, length in zip(batch.input_ids.tolist(), batch.lengths.tolist(), strict=True)]
    cache = backbone.new_cache(batch_size=len(rows), capacity=max(map(len, rows)))
    log_probs = torch.zeros(batch.input_ids.shape, dtype=_wide(backbone.dtype))
    scored = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    correct = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    for start in range(0, max(map(len, rows)) - 1, width):
        # The last token of a row predicts nothing that is given, so it is not read.
        chunks = [row[:-1][start : start + width] for row in rows]
        widths = [len(chunk) for chunk in chunks]
        logits = backbone.run(pad_rows(chunks, backbone.device), cache, widths=widths)
        cache.commit(widths)
        for index, (row, chunk) in enumerate(zip(rows, chunks, strict=True)):
            targets = row[start + 1 : start + 1 + len(chunk)]
            span = slice(start + 1, start + 1 + len(chunk))
            log_probs[index, span], correct[index, span] = _of_targets(logits[index, : len(chunk)], targets)
            scored[index, span] = True
    return Score(log_probs, scored, correct)


def score_at_once(backbone: Backbone, batch: Batch) -> Score:
    """The same by the base's own forward over the whole text, with no cache: the reference before surgery."""
    width = batch.input_ids.shape[1]
    is_real = torch.arange(width) < batch.lengths[:, None].cpu()
    inputs = batch.input_ids.to(backbone.device)
    logits = backbone.model(input_ids=inputs, attention_mask=is_real.long().to(backbone.device)).logits
    log_probs = torch.zeros(batch.input_ids.shape, dtype=_wide(backbone.dtype))
    correct = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
    for index, (ids, length) in enumerate(zip(batch.input_ids.tolist(), batch.lengths.tolist(), strict=True)):
        if length > 1:
            span = slice(1, length)
            log_probs[index, span], correct[index, span] = _of_targets(logits[index, : length - 1], ids[1:length])
    scored = is_real.clone()
    scored[:, 0] = False
    return Score(log_probs, scored, correct)


def _of_targets(logits: Tensor, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under its logits `[n, V]`, and whether it was the argmax; on the CPU."""
    ids = torch.tensor(targets, device=logits.device)
    wide = logits.to(_wide(logits.dtype)).log_softmax(dim=-1)
    return wide.gather(1, ids[:, None])[:, 0].cpu(), (logits.argmax(dim=-1) == ids).cpu()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
