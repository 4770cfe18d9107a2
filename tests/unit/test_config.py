import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepen.core.config import Config
from deepen.core.errors import ConfigError


@dataclass(frozen=True)
class OptimizerConfig(Config):
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)

    def validate(self) -> list[str]:
        return [] if self.learning_rate > 0 else ["learning_rate must be positive"]


@dataclass(frozen=True)
class RunConfig(Config):
    model: str
    width: int = 128
    enabled: bool = False
    schedule: Literal["linear", "cosine", "none"] = "linear"
    layers: Literal["all"] | tuple[int, ...] = "all"
    limit: int | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    teacher: OptimizerConfig | None = None
    phases: tuple[OptimizerConfig, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    extra: Any = None

    def validate(self) -> list[str]:
        messages = []
        if self.width <= 0:
            messages.append("width must be positive")
        if self.limit is not None and self.limit < self.width:
            messages.append("limit must be >= width")
        return messages


numbers = st.floats(allow_nan=False, allow_infinity=False)
optimizers = st.builds(
    OptimizerConfig, learning_rate=numbers.filter(lambda x: x > 0), betas=st.tuples(numbers, numbers)
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
runs = st.builds(
    RunConfig,
    model=st.text(),
    width=st.integers(min_value=1, max_value=1000),
    enabled=st.booleans(),
    schedule=st.sampled_from(["linear", "cosine", "none"]),
    layers=st.just("all") | st.lists(st.integers()).map(tuple),
    limit=st.none() | st.integers(min_value=1000),
    optimizer=optimizers,
    teacher=st.none() | optimizers,
    phases=st.lists(optimizers, max_size=2).map(tuple),
    weights=st.dictionaries(st.text(), numbers, max_size=3),
    extra=json_values,
)


def message_of(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as raised:
        RunConfig.from_dict(data)
    return str(raised.value)


class TestRoundTrip:
    @given(runs)
    def test_dict(self, run):
        assert RunConfig.from_dict(run.to_dict()) == run

    @given(runs)
    def test_dict_is_plain_json(self, run):
        assert json.loads(json.dumps(run.to_dict())) == run.to_dict()

    @given(run=runs)
    def test_file(self, run, tmp_path_factory):
        path = tmp_path_factory.mktemp("run") / "run.json"
        run.save(path)
        assert RunConfig.from_file(path) == run

    def test_omitted_fields_have_their_defaults(self):
        assert RunConfig.from_dict({"model": "m"}) == RunConfig(model="m")

    def test_equal_settings_are_equal_values_however_they_were_written(self):
        in_code = RunConfig(model="m", layers=[0, 2], optimizer=OptimizerConfig(learning_rate=1))
        from_json = RunConfig.from_dict({"model": "m", "layers": [0, 2], "optimizer": {"learning_rate": 1.0}})
        assert in_code == from_json
        assert in_code.layers == (0, 2)
        assert type(in_code.optimizer.learning_rate) is float


class TestTypes:
    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("model", 3, "model must be a string, not 3"),
            ("model", None, "model must be a string, not null"),
            ("width", "wide", 'width must be an integer, not "wide"'),
            ("width", True, "width must be an integer, not true"),
            ("width", 128.0, "width must be an integer, not 128.0"),
            ("enabled", 1, "enabled must be true or false, not 1"),
            ("schedule", "cosin", 'schedule must be linear, cosine, or none, not "cosin"'),
            ("layers", "some", 'layers must be "all" or a list [an integer, ...], not "some"'),
            ("layers", [0, "1"], 'layers[1] must be an integer, not "1"'),
            ("limit", "none", 'limit must be an integer or null, not "none"'),
            ("optimizer", [], "optimizer must be an object, not []"),
            ("optimizer", {"learning_rate": "x"}, 'optimizer.learning_rate must be a number, not "x"'),
            ("optimizer", {"learning_rate": True}, "optimizer.learning_rate must be a number, not true"),
            ("optimizer", {"learning_rate": float("nan")}, "optimizer.learning_rate must be a number, not NaN"),
            ("optimizer", {"betas": [0.9]}, "optimizer.betas must be a list [a number, a number], not [0.9]"),
            ("teacher", {"betas": 3}, "teacher.betas must be a list [a number, a number], not 3"),
            ("phases", [{}, {"betas": 3}], "phases[1].betas must be a list [a number, a number], not 3"),
            ("weights", {"a": None}, "weights.a must be a number, not null"),
            ("weights", 3, "weights must be an object with a number for each key, not 3"),
        ],
    )
    def test_a_wrong_type_names_field_value_and_expectation(self, key, value, message):
        assert message_of({"model": "m", key: value}) == f"RunConfig: {message}"

    def test_a_number_beyond_floats_is_refused(self):
        assert "learning_rate must be a number, not 1000" in message_of(
            {"model": "m", "optimizer": {"learning_rate": 10**400}}
        )

    def test_a_long_value_is_cut(self):
        message = message_of({"model": "m", "width": "x" * 1000})
        assert message.endswith("xxx...")
        assert len(message) < 120

    def test_not_an_object(self, tmp_path):
        path = tmp_path / "run.json"
        path.write_text("[1, 2]")
        with pytest.raises(ConfigError, match=r"run\.json: a configuration must be an object, not \[1, 2\]"):
            RunConfig.from_file(path)

    def test_an_annotation_that_json_has_no_value_for_is_our_bug(self):
        @dataclass(frozen=True)
        class Odd(Config):
            place: Path = Path()

        with pytest.raises(TypeError, match="place: a configuration's field can't be annotated with"):
            Odd()


class TestKeys:
    def test_an_unknown_key_gets_the_nearest_name(self):
        assert message_of({"model": "m", "widht": 3}) == 'RunConfig: unknown key "widht"; did you mean "width"?'

    def test_an_inner_unknown_key_is_named_with_its_path(self):
        message = message_of({"model": "m", "teacher": {"learning_rat": 3}})
        assert message == 'RunConfig: unknown key "teacher.learning_rat"; did you mean "learning_rate"?'

    def test_without_a_near_name_all_are_listed(self):
        message = message_of({"model": "m", "optimizer": {"zzz": 3}})
        assert message == 'RunConfig: unknown key "optimizer.zzz"; known are: betas, learning_rate'

    def test_a_missing_key(self):
        assert message_of({}) == "RunConfig: model is missing and has no default"


class TestValues:
    def test_every_problem_is_told_at_once_with_the_file(self, tmp_path):
        path = tmp_path / "run.json"
        path.write_text(json.dumps({"widht": 1, "enabled": "yes", "optimizer": {"learning_rate": "fast"}}))
        with pytest.raises(ConfigError) as raised:
            RunConfig.from_file(path)
        assert str(raised.value).splitlines() == [
            f"{path} has 4 problems:",
            '  - unknown key "widht"; did you mean "width"?',
            "  - model is missing and has no default",
            '  - enabled must be true or false, not "yes"',
            '  - optimizer.learning_rate must be a number, not "fast"',
        ]

    def test_validate_is_heard_inner_configurations_included(self):
        message = message_of({"model": "m", "width": 0, "limit": -1, "phases": [{"learning_rate": 0}]})
        assert message.splitlines() == [
            "RunConfig has 3 problems:",
            "  - width must be positive",
            "  - limit must be >= width",
            "  - phases[0]: learning_rate must be positive",
        ]

    def test_validate_gives_messages_and_check_raises_them(self):
        run = RunConfig(model="m", width=-1)
        assert run.validate() == ["width must be positive"]
        with pytest.raises(ConfigError, match="RunConfig: width must be positive"):
            run.check()

    def test_check_finds_wrong_types_made_in_code(self):
        run = RunConfig(model="m", width="wide", teacher=OptimizerConfig(learning_rate=None))
        with pytest.raises(ConfigError) as raised:
            run.check()
        assert "width must be an integer" in str(raised.value)
        assert "teacher.learning_rate must be a number, not null" in str(raised.value)

    def test_check_is_silent_on_what_is_right(self):
        RunConfig(model="m", phases=(OptimizerConfig(),)).check()

    def test_save_writes_nothing_that_could_not_be_read_back(self, tmp_path):
        with pytest.raises(ConfigError, match="width must be positive"):
            RunConfig(model="m", width=0).save(tmp_path / "run.json")
        assert list(tmp_path.iterdir()) == []


def test_bad_syntax_says_line_and_column(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{\n  "model": "m",\n  "width" 3\n}\n')
    with pytest.raises(ConfigError, match=r"run\.json, line 3, column 11: Expecting ':' delimiter"):
        RunConfig.from_file(path)
