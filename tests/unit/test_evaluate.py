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
from plain_answer import plain_answer

import deepen.methods
from deepen.backbones.costs import pass_flops, row_state_bytes
from deepen.backbones.hf import Backbone
from deepen.backbones.resolve import load
from deepen.checkpoint import open_model, save_adapter
from deepen.core import registry
from deepen.core.errors import CannotScore, ConfigError, DeepenError
from deepen.core.types import Advance, Batch, RowAdvance, Score, Spent
from deepen.data.batches import batch_of
from deepen.data.split import split_of
from deepen.data.tokenizer import BOS_ID, VOCAB_SIZE, byte_tokenizer
from deepen.evaluate import stages
from deepen.evaluate.metrics import ANSWER_METRICS, generation_figures
from deepen.evaluate.prompts import PROMPTS
from deepen.evaluate.recording import judged_by_place, pass_widths, passes_by_source
from deepen.evaluate.results import Answer, StageResults
from deepen.evaluate.scoring import FIRST_SCORED, document_id, measure, require_causal
from deepen.evaluate.sources import counted_passes, price, regret
from deepen.evaluate.speed import Answered, Timing
from deepen.evaluate.stages import StageConfig, run_stage
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.scoring import score_at_once
from deepen.generate.stop import StopConfig

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
    return measure(by_bigram, [batch_of([row]) for row in rows], tokenizer=TOKENIZER, **options).figures


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

    def test_documents_keep_their_difficulty_and_no_scorer_is_told_it(self):
        batch = batch_of([document(40), document(50), document(60)])
        told = torch.tensor([[3], [0], [2]]).expand(-1, batch.input_ids.shape[1])
        seen = []

        def score(given):
            seen.append(given.difficulty)
            return by_bigram(given)

        found = measure(score, [replace(batch, difficulty=told)], tokenizer=TOKENIZER)
        assert [each.difficulty for each in found.documents] == [3, None, 2]
        assert set(seen) == {None}

    @given(documents)
    def test_batches_make_no_difference(self, rows):
        assert measure(by_bigram, [batch_of(rows)], tokenizer=TOKENIZER).figures == figures(*rows)

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

    @pytest.mark.parametrize("first", [1, 10, 32, 50])
    def test_scoring_starts_where_it_is_asked_to(self, first):
        row = document(60)
        found = figures(row, first_scored=first)
        nll = -sum(float(TABLE[before, after]) for before, after in list(pairwise(row))[first - 1 :])
        assert found["num_tokens"] == 60 - first
        assert found["nll"] == pytest.approx(nll / (60 - first), rel=1e-9)

    def test_the_guard_row_reaches_a_late_start(self):
        row = document(200)
        assert figures(row, first_scored=150)["num_tokens"] == 50
        with pytest.raises(CannotScore, match="the scorer leaks"):
            measure(reading_one_ahead, [batch_of([row])], tokenizer=TOKENIZER, first_scored=150)
        with pytest.raises(CannotScore, match="no document has more than 200 tokens, where scoring starts"):
            figures(row, first_scored=200)

    @given(documents)
    def test_documents_add_up_to_the_figures(self, rows):
        measured = measure(by_bigram, [batch_of([row]) for row in rows], tokenizer=TOKENIZER)
        found = measured.figures
        assert sum(d.nll for d in measured.documents) / found["num_tokens"] == pytest.approx(found["nll"], rel=1e-12)
        for name in ("num_tokens", "num_bytes"):
            assert sum(getattr(d, name) for d in measured.documents) == found[name]
        assert sum(d.num_correct for d in measured.documents) == found["token_accuracy"] * found["num_tokens"]
        assert [d.id for d in measured.documents] == [document_id(row) for row in rows if len(row) > FIRST_SCORED]

    def test_an_id_is_that_of_every_token_read(self):
        row = document(60)
        assert document_id(row) == document_id(list(row)) != document_id(row[:-1])
        assert document_id([11, 2]) != document_id([1, 12])
        assert document_id([row[0] + 1, *row[1:]]) != document_id(row)

    def test_nothing_scored_at_all_is_told(self):
        def silent(batch):
            score = by_bigram(batch)
            return Score(score.log_probs * 0, torch.zeros_like(score.scored), score.correct)

        with pytest.raises(CannotScore, match="no log-probability for any token from 32 on"):
            measure(silent, [batch_of([document()])], tokenizer=TOKENIZER)

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
            measure(broken, [batch_of([document()])], tokenizer=TOKENIZER)


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
            measure(scorer, [batch_of([row])], tokenizer=TOKENIZER)

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
            measure(watched, [batch_of([document(300)])], tokenizer=TOKENIZER)
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
        model="tiny:llama",
        stage="baseline",
        data=str(corpus),
        max_tokens=120,
        max_new_tokens=0,
        output_dir=str(tmp_path / "results"),
    )


@pytest.fixture
def adapter(corpus, tmp_path) -> Path:
    """An untrained toy on tiny:llama."""
    method, loaded = registry.get("toy"), load("tiny:llama")
    backbone = Backbone.attach(loaded.model)
    model = method.load_model_type().build(method.load_config("small"), backbone, backbone.vocab_size)
    save_adapter(tmp_path / "adapter", method=method, model=model, identity=loaded.identity)
    return tmp_path / "adapter"


def grafted_chunk(folder: Path, base: str, **settings) -> Path:
    """A small untrained sidecar."""
    method, loaded = registry.get("chunk"), load(base)
    small = {"chunk_width": 8, "max_chunk_len": 8, "d_state": 8, "gate_hidden": 8}
    config = replace(method.load_config("after_surgery"), **(small | settings))
    backbone = Backbone.attach(loaded.model)
    model = method.load_model_type().build(config, backbone, backbone.vocab_size)
    save_adapter(folder / "chunk", method=method, model=model, identity=loaded.identity)
    return folder / "chunk"


class TestStages:
    def test_a_file_says_what_was_measured(self, stage, corpus):
        done = []
        results, path = run_stage(stage, advance=done.append)
        assert path == Path(stage.output_dir) / "baseline_results.json"
        assert json.loads(path.read_text()) == json.loads(json.dumps(results))
        assert StageResults.read(path) == StageResults.from_dict(results)
        assert results["answers"] == [] and results["generation"] is None and results["speed"] is None
        assert results["seconds"].keys() == {"loading", "scoring", "answers", "checks"}
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
        # To the last bit: both are read in passes whose width makes no difference.
        assert grafted["documents"] == base["documents"]
        assert grafted["checks"] == {"pass_width_difference": 0.0, "own_forward_difference": None}

    def test_a_baseline_is_what_the_models_own_forward_says(self, stage, corpus):
        results, _ = run_stage(stage)
        opened = open_model("tiny:llama")
        texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
        rows = [list(text.encode()) for text in texts if split_of(text) == "test"]
        cut = [row[: max(0, 120 - sum(map(len, rows[:number])))] for number, row in enumerate(rows)]
        own = measure(
            lambda batch: score_at_once(opened.backbone, batch),
            [batch_of([row]) for row in cut if row],
            tokenizer=opened.tokenizer,
        )
        assert [d["id"] for d in results["documents"]] == [d.id for d in own.documents]
        assert results["figures"]["nll"] == pytest.approx(own.figures["nll"], abs=1e-6)
        assert 0 <= results["checks"]["own_forward_difference"] < 1e-4

    def test_documents_can_be_counted_out(self, stage):
        done = []
        results, _ = run_stage(replace(stage, max_samples=1, first_scored=5), advance=done.append)
        assert len(done) == 1 and results["data"]["first_scored_token"] == 5
        assert results["documents"][0]["num_tokens"] == done[0] - 5

    @pytest.mark.parametrize("commit_mode", ["exact", "refined"])
    def test_documents_that_are_read_together_have_the_scores_that_they_have_alone(self, stage, tmp_path, commit_mode):
        folder = grafted_chunk(tmp_path, "tiny:llama", commit_mode=commit_mode)
        of_adapter = replace(stage, model=str(folder), stage="after_surgery", max_tokens=240, max_new_tokens=0)
        done = []
        alone, _ = run_stage(of_adapter)
        together, _ = run_stage(replace(of_adapter, batch_size=2), advance=done.append)
        assert len(alone["documents"]) > 2 and len(done) < len(alone["documents"])
        for one, other in zip(alone["documents"], together["documents"], strict=True):
            assert {**other, "nll": pytest.approx(one["nll"], rel=1e-5)} == one

    def test_a_method_may_promise_the_base(self, stage, tmp_path):
        folder = grafted_chunk(tmp_path, "tiny:llama")
        results, _ = run_stage(replace(stage, model=str(folder), stage="after_surgery", max_tokens=60))
        assert results["exact"] is True
        assert results["method_config"]["d_state"] == 8

    @pytest.mark.parametrize("name", ["baseline", "after_surgery"])
    def test_neither_a_base_nor_a_refined_sidecar_promises_it(self, stage, tmp_path, name):
        folder = grafted_chunk(tmp_path, "tiny:llama", commit_mode="refined")
        results, _ = run_stage(replace(stage, model=str(folder), stage=name, max_tokens=60, max_new_tokens=0))
        assert results["exact"] is False

    def test_a_failure_in_timing_loses_nothing(self, stage, monkeypatch):
        def fail(*_, **__):
            raise RuntimeError("no clock")

        monkeypatch.setattr(stages, "PROMPTS", PROMPTS[:1])
        monkeypatch.setattr(stages, "time_paths", fail)
        with pytest.raises(RuntimeError, match="no clock"):
            run_stage(replace(stage, max_new_tokens=2, speed=True))
        found = StageResults.read(Path(stage.output_dir) / "baseline_results.json")
        assert found.speed is None and len(found.answers) == 1

    @pytest.mark.parametrize("place", ["junk", "junk/x", "junk/x/y"])
    def test_a_place_that_cannot_be_written_is_told_before_anything_is_loaded(self, stage, tmp_path, place):
        (tmp_path / "junk").write_text("before")
        with pytest.raises(DeepenError, match=r"can't write .*junk.*: Not a directory"):
            run_stage(replace(stage, model="no-such-model", output_dir=str(tmp_path / place)))
        assert (tmp_path / "junk").read_text() == "before"

    def test_a_folder_in_the_files_place_is_told(self, stage, tmp_path):
        (tmp_path / "baseline_results.json").mkdir()
        with pytest.raises(DeepenError, match=r"can't write .*baseline_results\.json: it is a folder"):
            run_stage(replace(stage, model="no-such-model", output_dir=str(tmp_path)))

    def test_looking_whether_a_place_can_be_written_leaves_nothing_there(self, stage, tmp_path):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(DeepenError, match="no-such-model"):
            run_stage(replace(stage, model="./no-such-model", output_dir=str(tmp_path / "new" / "results")))
        assert sorted(tmp_path.iterdir()) == before

    def test_a_plain_base_has_no_surgery_behind_it(self, stage):
        with pytest.raises(CannotScore, match="tiny:llama is a plain base model; stage after_surgery measures"):
            run_stage(replace(stage, stage="after_surgery"))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"stage": "basline"}, 'unknown stage "basline"; did you mean "baseline"'),
            ({"split": "dev"}, "split must be train, validation, or test"),
            ({"max_tokens": 32}, "max_tokens must be above 32, where scoring starts, not 32"),
            ({"max_length": 5}, "max_length must be above 32"),
            ({"seed": -1}, "seed must be between 0"),
            ({"model": ""}, "model must not be empty"),
            ({"first_scored": 0}, "first_scored must be 1 or more, not 0"),
            ({"first_scored": 120}, "max_tokens must be above 120, where scoring starts"),
            ({"max_samples": 0}, "max_samples must be 1 or more"),
            ({"recursions": (2, 0)}, "recursions must be different numbers of at least 1, and 0 is not one of these"),
            ({"recursions": (2, 3, 2)}, "recursions must be different numbers of at least 1, and 2 is not one"),
            ({"batch_size": 0}, "batch_size must be 1 or more, not 0"),
            ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more"),
            ({"speed": True}, "speed times answers, and max_new_tokens 0 asks for none"),
            ({"rounds": 0}, "rounds must be 1 or more"),
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


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> tuple[dict, dict]:
    """Stages of a sidecar that copies, and of its base, with answers and timings."""
    folder = tmp_path_factory.mktemp("answered")
    corpus = folder / "corpus.txt"
    corpus.write_text("The answers are what counts here, not this text. " * 2)
    adapter = grafted_chunk(folder, "tiny:nanochat", draft="lookup")
    split = split_of(corpus.read_text())
    some = tuple(prompt for prompt in PROMPTS if prompt.name in ("moon", "primes", "letter", "report", "winter"))
    config = StageConfig(
        model=str(adapter),
        stage="baseline",
        data=str(corpus),
        split=split,
        max_tokens=60,
        max_new_tokens=24,
        output_dir=str(folder / "results"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "PROMPTS", some)
        before, _ = run_stage(config)
        after, _ = run_stage(replace(config, stage="after_surgery", speed=True, rounds=1))
    return before, after


class TestAnswers:
    def test_they_are_plain_decodings_and_tell_which_prompts_were_too_long(self, answered):
        before, after = answered
        opened = open_model("tiny:nanochat", pack=True)
        lengths = {prompt.name: len(prompt.encode(opened.tokenizer)) for prompt in PROMPTS}
        assert before["left_out"] == ["letter"] and lengths["letter"] + 24 > 512
        assert {answer["prompt"]: answer["num_prompt_tokens"] for answer in before["answers"]} == {
            name: lengths[name] for name in ("moon", "primes", "report", "winter")
        }
        stop = StopConfig(max_new_tokens=24, eos_ids=opened.eos_ids)
        by_name = {prompt.name: prompt for prompt in PROMPTS}
        for answer, copied in zip(before["answers"], after["answers"], strict=True):
            prompt = by_name[answer["prompt"]]
            ids = prompt.encode(opened.tokenizer)
            expected = complete(PlainDecoder(opened.backbone), [ids], stop=stop, tokenizer=opened.tokenizer)[0]
            assert answer["prompt"] == copied["prompt"] == prompt.name
            assert answer["tokens"] == copied["tokens"] == expected.tokens
            assert answer["text"] == copied["text"] == expected.text

    def test_plain_answers_cost_a_pass_a_token(self, answered):
        before, _ = answered
        opened = open_model("tiny:nanochat")
        for answer in before["answers"]:
            num = len(answer["tokens"])
            start = answer["num_prompt_tokens"] - 1
            assert answer["passes"] == answer["positions"] == num
            assert answer["commits"] == answer["passes_of_commits"] == [1] * num
            assert answer["passes_by_source"] == {"none": {"1": num}}
            assert answer["flops"] == sum(
                pass_flops(opened.backbone, num_positions=1, context=start + done) for done in range(num)
            )
        assert before["generation"]["tokens_per_pass"] == 1.0
        assert before["generation"]["acceptance"] is None

    def test_drafts_are_counted_by_source_and_place(self, answered):
        _, after = answered
        for answer in after["answers"]:
            assert sum(answer["commits"]) == len(answer["tokens"])
            assert sum(sum(widths.values()) for widths in answer["passes_by_source"].values()) == answer["passes"]
            widths = [int(width) * count for of in answer["passes_by_source"].values() for width, count in of.items()]
            assert sum(widths) == answer["positions"] == answer["passes"] + sum(answer["drafted"].values())
        figures = after["generation"]
        assert figures["passes_by_source"].keys() == {"lookup", "none"}
        num_tokens = sum(len(answer["tokens"]) for answer in after["answers"])
        num_passes = sum(answer["passes"] for answer in after["answers"])
        num_accepted = sum(sum(answer["agreed"].get("lookup", [])) for answer in after["answers"])
        assert num_accepted > 0
        # Every pass commits what was accepted and one token more, but for an answer's last, which may end it earlier.
        assert num_tokens <= num_passes + num_accepted
        assert figures["tokens_per_pass"] == num_tokens / num_passes > 1
        assert figures["acceptance_by_source"]["lookup"] == num_accepted / figures["drafted"]["lookup"]
        assert sum(int(n) * count for n, count in figures["chunk_lengths"].items()) == num_tokens
        assert figures["passes_per_chunk"] == {"1": num_passes}

    def test_speed_has_a_line_for_each_domain_and_path(self, answered):
        before, after = answered
        assert before["speed"] is None
        lines = {(line["domain"], line["path"]): line for line in after["speed"]}
        assert {path for _, path in lines} == {"plain", "chunk"}
        for domain in {answer["domain"] for answer in after["answers"]}:
            of_domain = [answer for answer in after["answers"] if answer["domain"] == domain]
            num_tokens = sum(len(answer["tokens"]) for answer in of_domain)
            plain, ours = lines[domain, "plain"], lines[domain, "chunk"]
            assert plain["tokens"] == ours["tokens"] == num_tokens
            assert plain["tokens_per_pass"] == 1 and plain["against_plain"]["ratio"] == 1
            assert ours["tokens_per_pass"] == round(num_tokens / sum(answer["passes"] for answer in of_domain), 3)
            assert ours["ms_per_token"] > 0

    def test_the_ledger_counts_what_was_added(self, answered):
        before, after = (results["ledger"] for results in answered)
        opened = open_model("tiny:nanochat")
        adapter = open_model(answered[1]["config"]["model"]).model
        added = sum(tensor.numel() for tensor in adapter.saved_state().values())
        assert before["parameters_unique"] == sum(p.numel() for p in opened.backbone.model.parameters())
        assert before["parameters_added"] == before["parameters_trainable"] == 0
        assert after["parameters_added"] == added
        # Grafted and not to be trained: no phase was chosen.
        assert after["parameters_trainable"] == 0
        assert after["parameters_unique"] == before["parameters_unique"] + added
        for context in (0, 1024):
            flops = pass_flops(opened.backbone, num_positions=1, context=context)
            assert before[f"flops_per_token_at_{context}"] == flops
            state = row_state_bytes(opened.backbone, context=context)
            assert before[f"state_bytes_at_{context}"] == state
        assert before["peak_memory_bytes"] > 1e7

    def test_answers_have_their_ledger(self, answered):
        base = open_model("tiny:nanochat").backbone
        for results in answered:
            for each in results["answers"]:
                assert each["layer_applications"] == base.num_layers * each["positions"]
                read = each["num_prompt_tokens"] - 1
                passes = [(min(256, read - start), start) for start in range(0, read, 256)]
                assert each["prompt_flops"] == sum(
                    pass_flops(base, num_positions=width, context=context, num_logits=1) for width, context in passes
                )
            assert results["generation"]["prompt_flops_per_token"] > 0
        assert answered[0]["generation"]["layer_applications_per_token"] == base.num_layers


def advance(tokens: int, *, drafted: int = 0, accepted: int = 0, source: str = "ar", passes: int = 1, positions: int):
    row = RowAdvance(tuple(range(tokens)), drafted=drafted, accepted=accepted, source=source)
    return Advance((row,), Spent(passes, positions))


class TestRecording:
    ADVANCES = (
        advance(1, positions=1),
        advance(1, source="lookup", positions=1),
        advance(1, positions=9),
        advance(3, drafted=4, accepted=2, source="lookup", positions=5),
        advance(5, drafted=4, accepted=4, source="lookup", positions=5),
        advance(1, drafted=2, source="mask", positions=3),
    )

    def test_passes_by_source_and_width(self):
        assert passes_by_source(self.ADVANCES) == {
            "drafting": {9: 1},
            "lookup": {5: 2},
            "mask": {3: 1},
            "none": {1: 2},
        }

    def test_what_stands_behind_a_rejected_token_is_not_judged(self):
        judged, agreed = judged_by_place(self.ADVANCES)
        assert judged == {"lookup": (2, 2, 2, 1), "mask": (1,)}
        assert agreed == {"lookup": (2, 2, 1, 1), "mask": (0,)}

    def test_passes_of_one_advance_are_about_equally_wide(self):
        assert pass_widths(advance(4, passes=3, positions=8)) == [3, 3, 2]
        assert pass_widths(advance(1, passes=0, positions=0)) == []


def answer(tokens, **fields) -> Answer:
    return plain_answer(tokens, **({"seconds": 2.0, "flops": 10 * len(tokens)} | fields))


class TestGenerationFigures:
    def test_by_hand(self):
        looping = answer([1, 2, 1, 2, 1, 2], passes=2, positions=8, commits=(4, 2), passes_of_commits=(1, 1))
        varied = answer(
            [1, 2, 3, 4],
            drafted={"lookup": 6},
            judged={"lookup": (2, 1)},
            agreed={"lookup": (1, 1)},
            p_commit=(0.9, 0.5),
        )
        found = generation_figures([looping, varied], commit_threshold=0.7)
        assert found["num_answers"] == 2 and found["num_tokens"] == 10 and found["mean_length"] == 5
        assert found["tokens_per_pass"] == 10 / 6 and found["positions_per_token"] == 12 / 10
        assert found["tokens_per_second"] == 10 / 4 and found["decode_flops_per_token"] == 10
        assert found["layer_applications_per_token"] is None and found["prompt_flops_per_token"] is None
        assert found["avg_chunk_length"] == 10 / 6 and found["avg_refine_steps"] == 1
        assert found["distinct_1"] == (2 + 4) / 10
        assert found["distinct_2"] == (2 + 3) / 8
        assert found["distinct_3"] == (2 + 2) / 6
        assert found["repetition"] == 1 / 4
        assert found["acceptance"] == found["acceptance_by_source"]["lookup"] == 2 / 6
        assert found["acceptance_by_place"] == {"lookup": [0.5, 1.0]}
        assert found["commit_rate"] == 0.5 and found["mean_p_commit"] == 0.7
        assert found["chunk_lengths"] == {"1": 4, "2": 1, "4": 1}

    def test_what_files_of_earlier_versions_lack_is_left_out(self):
        told = replace(answer([7, 8]), layer_applications=12, prompt_flops=90, num_prompt_tokens=3)
        found = generation_figures([answer([7, 8, 9]), told])
        assert found["layer_applications_per_token"] == 6 and found["prompt_flops_per_token"] == 30
        before = StageResults.read("benchmarks/results/stages/exact/baseline_results.json")
        assert all(each.layer_applications is each.prompt_flops is None for each in before.answers)

    def test_what_never_happened_is_none(self):
        found = generation_figures([answer([7])])
        for name in ("acceptance", "mean_p_commit", "commit_rate", "distinct_2", "repetition"):
            assert found[name] is None
        assert {metric.name for metric in ANSWER_METRICS} < found.keys()


def timing(tokens: int, passes: dict[str, dict[int, int]]) -> Timing:
    count = sum(sum(widths.values()) for widths in passes.values())
    return Timing(Answered(list(range(tokens)), count, passes), [1.0])


class TestSources:
    PRICES = {1: 1.0, 4: 1.25, 8: 1.5}  # noqa: RUF012
    TIMINGS = (
        {
            "plain": timing(10, {"none": {1: 10}}),
            "copy": timing(10, {"lookup": {8: 2}, "none": {1: 2}}),
            "auto": timing(10, {"lookup": {4: 2}, "none": {1: 3}}),
            "foreign": Timing(Answered(list(range(10)), None), [1.0]),
        },
        {
            "plain": timing(6, {"none": {1: 6}}),
            "copy": timing(6, {"lookup": {8: 6}}),
            "auto": timing(6, {"none": {1: 6}}),
            "foreign": Timing(Answered(list(range(6)), None), [1.0]),
        },
    )

    @pytest.mark.parametrize(
        ("width", "expected"), [(1, 1.0), (4, 1.25), (2, 1 + 0.25 / 3), (6, 1.375), (8, 1.5), (16, 3.0)]
    )
    def test_prices_lie_on_lines_between_those_measured(self, width, expected):
        assert price(width, self.PRICES) == pytest.approx(expected)

    def test_passes_are_counted_and_priced(self):
        found = counted_passes(self.TIMINGS, self.PRICES, path="copy")
        assert found["passes_by_source"] == {"lookup": 8, "none": 2}
        assert found["tokens"] == 16 and found["priced_passes"] == 8 * 1.5 + 2
        assert found["tokens_per_priced_pass"] == 16 / 14
        assert counted_passes(self.TIMINGS, self.PRICES, path="plain")["tokens_per_priced_pass"] == 1
        assert counted_passes(self.TIMINGS, self.PRICES, path="foreign")["tokens_per_priced_pass"] is None

    def test_regret_is_against_the_best_fixed_source_of_these_prompts(self):
        copied, prose = self.TIMINGS[:1], self.TIMINGS[1:]
        lost = regret(copied, self.PRICES, path="auto", fixed=("plain", "copy", "foreign"))
        assert lost["best_fixed"] == "copy" and lost["regret"] == pytest.approx(5.5 / 5 - 1)
        kept = regret(prose, self.PRICES, path="auto", fixed=("plain", "copy"))
        assert kept["best_fixed"] == "plain" and kept["regret"] == 0
        won = regret(self.TIMINGS, self.PRICES, path="auto", fixed=("plain", "copy"))
        assert won["best_fixed"] == "copy" and won["regret"] == pytest.approx(11.5 / 14 - 1)

    def test_without_passes_there_is_none(self):
        assert regret(self.TIMINGS, self.PRICES, path="foreign", fixed=("plain",))["regret"] is None
