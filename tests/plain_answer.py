"""An answer as plain decoding gives it, for tests of what is made of answers."""

from collections.abc import Sequence
from typing import Any

from deepen.evaluate.results import Answer


def plain_answer(tokens: Sequence[int], *, prompt: str = "moon", **fields: Any) -> Answer:
    """One pass of one position a token, one second in all; `fields` override."""
    num = len(tokens)
    plain = {
        "domain": "chat",
        "num_prompt_tokens": 3,
        "text": "",
        "reason": "length",
        "seconds": 1.0,
        "passes": num,
        "positions": num,
        "flops": num,
        "commits": (1,) * num,
        "passes_of_commits": (1,) * num,
        "drafted": {},
        "judged": {},
        "agreed": {},
        "passes_by_source": {"none": {"1": num}},
        "edits": 0,
        "p_commit": (),
    }
    return Answer(prompt=prompt, tokens=tuple(tokens), **(plain | fields))
