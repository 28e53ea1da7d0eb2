"""The names that trainers give to a model's modules, and what they are called in the model itself.

Two things are kept apart. `extra_dialects` renames what ComfyUI's own loader leaves unloaded into what it understands.
`LayerNames` knows, with or without a host, every name that a file may use for the layers of a model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ..kinds import Region
from ..report import family_of, may_be

State = Mapping[str, torch.Tensor]


class Target(NamedTuple):
    """What a name in a file stands for.

    Attributes:
        key: a parameter of the model.
        region: the part of it, e.g. the rows of q in a fused qkv.
        function: what the difference passes through on its way there.
    """

    key: str
    region: Region | None = None
    function: Callable[[torch.Tensor], torch.Tensor] | None = None

    @property
    def layer(self) -> str:
        """The layer whose weight or bias it is."""
        return self.key.removesuffix(".weight").removesuffix(".bias")


_PEFT_NAME = re.compile(r"\.(lora_[AB])\.(?!weight$|bias$)([^.]+)\.(weight|bias)$")
_MAGNITUDE = re.compile(r"\.lora_magnitude_vector(?:\.[^.]+){0,2}$")  # and at most an adapter's name and ``weight``
_XLABS = re.compile(
    r"^(?:diffusion_model\.)?(double_blocks|single_blocks)\.(\d+)\.processor\.(\w+)\.(up|down)\.weight$"
)
_XLABS_MODULES = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1_qkv",
    "proj_lora": "linear2",
}
# models under their native names, as fal's trainer for Kontext saves them
_NATIVE = re.compile(
    r"^(?:transformer\.)?base_model\.model\.((?:double_blocks|single_blocks|joint_blocks|blocks|layers|img_in|txt_in|time_in|vector_in|"
    r"guidance_in|final_layer|head)\.)"
)
_LLAMA_CPP = re.compile(r"(?:\.weight)?\.lora_([ab])$")
_MATRIX = re.compile(
    r"[._]lora_(?:[AB]|up|down)\b|[._]lora\.(?:up|down)\.|\.hada_w[12]_[ab]$|\.lokr_w[12](?:_[ab])?$|\.[ab][12]\.weight$"
)
_FUSED_QKV = re.compile(r"^lycoris_(single_)?transformer_blocks_(\d+)_attn_(to_qkv|add_qkv_proj|to_added_qkv)\.")


# the more particular before the more general
_DIALECTS = {
    "Wan-Fun": re.compile(r"^lora_unet__"),
    "kohya": re.compile(r"^lora_(?:unet|te\d?|prior)_"),
    "OneTrainer": re.compile(r"^lora_transformer_"),
    "SimpleTuner": re.compile(r"^lycoris_"),
    "XLabs": _XLABS,
    "fal Kontext": _NATIVE,
    "PEFT": re.compile(rf"^(?:unet\.|transformer\.)?base_model\.model\.|{_PEFT_NAME.pattern}"),
    "diffusers": re.compile(r"^(?:transformer|unet|text_encoder(?:_\d)?)\."),
    "native": re.compile(r"^(?:model\.)?diffusion_model\."),
    "bare": re.compile(""),
}


def dialect_of(names: Iterable[str]) -> str:
    """Whose way of naming a file's tensors follow: ``kohya``, ``diffusers``, ``native``, …; several with commas."""
    found = {next(dialect for dialect, pattern in _DIALECTS.items() if pattern.search(name)) for name in names}
    return ", ".join(dialect for dialect in _DIALECTS if dialect in found)


def extra_dialects(state: State, norm: str = "merged") -> dict[str, torch.Tensor]:
    """The same tensors, with names that ComfyUI's loader leaves unloaded turned into ones that it understands.

    XLabs, Wan-Fun, named PEFT adapters, native names under ``base_model.model.``, ``diff_m``,
    ``lora_B.bias``, ``lora_magnitude_vector`` and SimpleTuner's fused qkv. Names that are understood already stay.

    Args:
        norm: ``merged`` leaves PEFT's magnitudes a vector, by which `from_host` knows that they are meant for the norm
            of the merged weight; ``comfy`` makes them the column that ComfyUI's own merge needs.
    """
    flux = any("single_transformer_blocks" in key for key in state)
    renamed: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name = _renamed(key, flux)
        if _MAGNITUDE.search(key):
            value = value.flatten() if norm == "merged" else value.reshape(-1, *(1,) * max(1, value.dim() - 1))
        if name in renamed or (name != key and name in state):
            name = key  # two adapters of different names on one layer: the first one is loaded
        renamed[name] = value
    return {_with_bias(key, renamed): _bias(key, value, renamed) for key, value in renamed.items()}


def _renamed(key: str, flux: bool) -> str:
    key = _PEFT_NAME.sub(r".\1.\3", key)
    key = _MAGNITUDE.sub(".dora_scale", key)
    key = _NATIVE.sub(r"diffusion_model.\1", key)
    if key.startswith("lora_unet__"):
        key = "lora_unet_" + key.removeprefix("lora_unet__")
    if key.endswith(".diff_m"):
        return key.removesuffix(".diff_m") + ".modulation.diff"
    xlabs = _XLABS.match(key)
    if xlabs and xlabs.group(3) in _XLABS_MODULES:
        blocks, number, module, side = xlabs.groups()
        return f"diffusion_model.{blocks}.{number}.{_XLABS_MODULES[module]}.lora_{side}.weight"
    fused = _FUSED_QKV.match(key)
    if fused and flux:
        single, number, module = fused.groups()
        stream = "img" if module == "to_qkv" else "txt"
        place = f"single_blocks.{number}.linear1_qkv" if single else f"double_blocks.{number}.{stream}_attn.qkv"
        return f"diffusion_model.{place}.{key[fused.end() :]}"
    return key


def from_llama_cpp(state: State, alpha: Any = None) -> dict[str, torch.Tensor]:
    """A GGUF file's adapters under PEFT's names: llama.cpp calls them after the tensor, ``X.weight.lora_a``.

    Other names stay. ggml has no dimension of 1 in front, so factors of rank 1 have lost one: it is put back.

    Args:
        alpha: of all adapters, ``adapter.lora.alpha`` in the metadata; without one, or with 0, llama.cpp's scale is 1.
    """
    named: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        found = _LLAMA_CPP.search(key)
        module = key[: found.start()] if found else ""
        name = f"{module}.lora_{found[1].upper()}.weight" if found else key
        named[name] = value.unsqueeze(0) if value.dim() == 1 and _MATRIX.search(name) else value
        if found and found[1] == "b" and type(alpha) in (int, float) and alpha:
            named[f"{module}.alpha"] = torch.tensor(float(alpha))
    return named


def bfl_control(state: State) -> State:
    """Flux Tools' control LoRAs: native names without a prefix, norm scales in full, an img_in of more channels.

    ComfyUI converts these itself, and differently from version to version.
    """
    if "img_in.lora_A.weight" not in state or not any(".norm." in key and key.endswith("_norm.scale") for key in state):
        return state
    named = {f"diffusion_model.{key.replace('_norm.scale', '_norm.scale.set_weight')}": v for key, v in state.items()}
    up, down = state.get("img_in.lora_B.weight"), state["img_in.lora_A.weight"]
    if up is not None and up.dim() == down.dim() == 2:
        named["diffusion_model.img_in.reshape_weight"] = torch.tensor([up.shape[0], down.shape[1]])
    return named


def _with_bias(key: str, state: State) -> str:
    module = key.removesuffix(".lora_B.bias")
    return key if module == key or f"{module}.diff_b" in state else f"{module}.diff_b"


def _bias(key: str, value: torch.Tensor, state: State) -> torch.Tensor:
    """lora_B's own bias, with the scale that its matrix gets."""
    module = key.removesuffix(".lora_B.bias")
    alpha, down = state.get(f"{module}.alpha"), state.get(f"{module}.lora_A.weight")
    if module == key or alpha is None or down is None or alpha.numel() != 1 or not down.dim() or not down.shape[0]:
        return value
    if alpha.is_complex() or not value.is_floating_point():
        return value  # which is refused where it is used
    return value.float() * (float(alpha) / down.shape[0])


# trainers put one or more of them before a name, e.g. ``transformer.base_model.model.``
_PREFIXES = ("diffusion_model.", "model.diffusion_model.", "transformer.", "unet.", "base_model.model.")
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_", "lora_prior_unet_")
_SPELLINGS = (
    ("to_{}", "{}", "w{}", "W{}", "{}_proj", "{}_linear", "linear_{}"),
    ("add_{}_proj", "to_added_{}"),
)
"""How models and trainers call queries, keys and values, each alone (``to_q``) or as one layer (``to_qkv``, ``to_kv``);
those of a second stream of tokens after those of the first."""

_RESPELLED = {
    spelling.format(letters): [other.format(letters) for other in spellings if other != spelling]
    for spellings in _SPELLINGS for spelling in spellings for letters in ("qkv", "kv")
}  # fmt: skip
_FUSED_PARTS = {
    fused.format(letters): [tuple(part.format(letter) for letter in letters) for part in spellings]
    for spellings in _SPELLINGS for fused in spellings for letters in ("qkv", "kv")
}  # fmt: skip
_PART_OF = {
    part.format(letter): [(fused.format(letters), letters, letters.index(letter))
                          for letters in ("qkv", "kv") if letter in letters for fused in spellings]
    for spellings in _SPELLINGS for part in spellings for letter in "qkv"
}  # fmt: skip


class LayerNames:
    """Every name that a file may use for the layers of a model.

    Args:
        shapes: of the weights, by layer, e.g. ``{"double_blocks.0.img_attn.qkv": (9216, 3072)}``; the names may
            begin with ``diffusion_model.``.
        hosts: what a host calls its parameters, ahead of our own names.
        modules: those of the file. If they are of another architecture, fused layers and parts of such are not looked
            for: what other architectures call so may be of the same size.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        hosts: Mapping[str, Target] | None = None,
        modules: Iterable[str] = (),
    ) -> None:
        self._shapes = shapes
        self._hosts = hosts or {}
        ours, theirs = family_of(shapes), family_of(modules)
        self._is_alike = not ours or not theirs or may_be(ours, theirs)

    def targets(self, module: str) -> tuple[Target, ...]:
        """What a module of a file stands for: one layer or a part of one, the layers that it fuses, in order, or none.

        Several share the rows of the module as their weights have them.
        """
        found = self._find(module)
        if found is not None:
            return (found,)
        if not self._is_alike:
            return ()
        return self._respelled(module) or self._parts(module) or self._part(module)

    def _find(self, module: str) -> Target | None:
        target = self._hosts.get(module)
        if target is not None and self._fits(target):
            return target
        for name in _without_prefixes(module):
            if name in self._plain:
                return self._plain[name]
        flat = next((module[len(p) :] for p in _FLAT_PREFIXES if module.startswith(p)), None)
        return None if flat is None else self._flat.get(flat)

    def _fits(self, target: Target) -> bool:
        """Whether the part of a layer is within it: a host's own table may have been made for another size."""
        shape = self._shapes.get(target.layer)
        region = target.region
        return region is None or shape is None or region.start + region.length <= shape[region.dim]

    def _respelled(self, module: str) -> tuple[Target, ...]:
        """The layer that stands in the model where the module does, under another name for the same."""
        named = (self._find(stem + other) for stem, leaf in _leaves(module, _RESPELLED) for other in _RESPELLED[leaf])
        found = next((target for target in named if target is not None), None)
        return () if found is None else (found,)

    def _parts(self, module: str) -> tuple[Target, ...]:
        """The layers that a module fuses."""
        for stem, leaf in _leaves(module, _FUSED_PARTS):
            for parts in _FUSED_PARTS[leaf]:
                found = [self._find(stem + part) for part in parts]
                targets = [target for target in found if target is not None and target.layer in self._shapes]
                if len(targets) == len(parts):
                    return tuple(targets)
        return ()

    def _part(self, module: str) -> tuple[Target, ...]:
        """The part of a fused layer that a module stands for."""
        for stem, leaf in _leaves(module, _PART_OF):
            for fused, letters, place in _PART_OF[leaf]:
                whole = self._find(stem + fused)
                shape = None if whole is None else self._shapes.get(whole.layer)
                if whole is None or shape is None or whole.region is not None or whole.function is not None:
                    continue
                regions = _qkv_regions(shape) if letters == "qkv" else _equal_parts(shape[0], 2)
                if regions:
                    return (Target(whole.key, regions[place]),)
        return ()

    @cached_property
    def _plain(self) -> dict[str, Target]:
        """Names without a prefix."""
        paths = {_native(path): path for path in self._shapes}
        names = {name: Target(f"{path}.weight") for name, path in paths.items()}
        for name, inner, region, function in _diffusers_names({n: self._shapes[p] for n, p in paths.items()}):
            if inner in paths:
                names.setdefault(name, Target(f"{paths[inner]}.weight", region, function))
        for name, target in self._hosts.items():
            if self._fits(target) and not name.startswith(_FLAT_PREFIXES):
                for plain in _without_prefixes(name):
                    names.setdefault(plain, target)
        return names

    @cached_property
    def _flat(self) -> dict[str, Target]:
        """The same with ``_`` for every dot."""
        names: dict[str, Target] = {}
        for name, target in self._plain.items():
            names.setdefault(name.replace(".", "_"), target)
        for name, target in self._hosts.items():
            prefix = next((p for p in _FLAT_PREFIXES if name.startswith(p)), None)
            if prefix is not None and self._fits(target):
                names.setdefault(name[len(prefix) :], target)
        return names


def _native(path: str) -> str:
    return path.removeprefix("model.").removeprefix("diffusion_model.")


def _without_prefixes(name: str) -> Iterator[str]:
    """The name as it is, and then with one prefix less each time; old attention processors after the layers' names."""
    while True:
        yield name
        if ".processor.to_" in name:
            plain = name.replace(".processor.to_", ".to_")
            yield plain + ".0" if plain.endswith(".to_out") else plain
        prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
        if prefix is None:
            return
        name = name[len(prefix) :]


def _leaves(module: str, known: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The ways to see a module as ``(what is before the last part of its name, that part)``."""
    for leaf in known:
        stem = module.removesuffix(leaf)
        if stem != module and (not stem or stem[-1] in "._"):
            yield stem, leaf


_Name = tuple[str, str, Region | None, Callable[[torch.Tensor], torch.Tensor] | None]


def _diffusers_names(shapes: Mapping[str, Sequence[int]]) -> Iterator[_Name]:
    """``(name in diffusers, native name, region, function)`` for the architectures whose names differ."""
    if any(name.startswith("double_blocks.") for name in shapes):
        yield from _flux_names(shapes)
    elif any(name.startswith("joint_blocks.") for name in shapes):
        yield from _sd3_names(shapes)
    elif any(name.startswith("input_blocks.") for name in shapes):
        yield from _unet_names(shapes)
    else:
        yield from _lumina_names(shapes)


def swap_halves(weight: torch.Tensor) -> torch.Tensor:
    """Scale and shift, which diffusers has the other way round in the last modulation."""
    first, second = weight.chunk(2, dim=0)
    return torch.cat([second, first])


def _equal_parts(rows: int, count: int) -> list[Region]:
    return [Region(0, i * (rows // count), rows // count) for i in range(count)] if rows % count == 0 else []


def _qkv_regions(shape: Sequence[int]) -> list[Region]:
    """Where q, k and v lie in a fused layer; q is as wide as x if there are fewer keys and values. [] for others."""
    rows, width = shape[0], math.prod(shape[1:])
    others = rows - width
    if 0 < others < 2 * width and others % 2 == 0:
        return [Region(0, 0, width), Region(0, width, others // 2), Region(0, width + others // 2, others // 2)]
    # of more rows there are more than three parts, unless attention is wider than x
    return _equal_parts(rows, 3) if rows <= 3 * width or rows % width else []


def _blocks(shapes: Iterable[str], prefix: str) -> list[int]:
    numbers = {name.split(".")[1] for name in shapes if name.startswith(prefix + ".")}
    return sorted(int(n) for n in numbers if n.isdigit())


_FLUX_WHOLE = {
    "x_embedder": "img_in", "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
}  # fmt: skip
_FLUX_DOUBLE = {
    "attn.to_qkv": "img_attn.qkv", "attn.add_qkv_proj": "txt_attn.qkv", "attn.to_added_qkv": "txt_attn.qkv",
    "attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj",
    "norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin",
    "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
    "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
}  # fmt: skip
_FLUX_SINGLE = {
    "norm.linear": "modulation.lin", "proj_out": "linear2",
    "attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2",  # Flux 2
}  # fmt: skip
_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def _flux_names(shapes: Mapping[str, Sequence[int]]) -> Iterator[_Name]:
    yield from ((name, native, None, None) for name, native in _FLUX_WHOLE.items())
    yield "norm_out.linear", "final_layer.adaLN_modulation.1", None, swap_halves
    for i in _blocks(shapes, "double_blocks"):
        name, native = f"transformer_blocks.{i}.", f"double_blocks.{i}."
        yield from ((name + a, native + b, None, None) for a, b in _FLUX_DOUBLE.items())
        for parts, fused in ((_QKV, "img_attn.qkv"), (_ADDED_QKV, "txt_attn.qkv")):
            regions = _qkv_regions(shapes.get(native + fused, (0,)))
            yield from ((f"{name}attn.{a}", native + fused, r, None) for a, r in zip(parts, regions, strict=False))
    for i in _blocks(shapes, "single_blocks"):
        name, native = f"single_transformer_blocks.{i}.", f"single_blocks.{i}."
        yield from ((name + a, native + b, None, None) for a, b in _FLUX_SINGLE.items())
        rows, width = (*shapes.get(native + "linear1", ()), 0, 0)[:2]
        for j, part in enumerate(_QKV):
            yield f"{name}attn.{part}", native + "linear1", Region(0, j * width, width), None
        yield name + "attn.to_qkv", native + "linear1", Region(0, 0, 3 * width), None
        yield native + "linear1_qkv", native + "linear1", Region(0, 0, 3 * width), None
        yield name + "proj_mlp", native + "linear1", Region(0, 3 * width, rows - 3 * width), None


_SD3_WHOLE = {
    "context_embedder": "context_embedder", "pos_embed.proj": "x_embedder.proj", "proj_out": "final_layer.linear",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
}  # fmt: skip
_SD3_BLOCK = {
    "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
}  # fmt: skip
_SD3_FUSED = (
    ("attn", _QKV, "x_block.attn.qkv"),
    ("attn", _ADDED_QKV, "context_block.attn.qkv"),
    ("attn2", _QKV, "x_block.attn2.qkv"),
)


def _sd3_names(shapes: Mapping[str, Sequence[int]]) -> Iterator[_Name]:
    yield from ((name, native, None, None) for name, native in _SD3_WHOLE.items())
    yield "norm_out.linear", "final_layer.adaLN_modulation.1", None, swap_halves
    blocks = _blocks(shapes, "joint_blocks")
    for i in blocks:
        name, native = f"transformer_blocks.{i}.", f"joint_blocks.{i}."
        yield from ((name + a, native + b, None, None) for a, b in _SD3_BLOCK.items())
        # the last block's context is only scaled and shifted, as the last layer is
        swap = swap_halves if i == blocks[-1] else None
        yield name + "norm1_context.linear", native + "context_block.adaLN_modulation.1", None, swap
        for attention, parts, fused in _SD3_FUSED:
            for part, region in zip(parts, _qkv_regions(shapes.get(native + fused, (0,))), strict=False):
                yield f"{name}{attention}.{part}", native + fused, region, None


_UNET_WHOLE = {
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0", "class_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_UNET_RESNET = {
    "conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}  # fmt: skip


def _unet_names(shapes: Mapping[str, Sequence[int]]) -> Iterator[_Name]:
    """Stable Diffusion's UNet in CompVis's names, with two residual blocks on each level."""
    yield from ((name, native, None, None) for name, native in _UNET_WHOLE.items())
    places = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2",
              "mid_block.attentions.0": "middle_block.1"}  # fmt: skip
    for level in range(4):
        for j in range(2):
            places[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{3 * level + j + 1}.0"
            places[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{3 * level + j + 1}.1"
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{3 * level + 3}.0.op", None, None
        for j in range(3):
            places[f"up_blocks.{level}.resnets.{j}"] = f"output_blocks.{3 * level + j}.0"
            places[f"up_blocks.{level}.attentions.{j}"] = f"output_blocks.{3 * level + j}.1"
        for place in (1, 2):  # behind the attention, where there is one
            native = f"output_blocks.{3 * level + 2}.{place}.conv"
            if native in shapes:
                yield f"up_blocks.{level}.upsamplers.0.conv", native, None, None
    for name, native in places.items():
        if "resnets" in name:
            yield from ((f"{name}.{a}", f"{native}.{b}", None, None) for a, b in _UNET_RESNET.items())
        else:
            inside = (path[len(native) :] for path in shapes if path.startswith(native + "."))
            yield from ((name + rest, native + rest, None, None) for rest in inside)


_LUMINA_WHOLE = {
    "all_final_layer.2-1.linear": "final_layer.linear", "all_x_embedder.2-1": "x_embedder",
    "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
}  # fmt: skip


def _lumina_names(shapes: Mapping[str, Sequence[int]]) -> Iterator[_Name]:
    """Lumina 2 and Z-Image: blocks with a fused ``attention.qkv``."""
    fused = [name for name in shapes if name.endswith(".attention.qkv")]
    if fused:
        yield from ((name, native, None, None) for name, native in _LUMINA_WHOLE.items())
    for native in fused:
        attention = native.removesuffix("qkv")
        yield attention + "to_out.0", attention + "out", None, None
        for part, region in zip(_QKV, _qkv_regions(shapes[native]), strict=False):
            yield attention + part, native, region, None


__all__ = ["LayerNames", "Target", "bfl_control", "dialect_of", "extra_dialects", "from_llama_cpp"]
