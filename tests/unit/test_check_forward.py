"""Faults of a model's own forward, each found by the check that is about it and by no other."""

from dataclasses import replace
from random import Random

import planted
import pytest
import torch

from deepen.backbones import tiny
from deepen.backbones.whole import saved_and_loaded
from deepen.check import copies, forward
from deepen.check.effort import QUICK, THOROUGH
from deepen.check.outcome import Fault, NotApplicable
from deepen.check.padded import pad, positions_of
from deepen.check.report import Report
from deepen.check.subject import subject_of
from deepen.check.suite import run

ALL_DTYPES = replace(QUICK, dtypes=THOROUGH.dtypes)
COMPILED = replace(QUICK, slow=True)


def found(report: Report, check: str) -> str:
    """What the only failed check of `report` says, which is to be `check`."""
    assert [finding.check for finding in report.failed] == [check], str(report)
    return f"{report.failed[0].detail}\n{report.failed[0].cause}"


def draw_places(fault: object) -> list[tuple[str, int]]:
    """Two architectures and a layer of each."""
    chance = Random(str(fault))
    return [(name, chance.randrange(4)) for name in chance.sample(tiny.NAMES, 2)]


def faults(*kinds_and_words: tuple[type, str]) -> list[object]:
    return [
        pytest.param(kind, words, name, site, id=f"{kind.__name__}-{name}-{site}")
        for kind, words in kinds_and_words
        for name, site in draw_places(kind.__name__)
    ]


class TestSoundModels:
    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_nothing_is_found(self, name):
        report = run(subject_of(tiny.build(name)), QUICK)
        assert report.passed, str(report)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_nothing_is_found_thoroughly(self, name):
        report = run(subject_of(tiny.build(name)), THOROUGH)
        assert report.passed, str(report)

    @pytest.mark.parametrize("module", [planted.RoutedByToken, planted.RunningMean], ids=lambda kind: kind.__name__)
    def test_the_counterparts_of_planted_faults(self, module):
        report = run(subject_of(planted.with_module(planted.Uncached("qwen3"), 1, module)), QUICK)
        assert report.passed, str(report)

    def test_the_model_is_left_as_it_was(self):
        model = tiny.build("llama")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        settings, attributes = model.generation_config.to_dict(), set(vars(model))
        random_state = torch.random.get_rng_state()
        run(subject_of(model), QUICK)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert model.generation_config.to_dict() == settings and set(vars(model)) == attributes
        assert torch.equal(torch.random.get_rng_state(), random_state)
        assert not any(module._forward_hooks for module in model.modules())


class TestPlantedFaults:
    @pytest.mark.parametrize(
        ("kind", "words", "name", "site"),
        faults(
            (planted.AlwaysDrops, "dropout or noise"),
            (planted.MovesWithEachForward, "counter that a forward moves"),
        ),
    )
    def test_repeatability(self, kind, words, name, site):
        model = planted.with_module(planted.Cached(name), site, kind)
        assert words in found(run(subject_of(model), QUICK), "repeatability")

    @pytest.mark.parametrize(("kind", "words", "name", "site"), faults((planted.Routed, "expert-choice routing")))
    def test_causality(self, kind, words, name, site):
        model = planted.with_module(planted.Uncached(name), site, kind)
        assert words in found(run(subject_of(model), QUICK), "causality")

    @pytest.mark.parametrize(
        ("kind", "words", "name", "site"),
        faults(
            (planted.MixesRows, "depends on who stands beside it"),
            (planted.ScalesByPlace, "depends on its place"),
            (planted.ScalesByNumber, "depends on how many rows there are"),
        ),
    )
    def test_batch(self, kind, words, name, site):
        model = planted.with_module(planted.Cached(name), site, kind)
        assert words in found(run(subject_of(model), QUICK), "batch")

    @pytest.mark.parametrize(
        ("kind", "words", "name", "site"),
        faults(
            (planted.MeanCountsPads, "pads on the left are counted"),
            (planted.MeanSeesPads, "pads on the left are seen"),
        ),
    )
    def test_padding(self, kind, words, name, site):
        model = planted.with_module(planted.Uncached(name), site, kind)
        assert words in found(run(subject_of(model), QUICK), "padding")

    @pytest.mark.parametrize(
        ("kind", "words", "name", "site"), faults((planted.Float32Constant, "a tensor made in float32"))
    )
    def test_precision(self, kind, words, name, site):
        model = planted.with_module(planted.Cached(name), site, kind)
        assert words in found(run(subject_of(model), QUICK), "precision")

    @pytest.mark.parametrize(
        ("kind", "words", "name", "site"),
        [
            (planted.Overflows, "first in what model.model.layers.2.mlp.first gives", "llama", 2),
            (planted.Overflows, "first in what model.model.layers.1.mlp.first gives", "nanochat", 1),
            (planted.Cancels, "a difference of large numbers", "llama", 0),
            (planted.Cancels, "a difference of large numbers", "qwen3", 3),
        ],
    )
    def test_precision_of_every_dtype(self, kind, words, name, site):
        model = planted.with_module(planted.Cached(name), site, kind)
        assert words in found(run(subject_of(model), ALL_DTYPES), "precision")

    @pytest.mark.parametrize(
        ("kind", "words", "name", "site"),
        faults(
            (planted.InPlainList, "mlp.first.gains are not in the state dict"),
            (planted.DropsKey, "mlp.first.gain that loading asks for"),
        ),
    )
    def test_saving(self, kind, words, name, site):
        model = planted.with_module(planted.Cached(name), site, kind)
        assert words in found(run(subject_of(model), QUICK), "saving")

    @pytest.mark.parametrize(("name", "site"), [("llama", 2), ("qwen3", 0)])
    def test_saving_of_transformers(self, name, site):
        said = found(run(subject_of(planted.not_saved(name, site)), QUICK), "saving")
        assert f"not restored: model.layers.{site}.mlp.gain" in said

    def test_what_is_not_loaded_is_never_by_chance_what_it_was(self, tmp_path):
        """Nobody writes to such a tensor, and its memory may be one's that had the same values."""
        loaded = saved_and_loaded(planted.not_saved("llama", 2), tmp_path)
        assert loaded.model.layers[2].mlp.gain.isnan().all()
        assert not torch.are_deterministic_algorithms_enabled()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("kind", "words", "name", "site"), faults((planted.OtherWhenCompiled, "when the model is traced"))
    )
    def test_compile(self, kind, words, name, site):
        model = planted.with_module(planted.Cached(name), site, kind)
        assert words in found(run(subject_of(model), COMPILED), "compile")


class TestPadding:
    def test_no_mask_no_padding(self):
        class Plain(torch.nn.Embedding):
            def forward(self, input_ids):
                return super().forward(input_ids)

        with pytest.raises(NotApplicable, match="takes no attention_mask"):
            forward.padding(subject_of(Plain(8, 8)), QUICK)

    def test_positions_that_count_pads(self):
        """Only left pads fail where positions can't be given."""

        class NoPositions(planted.Uncached):
            def forward(self, input_ids, attention_mask=None):
                positions = torch.arange(input_ids.shape[1])[None]
                weights = self.inner.model.model.embed_tokens.weight
                shift = torch.cos(positions[..., None] * torch.arange(1, weights.shape[1] + 1) / 50)
                mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
                h = (weights[input_ids] + shift) * mask[..., None]
                return h.cumsum(dim=1) @ weights.T

        with pytest.raises(Fault, match="pads on its left") as fault:
            forward.padding(subject_of(NoPositions("llama")), QUICK)
        assert "forward takes no position_ids" in fault.value.cause

    def test_softmax_over_nothing(self):
        class Infinite(planted.Uncached):
            def forward(self, input_ids, attention_mask=None, position_ids=None):
                logits = super().forward(input_ids, attention_mask, position_ids)
                if attention_mask is None or attention_mask.all():
                    return logits
                return logits.masked_fill((attention_mask[:, :1] == 0)[..., None], torch.nan)

        with pytest.raises(Fault, match="not finite") as fault:
            forward.padding(subject_of(Infinite("llama")), QUICK)
        assert "infinite or undefined" in fault.value.cause

    def test_pads_hold_garbage_and_are_masked(self):
        rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
        left, right = (pad(rows, side, torch.tensor([7, 8, 9])) for side in ("left", "right"))
        assert left.ids.tolist() == [[1, 2, 3], [7, 8, 4]] and right.ids.tolist() == [[1, 2, 3], [4, 8, 9]]
        assert left.mask.tolist() == [[1, 1, 1], [0, 0, 1]] and right.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
        assert positions_of(left.mask).tolist() == [[0, 1, 2], [0, 0, 0]] and right.positions is None
        assert [row[where].tolist() for row, where in zip(left.ids, left.real, strict=True)] == [[1, 2, 3], [4]]


class TestPrecision:
    def test_all_dtypes_of_a_sound_model(self):
        passed = copies.precision(subject_of(tiny.build("llama")), ALL_DTYPES)
        assert passed.note == "in bfloat16, float16, float32, float64"

    def test_a_dtype_without_kernels_is_passed_over(self):
        class No64(planted.Uncached):
            def forward(self, input_ids):
                logits = super().forward(input_ids)
                if logits.dtype == torch.float64:
                    raise RuntimeError("\"product\" not implemented for 'Double'")
                return logits

        assert "float64" not in copies.precision(subject_of(No64("llama")), ALL_DTYPES).note

    def test_a_mask_that_does_not_close(self):
        class Weak(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(16, 16)

            def forward(self, input_ids):
                h = self.table(input_ids)
                closed = torch.finfo(h.dtype).min if h.dtype != torch.bfloat16 else -1.0
                scores = 0.1 * h @ h.mT + torch.full((h.shape[1], h.shape[1]), closed, dtype=h.dtype).triu(1)
                return scores.softmax(dim=-1) @ h

        with pytest.raises(Fault, match="in bfloat16 later tokens move a logit"):
            torch.manual_seed(0)
            copies.precision(subject_of(Weak()), QUICK)

    def test_logits_of_a_fixed_dtype(self):
        class Wide(planted.Uncached):
            def forward(self, input_ids):
                return super().forward(input_ids).double()

        with pytest.raises(Fault, match="in bfloat16 logits come in float64"):
            copies.precision(subject_of(Wide("llama")), QUICK)

    def test_the_model_keeps_its_dtype(self):
        model = tiny.build("qwen3", dtype=torch.bfloat16)
        copies.precision(subject_of(model), ALL_DTYPES)
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


class TestCompile:
    @pytest.mark.slow
    def test_a_sound_model(self):
        model = tiny.build("llama")
        before = set(vars(model))
        assert "backend" in copies.compilation(subject_of(model), QUICK).note
        assert set(vars(model)) == before

    def test_without_a_compiler(self, monkeypatch):
        class Plain(torch.nn.Embedding):
            def forward(self, input_ids):
                return super().forward(input_ids)

        monkeypatch.setattr("shutil.which", lambda name: None)
        assert copies.compilation(subject_of(Plain(8, 8)), QUICK).note == "with the aot_eager backend"

    def test_it_is_left_out_of_a_quick_run(self):
        findings = run(subject_of(planted.RecurrentModel(1)), QUICK).findings
        assert [each.verdict for each in findings if each.check == "compile"] == ["left out"]


class TestSaving:
    @pytest.mark.parametrize("name", ["llama", "kimi_linear"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_through_transformers(self, name, dtype):
        assert "from_pretrained" in copies.saving(subject_of(tiny.build(name, dtype=dtype)), QUICK).note

    def test_tied_tensors_of_a_module_of_ones_own(self):
        model = planted.RecurrentModel(2)
        assert model.head.weight is model.embedding.weight
        assert "state dict" in copies.saving(subject_of(model), QUICK).note

    def test_what_is_no_tensor(self):
        class Restoring(planted.RecurrentModel):
            """Moves a setting, which is no tensor, whenever tensors are loaded."""

            scale = 1.0

            def load_state_dict(self, *args, **kwargs):
                self.scale = 2.0
                return super().load_state_dict(*args, **kwargs)

            def forward(self, *args, **kwargs):
                logits, *others = super().forward(*args, **kwargs)
                return self.scale * logits, *others

        with pytest.raises(Fault, match="logits differ") as fault:
            copies.saving(subject_of(Restoring(1)), QUICK)
        assert "something other than tensors" in fault.value.cause
