"""A run that was cut off goes on as if it had not been, and takes no checkpoint that is torn or another run's."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from safetensors.torch import load_file

import deepen.methods
from deepen.checkpoint import open_model
from deepen.core.checksums import CHECKSUMS, checksums
from deepen.core.errors import CheckpointError, DeepenError
from deepen.train import resume, run
from deepen.train.average import Average
from deepen.train.config import RunConfig
from deepen.train.folder import checkpoints_in
from deepen.train.run import train
from deepen.train.signals import Signals
from deepen.train.step import Steps

DROPPED_IN = Path(__file__).parents[1] / "contract" / "dropped_in"

# The full number runs in the slow profile.
NUM_KILLS = 50 if settings.default.max_examples > 100 else 5
# More than are made between all of the kills, so that none comes too late.
NUM_STEPS_KILLED = 20 * NUM_KILLS


@pytest.fixture
def run_config(tmp_path, monkeypatch) -> RunConfig:
    monkeypatch.setattr(deepen.methods, "__path__", [*deepen.methods.__path__, str(DROPPED_IN)])
    lines = [
        json.dumps({"text": f"Document {n} says that {n} is less than {n + 1}, and much else."}) for n in range(29)
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return RunConfig(
        model="tiny:llama", method="toy", data=str(tmp_path / "corpus.jsonl"), output_dir=str(tmp_path / "run"),
        num_steps=8, batch_size=3, max_length=24, log_interval=1, save_interval=2, average_decay=0.9,
        schedule="cosine", warmup_steps=2, keep_checkpoints=None,
    )  # fmt: skip


def silent(line: str) -> None:
    pass


# What a clock or the machine gave is another one in every run.
MEASURED = {f"train/performance/{name}" for name in ("tokens_per_sec", "steps_per_sec", "memory_mb")}


def figures(folder: str | Path) -> list[dict[str, object]]:
    """What a run logged, without what was measured."""
    lines = (Path(folder) / "train.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in MEASURED} for line in lines]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything a checkpoint holds."""
    files = list(folder.rglob("*.safetensors"))
    return {f"{file.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_equal_runs(one: str | Path, other: str | Path, *, num_steps: int) -> None:
    assert figures(one) == figures(other)
    ends = [tensors(Path(folder) / f"step_{num_steps}") for folder in (one, other)]
    assert ends[0].keys() == ends[1].keys() and len(ends[0]) >= 6
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
    ledgers = [json.loads((Path(folder) / f"step_{num_steps}" / "ledger.json").read_text()) for folder in (one, other)]
    assert ledgers[0] == ledgers[1]


class Killed(BaseException):
    """As sudden as a kill, for a test in one process."""


@pytest.fixture
def whole_run(run_config, tmp_path) -> Path:
    config = replace(run_config, output_dir=str(tmp_path / "whole"))
    train(config, show=silent)
    return Path(config.output_dir)


def cut_off(config: RunConfig, *, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run until a step is made, and no further."""
    with monkeypatch.context() as patch:
        original = run._Run._take

        def taken(self, index, shown):
            original(self, index, shown)
            if index + 1 == after:
                raise Killed

        patch.setattr(run._Run, "_take", taken)
        with pytest.raises(Killed):
            train(config, show=silent)


class TestGoingOn:
    @pytest.mark.parametrize("after", [1, 2, 5, 7])
    def test_the_rest_is_bit_for_bit_what_it_would_have_been(self, run_config, whole_run, after, monkeypatch):
        cut_off(run_config, after=after, monkeypatch=monkeypatch)
        torch.manual_seed(after)  # whatever happens in between
        folder = train(run_config, show=silent)
        assert folder == Path(run_config.output_dir) / "step_8"
        assert_equal_runs(run_config.output_dir, whole_run, num_steps=8)

    def test_a_finished_run_stays_as_it_is(self, run_config, whole_run):
        config = replace(run_config, output_dir=str(whole_run))
        before = tensors(whole_run / "step_8")
        lines: list[str] = []
        assert train(config, show=lines.append) == whole_run / "step_8"
        assert lines == [f"the run is finished: {whole_run / 'step_8'}"]
        assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(whole_run / "step_8").items())

    def test_muon_goes_on_too(self, run_config, tmp_path, monkeypatch):
        config = replace(run_config, optimizer="muon", learning_rate=1e-2, average_decay=None)
        other = replace(config, output_dir=str(tmp_path / "other"))
        train(other, show=silent)
        cut_off(config, after=4, monkeypatch=monkeypatch)
        train(config, show=silent)
        assert_equal_runs(config.output_dir, other.output_dir, num_steps=8)

    def test_what_is_saved_are_the_averages(self, run_config, whole_run):
        saved = open_model(str(whole_run / "step_8")).model.saved_state()
        held = tensors(whole_run / "step_8")
        averages = {name.partition("average.model.")[2]: t for name, t in held.items() if "/average." in name}
        current = {name.partition("parameter.model.")[2]: t for name, t in held.items() if "/parameter." in name}
        assert averages.keys() == saved.keys()
        assert all(torch.equal(saved[name], averages[name]) for name in saved)
        assert any(not torch.equal(averages[name], current[name]) for name in saved)

    def test_only_the_newest_are_kept(self, run_config):
        train(replace(run_config, keep_checkpoints=2), show=silent)
        assert [folder.name for folder in checkpoints_in(Path(run_config.output_dir))] == ["step_8", "step_6"]

    def test_leftovers_of_a_kill_are_cleared(self, run_config):
        train(replace(run_config, num_steps=2), show=silent)
        left = Path(run_config.output_dir) / ".step_4.deadbeef.tmp"
        left.mkdir()
        train(replace(run_config, num_steps=2), show=silent)
        assert not left.exists()


@pytest.fixture
def unsaved(run_config) -> RunConfig:
    """A run that saves nothing on its way."""
    return replace(run_config, save_interval=None)


def interrupted(config: RunConfig, patch, *, by: type[BaseException] = KeyboardInterrupt) -> list[str]:
    """What a run says that is interrupted as `patch(context)` has it."""
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as context:
        patch(context)
        with pytest.raises(by):
            train(config, show=lines.append)
    return lines


def before(owner: type, name: str, act, *, call: int):
    """A patch: `act` comes before a method's so manyth call, counted from 1."""

    def patch(context: pytest.MonkeyPatch) -> None:
        original, calls = getattr(owner, name), itertools.count(1)

        def patched(*args, **kwargs):
            if next(calls) == call:
                act()
            return original(*args, **kwargs)

        context.setattr(owner, name, patched)

    return patch


def press() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def _signals_of_a_shell() -> Iterator[None]:
    """What a program is started with at a terminal; one in the background is started with Ctrl-C switched off."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals_of_a_shell")
class TestInterrupts:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_inside_a_step_waits_until_it_is_whole(self, unsaved, whole_run, number):
        """It comes between forward and backward of the fifth step."""
        by = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: SystemExit}[number]
        handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
        lines = interrupted(unsaved, before(Steps, "_move", lambda: signal.raise_signal(number), call=5), by=by)
        assert lines[-1] == "saved: step 5; the same command goes on"
        assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
        lines.clear()
        train(unsaved, show=lines.append)
        assert "going on behind step 5" in lines
        assert_equal_runs(unsaved.output_dir, whole_run, num_steps=8)

    def test_one_between_steps_saves_the_last(self, unsaved, whole_run):
        lines = interrupted(unsaved, before(Signals, "deliver", press, call=3))
        assert lines[-1] == "saved: step 3; the same command goes on"
        train(unsaved, show=silent)
        assert_equal_runs(unsaved.output_dir, whole_run, num_steps=8)

    @pytest.mark.parametrize("owner", [Steps, Average], ids=["before it moves", "behind it"])
    def test_half_a_step_is_never_saved(self, run_config, whole_run, owner):
        """Whatever stops it at once, as a second signal does; the optimizer may have moved already."""
        name = "_move" if owner is Steps else "update"
        lines = interrupted(run_config, before(owner, name, press, call=6))
        assert lines[-1] == f"the same command goes on from {run_config.output_dir}/step_4"
        assert [folder.name for folder in checkpoints_in(Path(run_config.output_dir))] == ["step_4", "step_2"]
        train(run_config, show=silent)
        assert_equal_runs(run_config.output_dir, whole_run, num_steps=8)

    def test_a_second_signal_stops_at_once(self, unsaved):
        def twice() -> None:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

        lines = interrupted(unsaved, before(Steps, "_move", twice, call=2))
        assert lines[-1] == "no checkpoint was made"
        assert not checkpoints_in(Path(unsaved.output_dir))

    def test_a_programs_own_handler_stays(self, unsaved):
        came: list[int] = []
        own = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
        try:
            with pytest.MonkeyPatch.context() as context:
                before(Steps, "_move", lambda: signal.raise_signal(signal.SIGINT), call=2)(context)
                assert train(unsaved, show=silent).name == "step_8"
        finally:
            signal.signal(signal.SIGINT, own)
        assert came == [signal.SIGINT]


class TestBranch:
    def test_there_must_be_steps_left(self, run_config, tmp_path):
        train(run_config, show=silent)
        branch = replace(run_config, branch_from=str(Path(run_config.output_dir) / "step_8"))
        with pytest.raises(CheckpointError, match="is at step 8, and the run ends at 8; give more steps"):
            train(replace(branch, output_dir=str(tmp_path / "branch")), show=silent)

    def test_a_plateau_is_cooled_down_as_a_run_with_that_end_would_have_been(self, run_config, tmp_path):
        """The stable part of a trapezoid doesn't know its end, so a branch equals the whole shorter run."""
        stable = replace(run_config, schedule="trapezoid", decay_steps=0, num_steps=8)
        train(stable, show=silent)
        branch = replace(
            stable, num_steps=6, decay_steps=2, output_dir=str(tmp_path / "branch"),
            branch_from=str(Path(stable.output_dir) / "step_4"),
        )  # fmt: skip
        train(branch, show=silent)
        alone = replace(branch, branch_from=None, output_dir=str(tmp_path / "alone"))
        train(alone, show=silent)
        assert figures(branch.output_dir) == figures(alone.output_dir)[4:]
        ends = [tensors(Path(config.output_dir) / "step_6") for config in (branch, alone)]
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())

    def test_another_runs_plateau_is_refused(self, run_config, tmp_path):
        train(run_config, show=silent)
        branch = replace(run_config, batch_size=4, output_dir=str(tmp_path / "branch"))
        with pytest.raises(CheckpointError, match="is of another run: batch_size was 3 and is 4"):
            train(replace(branch, branch_from=str(Path(run_config.output_dir) / "step_4")), show=silent)

    def test_what_is_no_checkpoint_is_told_as_what_it_is(self, run_config, tmp_path):
        train(replace(run_config, num_steps=2), show=silent)
        model = tmp_path / "model"
        shutil.copytree(Path(run_config.output_dir) / "step_2", model, ignore=lambda *_: {"training", CHECKSUMS})
        branch = replace(run_config, output_dir=str(tmp_path / "branch"))
        for place, message in (
            (tmp_path / "nowhere", r"^there is no checkpoint .*nowhere$"),
            (Path(run_config.output_dir), r"run is the folder of a run; give one of its checkpoints, .*run/step_N"),
            (model, r"model is no checkpoint of a run: it has no training/"),
        ):
            with pytest.raises(CheckpointError, match=message):
                train(replace(branch, branch_from=str(place)), show=silent)


def damage(folder: Path, how: str) -> None:
    (shard,) = (folder / "training").glob("shard-*.safetensors")
    if how == "cut short":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif how == "one bit":
        content = bytearray(shard.read_bytes())
        content[-5] ^= 1
        shard.write_bytes(bytes(content))
    elif how == "lost file":
        shard.unlink()
    elif how == "no checksums":
        (folder / CHECKSUMS).unlink()
    else:
        state = json.loads((folder / "training" / "state.json").read_text())
        state["run"]["seed"] = 99
        (folder / "training" / "state.json").write_text(json.dumps(state))
        sums = json.loads((folder / CHECKSUMS).read_text())
        (folder / CHECKSUMS).write_text(json.dumps({**sums, **checksums(folder)}))


REASONS = {
    "cut short": "is torn: .*shard.* was changed",
    "one bit": "is torn: .*shard.* was changed",
    "lost file": "is torn: it lacks .*shard",
    "no checksums": "is torn: it has no checksums.json",
    "foreign": "is of another run: seed was 99 and is 0",
}


class TestRefusal:
    @pytest.mark.parametrize("how", REASONS)
    def test_the_checkpoint_before_a_bad_one_is_used(self, run_config, whole_run, how, monkeypatch):
        cut_off(run_config, after=7, monkeypatch=monkeypatch)
        damage(Path(run_config.output_dir) / "step_6", how)
        with pytest.warns(UserWarning, match=REASONS[how]):
            train(run_config, show=silent)
        for step in (6, 8):
            assert_equal_runs(run_config.output_dir, whole_run, num_steps=step)
        left = sorted(path.name for path in Path(run_config.output_dir).glob("step_*"))
        assert left == ["step_2", "step_4", "step_6", "step_6.refused", "step_8"]

    def test_a_good_one_is_never_rotated_away_for_bad_ones(self, run_config, whole_run, monkeypatch):
        cut_off(run_config, after=7, monkeypatch=monkeypatch)
        for step in (4, 6):
            damage(Path(run_config.output_dir) / f"step_{step}", "one bit")
        with pytest.warns(UserWarning, match="is torn"):
            train(replace(run_config, keep_checkpoints=1), show=silent)
        assert [folder.name for folder in checkpoints_in(Path(run_config.output_dir))] == ["step_8"]
        assert_equal_runs(run_config.output_dir, whole_run, num_steps=8)

    def test_without_a_good_one_nothing_begins_anew(self, run_config, monkeypatch):
        cut_off(run_config, after=2, monkeypatch=monkeypatch)
        damage(Path(run_config.output_dir) / "step_2", "one bit")
        with pytest.warns(UserWarning, match="is torn"), pytest.raises(CheckpointError, match="choose another"):
            train(run_config, show=silent)
        assert len(figures(run_config.output_dir)) == 2

    def test_other_text_behind_the_same_name_is_refused(self, run_config, monkeypatch):
        cut_off(run_config, after=4, monkeypatch=monkeypatch)
        corpus = Path(run_config.data)
        corpus.write_text(corpus.read_text().replace("less", "more"))
        with (
            pytest.warns(UserWarning, match="digest was .* and is"),
            pytest.raises(CheckpointError, match="digest was"),
        ):
            train(run_config, show=silent)


class TestFullDisk:
    @pytest.mark.parametrize("which", ["shards", "model"])
    def test_nothing_is_lost(self, run_config, whole_run, which, monkeypatch):
        def full(*args, **kwargs):
            raise OSError(28, os.strerror(28))

        with monkeypatch.context() as patch:
            original = run._Run._save

            def spoiled(self, report):
                if report.step == 4:
                    patch.setattr(*(resume, "save_shards") if which == "shards" else (run, "write_adapter"), full)
                return original(self, report)

            patch.setattr(run._Run, "_save", spoiled)
            with pytest.raises(DeepenError, match=r"can't write .*step_4: No space left on device.*MB are free"):
                train(run_config, show=silent)
        assert [folder.name for folder in checkpoints_in(Path(run_config.output_dir))] == ["step_2"]
        assert sorted(path.name for path in Path(run_config.output_dir).iterdir()) == [
            "run.json",
            "step_2",
            "train.jsonl",
        ]
        train(run_config, show=silent)
        assert_equal_runs(run_config.output_dir, whole_run, num_steps=8)


# A process that imports once and then forks: each run is killed from outside, whatever it is doing.
RUNNER = """
import os, sys
import torch
torch.set_num_threads(1)
import deepen.methods
from deepen.train.config import RunConfig
from deepen.train.run import train
from deepen.train.signals import Signals
from deepen.train.step import Steps
import deepen.checkpoint
deepen.methods.__path__.append(sys.argv[2])
config = RunConfig.from_file(sys.argv[1])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        train(config, show=lambda line: None)
        os._exit(0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class TestKills:
    def test_a_run_killed_again_and_again_ends_as_it_would_have(self, run_config, tmp_path):
        config = replace(run_config, num_steps=NUM_STEPS_KILLED, save_interval=1, keep_checkpoints=3)
        calm = replace(config, output_dir=str(tmp_path / "calm"))
        train(calm, show=silent)
        config.save(tmp_path / "run.json")
        draws = random.Random(7)
        with subprocess.Popen(
            [sys.executable, "-c", RUNNER, str(tmp_path / "run.json"), str(DROPPED_IN)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as runner:  # fmt: skip
            num_kills = num_while_writing = 0
            code = -signal.SIGKILL
            while code:
                runner.stdin.write("run\n")
                runner.stdin.flush()
                child = int(runner.stdout.readline())
                if num_kills < NUM_KILLS:
                    saved = Path(config.output_dir)
                    # Some before the first step, most among them; every third while it is writing.
                    time.sleep(draws.uniform(0.05, 0.6))
                    if num_kills % 3 == 0:
                        deadline = time.monotonic() + 5
                        while time.monotonic() < deadline and not list(saved.glob(".step_*.tmp")):
                            time.sleep(0.0005)
                        num_while_writing += bool(list(saved.glob(".step_*.tmp")))
                    with contextlib.suppress(ProcessLookupError):  # it was at its end before
                        os.kill(child, signal.SIGKILL)
                        num_kills += 1
                code = int(runner.stdout.readline())
                assert code in (0, -signal.SIGKILL)
            runner.stdin.close()
        assert num_kills == NUM_KILLS and num_while_writing >= NUM_KILLS // 5
        assert_equal_runs(config.output_dir, calm.output_dir, num_steps=NUM_STEPS_KILLED)
