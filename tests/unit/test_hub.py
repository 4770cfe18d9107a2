"""Datasets of the hub, through the library that reads them; a folder where one stands is as good as a repository."""

import json
import sys

import pytest

from deepen.core.errors import AddressError
from deepen.data.text import corpus, records


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """`owner/name`, with two files in each split."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)

    def put(split: str, *rows: object) -> None:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    return put


def test_the_rows_of_the_training_split_are_records(repository):
    repository("train", {"text": "one", "id": 1}, {"text": "two", "id": 2})
    repository("test", {"text": "three", "id": 3})
    found = list(records("hub:owner/name"))
    assert [record.fields for record in found] == [{"text": "one", "id": 1}, {"text": "two", "id": 2}]
    assert found[1].place == "hub:owner/name, row 2"
    assert list(corpus("hub:owner/name")) == ["one", "two"]


def test_an_only_split_is_read_whatever_its_name(repository):
    repository("validation", {"text": "one"})
    assert list(corpus("hub:owner/name")) == ["one"]


def test_of_several_others_none_is_chosen(repository):
    repository("validation", {"text": "one"})
    repository("test", {"text": "two"})
    with pytest.raises(AddressError, match="has no split train, and several others: validation, test"):
        records("hub:owner/name")


def test_what_is_not_there_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AddressError, match="can't open hub:no/where"):
        records("hub:no/where")


@pytest.mark.parametrize("address", ["hub:", "hub:name", "hub:/name", "hub:owner/"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(AddressError, match="write it as hub:OWNER/NAME"):
        records(address)


def test_without_the_library_the_way_to_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(AddressError, match=r"pip install 'deepen\[data\]'"):
        records("hub:owner/name")
