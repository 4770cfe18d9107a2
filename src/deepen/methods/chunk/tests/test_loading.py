import logging
import shutil
from pathlib import Path

import pytest
import torch

from deepen import load_checkpoint, load_model_with_config
from deepen.backbones import tiny
from deepen.backbones.resolve import load
from deepen.checkpoint import MANIFEST, save_adapter
from deepen.core.errors import CheckpointError, ConfigError, DeepenError
from deepen.methods.chunk import METHOD
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.loading import remove
from deepen.methods.chunk.model import ChunkRefineWrapper
from deepen.nn.linear import PackedForward

SMALL = RecursiveConfig(recursive_enabled=True, d_state=8, gate_hidden=8, max_chunk_len=16, chunk_width=16)
IDS = torch.tensor([[72, 105, 32, 72, 105]])


def save(folder: Path, config: RecursiveConfig) -> ChunkRefineWrapper:
    """A sidecar filled with noise, saved to `folder`."""
    loaded = load("tiny:llama", device="cpu")
    wrapper = ChunkRefineWrapper(loaded.model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in wrapper.saved_state().values():
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
    save_adapter(folder, method=METHOD, model=wrapper, identity=loaded.identity)
    return wrapper


class TestLoadModelWithConfig:
    def test_the_defaults_give_the_base_itself(self):
        model, tokenizer, config = load_model_with_config("tiny:llama")
        assert type(model) is type(tiny.build("llama"))
        assert config == RecursiveConfig()
        assert tokenizer.encode("a") == [97]

    def test_disabled_it_computes_what_the_base_does(self):
        model, _, _ = load_model_with_config("tiny:llama", SMALL, recursive_enabled=False, device_map="cpu")
        assert torch.equal(model(IDS).logits, tiny.build("llama")(IDS).logits)

    def test_a_configuration_object(self):
        model, _, config = load_model_with_config("tiny:llama", config=SMALL)
        assert isinstance(model, ChunkRefineWrapper) and not model.training
        assert model.config is config and config == SMALL

    @pytest.mark.parametrize("as_path", [str, Path])
    def test_a_configuration_file(self, tmp_path, as_path):
        SMALL.save(tmp_path / "c.json")
        model, _, config = load_model_with_config("tiny:llama", config_path=as_path(tmp_path / "c.json"))
        assert isinstance(model, ChunkRefineWrapper) and config == SMALL

    def test_a_preset(self):
        _, _, config = load_model_with_config("tiny:llama", config_path="recursive_phase_a")
        assert config.phase == "a"

    def test_the_object_comes_before_the_file_and_the_log_says_so(self, caplog):
        _, _, config = load_model_with_config("tiny:llama", config=SMALL, config_path="after_surgery")
        assert config == SMALL
        assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
            "config_path after_surgery is not read: the configuration object that was passed comes first"
        ]

    @pytest.mark.parametrize(
        ("arguments", "enabled", "source"),
        [
            ({"config": SMALL}, False, "the configuration object said True"),
            ({"config_path": "after_surgery"}, False, "after_surgery said True"),
            ({}, True, "the defaults said False"),
        ],
    )
    def test_the_switch_overrides_its_field_alone_and_the_log_says_so(self, arguments, enabled, source, caplog):
        caplog.set_level(logging.INFO)
        before = load_model_with_config("tiny:llama", **arguments)[2]
        model, _, config = load_model_with_config("tiny:llama", **arguments, recursive_enabled=enabled)
        assert {**config.to_dict(), "recursive_enabled": None} == {**before.to_dict(), "recursive_enabled": None}
        assert config.recursive_enabled is enabled is isinstance(model, ChunkRefineWrapper)
        assert f"recursive_enabled is {enabled}, as the argument says; {source}" in caplog.text

    @pytest.mark.parametrize("switch", [None, True])
    def test_a_switch_that_changes_nothing_is_not_logged(self, switch, caplog):
        caplog.set_level(logging.INFO)
        load_model_with_config("tiny:llama", config=SMALL, recursive_enabled=switch)
        assert "recursive_enabled" not in caplog.text

    def test_a_wrong_object_is_told_before_anything_is_loaded(self):
        wrong = RecursiveConfig(recursive_enabled=True, chunk_width=0)
        with pytest.raises(ConfigError, match="chunk_width must be positive"):
            load_model_with_config("no/such/model", config=wrong)

    def test_the_dtype_is_the_bases(self):
        model, _, _ = load_model_with_config("tiny:llama", config=SMALL, dtype="float64")
        assert model.backbone.dtype == torch.float64

    @pytest.mark.parametrize(
        "arguments",
        [
            *({"device_map": place} for place in ("cpu", torch.device("cpu"), {"": "cpu"}, "auto", None)),
            {"device": "cpu"},
        ],
        ids=str,
    )
    def test_one_device(self, arguments):
        model, _, _ = load_model_with_config("tiny:llama", config=SMALL, **arguments)
        assert model.mask_token.embedding.device == model.backbone.device

    @pytest.mark.parametrize("place", ["meta:0:0", "nowhere", 99, {"": "nowhere"}], ids=str)
    def test_a_device_that_is_not_there(self, place):
        with pytest.raises(DeepenError, match="can't be used here"):
            load_model_with_config("tiny:llama", device_map=place)

    @pytest.mark.parametrize("device_map", ["balanced", "sequential", {"model.layers.0": 0, "lm_head": 1}], ids=str)
    def test_several_devices_are_refused(self, device_map):
        with pytest.raises(DeepenError, match=r"spreads a model over several devices, which is not supported.*\"cpu\""):
            load_model_with_config("tiny:llama", device_map=device_map)

    def test_two_places(self):
        with pytest.raises(ConfigError, match="device_map cpu and device cpu both name a place"):
            load_model_with_config("tiny:llama", device_map="cpu", device="cpu")

    def test_an_argument_that_nothing_reads(self):
        with pytest.raises(ConfigError, match='no use for "torch_dtype"; did you mean "dtype"'):
            load_model_with_config("tiny:llama", torch_dtype="float32")

    def test_a_saved_sidecar_is_sent_to_load_checkpoint(self, tmp_path):
        save(tmp_path / "a", SMALL)
        with pytest.raises(ConfigError, match=r"is a saved sidecar, .*: use load_checkpoint"):
            load_model_with_config(str(tmp_path / "a"), config=SMALL)


class TestLoadCheckpoint:
    def test_everything_comes_back(self, tmp_path):
        wrapper = save(tmp_path / "a", SMALL)
        model, config = load_checkpoint(tmp_path / "a")
        before, after = wrapper.saved_state(), model.saved_state()
        assert config == SMALL and model.config is config
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert torch.equal(model(IDS).logits, wrapper(IDS).logits)

    def test_disabled_it_is_the_base_itself(self, tmp_path):
        save(tmp_path / "a", RecursiveConfig())
        model, config = load_checkpoint(tmp_path / "a")
        assert type(model) is type(tiny.build("llama"))
        assert not config.recursive_enabled

    def test_a_folder_that_is_none(self, tmp_path):
        with pytest.raises(CheckpointError, match=f"{tmp_path} is no saved sidecar: it has no {MANIFEST}"):
            load_checkpoint(tmp_path)

    def test_a_mismatch_is_told(self, tmp_path):
        save(tmp_path / "a", SMALL)
        shutil.copy(tmp_path / "a" / METHOD.config_file, tmp_path / "kept.json")
        RecursiveConfig(recursive_enabled=True).save(tmp_path / "a" / METHOD.config_file)
        with pytest.raises(CheckpointError, match="the sidecar's tensors don't fit its configuration on this base"):
            load_checkpoint(tmp_path / "a")


class TestRemove:
    def test_the_base_object_comes_back_untouched(self):
        base = tiny.build("llama")
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        wrapper = ChunkRefineWrapper(base, SMALL)
        wrapper.generate_chunks(IDS, max_new_tokens=4)
        assert remove(wrapper) is base
        after = base.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
        assert all(not layer._forward_hooks for layer in base.modules())

    def test_what_was_packed_is_unpacked(self):
        base = tiny.build("llama")
        wrapper = ChunkRefineWrapper(base, SMALL)
        wrapper.backbone.pack()
        assert not any(isinstance(module.forward, PackedForward) for module in remove(wrapper).modules())


class TestDescribe:
    def test_it_says_what_was_grafted(self):
        facts = ChunkRefineWrapper(tiny.build("llama"), SMALL).describe()
        assert facts["layers refined"] == "2 of 4 (2-3)"
        assert facts["cells"] == "one, shared by these layers"
        assert facts["cell width"] == 16

    def test_its_parts_sum_to_the_sidecar(self):
        wrapper = ChunkRefineWrapper(tiny.build("llama"), SMALL, share_cells=False, layers_to_refine=(0, 2, 3))
        facts = wrapper.describe()
        assert facts["layers refined"] == "3 of 4 (0, 2-3)"
        assert facts["cells"] == "3, one a layer"
        parts = [value for label, value in facts.items() if label.startswith("parameters of ")]
        assert sum(parts) == wrapper.num_sidecar_parameters

    def test_its_flops_are_the_cells(self):
        wrapper = ChunkRefineWrapper(tiny.build("llama"), SMALL)
        facts = wrapper.describe()
        # Two layers, each a product D -> hidden and one back.
        assert facts["extra FLOPs per drafted token"] == 2 * 2 * (2 * 64 * 16)
        base = wrapper.flops(num_positions=1, context=0)
        assert facts["extra FLOPs, share of the base's"] == pytest.approx(8192 / base, abs=1e-6)

    def test_disabled_there_is_nothing(self):
        assert ChunkRefineWrapper(tiny.build("llama"), RecursiveConfig()).describe() == {
            "layers refined": "none: recursive_enabled is false"
        }
