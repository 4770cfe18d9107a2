"""A call of transformers' `generate` gives the same ids through our door: as a loop of the base's, and as our own.

As in decoding, two results may part where the base's choice was a near-tie: kernels of different shapes round
differently.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
    TopKLogitsWarper,
)

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.core.method import Sampler
from deepen.core.types import Advance, Prompt
from deepen.data.tokenizer import EOS_ID, PAD_ID, byte_tokenizer
from deepen.evaluate.agreement import NEAR_TIE_MARGIN, NEAR_TIE_MARGIN_RECURRENT, compare
from deepen.generate import door
from deepen.generate.drafts import NO_DRAFT, Draft
from deepen.generate.sampling import SamplingConfig
from deepen.generate.verify import Decoding, open_decoding, verify
from deepen.methods.chunk.model import ChunkRefineWrapper

RECURRENT = ("kimi_linear", "qwen3_next")
NAMES = ("llama", "qwen3", "nanochat", *RECURRENT)
TOKENIZER = byte_tokenizer()
LOOP = list(b"one two one two one two one")
ROWS = [LOOP, list(b"The lamp is lit. The boat comes in."), list(b"a a a a")]
NUM_NEW = 20

every_model = pytest.mark.parametrize("name", NAMES)
ids_of_rows = st.lists(st.integers(0, 255), min_size=1, max_size=6).flatmap(
    lambda unit: st.integers(1, 4).map(lambda times: unit * times)
)


@cache
def reference(name: str) -> PreTrainedModel:
    """The model that transformers runs; ours is another one with the same weights."""
    return tiny.build(name)


@cache
def wrapper(name: str, draft: str = "lookup") -> ChunkRefineWrapper:
    base = tiny.build(name).requires_grad_(False)
    return ChunkRefineWrapper(base, recursive_enabled=True, draft=draft, chunk_width=8, d_state=8)


def padded(rows: Sequence[list[int]], side: str = "left") -> dict[str, Tensor]:
    width = max(map(len, rows))
    pads = [[PAD_ID] * (width - len(row)) for row in rows]
    real = [[1] * len(row) for row in rows]
    if side == "left":
        ids = [pad + row for pad, row in zip(pads, rows, strict=True)]
        mask = [[0] * len(pad) + ones for pad, ones in zip(pads, real, strict=True)]
    else:
        ids = [row + pad for pad, row in zip(pads, rows, strict=True)]
        mask = [ones + [0] * len(pad) for pad, ones in zip(pads, real, strict=True)]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def their(name: str, rows: Sequence[list[int]], **options: Any) -> Tensor:
    return reference(name).generate(**padded(rows), **{"max_new_tokens": NUM_NEW, **options})


def ours(name: str, rows: Sequence[list[int]], *, draft: str = "lookup", **options: Any) -> Tensor:
    """By `generate` of the grafted model; that of its base must say the same."""
    model = wrapper(name, draft)
    options = {"max_new_tokens": NUM_NEW, **options}
    found = model.base.generate(**padded(rows), **options, custom_generate=model.as_custom_generate())
    assert torch.equal(found, model.generate(**padded(rows), **options))
    return found


def end_of(tokens: Sequence[int], at: int) -> int:
    """A token that first comes at position `at` or soon behind it."""
    return next(token for index, token in enumerate(tokens) if index >= at and token not in tokens[:index])


@every_model
@pytest.mark.parametrize("draft", ["lookup", "mask", "auto", "jacobi"])
def test_one_row(name: str, draft: str) -> None:
    for row in ROWS:
        assert torch.equal(ours(name, [row], draft=draft), their(name, [row]))


@every_model
def test_rows_padded_on_the_left_end_one_by_one(name: str) -> None:
    new = their(name, ROWS, eos_token_id=None)[:, len(ROWS[1]) :].tolist()
    ends = [end_of(new[0], 3), end_of(new[1], 8)]
    theirs = their(name, ROWS, eos_token_id=ends, pad_token_id=PAD_ID)
    assert (theirs[:, len(ROWS[1]) :] == PAD_ID).any()
    assert torch.equal(ours(name, ROWS, eos_token_id=ends, pad_token_id=PAD_ID), theirs)
    without_pad = {"eos_token_id": ends, "pad_token_id": None}
    assert torch.equal(ours(name, ROWS, **without_pad), their(name, ROWS, **without_pad))


@every_model
def test_rows_padded_on_the_right_continue_as_if_padded_on_the_left(name: str) -> None:
    options = {"max_new_tokens": NUM_NEW, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    left = wrapper(name).generate(**padded(ROWS), **options)
    right_input = padded(ROWS, "right")
    right = wrapper(name).generate(**right_input, **options)
    width = right_input["input_ids"].shape[1]
    assert torch.equal(right[:, :width], right_input["input_ids"])
    assert torch.equal(right[:, width:], left[:, width:])


class Foresight:
    """Decodes with drafts that are right but for some tokens, so that rows gain several at a time, each its own way."""

    def __init__(self, backbone: Backbone, texts: list[list[int]], lengths: list[int], wrong: set[int]) -> None:
        self.backbone, self.texts, self.lengths, self.wrong = backbone, texts, lengths, wrong

    def open(self, prompt: Prompt) -> Decoding:
        return open_decoding(self.backbone, prompt)

    def advance(self, decoding: Decoding, sampler: Sampler) -> Advance:
        drafts = [self.draft(ids, decoding.room(row) - 1) for row, ids in enumerate(decoding.rows)]
        return verify(self.backbone, decoding, drafts, sampler)

    def draft(self, ids: list[int], most: int) -> Draft:
        known = next((text for text in self.texts if text[: len(ids)] == ids), ids)
        length = min(most, self.lengths[len(ids) % len(self.lengths)])
        behind = known[len(ids) : len(ids) + length]
        tokens = [(token + (len(ids) + index in self.wrong)) % 256 for index, token in enumerate(behind)]
        return Draft(tuple(tokens), source="foresight", evidence=0) if tokens else NO_DRAFT

    def drop(self, decoding: Decoding, rows: Sequence[int]) -> None:
        decoding.drop(rows)


@given(
    name=st.sampled_from(NAMES),
    rows=st.lists(ids_of_rows, min_size=1, max_size=3),
    penalty=st.sampled_from([1.0, 1.3]),
    num_new=st.integers(1, 12),
    ends=st.lists(st.integers(0, 255), min_size=20, max_size=20, unique=True),
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    wrong=st.sets(st.integers(1, 40), max_size=12),
)
def test_any_rows_with_any_drafts(
    name: str,
    rows: list[list[int]],
    penalty: float,
    num_new: int,
    ends: list[int],
    lengths: list[int],
    wrong: set[int],
) -> None:
    """With so many ends of text that many rows meet one."""
    width = max(map(len, rows))
    options: dict[str, Any] = {"repetition_penalty": penalty, "max_length": width + num_new, "max_new_tokens": None}
    options |= {"eos_token_id": ends, "pad_token_id": PAD_ID}
    theirs = their(name, rows, **options)
    texts = [row + new for row, new in zip(rows, theirs[:, width:].tolist(), strict=True)]
    model = wrapper(name)
    decoder = Foresight(model.backbone, texts, lengths, wrong)
    assert_same(name, rows, door.generate(decoder, model.base, **padded(rows), **options), theirs, penalty)
    processors = LogitsProcessorList([Rotated()])
    theirs = their(name, rows, **options, logits_processor=processors)
    decoder.texts = [row + new for row, new in zip(rows, theirs[:, width:].tolist(), strict=True)]
    found = door.generate(decoder, model.base, **padded(rows), **options, logits_processor=processors)
    assert torch.equal(found, theirs)


def assert_same(name: str, rows: list[list[int]], found: Tensor, theirs: Tensor, penalty: float = 1.0) -> None:
    """Equal, or parted by a near-tie of the base."""
    if torch.equal(found, theirs):
        return
    width = max(map(len, rows))
    limit = NEAR_TIE_MARGIN_RECURRENT if name in RECURRENT else NEAR_TIE_MARGIN
    sampling = SamplingConfig(repetition_penalty=penalty)
    for row, one, other in zip(rows, found[:, width:].tolist(), theirs[:, width:].tolist(), strict=True):
        verdict = compare(wrapper(name).backbone, row, without_pads(one), without_pads(other), sampling=sampling)
        assert verdict.equal or verdict.margin < limit, str(verdict)


def without_pads(tokens: list[int]) -> list[int]:
    return [token for token in tokens if token != PAD_ID]


def allowed_by_row(row: int, ids: Tensor) -> list[int]:
    return [token for token in range(256) if (token + row + int(ids[-1])) % 5 == 0]


# Each changes something of the text `t`, what the first row says without it.
SETTINGS: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "repetition_penalty": lambda t: {"repetition_penalty": 1.4},
    "min_new_tokens": lambda t: {"repetition_penalty": 0.7, "min_new_tokens": 9},
    "min_length": lambda t: {"min_length": 45},
    "no_repeat_ngram_size": lambda t: {"no_repeat_ngram_size": 1},
    "bad_words_ids": lambda t: {"bad_words_ids": [[t[2]], [t[0], t[1]]]},
    "sequence_bias": lambda t: {"sequence_bias": {(t[0], t[1]): -9.0, (t[3],): 9.0}, "repetition_penalty": 1.1},
    "suppress_tokens": lambda t: {"suppress_tokens": [t[1], t[3]]},
    "begin_suppress_tokens": lambda t: {"begin_suppress_tokens": [t[0]]},
    "forced_eos_token_id": lambda t: {"forced_eos_token_id": EOS_ID, "eos_token_id": EOS_ID},
    "forced_bos_token_id": lambda t: {"forced_bos_token_id": t[1], "inputs": [[t[0]], [t[2]]]},
    "exponential_decay": lambda t: {"exponential_decay_length_penalty": (1, 3.0)},
    "remove_invalid_values": lambda t: {"remove_invalid_values": True, "renormalize_logits": True, "min_length": 45},
    "prefix_allowed_tokens_fn": lambda t: {"prefix_allowed_tokens_fn": allowed_by_row},
    "max_time": lambda t: {"max_time": 0.0},
    "max_length": lambda t: {"max_new_tokens": None, "max_length": 41, "eos_token_id": None},
    # Of samples, only those with one candidate can be the same.
    "num_return_sequences": lambda t: {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "sampling": lambda t: {"do_sample": True, "top_k": 1, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.4},
}


@every_model
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(name: str, setting: str) -> None:
    plain = their(name, ROWS, eos_token_id=None)[:, len(ROWS[1]) :].tolist()
    ends = {"eos_token_id": [end_of(plain[0], 4), end_of(plain[1], 6)], "pad_token_id": PAD_ID}
    changes = SETTINGS[setting](plain[0])
    rows = changes.pop("inputs", ROWS)
    theirs = their(name, rows, **{**ends, **changes})
    assert not torch.equal(theirs, their(name, rows, **ends))
    assert torch.equal(ours(name, rows, **{**ends, **changes}), theirs)


@every_model
@pytest.mark.parametrize("options", [{}, {"min_new_tokens": 5}], ids=["penalty alone", "penalty and another"])
def test_pads_are_not_penalized(name: str, options: dict[str, Any]) -> None:
    """Not even where they are what the model would say."""
    short = ROWS[2]
    said = their(name, [short])[0, len(short) :].tolist()
    inputs = padded([ROWS[1], short])
    inputs["input_ids"][1, : -len(short)] = torch.tensor((said * 3)[: len(ROWS[1]) - len(short)])
    options = {**inputs, "max_new_tokens": NUM_NEW, "repetition_penalty": 1.5, "eos_token_id": EOS_ID, **options}
    assert torch.equal(wrapper(name).generate(**options), reference(name).generate(**options))


class Rotated(LogitsProcessor):
    """Moves scores by what stands before the position: how much, and all of its tokens."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        shifts = (input_ids.sum(dim=1) + input_ids.shape[1]) % 7
        scores += torch.stack([torch.arange(scores.shape[1]).roll(int(shift)) % 5 for shift in shifts])
        return scores


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize(
    "processors",
    [
        [Rotated()],
        [Rotated(), TopKLogitsWarper(3)],
        [RepetitionPenaltyLogitsProcessor(1.4)],
        [RepetitionPenaltyLogitsProcessor(1.4, prompt_ignore_length=20), Rotated()],
    ],
    ids=lambda processors: "-".join(type(each).__name__ for each in processors),
)
@pytest.mark.parametrize("rows", [ROWS, [LOOP]], ids=["several rows", "one row"])
def test_processors_of_the_caller(name: str, rows: list[list[int]], processors: list[LogitsProcessor]) -> None:
    options = {"logits_processor": LogitsProcessorList(processors), "repetition_penalty": 1.2}
    theirs = their(name, rows, **options)
    assert not torch.equal(theirs, their(name, rows, repetition_penalty=1.2))
    assert torch.equal(ours(name, rows, **options), theirs)


class Witness(StoppingCriteria):
    """Ends a row once its new tokens add up to more than `most`; keeps what it was shown."""

    def __init__(self, width: int, most: int = 900) -> None:
        self.width = width
        self.most = most
        self.shown: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.shown.append(input_ids.clone())
        return input_ids[:, self.width :].sum(dim=1) > self.most


@every_model
@pytest.mark.parametrize("rows", [ROWS, [LOOP]], ids=["several rows", "one row"])
@pytest.mark.parametrize("eos", [None, EOS_ID])
def test_criteria_of_the_caller(name: str, rows: list[list[int]], eos: int | None) -> None:
    def run(generate: Callable[..., Tensor]) -> tuple[Tensor, list[Tensor]]:
        witness = Witness(max(map(len, rows)))
        inputs = {**padded(rows), "max_new_tokens": NUM_NEW, "eos_token_id": eos, "pad_token_id": PAD_ID}
        return generate(**inputs, stopping_criteria=[witness]), witness.shown

    theirs, shown_to_theirs = run(lambda **options: reference(name).generate(**wrapped(options)))
    found, shown_to_ours = run(lambda **options: wrapper(name).generate(**wrapped(options)))
    assert theirs.shape[1] < max(map(len, rows)) + NUM_NEW
    assert torch.equal(found, theirs)
    assert [each.tolist() for each in shown_to_ours] == [each.tolist() for each in shown_to_theirs]


def wrapped(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "stopping_criteria": StoppingCriteriaList(options["stopping_criteria"])}


@every_model
def test_criteria_of_the_caller_take_the_place_of_theirs(name: str) -> None:
    plain = their(name, ROWS, eos_token_id=None)[:, len(ROWS[1]) :].tolist()
    criteria = StoppingCriteriaList([EosTokenCriteria([end_of(plain[0], 5), EOS_ID]), MaxLengthCriteria(48)])
    theirs = their(name, ROWS, stopping_criteria=criteria)
    assert theirs.shape[1] == 48
    assert torch.equal(ours(name, ROWS, stopping_criteria=criteria), theirs)


@every_model
@pytest.mark.parametrize("rows", [ROWS, [LOOP]], ids=["several rows", "one row"])
@pytest.mark.parametrize("eos", [None, EOS_ID])
def test_stop_strings(name: str, rows: list[list[int]], eos: int | None) -> None:
    options: dict[str, Any] = {"eos_token_id": eos, "pad_token_id": PAD_ID}
    new = their(name, rows, **options)[:, max(map(len, rows)) :].tolist()
    # A token ends a row whatever stands before it: one that prints, in each row.
    strings = [chr(next(token for token in row[4:] if 32 < token < 127)) for row in new]
    theirs = their(name, rows, stop_strings=strings, tokenizer=TOKENIZER, **options)
    assert theirs.shape[1] < max(map(len, rows)) + NUM_NEW
    model = wrapper(name)
    options |= {**padded(rows), "max_new_tokens": NUM_NEW}
    assert torch.equal(model.generate(**options, stop_strings=strings, tokenizer=TOKENIZER), theirs)
    criteria = StoppingCriteriaList([StopStringCriteria(TOKENIZER, strings)])
    found = model.base.generate(**options, stopping_criteria=criteria, custom_generate=model.as_custom_generate())
    assert torch.equal(found, theirs)


@every_model
def test_streamed_text(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = {**padded([LOOP]), "max_new_tokens": NUM_NEW}
    model = wrapper(name)
    reference(name).generate(**inputs, streamer=TextStreamer(TOKENIZER))
    theirs = capsys.readouterr().out
    model.generate(**inputs, streamer=TextStreamer(TOKENIZER))
    assert capsys.readouterr().out == theirs
    model.base.generate(**inputs, custom_generate=model.as_custom_generate(streamer=TextStreamer(TOKENIZER)))
    assert capsys.readouterr().out == theirs
    assert theirs.startswith(bytes(LOOP).decode())


class Tape:
    def __init__(self) -> None:
        self.values: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.values.append((value.device.type, value.tolist()))

    def end(self) -> None:
        self.values.append("end")


@every_model
def test_streamed_rows(name: str) -> None:
    plain = their(name, ROWS, eos_token_id=None)[:, len(ROWS[1]) :].tolist()
    inputs = {**padded(ROWS), "max_new_tokens": NUM_NEW, "eos_token_id": end_of(plain[0], 4), "pad_token_id": PAD_ID}
    theirs, found = Tape(), Tape()
    reference(name).generate(**inputs, streamer=theirs)
    wrapper(name).generate(**inputs, streamer=found)
    assert found.values == theirs.values
