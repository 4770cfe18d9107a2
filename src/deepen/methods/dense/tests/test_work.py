"""What a training step is said to cost, against what torch counts, for all that can be trained and every base."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.check.counted import counted_flops
from deepen.core.types import Batch, Progress
from deepen.data.batches import batch_of
from deepen.methods.dense.config import DenseConfig
from deepen.methods.dense.model import DenseModel
from deepen.nn import kda
from deepen.train.optim import freeze_base

NUM_POSITIONS = 14
LORA_TARGETS = [
    "all-linear",
    ("q_proj",),
    ("k_proj",),
    ("v_proj",),
    ("o_proj",),
    ("q_proj", "v_proj"),
    ("gate_proj",),
    ("down_proj",),
    ("o_proj", "down_proj"),
]


@pytest.fixture(autouse=True)
def recurrent_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delta attention runs token by token, as it is counted, however many tokens there are."""
    monkeypatch.setattr(kda, "RECURRENT_WIDTH", 10**6)


def base(name: str) -> PreTrainedModel:
    if name == "gpt2":
        sizes = {"vocab_size": 300, "n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64}
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    if name == "tied":
        sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = LlamaConfig(vocab_size=300, intermediate_size=48, tie_word_embeddings=True, **sizes)
        return LlamaForCausalLM(config).eval()
    return tiny.build(name)


def dense(name: str, **settings: Any) -> DenseModel:
    config = DenseConfig.from_dict(settings)
    model = DenseModel.build(config, Backbone.attach(base(name)), 300).eval()
    freeze_base(model, model.backbone.model)
    return model


def some_batch(num_positions: int = NUM_POSITIONS) -> Batch:
    source = torch.Generator().manual_seed(0)
    return batch_of(torch.randint(0, 256, (2, num_positions), generator=source).tolist())


def hidden_work(model: DenseModel) -> tuple[int, int]:
    """Attention over all pairs of tokens computes those above the diagonal, too: forward and backward FLOPs.

    A pair costs what the work of a step grows by from token to token, more than it grew before.
    """
    work = [model.step_work(some_batch(NUM_POSITIONS + more)) for more in (-1, 0, 1)]
    pairs = NUM_POSITIONS * (NUM_POSITIONS - 1) // 2
    growths = [(other.forward_flops - one.forward_flops, other.flops - one.flops) for one, other in pairwise(work)]
    forward, both = (pairs * (after - before) for before, after in zip(*growths, strict=True))
    return forward, both - forward


def hold(model: DenseModel, batch: Batch) -> None:
    """Forward and backward apart."""
    losses: list[torch.Tensor] = []

    def forward() -> None:
        losses.append(model.train_step(batch, None, Progress(0, 1)).losses["final_ce"].total)

    work, hidden = model.step_work(batch), hidden_work(model)
    assert counted_flops(forward) - hidden[0] == work.forward_flops
    assert counted_flops(losses[0].backward) - hidden[1] == work.backward_flops


@pytest.mark.parametrize("name", [*tiny.NAMES, "gpt2", "tied"])
def test_of_a_whole_model(name: str) -> None:
    model = dense(name)
    hold(model, some_batch())
    assert all(each.grad is not None for group in model.optim_groups() for each in group["params"])


@pytest.mark.parametrize("layers", ["all", "top_third", (1,)], ids=str)
@pytest.mark.parametrize("name", [*tiny.NAMES, "gpt2", "tied"])
def test_of_lora_at_every_linear(name: str, layers: Any) -> None:
    hold(dense(name, trains="lora", lora_rank=3, lora_layers=layers), some_batch())


@pytest.mark.parametrize("targets", LORA_TARGETS, ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen3", "tied"])
def test_of_lora_at_some_linears(name: str, targets: Any) -> None:
    model = dense(name, trains="lora", lora_rank=3, lora_layers=[1, 2], lora_targets=targets)
    hold(model, some_batch())
    chosen = [path.rpartition(".lora_")[0].rpartition(".")[2] for path in model.saved_state()]
    assert targets == "all-linear" or set(chosen) == set(targets)


@pytest.mark.parametrize("settings", [{}, {"trains": "lora"}], ids=["all", "lora"])
def test_logits_that_no_row_predicts_from_are_not_computed(settings: dict[str, Any]) -> None:
    model, batch = dense("llama", **settings), some_batch()
    learned = torch.zeros(2, NUM_POSITIONS, dtype=torch.bool)
    learned[0, 5:8] = learned[1, 7:11] = True
    answers = Batch(batch.input_ids, batch.lengths, learned=learned)
    hold(model, answers)
    head = model.backbone.head
    assert isinstance(head, nn.Linear)
    fewer = model.step_work(batch).multiply_adds - model.step_work(answers).multiply_adds
    assert fewer == 2 * (NUM_POSITIONS - 1 - 6) * head.weight.numel()
