"""The report's parts: escaping, scales, points and bars, runs' files, plots without data, a page of hostile names."""

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from some_stages import BASE, DOCUMENTS, stage
from strict_page import StrictPage

from deepen.core.errors import DeepenError
from deepen.evaluate.comparison import columns, compare_stages
from deepen.evaluate.depths import DepthsOfStage, MeanOver, TextDepths
from deepen.evaluate.results import AtRecursions, ScoredDocument, StageResults, TrainingOfStage
from deepen.report import drawing
from deepen.report.drawing import Bars, Level, Series, bars, lines
from deepen.report.markup import element, own, together
from deepen.report.page import report, write_report
from deepen.report.run_plots import run_plots
from deepen.report.runs import Run, read_runs
from deepen.report.scale import Linear, Logarithmic, by_range, linear
from deepen.report.stage_plots import recursions_plot, stage_plots
from deepen.report.words import amount, amounts, cell, interval, signed

HOSTILE = (
    "</title></style><script>alert(1)</script><img src=x onerror='alert(1)'>\"&amp;\x00\ud800 --> {x} url(http://x)"
)
LABELS = {"title": "A plot", "x_label": "steps", "y_label": "nats"}
finite = st.floats(-1e9, 1e9)


class TestMarkup:
    def test_texts_are_escaped_and_markup_is_not(self):
        inner = element("b", "<i>")
        assert element("p", "a & b", inner, None, 3, title='"x"') == (
            '<p title="&quot;x&quot;">a &amp; b<b>&lt;i&gt;</b>3</p>'
        )
        assert together(["<", inner]) == "&lt;<b>&lt;i&gt;</b>"
        assert own("<hr>") == "<hr>"

    def test_attributes_are_written_as_html_has_them(self):
        assert element("meta", charset="utf-8", http_equiv=None) == '<meta charset="utf-8">'
        assert element("g", class_="a", stroke_width=1.5, viewBox="0 0 1 1") == (
            '<g class="a" stroke-width="1.5" viewBox="0 0 1 1"></g>'
        )

    @given(st.text())
    def test_any_text_comes_back_as_it_was(self, text):
        page = element("p", text, title=text)
        found = StrictPage.read(f"<!DOCTYPE html>\n{page}")
        (paragraph,) = found.all("p")
        assert {name for name, _ in found.elements} == {"p"}
        clean = re.sub("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]", "\ufffd", text)
        assert paragraph["title"] == clean and found.text == clean.strip()

    def test_what_joins_markup_is_text_again(self):
        assert element("p", element("b", "x") + "<i>") == "<p>&lt;b&gt;x&lt;/b&gt;&lt;i&gt;</p>"


class TestWords:
    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (None, "none"),
            (True, "yes"),
            (1234567, "1,234,567"),
            (0.123456789, "0.123457"),
            (650633652.5, "650.634 M"),
            (576717.25, "576717"),
            (999999.9, "1 M"),
            (2e20, "200000 P"),
            ({"1": 4, "2": 1}, "1: 4, 2: 1"),
            ([0.257142857, 1.0], "0.257 1"),
            ({}, "none"),
            ((), "none"),
            ("x", "x"),
        ],
    )
    def test_a_cell(self, value, text):
        assert cell(value) == text

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (None, ""),
            (0.0, "0"),
            (0.012345678, "+0.0123"),
            (12345.0, "+12.3 K"),
            (-999.9, "-1 K"),
            (-2.5e9, "-2.5 G"),
            (1e-9, "+1e-09"),
        ],
    )
    def test_a_difference(self, value, text):
        assert signed(value) == text

    def test_an_interval(self):
        assert interval((-0.5, 0.25)) == "-0.5 to +0.25" and interval(None) == ""
        assert amount(12_000_000) == "12 M" and amount(0.0625) == "0.0625"

    @pytest.mark.parametrize(
        ("values", "texts"),
        [
            ([2.8, 2.9, 3.0], ["2.8", "2.9", "3"]),
            ([2.85605, 2.8561, 2.85615], ["2.85605", "2.8561", "2.85615"]),
            ([0.0, 500.0, 1000.0, 1500.0], ["0", "500", "1 K", "1.5 K"]),
            ([12_340.0, 12_345.0], ["12340", "12345"]),
            ([4e12, 6e12, 1e13], ["4 T", "6 T", "10 T"]),
            ([1 / 3], ["0.333"]),
            ([], []),
        ],
    )
    def test_neighbours_on_an_axis_are_told_apart(self, values, texts):
        assert amounts(values) == texts


class TestScales:
    @given(st.lists(finite, min_size=1))
    def test_every_value_has_a_place_between_the_ends(self, values):
        scale = linear(values, start=10, end=110)
        assert all(10 - 1e-6 <= scale.place(value) <= 110 + 1e-6 for value in values)

    def test_there_is_a_margin_but_at_zero(self):
        assert linear([0, 10], start=0, end=1).place(0) == 0 < 1 - linear([0, 10], start=0, end=1).place(10)
        assert linear([-10, 0], start=0, end=1).place(0) == 1

    @given(st.lists(st.floats(1e-6, 1e18), min_size=1))
    def test_so_it_is_where_they_lie_decades_apart(self, values):
        scale = by_range(values, start=10, end=110)
        assert isinstance(scale, Logarithmic) is (math.log10(max(values) / min(values)) >= 1.5)
        assert all(10 - 1e-6 <= scale.place(value) <= 110 + 1e-6 for value in values)
        assert 1 <= len(scale.ticks()) <= 11

    @given(st.lists(finite, min_size=2, unique=True))
    def test_ticks_are_round_and_few_and_on_the_axis(self, values):
        scale = linear(values, start=0, end=1)
        ticks = scale.ticks()
        assert 2 <= len(ticks) <= 8
        assert all(scale.low - 1e-6 <= tick <= scale.high + 1e-6 for tick in ticks) or max(map(abs, values)) > 1e6
        steps = [after - before for before, after in pairwise(ticks)]
        assert max(steps) == pytest.approx(min(steps), rel=1e-3)

    def test_up_is_more_and_equal_ratios_are_equally_far(self):
        up = Linear(0, 10, 270, 12)
        assert up.place(0) == 270 and up.place(10) == 12 and up.place(5) == 141
        far = Logarithmic(1, 100, 0, 200)
        assert far.place(10) == pytest.approx(100) and far.ticks() == [1, 2, 5, 10, 20, 50, 100]

    def test_nothing_above_zero_is_left_out(self):
        assert isinstance(by_range([0, 1e9], start=0, end=1), Linear)


def drawn(picture: str) -> StrictPage:
    return StrictPage.read(f"<!DOCTYPE html>\n{element('div', drawing.hatches(), own(picture))}")


def path_of(picture: str) -> str:
    (line,) = drawn(picture).all("path", class_="line")
    return line["d"]


def ends_of(path: str) -> tuple[float, ...]:
    """How far down the page a path's points are that are told absolutely."""
    return tuple(float(pair.split()[1]) for pair in re.findall(r"[ML]([-\d.]+ [-\d.]+)", path))


class TestDrawing:
    SERIES = Series("one", 0, ((1, 2.0), (2, 1.0), (3, 0.5)))

    def test_a_line_goes_through_its_points(self):
        picture = lines([self.SERIES], **LABELS)
        places = [tuple(map(float, pair.split())) for pair in path_of(picture)[1:].split("L")]
        assert len(places) == len(drawn(picture).all("path", class_="point")) == 3
        assert [x for x, _ in places] == sorted(x for x, _ in places)
        assert [y for _, y in places] == sorted(y for _, y in places)  # down the page is less
        assert all(78 <= x <= 526 and 12 <= y <= 250 for x, y in places)

    def test_what_is_missing_interrupts_it(self):
        gap = Series("one", 0, ((1, 2.0), (2, 1.0), (3, None), (4, 0.5), (5, 0.25)))
        assert path_of(lines([gap], **LABELS)).count("M") == 2
        assert len(drawn(lines([gap], **LABELS)).all("path", class_="point")) == 4

    def test_points_of_long_lines_are_not_drawn_but_where_no_line_leads(self):
        many = tuple((float(x), float(x % 7)) for x in range(200))
        assert not drawn(lines([Series("one", 0, many)], **LABELS)).all("path", class_="point")
        alone = (*many, (200.0, None), (201.0, 3.0), (202.0, None))
        assert len(drawn(lines([Series("one", 0, alone)], **LABELS)).all("path", class_="point")) == 1

    def test_one_point_alone_is_drawn(self):
        picture = lines([Series("one", 0, ((5, 5.0),), ((4.0, 7.0),))], levels=[Level("two", 1, 9.0)], **LABELS)
        page = drawn(picture)
        assert len(page.all("path", class_="point")) == len(page.all("path", class_="error")) == 1
        assert len(page.all("path", class_="line")) == 2

    def test_it_is_named_and_its_axes_have_labels(self):
        page = drawn(lines([self.SERIES], **LABELS))
        assert page.all("svg", role="img", aria_label="A plot") or page.all("svg", **{"aria-label": "A plot"})
        assert "A plot" in page.text and "steps" in page.text and "nats" in page.text and "one" in page.text

    def test_bars_stand_on_zero_and_are_as_high_as_their_values(self):
        page = drawn(bars([Bars("a", 0, (50.0, 25.0)), Bars("b", 1, (0.0, None))], ["x", "y"], **LABELS))
        found = page.all("rect", class_="bar")
        heights = [float(bar["height"]) for bar in found]
        assert len(found) == 3
        assert heights[0] == pytest.approx(2 * heights[1], abs=0.2) and heights[2] == 0
        assert {float(bar["y"]) + float(bar["height"]) for bar in found} == {250.0}

    def test_many_series_all_look_different(self):
        looks = [(drawing._colour(n), drawing._DASHES[n % len(drawing._DASHES)]) for n in range(42)]
        assert len(set(looks)) == 42


def run(label: str, lines_: list[dict]) -> Run:
    return Run(f"runs/{label}", label, tuple(lines_))


def losses(num: int, *, start: float = 3.0) -> list[dict]:
    return [
        {
            "step": step,
            "train/loss/total": start / step,
            "train/loss/final_ce": start / step - 0.1,
            "train/performance/flops": step * 1_000_000,
            **({"evaluation/validation/loss": start / step + 0.5} if step % 10 == 0 else {}),
        }
        for step in range(1, num + 1)
    ]


class TestRuns:
    def write(self, folder: Path, text: str) -> str:
        folder.mkdir(parents=True)
        (folder / "train.jsonl").write_text(text)
        return str(folder)

    def test_lines_are_read_and_half_a_line_is_not(self, tmp_path):
        text = '{"step": 1, "a": 2.5}\n{"step": 2, "a": null, "b": 1}\n{"step": 3, "a": NaN}\n{"step": 4, "a'
        (found,) = read_runs([self.write(tmp_path / "one", text)])
        assert found.label == "one" and found.tags == ("a", "b")
        assert found.points("step", "a") == ((1.0, 2.5), (2.0, None), (3.0, None))
        assert found.points("b", "a") == ((1.0, None),)

    def test_runs_of_one_name_are_told_apart(self, tmp_path):
        folders = [self.write(tmp_path / part / "run", '{"step": 1}\n') for part in "ab"]
        assert [found.label for found in read_runs(folders)] == folders

    @pytest.mark.parametrize("line", ["{", "[]", '{"a": 1}', '{"step": 1, "a": "x"}', '{"step": "1"}', "\xff"])
    def test_what_is_no_line_is_told(self, tmp_path, line):
        folder = self.write(tmp_path / "one", f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
        with pytest.raises(DeepenError, match=r"train\.jsonl, line 2 is not a JSON object of numbers"):
            read_runs([folder])

    def test_a_folder_without_a_run_is_told(self, tmp_path):
        with pytest.raises(DeepenError, match=r"holds no train\.jsonl; give the folder that `deepen train` wrote to"):
            read_runs([str(tmp_path)])

    def test_a_run_given_twice_is_told(self, tmp_path):
        folder = self.write(tmp_path / "one", '{"step": 1}\n')
        with pytest.raises(DeepenError, match="more than once"):
            read_runs([folder, folder])


class TestRunPlots:
    def test_a_plot_a_loss_and_a_line_a_run(self):
        plots = run_plots([run("a", losses(40)), run("b", losses(30, start=4.0))])
        assert [plot.title for plot in plots] == [
            "train/loss/total",
            "train/loss/final_ce",
            "evaluation/validation/loss",
            "Validation loss against training FLOPs",
        ]
        for plot in plots:
            assert len(drawn(plot.picture).all("path", class_="line")) == 2 + 2  # and in the legend
            assert [row[0] for row in plot.numbers.rows] == ["a", "b"]
        assert plots[0].numbers.rows[0] == ("a", "40", "3.0000", "0.0750", "0.0750", "40")
        assert plots[3].numbers.rows[1][5] == "30 M"

    def test_a_loss_that_is_the_total_is_drawn_once(self):
        lines_ = [{"step": 1, "train/loss/total": 2.0, "train/loss/final_ce": 2.0}]
        plots = run_plots([run("a", lines_)])
        assert "train/loss/final_ce" not in [plot.title for plot in plots]
        assert plots[0].caption.endswith("It is train/loss/final_ce alone.")
        other = [{"step": 1, "train/loss/total": 3.0, "train/loss/next": 3.0}]
        both = run_plots([run("a", lines_), run("b", other)])
        assert [plot.title for plot in both if plot.picture is not None] == ["train/loss/total"]
        assert both[0].caption.endswith("It is train/loss/final_ce or train/loss/next alone.")

    def test_long_lines_are_thinned_and_keep_their_end_and_their_gaps(self):
        lines_ = losses(5000)
        lines_[1234]["train/loss/total"] = None
        (plot, *_) = run_plots([run("a", lines_)])
        path = drawn(plot.picture).all("path", class_="line")[0]["d"]
        assert path.count("M") == 2 and 380 <= path.count("L") <= 400
        assert float(path.split("L")[-1].split()[0]) > 500
        assert "one in 13 is drawn" in plot.caption and "Gaps are figures that were not finite." in plot.caption
        assert plot.numbers.rows[0][1] == "4,999"

    def test_what_is_not_there_is_said(self):
        (only,) = run_plots([])
        assert only.picture is None and "--runs DIR" in only.caption
        plots = run_plots([run("a", [{"step": 1}]), run("b", [])])
        assert all(plot.picture is None and plot.caption.startswith("Left out: no run has") for plot in plots)
        validated = [{"step": 1, "evaluation/validation/loss/total": 2.0}]
        assert "evaluation/validation/loss/total" in [plot.title for plot in run_plots([run("a", validated)])]
        one_of_two = run_plots([run("a", losses(20)), run("b", [{"step": 1}])])
        assert "Not in b." in one_of_two[0].caption


ANSWERED = {
    "chunk_lengths": {"1": 445, "2": 21, "16": 5, "47": 1},
    "passes_per_chunk": {"1": 400, "3": 72},
    "acceptance_by_source": {"lookup": 0.25, "mask": 0.125},
    "acceptance_by_place": {"lookup": [0.5, 0.75, 1.0], "mask": [0.5]},
}
PLAIN = {"chunk_lengths": {"1": 7}, "passes_per_chunk": {"1": 7}, "acceptance_by_source": {}, "acceptance_by_place": {}}


def moved(by: float, spread: float) -> tuple[ScoredDocument, ...]:
    """Every document's sum, moved by so many nats a token, more and less in turns."""
    shifts = [by + (spread if number % 2 else -spread) for number in range(len(DOCUMENTS))]
    return tuple(replace(each, nll=each.nll + each.num_tokens * s) for each, s in zip(DOCUMENTS, shifts, strict=True))


def four_stages() -> list[StageResults]:
    cost = TrainingOfStage({"steps": 3, "training_flops": 4 * 10**12}, {"seed": 0})
    more = replace(cost, figures={"steps": 3, "training_flops": 10**13})
    recursive = {"generation": ANSWERED, "documents": moved(-0.5, 0.25), "training": more}
    return [
        stage(generation=PLAIN),
        stage("after_surgery", generation=ANSWERED, method="chunk"),
        stage("finetuned_vanilla", generation=PLAIN, documents=moved(-0.25, 0.0), training=cost),
        stage("finetuned_recursive", **recursive),
    ]


def by_title(stages: list[StageResults]) -> dict:
    given = columns({f"{number}.json": results for number, results in enumerate(stages)})
    return {plot.title: plot for plot in stage_plots(compare_stages(given), given)}


class TestStagePlots:
    def test_quality_has_a_point_for_each_trained_stage_and_a_line_for_each_other(self):
        plot = by_title(four_stages())["Quality against training FLOPs"]
        svg = plot.picture.split("</svg>")[0] + "</svg>"
        page = drawn(svg)
        assert len(page.all("path", class_="point")) == 2 and len(page.all("path", class_="line")) == 2 + 2
        points, bars_ = ([ends_of(each["d"]) for each in page.all("path", class_=name)] for name in ("point", "error"))
        assert [bar[0] == bar[1] for bar in bars_] == [True, False]  # all documents moved alike, or not
        assert bars_[1][1] < points[1][0] < bars_[1][0]
        assert [row[:2] for row in plot.numbers.rows] == [
            ("finetuned_vanilla", "4 T"),
            ("finetuned_recursive", "10 T"),
            ("baseline (not trained)", ""),
            ("after_surgery (not trained)", ""),
        ]

    def test_a_baseline_that_was_trained_before_is_a_line_and_says_so(self):
        stages = four_stages()
        stages[0] = replace(stages[0], training=stages[2].training)
        plot = by_title(stages)["Quality against training FLOPs"]
        assert [row[0] for row in plot.numbers.rows[2:]] == ["baseline (trained before)", "after_surgery (not trained)"]
        left_out = by_title(stages[:2])["Quality against training FLOPs"]
        assert left_out.picture is None and "baselines aside" in left_out.caption

    def test_histograms_are_shares_of_each_stage(self):
        plot = by_title(four_stages())["Passes per chunk"]
        assert plot.numbers.head[1:] == tuple(f"{results.stage}, %" for results in four_stages())
        assert [row[0] for row in plot.numbers.rows] == ["1", "2", "3"]
        assert plot.numbers.rows[0] == ("1", "100", "84.7", "100", "84.7")
        assert plot.numbers.rows[2] == ("3", "0", "15.3", "0", "15.3")

    def test_many_lengths_are_put_together(self):
        plot = by_title(four_stages())["Chunk lengths"]
        ranges = [*"12345678", "9-12", "13-16", "17-24", "25-32", "33-48"]
        assert [row[0] for row in plot.numbers.rows] == ranges
        shares = {row[0]: float(row[2]) for row in plot.numbers.rows}
        assert sum(shares.values()) == pytest.approx(100, abs=0.5)
        assert shares["1"] == pytest.approx(100 * 445 / 472, abs=0.1)
        assert shares["13-16"] > shares["33-48"] > shares["17-24"] == 0
        assert len(drawn(plot.picture.split("</svg>")[0] + "</svg>").all("rect", class_="bar")) == 4 * len(ranges)

    def test_acceptance_by_position_has_a_line_for_each_source_of_each_stage(self):
        plot = by_title(four_stages())["Acceptance by draft position"]
        names = [
            f"{name}, {source}" for name in ("after_surgery", "finetuned_recursive") for source in ("lookup", "mask")
        ]
        assert plot.numbers.head == ("position", *names)
        # A stage's first source looks as that stage does in other plots, its other sources as no stage does.
        assert re.findall(r'<g style="--own: var\(--series-(.)\)', plot.picture.split("</svg>")[0]) == [*"1435"]
        assert plot.numbers.rows[1] == ("2", "75.0%", "", "75.0%", "")
        svg = plot.picture.split("</svg>")[0] + "</svg>"
        assert len(drawn(svg).all("path", class_="point")) == 2 * (3 + 1)

    def test_acceptance_by_source_has_a_bar_where_there_were_drafts(self):
        stages = four_stages()
        stages[3] = replace(stages[3], generation=ANSWERED | {"acceptance_by_source": {"lookup": 0.5}})
        plot = by_title(stages)["Acceptance by draft source"]
        assert plot.numbers.rows == (("lookup", "25", "50"), ("mask", "12.5", ""))

    def test_what_is_not_there_is_said(self):
        plots = by_title([stage(generation=None, answers=()), stage("after_surgery", generation=None, answers=())])
        assert len(plots) == 5
        for plot in plots.values():
            assert plot.picture is None and plot.caption.startswith("Left out: ")


def page_of(stages: list[StageResults], runs: list[Run] | None = None) -> StrictPage:
    given = columns({f"{number}.json": results for number, results in enumerate(stages)})
    return StrictPage.read(report(compare_stages(given), given, runs=runs or []))


PIECES = ("The", " lamp", ".\n", "", "<s>")
DEPTHS = DepthsOfStage(
    num_tokens=10,
    mean=1.7,
    histogram=(5, 3, 2),
    kept=(1.0, 0.5, 0.2),
    dead=0.5,
    by_class={"word start": MeanOver(10, 1.625), "number": MeanOver(0, None)},
    nll_by_depth=(MeanOver(4, 2.25), MeanOver(0, None), MeanOver(2, 3.5)),
    texts=(TextDepths("d" * 16, PIECES, (1, 3, 2, 1, 1)), TextDepths("e" * 16, PIECES, (1, 1, 1, 1, 2))),
)


def swept(*numbers: int, trained: int = 2) -> tuple[AtRecursions, ...]:
    return tuple(AtRecursions(each, each == trained, each / 2, 10 * each, {"nll": 4.0 - each / 8}) for each in numbers)


def with_depths(**fields) -> list[StageResults]:
    return [stage(), stage("finetuned_recursive", **{"depths": DEPTHS} | fields)]


class TestDepths:
    def test_each_token_is_shaded_by_its_depth_and_says_it(self):
        page = page_of(with_depths())
        tokens = [each for each in page.all("span", class_="token") if "title" in each]
        one, two, three = (f"{depth} recursion{'s' * (depth > 1)}" for depth in (1, 2, 3))
        order = [one, two, three, *(one, three, two, one, one), *(one, one, one, one, two)]  # the legend's come first
        assert [each["title"] for each in tokens] == order
        styles = {each["title"]: each["style"] for each in tokens}
        assert styles == {
            one: "--shade: 0%; --line: 0.0px",
            two: "--shade: 28%; --line: 2.0px",
            three: "--shade: 55%; --line: 4.0px",
        }

    def test_who_sees_no_shades_is_told_in_words(self):
        page = page_of(with_depths())
        maps = page.all("p", role="img", class_="tokens")
        said = f"finetuned_recursive, beginning of document {'d' * 16}. 1 recursion: 3 of 5 tokens"
        assert len(maps) == 2 and maps[0]["aria-label"].startswith(said)
        assert maps[0]["aria-label"].endswith("3 recursions: 1 of 5 tokens; the table below has each token")
        assert "0\nThe\n1\n1\nlamp\n3\n2\n.↵\n2\n3\n…\n1\n4\n<s>\n1" in page.text

    def test_means_stand_in_a_table_and_none_where_there_is_no_token(self):
        text = page_of(with_depths()).text
        assert "mean depth, word start\n-\n1.625" in text and "mean depth, number\n-\nnone" in text
        assert "kept\n-\n1 0.5 0.2" in text and "dead\n-\n0.5" in text
        assert "nll after 1\n-\n2.25" in text and "nll after 2\n-\nnone" in text

    def test_hostile_pieces_are_texts(self):
        text = TextDepths(HOSTILE, (HOSTILE, "\ud800"), (1, 2))
        page = page_of(with_depths(depths=replace(DEPTHS, texts=(text,))))
        assert "<script>alert(1)</script>" in page.text
        assert not {name for name, _ in page.elements} & {"script", "img"}

    def test_one_depth_alone_is_not_shaded(self):
        text = TextDepths("d", ("a",), (1,))
        flat = replace(DEPTHS, histogram=(1,), kept=(1.0,), nll_by_depth=(MeanOver(0, None),), texts=(text,))
        assert {each["style"] for each in page_of(with_depths(depths=flat)).all("span", class_="token")} == {
            "--shade: 0%; --line: 0.0px"
        }

    def test_without_them_there_is_no_such_part(self):
        page = page_of(four_stages())
        assert page.ids.isdisjoint({"depths", "at_recursions", "looking_ahead"})
        assert not page.all("span", class_="token")

    def test_other_numbers_of_recursions_are_drawn_in_their_order(self):
        page = page_of(with_depths(at_recursions=swept(4, 1, 2)))
        assert "as trained\n-\n2\nnll with 4\n-\n3.5\nnll with 1\n-\n3.875" in page.text
        assert "finetuned_recursive, 2 (as trained)" in page.text
        assert page.all("svg", role="img", **{"aria-label": "Quality against recursions"})
        given = columns({f"{n}.json": each for n, each in enumerate(with_depths(at_recursions=swept(4, 1, 2)))})
        path = path_of(recursions_plot(given).picture.split("</svg>")[0] + "</svg>")
        places = [tuple(map(float, pair.split())) for pair in path[1:].split("L")]
        assert places == sorted(places) and len(places) == 3  # more recursions are to the right, and here better

    def test_what_looks_ahead_is_said_to(self):
        page = page_of(with_depths(looking_ahead={"nll": 1.25, "perplexity": 3.49}))
        part = page.text.split("Looking ahead, not causal")[2]  # behind the link and the heading
        assert part.startswith("\nNot causal: ") and "nll\n-\n1.25" in part


class TestPage:
    def test_everything_that_was_compared_is_on_it(self):
        page = page_of(four_stages(), [run("a", losses(30))])
        for name in ("Equality", "Metrics", "Ledger", "Cost of training", "Settings that differ", "Training runs"):
            assert name in page.text
        assert "after_surgery is equal to baseline" in page.text
        assert len(page.all("svg", role="img")) == 5 + 4
        assert "Left out" not in page.text

    def test_differences_and_their_intervals_stand_below_the_values(self):
        assert "-0.25 (-0.25 to -0.25)" in page_of(four_stages()).text

    def test_a_graft_that_is_not_its_base_is_said_to_be_none(self):
        stages = four_stages()[:2]
        other = tuple(replace(document, nll=document.nll + 1) for document in stages[1].documents)
        page = page_of([stages[0], replace(stages[1], documents=other)])
        assert "after_surgery is NOT equal to baseline" in page.text and page.all("div", class_="verdict fails") == [
            {"class": "verdict fails"}
        ]

    def test_what_could_not_be_judged_is_said(self):
        stages = four_stages()[:2]
        page = page_of([stages[0], replace(stages[1], answers=())])
        assert "after_surgery was NOT JUDGED against baseline" in page.text
        assert "evaluate both with max_new_tokens above 0" in page.text
        assert not page.all("div", class_="verdict fails")

    def test_a_machines_speed_is_said_to_be_one(self):
        assert "tokens_per_second: the machine's speed in one run" in page_of(four_stages()[:2]).text

    def test_without_a_graft_nothing_is_judged(self):
        stages = four_stages()
        assert "Nothing was judged" in page_of([stages[0], stages[2]]).text

    def test_tables_have_captions_and_scopes(self):
        page = page_of(four_stages())
        assert len(page.all("table")) == len(page.all("caption"))
        assert all("scope" in found for found in page.all("th"))

    def test_it_may_fetch_and_run_nothing(self):
        (policy,) = page_of(four_stages()).all("meta", **{"http-equiv": "Content-Security-Policy"})
        assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"

    def test_hostile_names_are_texts(self, tmp_path):
        config = {"model": HOSTILE, HOSTILE: 1, "max_new_tokens": 4}
        generation = ANSWERED | {
            "acceptance_by_source": {HOSTILE: 0.5},
            "acceptance_by_place": {HOSTILE: [0.5]},
            "drafted": {HOSTILE: 1},
        }
        hostile = {
            "base": replace(BASE, address=HOSTILE),
            "config": config,
            "environment": {"device": HOSTILE, "dtype": "float32"},
            "generation": generation,
            "ledger": {HOSTILE: 1},
            "training": TrainingOfStage({"training_flops": 5, HOSTILE: 1}, {"data": HOSTILE}),
        }
        stages = [stage(**hostile), stage("after_surgery", **hostile | {"method": HOSTILE})]
        given = columns({HOSTILE: stages[0], f"2{HOSTILE}": stages[1], f"3{HOSTILE}": stages[1]})
        runs = [run(HOSTILE, [{"step": 1, f"train/loss/{HOSTILE}": 2.0, "train/loss/total": 1.0}])]
        path = tmp_path / "report.html"
        write_report(path, compare_stages(given), given, runs=runs)
        page = StrictPage.of(path)
        assert "<script>alert(1)</script>" in page.text
        assert not {name for name, _ in page.elements} & {"script", "img"}

    def test_a_place_that_cannot_be_written_is_told(self, tmp_path):
        path = tmp_path / "report.html"
        path.write_text("before")
        given = columns({"1": stage(), "2": stage("after_surgery")})
        with pytest.raises(DeepenError, match="can't write"):
            write_report(path / "x.html", compare_stages(given), given)
        assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]

    def test_a_comparison_that_was_saved_gives_the_same_page(self):
        given = columns({"1": four_stages()[0], "2": four_stages()[1]})
        comparison = compare_stages(given)
        assert report(json.loads(json.dumps(comparison)), given) == report(comparison, given)
