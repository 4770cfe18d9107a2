"""Figures by difficulty: sums over the documents of each, and what a blind guess gets of a task."""

import pytest

from deepen.evaluate.difficulty import by_difficulty
from deepen.evaluate.results import ScoredDocument


def document(difficulty: int | None, num_correct: int, num_tokens: int = 4, nll: float = 2.0) -> ScoredDocument:
    return ScoredDocument("x", nll, num_tokens, num_correct, 9, difficulty)


def test_each_difficulty_has_its_own_documents():
    documents = [document(2, 4), document(7, 3), document(2, 1, nll=4.0), document(None, 0), document(2, 2, 2)]
    found = by_difficulty(documents, "wiki")
    assert found is not None
    two, seven = found
    assert (two.difficulty, two.num_documents, two.chance) == (2, 3, None)
    assert two.all_correct == 2 / 3 and two.token_accuracy == 7 / 10 and two.nll == pytest.approx(0.8)
    assert (seven.all_correct, seven.token_accuracy) == (0.0, 0.75)


def test_of_a_task_it_is_known_what_a_blind_guess_gets():
    found = by_difficulty([document(1, 4), document(6, 4)], "task:pointer,nodes=16,hops=1-6")
    assert found is not None and [line.chance for line in found] == [1 / 16, 4 / 16]


def test_documents_that_tell_none_have_no_table():
    assert by_difficulty([document(None, 3)], "task:pointer") is None
