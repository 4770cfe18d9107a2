"""Differences and intervals against plain arithmetic, verdicts at their limits, and files that can't be compared."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_answer import plain_answer
from some_stages import ANSWERS, BASE, DOCUMENTS, stage

from deepen.core.errors import DeepenError
from deepen.core.files import write_json
from deepen.evaluate.comparison import Column, columns, compare_stages
from deepen.evaluate.equality import equality
from deepen.evaluate.results import FORMAT, STAGE_NAMES, Answer, ScoredDocument, StageResults, TrainingOfStage


def answer(prompt: str, tokens=(5, 6, 7, 8), **fields) -> Answer:
    return plain_answer(tokens, prompt=prompt, **fields)


def exact(**fields) -> StageResults:
    return stage("after_surgery", **({"method": "toy", "method_config": {"width": 8}, "exact": True} | fields))


def moved(by: float, documents=DOCUMENTS) -> tuple[ScoredDocument, ...]:
    """Every document's sum, moved by so many nats a token."""
    return tuple(replace(document, nll=document.nll + by * document.num_tokens) for document in documents)


def comparison(*stages: StageResults, seed: int = 0) -> dict:
    return compare_stages(columns({f"{number}.json": results for number, results in enumerate(stages)}), seed=seed)


def row(found: dict, name: str, part: str = "metrics") -> dict:
    (only,) = [each for each in found[part] if each["name"] == name]
    return only


class TestDifferences:
    def test_values_are_ratios_of_sums(self):
        found = comparison(stage(), exact(documents=moved(0.25)))
        nll, tokens = sum(d.nll for d in DOCUMENTS), sum(d.num_tokens for d in DOCUMENTS)
        values = row(found, "nll")["values"]
        assert values["baseline"] == pytest.approx(nll / tokens, rel=1e-12)
        assert values["after_surgery"] == pytest.approx(nll / tokens + 0.25, rel=1e-12)
        difference = row(found, "nll")["differences"]["after_surgery"]
        assert difference["delta"] == pytest.approx(0.25)
        accuracy = row(found, "token_accuracy")
        assert accuracy["values"]["baseline"] == sum(d.num_correct for d in DOCUMENTS) / tokens
        assert row(found, "tokens_per_pass")["values"]["baseline"] == 1.0

    def test_documents_are_paired(self):
        # Unpaired, the interval would be as wide as documents differ: some nats a token.
        difference = row(comparison(stage(), exact(documents=moved(0.25))), "nll")["differences"]["after_surgery"]
        assert difference["interval_95"] == pytest.approx((0.25, 0.25), abs=1e-9)

    def test_the_interval_is_that_of_resampled_pairs(self):
        shifts = [0.3 * (n % 4) - 0.2 for n in range(len(DOCUMENTS))]
        other = tuple(
            replace(document, nll=document.nll + shift * document.num_tokens)
            for document, shift in zip(DOCUMENTS, shifts, strict=True)
        )
        low, high = row(comparison(stage(), exact(documents=other)), "nll")["differences"]["after_surgery"][
            "interval_95"
        ]
        draws = random.Random(7)
        deltas = []
        for _ in range(4000):
            drawn = draws.choices(range(len(DOCUMENTS)), k=len(DOCUMENTS))
            tokens = sum(DOCUMENTS[i].num_tokens for i in drawn)
            deltas.append(sum(shifts[i] * DOCUMENTS[i].num_tokens for i in drawn) / tokens)
        deltas.sort()
        width = deltas[3900] - deltas[99]
        assert low == pytest.approx(deltas[99], abs=0.1 * width)
        assert high == pytest.approx(deltas[3900], abs=0.1 * width)

    def test_the_seed_decides_it(self):
        other = exact(documents=(*moved(1.0, DOCUMENTS[:6]), *DOCUMENTS[6:]))
        assert comparison(stage(), other, seed=3) == comparison(stage(), other, seed=3)
        assert row(comparison(stage(), other, seed=3), "nll") != row(comparison(stage(), other, seed=4), "nll")

    @given(st.permutations(DOCUMENTS), st.permutations(ANSWERS))
    def test_order_makes_no_difference(self, documents, answers):
        shuffled = exact(documents=moved(0.5, documents), answers=tuple(answers))
        ours, theirs = comparison(stage(), shuffled), comparison(stage(), exact(documents=moved(0.5)))
        for name in ("nll", "token_accuracy", "tokens_per_pass"):
            assert row(ours, name)["differences"] == row(theirs, name)["differences"]

    def test_one_document_has_no_interval(self):
        one = DOCUMENTS[:1]
        found = comparison(stage(documents=one), exact(documents=moved(0.5, one)))
        assert row(found, "nll")["differences"]["after_surgery"] == {"delta": pytest.approx(0.5), "interval_95": None}

    def test_answers_to_other_prompts_are_no_pairs(self):
        found = comparison(stage(), exact(answers=(answer("moon", (1,) * 8, passes=2),)))
        difference = row(found, "tokens_per_pass")["differences"]["after_surgery"]
        assert difference == {"delta": 3.0, "interval_95": None}

    def test_answers_of_other_lengths_are_no_pairs(self):
        found = comparison(stage(), exact(config={"max_new_tokens": 5}))
        differences = {each["name"]: each["differences"]["after_surgery"] for each in found["metrics"]}
        assert differences["mean_length"] == {"delta": 0.0, "interval_95": None}
        assert differences["distinct_2"]["interval_95"] is None and differences["nll"]["interval_95"] == (0.0, 0.0)

    def test_a_machines_speed_has_no_interval_and_says_why(self):
        later = tuple(replace(each, seconds=each.seconds * 2) for each in ANSWERS)
        found = comparison(stage(), exact(answers=later))
        speed = row(found, "tokens_per_second")
        assert speed["differences"]["after_surgery"]["delta"] < 0
        assert speed["differences"]["after_surgery"]["interval_95"] is None
        assert "the machine's speed in one run of each stage" in speed["note"]
        assert [each["name"] for each in found["metrics"] if "note" in each] == ["tokens_per_second"]
        assert row(found, "tokens_per_pass")["differences"]["after_surgery"]["interval_95"] == (0.0, 0.0)

    def test_what_only_one_has_has_no_difference(self):
        drafts = {"drafted": {"x": 4}, "judged": {"x": (1,)}, "agreed": {"x": (1,)}}
        found = comparison(stage(), exact(answers=(answer("moon", **drafts), answer("bread", (9, 9, 4), **drafts))))
        acceptance = row(found, "acceptance")
        assert acceptance["values"] == {"baseline": None, "after_surgery": 0.25}
        assert acceptance["differences"]["after_surgery"] == {"delta": None, "interval_95": None}
        assert "mean_p_commit" not in {each["name"] for each in found["metrics"]}

    def test_what_is_too_large_for_a_number_is_left_out(self):
        huge = moved(2000.0)
        found = comparison(stage(documents=huge), exact(documents=huge))
        assert "perplexity" not in {each["name"] for each in found["metrics"]}
        json.dumps(found, allow_nan=False)


class TestTables:
    def test_only_settings_that_differ_are_listed(self):
        other = exact(environment={"device": "cpu", "dtype": "float32", "torch": "2.14.0"})
        assert {each["name"]: each["values"] for each in comparison(stage(), other)["settings"]} == {
            "method": {"baseline": None, "after_surgery": "toy"},
            "method_config.width": {"after_surgery": 8},
            "environment.torch": {"baseline": "2.13.0", "after_surgery": "2.14.0"},
        }

    def test_a_yes_is_not_a_one(self):
        one, yes = (exact(method_config={"width": value}) for value in (1, True))
        names = [each["name"] for each in comparison(one, yes)["settings"]]
        assert names == ["method_config.width"]

    def test_costs_and_counts_stand_side_by_side(self):
        speed = (
            {
                "domain": "copy",
                "path": "plain",
                "prompts": 3,
                "tokens_per_pass": 2.0,
                "ms_per_token": 5.0,
                "against_plain": {"ratio": 1.5, "low": 1.0, "high": 2.0},
            },
        )
        found = comparison(stage(), exact(ledger={"parameters_unique": 120}, speed=speed))
        assert row(found, "parameters_unique", "ledger")["values"] == {"baseline": 100, "after_surgery": 120}
        assert row(found, "copy, plain, against_plain", "speed")["values"] == {"after_surgery": 1.5}
        assert row(found, "chunk_lengths", "counts")["values"]["baseline"] == {"1": 7}
        assert row(found, "num_scored_tokens", "counts")["values"]["baseline"] == sum(d.num_tokens for d in DOCUMENTS)

    def test_the_baseline_is_the_reference_wherever_it_stands(self):
        assert comparison(exact(), stage())["reference"] == "baseline"
        assert comparison(exact(), stage("finetuned_vanilla"))["reference"] == "after_surgery"

    def test_stages_of_one_name_are_told_apart_by_their_files(self):
        found = comparison(stage(), exact(), exact(documents=moved(1e-3)))
        assert [file["label"] for file in found["files"]] == [
            "baseline",
            "after_surgery (1.json)",
            "after_surgery (2.json)",
        ]
        assert [verdict["holds"] for verdict in found["equality"]] == [True, False]

    def test_later_stages_are_compared_and_not_judged(self):
        stages = [stage(), *(stage(name, documents=moved(-0.1)) for name in STAGE_NAMES[2:])]
        found = comparison(*stages)
        assert found["equality"] == []
        assert row(found, "nll")["differences"].keys() == set(STAGE_NAMES[2:])

    def test_training_stands_beside_what_was_trained(self):
        runs = [{"seed": 0, "learning_rate": rate, "config": {"width": 8}} for rate in (0.1, 0.2)]
        trained = [
            stage(name, training=TrainingOfStage({"steps": steps, "training_flops": 5}, run))
            for name, steps, run in zip(STAGE_NAMES[2:], (3, 4), runs, strict=True)
        ]
        found = comparison(stage(), *trained)
        assert row(found, "steps", "training")["values"] == {"finetuned_vanilla": 3, "finetuned_recursive": 4}
        assert [(each["name"], each["values"]) for each in found["training_settings"]] == [
            ("learning_rate", {"finetuned_vanilla": 0.1, "finetuned_recursive": 0.2})
        ]
        assert comparison(stage(), trained[0])["training_settings"] == []
        assert comparison(stage(), exact())["training"] == []


class TestEquality:
    def test_a_promise_is_kept_to_the_last_bit(self):
        verdict = equality(stage(), exact())
        assert verdict.holds and verdict.ids_equal and verdict.delta_nll == 0
        assert "exactly equal" in verdict.criterion

    def test_the_smallest_move_breaks_it(self):
        first, *rest = DOCUMENTS
        verdict = equality(stage(), exact(documents=(replace(first, nll=first.nll * (1 + 2**-50)), *rest)))
        assert not verdict.holds
        assert "1 of 12 documents moved" in verdict.nll

    def test_moves_that_cancel_are_seen(self):
        first, second, *rest = DOCUMENTS
        both = (replace(first, nll=first.nll + 1), replace(second, nll=second.nll - 1))
        verdict = equality(stage(), exact(documents=(*both, *rest)))
        assert verdict.delta_nll == 0 and not verdict.holds

    @pytest.mark.parametrize(("by", "holds"), [(0.0, True), (9e-7, True), (-9e-7, True), (1.1e-6, False)])
    @pytest.mark.parametrize(
        "fields",
        [
            {"exact": False},
            {"checks": {"pass_width_difference": 1e-5}},
            {"checks": {}},
        ],
        ids=["refined", "width matters", "width unknown"],
    )
    def test_rounding_is_allowed_where_it_is_none_of_the_methods_doing(self, fields, by, holds):
        verdict = equality(stage(), exact(documents=moved(by), **fields))
        assert verdict.holds is holds
        assert "less than 1e-06 apart" in verdict.criterion

    @pytest.mark.parametrize("promised", [True, False])
    def test_other_ids_break_it(self, promised):
        other = exact(exact=promised, answers=(ANSWERS[0], answer("bread", (9, 8, 4))))
        verdict = equality(stage(), other)
        assert verdict.ids_equal is False and not verdict.holds
        assert verdict.ids == "1 of 2 answers equal; DIFFERENT: bread at token 1"

    def test_an_answer_that_ends_early_is_different(self):
        verdict = equality(stage(), exact(answers=(ANSWERS[0], answer("bread", (9, 9)))))
        assert not verdict.holds and "bread at token 2" in verdict.ids

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"answers": ()}, "no greedy answers in one of the files"),
            ({"answers": ANSWERS[:1]}, "not the same answers: 2 prompts with max_new_tokens 4, and 1 with 4"),
            ({"config": {"max_new_tokens": 5}}, "2 prompts with max_new_tokens 4, and 2 with 5"),
        ],
    )
    def test_without_answers_to_compare_nothing_is_judged(self, fields, message):
        for grafted in (exact(**fields), exact(exact=False, **fields)):
            verdict = equality(stage(), grafted)
            assert verdict.ids_equal is verdict.holds is None
            assert message in verdict.ids

    @pytest.mark.parametrize("promised", [True, False])
    def test_scores_that_differ_need_no_answers(self, promised):
        assert equality(stage(), exact(exact=promised, answers=(), documents=moved(1e-3))).holds is False

    @pytest.mark.parametrize(("share", "holds"), [(0.0, True), (9e-4, True), (-9e-4, True), (1.1e-3, False)])
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_coarse_numbers_are_judged_by_a_thousandth(self, dtype, share, holds):
        environment = {"device": "cpu", "dtype": dtype}
        documents = tuple(replace(document, nll=document.nll * (1 + share)) for document in DOCUMENTS)
        other = exact(environment=environment, documents=documents, answers=(ANSWERS[0], answer("bread", (1, 2, 3))))
        verdict = equality(stage(environment=environment), other)
        assert verdict.holds is holds
        assert verdict.ids_equal is False and "0.1% apart" in verdict.criterion

    def test_other_environments_are_noted(self):
        verdict = equality(stage(), exact(environment={"device": "cpu", "dtype": "float32", "torch": "2.14.0"}))
        assert verdict.notes == ("the two stages were measured in different environments: torch 2.13.0 and 2.14.0",)


class TestRefusals:
    def refused(self, *stages: StageResults) -> str:
        with pytest.raises(DeepenError) as error:
            comparison(*stages)
        return str(error.value)

    def test_one_file_is_nothing_to_compare(self):
        assert "at least two results files, not 1" in self.refused(stage())
        with pytest.raises(DeepenError, match="at least two"):
            compare_stages([])

    @pytest.mark.parametrize("field", ["fingerprint", "tokenizer"])
    def test_other_bases(self, field):
        message = self.refused(stage(), replace(exact(), base=replace(BASE, **{field: "x" * 64})))
        assert message.startswith(f"1.json and 0.json are of different bases: base.{field} is {'x' * 64}")

    def test_other_documents(self):
        other = exact(documents=(*DOCUMENTS[:-2], replace(DOCUMENTS[-1], id="other")))
        message = self.refused(stage(), other)
        assert "1.json and 0.json don't score the same documents: in documents, 1 of 11 and 2 of 12" in message
        assert "so the corpus has changed" in message

    def test_another_start_is_named(self):
        documents = tuple(replace(document, num_tokens=document.num_tokens + 1) for document in DOCUMENTS)
        config = {**stage().config, "first_scored": 31}
        assert "config.first_scored is 31 and 32" in self.refused(stage(), exact(documents=documents, config=config))

    def test_a_document_that_is_there_twice(self):
        assert "don't score the same documents" in self.refused(stage(), exact(documents=(*DOCUMENTS, DOCUMENTS[0])))
        twice = (*DOCUMENTS, DOCUMENTS[0])
        assert comparison(stage(documents=twice), exact(documents=twice))["equality"][0]["holds"]


class TestFiles:
    def test_what_is_written_is_read(self, tmp_path):
        results = exact(documents=moved(1 / 3))
        write_json(tmp_path / "x.json", results.to_dict())
        assert StageResults.read(tmp_path / "x.json") == results

    @pytest.mark.parametrize("name", STAGE_NAMES)
    def test_every_stage_can_be_read(self, tmp_path, name):
        write_json(tmp_path / "x.json", stage(name).to_dict())
        assert StageResults.read(tmp_path / "x.json").stage == name

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": FORMAT + 1}, '"format" 2, and this version of deepen .* use the version that wrote it'),
            ({"format": 0}, '"format" 0, which no version has written'),
            ({"format": "1"}, 'its "format" must be a whole number'),
            ({"format": True}, 'its "format" must be a whole number'),
            ({"stage": "basline"}, 'unknown stage "basline"; did you mean "baseline"'),
            ({"stage": None}, "stage must be a string, not null"),
            ({"documents": []}, "documents must not be empty"),
            ({"documents": [{"id": "a"}]}, r"documents\[0\]\.nll is missing"),
            (
                {"documents": [{"id": "a", "nll": 1.0, "num_tokens": 0, "num_correct": 0, "num_bytes": 0}]},
                r"documents\[0\]: num_tokens must be positive",
            ),
            (
                {"documents": [{"id": "a", "nll": 1.0, "num_tokens": 2, "num_correct": 3, "num_bytes": -1}]},
                r"documents\[0\]: num_correct must be between",
            ),
            ({"extra": 1}, 'unknown key "extra"'),
            ({"answers": [ANSWERS[0].to_dict()] * 2}, "more than one answer to a prompt"),
            ({"base": {"address": "x"}}, "base.fingerprint is missing"),
        ],
    )
    def test_a_damaged_file_is_told(self, tmp_path, change, message):
        path = tmp_path / "x.json"
        write_json(path, {**stage().to_dict(), **change})
        with pytest.raises(DeepenError, match=message) as error:
            StageResults.read(path)
        assert str(path) in str(error.value)
        assert "deepen evaluate" in str(error.value) or "use the version" in str(error.value)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "line 1, column 1"),
            ("[]", 'no field "format"'),
            ("{}", 'no field "format"'),
            ('{"format": 1}', 'no field "stage"'),
            ('{"format": NaN}', "NaN is not a JSON number"),
        ],
    )
    def test_what_is_no_results_file_is_told(self, tmp_path, content, message):
        path = tmp_path / "x.json"
        path.write_text(content)
        with pytest.raises(DeepenError, match=message) as error:
            StageResults.read(path)
        assert str(path) in str(error.value)

    def test_training_is_written_and_read(self, tmp_path):
        results = stage("finetuned_vanilla", training=TrainingOfStage({"steps": 3, "training_flops": 1e9}, {"seed": 1}))
        write_json(tmp_path / "x.json", results.to_dict())
        assert StageResults.read(tmp_path / "x.json") == results

    def test_files_of_earlier_versions_have_no_training(self, tmp_path):
        content = stage().to_dict()
        del content["training"]
        write_json(tmp_path / "x.json", content)
        assert StageResults.read(tmp_path / "x.json").training is None

    @pytest.mark.parametrize("name", ["missing.json", "."])
    def test_a_missing_file_is_told(self, tmp_path, name):
        with pytest.raises(DeepenError, match=r"there is no results file at .*; `deepen evaluate MODEL --stage STAGE`"):
            StageResults.read(tmp_path / name)


def test_a_column_keeps_its_path():
    assert columns({"a/b.json": stage()}) == [Column("a/b.json", "baseline", stage())]
    assert Path(columns({"a/b.json": stage()})[0].path).name == "b.json"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["r/lora-0/x.json", "r/lora-1/x.json"], ["lora-0", "lora-1"]),
        (["0.json", "1.json"], ["0.json", "1.json"]),
        (["r/a/b/x.json", "r/c/b/x.json"], ["a", "c"]),
        (["r/x.json", "r/a/x.json"], ["r/x.json", "r/a/x.json"]),
        (["/r/x.json", "s/x.json"], ["/r", "s"]),
    ],
)
def test_columns_of_a_stage_are_told_apart_by_where_their_paths_differ(paths, names):
    found = columns({path: stage() for path in paths})
    assert [column.label for column in found] == [f"baseline ({name})" for name in names]
    assert [column.path for column in found] == paths
