"""Refined mode, scores and the suite on a GPU: what a CPU says of the same weights, up to rounding."""

import copy
import json
from pathlib import Path

import pytest
import torch

from deepen.backbones import tiny
from deepen.cli.main import main
from deepen.core.types import Batch
from deepen.evaluate.noise import fill_with_noise
from deepen.generate.loop import complete
from deepen.generate.stop import StopConfig
from deepen.methods.chunk.model import ChunkRefineWrapper

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA reaches"),
    # What Triton and the kernels' package deprecate in themselves and each other is not ours.
    pytest.mark.filterwarnings("ignore"),
]

ROWS = [[5, 9, 2, 7], [1, 2, 3] * 6, [250]]
STOP = StopConfig(max_new_tokens=24)

two_bases = pytest.mark.parametrize("name", ["llama", "kimi_linear"])


def pair(name: str, *, trained: bool, **fields: object) -> tuple[ChunkRefineWrapper, ChunkRefineWrapper]:
    """The same model twice: on the CPU, and on the GPU."""
    settings = {"chunk_width": 6, "max_inner_steps": 3, "d_state": 16, "gate_hidden": 16, "max_chunk_len": 32}
    here = ChunkRefineWrapper(tiny.build(name).requires_grad_(False), recursive_enabled=True, **settings, **fields)
    if trained:
        fill_with_noise(here)
        for tensor in here.saved_state().values():
            tensor.mul_(0.06)  # from what drowns the base to what moves it
    base = copy.deepcopy(here.base).cuda()
    there = ChunkRefineWrapper(base, here.config)
    there.load_saved_state(here.saved_state())
    return here, there


@two_bases
@pytest.mark.parametrize("draft", ["ar", "mask"])
def test_refined_decoding_is_that_of_a_cpu(name: str, draft: str) -> None:
    here, there = pair(name, trained=True, commit_mode="refined", draft=draft, use_latent_token=True)
    by_cpu, by_gpu = (complete(model, ROWS, stop=STOP) for model in (here, there))
    assert [row.tokens for row in by_gpu] == [row.tokens for row in by_cpu]
    assert [row.commits for row in by_gpu] == [row.commits for row in by_cpu]


@torch.no_grad()
@two_bases
@pytest.mark.parametrize("mode", ["exact", "refined"])
def test_scores_are_those_of_a_cpu(name: str, mode: str) -> None:
    ids = torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(1))
    batch = Batch(ids, torch.tensor([40, 31, 2]))
    here, there = (model.score(batch) for model in pair(name, trained=True, commit_mode=mode))
    assert torch.equal(here.scored, there.scored)
    torch.testing.assert_close(there.log_probs, here.log_probs, rtol=1e-4, atol=1e-3)


# What the suite finds in deepen's passes; of the rest, some is transformers' own cache and recurrence.
OF_PASSES = ("passes", "passes batch", "passes rollback", "sampling", "flops", "bytes")


@pytest.mark.parametrize(("name", "only"), [("llama", ()), ("kimi_linear", ("--only", *OF_PASSES))])
def test_the_suite_passes_where_it_chooses_the_device(name: str, only: tuple[str, ...], tmp_path: Path) -> None:
    status = main(["check", f"tiny:{name}", "--quick", "--json", str(tmp_path / "found.json"), *only])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"].startswith("cuda")
    verdicts = {finding["check"]: finding["verdict"] for finding in found["findings"]}
    assert status == 0, verdicts
    assert all(verdicts[check] == "passed" for check in OF_PASSES), verdicts
