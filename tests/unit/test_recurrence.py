"""Recurrent layers: any count of a pass's tokens can be committed, and pads and forgotten tokens leave no trace."""

import copy
import gc
import weakref
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import accelerate
import pytest
import torch
from effort import share_of_profile
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import BambaConfig, BambaForCausalLM, Lfm2Config, Lfm2ForCausalLM, PreTrainedModel

from deepen.backbones import tiny
from deepen.backbones.cache import PrefixCache
from deepen.backbones.costs import replay_bytes_per_token, row_state_bytes
from deepen.backbones.hf import Backbone
from deepen.backbones.recurrence import DeltaForward, rebound, stop_using_delta_attention, use_delta_attention
from deepen.core.errors import RollbackError, UnsupportedBackbone
from deepen.nn.kda import BLOCK

RECURRENT = ("kimi_linear", "qwen3_next")
every_model = pytest.mark.parametrize("name", RECURRENT)
# How the state after a part of a pass is had: from its record, or by going back and reading that part alone.
ROLLBACKS = ("replay", "rerun")


@cache
def backbone(name: str, dtype: torch.dtype = torch.float32) -> Backbone:
    attached = Backbone.attach(tiny.build(name, dtype=dtype).requires_grad_(False))
    attached.pack()
    return attached


def ids(batch: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, width), generator=torch.Generator().manual_seed(seed))


class StepByStep:
    """One row read token by token, each pass committed whole: what the cache held after each, and each one's logits."""

    def __init__(self, base: Backbone, row: Tensor) -> None:
        cache = base.new_cache(batch_size=1, capacity=len(row))
        self.base, self.logits, self.states = base, [], [cache.snapshot().states]
        for token in row:
            self.logits.append(base.run(token.view(1, 1), cache)[0, 0])
            cache.commit([1])
            self.states.append(cache.snapshot().states)
        self.cache = cache

    def assert_held(self, cache: PrefixCache, row: int, count: int) -> None:
        """`cache` holds in `row` what was held here after `count` tokens."""
        assert cache.lengths[row] == count
        if not count:
            return
        for layer, then in zip(cache.recurrent_layers, self.states[count], strict=True):
            for now, expected in zip(cache.state(layer), then, strict=True):
                close(now[row], expected[0])
        for layer in set(range(self.base.num_layers)) - set(cache.recurrent_layers):
            for now, expected in zip(cache.entries(layer, row), self.cache.entries(layer, 0), strict=True):
                close(now, expected[:, :count])


def close(actual: Tensor, expected: Tensor) -> None:
    # Both models compute their gates in float32 whatever they are, and that is where the digits end.
    limit = 2e-4 if expected.dtype == torch.float32 else 2e-6
    torch.testing.assert_close(actual, expected, rtol=limit, atol=limit * max(1.0, float(expected.abs().max())))


def read_part(
    base: Backbone, cache: PrefixCache, chunk: Tensor, widths: Sequence[int], counts: Sequence[int], rollback: str
) -> Tensor:
    """A pass over `widths` tokens of which `counts` are committed; its logits."""
    before = cache.snapshot()
    logits = base.run(chunk, cache, widths=widths, whole=rollback == "rerun")
    if rollback == "rerun":
        cache.rollback(before)
        base.run(chunk, cache, widths=counts, whole=True)
    cache.commit(counts)
    return logits


def read(base: Backbone, prompt: Tensor, lengths: Sequence[int], capacity: int) -> PrefixCache:
    cache = base.new_cache(batch_size=len(lengths), capacity=capacity)
    base.run(prompt[:, : max(lengths)], cache, widths=lengths)
    cache.commit(lengths)
    return cache


@torch.no_grad()
@every_model
@pytest.mark.parametrize("rollback", ROLLBACKS)
@pytest.mark.parametrize(
    ("width", "dtype", "step"),
    [
        (1, torch.float64, 1),
        (2, torch.float64, 1),
        (9, torch.float64, 1),
        (BLOCK + 1, torch.float32, 16),
        *(pytest.param(width, torch.float32, 1, marks=pytest.mark.slow) for width in (BLOCK - 1, BLOCK, BLOCK + 1)),
    ],
)
def test_every_count_of_a_pass_can_be_committed(
    name: str, rollback: str, width: int, dtype: torch.dtype, step: int
) -> None:
    """Alone and beside a row of another length that commits another count; the next pass goes on from there."""
    for lengths in ((3, 5), (4,)):
        assert_every_count(backbone(name, dtype), rollback, width, step, lengths)


def assert_every_count(base: Backbone, rollback: str, width: int, step: int, lengths: tuple[int, ...]) -> None:
    after = 2
    rows = ids(len(lengths), max(lengths) + width + after, seed=width)
    steps = [StepByStep(base, row) for row in rows]
    cache = read(base, rows, lengths, rows.shape[1] + 9)
    before = cache.snapshot()
    chunk = torch.stack([row[length : length + width] for row, length in zip(rows, lengths, strict=True)])
    for count in range(0, width + 1, step):
        cache.rollback(before)
        counts = (count, width - count)[: len(lengths)]
        logits = read_part(base, cache, chunk, [width] * len(lengths), counts, rollback)
        starts = [length + count for length, count in zip(lengths, counts, strict=True)]
        going_on = base.run(
            torch.stack([row[start : start + after] for row, start in zip(rows, starts, strict=True)]), cache
        )
        for row, start in enumerate(starts):
            close(logits[row], torch.stack(steps[row].logits[lengths[row] : lengths[row] + width]))
            steps[row].assert_held(cache, row, start)
            close(going_on[row], torch.stack(steps[row].logits[start : start + after]))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "rollback", "batch"),
    [
        ("kimi_linear", "replay", 2),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [("kimi_linear", "rerun", 3), ("qwen3_next", "replay", 3), ("qwen3_next", "rerun", 1)]
        ),
    ],
)
def test_a_hundred_random_commits_in_a_row(name: str, rollback: str, batch: int) -> None:
    base, draw = backbone(name), torch.Generator().manual_seed(3)
    rows = ids(batch, 320)
    steps = [StepByStep(base, row) for row in rows]
    cache = base.new_cache(batch_size=batch, capacity=340)
    for _ in range(100):
        widths = torch.randint(1, 10, (batch,), generator=draw).tolist()
        counts = [int(torch.randint(0, min(4, width) + 1, (1,), generator=draw)) for width in widths]
        chunk = ids(batch, max(widths), seed=9)  # stands at the pads
        for row, (width, length) in enumerate(zip(widths, cache.lengths, strict=True)):
            chunk[row, :width] = rows[row, length : length + width]
        read_part(base, cache, chunk, widths, counts, rollback)
    assert min(cache.lengths) > 100
    for row in range(batch):
        steps[row].assert_held(cache, row, cache.lengths[row])


@torch.no_grad()
@share_of_profile(5, least=10)
@given(
    name=st.sampled_from(RECURRENT),
    rollback=st.sampled_from(ROLLBACKS),
    lengths=st.lists(st.one_of(st.integers(0, 12), st.integers(BLOCK - 2, BLOCK + 2)), min_size=1, max_size=4),
    data=st.data(),
)
def test_ragged_rows_are_each_the_row_alone(name: str, rollback: str, lengths: list[int], data: st.DataObject) -> None:
    base, batch = backbone(name), len(lengths)
    widths = data.draw(st.lists(st.integers(0, 9), min_size=batch, max_size=batch))
    counts = [data.draw(st.integers(0, width)) for width in widths]
    rows = ids(batch, BLOCK + 12)
    cache = base.new_cache(batch_size=batch, capacity=BLOCK + 12)
    if any(lengths):
        base.run(rows[:, : max(lengths)], cache, widths=lengths)
        cache.commit(lengths)
    chunk = ids(batch, max(1, *widths), seed=5)
    for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        chunk[row, :width] = rows[row, length : length + width]
    logits = read_part(base, cache, chunk, widths, counts, rollback)
    for row, (length, width, count) in enumerate(zip(lengths, widths, counts, strict=True)):
        alone = base.new_cache(batch_size=1, capacity=BLOCK + 12)
        if width:
            close(logits[row, :width], base.run(rows[row : row + 1, : length + width], alone)[0, length:])
        if length + count:
            base.run(rows[row : row + 1, : length + count], alone)
            alone.commit([length + count])
        assert_same_row(cache, row, alone)


def assert_same_row(cache: PrefixCache, row: int, alone: PrefixCache) -> None:
    assert cache.lengths[row] == alone.lengths[0]
    if not alone.lengths[0]:
        return
    for layer in cache.recurrent_layers:
        for now, expected in zip(cache.state(layer), alone.state(layer), strict=True):
            close(now[row], expected[0])
    for now, expected in zip(cache.entries(3, row), alone.entries(3, 0), strict=True):
        close(now, expected)


@torch.no_grad()
@every_model
def test_what_stands_at_pads_reaches_nothing(name: str) -> None:
    base = backbone(name)
    rows, widths = ids(2, 9), [4, 9]
    outcomes = []
    for fill in (0.0, 1e4):
        embeddings = base.embedding(rows).clone()
        embeddings[0, 4:] = fill
        cache = base.new_cache(batch_size=2, capacity=20)
        logits = base.run(embeddings, cache, widths=widths)
        cache.commit(widths)
        outcomes.append([logits[0, :4], logits[1], *(part[0] for layer in (0, 1, 2) for part in cache.state(layer))])
    for one, other in zip(*outcomes, strict=True):
        close(one, other)


@torch.no_grad()
@every_model
def test_a_forgotten_pass_leaves_no_trace(name: str) -> None:
    base, rows = backbone(name), ids(2, 12)
    cache = read(base, rows, (7, 7), 40)
    expected = base.run(rows[:, 7:], cache)
    base.run(ids(2, 9, seed=3), cache, edit=lambda layer, h: torch.full_like(h, 1e6))
    assert torch.equal(base.run(rows[:, 7:], cache), expected)
    base.run(ids(2, 9, seed=3), cache)
    cache.commit([0, 0])
    assert torch.equal(base.run(rows[:, 7:], cache), expected)


@torch.no_grad()
@every_model
def test_a_snapshot_can_be_returned_to_more_than_once(name: str) -> None:
    base, rows = backbone(name), ids(2, 12)
    cache = read(base, rows, (7, 7), 40)
    early = cache.snapshot()
    expected = base.run(rows[:, 7:], cache)
    for seed in (1, 2):
        base.run(ids(2, 6, seed=seed), cache)
        cache.commit([6, 2])
        cache.rollback(early)
        assert cache.lengths == [7, 7]
        assert torch.equal(base.run(rows[:, 7:], cache), expected)


@torch.no_grad()
@every_model
def test_dropping_rows_keeps_the_others(name: str) -> None:
    base, rows = backbone(name), ids(3, 12)
    cache = read(base, rows, (7, 4, 6), 40)
    states = [cache.state(layer) for layer in cache.recurrent_layers]
    cache.keep_rows([2, 0])
    assert cache.lengths == [6, 7]
    for layer, before in zip(cache.recurrent_layers, states, strict=True):
        for now, then in zip(cache.state(layer), before, strict=True):
            assert torch.equal(now, then[[2, 0]])


@torch.no_grad()
def test_what_a_cache_refuses_it_says() -> None:
    base, rows = backbone("kimi_linear"), ids(2, 12)
    cache = read(base, rows, (7, 7), 40)
    early = cache.snapshot()
    base.run(rows[:, :2], cache)
    cache.commit([2, 2])
    late = cache.snapshot()
    cache.rollback(early)
    with pytest.raises(RollbackError, match=r"can't return from \[7, 7\] to \[9, 9\] tokens"):
        cache.rollback(late)
    with pytest.raises(RollbackError, match="the snapshot is of another cache"):
        cache.rollback(read(base, rows, (3, 3), 40).snapshot())
    base.run(rows[:, :4], cache, whole=True)
    with pytest.raises(RollbackError, match=r"row 0: can't commit 2 of 4 tokens.*layers 0, 1, 2, which hold a state"):
        cache.commit([2, 4])
    cache.commit([4, 4])
    with pytest.raises(RollbackError, match=r"call PrefixCache\.begin"):
        base.model(rows, past_key_values=cache)
    with pytest.raises(RollbackError, match="changed by commit, rollback, join and keep_rows only"):
        cache.reorder_cache(torch.tensor([1, 0]))
    assert cache.get_seq_length() == 11


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", *RECURRENT])
def test_a_pass_that_broke_off_is_not_committed(name: str) -> None:
    base, rows = backbone(name), ids(2, 12)
    cache = read(base, rows, (7, 7), 40)
    expected = base.run(rows[:, 7:], cache)

    def breaks(layer: int, h: Tensor) -> Tensor:
        if layer == 2:
            raise MemoryError
        return h + 1

    with pytest.raises(MemoryError):
        base.run(rows[:, 7:], cache, edit=breaks)
    with pytest.raises(RollbackError, match="did not come to its end"):
        cache.commit([3, 3])
    assert torch.equal(base.run(rows[:, 7:], cache), expected)
    cache.commit([5, 5])


@torch.no_grad()
def test_no_cache_outlives_its_owner() -> None:
    """It holds most of the memory, and no cycle may keep it until the garbage collector comes by."""
    base = backbone("kimi_linear")
    cache = read(base, ids(2, 7), (7, 7), 40)
    base.run(ids(2, 3), cache)
    held = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert held() is None
    finally:
        gc.enable()


@torch.no_grad()
@every_model
def test_offloaded_layers_are_fetched(name: str) -> None:
    plain, offloaded = tiny.build(name), tiny.build(name)
    for layer in offloaded.model.layers[:3]:
        accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    rows = ids(2, 7)
    logits = [Backbone.attach(model).run(rows, new_cache(model, 2, 9)) for model in (plain, offloaded)]
    assert torch.equal(*logits)
    use_delta_attention(offloaded)
    assert torch.equal(offloaded(rows).logits, logits_with_op(plain, rows))
    stop_using_delta_attention(offloaded)
    assert torch.equal(offloaded(rows).logits, plain(rows).logits)
    later = tiny.build(name)
    use_delta_attention(later)
    accelerate.cpu_offload(later.model.layers[0], execution_device=torch.device("cpu"))
    stop_using_delta_attention(later)
    assert torch.equal(later(rows).logits, plain(rows).logits)


def new_cache(model: PreTrainedModel, batch: int, capacity: int) -> PrefixCache:
    return Backbone.attach(model).new_cache(batch_size=batch, capacity=capacity)


def logits_with_op(model: PreTrainedModel, rows: Tensor) -> Tensor:
    use_delta_attention(model)
    logits = model(rows).logits
    stop_using_delta_attention(model)
    return logits


def test_other_recurrent_layers_are_refused_by_name() -> None:
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }  # fmt: skip
    lfm2 = Lfm2ForCausalLM(Lfm2Config(**sizes, layer_types=["conv", "full_attention"]))
    with pytest.raises(UnsupportedBackbone, match=r"layer 0 is recurrent.*Lfm2ShortConv.*KimiLinearDeltaAttention"):
        Backbone.attach(lfm2)
    bamba = BambaForCausalLM(
        BambaConfig(**sizes, attn_layer_indices=[1], mamba_n_heads=2, mamba_d_head=32, mamba_d_state=16)
    )
    with pytest.raises(UnsupportedBackbone, match=r"layer 0 is recurrent.*BambaMixer"):
        Backbone.attach(bamba)


@torch.no_grad()
@every_model
@pytest.mark.parametrize("whole", [False, True])
def test_bytes_are_those_that_are_held(name: str, whole: bool) -> None:
    base = backbone(name)
    length, width = 128, 8  # a whole block of entries, and of the op, so that nothing is held in reserve
    cache = base.new_cache(batch_size=2, capacity=length)
    base.run(ids(2, length - width), cache)
    cache.commit([50, length - width])
    committed = cache.num_bytes()
    assert committed == 2 * row_state_bytes(base, context=length)
    base.run(ids(2, width), cache, whole=whole)
    # Beside the record, a pass holds the state and window behind its last token.
    held = cache.num_bytes() - committed - 2 * row_state_bytes(base, context=0)
    assert held == 2 * width * (columns_per_token(base) if whole else replay_bytes_per_token(base))
    cache.commit([width, width])
    assert cache.num_bytes() == committed


def columns_per_token(base: Backbone) -> int:
    convolutions = [part for part in base.model.modules() if isinstance(part, torch.nn.Conv1d)]
    assert len(convolutions) == len(base.recurrent_layers)
    return sum(part.in_channels * base.dtype.itemsize for part in convolutions)


@torch.no_grad()
@every_model
def test_a_pass_leaves_the_model_as_it_was(name: str) -> None:
    base = backbone(name)
    before = base.model(ids(1, 6)).logits
    base.run(ids(1, 6), base.new_cache(batch_size=1, capacity=6))
    assert not any(isinstance(vars(part).get("forward"), DeltaForward) for part in base.model.modules())
    assert torch.equal(base.model(ids(1, 6)).logits, before)


@every_model
def test_the_op_under_a_model_of_transformers(name: str) -> None:
    """Forward, all gradients, padded batches and their own cache; and it can be taken away again."""
    theirs, ours = tiny.build(name), tiny.build(name)
    assert use_delta_attention(ours) == 3
    prompt = ids(2, 70)
    mask = torch.ones_like(prompt)
    mask[0, :11] = 0
    outputs = [model(prompt, attention_mask=mask, labels=prompt) for model in (theirs, ours)]
    limit = {"rtol": 5e-3, "atol": 5e-3}  # theirs are the coarser ones
    torch.testing.assert_close(outputs[1].logits[mask == 1], outputs[0].logits[mask == 1], **limit)
    for output in outputs:
        output.loss.backward()
    for (parameter_name, their_parameter), our_parameter in zip(
        theirs.named_parameters(), ours.parameters(), strict=True
    ):
        assert our_parameter.grad is not None and their_parameter.grad is not None, parameter_name
        error = (our_parameter.grad - their_parameter.grad).norm() / their_parameter.grad.norm().clamp(min=1e-6)
        assert error < 2e-2, parameter_name
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(
        ours.generate(prompt, attention_mask=mask, **options), theirs.generate(prompt, attention_mask=mask, **options)
    )
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        assert torch.equal(copied(prompt).logits, ours(prompt).logits)
        copied.model.layers[0].get_submodule(
            "self_attn" if name == "kimi_linear" else "linear_attn"
        ).conv1d.weight.mul_(2)
        assert not torch.equal(copied(prompt).logits, ours(prompt).logits)
        stop_using_delta_attention(ours)
        assert torch.equal(ours(prompt).logits, theirs(prompt).logits)


@torch.no_grad()
@every_model
def test_a_copy_of_a_model_keeps_its_own_states(name: str) -> None:
    model = tiny.build(name)
    use_delta_attention(model)
    base, rows = Backbone.attach(copy.deepcopy(model)), ids(2, 9)
    cache = read(base, rows, (4, 4), 20)
    base.run(rows[:, 4:], cache)
    cache.commit([3, 2])
    for row, count in enumerate((7, 6)):
        StepByStep(backbone(name), rows[row]).assert_held(cache, row, count)


@every_model
def test_packed_sequences_are_refused(name: str) -> None:
    model = tiny.build(name)
    use_delta_attention(model)
    with pytest.raises(UnsupportedBackbone, match="give each its own row"):
        model(ids(1, 6), cu_seq_lens_q=torch.tensor([0, 3, 6]))


def decorated(function):  # type: ignore[no-untyped-def]
    def wrapped(number: int) -> int:
        return function(number) + 1

    wrapped.__wrapped__ = function  # type: ignore[attr-defined]
    return wrapped


def double(number: int) -> int:
    return 2 * number


@decorated
def doubled(number: int) -> int:
    return double(number)


def hidden(number: int) -> int:
    return number


hidden.__wrapped__ = double  # type: ignore[attr-defined]


def test_rebinding_changes_a_copy_only() -> None:
    tripled = rebound(doubled, {"double": lambda number: 3 * number})
    assert (tripled(5), doubled(5)) == (16, 11)
    with pytest.raises(UnsupportedBackbone, match="does not call treble"):
        rebound(doubled, {"treble": double})
    with pytest.raises(UnsupportedBackbone, match="decorated in another way"):
        rebound(hidden, {"double": double})


def test_the_states_of_neighbouring_counts_differ() -> None:
    """Or the comparisons above would prove nothing."""
    steps = StepByStep(backbone("kimi_linear"), ids(1, 6)[0])
    for earlier, later in pairwise(steps.states[1:]):
        for one, other in zip(earlier, later, strict=True):
            assert not torch.allclose(one.state, other.state, rtol=1e-2, atol=1e-2)
            assert not torch.allclose(one.columns, other.columns, rtol=1e-2, atol=1e-2)
