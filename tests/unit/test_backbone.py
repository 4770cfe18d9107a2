"""Attach points, passes over a committed prefix, and the cache that holds it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from deepen.backbones import tiny
from deepen.backbones.cache import PrefixCache
from deepen.backbones.entries import write_at_once
from deepen.backbones.hf import Backbone
from deepen.backbones.window import PassWindow
from deepen.core.errors import PromptError, RollbackError, UnsupportedBackbone
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.stop import StopConfig
from deepen.nn.attention import KEY_BLOCK

ATTENTION_ONLY = ("llama", "qwen3", "nanochat")
ALL = (*ATTENTION_ONLY, "kimi_linear", "qwen3_next")  # more of the last two in test_recurrence.py
# Short ones, and ones about the length where attention begins to read another block of entries.
lengths_of_prefixes = st.one_of(st.integers(0, 12), st.integers(KEY_BLOCK - 12, KEY_BLOCK + 3))


def attach(name: str, *, packed: bool = False, dtype: torch.dtype = torch.float32) -> Backbone:
    backbone = Backbone.attach(tiny.build(name).to(dtype))
    if packed:
        backbone.pack()
    return backbone


def ids(batch: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, width), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {
            "rope_type": "longrope", "long_factor": [4.0] * 8, "short_factor": [1.0] * 8, "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotary_frequencies_that_change_with_the_pass_are_refused(rope: dict[str, object]) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rope_parameters={"rope_theta": 1e4, **rope},
    )  # fmt: skip
    with pytest.raises(UnsupportedBackbone, match=f"rope_type '{rope['rope_type']}'.*set rope_type to a fixed one"):
        Backbone.attach(LlamaForCausalLM(config))


def test_two_threads_decode_on_one_model() -> None:
    backbone = attach("llama", packed=True)
    decoder, stop = PlainDecoder(backbone), StopConfig(max_new_tokens=12)
    rows = [[[seed, seed + 1, seed + 2]] for seed in range(6)]
    expected = [complete(decoder, each, stop=stop)[0].tokens for each in rows]
    with ThreadPoolExecutor(2) as pool:
        actual = list(pool.map(lambda each: complete(decoder, each, stop=stop)[0].tokens, rows))
    assert actual == expected
    assert backbone.config._attn_implementation != "deepen_pass"


@pytest.fixture(params=ALL)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return attach(request.param)


def test_attach_points(backbone: Backbone) -> None:
    model = backbone.model
    assert backbone.embedding is model.get_input_embeddings()
    assert backbone.head is model.lm_head
    assert backbone.final_norm is model.model.norm
    assert list(backbone.layers) == list(model.model.layers)
    assert backbone.num_layers == model.config.num_hidden_layers
    assert (backbone.hidden_size, backbone.vocab_size) == (model.config.hidden_size, model.config.vocab_size)


def test_a_module_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedBackbone, match="Linear is not a transformers model"):
        Backbone.attach(nn.Linear(2, 2))


def test_a_missing_attach_point_is_named() -> None:
    model = tiny.build("llama")
    del model.model.norm
    with pytest.raises(UnsupportedBackbone, match="one final norm in LlamaModel"):
        Backbone.attach(model)


def test_a_sliding_window_is_refused_by_name() -> None:
    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    backbone = Backbone.attach(MistralForCausalLM(config))
    with pytest.raises(UnsupportedBackbone, match="DynamicSlidingWindowLayer"):
        backbone.new_cache(batch_size=1, capacity=8)


def test_another_architecture_works_by_the_same_rules() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64)).eval()
    backbone = Backbone.attach(model)
    prompt = ids(1, 9) % 64
    with torch.no_grad():
        actual = backbone.run(prompt, backbone.new_cache(batch_size=1, capacity=9))
        torch.testing.assert_close(actual, model(prompt).logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_pass_is_the_models_forward(backbone: Backbone) -> None:
    prompt = ids(2, 20)
    cache = backbone.new_cache(batch_size=2, capacity=20)
    actual = backbone.run(prompt, cache)
    limit = 1e-4 if cache.recurrent_layers else 1e-5
    torch.testing.assert_close(actual, backbone.model(prompt).logits, rtol=limit, atol=limit)


@torch.no_grad()
def test_a_pass_leaves_the_model_as_it_was(backbone: Backbone) -> None:
    before = backbone.model(ids(1, 6)).logits
    implementation = backbone.config._attn_implementation
    backbone.run(ids(1, 6), backbone.new_cache(batch_size=1, capacity=6), edit=lambda index, h: h + 1)
    assert backbone.config._attn_implementation == implementation
    assert not any(layer._forward_hooks for layer in backbone.layers)
    assert torch.equal(backbone.model(ids(1, 6)).logits, before)


@torch.no_grad()
def test_embeddings_may_stand_for_ids(backbone: Backbone) -> None:
    prompt = ids(1, 6)
    by_ids = backbone.run(prompt, backbone.new_cache(batch_size=1, capacity=6))
    by_embeddings = backbone.run(backbone.embedding(prompt), backbone.new_cache(batch_size=1, capacity=6))
    assert torch.equal(by_ids, by_embeddings)


@torch.no_grad()
@given(
    name=st.sampled_from(ALL),
    start=lengths_of_prefixes,
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=6),
)
def test_any_split_into_passes_gives_the_same_logits(name: str, start: int, cuts: list[int]) -> None:
    backbone = attach(name, packed=True)
    cuts = [*([start] if start else []), *cuts]
    prompt = ids(1, sum(cuts))
    whole = backbone.run(prompt, backbone.new_cache(batch_size=1, capacity=sum(cuts)))
    cache = backbone.new_cache(batch_size=1, capacity=sum(cuts))
    parts = []
    for part in prompt.split(cuts, dim=1):
        parts.append(backbone.run(part, cache))
        cache.commit([part.shape[1]])
    split = torch.cat(parts, dim=1)
    if name in ATTENTION_ONLY:
        assert torch.equal(split, whole)
    else:  # its chunked and its one-token kernel sum in different orders
        torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@given(
    name=st.sampled_from(ATTENTION_ONLY),
    lengths=st.lists(lengths_of_prefixes, min_size=1, max_size=4),
    data=st.data(),
)
def test_ragged_rows_equal_the_row_alone(name: str, lengths: list[int], data: st.DataObject) -> None:
    backbone = attach(name, packed=True)
    batch = len(lengths)
    widths = data.draw(st.lists(st.integers(1, 9), min_size=batch, max_size=batch))
    prompt = ids(batch, KEY_BLOCK + 12)
    cache = backbone.new_cache(batch_size=batch, capacity=KEY_BLOCK + 12)
    if max(lengths):
        backbone.run(prompt[:, : max(lengths)], cache, widths=lengths)
        cache.commit(lengths)
    chunk = torch.zeros(batch, max(widths), dtype=torch.long)
    for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        chunk[row, :width] = prompt[row, length : length + width]
    logits = backbone.run(chunk, cache, widths=widths)
    last = backbone.run(chunk, cache, widths=widths, keep="last")
    for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        alone = backbone.run(
            prompt[row : row + 1, : length + width], backbone.new_cache(batch_size=1, capacity=length + width)
        )
        assert torch.equal(logits[row, :width], alone[0, length:])
        assert torch.equal(last[row, 0], alone[0, -1])


def fill(backbone: Backbone, prompt: torch.Tensor, capacity: int) -> PrefixCache:
    cache = backbone.new_cache(batch_size=prompt.shape[0], capacity=capacity)
    backbone.run(prompt, cache)
    cache.commit([prompt.shape[1]] * prompt.shape[0])
    return cache


def assert_holds(cache: PrefixCache, backbone: Backbone, rows: list[torch.Tensor]) -> None:
    """The cache equals, bit for bit, a fresh prefill of these committed ids."""
    for row, committed in enumerate(rows):
        assert cache.lengths[row] == len(committed)
        fresh = fill(backbone, committed[None], cache.capacity)
        for layer in range(backbone.num_layers):
            for kept, expected in zip(cache.entries(layer, row), fresh.entries(layer, 0), strict=True):
                assert torch.equal(kept, expected)


@torch.no_grad()
@given(name=st.sampled_from(ATTENTION_ONLY), width=st.integers(1, 12), data=st.data())
def test_after_any_commit_the_cache_equals_a_fresh_prefill(name: str, width: int, data: st.DataObject) -> None:
    backbone = attach(name, packed=True)
    prompt, wrong, after = ids(2, 7), ids(2, width, seed=1), ids(2, 5, seed=2)
    counts = [data.draw(st.integers(0, width)) for _ in range(2)]
    cache = fill(backbone, prompt, 40)
    backbone.run(wrong, cache)
    cache.commit(counts)
    kept = [torch.cat([prompt[row], wrong[row, : counts[row]]]) for row in range(2)]
    assert_holds(cache, backbone, kept)
    backbone.run(after, cache)
    cache.commit([5, 5])
    assert_holds(cache, backbone, [torch.cat([kept[row], after[row]]) for row in range(2)])


@torch.no_grad()
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=4), st.booleans())
def test_what_one_kernel_writes_is_what_is_written_row_by_row(
    rows: list[tuple[int, int]], has_an_idle_row: bool
) -> None:
    rows = [*rows, (3, 0)] if has_an_idle_row else rows
    offsets, widths = zip(*rows, strict=True)
    window = PassWindow(offsets, widths)
    states = torch.randn(len(rows), 2, window.width, 3)
    one_by_one, at_once = torch.zeros(2, len(rows), 2, 16, 3)
    for row, (offset, width) in enumerate(rows):
        one_by_one[row, :, offset : offset + width] = states[row, :, :width]
    write_at_once(at_once, states, window)
    assert torch.equal(at_once, one_by_one)


def test_a_pass_that_is_not_committed_leaves_no_trace() -> None:
    backbone = attach("llama", packed=True)
    prompt = ids(1, 7)
    cache = fill(backbone, prompt, 30)
    expected = backbone.run(ids(1, 4, seed=2), cache)
    backbone.run(ids(1, 9, seed=3), cache, edit=lambda index, h: torch.full_like(h, 1e6))
    assert torch.equal(backbone.run(ids(1, 4, seed=2), cache), expected)
    assert_holds(cache, backbone, [prompt[0]])


@torch.no_grad()
def test_rollback_returns_to_the_snapshot_and_never_forward() -> None:
    backbone = attach("llama", packed=True)
    prompt = ids(1, 7)
    cache = fill(backbone, prompt, 30)
    early = cache.snapshot()
    backbone.run(ids(1, 6, seed=1), cache)
    cache.commit([6])
    late = cache.snapshot()
    cache.rollback(early)
    assert_holds(cache, backbone, [prompt[0]])
    with pytest.raises(RollbackError, match=r"can't return from \[7\] to \[13\] tokens"):
        cache.rollback(late)


@torch.no_grad()
def test_a_snapshot_of_what_is_no_longer_there_is_refused() -> None:
    backbone = attach("llama")
    prompt = ids(2, 7)
    cache = fill(backbone, prompt, 30)
    early = cache.snapshot()
    backbone.run(ids(2, 4, seed=1), cache)
    cache.commit([2, 2])
    middle = cache.snapshot()
    cache.rollback(early)
    backbone.run(ids(2, 4, seed=2), cache)
    cache.commit([4, 4])  # longer than `middle`, but other tokens stand there now
    with pytest.raises(RollbackError, match=r"tokens that were dropped"):
        cache.rollback(middle)
    cache.rollback(early)
    assert_holds(cache, backbone, list(prompt))
    cache.keep_rows([1, 0])
    with pytest.raises(RollbackError, match=r"of rows or tokens that were dropped"):
        cache.rollback(early)
    with pytest.raises(RollbackError, match=r"the snapshot is of another cache"):
        cache.rollback(fill(backbone, prompt, 30).snapshot())


@torch.no_grad()
def test_dropping_rows_keeps_the_others() -> None:
    backbone = attach("llama", packed=True)
    prompt = ids(3, 7)
    cache = fill(backbone, prompt, 30)
    cache.keep_rows([2, 0])
    assert_holds(cache, backbone, [prompt[2], prompt[0]])


@torch.no_grad()
def test_misuse_of_a_cache_is_an_error() -> None:
    backbone = attach("llama")
    cache = fill(backbone, ids(1, 7), 10)
    with pytest.raises(RollbackError, match="nothing to commit"):
        cache.commit([1])
    with pytest.raises(PromptError, match=r"row 0 would hold 11 tokens.*opened for 10"):
        backbone.run(ids(1, 4), cache)
    backbone.run(ids(1, 3), cache)
    with pytest.raises(RollbackError, match="can't commit 4 tokens of a pass over 3"):
        cache.commit([4])
    with pytest.raises(RollbackError, match="2 counts for a pass over 1 rows"):
        cache.commit([1, 1])
    with pytest.raises(RollbackError, match=r"a pass over \[1, 1\] tokens of 1 rows"):
        backbone.run(ids(2, 1), cache)
    with pytest.raises(RollbackError, match=r"a pass over \[-1\] tokens of 1 rows"):
        backbone.run(ids(1, 1), cache, widths=[-1])
    for tokens, widths in ((ids(1, 1), [2]), (ids(1, 0), [0])):
        with pytest.raises(PromptError, match="can't read"):
            backbone.run(tokens, cache, widths=widths)
    with pytest.raises(PromptError, match="exceed this model's context of 512"):
        backbone.new_cache(batch_size=1, capacity=513)


@torch.no_grad()
def test_an_edit_reaches_the_layers_above_it(backbone: Backbone) -> None:
    prompt = ids(1, 6)
    seen: dict[int, torch.Tensor] = {}

    def edit(index: int, h: torch.Tensor) -> torch.Tensor:
        seen[index] = h
        return h.clone().index_fill_(1, torch.tensor([5]), 0.5) if index == 1 else h

    plain = backbone.run(prompt, backbone.new_cache(batch_size=1, capacity=6))
    edited = backbone.run(prompt, backbone.new_cache(batch_size=1, capacity=6), edit=edit)
    assert sorted(seen) == list(range(backbone.num_layers))
    # Experts are grouped by the tokens that visit them, so there a neighbour's edit can change the rounding.
    torch.testing.assert_close(edited[:, :5], plain[:, :5], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(edited[:, 5], plain[:, 5], atol=1e-2)


@torch.no_grad()
def test_bytes_are_those_of_the_stores() -> None:
    backbone = attach("llama")
    cache = backbone.new_cache(batch_size=2, capacity=40)
    assert cache.num_bytes() == 0
    backbone.run(ids(2, 7), cache)
    heads, head_dim = backbone.config.num_key_value_heads, 16
    assert cache.num_bytes() == 2 * 2 * backbone.num_layers * heads * KEY_BLOCK * head_dim * 4


class TestAddedStore:
    """Entries of a method's own module: here one head that holds each token's id and where it stood in its pass."""

    def read(self, cache: PrefixCache, tokens: list[list[int]], counts: list[int]) -> None:
        """A pass over these tokens that no model makes, of which `counts` are committed."""
        widths = [len(row) for row in tokens]
        cache.begin(widths)
        padded = torch.tensor([[*row, *[-1] * (max(widths) - len(row))] for row in tokens], dtype=torch.float32)
        entries = padded[:, None, :, None]
        cache.added_store("own").update(entries, entries + 0.5)
        cache.end()
        cache.commit(counts)

    def held(self, cache: PrefixCache) -> list[list[float]]:
        place = cache.layers.index(cache.added_store("own"))
        return [cache.entries(place, row)[0].flatten().tolist() for row in range(len(cache.lengths))]

    @given(st.data())
    def test_it_holds_what_was_committed(self, data: st.DataObject) -> None:
        cache = attach("llama").new_cache(batch_size=2, capacity=64)
        rows: list[list[float]] = [[], []]
        for _ in range(data.draw(st.integers(1, 6))):
            tokens = [data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=4)) for _ in range(2)]
            counts = [data.draw(st.integers(0, len(row))) for row in tokens]
            self.read(cache, tokens, counts)
            rows = [[*row, *new[:count]] for row, new, count in zip(rows, tokens, counts, strict=True)]
            assert self.held(cache) == rows

    def test_it_is_taken_back_and_dropped_with_the_others(self) -> None:
        cache = attach("llama").new_cache(batch_size=2, capacity=64)
        self.read(cache, [[1, 2], [3]], [2, 1])
        snapshot = cache.snapshot()
        self.read(cache, [[4], [5, 6]], [1, 2])
        cache.rollback(snapshot)
        assert self.held(cache) == [[1, 2], [3]]
        cache.keep_rows([1])
        self.read(cache, [[7]], [1])
        assert self.held(cache) == [[3, 7]]

    def test_it_can_not_begin_in_the_middle(self) -> None:
        backbone = attach("llama")
        cache = fill(backbone, ids(1, 5), 32)
        cache.begin([1])
        with pytest.raises(RollbackError, match=r"entries of own are to be kept, but this cache holds \[5\] tokens"):
            cache.added_store("own")
        with pytest.raises(RollbackError, match="entries of own"):
            backbone.new_cache(batch_size=1, capacity=4).added_store("own")

    def test_it_stands_behind_the_layers(self) -> None:
        backbone = attach("llama")
        cache = backbone.new_cache(batch_size=1, capacity=16)
        assert cache.window is None
        self.read(cache, [[1]], [1])
        assert len(cache.layers) == backbone.num_layers + 1 and cache.recurrent_layers == ()
        assert cache.window is None


@pytest.mark.parametrize("name", [*tiny.NAMES, "gpt2"])
def test_logits_of_given_hidden_states_are_the_models(name: str) -> None:
    """Whatever it does behind its decoder: nanochat caps its logits."""
    if name == "gpt2":
        sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
        model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()
    else:
        model = tiny.build(name)
    if name == "nanochat":
        model.config.final_logit_softcapping = 0.5
    backbone, given_ids = Backbone.attach(model), ids(2, 5) % 64
    decoder = model.get_decoder()
    with torch.no_grad():
        hidden = decoder(given_ids, use_cache=False).last_hidden_state
        expected = model(given_ids, use_cache=False).logits
        assert torch.equal(backbone.logits_of(hidden), expected)
        assert "forward" not in vars(decoder)
        assert torch.equal(model(given_ids, use_cache=False).logits, expected)
