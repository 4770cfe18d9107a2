"""A trained model goes to a hub if that is asked for, and a run stays what it is where the hub refuses."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants
from model_hub import Hub, serve_hub, use_hub

import deepen.methods
from deepen.checkpoint import open_model
from deepen.cli.main import main
from deepen.core.errors import ConfigError, DeepenError
from deepen.train import run
from deepen.train.config import RunConfig
from deepen.train.push import push
from deepen.train.run import train

DROPPED_IN = Path(__file__).parents[1] / "contract" / "dropped_in"
NAME = "some-owner/own.model_1"


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_for_tests")
    with serve_hub({}) as served:
        use_hub(served, monkeypatch, tmp_path / "hub")
        yield served


@pytest.fixture
def config(tmp_path, monkeypatch) -> RunConfig:
    monkeypatch.setattr(deepen.methods, "__path__", [*deepen.methods.__path__, str(DROPPED_IN)])
    lines = [json.dumps({"text": f"Document {n} says that {n} is less than {n + 1}."}) for n in range(9)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    return RunConfig(
        model="tiny:llama", method="toy", data=str(tmp_path / "corpus.jsonl"), output_dir=str(tmp_path / "run"),
        num_steps=2, batch_size=2, max_length=24, push_to_hub=NAME,
    )  # fmt: skip


def silent(line: str) -> None:
    pass


class TestPush:
    def test_the_models_own_files_are_there_as_they_are(self, config, hub, tmp_path):
        lines = []
        folder = train(config, show=lines.append)
        own = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        del own["checksums.json"]
        assert hub.pushed == {NAME: own} and {"deepen.json", "ledger.json"} < own.keys()
        assert hub.private == {NAME}
        assert lines[-1] == f"pushed to {hub.url}/{NAME}"
        fetched = tmp_path / "fetched"
        fetched.mkdir()
        for name, content in hub.pushed[NAME].items():
            (fetched / name).write_bytes(content)
        assert open_model(str(fetched)).method.name == "toy"

    def test_the_flag_asks_for_it(self, config, hub, tmp_path):
        replace(config, push_to_hub=None).save(tmp_path / "run.json")
        assert main(["train", str(tmp_path / "run.json")]) == 0 and hub.requests == []
        assert main(["train", str(tmp_path / "run.json"), "--push_to_hub", NAME]) == 0
        assert "deepen.json" in hub.pushed[NAME]

    def test_the_same_command_pushes_a_finished_run(self, config, hub):
        train(replace(config, push_to_hub=None), show=silent)
        assert hub.requests == []
        train(config, show=silent)
        assert "deepen.json" in hub.pushed[NAME]

    def test_a_repository_that_is_there_gets_the_new_files(self, config, hub):
        hub.pushed[NAME] = {"README.md": b"mine"}
        train(config, show=silent)
        assert hub.pushed[NAME]["README.md"] == b"mine" and "deepen.json" in hub.pushed[NAME]

    def test_nothing_is_pushed_by_a_run_that_stops(self, config, hub, monkeypatch):
        def stop(self):
            raise DeepenError("stopped")

        monkeypatch.setattr(run._Run, "finish", stop)
        with pytest.raises(DeepenError, match="stopped"):
            train(config, show=silent)
        assert hub.requests == []


class TestRefusals:
    @pytest.mark.parametrize(
        ("status", "reason"),
        [
            (401, "the hub knows no valid token of yours; `hf auth login`, or set HF_TOKEN"),
            (403, "your token may not write there"),
            (418, "418"),
        ],
    )
    def test_the_run_is_saved_and_the_way_told(self, config, hub, status, reason):
        hub.refusal = status
        with pytest.raises(DeepenError) as raised:
            train(config, show=silent)
        folder = Path(config.output_dir) / "step_2"
        message = str(raised.value)
        assert message.startswith(f"push_to_hub {NAME} failed: ") and reason in message
        assert f"The run itself is saved, in {folder}; push it later by the same command" in message
        assert f"`hf upload {NAME} {folder} . --private --exclude 'training/*' --exclude 'checksums.json'`" in message
        assert open_model(str(folder)).method.name == "toy" and hub.pushed == {}

    def test_a_hub_that_is_not_there(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(
            DeepenError, match=rf"push_to_hub {NAME} failed: .*\. The run itself is saved, in {tmp_path}"
        ):
            push(tmp_path, NAME)

    def test_offline_is_told(self, hub, tmp_path, monkeypatch):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(DeepenError, match="failed: HF_HUB_OFFLINE is set, so that the hub is not asked"):
            push(tmp_path, NAME)

    @pytest.mark.parametrize("name", ["own", "a/b/c", "a b/c", ""])
    def test_a_name_that_is_none_is_refused_before_the_run(self, config, name):
        with pytest.raises(ConfigError, match=r"push_to_hub must be OWNER/NAME, a repository of the model hub"):
            train(replace(config, push_to_hub=name), show=silent)
        assert not Path(config.output_dir).exists()
