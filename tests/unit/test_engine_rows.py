"""The engine over decoders whose rows come and go: the answers of each request alone, and the memory that is told."""

from functools import cache
from typing import Any

import pytest
from effort import share_of_profile
from hypothesis import given
from hypothesis import strategies as st

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.core.errors import CannotJoin, PromptError
from deepen.core.method import Joining
from deepen.engine.engine import Engine
from deepen.engine.request import Request
from deepen.generate.events import Committed, RowResult
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import SamplingConfig
from deepen.generate.stop import StopConfig
from deepen.methods.chunk.model import ChunkRefineWrapper
from deepen.nn.attention import KEY_BLOCK, round_up

KINDS = ("llama", "kimi_linear")
REQUESTS = st.lists(
    st.builds(
        Request,
        ids=st.one_of(
            st.lists(st.integers(0, 255), min_size=1, max_size=20),
            st.builds(
                lambda unit, times: unit * times, st.lists(st.integers(0, 9), min_size=1, max_size=3), st.just(9)
            ),
        ).map(tuple),
        sampling=st.one_of(
            st.just(SamplingConfig()), st.builds(SamplingConfig, temperature=st.just(0.8), seed=st.integers(0, 9))
        ),
        stop=st.builds(StopConfig, max_new_tokens=st.integers(0, 9)),
    ),
    min_size=1,
    max_size=6,
)


@cache
def backbone(kind: str) -> Backbone:
    attached = Backbone.attach(tiny.build(kind).requires_grad_(False))
    attached.pack()
    return attached


def alone(kind: str, request: Request) -> RowResult:
    decoder = PlainDecoder(backbone(kind))
    return complete(decoder, [request.ids], sampling=[request.sampling], stop=request.stop)[0]


@share_of_profile(3, least=12)
@given(st.sampled_from(KINDS), REQUESTS, st.integers(1, 5), st.integers(1, 30), st.data())
def test_answers_are_those_of_each_request_alone(
    kind: str, requests: list[Request], slots: int, prompt_width: int, data: st.DataObject
) -> None:
    engine = Engine(
        PlainDecoder(backbone(kind)),
        backbone=backbone(kind),
        slots=slots,
        max_length=40,
        prompt_width=prompt_width,
    )
    results = {engine.submit(request): RowResult() for request in requests}
    while engine.is_busy:
        if data.draw(st.integers(0, 9)) == 0:
            engine.cancel(data.draw(st.sampled_from(sorted(results))))
        for event in engine.step():
            results[event.row].add(event)
        assert engine.num_bytes <= engine.most_bytes
    assert engine.num_bytes == 0
    for got, request in zip(results.values(), requests, strict=True):
        wanted = alone(kind, request)
        if got.reason == "cancelled":
            assert got.tokens == wanted.tokens[: len(got.tokens)]
        else:
            assert (got.tokens, got.reason) == (wanted.tokens, wanted.reason)


class Watched:
    """A decoder whose caches are remembered, to count what they have allocated."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.decodings: list[Any] = []
        for name in ("advance", "drop", "feed", "keep", "state_bytes", "check_joining"):
            setattr(self, name, getattr(decoder, name))

    def open(self, prompt: Any) -> Any:
        self.decodings.append(self._decoder.open(prompt))
        return self.decodings[-1]

    def join(self, decoding: Any, other: Any, *, most_rows: int) -> None:
        self._decoder.join(decoding, other, most_rows=most_rows)
        self.decodings.remove(other)

    def num_bytes(self) -> int:
        return sum(decoding.cache.num_bytes() for decoding in self.decodings)


def test_bytes_are_those_of_the_caches() -> None:
    watched = Watched(PlainDecoder(backbone("llama")))
    assert isinstance(watched, Joining)
    engine = Engine(watched, backbone=backbone("llama"), slots=3, max_length=40, prompt_width=8)
    for length in (9, 3, 30, 5):
        engine.submit(Request(tuple(range(length)), stop=StopConfig(max_new_tokens=6)))
    told = set()
    while engine.num_waiting or engine.num_answered == 3 or not told:
        engine.step()
        assert engine.num_bytes == watched.num_bytes()
        told.add(engine.num_bytes)
    row = PlainDecoder(backbone("llama")).state_bytes(context=round_up(40, KEY_BLOCK))
    assert told <= {row, 3 * row, 4 * row}
    assert engine.most_bytes == 4 * row


def test_a_request_that_is_too_long() -> None:
    engine = Engine(PlainDecoder(backbone("llama")), backbone=backbone("llama"), slots=2, max_length=20)
    with pytest.raises(PromptError, match="may hold 20 tokens, and this one 21"):
        engine.submit(Request(tuple(range(12)), stop=StopConfig(max_new_tokens=9)))


def test_cancelled_while_its_prompt_is_read() -> None:
    decoder = PlainDecoder(backbone("llama"))
    engine = Engine(decoder, backbone=backbone("llama"), slots=2, max_length=60, prompt_width=4)
    gone = engine.submit(Request(tuple(range(30)), stop=StopConfig(max_new_tokens=4)))
    engine.step()
    engine.cancel(gone)
    request = Request(tuple(range(40, 60)), stop=StopConfig(max_new_tokens=4))
    number, said = engine.submit(request), []
    while engine.is_busy:
        said += [t for e in engine.step() if isinstance(e, Committed) and e.row == number for t in e.tokens]
    assert said == alone("llama", request).tokens


@pytest.mark.parametrize(("rows", "slots"), [(1, 1), (2, 1), (3, 2)])
def test_a_prompt_that_is_read_has_room_beside_several_rows(rows: int, slots: int) -> None:
    decoder = PlainDecoder(backbone("llama"))
    memory = rows * decoder.state_bytes(context=128)
    engine = Engine(decoder, backbone=backbone("llama"), slots=9, max_length=100, memory_bytes=memory)
    for place in range(4):
        engine.submit(Request((place,), stop=StopConfig(max_new_tokens=9)))
    engine.step()
    assert engine.num_answered == slots
    assert engine.most_bytes <= memory


def test_memory_says_how_many_rows_there_are() -> None:
    decoder = PlainDecoder(backbone("llama"))
    row = decoder.state_bytes(context=128)
    engine = Engine(decoder, backbone=backbone("llama"), slots=9, max_length=100, memory_bytes=4 * row)
    for place in range(6):
        engine.submit(Request((place,), stop=StopConfig(max_new_tokens=9)))
    engine.step()
    assert (engine.num_answered, engine.num_waiting) == (3, 3)


class TestChunks:
    """Exact mode: the base's tokens in fewer passes, rows at different passes."""

    @pytest.mark.parametrize("draft", ["lookup", "jacobi", "mask", "auto"])
    def test_tokens_are_the_base_s(self, draft: str) -> None:
        model = ChunkRefineWrapper(backbone("llama").model, recursive_enabled=True, draft=draft, chunk_width=8)
        ids = [(1, 2, 3) * 8, (7,), (5, 6) * 5, tuple(range(40))]
        requests = [Request(each, stop=StopConfig(max_new_tokens=20)) for each in ids]
        engine = Engine(model, backbone=model.backbone, slots=3, max_length=100)
        events = list(engine.stream(requests))
        plain = PlainDecoder(backbone("llama"))
        for row, request in enumerate(requests):
            said = [t for event in events if isinstance(event, Committed) and event.row == row for t in event.tokens]
            assert said == complete(plain, [request.ids], stop=request.stop)[0].tokens
        if draft == "lookup":
            assert max(len(event.tokens) for event in events if isinstance(event, Committed)) > 1

    def test_tokens_behind_an_end_are_not_told(self) -> None:
        """A draft that is accepted may go beyond the id that ends a row."""
        model = ChunkRefineWrapper(backbone("llama").model, recursive_enabled=True, draft="lookup", chunk_width=8)
        ids = (1, 2, 3) * 8
        full = complete(PlainDecoder(backbone("llama")), [ids], stop=StopConfig(max_new_tokens=40))[0].tokens
        for eos in sorted(set(full)):
            stop = StopConfig(max_new_tokens=40, eos_ids=(eos,))
            engine = Engine(model, backbone=model.backbone, slots=2, max_length=100)
            got = engine.complete([Request(ids, stop=stop)])[0]
            assert (got.tokens, got.reason) == (full[: full.index(eos) + 1], "eos")

    def test_a_prompt_in_pieces_leaves_room_for_drafts(self) -> None:
        """As few passes as of a prompt read at once."""
        model = ChunkRefineWrapper(backbone("llama").model, recursive_enabled=True, draft="lookup", chunk_width=8)
        request = Request((1, 2, 3) * 8, stop=StopConfig(max_new_tokens=20))
        passes = {}
        for width in (256, 5):
            engine = Engine(model, backbone=model.backbone, slots=1, max_length=100, prompt_width=width)
            passes[width] = engine.complete([request])[0].passes
        assert passes[5] == passes[256] < 20

    def test_refined_mode_is_refused_at_once(self) -> None:
        model = ChunkRefineWrapper(backbone("llama").model, recursive_enabled=True, commit_mode="refined")
        with pytest.raises(CannotJoin, match="commit_mode"):
            Engine(model, backbone=model.backbone)
