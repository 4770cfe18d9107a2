"""Which dtype matrix products run in while parameters stay in float32."""

import torch

from deepen.core.errors import ConfigError

# Without one of these a CPU takes some 100 times as long for a bfloat16 product as for a float32 one.
_CPU_FLAGS = "avx512_bf16", "amx_bf16", "bf16", "sve_bf16"


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """For `torch.autocast`; None for float32. Raises `ConfigError` where the device has no such instructions."""
    if precision == "float32":
        return None
    capabilities = torch.cpu.get_capabilities()
    can = device.type != "cpu" or any(capabilities.get(flag) for flag in _CPU_FLAGS)
    if device.type == "cuda":
        can = torch.cuda.is_bf16_supported(including_emulation=False)
    if not can:
        raise ConfigError(
            f"precision is {precision}, which {device} has no instructions for: products would take 100 times as long; "
            "use float32"
        )
    return torch.bfloat16
