"""Generated tasks against solvers that read nothing but the prompt, and against all there is where it can be listed."""

import hashlib
import re
from collections import Counter
from itertools import islice, permutations, product
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from task_solvers import SOLVERS, filled, phop
from transformers import AutoTokenizer

from deepen.backbones.new import new_tokenizer
from deepen.core.errors import AddressError, ConfigError, DeepenError
from deepen.data.formats import Tokens, document_of
from deepen.data.rows import cut_rows
from deepen.data.split import records_of, split_of_record
from deepen.data.tasks import examples, read_task
from deepen.data.tasks.addition import Addition
from deepen.data.tasks.address import ADDRESSES, TASKS
from deepen.data.tasks.draws import Draws
from deepen.data.tasks.map import IteratedMap
from deepen.data.tasks.maze import Maze
from deepen.data.tasks.phop import PHop
from deepen.data.tasks.pointer import Pointer
from deepen.data.tasks.sudoku import Sudoku
from deepen.data.tasks.sudoku_classes import CLASSES
from deepen.data.tasks.task import split_of_instance
from deepen.data.text import records
from deepen.data.tokens import TokenCorpus
from deepen.data.vocabulary import tokenizer_fingerprint

SPLITS = ("train", "validation", "test")

SMALL = {"task:maze": "task:maze,size=3", "task:phop": "task:phop,length=64"}
"""Sooner made than those of the defaults."""

VARIED = (
    *(address for address in ADDRESSES if address != "task:map"),
    "task:pointer,nodes=8,hops=1-12,seed=3",
    "task:phop,symbols=3,length=24,hops=2-4",
    "task:addition,numbers=2-32,digits=4",
    "task:addition,numbers=2,digits=18",
    "task:sudoku,empty=18-22",
    "task:maze,size=3-7,openings=0",
    "task:maze,size=5,openings=8",
)


def some(address: str, split: str = "train", count: int = 300):
    return list(islice(examples(f"{address},examples={count},held_out={count}", split), count))


class TestAnswers:
    @given(st.sampled_from(VARIED), st.sampled_from(SPLITS), st.integers(0, 10**6))
    def test_the_answer_is_the_only_one(self, address, split, index):
        example = read_task(address).example(split, index)
        name = address.partition(",")[0].removeprefix("task:")
        assert SOLVERS[name](example.prompt[:]) == [example.answer]
        assert set(example.prompt + example.answer) <= set(TASKS[name].vocabulary().words)

    @pytest.mark.parametrize("address", ["task:map", "task:map,nodes=40,hops=1-30,map_seed=5"])
    def test_the_map_is_what_its_single_hops_say(self, address):
        every = [example for split in SPLITS for example in examples(address, split)]
        image = {example.prompt[0]: example.answer[0] for example in every if example.difficulty == 1}
        assert len(image) == read_task(address).nodes
        for example in every:
            node, hops, _ = example.prompt
            for _ in range(int(hops)):
                node = image[node]
            assert example.answer == (node,)

    def test_difficulty_is_within_the_range_that_was_asked_for(self):
        for address, low, high in (
            ("task:pointer,hops=3-5", 3, 5),
            ("task:phop,hops=2-3", 2, 3),
            ("task:map,hops=4", 4, 4),
            ("task:addition,numbers=3-4", 3, 4),
            ("task:sudoku,empty=9-11", 9, 11),
        ):
            assert {example.difficulty for example in some(address, count=40)} == set(range(low, high + 1))

    @pytest.mark.parametrize("address", ["task:pointer", "task:map"])
    def test_a_question_may_leave_the_hops_untold(self, address):
        told, untold = some(address), some(f"{address},hops_told=0")
        assert [(each.answer, each.difficulty, each.instance) for each in untold] == [
            (each.answer, each.difficulty, each.instance) for each in told
        ]
        for one, other in zip(told, untold, strict=True):
            *before, hops, mark = one.prompt
            assert other.prompt == (*before, mark) and hops == str(one.difficulty)

    @given(st.integers(8, 20), st.data())
    def test_many_pointer_questions_stand_behind_one_table(self, nodes, data):
        names, questions = data.draw(st.sampled_from((0, nodes, 31))), data.draw(st.integers(1, nodes))
        told, order = data.draw(st.integers(0, 1)), data.draw(st.sampled_from(("any", "ahead")))
        settings = f"names={names},questions={questions},hops=2-5,hops_told={told},order={order},seed=3"
        address = f"task:pointer,nodes={nodes},{settings}"
        example = read_task(address).example("train", data.draw(st.integers(0, 10**6)))
        lines, asked = example.prompt[:-2], [(example.prompt[-2:], example.answer), *example.further]
        table = dict(zip(lines[1::3], lines[2::3], strict=True))
        assert set(lines[::3]) == {"="} and len(table) == nodes and sorted(table) == sorted(table.values())
        assert set(table) <= {f"n{node}" for node in range(names or nodes)}
        assert len({start for (_, start), _ in asked}) == len(asked) == questions
        for (mark, start), (answer,) in asked:
            assert mark == (str(example.difficulty) if told else "?")
            assert answer == led(table, start, example.difficulty)

    def test_lines_ahead_lead_to_later_ones_but_for_one_of_each_circle(self):
        for example in some("task:pointer,nodes=12,names=30,questions=1,order=ahead", count=40):
            nodes = example.prompt[1:-2:3]
            table = dict(zip(nodes, example.prompt[2:-2:3], strict=True))
            place = {node: number for number, node in enumerate(nodes)}
            back = sum(place[table[node]] <= place[node] for node in nodes)
            circles = {frozenset(led(table, node, hops) for hops in range(12)) for node in nodes}
            assert back == len(circles)

    def test_lines_ahead_of_several_circles_take_turns(self):
        """Else the next line would tell where a line leads."""
        follow = []
        for example in some("task:pointer,nodes=12,questions=1,order=ahead", count=200):
            nodes, ends = example.prompt[1:-2:3], example.prompt[2:-2:3]
            follow += [there == here for there, here in zip(ends, nodes[1:], strict=False)]
        # One circle behind the other, four in five would.
        assert np.mean(follow) < 0.6

    def test_difficulty_is_what_there_is_to_do(self):
        found = {name: some(f"task:{name}", count=20) for name in TASKS}
        for name in ("pointer", "phop", "map"):
            assert all(int(each.prompt[-2]) == each.difficulty for each in found[name])
        assert all(each.prompt.count("+") == each.difficulty - 1 for each in found["addition"])
        assert all(each.prompt.count(".") == each.difficulty == len(each.answer) for each in found["sudoku"])
        assert all(len(each.answer) == each.difficulty for each in found["maze"])

    def test_a_sum_may_begin_with_its_most_significant_digit(self):
        for least, most in zip(
            some("task:addition", count=20), some("task:addition,order=most", count=20), strict=True
        ):
            assert most.answer == least.answer[::-1]
            assert "".join(most.prompt[:-1]).split("+") == [
                number[::-1] for number in "".join(least.prompt[:-1]).split("+")
            ]

    def test_mazes_have_the_openings_that_were_asked_for(self):
        for openings in (0, 3):
            for example in some(f"task:maze,size=4,openings={openings}", count=20):
                # A tree of 16 rooms has 15 passages.
                assert len([word for word in example.prompt if word in (".", "a", "b")]) == 16 + 15 + openings

    @pytest.mark.parametrize("openings", [2, 4])
    def test_a_maze_has_one_shortest_way_even_with_many_openings(self, openings):
        for example in some(f"task:maze,size=4,openings={openings}", count=30):
            assert SOLVERS["maze"](example.prompt) == [example.answer]

    def test_words_of_a_larger_task_are_those_of_a_smaller_one(self):
        small, large = some("task:maze,size=3", count=5), some("task:maze,size=9", count=5)
        assert max(len(each.prompt) for each in small) < min(len(each.prompt) for each in large)
        assert read_task("task:maze,size=3").vocabulary() == read_task("task:maze,size=9").vocabulary()


def led(table: dict[str, str], node: str, hops: int) -> str:
    """Where so many hops lead."""
    return node if hops == 0 else led(table, table[node], hops - 1)


def content(name: str, prompt: tuple[str, ...]) -> str:
    """What must not be in two splits, read off the prompt."""
    if name == "pointer":
        pairs = prompt[:-3]
        return str(sorted(zip(pairs[::2], pairs[1::2], strict=True)))
    if name == "addition":
        return str(sorted("".join(prompt[:-1]).split("+")))
    if name == "maze":
        rows = "".join(prompt[:-1]).replace("a", ".").replace("b", ".").removesuffix("/").split("/")
        grid = np.array([list(row) for row in rows])
        return min(str(np.rot90(image, turns).tolist()) for image in (grid, grid.T) for turns in range(4))
    if name == "sudoku":
        (solution,) = filled(list(prompt[:-1]))
        return canonical("".join(solution))[0]
    return str(prompt[:-2] if name == "phop" else prompt)


_ROWS = [
    [2 * band + (line ^ flipped) for band, flipped in zip(bands, flips, strict=True) for line in (0, 1)]
    for bands in permutations(range(3))
    for flips in product((0, 1), repeat=3)
]
_COLUMNS = [
    [3 * stack + line for stack, lines in zip(stacks, orders, strict=True) for line in lines]
    for stacks in permutations(range(2))
    for orders in product(list(permutations(range(3))), repeat=2)
]
_TURNS = np.array([[6 * row + column for row in rows for column in columns] for rows in _ROWS for columns in _COLUMNS])


def canonical(solution: str) -> tuple[str, int]:
    """The first of all 720 * 3456 copies of a solved Sudoku, and how many different ones there are."""
    copies = np.array([int(digit) - 1 for digit in solution])[_TURNS]
    renamed = np.take_along_axis(np.argsort(copies[:, :6], axis=1), copies, axis=1)  # its first row is 0 .. 5
    first = renamed[np.lexsort(renamed.T[::-1])[0]]
    same = int((renamed == first).all(axis=1).sum())
    return "".join(str(digit + 1) for digit in first), 720 * len(_TURNS) // same


class TestSplits:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (Pointer(nodes=5, hops=(1, 2)), Pointer(nodes=5, hops=(3, 4), seed=9)),
            (PHop(symbols=3, length=6, hops=(1, 1)), PHop(symbols=3, length=6, hops=(2, 2), seed=9)),
            (IteratedMap(nodes=32, hops=(1, 3)), IteratedMap(nodes=32, hops=(1, 5), seed=9)),
            (Addition(numbers=(2, 2), digits=1), Addition(numbers=(2, 2), digits=1, order="most", seed=9)),
            (Sudoku(empty=(6, 6)), Sudoku(empty=(12, 12), seed=9)),
            (Maze(size=(3, 3), openings=0), Maze(size=(3, 3), openings=0, seed=9)),
        ],
        ids=lambda task: task.name,
    )
    def test_nothing_of_one_is_in_another_whatever_the_settings(self, one, other):
        """So few instances that a draw without splits would take the same ones."""
        trained, validated, tested = (
            {content(task.name, task.example(split, index).prompt) for index in range(20)}
            for task, split in ((one, "train"), (other, "validation"), (other, "test"))
        )
        assert trained and validated and tested
        assert not (trained & validated or trained & tested or validated & tested)

    @pytest.mark.parametrize("address", ADDRESSES)
    def test_they_are_those_of_records(self, address):
        short = f"{SMALL.get(address, address)},examples=6,held_out=3"
        every = list(records(short))
        assert len(every) == 6 + 3 + 3
        for split in SPLITS:
            asked_for = list(records_of(short, split))
            assert [record.fields for record in asked_for] == [
                record.fields for record in every if split_of_record(record) == split
            ]
            assert len(asked_for) == (6 if split == "train" else 3)

    def test_a_table_is_in_one_split_however_it_is_asked_about(self):
        """Of eight nodes; other words for them make another table."""
        plain = {
            content("pointer", each.prompt): split for split in SPLITS for each in some("task:pointer,nodes=8", split)
        }
        for split in SPLITS:
            for example in some("task:pointer,nodes=8,names=8,questions=2,order=ahead,seed=5", split):
                lines = example.prompt[:-2]
                assert plain.get(str(sorted(zip(lines[1::3], lines[2::3], strict=True))), split) == split

    def test_held_out_instances_of_a_map_come_once(self):
        tested = [example.prompt for example in examples("task:map,nodes=64", "test")]
        assert len(set(tested)) == len(tested) < 1000
        assert all(int(hops) > 1 for _, hops, _ in tested)

    def test_training_has_all_others_of_a_map(self):
        prompts = {split: {each.prompt for each in examples("task:map,nodes=64", split)} for split in SPLITS}
        assert len(prompts["train"]) + len(prompts["validation"]) + len(prompts["test"]) == 64 * 8


class TestReproducible:
    DIGESTS: ClassVar[dict[str, str]] = {
        "pointer": "9768c6daec373067",
        "phop": "6b45dfac120641a3",
        "map": "c4db044c3261c9ec",
        "addition": "f2b059bdfca156e6",
        "sudoku": "134602bca3232cfc",
        "maze": "1d0742d642632a17",
    }

    @pytest.mark.parametrize("address", ADDRESSES)
    def test_examples_are_the_same_on_every_machine_for_ever(self, address):
        task = read_task(address)
        first = [
            (example.prompt, example.answer) for split in SPLITS for example in islice(examples(address, split), 2)
        ]
        assert hashlib.sha256(repr(first).encode()).hexdigest()[:16] == self.DIGESTS[task.name]

    @given(st.sampled_from(ADDRESSES), st.sampled_from(SPLITS), st.integers(0, 4))
    def test_an_example_needs_none_before_it(self, address, split, index):
        short = f"{SMALL.get(address, address)},examples=5,held_out=5"
        assert next(islice(examples(short, split), index, None)) == read_task(short).example(split, index)

    @pytest.mark.parametrize("address", ADDRESSES)
    def test_the_seed_decides(self, address):
        assert some(address, count=8) != some(f"{address},seed=1", count=8)
        assert len({each.prompt for each in some(address, count=20)}) > 15


class TestDraws:
    @given(st.integers(0, 2**62), st.integers(1, 2**40))
    def test_a_number_is_below_its_bound(self, seed, bound):
        assert 0 <= Draws(seed).below(bound) < bound

    def test_every_order_is_as_likely(self):
        draws = Draws(1)
        found = Counter(tuple(draws.shuffled("abc")) for _ in range(6000))
        assert len(found) == 6 and all(900 < times < 1100 for times in found.values())

    @given(st.integers(0, 2**62), st.integers(1, 30))
    def test_a_circle_goes_through_all(self, seed, size):
        image, node, seen = Draws(seed).circle(size), 0, set()
        for _ in range(size):
            node = image[node]
            seen.add(node)
        assert node == 0 and len(seen) == size

    def test_what_is_left_over_is_drawn_again(self):
        draws = Draws(2)  # of 2**63 numbers a quarter is left over; taken, it would make the lowest third a half
        assert 0.28 < sum(draws.below(3 * 2**61) < 2**61 for _ in range(2000)) / 2000 < 0.39


drawn_as_often_as = pytest.mark.parametrize("count", [150, pytest.param(4000, marks=pytest.mark.slow)])


class TestChance:
    """Computed shares against all there is where that can be listed, and against what is drawn."""

    @pytest.mark.parametrize("hops", range(1, 9))
    def test_of_pointers_by_all_tables(self, hops):
        found = Counter()
        for table in permutations(range(6)):
            node = 0
            for _ in range(hops):
                node = table[node]
            found[node] += 1
        best = max(found.values()) / found.total()
        assert Pointer(nodes=6).chance(hops) == pytest.approx(best, abs=1e-12)

    @pytest.mark.parametrize(("symbols", "length"), [(3, 9), (4, 7)])
    def test_of_hops_by_all_sequences(self, symbols, length):
        words = "abcd"[:symbols]
        for hops in range(1, 5):
            found = Counter()
            for sequence in product(words, repeat=length - 1):
                if sequence[-1] != "a":
                    try:
                        (answer,) = phop((*sequence, "a", str(hops), "="))
                    except ValueError:  # a hop that finds nothing
                        continue
                    found[answer] += 1
            best = max(found.values()) / found.total()
            assert PHop(symbols=symbols, length=length).chance(hops) == pytest.approx(best, abs=1e-12)

    @pytest.mark.parametrize(("count", "digits"), [(2, 1), (3, 1), (2, 2), (4, 1)])
    def test_of_sums_by_all_of_them(self, count, digits):
        width = len(str(count * (10**digits - 1)))
        totals = [sum(numbers) for numbers in product(range(10**digits), repeat=count)]
        places = [Counter(str(total).zfill(width)[place] for total in totals) for place in range(width)]
        best = sum(max(place.values()) for place in places) / (width * len(totals))
        assert Addition(digits=digits).chance(count) == pytest.approx(best, abs=1e-12)

    @drawn_as_often_as
    def test_of_what_is_drawn(self, count):
        """Of each task, the share of its best guess."""
        near = {"abs": 2 / count**0.5}  # four standard deviations of a share of a half
        for hops in (4, 7):
            address = f"task:pointer,nodes=8,hops={hops}"
            share = np.mean([each.answer[0] == each.prompt[-3] for each in some(address, count=count)])
            assert share == pytest.approx(read_task(address).chance(hops), **near)
        for hops in (1, 2, 3):
            address = f"task:phop,symbols=4,length=24,hops={hops}"
            of_last = np.mean([each.answer[0] == each.prompt[-3] for each in some(address, count=count)])
            assert max(of_last, (1 - of_last) / 3) == pytest.approx(read_task(address).chance(hops), **near)
        sums = some("task:addition,numbers=3,digits=2", count=count)
        of_place = [Counter(each.answer[place] for each in sums) for place in range(3)]
        share = np.mean([max(place.values()) / count for place in of_place])
        assert share == pytest.approx(read_task("task:addition,digits=2").chance(3), **near)
        images = Counter(
            IteratedMap(nodes=32, hops=(3, 3), map_seed=seed).example("train", 0).answer[0] for seed in range(count)
        )
        assert max(images.values()) / count == pytest.approx(IteratedMap(nodes=32).chance(3), **near)

    @drawn_as_often_as
    def test_of_digits_and_moves(self, count):
        for address, many in (("task:sudoku,empty=12", count // 10), ("task:maze,size=3", count // 2)):
            words = Counter(word for each in some(address, count=many) for word in each.answer)
            expected = read_task(address).chance(12)
            assert len(words) == round(1 / expected)
            for times in words.values():
                assert times / words.total() == pytest.approx(expected, abs=2 / words.total() ** 0.5)


def filled_in(example) -> list[str]:
    answer = iter(example.answer)
    return [next(answer) if word == "." else word for word in example.prompt[:-1]]


class TestSudokuClasses:
    def test_they_are_as_many_solutions_as_are_known(self):
        assert len(CLASSES) == 49 and sum(CLASSES.values()) == 28_200_960

    @pytest.mark.slow
    def test_they_are_all_there_is(self):
        row = list("123456")
        assert sum(CLASSES.values()) == 720 * sum(1 for _ in filled([*row, *"." * 30]))

    def test_each_is_the_first_of_its_copies_and_has_so_many(self):
        for representative, size in CLASSES.items():
            assert list(filled(list(representative))) == [list(representative)]
            assert canonical(representative) == (representative, size)

    def test_digits_are_exchanged_too(self):
        """Not only lines: these alone would make one grid of each of the four classes."""
        drawn = ["".join(filled_in(each)) for each in some("task:sudoku,empty=1", "test", 12)]
        turned = {min(map(tuple, np.array([int(digit) for digit in solution])[_TURNS])) for solution in drawn}
        assert len(turned) > 8

    def test_a_split_has_classes_of_its_own_each_as_often_as_it_is_large(self):
        of_split = {
            split: [each for each in CLASSES if split_of_instance(f"sudoku {each}") == split] for split in SPLITS
        }
        assert [len(of_split[split]) for split in SPLITS] == [38, 7, 4]
        drawn = Counter(each.instance.removeprefix("sudoku ") for each in some("task:sudoku,empty=1", "test", 200))
        total = sum(CLASSES[each] for each in of_split["test"])
        for each in of_split["test"]:
            assert drawn[each] / 200 == pytest.approx(CLASSES[each] / total, abs=0.14)


class TestAddresses:
    @pytest.mark.parametrize(
        ("address", "said"),
        [
            ("task:pointers", 'unknown task "pointers"; did you mean "pointer"'),
            ("task:", 'unknown task ""; known are: addition, map, maze, phop, pointer, sudoku'),
            ("task:pointer,hop=1-8", 'unknown key "hop"; did you mean "hops"'),
            ("task:pointer,hops=0-8", "hops must be within 1-64, not 0-8"),
            ("task:pointer,hops=8-1", "hops 8-1 is empty; write the lower number first"),
            ("task:pointer,hops=many", "hops is a range of whole numbers, as 1-8, or one of them, not many"),
            ("task:pointer,hops=-1", "hops is a range of whole numbers"),
            ("task:pointer,hops", '"hops" sets nothing; write it as NAME=VALUE'),
            ("task:pointer,", '"" sets nothing'),
            ("task:pointer,hops=1,hops=2", "hops is given more than once"),
            ("task:pointer,nodes=7", "nodes must be within 8-64, not 7"),
            ("task:pointer,nodes=8-16", 'nodes must be an integer, not "8-16"'),
            ("task:pointer,examples=0", "examples must be within 1-10000000, not 0"),
            ("task:pointer,questions=33", "questions must be within 0-32, not 33"),
            ("task:pointer,names=31", "names must be within 32-64, not 31"),
            ("task:pointer,order=behind", "order"),
            ("task:pointer,hops_told=2", "hops_told must be within 0-1, not 2"),
            ("task:pointer,questions=1,marks_learned=2", "marks_learned must be within 0-1, not 2"),
            ("task:pointer,marks_learned=1", "marks_learned 1 is for tables in threes; set questions to 1 or more"),
            ("task:map,hops_told=2", "hops_told must be within 0-1, not 2"),
            ("task:phop,length=32", "length must be at least 64, twice what 8 hops over 4 symbols go back"),
            ("task:phop,symbols=2", "symbols must be within 3-26, not 2"),
            ("task:map,hops=1", "hops must go up to 2 at least"),
            ("task:map,nodes=32,hops=1-32", "to less than the 32 nodes, not to 32"),
            ("task:addition,order=middle", 'order must be least or most, not "middle"'),
            ("task:addition,numbers=1-4", "numbers must be within 2-64, not 1-4"),
            ("task:sudoku,empty=30", "empty must be within 1-22, not 30"),
            ("task:maze,size=2", "size must be within 3-32, not 2"),
            ("task:maze,size=3,openings=5", "openings must be within 0-2, not 5"),
        ],
    )
    def test_wrong_ones_are_refused_at_once(self, address, said):
        for read in (lambda: records(address), lambda: records_of(address, "test"), lambda: examples(address, "train")):
            with pytest.raises((AddressError, ConfigError)) as raised:
                read()
            assert said in str(raised.value)

    def test_settings_are_read(self):
        task = read_task("task:pointer,hops=2-16,nodes=16,examples=5,held_out=3,seed=9")
        assert task == Pointer(hops=(2, 16), nodes=16, examples=5, held_out=3, seed=9)
        assert read_task("task:pointer,hops=4").hops == (4, 4)

    def test_a_mistyped_prefix_is_told(self):
        with pytest.raises(AddressError, match=r'unknown corpus "tasks:pointer"; did you mean "task:pointer"'):
            records("tasks:pointer")

    @pytest.mark.parametrize(
        "address",
        [
            "task:pointer,nodes=8,hops=64",
            "task:phop,symbols=3,length=16,hops=1-2",
            "task:map,nodes=32,hops=2",
            "task:addition,numbers=2,digits=2",
            "task:sudoku,empty=22",
            "task:maze,size=3,openings=2",
            "task:maze,size=3,openings=0",
        ],
    )
    def test_the_least_settings_leave_something_for_each_split(self, address):
        assert all(some(address, split, 4) for split in SPLITS)

    def test_settings_that_leave_nothing_to_draw(self):
        with pytest.raises(ConfigError, match=r"task phop with .* has no test example among 2,000 drawn"):
            PHop(symbols=3, length=3, hops=(60, 60)).example("test", 0)


class TestDocs:
    PAGE = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")

    def test_examples_shown_are_the_first_of_their_address(self):
        shown = re.findall(r"^    (task:\S+)\n    (.+ {4}.+)$", self.PAGE, re.MULTILINE)
        assert {address.split(",")[0] for address, _ in shown} == set(ADDRESSES)
        for address, line in shown:
            first = next(examples(address, "train"))
            asked = [(first.prompt, first.answer), *first.further]
            assert line == "    ".join(" ".join(part) for pair in asked for part in pair)

    def test_settings_shown_are_the_defaults(self):
        for name, settings in re.findall(r"^\| `(\w+)` \| (.+?) \|", self.PAGE, re.MULTILINE):
            address = ",".join([f"task:{name}", *re.findall(r"`(.+?)`", settings)])
            assert read_task(address) == read_task(f"task:{name}")


class TestRecords:
    @pytest.mark.parametrize("address", ADDRESSES)
    def test_they_are_ids_of_the_task_s_tokenizer_and_the_answer_alone_is_learned(self, address, tmp_path):
        short = f"{address},examples=6,held_out=2"
        made = new_tokenizer(address)
        made.save_pretrained(tmp_path)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(made)
        documents = [document_of(record) for record in records_of(short, "train")]
        rows = cut_rows(TokenCorpus.of(documents, tokenizer), max_length=512, cut="document")
        batch = rows.batch(list(range(len(rows))))
        asked = list(examples(short, "train"))
        assert len(rows) == len(asked) == 6
        for row, example in enumerate(asked):
            length = int(batch.lengths[row])
            assert tokenizer.decode(batch.input_ids[row, :length].tolist()) == " ".join(example.prompt + example.answer)
            predicted = batch.input_ids[row, 1:][batch.predicted()[row]]
            assert tokenizer.convert_ids_to_tokens(predicted.tolist()) == list(example.answer)

    def test_they_know_task_and_difficulty(self):
        for record, example in zip(
            records_of("task:phop,examples=9", "train"), examples("task:phop,examples=9", "train"), strict=True
        ):
            assert (record.fields["task"], record.fields["difficulty"]) == ("phop", example.difficulty)
            assert isinstance(document_of(record), Tokens)

    def test_batches_know_the_difficulty(self):
        address = "task:pointer,examples=9"
        corpus = TokenCorpus.of(map(document_of, records_of(address, "train")), new_tokenizer("task:pointer"))
        batch = cut_rows(corpus, max_length=128, cut="document").batch(list(range(9)))
        expected = [example.difficulty for example in examples(address, "train")]
        assert batch.difficulty is not None and batch.difficulty[:, 0].tolist() == expected

    def test_answers_to_further_questions_are_learned_too_and_no_question_is(self):
        address = "task:pointer,examples=5,questions=4"
        tokenizer = new_tokenizer("task:pointer")
        corpus = TokenCorpus.of(map(document_of, records_of(address, "train")), tokenizer)
        batch = cut_rows(corpus, max_length=256, cut="document").batch(list(range(5)))
        for row, example in enumerate(examples(address, "train")):
            words = [
                *example.prompt,
                *example.answer,
                *(word for pair in example.further for part in pair for word in part),
            ]
            assert tokenizer.convert_ids_to_tokens(batch.input_ids[row].tolist()) == words
            predicted = batch.input_ids[row, 1:][batch.predicted()[row]].tolist()
            answers = [*example.answer, *(word for _, answer in example.further for word in answer)]
            assert tokenizer.convert_ids_to_tokens(predicted) == answers and len(answers) == 4

    @pytest.mark.parametrize("told", [0, 1])
    def test_marks_behind_lines_are_learned_in_training_alone_and_change_no_word(self, told):
        plain = f"task:pointer,nodes=8,questions=4,hops_told={told}"
        tokenizer = new_tokenizer("task:pointer")
        for split in SPLITS:
            one, other = (
                cut_rows(
                    TokenCorpus.of(map(document_of, records_of(f"{each},examples=5,held_out=5", split)), tokenizer),
                    max_length=256,
                    cut="document",
                ).batch(list(range(5)))
                for each in (plain, f"{plain},marks_learned=1")
            )
            assert torch.equal(one.input_ids, other.input_ids) and torch.equal(one.difficulty, other.difficulty)
            added = other.predicted() & ~one.predicted()
            assert not (one.predicted() & ~other.predicted()).any()
            expected = torch.zeros_like(added)
            # Predicted at token t is t + 1; the first line's mark is the first token, which nothing says.
            expected[:, 2 : 3 * 8 : 3] = split == "train"
            assert torch.equal(added, expected)

    def test_another_tokenizer_is_refused(self):
        documents = map(document_of, records_of("task:pointer", "train"))
        with pytest.raises(DeepenError, match="task:pointer, train example 1: its ids are those of a tokenizer"):
            TokenCorpus.of(documents, new_tokenizer("task:map"))

    def test_a_text_becomes_its_words(self):
        tokenizer = new_tokenizer("task:maze")
        assert tokenizer.tokenize("a . # / b what =") == ["a", ".", "#", "/", "b", "<|unk|>", "="]
        assert tokenizer.chat_template is None and tokenizer.eos_token == "<|eos|>"
