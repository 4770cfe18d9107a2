"""Seeds that are functions of places: what is drawn in one place needs nothing that was drawn in another."""

_BITS = 2**64
_ODD = 0xD1342543DE82EF95


def seed_at(seed: int, *place: int) -> int:
    """A seed in [0, 2**63) of its own for each `place` (an epoch; a step, a rank and a micro-batch) of each `seed`.

    Neighbouring seeds and places must not share their draws, so each number goes through a mixer in which every bit
    of the input moves half of the output's (the finalizer of SplitMix64, Steele et al. 2014).
    """
    state = _mixed(seed)
    for number in place:
        # Not symmetric in the two: else a seed and an equal number would cancel.
        state = _mixed((state * _ODD + number) % _BITS)
    return state >> 1


def _mixed(number: int) -> int:
    number = (number + 0x9E3779B97F4A7C15) % _BITS
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % _BITS
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % _BITS
    return number ^ (number >> 31)
