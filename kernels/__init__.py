"""Decoding GGUF weights, and multiplying with them. Needs torch; Triton and libgguf where they exist.

    dequantize(data, fmt, shape)            the weights that packed bytes stand for
    linear(x, data, fmt, bias, residual)    x · dequant(data)ᵀ + bias + low-rank terms

`formats.py` is the table of types, `reference.py` the decode that everything is held to.
"""

from . import compiled as _compiled  # noqa: F401  (registers the operators)
from .backends import BACKENDS, Choice, choose, warm
from .cpu import SLOW_DTYPES, has_fast_bf16
from .dispatch import LowRank, decoded_rows, dequantize, embedding, is_slow, linear
from .errors import AdapterError, CorruptFile, GraftError, NoBackend, UnsupportedFormat
from .formats import FORMATS, Format, by_name, by_type

__all__ = [
    "BACKENDS", "FORMATS", "SLOW_DTYPES", "AdapterError", "Choice", "CorruptFile", "Format", "GraftError", "LowRank",
    "NoBackend", "UnsupportedFormat", "by_name", "by_type", "choose", "decoded_rows", "dequantize", "embedding",
    "has_fast_bf16", "is_slow", "linear", "warm",
]  # fmt: skip
