"""Writing GGUF files, whole or not at all.

The layout is the one that `gguf.py` reads, version 3. A file grows under another name in its folder, tensor by tensor,
and gets its own once all of it is on the disk: nobody ever sees half a model under a name that is listed.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

import torch

from ...kernels import Format, GraftError
from ..report import size_text
from .mapped import is_mapped

_VERSION, _ALIGNMENT = 3, 32
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64, _I64 = 4, 5, 6, 7, 8, 9, 10, 11
_STRUCTS = {_U32: "I", _I32: "i", _F32: "f", _BOOL: "?", _U64: "Q", _I64: "q"}
_MOST_DIMS = 8
_ROOM = 1 << 20
"""Bytes that are to stay free beside the file."""


class Raw(NamedTuple):
    """A metadata value as it stood in another file: its type's number and its bytes."""

    kind: int
    data: bytes


Value: TypeAlias = "bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str] | Raw"


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write.

    Attributes:
        name: as it is to stand in the file.
        fmt: its type.
        shape: of what the bytes decode to, in torch's order; the last dimension fills whole blocks.
        data: gives the bytes, ``uint8`` in pieces of any shape, when it is their turn.
    """

    name: str
    fmt: Format
    shape: tuple[int, ...]
    data: Callable[[], Iterable[torch.Tensor]]

    @property
    def nbytes(self) -> int:
        *rows, columns = self.shape or (1,)
        return math.prod(rows) * self.fmt.row_bytes(columns)


def write_gguf(
    path: str | os.PathLike[str], metadata: Mapping[str, Value], tensors: Sequence[NewTensor], overwrite: bool = False
) -> int:
    """Write a file. An int is stored in 32 bits if it fits, a list of ints as int32, a float as fp32.

    Args:
        path: where; its folder is made if need be.
        overwrite: whether a file of this name may be replaced. One that is loaded never is.

    Returns:
        the file's size in bytes.

    Raises:
        GraftError: the place is taken, or cannot be written to, or too small. There is no file then, and an old one is
            as it was; so it is whatever else is raised meanwhile.
    """
    path = Path(path)
    header = _header(metadata, tensors)
    size = len(header) + sum(_padded(tensor.nbytes) for tensor in tensors)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        check_place(path, size, overwrite)
        with _appearing(path) as file:
            file.write(header)
            for tensor in tensors:
                _write_tensor(file, tensor)
            # a file that took the name meanwhile is somebody else's
            check_place(path, 0, overwrite)
    except OSError as error:
        raise _refusal(error, path) from error
    return size


def check_place(path: Path, size: int, overwrite: bool = False) -> None:
    """Raises:
    GraftError: a file of `size` bytes cannot take this place, as far as one can tell before.
    """
    if path.is_dir():
        raise GraftError(f"this is the name of a folder: choose another name ({path})")
    if path.exists() and is_mapped(path):
        raise GraftError(f"the file of this name is loaded, so it stays as it is: choose another name ({path})")
    if path.exists() and not overwrite:
        raise GraftError(f"there is a file of this name already: choose another name, or allow to overwrite ({path})")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    free = shutil.disk_usage(folder).free
    if size + _ROOM > free and size:
        raise GraftError(
            f"the disk is too full, {size_text(size)} are needed and {size_text(free)} are free: make room, or "
            f"choose a smaller type ({path})"
        )


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name once all is written, or is gone."""
    part = path.with_name(f"{path.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":  # the name itself is on the disk once its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # not every file system has it
                os.fsync(folder)
        finally:
            os.close(folder)


def _write_tensor(file: BinaryIO, tensor: NewTensor) -> None:
    written = 0
    for piece in tensor.data():
        written += file.write(piece.contiguous().view(-1).view(torch.uint8).numpy().data)
    if written != tensor.nbytes:
        raise GraftError(f"{tensor.name} came as {written} bytes of {tensor.nbytes}: the file is not written")
    file.write(b"\0" * (_padded(written) - written))


def _refusal(error: OSError, path: Path) -> GraftError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return GraftError(f"the disk is full: make room, or choose another folder ({path})")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return GraftError(f"the folder cannot be written to: check its permissions, or choose another ({path})")
    reason = error.strerror or str(error)
    return GraftError(f"the file cannot be written, {reason}: choose another name or folder ({path})")


def _header(metadata: Mapping[str, Value], tensors: Sequence[NewTensor]) -> bytes:
    parts = [b"GGUF", struct.pack("<IQQ", _VERSION, len(tensors), len(metadata))]
    parts += [_string(key) + _entry(value) for key, value in metadata.items()]
    offset, names = 0, set()
    for tensor in tensors:
        if tensor.name in names:
            raise GraftError(f"{tensor.name} cannot be written: the model has two tensors of this name")
        if len(tensor.shape) > _MOST_DIMS:
            raise GraftError(
                f"{tensor.name} cannot be written: its shape {list(tensor.shape)} has more than {_MOST_DIMS} dimensions"
            )
        names.add(tensor.name)
        dims = tensor.shape[::-1]
        parts.append(_string(tensor.name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        parts.append(struct.pack("<IQ", tensor.fmt.ggml_type, offset))
        offset += _padded(tensor.nbytes)
    header = b"".join(parts)
    return header.ljust(_padded(len(header)), b"\0")


def _padded(count: int) -> int:
    return count + -count % _ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode(errors="replace")
    return struct.pack("<Q", len(data)) + data


def _entry(value: Value) -> bytes:
    """A value with its type in front."""
    if isinstance(value, Raw):
        return struct.pack("<I", value.kind) + value.data
    if isinstance(value, (list, tuple)):
        kind = _kind_of_items(value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_plain(kind, item) for item in value)
    assert isinstance(value, (bool, int, float, str))
    kind = _kind(value)
    return struct.pack("<I", kind) + _plain(kind, value)


def _kind(value: bool | int | float | str) -> int:
    if isinstance(value, bool):
        return _BOOL
    if isinstance(value, int):
        if value < 0:
            return _I32 if value >= -(1 << 31) else _I64
        return _U32 if value < 1 << 32 else _U64
    return _F32 if isinstance(value, float) else _STRING


def _kind_of_items(values: Sequence) -> int:
    kinds = {_kind(value) for value in values}
    if kinds <= {_U32, _I32} and all(value < 1 << 31 for value in values):
        return _I32
    return kinds.pop() if len(kinds) == 1 else _F32 if kinds <= {_U32, _I32, _F32} else _I64


def _plain(kind: int, value: bool | int | float | str) -> bytes:
    return _string(str(value)) if kind == _STRING else struct.pack("<" + _STRUCTS[kind], value)


__all__ = ["NewTensor", "Raw", "Value", "check_place", "write_gguf"]
