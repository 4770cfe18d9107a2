"""What every test runs under, those in tests/ and those beside the methods: hence here, above both."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings

# Types and shapes in deepen's annotations are checked at every call; nothing of it may be imported before this line.
jaxtyping.install_import_hook("deepen", "annotation_checks.check")

torch.set_num_threads(1)  # tiny tensors: threads cost several times what they bring

# How fast this machine is today says nothing about the code.
settings.register_profile(
    "ci", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("slow", settings.get_profile("ci"), max_examples=1000)
settings.load_profile(os.environ.get("DEEPEN_TEST_PROFILE", "ci"))


@pytest.fixture
def isolated_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache folder of the test's own."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("DEEPEN_CACHE", str(cache))
    return cache
