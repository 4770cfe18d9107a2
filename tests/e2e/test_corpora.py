"""What docs/training.md says of the corpora, against what the packages hold."""

import re
from collections import Counter
from pathlib import Path

import pytest

from deepen.data.records import Record
from deepen.data.split import split_of_record
from deepen.data.text import records

pytestmark = pytest.mark.slow

PAGE = (Path(__file__).parents[2] / "docs/training.md").read_text()
# Numbers with a star are of another Python's sources otherwise, and are held to nothing here.
TABLE = {name: row for name, *row in re.findall(r"^\| `([\w-]+)` \| ([\d,]+) \| ([\d,]+) \|", PAGE, re.M)}
(KEPT,) = re.findall(r"Test holds (\d+), \d+ \* and (\d+) of them, validation (\d+), \d+ \* and (\d+)\.", PAGE)


@pytest.fixture(scope="module", params=["wiki", "books", "chat-prompts", "rewriting-prompts"])
def named(request) -> tuple[str, list[Record]]:
    return request.param, list(records(request.param))


def test_it_holds_as_many_documents_of_that_length(named):
    name, found = named
    texts = [record.text("text" if "text" in record.fields else "prompt") for record in found]
    assert [f"{len(texts):,}", f"{sum(map(len, texts)) / len(texts):,.0f}"] == TABLE[name]


def test_so_many_prompts_are_kept_from_training():
    kept = {name: Counter(map(split_of_record, records(name))) for name in ("chat-prompts", "rewriting-prompts")}
    assert [str(each[split]) for split in ("test", "validation") for each in kept.values()] == list(KEPT)
