"""LoRA files without a host: safetensors or GGUF of any dialect, read, checked and matched to a model's layers.

    file = load_adapters("style.safetensors")
    fitted = file.on(packed_layers(model))
    fitted.add_to(stack, strength=0.8)
    print(fitted.report(0.8).line)

Nothing is half applied: an adapter fits its layer or is left out with a reason, and a file of which nothing
fits is an error. Inside ComfyUI its own key map comes first (`AdapterFile.on`'s `names`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch

from ...kernels import AdapterError, GraftError
from ..adapters import Adapter, Patch, Region, from_host
from ..kinds import InputOFT, Opaque
from ..layers import PackedLayer
from ..packed import PackedTensor
from ..report import FileReport, cause_of, describe, family_of, is_text_encoder, modules_of, split_name
from ..residual import ResidualStack
from ..strengths import Strength
from .dialects import LayerNames, Target, bfl_control, dialect_of, extra_dialects, from_llama_cpp
from .gguf import GGUFFile, open_gguf
from .scales import weights_of

_HEADER_LIMIT = 100_000_000  # safetensors' own
# far above what real files hold, some thousands of tensors under names of a hundred characters, so that none is dear
_MAX_TENSORS = 1 << 16
_MAX_NAME = 1 << 12


class Placed(NamedTuple):
    """An adapter and where it goes.

    Attributes:
        target: the layer, or a part of it; what a host does to the difference is in the adapter.
        parameter: ``weight`` or ``bias``.
    """

    target: Target
    parameter: str
    adapter: Adapter

    @property
    def key(self) -> str:
        """Of the model's parameter."""
        return f"{self.target.layer}.{self.parameter}"

    @property
    def region(self) -> Region | None:
        return self.target.region


@dataclass(frozen=True)
class AdapterFile:
    """A file of adapters, read and not yet matched to a model.

    Attributes:
        path: where it was opened.
        state: its tensors, under names that ComfyUI's loader understands.
        metadata: what its trainer wrote about it.
        dialect: whose names it uses, see `dialect_of`.
    """

    path: Path
    state: dict[str, torch.Tensor] = field(repr=False)
    metadata: dict[str, str] = field(repr=False)
    dialect: str

    @property
    def what(self) -> str:
        """Kinds and ranks, e.g. ``rank 16``."""
        return describe(self.state)

    @property
    def trained_for(self) -> str:
        """The architecture that its names are of, or ""."""
        return family_of(self.state)

    def on(
        self,
        layers: Mapping[str, PackedLayer | Sequence[int]],
        names: Mapping[str, Any] | None = None,
        norm: str = "comfy",
    ) -> FittedAdapters:
        """Match the file to a model.

        Args:
            layers: the model's layers, or the shapes of their weights, by path.
            names: what a host calls them, ahead of our own names: ``{name: key}`` or
                ``{name: (key, (dim, start, length), function)}``.
            norm: whose norm DoRA on the output axis divides by, see `from_host`.

        Raises:
            AdapterError: nothing in the file fits the model.
        """
        shapes = {path: _shape_of(layer) for path, layer in layers.items()}
        state = bfl_control(self.state)
        modules = modules_of(state)
        known = LayerNames(shapes, {name: target_of(value) for name, value in (names or {}).items()}, modules)
        fitted = FittedAdapters(self, family_of(shapes))
        for module, fields in modules.items():
            targets = known.targets(module)
            if is_text_encoder(module):
                fitted.text_encoder.append(module)
            elif not targets or any(target.layer not in shapes for target in targets):
                fitted.missing.append(module)
            else:
                values = {name: state[key] for name, key in fields.items()}
                fitted.take(module, values, targets, shapes, norm)
        if not fitted.placed:
            raise AdapterError(f"{fitted.report(1.0).line} ({self.path})")
        return fitted


@dataclass
class FittedAdapters:
    """A file's adapters on one model.

    Attributes:
        family: the model's architecture, or "".
        placed: what fits, in the file's order.
        matched: the modules of the file that these come from.
        missing: modules that the model does not have.
        rejected: modules that do not fit, and why.
        text_encoder: modules of text encoders.
    """

    file: AdapterFile
    family: str
    placed: list[Placed] = field(default_factory=list)
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    text_encoder: list[str] = field(default_factory=list)

    def take(
        self, module: str, fields: Mapping[str, torch.Tensor], targets: Sequence[Target],
        shapes: Mapping[str, torch.Size], norm: str,
    ) -> None:  # fmt: skip
        """Place one module's adapters, all of them or none."""
        try:
            self.placed += place(fields, targets, shapes, norm)
            self.matched.append(module)
        except AdapterError as error:
            self.rejected[module] = str(error)

    def patches(self, strength: float, when: Strength | None = None) -> dict[str, list[Patch]]:
        """The adapters with a strength, by parameter, and where and when it counts."""
        found: dict[str, list[Patch]] = {}
        for placed in self.placed:
            found.setdefault(placed.key, []).append(Patch(strength, placed.adapter, region=placed.region, when=when))
        return found

    def add_to(self, stack: ResidualStack, strength: float, when: Strength | None = None) -> None:
        """Put them behind what `stack` holds."""
        for key, patches in self.patches(strength, when).items():
            for patch in patches:
                stack.add(key, patch)

    def report(self, strength: float) -> FileReport:
        """What became of the file."""
        speaks_of = [*self.matched, *self.missing, *self.rejected]
        return FileReport(
            self.file.path.name, strength, len(self.matched), len(speaks_of), self.file.what, tuple(self.missing),
            self.rejected, len(self.text_encoder),
            cause_of(speaks_of, self.missing, len(self.matched), self.family), self.family, self.file.dialect,
        )  # fmt: skip


def load_adapters(path: str | os.PathLike[str], norm: str = "merged") -> AdapterFile:
    """Read a file of adapters, safetensors or GGUF.

    Args:
        norm: how magnitudes of PEFT's are to arrive, see `extra_dialects`; ``comfy`` for a host's own merge.

    Raises:
        AdapterError: it is missing, damaged, incomplete or of another kind.
    """
    path = Path(path)
    state, metadata = read_tensors(path)
    # what holds no adapter, such as a trainer's own counters, tells nothing of names
    dialect = dialect_of(key for key in state if split_name(key) is not None)
    return AdapterFile(path, extra_dialects(state, norm), metadata, dialect)


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file's tensors under its own names (llama.cpp's as PEFT's, packed where they are), and what it says of itself.

    Raises:
        AdapterError: it is missing, damaged or of another kind.
    """
    path = Path(path)
    return _read_gguf(path) if _check_kind(path) else _read_safetensors(path)


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A file's tensors with shapes and without numbers (on ``meta``), and what its trainer wrote about it.

    Raises:
        AdapterError: it is missing, damaged or of another kind.
    """
    path = Path(path)
    if _check_kind(path):
        file = _open_gguf(path)
        return _empty(file.tensors), file.metadata.texts()
    with _opened_safetensors(path) as (opened, names):
        return _empty({key: opened.get_slice(key) for key in names}), dict(opened.metadata() or {})


def _empty(tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Of GGUF's tensors, which have a shape, or of safetensors' slices, which are asked for it."""
    shapes = {key: t.shape if hasattr(t, "shape") else t.get_shape() for key, t in tensors.items()}
    return {key: torch.empty(tuple(shape), device="meta") for key, shape in shapes.items()}


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with _opened_safetensors(path) as (opened, names):
        return {key: opened.get_tensor(key) for key in names}, dict(opened.metadata() or {})


@contextmanager
def _opened_safetensors(path: Path) -> Iterator[tuple[Any, list[str]]]:
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            names = opened.keys()
            _check_names(names, path)
            yield opened, names
    except AdapterError:
        raise
    except Exception as error:  # the reader's own errors have no common base
        raise AdapterError(f"the file is damaged ({_first_line(error)}): download it again ({path})") from error


def _open_gguf(path: Path) -> GGUFFile:
    try:
        file = open_gguf(path)
        _check_names(list(file.tensors), path)
        if not any(map(split_name, from_llama_cpp(dict.fromkeys(file.tensors, torch.empty(0))))):
            raise AdapterError(f"the file is a GGUF model: load it as a model ({path})")
    except AdapterError:
        raise
    except GraftError as error:
        raise AdapterError(str(error)) from error
    return file


def _read_gguf(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Adapters of any GGUF type, which stay packed until the factors of a layer are put together of them."""
    file = _open_gguf(path)
    try:
        weights = weights_of(file.tensors, file)
    except AdapterError:
        raise
    except GraftError as error:
        raise AdapterError(str(error)) from error
    # copies of the file's: nothing of it stays mapped
    held = {name: _copy(weight) for name, weight in weights.items()}
    return from_llama_cpp(held, file.metadata.get("adapter.lora.alpha")), file.metadata.texts()


def _copy(weight: torch.Tensor) -> torch.Tensor:
    return weight.with_packed(weight.packed.clone()) if isinstance(weight, PackedTensor) else weight.clone()


def _check_kind(path: Path) -> bool:
    """Whether it is a GGUF file, and not safetensors; what else it is makes an error."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for whoever writes to it
            raise AdapterError(f"this is not a regular file: choose a .safetensors file ({path})")
        size = status.st_size
        with open(path, "rb") as file:
            head = file.read(512)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterError(f"the file cannot be read ({reason}): is it still there? ({path})") from error
    if path.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin") or head.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise AdapterError(f"a pickle can run code, so only safetensors are read: convert it ({path})")
    if not size:
        raise AdapterError(f"the file is empty, the download has failed: get it again ({path})")
    if head.startswith(b"version https://git-lfs"):
        raise AdapterError(f"the file is {size} bytes, a Git LFS pointer: download the LoRA itself ({path})")
    if head.lstrip()[:1] == b"<":
        raise AdapterError(f"the file is a web page: the download needed a login or a click, get it again ({path})")
    if head.startswith(b"GGUF"):
        return True
    header = int.from_bytes(head[:8], "little")
    if size < 8 or header > _HEADER_LIMIT or head[8:9] not in (b"{", b""):
        raise AdapterError(f"the file is no safetensors, whatever its name: get it again ({path})")
    if header > size - 8:
        raise AdapterError(f"the file ends after {size} bytes, inside its header: download it again ({path})")
    return False


def _check_names(names: Sequence[str], path: Path) -> None:
    if len(names) > _MAX_TENSORS:
        raise AdapterError(f"the file holds {len(names)} tensors, no LoRA has so many: get it again ({path})")
    if any(len(name) > _MAX_NAME for name in names):
        raise AdapterError(f"a tensor's name in the file has over {_MAX_NAME} characters: get it again ({path})")


def place(
    fields: Mapping[str, torch.Tensor], targets: Sequence[Target], shapes: Mapping[str, torch.Size], norm: str = "comfy"
) -> list[Placed]:
    """The adapters that a module's tensors make.

    Args:
        fields: the tensors, by what stands behind the module's name (`split_name`).
        targets: the layer; or the layers that the module fuses, each of which gets its rows.
        shapes: of the weights, by layer.
        norm: whose norm DoRA on the output axis divides by, see `from_host`.

    Raises:
        AdapterError: one of them does not fit.
    """
    placed = []
    for parameter, value in _values(fields):
        if len(targets) == 1:
            whole = shapes[targets[0].layer]
            shape = whole if parameter == "weight" else whole[:1]
            parts = [(targets[0], from_host(value, shape, targets[0].region, targets[0].function, norm))]
        else:
            parts = _apart(value, parameter, targets, shapes, norm)
        for target, adapter in parts:
            if isinstance(adapter, Opaque):
                raise AdapterError(f"{adapter.reason}: it can only be loaded with the host's own nodes")
            placed.append(Placed(target._replace(function=None), parameter, adapter))
    return placed


def _apart(
    value: Any, parameter: str, targets: Sequence[Target], shapes: Mapping[str, torch.Size], norm: str
) -> list[tuple[Target, Adapter]]:
    """An adapter of a fused layer, by the layers that a model has in its place."""
    inner = {shapes[target.layer][1:] for target in targets}
    if len(inner) > 1 or any(target.function is not None for target in targets):
        raise AdapterError("the layers that it fuses differ in this model: it was made for another one")
    rows = [shapes[t.layer][0] if t.region is None else t.region.length for t in targets]
    whole = torch.Size((sum(rows), *(inner.pop() if parameter == "weight" else ())))
    adapter = from_host(value, whole, norm=norm)
    starts = accumulate(rows, initial=0)
    return [(t, adapter.rows(start, count)) for t, start, count in zip(targets, starts, rows, strict=False)]


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def _shape_of(layer: PackedLayer | Sequence[int]) -> torch.Size:
    return torch.Size(layer.logical_shape if isinstance(layer, PackedLayer) else layer)


def target_of(value: Any) -> Target:
    """A host's key, or its ``(key, offset[, function])``."""
    if isinstance(value, str):
        return Target(value)
    key, offset, function = (*value, None, None)[:3]
    return Target(key, None if offset is None else Region(*offset), function)


def host_key_of(target: Target) -> Any:
    """The way back: a target as it stands in hosts' maps, a parameter or ``(parameter, part[, function])``."""
    key, region, function = target
    part = None if region is None else tuple(region)
    if function is not None:
        return key, part, function
    return key if part is None else (key, part)


_UPS = (".lora_up.weight", ".lora_B.weight", ".lora_B", "_lora.up.weight", ".lora.up.weight",
        ".lora_linear_layer.up.weight")  # fmt: skip
_DOWNS = (".lora_down.weight", ".lora_A.weight", ".lora_A", "_lora.down.weight", ".lora.down.weight",
          ".lora_linear_layer.down.weight")  # fmt: skip
_LOHA = (".hada_w1_a", ".hada_w1_b", ".alpha", ".hada_w2_a", ".hada_w2_b", ".hada_t1", ".hada_t2", ".dora_scale")
_LOKR = (".lokr_w1", ".lokr_w2", ".alpha", ".lokr_w1_a", ".lokr_w1_b", ".lokr_w2_a", ".lokr_w2_b", ".lokr_t2",
         ".dora_scale")  # fmt: skip
_GLORA = (".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight", ".alpha", ".dora_scale")
_OFT = (".oft_blocks", ".rescale", ".alpha", ".dora_scale")
_WEIGHT_DIFFS = {".diff": "diff", ".w_norm": "diff", ".set_weight": "set"}
_BIAS_DIFFS = (".diff_b", ".b_norm")


def _values(fields: Mapping[str, torch.Tensor]) -> list[tuple[str, Any]]:
    """What a module's tensors say: ``(weight or bias, value)``, the value as hosts hold it.

    Raises:
        AdapterError: they say nothing.
    """
    up, down = (next((fields[n] for n in names if n in fields), None) for names in (_UPS, _DOWNS))
    found: list[tuple[str, Any]] = []
    if up is not None or down is not None:
        reshape = fields.get(".reshape_weight")
        parts = (fields.get(n) for n in (".alpha", ".lora_mid.weight", ".dora_scale"))
        found.append(("weight", ("lora", (up, down, *parts, reshape))))
    for kind, names in (("loha", _LOHA), ("lokr", _LOKR), ("glora", _GLORA)):
        own = [n for n in names if n not in (".alpha", ".dora_scale")]
        if any(n in fields for n in own):
            found.append(("weight", (kind, tuple(fields.get(n) for n in names))))
    if ".oft_blocks" in fields:
        found.append(("weight", ("oft", tuple(fields.get(n) for n in _OFT))))
    found += [("weight", InputOFT(fields[n])) for n in fields if n.startswith(".oft_R")]
    found += [("weight", (kind, (fields[n],))) for n, kind in _WEIGHT_DIFFS.items() if n in fields]
    found += [("bias", ("diff", (fields[n],))) for n in _BIAS_DIFFS if n in fields]
    if not found:
        raise AdapterError(f"there is only {', '.join(n.lstrip('.') for n in fields)}: the file is incomplete")
    return found


__all__ = ["AdapterFile", "FittedAdapters", "Placed", "host_key_of", "load_adapters", "place", "target_of"]
