"""A complete method in one folder, for tests: nothing outside of it knows that it exists."""

from deepen.core.registry import Method

METHOD = Method(
    "toy",
    "runs one small shared block over the last hidden state a few times",
    config="config:ToyConfig",
    model="model:ToyModel",
)
