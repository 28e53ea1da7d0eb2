"""What can go wrong, and who has to act.

Every message is one sentence that names the cause, the place and the remedy; a path comes last.
"""

import re

import torch

_LONGEST = 6000  # characters: of a longer message the middle is left out, since a path, up to 4096 bytes, comes last
_UNSHOWABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

# torch before 2.5 calls it by its CUDA name alone
TorchOutOfMemory: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


def plain(text: str) -> str:
    """Text in which names from a file may stand, as one line that can be logged, sent and shown.

    Line breaks, control characters, marks that turn the direction of writing, and what is no Unicode become U+FFFD.
    """
    if len(text) > _LONGEST:
        text = f"{text[:1000]} … {text[1003 - _LONGEST :]}"
    return _UNSHOWABLE.sub("\ufffd", text)


class GraftError(Exception):
    """Base of everything that this package raises on purpose; its message is `plain`.

    Hosts show an error as its module, its name and its message, cut after some 130 characters: the module of all of
    these is "graft", whatever path they were imported by.
    """

    __module__ = "graft"

    def __init_subclass__(cls) -> None:
        cls.__module__ = GraftError.__module__

    def __init__(self, message: str = "") -> None:
        super().__init__(plain(message))

    def __reduce__(self) -> tuple:
        # by where the classes are in truth, for other processes
        return _again, (type(self).__name__, str(self))


def _again(kind: str, message: str) -> GraftError:
    return globals()[kind](message)


class UnsupportedFormat(GraftError):
    """The file is sound, but holds something that cannot be run as it stands."""


class CorruptFile(GraftError):
    """The file is not what it says it is: truncated, damaged or of another kind."""


class NoBackend(GraftError):
    """No backend can do this on this machine; the message lists each one's reason."""


class OutOfMemory(GraftError, TorchOutOfMemory):  # type: ignore[misc, valid-type]
    """Memory is full, whatever is given back; hosts treat it as torch's own error and unload models."""


class WrongInput(GraftError, ValueError):
    """What goes into a layer is not as wide as its weight, such as words from the text encoder of another model."""


class AdapterError(GraftError):
    """A LoRA file cannot be read, or does not fit the model."""
