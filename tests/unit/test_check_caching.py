"""Faults of a model's own cache, each found by the check that is about it and by no other."""

from random import Random

import planted
import pytest
import torch
from transformers import Gemma3TextConfig, GPT2Config, Lfm2Config, MistralConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from deepen.backbones import tiny
from deepen.check import caching
from deepen.check.effort import QUICK, THOROUGH
from deepen.check.held import first_difference, held_by, slots_at_odds
from deepen.check.outcome import Fault, NotApplicable
from deepen.check.report import Report
from deepen.check.subject import subject_of
from deepen.check.suite import run

_SHARED = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _SHARED | {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.2}


def found(report: Report, check: str) -> str:
    """What the only failed check of `report` says, which is to be `check`."""
    assert [finding.check for finding in report.failed] == [check], str(report)
    return f"{report.failed[0].detail}\n{report.failed[0].cause}"


def verdict(report: Report, check: str) -> str:
    return next(finding.verdict for finding in report.findings if finding.check == check)


def draw_layers(seed: str, num_layers: int) -> list[int]:
    return Random(seed).sample(range(num_layers), 2)


class TestSoundModels:
    @pytest.mark.parametrize("name", ["llama", "qwen3"])
    @pytest.mark.parametrize("kind", [planted.Cached, planted.Looped], ids=lambda kind: kind.__name__)
    def test_with_a_signature_of_its_own(self, name, kind):
        report = run(subject_of(kind(name)), QUICK)
        assert report.passed and verdict(report, "cache rollback") == "passed", str(report)

    @pytest.mark.parametrize("num_keys", [1, 4])
    def test_recurrent_with_a_cache_that_can_be_cropped(self, num_keys):
        report = run(subject_of(planted.RecurrentModel(num_keys)), QUICK)
        assert report.passed, str(report)
        unattached = {each.check for each in report.findings if each.verdict == "not applicable"}
        assert unattached.isdisjoint({"padding", "cache", "cache rollback", "cache batch", "generation"})

    @pytest.mark.slow
    @pytest.mark.parametrize("num_keys", [1, 4])
    def test_recurrent_thoroughly(self, num_keys):
        report = run(subject_of(planted.RecurrentModel(num_keys)), THOROUGH)
        assert report.passed, str(report)

    @pytest.mark.parametrize(
        "config",
        [
            GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
            MistralConfig(**_GROUPED, sliding_window=16),
            Gemma3TextConfig(**_GROUPED, head_dim=8, sliding_window=16),
            Lfm2Config(**_GROUPED, layer_types=["conv", "full_attention"], pad_token_id=0),
        ],
        ids=lambda config: config.model_type,
    )
    def test_caches_of_other_kinds(self, config):
        torch.manual_seed(0)
        report = run(subject_of(AutoModelForCausalLM.from_config(config)), QUICK)
        assert report.passed and verdict(report, "cache rollback") == "passed", str(report)

    def test_states_of_transformers_are_not_held_to_rollback(self):
        report = run(subject_of(tiny.build("kimi_linear")), QUICK)
        said = next(each for each in report.findings if each.check == "cache rollback")
        assert said.verdict == "not applicable" and "LinearAttentionLayer" in said.detail


class TestPlantedFaults:
    @pytest.mark.parametrize("name", ["llama", "qwen3"])
    @pytest.mark.parametrize("layer", draw_layers("slot", 4))
    def test_two_recursions_in_one_slot(self, name, layer):
        said = found(run(subject_of(planted.Looped(name, wrong=(layer, 1))), QUICK), "cache")
        assert "write to the same slot" in said and f"layers[{layer}].keys grows by 2 entries" in said

    def test_the_slot_that_is_left_empty_is_named(self):
        said = found(run(subject_of(planted.Looped("llama", wrong=(1, 1))), QUICK), "cache")
        assert "layers[5] holds nothing" in said

    @pytest.mark.parametrize("name", ["llama", "nanochat"])
    def test_positions_that_begin_again(self, name):
        said = found(run(subject_of(planted.RestartingPositions(name)), QUICK), "cache")
        assert "with position_ids given it is right" in said

    @pytest.mark.parametrize("name", ["llama", "qwen3"])
    def test_positions_that_are_not_wound_back(self, name):
        assert run(subject_of(planted.CountsPositions(name, winds_back=True)), QUICK).passed
        said = found(run(subject_of(planted.CountsPositions(name, winds_back=False)), QUICK), "cache rollback")
        assert "positions shifted by 8, the number of tokens taken back" in said

    @pytest.mark.parametrize("num_keys", [1, 4])
    @pytest.mark.parametrize("layer", draw_layers("state", 3))
    def test_a_state_that_is_not_rolled_back(self, num_keys, layer):
        said = found(run(subject_of(planted.RecurrentModel(num_keys, stale_state=layer)), QUICK), "cache rollback")
        assert f"crop does not roll back slots[{layer}].state" in said

    @pytest.mark.parametrize("num_keys", [1, 4])
    @pytest.mark.parametrize("layer", draw_layers("window", 3))
    def test_a_window_that_is_stale(self, num_keys, layer):
        said = found(run(subject_of(planted.RecurrentModel(num_keys, stale_window=layer)), QUICK), "cache rollback")
        assert f"crop does not roll back slots[{layer}].window" in said

    @pytest.mark.parametrize("name", ["llama", "qwen3"])
    def test_steps_whose_positions_count_pads(self, name):
        said = found(run(subject_of(planted.PositionsFromCache(name)), QUICK), "cache batch")
        assert "positions of a cached step count the pads" in said

    @pytest.mark.parametrize("name", ["llama", "qwen3"])
    def test_steps_that_forget_the_mask(self, name):
        said = found(run(subject_of(planted.ForgetsMask(name)), QUICK), "cache batch")
        assert "pads are seen" in said

    @pytest.mark.parametrize("name", ["llama", "qwen3"])
    def test_generation(self, name):
        said = found(run(subject_of(planted.wrong_when_generating(name)), QUICK), "generation")
        assert "prepare_inputs_for_generation" in said


class TestApplicability:
    def test_no_cache(self):
        with pytest.raises(NotApplicable, match="takes no past_key_values"):
            caching.cache(subject_of(planted.Uncached("llama")), QUICK)

    def test_no_crop(self):
        class Firm(planted.RecurrentModel):
            def forward(self, input_ids, past_key_values=None, use_cache=False):
                logits, *cache = super().forward(
                    input_ids, past_key_values=past_key_values and past_key_values[0], use_cache=use_cache
                )
                return logits, cache

        with pytest.raises(NotApplicable, match="has no crop"):
            caching.rollback(subject_of(Firm(1)), QUICK)

    def test_a_cache_that_breaks(self):
        class Breaks(planted.Cached):
            def forward(self, input_ids, past_key_values=None, use_cache=False):
                if past_key_values is not None and input_ids.shape[1] > 1:
                    raise ValueError("one at a time")
                return super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache)

        with pytest.raises(Fault, match="in pieces of 3: the model raises ValueError: one at a time"):
            caching.cache(subject_of(Breaks("llama")), QUICK)


class TestHeld:
    def test_tensors_and_counters_of_any_object(self):
        class Slot:
            def __init__(self):
                self.keys, self.count, self.ready = torch.ones(2), 3, True

        held = held_by({"layers": [Slot(), (torch.zeros(1), None)]})
        assert list(held) == ["[layers][0].keys", "[layers][0].count", "[layers][1][0]"]

    def test_an_object_that_holds_itself(self):
        loop: list[object] = [torch.ones(1)]
        loop.append(loop)
        assert list(held_by(loop)) == ["[0]"]

    def test_it_is_a_copy(self):
        tensor = torch.zeros(1)
        held = held_by([tensor])
        tensor.add_(1)
        assert not held["[0]"]

    def test_values_before_shapes(self):
        right = {"record": torch.ones(3), "state": torch.ones(2), "count": torch.tensor(1.0)}
        assert not first_difference(right, right)
        assert "count (it is 4" in first_difference(right | {"count": torch.tensor(4.0)}, right)
        assert first_difference(right | {"record": torch.ones(1)}, right).startswith("record (it is [1]")
        wrong = right | {"record": torch.ones(1), "state": torch.zeros(2)}
        assert first_difference(wrong, right).startswith("state")

    def test_slots(self):
        one = {f"layers[{slot}].keys": torch.zeros(1, 2, 1, 4) for slot in range(3)}
        two = {name: torch.zeros(1, 2, 2, 4) for name in one}
        assert not slots_at_odds(one, two)
        crowded = one | {"layers[1].keys": torch.zeros(1, 2, 2, 4)}
        assert slots_at_odds(crowded, None) == "after one token layers[1].keys holds 2 entries"
        del crowded["layers[0].keys"]
        assert "layers[0] holds nothing" in slots_at_odds(crowded, None)
