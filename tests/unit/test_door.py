"""The door on one tiny model: what is drawn, what is refused, and the form of the output."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    SynthIDTextWatermarkingConfig,
)
from transformers.generation import GenerateDecoderOnlyOutput

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.core.errors import ConfigError, PromptError
from deepen.data.tokenizer import PAD_ID, byte_tokenizer
from deepen.generate import door
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import SamplingConfig
from deepen.generate.stop import StopConfig
from deepen.methods.chunk.model import ChunkRefineWrapper

BASE = tiny.build("llama").requires_grad_(False)
MODEL = ChunkRefineWrapper(BASE, recursive_enabled=True, draft="lookup", chunk_width=6, d_state=8)
PLAIN = PlainDecoder(Backbone.attach(BASE))
LOOP = MODEL.as_custom_generate()
ROW = list(b"one two one two one")
IDS = torch.tensor([ROW])
MASK = torch.ones_like(IDS)
ROWS = {
    "input_ids": torch.tensor([ROW, [PAD_ID] * 13 + ROW[:6]]),
    "attention_mask": torch.tensor([[1] * 19, [0] * 13 + [1] * 6]),
}
NEW = 10


def generate(**options: Any) -> Any:
    return MODEL.generate(**{"inputs": IDS, "attention_mask": MASK, "max_new_tokens": NEW, **options})


def both(**options: Any) -> Tensor:
    """Two rows, the second padded."""
    return MODEL.generate(**{**ROWS, "max_new_tokens": NEW, **options})


def plain(rows: list[list[int]], sampling: SamplingConfig | list[SamplingConfig]) -> list[list[int]]:
    stop = StopConfig(eos_ids=MODEL.backbone.eos_ids, max_new_tokens=NEW)
    return behind_prompts([result.tokens for result in complete(PLAIN, rows, sampling=sampling, stop=stop)])


def behind_prompts(rows: list[list[int]]) -> list[list[int]]:
    """New tokens in transformers' form: padded up to the longest row."""
    longest = max(map(len, rows))
    return [row + [PAD_ID] * (longest - len(row)) for row in rows]


def new_of(output: Tensor) -> list[list[int]]:
    return output[:, len(ROW) :].tolist()


@given(
    seed=st.integers(0, 2**64 - 1),
    temperature=st.floats(0.2, 2.0),
    top_k=st.integers(0, 40),
    top_p=st.floats(0.3, 1.0),
    min_p=st.floats(0.0, 0.3),
    penalty=st.floats(0.5, 2.0),
)
def test_any_sample_has_the_meaning_of_our_settings(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampling = SamplingConfig(**settings, repetition_penalty=penalty, seed=seed)
    found = door.generate(
        PLAIN, BASE, **ROWS, max_new_tokens=NEW, do_sample=True, repetition_penalty=penalty, seed=seed, **settings
    )
    assert new_of(found) == plain([ROW, ROW[:6]], sampling)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_samples_in_chunks_are_the_plain_decoders(top_p: float, penalty: float) -> None:
    sampling = SamplingConfig(temperature=1.3, top_p=top_p, repetition_penalty=penalty, seed=6)
    options = {"do_sample": True, "temperature": 1.3, "top_k": 0, "top_p": top_p, "repetition_penalty": penalty}
    expected = plain([ROW, ROW[:6]], sampling)
    assert new_of(both(**options, seed=6)) == expected
    assert new_of(BASE.generate(**ROWS, max_new_tokens=NEW, **options, seed=6, custom_generate=LOOP)) == expected


def test_a_sample_has_transformers_defaults() -> None:
    sampling = SamplingConfig(temperature=1.0, top_k=50, seed=4)
    assert new_of(generate(do_sample=True, seed=4)) == plain([ROW], sampling)


def test_seeds_reproduce_a_row_alone() -> None:
    together = both(do_sample=True, temperature=1.5, seeds=[8, 5])
    assert new_of(together) == plain(
        [ROW, ROW[:6]], [SamplingConfig(temperature=1.5, top_k=50, seed=seed) for seed in (8, 5)]
    )
    assert torch.equal(generate(do_sample=True, temperature=1.5, seeds=[8])[0], together[0])
    assert torch.equal(together, both(do_sample=True, temperature=1.5, seeds=[8, 5]))


def test_repeated_rows_have_seeds_of_their_own() -> None:
    rows = generate(do_sample=True, temperature=1.5, num_return_sequences=3, seed=20)
    assert len({tuple(row) for row in rows.tolist()}) == 3
    for index, row in enumerate(rows):
        assert torch.equal(generate(do_sample=True, temperature=1.5, seed=20 + index)[0], row)


def test_without_a_seed_torch_draws_one() -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return generate(do_sample=True, temperature=2.0)

    with torch.random.fork_rng(devices=[]):
        assert torch.equal(drawn(1), drawn(1))
        assert not torch.equal(drawn(1), drawn(2))
        before = torch.random.get_rng_state()
        generate()
        generate(do_sample=True, generator=torch.Generator().manual_seed(3))
        assert torch.equal(torch.random.get_rng_state(), before)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 3, 4)]
    first, again, other = (generate(do_sample=True, temperature=2.0, generator=each) for each in generators)
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "settings",
    [
        {"typical_p": 0.7},
        {"eta_cutoff": 0.6},
        {"epsilon_cutoff": 0.02},
        {"top_h": 0.5},
        {"renormalize_logits": True, "temperature": 1.7, "top_p": 0.8},
        {"min_new_tokens": 8, "temperature": 1.7, "repetition_penalty": 1.3},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_samples_by_settings_that_our_sampler_lacks(settings: dict[str, Any]) -> None:
    """Chunked and plain decoding agree, and a row doesn't depend on the other."""
    options = {"do_sample": True, "top_k": 0, "seed": 9, **settings}
    chunked = both(**options)
    assert torch.equal(chunked, door.generate(PLAIN, BASE, **ROWS, max_new_tokens=NEW, **options))
    assert torch.equal(generate(**options)[0], chunked[0])
    assert not torch.equal(chunked, both(do_sample=True, top_k=0, seed=9))


class KeepsEven(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, 1::2] = -torch.inf
        return scores


def test_filters_act_behind_processors() -> None:
    """Of the even tokens the four best: not the even ones of the four best."""
    drawn = generate(
        max_new_tokens=1,
        do_sample=True,
        top_k=4,
        temperature=4.0,
        seed=1,
        num_return_sequences=60,
        logits_processor=[KeepsEven()],
    )
    best = BASE(IDS).logits[0, -1, ::2].topk(4).indices * 2
    assert set(drawn[:, -1].tolist()) == set(best.tolist())


def test_own_generation_config_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GenerationConfig(
        temperature=0.3,
        top_p=0.5,
        top_k=7,
        length_penalty=2.0,
        cache_implementation="dynamic",
        bos_token_id=1,
        eos_token_id=BASE.generation_config.eos_token_id,
        pad_token_id=PAD_ID,
        chat_format="unknown to transformers, too",
        guidance_scale=1.0,
        output_scores=True,
    )
    greedy = generate()
    monkeypatch.setattr(BASE, "generation_config", config)
    assert torch.equal(generate(), greedy)
    sampling = SamplingConfig(temperature=0.3, top_k=7, top_p=0.5, seed=2)
    assert new_of(generate(do_sample=True, seed=2)) == plain([ROW], sampling)


def test_generation_config_as_an_argument() -> None:
    config = GenerationConfig(max_new_tokens=4, do_sample=True, top_k=3, temperature=0.9)
    drawn = MODEL.generate(IDS, config, attention_mask=MASK, seed=1)
    assert drawn.shape == (1, len(ROW) + 4)
    assert torch.equal(drawn, generate(do_sample=True, top_k=3, temperature=0.9, seed=1)[:, : len(ROW) + 4])


def test_output_as_a_dictionary() -> None:
    output = generate(return_dict_in_generate=True)
    assert isinstance(output, GenerateDecoderOnlyOutput)
    assert torch.equal(output.sequences, generate()) and output.scores is None


def test_ids_keep_their_type() -> None:
    found = MODEL.generate(IDS.int(), attention_mask=MASK, max_new_tokens=3, eos_token_id=-1, pad_token_id=PAD_ID)
    assert found.dtype == torch.int32 and torch.equal(found.long(), generate(max_new_tokens=3))


def test_a_streamer_of_one_row_refuses_two() -> None:
    class OneRow:
        def put(self, value: Tensor) -> None:
            if value.ndim > 1 and len(value) > 1:
                raise ValueError("one row only")

        def end(self) -> None:
            pass

    generate(streamer=OneRow())
    with pytest.raises(ValueError, match="one row only"):
        both(streamer=OneRow())


REFUSED: dict[str, Any] = {
    "num_beams": 3,
    "penalty_alpha": 0.6,
    "guidance_scale": 1.5,
    "prompt_lookup_num_tokens": 3,
    "encoder_repetition_penalty": 1.2,
    "encoder_no_repeat_ngram_size": 2,
    "watermarking_config": {"bias": 2.5},
    "assistant_early_exit": 2,
    "dola_layers": "high",
    "token_healing": True,
    "assistant_model": BASE,
    "custom_generate": print,
    "synced_gpus": True,
    "past_key_values": DynamicCache(),
    "position_ids": torch.arange(3, 3 + len(ROW))[None],
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_argument_and_a_way_out(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} (is|don't).*leave it out, or use the base model's own generate"):
        generate(**{name: REFUSED[name]})


@pytest.mark.parametrize("name", ["num_beams", "penalty_alpha", "past_key_values", "position_ids"])
def test_refusals_in_the_bases_generate(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        BASE.generate(
            IDS,
            attention_mask=MASK,
            max_new_tokens=NEW,
            custom_generate=LOOP,
            **{name: REFUSED[name]},
        )


@pytest.mark.parametrize("name", ["output_scores", "output_logits", "output_attentions", "output_hidden_states"])
def test_outputs_that_are_not_there(name: str) -> None:
    generate(**{name: True})  # without a dictionary nobody gets them from transformers either
    with pytest.raises(ConfigError, match=f"{name} is True, but of the output there are only `sequences`"):
        generate(return_dict_in_generate=True, **{name: True})


def test_processors_bound_to_a_batch_are_refused() -> None:
    config = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
    bound = config.construct_processor(BASE.config.vocab_size, torch.device("cpu"))
    with pytest.raises(ConfigError, match="logits_processor holds a SynthIDTextWatermarkLogitsProcessor"):
        generate(logits_processor=LogitsProcessorList([bound]))


def test_embeddings_are_refused() -> None:
    with pytest.raises(ConfigError, match="inputs_embeds is given"):
        MODEL.generate(inputs_embeds=BASE.get_input_embeddings()(IDS), attention_mask=MASK, max_new_tokens=2)


def test_stop_strings_want_the_tokenizer() -> None:
    with pytest.raises(ConfigError, match=r"stop_strings is 'x': pass the model's `tokenizer`"):
        generate(stop_strings="x")
    config = GenerationConfig(stop_strings=["x"], max_new_tokens=2)
    with pytest.raises(ConfigError, match="stop_strings"):
        MODEL.generate(IDS, config, attention_mask=MASK)
    MODEL.generate(IDS, config, attention_mask=MASK, tokenizer=byte_tokenizer())


def test_seeds_must_be_one_each() -> None:
    with pytest.raises(ConfigError, match="seeds holds 1 for 2 rows"):
        both(do_sample=True, seeds=[1])
    with pytest.raises(ConfigError, match="seed and generator are given"):
        generate(do_sample=True, seed=1, generator=torch.Generator())


def test_another_model_is_refused() -> None:
    other: PreTrainedModel = tiny.build("qwen3")
    with pytest.raises(ConfigError, match="decodes another LlamaForCausalLM than the Qwen3ForCausalLM"):
        other.generate(IDS, attention_mask=MASK, max_new_tokens=2, custom_generate=LOOP)


def test_a_row_of_pads_is_refused() -> None:
    with pytest.raises(PromptError, match="prompt 1 is empty"):
        both(attention_mask=torch.tensor([[1] * 19, [0] * 19]))


def test_usual_position_ids_are_taken() -> None:
    usual = (ROWS["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert torch.equal(both(position_ids=usual), both())
