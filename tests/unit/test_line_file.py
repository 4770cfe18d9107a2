"""A file that gains whole lines: claimed by what makes it, read up to a line without an end, cut, gone on with."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepen.core.errors import DeepenError
from deepen.core.line_file import LineFile

RECORDS = st.lists(st.dictionaries(st.text(), st.text() | st.integers()), min_size=1, max_size=4)


@pytest.fixture
def file(tmp_path) -> LineFile:
    return LineFile(tmp_path / "new" / "lines.jsonl")


def claimed(file: LineFile, made_by: dict) -> LineFile:
    file.claim(made_by)
    return file


def records(file: LineFile) -> list[dict]:
    return [record for _, record in file.whole_lines(lambda index, record: True)]


@given(data=st.data(), before=RECORDS, after=RECORDS)
def test_a_file_cut_off_anywhere_is_gone_on_with(tmp_path_factory, data, before, after):
    file = claimed(LineFile(tmp_path_factory.mktemp("lines") / "lines.jsonl"), {})
    file.append(before, flush=False)
    content = file.path.read_bytes()
    kept = content[: data.draw(st.integers(0, len(content)))]
    file.path.write_bytes(kept)
    sizes = [size for size, _ in file.whole_lines(lambda index, record: record == before[index])]
    assert len(sizes) == kept.count(b"\n")
    file.cut(sum(sizes))
    file.append(after, flush=False)
    assert records(file) == [*before[: len(sizes)], *after]


@pytest.mark.parametrize("text", ["\ud800", "a\nb\u2028c", "\x00", "日本"])
def test_any_text_is_one_line(file, text):
    claimed(file, {}).append([{"text": text}, {"text": "next"}])
    assert records(file) == [{"text": text}, {"text": "next"}]
    assert file.path.read_bytes().count(b"\n") == 2


class TestClaim:
    def test_by_what_made_it(self, file):
        claimed(file, {"seed": 1, "inner": {"width": 8}}).append([{}])
        file.claim({"seed": 1, "inner": {"width": 8}})
        file.claim({"seed": 2, "inner": {"width": 8}}, not_compared={"seed"})
        assert json.loads(file.note.read_text())["seed"] == 1

    @pytest.mark.parametrize(
        ("now", "words"),
        [
            ({"seed": 2, "inner": {"width": 8}}, "by another beginning: seed is 1 there, and 2 here; choose another"),
            ({"seed": 1, "inner": {"width": 9}}, "by other settings: inner.width is 8 there, and 9 here"),
            ({"seed": 1, "inner": {"depth": 8}}, "by other settings: inner.width is 8 there, and null here"),
            ({"seed": 1, "inner": None}, 'by other settings: inner is {"width": 8} there, and null here'),
        ],
    )
    def test_by_something_else_is_refused_by_name(self, file, now, words):
        claimed(file, {"seed": 1, "inner": {"width": 8}}).append([{}])
        with pytest.raises(DeepenError) as refusal:
            file.claim(now, kinds={"seed": "another beginning"})
        assert words in str(refusal.value) and str(file.path) in str(refusal.value)

    @pytest.mark.parametrize("content", [None, b""], ids=["no file", "empty"])
    def test_of_what_holds_nothing(self, file, content):
        claimed(file, {"seed": 1})
        if content is not None:
            file.path.write_bytes(content)
        assert json.loads(claimed(file, {"seed": 2}).note.read_text()) == {"seed": 2}

    def test_of_somebody_elses(self, file):
        claimed(file, {}).append([{}])
        file.note.unlink()
        with pytest.raises(DeepenError, match=r"exists, and no lines\.jsonl\.json beside it says what made it"):
            file.claim({})

    def test_with_a_note_that_is_none(self, file):
        claimed(file, {}).append([{}])
        file.note.write_text("[]")
        with pytest.raises(DeepenError, match=r"doesn't say what made lines\.jsonl"):
            file.claim({})


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b"\xff\n", b"\n", b'{"no": "answer"}\n'])
def test_a_line_that_is_none_of_ours(file, line):
    claimed(file, {}).append([{"id": 0}])
    with file.path.open("ab") as opened:
        opened.write(line)
    with pytest.raises(DeepenError, match="line 2 is no answer"):
        list(file.whole_lines(lambda index, record: record.get("id") == index))


def test_a_place_that_cannot_be_written_or_read(tmp_path):
    (Path(tmp_path) / "folder.jsonl").mkdir()
    file = LineFile(tmp_path / "folder.jsonl")
    with pytest.raises(DeepenError, match=r"can't write .*folder\.jsonl: Is a directory; free some space, or mend"):
        file.append([{}])
    with pytest.raises(DeepenError, match=r"can't read .*folder\.jsonl: Is a directory"):
        records(file)
