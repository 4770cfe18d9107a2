"""deepen new"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from deepen.cli.options import OptionalInteger, OptionalText, require_new_folder
from deepen.cli.output import print_facts


@dataclass(frozen=True)
class Options:
    """Make a causal language model with random weights, to train from scratch, and save it as a transformers folder.

    Shipped configurations: llama-1m, llama-5m, nanochat-1m, and those that methods bring (`deepen methods`), as
    mor-1m-nr3.
    """

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG.json")]
    """A transformers configuration: model_type and sizes, without vocab_size and special ids, which come from the
    tokenizer; a file, or a shipped one's name."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The model's folder, new or empty."""
    tokenizer: Annotated[str, tyro.conf.arg(metavar="bytes|bpe:N")] = "bytes"
    """bytes, or a byte-pair encoding of N ids, trained on the training documents of the corpus."""
    data: OptionalText = None
    """The corpus for bpe:N: wiki, a .txt or .jsonl file, a folder of such files, or hub:OWNER/NAME."""
    seed: int = 0
    """Of the weights."""
    context_length: OptionalInteger = None
    """Most tokens of a text, in place of the configuration's max_position_embeddings."""


def run(options: Options) -> int:
    """Make it, save it, and tell what it is."""
    require_new_folder(options.out)
    # From here on things take a while.
    from deepen.backbones.new import new_model, new_tokenizer, parameters_by_part, read_config
    from deepen.checkpoint import save_model

    config = read_config(options.config)
    tokenizer = new_tokenizer(options.tokenizer, corpus=options.data)
    made = new_model(config, tokenizer, seed=options.seed, context_length=options.context_length)
    save_model(options.out, backbone=made.backbone, tokenizer=made.tokenizer)
    backbone, parts = made.backbone, parameters_by_part(made.backbone)
    facts = {
        "architecture": f"{config['model_type']}, {backbone.num_layers} layers of width {backbone.hidden_size}",
        "parameters": backbone.num_parameters,
        **{f"  {name}": count or _why_none(name) for name, count in parts.items() if count or name != "others"},
        "context": backbone.context_length,
        "vocabulary": f"{backbone.vocab_size:,} ({options.tokenizer})",
        "seed": options.seed,
    }
    print_facts(facts, title=f"new model in {options.out}")
    data = options.data or "CORPUS"
    # A model that a method brings is trained by it.
    method = "--method dense --config full " if backbone.own_method is None else ""
    print(f"train it: deepen train RUN.json --model {options.out} {method}--data {data}")
    return 0


def _why_none(part: str) -> str:
    return "the embedding's" if part == "head" else "none"
