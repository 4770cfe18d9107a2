"""Memory that runs out, as torch tells of it."""

import torch

# The allocator of main memory has no exception of its own.
_OF_MAIN_MEMORY = "DefaultCPUAllocator: can't allocate memory"


def is_out_of_memory(cause: BaseException) -> bool:
    """Whether there was no memory left for a tensor, on whatever device."""
    return isinstance(cause, torch.OutOfMemoryError) or _OF_MAIN_MEMORY in str(cause)
