"""Reading GGUF files: header, metadata and memory-mapped tensors, without copying a weight.

The layout is that of ggml's docs/gguf.md, versions 2 and 3, little-endian::

    "GGUF"  u32 version  u64 tensors  u64 entries
    entries x  string key, u32 value type, value
    tensors x  string name, u32 n, u64[n] dimensions (fastest first), u32 ggml type, u64 offset
    padding to general.alignment, then the data; offsets count from here

A string is a u64 length and its bytes; an array is a u32 item type, a u64 count and its items.
Nothing that the file claims is believed: each length, count and offset is checked against the
file's size before it is used, so a damaged file costs neither memory nor time.
"""

from __future__ import annotations

import math
import mmap
import os
import reprlib
import stat
import struct
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch

from ...kernels.errors import CorruptFile, UnsupportedFormat, plain
from ...kernels.formats import Format, by_type
from .contents import CONNECTORS, VACE, other_kind
from .mapped import MappedFile

Value: TypeAlias = "bool | int | float | str | list[Value]"

_SCALARS = {
    number: struct.Struct("<" + code)
    for number, code in enumerate(("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d"))
    if code
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]

# Bounds far above what real files hold, so that a hostile header stays cheap: the largest
# vocabularies have 262,144 tokens and twice as many merges, the largest embedded tokenizer 33 MB.
_MAX_ENTRIES = 1 << 16  # metadata entries, tensors
_MAX_ITEMS = 1 << 22  # strings inside arrays, all together
_MAX_ARRAYS = 1 << 16  # arrays inside arrays, all together; nobody writes any
_MAX_NUMBERS = 1 << 23  # in one array
_MAX_TEXT_BYTES = 1 << 26  # one string outside arrays
_MAX_NAME_BYTES = (1 << 16) - 1  # the specification's bound on a key
_MAX_NESTING = 4
_MAX_DIMS = 8  # ggml stops at 4; converters for ComfyUI write 5
_MAX_WEIGHTS = (1 << 63) - 1  # torch counts no further
_MAX_WEIGHTS_PER_BYTE = 8  # IQ1_S has 5.12
_MAX_ALIGNMENT = 1 << 24
_DEFAULT_ALIGNMENT = 32

_PAGE_FILE_TOO_SMALL = 1455  # Windows's ERROR_COMMITMENT_LIMIT

_AGAIN = "the download is incomplete or damaged, get it again"
_REPR = reprlib.Repr()  # for names and values in messages: quoted, and cut when they are long
_SHOWN_CHARACTERS = 120
_REPR.maxstring = _REPR.maxother = _SHOWN_CHARACTERS
_shown = _REPR.repr
_ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
DIFFUSION_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor in a file.

    Attributes:
        name: as it stands in the file.
        fmt: its type.
        shape: logical shape in torch's order; () for a scalar. Converters fold tensors whose rows do
            not fill whole blocks into rows of 256 and keep the true shape in
            ``comfy.gguf.orig_shape.<name>``: that one is meant here.
        stored_shape: shape of what the bytes decode to, in torch's order; same number of elements.
        offset: where the bytes begin, counted from the beginning of the file.
        nbytes: how many there are.
        data: uint8 [nbytes], a view of the mapped file. The mapping is private: whoever writes
            into it changes a copy in memory, never the file.
    """

    name: str
    fmt: Format
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    offset: int
    nbytes: int
    data: torch.Tensor = field(repr=False)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """An open GGUF file; it stays mapped for as long as this or a tensor's `data` lives.

    Attributes:
        path: where it was opened.
        version: GGUF version, 2 or 3.
        alignment: bytes to which each tensor is aligned.
        size: bytes of the whole file.
        metadata: key to value; an array is decoded when it is first asked for.
        tensors: name to tensor, in the file's order.
        mapped: tells whether it is still as it was.
    """

    path: Path
    version: int
    alignment: int
    size: int
    metadata: Metadata = field(repr=False)
    tensors: dict[str, GGUFTensor] = field(repr=False)
    mapped: MappedFile | None = field(default=None, repr=False)

    @property
    def architecture(self) -> str | None:
        """What the converter called the model, e.g. ``flux``; a hint, since anything may stand there: cut and plain."""
        name = self.metadata.get("general.architecture")
        return plain(name[:_SHOWN_CHARACTERS]) if isinstance(name, str) else None

    @property
    def parameters(self) -> int:
        """Number of weights in all tensors."""
        return sum(tensor.parameters for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def type_counts(self) -> dict[str, int]:
        """Tensors of each type, by name; the type that takes the most bytes first."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counts[tensor.fmt.name] += 1
            sizes[tensor.fmt.name] += tensor.nbytes
        return {name: counts[name] for name, _ in sizes.most_common()}


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a GGUF file; reads the header only.

    Raises:
        CorruptFile: it is missing, damaged, incomplete or of another kind.
        UnsupportedFormat: it is sound, but big-endian, of another version, split, or holds a type
            that cannot be a weight.
    """
    path = Path(path)
    mapping, mapped = _map(path)
    size = len(mapping)
    _check_magic(mapping[:512], size, path)
    cursor = _Cursor(mapping, 4, path)
    version = cursor.number(_U32)
    _check_version(version, path)
    tensor_count = cursor.count("tensors", smallest=24)
    entry_count = cursor.count("metadata entries", smallest=13)
    metadata = _read_metadata(cursor, entry_count)
    _check_split(metadata, path)
    alignment = _alignment(metadata, path)
    infos = [_read_tensor_info(cursor) for _ in range(tensor_count)]
    start = cursor.offset + -cursor.offset % alignment
    tensors = _build_tensors(infos, metadata, mapping, start, alignment, path)
    return GGUFFile(path, version, alignment, size, metadata, tensors, mapped)


def diffusion_tensors(file: GGUFFile) -> dict[str, GGUFTensor]:
    """The diffusion model's tensors, by the name that hosts use.

    From a whole checkpoint only the tensors under ``model.diffusion_model.`` or ``diffusion_model.``
    are taken, and the prefix is cut off.

    Raises:
        UnsupportedFormat: there is no diffusion model in the file.
    """
    if not file.tensors:
        raise UnsupportedFormat(f"the file holds metadata and no tensors: get the model itself ({file.path})")
    found: dict[str, GGUFTensor] = {}
    for prefix in DIFFUSION_PREFIXES:
        found = {name[len(prefix) :]: tensor for name, tensor in file.tensors.items() if name.startswith(prefix)}
        if found:
            break
    kind = other_kind(file, found or None)
    if kind is not None:
        raise UnsupportedFormat(
            f"{kind.subject(file)} is {kind.what}, not a diffusion model: {kind.remedy} ({file.path})"
        )
    return found or dict(file.tensors)


def module_tensors(file: GGUFFile) -> dict[str, GGUFTensor]:
    """The tensors of a module that is added to a diffusion model: VACE to Wan, text connectors to LTX-2.

    Raises:
        UnsupportedFormat: it is something else.
    """
    found: dict[str, GGUFTensor] = {}
    for name, tensor in file.tensors.items():
        prefix = next((prefix for prefix in DIFFUSION_PREFIXES if name.startswith(prefix)), "")
        found[name[len(prefix) :]] = tensor
    kind = other_kind(file, found)
    if kind in (VACE, CONNECTORS):
        return found
    what = "a diffusion model" if kind is None else kind.what
    raise UnsupportedFormat(
        f"this is {what}, not a module to add to one: choose a VACE module or LTX-2's connectors, or None ({file.path})"
    )


def describe(file: GGUFFile) -> str:
    """One line on a model, e.g. ``flux · 11.9B · Q4_K 228, Q6_K 76, F32 471 · 6.6 GB``."""
    types = ", ".join(f"{name} {count}" for name, count in file.type_counts.items())
    architecture = file.architecture or "unknown architecture"
    parameters = _short(file.parameters, ("B", "M", "K", ""))
    size = _short(file.nbytes, (" GB", " MB", " KB", " B"))
    return " · ".join((architecture, parameters, types or "no tensors", size))


class Metadata(Mapping[str, Value]):
    """A file's metadata: key to value, each decoded when it is first asked for.

    Bytes of a value that are not UTF-8 are shown as U+FFFD, since a licence text in another
    encoding is no reason not to run a model.
    """

    def __init__(self, cursor: _Cursor, places: dict[str, tuple[int, int]]) -> None:
        self._cursor = cursor
        self._places = places  # key to (value type, offset); the walk over the header checked each
        self._decoded: dict[str, Value] = {}

    def __getitem__(self, key: str) -> Value:
        if key not in self._decoded:
            kind, offset = self._places[key]
            self._decoded[key] = self._cursor.at(offset).value(kind)
        return self._decoded[key]

    def texts(self) -> dict[str, str]:
        """The entries that are strings."""
        return {key: str(self[key]) for key, (kind, _) in self._places.items() if kind == _STRING}

    def raw(self, key: str) -> tuple[int, bytes]:
        """The number of an entry's type, and its bytes as they stand in the file."""
        kind, offset = self._places[key]
        cursor = self._cursor.at(offset)
        cursor.skip(kind)
        return kind, cursor.mapping[offset : cursor.offset]

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class _Cursor:
    """Reads the header; every step is checked against the end of the file."""

    def __init__(self, mapping: mmap.mmap, offset: int, path: Path) -> None:
        self.mapping, self.offset, self.path = mapping, offset, path
        self.size = len(mapping)
        self.items_left, self.arrays_left = _MAX_ITEMS, _MAX_ARRAYS

    def at(self, offset: int) -> _Cursor:
        """Another cursor over the same file."""
        return _Cursor(self.mapping, offset, self.path)

    def corrupt(self, message: str) -> CorruptFile:
        return CorruptFile(f"{message} ({self.path})")

    def take(self, count: int) -> int:
        """Step over `count` bytes; returns the offset where they begin."""
        start = self.offset
        if count > self.size - start:
            raise self.corrupt(f"the header goes on past the end of the file at byte {self.size}: {_AGAIN}")
        self.offset = start + count
        return start

    def number(self, layout: struct.Struct) -> int:
        return layout.unpack_from(self.mapping, self.take(layout.size))[0]

    def count(self, what: str, smallest: int) -> int:
        """A count of things that take at least `smallest` bytes each."""
        count = self.number(_U64)
        if count > _MAX_ENTRIES or count * smallest > self.size - self.offset:
            raise self.corrupt(f"the header claims {count} {what} in a file of {self.size} bytes: {_AGAIN}")
        return count

    def name(self, what: str) -> str:
        """A key or a tensor's name."""
        length = self.number(_U64)
        if length > _MAX_NAME_BYTES:
            raise self.corrupt(f"the header claims a {what} of {length} bytes: {_AGAIN}")
        start = self.take(length)
        try:
            return self.mapping[start : self.offset].decode()
        except UnicodeDecodeError:
            raise self.corrupt(f"the {what} at byte {start} is not UTF-8: {_AGAIN}") from None

    def skip(self, kind: int, depth: int = 0) -> None:
        """Step over a value of type `kind`, which lies inside `depth` arrays."""
        if kind in _SCALARS:
            self.take(_SCALARS[kind].size)
        elif kind == _STRING:
            self._skip_text()
        elif kind == _ARRAY and depth < _MAX_NESTING:
            self._skip_array(depth + 1)
        elif kind == _ARRAY:
            raise self.corrupt(f"the header nests more than {_MAX_NESTING} arrays at byte {self.offset}: {_AGAIN}")
        else:
            raise self.corrupt(f"the header has a value of unknown type {kind} at byte {self.offset}: {_AGAIN}")

    def value(self, kind: int) -> Value:
        """Decode a value that `skip` has passed over."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            start = self.take(self.number(_U64))
            return self.mapping[start : self.offset].decode(errors="replace")
        item, count = self.number(_U32), self.number(_U64)
        if item in _SCALARS:
            layout = _SCALARS[item]
            start = self.take(count * layout.size)
            return list(struct.unpack_from(f"<{count}{layout.format[-1]}", self.mapping, start))
        return [self.value(item) for _ in range(count)]

    def _skip_text(self) -> None:
        length = self.number(_U64)
        if length > _MAX_TEXT_BYTES:
            raise self.corrupt(f"the header claims a text of {length} bytes at byte {self.offset}: {_AGAIN}")
        self.take(length)

    def _skip_array(self, depth: int) -> None:
        item, count = self.number(_U32), self.number(_U64)
        if item == _STRING:
            self.items_left -= count
        elif item not in _SCALARS:
            self.arrays_left -= count
        if count > _MAX_NUMBERS or self.items_left < 0 or self.arrays_left < 0:
            raise self.corrupt(f"the header claims an array of {count} items at byte {self.offset}: {_AGAIN}")
        if item in _SCALARS:
            self.take(count * _SCALARS[item].size)
        elif item == _STRING:
            self._skip_strings(count)
        else:
            for _ in range(count):
                self.skip(item, depth)

    def _skip_strings(self, count: int) -> None:
        # a vocabulary has 250,000 of them: the loop is `take(number(_U64))` without the calls
        mapping, offset, last, length = self.mapping, self.offset, self.size - _U64.size, _U64.unpack_from
        for _ in range(count):
            if offset > last:
                offset = self.size + 1  # the next length lies past the end
                break
            offset += _U64.size + length(mapping, offset)[0]
        self.take(offset - self.offset)


class _TensorInfo(NamedTuple):
    """What the header says about a tensor; `offset` counts from the beginning of the data."""

    name: str
    stored_shape: tuple[int, ...]
    ggml_type: int
    offset: int


def _map(path: Path) -> tuple[mmap.mmap, MappedFile]:
    """Map the whole file; writes go to copies of its pages. With it, what tells whether the file is written to."""
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise CorruptFile(f"this is a folder: choose the .gguf file in it ({path})")
        if not stat.S_ISREG(status.st_mode):
            raise CorruptFile(f"this is not a regular file: choose a .gguf file ({path})")
        if not status.st_size:
            raise CorruptFile(f"the file is empty: download it again ({path})")
        with open(path, "rb") as file:
            mapped = MappedFile(file, path)
            if sys.platform == "win32":
                # Windows promises memory for all of it, as it does for the .safetensors that hosts open. Read-only it
                # would not, but then a node that writes to a weight would end the process, and pinning would fail
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), mapped
            # without MAP_NORESERVE (named only by Python >= 3.13) Linux refuses a writable
            # private mapping that is larger than memory and swap
            no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
            flags, protection = mmap.MAP_PRIVATE | no_reserve, mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=protection), mapped
    except FileNotFoundError:
        raise CorruptFile(f"there is no such file: check its place and refresh the list of models ({path})") from None
    except (OSError, ValueError) as error:
        if getattr(error, "winerror", None) == _PAGE_FILE_TOO_SMALL:
            remedy = "let Windows manage its size, or make it larger"
            raise CorruptFile(f"the page file is too small to open {status.st_size} bytes: {remedy} ({path})") from None
        reason = getattr(error, "strerror", None) or error
        raise CorruptFile(f"the file cannot be read, {reason}: check its permissions and the disk ({path})") from None


# What stands where "GGUF" should: first bytes, what the file is, remedy
_FOREIGN = (
    (b"version https://git-lfs", "a Git LFS pointer", "download the model itself"),
    (b"<", "a web page", "download the model itself, after logging in if its site asks for it"),
    (b"PK\x03\x04", "a zip archive or PyTorch checkpoint", "use the host's own loader, or a GGUF of this model"),
    (b"\x80", "a pickled PyTorch checkpoint", "use the host's own loader, or a GGUF of this model"),
    (b"lmgg", "a GGML file from before GGUF", "get a GGUF of this model"),
    (b"tjgg", "a GGML file from before GGUF", "get a GGUF of this model"),
    (b"\0\0\0\0\0\0\0\0", "a file of zeros, the space kept for a download", "let the download finish, or get it again"),
)


def _check_magic(head: bytes, size: int, path: Path) -> None:
    if head.startswith(b"GGUF"):
        return
    text = head.lstrip(b"\xef\xbb\xbf\t\r\n ")
    for magic, what, remedy in _FOREIGN:
        if head.startswith(magic) or text.startswith(magic):
            raise CorruptFile(f"File is {size} bytes, {what}: {remedy} ({path})")
    if head[8:9] == b"{" and _U64.unpack_from(head)[0] <= size - _U64.size:
        remedy = "name it .safetensors and use the host's own loader"
        raise CorruptFile(f"File is {size} bytes, a safetensors file: {remedy} ({path})")
    raise CorruptFile(f"this is no GGUF file, it begins with {head[:16]!r}: choose or download another ({path})")


def _check_version(version: int, path: Path) -> None:
    if version in (2, 3):
        return
    if version == 1:
        raise UnsupportedFormat(f"GGUF version 1 is outdated: get the model in version 2 or 3 ({path})")
    if version and version % 0x10000 == 0:
        remedy = "convert it with `gguf-convert-endian` or get it as little-endian"
        raise UnsupportedFormat(f"the file is big-endian: {remedy} ({path})")
    if 3 < version < 0x10000:
        raise UnsupportedFormat(f"GGUF version {version} is newer than Graft: update Graft ({path})")
    raise CorruptFile(f"there is no GGUF version {version}: {_AGAIN} ({path})")


def _check_split(metadata: Metadata, path: Path) -> None:
    parts, part = metadata.get("split.count"), metadata.get("split.no")
    if isinstance(parts, int) and parts > 1:
        which = f"part {part + 1}" if isinstance(part, int) else "one part"
        remedy = "merge the parts with `llama-gguf-split --merge` and load the result"
        raise UnsupportedFormat(f"the file is {which} of {parts} of a split model: {remedy} ({path})")


def _alignment(metadata: Metadata, path: Path) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    # the specification asks for a multiple of 8, which also lets torch view the bytes as any float
    if type(alignment) is int and 8 <= alignment <= _MAX_ALIGNMENT and alignment & (alignment - 1) == 0:
        return alignment
    problem = f"general.alignment is {_shown(alignment)}, not a power of two from 8 to {_MAX_ALIGNMENT}"
    raise CorruptFile(f"{problem}: {_AGAIN} ({path})")


def _read_metadata(cursor: _Cursor, count: int) -> Metadata:
    places: dict[str, tuple[int, int]] = {}
    for _ in range(count):
        key = cursor.name("metadata key")
        if key in places:
            raise cursor.corrupt(f"the header has the metadata key {_shown(key)} twice: {_AGAIN}")
        kind = cursor.number(_U32)
        places[key] = kind, cursor.offset
        cursor.skip(kind)
    return Metadata(cursor, places)


def _read_tensor_info(cursor: _Cursor) -> _TensorInfo:
    name = cursor.name("tensor name")
    n_dims = cursor.number(_U32)
    if n_dims > _MAX_DIMS:
        raise cursor.corrupt(f"tensor {_shown(name)} claims {n_dims} dimensions of at most {_MAX_DIMS}: {_AGAIN}")
    dims = tuple(cursor.number(_U64) for _ in range(n_dims))
    if not _is_possible(dims, cursor.size):
        raise cursor.corrupt(f"tensor {_shown(name)} claims the impossible shape {dims[::-1]}: {_AGAIN}")
    return _TensorInfo(name, dims[::-1], cursor.number(_U32), cursor.number(_U64))


def _is_possible(dims: Sequence[int], size: int) -> bool:
    """Whether anything of this shape could lie in a file of `size` bytes.

    That goes for a tensor without weights, too, but for its zeros: somebody may make something of its other dimensions.
    """
    return math.prod(dim or 1 for dim in dims) <= (_MAX_WEIGHTS_PER_BYTE * size if 0 in dims else _MAX_WEIGHTS)


def _build_tensors(
    infos: list[_TensorInfo], metadata: Metadata, mapping: mmap.mmap, start: int, alignment: int, path: Path
) -> dict[str, GGUFTensor]:
    """The tensors whose data begins at byte `start`, once all that the header says about them is checked."""
    tensors: dict[str, GGUFTensor] = {}
    for info in infos:
        if info.name in tensors:
            raise CorruptFile(f"the header has the tensor {_shown(info.name)} twice: {_AGAIN} ({path})")
        if info.offset % alignment:
            raise CorruptFile(f"tensor {_shown(info.name)} is not aligned to {alignment} bytes: {_AGAIN} ({path})")
        tensors[info.name] = _build_tensor(info, metadata, mapping, start + info.offset, path)
    _check_overlap(tensors, path)
    return tensors


def _build_tensor(info: _TensorInfo, metadata: Metadata, mapping: mmap.mmap, offset: int, path: Path) -> GGUFTensor:
    name, shown = info.name, _shown(info.name)
    fmt = by_type(info.ggml_type, f"tensor {shown}, {path}")
    *rows, columns = info.stored_shape or (1,)
    try:
        nbytes = math.prod(rows) * fmt.row_bytes(columns)
    except CorruptFile as error:
        raise CorruptFile(f"tensor {shown}: {error} ({path})") from None
    if offset + nbytes > len(mapping):
        problem = f"tensor {shown} ends at byte {offset + nbytes} and the file at byte {len(mapping)}"
        raise CorruptFile(f"{problem}: {_AGAIN} ({path})")
    shape = _logical_shape(info, metadata, len(mapping), path)
    return GGUFTensor(name, fmt, shape, info.stored_shape, offset, nbytes, _view(mapping, offset, nbytes))


def _view(mapping: mmap.mmap, offset: int, nbytes: int) -> torch.Tensor:
    """Some bytes of the mapping as uint8 [nbytes], a storage of its own.

    As slices of one storage, deepcopy and torch.save would take the whole file along with each tensor.
    """
    if not nbytes:  # frombuffer takes no empty part
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(mapping, dtype=torch.uint8, count=nbytes, offset=offset)


def _logical_shape(info: _TensorInfo, metadata: Metadata, size: int, path: Path) -> tuple[int, ...]:
    key = _ORIGINAL_SHAPE + info.name
    if key not in metadata:
        return info.stored_shape
    shape = metadata[key]
    if isinstance(shape, list) and len(shape) <= _MAX_DIMS:
        dims = tuple(dim for dim in shape if type(dim) is int and dim >= 0)
        whole = len(dims) == len(shape) and math.prod(dims) == math.prod(info.stored_shape)
        if whole and _is_possible(dims, size):
            return dims
    problem = f"{_shown(key)} is {_shown(shape)}, which does not fit the stored shape {info.stored_shape}"
    raise CorruptFile(f"{problem}: get the model from another source ({path})")


def _check_overlap(tensors: dict[str, GGUFTensor], path: Path) -> None:
    ordered = sorted((tensor for tensor in tensors.values() if tensor.nbytes), key=lambda tensor: tensor.offset)
    for first, second in pairwise(ordered):
        if first.offset + first.nbytes > second.offset:
            problem = f"tensors {_shown(first.name)} and {_shown(second.name)} overlap"
            raise CorruptFile(f"{problem}: {_AGAIN} ({path})")


def _short(number: int, units: tuple[str, str, str, str]) -> str:
    """A number in thousands of thousands, e.g. 11.9B or 6.6 GB, with the unit for each power."""
    for size, unit in zip((10**9, 10**6, 10**3), units, strict=False):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number}{units[3]}"
