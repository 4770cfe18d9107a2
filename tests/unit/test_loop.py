"""Driving a decoder: rows end on their own, text is whole, what was asked for and can't be is said."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.core.errors import ConfigError, PromptError
from deepen.core.method import Sampler
from deepen.core.types import Advance, Prompt, RowAdvance, Spent
from deepen.data.tokenizer import byte_tokenizer
from deepen.generate.events import Committed, Finished, RowResult
from deepen.generate.loop import complete, stream
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import SamplingConfig
from deepen.generate.stop import StopConfig

TOKENIZER = byte_tokenizer()
END = 258


@dataclass
class Script:
    """What is left to say in each row, in the commits in which it is said."""

    rows: list[list[tuple[int, ...]]]


class Scripted:
    """A decoder that says what it was given, some tokens an advance, and notes which rows it was told to drop."""

    def __init__(self, *rows: Sequence[Sequence[int]]) -> None:
        self._rows = [[tuple(commit) for commit in row] for row in rows]
        self.dropped: list[list[int]] = []
        self.advances = 0

    def open(self, prompt: Prompt) -> Script:
        return Script([list(row) for row in self._rows])

    def advance(self, decoding: Script, sampler: Sampler) -> Advance:
        self.advances += 1
        commits = [row.pop(0) for row in decoding.rows]
        gained = tuple(RowAdvance(commit, len(commit) - 1, len(commit) - 1, "script") for commit in commits)
        return Advance(gained, Spent(1, sum(map(len, commits))))

    def drop(self, decoding: Script, rows: Sequence[int]) -> None:
        self.dropped.append(list(rows))
        decoding.rows = [row for place, row in enumerate(decoding.rows) if place not in rows]


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text))


def test_tokens_text_and_counts_of_a_row() -> None:
    decoder = Scripted([ids("ab"), ids("c"), ids("def")])
    stop = StopConfig(max_new_tokens=6)
    result = complete(decoder, [[1]], stop=stop, tokenizer=TOKENIZER)[0]
    assert result.tokens == ids("abcdef")
    assert result.text == "abcdef"
    assert (result.reason, result.passes, result.commits) == ("length", 3, [2, 1, 3])
    assert (result.drafted["script"], result.accepted["script"]) == (3, 3)
    assert result.tokens_per_pass == 2.0


def test_an_end_inside_a_commit_cuts_what_stands_behind_it() -> None:
    decoder = Scripted([[*ids("ab"), END, *ids("xyz")]])
    result = complete(decoder, [[1]], stop=StopConfig(eos_ids=(END,)), tokenizer=TOKENIZER)[0]
    assert result.tokens == [*ids("ab"), END]
    assert (result.text, result.reason) == ("ab", "eos")


def test_never_more_than_max_new_tokens() -> None:
    result = complete(Scripted([ids("abc"), ids("defgh")]), [[1]], stop=StopConfig(max_new_tokens=5))[0]
    assert result.tokens == ids("abcde")
    assert result.reason == "length"


def test_a_stop_string_across_a_chunk_border() -> None:
    decoder = Scripted([ids("one st"), ids("op two")])
    stop = StopConfig(stop_strings=("stop",))
    result = complete(decoder, [[1]], stop=stop, tokenizer=TOKENIZER)[0]
    assert result.tokens == ids("one stop")
    assert (result.text, result.reason) == ("one ", "stop_string")


def test_rows_end_on_their_own_and_are_dropped_once() -> None:
    decoder = Scripted(
        [ids("a"), ids("b"), ids("c")],
        [[*ids("x"), END]],
        [ids("m"), [*ids("n"), END]],
    )
    stop = StopConfig(max_new_tokens=3, eos_ids=(END,))
    results = complete(decoder, [[1], [2], [3]], stop=stop, tokenizer=TOKENIZER)
    assert [result.text for result in results] == ["abc", "x", "mn"]
    assert [result.reason for result in results] == ["length", "eos", "eos"]
    assert [result.passes for result in results] == [3, 1, 2]
    # By place among the rows still alive; the last one is not dropped, the decoding ends with it.
    assert decoder.dropped == [[1], [1]]


def test_nothing_is_run_for_no_new_tokens() -> None:
    decoder = Scripted([ids("a")])
    events = list(stream(decoder, [[1]], stop=StopConfig(max_new_tokens=0)))
    assert events == [Finished(0, "length")]
    assert decoder.advances == 0
    assert RowResult().tokens_per_pass == 0.0


@given(text=st.text(min_size=1, max_size=30), cuts=st.lists(st.integers(1, 7), min_size=1, max_size=60))
def test_streamed_text_is_the_decoded_text_for_any_cut(text: str, cuts: list[int]) -> None:
    tokens = ids(text)
    commits = []
    for cut in cuts:
        commits.append(tokens[:cut])
        tokens = tokens[cut:]
    commits = [commit for commit in [*commits, tokens] if commit]
    events = list(stream(Scripted(commits), [[1]], stop=StopConfig(max_new_tokens=len(ids(text))), tokenizer=TOKENIZER))
    committed = [event for event in events if isinstance(event, Committed)]
    assert "".join(event.text for event in committed) == text
    assert [token for event in committed for token in event.tokens] == ids(text)
    assert events[-1] == Finished(0, "length")


@pytest.fixture(scope="module")
def plain() -> PlainDecoder:
    return PlainDecoder(Backbone.attach(tiny.build("llama").requires_grad_(False)))


def test_one_sampling_gives_each_row_its_own_seed(plain: PlainDecoder) -> None:
    warm = SamplingConfig(temperature=1.0, seed=4)
    stop = StopConfig(max_new_tokens=12)
    both = complete(plain, [[1, 2], [1, 2]], sampling=warm, stop=stop)
    assert both[0].tokens != both[1].tokens
    second = complete(plain, [[1, 2]], sampling=SamplingConfig(temperature=1.0, seed=5), stop=stop)[0]
    assert second.tokens == both[1].tokens


@pytest.mark.parametrize(
    ("rows", "max_new_tokens", "message"),
    [
        ([], 4, "no prompt: give at least one row"),
        ([[1], []], 4, "prompt 1 is empty; give at least one token"),
        ([[1, 260]], 4, "prompt 0 holds id 260, outside this model's vocabulary of 260"),
        ([[1, -1]], 4, "prompt 0 holds id -1"),
        ([[1] * 500], 20, r"prompt 0 has 500 tokens; with max_new_tokens 20 .* context of 512.* by 8 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_continued(
    plain: PlainDecoder, rows: list[list[int]], max_new_tokens: int, message: str
) -> None:
    with pytest.raises(PromptError, match=message):
        complete(plain, rows, stop=StopConfig(max_new_tokens=max_new_tokens))


def test_a_prompt_may_fill_the_context(plain: PlainDecoder) -> None:
    result = complete(plain, [[1] * 500], stop=StopConfig(max_new_tokens=12))[0]
    assert len(result.tokens) == 12


def test_settings_must_match_the_prompts(plain: PlainDecoder) -> None:
    with pytest.raises(ConfigError, match="2 sampling configurations for 1 prompts"):
        complete(plain, [[1]], sampling=[SamplingConfig(), SamplingConfig()])
    with pytest.raises(ConfigError, match="stop_strings can't be found in tokens without"):
        complete(plain, [[1]], stop=StopConfig(stop_strings=("a",)))
    with pytest.raises(ConfigError, match="temperature must be"):
        complete(plain, [[1]], sampling=SamplingConfig(temperature=-1.0))
