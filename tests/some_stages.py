"""Results files as stages write them, small and made up, for tests of what is made of them."""

from typing import Any

from plain_answer import plain_answer

from deepen.evaluate.results import FORMAT, BaseOfStage, ScoredDocument, StageResults

BASE = BaseOfStage("tiny:llama", "f" * 64, "t" * 64)
DOCUMENTS = tuple(ScoredDocument(f"{n:016x}", 30.0 + 7 * n, 10 + n, n % 5, 40 + n) for n in range(12))
ANSWERS = (plain_answer((5, 6, 7, 8)), plain_answer((9, 9, 4), prompt="bread"))


def stage(name: str = "baseline", **fields: Any) -> StageResults:
    """A stage of `BASE` on a CPU; `fields` override."""
    defaults = {
        "base": BASE,
        "method": None,
        "method_config": None,
        "exact": False,
        "config": {"stage": name, "max_tokens": 500, "max_new_tokens": 4, "first_scored": 32, "output_dir": name},
        "environment": {"device": "cpu", "dtype": "float32", "torch": "2.13.0"},
        "figures": {"largest_move": 0.0},
        "documents": DOCUMENTS,
        "answers": ANSWERS,
        "generation": {"num_answers": 2, "tokens_per_pass": 1.0, "chunk_lengths": {"1": 7}},
        "ledger": {"parameters_unique": 100},
        "checks": {"pass_width_difference": 0.0, "own_forward_difference": None},
        "speed": None,
    }
    return StageResults(
        format=FORMAT,
        deepen_version="0.1.0",
        stage=name,
        data={"corpus": "wiki"},
        seed=0,
        left_out=(),
        seconds={"scoring": 1.0},
        **(defaults | fields),
    )
