"""Ways to recur beside models that don't, at equal tokens and at equal FLOPs, from several seeds.

    PYTHONPATH=src python benchmarks/isoflop.py mor-1m --jobs 2

benchmarks/isoflop/NAME.json says the arms (a shape, what each arm changes of it, which of them have a method on it),
corpora, seeds and the budget.
The learning rate of a group of arms is the one that is best, on validation documents, for the arm that the group is
called by, from a seed that is used for nothing else; where the best is the largest or the smallest, further ones are
tried.

An arm is trained from a seed at a constant rate, which is cooled down twice, in branches: where the budget's tokens
are read, and where the FLOPs are spent that the standard arm needs for these tokens. By the ledger of what was really
run, not by expectation. Both are scored on test documents, by what each arm would generate by; arms that were trained
looking ahead have that figure beside it. Everything lies in RUNS/NAME and OUT/NAME, and what is there isn't made again.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev
from threading import Lock
from typing import Any

from commands import checkpoints, deepen, interval_of, step_of

from deepen.backbones.new import new_model, new_tokenizer
from deepen.checkpoint import save_model
from deepen.core.config import Config
from deepen.core.files import read_json, write_json
from deepen.evaluate.results import StageResults

HERE = Path(__file__).parent
BUDGETS = "tokens", "flops"
# A budget in FLOPs that ends within this part of the budget in tokens is the same budget.
_SAME = 0.005
# Of Student's t, 95 %, by degrees of freedom: three seeds of an arm leave two.
T_OF_POOLED = {2: 4.303, 4: 2.776, 6: 2.447, 8: 2.306, 10: 2.228, 12: 2.179}
_tokenizers = Lock()


@dataclass(frozen=True)
class Comparison(Config):
    """One file of benchmarks/isoflop.

    `arms` change fields of `shape`; `tuned` says by which arm's best rate which arms are trained; `run` has the fields
    of a run that all share, `evaluation` those of an evaluation. `decay` is the share of steps in which the rate falls.
    `grafted` are arms with a method on their model: fields of their runs that differ from `run`. `tried` are arms that
    are trained from the first seed alone, on the sweep's corpus, for a hint of what else might be compared.
    """

    tokenizer: str
    shape: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    standard: str
    tuned: dict[str, tuple[str, ...]]
    sweep: dict[str, Any]
    corpora: tuple[str, ...]
    seeds: tuple[int, ...]
    tokens: int
    decay: float
    run: dict[str, Any]
    evaluation: dict[str, int]
    grafted: dict[str, dict[str, Any]] = field(default_factory=dict)
    tried: tuple[str, ...] = ()
    # Steps from one checkpoint to the next; a branch repeats what lies between its beginning and the one before it.
    save_interval: int = 200

    @property
    def tokens_per_step(self) -> int:
        """Rows are full."""
        return int(self.run["batch_size"]) * int(self.run["max_length"])

    @property
    def compared(self) -> list[str]:
        """The arms that are trained from every seed, but for the standard one."""
        return [arm for arm in self.arms if arm != self.standard and arm not in self.tried]

    def run_of(self, arm: str) -> dict[str, Any]:
        """What an arm's runs say of it."""
        return {**self.run, **self.grafted.get(arm, {})}

    def stage_of(self, arm: str) -> str:
        """What an arm's results are to `deepen evaluate`, which scores a method on a model only as such."""
        return "finetuned_recursive" if arm in self.grafted else "baseline"


@dataclass(frozen=True)
class Trained:
    """The end of one run."""

    folder: Path

    @property
    def ledger(self) -> Mapping[str, Any]:
        """What the run has cost, from its first step."""
        content: Mapping[str, Any] = read_json(self.folder / "ledger.json")
        return content

    @property
    def num_steps(self) -> int:
        """Made."""
        return int(self.ledger["steps"])


@dataclass(frozen=True)
class Start:
    """What a run begins from."""

    arm: str
    corpus: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """Of its results, and of the folder of its runs."""
        return f"{self.corpus}/{self.arm}-{self.seed}"


@dataclass(frozen=True)
class Bench:
    """A comparison, and where its runs and results lie."""

    comparison: Comparison
    runs: Path
    out: Path

    # Learning rates

    def best_rates(self, pool: ThreadPoolExecutor) -> dict[str, float]:
        """Of each arm that others are tuned by; what every rate gave is in OUT/rates.json."""
        found: dict[str, dict[float, float]] = {arm: {} for arm in self.comparison.tuned}
        wanted = [(arm, rate) for arm in found for rate in self.comparison.sweep["rates"]]
        while wanted:
            for (arm, rate), nll in zip(wanted, pool.map(lambda each: self._tried(*each), wanted), strict=True):
                found[arm][rate] = nll
            wanted = [(arm, rate) for arm, rates in found.items() for rate in beyond(rates)]
        write_json(
            self.out / "rates.json", {arm: {f"{r:g}": rates[r] for r in sorted(rates)} for arm, rates in found.items()}
        )
        return {arm: min(rates, key=rates.__getitem__) for arm, rates in found.items()}

    def _tried(self, arm: str, rate: float) -> float:
        """Nats a token on validation documents."""
        sweep = self.comparison.sweep
        name = f"sweep/{arm}-{rate:g}"
        kept = self.out / f"{name}.json"
        if not kept.exists():
            steps = sweep["tokens"] // self.comparison.tokens_per_step
            start = Start(arm, sweep["corpus"], sweep["seed"], rate)
            run = self._trained(start, name, num_steps=steps, decay=self._decay_of(steps))
            scores = self._scored(run, name, start, split="validation")
            write_json(kept, {"validation_nll": scores.figures["nll"], "steps": run.num_steps})
        return float(read_json(kept)["validation_nll"])

    # Arms

    def finish(self, start: Start, standard: Future[int] | None) -> int:
        """Train one arm from one seed to both budgets and score it; gives its FLOPs at the budget of tokens.

        The other budget are those of `standard`; None: its own.
        """
        at_tokens, at_flops = (self.out / f"{start.name}-{budget}.json" for budget in BUDGETS)
        if not at_tokens.exists():
            steps = self.comparison.tokens // self.comparison.tokens_per_step
            write_json(at_tokens, self._branch(start, steps))
        spent = read_json(at_tokens)["ledger"]
        if not at_flops.exists():
            flops = spent["training_flops"] if standard is None else standard.result()
            steps = round(spent["steps"] * flops / spent["training_flops"])
            is_same = abs(steps / spent["steps"] - 1) < _SAME
            write_json(at_flops, read_json(at_tokens) if is_same else self._branch(start, steps))
        return int(spent["training_flops"])

    def _branch(self, start: Start, steps: int) -> dict[str, Any]:
        """Go on to where the last part of `steps` begins, cool down, score."""
        decay = self._decay_of(steps)
        trunk = self._trunk(start, steps - decay)
        name = f"{start.name}/cooled-{steps}"
        end = self._trained(start, name, num_steps=steps, decay=decay, branch_from=trunk.folder)
        return record(end, self._scored(end, f"{start.name}-{steps}", start, split="test"))

    def _trunk(self, start: Start, steps: int) -> Trained:
        """At the constant rate, from the last step before that another trunk of this start has left."""
        folder = self.runs / start.name
        others = [each for each in folder.glob("trunk-*") if each.name != f"trunk-{steps}"]
        left = [checkpoint for each in others for checkpoint in checkpoints(each) if step_of(checkpoint) < steps]
        begin = max(left, key=step_of, default=None)
        return self._trained(start, f"{start.name}/trunk-{steps}", num_steps=steps, branch_from=begin, keep=None)

    def _decay_of(self, steps: int) -> int:
        return round(self.comparison.decay * steps)

    def _trained(
        self,
        start: Start,
        name: str,
        *,
        num_steps: int,
        decay: int = 0,
        branch_from: Path | None = None,
        keep: int | None = 1,
    ) -> Trained:
        """The end of a run, made now unless it is there, with so many last checkpoints (None: all)."""
        folder = self.runs / name
        done = folder / f"step_{num_steps}"
        if not done.exists():
            fields = {
                **self.comparison.run_of(start.arm),
                "model": str(self._model(start)),
                "data": start.corpus,
                "seed": start.seed,
                "learning_rate": start.rate,
                "num_steps": num_steps,
                "decay_steps": decay,
                "save_interval": self.comparison.save_interval,
                "keep_checkpoints": keep,
                "branch_from": None if branch_from is None else str(branch_from),
                "output_dir": str(folder),
            }
            file = self.runs / "files" / f"{name.replace('/', '-')}.json"
            write_json(file, fields)
            deepen("train", str(file), log=self._log(name), threads=1)
        return Trained(done)

    def _model(self, start: Start) -> Path:
        """The arm before training, from its seed."""
        folder = self.runs / "models" / f"{start.corpus}-{start.arm}-{start.seed}"
        with _tokenizers:
            if not folder.exists():
                tokenizer = tokenizer_of(self.comparison.tokenizer, start.corpus)
                made = new_model(self.shape_of(start.arm), tokenizer, seed=start.seed)
                save_model(folder, backbone=made.backbone, tokenizer=made.tokenizer)
        return folder

    def shape_of(self, arm: str) -> dict[str, Any]:
        """An arm's configuration."""
        return {**self.comparison.shape, **self.comparison.arms[arm]}

    def _scored(self, run: Trained, name: str, start: Start, *, split: str) -> StageResults:
        folder, stage = self.runs / "scores" / name, self.comparison.stage_of(start.arm)
        results = folder / f"{stage}_results.json"
        if not results.exists():
            flags = [f"--{field.replace('_', '-')}={value}" for field, value in self.comparison.evaluation.items()]
            deepen(
                *("evaluate", str(run.folder), "--stage", stage, "--data", start.corpus, "--split", split),
                *("--max-new-tokens", "0", *flags, "--output-dir", str(folder)),
                log=self._log("scores"),
                threads=1,
            )
        return StageResults.read(results)

    def _log(self, name: str) -> Path:
        return self.runs / "logs" / f"{name.replace('/', '-')}.log"

    # What came of it

    def summary(self, rates: Mapping[str, float]) -> dict[str, Any]:
        """All figures, as plain JSON types."""
        comparison = self.comparison
        return {
            "command": f"PYTHONPATH=src python benchmarks/isoflop.py {self.out.name}",
            "learning_rates": dict(rates),
            "corpora": {
                corpus: {budget: self._table(corpus, budget) for budget in BUDGETS} for corpus in comparison.corpora
            },
        }

    def _table(self, corpus: str, budget: str) -> dict[str, Any]:
        """The arms of one corpus at one budget, as far as they are there, and each beside the standard one."""
        found = {
            arm: {seed: read_json(path) for seed, path in self._paths(corpus, arm, budget).items() if path.exists()}
            for arm in self.comparison.arms
        }
        standard = found[self.comparison.standard]
        differences = {
            arm: {seed: runs[seed]["nll"] - standard[seed]["nll"] for seed in runs if seed in standard}
            for arm, runs in found.items()
            if arm != self.comparison.standard
        }
        arms = {
            arm: {**averages(runs.values()), **against(differences.get(arm, {}))} for arm, runs in found.items() if runs
        }
        spreads = [differences[arm] for arm in self.comparison.compared]
        return {"arms": arms, "smallest_difference": smallest_difference(spreads)}

    def _paths(self, corpus: str, arm: str, budget: str) -> dict[int, Path]:
        return {seed: self.out / corpus / f"{arm}-{seed}-{budget}.json" for seed in self.comparison.seeds}


@cache
def tokenizer_of(name: str, corpus: str) -> Any:
    """Made once."""
    return new_tokenizer(name, corpus=corpus)


def beyond(tried: Mapping[float, float]) -> list[float]:
    """The next rate where the best of those that were tried is the largest or the smallest."""
    best, rates = min(tried, key=tried.__getitem__), sorted(tried)
    return [2 * best] if best == rates[-1] else [best / 2] if best == rates[0] else []


def record(run: Trained, results: StageResults) -> dict[str, Any]:
    """What is kept of a run: figures, nats/tokens of each document, ledger, the last figures of its router."""
    lines = [json.loads(line) for line in (run.folder.parent / "train.jsonl").read_text().splitlines()]
    routers = {name: value for name, value in lines[-1].items() if name.startswith("train/router")}
    return {
        **{name: results.figures[name] for name in ("nll", "bits_per_byte", "token_accuracy", "num_tokens")},
        "looking_ahead": results.looking_ahead,
        "documents": " ".join(f"{each.nll:.3f}/{each.num_tokens}" for each in results.documents),
        "ledger": {name: run.ledger[name] for name in ("parameters_unique", "steps", "tokens", "training_flops")},
        "state_bytes_at_1024": results.ledger["state_bytes_at_1024"],
        "router": routers,
        "environment": results.environment,
    }


def averages(runs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of one arm over its seeds."""
    runs = list(runs)
    means = {name: fmean(run[name] for run in runs) for name in ("nll", "bits_per_byte", "token_accuracy")}
    costs = {name: fmean(run["ledger"][name] for run in runs) for name in runs[0]["ledger"]}
    ahead = [run["looking_ahead"]["nll"] for run in runs if run["looking_ahead"] is not None]
    return {
        "num_seeds": len(runs),
        **means,
        "nll_by_seed": [run["nll"] for run in runs],
        "nll_looking_ahead": fmean(ahead) if ahead else None,
        **costs,
        "flops_per_token": costs["training_flops"] / costs["tokens"],
    }


def against(differences: Mapping[int, float]) -> dict[str, Any]:
    """Nats a token more than the standard arm, from the same seed; 95 % interval by Student's t over three seeds."""
    values = list(differences.values())
    if not values:
        return {}
    return {
        "against_standard": fmean(values),
        "against_standard_by_seed": values,
        "interval_95": interval_of(values),
    }


def smallest_difference(differences: Iterable[Mapping[int, float]]) -> float | None:
    """Half of a 95 % interval whose spread is pooled over all arms: what is less can't be told from nothing.

    None before there are three seeds of each of them.
    """
    groups = [list(each.values()) for each in differences]
    if any(len(group) != 3 for group in groups):
        return None
    variance = fmean(stdev(group) ** 2 for group in groups)
    return T_OF_POOLED[2 * len(groups)] * (variance / 3) ** 0.5


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(each.stem for each in (HERE / "isoflop").glob("*.json")))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each")
    parser.add_argument("--corpora", nargs="+", metavar="NAME", help="train on these alone now; all of them otherwise")
    parser.add_argument("--out", default=str(HERE / "results" / "isoflop"))
    parser.add_argument("--runs", default="runs/isoflop")
    options = parser.parse_args()
    comparison = Comparison.from_file(HERE / "isoflop" / f"{options.name}.json")
    bench = Bench(comparison, Path(options.runs) / options.name, Path(options.out) / options.name)
    with ThreadPoolExecutor(options.jobs) as pool:
        best = bench.best_rates(pool)
        rates = {arm: best[by] for by, arms in comparison.tuned.items() for arm in arms}
        run_all(bench, rates, pool, options.corpora or comparison.corpora)
    summary = bench.summary(rates)
    write_json(bench.out / "summary.json", summary)
    print(json.dumps(summary, indent=2))


def run_all(bench: Bench, rates: Mapping[str, float], pool: ThreadPoolExecutor, corpora: Sequence[str]) -> None:
    """Seed by seed, so that a comparison that isn't finished is one of fewer seeds; of each the standard arms first."""
    comparison = bench.comparison
    first, aside = comparison.seeds[0], comparison.sweep["corpus"]

    def finish(seed: int, corpus: str, arm: str, standard: Future[int] | None) -> int:
        return bench.finish(Start(arm, corpus, seed, rates[arm]), standard)

    waiting: list[Future[int]] = []
    hints: list[Callable[[], int]] = []
    for seed in comparison.seeds:
        standards = {corpus: pool.submit(finish, seed, corpus, comparison.standard, None) for corpus in corpora}
        waiting += standards.values()
        waiting += [
            pool.submit(finish, seed, corpus, arm, standards[corpus])
            for corpus in corpora
            for arm in comparison.compared
        ]
        if seed == first and aside in standards:
            hints = [partial(finish, seed, aside, arm, standards[aside]) for arm in comparison.tried]
    waiting += [pool.submit(hint) for hint in hints]
    for each in waiting:
        each.result()
        write_json(bench.out / "summary.json", bench.summary(rates))


if __name__ == "__main__":
    main()
