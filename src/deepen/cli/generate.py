"""deepen generate"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from deepen.cli.options import (
    Model,
    OptionalFile,
    OptionalInteger,
    OptionalName,
    OptionalNumber,
    OptionalText,
    Settings,
    Texts,
    read_settings,
)
from deepen.cli.prompt import encode, read_prompt
from deepen.core.errors import ConfigError
from deepen.core.files import write_json

if TYPE_CHECKING:
    from deepen.checkpoint import Opened
    from deepen.generate.events import RowResult
    from deepen.generate.sampling import SamplingConfig
    from deepen.generate.stop import StopConfig


@dataclass(frozen=True)
class Options:
    """Continue a prompt with a model or an adapter; the text streams to stdout, everything else goes to stderr.

    Greedy unless a temperature is given. With --file and --out many prompts are answered at once, each as if it were
    alone, and the answers are written to a file; the same command goes on with one that was cut off. Exit status 1 if
    one of them could not be answered.
    """

    model: Model
    """A model (hub id, folder, pypi:NAME, tiny:NAME) or the folder of an adapter."""
    prompt: OptionalText = None
    """The prompt; left out, it is read from --prompt-file or from standard input, less one newline at its end."""
    prompt_file: OptionalFile = None
    """A UTF-8 file with the prompt."""
    file: Annotated[str | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """A prompt a line: an object with "prompt", "messages" or "prompt_tokens", an "id" if it has one, and settings of
    its own (max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed, stop). Line i, from 0, draws
    with seed + i."""
    out: Annotated[str | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """With --file: where the answers go, a line each, in the order of the prompts."""
    slots: OptionalInteger = None
    """With --file: prompts to answer at once; left out, 8."""
    memory_gb: OptionalNumber = None
    """With --file: memory for keys and values, in 10^9 bytes; left out, enough for all slots."""
    max_length: OptionalInteger = None
    """With --file: tokens that a prompt and its answer may have; left out, the model's context, at most 2048."""
    chat: bool = True
    """Put the prompt as a user's message, if the model has a chat template; --no-chat continues it as it is."""
    max_new_tokens: int = 256
    """Most tokens to add."""
    temperature: float = 0.0
    """0 takes the most probable token; above, tokens are drawn."""
    top_k: int = 0
    """Draw from the k most probable tokens only; 0 is off."""
    top_p: float = 1.0
    """Draw from the most probable tokens that together reach this probability only; 1 is off."""
    min_p: float = 0.0
    """Draw from tokens at least this share as probable as the most probable one only; 0 is off."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were there before get less probable."""
    seed: int = 0
    """Of what is drawn: equal seeds give equal texts."""
    stop: Texts = ()
    """Text to stop at; may be given more than once."""
    set: Settings = ()
    """A field of the adapter's configuration to set differently, as draft=lookup; may be given more than once."""
    chunk_width: OptionalInteger = None
    """The same as --set chunk_width=INT."""
    max_inner_steps: OptionalInteger = None
    """The same as --set max_inner_steps=INT."""
    commit_threshold: OptionalNumber = None
    """The same as --set commit_threshold=FLOAT."""
    min_commit_threshold: OptionalNumber = None
    """The same as --set min_commit_threshold=FLOAT."""
    recursions: OptionalInteger = None
    """Run the model's recursions so often, more or less often than they were trained to be."""
    base: OptionalName = None
    """Where the adapter's base model is, if it is no longer where it was."""
    dtype: OptionalName = None
    """float32, bfloat16, float16 or float64; left out, float32 on a CPU and the model's own elsewhere."""
    device: OptionalName = None
    """cpu, cuda, cuda:1, mps; left out, an accelerator if there is one."""
    pack: bool = True
    """Pack weights for speed on a CPU, where they then take twice the memory."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    stats: bool = False
    """Print tokens, passes, accepted drafts and speed to stderr."""
    json: OptionalFile = None
    """A file for the text, its tokens, the statistics and every setting."""


_FIELD_FLAGS = ("chunk_width", "max_inner_steps", "commit_threshold", "min_commit_threshold")


@dataclass(frozen=True)
class _Timing:
    """Seconds from the call to the first token, and to the last."""

    to_first: float
    total: float


def run(options: Options) -> int:
    """Generate."""
    if options.file is not None:
        from deepen.cli.generate_file import answer_file

        return answer_file(options, options.file)
    _refuse_alone(options)
    text = read_prompt(options.prompt, options.prompt_file)
    overrides = overrides_of(options)
    sampling, stop = sampling_of(options), stop_of(options)
    refuse_idle(sampling)
    opened = opened_for(options, overrides)
    stop = with_eos(stop, opened)
    chat = options.chat and opened.tokenizer.chat_template is not None
    ids = encode(opened.tokenizer, text, chat=chat)
    result, timing = _stream(opened, ids, sampling, stop)
    if options.stats:
        for line in _statistics(ids, chat, result, timing, stop):
            print(line, file=sys.stderr)
    if options.json is not None:
        outcome = _outcome(options, opened, text, ids, chat, sampling, stop, result, timing)
        write_json(options.json, outcome)
    return 0


def _refuse_alone(options: Options) -> None:
    for name in ("out", "slots", "memory_gb", "max_length"):
        value = getattr(options, name)
        if value is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(
                f"{flag} {value} is for --file, which isn't given; add --file FILE.jsonl, or leave it out"
            )


def opened_for(options: Options, overrides: Mapping[str, Any]) -> "Opened":
    """The model, with these fields of its configuration set differently."""
    from deepen.checkpoint import open_model

    opened = open_model(
        options.model,
        dtype=options.dtype,
        device=options.device,
        overrides=overrides,
        base=options.base,
        trust_remote_code=options.trust_remote_code,
        pack=options.pack,
    )
    return opened if options.recursions is None else _at_depth(opened, options.recursions, address=options.model)


def _at_depth(opened: "Opened", number: int, *, address: str) -> "Opened":
    from deepen.evaluate.recursions import at_each_depth

    model = at_each_depth(opened.model, (number,), address=address)[number]
    return replace(opened, decoder=model, model=model, backbone=model.backbone)


def overrides_of(options: Options) -> dict[str, Any]:
    """The fields of the model's configuration that flags set."""
    settings = read_settings(options.set)
    for name in _FIELD_FLAGS:
        value = getattr(options, name)
        if value is None:
            continue
        if name in settings:
            raise ConfigError(f"--{name} {value} and --set {name}={settings[name]} both set {name}; keep one")
        settings[name] = value
    return settings


def sampling_of(options: Options) -> "SamplingConfig":
    """What the flags say of how tokens are chosen."""
    from deepen.generate.sampling import SamplingConfig

    given = {field.name: getattr(options, field.name) for field in fields(SamplingConfig)}
    return SamplingConfig.from_dict(given, source="sampling")


def refuse_idle(sampling: "SamplingConfig", *, source: str = "") -> None:
    """Raises `ConfigError`, which begins with `source`, for a setting that does nothing where nothing is drawn."""
    for name in ("top_k", "top_p", "min_p"):
        value = getattr(sampling, name)
        if sampling.greedy and value != getattr(type(sampling), name):
            raise ConfigError(f"{source}{name} {value} has no effect at temperature 0 (greedy); set a temperature, too")


def stop_of(options: Options) -> "StopConfig":
    """What the flags say of when a text ends."""
    from deepen.generate.stop import StopConfig

    given = {"stop_strings": options.stop, "max_new_tokens": options.max_new_tokens}
    return StopConfig.from_dict(given, source="stopping")


def with_eos(stop: "StopConfig", opened: "Opened") -> "StopConfig":
    """The same, and the ids that end a text of this model."""
    return replace(stop, eos_ids=opened.eos_ids)


def _stream(
    opened: "Opened", ids: Sequence[int], sampling: "SamplingConfig", stop: "StopConfig"
) -> tuple["RowResult", _Timing]:
    """Write the text to stdout as it comes, and give what it was."""
    from deepen.generate.events import RowResult
    from deepen.generate.loop import stream

    result, began, first = RowResult(), perf_counter(), None
    for event in stream(opened.decoder, [ids], sampling=sampling, stop=stop, tokenizer=opened.tokenizer):
        before = len(result.text)
        result.add(event)
        if first is None:
            first = perf_counter()
        if len(result.text) > before:
            sys.stdout.write(result.text[before:])
            sys.stdout.flush()
    ended = perf_counter()
    if result.text and not result.text.endswith("\n"):
        sys.stdout.write("\n")
    return result, _Timing((ended if first is None else first) - began, ended - began)


def _statistics(ids: Sequence[int], chat: bool, result: "RowResult", timing: _Timing, stop: "StopConfig") -> list[str]:
    lines = [f"prompt: {len(ids)} tokens ({'as a chat message' if chat else 'as it stands'})"]
    if not stop.max_new_tokens:
        return [*lines, "new: 0 tokens, because max_new_tokens is 0"]
    lines.append(
        f"new: {len(result.tokens)} tokens in {result.passes} passes, {result.tokens_per_pass:.2f} a pass; "
        f"ended by {result.reason}"
    )
    lines += [
        f"drafts: {source}: {result.accepted[source]} of {drafted} tokens accepted "
        f"({result.accepted[source] / drafted:.0%})"
        for source, drafted in sorted(result.drafted.items())
    ]
    speed = len(result.tokens) / timing.total
    lines.append(f"time: {timing.total:.2f} s, {timing.to_first:.2f} s to the first token; {speed:.1f} tokens/s")
    return lines


def _outcome(
    options: Options,
    opened: "Opened",
    text: str,
    ids: Sequence[int],
    chat: bool,
    sampling: "SamplingConfig",
    stop: "StopConfig",
    result: "RowResult",
    timing: _Timing,
) -> dict[str, Any]:
    import deepen

    return {
        "deepen_version": deepen.__version__,
        "model": options.model,
        "base": vars(opened.identity),
        "method": opened.method.name if opened.method else None,
        "config": opened.model.config.to_dict() if opened.model else None,
        "dtype": str(opened.backbone.dtype).removeprefix("torch."),
        "device": str(opened.backbone.device),
        "sampling": sampling.to_dict(),
        "stop": stop.to_dict(),
        "chat": chat,
        "prompt": text,
        "prompt_tokens": list(ids),
        "text": result.text,
        "tokens": result.tokens,
        "reason": result.reason,
        "passes": result.passes,
        "tokens_per_pass": result.tokens_per_pass,
        "commits": result.commits,
        "drafted": dict(result.drafted),
        "accepted": dict(result.accepted),
        "seconds": timing.total,
        "seconds_to_first_token": timing.to_first,
        "tokens_per_second": len(result.tokens) / timing.total,
    }
