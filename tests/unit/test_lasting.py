"""What lasts in a block is entered anew when the block has ended."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import Thread

import pytest

from deepen.backbones.lasting import Again, lasting


class Opened:
    """What is open, in the order in which it was opened."""

    def __init__(self) -> None:
        self.names: list[str] = []

    @contextmanager
    def opening(self, name: str) -> Iterator[None]:
        self.names.append(name)
        try:
            yield
        finally:
            assert self.names.pop() == name


@pytest.fixture
def opened() -> Opened:
    return Opened()


def test_all_that_lasts_is_entered_in_its_order_and_as_often_as_is_asked(opened):
    outer, inner, last = (partial(opened.opening, name) for name in ("outer", "inner", "last"))
    with lasting(outer):
        with lasting(inner, last):
            assert opened.names == ["outer", "inner", "last"]
            again = Again()
        assert opened.names == ["outer"]
    assert opened.names == []
    for _ in range(2):
        with again:
            assert opened.names == ["outer", "inner", "last"]
        assert opened.names == []


def test_blocks_that_have_ended_and_those_of_other_threads_do_not_last(opened):
    with lasting(partial(opened.opening, "ended")):
        pass
    found = []
    with lasting(partial(opened.opening, "here")):
        thread = Thread(target=lambda: found.append(Again()))
        thread.start()
        thread.join()
        assert opened.names == ["here"]
    for again in (Again(), *found):
        with again:
            assert opened.names == []


def test_it_ends_where_something_fails(opened):
    with lasting(partial(opened.opening, "open")):
        again = Again()
    with pytest.raises(KeyError), again:
        raise KeyError
    assert opened.names == []
    with pytest.raises(KeyError), lasting(partial(opened.opening, "open")):
        raise KeyError
    with Again():
        assert opened.names == []


def test_blocks_of_the_same_may_be_nested(opened):
    with lasting(partial(opened.opening, "open")):
        again = Again()
    with again:
        with again:
            assert opened.names == ["open", "open"]
        assert opened.names == ["open"]
    assert opened.names == []
