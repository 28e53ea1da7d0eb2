"""One tiny model in both forms: does Graft load it, is the output the host's, is a LoRA's effect."""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.supported_models
import nodes
import numpy as np
import torch
from architectures import plain_weight
from generation import dense_model, distance, fingerprint, forget
from gguf_samples import write_gguf
from tiny_models import TinyModel

TYPES = ("Q4_K", "Q8_0", "BF16", "Q6_K", "Q5_0", "F16", "Q3_K", "IQ4_NL", "Q5_K", "Q4_0")

PACKINGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "weights": ("*weight", TYPES),
    "matrices": ("*", TYPES),
    "halves": ("*", ("BF16",)),
}
"""Names of the tensors of two and more dimensions that are packed, and in what, one after the other: converters write
all of these, and hosts round where a weight is BF16."""

EVERY = os.environ.get("GRAFT_ARCHITECTURES")
"""A file for the results of all of them."""

LORA_LAYERS = 8
FUSED = ("qkv", "to_kv", "kv", "linear1", "in_proj", "to_qkv", "modulation", "adaLN")


@dataclass
class Result:
    """Relative errors of a Graft model against the host's own, the worst of what was packed how.

    Attributes:
        summary: what the loader says of it.
        base: of the model's output.
        lora: of a LoRA's effect on that, or None where the file has no layer that one could go to.
        restored: the output without the LoRA, and all bytes, are what they were before.
    """

    summary: str
    base: float
    lora: float | None
    restored: bool


def keep(name: str, packing: str, **result: object) -> None:
    """Write a result down for the table, where one is made."""
    if not EVERY:
        return
    path = Path(EVERY)
    results = json.loads(path.read_text()) if path.is_file() else {}
    results.setdefault(name, {})[packing] = result
    path.write_text(json.dumps(results))


def known_classes() -> dict[str, type]:
    """The host's classes of diffusion models by name."""
    return {model.__name__: model for model in comfy.supported_models.models}


def module_of(tiny: TinyModel) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The host's module, of which names, shapes and buffers count, and no weight, and the arguments it was made of.

    Newer hosts have more of them: what this one does not know is left out.
    """
    host_class, chosen = known_classes()[tiny.host_class], dict(tiny.config)
    beside = {name: torch.zeros(shape) for name, shape in tiny.beside.items()}
    while True:
        config = host_class({**host_class.unet_config, **chosen})
        config.unet_config.update(chosen)
        config.custom_operations = comfy.ops.disable_weight_init
        config.set_inference_dtype(torch.float32, None)
        try:
            with _marked_where_empty():
                return config.get_model(dict(beside), "", device=torch.device("cpu")).diffusion_model, chosen
        except TypeError as e:
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(e))
            if unknown is None or unknown[1] not in chosen:
                raise
            del chosen[unknown[1]]


@contextmanager
def _marked_where_empty() -> Iterator[None]:
    """Memory that nothing is written to is NaN, so that it can be told from a buffer with a meaning."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def write_tiny(tiny: TinyModel, module: torch.nn.Module, packing: str, path: Path, seed: int = 0) -> Path:
    """A GGUF file of seeded weights; what is not packed, and has one dimension, is F32."""
    rng = np.random.default_rng(seed)
    parameters = {name for name, _ in module.named_parameters()}
    state = {}
    for name, value in module.state_dict().items():
        random = name in parameters or bool(value.isnan().any())
        state[name] = torch.from_numpy(plain_weight(name, tuple(value.shape), rng)).float() if random else value
    if tiny.named is not None:
        state = tiny.named(state)
    for name, shape in tiny.beside.items():
        state[name] = torch.from_numpy(plain_weight(name, shape, rng)).float()
    pattern, cycle = PACKINGS[packing]
    packed = [name for name, value in state.items() if value.dim() > 1 and fnmatch.fnmatchcase(name, pattern)]
    types = {name: cycle[i % len(cycle)] for i, name in enumerate(packed)}
    tensors = {name: (value.detach().numpy(), types.get(name, "F32")) for name, value in state.items()}
    return write_gguf(path, tensors, "tiny")


@contextmanager
def sizes_of(tiny: TinyModel) -> Iterator[torch.nn.Module]:
    """The host detects the class by the file's tensors, and takes its sizes from `tiny`; gives the module."""
    modules = {}
    for place, arguments in tiny.within.items():
        owner, _, name = place.rpartition(".")
        owner = importlib.import_module(owner)
        modules[owner, name] = getattr(owner, name)
        setattr(owner, name, partial(_made_with, modules[owner, name], arguments))
    detect = comfy.model_detection.model_config_from_unet_config

    def detect_tiny(unet_config: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        config = detect({**unet_config, **tiny.shown}, *args, **kwargs)
        if config is not None and type(config).__name__ == tiny.host_class:
            config.unet_config.update(sizes)
        return config

    try:
        module, sizes = module_of(tiny)
        comfy.model_detection.model_config_from_unet_config = detect_tiny
        yield module
    finally:
        for (owner, name), value in modules.items():
            setattr(owner, name, value)
        comfy.model_detection.model_config_from_unet_config = detect


def _made_with(module: type, arguments: Mapping[str, Any], *args: Any, **kwargs: Any) -> torch.nn.Module:
    return module(*args, **{**kwargs, **arguments})


def output_of(patcher: Any, tiny: TinyModel) -> torch.Tensor:
    """What the diffusion model gives in a step of the host's sampler, or called as its nodes call it."""
    noise = partial(random_noise, torch.Generator().manual_seed(1))
    model = patcher.model.diffusion_model
    if tiny.called is not None:
        comfy.model_management.load_models_gpu([patcher])
        return _flat(tiny.called(model, noise))
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        context = None if tiny.context is None else noise(1, *tiny.context)
        conditioning = [[context, tiny.brings(noise)]]
        nodes.common_ksampler(
            patcher, 3, 1, tiny.cfg, "euler", "simple", conditioning, conditioning, {"samples": _latent(tiny)}
        )
    finally:
        handle.remove()
    return _flat(seen)


def random_noise(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _latent(tiny: TinyModel) -> Any:
    if isinstance(tiny.latent[0], int):
        return torch.zeros(tiny.latent)
    from comfy.nested_tensor import NestedTensor

    return NestedTensor([torch.zeros(shape) for shape in tiny.latent])


def _flat(output: Any) -> torch.Tensor:
    """All numbers in it."""
    if isinstance(output, torch.Tensor):
        return output.float().flatten()
    parts = output.values() if isinstance(output, Mapping) else output
    return torch.cat([_flat(part) for part in parts if isinstance(part, (torch.Tensor, Mapping, list, tuple))])


def lora_for(graft: Any, dense: Any, seed: int = 5, rank: int = 4, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """A LoRA in the model's own names on layers with packed weights, spread over the model."""
    state, layers = dense.model.state_dict(), [
        path for path, layer in graft.graft.layers.items()
        if layer.fmt is not None and len(layer.logical_shape) > 1 and not isinstance(layer, torch.nn.Embedding)
    ]  # fmt: skip
    chosen = layers[:: max(1, len(layers) // LORA_LAYERS)][:LORA_LAYERS]
    fused = [path for path in layers if any(word in path for word in FUSED)]
    g, lora = torch.Generator().manual_seed(seed), {}
    for path in dict.fromkeys([*chosen, *fused[:1]]):
        shape = state[f"{path}.weight"].shape
        size = (scale / (shape[1:].numel() * rank) ** 0.5) ** 0.5
        lora[f"{path}.lora_A.weight"] = size * torch.randn(rank, *shape[1:], generator=g)
        lora[f"{path}.lora_B.weight"] = size * torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=g)
    return lora


def with_lora(patcher: Any, lora: Mapping[str, torch.Tensor]) -> Any:
    """As the host's nodes do, and again on the first half of the rows of one layer, as for files that split it."""
    keys = comfy.lora.model_lora_keys_unet(patcher.model, {})
    name = next(reversed(lora)).removesuffix(".lora_B.weight")
    up, down = lora[f"{name}.lora_B.weight"], lora[f"{name}.lora_A.weight"]
    half = up.shape[0] // 2
    part = {"half.lora_A.weight": down, "half.lora_B.weight": up[:half]} if half else {}
    patched = patcher.clone()
    patches = comfy.lora.load_lora({**lora, **part}, {**keys, "half": (keys[name], (0, 0, half))})
    patched.add_patches(patches, 0.8)
    return patched


@torch.inference_mode()
def compare(pack: Any, tiny: TinyModel, packing: str, folder: Path) -> Result:
    """Load a file of it both ways and measure.

    Raises:
        AssertionError: the host took it for another class, or its output says nothing.
    """
    path = folder / f"{tiny.host_class}-{packing}.gguf"
    try:
        with sizes_of(tiny) as module:
            write_tiny(tiny, module, packing, path)
            graft = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
            dense = dense_model(pack, path)
        for model in (graft, dense):
            name = type(model.model.model_config).__name__
            assert name == tiny.host_class, f"the host takes it for {name}"
        want, got = output_of(dense, tiny), output_of(graft, tiny)
        assert want.isfinite().all() and want.norm() > 0, "the host's output says nothing"
        lora = {} if tiny.called else lora_for(graft, dense)
        error, bytes_before = None, fingerprint(graft)
        if lora:
            changed = output_of(with_lora(graft, lora), tiny) - got
            expected = output_of(with_lora(dense, lora), tiny) - want
            assert expected.norm() > 0.001 * want.norm(), "the LoRA does nothing"
            error = distance(changed, expected)
        restored = torch.equal(output_of(graft, tiny), got) and fingerprint(graft) == bytes_before
        return Result(graft.graft.summary, distance(got, want), error, restored)
    finally:
        graft = dense = None
        forget()
        path.unlink(missing_ok=True)
