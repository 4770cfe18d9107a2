"""How many examples a costly property gets: fewer than the profile's, by a factor that the test names."""

from hypothesis import settings


def share_of_profile(divisor: int, *, least: int) -> settings:
    """Settings for a property whose example takes seconds: the profile's number over `divisor`, at least `least`."""
    return settings(max_examples=max(least, settings.default.max_examples // divisor))
