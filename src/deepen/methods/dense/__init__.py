"""Ordinary training of a causal language model, without recursion: what every method is compared with."""

from deepen.core.registry import Method

METHOD = Method(
    "dense",
    "trains a model without recursion, all of it or LoRA on it: the control of every comparison",
    config="config:DenseConfig",
    model="model:DenseModel",
)
