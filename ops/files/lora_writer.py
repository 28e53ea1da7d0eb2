"""Writing LoRA files: safetensors or GGUF, under the names that other programs load.

    kohya       lora_unet_<path with _>.lora_down.weight, .lora_up.weight, .alpha
    diffusers   <name of the layer there>.lora_A.weight, .lora_B.weight

What is no product of two factors is a full difference, ``.diff`` of a weight and ``.diff_b`` of a bias, which hosts
load beside either.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ...kernels import GraftError, by_name
from ..extract import Change
from ..kinds import Region
from ..quantize import quantize
from .writer import NewTensor, check_place, write_gguf

FORMS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "Q8_0 (GGUF)": None}
"""What a file may hold its numbers in."""

_LARGEST_HALF = 65504.0


class Name(NamedTuple):
    """What a host calls a layer, or some rows of it.

    Attributes:
        name: without the part behind it that says which factor.
        region: rows; None for all of it.
        function: what the host passes the difference through on the way in: a permutation of rows that is its own
            inverse.
    """

    name: str
    region: Region | None = None
    function: Callable[[torch.Tensor], torch.Tensor] | None = None


def kohya_module(path: str) -> str:
    """What kohya calls a layer of a diffusion model."""
    return f"lora_unet_{path.removeprefix('diffusion_model.').replace('.', '_')}"


def kohya_state(changes: Mapping[str, Change]) -> dict[str, torch.Tensor]:
    """The tensors of a file under kohya's names.

    Args:
        changes: by parameter, e.g. ``blocks.0.attn.qkv.weight``.
    """
    state: dict[str, torch.Tensor] = {}
    for key, change in changes.items():
        module = kohya_module(key.rpartition(".")[0])
        if _is_full(key, change):
            state[_full_name(module, key)] = change.matrix().reshape(change.shape)
            continue
        up, down = _shaped(change)
        state |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        state[f"{module}.alpha"] = torch.tensor(float(change.rank))
    return state


def diffusers_state(changes: Mapping[str, Change], names: Mapping[str, Sequence[Name]]) -> dict[str, torch.Tensor]:
    """The tensors of a file under diffusers' names.

    Args:
        changes: as for `kohya_state`.
        names: by parameter, what diffusers calls it, or its parts, which are all of its rows; a layer that has none
            goes by its own path, as trainers write it.
    """
    state: dict[str, torch.Tensor] = {}
    for key, change in changes.items():
        own = f"diffusion_model.{key.rpartition('.')[0]}"
        if _is_full(key, change):
            state[_full_name(own, key)] = change.matrix().reshape(change.shape)
            continue
        up, down = _shaped(change)
        for name, region, function in names.get(key) or (Name(own),):
            part = up if region is None else up.narrow(0, region.start, region.length)
            state[f"{name}.lora_A.weight"] = down
            state[f"{name}.lora_B.weight"] = part if function is None else function(part)
    return state


def _is_full(key: str, change: Change) -> bool:
    """Whether it is written in full: factors have names at layers' weights alone."""
    return change.full is not None or not key.endswith(".weight")


def _full_name(module: str, key: str) -> str:
    """Of a difference in full; what is neither weight nor bias has no other name than the model's."""
    endings = {"weight": ".diff", "bias": ".diff_b"}
    parameter = key.rpartition(".")[2]
    return module + endings[parameter] if parameter in endings else f"diffusion_model.{key}.diff"


def _shaped(change: Change) -> tuple[torch.Tensor, torch.Tensor]:
    """Up and down as convolutions have them, where it is one."""
    assert change.up is not None and change.down is not None
    inner = change.shape[1:]
    return change.up.reshape(*change.up.shape, *(1 for _ in inner[1:])), change.down.reshape(-1, *inner)


def write_lora(
    path: str | os.PathLike[str], state: Mapping[str, torch.Tensor], form: str, metadata: Mapping[str, str]
) -> int:
    """Write a LoRA file, whole or not at all.

    Args:
        form: a key of `FORMS`; in GGUF, rows that do not fill blocks of Q8_0 are F16, and single numbers F32.

    Returns:
        the file's size in bytes.

    Raises:
        GraftError: the place is taken or cannot be written to, or a number does not fit.
    """
    path, dtype = Path(path), FORMS[form]
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise GraftError(f"{name} holds numbers that are not finite: the LoRA or model is broken ({path})")
    if dtype is None:
        tensors = [_new_tensor(name, tensor) for name, tensor in state.items()]
        return write_gguf(path, {"general.type": "adapter", "adapter.type": "lora", **metadata}, tensors)
    for name, tensor in state.items():
        if dtype == torch.float16 and float(tensor.abs().max()) > _LARGEST_HALF:
            raise GraftError(f"{name} holds {float(tensor.abs().max()):.3g}, more than fp16 can: choose bf16 ({path})")
    # a rank above 256 is no number of bf16, and alpha over rank has to be 1
    cast = {name: tensor.to(dtype) if tensor.dim() else tensor for name, tensor in state.items()}
    return write_tensors(path, cast, metadata)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Write a safetensors file, whole or not at all, and return its size in bytes.

    Raises:
        GraftError: the place is taken or cannot be written to.
    """
    plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    check_place(path, sum(tensor.nbytes for tensor in plain.values()))
    part = path.with_name(f"{path.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(plain, part, {"format": "pt", **metadata})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise GraftError(f"the file cannot be written, {error}: check the folder and the disk ({path})") from error
    finally:
        part.unlink(missing_ok=True)
    return path.stat().st_size


def _new_tensor(name: str, tensor: torch.Tensor) -> NewTensor:
    columns = tensor.shape[-1] if tensor.dim() else 1
    fmt = by_name("F32" if tensor.dim() < 2 else "F16" if columns % by_name("Q8_0").block_size else "Q8_0")

    def data() -> Iterator[torch.Tensor]:
        yield quantize(tensor.reshape(-1, columns), fmt)

    return NewTensor(name, fmt, tuple(tensor.shape), data)


__all__ = ["FORMS", "Name", "diffusers_state", "kohya_module", "kohya_state", "write_lora", "write_tensors"]
