"""The rows that a sidecar is trained on: chunks of texts, each behind an anchor, and how they are corrupted.

Everything that is drawn is drawn here, for all texts of a step, before they are divided over ranks and micro-batches.
Letters: B texts, T tokens of the longest, N anchors a text, W tokens of a chunk, K refined passes, R chunks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from deepen.core.types import Batch, Progress
from deepen.data.chunks import corruption_rate_at, create_corruption_mask
from deepen.methods.chunk.config import RecursiveConfig

RANDOM_TOKEN_SHARE = 0.2
"""Of corrupted positions without the model's own draft: those that get a random token; the others are slots."""

_MANY_SEEDS = 2**62

# What a corrupted position gets.
CLEAN, SLOT, RANDOM, OWN_DRAFT = range(4)


@dataclass(frozen=True, kw_only=True)
class ChunkBatch(Batch):
    """Texts with chunks in them. A chunk is the `sizes` tokens behind its anchor, the last token that it is given.

    Where a text has fewer chunks than N, `sizes` is 0. `passes_corrupted` and what belongs to it are None in exact
    mode, which corrupts nothing.
    """

    anchors: Int[Tensor, "B N"]
    """Places of the tokens in front of the chunks."""
    sizes: Int[Tensor, "B N"]
    passes_corrupted: Int[Tensor, "B N W"] | None = None
    """In how many passes each position is corrupted: in the first so many of the K."""
    corruptions: Int[Tensor, "B N W"] | None = None
    """What it gets then: CLEAN, SLOT, RANDOM or OWN_DRAFT."""
    random_ids: Int[Tensor, "B N W"] | None = None
    noise_seeds: Int[Tensor, "B N"] | None = None
    """Of each chunk's soft tokens; None without such."""

    @property
    def num_chunks(self) -> int:
        """R"""
        return int((self.sizes > 0).sum())

    @property
    def num_masked(self) -> int:
        """Corrupted tokens, once for each pass that they are corrupted in."""
        return 0 if self.passes_corrupted is None else int(self.passes_corrupted.sum())

    @property
    def num_targets(self) -> int:
        """Tokens of chunks that are predicted: all but each chunk's first, which the clean prefix decides."""
        return int((self.sizes - 1).clamp(min=0).sum())

    def chunks(self) -> "Chunks":
        """The chunks as rows."""
        texts, numbers = (self.sizes > 0).nonzero(as_tuple=True)
        anchors, sizes = self.anchors[texts, numbers], self.sizes[texts, numbers]
        width = int(sizes.max()) if len(sizes) else 0
        places = (anchors[:, None] + 1 + torch.arange(width, device=anchors.device)).clamp(
            max=self.input_ids.shape[1] - 1
        )
        return Chunks(
            texts=texts,
            numbers=numbers,
            anchors=anchors,
            sizes=sizes,
            given=self.input_ids[texts, anchors],
            ids=self.input_ids[texts[:, None], places],
        )


@dataclass(frozen=True)
class Chunks:
    """R chunks of a batch: which text and number each has, the token at its anchor, and its own tokens.

    Behind `sizes` tokens of a row are others, which mean nothing.
    """

    texts: Int[Tensor, "R"]
    numbers: Int[Tensor, "R"]
    anchors: Int[Tensor, "R"]
    sizes: Int[Tensor, "R"]
    given: Int[Tensor, "R"]
    ids: Int[Tensor, "R W"]

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def width(self) -> int:
        """Of the widest."""
        return self.ids.shape[1]

    @property
    def targets(self) -> Bool[Tensor, "R W"]:
        """Which positions are predicted: all real ones but the first."""
        places = torch.arange(self.width, device=self.sizes.device)
        return (places > 0) & (places < self.sizes[:, None])

    def of_number(self, number: int) -> "Chunks":
        """One chunk of each text that has so many."""
        chosen = self.numbers == number
        sizes = self.sizes[chosen]
        width = int(sizes.max()) if len(sizes) else 0
        return Chunks(
            texts=self.texts[chosen],
            numbers=self.numbers[chosen],
            anchors=self.anchors[chosen],
            sizes=sizes,
            given=self.given[chosen],
            ids=self.ids[chosen][:, :width],
        )


def draw_rows(
    batch: Batch,
    config: RecursiveConfig,
    progress: Progress,
    *,
    vocab_size: int,
    least_anchor: int,
    num_places: int | None,
) -> ChunkBatch:
    """Draw anchors, and in refined mode what is corrupted, from torch's generator.

    An anchor is a token at `least_anchor` or behind it, with at least two tokens behind it in its document of which the
    second is learned: the first one is the clean prefix's. A chunk ends with its document, with what is learned, or
    with the place `num_places`.
    """
    sizes_at = _sizes_behind(batch, config.chunk_width)
    sizes_at[:, :least_anchor] = 0
    if num_places is not None:
        room = num_places - 1 - torch.arange(sizes_at.shape[1])
        sizes_at = torch.minimum(sizes_at, room.clamp(min=0))
    sizes_at[sizes_at < 2] = 0
    anchors, sizes = (
        _consecutive(sizes_at, config) if config.carry_state else _anywhere(sizes_at, config.anchors_per_text)
    )
    given = {**vars(batch), "anchors": anchors, "sizes": sizes}
    if config.commit_mode == "refined":
        given |= _corruption(sizes, config, progress, vocab_size=vocab_size)
    if config.use_soft_tokens:
        given["noise_seeds"] = torch.randint(_MANY_SEEDS, sizes.shape)
    return ChunkBatch(**given)


def _sizes_behind(batch: Batch, width: int) -> Int[Tensor, "B T"]:
    """Tokens of the chunk behind each token, 0 where there is none."""
    predicted = batch.predicted()
    num_texts, num_tokens = batch.input_ids.shape
    together = torch.arange(1, num_tokens) < batch.lengths[:, None]
    if batch.documents is not None:
        together &= batch.documents[:, 1:] == batch.documents[:, :-1]
    # From the back: how many tokens behind each one are learned without a gap.
    run = torch.zeros(num_texts, num_tokens, dtype=torch.long)
    for place in range(num_tokens - 2, -1, -1):
        run[:, place] = torch.where(predicted[:, place], run[:, place + 1] + 1, 0)
    sizes = torch.zeros_like(run)
    # The first token of a chunk belongs to it, learned or not, as long as it is of the same document.
    sizes[:, :-1] = torch.where(together, run[:, 1:] + 1, 0)
    return sizes.clamp(max=width)


def _anywhere(sizes_at: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Up to `number` different anchors of each text, in order, each as likely as any other."""
    drawn = torch.rand(sizes_at.shape).masked_fill_(sizes_at == 0, -1.0)
    chosen = drawn.topk(min(number, sizes_at.shape[1]), dim=1)
    anchors = torch.where(chosen.values < 0, sizes_at.shape[1], chosen.indices).sort(dim=1).values
    is_there = anchors < sizes_at.shape[1]
    anchors = torch.where(is_there, anchors, 0)
    return anchors, torch.where(is_there, sizes_at.gather(1, anchors), 0)


def _consecutive(sizes_at: Tensor, config: RecursiveConfig) -> tuple[Tensor, Tensor]:
    """Chunks of each text one behind the other, from an anchor that is drawn, until one is cut short."""
    number = config.anchors_per_text
    first, size = _anywhere(sizes_at, 1)
    anchors, sizes = [first], [size]
    for _ in range(number - 1):
        anchor = (anchors[-1] + config.chunk_width).clamp(max=sizes_at.shape[1] - 1)
        goes_on = sizes[-1] == config.chunk_width
        anchors.append(torch.where(goes_on, anchor, 0))
        sizes.append(torch.where(goes_on, sizes_at.gather(1, anchor), 0))
    return torch.cat(anchors, dim=1), torch.cat(sizes, dim=1)


def _corruption(sizes: Tensor, config: RecursiveConfig, progress: Progress, *, vocab_size: int) -> Mapping[str, Any]:
    """Which positions are corrupted in how many passes, and by what; a chunk's first never is."""
    rate = corruption_rate_at(
        progress.fraction,
        start=config.corruption_rate,
        final=config.corruption_rate_final,
        schedule=config.corruption_schedule,
    )
    shape = (*sizes.shape, config.chunk_width)
    corrupted = torch.zeros(shape, dtype=torch.bool)
    for text, number in (sizes > 1).nonzero().tolist():
        size = int(sizes[text, number])
        corrupted[text, number, 1:size] = create_corruption_mask(size - 1, rate, config.corruption_strategy)
    draws = torch.rand(shape)
    share = own_draft_share_at(config, progress)
    random_share = share + (1 - share) * RANDOM_TOKEN_SHARE
    kinds = torch.where(draws < share, OWN_DRAFT, torch.where(draws < random_share, RANDOM, SLOT))
    # So that from pass to pass some come clean, and none is corrupted anew: a pass never says what it has seen before.
    num_passes = torch.randint(1, config.max_inner_steps + 1, shape)
    return {
        "passes_corrupted": torch.where(corrupted, num_passes, 0),
        "corruptions": torch.where(corrupted, kinds, CLEAN),
        "random_ids": torch.randint(0, vocab_size, shape),
    }


def own_draft_share_at(config: RecursiveConfig, progress: Progress) -> float:
    """The share of corrupted positions that get the model's own draft; it rises to all of them in phases b and c."""
    start = config.own_draft_share
    return start + (1 - start) * progress.fraction if config.phase in ("b", "c") else start
