"""Writes GGUF files the way the converters for diffusion models do; needs gguf and libgguf."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

_FOLDED_COLUMNS = 256  # what converters fold to: whole blocks of every type
_PLAIN = {"F64": np.float64, "F32": np.float32, "F16": np.float16}
_PLAIN |= {"I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64}


def write_gguf(
    path: str | os.PathLike[str],
    tensors: Mapping[str, tuple[np.ndarray, str]],
    architecture: str = "flux",
    metadata: Mapping[str, Any] | None = None,
    orig_shapes: bool = True,
) -> Path:
    """Write a GGUF file (version 3, little-endian) of quantized and plain tensors.

    A tensor whose rows do not fill whole blocks of its type is folded into rows of 256, with its
    true shape in ``comfy.gguf.orig_shape.<name>``, as city96's converter does. Where its number of
    elements does not allow that, it is stored as F32 if it has at most one dimension, else as F16.

    Args:
        path: the file to write.
        tensors: name to (float32 array of any shape, name of a GGUF type, e.g. ``Q4_K`` or ``BF16``).
        architecture: ``general.architecture``.
        metadata: further entries: bool, int (written as INT32), float, str or a list of one of them;
            ``general.alignment`` (an int) also aligns the data.
        orig_shapes: whether to fold; without it such tensors are stored as F32 or F16.

    Returns:
        The path.

    Raises:
        KeyError: there is no GGUF type of this name.
        ValueError: libgguf cannot quantize to this type.
    """
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (metadata or {}).items():
        if key == "general.alignment":
            writer.add_custom_alignment(value)
        else:
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
    for name, (array, type_name) in tensors.items():
        stored, qtype = _fit(array, GGMLQuantizationType[type_name], orig_shapes)
        if stored.shape != array.shape:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(array.shape))
        writer.add_tensor(name, encode(stored, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def encode(array: np.ndarray, qtype: GGMLQuantizationType) -> np.ndarray:
    """Quantize or cast an array, row by row.

    Args:
        array: float32 [..., columns], the columns a multiple of the type's block size.
        qtype: the type; those that need an importance matrix get the rows' mean squares.

    Returns:
        uint8 [..., row bytes] of a quantized type, uint16 [..., columns] of BF16, else numbers.

    Raises:
        ValueError: libgguf cannot quantize to this type.
    """
    if qtype.name in _PLAIN:
        return array.astype(_PLAIN[qtype.name])
    rows = libgguf.quantize_rows(np.atleast_1d(array), qtype)
    return rows.view(np.uint16).reshape(array.shape) if qtype == GGMLQuantizationType.BF16 else rows


def _fit(array: np.ndarray, qtype: GGMLQuantizationType, fold: bool) -> tuple[np.ndarray, GGMLQuantizationType]:
    """The shape and the type in which an array can be stored."""
    block_size, _ = gguf.GGML_QUANT_SIZES[qtype]
    columns = array.shape[-1] if array.ndim else 1
    if columns % block_size == 0:
        return array, qtype
    if fold and array.size % _FOLDED_COLUMNS == 0:
        return array.reshape(-1, _FOLDED_COLUMNS), qtype
    return array, GGMLQuantizationType.F32 if array.ndim <= 1 else GGMLQuantizationType.F16
