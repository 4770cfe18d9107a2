"""Passes behind anchors of a walked text, against passes behind the same tokens committed, and their gradients."""

import pytest
import torch
from torch import Tensor

from deepen.backbones import hf, tiny
from deepen.backbones.anchored import Anchors, Asked, Walk
from deepen.backbones.hf import Backbone
from deepen.core.errors import RollbackError

LENGTHS = [21, 13, 30]
ANCHORS = Anchors(torch.tensor([0, 2, 2, 1, 0, 2]), torch.tensor([5, 30, 7, 13, 20, 8]))
WIDTHS = [3, 5, 4, 5, 1, 2]
NOTHING = Asked(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))
BASES = [*tiny.NAMES]


@pytest.fixture(params=BASES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return Backbone.attach(tiny.build(request.param).double().eval())


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def walked(backbone: Backbone, texts: Tensor, asked: Asked = NOTHING) -> Walk:
    return backbone.walk(texts, LENGTHS, ANCHORS, asked=asked)


def read_alone(backbone: Backbone, tokens: list[int]) -> Tensor:
    """`[1, T, V]`"""
    cache = backbone.new_cache(batch_size=1, capacity=len(tokens))
    with torch.no_grad():
        return backbone.run(torch.tensor([tokens]), cache)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 if expected.dtype == torch.float32 else 1e-5)


@pytest.fixture(params=[256, 4], ids=["one pass", "many passes"])
def walk_width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(hf, "WALK_WIDTH", request.param)
    return request.param


def test_a_pass_behind_an_anchor_says_what_the_base_says_of_the_whole_text(backbone, walk_width):
    texts, chunks = ids(3, 30), ids(6, 5, seed=1)
    prefix = walked(backbone, texts).prefix
    with torch.no_grad():
        logits = backbone.run_behind(prefix, chunks, widths=WIDTHS)
        kept = backbone.run_behind(prefix, chunks, widths=WIDTHS, keep=[1, 4])
    close(kept, logits[:, [1, 4]])
    for row, (text, length) in enumerate(zip(ANCHORS.texts.tolist(), ANCHORS.lengths.tolist(), strict=True)):
        whole = [*texts[text, :length].tolist(), *chunks[row, : WIDTHS[row]].tolist()]
        close(logits[row, : WIDTHS[row]], read_alone(backbone, whole)[0, length:])


def test_passes_leave_nothing(backbone):
    prefix, chunks = walked(backbone, ids(3, 30)).prefix, ids(6, 5, seed=1)
    with torch.no_grad():
        first = backbone.run_behind(prefix, chunks, widths=WIDTHS)
        backbone.run_behind(prefix, ids(6, 9, seed=2), widths=[9] * 6)
        assert torch.equal(backbone.run_behind(prefix, chunks, widths=WIDTHS), first)


def test_pads_say_nothing(backbone):
    prefix, chunks = walked(backbone, ids(3, 30)).prefix, ids(6, 5, seed=1)
    others = ids(6, 5, seed=3)
    real = torch.arange(5) < torch.tensor(WIDTHS)[:, None]
    with torch.no_grad():
        first = backbone.run_behind(prefix, chunks, widths=WIDTHS)
        second = backbone.run_behind(prefix, torch.where(real, chunks, others), widths=WIDTHS)
    close(second[real], first[real])


def test_what_was_kept_can_be_committed_to_a_cache(backbone, walk_width):
    texts, chunks = ids(3, 30), ids(6, 5, seed=1)
    prefix = walked(backbone, texts).prefix
    cache = prefix.committed(backbone.new_cache(batch_size=6, capacity=40))
    with torch.no_grad():
        close(
            backbone.run(chunks, cache, widths=WIDTHS)[0, :3],
            backbone.run_behind(prefix, chunks, widths=WIDTHS)[0, :3],
        )
        cache.commit(WIDTHS)
        again = backbone.run(ids(6, 1, seed=4), cache)
    for row, (text, length) in enumerate(zip(ANCHORS.texts.tolist(), ANCHORS.lengths.tolist(), strict=True)):
        whole = [*texts[text, :length].tolist(), *chunks[row, : WIDTHS[row]].tolist(), int(ids(6, 1, seed=4)[row])]
        close(again[row, 0], read_alone(backbone, whole)[0, -1])


def test_logits_come_where_they_are_asked_for_and_in_that_order(backbone, walk_width):
    texts = ids(3, 30)
    source = torch.Generator().manual_seed(0)
    chosen = torch.randint(0, 3, (25,), generator=source)
    places = (torch.rand(25, generator=source) * torch.tensor(LENGTHS)[chosen]).long()
    chosen[-1], places[-1] = chosen[0], places[0]  # one of them twice
    found = walked(backbone, texts, Asked(chosen, places)).logits
    assert len(found) == 25
    for logits, text, place in zip(found, chosen.tolist(), places.tolist(), strict=True):
        close(logits, read_alone(backbone, texts[text, : place + 1].tolist())[0, -1])


def test_gradients_flow_through_several_passes_into_what_they_read(backbone):
    """Twice through one prefix, the second pass reading what the first one gave: against the base's own forward."""
    for parameter in backbone.model.parameters():
        parameter.requires_grad_(False)
    texts = ids(3, 30)
    chunk = backbone.embedding(ids(6, 4, seed=1)).detach().requires_grad_()
    prefix = walked(backbone, texts).prefix

    def through(run) -> Tensor:
        first = run(chunk)
        second = run(chunk + 0.1 * first[..., : backbone.hidden_size])
        return (second * first).mean()

    ours = torch.autograd.grad(through(lambda x: backbone.run_behind(prefix, x, widths=[4] * 6)), chunk)[0]

    def whole(x: Tensor) -> Tensor:
        """Each row's text and chunk through the base without any cache."""
        rows = []
        for row, (text, length) in enumerate(zip(ANCHORS.texts.tolist(), ANCHORS.lengths.tolist(), strict=True)):
            before = backbone.embedding(texts[text, :length])
            logits = backbone.model(inputs_embeds=torch.cat([before, x[row]])[None], use_cache=False).logits
            rows.append(logits[0, length:])
        return torch.stack(rows)

    theirs = torch.autograd.grad(through(whole), chunk)[0]
    assert theirs.abs().max() > 1e-6
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_an_anchor_stands_behind_a_token(backbone):
    with pytest.raises(RollbackError, match="behind at least one token"):
        backbone.walk(ids(1, 4), [4], Anchors(torch.tensor([0]), torch.tensor([0])), asked=NOTHING)
