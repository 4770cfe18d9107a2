import hashlib
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from deepen.backbones import identity, tiny
from deepen.backbones.identity import BaseIdentity, fingerprint
from deepen.data.tokenizer import byte_tokenizer
from deepen.data.vocabulary import tokenizer_fingerprint


class Module(nn.Module):
    """One of everything that a state dict can hold."""

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(5, 3, generator=generator))
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("steps", torch.tensor([1, 2**40]))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("also_empty", torch.zeros(0, 4))
        self.register_buffer("frequencies", torch.randn(4, generator=generator), persistent=False)


def test_it_is_the_sha256_of_names_shapes_and_rounded_values():
    def digest(tensor: torch.Tensor) -> str:
        return hashlib.sha256(bytes(tensor.reshape(-1).view(torch.uint8).tolist())).hexdigest()

    module = Module()
    table = [
        ["also_empty", [0, 4], digest(module.also_empty.bfloat16())],
        ["empty", [0, 4], digest(module.empty.bfloat16())],
        ["mask", [2], digest(module.mask)],
        ["scale", [], digest(module.scale.detach().reshape(1).bfloat16())],
        ["steps", [2], digest(module.steps)],
        ["weight", [5, 3], digest(module.weight.detach().bfloat16())],
    ]
    assert fingerprint(module) == hashlib.sha256(json.dumps(table).encode()).hexdigest()


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_it_was_loaded_in_makes_no_difference(name, dtype):
    assert fingerprint(tiny.build(name, dtype=dtype)) == fingerprint(tiny.build(name))


def test_names_seeds_and_architectures_differ():
    models = [tiny.build(name, seed=seed) for name in tiny.NAMES for seed in (0, 1)]
    assert len({fingerprint(model) for model in models}) == len(models)


@given(st.integers(0, 14))
def test_any_changed_value_shows(position):
    module, before = Module(), fingerprint(Module())
    with torch.no_grad():
        module.weight.view(-1)[position] *= 1.01  # more than bfloat16's half step of 1/512
    assert fingerprint(module) != before


def test_the_shape_and_the_name_count():
    reshaped, renamed = Module(), Module()
    reshaped.weight = nn.Parameter(reshaped.weight.detach().reshape(3, 5))
    renamed.other = renamed.weight
    del renamed.weight
    assert len({fingerprint(Module()), fingerprint(reshaped), fingerprint(renamed)}) == 3


def test_what_is_not_saved_does_not_count():
    module = Module()
    module.frequencies.zero_()
    assert fingerprint(module) == fingerprint(Module())
    module.steps.zero_()
    assert fingerprint(module) != fingerprint(Module())


def test_tied_weights_count_once_and_copies_twice():
    single, tied, copied = (nn.Embedding(4, 2, _weight=torch.arange(8.0).view(4, 2)) for _ in range(3))
    tied.zz_head = nn.Linear(2, 4, bias=False)
    tied.zz_head.weight = tied.weight
    copied.zz_head = nn.Linear(2, 4, bias=False)
    copied.zz_head.weight = nn.Parameter(copied.weight.detach().clone())
    assert fingerprint(tied) == fingerprint(single)
    assert fingerprint(copied) != fingerprint(single)


def test_views_of_one_storage_are_not_ties():
    """Two halves of one tensor share memory and nothing else."""

    def module(first: torch.Tensor, second: torch.Tensor) -> nn.Module:
        both = nn.Module()
        both.first, both.second = nn.Parameter(first), nn.Parameter(second)
        return both

    halves = torch.arange(6.0).view(2, 3)
    assert fingerprint(module(halves[0], halves[1])) == fingerprint(module(halves[0].clone(), halves[1].clone()))


@pytest.mark.parametrize("size", [1, 4, 15, 100])
def test_the_piece_size_and_the_memory_layout_make_no_difference(monkeypatch, size):
    expected = fingerprint(Module())
    monkeypatch.setattr(identity, "_VALUES_PER_CHUNK", size)
    transposed = Module()
    transposed.weight = nn.Parameter(transposed.weight.detach().T.contiguous().T)
    assert fingerprint(transposed) == expected


def test_tokenizers_with_the_same_ids_are_the_same():
    other, extended = byte_tokenizer(context_length=7), byte_tokenizer()
    extended.add_tokens(["<|new|>"])
    assert tokenizer_fingerprint(other) == tokenizer_fingerprint(byte_tokenizer())
    assert tokenizer_fingerprint(extended) != tokenizer_fingerprint(byte_tokenizer())


def test_identities_compare_by_value():
    assert BaseIdentity("tiny:llama", "a", "b") == BaseIdentity("tiny:llama", "a", "b")
    assert BaseIdentity("tiny:llama", "a", "b") != BaseIdentity("tiny:llama", "c", "b")
