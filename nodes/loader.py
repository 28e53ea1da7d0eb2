"""Loading a GGUF diffusion model: file, architecture, patcher."""

from __future__ import annotations

import functools
import inspect
import itertools
import logging
import os
from collections.abc import Iterable
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.sd
import comfy.utils
import torch

from .. import kernels
from ..kernels import CorruptFile, UnsupportedFormat, int8
from ..ops.advice import Machine, advice
from ..ops.files.completeness import missing_parts, missing_within, stray_block
from ..ops.files.gguf import GGUFFile, describe, diffusion_tensors, module_tensors, open_gguf
from ..ops.files.scales import weights_of
from ..ops.files.shapes import mismatches, other_ranks, refitted, with_leading_ones
from ..ops.int8 import FINER, RULES, Rule, count, kept_finer, named, use_int8
from ..ops.layers import EmbeddingMath, PackedLayer, packed_layers, unpack_leftovers
from ..ops.make import origin_of
from ..ops.packed import convert_rows
from ..ops.questions import answer_questions
from ..ops.report import examples
from ..ops.report import layers as in_words
from . import hashes, node
from .architectures import name_of
from .host_errors import VARIANT, Asked, is_about_files, refusal
from .model_files import Found, all_present, find, listed
from .ops import GraftOps
from .patcher import Graft, GraftPatcher, adopt, make_savable

log = logging.getLogger(__name__)

FOLDER = "unet_gguf"
"""The key under which packs for GGUF share their list of models; never replaced where one is there."""

DEMO_FOLDER = "graft_demo"
"""A key of our own for the demo model, since other packs rewrite the shared one."""

NONE = "None"
HOME = "the diffusion_models folder"

_READS_METADATA = "metadata" in inspect.signature(comfy.sd.load_diffusion_model_state_dict).parameters
"""Whether the host's own loader hands on what a safetensors file says of itself: the ``config`` of LTXV and Wan."""

COMPUTE_DTYPES = {
    "auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, **dict.fromkeys(RULES),
}  # fmt: skip
"""What a model computes in; None is the host's choice, and with int8 see `_dtype_of`."""

COMPUTE_DTYPE = (
    list(COMPUTE_DTYPES),
    {
        "default": "auto",
        "tooltip": "Precision of the computation. auto takes what ComfyUI chooses. int8 makes large layers faster and "
        "about 1 % less precise; LoRAs keep their full precision. int8 leaves Q8_0 as it is, because Q8_0 is more "
        "precise. int8_all makes Q8_0 faster, too.",
    },
)
"""An input of the loaders of diffusion models."""


def model_files() -> list[str]:
    """What the loader lists."""
    return listed(FOLDER, DEMO_FOLDER)


def model_file(name: str) -> Found:
    """The file that a workflow calls so."""
    return find(name, FOLDER, DEMO_FOLDER)


def load_diffusion_model(
    path: str, compute_dtype: str = "auto", backend: str = "auto", disable_dynamic: bool = False,
    module: str | None = None,
) -> GraftPatcher:  # fmt: skip
    """Load a GGUF diffusion model of any architecture that the host knows.

    Args:
        path: the file.
        compute_dtype: ``auto`` (what the host chooses for the device), ``bf16``, ``fp16``, ``fp32``, ``int8`` or
            ``int8_all``: that choice, with int8 products in large layers (`ops/int8.py`) where they are faster.
        backend: ``auto``, ``triton``, ``cpu`` or ``torch``.
        disable_dynamic: the host's wish for a patcher without dynamic VRAM.
        module: a second file, of what is added to the model: VACE, or LTX-2's connectors.

    Raises:
        CorruptFile: the file is damaged or is no GGUF file.
        UnsupportedFormat: the host does not know the architecture, or the file is not a diffusion model.
        NoBackend: the backend cannot run here.
    """
    file = open_gguf(path)
    metadata = file.metadata.texts() if _READS_METADATA else None
    added = None if module is None else open_gguf(module)
    weights = weights_of(diffusion_tensors(file), file)
    asked = Asked(with_leading_ones(weights if added is None else _with_module(weights, added)))
    device = comfy.model_management.get_torch_device()
    choice = kernels.choose(torch.device(device), None, backend)
    dtype = _dtype_of(compute_dtype, torch.device(device))
    options: dict[str, Any] = {"custom_operations": GraftOps} | ({} if dtype is None else {"dtype": dtype})
    try:
        state = _in_hosts_names(asked, metadata)
        patcher = _load_state_dict(state, options, metadata, disable_dynamic)
    except Exception as error:
        if not is_about_files(error):
            raise
        raise refusal(error, asked, path) from error
    if patcher is None:
        raise UnsupportedFormat(
            f"this ComfyUI does not know the architecture of the file (it calls itself "
            f"{file.architecture or 'nothing'}): update ComfyUI, {path}"
        )
    if added is not None:
        _check_module(patcher.model.diffusion_model, added)
    lacking = _check_complete(patcher.model.diffusion_model, path)
    if dtype is not None:
        # on a device that it thinks slow in this dtype the host would go back to fp32
        patcher.model.manual_cast_dtype = dtype
    unpack_leftovers(patcher.model, _declared_dtype)
    _answer_questions(patcher.model)
    in_int8 = _take_int8(patcher, RULES[compute_dtype]) if compute_dtype in RULES else ""
    files = [file] if added is None else [file, added]
    lacking += "" if added is None else f" · with {added.path.name}"
    patcher.model.graft = Graft(patcher.model, _summary(file, patcher, choice, in_int8) + lacking, backend, files)
    if choice.name == "triton":
        _warm(patcher, device)
    make_savable(patcher.model)
    again = functools.partial(load_diffusion_model, module=module)
    patcher.cached_patcher_init = (again, (path, compute_dtype, backend))
    return adopt(patcher)


def _dtype_of(compute_dtype: str, device: torch.device) -> torch.dtype | None:
    """What the host is to compute in; None where it chooses.

    With int8 what int8 leaves out is in bf16 on a processor that multiplies it natively: there int8 is measured against
    bf16, and takes part where it is faster than that.
    """
    is_native = device.type == "cpu" and kernels.has_fast_bf16()
    if compute_dtype in RULES and is_native and int8.unavailable(device) is None:
        return torch.bfloat16
    return COMPUTE_DTYPES[compute_dtype]


def _with_module(weights: dict[str, torch.Tensor], module: GGUFFile) -> dict[str, torch.Tensor]:
    """A model's state dict with that of a module; parts that the model has itself are the module's then."""
    return weights | weights_of(module_tensors(module), module)


def _check_module(model: torch.nn.Module, module: GGUFFile) -> None:
    """Refuse a module for which the host's model has no place: it would be left out, and nobody would know."""
    places = {name for name, _ in model.named_modules()}
    parts = {name.rpartition(".")[0] for name in module_tensors(module)}
    if not places & parts:
        raise UnsupportedFormat(
            f"the model has no place for {examples(sorted(parts))}: this module is for another model ({module.path})"
        )


def _in_hosts_names(asked: Asked, metadata: dict[str, str] | None) -> dict[str, torch.Tensor]:
    """The state dict as the host knows it: by its own names, or as it renames diffusers', in shapes of that model."""
    known = {} if metadata is None else {"metadata": metadata}
    for state in itertools.chain((asked,), other_ranks(asked)):
        if comfy.model_detection.model_config_from_unet(state, "", **known) is not None:
            asked.answered = True
            return dict(state)
    return convert_rows(asked, comfy.model_detection.convert_diffusers_mmdit) or dict(asked)


def _load_state_dict(
    state: dict[str, torch.Tensor], options: dict, metadata: dict[str, str] | None, disable_dynamic: bool
) -> Any:
    """The host's own loader, on which it decides about architecture, dtypes and the patcher's class."""
    extra: dict[str, Any] = {"disable_dynamic": True} if disable_dynamic else {}
    if metadata is not None:
        extra["metadata"] = metadata
    load = functools.partial(comfy.sd.load_diffusion_model_state_dict, model_options=options, **extra)
    try:
        return load(dict(state))
    except RuntimeError as error:
        # shapes of the host's own parameters are known once the model is built, and this is where it tells them
        fitting = refitted(state, mismatches(error))
        if fitting is None:
            raise
    return load(fitting)


def _check_complete(model: torch.nn.Module, path: str) -> str:
    """Refuse a file without all of the model that the host built for it.

    Returns:
        for the report, what it has none of and the model may do without.
    """
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if hasattr(module, "comfy_cast_weights")]
    noted_missing, noted_unexpected = _noted_keys(modules.values())
    parameters = {*dict(model.named_parameters()), *(f"{layer}.weight" for layer in packed_layers(model))}
    missing = [name for name in noted_missing if name in parameters]  # and not what a model works out for itself
    held = parameters.difference(missing)
    absent = missing_within(missing, held, layers)
    stray = stray_block(noted_unexpected, held, modules)
    if stray is not None and stray[1] is None:
        raise UnsupportedFormat(f"the model ends before {stray[0]}, which the file has: {VARIANT} ({path})")
    absent += [stray[1]] if stray is not None else []
    if absent:
        raise CorruptFile(
            f"the file is incomplete: get it from another source, or update ComfyUI if this is a new variant of the "
            f"model: it lacks {examples(absent)} ({path})"
        )
    parts = missing_parts(missing, held, layers)
    return f" · the file has no {examples(parts)}" if parts else ""


def _noted_keys(modules: Iterable[torch.nn.Module]) -> tuple[list[str], list[str]]:
    """What was missing and what unexpected when the host loaded the model, as each layer was told."""
    noted = [module.__dict__.pop("noted_keys") for module in modules if "noted_keys" in module.__dict__]
    # the same two lists, unless the host loaded parts of the model by themselves
    lists = {id(missing): (missing, unexpected) for missing, unexpected in noted}.values()
    return [name for missing, _ in lists for name in missing], [name for _, others in lists for name in others]


def _declared_dtype(module: torch.nn.Module, name: str) -> torch.dtype:
    """What the host built a parameter in, where it notes that: there the file's tensor has taken its place."""
    return getattr(module, f"{name}_comfy_model_dtype", None) or torch.float32


def _answer_questions(model: torch.nn.Module) -> None:
    """Let layers answer what the host asks them, and its tables look up, in the dtype that it would compute in."""
    usual = model.manual_cast_dtype or model.get_dtype()

    def dtype_of(layer: PackedLayer) -> torch.dtype:
        # some architectures keep a layer in fp32 whatever the model is in
        declared = getattr(layer, "declared_dtype", None)
        return usual if declared in (None, model.get_dtype()) else declared

    answer_questions(model, dtype_of)
    for layer in packed_layers(model).values():
        if isinstance(layer, EmbeddingMath):
            layer.dtype = dtype_of(layer)


def _take_int8(patcher: Any, rule: Rule) -> str:
    """Have large layers multiply in int8, where that is faster and the rule lets them.

    Returns:
        for the report, how many do, or why none does.
    """
    reason = int8.unavailable(torch.device(patcher.load_device))
    if reason is not None:
        return f"int8 is not used: {reason}"
    found = packed_layers(patcher.model)
    use_int8(found, named(), rule)
    finer = kept_finer(found)
    return f"int8 in {in_words(count(found))}" + (f", not in {in_words(finer)} ({FINER})" if finer else "")


def _warm(patcher: Any, device: torch.device) -> None:
    """Compile the kernels of the model's types now, with progress on the node, and not in the first step."""
    layers = patcher.model.graft.layers.values()
    fmts = {layer.fmt for layer in layers if layer.fmt is not None and layer.fmt.is_quantized}
    bar = comfy.utils.ProgressBar(len(fmts))
    dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    in_int8 = count(patcher.model.graft.layers) > 0
    kernels.warm(fmts, torch.device(device), dtype, lambda line: bar.update(1), in_int8)


def _summary(file: GGUFFile, patcher: Any, choice: kernels.Choice, in_int8: str) -> str:
    """``Flux.1 dev · 11.9B · Q4_K 228, Q6_K 76, F32 471 · 6.6 GB · bfloat16 · triton``, under people's name for it.

    A file that Graft made has a second line, on what of.
    """
    _, _, rest = describe(file).partition(" · ")
    dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    faster = "bf16" if dtype == torch.float32 and kernels.has_fast_bf16() else ""
    faster = "fp32" if dtype in kernels.SLOW_DTYPES else faster
    on_cpu = patcher.load_device.type == "cpu"
    hint = f" (compute_dtype {faster} is faster on this processor)" if faster and on_cpu else ""
    shown = f"{str(dtype).removeprefix('torch.')}{hint}" + (f", {in_int8}" if in_int8 else "")
    line = f"{name_of(patcher.model.model_config)} · {rest} · {shown} · {choice}"
    origin = origin_of(file.metadata)
    return f"{line}\n{origin}" if origin else line


def running(patcher: GraftPatcher, backend: str) -> list[str]:
    """Which card a model runs on and how much of it it takes, which way, and what would be faster: lines for a node."""
    device = torch.device(patcher.load_device)
    is_dynamic = getattr(patcher, "is_dynamic", bool)()  # older hosts have none
    machine = Machine.of(device, comfy.model_management.get_total_memory(device), is_dynamic)
    dtype = patcher.model.manual_cast_dtype or patcher.model.get_dtype()
    return advice(machine, kernels.choose(device, None, backend), dtype, patcher.model_size())


class GraftUNETLoader:
    """Load Diffusion Model (GGUF, Graft)."""

    DESCRIPTION = (
        "Loads a GGUF diffusion model. LoRAs from any LoRA node run next to the quantized weights, at full precision. "
        "The file is never changed."
    )
    SEARCH_ALIASES = ["gguf", "unet loader gguf", "load gguf", "quantized model", "q4", "q8"]  # noqa: RUF012
    CATEGORY = node.CATEGORY
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The model, for all LoRA nodes and samplers.",)
    FUNCTION = "load"
    HAS_INTERMEDIATE_OUTPUT = True

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "unet_name": (
                    model_files(),
                    {
                        "tooltip": "A .gguf file in models/diffusion_models or models/unet.",
                        hashes.PROPERTY: hashes.shown(),  # of all folders: the page asks for nothing else of ours
                    },
                ),
            },
            "optional": {
                "compute_dtype": COMPUTE_DTYPE,
                "backend": node.BACKEND,
                "module_name": (
                    [NONE, *model_files()],
                    {
                        "default": NONE,
                        "tooltip": "A GGUF file to add to the model: a VACE module for Wan, or connectors for LTX-2.",
                    },
                ),
            },
        }

    @classmethod
    def IS_CHANGED(cls, unet_name: str | None, module_name: str | None = NONE, **_: Any) -> Any:
        state = node.UNKNOWN if unet_name is None else node.file_state(model_file(unet_name).path)
        return state if module_name in (None, NONE) else [state, node.file_state(model_file(module_name).path)]

    @classmethod
    def VALIDATE_INPUTS(cls, unet_name: str | None = None, module_name: str | None = None) -> bool:
        """Raises what is to be said of missing files: a text the host would repeat on both inputs."""
        all_present([model_file(name) for name in (unet_name, module_name) if name not in (None, NONE)], HOME)
        return True

    def load(self, unet_name: str, compute_dtype: str = "auto", backend: str = "auto", module_name: str = NONE) -> dict:
        found, module = model_file(unet_name), None if module_name == NONE else model_file(module_name)
        path, added = found.present(HOME), module and module.present(HOME)
        patcher = load_diffusion_model(path, compute_dtype, backend, module=added)
        log.info("%s: %s", os.path.basename(path), patcher.graft.summary)
        notes = *running(patcher, backend), found.note, module.note if module else ""
        return node.result((patcher,), patcher.graft.summary, *notes)
