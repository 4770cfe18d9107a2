"""Refined mode: untrained it is the base; trained or not, passes, edits, commits and caches go by the rules."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import pytest
import torch
from effort import share_of_profile
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.core.errors import CannotScore, PromptError
from deepen.core.types import Batch, Prompt
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.generate.scoring import score_at_once
from deepen.generate.stop import StopConfig
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.model import ChunkRefineWrapper
from deepen.methods.chunk.modules import pooled_mean
from deepen.methods.chunk.passes import States, run_refined
from deepen.methods.chunk.refined import RefinedDecoding

BASES = ("llama", "qwen3", "nanochat")
NOISE_STD = 0.3


@cache
def backbone(name: str, dtype: torch.dtype = torch.float32) -> Backbone:
    attached = Backbone.attach(tiny.build(name, dtype=dtype).requires_grad_(False))
    attached.pack()
    return attached


def wrapper(name: str, *, noise: float = 0.0, dtype: torch.dtype = torch.float32, **fields: Any) -> ChunkRefineWrapper:
    """A refined-mode model; `noise` is the deviation of every sidecar tensor, 0 leaves it untrained."""
    settings = {
        "chunk_width": 6, "max_inner_steps": 3, "d_state": 16, "gate_hidden": 16, "max_chunk_len": 32,
        "layers_to_refine": (1, 3), **fields,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = ChunkRefineWrapper(
            backbone(name, dtype).model, RecursiveConfig(recursive_enabled=True, commit_mode="refined"), **settings
        )
        for module in model._sidecar().values():
            module.to(dtype)
        if noise:
            with torch.no_grad():
                for tensor in model.saved_state().values():
                    if tensor.is_floating_point():
                        tensor.normal_(std=noise)
    return model


prompts = st.lists(st.integers(0, 255), min_size=1, max_size=12)
samplings = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.0, 0.8]),
    top_k=st.sampled_from([0, 20]),
    top_p=st.sampled_from([1.0, 0.9]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 9),
)


@share_of_profile(4, least=10)
@given(
    name=st.sampled_from(BASES),
    rows=st.lists(prompts, min_size=1, max_size=3),
    sampling=samplings,
    width=st.integers(1, 32),
    steps=st.integers(1, 3),
    max_new_tokens=st.integers(1, 20),
    policy=st.sampled_from(["keep_kda_recurrent_reset_mla", "reset_all"]),
    length_head=st.booleans(),
    eos=st.sets(st.integers(0, 255), max_size=40),
)
def test_untrained_it_gives_the_bases_tokens(
    name: str,
    rows: list[list[int]],
    sampling: SamplingConfig,
    width: int,
    steps: int,
    max_new_tokens: int,
    policy: str,
    length_head: bool,
    eos: set[int],
) -> None:
    model = wrapper(
        name, chunk_width=width, max_inner_steps=steps, cache_reset_policy=policy, enable_length_head=length_head
    )
    stop = StopConfig(max_new_tokens=max_new_tokens, eos_ids=tuple(eos))
    expected = complete(PlainDecoder(backbone(name)), rows, sampling=sampling, stop=stop)
    actual = complete(model, rows, sampling=sampling, stop=stop)
    assert [(r.tokens, r.reason) for r in actual] == [(r.tokens, r.reason) for r in expected]


def test_noise_changes_the_output() -> None:
    stop = StopConfig(max_new_tokens=24)
    plain = complete(PlainDecoder(backbone("llama")), [[1, 2, 3]], stop=stop)[0].tokens
    assert complete(wrapper("llama", noise=NOISE_STD), [[1, 2, 3]], stop=stop)[0].tokens != plain


@share_of_profile(20, least=8)
@given(
    name=st.sampled_from(BASES),
    rows=st.lists(prompts, min_size=2, max_size=4),
    draft=st.sampled_from(["ar", "mask"]),
    carry=st.booleans(),
    keep_better=st.booleans(),
    data=st.data(),
)
def test_a_row_depends_on_neither_batch_mates_nor_order(
    name: str, rows: list[list[int]], draft: str, carry: bool, keep_better: bool, data: st.DataObject
) -> None:
    model = wrapper(
        name, noise=NOISE_STD, dtype=torch.float64, draft=draft, carry_state=carry, keep_better=keep_better,
        commit_threshold=0.5, min_commit_threshold=0.1,
    )  # fmt: skip
    chosen = [SamplingConfig(temperature=0.7, seed=data.draw(st.integers(0, 9))) for _ in rows]
    stops = StopConfig(max_new_tokens=data.draw(st.integers(1, 14)), eos_ids=(data.draw(st.integers(0, 255)),))
    together = complete(model, rows, sampling=chosen, stop=stops)
    order = data.draw(st.permutations(range(len(rows))))
    reordered = complete(model, [rows[i] for i in order], sampling=[chosen[i] for i in order], stop=stops)
    for place, index in enumerate(order):
        alone = complete(model, [rows[index]], sampling=[chosen[index]], stop=stops)[0]
        assert alone.tokens == together[index].tokens == reordered[place].tokens


@share_of_profile(10, least=8)
@given(
    name=st.sampled_from(BASES),
    rows=st.lists(prompts, min_size=1, max_size=3),
    draft=st.sampled_from(["ar", "mask"]),
    policy=st.sampled_from(["keep_kda_recurrent_reset_mla", "reset_all", "keep_all"]),
)
def test_after_every_commit_the_cache_is_a_fresh_prefill(
    name: str, rows: list[list[int]], draft: str, policy: str
) -> None:
    with pytest.warns(UserWarning, match="an ablation") if policy == "keep_all" else nullcontext():
        model = wrapper(name, noise=NOISE_STD, draft=draft, cache_reset_policy=policy)
    base = backbone(name)
    decoding = model.open(Prompt(tuple(map(tuple, rows)), 20))
    assert isinstance(decoding, RefinedDecoding)
    sampler = BatchSampler([SamplingConfig()] * len(rows))
    while all(decoding.room(row) for row in range(len(rows))):
        model.advance(decoding, sampler)
        for row, (ids, unread) in enumerate(zip(decoding.rows, decoding.unread, strict=True)):
            committed = ids[: len(ids) - len(unread)]
            assert unread and decoding.cache.lengths[row] == len(committed)
            fresh = base.new_cache(batch_size=1, capacity=len(committed))
            base.run(torch.tensor([committed]), fresh)
            fresh.commit([len(committed)])
            for layer in range(base.num_layers):
                for held, expected in zip(decoding.cache.entries(layer, row), fresh.entries(layer, 0), strict=True):
                    assert torch.equal(held, expected)


@share_of_profile(20, least=8)
@given(name=st.sampled_from(BASES), row=prompts, draft=st.sampled_from(["ar", "mask"]), sampling=samplings)
def test_reading_the_prefix_anew_changes_nothing(
    name: str, row: list[int], draft: str, sampling: SamplingConfig
) -> None:
    stop = StopConfig(max_new_tokens=15)
    kept, anew = (
        complete(wrapper(name, noise=NOISE_STD, draft=draft, cache_reset_policy=policy), [row], sampling=sampling,
                 stop=stop)[0].tokens
        for policy in ("keep_kda_recurrent_reset_mla", "reset_all")
    )  # fmt: skip
    assert kept == anew


def oracle(model: ChunkRefineWrapper, prefix: Sequence[int], chunk: Sequence[int], passes: int) -> dict[str, Tensor]:
    """Refined passes as the equations have them: the whole text through the base's own forward, without any cache."""
    base, last = model.base, len(prefix) + len(chunk)
    chunk_positions = range(len(prefix), last)
    latent, top = model.latent_token, None
    states: dict[int, Tensor] = {}
    for _ in range(passes):
        edge_input = latent.embedding + (0 if top is None else latent.top_to_bottom.weight @ top)
        embedded = torch.cat([base.get_input_embeddings()(torch.tensor([*prefix, *chunk])), edge_input[None]])[None]
        handles, moved, seen = [], {}, []

        def hook(index: int, moved: dict[int, Tensor], seen: list[Tensor], states: dict[int, Tensor]) -> Any:
            def edited(_layer: Any, _inputs: Any, output: Any) -> Any:
                h = (output if isinstance(output, Tensor) else output[0]).clone()
                cell = model._cell_of(index)
                if cell is not None:
                    s, before = states.get(index, torch.zeros(1, cell.d_state, dtype=h.dtype)), h.clone()
                    for i in chunk_positions:
                        pooled = pooled_mean(before[:, chunk_positions.start : i + 1], None, "chunk")[0, 0]
                        h[0, i] += cell.out(cell.act(cell.inp(torch.cat([pooled, s[0]]))))
                    moved[index] = cell.state_upd(pooled_mean(h[:, chunk_positions.start :], None, "chunk")[:, 0], s)
                seen.append(h)
                return h if isinstance(output, Tensor) else (h, *output[1:])

            return edited

        for index, layer in enumerate(model.backbone.layers):
            handles.append(layer.register_forward_hook(hook(index, moved, seen, states)))
        logits = base(inputs_embeds=embedded, use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        top = model.backbone.final_norm(seen[-1])[0, -1]
        states = moved
    p_commit, length = model.boundary(top[None, None])
    return {"logits": logits[len(prefix) : last], "p_commit": p_commit[0], "length": length[0], **{
        f"state {index}": state[0] for index, state in states.items()
    }}  # fmt: skip


@torch.no_grad()
@share_of_profile(20, least=8)
@given(
    name=st.sampled_from(BASES),
    rows=st.lists(st.tuples(prompts, prompts), min_size=1, max_size=3),
    passes=st.integers(1, 3),
)
def test_passes_are_those_of_the_equations(name: str, rows: list[tuple[list[int], list[int]]], passes: int) -> None:
    model = wrapper(name, noise=NOISE_STD, dtype=torch.float64)
    base = model.backbone
    cache_ = base.new_cache(batch_size=len(rows), capacity=40)
    longest = max(len(prefix) for prefix, _ in rows)
    ids = torch.tensor([[*prefix, *[0] * (longest - len(prefix))] for prefix, _ in rows])
    base.run(ids, cache_, widths=[len(prefix) for prefix, _ in rows])
    cache_.commit([len(prefix) for prefix, _ in rows])
    states: States = {}
    edge = None
    sidecar = model._refined(model.config)._sidecar
    for _ in range(passes):
        result = run_refined(base, sidecar, partial(base.run, cache=cache_), [chunk for _, chunk in rows], states, edge)
        states, edge = result.states, result.edge
    for row, (prefix, chunk) in enumerate(rows):
        expected = oracle(model, prefix, chunk, passes)
        actual = {
            "logits": result.logits[row, : len(chunk)], "p_commit": result.p_commit[row], "length": result.length[row],
            **{f"state {index}": state[row] for index, state in states.items()},
        }  # fmt: skip
        assert actual.keys() == expected.keys()
        for what, value in actual.items():
            torch.testing.assert_close(value, expected[what], rtol=1e-9, atol=1e-10)


def batch_of(rows: Sequence[Sequence[int]]) -> Batch:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    return Batch(ids, torch.tensor([len(row) for row in rows]))


texts = st.lists(st.integers(0, 255), min_size=2, max_size=30)


@torch.no_grad()
@share_of_profile(20, least=8)
@given(name=st.sampled_from(BASES), rows=st.lists(texts, min_size=1, max_size=3), width=st.integers(1, 12))
def test_untrained_it_scores_as_the_base(name: str, rows: list[list[int]], width: int) -> None:
    model = wrapper(name, dtype=torch.float64, chunk_width=width)
    actual, expected = model.score(batch_of(rows)), score_at_once(model.backbone, batch_of(rows))
    assert torch.equal(actual.scored, expected.scored) and torch.equal(actual.correct, expected.correct)
    torch.testing.assert_close(actual.log_probs, expected.log_probs, rtol=0, atol=1e-10)


@share_of_profile(20, least=8)
@given(
    name=st.sampled_from(BASES),
    row=texts,
    width=st.integers(1, 12),
    draft=st.sampled_from(["ar", "mask"]),
    carry=st.booleans(),
    data=st.data(),
)
def test_no_token_moves_the_score_of_an_earlier_one(
    name: str, row: list[int], width: int, draft: str, carry: bool, data: st.DataObject
) -> None:
    model = wrapper(name, noise=NOISE_STD, dtype=torch.float64, chunk_width=width, draft=draft, carry_state=carry)
    changed = data.draw(st.integers(1, len(row) - 1))
    other = [*row[:changed], (row[changed] + data.draw(st.integers(1, 255))) % 256, *row[changed + 1 :]]
    before, after = model.score(batch_of([row])), model.score(batch_of([other]))
    torch.testing.assert_close(after.log_probs[:, :changed], before.log_probs[:, :changed], rtol=0, atol=1e-10)
    assert not torch.equal(after.log_probs[:, changed], before.log_probs[:, changed])


def test_noise_changes_the_score() -> None:
    text = batch_of([list(range(40, 70))])
    noisy, base = wrapper("llama", noise=NOISE_STD).score(text), score_at_once(backbone("llama"), text)
    # The first token of each chunk is decided by the clean prefix.
    firsts = torch.arange(1, 30, 6)
    rest = [t for t in range(1, 30) if t not in firsts]
    torch.testing.assert_close(noisy.log_probs[:, firsts], base.log_probs[:, firsts], rtol=1e-4, atol=1e-4)
    assert ((noisy.log_probs - base.log_probs)[:, rest].abs() > 1e-3).all()


def test_pooling_over_the_chunk_is_never_scored() -> None:
    with pytest.raises(CannotScore, match="set pooling to causal"):
        wrapper("llama", pooling="chunk").score(batch_of([[1, 2, 3]]))


def test_a_text_without_room_for_drafts_is_not_scored() -> None:
    with pytest.raises(CannotScore, match="score at most 511 tokens"):
        wrapper("llama").score(batch_of([[1] * 512]))
    assert wrapper("llama", max_inner_steps=1, chunk_width=32).score(batch_of([[1] * 511])).scored.sum() == 510


def test_the_context_must_hold_the_latent_token_too() -> None:
    with pytest.raises(PromptError, match="513 tokens"):
        complete(wrapper("llama"), [[1] * 500], stop=StopConfig(max_new_tokens=12))


def trained_tensors(model: ChunkRefineWrapper) -> dict[str, Tensor]:
    unused = {"mask_token.embedding"} if model.config.resolved_draft != "mask" else set()
    return {name: tensor for name, tensor in model.named_parameters() if not name.startswith("base.") and not any(
        name.endswith(other) for other in unused
    )}  # fmt: skip


def passes_with_gradient(model: ChunkRefineWrapper) -> Tensor:
    """A direct loss on everything that three refined passes say; each has its own cache, so that no graph is lost."""
    sidecar = model._refined(model.config)._sidecar
    states: States = {}
    edge = None
    total = torch.zeros((), dtype=model.backbone.dtype)
    for _ in range(3):
        fresh = model.backbone.new_cache(batch_size=1, capacity=20)
        model.backbone.run(torch.tensor([[5, 6, 7]]), fresh)
        fresh.commit([3])
        result = run_refined(
            model.backbone, sidecar, partial(model.backbone.run, cache=fresh), [[8, 9, 10, 11]], states, edge
        )
        states, edge = result.states, result.edge
        total = total + result.logits[:, :4].sin().sum() + result.p_commit.sum() + result.length.sin().sum()
    return total


def test_every_tensor_gets_a_gradient_and_changes_what_passes_say() -> None:
    model = wrapper("llama", noise=NOISE_STD, dtype=torch.float64, phase="a")
    loss = passes_with_gradient(model)
    loss.backward()
    for name, tensor in trained_tensors(model).items():
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, name
        with torch.no_grad():
            before = tensor.clone()
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor))
            assert not torch.equal(passes_with_gradient(model), loss), name
            tensor.copy_(before)


def test_the_slots_embedding_changes_mask_drafts() -> None:
    model = wrapper("llama", noise=NOISE_STD, draft="mask", max_inner_steps=1)
    before = complete(model, [[1, 2, 3]], stop=StopConfig(max_new_tokens=20))[0]
    with torch.no_grad():
        model.mask_token.embedding.normal_(std=3.0)
    after = complete(model, [[1, 2, 3]], stop=StopConfig(max_new_tokens=20))[0]
    assert after.tokens != before.tokens


def passes_of(model: ChunkRefineWrapper, prompt: Sequence[int], new: int) -> int:
    return complete(model, [prompt], stop=StopConfig(max_new_tokens=new))[0].passes


def test_passes_are_counted_as_they_are_run() -> None:
    # A clean pass for what was committed, W - 1 for the rest of the draft, K refined ones; 12 tokens are two chunks.
    assert passes_of(wrapper("llama", chunk_width=6, max_inner_steps=3), [1, 2], 12) == 2 * (1 + 5 + 3)
    assert passes_of(wrapper("llama", chunk_width=6, max_inner_steps=3, commit_bias_init=5.0), [1, 2], 12) == 2 * 7
    # Without a floor whatever became of the slots' draft is committed after K passes.
    drafted_by_slots = wrapper("llama", draft="mask", chunk_width=6, max_inner_steps=3, min_commit_threshold=0.0)
    assert passes_of(drafted_by_slots, [1, 2], 6) == 1 + 1 + 3


def test_a_kept_tail_is_not_drafted_again() -> None:
    model = wrapper("llama", chunk_width=6, max_inner_steps=1, max_chunk_len=32)
    with torch.no_grad():
        model.boundary.len_head.bias.zero_()[2] = 9.0
    result = complete(model, [[1, 2]], stop=StopConfig(max_new_tokens=8))[0]
    assert result.commits == [2, 2, 2, 2]
    # Six tokens are drafted, then one wide pass reads what is left and each pass adds one, to the end of the room.
    assert result.passes == (1 + 5 + 1) + (1 + 2 + 1) + (1 + 0 + 1) + (1 + 0 + 1)
    assert result.tokens == complete(PlainDecoder(backbone("llama")), [[1, 2]], stop=StopConfig(max_new_tokens=8))[
        0
    ].tokens  # fmt: skip


@pytest.mark.parametrize("dropped", [[0], [1], [2, 0]])
def test_rows_that_stay_keep_what_is_theirs(dropped: list[int]) -> None:
    rows = [[1, 2, 3], [40, 50], [60, 7, 80, 9]]
    staying = [row for row in range(3) if row not in dropped]
    model = wrapper("llama", noise=NOISE_STD, dtype=torch.float64, carry_state=True)

    def opened(rows: Sequence[Sequence[int]]) -> tuple[RefinedDecoding, BatchSampler]:
        return model.open(Prompt(tuple(map(tuple, rows)), 40)), BatchSampler([SamplingConfig()] * len(rows))

    together, sampler = opened(rows)
    alone, sampler_alone = opened([rows[row] for row in staying])
    for _ in range(2):
        model.advance(together, sampler)
        model.advance(alone, sampler_alone)
    model.drop(together, dropped)
    sampler.drop(dropped)
    assert together.states and together.states.keys() == alone.states.keys()
    for layer, state in together.states.items():
        torch.testing.assert_close(state, alone.states[layer], rtol=1e-10, atol=1e-10)
    for name in ("rows", "limits", "unread", "tails"):
        assert getattr(together, name) == getattr(alone, name), name
    assert together.next_logits is not None and alone.next_logits is not None
    torch.testing.assert_close(together.next_logits, alone.next_logits, rtol=1e-10, atol=1e-10)


def test_the_draft_is_kept_where_the_base_finds_it_likelier() -> None:
    stop = StopConfig(max_new_tokens=18)
    plain = complete(PlainDecoder(backbone("llama")), [[1, 2, 3]], stop=stop)[0].tokens
    kept = complete(wrapper("llama", noise=NOISE_STD, keep_better=True), [[1, 2, 3]], stop=stop)[0]
    free = complete(wrapper("llama", noise=NOISE_STD, keep_better=False), [[1, 2, 3]], stop=stop)[0]
    assert free.tokens != plain
    # A greedy draft is rarely beaten by noise: more of the plain text survives than without the veto.
    assert sum(a == b for a, b in zip(kept.tokens, plain, strict=True)) > sum(
        a == b for a, b in zip(free.tokens, plain, strict=True)
    )


def test_fields_of_refined_mode_act() -> None:
    stop = StopConfig(max_new_tokens=30)

    def tokens(**fields: Any) -> list[int]:
        return complete(wrapper("llama", noise=NOISE_STD, **fields), [[1, 2, 3]], stop=stop)[0].tokens

    usual = tokens()
    for changed in (
        {"carry_state": True},
        {"corruption_rate": 0.0},
        {"use_latent_token": False},
        {"max_inner_steps": 1},
        {"chunk_width": 9},
        {"enable_length_head": False},
        {"pooling": "chunk"},
        {"draft": "mask"},
    ):
        assert tokens(**changed) != usual, changed
    with pytest.warns(UserWarning, match="an ablation"):
        model = wrapper("llama", noise=NOISE_STD, cache_reset_policy="keep_all")
    assert complete(model, [[1, 2, 3]], stop=stop)[0].tokens != usual
