"""The path by which moonshotai/Kimi-Linear-48B-A3B-Instruct loads, on a tiny model in its format and on its shapes."""

import base64
import json
import shutil
from pathlib import Path

import published_kimi
import pytest
import torch
from model_hub import serve_hub, use_hub
from published_kimi import NUM_PIECES, PIECES
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from deepen.backbones.costs import pass_flops
from deepen.backbones.hf import Backbone
from deepen.backbones.identity import fingerprint
from deepen.backbones.kimi_tokenizer import is_published_format
from deepen.backbones.resolve import Loaded, load
from deepen.backbones.shapes import KIMI_LINEAR_48B, build_shape, read_config
from deepen.cli.budget import budget
from deepen.core.errors import CheckpointError
from deepen.data.vocabulary import tokenizer_fingerprint
from deepen.methods.chunk.config import get_after_surgery_config
from deepen.methods.chunk.model import ChunkRefineWrapper

# Parameters of the large model's parts, by hand.
_KDA = 4 * 2304 * 4096 + 3 * 4096 * 4 + 32 + 4096 + 2304 * 32 + 2 * (2304 * 128 + 128 * 4096) + 128
_MLA = 2304 * 6144 + 2304 * 576 + 512 + 512 * 8192 + 4096 * 2304
_DENSE = 3 * 2304 * 9216
_EXPERT = 3 * 2304 * 1024
_ROUTER = 256 * 2304
_EMBEDDING = 163840 * 2304
_NORMS = (2 * 27 + 1) * 2304
_TOTAL = 20 * _KDA + 7 * _MLA + _DENSE + 26 * (257 * _EXPERT + _ROUTER) + 2 * _EMBEDDING + _NORMS
# Without the embedding, which is looked up, and with 8 experts and the shared one.
_ACTIVE = 20 * _KDA + 7 * _MLA + _DENSE + 26 * (9 * _EXPERT + _ROUTER) + _EMBEDDING + _NORMS


@pytest.fixture(scope="module")
def large() -> Backbone:
    """The 48B model, without its weights."""
    return Backbone.attach(build_shape("kimi-linear-48b"))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as published; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("published") / "model"
    published_kimi.write_published_folder(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(original: Path) -> Loaded:
    return load(str(original), device="cpu")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """One to damage."""
    return shutil.copytree(original, tmp_path / "model")


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class TestConfiguration:
    def test_every_field_arrives_where_the_model_reads_it(self):
        config = read_config(KIMI_LINEAR_48B)
        kept = {name for name in KIMI_LINEAR_48B if name not in ("auto_map", "dtype", "rope_scaling")}
        assert {name for name in kept if getattr(config, name) != KIMI_LINEAR_48B[name]} == set()
        assert config.dtype == torch.bfloat16
        read = {
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "norm_topk_prob": True,
            "n_group": 1,
            "max_position_embeddings": 1048576,
            "qk_head_dim": 192,
            "linear_head_dim": 128,
            "linear_num_heads": 32,
            "linear_conv_kernel_dim": 4,
        }
        assert {name: getattr(config, name) for name in read} == read

    def test_layers_are_counted_from_1(self, large):
        kinds = [type(layer.self_attn).__name__ for layer in large.layers]
        full = [layer for layer, kind in enumerate(kinds) if kind == "KimiLinearAttention"]
        assert full == [3, 7, 11, 15, 19, 23, 26]
        assert kinds.count("KimiLinearDeltaAttention") == 20
        assert [type(layer.mlp).__name__ for layer in large.layers] == ["KimiLinearMLP"] + ["KimiLinearMoE"] * 26


class TestLargeModel:
    def test_its_parameters(self, large):
        assert large.num_parameters == _TOTAL == 49_122_675_072
        assert (large.num_layers, large.hidden_size, large.vocab_size) == (27, 2304, 163840)
        assert (large.context_length, large.eos_ids, large.dtype) == (1048576, (163586,), torch.bfloat16)

    def test_what_a_token_visits(self, large):
        of_a_token = pass_flops(large, num_positions=1, context=0) // 2
        attention = 7 * 32 * (192 + 128)
        unproductive = _NORMS + 20 * (32 + 4096 + 128) + 7 * 512
        states = 20 * 32 * 2 * 128 * 128
        assert of_a_token - attention - states == _ACTIVE - unproductive
        assert _ACTIVE == 3_106_965_888

    def test_its_sidecar_at_the_defaults(self, large):
        model = ChunkRefineWrapper.build(get_after_surgery_config(), large, large.vocab_size)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        cell = (2304 + 512) * 9216 + 9216 * 2304 + 3 * 512 * (2304 + 512 + 2)
        facts = budget(model, large)
        assert facts["parameters of refine_cells"] == 27 * cell == 1_390_887_936
        # The boundary head, [Z] with its link from top to bottom, the slots' embedding.
        others = 2305 * 1024 + 1025 * 1024 + 1025 * 130 + 2304 * 2305 + 2304
        assert facts["added parameters"] == 27 * cell + others == model.num_sidecar_parameters
        assert facts["base parameters"] == _TOTAL
        assert facts["layers refined"] == "27 of 27 (0-26)" and facts["cells"] == "27, one a layer"
        assert facts["extra FLOPs, share of the base's"] == pytest.approx(0.3666, abs=5e-5)

    def test_its_published_names_and_shapes(self, large):
        shapes = {name: list(tensor.shape) for name, tensor in published_kimi.published_tensors(large.model)}
        # Layers with KDA, with MLA, the dense one, those with experts; embedding, final norm, head.
        assert len(shapes) == 20 * (15 + 2) + 7 * (5 + 2) + 3 + 26 * (3 * 256 + 3 + 2) + 3 == 20_493
        layer, sparse = "model.layers.0.self_attn", "model.layers.26.block_sparse_moe"
        expected = {
            **{f"{layer}.{part}_proj.weight": [4096, 2304] for part in "qkv"},
            **{f"{layer}.{part}_conv1d.weight": [4096, 1, 4] for part in "qkv"},
            f"{layer}.A_log": [1, 1, 32, 1],
            f"{layer}.dt_bias": [4096],
            f"{layer}.f_a_proj.weight": [128, 2304],
            f"{layer}.f_b_proj.weight": [4096, 128],
            f"{layer}.b_proj.weight": [32, 2304],
            f"{layer}.o_norm.weight": [128],
            "model.layers.0.mlp.gate_proj.weight": [9216, 2304],
            "model.layers.26.self_attn.kv_a_proj_with_mqa.weight": [576, 2304],
            f"{sparse}.gate.weight": [256, 2304],
            f"{sparse}.gate.e_score_correction_bias": [256],
            f"{sparse}.experts.255.w1.weight": [1024, 2304],
            f"{sparse}.experts.255.w2.weight": [2304, 1024],
            f"{sparse}.experts.255.w3.weight": [1024, 2304],
            f"{sparse}.shared_experts.down_proj.weight": [2304, 1024],
            "lm_head.weight": [163840, 2304],
        }
        assert {name: shapes.get(name) for name in expected} == expected

    def test_every_published_name_has_a_place(self, large):
        rules = get_model_conversion_mapping(large.model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
        places = {
            rename_source_key(name, renamings, converters)[0]
            for name, _ in published_kimi.published_tensors(large.model)
        }
        assert places == large.model.state_dict().keys()


class TestFolder:
    def test_it_loads_to_the_same_weights_and_runs_no_code(self, original, loaded):
        source = published_kimi.build(published_kimi.CONFIG_TINY)
        ours, theirs = loaded.model.state_dict(), source.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name].float()) for name in ours)
        assert len({float(tensor.double().sum()) for tensor in ours.values()}) == len(ours)
        assert loaded.model.config.layer_types == [
            *("linear_attention", "linear_attention", "full_attention", "linear_attention", "full_attention")
        ]
        assert loaded.identity.fingerprint == fingerprint(source)
        assert type(loaded.model).__module__.startswith("transformers.")

    def test_it_has_the_published_names(self, original):
        weight_map = json.loads((original / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(set(weight_map.values())) == 3
        for part in ("0.self_attn.v_conv1d.weight", "0.self_attn.A_log", "1.block_sparse_moe.experts.11.w3.weight"):
            assert f"model.layers.{part}" in weight_map

    @pytest.mark.filterwarnings("ignore:this CPU has no instructions for torch.bfloat16")
    def test_in_its_own_dtype(self, original, loaded):
        model = load(str(original), device="cpu", dtype="bfloat16").model
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert fingerprint(model) == loaded.identity.fingerprint

    def test_from_the_hub_by_its_name(self, original, loaded, tmp_path, monkeypatch):
        address = "moonshotai/Kimi-Linear-48B-A3B-Instruct"
        with serve_hub({address: original}) as hub:
            use_hub(hub, monkeypatch, tmp_path)
            identity = load(address, device="cpu").identity
        assert identity.address == address
        assert (identity.fingerprint, identity.tokenizer) == (loaded.identity.fingerprint, loaded.identity.tokenizer)
        assert not any(request.endswith(".py") for request in hub.requests)

    def test_saved_by_transformers_it_is_the_same_model(self, loaded, tmp_path):
        loaded.model.save_pretrained(tmp_path)
        loaded.tokenizer.save_pretrained(tmp_path)
        again = load(str(tmp_path), device="cpu").identity
        assert (again.fingerprint, again.tokenizer) == (loaded.identity.fingerprint, loaded.identity.tokenizer)


class TestTokenizer:
    # What the package tiktoken gives for these pieces, cut up by the published forms.
    IDS = (
        ("hello hello HELLO", [262, 263, 32, 277, 76, 76, 79]),
        ("It's the cat's 12345 it's\n\n", [73, 285, 261, 32, 281, 271, 32, 265, 52, 53, 32, 272, 271, 269]),
        (
            "中文abc中, 1中2 A中 二〇 xllo",
            [276, 97, 98, 99, 274, 44, 32, 49, 274, 50, 32, 65, 274, 32, 288, 32, 120, 259, 111],
        ),
        ("aaaaaaa  aa \n x", [268, 267, 32, 32, 266, 32, 10, 32, 120]),
        (
            "don'T naïve e\u0301 ǅx ١٢٣٤",
            [
                100,
                111,
                110,
                39,
                84,
                32,
                110,
                97,
                195,
                175,
                118,
                101,
                32,
                101,
                204,
                129,
                32,
                199,
                133,
                120,
                32,
                217,
                161,
                217,
                162,
                217,
                163,
                217,
                164,
            ],
        ),
        ("theHE a !\n\n\n\n b", [279, 277, 32, 97, 286, 269, 269, 32, 98]),
        ("[BOS]hello<|im_end|><|tool_call_begin|>", [289, 262, 291, 302]),
        (f"<|reserved_token_{NUM_PIECES + 5}|>[PAD]", [294, 544]),
    )

    @pytest.mark.parametrize(("text", "ids"), IDS)
    def test_ids_are_those_of_tiktoken(self, loaded, text, ids):
        assert loaded.tokenizer.encode(text) == ids
        assert loaded.tokenizer.decode(ids) == text

    def test_named_tokens(self, loaded):
        tokenizer = loaded.tokenizer
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (NUM_PIECES, NUM_PIECES + 1)
        assert (tokenizer.unk_token_id, tokenizer.pad_token_id) == (NUM_PIECES + 254, NUM_PIECES + 255)
        assert len(tokenizer) == loaded.model.config.vocab_size and tokenizer.model_max_length == 512
        ids = tokenizer.encode("[EOT]a<|tool_call_begin|>")
        assert tokenizer.decode(ids, skip_special_tokens=True) == "a<|tool_call_begin|>"

    def test_its_chat_template(self, loaded):
        text = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": "hello"}], add_generation_prompt=True, tokenize=False
        )
        assert text == "<|im_user|>user<|im_middle|>hello<|im_end|><|im_assistant|>assistant<|im_middle|>"

    def test_a_template_may_stand_in_the_settings(self, folder):
        (folder / "chat_template.jinja").unlink()
        edit_json(folder / "tokenizer_config.json", chat_template="{{ messages }}", eos_token={"content": "[EOT]"})
        tokenizer = load(str(folder), device="cpu").tokenizer
        assert tokenizer.chat_template == "{{ messages }}" and tokenizer.eos_token_id == NUM_PIECES + 9

    def test_a_tokenizer_json_comes_first(self, folder, loaded):
        loaded.tokenizer.save_pretrained(folder)
        edit_json(folder / "tokenizer_config.json", tokenizer_class="TikTokenTokenizer")
        (folder / "tiktoken.model").write_text("no pieces")
        assert load(str(folder), device="cpu").identity.tokenizer == tokenizer_fingerprint(loaded.tokenizer)

    def test_other_code_is_not_taken_for_this(self, folder):
        assert is_published_format(folder)
        for file, change in [
            ("tokenizer_config.json", {"tokenizer_class": "OtherTokenizer"}),
            ("tokenizer_config.json", {"tokenizer_class": None}),
            ("config.json", {"model_type": "other"}),
        ]:
            before = (folder / file).read_text()
            edit_json(folder / file, **change)
            assert not is_published_format(folder)
            (folder / file).write_text(before)
        (folder / "tokenizer_config.json").unlink()
        assert not is_published_format(folder)

    def damaged(self, folder: Path) -> str:
        with pytest.raises(CheckpointError) as raised:
            load(str(folder), device="cpu")
        return str(raised.value)

    def test_a_line_that_is_none(self, folder):
        file = folder / "tiktoken.model"
        for line in ("AAAA", "AA!AA 3", "AAAA x", "AAAA 1 2"):
            file.write_text(f"AA== 0\n{line}\n")
            assert f"{file}, line 2, is no piece with its rank; fetch it again" in self.damaged(folder)

    def test_a_rank_that_is_missing_or_taken(self, folder):
        file = folder / "tiktoken.model"
        lines = file.read_text().splitlines()
        for damaged in (lines[:9] + lines[10:], [*lines, "QUFB 0"]):
            file.write_text("\n".join(damaged))
            assert f"{file} is damaged" in self.damaged(folder)

    def test_a_byte_without_a_piece(self, folder):
        pieces = [bytes([byte, byte]) if byte == 7 else bytes([byte]) for byte in range(256)]
        lines = [f"{base64.b64encode(piece).decode()} {rank}" for rank, piece in enumerate([*pieces, *PIECES])]
        (folder / "tiktoken.model").write_text("\n".join(lines))
        assert "has no piece for byte 7" in self.damaged(folder)

    def test_pieces_cut_short(self, folder):
        file = folder / "tiktoken.model"
        file.write_text("\n".join(file.read_text().splitlines()[:-3]))
        message = f"names tokens {NUM_PIECES} to {NUM_PIECES + 255}, but tiktoken.model has {NUM_PIECES - 3} pieces"
        assert message in self.damaged(folder)

    def test_pieces_of_another_tokenizer(self, folder):
        with (folder / "tiktoken.model").open("a") as file:
            file.write(f"QUFB {NUM_PIECES}\n")
        assert f"but tiktoken.model has {NUM_PIECES + 1} pieces" in self.damaged(folder)

    def test_more_added_tokens_than_there_are_places(self, folder):
        file = folder / "tokenizer_config.json"
        tokens = json.loads(file.read_text())["added_tokens_decoder"]
        edit_json(file, added_tokens_decoder=tokens | {str(NUM_PIECES + 256): {"content": "[MORE]"}})
        assert f"names tokens {NUM_PIECES} to {NUM_PIECES + 256}" in self.damaged(folder)

    @pytest.mark.parametrize("tokens", [None, {}, {"x": {}}, [1], {str(NUM_PIECES): {"special": True}}])
    def test_added_tokens_that_are_none(self, folder, tokens):
        edit_json(folder / "tokenizer_config.json", added_tokens_decoder=tokens)
        assert "tokenizer_config.json has tokens that can't be read" in self.damaged(folder)

    def test_an_added_token_that_is_another(self, folder):
        file = folder / "tokenizer_config.json"
        tokens = json.loads(file.read_text())["added_tokens_decoder"]
        tokens[str(NUM_PIECES + 2)]["content"] = "[EOS]"
        edit_json(file, added_tokens_decoder=tokens)
        assert f'names token {NUM_PIECES + 2} "[EOS]", as {NUM_PIECES + 1} is called' in self.damaged(folder)

    def test_a_named_token_that_is_not_added(self, folder):
        edit_json(folder / "tokenizer_config.json", pad_token="[MISSING]")
        assert "that is none of its added_tokens_decoder" in self.damaged(folder)
