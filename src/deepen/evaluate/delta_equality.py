"""Random decodings of bases whose passes round by their width: how often they are plain decoding's, token for token.

Their rows may part at a near-tie, which two widths of a pass decide apart; anywhere else they must not.

Random models hardly ever say what a draft of a method's says. So that states are taken back to every token of a pass,
some cases draft what plain decoding has said, right up to a random place and wrong from there.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from deepen.backbones.hf import Backbone
from deepen.core.method import Decoder, Sampler
from deepen.core.types import Advance, Prompt
from deepen.evaluate.agreement import NEAR_TIE_MARGIN_RECURRENT, Agreement, compare
from deepen.generate.drafts import Draft
from deepen.generate.loop import complete
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import SamplingConfig
from deepen.generate.stop import StopConfig
from deepen.generate.verify import Decoding, open_decoding, verify

PARTLY_RIGHT = "partly right"
"""The decoder whose drafts are right as far as chance will have it; there is no need to bring it."""

_NUM_ROWS = (1, 4)
_MAX_NEW_TOKENS = 24
_WIDTH = 8  # of a pass that checks partly right drafts
_NUM_BYTES = 256  # ids that every vocabulary of the random models has


@dataclass(frozen=True)
class Case:
    """Prompts of one to thirty ids, each with its own sampling, and which decoder continues them."""

    decoder: str
    rows: list[list[int]]
    sampling: list[SamplingConfig]


@dataclass
class Tally:
    """What was found, row by row."""

    rows: int = 0
    equal: int = 0
    tokens: int = 0
    passes: int = 0
    accepted: int = 0
    near_ties: int = 0
    margins: list[float] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def add(self, agreement: Agreement, *, label: str) -> None:
        """Take one row; `label` says which if it's neither equal nor parted at a near-tie."""
        self.rows += 1
        self.equal += agreement.equal
        if agreement.margin is None:
            return
        self.margins.append(agreement.margin)
        if agreement.margin < NEAR_TIE_MARGIN_RECURRENT:
            self.near_ties += 1
        else:
            self.others.append(f"{label}: token {agreement.position}, margin {agreement.margin:.1e}")

    def figures(self) -> dict[str, Any]:
        """Plain JSON types; margins are in processed logits."""
        return {
            "rows": self.rows,
            "equal": self.equal,
            "match_rate": round(self.equal / self.rows, 4) if self.rows else None,
            "near_ties": self.near_ties,
            "others": self.others,
            "margin_median": median(self.margins) if self.margins else None,
            "margin_largest": max(self.margins, default=None),
            "tokens": self.tokens,
            "draft_tokens_accepted": self.accepted,
            "tokens_per_pass": round(self.tokens / self.passes, 3) if self.passes else None,
        }


def draw_cases(count: int, decoders: Sequence[str], *, seed: int = 0) -> list[Case]:
    """`count` cases: decoders in turn, each with one row and with four, greedy and sampled."""
    source = random.Random(seed)
    cases = []
    for number in range(count):
        turn = number // len(decoders)
        rows = [_row(source) for _ in range(_NUM_ROWS[turn % 2])]
        greedy = turn // 2 % 2 == 0
        sampling = [SamplingConfig() if greedy else _sampling(source) for _ in rows]
        cases.append(Case(decoders[number % len(decoders)], rows, sampling))
    return cases


def _row(source: random.Random) -> list[int]:
    """Half of them repeat themselves, so that copied drafts are sometimes right."""
    if source.random() < 0.5:
        return [source.randrange(_NUM_BYTES) for _ in range(source.randint(1, 6))] * 5
    return [source.randrange(_NUM_BYTES) for _ in range(source.randint(1, 30))]


def _sampling(source: random.Random) -> SamplingConfig:
    return SamplingConfig(
        temperature=source.choice([0.5, 1.0]),
        top_p=source.choice([1.0, 0.9]),
        repetition_penalty=source.choice([1.0, 1.2]),
        seed=source.randrange(2**32),
    )


def tally_cases(
    backbone: Backbone, decoders: Mapping[str, Decoder], cases: Sequence[Case], *, done: Callable[[int], None]
) -> Tally:
    """Every case decoded plainly and by its own of `decoders` (or partly right drafts); `done` hears of each."""
    tally, stop = Tally(), StopConfig(max_new_tokens=_MAX_NEW_TOKENS)
    for number, case in enumerate(cases):
        plain = complete(PlainDecoder(backbone), case.rows, sampling=case.sampling, stop=stop)
        said = [[*ids, *result.tokens] for ids, result in zip(case.rows, plain, strict=True)]
        foreseeing = _PartlyRight(backbone, said, seed=number)
        decoder = foreseeing if case.decoder == PARTLY_RIGHT else decoders[case.decoder]
        exact = complete(decoder, case.rows, sampling=case.sampling, stop=stop)
        for row, (ids, ours, theirs, sampling) in enumerate(zip(case.rows, exact, plain, case.sampling, strict=True)):
            verdict = compare(backbone, ids, ours.tokens, theirs.tokens, sampling=sampling)
            tally.add(verdict, label=f"case {number} ({case.decoder}), row {row}")
            tally.tokens += len(ours.tokens)
            tally.passes += ours.passes
            tally.accepted += sum(ours.accepted.values())
        done(1)
    return tally


class _PartlyRight:
    """Drafts of what each row is known to become, wrong from a random place on."""

    def __init__(self, backbone: Backbone, said: Sequence[Sequence[int]], *, seed: int) -> None:
        self._backbone, self._said, self._source = backbone, list(said), random.Random(seed)

    def open(self, prompt: Prompt) -> Decoding:
        """Read the prompt, whose rows are what the known ones begin with."""
        return open_decoding(self._backbone, prompt)

    def advance(self, decoding: Decoding, sampler: Sampler) -> Advance:
        """One pass; each row commits what was right in its draft, and a token more."""
        drafts = [
            self._draft(ids, said, decoding.room(row))
            for row, (ids, said) in enumerate(zip(decoding.rows, self._said, strict=True))
        ]
        return verify(self._backbone, decoding, drafts, sampler)

    def drop(self, decoding: Decoding, rows: Sequence[int]) -> None:
        """Forget finished rows."""
        self._said = [said for row, said in enumerate(self._said) if row not in rows]
        decoding.drop(rows)

    def _draft(self, ids: Sequence[int], said: Sequence[int], room: int) -> Draft:
        length = min(_WIDTH, room) - 1
        coming = said[len(ids) : len(ids) + length]
        right = self._source.randint(0, length)
        wrong = [(token + 1) % _NUM_BYTES for token in coming[right:]]
        return Draft((*coming[:right], *wrong), source=PARTLY_RIGHT, evidence=0).shortened(length)
