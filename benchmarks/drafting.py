"""What a trained drafter is worth on prompts that no training read: passes, tokens, seconds, against plain decoding.

    PYTHONPATH=src python benchmarks/drafting.py adapters/smollm2-drafter --chat 100 --code 50 --rewriting 50

answers held-out prompts along four paths, one prompt after the other: plain decoding, prompt lookup, the drafter alone
and `auto`, which chooses among all of them. Which path begins changes from prompt to prompt. Every answer is a line of
OUT/answers.jsonl as soon as it is there, and the same command goes on where it was cut off; OUT/summary.json has the
figures by domain. A path whose tokens aren't plain decoding's, other than by a near-tie, is exit status 1.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from deepen.backbones.hf import Backbone
from deepen.checkpoint import Opened, open_model
from deepen.core.files import read_json, write_json
from deepen.core.method import Decoder
from deepen.core.types import Progress
from deepen.data.loader import Loader
from deepen.evaluate.agreement import compare
from deepen.evaluate.answers import answer
from deepen.evaluate.environment import environment
from deepen.evaluate.metrics import generation_figures
from deepen.evaluate.prompts import DomainPrompt, held_out_prompts
from deepen.evaluate.results import Answer
from deepen.generate.plain import PlainDecoder
from deepen.generate.stop import StopConfig
from deepen.train.config import RunConfig
from deepen.train.run import rows_of_run
from deepen.train.trainee import open_trainee

HERE = Path(__file__).parent
DOMAINS = ("chat", "code", "rewriting")
PLAIN = "plain"
PATHS: Mapping[str, Mapping[str, Any]] = {
    "lookup": {"draft": "lookup", "chunk_width": 8},
    "drafter": {"draft": "shallow", "chunk_width": 6},
    "auto": {"draft": "auto", "chunk_width": 16},
}
SHOWN = ("num_tokens", "tokens_per_pass", "acceptance", "distinct_1", "distinct_2", "repetition")


def decoders(opened: Opened, paths: Sequence[str]) -> dict[str, Decoder]:
    """Of plain decoding and these paths, on one packed base."""
    model, backbone = opened.model, opened.backbone
    assert model is not None, "an adapter was given"
    backbone.pack()
    found: dict[str, Decoder] = {PLAIN: PlainDecoder(backbone)}
    for name in paths:
        config = replace(model.config, **PATHS[name])
        config = replace(config, chunk_width=min(config.chunk_width, config.max_chunk_len))
        path = type(model).build(config, backbone, backbone.vocab_size)
        path.load_saved_state(model.saved_state())
        found[name] = path
    return found


def answers_in(path: Path) -> dict[tuple[str, str], Answer]:
    """What was answered so far, by prompt and path."""
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {(record["answer"]["prompt"], record["path"]): Answer.from_dict(record["answer"]) for record in records}


def claim(out: Path, opened: Opened, *, max_new_tokens: int) -> None:
    """Answers of one adapter, of one length, lie in one folder. What a kill left of a last line is cut off."""
    assert opened.model is not None, "an adapter was given"
    own = {
        "adapter": digest(opened.model.saved_state()),
        "max_new_tokens": max_new_tokens,
        "threads": torch.get_num_threads(),
    }
    settings = out / "settings.json"
    if settings.exists() and (found := read_json(settings)) != own:
        raise SystemExit(f"{out} holds answers of {found}, and these would be of {own}; choose another --out")
    write_json(settings, own)
    answers = out / "answers.jsonl"
    if answers.exists():
        text = answers.read_text(encoding="utf-8")
        answers.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")


def digest(state: Mapping[str, torch.Tensor]) -> str:
    """Of a model's tensors."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def in_turn(prompts: Sequence[DomainPrompt], names: Sequence[str]) -> Iterator[tuple[DomainPrompt, str]]:
    """Every path answers each prompt; which begins changes from prompt to prompt."""
    for index, prompt in enumerate(prompts):
        first = index % len(names)
        for name in [*names[first:], *names[:first]]:
            yield prompt, name


def answer_all(
    opened: Opened, prompts: Sequence[DomainPrompt], out: Path, *, paths: Sequence[str], max_new_tokens: int
) -> None:
    """Answer what isn't answered yet."""
    of_path, done = decoders(opened, paths), answers_in(out)
    stop = StopConfig(max_new_tokens=max_new_tokens, eos_ids=opened.backbone.eos_ids)
    plain = PlainDecoder(opened.backbone)
    waiting = [pair for pair in in_turn(prompts, list(of_path)) if (pair[0].name, pair[1]) not in done]

    def say(prompt: DomainPrompt, name: str) -> Answer:
        ids = prompt.encode(opened.tokenizer)
        return answer(
            of_path[name],
            ids,
            name=prompt.name,
            domain=prompt.domain,
            tokenizer=opened.tokenizer,
            stop=stop,
            flops=plain.flops,
        )

    for name in of_path if waiting else ():
        say(waiting[0][0], name)  # what is prepared on first use isn't timed
    for number, (prompt, name) in enumerate(waiting, start=1):
        record = {"path": name, "answer": say(prompt, name).to_dict()}
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        print(f"\r{number} of {len(waiting)} answers", end="", file=sys.stderr, flush=True)


def summary(
    answers: Mapping[tuple[str, str], Answer], prompts: Sequence[DomainPrompt], opened: Opened
) -> dict[str, dict[str, Any]]:
    """By domain, and chat without answers that repeat themselves, and all together; and by path."""
    names = list(dict.fromkeys(path for _, path in answers))
    encoded = {prompt.name: prompt.encode(opened.tokenizer) for prompt in prompts}
    groups = {domain: [prompt.name for prompt in prompts if prompt.domain == domain] for domain in DOMAINS}
    groups["chat, nothing repeated"] = [name for name in groups["chat"] if not repeats(answers[name, PLAIN].tokens)]
    groups["all"] = [prompt.name for prompt in prompts]
    return {
        group: {name: figures_of(answers, chosen, name, opened.backbone, encoded) for name in names}
        for group, chosen in groups.items()
        if chosen
    }


def repeats(tokens: Sequence[int]) -> bool:
    """Whether any four tokens in a row come twice."""
    grams = [tuple(tokens[place : place + 4]) for place in range(len(tokens) - 3)]
    return len(set(grams)) < len(grams)


def figures_of(
    answers: Mapping[tuple[str, str], Answer],
    chosen: Sequence[str],
    path: str,
    backbone: Backbone,
    encoded: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """One path over some prompts; `speedup` is plain decoding's seconds a token over this path's, prompt by prompt."""
    ours, plain = ([answers[prompt, name] for prompt in chosen] for name in (path, PLAIN))
    ratios = [b.seconds / len(b.tokens) * len(a.tokens) / a.seconds for a, b in zip(ours, plain, strict=True)]
    others = [
        str(found)
        for prompt, a, b in zip(chosen, ours, plain, strict=True)
        if not (found := compare(backbone, encoded[prompt], b.tokens, a.tokens)).equal
    ]
    quarter = len(ratios) // 4
    return {
        **generation_figures(ours),
        "speedup": {
            "median": median(ratios),
            "quartiles": [sorted(ratios)[quarter], sorted(ratios)[-1 - quarter]],
            "of_sums": sum(b.seconds for b in plain) / sum(a.seconds for a in ours),
        },
        "ms_per_token": 1e3 * sum(a.seconds for a in ours) / sum(len(a.tokens) for a in ours),
        "num_equal": len(ours) - len(others),
        "others": others,
    }


def learning_curve(folder: Path) -> list[dict[str, Any]]:
    """How a drafter's drafts became better in the run in `folder`: accepted tokens a draft, by drafted positions.

    They are those of the step's own texts, before it learns from them: in the first epoch, texts never seen.
    """
    config = RunConfig.from_file(folder / "run.json")
    trainee = open_trainee(config)
    loader = Loader(rows_of_run(config, trainee), rows_per_step=config.batch_size, seed=config.seed)
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    num_rows, last = loader.facts()["num_rows"], lines[-1]["step"]
    positions, made, found = 0, 0, []
    for line in lines:
        for step in range(made, line["step"]):
            torch.manual_seed(step)  # which positions are drafted is drawn; how many depends on that hardly at all
            prepared = trainee.model.prepare(loader.step(step), Progress(step, last))
            positions += trainee.model.count(prepared)["token"]
        made = line["step"]
        figures = {name.removeprefix("train/drafts/"): line[name] for name in line if name.startswith("train/drafts/")}
        epochs = made * config.batch_size / num_rows
        found.append(
            {"step": made, "epochs": epochs, "positions": positions, "loss": line["train/loss/total"], **figures}
        )
    return found


def show(found: Mapping[str, Mapping[str, Any]]) -> None:
    """A line for each domain and path."""
    for domain, paths in found.items():
        for path, figures in paths.items():
            shown = "  ".join(f"{name} {figures[name]:.3g}" for name in SHOWN if figures[name] is not None)
            speed = f"{figures['ms_per_token']:.1f} ms/token, {figures['speedup']['median']:.2f}x plain"
            print(f"{domain:22} {path:8} {speed}, {figures['num_equal']} of {figures['num_answers']} equal  {shown}")


def main() -> int:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    for domain in DOMAINS:
        parser.add_argument(f"--{domain}", type=int, default=0, help=f"prompts of {domain}-prompts")
    parser.add_argument("--paths", nargs="+", choices=list(PATHS), default=list(PATHS), help="beside plain decoding")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--run", help="the run's folder, for OUT/curve.json: how drafts became better as it learned")
    parser.add_argument("--out", default=str(HERE / "results" / "drafting"))
    options = parser.parse_args()
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    opened = open_model(options.adapter)
    wanted = {domain: getattr(options, domain) for domain in DOMAINS}
    prompts = [
        prompt
        for domain, count in wanted.items()
        if count
        for prompt in held_out_prompts(f"{domain}-prompts", domain=domain, count=count)  # type: ignore[arg-type]
    ]
    claim(out, opened, max_new_tokens=options.max_new_tokens)
    answers = out / "answers.jsonl"
    answer_all(opened, prompts, answers, paths=options.paths, max_new_tokens=options.max_new_tokens)
    found = summary(answers_in(answers), prompts, opened)
    write_json(
        out / "summary.json",
        {
            "prompts": wanted,
            "max_new_tokens": options.max_new_tokens,
            "method_config": opened.model.config.to_dict() if opened.model is not None else None,
            "environment": environment(opened.backbone),
            "threads": torch.get_num_threads(),
            "paths": found,
        },
    )
    if options.run is not None:
        write_json(out / "curve.json", learning_curve(Path(options.run)))
    show(found)
    others = [each for paths in found.values() for figures in paths.values() for each in figures["others"]]
    return int(any("DIFFERENT" in each for each in others))


if __name__ == "__main__":
    sys.exit(main())
