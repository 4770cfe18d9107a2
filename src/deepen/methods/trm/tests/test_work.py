"""What refining is said to cost and hold, against what torch counts and what is really held."""

from typing import Any

import pytest
import torch
from trm_models import KINDS, base, model, some_ids

from deepen.backbones.costs import pass_costs
from deepen.check.counted import committed_bytes, counted_flops, passes_of
from deepen.core.types import Batch, Progress, Prompt
from deepen.data.batches import batch_of
from deepen.generate.sampling import BatchSampler, SamplingConfig
from deepen.methods.trm.drawing import TRMBatch
from deepen.methods.trm.model import TRMModel
from deepen.methods.trm.refiner import TRMRefiner
from deepen.methods.trm.work import Extent, RefinerSizes, learning_work, refining_work
from deepen.train.optim import freeze_base

WIDTH = 9
SAMPLED = SamplingConfig(temperature=2.0, seed=5)
STEPS: list[dict[str, Any]] = [
    {"trm_n": 1, "trm_T": 1},
    {"trm_n": 3, "trm_T": 3},
    {"trm_n": 2, "trm_T": 4, "grad_outer_steps": 3},
    {"trm_n": 1, "trm_T": 2, "grad_outer_steps": 2},
]
LOSSES: list[dict[str, Any]] = [
    {"halt": "learned", "halt_weight": 0.3},
    {"trm_T": 3, "grad_outer_steps": 2, "supervise_steps": 2},
    {"trm_T": 4, "grad_outer_steps": 3, "supervise_steps": 3, "halt": "learned"},
]
HALTING: list[dict[str, Any]] = [
    {},
    {"halt": "delta", "halt_threshold": 0.6},
    {"halt": "kl", "halt_threshold": 0.5},
    {"halt": "learned"},
]


def hidden_pairs(made: TRMModel, num_steps: int, num_places: int) -> int:
    """Of multiply-adds of a forward: pairs that a reading over whole rows computes and hides."""
    assert made.refiner is not None
    pair = RefinerSizes.of(made.refiner).pair
    return pair * made.config.trm_n * num_steps * num_places


@pytest.mark.parametrize("mixing", ["position", "evidence"])
@pytest.mark.parametrize("x_learns", [False, True])
@pytest.mark.parametrize("steps", STEPS, ids=str)
def test_a_refiner_alone_costs_what_is_told(mixing, x_learns, steps):
    n, T, learning = steps["trm_n"], steps["trm_T"], steps.get("grad_outer_steps", 1)
    torch.manual_seed(0)
    made = TRMRefiner(7, 4, n, T, hidden=5, mixing=mixing, num_heads=2, grad_outer_steps=learning)
    x = torch.randn(1, WIDTH, 7, requires_grad=x_learns)
    sizes, results = RefinerSizes.of(made), []
    # All pairs are computed, also those that are hidden.
    extent = Extent(num_refined=WIDTH, num_entries=WIDTH, num_pairs=WIDTH * WIDTH)
    work = learning_work(sizes, extent, n=n, T=T, grad_outer_steps=learning, x_learns=x_learns)
    assert counted_flops(lambda: results.append(made(x))) == work.forward_flops
    assert counted_flops(lambda: results[0].sum().backward()) == work.backward_flops
    with torch.no_grad():
        without = refining_work(sizes, extent, n=n, T=T)
        assert counted_flops(lambda: made(x)) == without.forward_flops and without.backward_flops == 0


def test_the_formula_is_the_published_one():
    """2 (|W_x| + T (|W_y| + n (|W_z| + |W_out|) + |f_y|)) a position."""
    made = TRMRefiner(7, 4, n=3, T=5, hidden=11)
    f_y = sum(each.numel() for each in made.f_y.parameters())
    w_x, w_y, w_z, w_out = 7 * 11, 7 * 11, 4 * 11, 11 * 4
    expected = 2 * (w_x + 5 * (w_y + 3 * (w_z + w_out) + f_y))
    assert refining_work(RefinerSizes.of(made), Extent(1, 1, 1), n=3, T=5).flops == expected


def prepared(made: TRMModel, *lengths: int) -> Batch:
    torch.manual_seed(3)
    return made.prepare(batch_of([some_ids(1, length)[0].tolist() for length in lengths]), Progress(0, 10))


@pytest.mark.parametrize("trains", ["refiner", "all"])
@pytest.mark.parametrize(
    ("kind", "losses"),
    [*((kind, {}) for kind in KINDS), *((kind, each) for kind in KINDS[::2] for each in LOSSES)],
    ids=str,
)
def test_a_step_costs_what_is_told(kind, losses, trains):
    made = model(base(dtype=torch.float32), trains=trains, T_sampling="uniform", **kind, **losses)
    freeze_base(made, made.base)
    batch, outputs = prepared(made, WIDTH, WIDTH), []
    assert isinstance(batch, TRMBatch)
    counted = counted_flops(lambda: outputs.append(made.train_step(batch, None, Progress(0, 10))))
    total = torch.stack([term.total for term in outputs[0].losses.values()]).sum()
    backward = counted_flops(total.backward)
    work = made.step_work(batch)
    # Whole rows compute, in every layer and reading, the pairs above the diagonal: what work says of a pair.
    longer, shorter = (made.step_work(prepared(made, width, width)) for width in (WIDTH + 1, WIDTH - 1))
    above = WIDTH * (WIDTH - 1) // 2
    pair_forward = (longer.forward_flops - work.forward_flops) - (work.forward_flops - shorter.forward_flops)
    pair_backward = (longer.backward_flops - work.backward_flops) - (work.backward_flops - shorter.backward_flops)
    assert counted - above * pair_forward == work.forward_flops
    assert backward - above * pair_backward == work.backward_flops


@pytest.mark.parametrize("learning", [1, 2])
def test_positions_that_rest_cost_what_others_do(learning):
    """All positions of a step compute, whatever becomes of it."""
    torch.manual_seed(0)
    made = TRMRefiner(7, 4, 2, 4, hidden=5, mixing="evidence", num_heads=2, grad_outer_steps=learning)
    x, own_T = torch.randn(1, WIDTH, 7, requires_grad=True), torch.randint(1, 5, (1, WIDTH))
    evidence, results = made.evidence_of(x, torch.ones(1, 1, WIDTH, WIDTH, dtype=torch.bool)), []
    given = {"n": 2, "T": 4, "grad_outer_steps": learning, "x_learns": True}
    sizes, extent = RefinerSizes.of(made), Extent(WIDTH, WIDTH, WIDTH * WIDTH)
    work, entries = learning_work(sizes, extent, **given), Extent(0, WIDTH, 0)
    of_entries = learning_work(sizes, entries, **given)
    forward = counted_flops(lambda: results.append(made.refine(x, evidence, own_T=own_T)))
    assert forward == work.forward_flops - of_entries.forward_flops
    assert counted_flops(lambda: results[0].hidden.sum().backward()) == work.backward_flops


@pytest.mark.parametrize("num_outer", [1, 2, 5])
def test_a_step_costs_what_was_drawn_for_it(num_outer):
    made = model(base(dtype=torch.float32), mixing="evidence")
    freeze_base(made, made.base)
    given = prepared(made, WIDTH)
    batch = TRMBatch(given.input_ids, given.lengths, num_outer=num_outer)
    more = TRMBatch(given.input_ids, given.lengths, num_outer=num_outer + 1)
    assert made.refiner is not None
    one, none = (refining_work(RefinerSizes.of(made.refiner), Extent(8, 9, 36), n=2, T=T).flops for T in (1, 0))
    assert made.step_work(more).flops - made.step_work(batch).flops == one - none


@pytest.mark.parametrize(
    ("kind", "halting"),
    [
        *((kind, halting) for kind in KINDS for halting in HALTING[:2]),
        *((kind, halting) for kind in KINDS[::2] for halting in HALTING[2:]),
    ],
    ids=str,
)
def test_an_advance_costs_what_is_told_whenever_it_halts(kind, halting):
    """Of one row, whose outer steps are those of its one position."""
    made = model(base(dtype=torch.float32), trm_T=4, **kind, **halting)
    costs, found = pass_costs(made.backbone), set()
    decoding = made.open(Prompt((tuple(some_ids(1, 6)[0].tolist()),), 30))
    for _ in range(6):
        advances = []
        with passes_of(made.backbone) as passes:
            counted = counted_flops(lambda: advances.append(made.advance(decoding, BatchSampler([SAMPLED]))))  # noqa: B023
        (ran,), spent = passes, advances[0].spent
        context = ran.contexts[0]
        own = made.flops(num_positions=1, context=context) - costs.flops(num_positions=1, context=context)
        assert counted == ran.flops_computed(made.backbone, costs) + own + spent.added_flops
        num_outer = spent.layer_applications - made.backbone.num_layers
        found.add(num_outer)
        if kind["placement"] == "head":
            halted = made.halted_flops(num_outer, context=context)
            assert (
                counted
                == ran.flops_computed(made.backbone, costs) - costs.flops(num_positions=1, context=context) + halted
            )
        assert spent.added_flops <= 0
    places = 1 if kind["placement"] == "head" else 2
    assert (found == {4 * places}) if not halting else (max(found) <= 4 * places and len(found) > 1)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_reading_costs_what_is_told(kind):
    made = model(base(dtype=torch.float32), **kind)
    costs, prompt = pass_costs(made.backbone), Prompt((tuple(some_ids(1, 300)[0].tolist()),), 4)
    with passes_of(made.backbone) as passes:
        counted = counted_flops(lambda: made.open(prompt))
    assert [ran.widths for ran in passes] == [(256,), (43,)]
    of_base = sum(ran.flops_computed(made.backbone, costs) for ran in passes)
    own = 0
    for ran in passes:
        given = {"num_positions": ran.widths[0], "context": ran.contexts[0], "num_logits": 1}
        own += made.flops(**given) - costs.flops(**given)
    if kind == {"mixing": "evidence", "placement": (0, 2)}:
        # A pass computes all pairs of its own positions, and hides half.
        own += 2 * sum(hidden_pairs(made, 3, w * (w - 1) // 2) for w in (256, 43)) * 2
    assert counted - of_base == own


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_holds_what_is_told(kind, dtype):
    made = model(base(dtype=dtype), **kind)
    decoding = made.open(Prompt((tuple(some_ids(1, 11)[0].tolist()),), 5))
    made.advance(decoding, BatchSampler([SAMPLED]))
    assert committed_bytes(decoding.cache) == made.state_bytes(context=11)
    without = model(base(dtype=dtype), use_trm=False, trm_d_latent=256, trm_n=6, trm_hidden=None, trm_heads=4)
    slot = made.state_bytes(context=1) - without.state_bytes(context=1)
    places = 1 if kind["placement"] == "head" else 2
    assert slot == (0 if kind["mixing"] == "position" else places * 2 * 8 * max(4, dtype.itemsize))


def test_more_steps_hold_no_more():
    few, many = (model(mixing="evidence", trm_n=n, trm_T=T) for n, T in ((1, 1), (7, 9)))
    assert few.state_bytes(context=50) == many.state_bytes(context=50)
