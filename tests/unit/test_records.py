"""Records from files, and what becomes of bad ones."""

import json
import os

import pytest

from deepen.core.errors import DeepenError
from deepen.data import records
from deepen.data.records import Record, read_records


def test_a_line_too_long_for_a_record_is_named_without_being_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 2**20)
    file = tmp_path / "a.jsonl"
    with file.open("w") as out:
        out.write('{"text": "good"}\n{"text": "')
        out.write("x" * 2**20)
        out.write('"}\n')
    read = read_records(file)
    assert next(read).fields == {"text": "good"}
    with pytest.raises(DeepenError, match=r"a\.jsonl, line 2 is longer than 1 MiB"):
        next(read)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ('{"text": "a\tb"}', r"line 2, column 12: Invalid control character$"),
        ('{"text": "a', r"line 2, column 10: Unterminated string$"),
        ('{"text" "a"}', r"line 2, column 9: Expecting ':' delimiter$"),
    ],
)
def test_a_line_that_is_no_json_is_told_in_whole_words(tmp_path, line, fault):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(DeepenError, match=fault):
        list(read_records(tmp_path / "a.jsonl"))


def test_the_bound_is_on_what_is_read(tmp_path):
    """100 MB without a line break: refused after 64 MiB."""
    file = tmp_path / "a.jsonl"
    with file.open("wb") as out:
        out.truncate(100 * 10**6)
    with pytest.raises(DeepenError, match="line 1 is longer than 64 MiB"):
        next(read_records(file))


def test_a_line_at_the_bound_is_read(tmp_path, monkeypatch):
    line = json.dumps({"text": "é" * 40}, ensure_ascii=False).encode() + b"\n"
    monkeypatch.setattr(records, "MAX_LINE_BYTES", len(line))
    (tmp_path / "a.jsonl").write_bytes(line * 3)
    assert [record.place[-6:] for record in read_records(tmp_path / "a.jsonl")] == ["line 1", "line 2", "line 3"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_an_empty_file_is_told_about(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning, match=rf"{name} is empty"):
        assert list(read_records(tmp_path / name)) == []


def test_a_byte_that_is_not_utf_8_is_counted_from_the_beginning_of_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(DeepenError, match=r"a\.jsonl is not UTF-8 text \(byte 27\)"):
        list(read_records(tmp_path / "a.jsonl"))


def test_only_a_line_feed_ends_a_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "a\u2028b"}\r\n{"text": "c"}'.encode())
    assert [record.fields["text"] for record in read_records(tmp_path / "a.jsonl")] == ["a\u2028b", "c"]


def test_brackets_without_end_are_an_error_of_the_data(tmp_path):
    (tmp_path / "a.jsonl").write_text("[" * 200_000)
    with pytest.raises(DeepenError, match="line 1"):
        list(read_records(tmp_path / "a.jsonl"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(DeepenError, match=r"can't read .*a\.txt"):
        list(read_records(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"content": "x"}, 'somewhere: expected an object with a string in "text"; its fields are content'),
        ({}, "its fields are none"),
        ({"text": 3}, "it holds int"),
        ({"text": "half \ud83d"}, '"text" holds half of a surrogate pair'),
    ],
)
def test_a_missing_or_wrong_text_is_named(fields, message):
    with pytest.raises(DeepenError) as raised:
        Record(fields, "somewhere").text("text")
    assert message in str(raised.value)
