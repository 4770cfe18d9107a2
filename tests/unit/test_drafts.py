"""Prompt lookup against a search that reads the whole history each time; leftovers against a book of predictions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepen.core.errors import ConfigError
from deepen.generate.drafts import NO_DRAFT, Draft, JacobiDraft, LookupDraft

# Few different tokens, so that they repeat.
histories = st.lists(st.integers(0, 3), max_size=60)
sizes = st.tuples(st.integers(1, 4), st.integers(0, 3)).map(lambda pair: (pair[0], pair[0] + pair[1]))


def searched(history, most, *, min_ngram, max_ngram, max_evidence=16):
    """What `LookupDraft` should propose, by the definition."""
    length = len(history)
    for size in range(min(max_ngram, length), min_ngram - 1, -1):
        for end in range(length - 1, size - 1, -1):
            if history[end - size : end] != history[length - size :] or most == 0:
                continue
            evidence = size
            while evidence < min(end, max_evidence) and history[end - evidence - 1] == history[length - evidence - 1]:
                evidence += 1
            copied = list(history)
            for index in range(most):
                copied.append(copied[end + index])
            return Draft(tuple(copied[length:]), "lookup", evidence)
    return Draft((), "lookup", 0)


@given(history=histories, most=st.integers(0, 20), sizes=sizes)
def test_a_draft_is_what_a_full_search_finds(history, most, sizes):
    min_ngram, max_ngram = sizes
    drafter = LookupDraft(min_ngram=min_ngram, max_ngram=max_ngram)
    assert drafter.propose(history, most) == searched(history, most, min_ngram=min_ngram, max_ngram=max_ngram)


@given(parts=st.lists(histories, max_size=8), most=st.integers(1, 8), sizes=sizes)
def test_a_growing_history_gives_what_a_full_search_finds(parts, most, sizes):
    min_ngram, max_ngram = sizes
    drafter = LookupDraft(min_ngram=min_ngram, max_ngram=max_ngram)
    history = []
    for part in parts:
        history += part
        assert drafter.propose(history, most) == searched(history, most, min_ngram=min_ngram, max_ngram=max_ngram)


@given(several=st.lists(histories, max_size=6), most=st.integers(1, 8))
def test_other_histories_start_it_anew(several, most):
    drafter = LookupDraft(max_ngram=3, min_ngram=1)
    for history in several:
        assert drafter.propose(history, most) == searched(history, most, min_ngram=1, max_ngram=3)


def test_a_shorter_history_is_noticed_even_if_it_is_a_prefix():
    drafter = LookupDraft()
    assert drafter.propose([1, 2, 3, 9, 1, 2, 3], 1).tokens == (9,)
    assert drafter.propose([1, 2, 3, 9, 1], 1).tokens == (2,)


def test_a_change_long_ago_goes_unnoticed_and_does_no_harm():
    old = [5, 6, 7, *range(100, 200)]
    drafter = LookupDraft()
    drafter.propose(old, 4)
    assert drafter.propose([8, 8, 8, *old[3:], 5, 6], 1) == Draft((7,), "lookup", 2)


def test_the_longest_match_wins_then_the_latest():
    drafter = LookupDraft(max_ngram=3)
    assert drafter.propose([1, 2, 3, 40, 9, 3, 50, 8, 2, 3, 60, 1, 2, 3], 1) == Draft((40,), "lookup", 3)
    assert drafter.propose([7, 3, 40, 8, 3, 50, 9, 3], 1) == Draft((50,), "lookup", 1)


def test_a_loop_is_copied_as_long_as_asked():
    assert LookupDraft().propose([7, 1, 2, 1, 2], 7).tokens == (1, 2, 1, 2, 1, 2, 1)
    assert LookupDraft().propose([4, 4], 5).tokens == (4, 4, 4, 4, 4)


def test_evidence_follows_the_match_beyond_the_ngram_and_ends_at_the_maximum():
    phrase = list(range(30))
    history = [*phrase, 99, *phrase[5:]]
    assert LookupDraft(max_ngram=3).propose(history, 1) == Draft((99,), "lookup", 16)
    assert LookupDraft(max_ngram=3, max_evidence=9).propose(history, 1).evidence == 9
    assert LookupDraft(max_ngram=3).propose([*phrase, 99, *phrase[22:]], 1).evidence == 8


def test_too_short_a_match_counts_for_nothing():
    assert LookupDraft(min_ngram=2).propose([1, 5, 2, 5], 3) == Draft((), "lookup", 0)


class CountedList(list):
    """A list that counts how many of its entries are read."""

    num_read = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        self.num_read += len(found) if isinstance(index, slice) else 1
        return found


def test_a_step_reads_new_tokens_and_a_constant_number_of_old_ones():
    history = CountedList(index * 7919 % 1009 for index in range(20_000))
    drafter = LookupDraft()
    drafter.propose(history, 8)
    for step in range(1, 5):
        history.num_read = 0
        history.extend(range(step))
        drafter.propose(history, 8)
        assert step <= history.num_read < 100


@given(passes=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8), st.integers(0, 99)), max_size=12))
def test_leftovers_stand_where_they_were_predicted_for(passes):
    """The plain oracle writes down what each pass predicts for every place of the text, and reads there."""
    drafter, history, book = JacobiDraft(), [7], {}
    for most, num_right, token in passes:
        end = len(history)
        expected = [book.get(place, history[-1]) for place in range(end, end + most)]
        draft = drafter.propose(history, most)
        assert draft == Draft(tuple(expected), "jacobi", 0)
        # What a base might say behind the last token and behind each of the draft, right about its first tokens.
        accepted = min(num_right, most)
        predicted = [*draft.tokens[:accepted], *(token + index for index in range(most - accepted + 1))]
        book = {end + index: prediction for index, prediction in enumerate(predicted)}
        history += predicted[: accepted + 1]
        drafter.keep(predicted[accepted + 1 :])


def test_a_row_without_leftovers_guesses_its_last_token():
    assert JacobiDraft().propose([1, 2, 3], 4) == Draft((3, 3, 3, 3), "jacobi", 0)
    assert JacobiDraft().propose([1, 2, 3], 0).tokens == ()


def test_leftovers_are_those_of_the_last_pass_alone():
    drafter = JacobiDraft()
    drafter.keep([4, 5, 6])
    assert drafter.propose([1, 2], 2).tokens == (4, 5)
    assert drafter.propose([1, 2], 5).tokens == (4, 5, 6, 2, 2)
    drafter.keep([8])
    assert drafter.propose([1, 2], 3).tokens == (8, 2, 2)
    drafter.keep([])
    assert drafter.propose([1, 2], 1).tokens == (2,)


def test_a_shortened_draft_keeps_its_source_and_its_beginning():
    draft = Draft((4, 5, 6), "mask", 2)
    assert draft.shortened(2) == Draft((4, 5), "mask", 2)
    assert draft.shortened(9) == draft
    assert draft.shortened(0) == NO_DRAFT == NO_DRAFT.shortened(3)


@given(tokens=st.lists(st.integers(0, 1), max_size=6), committed=st.lists(st.integers(0, 1), min_size=1, max_size=8))
def test_what_a_draft_says_behind_committed_tokens(tokens, committed):
    rest = Draft(tuple(tokens), "mask", 2).behind(committed)
    if len(tokens) > len(committed) and tokens[: len(committed)] == committed:
        assert rest == Draft(tuple(tokens[len(committed) :]), "mask", 2 + len(committed))
    else:
        assert rest == NO_DRAFT


@pytest.mark.parametrize("sizes", [(0, 3, 16), (4, 3, 16), (1, 3, 2)])
def test_sizes_that_contradict_each_other_are_refused(sizes):
    min_ngram, max_ngram, max_evidence = sizes
    with pytest.raises(ConfigError, match=f"min_ngram {min_ngram}, max_ngram {max_ngram}, max_evidence {max_evidence}"):
        LookupDraft(min_ngram=min_ngram, max_ngram=max_ngram, max_evidence=max_evidence)
