"""The checks of the ledger: green on sound models, and red where something is run or held that it doesn't tell of."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.check import counts
from deepen.check.effort import QUICK
from deepen.check.outcome import Fault
from deepen.check.subject import subject_of
from deepen.core import registry


class Widened(nn.Module):
    """An MLP with a product by a weight that is in no linear."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner = inner
        self.turn = nn.Parameter(torch.eye(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.turn


class Hoarding(DynamicCache):
    """Keeps what each layer was given a second time."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.seen = [*getattr(self, "seen", []), key_states]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def adapter(base: str = "llama", preset: str = "after_surgery", **fields: Any) -> Any:
    """An untrained sidecar, by the registry."""
    method = registry.get("chunk")
    backbone = Backbone.attach(tiny.build(base))
    config = replace(method.load_config(preset), **fields)
    return method.load_model_type().build(config, backbone, backbone.vocab_size).eval()


@pytest.mark.parametrize("name", tiny.NAMES)
def test_sound_models_are_green(name):
    subject = subject_of(tiny.build(name))
    assert counts.flops(subject, QUICK).num_cases == (2 if subject.backbone.recurrent_layers else 6)
    assert counts.num_bytes(subject, QUICK).num_cases == (3 if subject.backbone.recurrent_layers else 6)


@pytest.mark.parametrize("width", [4, 12, 16, 128])
def test_a_chunk_may_be_longer_than_what_is_decoded(width):
    """One advance then brings all, and there is no second."""
    sidecar = adapter(preset="recursive_phase_c", chunk_width=width, max_inner_steps=2)
    of_base = counts.flops(subject_of(tiny.build("llama")), QUICK).num_cases
    found = counts.flops(subject_of(sidecar), QUICK).num_cases - of_base
    assert found == (3 if width == 4 else 1)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_product_that_is_not_counted_is_named(name, layer):
    model = tiny.build(name)
    model.model.layers[layer].mlp = Widened(model.model.layers[layer].mlp, 64)
    with pytest.raises(Fault, match=r"counted [\d,]+, the ledger tells") as found:
        counts.flops(subject_of(model), QUICK)
    assert f"model.layers.{layer}.mlp.turn" in found.value.cause


def test_a_layer_run_twice_is_found():
    model = tiny.build("llama")
    own = model.model.layers[1].mlp.forward
    model.model.layers[1].mlp.forward = lambda x: own(x) + 0 * own(x)
    with pytest.raises(Fault) as found:
        counts.flops(subject_of(model), QUICK)
    assert "more or less often than once a token" in found.value.cause


@pytest.mark.parametrize("field", ["passes", "positions", "added_flops"])
def test_a_method_that_tells_of_other_work_is_found(field, monkeypatch):
    model = adapter()
    assert counts.flops(subject_of(model), QUICK).num_cases == 9
    own = type(model).advance

    def lying(self: Any, decoding: Any, sampler: Any) -> Any:
        advance = own(self, decoding, sampler)
        return replace(advance, spent=replace(advance.spent, **{field: getattr(advance.spent, field) + 1}))

    monkeypatch.setattr(type(model), "advance", lying)
    with pytest.raises(Fault) as found:
        counts.flops(subject_of(model), QUICK)
    assert "advance 1" in found.value.seen and "`Spent`" in found.value.cause


def test_a_cache_that_keeps_more_is_found(monkeypatch):
    model = tiny.build("llama")
    monkeypatch.setattr("transformers.models.llama.modeling_llama.DynamicCache", Hoarding)
    with pytest.raises(Fault, match="bytes of 1 tokens in the model's own cache"):
        counts.num_bytes(subject_of(model), QUICK)


def test_entries_of_other_widths_than_configured_are_found():
    subject = subject_of(tiny.build("llama"))
    subject.backbone.config.num_key_value_heads = 1
    with pytest.raises(Fault, match="bytes of 1 tokens in a PrefixCache") as found:
        counts.num_bytes(subject, QUICK)
    assert "of other widths than the configuration says" in found.value.cause
