"""What a mutator decides by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
_RATES = (400, 100, 60, 20)


class Choices:
    """A row of choices, made by bytes: random ones, or those of a fuzzer that watches which code they reach.

    Where the bytes end every choice is the first, which is the harmless one. The first choice is how often something is
    wrong, from a field in twenty to hardly any: one that is refused early reaches little code.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._numbers = iter(memoryview(data[: len(data) & ~1]).cast("H"))
        self._rate = self.pick(_RATES)

    def below(self, limit: int) -> int:
        """A number from 0 to `limit` - 1, of at most 65536."""
        return next(self._numbers, 0) % limit

    def once_in(self, often: int) -> bool:
        return next(self._numbers, 0) % often == often - 1

    def odd(self) -> bool:
        """Whether the next field is to be wrong."""
        return self.once_in(self._rate)

    def pick(self, options: Sequence[T]) -> T:
        return options[next(self._numbers, 0) % len(options)]

    def noise(self, count: int) -> bytes:
        """`count` bytes; the row repeated where it is too short."""
        rest = self._data[next(self._numbers, 0) % (len(self._data) or 1) :] or b"\0"
        return (rest * (count // len(rest) + 1))[:count]


NUMBERS = (
    0, 1, 2, 3, 31, 32, 33, 127, 128, 255, 256, 257, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1,
    2**61, 2**62 + 1, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1,
)  # fmt: skip
"""Where arithmetic goes wrong: zero, blocks, and the ends of what 16, 31, 32, 63 and 64 bits hold."""

TEXTS = (
    "", "a", ".", "..", "../../etc/passwd", "\0", "\n", "<b>", "%s%n", "é" * 70, "\U0001f642", "weight", ".weight",
    "a." * 99 + "weight", ".lora_magnitude_vector" * 40 + "!.", "x" * 5000,
)  # fmt: skip


def damaged(choices: Choices, data: bytes) -> bytes:
    """`data` as it is, mostly; else cut, with other bytes in some places, or with a piece moved."""
    if not data or not choices.odd():
        return data
    changed = bytearray(data)
    for _ in range(1 + choices.below(4)):
        at, way = choices.below(65536) % len(changed), choices.below(4)
        if way == 0:
            changed[at] ^= 1 << choices.below(8)
        elif way == 1:
            changed[at : at + 8] = choices.pick(NUMBERS).to_bytes(8, "little")
        elif way == 2:
            changed[at:at] = changed[: choices.below(64)]
        else:
            del changed[at + 1 :]
    return bytes(changed)
