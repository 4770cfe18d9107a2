"""What tests on a GPU share."""

import gc
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def kernels_as_they_are_first_configured() -> None:
    """Which block sizes are fastest changes no claim, and takes minutes to find out for each shape and dtype."""
    if not torch.cuda.is_available() or find_spec("fla") is None:
        return
    import_module("fla.ops.kda")
    tuner = import_module("triton.runtime.autotuner").Autotuner
    for each in gc.get_objects():
        if issubclass(type(each), tuner):
            each.configs = each.configs[:1]
