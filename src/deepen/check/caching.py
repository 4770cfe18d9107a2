"""Checks of a model's own cache: a text in pieces, tokens taken back, ragged rows, generation.

Where something differs, experiments find out what: the cache's tensors are compared with those that one fresh reading
leaves, entries are counted, and the output is compared with what shifted positions give.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch import Tensor

from deepen.backbones.whole import generate_alone, is_pretrained_kind
from deepen.check.effort import Effort
from deepen.check.gauge import Gauge
from deepen.check.held import first_difference, held_by, slots_at_odds
from deepen.check.outcome import Fault, NotApplicable, Passed
from deepen.check.padded import Padded, pad, positions_of
from deepen.check.subject import Subject
from deepen.core.errors import DeepenError


def cache(subject: Subject, effort: Effort) -> Passed:
    """A text read in pieces through the model's own cache gives what it gives in one forward without."""
    _need_cache(subject)
    gauge = Gauge(subject.allowed)
    for seed in range(effort.num_texts):
        ids = subject.text(effort.length, seed=seed)
        whole = subject.logits(ids)
        for pieces in _divisions(effort, seed):
            seen = f"a text of {effort.length} tokens read in pieces of {_listed(pieces)}"
            try:
                logits = _in_pieces(subject, ids, pieces)
            except Exception as error:
                cause = _why_pieces_differ(subject, ids, pieces)
                raise Fault(f"{seen}: the model raises {type(error).__name__}: {error}", cause=cause) from error
            gauge.compare(logits, whole, seen=seen, cause=partial(_why_pieces_differ, subject, ids, pieces))
    return gauge.passed()


def _need_cache(subject: Subject) -> None:
    if "past_key_values" not in subject.takes:
        raise NotApplicable(
            "its forward takes no past_key_values, so it has no cache of its own that can be handed over"
        )
    try:
        subject.read(subject.text(1, seed=0))
    except DeepenError as reason:  # no cache came back; what else can go wrong is for the check to find
        raise NotApplicable(str(reason)) from reason


def _divisions(effort: Effort, seed: int) -> Iterator[list[int]]:
    """Sizes of pieces: all of one width, and a prompt with single steps behind it and the rest in one."""
    for width in effort.widths:
        if width < effort.length and (width > 1 or seed == 0):
            rest = effort.length % width
            yield [width] * (effort.length // width) + ([rest] if rest else [])
    for cut in effort.cuts(seed):
        steps = min(3, effort.length - cut)
        rest = effort.length - cut - steps
        yield [cut, *[1] * steps, *([rest] if rest else [])]


def _in_pieces(subject: Subject, ids: Tensor, pieces: Sequence[int], positions: Tensor | None = None) -> Tensor:
    """Logits `[B, T, V]` of all pieces."""
    logits, held = [], None
    for end, width in zip(accumulate(pieces), pieces, strict=True):
        own = None if positions is None else positions[:, end - width : end]
        read = subject.read(ids[:, end - width : end], held, positions=own)
        held = read.cache
        logits.append(read.logits)
    return torch.cat(logits, dim=1)


def _why_pieces_differ(subject: Subject, ids: Tensor, pieces: Sequence[int]) -> str:
    if odd := _odd_slots(subject, ids):
        return (
            f"two layers, or two recursions of one layer, write to the same slot of the cache: {odd}; give every "
            "application of a layer an index of its own"
        )
    if _right_positions_cure(subject, ids, pieces):
        return (
            "a cached step counts its positions wrongly: with position_ids given it is right; count them on from the "
            "number of tokens in the cache"
        )
    if different := _first_that_differs(subject, ids, pieces):
        return (
            f"what the cache holds: of all, in order, the first that is not as one reading of the whole text leaves "
            f"it is {different}; look at what writes it, and at what the layers before it read from the cache"
        )
    return (
        "the cache holds what one reading of the whole text leaves, so how a step uses it: its mask, or its last layer"
    )


def _odd_slots(subject: Subject, ids: Tensor) -> str:
    try:
        read = subject.read(ids[:, :1])
    except Exception:
        return ""
    after_one = held_by(read.cache)
    try:
        return slots_at_odds(after_one, held_by(subject.read(ids[:, 1:2], read.cache).cache))
    except Exception:
        return slots_at_odds(after_one, None)


def _right_positions_cure(subject: Subject, ids: Tensor, pieces: Sequence[int]) -> bool:
    if "position_ids" not in subject.takes:
        return False
    try:
        given = _in_pieces(subject, ids, pieces, torch.arange(ids.shape[1], device=ids.device)[None])
    except Exception:
        return False
    return _apart(given, subject.logits(ids)) <= subject.allowed


def _first_that_differs(subject: Subject, ids: Tensor, pieces: Sequence[int]) -> str:
    held = None
    try:
        for end, width in zip(accumulate(pieces), pieces, strict=True):
            held = subject.read(ids[:, end - width : end], held).cache
            if different := first_difference(held_by(held), held_by(subject.read(ids[:, :end]).cache)):
                return f"{different} (after {end} tokens)"
    except Exception:
        return ""
    return ""


def rollback(subject: Subject, effort: Effort) -> Passed:
    """Tokens taken back leave no trace: what follows is as if they had never been read, however many were kept."""
    width = max(each for each in effort.widths if each <= 8)
    prefix = effort.length - width - 4
    if prefix < 1:
        raise NotApplicable(f"its context of {subject.context_length} tokens is too short to take tokens back")
    _need_crop(subject, prefix)
    gauge = Gauge(subject.allowed)
    for seed in range(effort.num_texts):
        ids, drafts = subject.text(effort.length, seed=seed), subject.text(width, seed=seed + 1000)
        for num_kept in range(width + 1):
            _compare_after_crop(subject, gauge, ids[:, :prefix], drafts, num_kept)
        _compare_rounds(subject, gauge, ids, width, Random(seed))
    return gauge.passed()


def _need_crop(subject: Subject, prefix: int) -> None:
    _need_cache(subject)
    held = subject.read(subject.text(prefix, seed=0)).cache
    if not callable(getattr(held, "crop", None)):
        raise NotApplicable(f"its cache, a {type(held).__name__}, has no crop, which would take tokens back")
    if getattr(held, "is_croppable", True) is False:
        firm = [layer for layer in getattr(held, "layers", ()) if getattr(layer, "is_croppable", True) is False]
        kinds = " and ".join(sorted({type(layer).__name__ for layer in firm})) or type(held).__name__
        raise NotApplicable(
            f"its cache says that it can't be taken back (is_croppable of {kinds}); deepen's own passes can take such "
            "states back, see the check 'passes rollback'"
        )


def _compare_after_crop(subject: Subject, gauge: Gauge, prefix: Tensor, drafts: Tensor, num_kept: int) -> None:
    width = drafts.shape[1]
    following = subject.text(3, seed=num_kept + 2000)
    kept = torch.cat([prefix, drafts[:, :num_kept]], dim=1)
    expected = subject.logits(torch.cat([kept, following], dim=1))[:, -3:]
    held = _cropped(subject, prefix, drafts, width - num_kept)
    actual = subject.read(following, held).logits
    gauge.compare(
        actual,
        expected,
        seen=f"behind {prefix.shape[1]} tokens, of {width} more read {width - num_kept} taken back, the next 3",
        cause=lambda: _why_crop_leaves_a_trace(subject, prefix, drafts, num_kept, following, actual),
    )


def _cropped(subject: Subject, prefix: Tensor, drafts: Tensor, num_taken_back: int) -> Any:
    """The cache after `prefix` and `drafts`, without the last `num_taken_back`."""
    held = subject.read(prefix).cache
    _keep_past(held)
    held = subject.read(drafts, held).cache
    held.crop(-num_taken_back)
    return held


def _keep_past(held: Any) -> None:
    """Tells caches that ask for it, as transformers' do, that tokens may be taken back."""
    activate = getattr(held, "activate_past_recording", None)
    if callable(activate):
        activate()


def _compare_rounds(subject: Subject, gauge: Gauge, ids: Tensor, width: int, chance: Random) -> None:
    """Round after round as in speculative decoding: some tokens of the text, then wrong ones that are taken back."""
    whole = subject.logits(ids)
    start = max(1, ids.shape[1] // 4)
    held = subject.read(ids[:, :start]).cache
    _keep_past(held)
    while start < ids.shape[1]:
        num_right = min(chance.randint(1, width), ids.shape[1] - start)
        wrong = subject.text(min(width - num_right, ids.shape[1] - start - num_right), seed=start)
        read = subject.read(torch.cat([ids[:, start : start + num_right], wrong], dim=1), held)
        held = read.cache
        held.crop(-wrong.shape[1])
        gauge.compare(
            read.logits[:, :num_right],
            whole[:, start : start + num_right],
            seen=f"in round after round of reading up to {width} tokens and taking some back, behind {start} tokens",
            cause="taking tokens back works once, but not again: a snapshot that is only taken the first time, or a "
            "counter that is off after it",
        )
        start += num_right


def _why_crop_leaves_a_trace(
    subject: Subject, prefix: Tensor, drafts: Tensor, num_kept: int, following: Tensor, actual: Tensor
) -> str:
    num_back = drafts.shape[1] - num_kept
    kept = torch.cat([prefix, drafts[:, :num_kept]], dim=1)
    if num_back and "position_ids" in subject.takes:
        shifted = torch.arange(kept.shape[1] + following.shape[1], device=kept.device)[None]
        shifted[:, kept.shape[1] :] += num_back
        shifted_logits = _with_positions(subject, torch.cat([kept, following], dim=1), shifted)
        if _apart(shifted_logits[:, kept.shape[1] :], actual) <= subject.allowed:
            return (
                f"positions: the output is that of positions shifted by {num_back}, the number of tokens taken back; "
                "a counter of tokens read, from which positions are counted, is not wound back by crop"
            )
    if different := first_difference(
        held_by(_cropped(subject, prefix, drafts, num_back)), held_by(subject.read(kept).cache)
    ):
        return (
            f"crop does not roll back {different} to what a fresh reading of the tokens left gives; a state, a "
            "convolution window or a counter into which a token is folded for good needs a record of what it was "
            "before each token, or a snapshot and another reading of the tokens kept"
        )
    return (
        "the cache itself is rolled back, so something beside it: a counter or tensor that the model keeps, from which "
        "positions or masks are made"
    )


def batch(subject: Subject, effort: Effort) -> Passed:
    """Rows of different lengths behind left pads, read and then continued as `generate` does, each as alone."""
    _need_cache(subject)
    if "attention_mask" not in subject.takes:
        raise NotApplicable("its forward takes no attention_mask, so rows of different lengths can't share a cache")
    gauge = Gauge(subject.allowed)
    num_steps = 4
    longest = effort.length - num_steps
    if longest < 2:
        raise NotApplicable(f"its context of {subject.context_length} tokens is too short for a prompt and some steps")
    for seed in range(effort.num_texts):
        lengths = (longest, longest - 1, longest // 2, 1)
        texts = [subject.text(each + num_steps, seed=seed + each)[0] for each in lengths]
        prompts = pad([text[:-num_steps] for text in texts], "left", subject.text(longest, seed=99)[0])
        steps = torch.stack([text[-num_steps:] for text in texts])
        logits = _continued(subject, prompts, steps)
        for row, (text, real) in enumerate(zip(texts, prompts.real, strict=True)):
            gauge.compare(
                logits[row, real.start :],
                subject.logits(text[None])[0],
                seen=f"a prompt of {lengths[row]} tokens behind {longest - lengths[row]} pads, with {num_steps} steps",
                cause=partial(_why_padded_steps_differ, subject, text, num_steps),
            )
    return gauge.passed()


def _continued(subject: Subject, prompts: Padded, steps: Tensor) -> Tensor:
    """Logits `[B, T + S, V]` of `prompts` and then, one at a time, of `steps` `[B, S]`."""
    read = subject.read(prompts.ids, mask=prompts.mask, positions=prompts.positions)
    logits, mask = [read.logits], prompts.mask
    for step in steps.split(1, dim=1):
        mask = torch.cat([mask, torch.ones_like(step)], dim=1)
        read = subject.read(step, read.cache, mask=mask, positions=positions_of(mask)[:, -1:])
        logits.append(read.logits)
    return torch.cat(logits, dim=1)


def _why_padded_steps_differ(subject: Subject, text: Tensor, num_steps: int) -> str:
    prompt, steps = text[:-num_steps], text[None, -num_steps:]

    def behind_pads(num_pads: int, garbage: int) -> Tensor:
        prompts = pad([prompt], "left", subject.text(len(prompt) + num_pads, seed=garbage)[0])
        return _continued(subject, prompts, steps)[0, num_pads:]

    alone = subject.logits(text[None])[0]
    if _apart(behind_pads(0, 1), alone) > subject.allowed:
        return "even without pads, once attention_mask is given: how a cached step uses a mask of all tokens so far"
    observed = behind_pads(5, 1)
    if _apart(observed, behind_pads(5, 2)) > subject.allowed:
        return (
            "pads are seen: what stands in them moves the real tokens; a cached step has to apply attention_mask to "
            "all that the cache holds, not only to its own token"
        )
    if _apart(observed, alone) <= subject.allowed:
        return "rows of one cache are mixed: one row alone behind pads is right, several together are not"
    if "position_ids" in subject.takes:
        shifted = torch.arange(len(text), device=text.device)[None]
        shifted[:, -num_steps:] += 5
        if _apart(_with_positions(subject, text[None], shifted)[0], observed) <= subject.allowed:
            return (
                "positions of a cached step count the pads: the output is that of positions shifted by their number; "
                "use the position_ids given, also in a step behind a cache"
            )
    return (
        "pads are counted in a cached step, though what stands in them doesn't matter: positions taken from the "
        "length of the cache, or a mean, scale or capacity by it"
    )


def generation(subject: Subject, effort: Effort) -> Passed:
    """Generated twice it is the same, greedily and sampled with one seed; greedily, each token is the best one."""
    prompt = subject.text(max(1, effort.length // 2), seed=0)
    num_new = effort.length - prompt.shape[1]
    if is_pretrained_kind(subject.model) and callable(getattr(subject.model, "generate", None)):
        note = "by its own generate"
        greedy, again = (generate_alone(subject.model, prompt, num_new=num_new) for _ in range(2))
        _compare_sampled(subject, prompt, num_new)
    else:
        _need_cache(subject)
        note = "by a loop over its own cache"
        greedy, again = (_greedy(subject, prompt, num_new) for _ in range(2))
    if not torch.equal(greedy, again):
        raise Fault(
            "the same prompt continued greedily twice gives other ids",
            cause="something outlives a generation: a cache that is used again, a counter on the model",
        )
    _compare_with_best(subject, greedy, prompt.shape[1])
    return Passed(2, note=note)


def _compare_sampled(subject: Subject, prompt: Tensor, num_new: int) -> None:
    one, other = (generate_alone(subject.model, prompt, num_new=num_new, seed=7) for _ in range(2))
    if not torch.equal(one, other):
        raise Fault(
            "the same prompt sampled twice with the same torch.manual_seed gives other ids",
            cause="random numbers from another source than torch's generators, or that depend on what ran before",
        )


def _greedy(subject: Subject, prompt: Tensor, num_new: int) -> Tensor:
    ids, read = prompt, subject.read(prompt)
    for _ in range(num_new):
        best = read.logits[:, -1:].argmax(dim=-1)
        ids = torch.cat([ids, best], dim=1)
        if ids.shape[1] < prompt.shape[1] + num_new:
            read = subject.read(best, read.cache)
    return ids


def _compare_with_best(subject: Subject, ids: Tensor, num_prompt: int) -> None:
    """Every new id has the best logit of a forward over the text before it, up to near-ties."""
    logits = subject.logits(ids[:, :-1])[0, num_prompt - 1 :].double()
    chosen = ids[0, num_prompt:]
    behind = logits.amax(dim=-1) - logits.gather(1, chosen[:, None])[:, 0]
    wrong = (behind > 2 * subject.allowed).nonzero()
    if len(wrong):
        step = int(wrong[0])
        raise Fault(
            f"of the ids continued greedily, the one at position {num_prompt + step} is not the best of a forward over "
            f"the text before it: its logit lies {float(behind[step]):.2g} behind",
            cause="what generation does around forward, since cached steps alone are right: how "
            "prepare_inputs_for_generation makes ids, positions and masks of a step, or a processor of logits",
        )


def _with_positions(subject: Subject, ids: Tensor, positions: Tensor) -> Tensor:
    # Without a mask, transformers takes a gap in the positions for the border of two texts packed into one row.
    return subject.logits(ids, mask=torch.ones_like(ids), positions=positions)


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


def _listed(pieces: Sequence[int]) -> str:
    if len(pieces) > 6 and len(set(pieces[:-1])) == 1:
        return f"{pieces[0]}"
    return ", ".join(map(str, pieces))
