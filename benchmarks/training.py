"""Train small dense models from scratch, and say what came of it and how near to the machine's limit it ran.

    PYTHONPATH=src python benchmarks/training.py wiki python

makes `runs/CORPUS-1m` (once), trains as benchmarks/dense/CORPUS.json says, going on with a run that was cut off, and
writes benchmarks/results/training/CORPUS.json: the loss curve, validation figures, the ledger, and tokens a second with
the share of a matrix product's speed that this is. That speed is measured before and after, and the larger one counts.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from deepen.backbones.new import new_model, new_tokenizer, read_config
from deepen.checkpoint import open_model, save_model
from deepen.core.files import write_json
from deepen.evaluate.environment import environment
from deepen.train.config import RunConfig
from deepen.train.run import train

HERE = Path(__file__).parent
SHAPE, TOKENIZER = "llama-1m", "bpe:1024"
# As large as a product must be to run at full speed, and small enough for the last-level cache not to matter.
GEMM_SIZE, NUM_GEMMS = 2048, 8


def gemm_flops_per_second() -> float:
    """Of the fastest of several square float32 products."""
    left, right = torch.randn(GEMM_SIZE, GEMM_SIZE), torch.randn(GEMM_SIZE, GEMM_SIZE)
    torch.mm(left, right)
    seconds = []
    for _ in range(NUM_GEMMS):
        began = perf_counter()
        torch.mm(left, right)
        seconds.append(perf_counter() - began)
    return 2 * GEMM_SIZE**3 / min(seconds)


def trained(corpus: str) -> dict[str, Any]:
    """The whole of one run, as plain JSON types."""
    config = RunConfig.from_file(HERE / "dense" / f"{corpus}.json")
    if not Path(config.model).exists():
        new = new_model(read_config(SHAPE), new_tokenizer(TOKENIZER, corpus=corpus))
        save_model(config.model, backbone=new.backbone, tokenizer=new.tokenizer)
    before = gemm_flops_per_second()
    folder = train(config)
    peak = max(before, gemm_flops_per_second())
    lines = [json.loads(line) for line in (folder.parent / "train.jsonl").read_text().splitlines()]
    ledger = json.loads((folder / "ledger.json").read_text())
    paces = [line["train/performance/tokens_per_sec"] for line in lines[1:]]
    flops_per_second = median(paces) * ledger["training_flops_per_token"]
    samples = [json.loads(line) for line in (folder.parent / "samples.jsonl").read_text().splitlines()]
    return {
        "command": f"PYTHONPATH=src python benchmarks/training.py {corpus}",
        "run": config.to_dict(),
        "environment": environment(open_model(str(folder)).backbone),
        "ledger": ledger,
        "tokens_per_second": {"median": median(paces), "least": min(paces), "most": max(paces)},
        "seconds_of_steps": sum(_tokens(lines, ledger) / pace for pace in paces),
        "gemm_flops_per_second": peak,
        "share_of_gemm": flops_per_second / peak,
        "last_validation": {name: value for name, value in lines[-1].items() if name.startswith("evaluation/val")},
        "curve": [{"step": line["step"], "loss": line["train/loss/total"]} for line in lines],
        "validation": [
            {"step": line["step"], "bits_per_byte": line["evaluation/validation/bits_per_byte"]}
            for line in lines
            if "evaluation/validation/bits_per_byte" in line
        ],
        "samples": [{"prompt": sample["prompt"], "text": sample["text"]} for sample in samples[-config.num_samples :]],
    }


def _tokens(lines: list[dict[str, Any]], ledger: dict[str, Any]) -> float:
    """Of an interval between two lines, on average."""
    return float(ledger["tokens"] / max(1, len(lines) - 1))


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", choices=["wiki", "python"])
    for corpus in parser.parse_args().corpora:
        found = trained(corpus)
        out = HERE / "results" / "training" / f"{corpus}.json"
        out.parent.mkdir(exist_ok=True)
        write_json(out, found)
        bits = found["last_validation"]["evaluation/validation/bits_per_byte"]
        print(
            f"{corpus}: {bits:.3f} bits per byte, {found['tokens_per_second']['median']:,.0f} tokens/s, "
            f"{found['share_of_gemm']:.0%} of a matrix product's {found['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s"
        )


if __name__ == "__main__":
    main()
