"""Decoding GGUF weights, and multiplying with them. Needs torch; Triton and libgguf where they exist.

    dequantize(data, fmt, shape)            the weights that packed bytes stand for
    linear(x, data, fmt, bias, residual)    x · dequant(data)ᵀ + bias + low-rank terms
    int8.linear(x, data, fmt, scales, ...)  the same with int8 products

`formats.py` is the table of types, `reference.py` the decode that everything is held to.
"""

from . import compiled as _compiled  # noqa: F401  (registers the operators)
from . import int8
from .backends import BACKENDS, Choice, choose, warm
from .cpu import SLOW_DTYPES, has_fast_bf16
from .dispatch import LowRank, decoded_rows, dequantize, embedding, is_slow, linear
from .errors import AdapterError, CorruptFile, GraftError, NoBackend, OutOfMemory, UnsupportedFormat, plain
from .formats import FORMATS, Format, by_name, by_type
from .scratch import is_full, retried

__all__ = [
    "BACKENDS", "FORMATS", "SLOW_DTYPES", "AdapterError", "Choice", "CorruptFile", "Format", "GraftError", "LowRank",
    "NoBackend", "OutOfMemory", "UnsupportedFormat", "by_name", "by_type", "choose", "decoded_rows", "dequantize",
    "embedding", "has_fast_bf16", "int8", "is_full", "is_slow", "linear", "plain", "retried", "warm",
]  # fmt: skip
