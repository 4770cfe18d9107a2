import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import deepen.methods
from deepen import __version__
from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.backbones.resolve import load
from deepen.checkpoint import MANIFEST, is_adapter, open_model, save_adapter, save_model
from deepen.core import files, registry
from deepen.core.checksums import CHECKSUMS, checksums
from deepen.core.errors import AddressError, CheckpointError, ConfigError, DeepenError, DownloadError
from deepen.data.tokenizer import byte_tokenizer
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.stop import StopConfig
from deepen.nn.linear import PackedForward

CONFIG = "recursive_config.json"
WEIGHTS = "sidecar.safetensors"
SMALL = {"recursive_enabled": True, "d_state": 8, "gate_hidden": 8, "max_chunk_len": 16, "chunk_width": 16}


def graft(address: str = "tiny:llama", **fields):
    """A small sidecar filled with noise on a base, and what `save_adapter` wants to know."""
    method = registry.get("chunk")
    loaded = load(address, device="cpu")
    backbone = Backbone.attach(loaded.model)
    config = method.load_config_type().from_dict({**SMALL, **fields})
    model = method.load_model_type().build(config, backbone, backbone.vocab_size)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.saved_state().values():
            tensor.normal_(generator=generator)
    return {"method": method, "model": model, "identity": loaded.identity}


@pytest.fixture(scope="module")
def grafted():
    return graft()


@pytest.fixture(scope="module")
def saved(grafted, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapters") / "saved"
    save_adapter(folder, **grafted)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A saved adapter to damage."""
    return shutil.copytree(saved, tmp_path / "adapter")


def edit_json(file: Path, **changes: object) -> None:
    """Change keys of a JSON file; None removes one."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def continuation(decoder) -> list[int]:
    return complete(decoder, [[72, 105, 72, 105]], stop=StopConfig(max_new_tokens=12))[0].tokens


class TestWholeModel:
    """A model that was trained as a whole is a folder of transformers'."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("name", tiny.NAMES)
    @pytest.mark.filterwarnings("ignore:this CPU has no instructions")
    def test_it_comes_back_bit_for_bit(self, name, dtype, tmp_path):
        loaded = load(f"tiny:{name}", dtype=dtype, device="cpu")
        backbone = Backbone.attach(loaded.model)
        backbone.pack()
        save_model(tmp_path / "m", backbone=backbone, tokenizer=loaded.tokenizer)
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= tree(tmp_path / "m")
        opened = open_model(str(tmp_path / "m"), dtype=dtype, device="cpu")
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        expected = loaded.model.state_dict()
        for model in (opened.backbone.model, read):
            assert model.state_dict().keys() == expected.keys()
            assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
        assert (opened.method, opened.identity.fingerprint) == (None, loaded.identity.fingerprint)
        assert opened.identity.tokenizer == loaded.identity.tokenizer
        backbone.unpack()
        assert continuation(opened.decoder) == continuation(PlainDecoder(backbone))

    def test_it_is_replaced_only_if_it_may_be(self, tmp_path):
        first, second = (open_model(f"tiny:llama?seed={seed}", device="cpu") for seed in (1, 2))
        save_model(tmp_path / "m", backbone=first.backbone, tokenizer=first.tokenizer)
        with pytest.raises(DeepenError, match="exists and is not empty"):
            save_model(tmp_path / "m", backbone=second.backbone, tokenizer=second.tokenizer)
        assert open_model(str(tmp_path / "m"), device="cpu").identity.fingerprint == first.identity.fingerprint
        save_model(tmp_path / "m", backbone=second.backbone, tokenizer=second.tokenizer, replace=True)
        assert open_model(str(tmp_path / "m"), device="cpu").identity.fingerprint == second.identity.fingerprint

    def test_a_failure_leaves_nothing(self, tmp_path):
        class Unsaveable:
            def save_pretrained(self, folder: Path) -> None:
                assert (folder / "model.safetensors").is_file()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with pytest.raises(DeepenError, match="No space left"):
            save_model(tmp_path / "m", backbone=Backbone.attach(tiny.build("llama")), tokenizer=Unsaveable())
        assert tree(tmp_path) == set()


class TestRoundTrip:
    def test_the_folder_holds_what_was_added_and_nothing_of_the_base(self, saved, grafted):
        assert tree(saved) == {MANIFEST, CONFIG, WEIGHTS}
        assert load_file(saved / WEIGHTS).keys() == grafted["model"].saved_state().keys()
        assert json.loads((saved / MANIFEST).read_text()) == {
            "format": 1,
            "method": "chunk",
            "base": {"address": "tiny:llama", "fingerprint": grafted["identity"].fingerprint},
            "tokenizer": grafted["identity"].tokenizer,
            "deepen_version": __version__,
        }

    def test_opened_it_is_what_was_saved(self, saved, grafted):
        opened = open_model(str(saved), device="cpu")
        before, after = grafted["model"].saved_state(), opened.model.saved_state()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert opened.model.config == grafted["model"].config
        assert opened.identity == grafted["identity"]
        assert opened.method == grafted["method"]
        assert opened.decoder is opened.model
        assert opened.backbone.model is opened.model.base
        assert not opened.model.training
        assert opened.tokenizer.encode("é") == [195, 169]

    def test_it_decodes_as_its_base_does(self, saved):
        base = open_model("tiny:llama", device="cpu")
        assert continuation(open_model(str(saved), device="cpu").decoder) == continuation(base.decoder)

    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_every_architecture(self, name, tmp_path):
        save_adapter(tmp_path / "a", **graft(f"tiny:{name}?seed=2"))
        opened = open_model(str(tmp_path / "a"), device="cpu")
        assert opened.identity.address == f"tiny:{name}?seed=2"

    def test_the_dtype_of_the_base_makes_no_difference(self, saved):
        opened = open_model(str(saved), dtype="float64", device="cpu")
        assert opened.backbone.dtype == torch.float64

    def test_a_disabled_method_adds_nothing(self, tmp_path):
        save_adapter(tmp_path / "off", **graft(recursive_enabled=False))
        opened = open_model(str(tmp_path / "off"), device="cpu")
        assert opened.model.saved_state() == {}
        assert continuation(opened.decoder) == continuation(PlainDecoder(opened.backbone))

    def test_a_home_relative_folder(self, saved, monkeypatch):
        monkeypatch.setenv("HOME", str(saved.parent))
        assert is_adapter("~/saved")
        assert open_model("~/saved", device="cpu").method is not None

    def test_an_existing_folder_is_refused_unless_it_may_be_replaced(self, folder, grafted):
        with pytest.raises(DeepenError, match="exists and is not empty"):
            save_adapter(folder, **grafted)
        (folder / "old").touch()
        save_adapter(folder, **grafted, replace=True)
        assert tree(folder) == {MANIFEST, CONFIG, WEIGHTS}

    def test_a_full_disk_leaves_nothing(self, grafted, tmp_path, monkeypatch):
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, "fsync", full)
        with pytest.raises(DeepenError, match=r"No space left on device.*are free in"):
            save_adapter(tmp_path / "new", **grafted)
        assert tree(tmp_path) == set()


class TestPlainModel:
    def test_it_decodes_plainly(self):
        opened = open_model("tiny:qwen3", device="cpu")
        assert isinstance(opened.decoder, PlainDecoder)
        assert opened.method is None and opened.model is None
        assert opened.identity.address == "tiny:qwen3"

    @pytest.mark.parametrize("pack", [False, True])
    def test_linears_are_packed_on_request(self, pack):
        backbone = open_model("tiny:llama", device="cpu", pack=pack).backbone
        assert isinstance(backbone.head.forward, PackedForward) is pack

    @pytest.mark.parametrize(
        ("generates_with", "expected"), [(7, (7,)), ([7, 8], (7, 8)), (None, (byte_tokenizer().eos_token_id,))]
    )
    def test_the_ids_that_end_a_text(self, generates_with, expected):
        opened = open_model("tiny:llama", device="cpu")
        opened.backbone.model.generation_config.eos_token_id = generates_with
        assert opened.eos_ids == expected

    @pytest.mark.parametrize("argument", [{"overrides": {"draft": "ar"}}, {"base": "tiny:qwen3"}])
    def test_it_has_no_use_for_what_concerns_adapters(self, argument):
        with pytest.raises(ConfigError, match=r"tiny:llama is a plain model, which has no use for (draft=ar|base)"):
            open_model("tiny:llama", device="cpu", **argument)

    def test_an_empty_address_is_not_the_working_folder(self, saved, monkeypatch):
        monkeypatch.chdir(saved)
        assert is_adapter(".") and not is_adapter("")


class TestDamage:
    @given(st.floats(0, 1, exclude_max=True))
    def test_weights_cut_short_anywhere(self, saved, tmp_path_factory, share):
        folder = shutil.copytree(saved, tmp_path_factory.mktemp("cut") / "a")
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: int(share * len(content))])
        with pytest.raises(CheckpointError) as raised:
            open_model(str(folder), device="cpu")
        assert f"{folder / WEIGHTS} is damaged or incomplete" in str(raised.value)

    @pytest.mark.parametrize("place", [0.5, 0.999])
    def test_a_flipped_bit_where_checksums_are_known(self, folder, place):
        files.write_json(folder / CHECKSUMS, checksums(folder))
        assert open_model(str(folder), device="cpu").model is not None
        content = bytearray((folder / WEIGHTS).read_bytes())
        content[int(place * len(content))] ^= 1
        (folder / WEIGHTS).write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match=f"{folder / WEIGHTS} is not what was saved: .* delete {CHECKSUMS}"):
            open_model(str(folder), device="cpu")
        (folder / CHECKSUMS).unlink()
        assert open_model(str(folder), device="cpu").model is not None

    def test_a_flipped_bit_of_a_plain_model(self, tmp_path):
        loaded = load("tiny:llama", device="cpu")
        save_model(tmp_path / "m", backbone=Backbone.attach(loaded.model), tokenizer=loaded.tokenizer)
        files.write_json(tmp_path / "m" / CHECKSUMS, checksums(tmp_path / "m"))
        weights = tmp_path / "m" / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(bytes(content))
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not what was saved"):
            open_model(str(tmp_path / "m"), device="cpu")

    def test_weights_that_are_none(self, folder):
        (folder / WEIGHTS).write_bytes(b"\xff" * 64)
        with pytest.raises(CheckpointError, match=f"{WEIGHTS} is damaged"):
            open_model(str(folder), device="cpu")

    @pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
    def test_a_missing_file(self, folder, name):
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"{folder} is incomplete: it lacks {name}"):
            open_model(str(folder), device="cpu")

    @pytest.mark.parametrize("others", [[CONFIG], [WEIGHTS], [CONFIG, WEIGHTS]])
    def test_a_missing_manifest(self, folder, others):
        for name in {MANIFEST, CONFIG, WEIGHTS} - set(others):
            (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"files of the method chunk but no {MANIFEST}"):
            open_model(str(folder), device="cpu")

    @pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"method": "chunk"}'])
    def test_a_manifest_that_is_none(self, folder, content):
        (folder / MANIFEST).write_text(content)
        with pytest.raises(CheckpointError, match=f"{folder / MANIFEST}"):
            open_model(str(folder), device="cpu")

    @pytest.mark.parametrize("number", [2, 0, "1"])
    def test_another_format(self, folder, number):
        edit_json(folder / MANIFEST, format=number, deepen_version="9.1.0")
        with pytest.raises(CheckpointError) as raised:
            open_model(str(folder), device="cpu")
        assert f"has format {number!r}" in str(raised.value) and "(9.1.0)" in str(raised.value)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": True}, "format must be an integer, not true"),
            ({"base": None}, "base is missing"),
            ({"base": "tiny:llama"}, 'base must be an object, not "tiny:llama"'),
            ({"tokeniser": "x"}, 'unknown key "tokeniser"; did you mean "tokenizer"'),
        ],
    )
    def test_a_manifest_with_other_keys(self, folder, changes, message):
        edit_json(folder / MANIFEST, **changes)
        with pytest.raises(CheckpointError, match=message):
            open_model(str(folder), device="cpu")

    def test_an_unknown_method(self, folder):
        edit_json(folder / MANIFEST, method="chunks")
        with pytest.raises(CheckpointError) as raised:
            open_model(str(folder), device="cpu")
        for part in (str(folder), 'no method "chunks"', 'did you mean "chunk"', "DEEPEN_METHODS_PATH"):
            assert part in str(raised.value)

    def test_a_configuration_edited_wrongly(self, folder):
        edit_json(folder / CONFIG, chunk_with=4)
        with pytest.raises(ConfigError, match=rf'{folder / CONFIG}: unknown key "chunk_with"; .* "chunk_width"'):
            open_model(str(folder), device="cpu")

    def test_tensors_of_another_configuration(self, folder):
        edit_json(folder / CONFIG, gate_hidden=9)
        with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: .*boundary.mlp.0.weight is \[8, 64\], expected \[9, 6"):
            open_model(str(folder), device="cpu")

    def test_a_tensor_too_few_and_one_too_many(self, folder):
        tensors = load_file(folder / WEIGHTS)
        tensors["extra"] = tensors.pop("mask_token.embedding")
        save_file(tensors, folder / WEIGHTS)
        with pytest.raises(CheckpointError, match=r"missing mask_token\.embedding; unknown extra"):
            open_model(str(folder), device="cpu")


class TestBase:
    def test_another_one_names_both_and_the_way_out(self, folder, grafted):
        other = load("tiny:llama?seed=1", device="cpu").identity
        with pytest.raises(CheckpointError) as raised:
            open_model(str(folder), device="cpu", base="tiny:llama?seed=1")
        for part in ("tiny:llama with", grafted["identity"].fingerprint, "tiny:llama?seed=1", other.fingerprint):
            assert part in str(raised.value)
        assert "--base" in str(raised.value) and "graft anew" in str(raised.value)

    def test_one_that_changed_where_it_lies(self, tmp_path):
        base = tmp_path / "base"
        byte_tokenizer().save_pretrained(base)
        tiny.build("llama").save_pretrained(base)
        save_adapter(tmp_path / "a", **graft(str(base)))
        tiny.build("llama", seed=1).save_pretrained(base)
        with pytest.raises(CheckpointError, match=rf"{base} now has fingerprint"):
            open_model(str(tmp_path / "a"), device="cpu")

    def test_one_that_moved(self, tmp_path):
        base = tmp_path / "base"
        byte_tokenizer().save_pretrained(base)
        tiny.build("llama").save_pretrained(base)
        save_adapter(tmp_path / "a", **graft(str(base)))
        base.rename(tmp_path / "moved")
        with pytest.raises(AddressError, match=rf"the base model of {tmp_path}/a can't be had: .*base=ADDRESS"):
            open_model(str(tmp_path / "a"), device="cpu")
        opened = open_model(str(tmp_path / "a"), device="cpu", base=str(tmp_path / "moved"))
        assert opened.identity.address == str(tmp_path / "moved")

    def test_one_that_cannot_be_fetched_stays_a_download_error(self, folder):
        with pytest.raises(DownloadError, match="the base model of"):
            open_model(str(folder), device="cpu", base="owner/name")

    def test_float16_is_named_as_the_reason(self, folder, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_fp16": True})
        with pytest.raises(CheckpointError, match="choose dtype bfloat16 or float32"):
            open_model(str(folder), device="cpu", dtype="float16")

    def test_another_tokenizer(self, tmp_path):
        base = tmp_path / "base"
        tiny.build("llama").save_pretrained(base)
        byte_tokenizer().save_pretrained(base)
        save_adapter(tmp_path / "a", **graft(str(base)))
        renamed = byte_tokenizer()
        renamed.add_tokens(["extra"])
        renamed.save_pretrained(base)
        with pytest.raises(CheckpointError, match="was made with another tokenizer"):
            open_model(str(tmp_path / "a"), device="cpu")


class TestOverrides:
    def test_a_field_is_set_on_top(self, saved):
        opened = open_model(str(saved), device="cpu", overrides={"draft": "lookup", "chunk_width": 4})
        assert (opened.model.config.draft, opened.model.config.chunk_width) == ("lookup", 4)
        assert opened.model.config.d_state == SMALL["d_state"]

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            ({"chunk_with": 3}, r'with chunk_with=3: unknown key "chunk_with"; did you mean "chunk_width"'),
            ({"chunk_width": "3"}, r'chunk_width must be an integer, not "3"'),
            ({"chunk_width": 17}, r"with chunk_width=17: chunk_width must be <= max_chunk_len"),
        ],
    )
    def test_it_is_checked(self, saved, overrides, message):
        with pytest.raises(ConfigError, match=message):
            open_model(str(saved), device="cpu", overrides=overrides)

    def test_one_that_the_tensors_do_not_fit_is_blamed(self, saved):
        with pytest.raises(CheckpointError, match=r"The configuration was changed by d_state=9$"):
            open_model(str(saved), device="cpu", overrides={"d_state": 9})


class TestAnyMethod:
    """Nothing is known of a method but its registry entry and the protocol."""

    INIT = """
from deepen.core.registry import Method
METHOD = Method("shift", "Adds one number.", config="model:ShiftConfig", model="model:ShiftModel")
"""
    MODEL = """
from dataclasses import dataclass

import torch
from torch import nn

from deepen.core.config import Config
from deepen.generate.plain import PlainDecoder


@dataclass(frozen=True)
class ShiftConfig(Config):
    size: int = 2


class ShiftModel(nn.Module):
    def __init__(self, config, backbone):
        super().__init__()
        self.config, self.backbone, self.plain = config, backbone, PlainDecoder(backbone)
        self.promises_base = True
        self.shift = nn.Parameter(torch.zeros(config.size))
        self.open, self.advance, self.drop = self.plain.open, self.plain.advance, self.plain.drop

    @classmethod
    def build(cls, config, backbone, vocab_size):
        return cls(config, backbone)

    def saved_state(self):
        return {"shift": self.shift.data}

    def load_saved_state(self, state):
        self.shift.data.copy_(state["shift"])

    def unused(self, *arguments, **settings):
        raise AssertionError("saving and opening ask for nothing else")

    begin = prepare = count = train_step = after_step = score = optim_groups = shard_units = flops = unused
    state_bytes = step_work = unused
"""

    @pytest.fixture
    def shift(self, tmp_path, monkeypatch):
        package = tmp_path / "methods" / "shift"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(self.INIT)
        (package / "model.py").write_text(self.MODEL)
        monkeypatch.setattr(deepen.methods, "__path__", [*deepen.methods.__path__, str(package.parent)])
        yield registry.get("shift")
        for name in [name for name in sys.modules if name.startswith("deepen.methods.shift")]:
            del sys.modules[name]

    def test_it_is_saved_and_opened(self, shift, tmp_path):
        loaded = load("tiny:llama", device="cpu")
        backbone = Backbone.attach(loaded.model)
        model = shift.load_model_type().build(shift.load_config_type()(size=3), backbone, backbone.vocab_size)
        with torch.no_grad():
            model.shift.copy_(torch.tensor([1.0, 2.0, 3.0]))
        save_adapter(tmp_path / "a", method=shift, model=model, identity=loaded.identity)
        assert tree(tmp_path / "a") == {MANIFEST, "method_config.json", "weights.safetensors"}
        opened = open_model(str(tmp_path / "a"), device="cpu")
        assert opened.method == shift
        assert opened.model.shift.tolist() == [1.0, 2.0, 3.0]
        assert continuation(opened.decoder) == continuation(PlainDecoder(opened.backbone))
