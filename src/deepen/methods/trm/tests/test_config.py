"""What a configuration refuses, and which way out it names."""

from typing import Any

import pytest

from deepen.core.errors import ConfigError
from deepen.methods.trm.config import DEFAULT_THRESHOLDS, TRMConfig


def test_it_is_off_by_default_and_has_the_published_sizes():
    config = TRMConfig.from_dict({})
    assert not config.use_trm
    assert (config.trm_d_latent, config.trm_n, config.trm_T) == (256, 6, 3)
    assert (config.mixing, config.placement, config.grad_outer_steps, config.halt) == ("position", "head", 1, "none")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trm_n": 0}, "trm_n must be at least 1, not 0"),
        ({"trm_T": -1}, "trm_T must be at least 1, not -1"),
        ({"trm_hidden": 0}, "trm_hidden must be at least 1, not 0"),
        ({"trm_lattent": 3}, 'unknown key "trm_lattent"; did you mean "trm_d_latent"'),
        ({"mixing": "evidence", "trm_d_latent": 12, "trm_heads": 5}, "number of heads that divides it is 4"),
        ({"mixing": "attention"}, "mixing must be position or evidence"),
        ({"placement": []}, 'for the place before the head write "head"'),
        ({"placement": [1, 1]}, "placement names a layer more than once: 1, 1"),
        ({"placement": [-2, 1]}, "placement holds -2; layers are counted from 0"),
        ({"placement": "tail"}, "placement must be"),
        ({"placement": [1], "supervise_steps": 2, "grad_outer_steps": 2}, 'or set placement to "head"'),
        ({"placement": [1], "halt": "kl"}, 'halt kl goes by the tokens that a step says, .*use "delta"'),
        ({"placement": [1], "halt": "learned"}, "halt learned goes by the tokens"),
        ({"supervise_steps": 2}, "raise grad_outer_steps to 2"),
        ({"grad_outer_steps": 4}, "there are 3 outer steps; lower it, or raise trm_T"),
        ({"T_max": 5}, "T_max 5 has no effect with T_sampling fixed"),
        ({"T_sampling": "lognormal_poisson", "T_max": 2}, "T_max is 2, below trm_T 3"),
        ({"T_sampling": "tasks"}, "T_sampling must be fixed, uniform, lognormal_poisson, task, or fixed_point"),
        ({"T_sampling": "fixed_point"}, "T_sampling fixed_point draws up to T_max; set that to a number"),
        (
            {"T_sampling": "task", "supervise_steps": 2, "grad_outer_steps": 2},
            "before the last have come too soon for the answer; leave it at 1",
        ),
        ({"halt_threshold": 0.1}, "halt_threshold 0.1 has no effect with halt none"),
        ({"halt": "learned", "halt_threshold": 1.0}, "must be between 0 and 1 for halt learned"),
        ({"halt": "delta", "halt_threshold": -0.1}, "must be 0 or more for halt delta"),
        ({"halt": "kl", "halt_weight": 0.5}, "halt_weight 0.5 has no effect with halt kl"),
        ({"betas": [0.9, 1.0]}, r"betas must be in \[0, 1\)"),
        ({"refiner_rate_factor": 0.0}, "refiner_rate_factor must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be 0 or more"),
    ],
)
def test_what_can_not_be_is_told_with_a_way_out(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TRMConfig.from_dict({"use_trm": True, **fields})


def test_without_a_refiner_its_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="trm_T 4 has no effect without a refiner; leave it out, or set use_trm"):
        TRMConfig.from_dict({"trm_T": 4})
    assert TRMConfig.from_dict({"trains": "all", "learning_rate": 1e-4}).learning_rate == 1e-4


def test_layers_are_those_of_the_model() -> None:
    config = TRMConfig.from_dict({"use_trm": True, "placement": [3, 0]})
    assert config.layers_of(4) == (0, 3)
    with pytest.raises(ConfigError, match=r"placement names layer 3, but the model has 3 layers \(0..2\)"):
        config.layers_of(3)
    assert TRMConfig(use_trm=True).layers_of(2) == ()


@pytest.mark.parametrize("rule", DEFAULT_THRESHOLDS)
def test_each_rule_has_a_threshold_of_its_own(rule: str) -> None:
    assert TRMConfig.from_dict({"use_trm": True, "halt": rule}).threshold == DEFAULT_THRESHOLDS[rule]
    assert TRMConfig.from_dict({"use_trm": True, "halt": rule, "halt_threshold": 0.3}).threshold == 0.3


def test_widths_follow_the_latent() -> None:
    assert TRMConfig(trm_d_latent=8).hidden == 32
    assert TRMConfig(trm_d_latent=8, trm_hidden=5).hidden == 5
