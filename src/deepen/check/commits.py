"""Checks what a decoding's cache holds after each advance: the committed tokens, read by the base, and nothing else."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from deepen.backbones.cache import PrefixCache
from deepen.backbones.hf import Backbone
from deepen.check.effort import Effort
from deepen.check.methods import AS_IT_IS, GREEDY, SAMPLED, WatchedSampler, method_of, prompts_of, weights_of
from deepen.check.outcome import Fault, NotApplicable, Passed
from deepen.check.prefix import Comparison, Difference, attached, fresh_reading, parts
from deepen.check.subject import Subject
from deepen.core.method import RecursiveModel, adapted
from deepen.core.types import Prompt

_MOST_ADVANCES = 6
_MOST_CANDIDATES = 16


@runtime_checkable
class CommittedPrefix(Protocol):
    """A decoding that can be looked into: each row's committed ids, and the cache that has read a beginning of them."""

    rows: list[list[int]]
    cache: PrefixCache


def commits(subject: Subject, effort: Effort) -> Passed:
    """After each advance the cache must hold what the base leaves that reads just the committed tokens.

    That is the base with what the method lends it. Where the base's output is promised, the weights are as they are:
    what noise in what the method added does wrong shows in the ids, which is for `exactness`.
    """
    method, backbone = method_of(subject), attached(subject)
    sampler = WatchedSampler([GREEDY, SAMPLED])
    prompts = [prompt for prompt in prompts_of(subject, effort.length) if len(prompt) > 1]
    said, weights = _weights_that_tell(method)
    num_cases = 0
    with weights(subject), adapted(method), torch.no_grad():
        comparison = Comparison(subject)
        decoding = method.open(Prompt(tuple(map(tuple, prompts)), effort.length))
        if not isinstance(decoding, CommittedPrefix) or not isinstance(decoding.cache, PrefixCache):
            raise NotApplicable("its decodings have no `rows` of committed ids with a PrefixCache as their `cache`")
        for number in range(1, _MOST_ADVANCES + 1):
            gained = [len(row) - len(prompt) for row, prompt in zip(decoding.rows, prompts, strict=True)]
            if max(gained) >= effort.length // 2:
                break
            method.advance(decoding, sampler)
            _Look(backbone, comparison, decoding, sampler).check(f"{said}, after advance {number}")
            num_cases += len(prompts)
    return Passed(num_cases)


def _weights_that_tell(method: RecursiveModel) -> tuple[str, Any]:
    choices = weights_of(method)
    return (AS_IT_IS, choices[AS_IT_IS]) if method.promises_base else list(choices.items())[-1]


class _Look:
    """One look into a decoding's cache."""

    def __init__(
        self, backbone: Backbone, comparison: Comparison, decoding: CommittedPrefix, sampler: WatchedSampler
    ) -> None:
        self._backbone, self._comparison = backbone, comparison
        self._rows, self._cache, self._sampler = decoding.rows, decoding.cache, sampler

    def check(self, when: str) -> None:
        """Every row."""
        for row, (ids, length) in enumerate(zip(self._rows, self._cache.lengths, strict=True)):
            if length > len(ids):
                raise Fault(
                    f"{when}, row {row} has {len(ids)} committed tokens and its cache holds {length}",
                    cause=self._cause_of_excess(row),
                )
            differences = self._differences(row, ids[:length])
            if differences:
                raise Fault(
                    f"{when}, row {row} of {len(self._rows)}: {differences[0]} from that of a fresh reading by the "
                    f"base of the row's first {length} ids (rounding explains {self._comparison.allowed:.1g})",
                    cause=self._cause(row, ids, length, differences),
                )

    def _differences(self, row: int, ids: Sequence[int]) -> list[Difference]:
        fresh = fresh_reading(self._backbone, ids)
        return self._comparison.differences(list(parts(self._cache, row)), list(parts(fresh, 0)))

    def _cause_of_excess(self, row: int) -> str:
        return (
            "more of a pass was committed than the row gained tokens: a latent token, slots or rejected tokens are in "
            "the count given to `commit`, or a pass that was to be forgotten was committed"
        )

    def _cause(self, row: int, ids: Sequence[int], length: int, differences: list[Difference]) -> str:
        entry = next((each.entry for each in differences if each.entry is not None), None)
        if entry is None:
            return self._cause_in_states(row, ids, length, differences[0])
        rejected = self._rejected_at(row, ids, entry)
        if rejected is not None:
            return (
                f"entry {entry} is that of token {rejected}, which was drafted there and rejected: it was committed "
                "with the accepted ones, or not taken back"
            )
        if self._stands_one_further(row, ids, length, entry):
            return (
                f"entry {entry} belongs to no committed token, and behind it entries stand one place too far: a latent "
                "token or slot of a pass is left in the cache, by a count that has it in it"
            )
        if entry == length - 1:
            return (
                f"the last entry, {entry}, belongs to neither a committed nor a rejected token: a latent token or slot "
                "of a pass is left in the cache, by a count that has it in it"
            )
        return (
            f"the entries from {entry} on are not the untouched base's: what was committed is a pass in which the "
            "method's own parts acted, or one behind a prefix that was not this one"
        )

    def _cause_in_states(self, row: int, ids: Sequence[int], length: int, first: Difference) -> str:
        """No entries say where it begins; so see whether the state is that of another beginning of the ids."""
        for other in (*range(length + 1, len(ids) + 1), *range(length - 1, 0, -1)):
            fresh = parts(fresh_reading(self._backbone, ids[:other]), 0)
            if any(
                (part.layer, part.name) == (first.part.layer, first.part.name)
                and self._comparison.equal(first.part.tensor, part.tensor)
                for part in fresh
            ):
                return f"{first.part} is that after {other} of the row's tokens: commit and state are out of step"
        return (
            f"{first.part} is that after no beginning of the row's ids: rejected tokens, slots or a latent token are "
            "folded into it, or a pass in which the method's own parts acted was committed"
        )

    def _rejected_at(self, row: int, ids: Sequence[int], entry: int) -> int | None:
        """Which drafted token the entry is of, read behind the row's own beginning."""
        candidates = self._sampler.drafted_at(row, entry) - {ids[entry]}
        for token in sorted(candidates)[:_MOST_CANDIDATES]:
            if self._equal_at(row, entry, [*ids[:entry], token], entry):
                return token
        return None

    def _stands_one_further(self, row: int, ids: Sequence[int], length: int, entry: int) -> bool:
        """Whether the first layer's value behind the entry is that of the token whose place the entry has.

        Values of the first layer with entries depend on little but their token.
        """
        if entry + 1 >= length:
            return False
        layer, held = self._first_values(self._cache, row)
        fresh = self._first_values(fresh_reading(self._backbone, ids[: entry + 1]), 0)[1]
        return layer == 0 and self._comparison.equal(held[:, entry + 1], fresh[:, entry])

    def _equal_at(self, row: int, entry: int, ids: Sequence[int], place: int) -> bool:
        fresh = fresh_reading(self._backbone, ids)
        pairs = list(zip(self._entries(self._cache, row), self._entries(fresh, 0), strict=True))
        return all(self._comparison.equal(held[:, entry], read[:, place]) for held, read in pairs)

    def _entries(self, cache: PrefixCache, row: int) -> Iterator[torch.Tensor]:
        return (part.tensor for part in parts(cache, row) if part.is_entries)

    def _first_values(self, cache: PrefixCache, row: int) -> tuple[int, torch.Tensor]:
        return next((part.layer, part.tensor) for part in parts(cache, row) if part.name == "values")
