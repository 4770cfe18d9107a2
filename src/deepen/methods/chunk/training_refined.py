"""A training step of refined mode: chunks are drafted and refined as in generation, scored as in evaluation, denoised.

For each chunk, all from the untouched base's prefix up to the anchor:

1. the model drafts it, as it generates, without gradient;
2. K refined passes go over this draft, each applying its edits (`halt`, `length`, `ponder`, `stability` read them);
3. after each of them one pass reads the given chunk from the states that it left, as the scorer does: the last one is
   `final_ce`, the others say, without gradient, whether passes still help (`halt`);
4. K refined passes go over the given chunk with positions corrupted (`masked_ce`).

The given tokens reach no state and no [Z] of 2 and 3, and a pass of 4 is asked only for tokens that were corrupted in
it and in all passes before it. Nothing is asked of a chunk's first token, which the clean prefix decides.

Letters: R chunks, W positions, K passes, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from deepen.backbones.anchored import AnchoredPrefix, Anchors, Asked
from deepen.backbones.hf import Backbone
from deepen.core.seeds import seed_at
from deepen.core.types import LossTerm, Mean, StepOutput, Unit
from deepen.generate.random import gumbel
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.generate.verify import pad_rows
from deepen.methods.chunk import losses
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.passes import RefinedPass, Sidecar, States, run_refined_embeddings
from deepen.methods.chunk.refined import PassCounter, RefinedDecoder, RefinedDecoding
from deepen.methods.chunk.refinement import Chunk
from deepen.methods.chunk.rows import OWN_DRAFT, RANDOM, SLOT, ChunkBatch, Chunks

LEAST_ANCHOR = 0
"""The anchor itself is read with the prefix, so one token will do."""

SOFT_TEMPERATURE = 1.0
"""Of the Gumbel-softmax (Jang et al. 2017) with which `use_soft_tokens` makes the tokens of the next pass."""

UNITS: Mapping[str, Unit] = {
    "final_ce": "token",
    "masked_ce": "masked",
    "halt": "chunk",
    "length": "chunk",
    "ponder": "chunk",
    "stability": "token",
    "pull": "chunk",
}

PULL_WEIGHT = 0.01
"""Of the squared distance of tuned layers from the base's."""

_METRICS = ("chunks/draft_right", "chunks/refined_right", "chunks/p_commit", "chunks/masked_accuracy")
_DRIFT = "chunks/ngram_drift"
_DRIFT_TOKENS = 3


def terms(totals: Mapping[str, Tensor], config: RecursiveConfig) -> dict[str, LossTerm]:
    """The losses of a step from their sums."""
    return {name: LossTerm(totals[name], UNITS[name], weight) for name, weight in weights(config).items()}


def weights(config: RecursiveConfig) -> dict[str, float]:
    """Of the losses of a step."""
    found = {
        "final_ce": config.lambda_final,
        "masked_ce": config.lambda_masked,
        "halt": config.lambda_halt,
        "length": config.lambda_len,
        "ponder": config.lambda_ponder,
        "stability": config.lambda_stability,
    }
    return {**found, "pull": PULL_WEIGHT} if config.phase == "c" else found


def metric_names(config: RecursiveConfig) -> list[str]:
    """Of the figures that a step gives."""
    return [*_METRICS, _DRIFT] if config.phase == "c" else list(_METRICS)


def refined_step(backbone: Backbone, sidecar: Sidecar, config: RecursiveConfig, batch: ChunkBatch) -> StepOutput:
    """Loss sums over a batch that has chunks."""
    step = _Step(backbone, sidecar, config, batch)
    totals: dict[str, Tensor] = {}
    metrics: dict[str, list[Mean]] = {}
    states: States = {}
    texts: Tensor | None = None
    for chunks in columns_of(batch.chunks(), config):
        states = _of_texts(states, texts, chunks.texts)
        found = step.of(chunks, states)
        for name, total in found.totals.items():
            totals[name] = totals[name] + total if name in totals else total
        for name, mean in found.metrics.items():
            metrics.setdefault(name, []).append(mean)
        states, texts = found.states, chunks.texts
    if sidecar.tuned is not None:
        # Once a chunk, as the step divides it by the number of chunks.
        totals["pull"] = batch.num_chunks * sidecar.tuned.distance()
    return StepOutput(losses=terms(totals, config), metrics={name: _sum(means) for name, means in metrics.items()})


def columns_of(chunks: Chunks, config: RecursiveConfig) -> Iterator[Chunks]:
    """All chunks at once, or, where each begins from the states of the one before it, one of each text at a time."""
    if not config.carry_state:
        yield chunks
        return
    for number in sorted(set(chunks.numbers.tolist())):
        yield chunks.of_number(number)


def _of_texts(states: States, before: Tensor | None, now: Tensor) -> States:
    """The states of those texts that go on."""
    if before is None or not states:
        return {}
    rows = [before.tolist().index(text) for text in now.tolist()]
    return {layer: state[rows] for layer, state in states.items()}


def _sum(means: Sequence[Mean]) -> Mean:
    return Mean(sum(mean.total for mean in means), sum(mean.count for mean in means))


@dataclass(frozen=True)
class _Found:
    """Of some chunks: loss sums, figures, and the states that their last refined pass left."""

    totals: dict[str, Tensor]
    metrics: dict[str, Mean]
    states: States


class _Step:
    """The passes of one step."""

    def __init__(self, backbone: Backbone, sidecar: Sidecar, config: RecursiveConfig, batch: ChunkBatch) -> None:
        self._backbone, self._sidecar, self._config, self._batch = backbone, sidecar, config, batch
        self._decoder = RefinedDecoder(backbone, config, sidecar)

    def of(self, chunks: Chunks, states: States) -> _Found:
        """All losses of these chunks, refined from these states."""
        behind = _Behind.walked(self._backbone, self._batch, chunks)
        decoding, drafts = self._drafted(behind)
        own = [tuple(draft.tokens) for draft in drafts]
        passes = self._refined(behind, decoding, drafts, states)
        scores = self._scored(behind, [each.result.states for each in passes])
        masked, num_right = self._denoised(behind, own)
        drift = self._drift(chunks, own)
        return _Found(
            totals={
                "final_ce": scores[-1].sum(),
                "masked_ce": masked,
                **self._decided(behind, passes, scores),
                "stability": self._stability(behind, passes),
            },
            metrics={
                "chunks/draft_right": Mean(_right(own, chunks).sum(), len(chunks)),
                "chunks/refined_right": Mean(_right([each.tokens for each in drafts], chunks).sum(), len(chunks)),
                "chunks/p_commit": Mean(passes[-1].result.p_commit.detach().sum(), len(chunks)),
                "chunks/masked_accuracy": Mean(num_right, self._num_masked(behind.chunks)),
                **({} if drift is None else {_DRIFT: drift}),
            },
            states=passes[-1].result.states,
        )

    def _drift(self, chunks: Chunks, own: Sequence[Sequence[int]]) -> Mean | None:
        """Of the drafts' 3-grams those that the base as it was would not have drafted; None where nothing is tuned."""
        if self._sidecar.tuned is None:
            return None
        with self._sidecar.tuned.set_aside():
            _, before = self._drafted(_Behind.walked(self._backbone, self._batch, chunks))
        num_new = num_all = 0
        for ids, chunk in zip(own, before, strict=True):
            known = set(_ngrams(chunk.tokens))
            num_new += sum(ngram not in known for ngram in _ngrams(ids))
            num_all += len(_ngrams(ids))
        return Mean(num_new, num_all)

    @torch.no_grad()
    def _drafted(self, behind: "_Behind") -> tuple[RefinedDecoding, list[Chunk]]:
        """The model's own drafts, no longer than the given chunks, by the code that generates."""
        chunks = behind.chunks
        ends = chunks.anchors + 1 + chunks.sizes
        cache = self._backbone.new_cache(
            batch_size=len(chunks), capacity=max(int(ends.max()), behind.prefix.num_keys) + self._decoder.scratch
        )
        rows = [
            self._batch.input_ids[text, : anchor + 1].tolist()
            for text, anchor in zip(chunks.texts.tolist(), chunks.anchors.tolist(), strict=True)
        ]
        decoding = RefinedDecoding(
            cache=behind.prefix.committed(cache),
            rows=rows,
            limits=[len(row) + size for row, size in zip(rows, chunks.sizes.tolist(), strict=True)],
            unread=[[] for _ in rows],
            tails=[()] * len(rows),
            next_logits=behind.next_logits,
        )
        return decoding, self._decoder.draft(decoding, _greedy(len(rows)), PassCounter(self._backbone.num_layers))

    def _refined(
        self, behind: "_Behind", decoding: RefinedDecoding, drafts: list[Chunk], states: States
    ) -> list["_Pass"]:
        """K passes over the drafts, which each of them edits."""
        config = self._config
        edge, passes = None, list[_Pass]()
        embeddings, lengths = self._embedded([chunk.tokens for chunk in drafts])
        first_with_gradient = config.max_inner_steps - (config.grad_passes or config.max_inner_steps)
        for number in range(config.max_inner_steps):
            with torch.no_grad() if number < first_with_gradient else nullcontext():
                result = run_refined_embeddings(
                    self._backbone, self._sidecar, behind.run, embeddings, lengths, states, edge
                )
            states, edge = result.states, result.edge
            read = [tuple(chunk.tokens) for chunk in drafts]
            sampler = _greedy(len(drafts))
            with torch.no_grad():
                for row, chunk in enumerate(drafts):
                    self._decoder.take(decoding, sampler, row, chunk, result)
            passes.append(_Pass(result, read, edited=[tuple(chunk.tokens) for chunk in drafts]))
            embeddings = self._embedded_anew(passes[-1], behind.chunks, number=number)
        return passes

    def _embedded(self, rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        ids = pad_rows(rows, self._backbone.device)
        return self._backbone.embedding(ids), torch.tensor([len(row) for row in rows], device=ids.device)

    def _embedded_anew(self, pass_: "_Pass", chunks: Chunks, *, number: int) -> Tensor:
        """The input of the pass after `number`; with soft tokens an edited position is a mixture of what this pass
        thinks of it.
        """
        now, _ = self._embedded(pass_.edited)
        if not self._config.use_soft_tokens:
            return now
        edited = torch.zeros(now.shape[:2], dtype=torch.bool, device=now.device)
        for row, (old, new) in enumerate(zip(pass_.tokens, pass_.edited, strict=True)):
            edited[row, : len(old)] = torch.tensor([one != other for one, other in zip(old, new, strict=True)])
        if not edited.any():
            return now
        deciding = pass_.result.logits[:, : now.shape[1] - 1][edited[:, 1:]]
        noise = self._noise(chunks, edited, deciding.shape[1], number=number)
        shares = ((deciding + noise.to(deciding.dtype)) / SOFT_TEMPERATURE).softmax(dim=-1)
        return now.masked_scatter(edited[..., None], (shares @ self._backbone.embedding_weight).to(now.dtype))

    def _noise(self, chunks: Chunks, edited: Tensor, vocab_size: int, *, number: int) -> Tensor:
        """`[n, V]`, of each edited position its own, whatever is edited beside it."""
        seeds = self._batch.noise_seeds
        assert seeds is not None, "rows for soft tokens are drawn with seeds"
        ids = torch.arange(vocab_size, device=edited.device)
        of_chunks = seeds[chunks.texts, chunks.numbers].tolist()
        return torch.cat(
            [
                gumbel(seed_at(seed, number), places.nonzero(), ids)
                for seed, places in zip(of_chunks, edited, strict=True)
            ]
        )

    def _scored(self, behind: "_Behind", states: Sequence[States]) -> list[Tensor]:
        """`[R]` after each pass: how surprising the given chunks are from its states; gradient through the last."""
        last = self._surprise(behind, states[-1])
        with torch.no_grad():
            return [*(self._surprise(behind, each) for each in states[:-1]), last]

    def _surprise(self, behind: "_Behind", states: States) -> Tensor:
        chunks, device = behind.chunks, self._backbone.device
        sidecar = replace(self._sidecar, latent_token=None)  # nobody sees it
        result = run_refined_embeddings(
            self._backbone,
            sidecar,
            behind.run,
            self._backbone.embedding(chunks.ids.to(device)),
            chunks.sizes.to(device),
            states,
            None,
        )
        return _per_chunk(result.logits[:, :-1], chunks.ids[:, 1:], chunks.targets[:, 1:])

    def _decided(self, behind: "_Behind", passes: Sequence["_Pass"], scores: Sequence[Tensor]) -> dict[str, Tensor]:
        """The losses of the boundary head, which are means over passes."""
        config, chunks = self._config, behind.chunks
        commit_logit = torch.stack([each.result.commit_logit for each in passes], dim=1)
        sizes = (chunks.sizes - 1).to(scores[0].device)
        labels = losses.should_halt([score.detach() / sizes for score in scores], config.halt_margin)
        lengths = sum(
            losses.length_loss(each.result.length, _right(each.edited, chunks).to(commit_logit.device))
            for each in passes
        )
        every = torch.ones_like(labels)
        return {
            "halt": losses.binary_cross_entropy(commit_logit, labels, every) / len(passes),
            "length": torch.as_tensor(lengths) / len(passes),
            "ponder": losses.expected_passes(commit_logit.sigmoid()).sum(),
        }

    def _stability(self, behind: "_Behind", passes: Sequence["_Pass"]) -> Tensor:
        """Between successive passes, where both read what is right so far: there nothing should change."""
        total = passes[0].result.logits.new_zeros(())
        for before, now in pairwise(passes):
            right = _is_right(before.tokens, behind.chunks) & _is_right(now.tokens, behind.chunks)
            counted = (right[:, :-1] & behind.chunks.targets[:, 1:].cpu()).to(total.device)
            total = total + losses.divergence_between(before.logits(counted), now.logits(counted), counted)
        return total / max(1, len(passes) - 1)

    def _denoised(self, behind: "_Behind", own: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Cross entropy of corrupted tokens over K passes, and how many were right."""
        chunks, config, device = behind.chunks, self._config, self._backbone.device
        times, kinds, random_ids = self._corruption(chunks)
        drafted = _padded_ids(own, chunks).to(chunks.ids.device)
        sidecar = self._sidecar
        states: States = {}
        edge = None
        total = torch.zeros((), device=device)
        num_right = torch.zeros((), dtype=torch.long, device=device)
        for number in range(config.max_inner_steps if config.lambda_masked else 0):
            corrupted = times > number
            ids = torch.where(corrupted & (kinds == RANDOM), random_ids, chunks.ids)
            ids = torch.where(corrupted & (kinds == OWN_DRAFT), drafted, ids).to(device)
            slots = (corrupted & (kinds == SLOT)).to(device)
            embeddings = sidecar.mask_token(self._backbone.embedding(ids), slots)
            result = run_refined_embeddings(
                self._backbone, sidecar, behind.run, embeddings, chunks.sizes.to(device), states, edge
            )
            states, edge = result.states, result.edge
            logits, gold = result.logits[:, : chunks.width - 1], chunks.ids[:, 1:].to(device)
            counted = corrupted[:, 1:].to(device)
            total = total + losses.cross_entropy(logits, gold, counted)
            num_right += (logits.argmax(dim=-1) == gold)[counted].sum()
        return total, num_right

    def _num_masked(self, chunks: Chunks) -> int:
        return int(self._corruption(chunks)[0].sum())

    def _corruption(self, chunks: Chunks) -> tuple[Tensor, Tensor, Tensor]:
        """Of these chunks, `[R, W]` each: in how many passes each position is corrupted, by what, random ids."""
        batch = self._batch
        assert batch.passes_corrupted is not None and batch.corruptions is not None and batch.random_ids is not None
        of_batch = batch.passes_corrupted, batch.corruptions, batch.random_ids
        times, kinds, random_ids = (each[chunks.texts, chunks.numbers, : chunks.width] for each in of_batch)
        return times, kinds, random_ids


@dataclass(frozen=True)
class _Behind:
    """Chunks with the prefix they stand behind, and the logits `[R, V]` that decide their first tokens."""

    chunks: Chunks
    prefix: AnchoredPrefix
    next_logits: Tensor
    backbone: Backbone

    @classmethod
    def walked(cls, backbone: Backbone, batch: ChunkBatch, chunks: Chunks) -> "_Behind":
        """The texts read once, up to their last anchors."""
        texts, anchors = chunks.texts.cpu(), chunks.anchors.cpu()
        last = int(anchors.max()) + 1
        walk = backbone.walk(
            batch.input_ids[:, :last].to(backbone.device),
            batch.lengths.clamp(max=last).tolist(),
            Anchors(texts, anchors + 1),
            asked=Asked(texts, anchors),
        )
        return cls(chunks, walk.prefix, walk.logits, backbone)

    def run(self, tokens: Tensor, **options: object) -> Tensor:
        """One pass behind the prefix."""
        return self.backbone.run_behind(self.prefix, tokens, **options)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Pass:
    """What a refined pass said, the tokens that it read, and what its edits made of them."""

    result: RefinedPass
    tokens: list[tuple[int, ...]]
    edited: list[tuple[int, ...]]

    def logits(self, counted: Tensor) -> Tensor:
        """`[R, W - 1, V]`, as wide as the given chunks' targets."""
        return F.pad(self.result.logits, (0, 0, 0, max(0, counted.shape[1] - self.result.logits.shape[1])))[
            :, : counted.shape[1]
        ]


def _ngrams(ids: Sequence[int]) -> list[tuple[int, ...]]:
    return [tuple(ids[start : start + _DRIFT_TOKENS]) for start in range(len(ids) - _DRIFT_TOKENS + 1)]


def _greedy(num_rows: int) -> BatchSampler:
    return BatchSampler([SamplingConfig()] * num_rows)


def _per_chunk(logits: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
    """`[R]`: summed cross entropy of the counted tokens of each chunk."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    each = F.cross_entropy(wide.transpose(1, 2), ids.to(logits.device), reduction="none")
    return torch.where(counted.to(logits.device), each, torch.zeros_like(each)).sum(dim=1)


def _padded_ids(rows: Sequence[Sequence[int]], chunks: Chunks) -> Tensor:
    """`[R, W]`: a draft that ended early is filled up with the given tokens' places unsaid, by its last token."""
    return torch.tensor([[*row, *[row[-1]] * (chunks.width - len(row))][: chunks.width] for row in rows])


def _is_right(rows: Sequence[Sequence[int]], chunks: Chunks) -> Tensor:
    """`[R, W]`: which tokens are the given ones together with all before them."""
    filled = torch.full((len(rows), chunks.width), -1)
    for row, tokens in enumerate(rows):
        filled[row, : len(tokens)] = torch.tensor(tokens)
    return losses.right_prefix(filled, chunks.ids.cpu(), chunks.sizes.cpu())


def _right(rows: Sequence[Sequence[int]], chunks: Chunks) -> Tensor:
    """`[R]`: the length of each row's right beginning."""
    return _is_right(rows, chunks).sum(dim=1)
