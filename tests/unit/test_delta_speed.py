"""The benchmark of delta attention measures what it says it does, and its judge can find fault."""

import time
from dataclasses import dataclass, replace

import pytest
import torch

from deepen.backbones import tiny
from deepen.backbones.costs import replay_bytes_per_token, row_state_bytes
from deepen.backbones.delta_reference import ReferencePrefix, random_kimi_linear
from deepen.backbones.hf import Backbone
from deepen.backbones.recurrence import DeltaForward
from deepen.cli.bench_delta import DeltaOptions
from deepen.core import registry
from deepen.core.errors import ConfigError
from deepen.core.types import Advance, RowAdvance
from deepen.evaluate.agreement import Agreement
from deepen.evaluate.delta_equality import PARTLY_RIGHT, Tally, draw_cases, tally_cases
from deepen.evaluate.delta_speed import (
    CHUNK,
    KEPT,
    Bars,
    DeltaModel,
    Race,
    op_memory,
    op_races,
    run_race,
    saved_bytes,
)
from deepen.evaluate.noise import NOISE_STD, fill_with_noise
from deepen.generate.plain import PlainDecoder


def unheard(_: int) -> None:
    """Progress that nobody wants to see."""


class TestRace:
    @staticmethod
    def race(log, *, theirs=1.0, bars=None):
        def side(name, value, seconds):
            def prepare():
                log.append(f"prepare {name}")

                def work():
                    log.append(name)
                    time.sleep(seconds)
                    return (torch.tensor([value, 4.0]),)

                return work

            return prepare

        return Race("line", ours=side("ours", 1.0, 0.001), theirs=side("theirs", theirs, 0.01), bars=bars)

    def test_sides_take_turns_and_the_first_runs_are_not_measured(self):
        log, done = [], []
        raced = run_race(self.race(log), rounds=3, done=done.append)
        assert [entry for entry in log if "prepare" not in entry] == [
            *("ours", "theirs"),
            *("ours", "theirs", "theirs", "ours", "ours", "theirs"),
        ]
        assert len(raced.ours) == len(raced.theirs) == 3
        assert done == [1] * 8
        assert log[::2] == [f"prepare {entry}" for entry in log[1::2]]

    def test_figures_are_those_of_the_medians(self):
        raced = run_race(self.race([], bars=Bars(2, 3)), rounds=1, done=unheard)
        raced.ours[:], raced.theirs[:] = [0.1, 0.4, 0.2], [0.5, 0.2, 0.7]
        figures = raced.figures()
        assert (figures["ours_ms"], figures["transformers_ms"], figures["ratio"]) == (200.0, 500.0, 2.5)
        assert (figures["low"], figures["high"], figures["rounds"]) == (0.5, 5.0, 3)
        assert figures["bar"] == {"ratio": 2, "met": True}
        assert figures["stretch"] == {"ratio": 3, "met": False}

    def test_a_difference_is_told(self):
        assert run_race(self.race([]), rounds=1, done=unheard).difference == 0.0
        assert run_race(self.race([], theirs=2.0), rounds=1, done=unheard).difference == 0.25


def test_every_line_compares_the_same_thing():
    model = DeltaModel(hidden_size=32, heads=2, head_width=8)
    races = op_races(tokens=70, heads=2, decoding_heads=3, head_width=8) + model.races(tokens=70, context=10)
    for race in races:
        raced = run_race(race, rounds=1, done=unheard)
        assert raced.difference < 1e-4, race.name
        assert (raced.figures()["bar"] is not None) == (race in races[:2])


def test_a_training_step_reaches_every_parameter_and_uses_the_op_on_one_side_alone():
    model = DeltaModel(hidden_size=32, heads=2, head_width=8)
    race = model.races(tokens=20, context=10)[0]
    assert race.slow
    trained, grads = model._trained, []
    for prepare, num_ours in ((race.ours, 3), (race.theirs, 0), (race.ours, 3)):
        prepare()()
        assert sum(isinstance(vars(part).get("forward"), DeltaForward) for part in trained.modules()) == num_ours
        grads.append([parameter.grad for parameter in trained.parameters()])
    for ours, theirs, again in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
        assert torch.equal(ours, again)  # nothing is added up


def test_our_pass_starts_anew_and_keeps_a_part():
    model = DeltaModel(hidden_size=32, heads=2, head_width=8)
    for race in model.races(tokens=20, context=10)[1:]:
        first, second = (race.ours()()[0] for _ in range(2))
        assert torch.equal(first, second)
        assert first.shape[1] == CHUNK
    caches = []
    backbone = model._plain
    backbone.new_cache, new_cache = lambda **sizes: caches.append(new_cache(**sizes)) or caches[0], backbone.new_cache
    model._our_pass(backbone, 10)()()
    assert caches[0].lengths == [10 + KEPT]


def test_their_prefix_can_be_forked():
    model = random_kimi_linear(hidden_size=32, num_heads=2, head_width=8)
    ids = torch.arange(30)[None]
    prefix, expected = ReferencePrefix(model, ids[:, :22]), model(ids).logits[:, 22:]
    for _ in range(2):
        torch.testing.assert_close(prefix.fork()(ids[:, 22:]), expected, rtol=1e-4, atol=1e-5)


def test_a_random_model_leaves_the_global_random_state():
    before = torch.random.get_rng_state()
    one, two, other = (
        random_kimi_linear(hidden_size=16, num_heads=1, head_width=4, seed=seed).lm_head.weight for seed in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), before)


class TestMemory:
    def test_each_storage_counts_once(self):
        x, y = (torch.ones(1000, requires_grad=True) for _ in range(2))
        assert saved_bytes(lambda: x * y) == 8000
        assert saved_bytes(lambda: x * x + x[:500].square().sum()) == 4000
        assert saved_bytes(lambda: x.exp() * y) == 8000  # the exponential's result and y
        assert saved_bytes(lambda: x + y) == 0

    def test_the_op_keeps_less(self):
        figures = op_memory(tokens=128, heads=2, head_width=16)
        assert figures["inputs_bytes"] == 4 * 128 * 2 * (4 * 16 + 1)
        assert figures["inputs_bytes"] < figures["ours_bytes"] < figures["transformers_bytes"]
        assert figures["ratio"] == pytest.approx(figures["transformers_bytes"] / figures["ours_bytes"], abs=0.005)

    def test_of_a_model_it_is_what_costs_say(self):
        model = DeltaModel(hidden_size=32, heads=2, head_width=8)
        assert model.memory() == {
            "snapshot_bytes_per_row": row_state_bytes(model._plain, context=0),
            "replay_bytes_per_token": replay_bytes_per_token(model._plain),
        }
        assert model.memory()["snapshot_bytes_per_row"] == 3 * 4 * (3 * 16 * 3 + 2 * 8 * 8)


@dataclass
class Liar:
    """Decodes plainly, but for the third token of each row, to which it adds one."""

    backbone: Backbone

    def open(self, prompt):
        self._plain, self._steps = PlainDecoder(self.backbone), 0
        return self._plain.open(prompt)

    def advance(self, decoding, sampler):
        advance = self._plain.advance(decoding, sampler)
        self._steps += 1
        if self._steps != 3:
            return advance
        return Advance(tuple(RowAdvance(((row.tokens[0] + 1) % 256,)) for row in advance.rows), advance.spent)

    def drop(self, decoding, rows):
        self._plain.drop(decoding, rows)


class TestEquality:
    DRAFTS = ("lookup", "mask", "jacobi", "auto")

    @staticmethod
    def backbone(name="kimi_linear"):
        return Backbone.attach(tiny.build(name).requires_grad_(False))

    def models(self, backbone):
        method = registry.get("chunk")
        config = replace(method.load_config("after_surgery"), d_state=8, gate_hidden=8, chunk_width=8)
        models = {
            draft: method.load_model_type().build(replace(config, draft=draft), backbone, backbone.vocab_size)
            for draft in self.DRAFTS
        }
        for model in models.values():
            fill_with_noise(model)
        return models

    def test_noise_is_in_what_the_model_computes_with(self):
        for model in self.models(self.backbone()).values():
            states = model.saved_state()
            values = torch.cat([tensor.flatten() for tensor in states.values()])
            assert 0.9 * NOISE_STD < float(values.std()) < 1.1 * NOISE_STD
            held = {tensor.data_ptr() for tensor in model.parameters()} | {t.data_ptr() for t in model.buffers()}
            assert {tensor.data_ptr() for tensor in states.values()} <= held

    def test_cases_are_reproducible_and_of_every_kind(self):
        cases = draw_cases(32, self.DRAFTS)
        assert cases == draw_cases(32, self.DRAFTS) != draw_cases(32, self.DRAFTS, seed=1)
        kinds = {(case.decoder, len(case.rows), case.sampling[0].greedy) for case in cases}
        assert kinds == {(draft, rows, greedy) for draft in self.DRAFTS for rows in (1, 4) for greedy in (True, False)}
        assert any(len({len(row) for row in case.rows}) > 1 for case in cases)
        assert all(len(case.rows) == len(case.sampling) for case in cases)

    @pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next"])
    def test_exact_decoding_is_plain_decoding(self, name):
        backbone, done = self.backbone(name), []
        cases = draw_cases(16, self.DRAFTS)[::5]
        assert [(case.decoder, len(case.rows)) for case in cases] == list(zip(self.DRAFTS, (1, 4, 1, 4), strict=True))
        found = tally_cases(backbone, self.models(backbone), cases, done=done.append).figures()
        assert found["rows"] == 10 == found["equal"] + found["near_ties"]
        assert found["others"] == []
        assert found["tokens"] == 10 * 24
        assert len(done) == 4

    @pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next"])
    def test_partly_right_drafts_are_partly_accepted(self, name):
        cases = draw_cases(4, [PARTLY_RIGHT])
        found = tally_cases(self.backbone(name), {}, cases, done=unheard).figures()
        assert found["rows"] == 10 == found["equal"] + found["near_ties"]
        # 3.5 of 7 are right, and a token more: 4.5 a pass, but for what the end of a row cuts off.
        assert 3.0 < found["tokens_per_pass"] < 5.0
        assert found["draft_tokens_accepted"] > 150

    def test_what_is_wrong_is_found(self):
        backbone = self.backbone()
        found = tally_cases(backbone, {"liar": Liar(backbone)}, draw_cases(2, ["liar"]), done=unheard).figures()
        assert (found["rows"], found["equal"], found["near_ties"]) == (5, 0, 0)
        assert len(found["others"]) == 5
        assert found["others"][1].startswith("case 1 (liar), row 0: token 2, margin ")
        assert found["margin_median"] > 1e-3

    def test_a_tally_tells_near_ties_from_others(self):
        tally = Tally()
        for agreement in (Agreement(), Agreement(3, 9e-4), Agreement(5, 2e-3), Agreement()):
            tally.add(agreement, label="row")
        figures = tally.figures()
        assert (figures["rows"], figures["equal"], figures["match_rate"], figures["near_ties"]) == (4, 2, 0.5, 1)
        assert figures["others"] == ["row: token 5, margin 2.0e-03"]
        assert figures["margin_median"] == pytest.approx(1.45e-3)
        assert figures["margin_largest"] == 2e-3
        assert Tally().figures()["match_rate"] is None


def test_sizes_that_mean_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"--delta\.quick-rounds is 0; give a whole number from 1 on"):
        DeltaOptions(quick_rounds=0).check()
    with pytest.raises(ConfigError, match=r"--delta\.cases is -1; give a whole number from 0 on"):
        DeltaOptions(cases=-1).check()
    DeltaOptions(cases=0, coarse_cases=0).check()
