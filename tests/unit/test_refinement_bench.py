"""Comparisons on a pretrained base: what was published comes of what was kept, by the settings that are there."""

from pathlib import Path

import pytest
import refinement
from refinement import CONTROL, CONTROL_AT_FLOPS, SEEDS, Comparison, Places

from deepen.core.files import read_json
from deepen.evaluate.results import StageResults

HERE = Path(refinement.__file__).parent
NAMES = sorted(each.name for each in (HERE / "refinement").iterdir())
# Of the others not all results lie here.
WHOLE = ["smollm2-refiner"]


def places(name: str) -> Places:
    files, out = HERE / "refinement" / name, HERE / "results" / "refinement" / name
    return Places(Comparison.from_file(files / "comparison.json"), files, out, Path("runs"), 8000, 16)


def kept(place: Places, name: str, stage: str) -> StageResults:
    return StageResults.read(place.results(name, stage))


@pytest.mark.parametrize("name", NAMES)
def test_every_comparison_has_a_run_file_for_each_arm(name):
    assert all((HERE / "refinement" / name / f"{arm}.json").exists() for arm in places(name).comparison.tuned)


@pytest.mark.parametrize("name", WHOLE)
def test_a_summary_comes_of_what_was_kept(name):
    place = places(name)
    comparison = place.comparison
    rates = refinement.best_rates(place, None)
    before = {stage: kept(place, "untrained", stage) for stage in ("baseline", "after_surgery")}
    runs = {arm: [kept(place, f"{arm}-{seed}", place.stage_of(arm)) for seed in SEEDS] for arm in comparison.arms}
    stage = place.stage_of(comparison.recursive)
    others = {
        setting: [kept(place, f"{comparison.recursive}-{seed}-{setting.replace(' ', '-')}", stage) for seed in SEEDS]
        for setting in comparison.others
    }
    assert refinement.summary(place, rates, before, runs, others) == read_json(place.out / "summary.json")


@pytest.mark.parametrize("name", WHOLE)
def test_what_was_published_was_made_by_the_run_files_that_are_there(name):
    place = places(name)
    said = {arm: read_json(place.run_files / f"{arm}.json") for arm in place.comparison.tuned}
    rates = read_json(place.out / "rates.json")
    for arm, run in said.items():
        assert {float(rate) for rate in rates[arm]} == set(place.comparison.rates)
        found = [kept(place, f"{arm}-{seed}", place.stage_of(arm)).training for seed in SEEDS]
        assert [each.figures["steps"] for each in found] == [run["num_steps"]] * len(SEEDS)
    recursive = place.comparison.recursive
    for seed in SEEDS:
        one, other = (
            kept(place, f"{arm}-{seed}", place.stage_of(arm)).training.figures["training_flops"]
            for arm in (recursive, CONTROL_AT_FLOPS)
        )
        assert other == pytest.approx(one, rel=0.1), f"{CONTROL} from seed {seed}"
