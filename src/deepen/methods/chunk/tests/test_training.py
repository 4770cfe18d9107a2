"""Training of the sidecar: what its passes are, what reaches what, what learns, and that it learns."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deepen.backbones import tiny
from deepen.backbones.hf import LayerOutputs
from deepen.check.counted import passes_of
from deepen.core.errors import CannotTrain, CheckpointError, DeepenError
from deepen.core.types import Batch, Progress, Prompt, StepOutput
from deepen.data.batches import batch_of
from deepen.generate.drafts import NO_DRAFT, Draft
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.generate.stop import StopConfig
from deepen.methods.chunk import decoding as chunk_decoding
from deepen.methods.chunk import training_exact, training_refined
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.model import ChunkRefineWrapper
from deepen.methods.chunk.passes import RefinedPass, run_refined_embeddings
from deepen.methods.chunk.refined import RefinedDecoder
from deepen.methods.chunk.rows import OWN_DRAFT, RANDOM, SLOT, ChunkBatch
from deepen.train.module import StepModule
from deepen.train.optim import freeze_base, make_optimizers
from deepen.train.step import Steps

WIDTH, NUM_PASSES = 6, 3
SIZES = {"chunk_width": WIDTH, "max_chunk_len": 8, "d_state": 16, "gate_hidden": 32, "max_inner_steps": NUM_PASSES}
BEGIN = Progress(0, 10)


def wrapper(name: str = "llama", *, noise: float = 0.3, double: bool = False, **fields: Any) -> ChunkRefineWrapper:
    """On a base of its own; all of the sidecar is noise, so that it does something."""
    torch.manual_seed(0)
    base = tiny.build(name).eval()
    settings = {"recursive_enabled": True, "phase": "a", "anchors_per_text": 3, **SIZES, **fields}
    model = ChunkRefineWrapper(base.double() if double else base, RecursiveConfig(**settings))
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.saved_state().values():
            if noise and tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=source) * noise)
    if model.optim_groups():
        freeze_base(model, base)
    return model


def texts(*lengths: int, seed: int = 0) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=source).tolist() for length in lengths]


def prepared(model: ChunkRefineWrapper, rows: list[list[int]], seed: int = 0) -> ChunkBatch:
    torch.manual_seed(seed)
    batch = model.prepare(batch_of(rows), BEGIN)
    assert isinstance(batch, ChunkBatch)
    return batch


def stepped(model: ChunkRefineWrapper, batch: Batch) -> StepOutput:
    torch.manual_seed(0)
    return model.train_step(batch, model.begin(batch), BEGIN)


def at_grid(model: ChunkRefineWrapper, row: list[int]) -> ChunkBatch:
    """One text, cut as the scorer cuts it: chunks behind its first token, one behind the other."""
    firsts = range(1, len(row), WIDTH)
    sizes = [min(WIDTH, len(row) - first) for first in firsts]
    batch = prepared(model, [row])
    fields = {name: value for name, value in vars(batch).items() if name not in ("anchors", "sizes")}
    for name in ("passes_corrupted", "corruptions", "random_ids"):
        fields[name] = torch.zeros(1, len(sizes), WIDTH, dtype=torch.long)
    return ChunkBatch(**fields, anchors=torch.tensor([[first - 1 for first in firsts]]), sizes=torch.tensor([sizes]))


class Recorder:
    """Keeps what `training_refined` runs refined passes over, and what they say; what they read gets a gradient."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[tuple[Tensor, RefinedPass, bool]] = []

        def recording(backbone: Any, sidecar: Any, run: Any, embeddings: Tensor, *rest: Any) -> RefinedPass:
            if not embeddings.requires_grad:
                embeddings.requires_grad_(torch.is_grad_enabled())
            result = run_refined_embeddings(backbone, sidecar, run, embeddings, *rest)
            self.passes.append((embeddings, result, sidecar.latent_token is None))
            return result

        monkeypatch.setattr(training_refined, "run_refined_embeddings", recording)

    @property
    def refining(self) -> list[tuple[Tensor, RefinedPass]]:
        """The passes over the model's own draft."""
        return [(read, said) for read, said, scores in self.passes if not scores][:NUM_PASSES]

    @property
    def denoising(self) -> list[tuple[Tensor, RefinedPass]]:
        """The passes over what is corrupted."""
        return [(read, said) for read, said, scores in self.passes if not scores][NUM_PASSES:]

    @property
    def scoring(self) -> tuple[Tensor, RefinedPass]:
        """The pass of `final_ce`."""
        ((read, said),) = [(read, said) for read, said, scores in self.passes if scores and read.requires_grad]
        return read, said


class TestWhatTheStepsCompute:
    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_slots_say_what_they_say_in_decoding(self, name):
        """The divergence of a chunk is that of the logits of a draft pass behind the same committed tokens."""
        model = wrapper(name, commit_mode="exact", draft="mask", distill_gamma=3.0)
        (row,) = texts(23)
        batch = prepared(model, [row])
        expected = torch.zeros((), dtype=torch.float64)
        for anchor, size in zip(batch.anchors[0].tolist(), batch.sizes[0].tolist(), strict=True):
            slots, base = self.logits_in_decoding(model, row[: anchor + 1], size - 1), self.base(model, row)
            for k in range(1, size):
                p, q = base[anchor + k].double().log_softmax(-1), slots[k - 1].double().log_softmax(-1)
                expected += torch.exp(torch.tensor(-(k - 1) / 3.0)) * (p.exp() * (p - q)).sum()
        found = stepped(model, batch).losses["distill"].total
        torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-4)

    @staticmethod
    def logits_in_decoding(model: ChunkRefineWrapper, row: list[int], num_slots: int) -> Tensor:
        backbone = model.backbone
        cache = backbone.new_cache(batch_size=1, capacity=len(row) + num_slots)
        with torch.no_grad():
            backbone.run(torch.tensor([row[:-1]]), cache)
            cache.commit([len(row) - 1])
            sidecar = model._parts(model.config)

            def run(tokens: Tensor, **options: Any) -> Tensor:
                return backbone.run(tokens, cache, **options)

            rows = [[row[-1], *[0] * num_slots]]
            return training_exact.run_slots(backbone, sidecar, run, rows, [num_slots]).logits[0, 1:]

    @staticmethod
    def base(model: ChunkRefineWrapper, row: list[int]) -> Tensor:
        cache = model.backbone.new_cache(batch_size=1, capacity=len(row))
        with torch.no_grad():
            return model.backbone.run(torch.tensor([row]), cache)[0]

    @pytest.mark.parametrize("carry_state", [False, True])
    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_final_ce_is_what_the_scorer_finds(self, name, carry_state):
        """On the scorer's own grid, but for each chunk's first token, which the clean prefix decides."""
        model = wrapper(name, commit_mode="refined", commit_threshold=1.0, carry_state=carry_state)
        with torch.no_grad():
            model.boundary.commit.weight.zero_()
            model.boundary.commit.bias.fill_(-50.0)  # so that the scorer's refinement takes all its passes
        (row,) = texts(1 + 3 * WIDTH)
        score = model.score(batch_of([row]))
        scored = [place for place in range(2, len(row)) if (place - 1) % WIDTH]
        expected = -score.log_probs[0, scored].sum()
        found = stepped(model, at_grid(model, row)).losses["final_ce"].total
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

    def test_untrained_the_states_change_nothing(self):
        """A new sidecar scores as the base: the cross entropy is the base's own."""
        model = wrapper(commit_mode="refined", noise=0.0)
        (row,) = texts(20)
        batch = prepared(model, [row])
        base = TestWhatTheStepsCompute.base(model, row).log_softmax(-1)
        expected = sum(
            -base[place - 1, row[place]]
            for anchor, size in zip(batch.anchors[0].tolist(), batch.sizes[0].tolist(), strict=True)
            for place in range(anchor + 2, anchor + 1 + size)
        )
        torch.testing.assert_close(stepped(model, batch).losses["final_ce"].total, expected)


class TestWhatTheBoundaryHeadLearns:
    def test_a_slot_is_accepted_if_all_before_it_agree_too(self):
        targets = torch.tensor([[True, True, True], [True, True, False]])
        theirs = torch.eye(5)[[0, 1, 2, 3, 4]]
        ours = torch.eye(5)[[0, 4, 2, 3, 4]]  # the second of the first draft is wrong
        judged = training_exact._judged(ours, theirs, ours.argmax(dim=-1) == theirs.argmax(dim=-1), targets)
        assert judged.agrees.tolist() == [[True, False, True], [True, True, False]]
        assert judged.accepted.tolist() == [[True, False, False], [True, True, False]]
        found = {name: (float(mean.total), float(mean.count)) for name, mean in judged.metrics(6).items()}
        assert found == {
            "drafts/accepted": (3, 2), "drafts/agreement_1": (2, 2), "drafts/agreement_2": (1, 2),
            "drafts/agreement_4": (0, 0),
        }  # fmt: skip

    def test_the_length_is_that_of_what_a_pass_made_of_its_draft(self, monkeypatch):
        """Where the given chunk is what the first pass edits its draft to, that pass should name the whole of it."""
        model = wrapper(commit_mode="refined", corruption_rate=1.0)
        (row,) = texts(1 + WIDTH)
        edited, labels = self.edits_and_labels(model, row, monkeypatch)
        assert edited[0] != self.drafted(model, row)
        again, labels = self.edits_and_labels(model, [row[0], *edited[0]], monkeypatch)
        assert again == edited and labels[0] == WIDTH

    @staticmethod
    def drafted(model: ChunkRefineWrapper, row: list[int]) -> list[int]:
        plain = complete(PlainDecoder(model.backbone), [row[:1]], stop=StopConfig(max_new_tokens=WIDTH))
        return plain[0].tokens

    @staticmethod
    def edits_and_labels(
        model: ChunkRefineWrapper, row: list[int], monkeypatch: pytest.MonkeyPatch
    ) -> tuple[list[list[int]], list[int]]:
        """What each pass made of the only chunk, and the length that its head was to name."""
        edited: list[list[int]] = []
        labels: list[int] = []

        def take(decoder: RefinedDecoder, decoding: Any, sampler: Any, index: int, chunk: Any, result: Any) -> None:
            TAKE(decoder, decoding, sampler, index, chunk, result)
            edited.append(list(chunk.tokens))

        def length_loss(log_probs: Tensor, lengths: Tensor) -> Tensor:
            labels.extend(lengths.tolist())
            return LENGTH_LOSS(log_probs, lengths)

        monkeypatch.setattr(RefinedDecoder, "take", take)
        monkeypatch.setattr(training_refined.losses, "length_loss", length_loss)
        stepped(model, at_grid(model, row))
        return edited, labels


JUDGE = chunk_decoding.judge
TAKE, LENGTH_LOSS = RefinedDecoder.take, training_refined.losses.length_loss
SHALLOW: dict[str, Any] = {"draft": "shallow", "drafter_hidden": 24, "draft_vocab": 200, "chunk_width": WIDTH}


class TestShallowDrafter:
    """What `draft: "shallow"` trains and drafts from."""

    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_its_divergence_is_that_of_the_equations(self, name):
        """Step by step in float64, from the outputs of the layers at each anchor; over the tokens that it can draft."""
        model = wrapper(name, distill_gamma=3.0, **SHALLOW)
        (row,) = texts(23)
        batch, drafter, base = prepared(model, [row]), model.drafter.double(), model.backbone
        tops: dict[int, Tensor] = {}
        cache = base.new_cache(batch_size=1, capacity=len(row))
        with torch.no_grad():
            logits = base.run(torch.tensor([row]), cache, edit=tops.setdefault)[0].double()

        def normed(x: Tensor) -> Tensor:
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

        expected = torch.zeros((), dtype=torch.float64)
        for anchor, size in zip(batch.anchors[0].tolist(), batch.sizes[0].tolist(), strict=True):
            read = [normed(tops[layer][0, anchor].double()) for layer in drafter.read_layers]
            state = read[-1] + drafter.fuse.weight @ torch.cat(read)
            for k in range(1, size):
                token = base.embedding_weight[row[anchor + k]].double() * embedding_scale(base, row[anchor + k])
                inner = drafter.inp.weight @ torch.cat([normed(state), normed(token)])
                state = state + drafter.out.weight @ (inner * inner.sigmoid())
                ours = base.head.weight[:200].double() @ (drafter.scale * normed(state))
                q, p = ours.log_softmax(-1), logits[anchor + k, :200].log_softmax(-1)
                expected += torch.exp(torch.tensor(-(k - 1) / 3.0)) * (p.exp() * (p - q)).sum()
        model.drafter.float()
        found = stepped(model, batch).losses["distill"].total
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("layers", [None, (1,)], ids=["default", "not-the-last"])
    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_it_learns_the_same_from_what_was_kept(self, name, layers, monkeypatch, tmp_path):
        """Texts of one batch read together, read by themselves, and read from the disk."""
        monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path))
        settings = {**SHALLOW, "drafter_layers": layers}
        rows = texts(21, 15)
        anew = wrapper(name, noise=0.1, **settings)
        batch = prepared(anew, rows)
        expected = stepped(anew, batch)
        found, read = [], []
        for _ in range(2):
            model = wrapper(name, noise=0.1, **settings, keep_outputs=True)
            with passes_of(model.backbone) as passes:
                found.append(stepped(model, batch))
            read.append(len(list(passes)))
        assert read == [2, 0]
        totals = [output.losses["distill"].total for output in found]
        assert torch.equal(*totals)
        torch.testing.assert_close(totals[0], expected.losses["distill"].total, rtol=1e-5, atol=1e-5)
        assert found[0].metrics == found[1].metrics == expected.metrics

    def test_another_base_reads_its_own(self, monkeypatch, tmp_path):
        monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path))
        (row,) = texts(15)
        one, other = (wrapper(**SHALLOW, keep_outputs=True) for _ in range(2))
        with torch.no_grad():
            other.backbone.embedding_weight.mul_(1.5)
        tops = [model.drafter.kept_outputs.of(row).tops for model in (one, other)]
        assert not torch.equal(*tops)
        assert len(list(tmp_path.glob("outputs/*/*.safetensors"))) == 2

    def test_what_is_kept_is_not_rounded_by_the_precision_of_a_step(self, monkeypatch, tmp_path):
        monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path))
        (row,) = texts(15)
        kept = wrapper(**SHALLOW, keep_outputs=True).drafter.kept_outputs
        with torch.autocast("cpu", torch.bfloat16):
            rounded = kept.of(row)
        monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path / "other"))
        plain = wrapper(**SHALLOW, keep_outputs=True).drafter.kept_outputs.of(row)
        assert torch.equal(rounded.tops, plain.tops)

    def test_an_adapter_that_was_trained_so_drafts_otherwise(self):
        """`keep_outputs` is of training and stands in no other setting's way."""
        for draft in ("auto", "mask", "lookup", "shallow"):
            replace(wrapper(**SHALLOW, keep_outputs=True).config, draft=draft).check()

    def test_a_base_that_says_otherwise_than_its_head_is_refused(self, monkeypatch, tmp_path):
        monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path))
        (row,) = texts(15)
        model = wrapper("nanochat", **SHALLOW, keep_outputs=True)
        kept = model.drafter.kept_outputs
        monkeypatch.setattr(kept, "logits", lambda top, rows: 3 * torch.ones(len(top), len(rows)))
        for _ in range(2):
            with pytest.raises(CannotTrain, match="can't make the logits of NanoChatForCausalLM"):
                kept.of(row)
        assert not list(tmp_path.glob("outputs/*/*"))

    def test_what_is_damaged_is_named(self, monkeypatch, tmp_path):
        monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path))
        (row,) = texts(15)
        model = wrapper(**SHALLOW, keep_outputs=True)
        model.drafter.kept_outputs.of(row)
        (path,) = tmp_path.glob("outputs/*/*.safetensors")
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(DeepenError, match=r"is damaged .* delete it, and it is made again"):
            model.drafter.kept_outputs.of(row)

    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_it_alone_gets_a_gradient(self, name):
        model = wrapper(name, **SHALLOW)
        output = stepped(model, prepared(model, texts(21, 15)))
        output.losses["distill"].total.backward()
        for path, parameter in model.named_parameters():
            has_gradient = parameter.grad is not None and bool(parameter.grad.any())
            assert has_gradient == path.startswith("drafter.") == parameter.requires_grad, path

    def test_it_drafts_from_the_last_token_that_was_read(self, monkeypatch):
        """What it proposes behind a pass is what it proposes behind the whole text, read anew."""
        model = wrapper(noise=0.5, **SHALLOW)
        (row,) = texts(9)
        decoding, sampler = model.open(Prompt((tuple(row),), 40)), BatchSampler([SamplingConfig()])
        drafts = list[Draft]()

        def judge(decoding, given, *others):
            drafts.extend(given)
            return JUDGE(decoding, given, *others)

        monkeypatch.setattr(chunk_decoding, "judge", judge)
        model.advance(decoding, sampler)
        assert drafts.pop() == NO_DRAFT  # nothing was read yet that it could start from
        for _ in range(6):
            text = decoding.rows[0]
            cache = model.backbone.new_cache(batch_size=1, capacity=len(text))
            tops = LayerOutputs(model.drafter.read_layers)
            with torch.no_grad():
                model.backbone.run(torch.tensor([text[:-1]]), cache, edit=tops.read)
            expected = model.drafter.draft(tops.stacked()[:, -1], torch.tensor(text[-1:]), WIDTH - 1)[0]
            model.advance(decoding, sampler)
            assert drafts.pop().tokens == expected.tokens

    def test_it_drafts_the_most_frequent_tokens(self):
        model = wrapper(noise=0.0, **{**SHALLOW, "draft_vocab": 3})
        assert model.drafter.tokens.tolist() == [0, 1, 2]
        counts = torch.zeros(model.backbone.vocab_size, dtype=torch.long)
        counts[[7, 50, 200]] = torch.tensor([3, 9, 3])
        counts[100] = 4
        model.fit(counts)
        assert model.drafter.tokens.tolist() == [7, 50, 100]
        state = torch.randn(2, model.backbone.hidden_size)
        logits = model.drafter.logits(state)
        rows = model.backbone.head.weight[[7, 50, 100]]
        normed = state / (state.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(logits, (normed * model.drafter.scale) @ rows.T)
        drafted = model.drafter.draft(torch.randn(2, 3, model.backbone.hidden_size), torch.tensor([5, 9]), 6)
        assert {token for draft in drafted for token in draft.tokens} <= {7, 50, 100}
        # What it has learned belongs to these, so that going on with other data keeps them.
        model.drafter.out.weight.data += 1
        model.fit(counts.flip(0))
        assert model.drafter.tokens.tolist() == [7, 50, 100]

    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_a_new_one_says_again_what_the_base_has_just_said(self, name):
        model = wrapper(name, noise=0.0, **SHALLOW)
        (row,) = texts(9)
        tops = LayerOutputs(model.drafter.read_layers)
        cache = model.backbone.new_cache(batch_size=1, capacity=len(row))
        with torch.no_grad():
            said = model.backbone.run(torch.tensor([row]), cache, edit=tops.read)[0]
            state = model.drafter.step(model.drafter.start(tops.stacked()[0]), said.argmax(dim=-1))
            again = model.drafter.logits(state)
        assert not model.drafter.has_learned
        assert torch.equal(again.argmax(dim=-1), said[:, :200].argmax(dim=-1))

    def test_rows_of_a_batch_start_each_from_their_own(self):
        """Ragged rows of which one is dropped: what each would draft is what it would draft alone."""
        model = wrapper(noise=0.5, double=True, **SHALLOW)
        rows = texts(9, 4, 14)
        together, alone = model.open(Prompt(tuple(map(tuple, rows)), 40)), []
        sampler = BatchSampler([SamplingConfig()] * 3)
        for number in range(6):
            if number == 3:
                model.drop(together, [0])
                sampler = BatchSampler([SamplingConfig()] * 2)
            model.advance(together, sampler)
            for row, ids in enumerate(together.rows):
                cache = model.backbone.new_cache(batch_size=1, capacity=len(ids))
                tops = LayerOutputs(model.drafter.read_layers)
                with torch.no_grad():
                    model.backbone.run(torch.tensor([ids[:-1]]), cache, edit=tops.read)
                alone.append(tops.stacked()[0, -1])
                torch.testing.assert_close(together.tops[row], alone[-1], rtol=1e-6, atol=1e-6)
        assert len(alone) == 3 * 3 + 3 * 2

    def test_what_it_drafts_follows_its_base(self):
        """The head's rows are gathered once, until the head or what can be drafted changes."""
        model = wrapper(**SHALLOW)
        drafter, state = model.drafter, torch.randn(1, model.backbone.hidden_size)
        before = drafter.logits(state)
        with torch.no_grad():
            model.backbone.head.weight.mul_(2)
        torch.testing.assert_close(drafter.logits(state), 2 * before)
        with torch.no_grad():
            drafter.tokens.add_(1)
        torch.testing.assert_close(drafter.logits(state)[:, :-1], 2 * before[:, 1:])

    def test_only_what_trains_is_fitted(self):
        model = wrapper(noise=0.0, **{**SHALLOW, "draft": "mask"})
        model.fit(torch.arange(model.backbone.vocab_size))
        assert model.drafter.tokens.tolist() == list(range(200))

    def test_ids_outside_the_vocabulary_are_refused(self):
        model = wrapper(**SHALLOW)
        state = {name: tensor.clone() for name, tensor in model.saved_state().items()}
        state["drafter.tokens"][3] = 4000
        with pytest.raises(CheckpointError, match=r"drafter\.tokens holds id 4000, outside the base's vocabulary"):
            model.load_saved_state(state)

    def test_it_learns_a_text_that_the_base_knows_by_heart(self):
        """Of which it can draft the tokens that occur, wherever they stand in the vocabulary."""
        (row,) = texts(44)
        base = knowing(row)
        settings = {"chunk_width": 12, "max_chunk_len": 12, "anchors_per_text": 44, "distill_gamma": 100.0}
        shape = {"draft": "shallow", "drafter_hidden": 256, "draft_vocab": 44, "phase": "a"}
        model = ChunkRefineWrapper(base, RecursiveConfig(**{"recursive_enabled": True, **SIZES, **settings, **shape}))
        freeze_base(model, base)
        model.fit(torch.bincount(torch.tensor(row), minlength=model.backbone.vocab_size))
        losses = train(model, batch_of([row]), num_steps=60, learning_rate=3e-3)
        assert losses[0]["distill"] > 5 and losses[-1]["distill"] < 0.05
        (result,) = complete(model.eval(), [row[:4]], stop=StopConfig(max_new_tokens=40))
        assert result.tokens == row[4:44]
        assert len(result.tokens) / result.passes > 4


def embedding_scale(base: Any, token: int) -> float:
    """Some models scale embeddings: what the embedding module gives, over its weight."""
    given, weight = base.embedding(torch.tensor([token]))[0], base.embedding_weight[token]
    return float((given / weight).mean())


class TestWhatReachesWhat:
    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_no_later_given_token_reaches_a_logit_of_final_ce(self, name, monkeypatch):
        model = wrapper(name, commit_mode="refined")
        recorder = Recorder(monkeypatch)
        stepped(model, prepared(model, texts(21, 15)))
        read, said = recorder.scoring
        # Gradients of the tokens that are read, at the end of a chain through no other pass.
        for place in range(read.shape[1]):
            (gradient,) = torch.autograd.grad(said.logits[:, place].sin().sum(), read, retain_graph=True)
            assert torch.equal(gradient[:, place + 1 :], torch.zeros_like(gradient[:, place + 1 :]))
            assert gradient[:, place].any()

    def test_what_final_ce_starts_from_is_no_function_of_the_given_chunk(self, monkeypatch):
        model = wrapper(commit_mode="refined")
        (row,) = texts(1 + WIDTH)
        recorder = Recorder(monkeypatch)
        stepped(model, at_grid(model, row))
        other = [row[0], *((token + 1) % 256 for token in row[1:])]
        again = Recorder(monkeypatch)
        stepped(model, at_grid(model, other))
        for (_, one), (_, two) in zip(recorder.refining, again.refining, strict=True):
            assert torch.equal(one.logits, two.logits)
            assert all(torch.equal(one.states[layer], two.states[layer]) for layer in one.states)
        assert not torch.equal(recorder.scoring[1].logits, again.scoring[1].logits)

    @pytest.mark.parametrize("kind", [SLOT, RANDOM, OWN_DRAFT], ids=["slot", "random", "own-draft"])
    @pytest.mark.parametrize("place", range(1, WIDTH))
    @pytest.mark.parametrize("num_passes", range(1, NUM_PASSES + 1))
    def test_a_masked_target_is_in_nothing_that_any_pass_was_fed(self, place, num_passes, kind, monkeypatch):
        """A token corrupted in the first passes changes nothing that these say, whatever it is and was made."""
        model = wrapper(commit_mode="refined")
        (row,) = texts(1 + WIDTH)

        def passes(token: int) -> list[Tensor]:
            changed = [*row[: place + 1], token, *row[place + 2 :]]
            batch = at_grid(model, changed)
            assert batch.passes_corrupted is not None and batch.corruptions is not None
            batch.passes_corrupted[0, 0, place] = num_passes
            batch.corruptions[0, 0, place] = kind
            recorder = Recorder(monkeypatch)
            output = stepped(model, batch)
            assert model.count(batch)["masked"] == num_passes
            said = [each.logits for _, each in recorder.denoising]
            assert len(said) == NUM_PASSES
            # All that is counted: the token at its place, in each of these passes.
            expected = sum(-each[0, place - 1].log_softmax(-1)[token] for each in said[:num_passes])
            torch.testing.assert_close(output.losses["masked_ce"].total, expected)
            return said

        one, other = passes(7), passes(201)
        for number in range(NUM_PASSES):
            assert torch.equal(one[number], other[number]) == (number < num_passes), number

    def test_nothing_corrupted_is_no_masked_loss(self):
        model = wrapper(commit_mode="refined")
        batch = at_grid(model, texts(1 + WIDTH)[0])
        output = stepped(model, batch)
        assert model.count(batch)["masked"] == 0
        assert output.losses["masked_ce"].total == 0

    def test_ponder_has_a_gradient(self):
        model = wrapper(commit_mode="refined")
        output = stepped(model, prepared(model, texts(21, 15)))
        (gradient,) = torch.autograd.grad(output.losses["ponder"].total, model.boundary.commit.weight)
        assert gradient.abs().max() > 1e-4

    def test_stability_is_there_where_the_draft_is_right(self):
        """The given text is what the model would say: nothing should change from pass to pass, and noise changes it."""
        model = wrapper(commit_mode="refined", noise=0.05)
        (row,) = texts(5)
        said = complete(PlainDecoder(model.backbone), [row], stop=StopConfig(max_new_tokens=12))[0].tokens
        output = stepped(model, prepared(model, [[*row, *said]], seed=2))
        assert output.losses["stability"].total > 0
        untrained = wrapper(commit_mode="refined", noise=0.0)
        output = stepped(untrained, prepared(untrained, [[*row, *said]], seed=2))
        assert float(output.losses["stability"].total.detach()) == pytest.approx(0, abs=1e-6)


class TestWhatLearns:
    @pytest.mark.parametrize(
        ("mode", "phase"), [("exact", "a"), ("exact", "b"), ("refined", "a"), ("refined", "b"), ("refined", "c")]
    )
    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_all_that_the_phase_trains_gets_a_gradient_and_nothing_else(self, name, mode, phase):
        model = wrapper(name, commit_mode=mode, phase=phase, noise=0.1 if phase == "c" else 0.3)
        before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
        output = stepped(model, prepared(model, texts(21, 15)))
        torch.stack([term.weight * term.total for term in output.losses.values()]).sum().backward()
        trained = {id(each) for group in model.optim_groups() for each in group["params"]}
        for path, parameter in model.named_parameters():
            has_gradient = parameter.grad is not None and bool(parameter.grad.any())
            assert has_gradient == (id(parameter) in trained) == parameter.requires_grad, path
        names = {path for path, each in model.named_parameters() if id(each) in trained}
        assert any("lora" in path for path in names) == (phase == "b")
        assert any("state_upd" in path for path in names) == (mode == "refined")
        assert all(torch.equal(before[path], tensor) for path, tensor in model.base.state_dict().items())

    @pytest.mark.parametrize("mode", ["exact", "refined"])
    def test_a_step_leaves_the_base_bit_equal(self, mode):
        model = wrapper(commit_mode=mode, phase="b")
        before = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
        own = {name: tensor.detach().clone() for name, tensor in model.saved_state().items()}
        train(model, prepared(model, texts(21, 15)), num_steps=3, learning_rate=1e-2)
        assert all(torch.equal(before[path], tensor) for path, tensor in model.base.state_dict().items())
        moved = {name for name, tensor in model.saved_state().items() if not torch.equal(tensor, own[name])}
        assert moved == {name for name in own if model_trains(model, name)}

    @pytest.mark.parametrize("grad_passes", [0, 2])
    def test_back_propagation_goes_through_the_last_passes(self, grad_passes, monkeypatch):
        model = wrapper(commit_mode="refined", grad_passes=grad_passes, lambda_masked=0.0)
        recorder = Recorder(monkeypatch)
        stepped(model, prepared(model, texts(21)))
        learned = [said.p_commit.requires_grad for _, said in recorder.refining]
        assert learned == [grad_passes == 0, True, True]

    def test_soft_tokens_bring_a_gradient_from_pass_to_pass(self, monkeypatch):
        found = {}
        for soft in (False, True):
            model = wrapper(commit_mode="refined", use_soft_tokens=soft, corruption_rate=1.0, noise=1.0)
            recorder = Recorder(monkeypatch)
            stepped(model, prepared(model, texts(21, 15)))
            (_, first), (read, _) = recorder.refining[:2]
            found[soft] = read.grad_fn is not None and first.logits.requires_grad
        assert found == {False: False, True: True}

    def test_without_a_phase_there_is_nothing_to_train(self):
        model = wrapper(phase="none")
        assert model.optim_groups() == []
        with pytest.raises(CannotTrain, match=r'phase is "none".*set phase to "a"'):
            model.prepare(batch_of(texts(20)), BEGIN)
        disabled = ChunkRefineWrapper(tiny.build("llama"), RecursiveConfig())
        with pytest.raises(CannotTrain, match="recursive_enabled is false"):
            disabled.prepare(batch_of(texts(20)), BEGIN)

    @pytest.mark.filterwarnings("ignore:cache_reset_policy keep_all")
    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"chunk_width": 1}, "chunk_width is 1.*set it to 2 or more"),
            ({"commit_mode": "refined", "cache_reset_policy": "keep_all"}, "keep_all is an ablation of generation"),
        ],
    )
    def test_what_would_train_nothing_or_something_else_is_refused(self, settings, said):
        with pytest.raises(CannotTrain, match=said):
            wrapper(**settings).prepare(batch_of(texts(20)), BEGIN)

    def test_a_batch_that_was_not_prepared_is_refused(self):
        with pytest.raises(DeepenError, match=r"as prepare\(\) makes it"):
            stepped(wrapper(), batch_of(texts(20)))

    def test_phase_b_goes_on_from_phase_a(self):
        before = wrapper(phase="a")
        after = wrapper(phase="b", noise=0.0)
        after.load_saved_state(before.saved_state())
        for name, tensor in before.saved_state().items():
            assert torch.equal(after.saved_state()[name], tensor)
        assert not any(tensor.any() for name, tensor in after.saved_state().items() if "lora_B" in name)

    @pytest.mark.parametrize("mode", ["exact", "refined"])
    def test_the_same_step_draws_the_same_rows(self, mode):
        model = wrapper(commit_mode=mode)
        one, two, other = (prepared(model, texts(21, 15), seed) for seed in (3, 3, 4))
        assert torch.equal(one.anchors, two.anchors) and not torch.equal(one.anchors, other.anchors)


class TestThatItLearns:
    def test_slots_learn_a_text_that_the_base_knows_by_heart(self):
        """They come to say what the base says, and what they draft is committed: more than 4 tokens a pass."""
        (row,) = texts(44)
        base = knowing(row)
        settings = {"chunk_width": 12, "max_chunk_len": 12, "anchors_per_text": 24, "distill_gamma": 100.0}
        shape = {"layers_to_refine": (0, 1, 2), "refine_hidden": 256, "share_cells": False, "draft": "mask"}
        model = ChunkRefineWrapper(
            base, RecursiveConfig(**{"recursive_enabled": True, **SIZES, "phase": "a", **settings, **shape})
        )
        freeze_base(model, base)
        losses = train(model, batch_of([row]), num_steps=240, learning_rate=3e-3)
        assert losses[0]["distill"] > 5 and losses[-1]["distill"] < 0.05
        (result,) = complete(model.eval(), [row[:4]], stop=StopConfig(max_new_tokens=40))
        assert result.tokens == row[4:44]
        assert len(result.tokens) / result.passes > 4

    def test_refined_mode_learns_one_batch(self):
        model = wrapper(
            commit_mode="refined", noise=0.0, layers_to_refine=(0, 1, 2), refine_hidden=128, share_cells=False,
            lambda_masked=0.0, lambda_halt=0.0, lambda_len=0.0, lambda_ponder=0.0, lambda_stability=0.0,
            max_inner_steps=2, anchors_per_text=1,
        )  # fmt: skip
        batch = prepared(model, texts(1 + WIDTH, 2 + WIDTH))
        losses = train(model, batch, num_steps=120, learning_rate=4e-3)
        assert losses[0]["final_ce"] > 5 and losses[-1]["final_ce"] < 0.05


def knowing(row: list[int]) -> Any:
    """A tiny base that has learned a text by heart."""
    torch.manual_seed(0)
    base = tiny.build("llama").train()
    ids = torch.tensor([row])
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        base(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return base.eval()


def model_trains(model: ChunkRefineWrapper, saved_name: str) -> bool:
    saved = model.saved_state()[saved_name]
    return any(tensor.data_ptr() == saved.data_ptr() for tensor in model.parameters() if tensor.requires_grad)


def train(model: ChunkRefineWrapper, batch: Batch, *, num_steps: int, learning_rate: float) -> list[dict[str, float]]:
    """The losses of each step on the same texts; rows that are drawn already are the same, too."""
    if isinstance(batch, ChunkBatch):
        model.prepare = lambda texts, progress: batch  # type: ignore[method-assign]
    steps = Steps(
        StepModule(model, model.base),
        make_optimizers(model, model.base, learning_rate=learning_rate),
        lambda index: batch,
        num_steps=num_steps,
        grad_clip=1.0,
    )
    return [dict(steps.take(index).losses) for index in range(num_steps)]
