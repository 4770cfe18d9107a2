"""What is written is what is read back: from files of JSON lines, and from TensorBoard's event files."""

import json
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deepen import MetricsTracker
from deepen.core.errors import DeepenError
from deepen.metrics.sinks import JsonLines, TensorBoard


def events(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    return accumulator.Reload()


def scalars(folder, tag):
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


class TestJsonLines:
    def test_lines_are_read_back_in_order(self, tmp_path):
        lines = JsonLines(tmp_path / "run" / "train.jsonl")
        lines.append({"train/loss/total": 2.5, "count": 2**60}, step=1)
        lines.append({"text": "ß\n\u2028", "nothing": None}, step=2)
        assert list(lines) == [
            {"step": 1, "train/loss/total": 2.5, "count": 2**60},
            {"step": 2, "text": "ß\n\u2028", "nothing": None},
        ]

    def test_numbers_that_json_lacks_become_null_at_any_depth(self, tmp_path):
        lines = JsonLines(tmp_path / "train.jsonl")
        lines.append({"a": math.nan, "b": [1.0, -math.inf], "c": {"d": math.inf, "e": 0.5}}, step=1)
        assert lines.path.read_text() == '{"step": 1, "a": null, "b": [1.0, null], "c": {"d": null, "e": 0.5}}\n'

    def test_half_of_a_surrogate_pair_is_kept(self, tmp_path):
        lines = JsonLines(tmp_path / "texts.jsonl")
        lines.append({"text": "\ud800"}, step=1)
        assert list(lines) == [{"step": 1, "text": "\ud800"}]

    def test_a_line_is_there_when_append_returns(self, tmp_path):
        lines = JsonLines(tmp_path / "train.jsonl")
        for step in range(1, 4):
            lines.append({}, step=step)
            assert lines.path.read_text().count("\n") == step

    @given(st.lists(st.integers(0, 20), max_size=8), st.integers(-1, 21), st.integers(0, 40))
    def test_cutting_leaves_whole_lines_up_to_a_step(self, tmp_path_factory, steps, last, num_torn):
        folder = tmp_path_factory.mktemp("run")
        lines = JsonLines(folder / "train.jsonl")
        for step in steps:
            lines.append({"loss": 1 / (1 + step)}, step=step)
        with lines.path.open("ab") as file:  # as a kill leaves it: part of a line
            file.write(b'{"step": 3, "loss": 0.5, "train/text": "\xc3\xa4"}'[: min(num_torn, 44)])
        resumed = JsonLines(lines.path)
        resumed.cut_after(last)
        resumed.append({"loss": 0.0}, step=99)
        kept = [{"step": step, "loss": 1 / (1 + step)} for step in steps if step <= last]
        assert list(resumed) == [*kept, {"step": 99, "loss": 0.0}]
        assert [entry.name for entry in folder.iterdir()] == ["train.jsonl"]

    @pytest.mark.parametrize(
        ("end", "kept"), [(b'{"step": 2, "lo', []), (b'{"step": 2}', [{"step": 2}]), (b"\xc3", []), (b"[1]", [])]
    )
    def test_what_a_kill_left_is_mended_before_the_next_line(self, tmp_path, end, kept):
        (tmp_path / "train.jsonl").write_bytes(b'{"step": 1}\n' + end)
        lines = JsonLines(tmp_path / "train.jsonl")
        lines.append({}, step=3)
        assert list(lines) == [{"step": 1}, *kept, {"step": 3}]

    @pytest.mark.parametrize("damage", ["{", "[1]", '{"loss": 1}', '{"step": "1"}', "\x00"])
    def test_a_damaged_line_in_between_is_told_and_left_alone(self, tmp_path, damage):
        path = tmp_path / "train.jsonl"
        path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
        before = path.read_bytes()
        with pytest.raises(DeepenError, match=r"train\.jsonl, line 2 is not a JSON object"):
            JsonLines(path).cut_after(1)
        assert path.read_bytes() == before

    def test_nothing_is_cut_from_no_file(self, tmp_path):
        lines = JsonLines(tmp_path / "train.jsonl")
        lines.cut_after(3)
        assert list(lines) == [] and not lines.path.exists()

    def test_a_place_that_cannot_be_written_to_is_told(self, tmp_path):
        (tmp_path / "run").write_text("a file")
        with pytest.raises(DeepenError, match=r"can't write .*train\.jsonl: "):
            JsonLines(tmp_path / "run" / "train.jsonl").append({}, step=1)


class TestTensorBoard:
    def test_scalars_have_their_tags_steps_and_values(self, tmp_path):
        board = TensorBoard(tmp_path)
        board.scalars({"train/loss/total": 2.5, "train/learning_rate": 0.0, "absent": None}, step=1)
        board.scalars({"train/loss/total": 1.25}, step=10)
        board.close()
        assert scalars(tmp_path, "train/loss/total") == [(1, 2.5), (10, 1.25)]
        assert scalars(tmp_path, "train/learning_rate") == [(1, 0.0)]
        assert sorted(events(tmp_path).Tags()["scalars"]) == ["train/learning_rate", "train/loss/total"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
    def test_a_histogram_counts_every_value(self, tmp_path, dtype):
        values = torch.arange(12, dtype=dtype).reshape(3, 4)
        board = TensorBoard(tmp_path)
        board.histogram("depth", values, step=7)
        board.close()
        (event,) = events(tmp_path).Histograms("depth")
        found = event.histogram_value
        assert event.step == 7
        assert (found.num, found.min, found.max, found.sum) == (12, 0, 11, 66)
        assert sum(found.bucket) == 12
        below = sum(count for limit, count in zip(found.bucket_limit, found.bucket, strict=True) if limit <= 6)
        assert 5 <= below <= 6  # buckets are a tenth of a value wide

    def test_a_histogram_leaves_out_what_no_bucket_holds(self, tmp_path):
        board = TensorBoard(tmp_path)
        board.histogram("gate", torch.tensor([1.0, math.nan, math.inf, -1e30, 2.0]), step=1)
        board.histogram("gate", torch.tensor([math.nan]), step=2)
        board.histogram("gate", torch.zeros(0), step=3)
        board.close()
        (event,) = events(tmp_path).Histograms("gate")
        assert (event.step, event.histogram_value.num, event.histogram_value.max) == (1, 2, 2)

    def test_a_text_is_read_back(self, tmp_path):
        board = TensorBoard(tmp_path)
        board.text("samples/first", "    once upon a time", step=4)
        board.text("samples/first", "half a pair: \ud800", step=5)
        board.close()
        found = events(tmp_path).Tensors("samples/first/text_summary")
        assert [(event.step, list(event.tensor_proto.string_val)) for event in found] == [
            (4, [b"    once upon a time"]),
            (5, [b"half a pair: \\ud800"]),
        ]

    def test_flushed_figures_are_there_while_the_run_goes_on(self, tmp_path):
        board = TensorBoard(tmp_path)
        board.scalars({"loss": 2.0}, step=1)
        board.flush()
        assert scalars(tmp_path, "loss") == [(1, 2.0)]
        board.close()

    def test_a_resumed_run_hides_what_it_does_again(self, tmp_path):
        first = TensorBoard(tmp_path)
        for step in range(1, 6):
            first.scalars({"loss": float(step)}, step=step)
        first.close()
        second = TensorBoard(tmp_path, purge_step=4)
        second.scalars({"loss": 40.0}, step=4)
        second.close()
        assert scalars(tmp_path, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]

    def test_without_tensorboard_the_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(DeepenError, match=r"pip install deepen\[tensorboard\]"):
            TensorBoard(tmp_path)
        with pytest.raises(DeepenError, match=r"pip install deepen\[tensorboard\]"):
            MetricsTracker(tmp_path)
        with MetricsTracker(tmp_path, use_tensorboard=False) as tracker:
            tracker.log({"loss": 1.0}, 1)
        assert list(JsonLines(tmp_path / "train.jsonl")) == [{"step": 1, "loss": 1.0}]


class TestMetricsTracker:
    def test_tags_are_the_known_ones(self, tmp_path):
        with MetricsTracker(tmp_path) as tracker:
            tracker.log_losses({"total": 2.0, "final_ce": torch.tensor(1.5, requires_grad=True)}, 3)
            tracker.log_losses({"total": 2.25}, 3, prefix="evaluation")
            tracker.log_generation_metrics(2.5, 0.75, 12.0, 3)
        expected = {
            "train/loss/total": 2.0,
            "train/loss/final_ce": 1.5,
            "evaluation/loss/total": 2.25,
            "train/generation/avg_refine_steps": 2.5,
            "train/generation/commit_rate": 0.75,
            "train/generation/avg_chunk_length": 12.0,
        }
        assert {tag: scalars(tmp_path, tag) for tag in events(tmp_path).Tags()["scalars"]} == {
            tag: [(3, value)] for tag, value in expected.items()
        }
        lines = list(JsonLines(tmp_path / "train.jsonl"))
        assert {tag: value for line in lines for tag, value in line.items()} == {"step": 3, **expected}

    def test_a_figure_that_there_is_not_is_null_in_the_file_and_not_in_tensorboard(self, tmp_path):
        with MetricsTracker(tmp_path) as tracker:
            tracker.log_generation_metrics(1.0, None, 4.0, 1)
        (line,) = JsonLines(tmp_path / "train.jsonl")
        assert line["train/generation/commit_rate"] is None
        assert "train/generation/commit_rate" not in events(tmp_path).Tags()["scalars"]

    def test_a_figure_that_is_not_finite_is_null_in_files_and_told_as_it_is_in_tensorboard(self, tmp_path):
        with MetricsTracker(tmp_path) as tracker:
            tracker.log({"train/norm": math.inf}, 1)
            tracker.save_checkpoint_metrics(tmp_path)
        assert list(JsonLines(tmp_path / "train.jsonl")) == [{"step": 1, "train/norm": None}]
        assert json.loads((tmp_path / "metrics.json").read_text()) == {"step": 1, "train/norm": None}
        assert scalars(tmp_path, "train/norm") == [(1, math.inf)]

    def test_checkpoint_metrics_are_the_last_of_each_tag(self, tmp_path):
        with MetricsTracker(tmp_path, use_tensorboard=False) as tracker:
            tracker.log({"a": 1.0, "b": 2.0}, 1)
            tracker.log({"a": 3.0, "flops": 2**62}, 2)
            path = tracker.save_checkpoint_metrics(tmp_path / "step_2")
        assert path == tmp_path / "step_2" / "metrics.json"
        assert json.loads(path.read_text()) == {"step": 2, "a": 3.0, "b": 2.0, "flops": 2**62}

    def test_a_resumed_run_leaves_what_an_uninterrupted_one_does(self, tmp_path):
        def log(tracker, steps):
            for step in steps:
                tracker.log({"loss": 1 / step}, step)
                if step == 1:
                    tracker.log({"once": 1.0}, step)
                if step % 2:
                    tracker.log({"odd": step}, step)
                tracker.log_text("note", f"at {step}", step)

        with MetricsTracker(tmp_path / "whole") as tracker:
            log(tracker, range(1, 7))
            tracker.save_checkpoint_metrics(tmp_path / "whole")
        with MetricsTracker(tmp_path / "cut") as tracker:
            log(tracker, range(1, 6))
        with MetricsTracker(tmp_path / "cut", resume_after=3) as tracker:
            log(tracker, range(4, 7))
            tracker.save_checkpoint_metrics(tmp_path / "cut")
        for name in ("train.jsonl", "texts.jsonl", "metrics.json"):
            assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        for tag in ("loss", "odd"):
            assert scalars(tmp_path / "cut", tag) == scalars(tmp_path / "whole", tag)

    def test_a_histogram_is_summed_up_in_the_file(self, tmp_path):
        values = torch.tensor([[4.0, 0.0], [1.0, 3.0], [2.0, math.nan]], requires_grad=True)
        with MetricsTracker(tmp_path) as tracker:
            tracker.log_histogram("depth", values, 5)
            tracker.log_histogram("depth", torch.zeros(0), 6)
        assert list(JsonLines(tmp_path / "train.jsonl")) == [
            {
                "step": 5, "depth/num": 5, "depth/min": 0.0, "depth/q25": 1.0, "depth/median": 2.0, "depth/q75": 3.0,
                "depth/max": 4.0, "depth/num_left_out": 1,
            },
            {"step": 6, "depth/num": 0},
        ]  # fmt: skip
        (event,) = events(tmp_path).Histograms("depth")
        assert (event.step, event.histogram_value.num, event.histogram_value.sum) == (5, 5, 10)

    def test_a_text_is_kept_without_tensorboard(self, tmp_path):
        with MetricsTracker(tmp_path, use_tensorboard=False) as tracker:
            tracker.log_text("note", "fine", 2)
        assert list(JsonLines(tmp_path / "texts.jsonl")) == [{"step": 2, "note": "fine"}]

    def test_what_is_no_number_names_its_tag(self, tmp_path):
        with (
            MetricsTracker(tmp_path, use_tensorboard=False) as tracker,
            pytest.raises(DeepenError, match=r"train/loss/halt is not one number"),
        ):
            tracker.log_losses({"halt": torch.zeros(2)}, 1)
