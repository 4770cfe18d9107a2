"""What holds and what it costs on a GPU: bits of operators and passes, exact decodings, time, delta attention.

    PYTHONPATH=src python benchmarks/cuda.py --out benchmarks/results/cuda.json

Needs flash-linear-attention for the lines that compare with it. Models are random, so nothing is downloaded.
"""

import argparse
import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from deepen.backbones import tiny
from deepen.backbones.hf import Backbone
from deepen.evaluate.delta_equality import PARTLY_RIGHT, draw_cases, fill_with_noise, tally_cases
from deepen.methods.chunk.model import ChunkRefineWrapper
from deepen.nn import kda_kernels
from deepen.nn.attention import KEY_BLOCK, QUERY_BLOCK, Visibility, attend
from deepen.nn.kda import delta_attention

WIDTHS = (2, 3, 4, 5, 8, 16, 17, 64)
CHUNK_WIDTHS = (1, 8, 64)
DRAFTS = ("mask", "lookup", "auto")
PRECISIONS = {
    "float32": (torch.float32, False),
    "float32, TF32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
}
# Of the shape of SmolLM2-135M.
SMALL = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)
SMALL_NAME = "SmolLM2-135M's shape"
BASES = (*tiny.NAMES, SMALL_NAME)
LINEARS = ((576, 576), (576, 192), (576, 1536), (1536, 576), (576, 49152), (64, 64), (64, 176), (176, 64), (64, 320))
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 68, 128, 256, 512)
# Query heads, key heads, key width.
HEADS = ((9, 3, 64), (4, 2, 16))
CONTEXT = 256
NEW_TOKENS = 64


def main() -> None:
    """Run the asked sections and add them to what the file holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), help="of bits and decodings")
    parser.add_argument("--cases", type=int, default=60, help="random decodings to a base and precision")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    held = json.loads(options.out.read_text()) if options.out.exists() else {}
    held["machine"] = machine()
    for name in options.sections:
        held[name] = SECTIONS[name](options)
        print(name, json.dumps(held[name], indent=1), flush=True)
        options.out.write_text(json.dumps(held, indent=2) + "\n")


def machine() -> dict[str, str]:
    """What the figures depend on."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("transformers", "triton", "flash-linear-attention", "fla-core")},
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """In the block, products of float32 matrices may or must not be computed in TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def small_llama(dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, larger than transformers' own, so that the next token depends on the context."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SMALL, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(2.0)
    return model.to(dtype).eval().requires_grad_(False).cuda()


# Bits.


def operators(_: argparse.Namespace) -> list[dict[str, Any]]:
    """Which row counts give a row the same bits, in linears of SMALL's and the tiny models' shapes and in attention."""
    lines = []
    for label, (dtype, allowed) in (*PRECISIONS.items(), ("float64", (torch.float64, False))):
        with tf32(allowed):
            for shape in LINEARS:
                lines.append(
                    {"linear": list(shape), "precision": label, "rows with equal bits": _rows_alike(*shape, dtype)}
                )
            for num_heads, num_key_heads, width in HEADS:
                blocks = _blocks_alike(num_heads, num_key_heads, width, dtype)
                lines.append({"attention": [num_heads, num_key_heads, width], "precision": label, **blocks})
    return lines


def _rows_alike(num_in: int, num_out: int, dtype: torch.dtype) -> list[list[int]]:
    """The first row of a product, computed beside others: row counts in groups that gave the same bits."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(num_out, num_in, generator=generator, device="cuda", dtype=dtype)
    x = torch.randn(ROWS[-1], num_in, generator=generator, device="cuda", dtype=dtype)
    groups: list[tuple[Tensor, list[int]]] = []
    for count in ROWS:
        first = torch.nn.functional.linear(x[:count], weight)[0]
        for known, counts in groups:
            if torch.equal(known, first):
                counts.append(count)
                break
        else:
            groups.append((first, [count]))
    return [counts for _, counts in groups]


def _blocks_alike(num_heads: int, num_key_heads: int, width: int, dtype: torch.dtype) -> dict[str, list[int]]:
    """Of a pass of 1, 2, 4 and 16 blocks of positions, those whose first block is that of a pass of one block."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, width, generator=generator, device="cuda", dtype=dtype)

    query, key, value = normal(num_heads, 64), normal(num_key_heads, KEY_BLOCK), normal(num_key_heads, KEY_BLOCK)
    outs = {}
    for num_blocks in (1, 2, 4, 16):
        num_positions = num_blocks * QUERY_BLOCK
        seen = Visibility([32], num_positions, KEY_BLOCK, device=query.device, dtype=dtype)
        outs[num_blocks] = attend(query[:, :, :num_positions], key, value, visibility=seen, scale=None)[:, :QUERY_BLOCK]
    return {"blocks with equal bits": [count for count, out in outs.items() if torch.equal(out, outs[1])]}


def bits(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Largest difference between logits of passes of each width and of passes of one token; 0.0 is the same bits."""
    lines = []
    for label, (dtype, allowed) in (*PRECISIONS.items(), ("float64", (torch.float64, False))):
        for name in options.bases:
            model = small_llama(dtype) if name == SMALL_NAME else tiny.build(name, dtype=dtype).cuda()
            with tf32(allowed), torch.no_grad():
                lines.append({"base": name, "precision": label, **_bits_of(Backbone.attach(model))})
    return lines


def _bits_of(backbone: Backbone) -> dict[str, Any]:
    ids = torch.randint(256, (200,), generator=torch.Generator().manual_seed(3)).tolist()
    by_one = _logits_in_passes(backbone, ids, 1)
    differences = {
        f"width {width}": float((_logits_in_passes(backbone, ids, width) - by_one).abs().max()) for width in WIDTHS
    }
    again = float((_logits_in_passes(backbone, ids, 1) - by_one).abs().max())
    return {"spread of logits": round(float(by_one.std()), 3), **differences, "width 1 again": again}


def _logits_in_passes(backbone: Backbone, ids: list[int], width: int) -> Tensor:
    cache = backbone.new_cache(batch_size=1, capacity=len(ids))
    parts = []
    for chunk in torch.tensor([ids], device="cuda").split(width, dim=1):
        parts.append(backbone.run(chunk, cache))
        cache.commit([chunk.shape[1]])
    return torch.cat(parts, dim=1).double()


# Decodings.


def decodings(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Random cases decoded plainly and in exact mode, greedy and sampled, one row and four: where ids part, by what."""
    lines = []
    for name in (base for base in options.bases if base != SMALL_NAME):
        for label, (dtype, allowed) in PRECISIONS.items():
            backbone = Backbone.attach(tiny.build(name, dtype=dtype).requires_grad_(False).cuda())
            decoders = {}
            for draft in DRAFTS:
                for width in CHUNK_WIDTHS:
                    model = ChunkRefineWrapper(
                        backbone.model, recursive_enabled=True, draft=draft, chunk_width=width, d_state=16
                    )
                    fill_with_noise(model)
                    decoders[f"{draft} {width}"] = model
            cases = draw_cases(options.cases, [*decoders, PARTLY_RIGHT, PARTLY_RIGHT])
            with tf32(allowed):
                tally = tally_cases(backbone, decoders, cases, done=lambda _: None)
            lines.append({"base": name, "precision": label, **tally.figures(), "margins": tally.margins})
    return lines


# Time.


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """Median of `rounds` runs after three unmeasured ones, from when the GPU is idle until it is idle again."""
    times = []
    for turn in range(rounds + 3):
        torch.cuda.synchronize()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        work()
        ended.record()
        ended.synchronize()
        if turn >= 3:
            times.append(began.elapsed_time(ended))
    return round(median(times), 3)


def passes(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A pass and its commit behind 256 tokens, by width, against one token of transformers' `generate`."""
    lines = []
    ids = torch.randint(SMALL.vocab_size, (1, CONTEXT), generator=torch.Generator().manual_seed(1)).cuda()
    for label, (dtype, allowed) in PRECISIONS.items():
        model = small_llama(dtype)
        backbone = Backbone.attach(model)
        with tf32(allowed), torch.no_grad():
            line: dict[str, Any] = {"precision": label}
            for width in CHUNK_WIDTHS:
                line[f"pass of {width}, ms"] = _pass(backbone, ids, width, options.rounds)
            line["transformers generate, ms a token"] = _generated(model, ids, options.rounds)
        lines.append(line)
    return lines


def _pass(backbone: Backbone, ids: Tensor, width: int, rounds: int) -> float:
    cache = backbone.new_cache(batch_size=1, capacity=CONTEXT + width)
    backbone.run(ids, cache, keep="last")
    cache.commit([CONTEXT])
    chunk, before = ids[:, :width].contiguous(), cache.snapshot()

    def run() -> None:
        backbone.run(chunk, cache)
        cache.commit([width])
        cache.rollback(before)

    return milliseconds(run, rounds)


def _generated(model: PreTrainedModel, ids: Tensor, rounds: int) -> float:
    def generate() -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )

    return round(milliseconds(generate, max(3, rounds // 6)) / NEW_TOKENS, 3)


# Delta attention.


def delta(options: argparse.Namespace) -> list[dict[str, Any]]:
    """32 heads of 128: our op on the GPU against FLA's kernels, and both against our op in float64."""
    return [_delta_line(tokens, train, options.rounds) for tokens in (1, 8, 64, 2048) for train in (False, True)]


def _delta_line(tokens: int, train: bool, rounds: int) -> dict[str, Any]:
    drawn = _operands(tokens)
    exact = _delta(tuple(x.double() for x in drawn), train)
    sides = {
        "ours, float32": (tuple(x.float() for x in drawn), False),
        "ours, bfloat16 in and out": (drawn, False),
        "FLA, bfloat16": (drawn, True),
    }
    line: dict[str, Any] = {"tokens": tokens, "work": "forward and backward" if train else "forward"}
    for name, (inputs, by_kernels) in sides.items():
        with patch.object(kda_kernels, "serves", lambda query, by_kernels=by_kernels: by_kernels):
            answers = _delta(inputs, train)
            errors = [
                float((actual.double() - expected).abs().max() / expected.abs().max())
                for actual, expected in zip(answers, exact, strict=True)
            ]
            del answers
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            _delta(inputs, train)
            peak = torch.cuda.max_memory_allocated() - before
            line[name] = {
                "ms": milliseconds(lambda inputs=inputs: _delta(inputs, train), rounds),
                "largest relative error": float(f"{max(errors):.2g}"),
                "peak MB": round(peak / 2**20, 1),
            }
    return line


def _operands(tokens: int, heads: int = 32, size: int = 128) -> tuple[Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=generator, device="cuda")

    query, key, value = (normal(tokens, heads, size).bfloat16() for _ in range(3))
    log_decay = -torch.nn.functional.softplus(normal(tokens, heads, size))
    beta = normal(tokens, heads).sigmoid().bfloat16()
    return query, key, value, log_decay, beta, normal(heads, size, size)


def _delta(operands: tuple[Tensor, ...], train: bool) -> tuple[Tensor, ...]:
    if not train:
        with torch.no_grad():
            output = delta_attention(*operands[:5], initial=operands[5])
        return output.out, output.state
    leaves = [x.detach().requires_grad_() for x in operands]
    output = delta_attention(*leaves[:5], initial=leaves[5])
    grads = torch.autograd.grad(output.out.sum() + output.state.sum(), leaves)
    return output.out.detach(), output.state.detach(), *grads


SECTIONS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "operators": operators,
    "bits": bits,
    "decodings": decodings,
    "passes": passes,
    "delta": delta,
}

if __name__ == "__main__":
    main()
