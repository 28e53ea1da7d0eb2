"""LoRA files without a host: safetensors of any dialect, read, checked and matched to a model's layers.

    file = load_adapters("style.safetensors")
    fitted = file.on(packed_layers(model))
    fitted.add_to(stack, strength=0.8)
    print(fitted.report(0.8).line)

Nothing is half applied: an adapter fits its layer or is left out with a reason, and a file of which nothing
fits is an error. Inside ComfyUI its own key map comes first (`AdapterFile.on`'s `names`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch

from ..kernels import AdapterError
from .adapters import Adapter, Patch, Region, from_host
from .dialects import Target, bfl_control, dialect_of, extra_dialects, module_names
from .kinds import InputOFT, Opaque
from .layers import PackedLayer
from .report import FileReport, cause_of, describe, family_of, is_text_encoder, modules_of, split_name
from .residual import ResidualStack

_HEADER_LIMIT = 100_000_000  # safetensors' own


class Placed(NamedTuple):
    """An adapter and where it goes: a parameter of the model, or a part of it."""

    key: str
    region: Region | None
    adapter: Adapter


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
        known = module_names(shapes) | {name: _target(value) for name, value in (names or {}).items()}
        fitted = FittedAdapters(self, family_of(shapes))
        state = bfl_control(self.state)
        for module, fields in modules_of(state).items():
            target = known.get(module)
            if is_text_encoder(module):
                fitted.text_encoder.append(module)
            elif target is None or target.key.removesuffix(".weight") not in shapes:
                fitted.missing.append(module)
            else:
                values = {name: state[key] for name, key in fields.items()}
                fitted.take(module, values, target, shapes[target.key.removesuffix(".weight")], norm)
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

    def take(self, module: str, fields: dict[str, torch.Tensor], target: Target, shape: torch.Size, norm: str) -> None:
        """Place one module's adapters, all of them or none."""
        key, region, function = target
        placed = []
        try:
            for parameter, value in _values(fields):
                whole = shape if parameter == "weight" else shape[:1]
                adapter = from_host(value, whole, region, function, norm)
                if isinstance(adapter, Opaque):
                    raise AdapterError(f"{adapter.reason}: it can only be loaded with the host's own nodes")
                placed.append(Placed(key.removesuffix("weight") + parameter, region, adapter))
        except AdapterError as error:
            self.rejected[module] = str(error)
            return
        self.placed += placed
        self.matched.append(module)

    def patches(self, strength: float) -> dict[str, list[Patch]]:
        """The adapters with a strength, by parameter."""
        found: dict[str, list[Patch]] = {}
        for key, region, adapter in self.placed:
            found.setdefault(key, []).append(Patch(strength, adapter, region=region))
        return found

    def add_to(self, stack: ResidualStack, strength: float) -> None:
        """Put them behind what `stack` holds."""
        for key, patches in self.patches(strength).items():
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
    """Read a safetensors file of adapters.

    Args:
        norm: how magnitudes of PEFT's are to arrive, see `extra_dialects`; ``comfy`` for a host's own merge.

    Raises:
        AdapterError: it is missing, damaged, incomplete or of another kind.
    """
    path = Path(path)
    _check_kind(path)
    try:
        with safetensors.safe_open(path, framework="pt") as opened:
            state = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118, it is no mapping
            metadata = dict(opened.metadata() or {})
    except Exception as error:  # the reader's own errors have no common base
        raise AdapterError(f"the file is damaged ({_first_line(error)}): download it again ({path})") from error
    # what holds no adapter, such as a trainer's own counters, tells nothing of names
    dialect = dialect_of(key for key in state if split_name(key) is not None)
    return AdapterFile(path, extra_dialects(state, norm), metadata, dialect)


def _check_kind(path: Path) -> None:
    """Say what the file is, where it is no safetensors."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise AdapterError(f"the file cannot be read ({error.strerror}): is it still there? ({path})") from error
    if path.suffix.lower() in (".pt", ".pth", ".ckpt", ".bin") or head.startswith((b"PK\x03\x04", b"\x80\x02")):
        raise AdapterError(f"a pickle can run code, so only safetensors are read: convert it ({path})")
    if not size:
        raise AdapterError(f"the file is empty, the download has failed: get it again ({path})")
    if head.startswith(b"version https://git-lfs"):
        raise AdapterError(f"the file is {size} bytes, a Git LFS pointer: download the LoRA itself ({path})")
    if head.lstrip()[:1] == b"<":
        raise AdapterError(f"the file is a web page: the download needed a login or a click, get it again ({path})")
    if head.startswith(b"GGUF"):
        raise AdapterError(f"the file is a GGUF model: load it as a model ({path})")
    header = int.from_bytes(head[:8], "little")
    if size < 8 or header > _HEADER_LIMIT or head[8:9] not in (b"{", b""):
        raise AdapterError(f"the file is no safetensors, whatever its name: get it again ({path})")
    if header > size - 8:
        raise AdapterError(f"the file ends after {size} bytes, inside its header: download it again ({path})")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:120]


def _shape_of(layer: PackedLayer | Sequence[int]) -> torch.Size:
    return torch.Size(layer.logical_shape if isinstance(layer, PackedLayer) else layer)


def _target(value: Any) -> Target:
    """A host's key, or its ``(key, offset[, function])``."""
    if isinstance(value, str):
        return Target(value)
    key, offset, function = (*value, None, None)[:3]
    return Target(key, None if offset is None else Region(*offset), function)


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


def _values(fields: dict[str, torch.Tensor]) -> list[tuple[str, Any]]:
    """What a module's tensors say: ``(weight or bias, value)``, the value as hosts hold it.

    Raises:
        AdapterError: they say nothing.
    """
    up, down = (next((fields[n] for n in names if n in fields), None) for names in (_UPS, _DOWNS))
    found: list[tuple[str, Any]] = []
    if up is not None or down is not None:
        reshape = fields.get(".reshape_weight")
        parts = (fields.get(n) for n in (".alpha", ".lora_mid.weight", ".dora_scale"))
        found.append(("weight", ("lora", (up, down, *parts, None if reshape is None else reshape.tolist()))))
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


__all__ = ["AdapterFile", "FittedAdapters", "Placed", "load_adapters"]
