"""Decoding any bytes of every type: the reference's bits and libgguf's are the same, or what cannot be is refused."""

from __future__ import annotations

from typing import NamedTuple

import torch
from graft.kernels import FORMATS, GraftError, dequantize
from graft.kernels.formats import Format

from .bounds import bounded, sentence
from .choices import NUMBERS, Choices

_FORMATS = [fmt for fmt in FORMATS if fmt.is_quantized]


class Input(NamedTuple):
    fmt: Format
    data: bytes
    shape: tuple[int, ...]
    dtype: torch.dtype


def make(choices: Choices) -> Input:
    fmt = choices.pick(_FORMATS)
    rows, blocks = 1 + choices.below(3), 1 + choices.below(2)
    shape: tuple[int, ...] = (rows, blocks * fmt.block_size)
    count = rows * blocks * fmt.type_size
    if choices.once_in(8):
        count = choices.pick((0, 1, count - 1, count + 1, count // 2))
    if choices.once_in(8):
        shape = tuple(choices.pick(NUMBERS) % (1 << 40) for _ in range(choices.below(5)))
    return Input(fmt, choices.noise(count), shape, choices.pick((torch.float32, torch.float16, torch.bfloat16)))


def check(sample: Input) -> None:
    fmt, data, shape, dtype = sample
    packed = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    with bounded(len(data)):
        results = []
        for backend in ("torch", "cpu"):
            try:
                results.append(dequantize(packed, fmt, shape, dtype, backend))
            except GraftError as error:
                sentence(error)
                results.append(None)
        reference, fast = results
        if reference is None or fast is None:
            assert reference is fast, f"{fmt} {shape}: one of two backends refuses it"
            return
        assert reference.shape == shape and reference.dtype == dtype
        same = reference.view(torch.uint8) == fast.view(torch.uint8) if reference.numel() else torch.ones(1)
        both_nan = reference.isnan() & fast.isnan()
        assert same.all() or torch.equal(reference[~both_nan], fast[~both_nan]), f"{fmt}: other bits from libgguf"
