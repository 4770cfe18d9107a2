"""The checks of passes: green on sound models, and each planted fault found by its own check and no other.

A fault sits in one layer, drawn by a seed. What is expected is written down beside it: the check, and words that its
cause must have.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepen.backbones import tiny
from deepen.backbones.cache import PrefixCache, RecurrentStore
from deepen.backbones.hf import Backbone
from deepen.check.effort import QUICK, THOROUGH
from deepen.check.report import Report
from deepen.check.subject import subject_of
from deepen.check.suite import CHECKS, run

SLOW = pytest.mark.slow
OF_PASSES = ("passes", "passes batch", "passes rollback")
STANDING = ("repeatability", "causality", *OF_PASSES)


def report_of(model: nn.Module) -> Report:
    checks = [check for check in CHECKS if check.name in STANDING]
    return run(subject_of(model), QUICK, checks=checks)


def assert_found(report: Report, check: str, *words: str) -> None:
    """`check` alone is red, with these words in its cause, and those before it are green."""
    assert [finding.check for finding in report.failed] == [check], report
    (failed,) = report.failed
    said = f"{failed.detail} {failed.cause}"
    for word in words:
        assert word in said, said
    for finding in report.findings[: list(report.findings).index(failed)]:
        assert finding.verdict == "passed"


@pytest.mark.parametrize(
    "name", ["llama", "kimi_linear", *(pytest.param(name, marks=SLOW) for name in ("qwen3", "nanochat", "qwen3_next"))]
)
def test_sound_models_are_green(name: str) -> None:
    report = report_of(tiny.build(name))
    assert [finding.verdict for finding in report.findings] == ["passed"] * len(STANDING), report
    assert all(finding.num_cases >= 8 for finding in report.findings if finding.check in OF_PASSES)


@SLOW
@pytest.mark.parametrize("name", tiny.NAMES)
def test_sound_models_are_green_thoroughly(name: str) -> None:
    report = run(subject_of(tiny.build(name)), THOROUGH, checks=[each for each in CHECKS if each.name in OF_PASSES])
    assert report.passed, report


@pytest.mark.parametrize("packed", [False, True])
def test_the_backbone_is_left_as_it_was_found(packed: bool) -> None:
    subject = subject_of(tiny.build("llama"))
    assert subject.backbone is not None
    if packed:
        subject.backbone.pack()
    report = run(subject, QUICK, checks=[each for each in CHECKS if each.name == "passes"])
    assert report.passed and subject.backbone.packed == packed
    assert any("forward" in vars(module) for module in subject.model.modules()) == packed


def test_what_deepen_cannot_attach_to_is_not_judged() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 7)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.table(input_ids)

    report = report_of(Lookup())
    findings = {finding.check: finding for finding in report.findings}
    for check in OF_PASSES:
        assert findings[check].verdict == "not applicable", str(report)
        assert "Lookup is not a transformers model" in findings[check].detail


# Planted faults. Sites: layers, drawn by a seed.


def sites(name: str, num: int, *, recurrent: bool) -> list[int]:
    backbone = Backbone.attach(tiny.build(name))
    layers = backbone.recurrent_layers if recurrent else range(backbone.num_layers)
    return sorted(Random(name).sample(list(layers), num))


def at_sites(*names: str, recurrent: bool) -> Any:
    """Two sites in each of two models; all but the first of each only in the slow profile."""
    cases = [(name, layer, index) for name in names for index, layer in enumerate(sites(name, 2, recurrent=recurrent))]
    return pytest.mark.parametrize(
        ("name", "layer"),
        [pytest.param(name, layer, marks=SLOW if index else ()) for name, layer, index in cases],
    )


@contextmanager
def store_with(layer: int, method: str, wrong: Callable[[RecurrentStore, Sequence[int]], Tensor]) -> Iterator[None]:
    """In every cache made in the block, the store of one recurrent layer has another way to its state or window."""
    init = PrefixCache.__init__

    def planted(self: PrefixCache, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        store = self.layers[layer]
        setattr(store, method, lambda counts: wrong(store, counts))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixCache, "__init__", planted)
        yield


def columns_at(store: RecurrentStore, counts: Sequence[int]) -> Tensor:
    assert store._columns is not None
    return torch.stack(
        [row[:, count : count + store._num_before] for row, count in zip(store._columns, counts, strict=True)]
    )


class TestStates:
    @at_sites("kimi_linear", "qwen3_next", recurrent=True)
    def test_a_state_that_is_not_taken_back(self, name: str, layer: int) -> None:
        with store_with(layer, "_state_after", lambda store, counts: store._state):
            report = report_of(tiny.build(name))
        assert_found(report, "passes rollback", f"layer {layer}'s state is that after all", "tokens of the pass")

    @at_sites("kimi_linear", "qwen3_next", recurrent=True)
    def test_a_window_that_goes_to_the_end_of_the_pass(self, name: str, layer: int) -> None:
        def wrong(store: RecurrentStore, counts: Sequence[int]) -> Tensor:
            return columns_at(store, store.window.widths)

        with store_with(layer, "_columns_after", wrong):
            report = report_of(tiny.build(name))
        assert_found(report, "passes rollback", f"layer {layer}'s window is that after all", "tokens of the pass")

    @at_sites("kimi_linear", "qwen3_next", recurrent=True)
    def test_a_window_that_stays_behind(self, name: str, layer: int) -> None:
        def wrong(store: RecurrentStore, counts: Sequence[int]) -> Tensor:
            whole = tuple(counts) == store.window.widths
            return columns_at(store, counts if whole else [0] * len(counts))

        with store_with(layer, "_columns_after", wrong):
            report = report_of(tiny.build(name))
        assert_found(report, "passes rollback", f"layer {layer}'s window is that after the", "tokens before the pass")

    @at_sites("kimi_linear", "qwen3_next", recurrent=True)
    def test_a_state_that_pads_reach(self, name: str, layer: int) -> None:
        """The width of the pass in place of the row's: a shorter row's window ends in pads."""

        def wrong(store: RecurrentStore, counts: Sequence[int]) -> Tensor:
            behind = max(store.window.widths) - max(counts)
            return columns_at(store, [max(counts) - behind] * len(counts))

        with store_with(layer, "_columns_after", wrong):
            report = report_of(tiny.build(name))
        assert_found(report, "passes batch", "tokens at pads reach the row")


@contextmanager
def positions_that_stay(model: Any, layer: int) -> Iterator[None]:
    """Attention of one layer rotates by positions that it counts on, whatever is forgotten of its passes."""
    commit, forgotten = PrefixCache.commit, {}

    def counting(cache: PrefixCache, counts: Sequence[int]) -> None:
        window = cache._window
        commit(cache, counts)
        before = forgotten.get(cache, [])
        if len(before) != len(counts):  # new, or rows were dropped
            before = [0] * len(counts)
        forgotten[cache] = [
            old + width - count for old, width, count in zip(before, window.widths, counts, strict=True)
        ]

    positions: dict[str, Tensor] = {}

    def remember(_model: object, _inputs: object, arguments: dict[str, Any]) -> None:
        positions["now"] = arguments.get("position_ids")

    def rotate(_attention: object, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        cache = arguments.get("past_key_values")
        if isinstance(cache, PrefixCache) and cache in forgotten and len(forgotten[cache]) == len(cache.lengths):
            shifted = positions["now"] + torch.tensor(forgotten[cache])[:, None]
            rotary = model.model.rotary_emb(arguments["hidden_states"], shifted)
            arguments = {**arguments, "position_embeddings": rotary}
        return inputs, arguments

    handles = [
        model.register_forward_pre_hook(remember, with_kwargs=True),
        model.model.layers[layer].self_attn.register_forward_pre_hook(rotate, with_kwargs=True),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixCache, "commit", counting)
        yield
    for handle in handles:
        handle.remove()


@at_sites("llama", "qwen3", recurrent=False)
def test_positions_that_do_not_go_back(name: str, layer: int) -> None:
    model = tiny.build(name)
    with positions_that_stay(model, layer):
        report = report_of(model)
    assert_found(
        report,
        "passes rollback",
        f"layer {layer}'s keys are those of tokens",
        "positions further on",
        "did not go back",
    )


# Other faults of passes, each in any layer of a model: what is done to the layer's output while a pass runs.


@contextmanager
def edited_in_passes(model: Any, layer: int, edit: Callable[[Tensor, PrefixCache], Tensor]) -> Iterator[None]:
    def hook(_layer: object, _inputs: object, arguments: dict[str, Any], output: Any) -> Any:
        cache = arguments.get("past_key_values")
        return edit(output, cache) if isinstance(cache, PrefixCache) else output

    handle = model.model.layers[layer].register_forward_hook(hook, with_kwargs=True)
    yield
    handle.remove()


def counted_from_nought(h: Tensor, cache: PrefixCache) -> Tensor:
    """Something that begins anew with every pass, at its first position."""
    return h + 0.3 * torch.linspace(1, 0, h.shape[1]).square()[None, :, None] * (max(cache.lengths) > 0)


def centred_over_the_pass(h: Tensor, cache: PrefixCache) -> Tensor:
    return h if len(h) == 1 else h - 0.1 * h.mean(dim=(0, 1), keepdim=True)


def centred_over_the_batch(h: Tensor, cache: PrefixCache) -> Tensor:
    real = [row for row, width in enumerate(cache.layers[0].window.widths) if width]
    return h if len(real) == 1 else h - 0.1 * h[real, :1].mean(dim=0, keepdim=True)


def placed_by_the_longest_row(h: Tensor, cache: PrefixCache) -> Tensor:
    lengths = torch.tensor(cache.lengths)
    return h + 0.05 * (lengths.max() - lengths)[:, None, None]


PLANTED: list[tuple[str, Callable[[Tensor, PrefixCache], Tensor], str, str]] = [
    ("llama", counted_from_nought, "passes", "depends on where the text is cut"),
    ("qwen3", counted_from_nought, "passes", "depends on where the text is cut"),
    ("llama", centred_over_the_pass, "passes batch", "reach"),
    ("qwen3", centred_over_the_pass, "passes batch", "reach"),
    ("llama", centred_over_the_batch, "passes batch", "another row's tokens reach this one"),
    ("nanochat", placed_by_the_longest_row, "passes batch", "their lengths do"),
    ("llama", placed_by_the_longest_row, "passes batch", "their lengths do"),
]


@pytest.mark.parametrize(("name", "edit", "check", "words"), PLANTED)
@pytest.mark.parametrize("draw", [0, pytest.param(1, marks=SLOW)])
def test_a_layer_that_looks_at_the_pass(
    name: str, edit: Callable[[Tensor, PrefixCache], Tensor], check: str, words: str, draw: int
) -> None:
    model = tiny.build(name)
    layer = Random(f"{name}{edit.__name__}{draw}").randrange(4)
    with edited_in_passes(model, layer, edit):
        report = report_of(model)
    assert_found(report, check, words)
    if check == "passes":
        assert f"layer {layer} " in report.failed[0].cause


def test_a_layer_that_is_another_in_passes_is_named() -> None:
    model = tiny.build("qwen3")
    with edited_in_passes(model, 2, lambda h, cache: 1.1 * h):
        report = report_of(model)
    assert_found(report, "passes", "layer 2 (Qwen3DecoderLayer) is the first that computes otherwise", "at once")
