"""Figures against a plain loop, planted leaks against the guard, and the stages' files."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import deepen.methods
from deepen.backbones.hf import Backbone
from deepen.backbones.resolve import load
from deepen.checkpoint import save_adapter
from deepen.core import registry
from deepen.core.errors import CannotScore, ConfigError, DeepenError
from deepen.core.types import Batch, Score
from deepen.data.batches import batch_of
from deepen.data.split import split_of
from deepen.data.tokenizer import BOS_ID, VOCAB_SIZE, byte_tokenizer
from deepen.evaluate.scoring import FIRST_SCORED, evaluate, require_causal
from deepen.evaluate.stages import StageConfig, run_stage

DROPPED_IN = Path(__file__).parents[1] / "contract" / "dropped_in"
TOKENIZER = byte_tokenizer()
TABLE = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)).log_softmax(dim=-1)
rows_of_length = st.builds(
    lambda length, seed: torch.randint(0, 128, (length,), generator=torch.Generator().manual_seed(seed)).tolist(),
    st.integers(1, 60),
    st.integers(0, 2**31),
)
documents = st.builds(
    lambda before, long, behind: [*before, long, *behind],
    st.lists(rows_of_length, max_size=3),
    rows_of_length.map(lambda row: [*range(FIRST_SCORED), *row]),
    st.lists(rows_of_length, max_size=3),
)


def by_bigram(batch: Batch) -> Score:
    """A leak-free scorer: each token from the one before it."""
    ids = batch.input_ids
    predictions = TABLE[ids[:, :-1]]
    scored = torch.arange(ids.shape[1]) < batch.lengths[:, None]
    scored[:, 0] = False
    log_probs, correct = torch.zeros(ids.shape), torch.zeros(ids.shape, dtype=torch.bool)
    log_probs[:, 1:] = predictions.gather(2, ids[:, 1:, None])[..., 0]
    correct[:, 1:] = predictions.argmax(dim=-1) == ids[:, 1:]
    return Score(log_probs * scored, scored, correct & scored)


def document(length: int = 60, seed: int = 0) -> list[int]:
    return torch.randint(97, 123, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def figures(*rows, **options):
    return evaluate(by_bigram, [batch_of([row]) for row in rows], tokenizer=TOKENIZER, **options)


class TestFigures:
    @given(documents)
    def test_they_are_those_of_a_plain_loop(self, rows):
        nll, num_correct, num_tokens = 0.0, 0, 0
        for row in rows:
            for before, after in list(pairwise(row))[FIRST_SCORED - 1 :]:
                nll -= float(TABLE[before, after])
                num_correct += int(TABLE[before].argmax()) == after
                num_tokens += 1
        found = figures(*rows)
        assert found["num_tokens"] == found["num_bytes"] == num_tokens
        assert found["num_documents"] == sum(len(row) > FIRST_SCORED for row in rows)
        assert found["nll"] == pytest.approx(nll / num_tokens, rel=1e-9)
        assert found["perplexity"] == pytest.approx(math.exp(nll / num_tokens), rel=1e-9)
        assert found["bits_per_byte"] == pytest.approx(nll / math.log(2) / num_tokens, rel=1e-9)
        assert found["token_accuracy"] == num_correct / num_tokens
        assert found["largest_move"] == 0.0

    @given(documents)
    def test_batches_make_no_difference(self, rows):
        assert evaluate(by_bigram, [batch_of(rows)], tokenizer=TOKENIZER) == figures(*rows)

    def test_the_mean_is_over_tokens_not_over_documents(self):
        short, long = document(40, seed=1), document(300, seed=2)
        found = figures(short, long)
        parts = [figures(row) for row in (short, long)]
        weighted = sum(part["nll"] * part["num_tokens"] for part in parts) / sum(part["num_tokens"] for part in parts)
        assert found["nll"] == pytest.approx(weighted, rel=1e-12)

    @pytest.mark.parametrize(
        ("text", "num_bytes"),
        [
            ("a" * 20 + "é" * 10, 8),  # tokens 32 to 39 are four whole characters
            ("a" * 31 + "é" * 4, 8),  # token 32 completes a character that token 31 began
            ("a" * 36 + "é", 6),
        ],
    )
    def test_bytes_are_those_of_the_scored_text(self, text, num_bytes):
        assert figures(list(text.encode()))["num_bytes"] == num_bytes

    def test_a_special_token_is_no_text(self):
        row = document(40)
        found = figures([BOS_ID, *row])
        assert found["num_tokens"] == found["num_bytes"] == 9

    def test_a_character_that_was_cut_off_is_not_counted(self):
        row = list(("a" * 39 + "é").encode())[:40]
        assert figures(row)["num_bytes"] == 7

    def test_progress_counts_all_tokens(self):
        done = []
        figures(document(40), document(50), advance=done.append)
        assert done == [40, 50]

    def test_nothing_long_enough_is_told(self):
        with pytest.raises(CannotScore, match="no document has more than 32 tokens, where scoring starts"):
            figures(document(32))

    def test_what_is_not_finite_is_told(self):
        def broken(batch):
            score = by_bigram(batch)
            return Score(torch.where(score.scored, -1e4, 0.0), score.scored, score.correct)

        with pytest.raises(CannotScore, match=r"the mean negative log-probability is 10000\.0"):
            evaluate(broken, [batch_of([document()])], tokenizer=TOKENIZER)


class TestInterval:
    ROWS = tuple(document(33 + seed % 9, seed=seed) for seed in range(30))

    def test_it_holds_the_mean_and_the_seed_decides_it(self):
        one, two, other = (figures(*self.ROWS, seed=seed) for seed in (0, 0, 1))
        low, high = one["nll_interval_95"]
        assert low < one["nll"] < high
        assert one == two
        assert one["nll_interval_95"] != other["nll_interval_95"]

    def test_it_is_that_of_resampled_documents(self):
        nlls, tokens = [], []
        for row in self.ROWS:
            alone = figures(row)
            nlls.append(alone["nll"] * alone["num_tokens"])
            tokens.append(alone["num_tokens"])
        generator = torch.Generator().manual_seed(99)
        means = []
        for _ in range(4000):
            drawn = torch.randint(len(nlls), (len(nlls),), generator=generator).tolist()
            means.append(sum(nlls[i] for i in drawn) / sum(tokens[i] for i in drawn))
        means.sort()
        low, high = figures(*self.ROWS)["nll_interval_95"]
        width = means[3900] - means[99]
        assert low == pytest.approx(means[99], abs=0.1 * width)
        assert high == pytest.approx(means[3900], abs=0.1 * width)

    def test_one_document_has_none(self):
        assert figures(document())["nll_interval_95"] is None


def changed(score: Score, **fields: torch.Tensor) -> Score:
    return replace(score, **fields)


def pooling_the_future(batch):
    """Each log-probability takes a little of the mean of all ids, those to come included."""
    score = by_bigram(batch)
    return changed(score, log_probs=score.log_probs - batch.input_ids.double().mean() * 1e-3 * score.scored)


def reading_one_ahead(batch):
    """Token t is predicted by someone who has read it."""
    score = by_bigram(batch)
    return changed(score, log_probs=score.log_probs * 0.01)


def always_right(batch):
    score = by_bigram(batch)
    return changed(score, correct=score.scored)


def skipping_what_an_odd_id_follows(batch):
    score = by_bigram(batch)
    skipped = torch.nn.functional.pad(batch.input_ids[:, 1:] % 2 == 1, (0, 1))
    return changed(score, scored=score.scored & ~skipped)


def no_number(batch):
    score = by_bigram(batch)
    return changed(score, log_probs=score.log_probs * math.nan)


class TestGuard:
    @pytest.mark.parametrize(
        ("scorer", "message"),
        [
            (pooling_the_future, r"token \d+ was changed, and a log-probability before it moved by 0\.\d+"),
            (reading_one_ahead, r"3 different tokens in place \d+ have probabilities that sum to 2\.\d+"),
            (always_right, "3 of them are the most probable"),
            (skipping_what_an_odd_id_follows, r"which tokens it scores before token \d+ depends on that token"),
            (no_number, "moved by nan"),
        ],
    )
    def test_a_scorer_that_peeks_gives_no_figure(self, scorer, message):
        row = [*range(60), 0]
        with pytest.raises(CannotScore, match=f"the scorer leaks: .*{message}"):
            evaluate(scorer, [batch_of([row])], tokenizer=TOKENIZER)

    @pytest.mark.parametrize(("size", "passes"), [(1e-6, True), (1e-4, False)])
    def test_rounding_is_no_leak(self, size, passes):
        def rounded(batch):
            score = by_bigram(batch)
            noise = (batch.input_ids.sum() % 7) * size * score.scored
            return changed(score, log_probs=score.log_probs - noise)

        row = document()
        if passes:
            assert 0 < require_causal(rounded, row) <= 1e-5
        else:
            with pytest.raises(CannotScore, match="the scorer leaks"):
                require_causal(rounded, row)

    def test_a_causal_scorer_passes_on_any_row(self):
        for length in (2, 3, 33, 96):
            assert require_causal(by_bigram, document(length)) == 0.0

    def test_it_is_asked_before_anything_is_scored(self):
        lengths = []

        def watched(batch):
            lengths.append(batch.input_ids.shape[1])
            return pooling_the_future(batch)

        with pytest.raises(CannotScore):
            evaluate(watched, [batch_of([document(300)])], tokenizer=TOKENIZER)
        assert max(lengths) < 100


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> Path:
    """A file with documents for each split; the toy method is there as well."""
    monkeypatch.setattr(deepen.methods, "__path__", [*deepen.methods.__path__, str(DROPPED_IN)])
    texts = [f"Document {number} has something to say about the number {number * 7}." for number in range(400)]
    assert {split_of(text) for text in texts} == {"train", "validation", "test"}
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.fixture
def stage(corpus, tmp_path) -> StageConfig:
    return StageConfig(
        model="tiny:llama", stage="baseline", data=str(corpus), max_tokens=120, output_dir=str(tmp_path / "results")
    )


@pytest.fixture
def adapter(corpus, tmp_path) -> Path:
    """An untrained toy on tiny:llama."""
    method, loaded = registry.get("toy"), load("tiny:llama")
    backbone = Backbone.attach(loaded.model)
    model = method.load_model_type().build(method.load_config("small"), backbone, backbone.vocab_size)
    save_adapter(tmp_path / "adapter", method=method, model=model, identity=loaded.identity)
    return tmp_path / "adapter"


class TestStages:
    def test_a_file_says_what_was_measured(self, stage, corpus):
        done = []
        results, path = run_stage(stage, advance=done.append)
        assert path == Path(stage.output_dir) / "baseline_results.json"
        assert json.loads(path.read_text()) == json.loads(json.dumps(results))
        assert results["stage"] == "baseline" and results["seed"] == 0
        assert results["config"] == {**stage.to_dict(), "max_length": 512}
        assert results["base"]["address"] == "tiny:llama" and len(results["base"]["fingerprint"]) == 64
        assert results["method"] is None and results["method_config"] is None
        assert results["data"] == {"corpus": str(corpus), "split": "test", "first_scored_token": FIRST_SCORED}
        assert results["figures"]["num_documents"] == sum(length > FIRST_SCORED for length in done)
        assert sum(done) == 120

    def test_after_surgery_is_the_adapter_and_baseline_its_base(self, stage, adapter):
        plain, _ = run_stage(stage)
        base, _ = run_stage(replace(stage, model=str(adapter)))
        grafted, path = run_stage(replace(stage, model=str(adapter), stage="after_surgery"))
        assert base["figures"] == plain["figures"] and base["base"] == plain["base"]
        assert path.name == "after_surgery_results.json"
        assert grafted["method"] == "toy"
        assert grafted["method_config"] == {"width": 8, "num_recursions": 2}
        assert grafted["figures"]["nll"] == pytest.approx(base["figures"]["nll"], abs=1e-6)

    def test_a_plain_base_has_no_surgery_behind_it(self, stage):
        with pytest.raises(CannotScore, match="tiny:llama is a plain base model; stage after_surgery measures"):
            run_stage(replace(stage, stage="after_surgery"))

    @pytest.mark.parametrize("name", ["finetuned_vanilla", "finetuned_recursive"])
    def test_stages_of_training_are_refused(self, stage, name):
        with pytest.raises(ConfigError, match=f"stage {name} needs the training stages, which are not part of this"):
            run_stage(replace(stage, stage=name))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"stage": "basline"}, 'unknown stage "basline"; did you mean "baseline"'),
            ({"split": "dev"}, "split must be train, validation, or test"),
            ({"max_tokens": 32}, "max_tokens must be above 32, where scoring starts, not 32"),
            ({"max_length": 5}, "max_length must be above 32"),
            ({"seed": -1}, "seed must be between 0"),
            ({"model": ""}, "model must not be empty"),
        ],
    )
    def test_impossible_wishes_are_refused(self, stage, fields, message):
        with pytest.raises(ConfigError, match=message):
            run_stage(replace(stage, **fields))

    def test_a_split_without_documents_says_which_have_some(self, stage, corpus):
        text = "a document of more than thirty-two bytes"
        corpus.write_text(json.dumps({"text": text}))
        found = split_of(text)
        other = "test" if found != "test" else "train"
        with pytest.raises(DeepenError, match=f'no document in split "{other}"; it has 1 in {found}'):
            run_stage(replace(stage, split=other))
