"""Refine cell, boundary head, latent token and slot embedding against plain loops and by perturbation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deepen.core.errors import ConfigError, DeepenError
from deepen.methods.chunk import modules
from deepen.methods.chunk.modules import (
    NORM_EPS,
    BoundaryHead,
    LatentToken,
    MaskToken,
    RefineCell,
    pooled_mean,
    sanitize,
)

D_MODEL, D_STATE, HIDDEN = 6, 4, 10

seeds = st.integers(0, 2**31 - 1)
batch_sizes = st.integers(1, 3)
widths = st.integers(1, 9)
poolings = st.sampled_from(["causal", "chunk"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def coin_flips(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=generator(seed + 1)) < 0.5


def fill_with_noise(module: nn.Module, *, std: float, seed: int) -> None:
    """Stands for training: every parameter drawn from a normal distribution."""
    source = generator(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=source, dtype=torch.float64) * std)


def noisy_cell(*, seed: int = 0, std: float = 0.5, dtype: torch.dtype = torch.float64) -> RefineCell:
    cell = RefineCell(D_MODEL, D_STATE, HIDDEN).to(dtype)
    fill_with_noise(cell, std=std, seed=seed)
    return cell


def bits(x: Tensor) -> Tensor:
    """The bit pattern, so that NaN equals itself and -0.0 differs from 0.0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


# The oracle: one position after the other, one row after the other, as the equations are printed.


def unit_rms(x: Tensor) -> Tensor:
    return x / (x.square().mean() + NORM_EPS).sqrt()


def oracle_mean(h: Tensor, positions: list[int]) -> Tensor:
    total = torch.zeros(h.shape[-1], dtype=torch.float64)
    for position in positions:
        total += h[position]
    return total / max(1, len(positions))


def oracle_refine(cell: RefineCell, h: Tensor, s: Tensor, mask: Tensor, pooling: str) -> Tensor:
    refined = h.clone()
    for row in range(h.shape[0]):
        chunk = mask[row].nonzero().flatten().tolist()
        for i in chunk:
            read = chunk if pooling == "chunk" else [j for j in chunk if j <= i]
            pre_activation = cell.inp.weight @ torch.cat([unit_rms(oracle_mean(h[row], read)), s[row]])
            refined[row, i] = h[row, i] + cell.out.weight @ (pre_activation * pre_activation.sigmoid())
    return refined


def oracle_next_state(cell: RefineCell, refined: Tensor, s: Tensor, mask: Tensor) -> Tensor:
    """GRU equations as in torch.nn.GRUCell, gates in the order reset, update, new."""
    moved = s.clone()
    gru = cell.state_upd
    for row in range(refined.shape[0]):
        chunk = mask[row].nonzero().flatten().tolist()
        if not chunk:
            continue
        x = unit_rms(oracle_mean(refined[row], chunk))
        from_x = (gru.weight_ih @ x + gru.bias_ih).chunk(3)
        from_s = (gru.weight_hh @ s[row] + gru.bias_hh).chunk(3)
        reset = (from_x[0] + from_s[0]).sigmoid()
        update = (from_x[1] + from_s[1]).sigmoid()
        new = (from_x[2] + reset * from_s[2]).tanh()
        moved[row] = (1 - update) * new + update * s[row]
    return moved


class TestRefineCell:
    @given(batch_size=batch_sizes, width=widths, seed=seeds, pooling=poolings)
    def test_equals_the_plain_loop(self, batch_size, width, seed, pooling):
        cell = noisy_cell(seed=seed)
        h, s = noise(batch_size, width, D_MODEL, seed=seed + 1), noise(batch_size, D_STATE, seed=seed + 2)
        mask = coin_flips(batch_size, width, seed=seed)

        refined, s_next = cell(h, s, mask, pooling)

        expected = oracle_refine(cell, h, s, mask, pooling)
        torch.testing.assert_close(refined, expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(s_next, oracle_next_state(cell, expected, s, mask), rtol=0, atol=1e-12)

    @given(batch_size=batch_sizes, width=widths, seed=seeds, pooling=poolings)
    def test_no_mask_means_every_position(self, batch_size, width, seed, pooling):
        cell = noisy_cell(seed=seed)
        h, s = noise(batch_size, width, D_MODEL, seed=seed), noise(batch_size, D_STATE, seed=seed)
        everywhere = torch.ones(batch_size, width, dtype=torch.bool)
        for with_mask, without in zip(cell(h, s, everywhere, pooling), cell(h, s, None, pooling), strict=True):
            torch.testing.assert_close(with_mask, without, rtol=0, atol=1e-13)

    @given(seed=seeds, width=st.integers(2, 9), data=st.data())
    def test_causal_pooling_shows_nothing_from_the_right(self, seed, width, data):
        moved = data.draw(st.integers(1, width - 1), label="moved position")
        cell = noisy_cell(seed=seed)
        h, s = noise(1, width, D_MODEL, seed=seed + 1), noise(1, D_STATE, seed=seed + 2)
        perturbed = h.clone()
        perturbed[:, moved] += 10 * noise(D_MODEL, seed=seed + 3)

        before, after = cell.refine(h, s), cell.refine(perturbed, s)

        assert torch.equal(before[:, :moved], after[:, :moved])
        assert not torch.equal(before[:, moved:] - h[:, moved:], after[:, moved:] - perturbed[:, moved:])

    @given(seed=seeds, width=st.integers(2, 9), data=st.data())
    def test_chunk_pooling_does_leak(self, seed, width, data):
        moved = data.draw(st.integers(1, width - 1), label="moved position")
        cell = noisy_cell(seed=seed)
        h, s = noise(1, width, D_MODEL, seed=seed + 1), noise(1, D_STATE, seed=seed + 2)
        perturbed = h.clone()
        perturbed[:, moved] += 10 * noise(D_MODEL, seed=seed + 3)

        before, after = cell.refine(h, s, pooling="chunk"), cell.refine(perturbed, s, pooling="chunk")

        assert not torch.equal(before[:, :moved], after[:, :moved])

    @given(
        batch_size=batch_sizes,
        width=widths,
        seed=seeds,
        pooling=poolings,
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        foreign=st.sampled_from([math.inf, -math.inf, math.nan, -0.0]),
    )
    def test_what_stands_outside_the_mask_is_neither_changed_nor_read(
        self, batch_size, width, seed, pooling, dtype, foreign
    ):
        cell = noisy_cell(seed=seed, dtype=torch.float32)
        h, s = noise(batch_size, width, D_MODEL, seed=seed, dtype=dtype), noise(batch_size, D_STATE, seed=seed)
        mask = coin_flips(batch_size, width, seed=seed)
        dirty = torch.where(mask.unsqueeze(-1), h, torch.full_like(h, foreign))

        refined, s_next = cell(h, s.to(dtype), mask, pooling)
        dirty_refined, dirty_s_next = cell(dirty, s.to(dtype), mask, pooling)

        assert torch.equal(bits(dirty_refined[~mask]), bits(dirty[~mask]))
        assert torch.equal(bits(dirty_refined[mask]), bits(refined[mask]))
        assert torch.equal(bits(dirty_s_next), bits(s_next))
        assert refined.isfinite().all() and s_next.isfinite().all()

    @pytest.mark.parametrize("pooling", ["causal", "chunk"])
    def test_gradients_ignore_what_stands_outside_the_mask(self, pooling):
        cell = noisy_cell()
        mask = torch.tensor([[False, True, True, False]])
        h = noise(1, 4, D_MODEL, seed=1)
        h[~mask] = math.inf
        h.requires_grad_()

        refined, s_next = cell(h, noise(1, D_STATE, seed=2), mask, pooling)
        (refined[mask].sum() + s_next.sum()).backward()

        assert h.grad.isfinite().all()
        assert torch.equal(h.grad[~mask], torch.zeros_like(h.grad[~mask]))
        assert all(parameter.grad.isfinite().all() for parameter in cell.parameters())

    def test_a_row_without_chunk_positions_keeps_everything(self):
        cell = noisy_cell()
        h, s = noise(2, 3, D_MODEL, seed=1), noise(2, D_STATE, seed=2)
        mask = torch.tensor([[True, True, True], [False, False, False]])
        refined, s_next = cell(h, s, mask)
        assert torch.equal(refined[1], h[1]) and torch.equal(s_next[1], s[1])
        assert not torch.equal(refined[0], h[0]) and not torch.equal(s_next[0], s[0])

    @given(width=widths, seed=seeds, pooling=poolings)
    def test_no_row_depends_on_its_batch_mates(self, width, seed, pooling):
        cell = noisy_cell(seed=seed)
        h, s = noise(3, width, D_MODEL, seed=seed), noise(3, D_STATE, seed=seed + 1)
        mask = coin_flips(3, width, seed=seed)
        together = cell(h, s, mask, pooling)
        for row in range(3):
            alone = cell(h[row : row + 1], s[row : row + 1], mask[row : row + 1], pooling)
            for batched, single in zip(together, alone, strict=True):
                torch.testing.assert_close(batched[row], single[0], rtol=0, atol=1e-13)

    @given(
        batch_size=batch_sizes,
        width=widths,
        seed=seeds,
        pooling=poolings,
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
        magnitude=st.sampled_from([0.0, 1e-4, 1.0, 1e3]),
    )
    def test_a_new_cell_changes_no_element(self, batch_size, width, seed, pooling, dtype, magnitude):
        torch.manual_seed(seed)
        cell = RefineCell(D_MODEL, D_STATE, HIDDEN)
        h = (noise(batch_size, width, D_MODEL, seed=seed) * magnitude).to(dtype)
        refined, s_next = cell(h, noise(batch_size, D_STATE, seed=seed, dtype=dtype), None, pooling)
        assert torch.equal(refined, h)
        assert refined.dtype == s_next.dtype == dtype

    def test_a_new_cell_can_learn(self):
        cell = RefineCell(D_MODEL, D_STATE, HIDDEN)
        cell.refine(noise(1, 3, D_MODEL, seed=1, dtype=torch.float32)).square().sum().backward()
        assert cell.out.weight.grad.abs().max() > 0

    def test_every_parameter_gets_a_gradient_once_filled(self):
        cell = noisy_cell()
        refined, s_next = cell(noise(2, 5, D_MODEL, seed=1), noise(2, D_STATE, seed=2))
        (refined.square().sum() + s_next.square().sum()).backward()
        for name, parameter in cell.named_parameters():
            assert parameter.grad.abs().max() > 0, name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_magnitudes_do_not_compound_over_thirty_wild_cells(self, dtype):
        wild = [noisy_cell(seed=seed, std=5.0, dtype=torch.float32) for seed in range(30)]
        h = noise(2, 8, D_MODEL, seed=99, dtype=dtype)
        s = torch.zeros(2, D_STATE, dtype=dtype)
        largest_steps = []
        for cell in wild:
            refined, s = cell(h, s)
            largest_steps.append((refined - h).abs().max().item())
            h = refined
        assert h.isfinite().all() and s.isfinite().all()
        # Additive growth: the steps of the last ten cells are no larger in kind than those of the first ten.
        assert max(largest_steps[-10:]) < 5 * max(largest_steps[:10])

    def test_magnitudes_compound_without_the_norm(self, monkeypatch):
        monkeypatch.setattr(modules.F, "rms_norm", lambda x, *_, **__: x)
        h = noise(2, 8, D_MODEL, seed=99, dtype=torch.float32)
        for seed in range(30):
            h = noisy_cell(seed=seed, std=5.0, dtype=torch.float32).refine(h)
        assert not h.isfinite().all()

    @given(scale=st.floats(1e2, 1e15), seed=seeds, width=widths, pooling=poolings)
    def test_what_a_cell_reads_does_not_grow_with_the_hidden_states(self, scale, seed, width, pooling):
        h = noise(2, width, D_MODEL, seed=seed)
        pooled = pooled_mean(h * scale, pooling=pooling)
        # At RMS 1e-3 and above NORM_EPS is no longer felt; the mean of a few rows of noise is far above it.
        torch.testing.assert_close(pooled, pooled_mean(h * 1e2, pooling=pooling), rtol=1e-4, atol=1e-4)
        assert (pooled.square().mean(-1) <= 1 + 1e-12).all()

    @pytest.mark.parametrize("with_state", [True, False], ids=["state", "zero state"])
    def test_fp32_weights_serve_bf16_hidden_states(self, with_state):
        cell = noisy_cell(std=0.3, dtype=torch.float32)
        h, s = noise(2, 7, D_MODEL, seed=1, dtype=torch.bfloat16), noise(2, D_STATE, seed=2, dtype=torch.bfloat16)
        state = s if with_state else None

        refined = cell.refine(h, state)

        assert refined.dtype == torch.bfloat16 and cell.out.weight.dtype == torch.float32
        everywhere = torch.ones(2, 7, dtype=torch.bool)
        exact_cell = noisy_cell(std=0.3)
        exact = oracle_refine(exact_cell, h.double(), s.double() * with_state, everywhere, "causal")
        torch.testing.assert_close(refined.double(), exact, rtol=0.03, atol=0.03)
        # Casting on use and moving the module once are the same computation.
        assert torch.equal(refined, cell.to(torch.bfloat16).refine(h, state))

    def test_the_state_takes_the_dtype_of_the_hidden_states(self):
        cell = noisy_cell(dtype=torch.float32)
        h = noise(1, 3, D_MODEL, seed=1, dtype=torch.bfloat16)
        refined, s_next = cell(h, torch.zeros(1, D_STATE))
        assert refined.dtype == s_next.dtype == torch.bfloat16

    def test_means_are_taken_in_fp32(self):
        """A thousand bf16 ones: a bf16 running sum stops growing at 256, which would halve the later means."""
        h = torch.ones(1, 1000, D_MODEL, dtype=torch.bfloat16)
        h[..., 0] = 3.0
        pooled = pooled_mean(h)
        assert torch.equal(pooled[0, -1], pooled[0, 0])

    def test_no_state_is_the_zero_state(self):
        cell = noisy_cell()
        h = noise(2, 5, D_MODEL, seed=1)
        initial = cell.initial_state(h)
        assert initial.shape == (2, D_STATE) and initial.dtype == h.dtype and not initial.any()
        assert torch.equal(cell.refine(h), cell.refine(h, initial))

    def test_forward_composes_refine_and_next_state(self):
        cell = noisy_cell()
        h, s = noise(2, 5, D_MODEL, seed=1), noise(2, D_STATE, seed=2)
        mask = coin_flips(2, 5, seed=3)
        refined, s_next = cell(h, s, mask)
        assert torch.equal(refined, cell.refine(h, s, mask))
        assert torch.equal(s_next, cell.next_state(refined, s, mask))

    @pytest.mark.parametrize(("d_model", "hidden", "millions"), [(2304, None, 51.5), (576, None, 5.5), (576, 144, 1.9)])
    def test_size(self, d_model, hidden, millions):
        with torch.device("meta"):
            cell = RefineCell(d_model, hidden=hidden)
        assert round(cell.num_parameters / 1e6, 1) == millions

    def test_default_width_is_four_times_the_hidden_size(self):
        cell = RefineCell(D_MODEL, D_STATE)
        assert cell.hidden == 4 * D_MODEL and cell.out.in_features == 4 * D_MODEL
        assert cell.inp.bias is None and cell.out.bias is None

    @given(batch_size=batch_sizes, width=widths)
    def test_counted_flops_are_the_profiler_s(self, batch_size, width):
        cell = noisy_cell()
        h, s = noise(batch_size, width, D_MODEL, seed=1), noise(batch_size, D_STATE, seed=2)
        positions = batch_size * width * cell.flops_per_token
        assert measured_flops(lambda: cell.refine(h)) == positions
        assert measured_flops(lambda: cell.refine(h, s)) == positions + batch_size * cell.flops_per_row
        assert measured_flops(lambda: cell.next_state(h, s)) == batch_size * cell.flops_per_state_update
        chunk_wide = batch_size * (cell.flops_per_token + cell.flops_per_row)
        assert measured_flops(lambda: cell.refine(h, s, pooling="chunk")) == chunk_wide

    def test_misfits_are_refused_in_words(self):
        cell = RefineCell(D_MODEL, D_STATE, HIDDEN)
        h, s = torch.zeros(1, 2, D_MODEL), torch.zeros(1, D_STATE)
        with pytest.raises(DeepenError, match=r"built for hidden size 6 and got hidden states of size 8"):
            cell(torch.zeros(1, 2, 8), s)
        with pytest.raises(DeepenError, match=r"states of size 4 and got one of size 5"):
            cell(h, torch.zeros(1, 5))
        with pytest.raises(DeepenError, match=r"RefineCell is on cpu and got hidden states on meta"):
            cell(h.to("meta"), s)
        with pytest.raises(DeepenError, match=r"hidden states on cpu and its state on meta"):
            cell(h, s.to("meta"))

    def test_an_unknown_pooling_is_refused(self):
        # The type checker of the tests may get there first; users have none.
        with pytest.raises((ConfigError, TypeCheckError), match="pooling"):
            pooled_mean(torch.zeros(1, 2, D_MODEL), pooling="mean")


class TestBoundaryHead:
    @given(max_len=st.integers(1, 400), seed=seeds, magnitude=st.sampled_from([0.0, 1.0, 1e4]))
    def test_untrained_it_commits_late_and_whole(self, max_len, seed, magnitude):
        head = BoundaryHead(D_MODEL, gate_hidden=8, max_len=max_len)
        h = noise(2, 3, D_MODEL, seed=seed, dtype=torch.float32) * magnitude
        p_commit, length_log_probs = head(h)
        torch.testing.assert_close(p_commit, torch.full((2,), 1 / (1 + math.exp(2.0))))
        assert length_log_probs.shape == (2, max_len + 1)
        assert (length_log_probs[:, -1].exp() > 0.99).all()

    def test_commit_bias_init_sets_the_untrained_probability(self):
        p_commit, _ = BoundaryHead(D_MODEL, gate_hidden=8, commit_bias_init=1.5)(torch.zeros(1, 1, D_MODEL))
        assert p_commit.item() == pytest.approx(1 / (1 + math.exp(-1.5)))

    @given(batch_size=batch_sizes, width=widths, seed=seeds)
    def test_reads_the_right_edge_of_each_row_and_nothing_else(self, batch_size, width, seed):
        head = BoundaryHead(D_MODEL, gate_hidden=8, max_len=5).double()
        fill_with_noise(head, std=0.5, seed=seed)
        h = noise(batch_size, width, D_MODEL, seed=seed)
        lengths = torch.randint(1, width + 1, (batch_size,), generator=generator(seed))
        ragged = h.clone()
        for row, length in enumerate(lengths.tolist()):
            ragged[row, : length - 1] = math.nan
            ragged[row, length:] = math.nan

        p_commit, length_log_probs = head(ragged, lengths)

        for row, length in enumerate(lengths.tolist()):
            alone = head(h[row : row + 1, :length])
            torch.testing.assert_close(p_commit[row], alone[0][0], rtol=0, atol=1e-13)
            torch.testing.assert_close(length_log_probs[row], alone[1][0], rtol=0, atol=1e-13)
        torch.testing.assert_close(length_log_probs.exp().sum(-1), torch.ones(batch_size, dtype=torch.float64))

    def test_probabilities_are_fp32_for_bf16_hidden_states(self):
        head = BoundaryHead(D_MODEL, gate_hidden=8, max_len=5)
        fill_with_noise(head, std=0.5, seed=1)
        h = noise(2, 3, D_MODEL, seed=2, dtype=torch.bfloat16)
        p_commit, length_log_probs = head(h)
        assert p_commit.dtype == length_log_probs.dtype == torch.float32
        exact = head.double()(h.double())
        torch.testing.assert_close(p_commit.double(), exact[0], rtol=0, atol=0.02)
        torch.testing.assert_close(length_log_probs.double(), exact[1], rtol=0, atol=0.05)

    def test_logits_are_what_forward_normalises(self):
        head = BoundaryHead(D_MODEL, gate_hidden=8, max_len=5)
        fill_with_noise(head, std=0.5, seed=1)
        h = noise(2, 3, D_MODEL, seed=2, dtype=torch.float32)
        commit_logit, length_logits = head.logits(h)
        p_commit, length_log_probs = head(h)
        torch.testing.assert_close(commit_logit.sigmoid(), p_commit)
        torch.testing.assert_close(length_logits.softmax(-1), length_log_probs.exp())

    def test_every_parameter_gets_a_gradient_once_filled_and_the_last_layers_at_once(self):
        head = BoundaryHead(D_MODEL, gate_hidden=8, max_len=5)
        h = noise(2, 3, D_MODEL, seed=2, dtype=torch.float32)

        def gradients() -> dict[str, float]:
            head.zero_grad()
            p_commit, length_log_probs = head(h)
            (p_commit.square().sum() - length_log_probs[:, 2].sum()).backward()
            return {name: parameter.grad.abs().max().item() for name, parameter in head.named_parameters()}

        untrained = gradients()
        assert untrained["commit.weight"] > 0 and untrained["len_head.weight"] > 0
        fill_with_noise(head, std=0.5, seed=1)
        assert min(gradients().values()) > 0

    @given(batch_size=batch_sizes, width=widths)
    def test_counted_flops_are_the_profiler_s(self, batch_size, width):
        head = BoundaryHead(D_MODEL, gate_hidden=8, max_len=5)
        h = torch.zeros(batch_size, width, D_MODEL)
        assert measured_flops(lambda: head(h)) == batch_size * head.flops_per_row
        assert head.num_parameters == (6 * 8 + 8) + (8 * 8 + 8) + (8 + 1) + (8 * 6 + 6)

    def test_another_hidden_size_or_device_is_refused(self):
        head = BoundaryHead(D_MODEL, gate_hidden=8)
        with pytest.raises(DeepenError, match=r"BoundaryHead was built for hidden size 6 .* size 7"):
            head(torch.zeros(1, 2, 7))
        with pytest.raises(DeepenError, match=r"BoundaryHead is on cpu .* meta"):
            head(torch.zeros(1, 2, D_MODEL, device="meta"))


class TestLatentToken:
    @given(batch_size=batch_sizes, seed=seeds)
    def test_untrained_the_link_from_the_top_is_silent(self, batch_size, seed):
        torch.manual_seed(seed)
        token = LatentToken(11, D_MODEL)
        top = noise(batch_size, D_MODEL, seed=seed, dtype=torch.float32)
        embedded = token.embed(batch_size, top=top)
        assert embedded.shape == (batch_size, 1, D_MODEL)
        assert torch.equal(embedded, token.embed(batch_size))
        assert embedded.abs().max() > 0

    @given(batch_size=batch_sizes, seed=seeds)
    def test_trained_it_adds_the_projected_top_row_by_row(self, batch_size, seed):
        token = LatentToken(11, D_MODEL).double()
        fill_with_noise(token, std=0.5, seed=seed)
        top = noise(batch_size, D_MODEL, seed=seed + 1)
        embedded = token.embed(batch_size, top=top)
        for row in range(batch_size):
            expected = token.embedding + token.top_to_bottom.weight @ top[row]
            torch.testing.assert_close(embedded[row, 0], expected, rtol=0, atol=1e-13)

    @given(token_id=st.integers(0, 10), seed=seeds)
    def test_with_a_token_id_it_is_that_token_of_the_base(self, token_id, seed):
        token = LatentToken(11, D_MODEL, token_id=token_id)
        base = noise(11, D_MODEL, seed=seed, dtype=torch.bfloat16)
        embedded = token.embed(2, base_embedding_weight=base)
        assert torch.equal(embedded, base[token_id].expand(2, 1, D_MODEL))
        assert [name for name, _ in token.named_parameters()] == ["top_to_bottom.weight"]

    def test_the_base_s_dtype_wins_over_the_parameters(self):
        token = LatentToken(11, D_MODEL)
        base = torch.zeros(11, D_MODEL, dtype=torch.bfloat16)
        assert token.embed(1, base_embedding_weight=base).dtype == torch.bfloat16
        assert token.embed(1, top=torch.zeros(1, D_MODEL, dtype=torch.bfloat16)).dtype == torch.bfloat16
        both = token.embed(1, base_embedding_weight=base, top=torch.zeros(1, D_MODEL))
        assert both.dtype == torch.bfloat16
        assert token.embed(1).dtype == torch.float32

    def test_every_parameter_gets_a_gradient_from_the_start(self):
        token = LatentToken(11, D_MODEL)
        token.embed(2, top=torch.ones(2, D_MODEL)).square().sum().backward()
        for name, parameter in token.named_parameters():
            assert parameter.grad.abs().max() > 0, name

    @pytest.mark.parametrize("token_id", [-1, 11])
    def test_a_token_id_outside_the_vocabulary_is_refused(self, token_id):
        with pytest.raises(ConfigError, match=rf"token_id {token_id} is outside the vocabulary of 11 tokens"):
            LatentToken(11, D_MODEL, token_id=token_id)

    def test_misfits_are_refused_in_words(self):
        with pytest.raises(DeepenError, match=r"token 3 and needs the base's embedding weight"):
            LatentToken(11, D_MODEL, token_id=3).embed(1)
        with pytest.raises(DeepenError, match=r"LatentToken was built for hidden size 6 .* size 7"):
            LatentToken(11, D_MODEL).embed(1, top=torch.zeros(1, 7))
        with pytest.raises(DeepenError, match=r"LatentToken is on cpu .* meta"):
            LatentToken(11, D_MODEL).embed(1, top=torch.zeros(1, D_MODEL, device="meta"))

    def test_counted_flops_are_the_profiler_s(self):
        token = LatentToken(11, D_MODEL)
        assert measured_flops(lambda: token.embed(3, top=torch.zeros(3, D_MODEL))) == 3 * token.flops_per_row


class TestMaskToken:
    @given(vocab_size=st.integers(1, 9), seed=seeds, dtype=st.sampled_from([torch.float32, torch.bfloat16]))
    def test_starts_at_the_mean_of_the_base_s_embeddings(self, vocab_size, seed, dtype):
        base = noise(vocab_size, D_MODEL, seed=seed, dtype=dtype)
        token = MaskToken(D_MODEL)
        token.initialise_from(base)
        torch.testing.assert_close(token.embedding.detach(), base.float().mean(0), rtol=0, atol=1e-6)
        assert token.embedding.requires_grad

    @given(batch_size=batch_sizes, width=widths, seed=seeds)
    def test_replaces_slots_and_leaves_the_rest_bit_equal(self, batch_size, width, seed):
        token = MaskToken(D_MODEL)
        embeddings = noise(batch_size, width, D_MODEL, seed=seed, dtype=torch.float32)
        embeddings[..., 0] = math.nan
        slots = coin_flips(batch_size, width, seed=seed)
        filled = token(embeddings, slots)
        assert torch.equal(bits(filled[~slots]), bits(embeddings[~slots]))
        assert torch.equal(filled[slots], token.embedding.expand(int(slots.sum()), D_MODEL))

    def test_the_gradient_counts_the_slots(self):
        token = MaskToken(D_MODEL)
        slots = torch.tensor([[False, True, True], [False, False, True]])
        token(torch.full((2, 3, D_MODEL), math.inf), slots)[slots].sum().backward()
        assert torch.equal(token.embedding.grad, torch.full((D_MODEL,), 3.0))

    def test_another_hidden_size_is_refused(self):
        with pytest.raises(DeepenError, match=r"MaskToken was built for hidden size 6 .* size 7"):
            MaskToken(D_MODEL).initialise_from(torch.zeros(3, 7))


class TestSanitize:
    @given(
        batch_size=batch_sizes,
        width=widths,
        seed=seeds,
        dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    )
    def test_zeroes_non_finite_elements_at_slots_and_nothing_else(self, batch_size, width, seed, dtype):
        palette = torch.tensor([math.inf, -math.inf, math.nan, -0.0, 1.5, -3.0], dtype=dtype)
        h = palette[torch.randint(0, len(palette), (batch_size, width, D_MODEL), generator=generator(seed))]
        slots = coin_flips(batch_size, width, seed=seed)
        clean = sanitize(h, slots)
        broken = slots.unsqueeze(-1) & ~h.isfinite()
        assert torch.equal(bits(clean[~broken]), bits(h[~broken]))
        assert (clean[broken] == 0).all()

    def test_one_infinite_slot_leaves_clean_positions_unchanged_behind_a_masked_softmax(self):
        """Two layers of causal attention with a cell at each output; the last position is a slot."""
        cells = [noisy_cell(seed=seed, dtype=torch.float32) for seed in (0, 1)]
        slots = torch.tensor([[False, False, False, True]])
        calm = noise(1, 4, D_MODEL, seed=5, dtype=torch.float32)
        wild = calm.clone()
        wild[0, 3] = math.inf

        def run(h: Tensor, *, sanitized: bool) -> Tensor:
            for cell in cells:
                h = cell.refine(h, mask=slots)
                h = causal_attention(sanitize(h, slots) if sanitized else h)
            return h[~slots]

        reference = run(calm, sanitized=True)
        assert reference.isfinite().all()
        assert torch.equal(run(wild, sanitized=True), reference)
        assert run(wild, sanitized=False).isnan().any(), "without sanitize the slot must leak, or this test is blind"


def causal_attention(h: Tensor) -> Tensor:
    """One residual attention layer, queries, keys and values read straight from h."""
    width = h.shape[1]
    scores = h @ h.transpose(1, 2) / math.sqrt(h.shape[-1])
    future = torch.ones(width, width, dtype=torch.bool).triu(1)
    return h + scores.masked_fill(future, -math.inf).softmax(-1) @ h


def measured_flops(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
