"""Comparisons on questions of hops: what they are read from, and that what was published is what they say."""

from pathlib import Path

import hops
import pytest
from hops import Bench, Comparison, named

from deepen.core.files import read_json

HERE = Path(hops.__file__).parent
NAMES = sorted(each.stem for each in (HERE / "hops").glob("*.json"))
PUBLISHED = [name for name in NAMES if (HERE / "results" / "hops" / name).exists()]
WHOLE = [name for name in PUBLISHED if (HERE / "results" / "hops" / name / "summary.json").exists()]


def comparison(name: str) -> Comparison:
    return Comparison.from_file(HERE / "hops" / f"{name}.json")


def steps_of(runs: list[dict], shared: dict) -> int:
    return sum({**shared, **run}["num_steps"] for run in runs)


@pytest.mark.parametrize("name", NAMES)
def test_every_comparison_can_be_read(name):
    read = comparison(name)
    assert all(read.shape_of(arm) and read.runs_of(arm) and read.steps_of(arm) for arm in read.arms)
    assert not set(read.trained) & set(read.beyond)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_was_published_was_made_by_the_settings_that_are_there(name):
    read, out = comparison(name), HERE / "results" / "hops" / name
    expected = {f"{named(arm)}-{seed}.json": arm for arm in read.arms for seed in read.seeds}
    found = {path.name: read_json(path) for path in out.glob("*.json") if path.name != "summary.json"}
    assert found and found.keys() <= expected.keys()
    for file, kept in found.items():
        arm = expected[file]
        assert kept["learning_rate"] in read.rates, file
        assert kept["ledger"]["steps"] == steps_of(read.runs_of(arm), read.run), file
        assert list(kept["accuracy"]) == [str(steps) for steps in read.steps_of(arm)], file
        assert all(set(map(int, each)) == set(read.hops) for each in kept["accuracy"].values()), file
        if read.lessons:
            assert kept["lessons"]["steps"] == steps_of([*read.lessons], read.run), file


@pytest.mark.parametrize("name", WHOLE)
def test_a_summary_comes_of_what_was_kept(name):
    out = HERE / "results" / "hops" / name
    assert Bench(comparison(name), Path("runs"), out).summary() == read_json(out / "summary.json")
