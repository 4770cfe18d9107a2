"""What figures depend on beside the model: versions, device, threads; and how much memory was used."""

import platform
import resource
import sys
from importlib.metadata import version

import torch

import deepen
from deepen.backbones.hf import Backbone


def environment(backbone: Backbone) -> dict[str, str | int]:
    """Plain JSON types, by label."""
    return {
        "deepen": deepen.__version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": str(backbone.device),
        "dtype": str(backbone.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process has held so far: on the GPU if the model is there, else in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # a Mac counts bytes, Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
