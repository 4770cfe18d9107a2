"""Exact mode gives the base's own output, whatever the sidecar holds and wherever drafts come from."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any

import pytest
import torch
from effort import share_of_profile
from hypothesis import given
from hypothesis import strategies as st

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone, LayerOutputs
from deepen.core.errors import ConfigError, PromptError
from deepen.core.types import Advance, Batch, Prompt, RowAdvance
from deepen.data.tokenizer import byte_tokenizer
from deepen.generate.drafts import Draft
from deepen.generate.events import RowResult
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.generate.scoring import score_at_once
from deepen.generate.stop import StopConfig
from deepen.methods.chunk import decoding as decoding_module
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.decoding import ExactDecoder
from deepen.methods.chunk.drafter import GoesOn, ShallowDrafter
from deepen.methods.chunk.model import ChunkRefineWrapper
from deepen.methods.chunk.modules import MaskToken

BASES = ("llama", "qwen3", "nanochat")
DRAFTS = ("ar", "lookup", "jacobi", "mask", "auto", "shallow", "auto with a drafter")
DRAFTER = {"drafter_hidden": 24, "draft_vocab": 200}
NOISE_STD = 5.0
TOKENIZER = byte_tokenizer()


@cache
def backbone(name: str) -> Backbone:
    attached = Backbone.attach(tiny.build(name).requires_grad_(False))
    attached.pack()
    return attached


@cache
def wrapper(
    name: str, *, noise: bool, draft: str, chunk_width: int, policy: str = "keep_kda_recurrent_reset_mla"
) -> ChunkRefineWrapper:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = ChunkRefineWrapper(
            backbone(name).model, recursive_enabled=True, chunk_width=chunk_width, d_state=16,
            gate_hidden=16, layers_to_refine=(1, 3), cache_reset_policy=policy, **of_draft(draft),
        )  # fmt: skip
        if noise:
            for tensor in model.saved_state().values():
                if tensor.is_floating_point():
                    tensor.normal_(std=NOISE_STD)
    return model


def of_draft(draft: str) -> dict[str, Any]:
    """The fields that say so."""
    source = draft.removesuffix(" with a drafter")
    return {"draft": source, **(DRAFTER if source == "shallow" or source != draft else {})}


prompts = st.lists(st.integers(0, 255), min_size=1, max_size=40)
# Text that repeats itself, so that copied drafts are often accepted.
loops = st.builds(lambda unit, times: unit * times, st.lists(st.integers(0, 255), min_size=1, max_size=6), st.just(5))
samplings = st.one_of(
    st.just(SamplingConfig()),
    st.builds(SamplingConfig, repetition_penalty=st.sampled_from([1.1, 1.7])),
    st.builds(
        SamplingConfig,
        temperature=st.sampled_from([0.2, 0.8, 1.5]),
        top_k=st.sampled_from([0, 5]),
        top_p=st.sampled_from([1.0, 0.8]),
        min_p=st.sampled_from([0.0, 0.05]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        seed=st.integers(0, 2**32),
    ),
)
stops = st.builds(
    StopConfig,
    max_new_tokens=st.integers(0, 40),
    eos_ids=st.sampled_from([(), (258,), tuple(range(0, 256, 9))]),
    stop_strings=st.sampled_from([(), ("a",), ("\x01", "ab")]),
)


def outcome(results: Sequence[RowResult]) -> list[tuple[list[int], str, str | None]]:
    return [(result.tokens, result.text, result.reason) for result in results]


@given(
    name=st.sampled_from(BASES),
    noise=st.booleans(),
    draft=st.sampled_from(DRAFTS),
    chunk_width=st.one_of(st.integers(1, 16), st.integers(1, 128)),
    policy=st.sampled_from(["keep_kda_recurrent_reset_mla", "reset_all"]),
    rows=st.one_of(
        st.lists(st.one_of(prompts, loops), min_size=1, max_size=3),
        st.lists(st.one_of(prompts, loops), min_size=8, max_size=8),
    ),
    sampling=samplings,
    stop=stops,
)
def test_any_sidecar_any_draft_gives_the_plain_output(
    name: str,
    noise: bool,
    draft: str,
    chunk_width: int,
    policy: str,
    rows: list[list[int]],
    sampling: SamplingConfig,
    stop: StopConfig,
) -> None:
    options = {"sampling": sampling, "stop": stop, "tokenizer": TOKENIZER}
    plain = complete(PlainDecoder(backbone(name)), rows, **options)
    model = wrapper(name, noise=noise, draft=draft, chunk_width=chunk_width, policy=policy)
    exact = complete(model, rows, **options)
    assert outcome(exact) == outcome(plain)
    for result in exact:
        assert result.passes <= max(len(result.tokens), 1) or policy == "reset_all"
        assert all(count <= chunk_width for count in result.commits)


@share_of_profile(4, least=15)
@given(name=st.sampled_from(BASES), draft=st.sampled_from(DRAFTS), chunk_width=st.integers(1, 64), row=prompts)
def test_in_float64_too(name: str, draft: str, chunk_width: int, row: list[int]) -> None:
    base = Backbone.attach(_double(name))
    model = ChunkRefineWrapper(
        base.model, recursive_enabled=True, chunk_width=chunk_width, d_state=16, **of_draft(draft)
    )
    stop = StopConfig(max_new_tokens=12)
    assert complete(model, [row], stop=stop)[0].tokens == complete(PlainDecoder(base), [row], stop=stop)[0].tokens


@cache
def _double(name: str) -> torch.nn.Module:
    return tiny.build(name, dtype=torch.float64)


@share_of_profile(10, least=8)
@given(
    name=st.sampled_from(BASES),
    rows=st.lists(st.one_of(prompts, loops), min_size=2, max_size=4),
    draft=st.sampled_from(DRAFTS),
    data=st.data(),
)
def test_a_row_depends_on_neither_batch_mates_nor_order(
    name: str, rows: list[list[int]], draft: str, data: st.DataObject
) -> None:
    model = wrapper(name, noise=True, draft=draft, chunk_width=8)
    samplings = [SamplingConfig(temperature=0.7, seed=data.draw(st.integers(0, 9))) for _ in rows]
    stop = StopConfig(max_new_tokens=12)
    together = complete(model, rows, sampling=samplings, stop=stop)
    order = data.draw(st.permutations(range(len(rows))))
    reordered = complete(model, [rows[i] for i in order], sampling=[samplings[i] for i in order], stop=stop)
    for place, index in enumerate(order):
        alone = complete(model, [rows[index]], sampling=[samplings[index]], stop=stop)[0]
        assert alone.tokens == together[index].tokens == reordered[place].tokens


@share_of_profile(4, least=15)
@given(name=st.sampled_from(BASES), row=st.one_of(prompts, loops), draft=st.sampled_from(DRAFTS))
def test_after_every_commit_the_cache_equals_a_fresh_prefill(name: str, row: list[int], draft: str) -> None:
    model, base = wrapper(name, noise=True, draft=draft, chunk_width=8), backbone(name)
    decoding = model.open(Prompt((tuple(row),), 10))
    sampler = BatchSampler([SamplingConfig()])
    while decoding.room(0) > 0:
        model.advance(decoding, sampler)
        committed = decoding.rows[0][:-1]
        assert decoding.cache.lengths == [len(committed)]
        fresh = base.new_cache(batch_size=1, capacity=len(committed) + 1)
        if committed:
            base.run(torch.tensor([committed]), fresh)
            fresh.commit([len(committed)])
            for layer in range(base.num_layers):
                for held, expected in zip(decoding.cache.entries(layer, 0), fresh.entries(layer, 0), strict=True):
                    assert torch.equal(held, expected)


def test_reset_all_decodes_from_a_cache_of_its_own_each_time() -> None:
    model = wrapper("llama", noise=False, draft="lookup", chunk_width=8, policy="reset_all")
    decoding = model.open(Prompt(((1, 2, 3),), 10))
    before = decoding.cache
    model.advance(decoding, BatchSampler([SamplingConfig()]))
    assert decoding.cache is not before and decoding.cache.lengths == [len(decoding.rows[0]) - 1]


def test_copied_drafts_are_accepted_where_text_repeats() -> None:
    model = wrapper("nanochat", noise=False, draft="lookup", chunk_width=8)
    result = complete(model, [[1, 2, 3] * 6], stop=StopConfig(max_new_tokens=40))[0]
    assert result.accepted["lookup"] > 0
    assert result.tokens_per_pass > 1.2


@pytest.mark.parametrize("name", BASES)
def test_leftovers_are_what_the_base_predicted_behind_its_last_draft(name: str) -> None:
    """The plain oracle reads the whole text and the draft anew, and keeps what the base says of each place."""
    width, rows = 6, [[5, 9, 2, 7], [1, 2, 3] * 6, [250]]
    model, base = wrapper(name, noise=False, draft="jacobi", chunk_width=width), backbone(name)
    decoding, sampler = model.open(Prompt(tuple(map(tuple, rows)), 20)), BatchSampler([SamplingConfig()] * 3)
    books: list[dict[int, int]] = [{} for _ in rows]
    left_over = 0
    while all(decoding.room(row) > width for row in range(3)):
        before = [list(ids) for ids in decoding.rows]
        expected = [
            [book.get(place, ids[-1]) for place in range(len(ids), len(ids) + width - 1)]
            for ids, book in zip(before, books, strict=True)
        ]
        left_over += sum(len(ids) in book for ids, book in zip(before, books, strict=True))
        drafts = [guess.propose(ids, width - 1) for guess, ids in zip(decoding.guesses, before, strict=True)]
        assert [list(draft.tokens) for draft in drafts] == expected
        gained = model.advance(decoding, sampler).rows
        assert {(row.source, row.drafted) for row in gained} == {("jacobi", width - 1)}
        for row, (ids, draft) in enumerate(zip(before, expected, strict=True)):
            text = torch.tensor([[*ids, *draft]])
            with torch.no_grad():
                logits = base.run(text, base.new_cache(batch_size=1, capacity=text.shape[1]))
            books[row] = dict(enumerate(logits[0].argmax(dim=-1).tolist(), start=1))
    assert left_over > 3


def test_leftovers_are_accepted_where_text_becomes_predictable() -> None:
    model = wrapper("nanochat", noise=False, draft="jacobi", chunk_width=8)
    result = complete(model, [[1, 2, 3] * 6], stop=StopConfig(max_new_tokens=40))[0]
    assert result.accepted["jacobi"] > 0
    assert result.passes < len(result.tokens)


def timed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """By this clock all passes take as long, so that width costs nothing."""
    ticks = count()
    monkeypatch.setattr(decoding_module, "perf_counter", lambda: float(next(ticks)))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_auto_fills_slots_beside_copies_where_width_costs_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timed_alike(monkeypatch)
    rows, stop = [[5, 6, 7, 8], [1, 2, 3] * 6, [200]], StopConfig(max_new_tokens=150)
    plain = complete(PlainDecoder(backbone(name)), rows, stop=stop)
    exact = complete(wrapper(name, noise=True, draft="auto", chunk_width=8), rows, stop=stop)
    assert outcome(exact) == outcome(plain)
    assert sum(result.drafted["mask"] for result in exact) > 0
    assert sum(result.drafted["lookup"] for result in exact) > 0


def advances_of_a_prophet(prompt: list[int], num_new: int, draft: str) -> list[RowAdvance]:
    """What a sidecar commits whose slots know the tokens that the base would have there; W is 8."""
    base = backbone("llama")
    truth = prompt + complete(PlainDecoder(base), [prompt], stop=StopConfig(max_new_tokens=num_new))[0].tokens

    class Foresight(MaskToken):
        def forward(self, embeddings: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
            start = len(decoding.rows[0])
            coming = torch.tensor(truth[start : start + int(slots.sum())])
            return embeddings.masked_scatter(slots[..., None], base.embedding(coming))

    untrained = wrapper("llama", noise=False, draft=draft, chunk_width=8)
    sidecar = replace(untrained._parts(untrained.config), mask_token=Foresight(base.hidden_size))
    decoder = ExactDecoder(base, draft=draft, chunk_width=8, sidecar=sidecar)
    decoding = decoder.open(Prompt((tuple(prompt),), num_new))
    sampler, advances = BatchSampler([SamplingConfig()]), []
    while decoding.room(0) > 0:
        advances += decoder.advance(decoding, sampler).rows
    assert decoding.rows == [truth]
    return advances


def test_slots_propose_each_for_its_own_place() -> None:
    advances = advances_of_a_prophet([5, 6, 7, 8], 45, "mask")
    assert [len(advance.tokens) for advance in advances] == [1, 8] * 5
    assert [advance.accepted for advance in advances] == [0, 7] * 5


def test_auto_finds_a_sidecar_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    timed_alike(monkeypatch)
    advances = advances_of_a_prophet([5, 6, 7, 8], 180, "auto")
    assert sum(advance.accepted for advance in advances if advance.source == "mask") > 80
    assert [len(advance.tokens) for advance in advances[-4:-2]] in ([1, 8], [8, 1])


class Known(ShallowDrafter):
    """One that knows what the base would say, or something else, and is sure of it."""

    def __init__(self, truth: list[int], *, is_right: bool, place: Callable[[], int]) -> None:
        super().__init__(backbone("llama"), hidden=8, read_layers=(3,), num_tokens=200)
        self.num_asked, self.num_drafted = 0, 0
        self._truth, self._shift, self._place = truth, 0 if is_right else 1, place
        base, outputs = backbone("llama"), LayerOutputs((3,))
        with torch.no_grad():
            base.run(torch.tensor([truth]), base.new_cache(batch_size=1, capacity=len(truth)), edit=outputs.read)
        self._outputs = outputs.stacked()[0]

    @property
    def has_learned(self) -> bool:
        return True

    def draft(
        self, tops: torch.Tensor, ids: torch.Tensor, length: int, *, goes_on: GoesOn | None = None
    ) -> list[Draft]:
        # The base's last token was decided and not read yet: it starts from the one before.
        torch.testing.assert_close(tops[0], self._outputs[self._place() - 2])
        assert ids.tolist() == [self._truth[self._place() - 1]]
        sure = [0.9]
        while len(sure) < length and (goes_on is None or goes_on([sure])):
            sure.append(0.9)
        coming = self._truth[self._place() :][: len(sure)]
        tokens = [(token + self._shift) % 256 if self._shift else token for token in coming] + [0] * (
            len(sure) - len(coming)
        )
        self.num_asked, self.num_drafted = self.num_asked + 1, self.num_drafted + len(sure)
        return [Draft(tuple(tokens), "shallow", 0, tuple(sure))]


def decoded_with_a_drafter(num_new: int, draft: str, *, is_right: bool) -> tuple[list[Advance], Known]:
    """What is committed with a drafter that is right, or wrong; W is 8."""
    base, prompt = backbone("llama"), [5, 6, 7, 8]
    truth = prompt + complete(PlainDecoder(base), [prompt], stop=StopConfig(max_new_tokens=num_new))[0].tokens
    known = Known(truth, is_right=is_right, place=lambda: len(decoding.rows[0]))
    model = wrapper("llama", noise=False, draft="shallow", chunk_width=8)
    sidecar = replace(model._parts(model.config), drafter=known)
    decoder = ExactDecoder(base, draft=draft, chunk_width=8, sidecar=sidecar)
    decoding = decoder.open(Prompt((tuple(prompt),), num_new))
    sampler, advances = BatchSampler([SamplingConfig()]), []
    while decoding.room(0) > 0:
        advances.append(decoder.advance(decoding, sampler))
    assert decoding.rows == [truth]
    return advances, known


def test_auto_asks_a_drafter_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    timed_alike(monkeypatch)
    advances, known = decoded_with_a_drafter(120, "auto", is_right=True)
    rows = [advance.rows[0] for advance in advances]
    assert sum(row.accepted for row in rows if row.source == "shallow") > 80
    assert [len(row.tokens) for row in rows[-5:-1]] == [8] * 4
    flops = known.flops_per_start * known.num_asked + known.flops_per_token * known.num_drafted
    assert sum(advance.spent.added_flops for advance in advances) == flops


def test_auto_asks_a_drafter_that_is_wrong_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    timed_alike(monkeypatch)
    advances, known = decoded_with_a_drafter(200, "auto", is_right=False)
    assert 0 < known.num_asked < 25
    assert sum(advance.rows[0].accepted for advance in advances if advance.rows[0].source == "shallow") == 0


def test_the_drafter_alone_drafts_all_that_there_is_room_for() -> None:
    for is_right, gained in ((True, [1, 8, 8, 8, 5]), (False, [1] * 30)):
        advances, known = decoded_with_a_drafter(30, "shallow", is_right=is_right)
        assert [len(advance.rows[0].tokens) for advance in advances] == gained
        assert known.num_asked == len(gained) - 1 - (not is_right)


def test_a_new_drafter_is_left_alone_by_auto() -> None:
    """It would say again what the base has just said."""
    model = wrapper("llama", noise=False, draft="auto with a drafter", chunk_width=8)
    (result,) = complete(model, [[5, 6, 7, 8]], stop=StopConfig(max_new_tokens=60))
    assert result.drafted["shallow"] == 0


def test_a_trained_sidecar_is_what_drafts_come_from() -> None:
    """Slots see the sidecar: other cells and another slot embedding propose other tokens."""

    def proposals(model: ChunkRefineWrapper) -> tuple[int, ...]:
        decoding = model.open(Prompt(((5, 6, 7, 8),), 20))
        model.advance(decoding, BatchSampler([SamplingConfig()]))
        return decoding.pending[0].tokens

    untrained = wrapper("llama", noise=False, draft="mask", chunk_width=8)
    assert proposals(untrained) == proposals(untrained)
    assert len(proposals(untrained)) == 7
    assert proposals(untrained) != proposals(wrapper("llama", noise=True, draft="mask", chunk_width=8))


@torch.no_grad()
def test_untrained_cells_leave_a_pass_bit_equal_and_noisy_ones_do_not() -> None:
    base = backbone("llama")
    tokens = torch.arange(12)[None]
    slots = torch.zeros_like(tokens, dtype=torch.bool)
    slots[:, 4:] = True

    def logits(model: ChunkRefineWrapper | None) -> torch.Tensor:
        edit = None if model is None else lambda layer, h: model.refine_slots(layer, h, slots)
        return base.run(tokens, base.new_cache(batch_size=1, capacity=12), edit=edit)

    clean = logits(None)
    assert torch.equal(logits(wrapper("llama", noise=False, draft="mask", chunk_width=8)), clean)
    noisy = logits(wrapper("llama", noise=True, draft="mask", chunk_width=8))
    assert torch.equal(noisy[:, :4], clean[:, :4])
    assert not torch.allclose(noisy[:, 4:], clean[:, 4:], atol=1e-2)


@torch.no_grad()
def test_one_infinite_slot_leaves_clean_logits_unchanged() -> None:
    base, model = backbone("llama"), wrapper("llama", noise=True, draft="mask", chunk_width=8)
    tokens = torch.arange(12)[None]
    slots = torch.zeros_like(tokens, dtype=torch.bool)
    slots[:, 5] = True

    def poisoned(layer: int, h: torch.Tensor) -> torch.Tensor:
        if layer == 0:
            h = h.clone().index_fill_(1, torch.tensor([5]), float("inf"))
        return model.refine_slots(layer, h, slots)

    clean = base.run(tokens, base.new_cache(batch_size=1, capacity=12))
    edited = base.run(tokens, base.new_cache(batch_size=1, capacity=12), edit=poisoned)
    assert torch.equal(edited[:, :5], clean[:, :5])
    assert edited.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("draft", ["mask", "auto", "shallow", "auto with a drafter"])
def test_no_value_in_a_sidecar_reaches_the_output(draft: str, value: float) -> None:
    rows, stop = [[1, 2, 3] * 4, [5]], StopConfig(max_new_tokens=60)
    plain = complete(PlainDecoder(backbone("llama")), rows, stop=stop)
    names = wrapper("llama", noise=False, draft=draft, chunk_width=8).saved_state()
    for name in names:
        model = ChunkRefineWrapper(
            backbone("llama").model, recursive_enabled=True, chunk_width=8, d_state=16, gate_hidden=16,
            layers_to_refine=(1, 3), **of_draft(draft),
        )  # fmt: skip
        tensor = model.saved_state()[name]
        # Of ids any will do.
        tensor.fill_(value if tensor.is_floating_point() else 7)
        assert outcome(complete(model, rows, stop=stop)) == outcome(plain), name


def test_ids_that_are_none_are_refused() -> None:
    model = wrapper("llama", noise=False, draft="lookup", chunk_width=8)
    for ids in (torch.tensor([1, 2]), torch.tensor([[1.0, 2.0]])):
        with pytest.raises(PromptError, match=r"whole numbers \[B, S\]"):
            model.generate_chunks(ids)
    with pytest.raises(ConfigError, match="seed"):
        model.generate_chunks(torch.tensor([[1, 2]]), seed=None)
    last = model.generate_chunks(torch.tensor([[1], [1]]), max_new_tokens=4, seed=2**64 - 1, temperature=1.0)
    assert torch.equal(last[1:], model.generate_chunks(torch.tensor([[1]]), max_new_tokens=4, seed=0, temperature=1.0))


@pytest.mark.parametrize("name", BASES)
def test_grafting_leaves_the_forward_bit_equal(name: str) -> None:
    model = tiny.build(name)
    tokens = torch.arange(40).view(2, 20)
    before = model(tokens).logits
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    grafted = ChunkRefineWrapper(model, recursive_enabled=True, d_state=8, gate_hidden=8)
    assert grafted.base is model
    assert torch.equal(grafted(tokens).logits, before)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())


def test_disabled_has_no_components_and_passes_through() -> None:
    model = tiny.build("llama")
    disabled = ChunkRefineWrapper(model, RecursiveConfig())
    assert (disabled.refine_cells, disabled.boundary, disabled.latent_token, disabled.mask_token) == (None,) * 4
    assert disabled.saved_state() == {}
    tokens = torch.arange(9)[None]
    assert torch.equal(disabled(tokens).logits, model(tokens).logits)
    stop = StopConfig(max_new_tokens=5)
    plain = complete(PlainDecoder(Backbone.attach(model)), [[1, 2, 3]], stop=stop)
    assert complete(disabled, [[1, 2, 3]], stop=stop)[0].tokens == plain[0].tokens


@given(
    name=st.sampled_from(BASES),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    chunk_width=st.integers(1, 64),
)
def test_scores_through_chunks_are_the_bases_own(name: str, lengths: list[int], chunk_width: int) -> None:
    base = Backbone.attach(_double(name))
    model = ChunkRefineWrapper(base.model, recursive_enabled=True, chunk_width=chunk_width, d_state=8)
    ids = torch.randint(0, 256, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    batch = Batch(ids, torch.tensor(lengths))
    with torch.no_grad():
        expected = score_at_once(base, batch)
    actual = model.score(batch)
    assert torch.equal(actual.scored, expected.scored)
    assert torch.equal(actual.correct, expected.correct)
    torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=1e-10)


def test_generate_chunks_gives_prompt_and_continuation() -> None:
    model = wrapper("llama", noise=True, draft="lookup", chunk_width=8)
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    out = model.generate_chunks(ids, max_new_tokens=9, eos_token_id=None)
    plain = complete(PlainDecoder(backbone("llama")), ids.tolist(), stop=StopConfig(max_new_tokens=9))
    assert torch.equal(out, torch.cat([ids, torch.tensor([row.tokens for row in plain])], dim=1))
    narrower = model.generate_chunks(ids, max_new_tokens=9, chunk_width=2, eos_token_id=None)
    assert torch.equal(narrower, out)
    # An end of sequence in the first row: what follows it is filled with it.
    end = int(out[0, 5])
    ended = model.generate_chunks(ids, max_new_tokens=9, eos_token_id=end)
    length = plain[0].tokens.index(end) + 1
    assert ended[0, 3 : 3 + length].tolist() == plain[0].tokens[:length]
    assert set(ended[0, 3 + length :].tolist()) <= {end}


def test_generate_chunks_reproduces_a_row_by_its_seed() -> None:
    model = wrapper("llama", noise=True, draft="lookup", chunk_width=8)
    ids = torch.tensor([[1, 2, 3], [1, 2, 3]])
    settings = {"max_new_tokens": 12, "temperature": 1.0, "eos_token_id": None}
    both = model.generate_chunks(ids, seed=5, **settings)
    assert not torch.equal(both[0], both[1])
    assert torch.equal(both[1:], model.generate_chunks(ids[1:], seed=6, **settings))
