"""What recursion is worth where answers need hops: arms beside each other on a generated task, from several seeds.

    PYTHONPATH=src python benchmarks/hops.py map --jobs 2

benchmarks/hops/NAME.json says the task, the trunk's shape, the arms, rates, seeds and the run that all share. An arm's
learning rate is the one of `rates` with the lowest loss on validation examples, from a seed that is used for nothing
else; where there is but one rate, nothing is tried. A comparison may have `lessons`, which models learn before they
become arms, so that arms of one shape begin with the same model, and `stages`, which every arm goes through first.

Trained arms answer test examples of each number of hops, also of more than training has shown; refiners with each
number of outer steps of `T`, but where training took as many as there are hops, with that many alone: what no question
tells, an oracle.

Everything lies in RUNS/NAME and OUT/NAME, and what is there isn't made again; OUT/NAME/summary.json has the figures.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from threading import Lock
from typing import Any

from commands import deepen

from deepen.backbones.new import new_model, new_tokenizer
from deepen.checkpoint import Opened, open_model, save_model
from deepen.core.config import Config
from deepen.core.files import read_json, write_json
from deepen.data.measured import documents_of, measured_batch, measured_rows
from deepen.data.records import Split
from deepen.data.tasks import read_task
from deepen.evaluate.difficulty import by_difficulty
from deepen.evaluate.environment import environment
from deepen.evaluate.scoring import Measured, measure
from deepen.generate.scoring import score_at_once
from deepen.methods.trm.config import TRMConfig

HERE = Path(__file__).parent
SWEEP_SEED = 100
BATCH_SIZE = 256
ORACLE = "hops"
"""The number of outer steps that is the number of hops."""

# Random states and what transformers patches while it makes a model are the process's.
_models = Lock()


@dataclass(frozen=True)
class Comparison(Config):
    """One file of benchmarks/hops.

    `train` is an address; `test` another, in which {hops} stands for each number of hops. `lessons` and `stages` are
    fields of runs, "data" among them, beside what `run` says of all. The arms in `arms` have "shape", what differs from
    `shape`, "refiner", its configuration beside what `refiner` says of all, "settings", more of the task's for all
    addresses but those of lessons, and "run", fields of its runs beside those of all; all may be left out.
    """

    train: str
    test: str
    trained: tuple[int, ...]
    beyond: tuple[int, ...]
    shape: dict[str, Any]
    refiner: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    T: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    run: dict[str, Any]
    lessons: tuple[dict[str, Any], ...] = ()
    stages: tuple[dict[str, Any], ...] = ()

    def runs_of(self, arm: str) -> list[dict[str, Any]]:
        """What an arm's runs say beside what all say, one after the other, the last on what it is all about."""
        fields = self.arms[arm]
        runs = [*self.stages, {"data": self.train}]
        return [{**each, **fields.get("run", {}), "data": each["data"] + fields.get("settings", "")} for each in runs]

    def shape_of(self, arm: str) -> dict[str, Any]:
        """Of the model that an arm begins with."""
        return {**self.shape, **self.arms[arm].get("shape", {})}

    def asked_of(self, arm: str, hops: int) -> str:
        """What an arm is asked."""
        return self.test.format(hops=hops) + self.arms[arm].get("settings", "")

    @property
    def hops(self) -> tuple[int, ...]:
        """All that are asked for."""
        return self.trained + self.beyond

    def steps_of(self, arm: str) -> list[int | str | None]:
        """The numbers of outer steps that an arm answers with, that of its training first; None: it has no refiner."""
        own = self.arms[arm].get("refiner")
        if own is None:
            return [None]
        if own.get("T_sampling") == "task":
            return [ORACLE]
        trained = own.get("T_max", own.get("trm_T", TRMConfig.trm_T))
        return [trained, *(each for each in self.T if each != trained)]

    def model_of(self, arm: str) -> str:
        """The first arm that begins with the same model."""
        return next(each for each in self.arms if self.shape_of(each) == self.shape_of(arm))

    def training_of(self, arm: str) -> dict[str, Any]:
        """What an arm's first run says of its method; nothing where the model brings its own."""
        fields = self.arms[arm]
        if "refiner" in fields:
            return {"method": "trm", "config": {**self.refiner, **fields["refiner"]}}
        return self.training_of_base(arm)

    def training_of_base(self, arm: str) -> dict[str, Any]:
        """The same of the model alone."""
        return {} if "model_type" in self.arms[arm].get("shape", {}) else {"method": "dense", "config": "full"}


@dataclass(frozen=True)
class Bench:
    """A comparison, and where its runs and results lie."""

    comparison: Comparison
    runs: Path
    out: Path

    def rate_of(self, arm: str) -> float:
        """The best of those that were tried."""
        if len(self.comparison.rates) == 1:
            return self.comparison.rates[0]
        found = {rate: self._tried(arm, rate) for rate in self.comparison.rates}
        return min(found, key=found.__getitem__)

    def rates(self) -> dict[str, dict[str, float]]:
        """What every rate of every arm gave: nats a token on validation examples."""
        rates = self.comparison.rates
        return {arm: {f"{r:g}": self._tried(arm, r) for r in rates if len(rates) > 1} for arm in self.comparison.arms}

    def _tried(self, arm: str, rate: float) -> float:
        kept = self.out / "sweep" / f"{named(arm)}-{rate:g}.json"
        if not kept.exists():
            folder = self._trained(arm, SWEEP_SEED, rate, f"sweep/{named(arm)}-{rate:g}")[-1]
            steps = self.comparison.steps_of(arm)[0]
            found = [self._answered(arm, folder, steps, hops, "validation") for hops in self.comparison.trained]
            nats = sum(each.figures["nll"] * each.figures["num_tokens"] for each in found)
            write_json(kept, {"validation_nll": nats / sum(each.figures["num_tokens"] for each in found)})
        return float(read_json(kept)["validation_nll"])

    def finish(self, arm: str, seed: int) -> None:
        """Train an arm from a seed, and let it answer."""
        kept = self.out / f"{named(arm)}-{seed}.json"
        if kept.exists():
            return
        rate = self.rate_of(arm)
        folders = self._trained(arm, seed, rate, f"{named(arm)}-{seed}")
        folder = folders[-1]
        accuracy = {
            str(steps): {str(hops): self._accuracy(arm, folder, steps, hops) for hops in self.comparison.hops}
            for steps in self.comparison.steps_of(arm)
        }
        content = {"learning_rate": rate, "accuracy": accuracy, "ledger": costs_of(folders)}
        if self.comparison.lessons:
            content["lessons"] = {**costs_of(self.lessons(arm, seed)), **self._learned(arm, seed)}
        write_json(kept, {**content, "environment": environment(opened(folder).backbone)})
        print("done:", kept.name, flush=True)

    def _trained(self, arm: str, seed: int, rate: float, name: str) -> list[Path]:
        """The last checkpoint of each run of an arm, made now unless it is there."""
        folders, model = [], self._begun(arm, seed)
        for number, said in enumerate(self.comparison.runs_of(arm), start=1):
            # An adapter or a model of a method's own has its method from the first run on.
            method = self.comparison.training_of(arm) if number == 1 or self._is_base(arm) else {}
            model = self._run({**said, **method, "learning_rate": rate}, model, seed, f"{name}/{number}")
            folders.append(model)
        return folders

    def _is_base(self, arm: str) -> bool:
        return "refiner" not in self.comparison.arms[arm]

    def _begun(self, arm: str, seed: int) -> Path:
        """What an arm begins with: a model that has had its lessons."""
        return [self._new(arm, seed), *self.lessons(arm, seed)][-1]

    def teach(self, seed: int, pool: ThreadPoolExecutor) -> None:
        """Give the models that arms share their lessons, before any arm begins with one."""
        models = {self.comparison.model_of(arm) for arm in self.comparison.arms}
        list(pool.map(partial(self.lessons, seed=seed), sorted(models)))

    def lessons(self, arm: str, seed: int) -> list[Path]:
        """The last checkpoint of each lesson of an arm's model."""
        folders, model, name = [], self._new(arm, seed), f"lessons/{named(self.comparison.model_of(arm))}-{seed}"
        for number, lesson in enumerate(self.comparison.lessons, start=1):
            model = self._run({**lesson, **self.comparison.training_of_base(arm)}, model, seed, f"{name}/{number}")
            folders.append(model)
        return folders

    def _new(self, arm: str, seed: int) -> Path:
        """An arm's model with random weights, made now unless it is there."""
        folder = self.runs / "models" / f"{named(self.comparison.model_of(arm))}-{seed}"
        with _models:
            if not folder.exists():
                made = new_model(self.comparison.shape_of(arm), new_tokenizer(self.comparison.train), seed=seed)
                save_model(folder, backbone=made.backbone, tokenizer=made.tokenizer)
        return folder

    def _run(self, said: Mapping[str, Any], model: Path, seed: int, name: str) -> Path:
        """The last checkpoint of a run, made now unless it is there."""
        folder, plain = self.runs / name, name.replace("/", "-")
        run = {**self.comparison.run, **said, "model": str(model), "seed": seed, "output_dir": str(folder)}
        done = folder / f"step_{run['num_steps']}"
        if not done.exists():
            file = self.runs / "files" / f"{plain}.json"
            write_json(file, run)
            deepen("train", str(file), log=self.runs / "logs" / f"{plain}.log", threads=1)
        return done

    def _learned(self, arm: str, seed: int) -> dict[str, float]:
        """What a model answers right after its lessons, of the last of them."""
        data = self.comparison.lessons[-1]["data"]
        found = self._measured(opened(self._begun(arm, seed)), data, "test")
        (line,) = by_difficulty(found.documents, data) or ()
        return {"accuracy": line.token_accuracy}

    def _accuracy(self, arm: str, folder: Path, steps: int | str | None, hops: int) -> float:
        """The share of test answers of which every token is right."""
        lines = by_difficulty(self._answered(arm, folder, steps, hops, "test").documents, self.comparison.train)
        assert lines is not None and len(lines) == 1, "all that was asked has so many hops"
        return lines[0].all_correct

    def _answered(self, arm: str, folder: Path, steps: int | str | None, hops: int, split: Split) -> Measured:
        overrides = {} if steps is None else {"trm_T": hops if steps == ORACLE else steps}
        return self._measured(opened(folder, overrides), self.comparison.asked_of(arm, hops), split)

    def _measured(self, made: Opened, data: str, split: Split) -> Measured:
        score = made.model.score if made.model is not None else partial(score_at_once, made.backbone)
        rows = list(measured_rows(documents_of(data, split), made.tokenizer, max_length=10**6, max_tokens=10**9))
        batches = [measured_batch(rows[start : start + BATCH_SIZE]) for start in range(0, len(rows), BATCH_SIZE)]
        return measure(score, batches, tokenizer=made.tokenizer, first_scored=1)

    def summary(self) -> dict[str, Any]:
        """All figures that are there, as plain JSON types."""
        comparison = self.comparison
        arms = {arm: self._runs_of(arm) for arm in comparison.arms}
        chance = {hops: read_task(comparison.test.format(hops=hops)).chance(hops) for hops in comparison.hops}
        return {
            "command": f"PYTHONPATH=src python benchmarks/hops.py {self.out.name}",
            "validation_nll_by_rate": self.rates(),
            "chance": {str(hops): each for hops, each in chance.items()},
            "arms": {arm: self._table(arm, runs) for arm, runs in arms.items() if runs},
        }

    def _runs_of(self, arm: str) -> list[Mapping[str, Any]]:
        paths = [self.out / f"{named(arm)}-{seed}.json" for seed in self.comparison.seeds]
        return [read_json(path) for path in paths if path.exists()]

    def _table(self, arm: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Of each number of outer steps the accuracy on trained hops and beyond, seed by seed, and by hops over all."""
        comparison = self.comparison
        by_steps = {}
        for steps in map(str, comparison.steps_of(arm)):
            found = [run["accuracy"][steps] for run in runs]
            by_steps[steps] = {
                "trained": [over(each, comparison.trained) for each in found],
                "beyond": [over(each, comparison.beyond) for each in found],
                "by_hops": {str(hops): fmean(each[str(hops)] for each in found) for hops in comparison.hops},
            }
        costs = {name: fmean(run["ledger"][name] for run in runs) for name in runs[0]["ledger"]}
        return {"learning_rate": runs[0]["learning_rate"], **costs, "outer_steps": by_steps}


def opened(folder: Path, overrides: Mapping[str, Any] | None = None) -> Opened:
    """A trained model, with other settings."""
    with _models:
        return open_model(str(folder), overrides=overrides)


def costs_of(folders: Iterable[Path]) -> dict[str, float]:
    """What runs one after the other have cost."""
    ledgers = [read_json(folder / "ledger.json") for folder in folders]
    costs = {name: sum(each[name] for each in ledgers) for name in ("steps", "tokens", "training_flops")}
    return {"parameters_unique": ledgers[-1]["parameters_unique"], **costs}


def named(arm: str) -> str:
    """An arm in a file's name."""
    return arm.replace(",", "").replace(" ", "-")


def over(accuracy: Mapping[str, float], hops: Iterable[int]) -> float:
    """The mean over numbers of hops."""
    return fmean(accuracy[str(each)] for each in hops)


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(each.stem for each in (HERE / "hops").glob("*.json")))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each")
    parser.add_argument("--out", default=str(HERE / "results" / "hops"))
    parser.add_argument("--runs", default="runs/hops")
    options = parser.parse_args()
    comparison = Comparison.from_file(HERE / "hops" / f"{options.name}.json")
    bench = Bench(comparison, Path(options.runs) / options.name, Path(options.out) / options.name)
    with ThreadPoolExecutor(options.jobs) as pool:
        if len(comparison.rates) > 1:
            bench.teach(SWEEP_SEED, pool)
            list(pool.map(bench.rate_of, comparison.arms))
        for seed in comparison.seeds:
            bench.teach(seed, pool)
            list(pool.map(partial(bench.finish, seed=seed), comparison.arms))
    summary = bench.summary()
    write_json(bench.out / "summary.json", summary)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
