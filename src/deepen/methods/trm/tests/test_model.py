"""Decoding, scores and training steps of a base with a refiner."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from trm_models import KINDS, base, forward, model, some_ids

from deepen.backbones.identity import fingerprint
from deepen.check.effort import QUICK
from deepen.check.subject import subject_of
from deepen.check.suite import run
from deepen.core.errors import CannotTrain, CheckpointError
from deepen.core.types import Batch, Progress, StepOutput
from deepen.data.batches import batch_of
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.stop import StopConfig
from deepen.methods.trm.drawing import TRMBatch
from deepen.methods.trm.model import TRMModel
from deepen.train.module import StepModule
from deepen.train.optim import make_optimizers
from deepen.train.step import Steps

OFF: dict[str, Any] = {"use_trm": False, "trm_d_latent": 256, "trm_n": 6, "trm_hidden": None, "trm_heads": 4}
PROMPTS = [[5, 17, 200, 3], [7], [1, 2, 3] * 5]
TIGHT = {"rtol": 1e-8, "atol": 1e-8}


def rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    return [some_ids(1, length, seed=seed + index)[0].tolist() for index, length in enumerate(lengths)]


def ids_of(decoder: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [result.tokens for result in complete(decoder, prompts, stop=StopConfig(max_new_tokens=10))]


class TestDecoding:
    @pytest.mark.parametrize(
        ("name", "halting"),
        [
            ("nanochat", {"halt": "kl", "halt_threshold": 0.3, "trm_T": 5}),
            pytest.param("llama", {}, marks=pytest.mark.slow),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_greedy_ids_are_those_of_forwards_over_the_whole_text(self, name, kind, halting):
        if kind["placement"] != "head" and halting:
            halting = {"halt": "delta", "halt_threshold": 0.4, "trm_T": 5}
        made = model(name, **kind, **halting)
        expected = []
        for prompt in PROMPTS:
            text = list(prompt)
            for _ in range(10):
                text.append(int(forward(made, torch.tensor([text]))[0, -1].argmax()))
            expected.append(text[len(prompt) :])
        assert ids_of(made, PROMPTS) == expected != ids_of(PlainDecoder(made.backbone), PROMPTS)

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_rows_in_company_are_those_alone(self, kind):
        made = model(halt="delta", halt_threshold=0.4, trm_T=4, **kind)
        assert ids_of(made, PROMPTS) == [ids_of(made, [prompt])[0] for prompt in PROMPTS]

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_a_packed_base_decodes_the_same(self, kind):
        made = model(base(dtype=torch.float32), **kind)
        before = ids_of(made, PROMPTS)
        made.backbone.pack()
        assert ids_of(made, PROMPTS) == before

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_transformers_own_door_gives_the_same_ids(self, kind):
        """Also of rows that are padded on their left, as transformers has it."""
        made, width = model(**kind), max(map(len, PROMPTS))
        padded = torch.tensor([[0] * (width - len(row)) + row for row in PROMPTS])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in PROMPTS])
        given = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert made.generate(padded, attention_mask=mask, **given)[:, width:].tolist() == ids_of(made, PROMPTS)

    def test_its_forward_is_the_base_s_with_the_refiner_in_it(self):
        made, ids = model(mixing="evidence"), some_ids(2, 9)
        output = made(input_ids=ids, labels=ids, use_cache=False)
        assert torch.equal(output.logits, forward(made, ids)) and output.loss > 0

    def test_without_a_refiner_it_is_the_base(self):
        made = model(**OFF)
        assert made.promises_base and made.saved_state() == {}
        assert ids_of(made, PROMPTS) == ids_of(PlainDecoder(made.backbone), PROMPTS)
        assert not model().promises_base


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
@pytest.mark.parametrize("halting", [{}, {"halt": "delta", "halt_threshold": 0.3, "trm_T": 5}], ids=str)
@pytest.mark.parametrize("kind", KINDS[1::2], ids=str)
def test_the_check_suite_is_green_behind_layers(name, halting, kind):
    """Before the head presets are held to it in the contract tests."""
    made = model(base(name, dtype=torch.float32), noise=0.0, **kind, **halting)
    report = run(subject_of(made), QUICK)
    assert report.passed, str(report)
    verdicts = {finding.check: finding.verdict for finding in report.findings}
    for check in ("commits", "decoding", "scores", "training", "adapter saving"):
        assert verdicts[check] == "passed", f"{check}: {report}"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_scores_are_those_of_the_forward(kind):
    made, (row,) = model(**kind), rows(12)
    log_probs = forward(made, torch.tensor([row]))[0].log_softmax(dim=-1)
    score = made.score(batch_of([row]))
    torch.testing.assert_close(score.log_probs[0, 1:], log_probs[range(11), row[1:]], **TIGHT)


@pytest.mark.parametrize("halting", ["delta", "kl", "learned"])
def test_depths_are_the_outer_steps_that_each_token_takes_alone(halting):
    threshold = {"delta": 0.4, "kl": 0.3, "learned": 0.5}[halting]
    made = model("nanochat", mixing="evidence", trm_T=6, halt=halting, halt_threshold=threshold)
    texts = rows(12, 7)
    depths = made.score(batch_of(texts)).depths
    assert depths is not None and made._lent is not None
    for row, text in enumerate(texts):
        for place in range(12):
            steps = 0
            if place < len(text):
                with torch.no_grad(), made.adapted():
                    made.base(input_ids=torch.tensor([text[: place + 1]]), use_cache=False, logits_to_keep=1)
                steps = made._lent.refined[0].num_steps
            assert depths[row, place] == steps
    assert len(depths[depths > 0].unique()) > 1, "a rule by which all stop together tells nothing"


def test_depths_behind_layers_are_those_of_all_places():
    made = model(placement=[0, 2], trm_T=3, halt="delta", halt_threshold=0.0)
    depths = made.score(batch_of(rows(5))).depths
    assert depths is not None and depths.tolist() == [[6] * 5]


def test_without_a_rule_all_tokens_are_as_deep():
    assert model().score(batch_of(rows(5))).depths is None


# Training


def prepared(made: TRMModel, batch: Batch, *, seed: int = 0) -> TRMBatch:
    torch.manual_seed(seed)
    return made.prepare(batch, Progress(0, 10))


def step(made: TRMModel, batch: Batch) -> StepOutput:
    return made.train_step(batch if isinstance(batch, TRMBatch) else prepared(made, batch), None, Progress(0, 10))


def scored(made: TRMModel, batch: Batch) -> Tensor:
    return -made.score(batch).log_probs.sum()


class TestLosses:
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    @pytest.mark.parametrize("name", ["llama", "nanochat"])
    def test_the_last_step_s_is_what_scoring_says(self, name, kind):
        made, batch = model(name, **kind), batch_of(rows(20, 1, 12))
        (term,) = step(made, batch).losses.values()
        assert made.count(batch) == {"token": 19 + 0 + 11} and term.unit == "token" and term.weight == 1
        torch.testing.assert_close(term.total, scored(made, batch), **TIGHT)

    def test_only_what_is_to_be_predicted_counts(self):
        made, given = model(mixing="evidence"), batch_of(rows(12, 9))
        documents = torch.tensor([[0] * 5 + [1] * 7, [2] * 12])
        learned = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) > 0.4
        batch = Batch(given.input_ids, given.lengths, documents=documents, learned=learned)
        expected = -(made.score(given).log_probs[:, 1:] * batch.predicted()).sum()
        torch.testing.assert_close(step(made, batch).losses["final_ce"].total, expected, **TIGHT)

    def test_a_batch_in_which_nothing_is_predicted(self):
        made = model(mixing="evidence", halt="learned", supervise_steps=2, grad_outer_steps=2)
        losses = step(made, batch_of([[3], [4]])).losses
        torch.stack([term.total for term in losses.values()]).sum().backward()
        assert set(losses) == {"final_ce", "earlier_ce", "halt"}
        assert all(term.total == 0 for term in losses.values())

    def test_earlier_steps_are_asked_for_the_same_tokens(self):
        made = model(trm_T=4, grad_outer_steps=3, supervise_steps=3)
        batch = batch_of(rows(15, 9))
        losses = step(made, batch).losses
        assert {term.weight for term in losses.values()} == {1 / 3}
        fewer = [model(trm_T=T) for T in (2, 3)]
        torch.testing.assert_close(losses["earlier_ce"].total, sum(scored(each, batch) for each in fewer), **TIGHT)
        torch.testing.assert_close(losses["final_ce"].total, scored(made, batch), **TIGHT)
        losses["earlier_ce"].total.backward()
        assert made.refiner is not None and made.refiner.f_y.out.weight.grad.any()

    def test_where_fewer_steps_are_drawn_there_are_fewer_to_ask(self):
        made = model(trm_T=4, grad_outer_steps=3, supervise_steps=3, T_sampling="uniform")
        batch = batch_of(rows(15, 9))
        for drawn, weight in ((1, 1.0), (2, 0.5), (7, 1 / 3)):
            losses = step(made, TRMBatch(**vars(batch), num_outer=drawn)).losses
            assert losses.keys() == {"final_ce", "earlier_ce"}
            assert {term.weight for term in losses.values()} == {weight}
            assert (losses["earlier_ce"].total == 0) == (drawn == 1)
            torch.testing.assert_close(losses["final_ce"].total, scored(model(trm_T=drawn), batch), **TIGHT)

    @pytest.mark.parametrize("asked", [1, 2, 3])
    def test_the_halting_head_learns_whether_the_token_is_right_after_a_step(self, asked):
        made = model(trm_T=4, halt="learned")
        # Some random tokens, and what the model says behind them if it makes as many steps.
        says = model(trm_T=asked, halt="learned", halt_threshold=1 - 1e-9)
        row = [*rows(8)[0], *ids_of(says, rows(8))[0]]
        assert made.refiner is not None and made.refiner.halt is not None and made._lent is not None
        batch = TRMBatch(**vars(batch_of([row])), num_outer=4, halting_step=asked)
        term = step(made, batch).losses["halt"]
        assert (term.unit, term.weight) == ("token", made.config.halt_weight)
        with torch.no_grad():
            hidden = made.base.get_decoder()(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state
            watched = made.refiner.refine(hidden, watch={asked}).watched[asked]
            right = (made.base.lm_head(watched.after)[0, :-1].argmax(dim=-1) == torch.tensor(row[1:])).double()
            assert 0 < right.mean() < 1
            said = made.refiner.halt(watched.z)[0, :-1, 0].sigmoid()
        expected = -(right * said.log() + (1 - right) * (1 - said).log()).sum()
        torch.testing.assert_close(term.total, expected, **TIGHT)
        gradients = torch.autograd.grad(term.total, list(made.refiner.parameters()), allow_unused=True)
        moved = [
            name
            for (name, _), gradient in zip(made.refiner.named_parameters(), gradients, strict=True)
            if gradient is not None
        ]
        assert moved == ["halt.weight", "halt.bias"]

    def test_the_halting_head_is_asked_where_a_token_is_predicted(self):
        made = model(trm_T=4, halt="learned")
        whole = TRMBatch(**vars(batch_of(rows(15, 4))), num_outer=4, halting_step=2)
        together, *alone = (step(made, each).losses["halt"].total for each in (whole, whole.rows([0]), whole.rows([1])))
        torch.testing.assert_close(together, sum(alone), **TIGHT)

    def test_training_never_halts(self):
        made, batch = model(halt="delta", halt_threshold=100.0, trm_T=3), batch_of(rows(15))
        torch.testing.assert_close(step(made, batch).losses["final_ce"].total, scored(model(trm_T=3), batch), **TIGHT)
        assert (scored(made, batch) - scored(model(trm_T=3), batch)).abs() > 1e-3


class TestUntrained:
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    @pytest.mark.parametrize("name", ["llama", "nanochat"])
    def test_loss_and_gradients_of_the_trunk_are_those_without_it(self, name, kind):
        batch, found = batch_of(rows(20, 12)), []
        for fields in (OFF, kind):
            made = model(base(name, dtype=torch.float32), noise=0.0, trains="all", **fields)
            total = step(made, batch).losses["final_ce"].total
            total.backward()
            found.append((total, {n: p.grad for n, p in made.base.named_parameters()}))
        (loss, gradients), (with_it, with_gradients) = found
        assert torch.equal(with_it, loss)
        for name, gradient in gradients.items():
            assert gradient is not None and torch.equal(with_gradients[name], gradient), name


class TestDrawing:
    @given(st.integers(0, 1000))
    def test_all_parts_of_a_step_have_the_same_draw(self, seed):
        made = model(T_sampling="uniform", T_max=9, halt="learned")
        whole = prepared(made, batch_of(rows(9, 5, 7)), seed=seed)
        parts = [whole.rows([row]) for row in range(3)]
        assert {(each.num_outer, each.halting_step) for each in [whole, *parts]} == {
            (whole.num_outer, whole.halting_step)
        }
        assert 1 <= whole.num_outer <= 9
        assert 1 <= whole.halting_step <= max(1, whole.num_outer - 1)

    def test_the_halting_head_is_asked_after_one_step_or_another(self):
        made, batch = model(trm_T=5, halt="learned"), batch_of(rows(9))
        assert {prepared(made, batch, seed=seed).halting_step for seed in range(40)} == {1, 2, 3, 4}
        assert prepared(model(trm_T=5), batch).halting_step == 0

    def test_it_is_a_function_of_seed_and_step(self):
        def drawn(seed: int, *, num_micro_batches: int = 1) -> list[float]:
            made = model(base(dtype=torch.float32), T_sampling="uniform", T_max=9)
            steps = Steps(
                StepModule(made, made.base), make_optimizers(made, made.base), lambda _: batch_of(rows(9, 7)),
                num_steps=8, seed=seed, num_micro_batches=num_micro_batches,
            )  # fmt: skip
            return [steps.take(index).metrics["refiner/outer_steps"] for index in range(8)]

        first = drawn(1)
        assert first == drawn(1) == drawn(1, num_micro_batches=2) != drawn(2)
        assert len(set(first)) > 2


class TestStepsByDifficulty:
    @staticmethod
    def batch(*difficulties: int) -> Batch:
        made = batch_of(rows(*range(9, 9 + len(difficulties))))
        told = torch.tensor(difficulties)[:, None].expand(-1, made.input_ids.shape[1])
        return replace(made, difficulty=told)

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_each_row_is_a_row_of_a_model_of_so_many_steps(self, kind):
        batch = self.batch(1, 3, 2)
        losses = step(model(T_sampling="task", grad_outer_steps=2, **kind), batch).losses
        alone = [scored(model(trm_T=T, **kind), batch.rows([row])) for row, T in enumerate((1, 3, 2))]
        torch.testing.assert_close(losses["final_ce"].total, sum(alone), **TIGHT)

    @pytest.mark.parametrize("sampling", [{"T_sampling": "task"}, {"T_sampling": "fixed_point", "T_max": 5}], ids=str)
    @pytest.mark.parametrize("halting", [{}, {"halt": "learned"}], ids=str)
    def test_micro_batches_move_the_same(self, sampling, halting):
        found = []
        for num_micro_batches in (1, 3):
            made = model(mixing="evidence", grad_outer_steps=2, **sampling, **halting)
            optimizers = make_optimizers(made, made.base)
            steps = Steps(
                StepModule(made, made.base), optimizers, lambda _: self.batch(1, 3, 2), num_steps=3,
                num_micro_batches=num_micro_batches,
            )  # fmt: skip
            reports = [steps.take(index) for index in range(3)]
            found.append((torch.cat([each.detach().flatten() for each in made.refiner.parameters()]), reports))
        (one, reports), (other, others) = found
        torch.testing.assert_close(other, one, **TIGHT)
        means = [report.metrics["refiner/outer_steps"] for report in reports]
        assert means == [report.metrics["refiner/outer_steps"] for report in others]
        if sampling["T_sampling"] == "task":
            assert means == [pytest.approx((8 * 1 + 9 * 3 + 10 * 2) / 27)] * 3

    def test_the_halting_head_is_asked_of_those_that_take_the_step(self):
        made = model(T_sampling="task", halt="learned")
        drawn = TRMBatch(**vars(prepared(made, self.batch(1, 4, 3))))
        asked = replace(drawn, halting_step=3)
        # One step is made last, and the row of 3 makes its third then: at the third of all, that of 4 alone moves.
        term = step(made, asked).losses["halt"].total
        torch.testing.assert_close(term, step(made, asked.rows([1])).losses["halt"].total, **TIGHT)

    def test_scoring_and_decoding_know_no_difficulty(self):
        made, plain = model(T_sampling="task", trm_T=2), model(trm_T=2)
        assert torch.equal(made.score(self.batch(5, 1)).log_probs, plain.score(self.batch(1, 1)).log_probs)
        assert ids_of(made, PROMPTS) == ids_of(plain, PROMPTS)


class TestGroups:
    def test_the_refiner_has_a_rate_of_its_own_and_vectors_are_not_decayed(self):
        fields = {"learning_rate": 2e-3, "refiner_rate_factor": 0.25, "weight_decay": 0.3, "betas": [0.8, 0.9]}
        made = model("kimi_linear", mixing="evidence", halt="learned", trains="all", **fields)
        assert made.refiner is not None
        names = dict(made.named_parameters())
        where = {
            name: group for group in made.optim_groups() for name, each in names.items()
            if any(each is parameter for parameter in group["params"])
        }  # fmt: skip
        assert where.keys() == names.keys()
        for name, group in where.items():
            assert group["lr"] == (5e-4 if name.startswith("refiner") else 2e-3) and group["betas"] == (0.8, 0.9)
            is_vector = sum(size > 1 for size in names[name].shape) <= 1
            assert group["weight_decay"] == (0.0 if is_vector else 0.3), name

    def test_one_rate_for_all_keeps_the_factor(self):
        made = model(trains="all", refiner_rate_factor=0.25)
        optimizers = make_optimizers(made, made.base, learning_rate=8e-3)
        rates = {
            name: group["lr"] for group in optimizers.groups for name, each in made.named_parameters()
            if any(each is parameter for parameter in group["params"])
        }  # fmt: skip
        assert {rate for name, rate in rates.items() if name.startswith("refiner")} == {2e-3}
        assert {rate for name, rate in rates.items() if name.startswith("base")} == {8e-3}

    @pytest.mark.parametrize("trains", ["refiner", "all"])
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    @pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
    def test_steps_lower_the_loss_and_move_what_is_trained(self, trains, kind, optimizer):
        made = model(base(dtype=torch.float32), noise=0.0, trains=trains, learning_rate=5e-3, **kind)
        before = fingerprint(made.base)
        optimizers = make_optimizers(made, made.base, name=optimizer)
        batch = batch_of(rows(30, 30))
        steps = Steps(StepModule(made.train(), made.base), optimizers, lambda _: batch, num_steps=8, grad_clip=1.0)
        reports = [steps.take(index) for index in range(8)]
        assert reports[-1].total < 0.99 * reports[0].total
        assert (fingerprint(made.base) == before) == (trains == "refiner")

    def test_without_a_refiner_there_is_the_base_to_train_or_nothing(self):
        made = model(**OFF)
        for action in (lambda: prepared(made, batch_of(rows(5))), lambda: made.step_work(batch_of(rows(5)))):
            with pytest.raises(CannotTrain, match="use_trm is false, and so there is no refiner to train"):
                action()
        whole = model(**OFF, trains="all")
        assert step(whole, batch_of(rows(9))).losses.keys() == {"final_ce"}
        assert {each for group in whole.optim_groups() for each in group["params"]} == set(whole.base.parameters())


class TestSaved:
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_it_fits_any_number_of_steps_and_any_place(self, kind):
        made = model(trm_n=2, trm_T=3, **kind)
        other = model(noise=0.0, trm_n=4, trm_T=1, mixing=kind["mixing"], placement=[1])
        other.load_saved_state(made.saved_state())
        assert made.refiner is not None and other.refiner is not None
        for name, tensor in made.refiner.state_dict().items():
            assert torch.equal(other.refiner.state_dict()[name], tensor)

    @pytest.mark.parametrize("halt", ["none", "delta", "kl"])
    def test_one_that_has_learned_to_halt_may_be_run_by_another_rule(self, halt):
        learned, other = model(halt="learned"), model(noise=0.0, halt=halt)
        other.load_saved_state(learned.saved_state())
        assert other.saved_state().keys() == learned.saved_state().keys() - {"halt.weight", "halt.bias"}
        for name, tensor in other.saved_state().items():
            assert torch.equal(tensor, learned.saved_state()[name])

    def test_one_that_has_not_learned_to_halt_is_told_to_where_it_must(self):
        with pytest.raises(CheckpointError, match=r"missing halt\.weight"):
            model(halt="learned").load_saved_state(model().saved_state())

    def test_another_mixing_is_told(self):
        with pytest.raises(CheckpointError, match=r"unknown reader\.scale"):
            model().load_saved_state(model(mixing="evidence").saved_state())

    def test_beside_a_base_of_16_bits_it_has_32(self):
        made = model(base(dtype=torch.bfloat16), mixing="evidence")
        assert {tensor.dtype for tensor in made.saved_state().values()} == {torch.float32}
        step(made, batch_of(rows(9))).losses["final_ce"].total.backward()
        assert all(each.grad is not None for each in made.refiner.parameters())
