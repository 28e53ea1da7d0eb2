"""llama.cpp's importance matrices: what the columns of each weight count, for a quantizer.

Two forms are read (ggml-org/llama.cpp, tools/imatrix). A GGUF file with ``general.type`` ``imatrix``::

    imatrix.datasets    what it was made from
    imatrix.chunk_count, imatrix.chunk_size
    <weight>.in_sum2    F32 [experts, columns], the sum of squares of what each column was multiplied by
    <weight>.counts     F32 [experts, 1], how many rows that is the sum of

and the older ``.dat``, little-endian, which holds means times a number of calls::

    i32 entries
    entries x  i32 length, name, i32 calls, i32 columns, f32[columns]
    i32 calls, i32 length, dataset                       (may be missing)
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...kernels import by_name
from ...kernels.errors import CorruptFile, GraftError, UnsupportedFormat
from .gguf import GGUFFile, GGUFTensor, open_gguf
from .writer import NewTensor, Value, write_gguf

_SUMS, _COUNTS = ".in_sum2", ".counts"
_I32 = struct.Struct("<i")
_MAX_ENTRIES = 1 << 16
_MAX_NAME = (1 << 16) - 1
_AGAIN = "the file is damaged or of another kind, get or make it again"


@dataclass(frozen=True, eq=False)
class Importance(Mapping[str, torch.Tensor]):
    """The mean square of what each column of a weight is multiplied by, ``fp32 [columns]``, by the weight's name.

    The name is that in a GGUF file, e.g. ``blocks.0.self_attn.q.weight``; a convolution's row is ``[in * kernel]``.
    Of weights with experts the files hold ``[experts, columns]``.

    Attributes:
        sums: of the squares, fp64 ``[experts, columns]``; one expert where there are none.
        counts: rows that these are sums of, fp64 ``[experts]``.
        calls: of the model, or chunks of a text.
        datasets: what it was made from, in words.
        sketches: of the inputs, fp32 ``[rows, columns]`` with SᵀS near to the sum of x xᵀ, for a repair; none in files.
    """

    sums: Mapping[str, torch.Tensor] = field(repr=False)
    counts: Mapping[str, torch.Tensor] = field(repr=False)
    calls: int = 1
    datasets: tuple[str, ...] = ()
    sketches: Mapping[str, torch.Tensor] = field(default_factory=dict, repr=False)

    @staticmethod
    def of(
        sums: Mapping[str, torch.Tensor], rows: Mapping[str, int], calls: int = 1, datasets: Sequence[str] = (),
        sketches: Mapping[str, torch.Tensor] | None = None,
    ) -> Importance:  # fmt: skip
        """Of sums ``[columns]`` over so many rows."""
        counts = {name: torch.tensor([float(rows[name])], dtype=torch.float64) for name in sums}
        wide = {name: found.double().view(1, -1) for name, found in sums.items()}
        return Importance(wide, counts, calls, tuple(datasets), sketches or {})

    def __getitem__(self, name: str) -> torch.Tensor:
        counts = self.counts[name][:, None]
        mean = torch.where(counts > 0, self.sums[name] / counts.clamp(min=1), 1.0).float()
        return mean[0] if len(mean) == 1 else mean

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)

    def rows(self, name: str) -> int:
        """How many rows the mean of a weight's columns is of."""
        return int(self.counts[name].sum())

    def __add__(self, other: Importance) -> Importance:
        """What both have counted.

        Raises:
            GraftError: they are of different models.
        """
        sums, counts = dict(self.sums), dict(self.counts)
        for name, more in other.sums.items():
            if name in sums and sums[name].shape != more.shape:
                raise GraftError(
                    f"{name} has {sums[name].numel()} columns in one calibration and {more.numel()} in the other: "
                    "add up those of one model"
                )
            sums[name] = sums[name] + more if name in sums else more
            counts[name] = counts[name] + other.counts[name] if name in counts else other.counts[name]
        datasets = tuple(dict.fromkeys((*self.datasets, *other.datasets)))
        sketches = dict(self.sketches)
        for name, sketch in other.sketches.items():
            sketches[name] = sketches[name] + sketch if name in sketches else sketch
        return Importance(sums, counts, self.calls + other.calls, datasets, sketches)


def read_imatrix(path: str | os.PathLike[str]) -> Importance:
    """Read an importance matrix, in either form.

    Raises:
        CorruptFile: the file is missing, damaged or incomplete.
        UnsupportedFormat: it is sound and no importance matrix.
    """
    path = Path(path)
    if _is_gguf(path):
        return _from_gguf(open_gguf(path))
    return _from_dat(path)


def write_imatrix(path: str | os.PathLike[str], importance: Importance, overwrite: bool = False) -> int:
    """Write an importance matrix as llama.cpp does, in GGUF.

    Returns:
        the file's size in bytes.

    Raises:
        GraftError: it cannot be written, see `write_gguf`.
    """
    most = max((float(counts.max()) for counts in importance.counts.values()), default=1.0)
    metadata: dict[str, Value] = {
        "general.type": "imatrix",
        "imatrix.datasets": list(importance.datasets) or ["unknown"],
        "imatrix.chunk_count": importance.calls,
        "imatrix.chunk_size": max(1, math.ceil(most / importance.calls)),
    }
    tensors = []
    for name in sorted(importance):
        tensors += [_f32(name + _SUMS, importance.sums[name]), _f32(name + _COUNTS, importance.counts[name][:, None])]
    return write_gguf(path, metadata, tensors, overwrite)


def _f32(name: str, values: torch.Tensor) -> NewTensor:
    return NewTensor(name, by_name("F32"), tuple(values.shape), lambda: [values.float().view(torch.uint8)])


def _is_gguf(path: Path) -> bool:
    """Whether `open_gguf` is to judge of it: all but a regular file that begins like the older form."""
    try:
        if not path.is_file():
            return True
        with open(path, "rb") as file:
            head = file.read(4)
    except (OSError, ValueError):
        return True
    # no more entries than there may be, so that texts, zips and pickles are told apart
    return len(head) < 4 or not 0 < _I32.unpack(head)[0] <= _MAX_ENTRIES


def _from_gguf(file: GGUFFile) -> Importance:
    tensors = file.tensors
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    if not names:
        what = "a model" if tensors else "empty"
        raise UnsupportedFormat(
            f"the file is no importance matrix but {what}: choose a file of Save Importance or of llama-imatrix "
            f"({file.path})"
        )
    found = {name: _entry(name, tensors, file.path) for name in names}
    datasets = file.metadata.get("imatrix.datasets")
    texts = tuple(str(text) for text in datasets) if isinstance(datasets, list) else ()
    calls = file.metadata.get("imatrix.chunk_count")
    return Importance(
        {name: sums for name, (sums, _) in found.items()},
        {name: counts for name, (_, counts) in found.items()},
        calls if type(calls) is int and calls > 0 else 1,
        texts,
    )


def _entry(name: str, tensors: Mapping[str, GGUFTensor], path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    if name + _COUNTS not in tensors:
        raise CorruptFile(f"the file has no counts of {name[:120]}: {_AGAIN} ({path})")
    sums, counts = (_numbers(tensors[name + suffix], path) for suffix in (_SUMS, _COUNTS))
    if not counts.numel() or not sums.numel() or sums.numel() % counts.numel():
        raise CorruptFile(
            f"{name[:120]} has {sums.numel()} sums and {counts.numel()} counts, which do not fit: {_AGAIN} ({path})"
        )
    return sums.view(counts.numel(), -1), counts


def _numbers(tensor: GGUFTensor, path: Path) -> torch.Tensor:
    """The values of a tensor of sums or counts, fp64 ``[n]``."""
    if tensor.fmt.name != "F32":
        raise CorruptFile(f"{tensor.name[:120]} is {tensor.fmt.name}, not F32: {_AGAIN} ({path})")
    return _checked(tensor.data.view(torch.float32), tensor.name, path)


def _checked(values: torch.Tensor, name: str, path: Path) -> torch.Tensor:
    # of a sum that is no number, or too large for fp32, the least and the greatest show it
    if values.numel() and not (values.min() >= 0 and values.max() < math.inf):
        raise CorruptFile(f"{name[:120]} holds numbers that no squares add up to: {_AGAIN} ({path})")
    return values.double()


def _from_dat(path: Path) -> Importance:
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, torch.Tensor] = {}
    try:
        with open(path, "rb") as opened:
            file = _Dat(opened, path)
            for _ in range(file.number(1, _MAX_ENTRIES)):
                name = file.text(file.number(1, _MAX_NAME))
                calls = file.number(0, (1 << 31) - 1)
                sums[name] = _checked(file.floats(file.number(1, (1 << 31) - 1)), name, path).view(1, -1)
                # what is there when nobody counted is the mean itself
                counts[name] = torch.tensor([float(max(1, calls))], dtype=torch.float64)
            calls, datasets = file.ending()
    except OSError as error:
        raise CorruptFile(f"the file cannot be read, {error.strerror}: check its permissions ({path})") from None
    return Importance(sums, counts, calls, datasets)


class _Dat:
    """Reads the older form; what it claims is checked against what is left of the file."""

    def __init__(self, file: object, path: Path) -> None:
        self.file, self.path = file, path
        self.left = os.fstat(file.fileno()).st_size  # type: ignore[attr-defined]

    def take(self, count: int) -> bytes:
        data = self.file.read(count) if count <= self.left else b""  # type: ignore[attr-defined]
        if len(data) != count:
            raise CorruptFile(f"the file ends before what it says it holds: {_AGAIN} ({self.path})")
        self.left -= count
        return data

    def number(self, low: int, high: int) -> int:
        (found,) = _I32.unpack(self.take(_I32.size))
        if not low <= found <= high:
            raise CorruptFile(f"the file has {found} where a length or count stands: {_AGAIN} ({self.path})")
        return found

    def text(self, length: int) -> str:
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise CorruptFile(f"a name in the file is not UTF-8: {_AGAIN} ({self.path})") from None

    def floats(self, count: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(self.take(4 * count)), dtype=torch.float32)

    def ending(self) -> tuple[int, tuple[str, ...]]:
        """How many calls there were, and what of; older files do not say."""
        if self.left < 2 * _I32.size:
            return 1, ()
        calls, length = self.number(-(1 << 31), (1 << 31) - 1), self.number(-(1 << 31), (1 << 31) - 1)
        whole = 0 < length <= min(self.left, _MAX_NAME)
        return max(1, calls), (self.take(length).decode(errors="replace"),) if whole else ()


__all__ = ["Importance", "read_imatrix", "write_imatrix"]
