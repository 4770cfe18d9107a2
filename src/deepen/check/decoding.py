"""Checks of decodings: rows are their own affair, and where the base's output is promised, it is the base's."""

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from deepen.check.effort import Effort
from deepen.check.methods import (
    AS_IT_IS,
    FILLED,
    GREEDY,
    PENALIZED,
    SAMPLED,
    Told,
    decode,
    is_near_tie,
    method_of,
    prompts_of,
    weights_of,
)
from deepen.check.outcome import Fault, NotApplicable, Passed
from deepen.check.subject import Subject
from deepen.core.method import Decoder
from deepen.generate.plain import PlainDecoder
from deepen.generate.sampling import BatchSampler, SamplingConfig


def decoding(subject: Subject, effort: Effort) -> Passed:
    """A row's ids must not depend on the run, the order of rows, their company, or rows that are dropped."""
    method = method_of(subject)
    cases = 0
    *untrained, (said, weights) = weights_of(method).items()
    for as_it_is, left_alone in untrained:
        with left_alone(subject):
            cases += _Rows(subject, method, effort, as_it_is).check_order()
    with weights(subject):
        cases += _Rows(subject, method, effort, said).check()
    return Passed(cases)


class _Rows:
    """Three rows, one greedy and two sampled, decoded in several ways."""

    def __init__(self, subject: Subject, decoder: Decoder, effort: Effort, said: str) -> None:
        self._subject, self._decoder, self._said = subject, decoder, said
        self._prompts = prompts_of(subject, effort.length)
        self._configs = [GREEDY, SAMPLED, PENALIZED]
        self._num_tokens = max(8, effort.length // 4)

    def check_order(self) -> int:
        """The least there is: untrained, a method does little that could go wrong."""
        self._in_other_orders()
        return 2

    def check(self) -> int:
        """How many decodings were compared; raises `Fault`."""
        order = [0, 1, 2]
        together = self._in_other_orders()
        for row in order:
            self._compare_company(together, [row], "alone")
        self._compare(
            together,
            self._decode(order, dropped=[1]),
            "row 1 dropped after the first advance",
            "`drop` forgets a row in some of the decoding's tensors and lists and not in others",
            rows=[0, 2],
        )
        return 6

    def _in_other_orders(self) -> Told:
        """The rows together, found to be the same twice and the other way round."""
        order = [0, 1, 2]
        together = self._decode(order)
        self._compare(
            together,
            self._decode(order),
            "the same rows decoded twice",
            "random numbers from a generator that isn't the sampler's, or something that one decoding leaves in the "
            "model for the next",
        )
        self._compare_company(together, order[::-1], "in the opposite order")
        return together

    def _decode(self, order: Sequence[int], dropped: Sequence[int] = ()) -> Told:
        """By row, whatever the order they are decoded in; rows left out have no tokens."""
        told = decode(
            self._decoder,
            [self._prompts[row] for row in order],
            [self._configs[row] for row in order],
            num_tokens=self._num_tokens,
            dropped=dropped,
        )
        place = {row: place for place, row in enumerate(order)}
        return Told(
            [told.tokens[place[row]] if row in place else [] for row in range(3)],
            [told.choices[place[row]] if row in place else [] for row in range(3)],
        )

    def _compare(self, one: Told, other: Told, what: str, cause: str, rows: Sequence[int] = (0, 1, 2)) -> None:
        for row in rows:
            at = self._parted(one, other, row)
            if at is not None:
                raise Fault(f"{what}, {self._said}: row {row} gives other ids from new token {at} on", cause=cause)

    def _compare_company(self, together: Told, order: Sequence[int], what: str) -> None:
        other = self._decode(order)
        for row in order:
            at = self._parted(together, other, row)
            if at is not None:
                raise Fault(
                    f"row {row} decoded beside two others and {what}, {self._said}: other ids from new token {at} on",
                    cause=self._cause_of_company(row),
                )

    def _parted(self, one: Told, other: Told, row: int) -> int | None:
        """Where a row's ids part and rounding doesn't explain it."""
        at = one.part(row, other, row)
        if at is None:
            return None
        last = len(self._prompts[row]) + at
        # A choice that was near may have been thrown away and still have changed what came of it.
        margins = [margin for told in (one, other) for margin in told.margins(row, range(last + 1))]
        return None if is_near_tie(self._subject, margins, self._configs[row]) else at

    def _cause_of_company(self, row: int) -> str:
        """By experiment: copies of the row, which need no pads, then rows of its length with other tokens."""
        prompt, config = self._prompts[row], self._configs[row]
        alone = self._beside(row, [])
        if self._moved(alone, self._beside(row, [prompt, prompt]), row):
            return (
                "the number of rows itself matters, though they are copies: something is summed or normalised over the "
                "batch"
            )
        others = [self._subject.text(len(prompt), seed=seed)[0].tolist() for seed in (31, 32)]
        if self._moved(alone, self._beside(row, others), row):
            return (
                "tokens of other rows reach the row, though their prompts are as long: a mean or maximum over the "
                "batch, one state or one decision (when to stop, how much to commit) for all rows, or pads of chunks "
                "of other lengths that are counted"
            )
        assert config is self._configs[row]
        return (
            "rows of other lengths move it, rows of its length don't: pads are counted in a mean, a state or a "
            "position, or an index is that of the longest row"
        )

    def _beside(self, row: int, mates: Sequence[Sequence[int]]) -> Told:
        configs = [self._configs[row]] * (1 + len(mates))
        return decode(self._decoder, [self._prompts[row], *mates], configs, num_tokens=self._num_tokens)

    def _moved(self, alone: Told, beside: Told, row: int) -> bool:
        return alone.part(0, beside, 0) is not None


# The base's own output.


def exactness(subject: Subject, effort: Effort) -> Passed:
    """Ids must be those of plain decoding, trained or not, greedy and sampled; near-ties aside."""
    method = method_of(subject)
    if not method.promises_base:
        raise NotApplicable("this method changes the output; it doesn't promise the base's")
    if subject.backbone is None:
        raise NotApplicable(f"there is no plain decoding to compare with: {subject.unattached}")
    prompts = prompts_of(subject, effort.length)
    configs = [GREEDY, SAMPLED, PENALIZED]
    cases = [(prompt, config) for prompt in prompts for config in configs]
    num_tokens = max(8, effort.length // 4)

    def told_by(decoder: Decoder) -> Told:
        return decode(decoder, *map(list, zip(*cases, strict=True)), num_tokens=num_tokens)

    plain = told_by(PlainDecoder(subject.backbone))
    wrong: dict[str, list[_Parting]] = {}
    for said, weights in weights_of(method).items():
        with weights(subject):
            wrong[said] = _partings(subject, cases, plain, told_by(method))
        if wrong[said]:
            first = wrong[said][0]
            raise Fault(
                f"{said}, {first} ({len(wrong[said])} of {len(cases)} rows part from plain decoding)",
                cause=_cause_of_parting(said, wrong[said]),
            )
    return Passed(len(cases) * len(wrong))


class _Parting:
    """A row that leaves plain decoding."""

    def __init__(self, prompt: Sequence[int], config: SamplingConfig, at: int, advance: str) -> None:
        self.config = config
        self._text = (
            f"a {'greedy' if config.greedy else 'sampled'} row behind {len(prompt)} tokens gives another id than plain "
            f"decoding at new token {at}, which came of {advance}"
        )

    def __str__(self) -> str:
        return self._text


def _partings(
    subject: Subject, cases: Sequence[tuple[list[int], SamplingConfig]], plain: Told, ours: Told
) -> list[_Parting]:
    found = []
    for row, (prompt, config) in enumerate(cases):
        at = plain.part(row, ours, row)
        if at is None:
            continue
        position = len(prompt) + at
        margins = [min(told.margins(row, range(position, position + 1)), default=math.inf) for told in (plain, ours)]
        if is_near_tie(subject, [max(margins)], config):
            continue
        found.append(_Parting(prompt, config, at, _source_of(ours, row, at)))
    return found


def _source_of(told: Told, row: int, at: int) -> str:
    """The advance that committed a new token, told of the rows that were alive then: only exact for the first."""
    if len(told.tokens) != len(told.advances[0].rows):
        return "an advance"
    gained = 0
    for number, advance in enumerate(told.advances):
        if len(advance.rows) != len(told.tokens):
            break
        this = advance.rows[row]
        gained += len(this.tokens)
        if gained > at:
            return (
                f"advance {number + 1} (source {this.source}: {this.drafted} tokens drafted, {this.accepted} accepted)"
            )
    return "an advance after the first rows had ended"


def _cause_of_parting(said: str, partings: Sequence[_Parting]) -> str:
    if said == FILLED:
        return (
            "what the method added acts where a token is decided: with its untrained zeros the ids are the base's, "
            "with noise in their place they aren't. Cells at verified positions, or slots that clean positions see"
        )
    if all(not parting.config.greedy for parting in partings):
        return (
            "greedy rows are the base's, sampled ones aren't: draws depend on the width of the pass or on what was "
            "drafted and thrown away, instead of on seed, position and token"
        )
    assert said == AS_IT_IS
    return (
        "drafted tokens are committed that the base doesn't agree with (compared with logits of another position), or "
        "rejected ones stay in the cache and the next pass reads behind them"
    )


# deepen's sampler.

_ALL = "all of them"
_CONFIGS = {
    "greedy": GREEDY,
    "greedy with a repetition penalty": replace(GREEDY, repetition_penalty=1.3),
    "temperature": SamplingConfig(temperature=0.8, seed=3),
    "top_k": SamplingConfig(temperature=1.0, top_k=20, seed=4),
    "top_p": SamplingConfig(temperature=1.0, top_p=0.9, seed=5),
    "min_p": SamplingConfig(temperature=1.2, min_p=0.02, seed=6),
    _ALL: SamplingConfig(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=7),
}


def sampling(subject: Subject, effort: Effort) -> Passed:
    """Tokens chosen over a span of positions at once must be those chosen one position at a time, margins too."""
    ids = subject.text(effort.length, seed=41)
    logits, tokens = subject.logits(ids)[0], ids[0].tolist()
    wrong: dict[str, str] = {}
    num_cases = 0
    for name, config in _CONFIGS.items():
        spans = _Spans(logits, tokens, config)
        for width in effort.widths:
            num_cases += 1
            seen = spans.odd_choice(width)
            if seen is not None:
                wrong.setdefault(name, seen)
        # Margins sort the vocabulary for every position, so one configuration, with every filter, has to do.
        if name == _ALL and name not in wrong and spans.odd_margin(effort.widths[-1]):
            wrong[name] = f"margins of {effort.widths[-1]} positions at once are others"
    if wrong:
        name, seen = next(iter(wrong.items()))
        raise Fault(f"{name}: {seen} than one position at a time", cause=_cause_of_choice(set(wrong)))
    return Passed(num_cases)


class _Spans:
    """Choices of one configuration along a text, singly and many at once."""

    def __init__(self, logits: Tensor, tokens: Sequence[int], config: SamplingConfig) -> None:
        self._logits, self._tokens = logits, tokens
        self._sampler = BatchSampler([config])
        self._singly = [self._sampler.choose(0, *self._given(place, 1))[0] for place in range(len(tokens))]

    def odd_choice(self, width: int) -> str | None:
        """Where a span of `width` positions says something else; None if none does."""
        for start in range(0, len(self._tokens), width):
            chosen = self._sampler.choose(0, *self._given(start, width))
            for place, (one, other) in enumerate(zip(chosen, self._singly[start:], strict=False)):
                if one != other:
                    return f"over {width} positions at once, position {place} of them gets another id"
        return None

    def odd_margin(self, width: int) -> bool:
        """Whether the margins of the text's last `width` positions are others when asked for at once."""
        start = max(0, len(self._tokens) - width)
        chosen = self._singly[start : start + width]
        together = self._sampler.margins(0, *self._given(start, width), chosen)
        singly = [
            self._sampler.margins(0, *self._given(start + place, 1), [token])[0] for place, token in enumerate(chosen)
        ]
        pairs = zip(together, singly, strict=True)
        return not all(math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-6) for one, other in pairs)

    def _given(self, start: int, width: int) -> tuple[Tensor, Sequence[int], Sequence[int]]:
        """Logits, history and draft of the positions behind tokens `start`, `start + 1`, ..."""
        stop = start + width
        return self._logits[start:stop], self._tokens[: start + 1], self._tokens[start + 1 : stop]


def _cause_of_choice(wrong: set[str]) -> str:
    if wrong <= {"greedy with a repetition penalty", _ALL}:
        return "the repetition penalty counts other tokens than those before the position: drafted[:i] for position i"
    if "greedy" in wrong:
        return "the logits of one position are read for another"
    return (
        "the noise of a draw is keyed by the index in the pass, or drawn in sequence, instead of being a function of "
        "seed, position and token"
    )
