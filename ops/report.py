"""What a LoRA file came to: in a line, and on a miss with the count, three examples and the likely cause."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..kernels import plain

EXAMPLES = 3
_EXAMPLE_CHARACTERS = 300


class Family(NamedTuple):
    """An architecture by the names of its modules.

    Attributes:
        name: as people call it.
        pattern: found in some module's name of a model or an adapter file, kohya's flattening included.
        hosts: how the names of the hosts' own classes for it begin, in lower case.
    """

    name: str
    pattern: re.Pattern[str]
    hosts: tuple[str, ...]


# before a model's own name of a module
_ROOT = r"(?:^|[.]|_unet_{1,2}|lycoris_)"
_END = r"(?![A-Za-z0-9_])"


def _family(name: str, pattern: str, *hosts: str) -> Family:
    # kohya writes _ for every dot; [.] means a dot alone
    return Family(name, re.compile(pattern.replace(r"\.", "[._]"), re.MULTILINE), hosts)


# an "or" stands where names alone do not tell
FAMILIES = (
    _family("Stable Cascade", r"lora_prior_unet_|(?:down|up)_blocks\.\d+\.\d+\.", "stable_cascade"),
    _family("JoyImage", r"double_blocks\.\d+\.(?:attn\.(?:img|txt)_attn|(?:img|txt)_mlp\.net)", "joyimage"),
    _family("HunyuanVideo", r"individual_token_refiner|double_blocks[.]\d+[.](?:img|txt)_attn_(?:qkv|proj)"
            r"|double_blocks\.\d+\.(?:img|txt)_m(?:od\.linear|lp\.fc[12])|single_blocks\.\d+\.modulation\.linear",
            "hunyuanvideo", "hunyuanimage"),
    _family("Hunyuan3D", rf"{_ROOT}(?:latent_in|cond_in){_END}|{_ROOT}blocks\.\d+\.moe\.(?:gate|(?:shared_)?experts)",
            "hunyuan3d"),
    _family("HiDream-O1", r"t_embedder1\.mlp|final_layer2\.linear|x_embedder\.proj[12]", "hidreamo1"),
    _family("HiDream", r"(?:double|single)_stream_blocks\.\d", "hidream"),
    _family("Boogu", r"(?:double|single)_stream_layers\.\d", "boogu"),
    _family("Kandinsky 5", r"(?:text|visual)_transformer_blocks\.\d", "kandinsky5"),
    _family("Flux", r"(?:double_blocks\.\d+\.(?:img|txt)_|double_blocks\.\d+\.processor|single_transformer_blocks\.\d)",
            "flux", "chroma", "longcat"),
    _family("Flux", r"single_blocks\.\d+\.(?:linear|modulation|processor)", "flux", "chroma", "longcat"),
    _family("Lens", r"transformer_blocks\.\d+\.(?:attn\.(?:img|txt)_qkv|(?:img|txt)_mlp\.w[123])", "lens"),
    _family("Qwen-Image", r"transformer_blocks\.\d+\.(?:img|txt)_mlp\.net", "qwenimage"),
    _family("Qwen-Image or Lens", r"transformer_blocks\.\d+\.(?:img|txt)_mod\."),
    _family("SD3", r"joint_blocks\.\d", "sd3"),
    _family("SD3 or Flux", r"transformer_blocks\.\d+\.(?:norm1_context|ff_context)"),
    _family("ACE-Step", r"lyric_(?:encoder|proj)|timbre_encoder"
            r"|transformer_blocks\.\d+\.(?:cross_attn|ff\.inverted_conv)"
            rf"|{_ROOT}(?:decoder\.)?layers\.\d+\.cross_attn\.[qkvo]_proj", "acestep"),
    _family("Anima", r"llm_adapter\.", "anima"),
    _family("Cosmos-Predict2 or Anima",
            rf"{_ROOT}blocks\.\d+\.(?:(?:self|cross)_attn\.(?:[qkv]|output)_proj|adaln_modulation_)",
            "cosmost2ipredict2", "cosmosi2vpredict2"),
    _family("Cosmos", r"blocks\.block\d+\.blocks\.\d", "cosmos"),
    _family("Wan", rf"{_ROOT}(?:vace_)?blocks\.\d+\."
            rf"(?:(?:self|cross)_attn\.[qkvo](?:_img)?{_END}|ffn\.(?:net|[02])|attn[12]\.to_out)", "wan"),
    _family("PixArt", r"cross_attn\.(?:q|kv)_linear|csize_embedder|y_embedder\.y_proj", "pixart"),
    _family("Krea 2", rf"txtfusion|text_fusion|{_ROOT}blocks\.\d+\.(?:attn\.w[qkvo]|mlp\.(?:gate|up|down)){_END}"
            rf"|transformer_blocks\.\d+\.(?:attn\.to_gate|ff\.(?:gate|up|down)){_END}", "krea2"),
    _family("SDXL", r"(?:input_blocks\.[78]\.1|down_blocks\.2\.attentions\.\d|mid_block\.attentions\.0|middle_block\.1)"
            r"\.transformer_blocks\.[1-9]|lora_te2_text_model", "sdxl", "ssd1b", "segmind", "koala"),
    _family("SD1.5 or SD2", r"(?:input|output)_blocks\.\d+\.\d|(?:mid|middle)_block\."
            r"|(?:down|up)_blocks\.\d\.(?:attentions|resnets|(?:down|up)samplers)",
            "sd15", "sd20", "sd21", "sd1", "sd2"),
    _family("TripoSplat", r"repo_layers\.\d|cam_refiner|_refiner\.\d+\.attn\.qkv|blocks\.\d+\.mlp\.mlp", "triposplat"),
    _family("OmniGen2", r"(?!)", "omnigen2"),  # no module that others don't have, too
    _family("OmniGen2 or Boogu", r"ref_image_(?:refiner|patch_embedder)"),
    _family("OmniGen2, Boogu or Lumina 2", r"(?:refiner|layers)\.\d+\.(?:attn\.to_|feed_forward\.linear_[123])"),
    _family("Ideogram 4", rf"layers\.\d+\.(?:attention\.o|adaln_modulation){_END}|llm_cond_proj|embed_image_indicator",
            "ideogram4"),
    _family("Z-Image", r"(?:_refiner|layers)\.\d+\.(?:attention\.to_|adaLN_modulation\.0)", "zimage"),
    _family("Lumina 2", r"(?:_refiner|layers)\.\d+\.adaLN_modulation\.1", "lumina"),
    _family("Lumina 2 or Z-Image", r"_refiner\.\d+\.(?:feed_forward\.w|attention\.)|layers\.\d+\.attention\.out"),
    _family("Lumina 2, Z-Image or Ideogram 4", r"layers\.\d+\.(?:feed_forward\.w[123]|attention\.)"),
    _family("ERNIE-Image", r"layers\.\d+\.(?:self_attention\.to_|mlp\.linear_fc2)", "ernie"),
    _family("AuraFlow", r"(?:double|single)_layers\.\d|joint_transformer_blocks\.\d", "auraflow"),
    _family("PixelDiT", r"(?:patch|pixel)_blocks\.\d", "pixeldit", "pid"),
    _family("Mochi", rf"{_ROOT}blocks\.\d+\.attn\.(?:qkv_x|qkv_y|proj_x)", "genmomochi", "genmo_mochi"),
    _family("SeedVR2", r"proj_(?:qkv|out)\.(?:vid|txt|all)", "seedvr2"),
    _family("Hunyuan-DiT", r"attn1\.Wqkv|attn2\.kv_proj|default_modulation", "hunyuandit"),
    _family("Stable Audio", r"layers\.\d+\.(?:self_attn\.to_(?:qkv|out)|cross_attn\.to_kv|ff\.ff\.)", "stableaudio"),
    _family("CogVideoX", rf"{_ROOT}blocks\.\d+\.ff_(?:proj|out){_END}", "cogvideox"),
    _family("LTX-Video", r"patchify_proj|(?:audio|video)_to_(?:audio|video)_attn|audio_attn[12]"
            r"|(?:diffusion_model[.]|lora_unet_)transformer_blocks\.\d+\.attn2", "ltx"),
    _family("LTX-Video or PixArt", r"transformer_blocks\.\d+\.attn2\."),
)  # fmt: skip
"""The more particular before the more general."""


def family_of(names: Iterable[str]) -> str:
    """The architecture whose modules these are, or "" if it is none that we know."""
    text = "\n".join(names)
    return next((f.name for f in FAMILIES if f.pattern.search(text)), "")


def family_of_host(name: str) -> str:
    """The same from the name of a host's model class, or of our own family."""
    plain = name.lower()
    known = (f.name for f in FAMILIES if f.name == name or any(plain.startswith(h) for h in f.hosts))
    return next(known, "")


def may_be(family: str, other: str) -> bool:
    """Whether two names of families, each of which may say "or", have one in common."""
    return not set(re.split(r", | or ", family)).isdisjoint(re.split(r", | or ", other))


_FIELD = re.compile(
    r"""(?x)
    ( \.lora_(?:up|down|mid)\.weight | [._]lora\.(?:up|down)\.weight | \.lora_linear_layer\.(?:up|down)\.weight
    | \.lora_[AB](?:\.[^.]+)?\.(?:weight|bias) | \.lora_[AB]
    | \.(?:qkv|proj)_lora\d?\.(?:up|down)\.weight
    | \.hada_(?:w[12]_[ab]|t[12]) | \.lokr_(?:w[12](?:_[ab])?|t2) | \.[ab][12]\.weight
    | \.oft_blocks | \.oft_R(?:\.[^.]+)?(?:\.weight)? | \.rescale
    | \.(?:alpha|dora_scale|reshape_weight|diff|diff_b|diff_m|set_weight|w_norm|b_norm)
    | \.lora_magnitude_vector(?:\.[^.]+){0,2}
    )$"""
)
_TEXT_ENCODER = re.compile(
    r"^(?:lora_te\d?_|lora_prior_te|text_encoders?(?:_\d)?\.|te\d?\.|clip_[lgh]\.|t5xxl\.|base_model\.model\.text_model)"
)


def split_name(key: str) -> tuple[str, str] | None:
    """A tensor's name as ``(module, field)``, e.g. ``("lora_unet_img_in", ".lora_up.weight")``; None for others."""
    found = _FIELD.search(key)
    return (key[: found.start()], found.group(1)) if found and found.start() else None


def is_text_encoder(module: str) -> bool:
    """Whether a module's name in a file belongs to a text encoder."""
    return _TEXT_ENCODER.match(module) is not None


@dataclass(frozen=True)
class FileReport:
    """What became of one file on one model.

    Attributes:
        name: of the file.
        strength: that it runs with.
        matched, total: layers of the diffusion model that the file reaches, and that it speaks of.
        what: its kind and rank, e.g. ``rank 16`` or ``DoRA, rank 8``.
        missing: modules that the model does not have.
        rejected: layers that the adapter does not fit, and why.
        text_encoder: layers of text encoders that the file speaks of.
        cause: why layers are missing, as far as one can tell.
        model: what the model is.
        dialect: whose names the file uses.
        ways: how many layers take which way, in words (`way_of`).
        on_clip: layers of text encoders that a CLIP took; None if there was none.
    """

    name: str
    strength: float
    matched: int
    total: int
    what: str = ""
    missing: tuple[str, ...] = ()
    rejected: Mapping[str, str] = field(default_factory=dict)
    text_encoder: int = 0
    cause: str = ""
    model: str = ""
    dialect: str = ""
    ways: Mapping[str, int] = field(default_factory=dict)
    on_clip: int | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        strength: float,
        state: Mapping[str, torch.Tensor],
        patches: Mapping[Any, Any],
        taken: Collection[Any],
        rejected: Mapping[str, str] | None = None,
        model: str = "",
        placed: Collection[str] = (),
    ) -> FileReport:
        """From what a host's loader made of a file, and what the model took of that.

        Args:
            state: the file's tensors.
            patches: the loader's result, by parameter or (parameter, part of it).
            taken: those of its keys that the model took.
            rejected: by parameter, why it did not take others; by module, why there are no patches of it.
            model: its class, or a family's name.
            placed: modules whose patches hold other tensors than the file's.
        """
        rejected = dict(rejected or {})
        modules = modules_of(state)
        ours = {m: fields for m, fields in modules.items() if not is_text_encoder(m)}
        loaded = _tensors_in(patches.values())
        known = {*rejected, *placed}
        unloaded = {m for m, fields in ours.items() if not any(id(state[k]) in loaded for k in fields.values())}
        missing = tuple(m for m in ours if m in unloaded and m not in known)
        matched = len({place_of(key) for key in taken})
        places = len({place_of(key) for key in patches}) + len(ours.keys() & rejected.keys())
        total = max(matched, places + len(missing))
        return cls(
            name, strength, matched, total, describe(state), missing, rejected, len(modules) - len(ours),
            cause_of(ours, missing, matched, model), family_of_host(model) or model,
        )  # fmt: skip

    @property
    def line(self) -> str:
        """``style.safetensors ×0.80: 304/304 layers, rank 16``; a reason where nothing fits."""
        return plain(self._line())

    def _line(self) -> str:
        if not self.matched:
            return f"{self.name}: {layers(self.on_clip)} of the text encoder" if self.on_clip else self._nothing()
        head = f"{self.name} ×{self.strength:.2f}: {self.matched}/{self.total} layers"
        head += f", {self.what}" if self.what else ""
        if self.missing:
            head += f"; {len(self.missing)} not in this model, such as {examples(self.missing)}"
            head += f" ({self.cause})" if self.cause else ""
        if self.rejected:
            head += f"; {len(self.rejected)} left out, such as {examples(self._reasons())}"
        return head

    @property
    def text(self) -> str:
        """The line, and below it whose names the file uses, which way its layers take, and what it holds for others."""
        if not self.matched:
            return self.line
        ways = [f"{layers(count)} {way}" for way, count in self.ways.items()]
        details = [f"{self.dialect} names"] if self.dialect else []
        lines = [self.line, "; ".join(details + ways)]
        if self.text_encoder and self.on_clip is None:
            lines.append(f"connect a CLIP for the {layers(self.text_encoder)} of text encoders in this file")
        elif self.text_encoder:
            lines.append(f"{self.on_clip} of {self.text_encoder} text encoder layers on the CLIP")
        lines += self.notes
        return "\n  ".join(line for line in lines if line)

    def _reasons(self) -> list[str]:
        return [f"{key}: {why}" for key, why in self.rejected.items()]

    def _nothing(self) -> str:
        if not self.total and self.text_encoder and self.on_clip is None:
            remedy = "connect a CLIP to LoRA Stack (Graft)"
            return f"{self.name} is for a text encoder only ({layers(self.text_encoder)}): {remedy}"
        if not self.total and self.text_encoder:
            return f"{self.name} is for another text encoder (0 of {layers(self.text_encoder)} match)"
        if not self.total:
            return f"{self.name} holds no adapter that is known here: is it a LoRA?"
        cause = self.cause or "it does not fit this model"
        if self.rejected:
            return f"{self.name}: 0 of {self.total} layers fit, such as {examples(self._reasons())}"
        return f"{self.name}: {cause} (0 of {self.total} layers match), such as {examples(self.missing)}"


def layers(count: int) -> str:
    """A number of layers, in words."""
    return f"{count} {'layer' if count == 1 else 'layers'}"


def size_text(nbytes: float) -> str:
    """A number of bytes in three digits and the unit that people use, e.g. ``6.87 GB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def modules_of(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, str]]:
    """The modules that a file speaks of: ``{module: {field: key}}``, in its order."""
    modules: dict[str, dict[str, str]] = {}
    for key in state:
        split = split_name(key)
        if split is not None:
            modules.setdefault(split[0], {})[split[1]] = key
    return modules


_DOWN = re.compile(r"(?:\.lora_down\.weight|\.lora_A(?:\.[^.]+)?(?:\.weight)?|(?:lora\d?|layer)\.down\.weight)$")
_KINDS = (
    ("LoHa", r"\.hada_w1_a"), ("LoKr", r"\.lokr_w"), ("GLoRA", r"\.a1\.weight"), ("OFT", r"\.oft_"),
    ("full", r"\.diff$"), ("DoRA", r"\.dora_scale|\.lora_magnitude_vector"),
)  # fmt: skip


def describe(state: Mapping[str, torch.Tensor]) -> str:
    """Kinds and ranks of a file: ``rank 16``, ``DoRA, rank 4 to 32``, ``LoKr``."""
    fields = {split[1] for split in map(split_name, state) if split is not None}
    parts = [kind for kind, pattern in _KINDS if any(re.match(pattern, field) for field in fields)]
    ranks = {state[k].shape[0] for k in state if (_DOWN.search(k) or k.endswith(".hada_w1_b")) and state[k].dim()}
    if ranks:
        low, high = min(ranks), max(ranks)
        parts.append(f"rank {low}" if low == high else f"rank {low} to {high}")
    return ", ".join(parts)


def _tensors_in(values: Iterable[Any]) -> set[int]:
    """Identities of all tensors in a loader's patches."""
    found: set[int] = set()
    stack = list(values)
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            found.add(id(value))
        elif isinstance(value, (tuple, list)):
            stack += value
        elif hasattr(value, "weights"):
            stack += value.weights
        elif hasattr(value, "__dict__"):
            stack += vars(value).values()
    return found


def place_of(key: Any) -> Any:
    """A layer, or the part of one, whose weight or bias a host's `key` names: ``(layer, (dim, start, length))``."""
    name, *part = (key,) if isinstance(key, str) else key
    return (name.removesuffix(".weight").removesuffix(".bias"), *(p for p in part if not callable(p)))


def cause_of(modules: Iterable[str], missing: Sequence[str], matched: int, model: str) -> str:
    """Why `missing` are missing in `model`, a host's class or a family, as far as names tell."""
    if not missing:
        return ""
    trained, running = family_of(modules), family_of_host(model) or model
    if trained and running and not may_be(trained, running) and matched < len(missing):
        return f"trained for {trained}, model is {running}"
    if matched:
        return f"the file is for another version of {trained}" if trained else ""
    return f"its names are not those of {running}" if running else ""


def examples(names: Sequence[str]) -> str:
    """The first few, in a row; names come from files, so long ones are cut."""
    shown = (n if len(n) <= _EXAMPLE_CHARACTERS else n[: _EXAMPLE_CHARACTERS - 1] + "…" for n in names[:EXAMPLES])
    return plain(", ".join(shown)) + (", …" if len(names) > EXAMPLES else "")


def way_of(path: str, reason: str) -> str:
    """In words, which way a layer takes: `path` and `reason` as `LayerResidual` has them."""
    way = "merged into a decoded copy of the weight" if path == "exact" else "next to the quantized weights"
    return f"{way} ({reason})" if reason else way


__all__ = [
    "FileReport", "cause_of", "describe", "examples", "family_of", "is_text_encoder", "layers", "may_be", "modules_of",
    "place_of", "size_text", "split_name", "way_of",
]  # fmt: skip
