"""Test data in every GGUF type, and what it decodes to according to gguf-py. `import oracle` from any test."""

from __future__ import annotations

import libgguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, quants
from graft.kernels.formats import FORMATS, Format

QUANTIZED: tuple[Format, ...] = tuple(f for f in FORMATS if f.is_quantized)
"""Formats whose bytes have to be decoded."""
DECODABLE: tuple[Format, ...] = tuple(f for f in FORMATS if f.decode)
"""The same and BF16: everything that gguf-py can decode."""

# where the fp16 scales (and mins) of a block begin; IQ1_M, MXFP4 and NVFP4 keep theirs in other ways
_HALVES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,),
}  # fmt: skip


def random_blocks(fmt: Format, blocks: int, seed: int = 0) -> torch.Tensor:
    """Random bytes with finite, moderate scales of either sign: uint8 [blocks, type_size].

    Codes, sub-scales and signs take every value; scales are about 0.01, so that weights stay below about 1000 in
    all types. Floats are normal numbers.
    """
    rng = np.random.default_rng([seed, fmt.ggml_type])
    if fmt.dtype is not None and fmt.dtype.is_floating_point:
        numbers = torch.from_numpy(rng.standard_normal((blocks, 1)))
        return numbers.to(fmt.dtype).view(torch.uint8)
    data = rng.integers(0, 256, (blocks, fmt.type_size), dtype=np.uint8)
    halves = (0.01 * rng.standard_normal((blocks, 2))).astype("<f2").view(np.uint8)
    for start, half in zip(_HALVES.get(fmt.name, ()), np.split(halves, 2, axis=1), strict=False):
        data[:, start : start + 2] = half
    if fmt.name == "IQ1_M":
        data[:, 49::2] = data[:, 49::2] & 0x0F | _nibbles(halves[:, :2]) << 4
    elif fmt.name == "MXFP4":
        data[:, 0] = rng.integers(112, 132, blocks)
    elif fmt.name == "NVFP4":
        data[:, :4] = rng.integers(0, 0x60, (blocks, 4))
    return torch.from_numpy(data)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Bytes [n, m] as nibbles [n, 2 m], low ones first."""
    return np.stack([data & 15, data >> 4], axis=2).reshape(len(data), -1)


def quantized(fmt: Format, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """A normal random matrix, quantized by libgguf: uint8 [rows, row_bytes]."""
    rng = np.random.default_rng([seed, fmt.ggml_type])
    return quantize(torch.from_numpy(rng.standard_normal((rows, columns), dtype=np.float32)), fmt)


def quantize(weights: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The fp32 matrix [rows, columns] in any type that libgguf can write: uint8 [rows, row_bytes]."""
    packed = libgguf.quantize_rows(weights.contiguous().numpy(), fmt.ggml_type)
    return torch.from_numpy(packed.view(np.uint8))


def oracle(data: torch.Tensor, fmt: Format) -> torch.Tensor:
    """What gguf-py decodes: uint8 [..., n type_size] to fp32 [..., n block_size]."""
    with np.errstate(all="ignore"):  # random bytes hold NaN and infinite scales, too
        decoded = quants.dequantize(data.contiguous().numpy(), GGMLQuantizationType[fmt.name])
    return torch.from_numpy(decoded)


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Whether two fp32 tensors are equal bit for bit, signs of zeros included, NaN being NaN whatever its payload."""
    equal = (got.view(torch.int32) == want.view(torch.int32)) | (got.isnan() & want.isnan())
    return got.dtype == want.dtype and got.shape == want.shape and bool(equal.all())
