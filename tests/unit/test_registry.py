import os
import subprocess
import sys
from pathlib import Path

import pytest

import deepen.methods
from deepen.core import registry
from deepen.core.errors import AddressError, ConfigError, DeepenError
from deepen.core.registry import Method

INIT = """
from deepen.core.registry import Method
METHOD = Method("echo", "Says it again.", config="config:EchoConfig", model="inner.model:EchoModel")
"""
CONFIG = """
from dataclasses import dataclass
from deepen.core.config import Config

@dataclass(frozen=True)
class EchoConfig(Config):
    times: int = 2
"""


def drop_in(folder: Path, name: str = "echo", init: str = INIT) -> Path:
    """A method's package, as a user would put it into a folder of their own."""
    package = folder / name
    (package / "inner").mkdir(parents=True)
    (package / "presets").mkdir()
    (package / "__init__.py").write_text(init)
    (package / "config.py").write_text(CONFIG)
    (package / "inner" / "__init__.py").write_text("")
    (package / "inner" / "model.py").write_text("class EchoModel:\n    pass\n")
    (package / "presets" / "quiet.json").write_text('{"times": 1}')
    (package / "presets" / "loud.json").write_text('{"times": 9}')
    (package / "presets" / "notes.txt").write_text("not a preset")
    return package


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder searched for methods beside ours; what is imported from it is forgotten afterwards."""
    place = tmp_path / "methods"
    place.mkdir()
    monkeypatch.setattr(deepen.methods, "__path__", [*deepen.methods.__path__, str(place)])
    yield place
    for name in [name for name in sys.modules if name.startswith("deepen.methods.")]:
        origin = getattr(sys.modules[name], "__file__", None) or ""
        if origin.startswith(str(place)):
            del sys.modules[name]


class TestDiscover:
    def test_every_folder_of_ours_is_a_method(self):
        root = Path(deepen.methods.__file__).parent
        packages = {path.parent.name for path in root.glob("*/__init__.py")}
        assert set(registry.discover()) == packages

    def test_a_dropped_in_folder_is_a_method_beside_ours(self, folder):
        before = registry.discover()
        drop_in(folder)
        found = registry.discover()
        assert found.keys() - before.keys() == {"echo"}
        assert found["echo"].summary == "Says it again."
        assert list(found) == sorted(found)

    def test_the_environment_names_folders(self, tmp_path):
        drop_in(tmp_path / "one")
        drop_in(tmp_path / "two", "echo_two", INIT.replace('"echo"', '"echo_two"'))
        program = (
            "import os, sys, deepen.methods; os.chdir('/'); from deepen.core import registry; "
            "print(*registry.discover()); assert 'torch' not in sys.modules"
        )
        environment = {
            **os.environ,
            "DEEPEN_METHODS_PATH": os.pathsep.join(["one", "", str(tmp_path / "two")]),
            "PYTHONPATH": str(Path(deepen.methods.__file__).parents[2]),
        }
        command = [sys.executable, "-c", program]
        printed = subprocess.run(
            command, env=environment, cwd=tmp_path, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
        assert {"echo", "echo_two"} <= set(printed.split())

    def test_a_folder_that_is_not_there_is_told(self, folder):
        folder.rmdir()
        with pytest.raises(DeepenError, match=rf"DEEPEN_METHODS_PATH names {folder}, which is not a folder"):
            registry.discover()

    def test_two_methods_of_one_name_are_told_with_their_places(self, folder, tmp_path, monkeypatch):
        other = tmp_path / "other"
        drop_in(folder)
        drop_in(other)
        monkeypatch.setattr(deepen.methods, "__path__", [*deepen.methods.__path__, str(other)])
        with pytest.raises(DeepenError, match=rf'two methods are called "echo": {folder} and {other}'):
            registry.discover()

    @pytest.mark.parametrize("init", ["", "METHOD = 3", INIT.replace('"echo"', '"other"')])
    def test_a_package_without_its_method_is_told(self, folder, init):
        drop_in(folder, init=init)
        with pytest.raises(DeepenError, match=r'echo is not a method: .* lacks METHOD = Method\("echo", \.\.\.\)'):
            registry.discover()

    def test_a_package_that_cannot_be_imported_is_told(self, folder):
        drop_in(folder, init="1 / 0")
        with pytest.raises(DeepenError, match=r'the method "echo" in .* can\'t be imported: ZeroDivisionError'):
            registry.discover()

    def test_folders_that_are_no_packages_are_passed_over(self, folder):
        (folder / "__pycache__").mkdir()
        (folder / "notes").mkdir()
        (folder / "single.py").write_text("1 / 0")
        assert "notes" not in registry.discover()


class TestGet:
    def test_by_name(self, folder):
        drop_in(folder)
        assert registry.get("echo").name == "echo"

    def test_an_unknown_name_gets_the_nearest(self, folder):
        drop_in(folder)
        with pytest.raises(AddressError, match=r'there is no method "ehco"; did you mean "echo"\?'):
            registry.get("ehco")


class TestMethod:
    @pytest.fixture
    def echo(self, folder) -> Method:
        drop_in(folder)
        return registry.get("echo")

    def test_file_names_have_defaults(self, echo):
        assert echo.config_file == "method_config.json"
        assert echo.weights_file == "weights.safetensors"

    def test_types_are_loaded_from_the_methods_own_modules(self, echo):
        assert echo.load_config_type().__name__ == "EchoConfig"
        assert echo.load_model_type().__module__ == "deepen.methods.echo.inner.model"

    def test_presets_by_name(self, echo, folder):
        assert echo.preset_paths() == {
            "loud": folder / "echo" / "presets" / "loud.json",
            "quiet": folder / "echo" / "presets" / "quiet.json",
        }

    @pytest.mark.parametrize("name", ["loud", "loud.json"])
    def test_a_preset_is_loaded_by_name(self, echo, name):
        assert echo.load_config(name).times == 9

    def test_a_file_is_loaded_by_path_and_comes_before_a_preset(self, echo, tmp_path, monkeypatch):
        (tmp_path / "loud.json").write_text('{"times": 5}')
        assert echo.load_config(tmp_path / "loud.json").times == 5
        monkeypatch.chdir(tmp_path)
        assert echo.load_config("loud.json").times == 5
        assert echo.load_config("loud").times == 9

    def test_neither_file_nor_preset(self, echo):
        with pytest.raises(ConfigError, match=r'"laud" is neither a file nor a preset of echo; did you mean "loud"\?'):
            echo.load_config("laud")

    def test_a_method_without_presets_says_so(self, echo, folder):
        for path in (folder / "echo" / "presets").iterdir():
            path.unlink()
        with pytest.raises(ConfigError, match="none are known"):
            echo.load_config("loud")


def test_every_shipped_preset_is_a_valid_configuration():
    methods = registry.discover().values()
    assert methods
    for method in methods:
        paths = method.preset_paths()
        assert paths, f"{method.name} ships no preset"
        for path in paths.values():
            method.load_config(path).check()
