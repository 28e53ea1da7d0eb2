"""Ways to multiply by a packed weight: ours, and what it is compared with."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from graft.kernels import dispatch, int8
from graft.kernels.formats import Format

from .setting import RANK

Linear = Callable[[torch.Tensor, torch.Tensor, Format, "dispatch.LowRank | None"], torch.Tensor]


def graft_linear(backend: str) -> Linear:
    def run(x, data, fmt, residual):
        return dispatch.linear(x, data, fmt, None, residual, backend=backend)

    return run


def int8_linear(backend: str) -> Linear:
    """Ours in int8, where a layer's inputs allow it; the scales of a weight's rows are worked out once."""
    scales: dict[int, torch.Tensor] = {}
    usual = graft_linear(backend)

    def run(x, data, fmt, residual):
        if x.shape[-1] % int8.BLOCK:
            return usual(x, data, fmt, residual)
        if data.data_ptr() not in scales:
            scales[data.data_ptr()], _ = int8.prepare(data, fmt, (data.shape[0], x.shape[-1]), backend)
        return int8.linear(x, data, fmt, scales[data.data_ptr()], None, residual, backend)

    return run


def torch_linear(x: torch.Tensor, data: torch.Tensor, fmt: Format, residual: dispatch.LowRank | None) -> torch.Tensor:
    """A decode in torch into fresh memory, LoRAs patched into the weight as a host does it."""
    shape = (data.shape[0], x.shape[-1])
    return F.linear(x, patched(dispatch.dequantize(data, fmt, shape, x.dtype, backend="torch"), residual))


def patched(weight: torch.Tensor, residual: dispatch.LowRank | None) -> torch.Tensor:
    for start in range(0, residual.down.shape[0] if residual else 0, RANK):
        part = slice(start, start + RANK)
        weight = weight + residual.ups[0][2][:, part] @ residual.down[part]
    return weight


@cache
def city96_decode(folder: str) -> ModuleType:
    """`dequant.py` of a checkout of ComfyUI-GGUF."""
    spec = importlib.util.spec_from_file_location(f"city96_{abs(hash(folder))}", Path(folder) / "dequant.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def others(fmt: Format) -> dict[str, Linear]:
    """What to compare with besides `F.linear`: those that have a decode of `fmt` on the GPU."""
    found: dict[str, Linear] = {"torch decode": torch_linear}
    for name, variable in (("city96", "COMFYUI_GGUF"), ("city96 triton", "COMFYUI_GGUF_TRITON")):
        if not os.environ.get(variable):
            continue
        from gguf import GGMLQuantizationType

        module, kind = city96_decode(os.environ[variable]), GGMLQuantizationType[fmt.name]
        if kind not in module.dequantize_functions:
            continue

        def run(x, data, fmt, residual, module=module, kind=kind):
            weight = module.dequantize(data, kind, (data.shape[0], x.shape[-1]), dtype=None).to(x.dtype)
            return F.linear(x, patched(weight, residual))

        found[name] = run
    return found
