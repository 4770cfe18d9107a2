"""A refiner in a base's passes: against the same written into the model, whole and in pieces behind a cache."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Cache, DynamicCache, MistralConfig, StaticCache
from trm_models import KINDS, base, forward, model, some_ids

from deepen.backbones import tiny
from deepen.backbones.added import added_entries
from deepen.core.errors import ConfigError, UnsupportedBackbone
from deepen.methods.trm.halting import stop_of
from deepen.methods.trm.model import TRMModel
from deepen.methods.trm.placing import Ask
from deepen.methods.trm.refiner import TRMRefiner, to_unit_rms
from deepen.methods.trm.seeing import unmasked, up_to

LENGTH = 13
TIGHT = {"rtol": 1e-8, "atol": 1e-8}
HALTING = ({}, {"halt": "delta", "halt_threshold": 0.6}, {"halt": "kl", "halt_threshold": 0.5}, {"halt": "learned"})


class Behind(nn.Module):
    """A layer with the refiner written behind it."""

    def __init__(self, layer: nn.Module, refiner: TRMRefiner) -> None:
        super().__init__()
        self.layer, self.refiner = layer, refiner

    def __getattr__(self, name: str) -> Any:  # models look at their layers
        return super().__getattr__(name) if name in ("layer", "refiner") else getattr(self.layer, name)

    def forward(self, *args: Any, **given: Any) -> Any:
        output = self.layer(*args, **given)
        h = output if isinstance(output, Tensor) else output[0]
        moved = h + self.refiner(to_unit_rms(h)) - to_unit_rms(h)
        return moved if isinstance(output, Tensor) else (moved, *output[1:])


@torch.no_grad()
def written_in(made: TRMModel, ids: Tensor) -> Tensor:
    """The logits of a model that has its refiner for good."""
    written, refiner = copy.deepcopy(made.base), made.refiner
    assert refiner is not None
    if made.config.placement == "head":
        hidden = written.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        logits = written.lm_head(refiner(hidden))
        cap = getattr(written.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)
    layers = written.get_decoder().layers
    for layer in made.config.placement:
        layers[layer] = Behind(layers[layer], refiner)
    return written(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_it_computes_what_the_same_model_would_that_had_it_written_in(name, kind):
    made, ids = model(name, **kind), some_ids(2, LENGTH)
    torch.testing.assert_close(forward(made, ids), written_in(made, ids), **TIGHT)
    with torch.no_grad():
        plain = made.base(input_ids=ids, use_cache=False).logits
    assert float((forward(made, ids) - plain).abs().mean()) > 0.01


def test_logits_that_a_model_caps_are_capped():
    made, ids = model(base("nanochat", final_logit_softcapping=0.7)), some_ids(1, LENGTH)
    torch.testing.assert_close(forward(made, ids), written_in(made, ids), **TIGHT)
    assert forward(made, ids).abs().max() <= 0.7


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_untrained_the_model_is_the_base_to_the_last_bit(kind):
    made, ids = model(base(dtype=torch.float32), noise=0.0, **kind), some_ids(2, LENGTH)
    with torch.no_grad():
        plain = made.base(input_ids=ids, use_cache=False).logits
    assert torch.equal(forward(made, ids), plain)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_outside_of_its_block_the_base_is_itself(kind):
    made, ids = model(**kind), some_ids(1, LENGTH)
    fresh = base()(input_ids=ids, use_cache=False).logits
    with made.adapted(), made.adapted():
        pass
    assert torch.equal(made.base(input_ids=ids, use_cache=False).logits, fresh)
    with pytest.raises(IndexError), made.adapted():
        made.base(input_ids=ids + 10**6)
    assert torch.equal(made.base(input_ids=ids, use_cache=False).logits, fresh)
    with made.adapted():
        once = made.base(input_ids=ids, use_cache=False).logits
        with made.adapted():
            assert torch.equal(made.base(input_ids=ids, use_cache=False).logits, once)
        assert torch.equal(made.base(input_ids=ids, use_cache=False).logits, once)
    assert not torch.equal(once, fresh)


def in_pieces(made: TRMModel, rows: list[list[int]], cuts: list[int]) -> list[Tensor]:
    """The logits of each row, read in passes behind a cache, of which some are tried in vain before."""
    found: list[list[Tensor]] = [[] for _ in rows]
    longest = max(map(len, rows))
    cache = made.backbone.new_cache(batch_size=len(rows), capacity=longest)
    edges = sorted({0, *(cut for cut in cuts if cut < longest), longest})
    with torch.no_grad(), made.adapted():
        for start, end in pairwise(edges):
            pieces = [row[start:end] for row in rows]
            widths = [len(piece) for piece in pieces]
            ids = torch.tensor([[*piece, *[0] * (max(widths) - len(piece))] for piece in pieces])
            made.backbone.run((ids + 1) % 256, cache, widths=widths)
            logits = made.backbone.run(ids, cache, widths=widths)
            cache.commit(widths)
            for row, width in enumerate(widths):
                found[row].append(logits[row, :width])
    return [torch.cat(parts) for parts in found]


@given(
    st.sampled_from(KINDS), st.sampled_from(HALTING), st.lists(st.integers(1, LENGTH - 1), max_size=4),
    st.lists(st.integers(1, LENGTH), min_size=1, max_size=3), st.sampled_from(["llama", "nanochat"]),
)  # fmt: skip
def test_in_any_pieces_and_any_company_rows_are_what_they_are_alone(kind, halting, cuts, lengths, name):
    if kind["placement"] != "head" and halting.get("halt") in ("kl", "learned"):
        halting = {}
    made = model(name, trm_T=4, **kind, **halting)
    rows = [some_ids(1, length, seed=seed)[0].tolist() for seed, length in enumerate(lengths)]
    for row, logits in zip(rows, in_pieces(made, rows, cuts), strict=True):
        torch.testing.assert_close(logits, forward(made, torch.tensor([row]))[0], **TIGHT)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_behind_states_of_recurrent_layers_as_well(kind):
    made, rows = model("kimi_linear", **kind), [some_ids(1, LENGTH)[0].tolist()]
    (logits,) = in_pieces(made, rows, [5, 6])
    # transformers computes parts of these layers in float32, whatever the model is in.
    torch.testing.assert_close(logits, forward(made, torch.tensor(rows))[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_part_of_a_pass_may_be_committed_and_rows_dropped(kind):
    made, ids = model(**kind), some_ids(2, LENGTH)
    cache = made.backbone.new_cache(batch_size=2, capacity=LENGTH)
    with torch.no_grad(), made.adapted():
        made.backbone.run(ids[:, :8], cache)
        cache.commit([5, 3])
        snapshot = cache.snapshot()
        made.backbone.run(ids[:, 8:10], cache)
        cache.commit([2, 1])
        cache.rollback(snapshot)
        cache.keep_rows([1])
        logits = made.backbone.run(ids[1:, 3:], cache)
    torch.testing.assert_close(logits, forward(made, ids[1:])[:, 3:], **TIGHT)


@given(st.sampled_from(KINDS), st.integers(0, LENGTH - 1), st.integers(0, 9))
def test_another_token_moves_nothing_before_it(kind, place, seed):
    made, ids = model(**kind), some_ids(2, LENGTH, seed=seed)
    other = ids.clone()
    other[0, place] = (other[0, place] + 1) % 256
    moved = (forward(made, other) - forward(made, ids)).abs().amax(dim=-1)
    assert (moved[0, :place] == 0).all() and (moved[1] == 0).all() and moved[0, place] > 0


class TestHalting:
    """Of a whole model; the rules themselves are in test_halting.py."""

    @pytest.mark.parametrize("halting", HALTING[1:], ids=str)
    @pytest.mark.parametrize("mixing", ["position", "evidence"])
    def test_each_position_makes_as_many_steps_as_its_rule_lets_it(self, halting, mixing):
        made, ids = model(mixing=mixing, trm_T=6, **halting), some_ids(3, LENGTH)
        by_steps = [self.after(made, ids, T) for T in range(1, 7)]
        actual = forward(made, ids)
        made_steps = torch.stack([torch.isclose(each, actual, **TIGHT).all(dim=-1) for each in by_steps])
        assert made_steps.any(dim=0).all(), "some position has made no whole number of steps"
        found = made_steps.int().argmax(dim=0) + 1
        assert len(found.unique()) > 1, "a rule by which all stop together tells nothing"

    def after(self, made: TRMModel, ids: Tensor, T: int) -> Tensor:
        assert made._lent is not None
        with made._lent.asked(Ask(T=T, halts=False)):
            return forward(made, ids)

    def test_which_positions_get_logits_changes_none_of_them(self):
        """And no others are refined."""
        made, ids = model(mixing="evidence", halt="kl", halt_threshold=0.5, trm_T=5), some_ids(2, LENGTH)
        places = [0, 3, 4, 11]
        with torch.no_grad(), made.adapted():
            some = made.base(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor(places)).logits
            assert made._lent is not None and made._lent.refined[0].d.shape[1] == 4
            last = made.base(input_ids=ids, use_cache=False, logits_to_keep=2).logits
            assert made._lent.refined[0].d.shape[1] == 2
        torch.testing.assert_close(some, forward(made, ids)[:, places], **TIGHT)
        torch.testing.assert_close(last, forward(made, ids)[:, -2:], **TIGHT)

    def test_no_rule_is_one_that_says_nothing(self):
        made = model()
        assert made.refiner is not None
        assert stop_of(made.config, made.refiner, lambda hidden: hidden) is None


class TestRefused:
    def test_a_layer_that_is_not_there(self):
        with pytest.raises(ConfigError, match="placement names layer 4"):
            model(placement=[1, 4])


CACHES: dict[str, Callable[[Any], Cache]] = {
    "made by the model": lambda config: None,
    "dynamic": lambda config: DynamicCache(),
    "dynamic, of its layers": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=LENGTH + 3),
}


class TestCachesOfTransformers:
    @staticmethod
    def read(made: TRMModel, ids: Tensor, cache: Any, cuts: list[int]) -> Tensor:
        edges = sorted({0, *(cut for cut in cuts if cut < ids.shape[1]), ids.shape[1]})
        parts = []
        with torch.no_grad(), made.adapted():
            for start, end in pairwise(edges):
                output = made.base(input_ids=ids[:, start:end], past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                parts.append(output.logits)
        return torch.cat(parts, dim=1)

    @given(
        st.sampled_from(sorted(CACHES)), st.sampled_from(KINDS), st.sampled_from(HALTING[:2]),
        st.lists(st.integers(1, LENGTH - 1), max_size=4), st.sampled_from(["llama", "nanochat"]),
    )  # fmt: skip
    def test_in_any_pieces_rows_are_what_they_are_as_a_whole(self, cache, kind, halting, cuts, name):
        made, ids = model(name, trm_T=4, **kind, **halting), some_ids(2, LENGTH)
        logits = self.read(made, ids, CACHES[cache](made.base.config), cuts)
        torch.testing.assert_close(logits, forward(made, ids), **TIGHT)

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_tokens_are_taken_back_rows_chosen_and_all_forgotten(self, kind, cache):
        made, ids = model(**kind), some_ids(3, LENGTH)
        held = CACHES[cache](made.base.config)
        self.read(made, ids, held, [4])
        held.reset()
        torch.testing.assert_close(self.read(made, ids, held, [6]), forward(made, ids), **TIGHT)
        if cache == "static":
            return
        held.crop(-5)
        held.reorder_cache(torch.tensor([2, 0, 0]))
        held.batch_repeat_interleave(2)
        held.batch_select_indices(torch.tensor([0, 3, 4]))
        rows = ids[[2, 0, 0]]
        rest = self.read(made, rows[:, -5:], held, [2])
        torch.testing.assert_close(rest, forward(made, rows)[:, -5:], **TIGHT)

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    @pytest.mark.parametrize("cache", sorted(CACHES))
    def test_pads_on_the_left_are_no_evidence(self, kind, cache):
        made, ids = model(**kind), some_ids(2, LENGTH)
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        mask[1, :5] = 0
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        held, parts = CACHES[cache](made.base.config), []
        with torch.no_grad(), made.adapted():
            for start, end in ((0, 9), (9, LENGTH)):
                output = made.base(
                    input_ids=ids[:, start:end], attention_mask=mask[:, :end], position_ids=positions[:, start:end],
                    past_key_values=held, use_cache=True,
                )  # fmt: skip
                held = output.past_key_values
                parts.append(output.logits)
        logits = torch.cat(parts, dim=1)
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[0], forward(made, ids[:1])[0], **TIGHT)
        torch.testing.assert_close(logits[1, 5:], forward(made, ids[1:, 5:])[0], **TIGHT)

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    @pytest.mark.parametrize(
        "ways",
        [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}],
        ids=str,
    )
    def test_what_transformers_generates_is_what_it_does_without_a_cache(self, kind, ways):
        made, ids = model(**kind), some_ids(1, 9)
        given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        beams = {name: value for name, value in ways.items() if name == "num_beams"}
        with torch.no_grad(), made.adapted():
            expected = made.base.generate(ids, use_cache=False, **given, **beams)
            assert torch.equal(made.base.generate(ids, **given, **ways), expected)

    @pytest.mark.parametrize("placement", ["head", (1,)])
    def test_tokens_that_were_read_without_the_refiner_are_refused(self, placement):
        made, cache = model(mixing="evidence", placement=placement), DynamicCache()
        made.base(input_ids=some_ids(1, 4), past_key_values=cache, use_cache=True)
        with (
            made.adapted(),
            pytest.raises(UnsupportedBackbone, match="holds 4 tokens, of which 4 were read without the refi"),
        ):
            made.base(input_ids=some_ids(1, 1), past_key_values=cache, use_cache=True)

    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    def test_tokens_that_the_base_alone_has_read_in_between_are_refused(self, cache):
        made, ids = model(mixing="evidence"), some_ids(1, 7)
        held = CACHES[cache](made.base.config)
        self.read(made, ids[:, :4], held, [])
        made.base(input_ids=ids[:, 4:6], past_key_values=held, use_cache=True)
        with pytest.raises(UnsupportedBackbone, match="holds 6 tokens, of which 2 were read without the refiner"):
            self.read(made, ids[:, 6:], held, [])

    def test_a_pad_sees_itself_alone(self):
        """So that no kernel divides nothing by nothing."""
        places, mask = torch.arange(3), torch.tensor([[0, 0, 1]])
        seen = unmasked(up_to(places[None], 4), mask, places, places)
        assert seen[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]
        low = torch.full((1, 1, 3, 3), -1e30).masked_fill(torch.tensor([False, False, True]), 0.0)
        assert torch.equal(unmasked(up_to(places[None], 4), low, places, places), seen)

    def test_a_cache_that_holds_a_window_has_no_room(self):
        made = model(mixing="evidence")
        config = MistralConfig(num_hidden_layers=made.backbone.num_layers, sliding_window=4)
        with pytest.raises(UnsupportedBackbone, match="all layers of this StaticCache hold a sliding window"):
            self.read(made, some_ids(1, 3), StaticCache(config=config, max_cache_len=32), [])
        with pytest.raises(UnsupportedBackbone, match="this model's masks are of sliding_attention alone"):
            unmasked(
                torch.ones(1, 1, 3, 3, dtype=torch.bool), {"sliding_attention": None}, torch.arange(3), torch.arange(3)
            )

    def test_a_cache_that_moves_its_layers_is_refused(self):
        made, held = model(mixing="evidence"), DynamicCache()
        held.offloading = True
        entries = torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4)
        with pytest.raises(UnsupportedBackbone, match="moves its layers between devices"):
            added_entries(held, "x", *entries, num_layers=made.backbone.num_layers, num_before=0)

    def test_layers_that_run_again_for_the_backward_move_the_same(self):
        made, ids = model(mixing="evidence", placement=(1,), trains="all"), some_ids(1, 6)
        made.base.train()
        made.base.activation_checkpointing_enable()
        found = []
        for use_cache in (None, False):
            with made.adapted():
                made.base(input_ids=ids, use_cache=use_cache).logits.sum().backward()
            found.append([each.grad.clone() for each in made.refiner.parameters()])
            made.zero_grad()
        assert all(torch.equal(*pair) for pair in zip(*found, strict=True))

    def test_behind_states_of_recurrent_layers_as_well(self):
        made, ids = model("kimi_linear", mixing="evidence"), some_ids(2, LENGTH)
        logits = self.read(made, ids, None, [5, 6])
        torch.testing.assert_close(logits, forward(made, ids), rtol=1e-3, atol=1e-3)

    def test_arguments_may_have_no_names(self):
        made, ids, cache = model(mixing="evidence"), some_ids(1, 6), DynamicCache()
        with torch.no_grad(), made.adapted():
            made.base(ids[:, :4], None, None, cache, use_cache=True)
            logits = made.base(ids[:, 4:], None, None, cache, use_cache=True).logits
        torch.testing.assert_close(logits, forward(made, ids)[:, 4:], **TIGHT)

    def test_positions_by_themselves_take_any_cache(self):
        """A transformers cache has all that they need."""
        made, ids, cache = model(), some_ids(1, 6), DynamicCache()
        with torch.no_grad(), made.adapted():
            parts = [
                made.base(input_ids=ids[:, start : start + 3], past_key_values=cache, use_cache=True).logits
                for start in (0, 3)
            ]
        torch.testing.assert_close(torch.cat(parts, dim=1), forward(made, ids), **TIGHT)
