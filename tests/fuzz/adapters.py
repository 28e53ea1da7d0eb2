"""The LoRA loader: a file is read and matched to models, and what is taken runs beside their layers."""

from __future__ import annotations

import functools

import torch
from graft.kernels import AdapterError
from graft.ops import layers
from graft.ops.factors import FactorCache
from graft.ops.files.lora import FittedAdapters, load_adapters
from graft.ops.residual import ResidualStack

from .bounds import bounded, sentence, written
from .choices import Choices
from .lora_files import H
from .lora_files import file as make_file

SUFFIX = ".safetensors"
_FLUX = {"img_in": (H, 16), "double_blocks.0.img_attn.qkv": (3 * H, H)}
_UNET = {"input_blocks.0.0": (16, 4, 3, 3)}


@functools.cache
def models() -> tuple[dict[str, layers.PackedLayer], ...]:
    """Two small models."""
    found = []
    for shapes in (_FLUX, _UNET):
        model: dict[str, layers.PackedLayer] = {}
        for name, shape in shapes.items():
            convolution = len(shape) == 4
            layer = layers.Conv2d(shape[1], shape[0], shape[2:]) if convolution else layers.Linear(shape[1], shape[0])
            layer.load_weight(torch.full(shape, 0.125))
            model[name] = layer
        found.append(model)
    return tuple(found)


def make(choices: Choices) -> bytes:
    return make_file(choices)


@torch.no_grad()
def check(data: bytes) -> None:
    path = written(data, SUFFIX)
    with bounded(len(data)):
        for norm in ("merged", "comfy"):
            try:
                file = load_adapters(path, norm)
            except AdapterError as error:
                sentence(error)
                return
        for model in models():
            try:
                fitted = file.on(model)
            except AdapterError as error:
                assert str(error).endswith(f"({path})")
                sentence(error)
                continue
            sentence(Exception(fitted.report(1.0).line))
            if len(data) % 4 == 0:  # which takes longer than all the rest
                _run(model, fitted)


def _run(model: dict[str, layers.PackedLayer], fitted: FittedAdapters) -> None:
    stack = ResidualStack()
    fitted.add_to(stack, 0.5)
    stack.build(model, FactorCache())
    with stack.active(model, torch.device("cpu")):
        for name in {key.rpartition(".")[0] for key in stack.patches}:
            layer, wide = model[name], list(model[name].logical_shape)
            for patch in stack.patches.get(f"{name}.weight", ()):
                wide[1] = max(wide[1], getattr(patch.adapter, "shape", wide)[1])
            y = layer(torch.ones(1, *((wide[1], 3, 3) if len(wide) == 4 else (wide[1],))))
            assert y.dtype == torch.float32 and y.shape[0] == 1
    assert all(layer.residual is None for layer in model.values())
