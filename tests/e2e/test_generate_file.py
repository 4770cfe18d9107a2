"""`deepen generate --file` as a user runs it: many prompts at once, a file that is gone on with, what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepen.cli.main import main
from deepen.core.line_file import LineFile
from deepen.engine.engine import Engine

SMALL = {
    "model_type": "mor",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_recursions": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
PROMPTS: list[dict[str, Any]] = [
    {"prompt": "The river", "id": "river", "max_new_tokens": 16},
    {"prompt": "a", "temperature": 1.0, "max_new_tokens": 2},
    {"prompt_tokens": [1, 2, 3], "temperature": 0.8, "seed": 2**64 - 1, "id": 7},
    {"prompt": "The lamp is lit. The boat comes in.", "temperature": 1.0, "top_k": 20, "top_p": 0.9},
    {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], "id": "chat"},
    {"prompt": "no more", "max_new_tokens": 0},
    {"prompt": "repeat repeat", "repetition_penalty": 1.3, "temperature": 0.7, "min_p": 0.01},
]
FLAGS = ("--max-new-tokens", "5", "--seed", "3", "--slots", "2")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with a tiny model of random weights in it."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "small.json").write_text(json.dumps(SMALL))
    assert main(["new", str(folder / "small.json"), "--out", str(folder / "model")]) == 0
    return folder


@pytest.fixture
def place(made, tmp_path, monkeypatch) -> Path:
    """A folder to work in, with the model as `model` and PROMPTS as `prompts.jsonl`."""
    (tmp_path / "model").symlink_to(made / "model")
    monkeypatch.chdir(tmp_path)
    write(PROMPTS)
    return tmp_path


def write(lines: list[Any], path: str = "prompts.jsonl") -> None:
    Path(path).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")


def generate(*flags: str, model: str = "model", out: str = "answers.jsonl") -> int:
    return main(["generate", model, "--file", "prompts.jsonl", "--out", out, *FLAGS, *flags])


def answers(path: str = "answers.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def alone(index: int, line: dict[str, Any], *, model: str = "model") -> dict[str, Any]:
    """What `deepen generate --prompt` says of the line."""
    given = {"seed": 3 + index, "max_new_tokens": 5, **line}
    flags = [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    assert main(["generate", model, "--json", "alone.json", *flags]) == 0
    said: dict[str, Any] = json.loads(Path("alone.json").read_text())
    return said


def interrupt(patched: pytest.MonkeyPatch, owner: type, name: str, num_calls: int) -> None:
    """Let what has this name be done so often, and be interrupted the next time."""
    real, calls = getattr(owner, name), []

    def interrupted(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > num_calls:
            raise KeyboardInterrupt
        return real(self, *arguments, **options)

    patched.setattr(owner, name, interrupted)


def another_model() -> None:
    """The same address, other weights."""
    target = Path(os.readlink("model")).with_name("small.json")
    Path("model").unlink()
    assert main(["new", str(target), "--seed", "1", "--out", "model"]) == 0


def are_those_alone(found: list[dict[str, Any]], *, model: str) -> None:
    """Token for token, of the lines that have a prompt."""
    for index, (line, answer) in enumerate(zip(PROMPTS, found, strict=True)):
        if "prompt" in line:
            said = alone(index, {name: value for name, value in line.items() if name != "id"}, model=model)
            for name in ("tokens", "text", "reason"):
                assert answer[name] == said[name], (index, name)


@pytest.fixture(scope="module")
def finished(made) -> Path:
    """A folder with the answers to PROMPTS."""
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(made)
        write(PROMPTS)
        assert generate() == 0
    return made


class TestAnswers:
    def test_each_is_that_of_the_prompt_alone_in_the_order_of_the_file(self, place):
        assert generate() == 0
        found = answers()
        assert [answer["id"] for answer in found] == [line.get("id") for line in PROMPTS]
        assert [len(answer["tokens"]) for answer in found] == [16, 2, 5, 5, 5, 0, 5]
        assert len({token for answer in found for token in answer["tokens"]}) > 10
        assert all(answer.keys() == {"id", "text", "tokens", "reason", "passes"} for answer in found)
        are_those_alone(found, model="model")

    def test_those_of_a_plain_model(self, place):
        assert generate(model="tiny:llama") == 0
        are_those_alone(answers(), model="tiny:llama")

    @pytest.mark.slow
    def test_those_of_an_adapter(self, place):
        graft = "graft tiny:llama --config after_surgery --set d_state=8 --set gate_hidden=8 --out adapter"
        assert main(graft.split()) == 0
        assert generate("--chunk-width", "8", model="adapter") == 0
        are_those_alone(answers(), model="adapter")

    def test_how_they_are_answered_changes_none_and_is_told(self, place, capsys):
        generate(out="first.jsonl")
        captured = capsys.readouterr()
        assert captured.out == ""
        requests, new, failures = captured.err.splitlines()[-3:]
        assert (requests, failures) == ("requests: 7", "failures: 0")
        assert new.startswith("new: 38 tokens in ") and new.endswith(" tokens/s")
        generate("--slots", "5", "--memory-gb", "0.001", "--no-pack", out="second.jsonl")
        assert answers("first.jsonl") == answers("second.jsonl")

    def test_a_message_is_what_chat_makes_of_a_prompt(self, place):
        write([{"prompt": "Why?"}, {"messages": [{"role": "user", "content": "Why?"}]}])
        generate()
        chat = answers()
        assert chat[0]["tokens"] == chat[1]["tokens"]
        write([{"prompt": "Why?"}])
        generate("--no-chat", out="plain.jsonl")
        assert answers("plain.jsonl")[0]["tokens"] != chat[0]["tokens"]

    def test_a_line_stands_over_the_flags(self, place):
        drawn = ("--temperature", "1.0", "--top-k", "50")
        write([{"prompt": "a"}, {"prompt": "a", "temperature": 0}])
        generate(*drawn, "--max-new-tokens", "12", out="unstopped.jsonl")
        unstopped, greedy = answers("unstopped.jsonl")
        stop = next(letter for letter in unstopped["text"] if letter.isascii())
        again, cold = {"prompt": "a", "seed": 3}, {"prompt": "a", "temperature": 0}
        write([{"prompt": "a"}, {**again, "stop": []}, {**again, "stop": ["xx", stop]}, {**cold, "stop": "xx"}])
        generate(*drawn, "--max-new-tokens", "12", "--stop", stop)
        found = answers()
        assert [answer["reason"] for answer in found] == ["stop_string", "length", "stop_string", "length"]
        assert found[0]["text"] == found[2]["text"] == unstopped["text"].partition(stop)[0]
        assert (found[1]["tokens"], found[3]["tokens"]) == (unstopped["tokens"], greedy["tokens"])

    @pytest.mark.slow
    def test_recursions_are_those_that_are_asked_for(self, place):
        write([PROMPTS[0]])
        generate(out="trained.jsonl")
        generate("--recursions", "1", out="one.jsonl")
        said = alone(0, {"prompt": "The river", "max_new_tokens": 16, "recursions": 1})
        assert answers("one.jsonl")[0]["tokens"] == said["tokens"] != answers("trained.jsonl")[0]["tokens"]

    def test_what_can_never_be_answered_is_an_answer(self, place, capsys):
        write([{"prompt": "a", "id": 1}, {"prompt": "long" * 40, "id": 2}, {"prompt": "b", "max_new_tokens": 70}])
        assert generate("--max-length", "64") == 1
        assert [answer["reason"] for answer in answers()] == ["length", "failed", "failed"]
        assert "exceeds this model's context of 128" in answers()[1]["error"]
        assert "64 tokens" in answers()[2]["error"] and "max_length" in answers()[2]["error"]
        assert answers()[1] == {**answers()[1], "id": 2, "text": "", "tokens": [], "passes": 0}
        err = capsys.readouterr().err
        assert "failures: 2\n" in err and "the first: prompts.jsonl, line 2: the prompt has " in err
        # What was there before counts, too.
        assert generate("--max-length", "64") == 1
        assert "requests: 3, 3 of them answered before\n" in capsys.readouterr().err

    def test_too_little_memory_is_an_answer(self, place):
        write([{"prompt": "a", "max_new_tokens": 2}, {"prompt": "a", "max_new_tokens": 90}])
        assert generate("--memory-gb", "0.00001", "--no-chat") == 1
        first, second = answers()
        assert first["reason"] == "length" and "memory" in second["error"]

    def test_a_failure_inside_is_an_answer_with_its_name(self, place, monkeypatch):
        def broken(*arguments: object, **options: object) -> None:
            raise ZeroDivisionError("by zero")

        monkeypatch.setattr("deepen.generate.sampling._draw", broken)
        write([{"prompt": "a"}, {"prompt": "a", "temperature": 1.0}])
        assert generate() == 1
        assert answers()[0]["reason"] == "length"
        assert answers()[1]["reason"] == "failed" and answers()[1]["error"] == "ZeroDivisionError: by zero"

    @pytest.mark.filterwarnings("default")
    def test_no_prompts_have_no_answers(self, place, capsys):
        Path("prompts.jsonl").write_text("")
        assert generate() == 0
        err = capsys.readouterr().err
        assert "warning: prompts.jsonl is empty" in err and "requests: 0\n" in err


class TestGoingOn:
    @pytest.fixture
    def whole(self, finished, place) -> bytes:
        for name in ("answers.jsonl", "answers.jsonl.json"):
            shutil.copy(finished / name, place)
        return Path("answers.jsonl").read_bytes()

    @pytest.mark.parametrize(
        "share", [*(pytest.param(each, marks=pytest.mark.slow) for each in (0, 0.3, 1)), 0.6, 0.97]
    )
    def test_a_file_cut_off_anywhere_becomes_the_same(self, whole, share, capsys):
        kept = whole[: round(share * len(whole))]
        Path("answers.jsonl").write_bytes(kept)
        capsys.readouterr()
        assert generate("--slots", "3") == 0
        assert Path("answers.jsonl").read_bytes() == whole
        num_kept = kept.count(b"\n")
        assert (f"requests: 7, {num_kept} of them" if num_kept else "requests: 7\n") in capsys.readouterr().err

    @pytest.mark.parametrize("interrupted", [(Engine, "step", 3), (LineFile, "append", 2)], ids=["early", "late"])
    def test_an_interruption_leaves_whole_lines_of_the_first_prompts(self, whole, monkeypatch, interrupted):
        Path("answers.jsonl").unlink()
        with monkeypatch.context() as patched:
            interrupt(patched, *interrupted)
            assert generate() == 130
        left = Path("answers.jsonl").read_bytes() if Path("answers.jsonl").exists() else b""
        assert whole.startswith(left) and left != whole
        assert left.endswith(b"\n") if interrupted[0] is LineFile else not left
        assert generate() == 0
        assert Path("answers.jsonl").read_bytes() == whole

    @pytest.mark.parametrize(("slots", "sizes"), [("1", [1, 1, 1, 1]), ("2", [1, 3])])
    def test_a_line_is_there_as_soon_as_those_before_it_are(self, place, monkeypatch, slots, sizes):
        write([{"prompt": "a", "max_new_tokens": number} for number in (1, 15, 2, 4)])
        seen, real = [], LineFile.append

        def append(self, records, **options):
            seen.append(len(records))
            real(self, records, **options)

        monkeypatch.setattr(LineFile, "append", append)
        assert generate("--slots", slots) == 0
        assert seen == sizes

    def test_a_finished_file_asks_the_model_for_nothing(self, whole, monkeypatch):
        def never(*arguments: object) -> None:
            raise AssertionError("there is nothing left to answer")

        monkeypatch.setattr(Engine, "submit", never)
        assert generate() == 0
        assert Path("answers.jsonl").read_bytes() == whole

    def test_how_prompts_are_written_makes_no_difference(self, whole):
        lines = [json.dumps(dict(reversed(line.items())), indent=None) for line in PROMPTS]
        write([part for line in lines for part in (line, " ")])
        assert generate() == 0
        assert Path("answers.jsonl").read_bytes() == whole

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda: write(PROMPTS[1:]), "made by other prompts: num_prompts is 7 there, and 6 here"),
            (lambda: write([*PROMPTS[:-1], {"prompt": "else"}]), "made by other prompts: prompts is "),
            (lambda: ("--temperature", "0.5"), "made by other settings: temperature is 0.0 there, and 0.5 here"),
            (lambda: ("--max-new-tokens", "12"), "made by other settings: max_new_tokens is 5 there, and 12 here"),
            (lambda: ("--recursions", "1"), "made by other settings: recursions is null there, and 1 here"),
            (lambda: ("--dtype", "float64"), 'made by other settings: dtype is "float32" there'),
            (another_model, 'made by another model: fingerprint is "'),
        ],
    )
    def test_a_file_of_something_else_is_refused_by_name(self, whole, capsys, change: Callable, words):
        flags = change() or ()
        capsys.readouterr()
        assert generate(*flags) == 2
        message = capsys.readouterr().err
        assert words in message and "choose another out, or take it and answers.jsonl.json away" in message
        assert Path("answers.jsonl").read_bytes() == whole

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda lines: [b"no JSON\n", *lines[1:]],
            lambda lines: [b"[]\n", *lines[1:]],
            lambda lines: [lines[1], lines[0], *lines[2:]],
            lambda lines: [*lines, lines[0]],
            lambda lines: [b"{}\n", *lines[1:]],
        ],
        ids=["no JSON", "no object", "another order", "one too many", "no answer"],
    )
    def test_a_file_that_was_changed_is_refused_by_line(self, whole, capsys, spoil: Callable):
        spoilt = b"".join(spoil(whole.splitlines(keepends=True)))
        Path("answers.jsonl").write_bytes(spoilt)
        assert generate() == 2
        assert "is no answer to the prompt it should answer; take the file away" in capsys.readouterr().err
        assert Path("answers.jsonl").read_bytes() == spoilt

    def test_somebody_elses_file_is_refused(self, place, capsys):
        Path("answers.jsonl").write_text("mine\n")
        assert generate() == 2
        assert "exists, and no answers.jsonl.json beside it says what made it" in capsys.readouterr().err
        assert Path("answers.jsonl").read_text() == "mine\n"

    def test_settings_of_a_file_without_answers_are_forgotten(self, place, monkeypatch):
        with monkeypatch.context() as patched:
            interrupt(patched, Engine, "step", 1)
            assert generate() == 130
        assert generate("--seed", "9") == 0
        assert json.loads(Path("answers.jsonl.json").read_text())["seed"] == 9


class TestRefused:
    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ('{"prompt": "a"', "column "),
            ("[1]", "expected an object in braces, found list"),
            ({}, "one of prompt, messages, prompt_tokens must ask, and none is given"),
            ({"prompt": "a", "prompt_tokens": [1]}, "prompt and prompt_tokens are given; keep one"),
            ({"prompt": ""}, "prompt is empty; give at least one character"),
            ({"messages": []}, "messages is empty; give at least one message"),
            ({"prompt_tokens": []}, "prompt_tokens is empty; give at least one id"),
            ({"prompt": 3}, "prompt must be a string or null, not 3"),
            ({"promt": "a"}, 'unknown key "promt"; did you mean "prompt"?'),
            ({"prompt": "a", "max_tokens": 3}, 'unknown key "max_tokens"; did you mean "max_new_tokens"?'),
            ({"messages": [{"role": "user", "text": "a"}]}, 'unknown key "messages[0].text"'),
            ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role must be system, user, or assistant"),
            (
                {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
                "messages end with the assistant's",
            ),
            ({"prompt": "a", "temperature": "hot"}, 'temperature must be a number or null, not "hot"'),
            ({"prompt": "a", "temperature": -1}, "temperature must be 0 (greedy) or at least 1e-06, not -1.0"),
            ({"prompt": "a", "temperature": 1, "top_p": 2}, "top_p must be between 0 and 1 (off), not 2.0"),
            ({"prompt": "a", "top_k": 5}, "top_k 5 has no effect at temperature 0 (greedy)"),
            ({"prompt": "a", "seed": -1}, "seed must be between 0 and 2**64 - 1, not -1"),
            ({"prompt": "a", "max_new_tokens": -1}, "max_new_tokens must be 0 or more, not -1"),
            ({"prompt": "a", "stop": ["b", ""]}, 'stop must hold at least one character, not ""'),
            ({"prompt": "\ud800"}, '"prompt" holds half of a surrogate pair'),
            ({"prompt_tokens": [1, 999]}, "prompt_tokens holds id 999, outside this model's vocabulary of 260"),
            ({"prompt_tokens": [-1]}, "prompt_tokens holds id -1, outside this model's vocabulary of 260"),
        ],
        ids=str,
    )
    def test_a_line_by_file_number_and_field(self, place, capsys, line, words):
        write([{"prompt": "fine"}, " ", line])
        assert generate() == 2
        message = capsys.readouterr().err
        assert "prompts.jsonl, line 3" in message and words in message
        assert sorted(path.name for path in place.iterdir()) == ["model", "prompts.jsonl"]

    def test_messages_without_chat(self, place, capsys):
        assert generate("--no-chat") == 2
        assert "prompts.jsonl, line 5: messages need a chat template, and --no-chat" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("flags", "words"),
        [
            ("--file prompts.jsonl", "needs a place for the answers: give --out FILE.jsonl"),
            ("--file prompts.jsonl --out answers.txt", "--out answers.txt must be a file whose name ends in .jsonl"),
            ("--file prompts.jsonl --out a.jsonl --prompt b", '--prompt "b" is one prompt'),
            ("--file prompts.jsonl --out a.jsonl --prompt-file b", '--prompt-file "b" is one prompt'),
            ("--file prompts.jsonl --out a.jsonl --json b", "--json b is for one prompt"),
            ("--file prompts.jsonl --out a.jsonl --stats", "--stats is for one prompt"),
            ("--file prompts.jsonl --out prompts.jsonl", "no prompts.jsonl.json beside it says what made it"),
            ("--file nowhere.jsonl --out a.jsonl", "can't read nowhere.jsonl"),
            ("--file prompts.txt --out a.jsonl", "must be a file of JSON lines whose name ends in .jsonl"),
            ("--file prompts.jsonl --out a.jsonl --slots 0", "slots must be 1 or more, not 0"),
            ("--file prompts.jsonl --out a.jsonl --max-length 0", "max_length must be 1 or more, not 0"),
            ("--file prompts.jsonl --out a.jsonl --memory-gb 0", "memory_gb must be above 0, not 0.0"),
            ("--file prompts.jsonl --out a.jsonl --memory-gb nan", "memory_gb must be a number or null, not NaN"),
            ("--prompt b --out a.jsonl", "--out a.jsonl is for --file"),
            ("--prompt b --slots 3", "--slots 3 is for --file"),
            ("--prompt b --memory-gb 3", "--memory-gb 3.0 is for --file"),
            ("--prompt b --max-length 3", "--max-length 3 is for --file"),
        ],
    )
    def test_flags_that_do_not_go_together(self, place, capsys, flags, words):
        assert main(["generate", "model", *flags.split()]) == 2
        assert words in capsys.readouterr().err
        assert sorted(path.name for path in place.iterdir()) == ["model", "prompts.jsonl"]

    def test_a_flag_that_does_nothing_for_any_line(self, place, capsys):
        write([{"prompt": "a"}, {"prompt": "b"}])
        assert generate("--top-k", "5") == 2
        assert "top_k 5 has no effect at temperature 0" in capsys.readouterr().err
        write([{"prompt": "a"}, {"prompt": "b", "temperature": 1.0}])
        assert generate("--top-k", "5") == 0

    def test_too_little_memory_for_any(self, place, capsys):
        assert generate("--memory-gb", "0.0001", model="tiny:llama") == 2
        assert "memory_bytes is 100000, too little" in capsys.readouterr().err
        assert sorted(path.name for path in place.iterdir()) == ["model", "prompts.jsonl"]

    def test_a_place_that_cannot_be_written(self, place, capsys):
        Path("folder.jsonl").mkdir()
        assert generate(out="folder.jsonl") == 2
        assert "folder.jsonl" in capsys.readouterr().err
