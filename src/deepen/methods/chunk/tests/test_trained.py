"""Exact mode with sidecars that have learned, by real steps on the base's own text: the output stays the base's own."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from effort import share_of_profile
from hypothesis import event, given
from hypothesis import strategies as st
from torch import Tensor

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.data.batches import batch_of
from deepen.evaluate.agreement import NEAR_TIE_MARGIN_RECURRENT, compare
from deepen.generate.events import RowResult
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import SamplingConfig
from deepen.generate.stop import StopConfig
from deepen.methods.chunk.config import RecursiveConfig
from deepen.methods.chunk.decoding import ExactDecoder
from deepen.methods.chunk.model import ChunkRefineWrapper
from deepen.methods.chunk.passes import run_slots
from deepen.train.module import StepModule
from deepen.train.optim import freeze_base, make_optimizers
from deepen.train.step import Steps

BASES = ("llama", "kimi_linear")
LEARNED: dict[str, dict[str, Any]] = {
    "phase a": {"phase": "a"},
    "phase b": {"phase": "b"},
    "drafter": {"phase": "a", "draft": "shallow", "drafter_hidden": 64, "draft_vocab": 200},
}
"""What trains in each."""
SOURCES = {"phase a": ("mask", "auto"), "phase b": ("mask", "auto"), "drafter": ("shallow", "auto")}
"""Where drafts come from that it has a part in."""
PROMPTS = ([5, 6, 7, 8], [200, 3], [90])
NUM_TRAINED, NUM_STEPS = 24, 40
"""Tokens of the base's own behind each prompt, which it learns; and steps."""


@cache
def pristine(name: str) -> Backbone:
    """A base that no sidecar has ever been grafted on."""
    return Backbone.attach(tiny.build(name).requires_grad_(False))


@cache
def known_texts(name: str) -> tuple[tuple[int, ...], ...]:
    """What the sidecars learn."""
    results = complete(PlainDecoder(pristine(name)), PROMPTS, stop=StopConfig(max_new_tokens=NUM_TRAINED))
    return tuple((*prompt, *result.tokens) for prompt, result in zip(PROMPTS, results, strict=True))


@dataclass(frozen=True)
class Trained:
    """A model behind its steps, and what it saved before the first."""

    model: ChunkRefineWrapper
    before: dict[str, Tensor]

    def decoder(self, draft: str, chunk_width: int) -> ExactDecoder:
        return ExactDecoder(
            self.model.backbone, draft=draft, chunk_width=chunk_width, sidecar=self.model._parts(self.model.config)
        )


@cache
@torch.enable_grad()  # whichever test asks first
def trained(name: str, what: str) -> Trained:
    base = tiny.build(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = RecursiveConfig(
            recursive_enabled=True, chunk_width=8, max_chunk_len=8, d_state=16, gate_hidden=32, anchors_per_text=12,
            layers_to_refine=(0, 1, 2), refine_hidden=256, share_cells=False, **{"draft": "mask", **LEARNED[what]},
        )  # fmt: skip
        model = ChunkRefineWrapper(base, config)
        freeze_base(model, base)
        before = {path: tensor.detach().clone() for path, tensor in model.saved_state().items()}
        batch = batch_of([list(text) for text in known_texts(name)])
        optimizers = make_optimizers(model, base, learning_rate=5e-3)
        steps = Steps(StepModule(model, base), optimizers, lambda index: batch, num_steps=NUM_STEPS, grad_clip=1.0)
        for index in range(NUM_STEPS):
            steps.take(index)
    return Trained(model.eval(), before)


def assert_same(
    name: str, rows: list[list[int]], ours: list[RowResult], theirs: list[RowResult], sampling: SamplingConfig
) -> None:
    """Token for token; where a base has recurrent layers, rows may part at a near-tie, which hypothesis counts."""
    for row, our, their in zip(rows, ours, theirs, strict=True):
        verdict = compare(pristine(name), row, our.tokens, their.tokens, sampling=sampling)
        event("equal" if verdict.equal else "near-tie")
        is_near = bool(pristine(name).recurrent_layers) and (verdict.margin or 0.0) < NEAR_TIE_MARGIN_RECURRENT
        assert verdict.equal or is_near, f"{verdict}: {our.tokens} against {their.tokens}"


@pytest.mark.parametrize("what", LEARNED)
@pytest.mark.parametrize("name", BASES)
def test_what_trains_has_moved_and_acts(name: str, what: str) -> None:
    """Or what follows would say nothing of sidecars that have learned."""
    model, before = trained(name, what).model, trained(name, what).before
    after = {path: tensor for path, tensor in model.saved_state().items() if tensor.is_floating_point()}
    moved = {path for path, tensor in after.items() if not torch.equal(tensor, before[path])}
    learns = {each.data_ptr() for each in model.parameters() if each.requires_grad}
    assert moved == {path for path, tensor in after.items() if tensor.data_ptr() in learns}
    new = {"phase a": "refine_cells.0.out.", "phase b": "lora_B", "drafter": "drafter.out."}[what]
    changed = {path for path in after if new in path}
    # Zero at first, so that the sidecar said nothing of its own.
    assert changed and all(not before[path].any() and after[path].abs().max() > 1e-3 for path in changed)
    base = model.base.state_dict()
    assert all(torch.equal(base[path], tensor) for path, tensor in pristine(name).model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("name", BASES)
def test_lora_has_a_part_in_what_slots_say(name: str) -> None:
    model, row = trained(name, "phase b").model, list(known_texts(name)[0][:9])
    parts, cache = model._parts(model.config), model.backbone.new_cache(batch_size=1, capacity=24)

    def slots(sidecar: Any) -> Tensor:
        def run(tokens: Tensor, **options: Any) -> Tensor:
            return model.backbone.run(tokens, cache, **options)

        return run_slots(model.backbone, sidecar, run, [[*row, 0, 0, 0]], [3]).logits[0]

    with_lora, without = slots(parts), slots(replace(parts, lora=None))
    assert (with_lora[-3:] - without[-3:]).abs().max() > 1e-2
    # Experts that slots visit otherwise round for the clean positions, too.
    bound = 1e-4 if model.backbone.recurrent_layers else 0.0
    torch.testing.assert_close(with_lora[:-3], without[:-3], rtol=0, atol=bound)


@pytest.mark.parametrize("what", LEARNED)
@pytest.mark.parametrize("name", BASES)
def test_of_what_it_learned_drafts_are_accepted_and_refused(name: str, what: str) -> None:
    stop = StopConfig(max_new_tokens=NUM_TRAINED)
    results = complete(trained(name, what).decoder(SOURCES[what][0], 8), PROMPTS, stop=stop)
    assert [(*prompt, *row.tokens) for prompt, row in zip(PROMPTS, results, strict=True)] == [*known_texts(name)]
    drafted, accepted = (sum(sum(getattr(row, which).values()) for row in results) for which in ("drafted", "accepted"))
    assert 0 < accepted < drafted


def rows_of(name: str) -> st.SearchStrategy[list[list[int]]]:
    """Ragged: a beginning of what it learned, behind which drafts are often right, and any others."""
    known = st.builds(lambda text, length: list(text[:length]), st.sampled_from(known_texts(name)), st.integers(6, 20))
    others = st.lists(st.integers(0, 255), min_size=1, max_size=30)
    return st.builds(lambda first, rest: [first, *rest], known, st.lists(st.one_of(known, others), max_size=3))


samplings = st.one_of(
    *[st.just(SamplingConfig())] * 2,
    st.builds(
        SamplingConfig,
        temperature=st.sampled_from([0.3, 1.0]),
        top_k=st.sampled_from([0, 5]),
        top_p=st.sampled_from([1.0, 0.9]),
        repetition_penalty=st.sampled_from([1.0, 1.2]),
        seed=st.integers(0, 99),
    ),
)


@pytest.mark.parametrize("what", LEARNED)
@pytest.mark.parametrize("name", BASES)
@share_of_profile(5, least=8)
@given(
    data=st.data(),
    chunk_width=st.sampled_from([2, 5, 8, 30]),
    sampling=samplings,
    max_new=st.integers(8, 24),
)
def test_gives_the_plain_output(
    name: str, what: str, data: st.DataObject, chunk_width: int, sampling: SamplingConfig, max_new: int
) -> None:
    rows, draft = data.draw(rows_of(name)), data.draw(st.sampled_from(SOURCES[what]))
    options = {"sampling": [sampling] * len(rows), "stop": StopConfig(max_new_tokens=max_new)}
    plain = complete(PlainDecoder(pristine(name)), rows, **options)
    exact = complete(trained(name, what).decoder(draft, chunk_width), rows, **options)
    event(f"accepted {min(3, max(sum(row.accepted.values()) for row in exact))} or more")
    assert_same(name, rows, exact, plain, sampling)
    assert all(row.passes <= len(row.tokens) for row in exact)
