import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepen.core import files
from deepen.core.errors import ConfigError, DeepenError
from deepen.core.files import read_json, write_atomically, write_folder_atomically, write_json


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder`, hidden ones included, with its text."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fail_with(code: int):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def kill_in(program: str) -> None:
    """Run a program that kills itself in the middle of things."""
    source = "import os, signal\nfrom pathlib import Path\nfrom deepen.core import files\n" + program
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
    killed = subprocess.run([sys.executable, "-c", source], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL


class TestWriteAtomically:
    def test_the_file_appears_whole_with_its_parents(self, tmp_path):
        target = tmp_path / "a" / "b" / "x.txt"
        with write_atomically(target) as temporary:
            temporary.write_text("new")
            assert temporary.parent == target.parent
            assert not target.exists()
        assert tree(tmp_path) == {"a/b/x.txt": "new"}

    def test_an_exception_leaves_the_old_file_and_nothing_else(self, tmp_path):
        target = tmp_path / "x.txt"
        target.write_text("old")
        with pytest.raises(KeyboardInterrupt), write_atomically(target) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
        assert tree(tmp_path) == {"x.txt": "old"}

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_is_told_and_leaves_nothing(self, tmp_path, monkeypatch, code):
        monkeypatch.setattr(files.os, "fsync", fail_with(code))
        with pytest.raises(DeepenError) as raised:
            write_json(tmp_path / "out" / "x.json", {"a": 1})
        assert f"can't write {tmp_path / 'out' / 'x.json'}: {os.strerror(code)}" in str(raised.value)
        assert f"MB are free in {tmp_path / 'out'}" in str(raised.value)
        assert "nothing half-written was left" in str(raised.value)
        assert tree(tmp_path) == {}

    def test_a_full_disk_is_recognised_when_the_writer_wraps_the_error(self, tmp_path):
        with pytest.raises(DeepenError, match="MB are free in"), write_atomically(tmp_path / "x.bin") as temporary:
            temporary.write_bytes(b"half")
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
        assert tree(tmp_path) == {}

    def test_a_place_that_cannot_be_written_to(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(DeepenError, match=r"can't write .*file/x\.json: .*Choose another place"):
            write_json(tmp_path / "file" / "x.json", {})
        assert tree(tmp_path) == {"file": "in the way"}

    def test_a_folder_in_the_way(self, tmp_path):
        (tmp_path / "x.json").mkdir()
        with pytest.raises(DeepenError, match=r"can't write .*x\.json: Is a directory"):
            write_json(tmp_path / "x.json", {})
        assert tree(tmp_path) == {}

    def test_an_error_about_another_file_is_not_ours_to_reword(self, tmp_path):
        with pytest.raises(FileNotFoundError), write_atomically(tmp_path / "x.txt"):
            (tmp_path / "elsewhere" / "input.txt").read_text()

    def test_a_link_stays_a_link(self, tmp_path):
        (tmp_path / "real.txt").write_text("old")
        (tmp_path / "link.txt").symlink_to("real.txt")
        with write_atomically(tmp_path / "link.txt") as temporary:
            temporary.write_text("new")
        assert (tmp_path / "link.txt").is_symlink()
        assert (tmp_path / "real.txt").read_text() == "new"

    def test_permissions_are_those_of_any_new_file(self, tmp_path):
        (tmp_path / "plain.txt").write_text("x")
        with write_atomically(tmp_path / "x.txt") as temporary:
            temporary.write_text("x")
        assert (tmp_path / "x.txt").stat().st_mode == (tmp_path / "plain.txt").stat().st_mode

    @pytest.mark.parametrize("moment", ["in the block", "before the rename"])
    def test_a_kill_leaves_the_old_file(self, tmp_path, moment):
        target = tmp_path / "x.txt"
        target.write_text("old")
        program = f"""
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

with files.write_atomically({str(target)!r}) as temporary:
    temporary.write_text("new")
    if {moment == "in the block"}:
        die()
    os.replace = die
"""
        kill_in(program)
        assert target.read_text() == "old"
        assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == ["x.txt"]


class TestWriteFolderAtomically:
    def test_the_folder_appears_whole(self, tmp_path):
        target = tmp_path / "runs" / "step_1"
        with write_folder_atomically(target) as temporary:
            (temporary / "inner").mkdir()
            (temporary / "inner" / "a.txt").write_text("a")
            assert not target.exists()
        assert tree(tmp_path) == {"runs/step_1/inner/a.txt": "a"}

    def test_an_empty_target_is_taken(self, tmp_path):
        (tmp_path / "out").mkdir()
        with write_folder_atomically(tmp_path / "out") as temporary:
            (temporary / "a.txt").write_text("a")
        assert tree(tmp_path) == {"out/a.txt": "a"}

    def test_a_filled_target_is_refused_before_the_work(self, tmp_path):
        write_json(tmp_path / "out" / "old.json", 1)
        with (
            pytest.raises(DeepenError, match=r"out exists and is not empty; choose another folder"),
            write_folder_atomically(tmp_path / "out"),
        ):
            pytest.fail("the block was entered")
        assert tree(tmp_path) == {"out/old.json": "1\n"}

    def test_replace_gives_exactly_the_new_folder(self, tmp_path):
        write_json(tmp_path / "out" / "old.json", 1)
        with write_folder_atomically(tmp_path / "out", replace=True) as temporary:
            (temporary / "new.txt").write_text("new")
            assert tree(tmp_path / "out") == {"old.json": "1\n"}
        assert tree(tmp_path) == {"out/new.txt": "new"}

    def test_a_failing_exchange_puts_the_old_folder_back(self, tmp_path, monkeypatch):
        write_json(tmp_path / "out" / "old.json", 1)
        rename = Path.rename

        def refuse_the_new(self, target):
            if self.suffix == ".tmp":
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse_the_new)
        with (
            pytest.raises(DeepenError, match="Input/output error"),
            write_folder_atomically(tmp_path / "out", replace=True) as temporary,
        ):
            (temporary / "new.txt").write_text("new")
        assert tree(tmp_path) == {"out/old.json": "1\n"}

    def test_a_kill_while_filling_leaves_no_folder_of_that_name(self, tmp_path):
        program = f"""
with files.write_folder_atomically({str(tmp_path / "out")!r}) as temporary:
    (temporary / "a.txt").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
        kill_in(program)
        assert all(path.name.startswith(".out.") for path in tmp_path.iterdir())

    def test_a_kill_in_the_middle_of_an_exchange_leaves_the_old_folder_whole_beside(self, tmp_path):
        write_json(tmp_path / "out" / "old.json", 1)
        program = f"""
with files.write_folder_atomically({str(tmp_path / "out")!r}, replace=True) as temporary:
    rename = Path.rename
    Path.rename = lambda self, to: os.kill(os.getpid(), signal.SIGKILL) if self == temporary else rename(self, to)
"""
        kill_in(program)
        [old] = tmp_path.glob(".out.*.old")
        assert tree(old) == {"old.json": "1\n"}

    def test_a_full_disk_leaves_neither_folder_nor_parts(self, tmp_path):
        with (
            pytest.raises(DeepenError, match="No space left on device"),
            write_folder_atomically(tmp_path / "out") as temporary,
        ):
            (temporary / "a.txt").write_text("a")
            fail_with(errno.ENOSPC)()
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_at_an_inner_atomic_write(self, tmp_path, monkeypatch):
        monkeypatch.setattr(files.os, "fsync", fail_with(errno.ENOSPC))
        with (
            pytest.raises(DeepenError, match=r"can't write .*out: No space left on device"),
            write_folder_atomically(tmp_path / "out") as temporary,
        ):
            write_json(temporary / "x.json", {})
        assert list(tmp_path.iterdir()) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


class TestJson:
    @given(data=json_values)
    def test_what_is_written_is_read(self, data, tmp_path_factory):
        path = tmp_path_factory.mktemp("json") / "x.json"
        write_json(path, data)
        assert read_json(path) == data

    def test_text_stays_legible(self, tmp_path):
        write_json(tmp_path / "x.json", {"é": "日本"})
        assert (tmp_path / "x.json").read_text(encoding="utf-8") == '{\n  "é": "日本"\n}\n'

    def test_an_undecodable_file_name_survives(self, tmp_path):
        name = os.fsdecode(b"caf\xe9")
        write_json(tmp_path / "x.json", name)
        assert read_json(tmp_path / "x.json") == name

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_nan_and_infinity_are_not_written(self, tmp_path, value):
        with pytest.raises(ValueError, match="Out of range float"):
            write_json(tmp_path / "x.json", {"loss": value})
        assert tree(tmp_path) == {}

    def test_a_byte_order_mark_is_no_part_of_the_text(self, tmp_path):
        (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
        assert read_json(tmp_path / "x.json") == {"a": 1}

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b'{"a": 1,\n "b": }', r"x\.json, line 2, column 7: Expecting value"),
            (b"", r"x\.json, line 1, column 1: Expecting value"),
            (b'{"a": "\t"}', r"x\.json, line 1, column 8: Invalid control character$"),
            (b'{"a": 1, "b": 2, "a": 3}', r'x\.json: "a" is given more than once in one object'),
            (b'{"a": NaN}', r"x\.json: NaN is not a JSON number"),
            (b'{"a": -Infinity}', r"x\.json: -Infinity is not a JSON number"),
            (b'{"a": "\xff"}', r"x\.json is not UTF-8 text \(byte 7\)"),
            (b"[" * 200_000, r"x\.json is nested too deeply"),
        ],
    )
    def test_a_damaged_file_is_told_where(self, tmp_path, content, message):
        (tmp_path / "x.json").write_bytes(content)
        with pytest.raises(ConfigError, match=message):
            read_json(tmp_path / "x.json", error=ConfigError)

    def test_no_file(self, tmp_path):
        with pytest.raises(DeepenError, match=r"can't read .*x\.json: No such file or directory"):
            read_json(tmp_path / "x.json")

    def test_many_keys_are_read_in_reasonable_time(self, tmp_path):
        vocabulary = {f"token {index}": index for index in range(200_000)}
        (tmp_path / "x.json").write_text(json.dumps(vocabulary))
        assert read_json(tmp_path / "x.json") == vocabulary
