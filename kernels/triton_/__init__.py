"""The Triton backend: decode functions per format, and the kernels that share them.

    bits          what decode functions are made of: loads, expansion to numbers, signs
    legacy ..     one decode function per format, by family
    dequant       bytes to floats
    matvec        one row of x
    project       one row of x to the ranks of low-rank terms
    matmul        a few rows of x, on the tensor cores
    int8          bytes to rotated int8 rows, for the int8 GEMM of a library
    plan          which of them, in which tiles: the tables
    launch        launches, checks, warming

Importing it imports Triton and compiles nothing; `kernels.dispatch` imports it on first use.
"""

from .launch import dequantize, encode_int8, int8_scales, matmul, matvec, project, unavailable, warm
from .plan import choose

__all__ = ["choose", "dequantize", "encode_int8", "int8_scales", "matmul", "matvec", "project", "unavailable", "warm"]
