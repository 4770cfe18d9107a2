"""Errors meant for users: each names the field, the value and a way out.

Everything a user can cause is a `DeepenError`; the command line prints its message without a traceback and exits
with status 2. Anything else that escapes is a bug of ours and keeps its traceback.
"""


class DeepenError(Exception):
    """Something the user asked for can't be done; the message says what, and what to do instead."""


class ConfigError(DeepenError):
    """A configuration has an unknown key, a wrong type or an impossible value."""


class AddressError(DeepenError):
    """A model, corpus or method address can't be understood, found or fetched."""


class DownloadError(AddressError):
    """A file could not be fetched, or is not the file its hash promises."""


class UnsupportedBackbone(DeepenError):
    """A model lacks something that a method needs; the message names what is missing."""


class CheckpointError(DeepenError):
    """A saved folder is incomplete, damaged or belongs to another base model."""


class PromptError(DeepenError):
    """A prompt is empty, too long for the model's context or holds ids outside the vocabulary."""


class RollbackError(DeepenError):
    """A cache was asked for what it can't do: to commit what was not read, to return to what is no longer there."""


class CannotTrain(DeepenError):
    """A method's model has no training as it is configured, or none in this version."""


class CannotJoin(DeepenError):
    """A method's model has no decodings whose rows come and go, as it is configured, or none in this version."""


class CannotScore(DeepenError):
    """A model has no leak-free log-probability for this input."""
