"""The main job by command on a tiny model, and that it notices when it is not exact."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepen import ChunkRefineWrapper
from deepen.cli.main import main
from deepen.core.types import Batch, Score

ARGUMENTS = ["demo", "--model", "tiny:nanochat", "--scored-tokens", "0", "--max-new-tokens", "16"]


def test_it_answers_exactly_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo.json"
    assert main([*ARGUMENTS, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "exact: every check above holds" in shown
    assert str(out) in shown
    found = json.loads(out.read_text())
    assert found["exact"]
    assert all(found["identity"].values())
    # The others are longer than a tiny model's context.
    assert [answer["domain"] for answer in found["answers"]] == ["chat"]
    assert "left out, as they don't fit into this model's context: account, letter" in shown
    for answer in found["answers"]:
        assert sum(answer["commits"]) == len(answer["tokens"])
        assert len(answer["commits"]) == answer["passes"]
        assert answer["against_plain"] == {"position": None, "margin": None}
    assert found["noise_filled"]["exact"]
    assert found["noise_filled"]["drafted"] > 0
    assert found["scores"] is None


def test_an_adapter_answers_for_its_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["drafter_hidden=8", "draft_vocab=200", "draft=shallow", "d_state=8", "gate_hidden=8"]
    flags = [part for setting in settings for part in ("--set", setting)]
    folder = str(tmp_path / "adapter")
    assert main(["graft", "tiny:nanochat", "--config", "after_surgery", "--out", folder, *flags]) == 0
    weights = tmp_path / "adapter" / "sidecar.safetensors"
    state = load_file(weights)
    state["drafter.out.weight"] = torch.randn(state["drafter.out.weight"].shape)
    save_file(state, weights)
    out = tmp_path / "demo.json"
    assert main(["demo", "--model", folder, *ARGUMENTS[3:], "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "What answers: a sidecar that was trained" in shown and "exact: every check above holds" in shown
    found = json.loads(out.read_text())
    assert (found["config"]["drafter_hidden"], found["answered_by"]["drafter_hidden"]) == (None, 8)
    assert found["answered_by"]["draft"] is None
    assert found["answers"][0]["drafted"] > 0


def test_a_model_too_short_for_every_prompt_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ARGUMENTS, "--max-new-tokens", "500"]) == 2
    assert "no prompt of the demonstration fits into this model's context of 512" in capsys.readouterr().err


def test_one_token_too_many_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def trusting(draft: Sequence[int], emitted: Sequence[int]) -> int:
        # Takes the first drafted token unseen.
        return min(1, len(draft))

    monkeypatch.setattr("deepen.generate.verify.agreement", trusting)
    out = tmp_path / "demo.json"
    assert main([*ARGUMENTS, "--out", str(out)]) == 1
    assert "NOT EXACT" in capsys.readouterr().out
    assert not json.loads(out.read_text())["exact"]


@pytest.fixture
def held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of two documents, in place of one that must be fetched."""
    texts = ["The lamp is lit and the boat comes in. " * 4, "Snow fell all night on the roofs of the town. " * 3]
    monkeypatch.setattr("deepen.evaluate.demonstration.documents", lambda name, split: texts)


SCORED = [*ARGUMENTS, "--scored-tokens", "150"]


@pytest.mark.usefixtures("held_out")
def test_held_out_text_scores_alike_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo.json"
    assert main([*SCORED, "--out", str(out)]) == 0
    scores = json.loads(out.read_text())["scores"]
    assert scores["before"]["num_tokens"] == scores["after"]["num_tokens"] == 150
    assert scores["before"]["nll"] > 1
    assert scores["difference"] == abs(scores["after"]["nll"] - scores["before"]["nll"]) < 1e-6
    assert "(below 1e-6: yes)" in capsys.readouterr().out


@pytest.mark.usefixtures("held_out")
def test_a_score_that_moved_is_noticed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = ChunkRefineWrapper.score

    def moved(self: ChunkRefineWrapper, batch: Batch) -> Score:
        score = own(self, batch)
        return replace(score, log_probs=score.log_probs - 1e-5 * score.scored)

    monkeypatch.setattr(ChunkRefineWrapper, "score", moved)
    assert main([*SCORED, "--out", str(tmp_path / "demo.json")]) == 1
    assert "NOT EXACT" in capsys.readouterr().out
