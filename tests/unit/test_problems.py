"""Generated problems against solvers that read nothing but the prompt."""

import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepen.core.errors import AddressError, ConfigError
from deepen.data.formats import Conversation, document_of
from deepen.data.problems import Problem, problems


def solve_arithmetic(prompt: str) -> str:
    body, asked = re.fullmatch(r"Modulo 97: (.*); (\w)\?", prompt).groups()
    values: dict[str, int] = {}
    for line in body.split("; "):
        name, expression = line.split(" = ")
        values[name] = eval(expression, {}, values)
    return str(values[asked] % 97)


def solve_pointers(prompt: str) -> str:
    table, start, hops = re.fullmatch(r"(.*); (\w) (\d+)\?", prompt).groups()
    arrows = dict(arrow.split(">") for arrow in table.split())
    for _ in range(int(hops)):
        start = arrows[start]
    return start


SOLVERS = {"arithmetic": solve_arithmetic, "pointers": solve_pointers}


@given(st.sampled_from(sorted(SOLVERS)), st.integers(1, 7), st.integers(0, 999))
def test_the_answer_is_what_the_prompt_asks_for(kind, difficulty, seed):
    for problem in problems(kind, count=3, difficulty=difficulty, seed=seed):
        assert problem.answer == SOLVERS[kind](problem.prompt)
        assert problem.difficulty == difficulty


@pytest.mark.parametrize("kind", SOLVERS)
def test_the_best_blind_guess_is_no_better_than_told(kind):
    found = list(problems(kind, count=8000, difficulty=4))
    start = [problem.prompt.split("; ")[-1][0] for problem in found] if kind == "pointers" else [""] * 8000
    # A blind guesser may know where the walk starts.
    groups: dict[str, Counter[str]] = {}
    for problem, begin in zip(found, start, strict=True):
        groups.setdefault(begin, Counter())[problem.answer] += 1
    best = sum(counts.most_common(1)[0][1] for counts in groups.values()) / 8000
    assert found[0].chance <= best < 1.6 * found[0].chance


def test_every_step_decides():
    """Another first value, everything else equal, is another answer."""
    for problem in problems("arithmetic", count=50, difficulty=6):
        value = int(re.search(r"a = (\d+)", problem.prompt)[1])
        other = problem.prompt.replace(f"a = {value};", f"a = {(value + 1) % 97};")
        assert solve_arithmetic(other) != problem.answer


def test_they_are_the_same_for_the_same_seed_and_others_for_another():
    first, again, other = (list(problems("pointers", count=20, difficulty=3, seed=seed)) for seed in (1, 1, 2))
    assert first == again and not set(first) & set(other)


@pytest.mark.parametrize(
    ("reply", "solved"), [("24", True), (" 24.", True), ("**24**", True), ("124", False), ("", False)]
)
def test_the_first_word_of_a_reply_counts(reply, solved):
    assert Problem("", "24", 1, 0.0).is_solved_by(reply) is solved


def test_they_are_training_data():
    (problem,) = problems("arithmetic", count=1, difficulty=2)
    found = document_of(problem.record("here"))
    assert isinstance(found, Conversation)
    assert [message.content for message in found.messages] == [problem.prompt, problem.answer]


def test_impossible_ones_are_named():
    with pytest.raises(AddressError, match='unknown kind of problem "pointer"; did you mean "pointers"'):
        next(problems("pointer", count=1, difficulty=1))
    with pytest.raises(ConfigError, match="hops must be between 1 and 7"):
        next(problems("pointers", count=1, difficulty=8))
    with pytest.raises(ConfigError, match="steps must be between 1 and 25"):
        next(problems("arithmetic", count=1, difficulty=26))
