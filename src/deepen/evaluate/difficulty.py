"""Figures by difficulty: of documents whose records say how hard they are."""

from collections.abc import Callable, Sequence

from deepen.data.tasks.address import PREFIX, read_task
from deepen.evaluate.results import AtDifficulty, ScoredDocument


def by_difficulty(documents: Sequence[ScoredDocument], data: str) -> tuple[AtDifficulty, ...] | None:
    """A line for each difficulty, ascending, documents without one left out; None where none has one.

    `data` is the address that the documents are from: of a task it is known what a blind guess gets.
    """
    chance = read_task(data).chance if data.startswith(PREFIX) else None
    found = sorted({each.difficulty for each in documents if each.difficulty is not None})
    return tuple(_line(number, documents, chance) for number in found) or None


def _line(difficulty: int, documents: Sequence[ScoredDocument], chance: Callable[[int], float] | None) -> AtDifficulty:
    own = [each for each in documents if each.difficulty == difficulty]
    num_tokens = sum(each.num_tokens for each in own)
    return AtDifficulty(
        difficulty=difficulty,
        num_documents=len(own),
        all_correct=sum(each.num_correct == each.num_tokens for each in own) / len(own),
        token_accuracy=sum(each.num_correct for each in own) / num_tokens,
        nll=sum(each.nll for each in own) / num_tokens,
        chance=None if chance is None else chance(difficulty),
    )
