"""What happened to a LoRA file, in one line: how much of it reached the model, and why not more."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch

# what follows the module's name in a key, in every dialect
_FACTORS = re.compile(
    r"\.(lora_(up|down|mid|A|B|E|magnitude_vector)(\.[^.]+)?(\.weight|\.bias)?|lora\.(up|down)\.weight|"
    r"lora_linear_layer\.(up|down)\.weight|alpha|dora_scale|hada_\w+|lokr_\w+|glora_\w+|[ab][12]\.weight|oft_\w+|"
    r"diff|diff_b|diff_m|set_weight|w_norm|b_norm|reshape_weight|scale|norm|bias|weight)$"
    r"|_lora\.(up|down)\.weight$|\.lora_[AB]$"
)
_TEXT_ENCODER = re.compile(r"^(lora_te\d?_|lora_prior_te_|text_encoder|text_encoders|te\d?[._]|clip_[lg]\.|t5xxl\.)")
_RANKS = re.compile(r"\.(lora_down\.weight|lora_A(\.[^.]+)?\.weight|lora\.down\.weight|lora_A)$|_lora\.down\.weight$")

# names of modules that one architecture has and the others have not
_TRAINED_FOR = (
    ("Flux", re.compile(r"double_blocks|single_blocks|single_transformer_blocks")),
    ("SD3", re.compile(r"joint_blocks")),
    ("SDXL", re.compile(r"(input_blocks|down_blocks)[._]\d.*transformer_blocks[._][2-9]|lora_te2_")),
    ("SD1.5", re.compile(r"(input_blocks|down_blocks)[._]\d")),
    ("Wan", re.compile(r"blocks[._]\d+[._](self_attn|cross_attn)")),
    ("Qwen-Image or SD3", re.compile(r"transformer_blocks[._]\d+[._](attn|img_mlp)")),
    ("HunyuanVideo", re.compile(r"(img_attn_qkv|individual_token_refiner)")),
    ("LTX-Video or PixArt", re.compile(r"transformer_blocks[._]\d+[._]attn[12]")),
)


def modules(keys: Iterable[str]) -> tuple[set[str], set[str]]:
    """The modules that a file's keys speak of: ``(of the diffusion model, of text encoders)``."""
    named = {_FACTORS.sub("", key) for key in keys if _FACTORS.search(key)}
    text = {name for name in named if _TEXT_ENCODER.match(name)}
    return named - text, text


def trained_for(keys: Iterable[str]) -> str | None:
    """The architecture that a file's module names point to, if they point to one."""
    names = list(keys)
    return next((what for what, pattern in _TRAINED_FOR if any(map(pattern.search, names))), None)


def ranks(state: Mapping[str, torch.Tensor]) -> list[int]:
    """The ranks of a file's low-rank pairs, the most frequent first."""
    found = Counter(value.shape[0] for key, value in state.items() if value.ndim > 1 and _RANKS.search(key))
    return [rank for rank, _ in found.most_common()]


@dataclass(frozen=True)
class FileReport:
    """One file on one model.

    Attributes:
        matched: layers of the model that an adapter of the file is on.
        total: modules of the diffusion model that the file speaks of.
        missed: names of those that the model does not have.
        rejected: parameter names of the model with the reason why their adapter was not taken.
        text_encoder: modules of text encoders, which a model-only load leaves alone.
        model: what the host calls the model's architecture.
    """

    name: str
    strength: float
    matched: int
    total: int
    ranks: list[int] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    rejected: dict[str, str] = field(default_factory=dict)
    text_encoder: int = 0
    model: str = ""
    likely: str | None = None

    @classmethod
    def of(
        cls, name: str, strength: float, state: Mapping[str, torch.Tensor], found: Mapping[object, object],
        taken: Collection[object], rejected: Mapping[str, str], model: str,
    ) -> FileReport:  # fmt: skip
        """From a file's tensors, the patches that the host found in them, and those that the model took."""
        wanted, text = modules(state)
        claimed = {_FACTORS.sub("", key) for value in found.values() for key in getattr(value, "loaded_keys", ())}
        missed = sorted(wanted - claimed) if claimed else sorted(wanted) if not found else []
        return cls(
            name, strength, len(set(map(_layer, taken))), max(len(wanted), len(set(map(_layer, taken)))), ranks(state),
            missed, dict(rejected), len(text), model, trained_for(state),
        )  # fmt: skip

    @property
    def line(self) -> str:
        """``style.safetensors ×0.80: 304/304 layers, rank 16``, or what is wrong and the likely cause."""
        head = f"{self.name} ×{self.strength:.2f}:"
        if not self.matched:
            return f"{head} {self._nothing()}"
        parts = [f"{self.matched}/{self.total} layers"]
        if self.ranks:
            parts.append(f"rank {self.ranks[0]}" if len(self.ranks) == 1 else f"ranks {min(self.ranks)} to {max(self.ranks)}")
        if self.text_encoder:
            parts.append(f"{self.text_encoder} of text encoders left to CLIP")
        return f"{head} {', '.join(parts)}"

    def _nothing(self) -> str:
        if not self.total and self.text_encoder:
            return f"has only text encoder layers ({self.text_encoder}): load it with a node that also takes CLIP"
        if not self.total:
            return "holds no LoRA that ComfyUI or Graft knows: it may be a full model or an embedding"
        if self.rejected:
            return f"no layer could be used: {next(iter(self.rejected.values()))}"
        cause = f"trained for {self.likely}, model is {self.model}" if self.likely else f"not made for {self.model}"
        return f"LoRA {cause} (0 of {self.total} layers match)"

    @property
    def text(self) -> str:
        """The line, and below it what did not fit: a count and three examples each."""
        lines = [self.line]
        if self.missed and self.matched:
            lines.append(f"  {len(self.missed)} not in this model: {', '.join(self.missed[:3])}")
        if self.rejected and self.matched:
            examples = "; ".join(f"{key}: {why}" for key, why in list(self.rejected.items())[:3])
            lines.append(f"  {len(self.rejected)} rejected: {examples}")
        return "\n".join(lines)


def _layer(key: object) -> str:
    """The layer of a patch's key, which a slice or a function may accompany."""
    name = key if isinstance(key, str) else key[0]  # type: ignore[index]
    return f"{name.rpartition('.')[0]}{'' if isinstance(key, str) else key[1]}"  # type: ignore[index]
