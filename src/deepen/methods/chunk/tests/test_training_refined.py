"""What refined training gives its passes to read and sums over what they say, place by place, beside plain loops."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepen.backbones import tiny
from deepen.core.types import Progress, StepOutput
from deepen.data.batches import batch_of
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.stop import StopConfig
from deepen.methods.chunk import training_refined
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.model import ChunkRefineWrapper
from deepen.methods.chunk.passes import RefinedPass, Sidecar, run_refined_embeddings
from deepen.methods.chunk.rows import CLEAN, OWN_DRAFT, RANDOM, SLOT, ChunkBatch
from deepen.train.optim import freeze_base

BASES = ("llama", "kimi_linear")
WIDTH, NUM_PASSES, NUM_CHUNKS = 6, 3, 3
BEGIN = Progress(0, 10)


def wrapper(name: str = "llama", **fields: Any) -> ChunkRefineWrapper:
    """On a base of its own; all of the sidecar is noise, the same for each, so that passes differ."""
    settings = {
        "recursive_enabled": True, "commit_mode": "refined", "phase": "a", "anchors_per_text": NUM_CHUNKS,
        "chunk_width": WIDTH, "max_chunk_len": 8, "d_state": 16, "gate_hidden": 32, "max_inner_steps": NUM_PASSES,
    }  # fmt: skip
    base = tiny.build(name)
    model = ChunkRefineWrapper(base, RecursiveConfig(**{**settings, **fields}))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.saved_state().values():
            tensor.copy_(torch.randn(tensor.shape, generator=source) * 0.3)
    freeze_base(model, base)
    return model


def texts(*lengths: int) -> list[list[int]]:
    source = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (length,), generator=source).tolist() for length in lengths]


def continued(model: ChunkRefineWrapper, row: Sequence[int], num_new: int) -> list[int]:
    """What the base says behind `row`, which has no end."""
    (result,) = complete(PlainDecoder(model.backbone), [list(row)], stop=StopConfig(max_new_tokens=num_new))
    assert len(result.tokens) == num_new and not {*model.backbone.eos_ids} & {*result.tokens}
    return result.tokens


def half_right(model: ChunkRefineWrapper, row: list[int], length: int) -> list[int]:
    """A text of which the base foresees a few tokens at a time: its own words, of which every fifth is another."""
    row = list(row)
    while len(row) < length:
        row += continued(model, row, 5)
        row[-1] = (row[-1] + 1) % 256
    return row[:length]


def at_grid(model: ChunkRefineWrapper, rows: list[list[int]]) -> ChunkBatch:
    """Texts of `NUM_CHUNKS` whole chunks, cut as the scorer cuts them: behind the first token, one after the other."""
    assert {len(row) for row in rows} == {1 + NUM_CHUNKS * WIDTH}
    anchors = torch.arange(0, NUM_CHUNKS * WIDTH, WIDTH).expand(len(rows), -1)
    return replace(prepared(model, rows), anchors=anchors, sizes=torch.full_like(anchors, WIDTH))


def prepared(model: ChunkRefineWrapper, rows: list[list[int]]) -> ChunkBatch:
    torch.manual_seed(0)
    batch = model.prepare(batch_of(rows), BEGIN)
    assert isinstance(batch, ChunkBatch)
    return batch


@dataclass(frozen=True)
class Chunk:
    """A chunk of a batch, with the tokens in front of it."""

    text: int
    number: int
    prefix: list[int]
    gold: list[int]


def chunks_of(batch: ChunkBatch) -> list[Chunk]:
    """In the order of their rows."""
    rows = batch.unpadded()
    return [
        Chunk(text, number, rows[text][: anchor + 1], rows[text][anchor + 1 : anchor + 1 + size])
        for text in range(len(rows))
        for number, (anchor, size) in enumerate(
            zip(batch.anchors[text].tolist(), batch.sizes[text].tolist(), strict=True)
        )
        if size
    ]


class Passes:
    """A training step, with what its refined passes read and say; the first one says `first_logits` where given."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        model: ChunkRefineWrapper,
        batch: ChunkBatch,
        first_logits: Tensor | None = None,
    ) -> None:
        self._found: list[tuple[Tensor, RefinedPass, bool]] = []

        def run(backbone: Any, sidecar: Sidecar, behind: Any, embeddings: Tensor, *rest: Any) -> RefinedPass:
            result = run_refined_embeddings(backbone, sidecar, behind, embeddings, *rest)
            if first_logits is not None and not self._found:
                result = replace(result, logits=first_logits)
            # A pass that scores has no [Z].
            self._found.append((embeddings, result, sidecar.latent_token is None))
            return result

        with monkeypatch.context() as patch:
            patch.setattr(training_refined, "run_refined_embeddings", run)
            torch.manual_seed(0)
            self.output: StepOutput = model.train_step(batch, model.begin(batch), BEGIN)

    def total(self, name: str) -> Tensor:
        return self.output.losses[name].total.detach().double()

    @property
    def refining(self) -> list[tuple[Tensor, RefinedPass]]:
        """The passes over the model's own drafts."""
        return self._without_scores[:NUM_PASSES]

    @property
    def denoising(self) -> list[tuple[Tensor, RefinedPass]]:
        """The passes over what is corrupted."""
        assert len(self._without_scores) == 2 * NUM_PASSES
        return self._without_scores[NUM_PASSES:]

    @property
    def _without_scores(self) -> list[tuple[Tensor, RefinedPass]]:
        return [(read, said) for read, said, scores in self._found if not scores]


def log_probs(result: RefinedPass, row: int, place: int) -> Tensor:
    """What a pass says of the token at `place` of a chunk: the logits stand one to the left."""
    return result.logits[row, place - 1].detach().double().log_softmax(dim=-1)


class TestDenoising:
    @pytest.mark.parametrize("name", BASES)
    def test_corrupted_places_read_what_was_drawn_for_them(self, name, monkeypatch):
        """Slot, random token or own draft, in as many passes as are drawn: all else is as given, and not asked for."""
        model = wrapper(name)
        batch, kinds, times, random_ids = self.corrupted(prepared(model, texts(21, 15)))
        passes = Passes(monkeypatch, model, batch)
        expected, met = torch.zeros((), dtype=torch.float64), set[tuple[int, int]]()
        for row, chunk in enumerate(chunks_of(batch)):
            own, at = continued(model, chunk.prefix, len(chunk.gold)), (chunk.text, chunk.number)
            for number, (read, said) in enumerate(passes.denoising):
                for place, gold in enumerate(chunk.gold):
                    corruption = int(kinds[(*at, place)]) if number < times[(*at, place)] else CLEAN
                    token = {CLEAN: gold, RANDOM: int(random_ids[(*at, place)]), OWN_DRAFT: own[place], SLOT: None}
                    assert torch.equal(read[row, place], self.embedding(model, token[corruption])), (at, number, place)
                    if corruption != CLEAN:
                        assert token[corruption] != gold, "this would not tell what is given from what was drawn"
                        expected -= log_probs(said, row, place)[gold]
                        met.add((corruption, number))
        assert met == {(kind, number) for kind in (SLOT, RANDOM, OWN_DRAFT) for number in range(NUM_PASSES)}
        torch.testing.assert_close(passes.total("masked_ce"), expected, rtol=1e-5, atol=1e-5)

    @staticmethod
    def corrupted(batch: ChunkBatch) -> tuple[ChunkBatch, Tensor, Tensor, Tensor]:
        """All kinds in all numbers of passes, side by side; a chunk's first token is never corrupted."""
        assert batch.random_ids is not None
        shape = batch.random_ids.shape
        real = torch.arange(WIDTH) < batch.sizes[..., None]
        real[..., 0] = False
        drawn = torch.arange(batch.random_ids.numel()).view(shape)
        kinds = torch.where(real, torch.tensor([SLOT, RANDOM, OWN_DRAFT, CLEAN])[drawn % 4], CLEAN)
        times = torch.where(kinds == CLEAN, 0, drawn // 4 % NUM_PASSES + 1)
        return replace(batch, corruptions=kinds, passes_corrupted=times), kinds, times, batch.random_ids

    @staticmethod
    def embedding(model: ChunkRefineWrapper, token: int | None) -> Tensor:
        """Of a token, or of a slot."""
        with torch.no_grad():
            return model.mask_token.embedding if token is None else model.backbone.embedding(torch.tensor(token))


class TestSoftTokens:
    def test_an_edited_token_is_mixed_from_the_logits_that_decide_it(self, monkeypatch):
        """Each place has two likely tokens of its own, so that what it reads next can be no other's.

        The first pass says so of all places but the draft's second, where it confirms what stands there.
        """
        model = wrapper(use_soft_tokens=True, corruption_rate=1.0)
        batch = prepared(model, texts(21, 15))
        chunks = chunks_of(batch)
        drafts = [continued(model, chunk.prefix, len(chunk.gold)) for chunk in chunks]
        assert len({len(draft) for draft in drafts}) > 1, "rows of one length would not show all"
        first, second, logits = self.two_likely(model, drafts)

        passes = Passes(monkeypatch, model, batch, first_logits=logits)
        (_, _), (read, _), (_, _) = passes.refining
        table = model.backbone.embedding_weight.detach()
        shares = []
        for row, draft in enumerate(drafts):
            for place, token in enumerate(draft):
                vector = read[row, place]
                if place < 2:
                    assert torch.equal(vector, table[token])
                    continue
                one, other = table[first[row][place]], table[second[row][place]]
                share = torch.dot(vector.detach() - other, one - other) / (one - other).square().sum()
                torch.testing.assert_close(vector.detach(), share * one + (1 - share) * other, rtol=0, atol=1e-4)
                shares.append(float(share))
                (gradient,) = torch.autograd.grad(vector.sin().sum(), logits, retain_graph=True)
                assert gradient[row, place - 1].any()
                gradient[row, place - 1] = 0
                assert not gradient.any()
        # A mixture, and another one at each place, since noise decides how much of which.
        assert len(shares) > 10 and len(set(shares)) == len(shares)
        assert all(0 < share < 1 for share in shares)

    @staticmethod
    def two_likely(
        model: ChunkRefineWrapper, drafts: list[list[int]]
    ) -> tuple[list[list[int]], list[list[int]], Tensor]:
        """The two tokens for each place, none of which is the draft's, and logits `[R, W + 1, V]` that say so."""
        width = max(map(len, drafts))
        logits = torch.zeros(len(drafts), width + 1, model.backbone.vocab_size)  # [Z] stands behind the longest
        spare = iter(range(256))
        first, second = ([[0] * width for _ in drafts] for _ in range(2))
        for row, draft in enumerate(drafts):
            for place in range(1, width):
                pair = [next(token for token in spare if token not in draft) for _ in range(2)]
                first[row][place], second[row][place] = pair
                logits[row, place - 1, pair] = torch.tensor([60.5, 60.0])
            logits[row, 0] = 60.0 * F.one_hot(torch.tensor(draft[1]), logits.shape[-1])
        return first, second, logits.requires_grad_()


class TestStability:
    @pytest.mark.parametrize("name", BASES)
    def test_is_between_passes_that_both_read_what_is_right_so_far(self, name, monkeypatch):
        """A place counts if all in front of it is right in this pass and in the one before; over K - 1 pairs."""
        model = wrapper(name)
        rows = [half_right(model, row, length) for row, length in zip(texts(3, 2, 4), (24, 19, 15), strict=True)]
        counts = self.assert_by_hand(model, prepared(model, rows), monkeypatch)
        # None of a chunk, a part of it, and what was right until an edit: all of it is met.
        both = [count for count, _, _ in counts]
        assert 0 in both and {1, 2, 3} & {*both} and sum(only_before for _, only_before, _ in counts) > 3

    def test_what_an_edit_has_just_made_right_does_not_count(self, monkeypatch):
        """The given chunk is what the first pass makes of the draft, so that the second is the first to read it."""
        model = wrapper(anchors_per_text=1, corruption_rate=1.0)
        (row,) = texts(9 + WIDTH)

        def behind(prefix: list[int], gold: list[int]) -> ChunkBatch:
            anchor, size = torch.tensor([[len(prefix) - 1]]), torch.tensor([[len(gold)]])
            return replace(prepared(model, [[*prefix, *gold]]), anchors=anchor, sizes=size)

        (_, _), (read, _), (_, _) = Passes(monkeypatch, model, behind(row[:9], row[9:])).refining
        table = model.backbone.embedding_weight
        edited = [int((table == vector).all(dim=-1).nonzero()) for vector in read[0, :WIDTH]]
        (_, _, only_now), _ = self.assert_by_hand(model, behind(row[:9], edited), monkeypatch)
        assert only_now > 1

    @staticmethod
    def assert_by_hand(
        model: ChunkRefineWrapper, batch: ChunkBatch, monkeypatch: pytest.MonkeyPatch
    ) -> list[tuple[int, int, int]]:
        """For each chunk and pair of passes: at how many places all is right so far in both, or in one alone."""
        passes = Passes(monkeypatch, model, batch)
        expected, counts = torch.zeros((), dtype=torch.float64), []
        for row, chunk in enumerate(chunks_of(batch)):
            with torch.no_grad():
                gold = model.backbone.embedding(torch.tensor(chunk.gold))
            for (read, said), (read_next, said_next) in zip(passes.refining[:-1], passes.refining[1:], strict=True):
                both = only_before = only_now = 0
                for place in range(1, len(chunk.gold)):
                    was_right, is_right = (torch.equal(each[row, :place], gold[:place]) for each in (read, read_next))
                    both += was_right and is_right
                    only_before += was_right and not is_right
                    only_now += is_right and not was_right
                    if was_right and is_right:
                        before, now = log_probs(said, row, place), log_probs(said_next, row, place)
                        expected += (before.exp() * (before - now)).sum()
                counts.append((both, only_before, only_now))
        torch.testing.assert_close(passes.total("stability"), expected / (NUM_PASSES - 1), rtol=1e-4, atol=1e-5)
        return counts


class TestHalting:
    @pytest.mark.parametrize("margin", [0.0, 0.025])
    @pytest.mark.parametrize("name", BASES)
    def test_is_right_where_one_more_pass_would_not_help(self, name, margin, monkeypatch):
        """How well the chunks are known after one, two and three passes, the scorer says, who makes no more of them."""
        settings = {"commit_threshold": 1.0, "halt_margin": margin}  # never sure: all passes are made
        model = wrapper(name, **settings)
        rows = texts(1 + NUM_CHUNKS * WIDTH, 1 + NUM_CHUNKS * WIDTH)
        passes = Passes(monkeypatch, model, at_grid(model, rows))
        after = [
            self.mean_surprise(wrapper(name, **settings, max_inner_steps=num_passes), rows)
            for num_passes in range(1, NUM_PASSES + 1)
        ]
        halt = ponder = torch.zeros((), dtype=torch.float64)
        labels = []
        for row in range(len(rows) * NUM_CHUNKS):
            still_going = torch.ones((), dtype=torch.float64)
            for number, (_, said) in enumerate(passes.refining):
                is_last = number == NUM_PASSES - 1
                label = is_last or bool(after[number][row] - after[number + 1][row] <= margin)
                p_commit = said.p_commit[row].detach().double()
                halt = halt - (p_commit if label else 1 - p_commit).log()
                ponder, still_going = ponder + still_going, still_going * (1 - p_commit)
                labels += [] if is_last else [label]
        assert set(labels) == {False, True}
        torch.testing.assert_close(passes.total("halt"), halt / NUM_PASSES, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(passes.total("ponder"), ponder, rtol=1e-4, atol=1e-5)

    @staticmethod
    def mean_surprise(model: ChunkRefineWrapper, rows: list[list[int]]) -> list[float]:
        """Of each chunk's tokens but the first."""
        scored = model.score(batch_of(rows)).log_probs.double()
        return [
            float(-scored[text, first + 1 : first + WIDTH].mean())
            for text in range(len(rows))
            for first in range(1, len(rows[text]), WIDTH)
        ]
