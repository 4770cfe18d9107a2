"""What batching tokens by depth brings: Mixture-of-Recursions beside a plain model of the same sizes in one engine.

    PYTHONPATH=src python benchmarks/engine.py 135m --slots 1 8 32

Weights are random, and routers' thresholds those that keep the wanted shares of random text: what is timed doesn't
depend on what a model has learned, but on how many recursions its tokens run, which is told. Prompts are random, too.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from deepen.backbones.hf import Backbone
from deepen.cli.bench_engine import EngineOptions, measure
from deepen.core.files import write_json
from deepen.engine.request import Request
from deepen.evaluate.engine_speed import Arm, answer
from deepen.evaluate.environment import environment
from deepen.generate.stop import StopConfig
from deepen.methods.mor.config import MoRConfig
from deepen.methods.mor.method import MixtureOfRecursions
from deepen.methods.mor.model import MoRForCausalLM

HERE = Path(__file__).parent
SIZES: dict[str, dict[str, Any]] = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "360m": {"hidden_size": 960, "intermediate_size": 2560, "num_attention_heads": 15, "num_key_value_heads": 5},
}
VOCAB_SIZE = 49_152
DEPTHS = {1: 32, 2: 32, 3: 32, 4: 34}
"""Layers by recursions: those nearest to 32 that can be shared."""


def arm(size: str, num_recursions: int, *, kv: str) -> Arm:
    """A model of random weights, packed, whose routers keep what they are to keep."""
    torch.manual_seed(0)
    config = MoRConfig(
        vocab_size=VOCAB_SIZE,
        num_hidden_layers=DEPTHS[num_recursions],
        num_recursions=num_recursions,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        kv=kv,
        **SIZES[size],
    )
    base = MoRForCausalLM(config).eval().requires_grad_(False)
    keep_wanted_shares(base)
    backbone = Backbone.attach(base)
    backbone.pack()
    name = "plain" if num_recursions == 1 else f"mor-{num_recursions}"
    return Arm(name, MixtureOfRecursions.build(base.config, backbone, VOCAB_SIZE), backbone)


@torch.no_grad()
def keep_wanted_shares(base: MoRForCausalLM) -> None:
    """Each level's threshold goes by what the levels before it let through: so as often as there are levels."""
    ids = torch.randint(0, VOCAB_SIZE, (8, 128))
    for _ in range(base.config.num_recursions - 1):
        reading = base.model.read(ids)
        base.model.router.move(base.model.router.count(reading.routed, reading.run.real), rate=1.0)


def requests(count: int, *, new_tokens: int) -> list[Request]:
    """Of 16 to 64 random ids."""
    source = random.Random(0)
    return [
        Request(
            tuple(source.randrange(VOCAB_SIZE) for _ in range(source.randint(16, 64))),
            stop=StopConfig(max_new_tokens=new_tokens),
        )
        for _ in range(count)
    ]


def exits(arms: list[Arm], asked: list[Request], slots: int) -> list[dict[str, Any]]:
    """How fast each model is by how many tokens leave together."""
    found = []
    for each in arms[1:]:
        for width in sorted({max(1, slots // 4), max(1, slots // 2), slots}):
            speed = answer(each, asked[:slots], slots=slots, exit_width=width).speed
            found.append({"model": each.name, "slots": slots, "exit_width": width, "tokens_per_second": speed})
    return found


@torch.no_grad()
def layer_seconds(each: Arm, num_tokens: int) -> float:
    """One layer over so many tokens, but for its attention: the median of many."""
    model = each.decoder.base.model
    hidden = torch.randn(num_tokens, model.config.hidden_size)
    cos, sin = model.rotary_emb(hidden, torch.arange(num_tokens)[None])
    seconds = []
    for _ in range(60):
        for layer in model.layers[1:5]:  # others than the one before, so that weights come from memory
            began = perf_counter()
            layer.run_with(hidden, (cos[0], sin[0]), num_tokens, lambda queries, made: queries)
            seconds.append(perf_counter() - began)
    return median(seconds)


def by_call(arms: list[Arm], asked: list[Request], slots: int) -> dict[str, Any]:
    """How many times as fast each model's recursions would be if a call took what a layer takes for as many tokens.

    What is less than the ideal here no engine can give back: a layer over few tokens costs nearly what it does over
    more.
    """
    calls = {each.name: answer(each, asked[:slots], slots=slots).statistics.calls for each in arms}
    sizes = sorted({size for counter in calls.values() for size in counter})
    price = {size: layer_seconds(arms[0], size) for size in sizes}
    seconds = {}
    for each in arms:
        recursion = each.decoder.depth_layout().recursions[0]
        seconds[each.name] = len(recursion) * sum(price[size] * times for size, times in calls[each.name].items())
    usual = [size for size in (1, 2, 4, 8, 16, 32) if size in price]
    return {
        "slots": slots,
        "layer_ms": {str(size): round(1e3 * price[size], 3) for size in usual},
        "ratio_of_calls": {name: seconds[arms[0].name] / each for name, each in seconds.items()},
    }


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=sorted(SIZES))
    parser.add_argument("--slots", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--recursions", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--kv", choices=("recursion", "shared", "frozen"), default="recursion")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--load", type=float, default=0.7)
    parser.add_argument("--load-requests", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", default=str(HERE / "results" / "engine"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    arms = [arm(given.size, each, kv=given.kv) for each in (1, *given.recursions)]
    options = replace(
        EngineOptions(),
        models=tuple(each.name for each in arms),
        slots=tuple(given.slots),
        rounds=given.rounds,
        new_tokens=given.new_tokens,
        load=given.load,
        load_requests=given.load_requests,
    )
    asked = requests(max(*given.slots, given.load_requests), new_tokens=given.new_tokens)
    figures = measure(options, arms, asked)
    figures["exits"] = exits(arms, asked, max(given.slots))
    figures["by_call"] = [by_call(arms, asked, slots) for slots in given.slots]
    print(json.dumps({name: figures[name] for name in ("exits", "by_call")}, indent=1))
    content = {"command": command(given), "environment": environment(arms[0].backbone), **figures}
    write_json(Path(given.out) / f"{given.size}-{given.kv}.json", content)


def command(given: argparse.Namespace) -> str:
    """What makes these figures."""
    lists = {name: " ".join(map(str, getattr(given, name))) for name in ("slots", "recursions")}
    return (
        f"PYTHONPATH=src python benchmarks/engine.py {given.size} --slots {lists['slots']} --recursions "
        f"{lists['recursions']} --kv {given.kv} --new-tokens {given.new_tokens} --rounds {given.rounds}"
    )


if __name__ == "__main__":
    main()
