"""New models: the same for the same seed, as their configuration and tokenizer say, or a clear refusal."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepen.backbones.identity import fingerprint
from deepen.backbones.new import (
    NewModel,
    config_paths,
    derived_model,
    new_model,
    new_tokenizer,
    parameters_by_part,
    read_config,
)
from deepen.backbones.resolve import load
from deepen.checkpoint import open_model, save_model
from deepen.core.errors import ConfigError, UnsupportedBackbone
from deepen.core.registry import discover
from deepen.data.split import split_of
from deepen.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE, byte_tokenizer

SMALL = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 64}


def made(seed: int = 0, context_length: int | None = None, **changes: Any) -> NewModel:
    given = {name: value for name, value in {**SMALL, **changes}.items() if value is not None}
    return new_model(given, byte_tokenizer(), seed=seed, context_length=context_length)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Enough text to merge some hundred pairs, with a word in documents that are not for training."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    texts = [f"{number}: recursion reads the sentence number {number * number} again. " * 3 for number in range(300)]
    others = [text for text in (f"{number} zyzzyva" * 500 for number in range(300)) if split_of(text) != "train"]
    assert len(others) > 3
    texts = [text for text in texts if split_of(text) == "train"] + others
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return file


class TestModel:
    def test_the_seed_decides(self):
        state = torch.random.get_rng_state()
        prints = [fingerprint(made(seed).backbone.model) for seed in (0, 0, 1)]
        assert prints[0] == prints[1] != prints[2]
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_vocabulary_and_special_ids_are_the_tokenizer_s(self):
        config = made().backbone.config
        assert (config.vocab_size, config.pad_token_id) == (VOCAB_SIZE, PAD_ID)
        assert (config.bos_token_id, config.eos_token_id) == (BOS_ID, EOS_ID)
        assert made().backbone.eos_ids == (EOS_ID,)
        assert made(vocab_size=VOCAB_SIZE, eos_token_id=EOS_ID).backbone.vocab_size == VOCAB_SIZE

    @pytest.mark.parametrize("field", ["vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"])
    def test_others_are_refused(self, field):
        with pytest.raises(ConfigError, match=f"{field} is 7, but the tokenizer's is [0-9]+; leave it out"):
            made(**{field: 7})

    def test_the_context(self):
        for one, context in ((made(), 64), (made(context_length=32), 32)):
            assert (one.backbone.context_length, one.tokenizer.model_max_length) == (context, context)
        gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        assert new_model(gpt2, byte_tokenizer(), context_length=16).backbone.context_length == 16
        with pytest.raises(ConfigError, match="context_length must be at least 1, not 0"):
            made(context_length=0)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"model_type": None}, "model_type is missing"),
            ({"model_type": "lama"}, 'model_type "lama" is no causal language model .*; did you mean "llama"'),
            ({"model_type": "no-such-thing"}, "as those of transformers' causal models"),
            ({"model_type": "vit"}, 'model_type "vit" is no causal language model'),
            ({"hidden_sise": 32}, 'a llama configuration has no "hidden_sise"; did you mean "hidden_size"'),
            ({"hidden_size": 30}, "hidden size .30. is not a multiple .* heads .4."),
            ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of num_key_value_heads 3"),
            ({"model_type": "nanochat", "hidden_size": 30}, "hidden_size 30 can't be divided among 4 heads"),
            ({"head_dim": 7}, "a llama configuration can't be made of this: .*even rotary dimension"),
            ({"hidden_act": "silur"}, "a llama model like this can't be built"),
            ({"hidden_size": "wide"}, "a llama configuration can't be made of this: .*hidden_size"),
        ],
        ids=str,
    )
    def test_impossible_configurations(self, changes, said):
        with pytest.raises(ConfigError, match=said):
            made(**changes)

    def test_a_model_that_passes_know_nothing_of(self):
        with pytest.raises(UnsupportedBackbone):
            new_model({"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}, byte_tokenizer())

    @pytest.mark.parametrize("tied", [False, True])
    def test_parameters_by_part(self, tied):
        backbone = made(tie_word_embeddings=tied).backbone
        parts = parameters_by_part(backbone)
        assert sum(parts.values()) == backbone.num_parameters
        assert parts["embedding"] == 32 * VOCAB_SIZE and parts["final norm"] == 32 and parts["others"] == 0
        assert parts["head"] == (0 if tied else 32 * VOCAB_SIZE)

    def test_positions_are_counted_apart(self):
        gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        assert parameters_by_part(new_model(gpt2, byte_tokenizer()).backbone)["others"] == 64 * 32


class TestDerived:
    @staticmethod
    def derived(seed: int = 0, initialization: str | None = None, **settings: Any) -> NewModel:
        given = {"model_type": "mor", "num_recursions": 2, **settings}
        return derived_model(given, load("tiny:llama"), initialization=initialization, seed=seed)

    def test_the_seed_decides_what_is_drawn(self):
        state = torch.random.get_rng_state()
        one, same, other = (self.derived(seed).backbone.model.state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(tensor, same[name]) for name, tensor in one.items())
        assert {name for name, tensor in one.items() if not torch.equal(tensor, other[name])} == {
            "model.router.levels.0.weight"
        }
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_left_out_the_way_is_the_architecture_s_own(self):
        left_out, stepwise, upper = (self.derived(0, way) for way in (None, "stepwise", "upper"))
        assert fingerprint(left_out.backbone.model) == fingerprint(stepwise.backbone.model)
        assert fingerprint(left_out.backbone.model) != fingerprint(upper.backbone.model)

    def test_a_context_that_is_given_is_taken(self):
        assert self.derived(max_position_embeddings=64).backbone.context_length == 64
        assert self.derived().backbone.context_length == load("tiny:llama").model.config.max_position_embeddings

    def test_what_is_given_twice_may_be_the_same(self):
        assert self.derived(hidden_size=64, vocab_size=VOCAB_SIZE).backbone.hidden_size == 64
        with pytest.raises(ConfigError, match="hidden_size is 32, and 64 in the model to begin with; leave it out"):
            self.derived(hidden_size=32)

    @pytest.mark.parametrize("model_type", ["llama", "qwen3"])
    def test_an_architecture_that_can_t(self, model_type):
        with pytest.raises(ConfigError, match=f"a {model_type} model can't begin with another's .* model_type mor can"):
            derived_model({"model_type": model_type}, load("tiny:llama"))


class TestSaved:
    @pytest.mark.parametrize("model_type", ["llama", "nanochat", "qwen3"])
    @pytest.mark.parametrize("tied", [False, True])
    def test_transformers_and_deepen_read_it_bit_for_bit(self, tmp_path, model_type, tied):
        one = made(model_type=model_type, num_key_value_heads=2, tie_word_embeddings=tied)
        save_model(tmp_path / "m", backbone=one.backbone, tokenizer=one.tokenizer)
        expected = one.backbone.model.state_dict()
        opened = open_model(str(tmp_path / "m"), device="cpu")
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        for model in (read, opened.backbone.model):
            assert model.state_dict().keys() == expected.keys()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
            assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        text = "Recursion, again. é"
        for tokenizer in (opened.tokenizer, AutoTokenizer.from_pretrained(tmp_path / "m")):
            assert tokenizer.encode(text) == one.tokenizer.encode(text)
            assert tokenizer.model_max_length == 64
        assert opened.eos_ids == (EOS_ID,)


class TestTokenizer:
    def test_bytes(self):
        assert len(new_tokenizer("bytes")) == VOCAB_SIZE

    def test_pairs_are_those_of_training_documents(self, corpus):
        tokenizer = new_tokenizer("bpe:300", corpus=str(corpus))
        assert len(tokenizer) == 300
        pieces = tokenizer.get_vocab()
        assert any("recursion".startswith(piece.lstrip("Ġ")) for piece in pieces if len(piece) > 3)
        assert not any("zyz" in piece for piece in pieces)
        assert tokenizer.get_vocab() == new_tokenizer("bpe:300", corpus=str(corpus)).get_vocab()

    def test_of_conversations_every_turn_is_read(self, tmp_path):
        file = tmp_path / "chat.jsonl"
        turns = [{"question": f"what is qqq {number}", "answer": "rrrr " * 9} for number in range(60)]
        file.write_text("\n".join(map(json.dumps, turns)))
        pieces = new_tokenizer("bpe:275", corpus=str(file)).get_vocab()
        assert any("qq" in piece for piece in pieces) and any("rr" in piece for piece in pieces)

    @pytest.mark.parametrize("name", ["bite", "bpe", "bpe:many", "bpe:-3", ""])
    def test_unknown_ones(self, name):
        with pytest.raises(ConfigError, match=f'unknown tokenizer "{name}"; it is bytes, or bpe:N'):
            new_tokenizer(name)

    def test_what_it_is_trained_on_must_be_said(self):
        with pytest.raises(ConfigError, match="bpe:400 is trained on text: say on which"):
            new_tokenizer("bpe:400")

    def test_too_small_a_vocabulary(self, corpus):
        with pytest.raises(ConfigError, match="must be above 260"):
            new_tokenizer("bpe:260", corpus=str(corpus))

    def test_a_corpus_of_other_splits(self, tmp_path):
        text = next(f"{number}" for number in range(1000) if split_of(f"{number}") == "test")
        (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}))
        with pytest.raises(ConfigError, match="has no training document"):
            new_tokenizer("bpe:300", corpus=str(tmp_path))


class TestShipped:
    def test_their_sizes_are_their_names(self):
        of_methods = {name for method in discover().values() if method.architecture for name in method.preset_paths()}
        assert list(config_paths()) == sorted(config_paths())
        assert sorted(config_paths().keys() - of_methods) == ["llama-1m", "llama-5m", "nanochat-1m"]
        for name, size, vocabulary in (
            ("llama-1m", 1.15e6, 1024),
            ("llama-5m", 5.2e6, 4096),
            ("nanochat-1m", 1e6, 1024),
        ):
            backbone = new_model(read_config(name), byte_tokenizer()).backbone
            tables = 1 if backbone.config.tie_word_embeddings else 2
            more = tables * (vocabulary - VOCAB_SIZE) * backbone.hidden_size
            assert backbone.num_parameters + more == pytest.approx(size, rel=0.1)
            assert backbone.context_length == 512

    def test_a_file_comes_before_a_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("llama-1m").write_text(json.dumps(SMALL))
        assert read_config("llama-1m") == SMALL
        assert read_config("llama-1m.json")["hidden_size"] == 128

    @pytest.mark.parametrize(("depth", "width"), [(1, 128), (3, 256), (4, 256), (12, 768), (20, 1280), (32, 2048)])
    def test_of_a_nanochat_all_sizes_follow_from_its_depth(self, depth, width):
        config = read_config(f"nanochat-d{depth}")
        sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        assert [config[name] for name in sizes] == [depth, width, 4 * width, width // 128, width // 128]
        if depth < 5:
            backbone = new_model(config, byte_tokenizer()).backbone
            of_layers = sum(parameter.numel() for parameter in backbone.layers.parameters())
            assert of_layers == 12 * depth * width**2 and backbone.context_length == 2048

    @pytest.mark.parametrize("depth", [0, 129, 10**9])
    def test_a_depth_that_can_not_be(self, depth):
        with pytest.raises(ConfigError, match=f"has {depth} layers; give 1 to 128, as in nanochat-d4"):
            read_config(f"nanochat-d{depth}")

    def test_neither(self, tmp_path):
        with pytest.raises(ConfigError, match='neither a file nor a shipped configuration; did you mean "llama-1m"'):
            read_config("lama-1m")
        (tmp_path / "list.json").write_text("[]")
        with pytest.raises(ConfigError, match="must hold one JSON object"):
            read_config(tmp_path / "list.json")
