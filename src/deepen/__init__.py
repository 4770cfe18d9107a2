"""Recursive computation for language models: exact, causal, at counted compute.

The names below are loaded when first used, so that `import deepen` stays free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepen.engine.engine import Engine as Engine
    from deepen.engine.request import Request as Request
    from deepen.engine.served import AsyncEngine as AsyncEngine
    from deepen.methods.chunk.config import RecursiveConfig as RecursiveConfig
    from deepen.methods.chunk.config import get_after_surgery_config as get_after_surgery_config
    from deepen.methods.chunk.config import get_baseline_config as get_baseline_config
    from deepen.methods.chunk.config import get_phase_a_config as get_phase_a_config
    from deepen.methods.chunk.config import get_phase_b_config as get_phase_b_config
    from deepen.methods.chunk.config import get_phase_c_config as get_phase_c_config
    from deepen.methods.chunk.loading import load_checkpoint as load_checkpoint
    from deepen.methods.chunk.loading import load_model_with_config as load_model_with_config
    from deepen.methods.chunk.model import ChunkRefineWrapper as ChunkRefineWrapper
    from deepen.methods.mor.config import MoRConfig as MoRConfig
    from deepen.methods.mor.model import MoRForCausalLM as MoRForCausalLM
    from deepen.methods.trm.config import TRMConfig as TRMConfig
    from deepen.methods.trm.refiner import TRMRefiner as TRMRefiner
    from deepen.metrics.tracker import MetricsTracker as MetricsTracker

__version__ = "0.1.0"

_HOME_OF = {
    "AsyncEngine": "deepen.engine.served",
    "Engine": "deepen.engine.engine",
    "Request": "deepen.engine.request",
    "RecursiveConfig": "deepen.methods.chunk.config",
    "get_after_surgery_config": "deepen.methods.chunk.config",
    "get_baseline_config": "deepen.methods.chunk.config",
    "get_phase_a_config": "deepen.methods.chunk.config",
    "get_phase_b_config": "deepen.methods.chunk.config",
    "get_phase_c_config": "deepen.methods.chunk.config",
    "load_checkpoint": "deepen.methods.chunk.loading",
    "load_model_with_config": "deepen.methods.chunk.loading",
    "ChunkRefineWrapper": "deepen.methods.chunk.model",
    "MoRConfig": "deepen.methods.mor.config",
    "MoRForCausalLM": "deepen.methods.mor.model",
    "TRMConfig": "deepen.methods.trm.config",
    "TRMRefiner": "deepen.methods.trm.refiner",
    "MetricsTracker": "deepen.metrics.tracker",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})
