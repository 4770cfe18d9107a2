"""LoRA at chosen positions: merged weights there, the base's bits elsewhere, and nothing left behind."""

import copy
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from deepen.backbones import fused, tiny
from deepen.backbones.cache import PrefixCache
from deepen.backbones.gated_lora import GatedLora
from deepen.backbones.hf import Backbone
from deepen.backbones.lasting import Again
from deepen.core.errors import CheckpointError, ConfigError, DeepenError, UnsupportedBackbone
from deepen.core.types import Work

ATTENTION_ONLY = ("llama", "qwen3", "nanochat")
PREFIX_LENGTHS = (9, 4, 130)
WIDTHS = (6, 1, 4)
NUM_SLOTS = (4, 0, 3)


def attach(name: str, *, packed: bool = False, dtype: torch.dtype = torch.float32) -> Backbone:
    backbone = Backbone.attach(tiny.build(name, dtype=dtype))
    backbone.model.requires_grad_(False)
    if packed:
        backbone.pack()
    return backbone


def lora_on(backbone: Backbone, *, std: float = 0.2, layers: Sequence[int] = (2, 3), **settings: object) -> GatedLora:
    """With weights that change the output."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        lora = GatedLora(backbone, **{"rank": 4, "alpha": 6.0, "layers": layers, **settings})
        with torch.no_grad():
            for name, tensor in lora.tensors().items():
                if "lora_B" in name:
                    tensor.normal_(std=std)
    return lora


def ids(batch: int, width: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (batch, width), generator=torch.Generator().manual_seed(seed))


PREFIXES = ids(3, max(PREFIX_LENGTHS), seed=1)
CHUNKS = ids(3, max(WIDTHS), seed=2)


def trailing(widths: Sequence[int], counts: Sequence[int], width: int | None = None) -> Tensor:
    """The last `counts[row]` of the first `widths[row]` positions."""
    mask = torch.zeros(len(widths), width or max(widths), dtype=torch.bool)
    for row, (end, count) in enumerate(zip(widths, counts, strict=True)):
        mask[row, end - count : end] = True
    return mask


SLOTS, REAL = trailing(WIDTHS, NUM_SLOTS), trailing(WIDTHS, WIDTHS)


def prefilled(backbone: Backbone) -> PrefixCache:
    cache = backbone.new_cache(batch_size=3, capacity=max(PREFIX_LENGTHS) + 16)
    backbone.run(PREFIXES, cache, widths=PREFIX_LENGTHS)
    cache.commit(PREFIX_LENGTHS)
    return cache


def chunk_pass(backbone: Backbone, *loras: GatedLora, mask: Tensor = SLOTS) -> Tensor:
    """Logits of a ragged pass with LoRA behind ragged prefixes without it."""
    cache = prefilled(backbone)
    with ExitStack() as blocks:
        for lora in loras:
            blocks.enter_context(lora.acting_at(mask))
        return backbone.run(CHUNKS, cache, widths=WIDTHS)


class Mixed(nn.Module):
    """Two linears in one: that with the merged weight where the mask holds, the base's elsewhere."""

    def __init__(self, linear: nn.Module, inner: Tensor, outer: Tensor, scale: float, mask: Tensor) -> None:
        super().__init__()
        self.linear, self.inner, self.outer, self.scale, self.mask = linear, inner, outer, scale, mask

    def forward(self, x: Tensor) -> Tensor:
        transposed = not isinstance(self.linear, nn.Linear)
        weight = self.linear.weight.T if transposed else self.linear.weight
        merged = weight + self.scale * (self.outer @ self.inner).to(weight.dtype)
        chosen = self.mask.view(*x.shape[:-1], 1)
        return torch.where(chosen, F.linear(x, merged, self.linear.bias), self.linear(x))


def mixed_logits(model: PreTrainedModel, lora: GatedLora, scale: float, row: Tensor, mask: Tensor) -> Tensor:
    """Plain forward over one row `[1, T]` with LoRA at its `mask` `[1, T]`; uses the very A and B of `lora`."""
    mixed = copy.deepcopy(model)
    tensors = lora.tensors()
    for path in {name.partition(".lora_")[0] for name in tensors}:
        parent, _, name = path.rpartition(".")
        inner, outer = (tensors[f"{path}.lora_{part}.weight"] for part in "AB")
        linear = mixed.get_submodule(path)
        setattr(mixed.get_submodule(parent), name, Mixed(linear, inner, outer, scale, mask))
    return mixed(row, use_cache=False).logits


def expected_rows(name: str, lora: GatedLora, mask: Tensor = SLOTS, scale: float = 1.5) -> list[Tensor]:
    """What each row of `chunk_pass` should say, `[widths[row], V]`, each computed alone."""
    model = tiny.build(name).requires_grad_(False)
    found = []
    for row, (length, width) in enumerate(zip(PREFIX_LENGTHS, WIDTHS, strict=True)):
        whole = torch.cat([PREFIXES[row, :length], CHUNKS[row, :width]])[None]
        chosen = torch.cat([torch.zeros(length, dtype=torch.bool), mask[row, :width]])[None]
        found.append(mixed_logits(model, lora, scale, whole, chosen)[0, length:])
    return found


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def hooks_in(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class TestEffect:
    @torch.no_grad()
    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_at_chosen_positions_it_is_the_merged_weight(self, name, packed):
        backbone = attach(name, packed=packed)
        lora = lora_on(backbone)
        clean = chunk_pass(backbone)
        actual = chunk_pass(backbone, lora)
        for row, expected in enumerate(expected_rows(name, lora)):
            torch.testing.assert_close(actual[row, : WIDTHS[row]], expected, rtol=1e-3, atol=1e-3)
        assert (actual - clean)[SLOTS].abs().max() > 0.3

    @torch.no_grad()
    def test_positions_need_not_be_neighbours(self):
        mask = torch.tensor([[1, 0, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]], dtype=torch.bool)
        for name in ("llama", "kimi_linear"):
            backbone = attach(name)
            lora = lora_on(backbone)
            actual = chunk_pass(backbone, lora, mask=mask)
            for row, expected in enumerate(expected_rows(name, lora, mask)):
                torch.testing.assert_close(actual[row, : WIDTHS[row]], expected, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["llama", "kimi_linear", "qwen3_next"])
    def test_a_forward_outside_of_passes(self, name):
        backbone = attach(name)
        lora = lora_on(backbone)
        mask = torch.tensor([[False, True, False, True, True]])
        with lora.acting_at(mask):
            actual = backbone.model(CHUNKS[:1, :5]).logits
        expected = mixed_logits(tiny.build(name), lora, 1.5, CHUNKS[:1, :5], mask)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    def test_weights_that_are_transposed(self):
        config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            backbone = Backbone.attach(GPT2LMHeadModel(config).eval())
        lora = lora_on(backbone, layers=[1])
        assert lora.tensors()["transformer.h.1.attn.c_attn.lora_B.weight"].shape == (96, 4)
        tokens, mask = ids(1, 6) % 64, torch.tensor([[False, False, True, True, False, True]])
        with lora.acting_at(mask):
            actual = backbone.run(tokens, backbone.new_cache(batch_size=1, capacity=6))
        expected = mixed_logits(backbone.model, lora, 1.5, tokens, mask)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
    def test_a_new_one_changes_nothing(self, packed):
        backbone = attach("llama", packed=packed)
        lora = GatedLora(backbone, rank=4, alpha=8.0, layers=[0, 3])
        clean = chunk_pass(backbone)
        assert torch.equal(chunk_pass(backbone, lora), clean)
        assert all((tensor == 0).all() == ("lora_B" in name) for name, tensor in lora.tensors().items())

    @torch.no_grad()
    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
    def test_blocks_in_each_other_add_up(self, packed):
        backbone = attach("llama", packed=packed)
        half, whole = lora_on(backbone, alpha=3.0), lora_on(backbone, alpha=6.0)
        expected = chunk_pass(backbone, whole)
        torch.testing.assert_close(chunk_pass(backbone, half, half), expected, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_a_base_of_16_bits_has_lora_of_32_and_computes_in_16(self):
        backbone = attach("llama", dtype=torch.bfloat16)
        lora = lora_on(backbone)
        assert {tensor.dtype for tensor in lora.tensors().values()} == {torch.float32}
        clean = chunk_pass(backbone)
        actual = chunk_pass(backbone, lora)
        assert actual.dtype == torch.bfloat16
        assert (actual - clean)[SLOTS].abs().max() > 0.3
        assert torch.equal(actual[REAL & ~SLOTS], clean[REAL & ~SLOTS])

    @torch.no_grad()
    def test_a_base_of_64_bits_has_lora_of_64(self):
        backbone = attach("llama", dtype=torch.float64)
        assert {tensor.dtype for tensor in lora_on(backbone).tensors().values()} == {torch.float64}


class TestCleanPositions:
    @torch.no_grad()
    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
    @pytest.mark.parametrize("name", ATTENTION_ONLY)
    def test_they_are_the_base_s_bit_for_bit_and_so_is_what_they_commit(self, name, packed):
        backbone = attach(name, packed=packed)
        lora = lora_on(backbone, layers=[0, 1, 2, 3], std=5.0)
        counts = [width - count for width, count in zip(WIDTHS, NUM_SLOTS, strict=True)]
        logits, after = [], []
        for mask in (torch.zeros_like(SLOTS), SLOTS):
            cache = prefilled(backbone)
            with lora.acting_at(mask):
                logits.append(backbone.run(CHUNKS, cache, widths=WIDTHS))
            cache.commit(counts)
            after.append(backbone.run(CHUNKS.flip(1), cache))
        assert torch.equal(logits[0][REAL & ~SLOTS], logits[1][REAL & ~SLOTS])
        assert not torch.isclose(logits[0], logits[1], atol=0.1)[SLOTS].all(dim=-1).any()
        assert torch.equal(*after)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["kimi_linear", "qwen3_next"])
    def test_in_a_mixture_of_experts_they_are_the_base_s_up_to_the_grouping_of_rows(self, name):
        backbone = attach(name)
        lora = lora_on(backbone, layers=[0, 1, 2, 3])
        clean = chunk_pass(backbone)
        actual = chunk_pass(backbone, lora)
        torch.testing.assert_close(actual[REAL & ~SLOTS], clean[REAL & ~SLOTS], rtol=1e-4, atol=1e-4)
        assert (actual - clean)[SLOTS].abs().max() > 0.3

    @torch.no_grad()
    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_each_linear_gives_them_the_same_bits(self, name, packed):
        """Whatever they hold: infinities and NaN too."""
        backbone = attach(name, packed=packed)
        lora = lora_on(backbone)
        mask = torch.tensor([[True, False, False, True], [False, False, True, False]])
        for path in {name.partition(".lora_")[0] for name in lora.tensors()}:
            linear = backbone.model.get_submodule(path)
            x = torch.randn(2, 4, linear.in_features, generator=torch.Generator().manual_seed(0))
            x[0, 1], x[0, 2, 0], x[1, 0, 1] = float("inf"), float("nan"), -float("inf")
            expected = linear(x)
            with lora.acting_at(mask):
                actual = linear(x)
            assert torch.equal(bits(actual)[~mask], bits(expected)[~mask])
            assert not torch.equal(actual[mask], expected[mask]) and actual[mask].isfinite().all()

    @torch.no_grad()
    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
    @pytest.mark.parametrize("std", [1e30, float("inf")])
    @pytest.mark.parametrize("name", ATTENTION_ONLY)
    def test_weights_that_overflow_do_not_reach_them(self, name, std, packed):
        """Where what the layers give is kept finite, too."""
        backbone = attach(name, packed=packed)
        lora, cache = lora_on(backbone, layers=[0, 1, 2, 3], std=std), prefilled(backbone)
        clean = backbone.run(CHUNKS, cache, widths=WIDTHS)
        with lora.acting_at(SLOTS):
            actual = backbone.run(CHUNKS, cache, widths=WIDTHS, edit=lambda layer, h: h.nan_to_num(0.0, 0.0, 0.0))
        assert torch.equal(actual[REAL & ~SLOTS], clean[REAL & ~SLOTS])
        assert torch.equal(actual, clean) == (std == float("inf"))

    @torch.no_grad()
    def test_what_is_behind_the_mask_is_clean(self):
        """The pass itself is wider, or padded to whole blocks."""
        backbone = attach("llama")
        lora = lora_on(backbone, layers=[0])
        clean = chunk_pass(backbone)
        actual = chunk_pass(backbone, lora, mask=SLOTS[:, :3])
        assert torch.equal(actual[1], clean[1])
        for row, expected in enumerate(expected_rows("llama", lora, SLOTS & (torch.arange(6) < 3))):
            torch.testing.assert_close(actual[row, : WIDTHS[row]], expected, rtol=1e-3, atol=1e-3)

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["llama", "kimi_linear"])
    def test_pads_that_are_chosen_reach_no_row(self, name):
        """Behind a long row they have no entries of their own."""
        backbone = attach(name)
        lora, logits = lora_on(backbone, targets=["kv_b_proj"] if name == "kimi_linear" else None), []
        lengths, widths = (127, 4), (1, 6)
        for mask in (trailing(widths, widths), torch.ones(2, 6, dtype=torch.bool)):
            cache = backbone.new_cache(batch_size=2, capacity=133)
            backbone.run(PREFIXES[:2], cache, widths=lengths)
            cache.commit(lengths)
            with lora.acting_at(mask):
                logits.append(backbone.run(CHUNKS[:2], cache, widths=widths)[trailing(widths, widths)])
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_an_empty_mask_hooks_nothing(self):
        backbone = attach("llama")
        lora = lora_on(backbone)
        clean = chunk_pass(backbone)
        with lora.acting_at(torch.zeros_like(SLOTS)):
            assert hooks_in(backbone.model) == 0
        assert torch.equal(chunk_pass(backbone, lora, mask=torch.zeros_like(SLOTS)), clean)


class TestFusedLayers:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Indices of layers that computed fused."""
        seen: list[int] = []
        forward: Callable[..., Tensor] = fused.FusedForward._forward

        def counted(this: fused.FusedForward, *args: object, **kwargs: object) -> Tensor:
            seen.append(this._index)
            return forward(this, *args, **kwargs)

        monkeypatch.setattr(fused.FusedForward, "_forward", counted)
        return seen

    @torch.no_grad()
    def test_they_compute_fused_with_it(self, calls):
        backbone = attach("llama", packed=True)
        lora = lora_on(backbone, layers=[1, 2])
        chunk_pass(backbone, lora)
        assert calls == [0, 1, 2, 3] * 2

    @torch.no_grad()
    def test_another_hook_beside_it_is_called(self, calls):
        backbone = attach("llama", packed=True)
        lora = lora_on(backbone, layers=[1, 2])
        cache, seen = prefilled(backbone), []
        backbone.layers[1].mlp.up_proj.register_forward_hook(lambda module, inputs, output: seen.append(output))
        with lora.acting_at(SLOTS):
            calls.clear()
            actual = backbone.run(CHUNKS, cache, widths=WIDTHS)
        assert calls == [0, 2, 3] and len(seen) == 1
        for row, expected in enumerate(expected_rows("llama", lora)):
            torch.testing.assert_close(actual[row, : WIDTHS[row]], expected, rtol=1e-3, atol=1e-3)

    def test_where_it_learns_they_compute_as_themselves(self, calls):
        backbone = attach("llama", packed=True)
        lora, cache = lora_on(backbone, layers=[2]), prefilled(backbone)
        with lora.acting_at(SLOTS):
            calls.clear()
            logits = backbone.run(CHUNKS, cache, widths=WIDTHS)
        assert calls == [0, 1] and logits.requires_grad


class TestGradients:
    @pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
    @pytest.mark.parametrize("name", tiny.NAMES)
    def test_a_and_b_get_those_of_the_merged_weight_and_the_base_none(self, name, packed):
        backbone = attach(name, packed=packed)
        lora = lora_on(backbone)
        weights = torch.randn(256, generator=torch.Generator().manual_seed(0))

        def loss_of(logits: Tensor) -> Tensor:
            return logits[:, :256].tanh() @ weights

        loss_of(chunk_pass(backbone, lora)[SLOTS]).sum().backward()
        actual = {name: parameter.grad.clone() for name, parameter in lora.tensors().items()}
        assert all(parameter.grad is None for parameter in backbone.model.parameters())
        lora.zero_grad()
        rows = expected_rows(name, lora)
        sum(loss_of(rows[row][-count:]).sum() for row, count in enumerate(NUM_SLOTS) if count).backward()
        for path, parameter in lora.tensors().items():
            # Relative to the whole tensor: what cancels is only as exact as its parts.
            assert parameter.grad.abs().max() > 0, path
            tolerance = 2e-3 * float(parameter.grad.abs().max())
            torch.testing.assert_close(actual[path], parameter.grad, rtol=1e-3, atol=tolerance, msg=path)

    @pytest.mark.parametrize("name", ATTENTION_ONLY)
    def test_none_comes_from_clean_positions(self, name):
        backbone = attach(name)
        lora = lora_on(backbone)
        chunk_pass(backbone, lora)[REAL & ~SLOTS].square().sum().backward()
        assert all((parameter.grad == 0).all() for parameter in lora.parameters())

    def test_infinities_elsewhere_do_not_reach_it(self):
        backbone = attach("llama")
        lora = lora_on(backbone, layers=[3], targets=["up_proj"])
        mask = torch.tensor([[True, False, False, True]])
        x = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0))
        found = []
        for elsewhere in (0.0, float("inf")):
            lora.zero_grad()
            x[~mask] = elsewhere
            with lora.acting_at(mask):
                backbone.layers[3].mlp.up_proj(x)[mask].square().sum().backward()
            found.append([parameter.grad.clone() for parameter in lora.parameters()])
        for finite, infinite in zip(*found, strict=True):
            assert torch.equal(finite, infinite) and finite.abs().max() > 0

    def test_activation_checkpointing_within_the_block(self):
        backbone, found = attach("llama"), []

        def forward(tokens: Tensor) -> Tensor:
            return backbone.model(tokens, use_cache=False).logits

        for run in (forward, partial(checkpoint, forward, use_reentrant=False)):
            lora = lora_on(backbone)
            with lora.acting_at(SLOTS):
                run(CHUNKS).square().sum().backward()
            found.append([parameter.grad for parameter in lora.parameters()])
        for plain, again in zip(*found, strict=True):
            torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("is_inside", [False, True])
    def test_activation_checkpointing_that_enters_the_block_again(self, is_inside):
        """The backward is on another thread, as on a GPU, while this one holds the model."""
        backbone, found = attach("llama"), []

        def forward(tokens: Tensor) -> Tensor:
            return backbone.model(tokens, use_cache=False).logits

        def saving(tokens: Tensor) -> Tensor:
            return checkpoint(forward, tokens, use_reentrant=False, context_fn=lambda: (nullcontext(), Again()))

        for run in (forward, saving):
            lora = lora_on(backbone)
            with ExitStack() as block:
                block.enter_context(lora.acting_at(SLOTS))
                loss = run(CHUNKS).square().sum()
                if not is_inside:
                    block.close()
                with backbone.held():
                    thread = threading.Thread(target=loss.backward, daemon=True)
                    thread.start()
                    thread.join(timeout=60)
            assert not thread.is_alive() and hooks_in(backbone.model) == 0
            found.append([parameter.grad for parameter in lora.parameters()])
        for plain, again in zip(*found, strict=True):
            assert torch.equal(again, plain) and plain.abs().max() > 0


class TestBlock:
    def test_within_it_the_model_s_tree_is_what_it_was_and_after_it_all_is(self):
        backbone = attach("llama", packed=True)
        model, lora = backbone.model, lora_on(backbone)
        modules, keys = list(model.modules()), list(model.state_dict())
        clean = chunk_pass(backbone)
        with lora.acting_at(SLOTS):
            assert hooks_in(model) == 2 * 7
            assert list(model.modules()) == modules and list(model.state_dict()) == keys
        assert hooks_in(model) == 0
        assert list(model.modules()) == modules and list(model.state_dict()) == keys
        assert torch.equal(chunk_pass(backbone), clean)

    def test_nothing_is_left_after_a_failure_in_it(self):
        backbone = attach("llama")
        lora = lora_on(backbone)
        with pytest.raises(IndexError), lora.acting_at(SLOTS):
            backbone.run(CHUNKS + 10**6, prefilled(backbone), widths=WIDTHS)
        assert hooks_in(backbone.model) == 0

    def test_another_thread_s_passes_of_the_base_wait(self):
        backbone, found = attach("llama"), []
        lora, cache = lora_on(backbone), prefilled(backbone)
        clean = backbone.run(CHUNKS, cache, widths=WIDTHS)
        thread = threading.Thread(target=lambda: found.append(backbone.run(CHUNKS, cache, widths=WIDTHS)))
        with lora.acting_at(SLOTS):
            thread.start()
            thread.join(timeout=0.3)
            assert not found
        thread.join()
        assert torch.equal(found[0], clean)

    @pytest.mark.parametrize("shape", [(3, 9), (2, 6)], ids=["wider than the pass", "of fewer rows"])
    def test_a_mask_that_is_not_of_the_pass(self, shape):
        backbone = attach("llama")
        lora = lora_on(backbone)
        message = rf"a mask \[{shape[0]}, {shape[1]}\], and the pass in its block is over 3 rows of 8 positions"
        with pytest.raises(DeepenError, match=message):
            chunk_pass(backbone, lora, mask=torch.ones(shape, dtype=torch.bool))

    @torch.no_grad()
    @pytest.mark.parametrize("name", ["llama", "qwen3_next"])
    def test_outside_of_passes_the_mask_has_the_width_of_the_forward(self, name):
        backbone = attach(name)
        lora = lora_on(backbone, layers=[3])
        message = r"layers\.3\.self_attn\.q_proj reads \[3, 6, '..'\] in a forward"
        with pytest.raises(UnsupportedBackbone, match=message), lora.acting_at(SLOTS[:, :4]):
            backbone.model(CHUNKS)

    @torch.no_grad()
    def test_latent_entries_of_a_cache_of_transformers_are_refused(self):
        """Which of them are the forward's own, only a pass can tell."""
        backbone = attach("kimi_linear")
        lora = lora_on(backbone, targets=["kv_b_proj"])
        cache = backbone.model(PREFIXES[:, :8]).past_key_values
        message = r"layers\.3\.self_attn\.kv_b_proj reads \[3, 1, 14, '..'\]"
        with pytest.raises(UnsupportedBackbone, match=message), lora.acting_at(SLOTS):
            backbone.model(CHUNKS, past_key_values=cache)


class TestTargets:
    def test_all_linears_but_those_of_routing(self):
        def targets_of(name: str, layer: int) -> set[str]:
            names = lora_on(attach(name), layers=[layer]).tensors()
            return {name.removeprefix(f"model.layers.{layer}.").partition(".lora_")[0] for name in names}

        mlp = {"gate_proj", "up_proj", "down_proj"}
        shared = {f"mlp.shared_experts.{name}" for name in mlp}
        assert targets_of("llama", 1) == {
            *(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}" for name in mlp)
        }  # fmt: skip
        delta = {"q_proj", "k_proj", "v_proj", "o_proj", "b_proj", "g_a_proj", "g_b_proj"}
        delta |= {"forget_gate.f_a_proj", "forget_gate.f_b_proj"}
        assert targets_of("kimi_linear", 0) == {f"self_attn.{name}" for name in delta} | {f"mlp.{name}" for name in mlp}
        latent = {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
        assert targets_of("kimi_linear", 3) == {f"self_attn.{name}" for name in latent} | shared
        net = {f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")}
        assert targets_of("qwen3_next", 1) == net | {f"mlp.shared_expert.{name}" for name in mlp}

    def test_named_ones(self):
        lora = lora_on(attach("llama"), layers=[0, 2], targets=["q_proj", "mlp.down_proj"])
        assert list(lora.tensors()) == [
            f"model.layers.{layer}.{name}.lora_{part}.weight"
            for layer in (0, 2)
            for name in ("self_attn.q_proj", "mlp.down_proj")
            for part in "AB"
        ]
        shapes = [tuple(tensor.shape) for tensor in lora.tensors().values()]
        assert shapes[:4] == [(4, 64), (64, 4), (4, 176), (64, 4)]
        assert lora.num_parameters == 2 * 4 * (64 + 64 + 176 + 64)
        assert lora.flops_per_position == 2 * lora.num_parameters
        assert lora.work_per_position == Work(two_gradients=lora.num_parameters)

    @pytest.mark.parametrize(
        ("base", "settings", "message"),
        [
            ("llama", {"rank": 0}, "lora_rank must be at least 1, not 0"),
            ("llama", {"alpha": 0.0}, "lora_alpha must be positive, not 0.0"),
            ("llama", {"layers": []}, r"lora_layers must name at least one, and each once, not \[\]"),
            ("llama", {"layers": [1, 1]}, r"lora_layers must name at least one, and each once, not \[1, 1\]"),
            ("llama", {"layers": [4]}, r"lora_layers names layer 4, but the model has 4 layers \(0..3\)"),
            ("llama", {"layers": [-1]}, "lora_layers names layer -1"),
            ("llama", {"targets": []}, r"lora_targets must name at least one, and each once, not \[\]"),
            ("llama", {"targets": ["q_prj"]}, r'"q_prj", which is no linear there; did you mean "q_proj"\?'),
            ("qwen3_next", {"targets": ["shared_expert_gate"]}, '"shared_expert_gate", which is no linear there'),
        ],
    )
    def test_what_is_not_there(self, base, settings, message):
        with pytest.raises(ConfigError, match=message):
            lora_on(attach(base), **settings)

    def test_a_model_without_memory_is_counted(self):
        backbone = Backbone.attach(tiny.build("kimi_linear").to("meta"))
        lora = GatedLora(backbone, rank=2, alpha=2.0, layers=[3])
        assert all(parameter.is_meta for parameter in lora.parameters())
        assert lora.num_parameters == lora_on(attach("kimi_linear"), rank=2, layers=[3]).num_parameters


class TestSaving:
    @torch.no_grad()
    def test_loaded_tensors_act_as_they_did(self):
        backbone = attach("llama")
        lora, other = lora_on(backbone), GatedLora(backbone, rank=4, alpha=6.0, layers=[2, 3])
        saved = {name: tensor.detach().clone() for name, tensor in lora.tensors().items()}
        other.load(saved)
        assert torch.equal(chunk_pass(backbone, lora), chunk_pass(backbone, other))

    def test_tensors_that_do_not_fit(self):
        lora = lora_on(attach("llama"), targets=["q_proj"])
        saved = dict(lora.tensors())
        first = next(iter(saved))
        for given, message in (
            ({name: saved[name] for name in saved if name != first}, f"missing {first}"),
            ({**saved, "x": torch.zeros(1)}, "unknown x"),
            ({**saved, first: torch.zeros(2, 64)}, rf"{first} is \[2, 64\], expected \[4, 64\]"),
        ):
            with pytest.raises(CheckpointError, match=f"the LoRA tensors don't fit.*{message}"):
                lora.load(given)
