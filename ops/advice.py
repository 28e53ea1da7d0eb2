"""Where a model runs and what would make it faster, in words for the node that has loaded it."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass

import torch

from ..kernels import Choice, plain
from .report import size_text

_ROOM = 2 << 30
"""Bytes that a card needs for what is computed, at the least (README, "Which file for my card")."""

_WAYS = {
    "triton": "weights are decoded on the card, in Triton kernels",
    "cpu": "weights are decoded by libgguf",
    "torch": "weights are decoded by torch code",
}


@dataclass(frozen=True)
class Machine:
    """What a model runs on.

    Attributes:
        device: its kind, as torch calls it.
        name: of the card, or the processor.
        memory: bytes that it has.
        capability: of an NVIDIA card, such as ``(8, 6)``; None for others.
        is_amd: whether torch is one for ROCm.
        system: ``Linux``, ``Windows`` or ``Darwin``.
        is_portable: whether it is the portable Windows version, which has a Python of its own.
        is_dynamic: whether the host's dynamic VRAM is on.
    """

    device: str
    name: str
    memory: int
    capability: tuple[int, int] | None = None
    is_amd: bool = False
    system: str = "Linux"
    is_portable: bool = False
    is_dynamic: bool = False

    @classmethod
    def of(cls, device: torch.device, memory: int, is_dynamic: bool = False) -> Machine:
        """This one, for a model on `device` with so much memory."""
        is_cuda, is_amd = device.type == "cuda", torch.version.hip is not None
        return cls(
            device.type, torch.cuda.get_device_name(device) if is_cuda else _name(device.type), memory,
            torch.cuda.get_device_capability(device) if is_cuda and not is_amd else None, is_amd, platform.system(),
            "python_embeded" in sys.executable, is_dynamic,
        )  # fmt: skip


def _name(kind: str) -> str:
    return {"cpu": "the processor", "mps": "Apple's GPU", "xpu": "an Intel GPU"}.get(kind, kind)


def advice(machine: Machine, choice: Choice, dtype: torch.dtype, nbytes: int) -> list[str]:
    """Which card and how much of it, which way, and what would be faster and how to get it; a line each.

    Args:
        choice: what decodes the weights.
        dtype: that it computes in.
        nbytes: of the model.
    """
    return list(map(plain, [_place(machine, nbytes), _WAYS[choice.name], *_faster(machine, choice, dtype)]))


def _place(machine: Machine, nbytes: int) -> str:
    line = f"runs on {machine.name}: the model takes {size_text(nbytes)} of {size_text(machine.memory)}"
    if machine.device == "cpu":
        return line
    if machine.is_dynamic:
        line += ", dynamic VRAM is on"
    if nbytes + _ROOM <= machine.memory:
        return line
    fits = max(machine.memory - _ROOM, 0)
    return (
        f"{line}. ComfyUI keeps a part of it in main memory, which is slower: a file of up to {size_text(fits)} stays "
        "on the card"
    )


def _faster(machine: Machine, choice: Choice, dtype: torch.dtype) -> list[str]:
    lines = []
    if choice.name == "torch" and choice.reason != "as chosen":
        lines += _without_kernels(machine, choice.reason)
    if dtype == torch.bfloat16 and machine.capability is not None and machine.capability < (8, 0):
        lines.append("faster: choose fp16 in compute_dtype, this card has no bf16 units")
    return lines


def _without_kernels(machine: Machine, reason: str) -> list[str]:
    """How to get what decodes faster than torch code."""
    pip = "python_embeded\\python.exe -m pip" if machine.is_portable else "python -m pip"
    where = "in the folder of ComfyUI_windows_portable" if machine.is_portable else "with ComfyUI's Python"
    if machine.device == "cpu":
        is_missing = "not installed" in reason
        return [f"faster: run {pip} install libgguf {where} and start ComfyUI again"] if is_missing else []
    if machine.device != "cuda":
        return []
    if machine.is_amd and machine.system == "Windows":
        return ["faster on Linux: PyTorch for ROCm brings Triton there. Triton for AMD cards on Windows was not tried"]
    if machine.is_amd:
        return ["faster: install PyTorch for ROCm from pytorch.org, which brings Triton, and start ComfyUI again"]
    if machine.capability is not None and machine.capability < (8, 0) and "trial launch" in reason:
        return ["Triton is made for NVIDIA cards from the RTX 30 series on: this one has no faster way"]
    name = "triton-windows" if machine.system == "Windows" else "triton"
    return [f"faster: run {pip} install -U {name} {where} and start ComfyUI again"]
