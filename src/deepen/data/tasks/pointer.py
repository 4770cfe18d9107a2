"""Pointer chasing: where `hops` steps through a table lead, in which every node points to one and none is left out.

    n4 n2 n0 n4 n3 n0 n1 n1 n2 n3 n0 3 =    n3        pairs of a node and where it points, in any order; start; hops

The table is an arbitrary permutation (most have several circles), start and hops are drawn, and the question stands
behind the table: no position but the last can know what is asked. An instance is the table.
"""

from dataclasses import dataclass
from typing import ClassVar

from deepen.data.records import Split
from deepen.data.tasks.draws import Draws
from deepen.data.tasks.task import ANSWER, MOST_COUNTED, DrawnTask, Example, counts, outside, split_of_instance

MOST_NODES = 64


@dataclass(frozen=True)
class Pointer(DrawnTask):
    """Difficulty: hops. A blind guess sees start and hops, and no table."""

    name: ClassVar[str] = "pointer"
    own_words: ClassVar[tuple[str, ...]] = (*counts(), *(f"n{node}" for node in range(MOST_NODES)))

    nodes: int = 32
    hops: tuple[int, int] = (1, 8)
    # 0: the question doesn't say how many; only a model can answer whose depth is set from outside.
    hops_told: int = 1

    def validate(self) -> list[str]:
        """Nodes or hops for which there are no words, or too few tables to divide among splits."""
        return [
            *super().validate(),
            *outside("nodes", self.nodes, (8, MOST_NODES)),
            *outside("hops", self.hops, (1, MOST_COUNTED)),
            *outside("hops_told", self.hops_told, (0, 1)),
        ]

    def draw(self, draws: Draws, split: Split) -> Example | None:
        """A table, and a question about it."""
        table = draws.shuffled(range(self.nodes))
        instance = f"pointer {table}"
        if split_of_instance(instance) != split:
            return None
        start, hops = draws.below(self.nodes), draws.between(self.hops)
        pairs = [f"n{each}" for node in draws.shuffled(range(self.nodes)) for each in (node, table[node])]
        node = start
        for _ in range(hops):
            node = table[node]
        told = (str(hops),) * self.hops_told
        return Example((*pairs, f"n{start}", *told, ANSWER), (f"n{node}",), hops, instance)

    def chance(self, difficulty: int) -> float:
        """Of guessing the start: its circle is as likely of any length, and leads back after each divisor of hops.

        Any other node shares what is left over with all others, which is at most as much.
        """
        return sum(difficulty % length == 0 for length in range(1, self.nodes + 1)) / self.nodes
