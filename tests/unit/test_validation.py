"""What is measured in the middle of a training is what `deepen evaluate` says, and leaves no trace in the training."""

import json
import math
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import deepen.methods
from deepen.backbones.hf import Backbone
from deepen.backbones.resolve import load
from deepen.checkpoint import save_adapter
from deepen.core import registry
from deepen.core.errors import CannotScore, DeepenError
from deepen.core.types import Batch, LossTerm, Progress, Score
from deepen.data.batches import batch_of
from deepen.data.records import Record
from deepen.data.split import split_of, split_of_record
from deepen.evaluate.stages import StageConfig, run_stage
from deepen.generate.loop import complete
from deepen.generate.stop import StopConfig
from deepen.metrics.sinks import JsonLines, TensorBoard
from deepen.train.samples import SampleBook, Samples, prompts_of_documents, prompts_of_texts
from deepen.train.untouched import untouched
from deepen.train.validation import Validation

DROPPED_IN = Path(__file__).parents[1] / "contract" / "dropped_in"
HALFWAY = Progress(5, 10)
TAG = "evaluation/validation/"


@pytest.fixture(autouse=True)
def _toys_are_known(monkeypatch):
    monkeypatch.setattr(deepen.methods, "__path__", [*deepen.methods.__path__, str(DROPPED_IN)])


@pytest.fixture
def loaded():
    return load("tiny:llama")


@pytest.fixture
def toy(loaded):
    """A toy that has learned a little of what it is to predict, so that some tokens are right."""
    toy = toy_on(Backbone.attach(loaded.model))
    batch = batch_of([loaded.tokenizer.encode(text)[:60] for text in validation_texts(4)])
    optimizer = torch.optim.AdamW([toy.up.weight, toy.down.weight], lr=3e-2)
    for _ in range(12):
        optimizer.zero_grad()
        toy.train_step(batch, None, HALFWAY).losses["next_token"].total.backward()
        optimizer.step()
    optimizer.zero_grad()
    return toy


def toy_on(backbone, kind=None):
    method = registry.get("toy")
    kind = kind if kind is not None else method.load_model_type()
    torch.manual_seed(3)
    model = kind.build(method.load_config_type()(), backbone, backbone.vocab_size)
    torch.nn.init.normal_(model.up.weight, std=0.3)
    return model


def validation_texts(num):
    texts = (f"Document {n} says that {n} is less than {n + 1}, and much else about {n}." for n in count())
    return list(islice((text for text in texts if split_of(text) == "validation"), num))


@pytest.fixture
def corpus(tmp_path) -> str:
    """Five documents to validate on, behind one to train on."""
    texts = ["Something to train on.", *validation_texts(5)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture
def chats(tmp_path) -> str:
    """Three conversations to validate on."""
    found = ({"prompt": f"what comes after {n}?", "response": f"after {n} comes {n + 1}, as always"} for n in count())
    chosen = islice((fields for fields in found if split_of_record(Record(fields, "here")) == "validation"), 3)
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(fields) + "\n" for fields in chosen))
    return str(path)


def validation_of(model, loaded, data, **options):
    return Validation(model, loaded.tokenizer, data, **{"max_length": 60, "say": pytest.fail, **options})


class TestFigures:
    @pytest.mark.parametrize("max_tokens", [20_000, 150])
    def test_they_are_those_of_an_evaluation_to_the_last_bit(self, toy, loaded, corpus, tmp_path, max_tokens):
        save_adapter(tmp_path / "toy", method=registry.get("toy"), model=toy, identity=loaded.identity)
        stage = StageConfig(
            model=str(tmp_path / "toy"), stage="after_surgery", data=corpus, split="validation", max_length=60,
            max_tokens=max_tokens, max_new_tokens=0, output_dir=str(tmp_path / "eval"),
        )  # fmt: skip
        expected = run_stage(stage)[0]["figures"]
        toy.train()
        figures = validation_of(toy, loaded, corpus, max_tokens=max_tokens).measure(HALFWAY)
        named = {
            f"{TAG}loss": expected["nll"],
            f"{TAG}perplexity": expected["perplexity"],
            f"{TAG}bits_per_byte": expected["bits_per_byte"],
            f"{TAG}token_accuracy": expected["token_accuracy"],
        }
        assert figures == pytest.approx(named, rel=1e-5) and expected["token_accuracy"] > 0
        toy.backbone.pack()  # as an evaluation does
        assert validation_of(toy, loaded, corpus, max_tokens=max_tokens).measure(HALFWAY) == named

    def test_of_conversations_the_answers_count(self, toy, loaded, chats):
        first_scored = 8
        figures = validation_of(toy, loaded, chats, max_length=200, first_scored=first_scored).measure(HALFWAY)
        nll = num_tokens = num_correct = 0
        for line in Path(chats).read_text().splitlines():
            fields = json.loads(line)
            asked, answered = (
                loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompts)
                for turns, prompts in (
                    ([{"role": "user", "content": fields["prompt"]}], True),
                    (
                        [
                            {"role": "user", "content": fields["prompt"]},
                            {"role": "assistant", "content": fields["response"]},
                        ],
                        False,
                    ),
                )
            )
            ids = loaded.tokenizer.encode(answered, add_special_tokens=False)
            start = len(loaded.tokenizer.encode(asked, add_special_tokens=False))
            assert first_scored < start < len(ids)
            score = toy.score(batch_of([ids]))
            nll -= float(score.log_probs[0, start:].double().sum())
            num_correct += int(score.correct[0, start:].sum())
            num_tokens += len(ids) - start
        assert figures[f"{TAG}loss"] == pytest.approx(nll / num_tokens, rel=1e-5)
        assert figures[f"{TAG}token_accuracy"] == num_correct / num_tokens > 0

    def test_empty_documents_are_none(self, toy, loaded, corpus):
        figures = validation_of(toy, loaded, corpus).measure(HALFWAY)
        blank = next(" " * num for num in count() if split_of(" " * num) == "validation")
        lines = Path(corpus).read_text()
        Path(corpus).write_text(json.dumps({"text": blank}) + "\n" + lines)
        assert validation_of(toy, loaded, corpus).measure(HALFWAY) == figures

    def test_a_corpus_without_validation_documents_is_told(self, toy, loaded, tmp_path):
        (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": "Something to train on."}))
        with pytest.raises(DeepenError, match="has no validation document: 2 in 100 documents"):
            validation_of(toy, loaded, str(tmp_path / "corpus.jsonl"))


class TestOptimizer:
    """A packed base whose own weights are trained: nothing that was packed before may be read again."""

    @pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
    def test_scores_see_the_step_that_was_made(self, loaded, corpus, options):
        backbone = Backbone.attach(loaded.model)
        backbone.pack()
        toy = toy_on(backbone)
        validation = validation_of(toy, loaded, corpus)
        before = validation.measure(HALFWAY)
        optimizer = torch.optim.AdamW(toy.parameters(), lr=1e-2, **options)
        output = toy.train_step(batch_of([list(range(40))]), None, HALFWAY)
        output.losses["next_token"].total.backward()
        optimizer.step()
        behind = validation.measure(HALFWAY)
        backbone.unpack()
        backbone.pack()
        assert behind == validation.measure(HALFWAY) != before
        assert backbone.packed and all(parameter.requires_grad for parameter in backbone.model.parameters())

    def test_scores_see_weights_that_moved_through_data(self, loaded, corpus):
        backbone = Backbone.attach(loaded.model)
        backbone.pack()
        validation = validation_of(toy_on(backbone), loaded, corpus)
        before = validation.measure(HALFWAY)
        for parameter in backbone.model.parameters():
            parameter.data.mul_(1.05)
        behind = validation.measure(HALFWAY)
        backbone.unpack()
        backbone.pack()
        assert behind == validation.measure(HALFWAY) != before


def drawing_toy(loaded, *, scores=False):
    """A toy whose training draws, that counts in a buffer and drops out in training mode, and that has no score."""

    class DrawingToy(registry.get("toy").load_model_type()):
        def __init__(self, config, backbone):
            super().__init__(config, backbone)
            self.register_buffer("num_steps", torch.zeros(()))
            self.dropout = torch.nn.Dropout(0.5)
            self.grad_modes: list[bool] = []
            self.carries: list[float] = []

        def begin(self, batch):
            return torch.zeros(())

        def train_step(self, batch, carry, progress):
            self.num_steps += 1
            self.grad_modes.append(torch.is_grad_enabled())
            self.carries.append(float(carry))
            output = super().train_step(batch, carry, progress)
            term = output.losses["next_token"]
            noise = 1 + self.dropout(torch.rand(()))
            sizes = LossTerm(self.up.weight.square().sum() * len(batch.lengths), "sequence", weight=0.5)
            losses = {"next_token": replace(term, total=term.total * noise), "size": sizes}
            return replace(output, losses=losses, carry=carry + 1)

        def count(self, batch):
            return {**super().count(batch), "sequence": len(batch.lengths)}

        def score(self, batch):
            if scores:
                return super().score(batch)
            raise CannotScore("this toy sees what it predicts")

    return toy_on(Backbone.attach(loaded.model), DrawingToy)


class TestWithoutScore:
    def test_the_trainings_losses_are_measured_and_it_is_said_once(self, loaded, corpus):
        toy, said = drawing_toy(loaded), []
        validation = validation_of(toy, loaded, corpus, say=said.append)
        figures = [validation.measure(HALFWAY) for _ in range(2)]
        assert said == [
            "no validation perplexity: this toy sees what it predicts; the training's losses are measured instead"
        ]
        assert figures[0] == figures[1]
        assert figures[0].keys() == {f"{TAG}loss/{name}" for name in ("next_token", "size", "total")}

    def test_losses_are_sums_over_counts(self, loaded, corpus):
        toy = drawing_toy(loaded)
        figures = validation_of(toy, loaded, corpus, batch_size=2, say=str).measure(HALFWAY)
        assert toy.carries == [0, 1, 2]
        rows = [loaded.tokenizer.encode(text)[:60] for text in validation_texts(5)]
        torch.manual_seed(0)
        total, toy_class = 0.0, registry.get("toy").load_model_type()
        for start in range(0, 5, 2):
            with torch.no_grad():
                plain = toy_class.train_step(toy, batch_of(rows[start : start + 2]), None, HALFWAY)
            total += float(plain.losses["next_token"].total) * float(1 + torch.rand(()))
        next_token = total / sum(len(row) - 1 for row in rows)
        size = float(toy.up.weight.detach().square().sum())
        assert figures == pytest.approx(
            {
                f"{TAG}loss/next_token": next_token,
                f"{TAG}loss/size": size,
                f"{TAG}loss/total": next_token + 0.5 * size,
            },
            rel=1e-5,
        )

    def test_a_scorer_that_leaks_has_no_perplexity(self, toy, loaded, corpus, monkeypatch):
        def leaking(batch: Batch) -> Score:
            real = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
            return Score(-0.01 * batch.input_ids.sum(dim=1, keepdim=True) * real, real, real)

        said = []
        monkeypatch.setattr(toy, "score", leaking)
        figures = validation_of(toy, loaded, corpus, say=said.append).measure(HALFWAY)
        assert figures.keys() == {f"{TAG}loss/next_token", f"{TAG}loss/total"}
        assert len(said) == 1 and "the scorer leaks" in said[0]

    def test_documents_too_short_to_score_still_have_losses(self, toy, loaded, corpus):
        said = []
        figures = validation_of(toy, loaded, corpus, max_length=20, say=said.append).measure(HALFWAY)
        assert figures[f"{TAG}loss/next_token"] > 0
        assert len(said) == 1 and "no document has more than 32 tokens" in said[0]


class TestNoTrace:
    @pytest.mark.parametrize("scores", [True, False])
    def test_a_training_is_the_same_with_and_without_it(self, corpus, scores):
        def trained(*, looked_at: bool):
            loaded = load("tiny:llama")
            toy = drawing_toy(loaded, scores=scores)
            validation = validation_of(toy, loaded, corpus, say=str)
            prompts = prompts_of_documents(corpus, loaded.tokenizer, count=2)
            samples = Samples(toy, loaded.tokenizer, prompts, max_new_tokens=4)
            optimizer = torch.optim.AdamW([toy.up.weight, toy.down.weight], lr=1e-2)
            torch.manual_seed(7)
            toy.train()
            for step in range(3):
                if looked_at:
                    validation.measure(Progress(step, 3))
                    samples.draw()
                optimizer.zero_grad()
                output = toy.train_step(batch_of([torch.randint(100, (30,)).tolist()]), torch.zeros(()), HALFWAY)
                output.losses["next_token"].total.backward()
                optimizer.step()
            return toy.state_dict(), torch.get_rng_state()

        (state, generator), (seen_state, seen_generator) = trained(looked_at=False), trained(looked_at=True)
        assert state.keys() == seen_state.keys()
        assert all(torch.equal(state[name], seen_state[name]) for name in state)
        assert torch.equal(generator, seen_generator)

    def test_each_module_comes_back_in_its_mode_even_after_a_failure(self, loaded, corpus, monkeypatch):
        toy = drawing_toy(loaded)
        toy.train()
        toy.base.eval()
        toy.base.model.layers[1].mlp.train()
        modes = {name: module.training for name, module in toy.named_modules()}
        seen = []

        def failing(batch, progress):
            seen.extend(module.training for module in toy.modules())
            toy.num_steps.fill_(99)
            raise KeyError

        monkeypatch.setattr(toy, "prepare", failing)
        before = torch.get_rng_state()
        with pytest.raises(KeyError):
            validation_of(toy, loaded, corpus, say=str).measure(HALFWAY)
        assert seen and not any(seen)
        assert {name: module.training for name, module in toy.named_modules()} == modes
        assert float(toy.num_steps) == 0 and torch.equal(torch.get_rng_state(), before)
        assert torch.is_grad_enabled()

    def test_a_base_that_is_held_aside_is_part_of_it(self, toy):
        base = toy.base
        del toy.base
        base.train()
        with untouched(toy, seed=0):
            assert not any(module.training for module in base.modules())
        assert all(module.training for module in base.modules())

    def test_a_buffer_that_is_replaced_comes_back_as_it_was(self, toy):
        toy.register_buffer("threshold", torch.tensor(1.0))
        kept, version = toy.threshold, toy.threshold._version
        with untouched(toy, seed=0):
            toy.threshold = torch.tensor(2.0)
            toy.register_buffer("mask", torch.ones(3))
        assert toy.threshold is kept and kept._version == version and float(kept) == 1.0
        assert "mask" not in dict(toy.named_buffers())

    def test_there_are_no_gradients(self, loaded, corpus):
        toy = drawing_toy(loaded)
        validation_of(toy, loaded, corpus, say=str).measure(HALFWAY)
        assert toy.grad_modes and not any(toy.grad_modes)
        assert all(parameter.grad is None for parameter in toy.parameters())


def samples_of(model, loaded, texts):
    return Samples(model, loaded.tokenizer, prompts_of_texts(texts, loaded.tokenizer, chat=False), max_new_tokens=8)


class TestSamples:
    def test_they_are_greedy_continuations(self, toy, loaded, corpus):
        prompts = prompts_of_documents(corpus, loaded.tokenizer, count=3)
        toy.train()
        samples = Samples(toy, loaded.tokenizer, prompts, max_new_tokens=12).draw()
        assert toy.training
        results = complete(
            toy,
            [list(prompt.ids) for prompt in prompts],
            stop=StopConfig(max_new_tokens=12),
            tokenizer=loaded.tokenizer,
        )
        assert [list(sample.answer.tokens) for sample in samples] == [result.tokens for result in results]
        assert [sample.fields()["text"] for sample in samples] == [result.text for result in results]

    def test_they_are_kept_with_their_step_and_figures(self, toy, loaded, corpus, tmp_path):
        samples = samples_of(toy, loaded, ["one", "two"])
        board = TensorBoard(tmp_path)
        book = SampleBook(tmp_path, tensorboard=board)
        drawn = samples.draw()
        book.write(drawn, step=4)
        book.write(drawn, step=8)
        board.close()
        lines = list(JsonLines(tmp_path / "samples.jsonl"))
        assert [(line["step"], line["sample"], line["prompt"]) for line in lines] == [
            (4, 0, "one"), (4, 1, "two"), (8, 0, "one"), (8, 1, "two"),
        ]  # fmt: skip
        tokens = lines[0]["tokens"]
        assert lines[0]["num_tokens"] == len(tokens) == 8 and lines[0]["reason"] == "length"
        assert lines[0]["tokens_per_pass"] == 1.0
        assert lines[0]["distinct_1"] == len(set(tokens)) / 8
        assert lines[0]["text"] == drawn[0].answer.text
        events = (
            EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload().Tensors("samples/1/text_summary")
        )
        assert [event.step for event in events] == [4, 8]
        assert events[0].tensor_proto.string_val[0].decode().startswith("    two\n")
        SampleBook(tmp_path, resume_after=4)
        assert [line["step"] for line in JsonLines(tmp_path / "samples.jsonl")] == [4, 4]

    def test_figures_are_over_all_samples(self, toy, loaded):
        samples = samples_of(toy, loaded, ["a", "b"])
        drawn = samples.draw()
        figures = samples.figures(drawn)
        answers = [sample.answer.tokens for sample in drawn]
        assert figures["evaluation/samples/mean_length"] == 8
        assert figures["evaluation/samples/distinct_1"] == sum(len(set(tokens)) for tokens in answers) / 16
        assert figures["train/generation/avg_refine_steps"] == figures["train/generation/avg_chunk_length"] == 1.0
        assert figures["train/generation/commit_rate"] is None  # a toy doesn't judge its chunks
        assert math.isfinite(figures["evaluation/samples/repetition"])

    def test_an_end_ends_them(self, toy, loaded):
        prompts = prompts_of_texts(["a"], loaded.tokenizer, chat=False)
        (free,) = Samples(toy, loaded.tokenizer, prompts, max_new_tokens=8).draw()
        end = free.answer.tokens[0]
        (ended,) = Samples(toy, loaded.tokenizer, prompts, max_new_tokens=8, eos_ids=(end,)).draw()
        assert ended.answer.tokens == (end,) and ended.answer.reason == "eos"
        assert ended.fields()["distinct_2"] is None

    def test_documents_give_their_first_words_and_conversations_what_is_asked(self, loaded, corpus, chats):
        words = prompts_of_documents(corpus, loaded.tokenizer, count=2)
        assert [len(prompt.ids) for prompt in words] == [16, 16]
        assert all(text.startswith(prompt.text) for prompt, text in zip(words, validation_texts(2), strict=True))
        asked = prompts_of_documents(chats, loaded.tokenizer, count=9)
        expected = [json.loads(line)["prompt"] for line in Path(chats).read_text().splitlines()]
        assert [prompt.text for prompt in asked] == expected
        assert [asked[0].ids] == [prompt.ids for prompt in prompts_of_texts(expected[:1], loaded.tokenizer, chat=True)]

    def test_what_cannot_be_continued_is_told(self, toy, loaded):
        with pytest.raises(DeepenError, match="there is no prompt to continue"):
            Samples(toy, loaded.tokenizer, [])
        (prompt,) = prompts_of_texts(["a " * 300], loaded.tokenizer, chat=False)
        with pytest.raises(DeepenError, match=r"a prompt of 60\d tokens and 64 new ones exceed .* context of 512"):
            Samples(toy, loaded.tokenizer, [prompt])

    def test_on_a_packed_base_they_see_the_step_that_was_made(self, loaded):
        backbone = Backbone.attach(loaded.model)
        backbone.pack()
        toy = toy_on(backbone)
        samples = samples_of(toy, loaded, ["a"])
        before = samples.draw()[0].answer.tokens
        optimizer = torch.optim.AdamW(toy.parameters(), lr=1e-1)
        toy.train_step(batch_of([list(range(40))]), None, HALFWAY).losses["next_token"].total.backward()
        optimizer.step()
        behind = samples.draw()[0].answer.tokens
        backbone.unpack()
        backbone.pack()
        assert behind == samples.draw()[0].answer.tokens != before
