"""What checks are made of: the gauge, the yardstick of rounding, the subject, and how verdicts stand on each other."""

from dataclasses import replace

import planted
import pytest
import torch
from torch import nn

from deepen.backbones import tiny
from deepen.check.effort import QUICK, THOROUGH
from deepen.check.gauge import Gauge
from deepen.check.outcome import Fault, NotApplicable, Passed
from deepen.check.rounding import rounding_noise
from deepen.check.subject import subject_of
from deepen.check.suite import CHECKS, Check, check, run
from deepen.core.errors import DeepenError


class Bigram(nn.Module):
    """The smallest language model."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(16, 8, dtype=dtype)
        self.head = nn.Linear(8, 16, dtype=dtype)

    def forward(self, input_ids):
        return self.head(self.table(input_ids))


class TestGauge:
    def test_figures_of_all_cases(self):
        gauge = Gauge(1.0)
        gauge.compare(torch.zeros(1, 2, 3), torch.full((1, 2, 3), 0.5), seen="one", cause="")
        gauge.compare(torch.zeros(2, 3), torch.full((2, 3), 0.25), seen="other", cause="")
        assert gauge.passed() == Passed(2, 0.5, 1.0)

    @pytest.mark.parametrize("shape", [(4, 3), (2, 4, 3)])
    def test_the_first_position_that_differs(self, shape):
        actual = torch.zeros(shape)
        actual[..., 2:, 1] = 5.0
        with pytest.raises(Fault, match=r"here: logits differ by up to 5, first at position 2") as fault:
            Gauge(1.0).compare(actual, torch.zeros(shape), seen="here", cause="why")
        assert fault.value.cause == "why"

    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_what_is_not_finite(self, value):
        with pytest.raises(Fault, match="not finite"):
            Gauge(1.0).compare(torch.full((1, 1, 1), value), torch.zeros(1, 1, 1), seen="", cause="")

    def test_a_diagnosis_is_made_only_where_it_is_needed(self):
        asked = []
        gauge = Gauge(1.0)
        gauge.compare(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), seen="", cause=lambda: asked.append(1) or "why")
        assert not asked
        with pytest.raises(Fault):
            gauge.compare(
                torch.zeros(1, 1, 1), torch.full((1, 1, 1), 2.0), seen="", cause=lambda: asked.append(1) or ""
            )
        assert asked


class TestRounding:
    def test_it_goes_with_the_dtype(self):
        noise = {}
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            subject = subject_of(Bigram(dtype))
            noise[dtype] = rounding_noise(
                subject.model, lambda subject=subject: subject.logits(subject.text(8, seed=0))
            )
        for dtype, size in noise.items():
            assert 0.5 * torch.finfo(dtype).eps < size < 100 * torch.finfo(dtype).eps

    def test_it_goes_with_what_a_model_makes_of_it(self):
        plain, steep = Bigram(), Bigram()
        steep.head.weight.data *= 100
        ids = torch.arange(8)[None]
        noise = [rounding_noise(model, lambda model=model: model(ids)) for model in (plain, steep)]
        assert noise[1] > 20 * noise[0]

    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_equivalent_ways_stay_below(self, name):
        """The same products summed in another order."""
        model = tiny.build(name)
        subject = subject_of(model)
        ids = subject.text(24, seed=1)
        narrow = torch.cat([subject.logits(ids[:, :end])[:, -1:] for end in range(1, 25)], dim=1)
        assert float((narrow - subject.logits(ids)).abs().max()) < subject.allowed / 2

    def test_nothing_is_left_on_the_model(self):
        model = Bigram()
        ids = torch.arange(8)[None]
        before = model(ids)
        rounding_noise(model, lambda: model(ids))
        assert torch.equal(model(ids), before)
        assert not any(module._forward_hooks for module in model.modules())


class TestSubject:
    def test_a_vocabulary_found_by_a_forward(self):
        assert subject_of(Bigram()).vocab_size == 16

    def test_what_forward_takes(self):
        assert not subject_of(Bigram()).takes
        assert subject_of(planted.Uncached("llama")).takes == {"attention_mask", "position_ids"}
        everything = {"attention_mask", "position_ids", "past_key_values", "use_cache"}
        assert subject_of(tiny.build("llama")).takes == everything
        assert subject_of(planted.Cached("llama")).takes == everything

    def test_the_same_text_for_the_same_seed(self):
        subject = subject_of(Bigram())
        assert torch.equal(subject.text(5, seed=1), subject.text(5, seed=1))
        assert not torch.equal(subject.text(9, seed=1), subject.text(9, seed=2))

    def test_what_is_no_language_model(self):
        class Classifier(Bigram):
            def forward(self, input_ids):
                return super().forward(input_ids).mean(dim=1)

        with pytest.raises(DeepenError, match=r"\[1, 16\] where logits \[batch, tokens, vocabulary\] are expected"):
            subject_of(Classifier())


class TestSuite:
    def test_checks_stand_on_earlier_ones(self):
        names = [each.name for each in CHECKS]
        assert len(set(names)) == len(names)
        for index, each in enumerate(CHECKS):
            assert set(each.needs) <= set(names[:index]), each.name

    def test_what_stands_on_a_failure_is_not_judged(self):
        def fails(subject, effort):
            raise Fault("seen", cause="why")

        def not_there(subject, effort):
            raise NotApplicable("lacks it")

        checks = [
            Check("first", "?", fails),
            Check("second", "?", lambda subject, effort: Passed(1), needs=("first",)),
            Check("third", "?", lambda subject, effort: Passed(1), needs=("second",)),
            Check("lacking", "?", not_there),
            Check("on it", "?", lambda subject, effort: Passed(1, note="so"), needs=("lacking",)),
            Check("long", "?", fails, slow=True),
        ]
        told = []
        report = run(subject_of(Bigram()), QUICK, checks=checks, done=told.append)
        verdicts = [each.verdict for each in report.findings]
        assert verdicts == ["failed", "not judged", "not judged", "not applicable", "passed", "left out"]
        assert tuple(told) == report.findings and not report.passed
        assert [each.check for each in report.failed] == ["first"] and report.findings[4].detail == "so"
        assert "seen" in str(report) and "likely cause: why" in str(report)

    def test_a_crash_is_a_finding(self):
        class Crashes(Bigram):
            def forward(self, input_ids):
                if input_ids.shape[1] > 1:
                    raise ZeroDivisionError("by length")
                return super().forward(input_ids)

        report = run(subject_of(Crashes()), QUICK)
        assert [each.check for each in report.failed] == ["repeatability"]
        assert "ZeroDivisionError: by length" in report.failed[0].detail

    @pytest.mark.parametrize("effort", [QUICK, THOROUGH], ids=["quick", "thorough"])
    def test_a_short_context(self, effort):
        class Short(Bigram):
            config = type("Config", (), {"vocab_size": 16, "max_position_embeddings": 6})

            def forward(self, input_ids):
                assert input_ids.shape[1] <= 6
                return super().forward(input_ids)

        report = run(subject_of(Short()), replace(effort, slow=False))
        assert report.passed, str(report)

    def test_the_front_door(self):
        report = check(Bigram(), quick=True, name="bigram")
        assert report.passed and report.model == "bigram" and report.to_dict()["passed"]
