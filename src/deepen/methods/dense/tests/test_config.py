"""The configuration of ordinary training: presets, what is refused, what is chosen."""

import pytest

from deepen.core.errors import ConfigError
from deepen.methods.dense import METHOD
from deepen.methods.dense.config import LORA_FIELDS, DenseConfig


def test_presets():
    assert list(METHOD.preset_paths()) == ["full", "lora", "vanilla"]
    full, lora, vanilla = (METHOD.load_config(name) for name in METHOD.preset_paths())
    assert (full.trains, lora.trains, vanilla.trains) == ("all", "lora", "lora")
    assert (vanilla.lora_rank, vanilla.lora_layers, vanilla.learning_rate) == (16, "top_third", 1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"trains": "some"}, "all or lora"),
        ({"lora_rank": 0}, "lora_rank must be at least 1"),
        ({"lora_alpha": 0}, "lora_alpha must be positive"),
        ({"lora_dropout": 1}, r"lora_dropout must be in \[0, 1\)"),
        ({"lora_layers": []}, "lora_layers must name at least one"),
        ({"lora_layers": [1, 1]}, "lora_layers names one more than once"),
        ({"lora_layers": [-1]}, "layers are counted from 0"),
        ({"lora_targets": []}, "lora_targets must name at least one"),
        ({"learning_rate": 0}, "learning_rate must be positive"),
        ({"weight_decay": -1}, "weight_decay must be 0 or more"),
        ({"betas": [0.9, 1]}, "betas must be in"),
        ({"rank": 8}, 'unknown key "rank"; did you mean "lora_rank"'),
    ],
)
def test_impossible_values(settings, said):
    with pytest.raises(ConfigError, match=said):
        DenseConfig.from_dict({"trains": "lora", **settings})


@pytest.mark.parametrize("name", LORA_FIELDS)
def test_a_setting_that_nothing_reads_is_refused(name):
    values = {"lora_rank": 4, "lora_alpha": 1, "lora_dropout": 0.1, "lora_layers": [0], "lora_targets": ["q_proj"]}
    assert DenseConfig.from_dict({"trains": "lora", name: values[name]}).trains == "lora"
    with pytest.raises(ConfigError, match=f"{name} .* has no effect where all is trained"):
        DenseConfig.from_dict({name: values[name]})


@pytest.mark.parametrize(("num_layers", "top"), [(1, (0,)), (4, (2, 3)), (6, (4, 5)), (12, (8, 9, 10, 11))])
def test_the_top_third_is_rounded_up(num_layers, top):
    assert DenseConfig(trains="lora", lora_layers="top_third").layers_of(num_layers) == top
    assert DenseConfig(trains="lora").layers_of(num_layers) == tuple(range(num_layers))


def test_listed_layers():
    config = DenseConfig(trains="lora", lora_layers=(3, 1))
    assert config.layers_of(4) == (1, 3)
    with pytest.raises(ConfigError, match=r"names layer 3, but the model has 3 layers \(0..2\)"):
        config.layers_of(3)
