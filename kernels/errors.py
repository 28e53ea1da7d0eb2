"""What can go wrong, and who has to act.

Every message is one sentence that names the cause, the place and the remedy; a path comes last.
"""


class GraftError(Exception):
    """Base of everything that this package raises on purpose."""


class UnsupportedFormat(GraftError):
    """The file is sound, but holds something that cannot be run as it stands."""


class CorruptFile(GraftError):
    """The file is not what it says it is: truncated, damaged or of another kind."""


class NoBackend(GraftError):
    """No backend can do this on this machine; the message lists each one's reason."""


class AdapterError(GraftError):
    """A LoRA file cannot be read, or does not fit the model."""
