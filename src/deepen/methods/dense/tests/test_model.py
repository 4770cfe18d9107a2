"""Ordinary training: its loss, what it trains, and LoRA against peft's own model."""

import copy
import threading
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.backbones.identity import fingerprint
from deepen.backbones.resolve import load
from deepen.check.effort import QUICK
from deepen.check.subject import subject_of
from deepen.check.suite import run
from deepen.checkpoint import open_model, save_adapter
from deepen.core.errors import CheckpointError, ConfigError
from deepen.core.types import Batch, Progress
from deepen.data.batches import batch_of
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import SamplingConfig
from deepen.generate.stop import StopConfig
from deepen.methods.dense import METHOD
from deepen.methods.dense.config import DenseConfig
from deepen.methods.dense.model import DenseModel
from deepen.train.module import StepModule
from deepen.train.optim import make_optimizers
from deepen.train.step import Steps

# peft takes down_proj in a mixture of Qwen's experts for their stacked weights.
BASES = {
    "llama": "all-linear",
    "nanochat": "all-linear",
    "kimi_linear": "all-linear",
    "qwen3_next": ("q_proj", "o_proj", "out_proj", "in_proj_qkvz"),
}
PROMPTS = [[5, 17, 200, 3], [7], [1, 2, 3] * 5]


def dense(base: str | nn.Module = "llama", **settings: Any) -> DenseModel:
    torch.manual_seed(0)
    model = tiny.build(base) if isinstance(base, str) else base
    return DenseModel.build(DenseConfig.from_dict(settings), Backbone.attach(model), 260).eval()


def lora(base: str | nn.Module = "llama", **settings: Any) -> DenseModel:
    """With weights that change the output."""
    model = dense(base, trains="lora", **settings)
    source = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in model.saved_state().items():
            if "lora_B" in name:
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=source))
    return model


def rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=source).tolist() for length in lengths]


def ids_of(decoder: Any, sampling: SamplingConfig | None = None) -> list[list[int]]:
    results = complete(decoder, PROMPTS, sampling=sampling, stop=StopConfig(max_new_tokens=12))
    return [result.tokens for result in results]


def loss_of(model: DenseModel, batch: Batch) -> Tensor:
    return model.train_step(batch, None, Progress(0, 1)).losses["final_ce"].total


class TestLoss:
    @pytest.mark.parametrize("base", tiny.NAMES)
    @pytest.mark.parametrize("settings", [{}, {"trains": "lora"}], ids=["all", "lora"])
    def test_it_is_what_scoring_says(self, base, settings):
        model = lora(base) if settings else dense(base)
        batch = batch_of(rows(30, 1, 17))
        assert model.count(batch) == {"token": 29 + 0 + 16}
        torch.testing.assert_close(loss_of(model, batch), -model.score(batch).log_probs.sum(), rtol=1e-5, atol=1e-4)

    def test_only_what_is_to_be_predicted_counts(self):
        model, given = dense(), batch_of(rows(12, 9))
        documents = torch.tensor([[0] * 5 + [1] * 7, [2] * 12])
        learned = torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) > 0.4
        batch = Batch(given.input_ids, given.lengths, documents=documents, learned=learned)
        chosen = batch.predicted()
        assert 0 < model.count(batch)["token"] == int(chosen.sum()) < 19
        expected = -(model.score(given).log_probs[:, 1:] * chosen).sum()
        torch.testing.assert_close(loss_of(model, batch), expected, rtol=1e-5, atol=1e-4)

    def test_a_batch_in_which_nothing_is_predicted(self):
        model = dense()
        loss = loss_of(model, batch_of([[3], [4]]))
        loss.backward()
        assert loss.item() == 0 and model.count(batch_of([[3], [4]])) == {"token": 0}

    def test_documents_see_those_before_them_in_their_row(self):
        """As a model of transformers that is given nothing but ids."""
        model, (row,) = dense(), rows(16)
        packed = Batch(torch.tensor([row]), torch.tensor([16]), documents=torch.tensor([[0] * 8 + [1] * 8]))
        alone = loss_of(model, batch_of([row[:8]])) + loss_of(model, batch_of([row[8:]]))
        assert abs(loss_of(model, packed) - alone) > 0.1
        logits = model.base(input_ids=packed.input_ids).logits[0].log_softmax(-1)
        expected = -sum(logits[t, row[t + 1]] for t in range(15) if t != 7)
        torch.testing.assert_close(loss_of(model, packed), expected)

    def test_in_bfloat16_it_is_summed_in_float32(self):
        loss = loss_of(dense(tiny.build("llama", dtype=torch.bfloat16)), batch_of(rows(20)))
        assert loss.dtype == torch.float32


class TestGroups:
    def test_all_is_trained_and_vectors_are_not_decayed(self):
        model = dense("kimi_linear", weight_decay=0.3, learning_rate=2e-3, betas=[0.8, 0.9])
        matrices, vectors = model.optim_groups()
        assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
        for group in (matrices, vectors):
            assert (group["lr"], group["betas"]) == (2e-3, (0.8, 0.9))
        decayed = {name for name, each in model.base.named_parameters() if any(each is p for p in matrices["params"])}
        others = {name for name, each in model.base.named_parameters() if any(each is p for p in vectors["params"])}
        assert decayed | others == {name for name, _ in model.base.named_parameters()}
        assert not decayed & others
        assert {name for name in decayed | others if "norm" in name or name.endswith("bias")} <= others
        assert all("norm" not in name for name in decayed) and any("experts" in name for name in decayed)

    def test_a_head_that_shares_the_embedding_is_in_one_group_once(self):
        config = copy.deepcopy(tiny.build("llama").config)
        config.tie_word_embeddings = True
        base = type(tiny.build("llama"))(config)
        assert base.lm_head.weight is base.model.embed_tokens.weight
        groups = dense(base).optim_groups()
        assert sum(each is base.lm_head.weight for group in groups for each in group["params"]) == 1

    @pytest.mark.parametrize("settings", [{}, {"trains": "lora", "lora_rank": 2}], ids=["all", "lora"])
    def test_steps_lower_the_loss(self, settings):
        model = dense(learning_rate=5e-3, **settings)
        before = fingerprint(model.base)
        optimizers = make_optimizers(model, model.base)
        assert optimizers.groups[0]["betas"] == (0.9, 0.95)
        batch = batch_of(rows(40, 40))
        steps = Steps(
            StepModule(model.train(), model.base), optimizers, lambda index: batch, num_steps=12, grad_clip=1.0
        )
        made = [steps.take(index) for index in range(12)]
        assert made[-1].total < 0.8 * made[0].total
        assert (fingerprint(model.base) == before) == bool(settings)


class TestLora:
    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
    @pytest.mark.parametrize(("base", "targets"), BASES.items())
    def test_it_is_peft_s_merged_model(self, base, targets):
        model = lora(base, lora_rank=4, lora_alpha=12, lora_targets=targets)
        batch = batch_of(rows(33, 20))
        merged = merged_by_peft(model, tiny.build(base), LoraConfig(r=4, lora_alpha=12, target_modules=paths(model)))
        plain = PlainDecoder(Backbone.attach(merged))
        assert ids_of(model) == ids_of(plain) != ids_of(PlainDecoder(model.backbone))
        expected = DenseModel.build(DenseConfig(), Backbone.attach(merged), 260).score(batch)
        torch.testing.assert_close(model.score(batch).log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)

    def test_the_base_is_as_it_was_outside_of_its_passes(self):
        base = tiny.build("llama")
        before, modules = fingerprint(base), list(base.modules())
        model = lora(base)
        plain = ids_of(PlainDecoder(model.backbone))
        assert ids_of(model) != plain == ids_of(PlainDecoder(Backbone.attach(tiny.build("llama"))))
        loss_of(model, batch_of(rows(9))).backward()
        assert list(base.modules()) == modules and fingerprint(base) == before
        assert all(parameter.requires_grad for parameter in base.parameters())
        assert "peft_config" not in vars(base)

    def test_it_is_put_back_after_a_failure(self):
        model = lora()
        modules = list(model.base.modules())
        with pytest.raises(IndexError):
            loss_of(model, batch_of([[1, 10**6]]))
        assert list(model.base.modules()) == modules

    def test_two_of_them_stand_beside_each_other(self):
        first = lora()
        second = DenseModel.build(DenseConfig(trains="lora", lora_rank=2), first.backbone, 260).eval()
        plain = ids_of(PlainDecoder(first.backbone))
        assert ids_of(second) == plain != ids_of(first)
        with first.adapted(), first.adapted():
            assert ids_of(PlainDecoder(first.backbone)) == ids_of(first)

    def test_another_thread_s_passes_of_the_base_wait(self):
        model, found = lora(), []
        plain = ids_of(PlainDecoder(model.backbone))
        thread = threading.Thread(target=lambda: found.append(ids_of(PlainDecoder(model.backbone))))
        with model.adapted():
            thread.start()
            thread.join(timeout=0.3)
            assert not found
        thread.join()
        assert found == [plain]

    def test_packed_and_fused_layers_know_of_it(self):
        model = lora(lora_layers=[2])
        batch = batch_of(rows(20, 11))
        ids, score = ids_of(model), model.score(batch).log_probs
        model.backbone.pack()
        assert ids_of(model) == ids != ids_of(PlainDecoder(model.backbone))
        torch.testing.assert_close(model.score(batch).log_probs, score, rtol=1e-4, atol=1e-4)

    def test_layers_and_targets(self):
        def stands_at(**settings: Any) -> set[str]:
            names = dense(trains="lora", **settings).saved_state()
            return {name.removeprefix("model.layers.").rpartition(".lora_")[0] for name in names}

        assert stands_at(lora_layers=[1], lora_targets=["q_proj", "mlp.down_proj"]) == {
            "1.self_attn.q_proj",
            "1.mlp.down_proj",
        }
        assert {path[0] for path in stands_at(lora_layers="top_third")} == {"2", "3"}
        assert len(stands_at()) == 4 * 7

    def test_a_target_that_is_not_there(self):
        with pytest.raises(ConfigError, match='lora_targets names "q_prj", which is no linear there; did you mean'):
            dense(trains="lora", lora_targets=["q_prj"])

    def test_dropout_is_for_training(self):
        model, batch = lora(lora_dropout=0.5), batch_of(rows(30))
        still = loss_of(model, batch)
        assert torch.equal(loss_of(model, batch), still)
        model.train()
        model.base.eval()
        assert abs(loss_of(model, batch) - still) > 0.01
        model.eval()
        assert torch.equal(loss_of(model, batch), still)

    def test_beside_a_base_of_16_bits_it_has_32(self):
        model = lora(tiny.build("llama", dtype=torch.bfloat16))
        assert {tensor.dtype for tensor in model.saved_state().values()} == {torch.float32}
        loss_of(model, batch_of(rows(9))).backward()
        assert all(
            parameter.grad is not None for parameter in model.lora.parameters() if parameter.dtype != torch.bfloat16
        )

    @pytest.mark.parametrize("sampling", [None, SamplingConfig(temperature=0.9, seed=3)], ids=["greedy", "sampled"])
    def test_a_saved_adapter_decodes_the_same_ids(self, tmp_path, sampling):
        loaded = load("tiny:llama")
        model = lora(loaded.model, lora_layers="top_third")
        save_adapter(tmp_path / "a", method=METHOD, model=model, identity=loaded.identity)
        opened = open_model(str(tmp_path / "a"))
        assert ids_of(opened.decoder, sampling) == ids_of(model, sampling)
        batch = batch_of(rows(20))
        assert torch.equal(opened.model.score(batch).log_probs, model.score(batch).log_probs)

    def test_a_whole_model_has_no_place_for_tensors(self):
        with pytest.raises(CheckpointError, match="unknown x"):
            dense().load_saved_state({"x": torch.zeros(1)})

    @pytest.mark.slow
    def test_the_check_suite_is_green(self):
        report = run(subject_of(lora(lora_targets=["q_proj", "o_proj"])), QUICK)
        assert report.passed, str(report)


def paths(model: DenseModel) -> list[str]:
    return [name.removesuffix(".lora_A.weight") for name in model.saved_state() if "lora_A" in name]


def merged_by_peft(model: DenseModel, base: nn.Module, settings: LoraConfig) -> nn.Module:
    """peft's own model with the same tensors, which it has under the same names."""
    peft_model = get_peft_model(base, settings)
    own = {name.replace(".default", ""): tensor for name, tensor in peft_model.state_dict().items() if "lora_" in name}
    with torch.no_grad():
        for name, tensor in model.saved_state().items():
            own[f"base_model.model.{name}"].copy_(tensor)
    return peft_model.merge_and_unload().eval()
