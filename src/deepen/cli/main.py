"""The command line: finds the verb, reads its options, and turns errors into one message and an exit status.

Each verb is the module of its name beside this one, with a frozen dataclass `Options` (its fields are the flags, their
docstrings the help) and `run(options) -> int`. Nothing here or in a verb's module imports torch until `run`.

Exit status: 0 done, 1 the verb's own verdict (see its help), 2 something the user can mend, 130 interrupted.
"""

import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import deepen
from deepen.core.errors import DeepenError
from deepen.core.hints import did_you_mean

VERBS = {
    "demo": "what recursion buys on a pretrained model, measured here in minutes",
    "graft": "add a method to a model, print its budget, verify that nothing else changed, save the adapter",
    "generate": "continue a prompt, or all prompts of a file, with any model or adapter",
    "new": "make a model to train: with random weights and a tokenizer for it, or of a pretrained model's weights",
    "train": "train a method's parameters as a run file says",
    "distill": "write a model's own greedy answers as a corpus to train on",
    "evaluate": "measure a model at one stage of its surgery",
    "compare": "stages side by side: differences, costs, and whether the grafted model still is its base",
    "check": "hold any causal language model, also your own class, to what such a model must do",
    "inspect": "what a model is made of and what a pass of it costs",
    "methods": "the methods there are, and their presets",
    "bench": "time plain and exact decoding or delta attention against transformers, or many requests at once",
}

_BAD_INPUT = 2
_INTERRUPTED = 130
_BROKEN_PIPE = 141  # what a shell reports for a program that a closed pipe has ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run `deepen` with these arguments (default: the process's own) and give its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model's text may hold what a terminal's encoding lacks
    name = f"deepen {arguments[0]}" if arguments and arguments[0] in VERBS else "deepen"
    try:
        with _warnings_on_one_line(name):
            status = _dispatch(arguments)
        sys.stdout.flush()
    except DeepenError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return _BAD_INPUT
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        _leave_the_pipe()
        return _BROKEN_PIPE
    return status


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    verb, *rest = arguments
    if verb in ("-V", "--version"):
        print(f"deepen {deepen.__version__}")
        return 0
    if verb not in VERBS:
        raise DeepenError(f'unknown command "{verb}"{did_you_mean(verb, VERBS)} (deepen --help tells what each does)')
    module = importlib.import_module(f"deepen.cli.{verb}")
    try:
        options = _read_options(verb, module, rest)
    except SystemExit as asked:  # tyro has printed the help, or what is wrong
        return asked.code if isinstance(asked.code, int) else 0
    status: int = module.run(options)
    return status


def _read_options(verb: str, module: Any, arguments: Sequence[str]) -> Any:
    import tyro

    return tyro.cli(module.Options, prog=f"deepen {verb}", args=arguments)


def _help() -> str:
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "usage: deepen COMMAND [OPTIONS]",
            "",
            "Recursive computation for language models: exact, causal, at counted compute.",
            "",
            *(f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items()),
            "",
            "deepen COMMAND --help tells a command's options, deepen --version the version.",
        ]
    )


@contextlib.contextmanager
def _warnings_on_one_line(name: str) -> Iterator[None]:
    """Warnings as one line each, without the place in the code that a user can't do anything about."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"{name}: warning: {' '.join(str(message).split())}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _leave_the_pipe() -> None:
    """Let the interpreter's last flush of what nobody reads go nowhere, instead of failing again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
