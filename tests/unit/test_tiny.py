import copy

import pytest
import torch
from torch import Tensor

from deepen.backbones import tiny
from deepen.core.errors import AddressError
from deepen.data.tokenizer import BOS_ID, EOS_ID, PAD_ID, VOCAB_SIZE

PROMPT_LENGTH = 16
NEW_TOKENS = 48


@pytest.fixture(params=tiny.NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def prompts() -> Tensor:
    return torch.randint(0, 256, (8, PROMPT_LENGTH), generator=torch.Generator().manual_seed(7))


def greedy(model, prompts: Tensor) -> Tensor:
    """Prompts and continuation, past the end-of-sequence token."""
    everything = torch.ones_like(prompts)
    return model.generate(
        prompts, attention_mask=everything, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )


def test_the_same_seed_gives_the_same_weights(name):
    first, second = tiny.build(name, seed=3).state_dict(), tiny.build(name, seed=3).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_another_seed_gives_others(name):
    first, second = tiny.build(name), tiny.build(name, seed=1)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_the_global_random_state_has_no_part_in_it(name):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    model = tiny.build(name)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(456)
    assert torch.equal(tiny.build(name).lm_head.weight, model.lm_head.weight)


def test_it_fits_the_byte_tokenizer(name):
    model = tiny.build(name)
    config = model.config
    assert model.get_input_embeddings().weight.shape == (VOCAB_SIZE, 64)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (PAD_ID, BOS_ID, EOS_ID)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (4, 512)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) < 400_000


def test_greedy_text_does_not_end_in_a_loop_at_once(name, prompts):
    rows = greedy(tiny.build(name), prompts)[:, PROMPT_LENGTH:]
    assert min(len(set(row.tolist())) for row in rows) >= 8
    assert len({tuple(row.tolist()) for row in rows}) == len(rows)


def test_the_next_token_depends_on_more_than_the_last(name, prompts):
    prompts[:, -1] = 65
    with torch.no_grad():
        chosen = tiny.build(name)(prompts).logits[:, -1].argmax(-1)
    assert len(set(chosen.tolist())) >= 4


def test_every_position_of_the_context_matters(name, prompts):
    model, row = tiny.build(name), prompts[:1]
    with torch.no_grad():
        logits = model(row).logits[0, -1]
        for position in range(PROMPT_LENGTH):
            changed = row.clone()
            changed[0, position] = (changed[0, position] + 1) % 256
            assert (model(changed).logits[0, -1] - logits).abs().max() > 1e-3


def test_the_best_logit_leads_by_far_more_than_rounding(name, prompts):
    model = tiny.build(name)
    rows = greedy(model, prompts)
    with torch.no_grad():
        logits = model(rows).logits
        error = (copy.deepcopy(model).double()(rows).logits - logits).abs().max()
    best, second = logits.topk(2).values.unbind(-1)
    assert error < 2e-4
    assert (best - second).quantile(0.05) > 100 * error
    assert 1 < logits.std() < 3


def test_another_dtype_rounds_the_weights_and_nothing_else():
    plain, rounded = tiny.build("llama"), tiny.build("llama", dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    assert torch.equal(rounded.lm_head.weight, plain.lm_head.weight.bfloat16())
    assert torch.equal(rounded.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)


def test_kimi_linear_has_every_part_of_the_large_one():
    model = tiny.build("kimi_linear")
    assert model.config.layer_types == ["linear_attention"] * 3 + ["full_attention"]
    kinds = {type(module).__name__ for module in model.modules()}
    assert {"KimiLinearDeltaAttention", "KimiLinearAttention", "KimiLinearMLP", "KimiLinearTopkRouter"} <= kinds
    experts = model.model.layers[1].mlp.experts
    assert experts.num_experts == 4 and model.config.num_experts_per_tok == 2 and model.config.n_shared_experts == 1


def test_an_unknown_name_is_told_the_nearest():
    with pytest.raises(AddressError, match=r'unknown tiny model "lama"; did you mean "llama"\?'):
        tiny.build("lama")
