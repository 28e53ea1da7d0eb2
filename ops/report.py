"""What a LoRA file came to: in a line, and on a miss with the count, three examples and the likely cause."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

EXAMPLES = 3


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


def _family(name: str, pattern: str, *hosts: str) -> Family:
    # kohya writes _ for every dot; [.] means a dot alone
    return Family(name, re.compile(pattern.replace(r"\.", "[._]")), hosts or (name.lower(),))


FAMILIES = (
    _family("Stable Cascade", r"lora_prior_unet_", "stable_cascade"),
    _family("HunyuanVideo", r"individual_token_refiner|double_blocks[.]\d+[.](?:img_attn_qkv|img_mod[.]linear)",
            "hunyuan"),
    _family("HiDream", r"(?:double|single)_stream_blocks\.\d", "hidream"),
    _family("Flux", r"(?:double_blocks\.\d+\.(?:img|txt)_|double_blocks\.\d+\.processor|single_transformer_blocks\.\d)",
            "flux", "chroma", "longcat"),
    _family("Flux", r"single_blocks\.\d+\.(?:linear|modulation|processor)", "flux", "chroma", "longcat"),
    _family("Qwen-Image", r"transformer_blocks\.\d+\.(?:img|txt)_m(?:lp|od)", "qwenimage"),
    _family("SD3", r"joint_blocks\.\d|transformer_blocks\.\d+\.(?:attn\.add_[qkv]|norm1_context|ff_context)", "sd3"),
    _family("Wan", r"blocks\.\d+\.(?:self_attn|cross_attn)\.[qkvo]\b|blocks\.\d+\.(?:self|cross)_attn_[qkvo]", "wan"),
    _family("SDXL", r"(?:input_blocks\.[78]\.1|down_blocks\.2\.attentions\.\d|mid_block\.attentions\.0|middle_block\.1)"
            r"\.transformer_blocks\.[1-9]|lora_te2_text_model", "sdxl", "ssd1b", "segmind", "koala"),
    _family("SD1.5 or SD2", r"(?:input|output)_blocks\.\d+\.\d|(?:down|up)_blocks\.\d\.|mid_block\.|middle_block\.",
            "sd15", "sd20", "sd21", "sd1", "sd2"),
    _family("Lumina 2", r"(?:noise|context)_refiner\.\d|layers\.\d+\.(?:feed_forward|attention)\.", "lumina", "zimage"),
    _family("AuraFlow", r"(?:double|single)_layers\.\d|joint_transformer_blocks\.\d", "auraflow"),
    _family("Mochi", r"blocks\.\d+\.attn\.(?:qkv_x|qkv_y|proj_x)", "genmo_mochi", "genmomochi"),
    _family("LTX-Video", r"transformer_blocks\.\d+\.attn[12]\.", "ltxv", "pixart"),
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


_FIELD = re.compile(
    r"""(?x)
    ( \.lora_(?:up|down|mid)\.weight | [._]lora\.(?:up|down)\.weight | \.lora_linear_layer\.(?:up|down)\.weight
    | \.lora_[AB](?:\.[^.]+)?\.(?:weight|bias) | \.lora_[AB]
    | \.(?:qkv|proj)_lora\d?\.(?:up|down)\.weight
    | \.hada_(?:w[12]_[ab]|t[12]) | \.lokr_(?:w[12](?:_[ab])?|t2) | \.[ab][12]\.weight
    | \.oft_blocks | \.oft_R(?:\.[^.]+)?(?:\.weight)? | \.rescale
    | \.(?:alpha|dora_scale|reshape_weight|diff|diff_b|diff_m|set_weight|w_norm|b_norm)
    | \.lora_magnitude_vector(?:\.[^.]+)*
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
    ) -> FileReport:
        """From what a host's loader made of a file, and what the model took of that.

        Args:
            state: the file's tensors.
            patches: the loader's result, by parameter or (parameter, part of it).
            taken: those of its keys that the model took.
            rejected: by parameter, why it did not take others.
            model: its class, or a family's name.
        """
        rejected = dict(rejected or {})
        modules = modules_of(state)
        ours = {m: fields for m, fields in modules.items() if not is_text_encoder(m)}
        loaded = _tensors_in(patches.values())
        missing = tuple(m for m, fields in ours.items() if not any(id(state[k]) in loaded for k in fields.values()))
        matched = len({place_of(key) for key in taken})
        total = max(matched, len({place_of(key) for key in patches}) + len(missing))
        return cls(
            name, strength, matched, total, describe(state), missing, rejected, len(modules) - len(ours),
            cause_of(ours, missing, matched, model), family_of_host(model) or model,
        )  # fmt: skip

    @property
    def line(self) -> str:
        """``style.safetensors ×0.80: 304/304 layers, rank 16``; a reason where nothing fits."""
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
            lines.append(f"{layers(self.text_encoder)} of text encoders in it need a CLIP")
        elif self.text_encoder:
            lines.append(f"{self.on_clip} of {self.text_encoder} text encoder layers on the CLIP")
        return "\n  ".join(line for line in lines if line)

    def _reasons(self) -> list[str]:
        return [f"{key}: {why}" for key, why in self.rejected.items()]

    def _nothing(self) -> str:
        if not self.total and self.text_encoder:
            return (
                f"{self.name} is for a text encoder only ({self.text_encoder} layers): "
                "load it with a node that has a CLIP input"
            )
        if not self.total:
            return f"{self.name} holds no adapter that is known here: is it a LoRA?"
        cause = self.cause or "it does not fit this model"
        if self.rejected:
            return f"{self.name}: 0 of {self.total} layers fit, such as {examples(self._reasons())}"
        return f"{self.name}: {cause} (0 of {self.total} layers match), such as {examples(self.missing)}"


def layers(count: int) -> str:
    """A number of layers, in words."""
    return f"{count} {'layer' if count == 1 else 'layers'}"


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
    if trained and running and trained != running and matched < len(missing):
        return f"trained for {trained}, model is {running}"
    if matched:
        return f"the file is for another version of {trained}" if trained else ""
    return f"its names are not those of {running}" if running else ""


def examples(names: Sequence[str]) -> str:
    """The first few, in a row."""
    return ", ".join(names[:EXAMPLES]) + (", …" if len(names) > EXAMPLES else "")


def way_of(path: str, reason: str) -> str:
    """In words, which way a layer takes: `path` and `reason` as `LayerResidual` has them."""
    way = "by the host's own merge on the decoded weight" if path == "exact" else "beside the packed weight"
    return f"{way} ({reason})" if reason else way


__all__ = [
    "FileReport", "cause_of", "describe", "examples", "family_of", "is_text_encoder", "layers", "modules_of",
    "place_of", "split_name", "way_of",
]  # fmt: skip
