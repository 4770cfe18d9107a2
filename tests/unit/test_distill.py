"""A model's own answers as a corpus: whose they are, how they are read again, and a file that was cut off."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.backbones.new import new_tokenizer
from deepen.checkpoint import open_model, save_adapter
from deepen.core.errors import ConfigError, DeepenError
from deepen.core.registry import get
from deepen.data.encoding import encode
from deepen.data.formats import Tokens, document_of
from deepen.data.loader import Loader
from deepen.data.records import Record, read_records
from deepen.data.split import split_of_record
from deepen.data.tokenizer import EOS_ID, PAD_ID, byte_tokenizer
from deepen.data.vocabulary import tokenizer_fingerprint
from deepen.evaluate.agreement import NEAR_TIE_MARGIN, compare
from deepen.train import distill as module
from deepen.train.config import RunConfig
from deepen.train.distill import DistillConfig, distill
from deepen.train.run import rows_of_run, train
from deepen.train.samples import beginning
from deepen.train.trainee import open_trainee

TOKENIZER = byte_tokenizer()
DIGEST = tokenizer_fingerprint(TOKENIZER)
NUM_NEW = 12
NUM_PROMPTS = 7


@pytest.fixture
def config(tmp_path) -> DistillConfig:
    texts = [f"Document {n} says that {n} is less than {n + 1}, and much else." for n in range(20)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return DistillConfig(
        model="tiny:llama", data=str(tmp_path / "corpus.jsonl"), out=str(tmp_path / "own.jsonl"),
        num_prompts=NUM_PROMPTS, max_new_tokens=NUM_NEW, batch_size=3, prompt_tokens=20,
    )  # fmt: skip


def records_in(path: str | Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def adapter(folder: Path) -> Path:
    """An exact adapter of tiny:llama."""
    base, method = open_model("tiny:llama"), get("chunk")
    values = {"recursive_enabled": True, "chunk_width": 8, "max_chunk_len": 8, "d_state": 8, "gate_hidden": 8}
    settings = method.load_config_type().from_dict({**values, "draft": "lookup"}, source="test")
    model = method.load_model_type().build(settings, base.backbone, base.backbone.vocab_size)
    save_adapter(folder, method=method, model=model, identity=base.identity)
    return folder


class TestAnswers:
    def test_they_are_what_the_model_generates(self, config):
        distilled = distill(config)
        reference = tiny.build("llama")
        records = records_in(config.out)
        assert len(records) == NUM_PROMPTS and distilled.num_made == NUM_PROMPTS
        for record in records:
            prompt = torch.tensor([record["prompt_ids"]])
            generated = reference.generate(
                prompt, do_sample=False, max_new_tokens=NUM_NEW, eos_token_id=EOS_ID, pad_token_id=PAD_ID
            )
            theirs = generated[0, prompt.shape[1] :].tolist()
            verdict = compare(Backbone.attach(reference), record["prompt_ids"], record["response_ids"], theirs)
            assert verdict.equal or verdict.margin < NEAR_TIE_MARGIN, verdict
            assert record["reason"] == ("eos" if theirs[-1] == EOS_ID else "length")
            assert record["response_text"] == TOKENIZER.decode(record["response_ids"], skip_special_tokens=True)
            assert record["prompt_text"] == TOKENIZER.decode(record["prompt_ids"])

    def test_prompts_are_beginnings_of_different_training_documents_drawn_by_the_seed(self, config):
        distill(config)
        texts = {
            json.loads(line)["text"]
            for line in Path(config.data).read_text().splitlines()
            if split_of_record(Record(json.loads(line), "")) == "train"
        }
        asked = [record["prompt_text"] for record in records_in(config.out)]
        assert set(asked) <= {text[:20] for text in texts} and len(asked) == NUM_PROMPTS
        other = replace(config, seed=1, out=str(Path(config.out).with_name("other.jsonl")))
        distill(other)
        assert asked != [record["prompt_text"] for record in records_in(other.out)]

    def test_of_a_conversation_the_prompt_is_what_is_asked(self, config):
        Path(config.data).write_text(json.dumps({"question": "What is it?", "answer": "A lamp."}))
        distill(replace(config, num_prompts=None))
        (record,) = records_in(config.out)
        turn = [{"role": "user", "content": "What is it?"}]
        framed = TOKENIZER.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        assert record["prompt_ids"] == TOKENIZER.encode(framed, add_special_tokens=False)

    def test_a_prompt_without_an_answer_is_answered(self, config):
        Path(config.data).write_text(json.dumps({"prompt": "What is it?"}))
        distill(replace(config, num_prompts=None))
        (record,) = records_in(config.out)
        turn = [{"role": "user", "content": "What is it?"}]
        framed = TOKENIZER.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        assert record["prompt_ids"] == TOKENIZER.encode(framed, add_special_tokens=False)

    def test_an_exact_adapter_answers_as_its_base(self, config, tmp_path):
        config = replace(config, max_new_tokens=48)
        plain = distill(config)
        grafted = replace(config, model=str(adapter(tmp_path / "adapter")), out=str(tmp_path / "adapter.jsonl"))
        drafted = distill(grafted)
        assert Path(grafted.out).read_bytes() == Path(config.out).read_bytes()
        assert plain.tokens_per_pass == 1.0 < drafted.tokens_per_pass

    def test_what_does_not_fit_is_left_out_and_told(self, config):
        context = open_model("tiny:llama").backbone.context_length
        lines = Path(config.data).read_text().splitlines()[:4]
        lines.append(json.dumps({"text": "long " * context}))
        Path(config.data).write_text("\n".join(lines))
        with pytest.warns(UserWarning, match="1 prompts were left out, as they don't fit"):
            distill(replace(config, prompt_tokens=context, num_prompts=None))
        assert 1 <= len(records_in(config.out)) <= 4
        with pytest.raises(DeepenError, match=r"none fits into the model's context of \d+ tokens"):
            distill(replace(config, max_new_tokens=context, out=config.out.replace("own", "none")))

    def test_fewer_documents_than_prompts_are_told(self, config):
        with pytest.warns(UserWarning, match="num_prompts is 50, and .* has"):
            distill(replace(config, num_prompts=50))

    def test_figures_are_over_the_file(self, config):
        distilled = distill(config)
        answers = [record["response_ids"] for record in records_in(config.out)]
        pairs = [list(pairwise(ids)) for ids in answers]
        assert distilled.figures["num_tokens"] == sum(map(len, answers))
        assert distilled.figures["distinct_2"] == sum(len(set(each)) for each in pairs) / sum(map(len, pairs))
        assert sum(distilled.reasons.values()) == distilled.figures["num_answers"] == NUM_PROMPTS

    def test_answers_that_loop_are_counted(self, config, monkeypatch):
        loops = iter([[5, 6] * 6, list(range(12)), [7] * 12])

        def looping(opened, batch, settings):
            return [replace(result, tokens=next(loops)) for result in real(opened, batch, settings)]

        real = module._answers
        monkeypatch.setattr(module, "_answers", looping)
        assert distill(replace(config, num_prompts=3)).figures["num_repeating"] == 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"out": "own.txt"}, "out must be a file whose name ends in .jsonl"),
            ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
            ({"num_prompts": 0}, "num_prompts must be at least 1, not 0"),
            ({"seed": -1}, "seed must be between"),
            ({"data": ""}, "data must not be empty"),
        ],
    )
    def test_settings_that_cannot_be(self, config, change, message):
        with pytest.raises(ConfigError, match=message):
            distill(replace(config, **change))


class TestGoingOn:
    @pytest.fixture
    def whole(self, config) -> bytes:
        distill(config)
        return Path(config.out).read_bytes()

    @pytest.mark.parametrize("torn", [0, 40], ids="{}".format)
    @pytest.mark.parametrize("num_lines", range(NUM_PROMPTS))
    def test_a_file_cut_off_anywhere_becomes_the_same(self, config, whole, num_lines, torn):
        lines = whole.splitlines(keepends=True)
        Path(config.out).write_bytes(b"".join(lines[:num_lines]) + lines[num_lines][:torn])
        shown = []

        @contextmanager
        def display(total):
            assert total == NUM_PROMPTS
            yield shown.append

        distilled = distill(config, display=display)
        assert Path(config.out).read_bytes() == whole
        num_kept = num_lines // config.batch_size * config.batch_size
        assert distilled.num_made == NUM_PROMPTS - num_kept and shown[0] == num_kept and sum(shown) == NUM_PROMPTS
        assert distilled.figures["num_answers"] == NUM_PROMPTS

    def test_a_call_that_breaks_leaves_whole_batches(self, config, whole, monkeypatch):
        before, real = Path(config.out), module._answers
        before.unlink()
        calls = []

        def breaking(*arguments):
            calls.append(arguments)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(module, "_answers", breaking)
        with pytest.raises(KeyboardInterrupt):
            distill(config)
        assert before.read_bytes() == b"".join(whole.splitlines(keepends=True)[: config.batch_size])
        distill(config)
        assert before.read_bytes() == whole

    def test_a_finished_file_is_left_as_it_is(self, config, whole, monkeypatch):
        def never(*arguments):
            raise AssertionError("a finished file asks the model for nothing")

        monkeypatch.setattr(module, "_answers", never)
        stamps = [path.stat().st_mtime_ns for path in (Path(config.out), Path(config.out + ".json"))]
        distilled = distill(config)
        assert distilled.num_made == 0 and distilled.tokens_per_pass is None
        assert distilled.figures["num_answers"] == NUM_PROMPTS
        assert stamps == [path.stat().st_mtime_ns for path in (Path(config.out), Path(config.out + ".json"))]

    @pytest.mark.parametrize(
        ("change", "field"),
        [
            ({"model": "tiny:llama?seed=2"}, "model"),
            ({"max_new_tokens": 11}, "max_new_tokens"),
            ({"batch_size": 4}, "batch_size"),
            ({"prompt_tokens": 19}, "prompt_tokens"),
            ({"seed": 1}, "seed"),
            ({"num_prompts": 6}, "num_prompts"),
            ({"dtype": "float64"}, "dtype"),
        ],
    )
    def test_other_settings_are_refused_by_name(self, config, whole, change, field):
        with pytest.raises(DeepenError, match=f"own.jsonl was made by other settings: {field} is .* choose another"):
            distill(replace(config, **change))
        assert Path(config.out).read_bytes() == whole

    def test_a_corpus_that_has_changed_is_refused(self, config, whole):
        content = Path(config.data).read_text()
        Path(config.data).write_text(content.replace("says", "said"))
        with pytest.raises(DeepenError, match="other settings: prompts is"):
            distill(config)

    def test_an_adapter_that_was_trained_since_is_refused(self, config, tmp_path):
        folder = adapter(tmp_path / "adapter")
        config = replace(config, model=str(folder), num_prompts=2)
        distill(config)
        opened = open_model(str(folder))
        changed = {name: tensor + 1 for name, tensor in opened.model.saved_state().items()}
        opened.model.load_saved_state(changed)
        save_adapter(folder, method=opened.method, model=opened.model, identity=opened.identity, replace=True)
        with pytest.raises(DeepenError, match="other settings: method_weights is"):
            distill(config)

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda lines: [b'{"half": \n', *lines[1:]],
            lambda lines: [lines[1], lines[0], *lines[2:]],
            lambda lines: [*lines, lines[0]],
            lambda lines: [b"\xff\n", *lines[1:]],
        ],
        ids=["no JSON", "another order", "one too many", "no text"],
    )
    def test_a_file_that_was_changed_is_refused_by_line(self, config, whole, spoil: Callable):
        Path(config.out).write_bytes(b"".join(spoil(whole.splitlines(keepends=True))))
        with pytest.raises(DeepenError, match=r"own.jsonl, line \d is no answer to the prompt it should answer"):
            distill(config)

    def test_somebody_elses_file_is_refused(self, config):
        Path(config.out).write_text('{"text": "mine"}\n')
        with pytest.raises(DeepenError, match=r"exists, and no own\.jsonl\.json beside it says what made it"):
            distill(config)
        assert Path(config.out).read_text() == '{"text": "mine"}\n'


class TestTraining:
    def run_config(self, config: DistillConfig, **settings: object) -> RunConfig:
        values = {"method": "dense", "config": "lora", "num_steps": 1, "batch_size": 5, "max_length": 64}
        out = str(Path(config.out).with_name("run"))
        return RunConfig(model="tiny:llama", data=config.out, output_dir=out, **{**values, **settings})

    def test_batches_hold_these_ids_with_answers_learned(self, config):
        distill(config)
        run = self.run_config(config)
        expected = {
            (*record["prompt_ids"], *record["response_ids"]): len(record["prompt_ids"])
            for record, read in zip(records_in(config.out), read_records(Path(config.out)), strict=True)
            if split_of_record(read) == "train"
        }
        rows = rows_of_run(run, open_trainee(run))
        batch = Loader(rows, rows_per_step=len(rows), seed=0).step(0)
        found = {}
        for ids, length, learned in zip(batch.input_ids, batch.lengths, batch.learned, strict=True):
            (given,) = (~learned[:length]).nonzero()[-1].tolist()
            assert learned[: given + 1].sum() == 0 and learned[given + 1 : length].all()
            found[tuple(ids[:length].tolist())] = given + 1
        assert found == expected and len(found) >= 5

    def test_a_run_takes_the_file(self, config):
        distill(config)
        train(self.run_config(config), show=lambda line: None)

    def test_a_run_takes_a_folder_of_such_files(self, config, tmp_path):
        folder = tmp_path / "answers"
        folder.mkdir()
        found = []
        for seed in (0, 1):
            one = replace(config, out=str(folder / f"seed{seed}.jsonl"), seed=seed)
            distill(one)
            found += self.ids_of(self.run_config(one))
        run = replace(self.run_config(config), data=str(folder))
        assert self.ids_of(run) == found
        train(run, show=lambda line: None)

    @staticmethod
    def ids_of(run: RunConfig) -> list[int]:
        """Of the training documents, behind each other."""
        return rows_of_run(run, open_trainee(run)).corpus.ids.tolist()

    def test_a_run_refuses_prompts_without_answers_and_says_what_makes_some(self, config):
        Path(config.out).write_text("\n".join(json.dumps({"prompt": f"What is {n}?"}) for n in range(9)))
        with pytest.raises(DeepenError, match=r"has nothing to learn; `deepen distill MODEL --data PROMPTS"):
            train(self.run_config(config), show=lambda line: None)

    def test_ids_of_another_vocabulary_are_refused(self, config):
        distill(config)
        other = byte_tokenizer()
        other.add_tokens(["new"])
        document = document_of(next(read_records(Path(config.out))))
        with pytest.raises(DeepenError, match="line 1: its ids are those of a tokenizer with digest"):
            encode(document, other)

    def test_ids_beyond_the_models_are_refused(self, config, tmp_path):
        record = {"prompt_ids": [1], "response_ids": [100_000], "tokenizer": DIGEST}
        Path(config.out).write_text("\n".join(json.dumps({**record, "n": n}) for n in range(5)))
        run = self.run_config(config)
        with pytest.raises(DeepenError, match="holds token id 100000, and the model has ids below"):
            rows_of_run(run, open_trainee(run))


class TestFormat:
    def test_ids_are_read_as_they_are(self):
        fields = {"prompt_ids": [3, EOS_ID], "response_ids": [0, 7], "tokenizer": DIGEST, "response_text": "no matter"}
        document = document_of(Record(fields, "data, line 7"))
        assert document == Tokens((3, EOS_ID), (0, 7), DIGEST, "data, line 7")
        encoded = encode(document, TOKENIZER)
        assert encoded.ids == [3, EOS_ID, 0, 7] and encoded.learned == [False, False, True, True]

    def test_what_was_asked_is_a_prompt_for_samples(self):
        prompt = beginning(Tokens((104, 105, EOS_ID), (7,), DIGEST), TOKENIZER, num_tokens=1)
        assert prompt.ids == (104, 105, EOS_ID) and prompt.text == "hi"

    def test_no_tokenizer_is_made_of_ids(self, tmp_path):
        path = tmp_path / "ids.jsonl"
        record = {"prompt_ids": [1], "response_ids": [2], "tokenizer": DIGEST}
        path.write_text("\n".join(json.dumps({**record, "n": n}) for n in range(5)))
        with pytest.raises(ConfigError, match=r"ids\.jsonl, line \d: token ids are no text to make a tokenizer from"):
            new_tokenizer("bpe:300", corpus=str(path))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"prompt_ids": []}, '"prompt_ids" must be a list of at least one token id'),
            ({"response_ids": "ab"}, '"response_ids" must be a list'),
            ({"response_ids": [1, -1]}, '"response_ids" holds -1, which is no token id'),
            ({"response_ids": [True]}, '"response_ids" holds True'),
            ({"prompt_ids": [1.0]}, '"prompt_ids" holds 1.0'),
            ({"prompt_ids": [2**31]}, '"prompt_ids" holds 2147483648'),
            ({"further_ids": {}}, '"further_ids" must be a list of pairs'),
            ({"further_ids": [[[1], [2], [3]]]}, '"further_ids" must be a list of pairs'),
            ({"further_ids": [[[1], []]]}, '"further_ids" must be a list of at least one token id'),
            ({"tokenizer": None}, 'a string in "tokenizer"; it holds NoneType'),
            ({"text": "x"}, "fits several formats (text, tokens)"),
        ],
    )
    def test_nothing_is_guessed(self, change, message):
        fields = {"prompt_ids": [1], "response_ids": [2], "tokenizer": DIGEST, **change}
        with pytest.raises(DeepenError) as raised:
            document_of(Record(fields, "data, line 7"))
        assert str(raised.value).startswith("data, line 7") and message in str(raised.value)
