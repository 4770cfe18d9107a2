"""An iterated map: one permutation, the same in all examples, applied `hops` times to a node.

    n17 3 =    n201

Nothing has to be looked up in the prompt: the map is learned by weights, and what is asked for is to apply it again and
again, which a position can do by itself. The map is one circle through all nodes. An instance is start and hops; a
single hop is the map itself, which only training can tell, so it is asked there alone.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from deepen.core.errors import ConfigError
from deepen.data.records import Split
from deepen.data.tasks.draws import Draws
from deepen.data.tasks.task import (
    ANSWER,
    MOST_COUNTED,
    Example,
    Task,
    counts,
    number_of,
    outside,
    split_of_instance,
)

MOST_NODES = 256


@dataclass(frozen=True)
class IteratedMap(Task):
    """Difficulty: hops. A blind guess sees start and hops, and has not learned the map.

    There are no more than `nodes` times `hops` instances: a split has each of its own once in an order drawn from
    `seed`, then, in training, all of them again.
    """

    name: ClassVar[str] = "map"
    own_words: ClassVar[tuple[str, ...]] = (*counts(), *(f"n{node}" for node in range(MOST_NODES)))

    nodes: int = MOST_NODES
    hops: tuple[int, int] = (1, 8)
    # 0: the question doesn't say how many; only a model can answer whose depth is set from outside.
    hops_told: int = 1
    # Another map for each number.
    map_seed: int = 0

    def validate(self) -> list[str]:
        """Nodes or hops for which there are no words; hops that lead around; nothing to hold out."""
        problems = [
            *super().validate(),
            *outside("nodes", self.nodes, (32, MOST_NODES)),
            *outside("hops", self.hops, (1, MOST_COUNTED)),
            *outside("hops_told", self.hops_told, (0, 1)),
            *outside("map_seed", self.map_seed, (0, 2**63 - 1)),
        ]
        if not problems and not 2 <= self.hops[1] < self.nodes:
            problems.append(
                f"hops must go up to 2 at least, as single ones are not held out, and to less than the {self.nodes} "
                f"nodes, not to {self.hops[1]}"
            )
        return problems

    def num_examples(self, split: Split) -> int:
        """How many examples it has; held out, no more than there are different ones."""
        return self.examples if split == "train" else min(self.held_out, len(self._instances(split)))

    def example(self, split: Split, index: int) -> Example:
        """Number `index` of a split, from 0. Raises `ConfigError` where the settings leave the split no instance."""
        instances = self._instances(split)
        start, hops = instances[index % len(instances)]
        node = start
        for _ in range(hops):
            node = _map(self.nodes, self.map_seed)[node]
        told = (str(hops),) * self.hops_told
        return Example((f"n{start}", *told, ANSWER), (f"n{node}",), hops, self._instance(start, hops))

    def chance(self, difficulty: int) -> float:
        """Fewer hops than nodes never lead back; all other nodes are alike."""
        return 1 / (self.nodes - 1)

    def _instance(self, start: int, hops: int) -> str:
        return f"map {self.nodes} {self.map_seed} {start} {hops}"

    def _instances(self, split: Split) -> list[tuple[int, int]]:
        found = _instances_of(self, split)
        if not found:
            raise ConfigError(f"task map has no {split} example with {self.nodes} nodes; give more nodes or hops")
        return found

    def split_of(self, start: int, hops: int) -> Split:
        """The split of an instance."""
        return "train" if hops == 1 else split_of_instance(self._instance(start, hops))


@lru_cache(maxsize=64)
def _map(nodes: int, map_seed: int) -> list[int]:
    return Draws(map_seed, number_of("map itself"), nodes).circle(nodes)


@lru_cache(maxsize=64)
def _instances_of(task: IteratedMap, split: Split) -> list[tuple[int, int]]:
    """Start and hops of each instance, in the order of examples."""
    low, high = task.hops
    pairs = [(start, hops) for hops in range(low, high + 1) for start in range(task.nodes)]
    draws = Draws(task.seed, number_of(task.name))
    return draws.shuffled([pair for pair in pairs if task.split_of(*pair) == split])
