"""transformers' door: its `generate` arguments in, its form of output out, any decoder of ours between.

transformers' `generate` prepares a call: it merges the configurations, repeats rows, infers a mask, and builds a list
of logits processors and one of stopping criteria from all its settings. Then it hands everything to a loop, its own or
one passed as `custom_generate=`. A `Door` is such a loop. It works from the two lists, so a setting means here what it
means there:

- logits processors that our sampler knows become its configuration; the others run on the logits of each position,
  drafted ones included, with the ids that position has before it;
- stopping criteria see the rows as they see them there, all of one length, one token longer at each step. What was
  committed behind the step at which they end a row is cut.

Greedy ids are those of transformers, if the decoder is exact. Sampled ids are not: transformers draws from one stream
of random numbers, we draw by (seed, position, token). They are those of our plain decoder with the same seeds.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import (
    ClassifierFreeGuidanceLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerateDecoderOnlyOutput

from deepen.core.errors import ConfigError
from deepen.core.method import Decoder
from deepen.generate.events import Committed
from deepen.generate.loop import stream
from deepen.generate.processed import ProcessedDecoder, RowProcessors
from deepen.generate.sampling import SamplingConfig
from deepen.generate.steps import Steps
from deepen.generate.stop import StopConfig

# fmt: off
# Settings that have done their work when the lists are built, or that are read below.
_HONOURED = {
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "do_sample",
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "renormalize_logits",
    "remove_invalid_values", "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "num_return_sequences", "return_dict_in_generate", "pad_token_id",
    "bos_token_id", "eos_token_id",
}
# Settings of transformers' caches and kernels, those that only beam search, assistants or encoders read, and outputs,
# which are looked at where they are asked for.
_WITHOUT_EFFECT = {
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile",
    "prefill_chunk_size", "continuous_batching_config", "low_memory", "early_stopping", "length_penalty",
    "diversity_penalty", "num_beam_groups", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "max_matching_ngram_size", "assistant_lookbehind", "target_lookbehind",
    "decoder_start_token_id", "transformers_version", "output_attentions", "output_hidden_states", "output_scores",
    "output_logits",
}
# Arguments of `generate` that transformers doesn't hand on to a loop of another's.
_REFUSED_ARGUMENTS = ("assistant_model", "assistant_tokenizer", "custom_generate", "synced_gpus", "token_healing")
# What a model is given beside ids. The cache is transformers' own, empty: ours is another.
_INPUTS = {
    "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "output_attentions",
    "output_hidden_states",
}
# fmt: on
# Each remembers its earlier calls or holds ids of the whole batch: at a drafted position, or for a row alone, its
# answer would be wrong.
_BOUND_PROCESSORS = (
    ClassifierFreeGuidanceLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
_FILTERS = (("top_k", int, TopKLogitsWarper), ("top_p", float, TopPLogitsWarper), ("min_p", float, MinPLogitsWarper))
_WAY_OUT = "leave it out, or use the base model's own generate without custom_generate"


@runtime_checkable
class Streamer(Protocol):
    """What transformers asks of a streamer."""

    def put(self, value: Tensor) -> Any:
        """Take the prompt `[B, S]`, then one token of each row `[B]` at a time."""

    def end(self) -> Any:
        """No more tokens follow."""


def generate(
    decoder: Decoder,
    model: Any,
    inputs: Tensor | None = None,
    generation_config: Any = None,
    *,
    streamer: Streamer | None = None,
    tokenizer: Any = None,
    **arguments: Any,
) -> Any:
    """transformers' `model.generate` with its arguments and its results, decoded by `decoder`, which decodes `model`.

    More arguments: `seed` (row r gets seed + r), or `seeds`, one for each row, or a `generator` to draw the seed from;
    without any it is drawn from torch's global generator, as transformers' samples are. Rows count after
    `num_return_sequences`. `stop_strings` need the `tokenizer`, and sampled ids are our own: see the module.

    Raises `ConfigError` for whatever would change the output and can't be honoured; it names the argument and a way
    out.
    """
    configs = [config for config in (generation_config, model.generation_config) if config is not None]
    for name in _REFUSED_ARGUMENTS:
        if value := _setting(name, arguments, configs):
            raise ConfigError(f"{name} is {_short(value)}, which this decoding can't honour; {_WAY_OUT}")
    if stop_strings := _setting("stop_strings", arguments, configs):
        # transformers wants the tokenizer for them, and loses it where another loop is passed.
        if tokenizer is None:
            raise ConfigError(f"stop_strings is {stop_strings!r}: pass the model's `tokenizer` to find them in tokens")
        criteria = [StopStringCriteria(tokenizer, stop_strings), *(arguments.get("stopping_criteria") or ())]
        arguments |= {"stop_strings": None, "stopping_criteria": StoppingCriteriaList(criteria)}
    if generation_config is not None:
        arguments["generation_config"] = generation_config
    return model.generate(inputs, custom_generate=Door(decoder, model, streamer), **arguments)


@dataclass(frozen=True)
class Door:
    """A callable for `model.generate(custom_generate=...)` that decodes with `decoder`, which decodes `model`.

    Of the arguments of that `generate`, transformers doesn't hand on `streamer` and `tokenizer`. A streamer is given
    here and not there; stop strings are given there as `stopping_criteria=[StopStringCriteria(tokenizer, ...)]`.
    `seed`, `seeds` and `generator` are arguments of that `generate` as of ours.

    Logits processors are called with one row at a time, ids `[1, S]` (padded on the left to the batch's width) and
    scores `[1, V]` in float32, and must be functions of these two: a position may be asked about several times, and
    about tokens that are then not committed.
    """

    decoder: Decoder
    model: Any
    streamer: Streamer | None = None

    # No parameter may bear the name of a model input: transformers would take it away from the model's other inputs.
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        *,
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        generator: torch.Generator | None = None,
        **inputs: Any,
    ) -> Any:
        """`input_ids` `[B, S]` as given and what follows them, `[B, S + new]`, or transformers' output that holds it.

        Rows may be padded on either side. A row that has ended is padded with `pad_token_id` until the last one has,
        or goes on until then if there is no end-of-sequence id: so does transformers.

        Raises `ConfigError` as `generate` does, and `PromptError` as the decoder does.
        """
        _refuse_model(model, self.model)
        _refuse_settings(generation_config)
        _refuse_inputs(inputs, input_ids)
        rows = _Rows.taken_from(input_ids, inputs.get("attention_mask"))
        ends = _Ends.taken_from(stopping_criteria, generation_config, width=input_ids.shape[1])
        decoder, sampling = _processed(
            self.decoder, logits_processor, rows, input_ids.device, sampled=bool(generation_config.do_sample)
        )
        seeded = _seeded(sampling, len(rows.ids), seed, seeds, generator)
        columns = []
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())
        for column in _columns(decoder, rows, ends, seeded, input_ids.device):
            columns.append(column)
            if self.streamer is not None:
                self.streamer.put(column)
        if self.streamer is not None:
            self.streamer.end()
        sequences = torch.cat([input_ids, torch.stack(columns, dim=1).to(input_ids)], dim=1)
        if generation_config.return_dict_in_generate:
            return GenerateDecoderOnlyOutput(sequences=sequences)
        return sequences


def _columns(
    decoder: Decoder,
    rows: "_Rows",
    ends: "_Ends",
    sampling: SamplingConfig | list[SamplingConfig],
    device: torch.device,
) -> Iterator[Tensor]:
    """The new tokens, one of each row `[B]` at a time, until the last row has ended."""
    steps = Steps(
        rows.left_padded.to(device), eos_ids=ends.stop.eos_ids, pad_id=ends.pad_id, criteria=ends.other_criteria
    )
    for event in stream(decoder, rows.ids, sampling=sampling, stop=ends.stop):
        if isinstance(event, Committed):
            yield from steps.after(event.row, event.tokens)
        if steps.ended:
            return


class _Rows(NamedTuple):
    """The real tokens of each row, and what stood in place of the others."""

    ids: list[list[int]]
    pads: list[list[int]]

    @classmethod
    def taken_from(cls, input_ids: Tensor, mask: Tensor | None) -> "_Rows":
        is_real = torch.ones_like(input_ids) if mask is None else mask
        pairs = [list(zip(*row, strict=True)) for row in zip(input_ids.tolist(), is_real.tolist(), strict=True)]
        return cls(
            ids=[[token for token, real in row if real] for row in pairs],
            pads=[[token for token, real in row if not real] for row in pairs],
        )

    @property
    def left_padded(self) -> Tensor:
        """`[B, S]`: rows as transformers wants them, whatever side they were padded on."""
        return torch.tensor([[*pads, *ids] for pads, ids in zip(self.pads, self.ids, strict=True)])


class _Ends(NamedTuple):
    """What ends rows: what `stream` is told, and criteria that it doesn't know; and what stands behind an end.

    `pad_id` is None where rows go on behind their end: so they do in transformers where no criterion knows an
    end-of-sequence id.
    """

    stop: StopConfig
    other_criteria: StoppingCriteriaList
    pad_id: int | None

    @classmethod
    def taken_from(cls, criteria: Sequence[Any], config: Any, *, width: int) -> "_Ends":
        most = min(each.max_length for each in criteria if type(each) is MaxLengthCriteria)
        ids = {token for each in criteria if type(each) is EosTokenCriteria for token in each.eos_token_id.tolist()}
        # An id below 0 is how callers say that nothing shall end a row.
        eos_ids = tuple(sorted(token for token in ids if token >= 0))
        others = [each for each in criteria if type(each) not in (EosTokenCriteria, MaxLengthCriteria)]
        pads = any(getattr(each, "eos_token_id", None) is not None for each in criteria)
        return cls(
            # transformers looks at criteria behind a token, so there is always one.
            StopConfig(eos_ids=eos_ids, max_new_tokens=max(1, most - width)),
            StoppingCriteriaList(others),
            _pad_id(config) if pads else None,
        )


def _pad_id(config: Any) -> int:
    for pad in (config.pad_token_id, config.eos_token_id):
        if pad is not None:
            return int(pad[0]) if isinstance(pad, list | tuple) else int(pad)
    raise ConfigError("pad_token_id is None: set it, to fill rows that end before others")


def _processed(
    decoder: Decoder, processors: Sequence[Any], rows: _Rows, device: torch.device, *, sampled: bool
) -> tuple[Decoder, SamplingConfig]:
    """The decoder with what must run before our sampler, and what our sampler does."""
    for processor in processors:
        if isinstance(processor, _BOUND_PROCESSORS):
            raise ConfigError(
                f"logits_processor holds a {type(processor).__name__}, which is bound to a whole batch or to earlier "
                f"calls, while drafted tokens are judged row by row and out of order; {_WAY_OUT}"
            )
    before, sampling = _split(processors, rows, sampled=sampled)
    return (ProcessedDecoder(decoder, _of_rows(before, rows, device)) if before else decoder), sampling


def _split(processors: Sequence[Any], rows: _Rows, *, sampled: bool) -> tuple[list[Any], SamplingConfig]:
    """The processors that must run, and what our sampler does behind them: as much of the list's end as it can."""
    left = list(processors)
    found: dict[str, Any] = {"temperature": 1.0 if sampled else 0.0}
    for name, number, kind in reversed(_FILTERS) if sampled else ():
        if left and type(left[-1]) is kind and left[-1].filter_value == -inf and left[-1].min_tokens_to_keep == 1:
            found[name] = number(getattr(left.pop(), name))
    if sampled and left and type(left[-1]) is TemperatureLogitsWarper:
        found["temperature"] = left.pop().temperature
    if left and type(left[-1]) is RepetitionPenaltyLogitsProcessor and _passes_over_pads(left[-1], rows):
        found["repetition_penalty"] = left.pop().penalty
    return left, SamplingConfig(**found)


def _passes_over_pads(penalty: RepetitionPenaltyLogitsProcessor, rows: _Rows) -> bool:
    # The one that transformers makes knows how many there are, row by row, or that there are none.
    ignored = penalty.prompt_ignore_length
    return isinstance(ignored, Tensor) or (ignored is None and not any(rows.pads))


def _of_rows(processors: Sequence[Any], rows: _Rows, device: torch.device) -> list[RowProcessors]:
    return [
        RowProcessors(
            LogitsProcessorList([_of_row(processor, row, len(pads)) for processor in processors]), pads, device
        )
        for row, pads in enumerate(rows.pads)
    ]


def _of_row(processor: Any, row: int, num_pads: int) -> Any:
    """What `processor` is to this row alone: two that transformers makes know a row by its place in the batch."""
    if type(processor) is RepetitionPenaltyLogitsProcessor and isinstance(processor.prompt_ignore_length, Tensor):
        return RepetitionPenaltyLogitsProcessor(processor.penalty, prompt_ignore_length=num_pads)
    if type(processor) is PrefixConstrainedLogitsProcessor:
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(row, ids), num_beams=1)
    return processor


def _seeded(
    sampling: SamplingConfig,
    num_rows: int,
    seed: int | None,
    seeds: Sequence[int] | None,
    generator: torch.Generator | None,
) -> SamplingConfig | list[SamplingConfig]:
    given = {"seed": seed, "seeds": seeds, "generator": generator}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ConfigError(f"{' and '.join(names)} are given; one of them decides what is drawn, leave out the others")
    if seeds is not None:
        if len(seeds) != num_rows:
            raise ConfigError(f"seeds holds {len(seeds)} for {num_rows} rows; give one each, or one `seed` for all")
        return [replace(sampling, seed=each) for each in seeds]
    if seed is None and not sampling.greedy:
        device = generator.device if generator is not None else None
        seed = int(torch.randint(2**63 - 1, (), generator=generator, device=device))
    return replace(sampling, seed=seed or 0)


def _refuse_model(called: Any, own: Any) -> None:
    if called is not own:
        raise ConfigError(
            f"this custom_generate decodes another {type(own).__name__} than the {type(called).__name__} whose "
            "generate was called; call generate of the model it was made for"
        )


def _refuse_settings(config: Any) -> None:
    kind = type(config)
    defaults = {**vars(kind()), **kind._get_default_generation_params()}
    for name in sorted(defaults.keys() - _HONOURED - _WITHOUT_EFFECT):
        value = getattr(config, name, None)
        # Off, the default, or the scale at which guidance does nothing.
        neutral = not value or value == defaults[name] or (name == "guidance_scale" and value == 1)
        if not neutral and not name.startswith("_"):
            raise ConfigError(f"{name} is {_short(value)}, which this decoding can't honour; {_WAY_OUT}")
    wanted = [name for name in kind.extra_output_flags if getattr(config, name)]
    if config.return_dict_in_generate and wanted:
        raise ConfigError(f"{wanted[0]} is True, but of the output there are only `sequences`; {_WAY_OUT}")


def _refuse_inputs(inputs: Mapping[str, Any], input_ids: Tensor) -> None:
    for name, value in inputs.items():
        if name not in _INPUTS and value is not None:
            raise ConfigError(f"{name} is given ({_short(value)}), but a row is read by its ids alone; {_WAY_OUT}")
    if getattr(inputs.get("past_key_values"), "_is_user_defined", False):
        raise ConfigError(f"past_key_values is given, but the cache of this decoding is its own; {_WAY_OUT}")
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if positions is None:
        return
    is_real = torch.ones_like(input_ids) if mask is None else (mask != 0).long()
    usual = is_real.cumsum(dim=1) - 1
    if not torch.equal(positions.expand_as(usual)[is_real.bool()], usual[is_real.bool()]):
        raise ConfigError(f"position_ids don't count a row's real tokens from 0, as this decoding does; {_WAY_OUT}")


def _setting(name: str, arguments: Mapping[str, Any], configs: Sequence[Any]) -> Any:
    """An argument's value, or that of the first configuration to have one."""
    if name in arguments:
        return arguments[name]
    values = (getattr(config, name, None) for config in configs)
    return next((value for value in values if value is not None), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
