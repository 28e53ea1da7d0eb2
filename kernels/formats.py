"""The table of GGUF types: the only list of them in this project.

Checks, kernels, tests, error messages and the matrix in docs/formats.md all read it; adding a type is adding a
row (CONTRIBUTING.md, "A new format"). Numbers, block sizes and byte sizes are those of ggml
(`enum ggml_type` and `type_traits` in ggml.c, mirrored by `gguf.constants.GGML_QUANT_SIZES`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from . import reference
from .errors import CorruptFile, UnsupportedFormat

Family = Literal["float", "integer", "legacy", "k-quant", "i-quant", "ternary", "microscaling", "activation", "binary"]


@dataclass(frozen=True, slots=True)
class Format:
    """One GGUF type.

    Attributes:
        name: ggml's name, e.g. ``Q4_K``.
        ggml_type: the number that stands in the file.
        block_size: weights in a block.
        type_size: bytes of a block.
        family: what it is related to; groups the matrix in docs/formats.md.
        decode: reference decode, ``uint8 [blocks, type_size] -> fp32 [blocks, block_size]``.
        triton: the Triton decode function as ``module.function`` in ``kernels/triton_``.
        book: the code book that it looks codes up in, a name of `codebooks.NAMES`.
        dtype: the torch dtype of a type that torch can hold as it is.
        refusal: why this type cannot be a weight, with the remedy.
    """

    name: str
    ggml_type: int
    block_size: int
    type_size: int
    family: Family
    decode: Callable[[torch.Tensor], torch.Tensor] | None = None
    triton: str | None = None
    book: str | None = None
    dtype: torch.dtype | None = None
    refusal: str | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the bytes have to be decoded before torch can compute with them."""
        return self.dtype is None and self.refusal is None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.type_size / self.block_size

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights; CorruptFile if it does not fill whole blocks."""
        if columns % self.block_size:
            raise CorruptFile(
                f"a row of {columns} weights does not fill whole {self.name} blocks of {self.block_size}: "
                "the file was written wrongly, get it again or from another source"
            )
        return columns // self.block_size * self.type_size

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        # looked up in every call of a layer: not by all of its fields
        return self.ggml_type


def _quantized(
    name: str, number: int, block_size: int, type_size: int, family: Family, triton: str, book: str | None = None
) -> Format:
    return Format(
        name, number, block_size, type_size, family,
        decode=getattr(reference, f"decode_{name.lower()}"), triton=f"{triton}.decode_{name.lower()}", book=book,
    )  # fmt: skip


def _plain(name: str, number: int, family: Family, dtype: torch.dtype) -> Format:
    return Format(name, number, 1, dtype.itemsize, family, dtype=dtype)


_ACTIVATION = "is a format of activations, not of weights: convert the model to Q8_0 instead"

FORMATS: tuple[Format, ...] = (
    _plain("F32", 0, "float", torch.float32),
    _plain("F16", 1, "float", torch.float16),
    Format("BF16", 30, 1, 2, "float", reference.decode_bf16, "legacy.decode_bf16", dtype=torch.bfloat16),
    _plain("F64", 28, "float", torch.float64),
    _plain("I8", 24, "integer", torch.int8),
    _plain("I16", 25, "integer", torch.int16),
    _plain("I32", 26, "integer", torch.int32),
    _plain("I64", 27, "integer", torch.int64),
    _quantized("Q4_0", 2, 32, 18, "legacy", "legacy"),
    _quantized("Q4_1", 3, 32, 20, "legacy", "legacy"),
    _quantized("Q5_0", 6, 32, 22, "legacy", "legacy"),
    _quantized("Q5_1", 7, 32, 24, "legacy", "legacy"),
    _quantized("Q8_0", 8, 32, 34, "legacy", "legacy"),
    _quantized("Q2_K", 10, 256, 84, "k-quant", "kquants"),
    _quantized("Q3_K", 11, 256, 110, "k-quant", "kquants"),
    _quantized("Q4_K", 12, 256, 144, "k-quant", "kquants"),
    _quantized("Q5_K", 13, 256, 176, "k-quant", "kquants"),
    _quantized("Q6_K", 14, 256, 210, "k-quant", "kquants"),
    _quantized("IQ1_S", 19, 256, 50, "i-quant", "iquants", "iq1s"),
    _quantized("IQ1_M", 29, 256, 56, "i-quant", "iquants", "iq1s"),
    _quantized("IQ2_XXS", 16, 256, 66, "i-quant", "iquants", "iq2xxs"),
    _quantized("IQ2_XS", 17, 256, 74, "i-quant", "iquants", "iq2xs"),
    _quantized("IQ2_S", 22, 256, 82, "i-quant", "iquants", "iq2s"),
    _quantized("IQ3_XXS", 18, 256, 98, "i-quant", "iquants", "iq3xxs"),
    _quantized("IQ3_S", 21, 256, 110, "i-quant", "iquants", "iq3s"),
    _quantized("IQ4_NL", 20, 32, 18, "i-quant", "iquants", "iq4nl"),
    _quantized("IQ4_XS", 23, 256, 136, "i-quant", "iquants", "iq4nl"),
    _quantized("TQ1_0", 34, 256, 54, "ternary", "ternary"),
    _quantized("TQ2_0", 35, 256, 66, "ternary", "ternary"),
    _quantized("MXFP4", 39, 32, 17, "microscaling", "microscaling"),
    _quantized("NVFP4", 40, 64, 36, "microscaling", "microscaling"),
    Format("Q8_1", 9, 32, 40, "activation", refusal=_ACTIVATION),
    Format("Q8_K", 15, 256, 292, "activation", refusal=_ACTIVATION),
    Format("Q1_0", 41, 128, 18, "binary", refusal="has no reference decode yet: convert the model to TQ1_0 or IQ1_S"),
)

BY_NAME: dict[str, Format] = {f.name: f for f in FORMATS}
BY_TYPE: dict[int, Format] = {f.ggml_type: f for f in FORMATS}


def by_type(ggml_type: int, where: str = "") -> Format:
    """The format with this number in the file; UnsupportedFormat if unknown or refused as a weight."""
    found = BY_TYPE.get(ggml_type)
    suffix = f" ({where})" if where else ""
    if found is None:
        raise UnsupportedFormat(
            f"GGUF type number {ggml_type} is unknown: update Graft, or get the model in another type{suffix}"
        )
    if found.refusal:
        raise UnsupportedFormat(f"{found.name} {found.refusal}{suffix}")
    return found


def by_name(name: str) -> Format:
    """The format of this name, e.g. ``Q4_K``; UnsupportedFormat if there is none."""
    try:
        return BY_NAME[name]
    except KeyError:
        raise UnsupportedFormat(f"there is no GGUF type {name!r}: the types are {', '.join(BY_NAME)}") from None
