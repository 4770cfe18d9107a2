"""The engine by itself: whose turn it is, what is held, and what one request can do to the others."""

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest
import torch
from effort import share_of_profile
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepen.backbones.hf import Backbone
from deepen.checkpoint import open_model
from deepen.core.depthwise import DepthLayout, KeyValues, Running, State
from deepen.core.errors import ConfigError, DeepenError, PromptError
from deepen.core.types import RowAdvance
from deepen.engine.engine import Engine
from deepen.engine.request import Live, Request
from deepen.engine.served import AsyncEngine
from deepen.generate.events import Committed, Event, Finished
from deepen.generate.sampling import SamplingConfig
from deepen.generate.stop import StopConfig

VOCAB_SIZE, MOST = 50, 4
BROKEN = 49
"""An id behind which there are no logits that mean anything."""


class Scripted:
    """A `Depthwise` model of four recursions in which an id says how many it runs: 1 + id % 4.

    What a token leaves is the sum of the ids before it and its own, read through keys and values; the token behind it
    is that sum modulo the vocabulary.
    """

    def depth_layout(self) -> DepthLayout:
        layers = range(MOST)
        return DepthLayout(
            before=(),
            recursions=tuple((layer,) for layer in layers),
            after=(),
            entries=(0,) * MOST,
            under=(None,) * MOST,
            groups=(0,) * MOST,
            num_heads=1,
            width=8,
        )

    def enter(self, ids: Tensor, running: Running, kv: KeyValues) -> State:
        return ids.double()[:, None].expand(-1, 8), running.positions, ids % MOST, ids

    def recur(self, state: State, running: Running, kv: KeyValues) -> tuple[State, Tensor]:
        own, positions, more, ids = state
        first = running.runs[0][1] if running.runs[0][0] == 0 else 0
        # All keys are equal, so that what is read is the mean of all values so far.
        made = (torch.zeros(first, 1, 8).double(), own[:first, None]) if first else None
        mean = kv.attend([level for level, _ in running.runs], torch.zeros(len(ids), 1, 8).double(), made)
        total = (mean[:, 0] * (positions + 1)[:, None]).round()
        levels = torch.tensor([level for level, count in running.runs for _ in range(count)])
        return (torch.where(levels[:, None] == 0, total, own), positions, more, ids), more > levels

    def leave(self, state: State, running: Running, kv: KeyValues) -> Tensor:
        total, _, _, ids = state
        return torch.stack([total[:, 0], ids.double()], dim=1)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = torch.nn.functional.one_hot(hidden[:, 0].long() % VOCAB_SIZE, VOCAB_SIZE).double()
        return torch.where(hidden[:, 1:] == BROKEN, torch.nan, logits)


def answer(request: Request) -> list[int]:
    """What the scripted model says, by plain arithmetic."""
    ids = list(request.ids)
    for _ in range(request.stop.max_new_tokens):
        ids.append(sum(ids) % VOCAB_SIZE)
    return ids[len(request.ids) :]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """For a device, a vocabulary and a width of numbers; no layer of it runs."""
    made = open_model("tiny:llama", dtype="float64").backbone
    made.config.vocab_size = VOCAB_SIZE
    return made


def asked(*ids: int, new: int = 5) -> Request:
    return Request(ids, stop=StopConfig(max_new_tokens=new))


def deep(place: int, new: int) -> Request:
    """One that says odd numbers only from then on, of which each runs two recursions or four."""
    return asked(2 * place + 1, new=new)


REQUESTS = st.lists(
    st.builds(
        lambda ids, new: asked(*ids, new=new),
        st.lists(st.integers(0, BROKEN - 1), min_size=1, max_size=12),
        st.integers(0, 9),
    ),
    min_size=1,
    max_size=10,
)


class TestTurns:
    @share_of_profile(1, least=25)
    @given(REQUESTS, st.integers(1, 6), st.integers(1, 8), st.integers(1, 9))
    def test_everybody_commits_within_a_bounded_number_of_steps(
        self, backbone: Backbone, requests: list[Request], slots: int, exit_width: int, prompt_width: int
    ) -> None:
        """From its first token on within twice the recursions, whatever depths the others run."""
        engine = Engine(
            Scripted(), backbone=backbone, slots=slots, max_length=32, exit_width=exit_width, prompt_width=prompt_width
        )
        numbers = [engine.submit(request) for request in requests]
        tokens: dict[int, list[int]] = defaultdict(list)
        last: dict[int, int] = {}
        ended: list[int] = []
        step = 0
        while engine.is_busy:
            step += 1
            for event in engine.step():
                if isinstance(event, Finished):
                    ended.append(event.row)
                    last.pop(event.row, None)
                else:
                    tokens[event.row] += event.tokens
                    last[event.row] = step
            assert all(step - since < 2 * MOST for since in last.values())
        assert sorted(ended) == numbers
        for number, request in zip(numbers, requests, strict=True):
            said, cut = tokens[number], answer(request)
            assert said == (cut[: cut.index(BROKEN) + 1] if BROKEN in cut[:-1] else cut)

    def test_nobody_is_overtaken(self, backbone: Backbone) -> None:
        """A long request for which there is no room yet goes before a short one for which there is."""
        engine = Engine(Scripted(), backbone=backbone, slots=3, max_length=32, memory_bytes=40 * 128)
        order = [asked(1, new=20), asked(2, new=30), asked(3, new=2)]
        numbers = [engine.submit(request) for request in order]
        first: list[int] = []
        while engine.is_busy:
            for event in engine.step():
                if isinstance(event, Committed) and event.row not in first:
                    first.append(event.row)
            assert engine.num_bytes <= engine.most_bytes == 40 * 128
        assert first == numbers
        assert engine.num_bytes == 0

    def test_tokens_of_several_depths_run_in_one_call(self, backbone: Backbone) -> None:
        """Three rows that run one, two and four recursions a token take as many calls as the deepest alone."""
        engine = Engine(Scripted(), backbone=backbone, slots=3, max_length=64, exit_width=1)
        engine.complete([deep(0, 20), deep(1, 20), asked(4, 4, new=20)])
        together = engine.statistics
        calls = []
        for request in (deep(0, 20), deep(1, 20), asked(4, 4, new=20)):
            apart = Engine(Scripted(), backbone=backbone, slots=1, max_length=64)
            apart.complete([request])
            calls.append(apart.statistics.spent.passes)
        assert together.spent.passes <= max(calls) + MOST < sum(calls)
        assert together.spent.positions == 20 + 20 + 21

    def test_a_stream_of_newcomers_keeps_nobody_waiting(self, backbone: Backbone) -> None:
        """One comes each step, so that somebody is always on the way; what is done leaves all the same."""
        engine = Engine(Scripted(), backbone=backbone, slots=64, max_length=32, exit_width=64)
        first, last, ended = engine.submit(deep(1, 6)), 0, False
        for step in range(1, 60):
            engine.submit(asked(3, new=20))
            of_first = [event for event in engine.step() if event.row == first]
            ended = ended or any(isinstance(event, Finished) for event in of_first)
            last = step if of_first or ended else last
            assert step - last < 2 * MOST - 1
        assert ended

    def test_prompts_of_those_who_came_first_are_read_first(self, backbone: Backbone) -> None:
        engine = Engine(Scripted(), backbone=backbone, slots=2, max_length=64, prompt_width=4)
        numbers = [engine.submit(asked(*[0] * 25, new=1)) for _ in range(2)]
        assert [event.row for event in run(engine) if isinstance(event, Committed)] == numbers

    def test_a_long_prompt_is_not_overtaken_by_shorter_ones(self, backbone: Backbone) -> None:
        """Another's piece is on the way when it begins, so that its own first one is short."""
        engine = Engine(Scripted(), backbone=backbone, slots=12, max_length=128, prompt_width=16, exit_width=1)
        numbers = [engine.submit(asked(*[each] * width, new=1)) for each, width in ((0, 16), (3, 100))]
        numbers += [engine.submit(asked(*[3] * 15, new=1)) for _ in range(9)]
        assert [event.row for event in run(engine) if isinstance(event, Committed)] == numbers

    def test_no_more_tokens_of_prompts_than_prompt_width_are_on_their_way(self, backbone: Backbone) -> None:
        class Counted(Scripted):
            """Counts tokens that have entered and not left."""

            inside = most = 0

            def enter(self, ids: Tensor, running: Running, kv: KeyValues) -> State:
                self.inside += len(ids)
                self.most = max(self.most, self.inside)
                return super().enter(ids, running, kv)

            def leave(self, state: State, running: Running, kv: KeyValues) -> Tensor:
                self.inside -= len(running)
                return super().leave(state, running, kv)

        model = Counted()
        engine = Engine(model, backbone=backbone, slots=3, max_length=64, prompt_width=5, exit_width=1)
        engine.complete([asked(*[3] * width, new=1) for width in (21, 22, 23)])
        assert 5 <= model.most <= 5 + 3

    def test_tokens_leave_when_enough_are_done(self, backbone: Backbone) -> None:
        requests = [deep(place, 12) for place in range(8)]
        heads: dict[int, Counter[int]] = {}
        for exit_width in (1, 8):
            engine = Engine(Scripted(), backbone=backbone, slots=8, max_length=32, exit_width=exit_width)
            engine.complete(requests)
            heads[exit_width] = engine.statistics.heads
            assert sum(size * times for size, times in heads[exit_width].items()) == 8 * 12
        assert sum(heads[8].values()) < sum(heads[1].values())


class TestRefusals:
    def test_a_request_that_never_fits(self, backbone: Backbone) -> None:
        engine = Engine(Scripted(), backbone=backbone, max_length=16)
        with pytest.raises(PromptError, match=r"may hold 16 tokens, and this one 17.*raise max_length"):
            engine.submit(asked(1, 2, new=15))
        engine = Engine(Scripted(), backbone=backbone, max_length=16, memory_bytes=10 * 128)
        with pytest.raises(PromptError, match=r"11 tokens may need 1408 bytes, and there are 1280"):
            engine.submit(asked(1, new=10))
        assert not engine.is_busy

    @pytest.mark.parametrize(
        ("ids", "message"), [((), "the prompt is empty"), ((1, VOCAB_SIZE), "id 50, outside .* vocabulary of 50")]
    )
    def test_ids_that_are_no_prompt(self, backbone: Backbone, ids: tuple[int, ...], message: str) -> None:
        with pytest.raises(PromptError, match=message):
            Engine(Scripted(), backbone=backbone).submit(Request(ids))

    def test_more_than_the_context(self, backbone: Backbone) -> None:
        context = backbone.context_length
        with pytest.raises(PromptError, match=f"exceeds this model's context of {context}.*by 1 tokens"):
            Engine(Scripted(), backbone=backbone).submit(asked(1, new=context))

    def test_impossible_sampling(self, backbone: Backbone) -> None:
        with pytest.raises(ConfigError, match="temperature"):
            Engine(Scripted(), backbone=backbone).submit(Request((1,), SamplingConfig(temperature=-1)))

    @pytest.mark.parametrize("name", ["slots", "max_length", "memory_bytes", "prompt_width", "exit_width"])
    def test_impossible_numbers(self, backbone: Backbone, name: str) -> None:
        with pytest.raises(ConfigError, match=f"{name} must be 1 or more, not 0"):
            Engine(Scripted(), backbone=backbone, **{name: 0})

    def test_memory_for_not_one_token(self, backbone: Backbone) -> None:
        with pytest.raises(ConfigError, match="memory_bytes is 100, too little for a single token, which may take 128"):
            Engine(Scripted(), backbone=backbone, memory_bytes=100)

    def test_what_can_t_be_batched(self, backbone: Backbone) -> None:
        with pytest.raises(ConfigError, match=r"object .*come and go"):
            Engine(object(), backbone=backbone)

    def test_too_little_memory_for_one_row(self) -> None:
        opened = open_model("tiny:llama")
        with pytest.raises(ConfigError, match="memory_bytes is 100, too little"):
            Engine(opened.decoder, backbone=opened.backbone, memory_bytes=100)


def finished(events: Sequence[Event]) -> dict[int, Finished]:
    return {event.row: event for event in events if isinstance(event, Finished)}


def run(engine: Engine) -> list[Event]:
    events: list[Event] = []
    while engine.is_busy:
        events += engine.step()
    return events


class TestOneAmongOthers:
    def test_a_request_that_fails_disturbs_nobody(self, backbone: Backbone) -> None:
        engine = Engine(Scripted(), backbone=backbone, slots=4, max_length=32)
        requests = [asked(1, new=9), asked(3, BROKEN, new=9), asked(2, 5, new=9)]
        results = engine.complete(requests)
        assert [each.reason for each in results] == ["length", "failed", "length"]
        assert isinstance(results[1].error, DeepenError)
        assert [results[0].tokens, results[2].tokens] == [answer(requests[0]), answer(requests[2])]
        assert engine.num_bytes == 0

    def test_a_text_that_fails_ends_its_request_alone(self, backbone: Backbone) -> None:
        class Tokenizer:
            """Knows no 7."""

            def decode(self, ids: Sequence[int], **options: object) -> str:
                if 7 in ids:
                    raise ValueError("there is no 7")
                return " ".join(map(str, ids))

            def convert_ids_to_tokens(self, ids: int) -> str:
                return str(ids)

        engine = Engine(Scripted(), backbone=backbone, slots=4, max_length=32, tokenizer=Tokenizer())
        results = engine.complete([asked(7, new=3), asked(1, new=3)])
        assert [each.reason for each in results] == ["failed", "length"]
        assert str(results[0].error) == "there is no 7"
        assert results[1].tokens == answer(asked(1, new=3))

    def test_cancelled_waiting_and_running(self, backbone: Backbone) -> None:
        engine = Engine(Scripted(), backbone=backbone, slots=1, max_length=32)
        running, waiting, last = (engine.submit(asked(each, new=9)) for each in (1, 2, 3))
        events = [event for _ in range(2) for event in engine.step()]
        engine.cancel(running)
        engine.cancel(waiting)
        engine.cancel(12345)
        events += run(engine)
        ends = finished(events)
        assert [ends[number].reason for number in (running, waiting, last)] == ["cancelled", "cancelled", "length"]
        assert engine.num_bytes == 0
        said = [token for e in events if isinstance(e, Committed) and e.row == last for token in e.tokens]
        assert said == answer(asked(3, new=9))

    def test_cancelled_while_done_and_waiting_to_leave(self, backbone: Backbone) -> None:
        engine = Engine(Scripted(), backbone=backbone, slots=2, max_length=32, exit_width=2)
        shallow = engine.submit(asked(0, new=5))
        engine.submit(asked(3, new=1))
        engine.step()
        engine.cancel(shallow)
        assert finished(run(engine))[shallow].reason == "cancelled"
        assert engine.statistics.tokens == 1

    def test_tokens_behind_an_end_are_not_told(self) -> None:
        live = Live(0, Request((1,), stop=StopConfig(eos_ids=(2,))))
        committed, end = live.take(RowAdvance((5, 2, 7)), 1)
        assert isinstance(committed, Committed) and isinstance(end, Finished)
        assert (committed.tokens, end.reason) == ((5, 2), "eos")

    def test_stop_strings_and_text(self, backbone: Backbone) -> None:
        engine = Engine(Scripted(), backbone=backbone, slots=2, max_length=32, tokenizer=Named())
        stop = StopConfig(max_new_tokens=9, stop_strings=("<8>",))
        ended, other = engine.complete([Request((1,), stop=stop), asked(3, new=3)])
        assert (ended.tokens, ended.text, ended.reason) == ([1, 2, 4, 8], "<1><2><4>", "stop_string")
        assert other.text == "<3><6><12>"

    def test_a_stop_string_may_begin_in_the_prompt(self, backbone: Backbone) -> None:
        engine = Engine(Scripted(), backbone=backbone, slots=1, max_length=32, tokenizer=Named())
        stop = StopConfig(max_new_tokens=9, stop_strings=("<7><7>",))
        assert engine.complete([Request((7,), stop=stop)])[0].tokens == [7]

    def test_nothing_to_add(self, backbone: Backbone) -> None:
        engine = Engine(Scripted(), backbone=backbone, slots=1)
        assert [each.reason for each in engine.complete([asked(1, new=0), asked(1, new=1)])] == ["length", "length"]


class Named:
    """Texts that tell ids."""

    def decode(self, ids: Sequence[int], **options: object) -> str:
        return "".join(f"<{each}>" for each in ids)

    def convert_ids_to_tokens(self, ids: int) -> str:
        return f"<{ids}>"


class Faulty(Scripted):
    """Breaks where tokens leave, after a while."""

    def leave(self, state: State, running: Running, kv: KeyValues) -> Tensor:
        time.sleep(0.1)
        raise RuntimeError("out of order")


class TestTogether:
    """`stream` and `complete`."""

    def test_if_one_is_refused_none_is_begun(self, backbone: Backbone) -> None:
        engine = Engine(Scripted(), backbone=backbone, slots=2, max_length=16)
        with pytest.raises(PromptError):
            engine.complete([asked(1, new=3), asked(1, new=99)])
        with pytest.raises(ConfigError, match="tokenizer"):
            engine.complete([asked(1, new=3), Request((1,), stop=StopConfig(max_new_tokens=2, stop_strings=("x",)))])
        assert not engine.is_busy
        assert engine.complete([asked(2, new=3)])[0].tokens == answer(asked(2, new=3))

    def test_what_a_reader_leaves_is_forgotten(self, backbone: Backbone) -> None:
        engine = Engine(Scripted(), backbone=backbone, slots=1, max_length=16)
        stream = engine.stream([asked(1, new=5), asked(2, new=5)])
        next(stream)
        stream.close()
        assert not engine.is_busy and engine.num_bytes == 0
        assert engine.complete([asked(2, new=3)])[0].tokens == answer(asked(2, new=3))

    def test_others_events_are_not_lost(self, backbone: Backbone) -> None:
        engine = Engine(Scripted(), backbone=backbone)
        engine.submit(asked(1))
        with pytest.raises(ConfigError, match="has 1 requests to answer, whose events would be lost"):
            engine.complete([asked(2)])

    def test_after_a_fault_nothing_is_answered_wrongly(self, backbone: Backbone) -> None:
        engine = Engine(Faulty(), backbone=backbone)
        with pytest.raises(RuntimeError, match="out of order"):
            engine.complete([asked(1)])
        for again in (engine.step, lambda: engine.submit(asked(1)), lambda: engine.complete([asked(1)])):
            with pytest.raises(DeepenError, match=r"RuntimeError: out of order.*make a new one"):
                again()


class TestWaiting:
    """`AsyncEngine`."""

    def test_streams_beside_each_other(self, backbone: Backbone) -> None:
        requests = [asked(place, new=6) for place in range(5)]

        async def said(served: AsyncEngine, request: Request) -> list[int]:
            return [t async for event in served.stream(request) if isinstance(event, Committed) for t in event.tokens]

        async def everything() -> list[list[int]]:
            async with AsyncEngine(Engine(Scripted(), backbone=backbone, slots=2, max_length=32)) as served:
                return await asyncio.gather(*(said(served, request) for request in requests))

        assert asyncio.run(everything()) == [answer(request) for request in requests]

    def test_a_stream_that_is_left_is_cancelled(self, backbone: Backbone) -> None:
        engine = Engine(Scripted(), backbone=backbone, slots=1, max_length=512)

        async def everything() -> None:
            async with AsyncEngine(engine) as served:
                stream = served.stream(asked(1, new=500))
                await anext(stream)
                await stream.aclose()
                assert [event async for event in served.stream(asked(2, new=1))]

        asyncio.run(everything())
        assert engine.num_bytes == 0
        assert engine.statistics.tokens < 500

    def test_leaving_the_block_ends_streams(self, backbone: Backbone) -> None:
        async def read(served: AsyncEngine) -> Event:
            return [event async for event in served.stream(asked(1, new=500))][-1]

        async def everything() -> list[object]:
            async with AsyncEngine(Engine(Scripted(), backbone=backbone, slots=1, max_length=512)) as served:
                reading = [asyncio.create_task(read(served)) for _ in range(2)]
                await asyncio.sleep(0.05)
            return await asyncio.wait_for(asyncio.gather(*reading, return_exceptions=True), 20)

        ends = asyncio.run(everything())
        assert [each.reason for each in ends if isinstance(each, Finished)] == ["cancelled", "cancelled"]

    def test_who_gives_up_while_submitting_disturbs_nobody(self, backbone: Backbone) -> None:
        class Slow(Scripted):
            def recur(self, state: State, running: Running, kv: KeyValues) -> tuple[State, Tensor]:
                time.sleep(0.05)
                return super().recur(state, running, kv)

        async def said(served: AsyncEngine, request: Request) -> list[int]:
            return [t async for event in served.stream(request) if isinstance(event, Committed) for t in event.tokens]

        engine = Engine(Slow(), backbone=backbone, slots=4, max_length=32)

        async def everything() -> list[list[int]]:
            async with AsyncEngine(engine) as served:
                first = asyncio.create_task(said(served, asked(1, new=6)))
                await asyncio.sleep(0.1)
                for _ in range(3):
                    gone = asyncio.create_task(said(served, asked(2, new=20)))
                    await asyncio.sleep(0.01)
                    gone.cancel()
                return [await asyncio.wait_for(first, 20), await said(served, asked(3, new=6))]

        assert asyncio.run(everything()) == [answer(asked(1, new=6)), answer(asked(3, new=6))]
        assert engine.statistics.tokens < 12 + 20

    def test_what_is_asked_while_it_breaks_is_answered(self, backbone: Backbone) -> None:
        async def everything() -> list[object]:
            async with AsyncEngine(Engine(Faulty(), backbone=backbone, slots=1)) as served:
                first = asyncio.ensure_future(anext(served.stream(asked(1))))
                await asyncio.sleep(0.05)
                second, gone = (asyncio.ensure_future(anext(served.stream(asked(each)))) for each in (2, 3))
                await asyncio.sleep(0.01)
                gone.cancel()
                return await asyncio.wait_for(asyncio.gather(first, second, return_exceptions=True), 20)

        assert [str(each) for each in asyncio.run(everything())] == ["out of order"] * 2

    def test_refusals_reach_the_one_who_asked(self, backbone: Backbone) -> None:
        async def everything() -> None:
            async with AsyncEngine(Engine(Scripted(), backbone=backbone)) as served:
                with pytest.raises(PromptError, match="empty"):
                    await anext(served.stream(Request(())))
                assert [event async for event in served.stream(asked(2, new=1))]
            with pytest.raises(DeepenError, match=r"stopped|doesn't run"):
                await anext(served.stream(asked(1)))

        asyncio.run(everything())

    def test_a_fault_of_the_engine_reaches_everybody(self, backbone: Backbone) -> None:
        async def ask(served: AsyncEngine) -> None:
            with pytest.raises(RuntimeError, match="out of order"):
                async for _ in served.stream(asked(1)):
                    pass

        async def everything() -> None:
            async with AsyncEngine(Engine(Faulty(), backbone=backbone)) as served:
                await asyncio.gather(ask(served), ask(served))
                with pytest.raises(RuntimeError, match="out of order"):
                    await anext(served.stream(asked(1)))

        asyncio.run(everything())
