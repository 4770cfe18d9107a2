"""Pointer chasing: where `hops` steps through a table lead, in which every node points to one and none is left out.

    n4 n2 n0 n4 n3 n0 n1 n1 n2 n3 n0 3 =    n3        pairs of a node and where it points, in any order; start; hops

The table is an arbitrary permutation (most have several circles), start and hops are drawn, and the question stands
behind the table: no position but the last can know what is asked. An instance is the table.

With `questions`, these are asked behind one table, of different starts and as many hops each, and everything is in
threes: a mark, a node, and where it leads. "=" marks what the table says; the hops mark a question, or "?" where they
aren't told.

    = n4 n2 = n0 n4 = n3 n0 = n1 n1 = n2 n3 3 n0    n3    3 n1    n1    3 n4    n0

So the node before it alone tells how a line ends, and a question of one hop: what a model of two layers learns soonest.
Bare pairs are harder for it, as a node stands in two of them, and nothing but its place says which it begins.

Of lines in any order, half stand behind the one that they lead to, and who reads such a line can look up at once where
the next hop leads: two hops are then one. With `order=ahead` no line stands behind the one that it leads to, but for
one of each circle, so that hops have to be made after the question. Who has learned to answer single hops looks up at
that one, too. With `marks_learned=1` training asks at the end of every line for the mark behind it, which is no
node; what is asked in validation and test stays the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from deepen.data.records import Split
from deepen.data.tasks.draws import Draws
from deepen.data.tasks.task import ANSWER, MOST_COUNTED, DrawnTask, Example, counts, outside, split_of_instance

MOST_NODES = 64
UNTOLD = "?"
"""Marks a question that doesn't tell its hops."""


@dataclass(frozen=True)
class Pointer(DrawnTask):
    """Difficulty: hops. A blind guess sees the start and hops of its question, and no table."""

    name: ClassVar[str] = "pointer"
    own_words: ClassVar[tuple[str, ...]] = (*counts(), *(f"n{node}" for node in range(MOST_NODES)), UNTOLD)

    nodes: int = 32
    hops: tuple[int, int] = (1, 8)
    # 0: the question doesn't say how many; only a model can answer whose depth is set from outside.
    hops_told: int = 1
    # Behind each table, all in threes; 0: one, behind bare pairs.
    questions: int = 0
    # Each table's nodes are drawn from so many, so that small tables teach the words of large ones; 0: all are its own.
    names: int = 0
    # Of the table's lines. "ahead": none behind the one that it leads to, where that can be; else all are as likely.
    order: Literal["any", "ahead"] = "any"
    # In training, marks behind the table's lines beside the answers.
    marks_learned: int = 0

    def validate(self) -> list[str]:
        """Nodes or hops for which there are no words, too few tables to divide among splits, a start asked twice."""
        return [
            *super().validate(),
            *outside("nodes", self.nodes, (8, MOST_NODES)),
            *outside("hops", self.hops, (1, MOST_COUNTED)),
            *outside("hops_told", self.hops_told, (0, 1)),
            *outside("questions", self.questions, (0, self.nodes)),
            *outside("marks_learned", self.marks_learned, (0, 1)),
            *self._marks_of_none(),
            *(outside("names", self.names, (self.nodes, MOST_NODES)) if self.names else []),
        ]

    def _marks_of_none(self) -> list[str]:
        if not self.marks_learned or self.questions:
            return []
        return [f"marks_learned {self.marks_learned} is for tables in threes; set questions to 1 or more"]

    def draw(self, draws: Draws, split: Split) -> Example | None:
        """A table, and what is asked about it."""
        nodes = list(range(self.nodes))
        if self.names:
            nodes = draws.shuffled(range(self.names))[: self.nodes]
        table = dict(zip(nodes, draws.shuffled(nodes), strict=True))
        instance = f"pointer {_told(table)}"
        if split_of_instance(instance) != split:
            return None
        if self.questions:
            learn_marks = bool(self.marks_learned) and split == "train"
            return self._in_threes(draws, table, instance, learn_marks=learn_marks)
        start, hops = draws.choice(nodes), draws.between(self.hops)
        pairs = [f"n{each}" for node in self._ordered(draws, table) for each in (node, table[node])]
        told = (str(hops),) * self.hops_told
        return Example((*pairs, f"n{start}", *told, ANSWER), (f"n{_led(table, start, hops)}",), hops, instance)

    def chance(self, difficulty: int) -> float:
        """Of guessing the start: its circle is as likely of any length, and leads back after each divisor of hops.

        Any other node shares what is left over with all others, which is at most as much.
        """
        return sum(difficulty % length == 0 for length in range(1, self.nodes + 1)) / self.nodes

    def _in_threes(self, draws: Draws, table: Mapping[int, int], instance: str, *, learn_marks: bool) -> Example:
        lines = [(f"n{node}", f"n{table[node]}") for node in self._ordered(draws, table)]
        hops = draws.between(self.hops)
        mark = str(hops) if self.hops_told else UNTOLD
        first, *further = (
            ((mark, f"n{start}"), (f"n{_led(table, start, hops)}",))
            for start in draws.shuffled(list(table))[: self.questions]
        )
        asked, answer = first
        if not learn_marks:
            words = [word for line in lines for word in (ANSWER, *line)]
            return Example((*words, *asked), answer, hops, instance, tuple(further))
        behind = [*[(ANSWER,)] * (len(lines) - 1), (mark,)]
        (line, its_mark), *others = zip(lines, behind, strict=True)
        return Example((ANSWER, *line), its_mark, hops, instance, (*others, (asked[1:], answer), *further))

    def _ordered(self, draws: Draws, table: Mapping[int, int]) -> list[int]:
        """The nodes whose lines come one after the other."""
        nodes = draws.shuffled(list(table))
        if self.order == "any":
            return nodes
        circles = _circles(table, nodes)
        # Every way to take turns is as likely.
        turns = draws.shuffled([number for number, circle in enumerate(circles) for _ in circle])
        along = [iter(circle) for circle in circles]
        return [next(along[turn]) for turn in turns]


def _circles(table: Mapping[int, int], starts: Sequence[int]) -> list[list[int]]:
    """A table's circles, each from the one of its nodes that comes first in `starts`, which has them all."""
    circles: list[list[int]] = []
    seen: set[int] = set()
    for start in starts:
        circle = []
        node = start
        while node not in seen:
            seen.add(node)
            circle.append(node)
            node = table[node]
        circles += [circle] if circle else []
    return circles


def _led(table: Mapping[int, int], node: int, hops: int) -> int:
    """Where so many hops lead."""
    for _ in range(hops):
        node = table[node]
    return node


def _told(table: Mapping[int, int]) -> list[int] | list[tuple[int, int]]:
    """A table, the same however it was drawn: where its nodes point, and which they are unless these are the first."""
    if max(table) == len(table) - 1:
        return [table[node] for node in range(len(table))]
    return sorted(table.items())
