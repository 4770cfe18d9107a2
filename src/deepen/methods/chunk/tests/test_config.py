"""RecursiveConfig: fields, messages, presets, and the shape of cells per base."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepen.core.errors import ConfigError
from deepen.methods.chunk import METHOD
from deepen.methods.chunk.config import (
    DRAFTS_OF_MODE,
    EXACT_LOSS_WEIGHTS,
    FIELDS_OF_ONE_MODE,
    REFINED_LOSS_WEIGHTS,
    SMALL_BASE_PARAMETERS,
    CellPlan,
    RecursiveConfig,
    get_after_surgery_config,
    get_baseline_config,
    get_phase_a_config,
    get_phase_b_config,
    get_phase_c_config,
    resolve_for_base,
)

KNOWN_DEFAULTS = {
    "recursive_enabled": False,
    "chunk_width": 128,
    "max_inner_steps": 4,
    "commit_threshold": 0.7,
    "min_commit_threshold": 0.3,
    "layers_to_refine": "all",
    "use_latent_token": True,
    "d_state": 512,
    "gate_hidden": 1024,
    "max_chunk_len": 128,
    "corruption_rate": 0.3,
    "corruption_schedule": "linear",
    "corruption_rate_final": 0.1,
    "lambda_final": 1.0,
    "lambda_masked": 0.5,
    "lambda_halt": 0.5,
    "lambda_len": 0.05,
    "lambda_ponder": 0.01,
    "lambda_stability": 0.01,
    "cache_reset_policy": "keep_kda_recurrent_reset_mla",
    "enable_length_head": True,
    "use_soft_tokens": False,
}
FURTHER_DEFAULTS = {
    "commit_mode": "exact",
    "draft": None,
    "pooling": "causal",
    "refine_hidden": None,
    "share_cells": None,
    "commit_bias_init": -2.0,
    "keep_better": False,
    "carry_state": False,
    "grad_passes": 0,
    "corruption_strategy": "random",
    "own_draft_share": 0.0,
    "halt_margin": 0.01,
    "lambda_distill": 1.0,
    "distill_gamma": 4.0,
    "drafter_hidden": None,
    "drafter_layers": None,
    "draft_vocab": 0,
    "keep_outputs": False,
    "lora_rank": 8,
    "anchors_per_text": 8,
    "phase": "none",
}


def refined(**fields) -> RecursiveConfig:
    return RecursiveConfig(commit_mode="refined", **fields)


class TestFields:
    def test_names_and_defaults_are_the_known_ones(self):
        assert len(KNOWN_DEFAULTS) == 22
        assert list(RecursiveConfig().to_dict().items()) == [*KNOWN_DEFAULTS.items(), *FURTHER_DEFAULTS.items()]

    def test_defaults_are_valid_in_both_modes(self):
        assert RecursiveConfig().validate() == []
        assert refined().validate() == []

    def test_is_frozen(self):
        with pytest.raises(dataclasses.FrozenInstanceError):
            RecursiveConfig().chunk_width = 64

    def test_one_field_is_a_complete_file(self, tmp_path: Path):
        path = tmp_path / "recursive_config.json"
        path.write_text('{"recursive_enabled": false}')
        assert RecursiveConfig.from_file(path) == RecursiveConfig()

    def test_a_list_of_layers_is_the_tuple_of_them(self):
        assert RecursiveConfig(layers_to_refine=[0, 3]) == RecursiveConfig(layers_to_refine=(0, 3))
        assert RecursiveConfig.from_dict({"layers_to_refine": [0, 3]}).layers_to_refine == (0, 3)

    @given(
        width=st.integers(1, 128),
        threshold=st.floats(0.3, 1),
        layers=st.just("all") | st.lists(st.integers(0, 99), min_size=1, unique=True).map(tuple),
        hidden=st.none() | st.integers(1, 10**6),
        shared=st.none() | st.booleans(),
        mode_and_draft=st.sampled_from([(mode, draft) for mode, all_ in DRAFTS_OF_MODE.items() for draft in all_]),
    )
    def test_saving_and_reading_gives_the_same_configuration(
        self, tmp_path_factory, width, threshold, layers, hidden, shared, mode_and_draft
    ):
        mode, draft = mode_and_draft
        config = RecursiveConfig(
            chunk_width=width,
            commit_threshold=threshold,
            layers_to_refine=layers,
            refine_hidden=hidden,
            share_cells=shared,
            commit_mode=mode,
            draft=draft,
            drafter_hidden=64 if draft == "shallow" else None,
        )
        path = tmp_path_factory.mktemp("config") / "recursive_config.json"
        config.save(path)
        assert RecursiveConfig.from_file(path) == config
        assert RecursiveConfig.from_dict(config.to_dict()) == config
        assert dataclasses.replace(config, chunk_width=129, max_chunk_len=129) != config


class TestMessages:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (
                RecursiveConfig(draft="shallow"),
                "draft shallow needs a drafter; set drafter_hidden to its width, such as twice the base's",
            ),
            (
                RecursiveConfig(draft_vocab=9),
                "draft_vocab 9 has no effect without a drafter; set drafter_hidden, or leave it out",
            ),
            (
                RecursiveConfig(drafter_layers=(1, 2)),
                "drafter_layers (1, 2) has no effect without a drafter; set drafter_hidden, or leave it out",
            ),
            (
                RecursiveConfig(drafter_hidden=8, drafter_layers=(2, 1)),
                "drafter_layers must name at least one layer, ascending, not [2, 1]",
            ),
            (RecursiveConfig(drafter_hidden=0), "drafter_hidden must be positive, or null for no drafter"),
            (RecursiveConfig(drafter_hidden=8, draft_vocab=-1), "draft_vocab must be 0 (all tokens) or more, not -1"),
            (
                RecursiveConfig(draft="shallow", drafter_hidden=8, phase="b"),
                "phase b trains LoRA at slots, which draft shallow has none of; set phase to a",
            ),
            (
                RecursiveConfig(keep_outputs=True),
                "keep_outputs True has no effect without a drafter; set drafter_hidden, or leave it out",
            ),
            (RecursiveConfig(chunk_width=0), "chunk_width must be positive"),
            (RecursiveConfig(max_inner_steps=0), "max_inner_steps must be positive"),
            (RecursiveConfig(commit_threshold=1.1), "commit_threshold must be in [0, 1]"),
            (RecursiveConfig(min_commit_threshold=-0.1), "min_commit_threshold must be in [0, 1]"),
            (
                RecursiveConfig(commit_threshold=0.2, min_commit_threshold=0.3),
                "commit_threshold must be >= min_commit_threshold",
            ),
            (RecursiveConfig(corruption_schedule="step"), "corruption_schedule must be linear, cosine, or none"),
            (RecursiveConfig(chunk_width=129), "chunk_width must be <= max_chunk_len"),
            (RecursiveConfig(max_chunk_len=0), "max_chunk_len must be positive"),
            (RecursiveConfig(d_state=-1), "d_state must be positive"),
            (RecursiveConfig(gate_hidden=0), "gate_hidden must be positive"),
            (
                RecursiveConfig(refine_hidden=0),
                "refine_hidden must be positive, or null for a width by the base's size",
            ),
            (RecursiveConfig(corruption_rate=1.5), "corruption_rate must be in [0, 1]"),
            (RecursiveConfig(corruption_rate_final=-1.0), "corruption_rate_final must be in [0, 1]"),
            (refined(own_draft_share=2.0), "own_draft_share must be in [0, 1]"),
            (refined(grad_passes=1), "grad_passes must be 0 (all passes) or at least 2, not 1"),
            (refined(grad_passes=-2), "grad_passes must be 0 (all passes) or at least 2, not -2"),
            (refined(halt_margin=-0.5), "halt_margin must be >= 0, not -0.5"),
            (RecursiveConfig(distill_gamma=0.0), "distill_gamma must be positive, not 0.0"),
            (
                RecursiveConfig(layers_to_refine=()),
                'layers_to_refine must name at least one layer; "all" leaves the choice to the base\'s size',
            ),
            (RecursiveConfig(layers_to_refine=(0, -1)), "layers_to_refine holds -1; layers are counted from 0"),
            (RecursiveConfig(layers_to_refine=(2, 1, 2)), "layers_to_refine holds 2 more than once"),
            (RecursiveConfig(commit_mode="fast"), "commit_mode must be exact or refined"),
            (RecursiveConfig(pooling="mean"), "pooling must be causal or chunk"),
            (RecursiveConfig(phase="d"), "phase must be none, a, b, or c"),
            (RecursiveConfig(corruption_strategy="block"), "corruption_strategy must be random or span"),
            (
                RecursiveConfig(cache_reset_policy="drop"),
                "cache_reset_policy must be keep_kda_recurrent_reset_mla, keep_all, or reset_all",
            ),
            (
                RecursiveConfig(phase="c"),
                "phase c changes the base, whose output commit_mode exact promises; "
                "set commit_mode to refined, or phase to a or b",
            ),
            (
                RecursiveConfig(cache_reset_policy="keep_all"),
                "cache_reset_policy keep_all lets a pass see what others left, and then its output isn't the base's; "
                "set commit_mode to refined, or cache_reset_policy to keep_kda_recurrent_reset_mla",
            ),
            (refined(draft="lookup"), "draft must be ar or mask in commit_mode refined, not lookup"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_one_fault_gives_its_one_message(self, config: RecursiveConfig, message: str):
        assert message in config.validate()
        if "threshold" not in message:  # a threshold out of range may be out of order as well
            assert config.validate() == [message]
        with pytest.raises(ConfigError):
            config.check()

    @pytest.mark.parametrize("name", [*REFINED_LOSS_WEIGHTS, *EXACT_LOSS_WEIGHTS])
    def test_weights_are_not_negative(self, name: str):
        mode = "refined" if name in REFINED_LOSS_WEIGHTS else "exact"
        config = RecursiveConfig(commit_mode=mode, **{name: -0.25})
        assert config.validate() == [f"{name} must be >= 0, not -0.25"]

    @pytest.mark.parametrize("edge", [0.0, 1.0])
    def test_shares_include_both_ends(self, edge: float):
        names = ("commit_threshold", "min_commit_threshold", "corruption_rate", "corruption_rate_final")
        assert refined(own_draft_share=edge, **dict.fromkeys(names, edge)).validate() == []

    def test_faults_are_told_together(self):
        config = RecursiveConfig(chunk_width=-1, commit_threshold=0.1, draft="ar", lambda_final=3.0)
        assert config.validate() == [
            "chunk_width must be positive",
            "commit_threshold must be >= min_commit_threshold",
            "lambda_final 3.0 has no effect in commit_mode exact; leave it out, or set commit_mode to refined",
        ]

    @given(
        fields=st.fixed_dictionaries(
            {},
            optional={
                "chunk_width": st.integers(-2, 200),
                "max_chunk_len": st.integers(-2, 200),
                "max_inner_steps": st.integers(-1, 5),
                "commit_threshold": st.floats(-0.5, 1.5),
                "min_commit_threshold": st.floats(-0.5, 1.5),
                "layers_to_refine": st.just("all") | st.lists(st.integers(-2, 3)).map(tuple),
                "commit_mode": st.sampled_from(["exact", "refined"]),
                "draft": st.sampled_from([None, "auto", "ar", "lookup", "mask", "jacobi"]),
                "grad_passes": st.integers(-1, 4),
                "lambda_final": st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
                "lambda_distill": st.sampled_from([-1.0, 0.0, 1.0, 2.0]),
                "phase": st.sampled_from(["none", "a", "b", "c"]),
            },
        )
    )
    def test_whatever_validate_passes_can_be_read_back(self, fields):
        config = RecursiveConfig(**fields)
        messages = config.validate()
        assert len(set(messages)) == len(messages)
        if messages:
            with pytest.raises(ConfigError) as error:
                RecursiveConfig.from_dict(fields)
            assert all(message in str(error.value) for message in messages)
        else:
            assert RecursiveConfig.from_dict(config.to_dict()) == config


class TestStrictReading:
    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("chunk_widht", "chunk_width"),
            ("lambda_length", "lambda_len"),
            ("layers_refined", "layers_to_refine"),
            ("recursive_enable", "recursive_enabled"),
        ],
    )
    def test_an_unknown_key_names_the_file_and_the_nearest_field(self, tmp_path: Path, written: str, meant: str):
        path = tmp_path / "mine.json"
        path.write_text(json.dumps({written: 1}))
        with pytest.raises(ConfigError) as error:
            RecursiveConfig.from_file(path)
        for expected in (str(path), f'"{written}"', f'did you mean "{meant}"'):
            assert expected in str(error.value)

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("chunk_width", "64"),
            ("chunk_width", 64.0),
            ("recursive_enabled", 1),
            ("d_state", True),
            ("commit_threshold", "high"),
            ("layers_to_refine", "some"),
            ("layers_to_refine", ["0"]),
            ("draft", "tree"),
            ("share_cells", 0),
            ("refine_hidden", 1.5),
        ],
    )
    def test_a_wrong_type_names_the_field(self, field: str, value: object):
        with pytest.raises(ConfigError, match=field):
            RecursiveConfig.from_dict({field: value})

    def test_the_known_message_reaches_readers_of_files_too(self):
        with pytest.raises(ConfigError, match="corruption_schedule must be linear, cosine, or none"):
            RecursiveConfig.from_dict({"corruption_schedule": "step"})


class TestModes:
    @pytest.mark.parametrize(("mode", "draft"), [("exact", "auto"), ("refined", "ar")])
    def test_no_draft_means_the_mode_s_own(self, mode: str, draft: str):
        assert RecursiveConfig(commit_mode=mode).resolved_draft == draft

    @pytest.mark.parametrize("mode", ["exact", "refined"])
    @pytest.mark.parametrize("draft", ["auto", "ar", "lookup", "mask", "jacobi"])
    def test_which_draft_goes_with_which_mode(self, mode: str, draft: str):
        config = RecursiveConfig(commit_mode=mode, draft=draft)
        assert config.resolved_draft == draft
        fits = mode == "exact" or draft in ("ar", "mask")
        assert (config.validate() == []) is fits

    @pytest.mark.parametrize(
        ("mode", "other", "field", "value"),
        [
            *(("exact", "refined", name, 0.75) for name in REFINED_LOSS_WEIGHTS),
            ("exact", "refined", "keep_better", True),
            ("exact", "refined", "carry_state", True),
            ("exact", "refined", "grad_passes", 2),
            ("exact", "refined", "corruption_strategy", "span"),
            ("exact", "refined", "own_draft_share", 0.5),
            ("exact", "refined", "halt_margin", 0.0),
            ("exact", "refined", "use_soft_tokens", True),
            ("refined", "exact", "lambda_distill", 0.5),
            ("refined", "exact", "distill_gamma", 2.0),
        ],
    )
    def test_a_setting_the_mode_does_not_read_is_refused(self, mode: str, other: str, field: str, value: object):
        assert RecursiveConfig(commit_mode=mode, **{field: value}).validate() == [
            f"{field} {value} has no effect in commit_mode {mode}; leave it out, or set commit_mode to {other}"
        ]
        assert RecursiveConfig(commit_mode=other, **{field: value}).validate() == []

    @pytest.mark.parametrize(("mode", "weights"), [("exact", REFINED_LOSS_WEIGHTS), ("refined", EXACT_LOSS_WEIGHTS)])
    def test_a_weight_of_zero_or_at_its_default_asks_for_nothing(self, mode: str, weights: tuple[str, ...]):
        for name in weights:
            default = (KNOWN_DEFAULTS | FURTHER_DEFAULTS)[name]
            for value in (0.0, default):
                assert RecursiveConfig.from_dict({"commit_mode": mode, name: value}).commit_mode == mode


PRESETS = {
    "baseline": get_baseline_config,
    "after_surgery": get_after_surgery_config,
    "recursive_phase_a": get_phase_a_config,
    "recursive_phase_b": get_phase_b_config,
    "recursive_phase_c": get_phase_c_config,
}


class TestPresets:
    def test_the_five_known_names_ship(self):
        assert sorted(METHOD.preset_paths()) == sorted(PRESETS)

    @pytest.mark.parametrize("name", PRESETS)
    def test_each_parses_by_name_by_path_and_by_function(self, name: str):
        config = PRESETS[name]()
        assert config == RecursiveConfig.from_file(METHOD.preset_paths()[name])
        assert config == METHOD.load_config(f"{name}.json")
        assert config.validate() == []

    def test_all_differ(self):
        configs = [get() for get in PRESETS.values()]
        assert len({json.dumps(config.to_dict()) for config in configs}) == len(configs)

    def test_baseline_is_exactly_one_field(self):
        assert json.loads(METHOD.preset_paths()["baseline"].read_text()) == {"recursive_enabled": False}

    def test_after_surgery_is_the_defaults_switched_on(self):
        assert get_after_surgery_config() == RecursiveConfig(recursive_enabled=True)

    def test_the_phases_train_different_things_each_in_a_mode_that_can(self):
        phases = [get_phase_a_config(), get_phase_b_config(), get_phase_c_config()]
        assert [config.phase for config in phases] == ["a", "b", "c"]
        assert [config.commit_mode for config in phases] == ["exact", "exact", "refined"]
        assert all(config.recursive_enabled for config in phases)


class TestCellPlan:
    def test_a_small_base_gets_one_narrow_cell_on_its_last_third(self):
        plan = resolve_for_base(RecursiveConfig(), num_layers=30, hidden_size=576, num_parameters=134_515_008)
        assert plan == CellPlan(layers=tuple(range(20, 30)), hidden=144, shared=True)
        assert plan.num_cells == 1

    def test_a_large_base_gets_a_wide_cell_on_every_layer(self):
        plan = resolve_for_base(RecursiveConfig(), num_layers=27, hidden_size=2304, num_parameters=48_000_000_000)
        assert plan == CellPlan(layers=tuple(range(27)), hidden=9216, shared=False)
        assert plan.num_cells == 27

    @pytest.mark.parametrize(("num_layers", "first"), [(1, 0), (2, 1), (3, 2), (4, 2), (6, 4), (7, 4)])
    def test_a_third_is_rounded_up(self, num_layers: int, first: int):
        plan = resolve_for_base(RecursiveConfig(), num_layers=num_layers, hidden_size=8, num_parameters=1000)
        assert plan.layers == tuple(range(first, num_layers))

    def test_small_means_below_one_billion_parameters(self):
        below, at = (
            resolve_for_base(RecursiveConfig(), num_layers=6, hidden_size=8, num_parameters=num_parameters)
            for num_parameters in (SMALL_BASE_PARAMETERS - 1, SMALL_BASE_PARAMETERS)
        )
        assert SMALL_BASE_PARAMETERS == 10**9
        assert (below.hidden, below.shared, len(below.layers)) == (2, True, 2)
        assert (at.hidden, at.shared, len(at.layers)) == (32, False, 6)

    @given(
        num_layers=st.integers(1, 40),
        hidden_size=st.integers(1, 4096),
        num_parameters=st.sampled_from([10**6, 10**12]),
        refine_hidden=st.integers(1, 9999),
        share_cells=st.booleans(),
        data=st.data(),
    )
    def test_each_field_overrides_its_part_and_no_other(
        self, num_layers, hidden_size, num_parameters, refine_hidden, share_cells, data
    ):
        named = data.draw(st.lists(st.integers(0, num_layers - 1), min_size=1, unique=True), label="layers_to_refine")

        def plan(**fields) -> CellPlan:
            return resolve_for_base(
                RecursiveConfig(**fields),
                num_layers=num_layers,
                hidden_size=hidden_size,
                num_parameters=num_parameters,
            )

        default = plan()
        assert default.layers == tuple(range(num_layers - len(default.layers), num_layers))
        assert default.layers and default.hidden >= 1
        assert plan(layers_to_refine=named) == dataclasses.replace(default, layers=tuple(sorted(named)))
        assert plan(refine_hidden=refine_hidden) == dataclasses.replace(default, hidden=refine_hidden)
        assert plan(share_cells=share_cells) == dataclasses.replace(default, shared=share_cells)

    @pytest.mark.parametrize("layer", [30, -1])
    def test_a_layer_the_base_lacks_is_named_with_the_number_there_is(self, layer: int):
        with pytest.raises(ConfigError, match=rf"names layer {layer}, but the base has 30 layers \(0\.\.29\)"):
            resolve_for_base(
                RecursiveConfig(layers_to_refine=(3, layer)), num_layers=30, hidden_size=8, num_parameters=1000
            )


def test_the_method_and_its_configuration_are_found_without_torch():
    program = (
        "import sys; from deepen.core.registry import get; method = get('chunk'); kind = method.load_config_type(); "
        "assert kind.__name__ == 'RecursiveConfig'; assert kind().validate() == []; "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_the_method_names_the_files_of_its_checkpoints():
    assert METHOD.name == "chunk"
    assert METHOD.load_config_type() is RecursiveConfig
    assert (METHOD.config_file, METHOD.weights_file) == ("recursive_config.json", "sidecar.safetensors")


def test_the_readme_s_table_of_fields_is_the_code_s():
    readme = (Path(str(METHOD.preset_paths()["baseline"])).parents[1] / "README.md").read_text()
    table = readme.split("## Fields of `RecursiveConfig`")[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:3] == "| `"]
    documented = {name.strip("`"): json.loads(default) for name, default, _, _ in rows}
    assert documented == RecursiveConfig().to_dict()
    readers = {name: mode for mode, names in FIELDS_OF_ONE_MODE.items() for name in names}
    assert {name.strip("`"): mode for name, _, mode, _ in rows} == {
        name: readers.get(name, "both") for name in documented
    }
