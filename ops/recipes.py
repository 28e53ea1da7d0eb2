"""Recipes: what each kind of tensor becomes when a model is written as GGUF.

The mixes of the K types and what stays in floats are those of city96's patch to llama.cpp for diffusion models
(ComfyUI-GGUF, tools/lcpp.patch), by which nearly all files of such models were made. It has none for the I types: those
follow llama.cpp's own for language models.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from ..kernels import Format, GraftError, UnsupportedFormat, by_name
from .files.contents import OWN_NAMES
from .merged import MergedTensor
from .packed import PackedTensor
from .quantize import cannot_write, needs_importance

_TABLE = """
recipe   number  most     values       fused  down
F32      0       F32
F16      1       F16
BF16     32      BF16
Q8_0     7       Q8_0
Q6_K     18      Q6_K
Q5_K_M   17      Q5_K     Q6_K         Q6_K   Q6_K
Q5_K_S   16      Q5_K
Q5_1     9       Q5_1
Q5_0     8       Q5_0     Q5_0         Q5_0   Q5_1
Q4_K_M   15      Q4_K     Q6_K         Q5_K   Q6_K
Q4_K_S   14      Q4_K     Q5_K×4,Q4_K  Q4_K   Q5_K
Q4_1     3       Q4_1
Q4_0     2       Q4_0     Q4_0         Q4_0   Q4_1
IQ4_NL   25      IQ4_NL   Q5_K         IQ4_NL IQ4_NL
IQ4_XS   30      IQ4_XS   Q5_K         IQ4_XS IQ4_XS
Q3_K_L   13      Q3_K     Q5_K         Q4_K   Q5_K
Q3_K_M   12      Q3_K     Q5_K×2,Q4_K  Q4_K   Q4_K
Q3_K_S   11      Q3_K
IQ3_S    26      IQ3_S    Q4_K         IQ3_S  IQ3_S
IQ3_XXS  23      IQ3_XXS  IQ3_S        IQ3_S  IQ3_XXS
Q2_K     10      Q2_K     Q3_K         Q2_K   Q2_K
IQ2_S    28      IQ2_S    Q3_K         Q2_K   IQ2_S
IQ2_XS   20      IQ2_XS   Q2_K         Q2_K   IQ2_XS
IQ2_XXS  19      IQ2_XXS  Q2_K         Q2_K   IQ2_XXS
IQ1_M    31      IQ1_M    Q2_K         Q2_K   IQ1_M
IQ1_S    24      IQ1_S    Q2_K         Q2_K   IQ1_S
"""
"""`values` are the weights of attention's values, `fused` those of queries, keys and values in one, `down` the second
of a feed-forward, `most` all others; ``Q5_K×4,Q4_K``: the first four of the model in Q5_K. The number is
``general.file_type``."""

_KINDS = {
    "values": re.compile(
        r"attn_v\.weight|\.to_v\.weight|\.v\.weight|\.attn\.w[12]v\.weight|\.attn\.wv\.weight|_attn\.v_proj\.weight"
    ),
    "fused": re.compile(r"(?:attn_qkv|attn\.qkv|attention\.qkv|attn\.Wqkv)\.weight"),
    "down": re.compile(
        r"ffn_down|experts\.(?:(?!experts\.).)*\.w2\.weight|\.ffn\.2\.weight|\.ff\.net\.2\.weight|\.mlp\.net\.2\.weight"
        r"|\.mlp\.layer2\.weight|\.adaln_modulation_mlp\.2\.weight|\.feed_forward\.w2\.weight|(?:mlp|experts)\.down(?:_proj)?\.weight"
    ),
}

KEPT: dict[str, str] = {
    "flux": "txt_in. img_in. time_in. vector_in. guidance_in. final_layer. distilled_guidance_layer.",
    "sd1": "class_embedding. time_embedding. add_embedding. time_embed. label_emb. conv_in. conv_out. "
    "input_blocks.0.0.weight out.2.weight",
    "sd3": "final_layer. time_text_embed. context_embedder. t_embedder. y_embedder. x_embedder. proj_out.weight "
    "pos_embed",
    "aura": "t_embedder. init_x_linear. modF.1.weight cond_seq_linear.weight final_linear.weight positional_encoding "
    "register_tokens",
    "ltxv": "adaln_single. caption_projection. patchify_proj. proj_out. scale_shift_table",
    "hyvid": "txt_in. img_in. time_in. vector_in. guidance_in. final_layer.",
    "wan": "modulation. patch_embedding. text_embedding. time_projection. time_embedding. img_emb. head.",
    "hidream": "p_embedder. t_embedder. x_embedder. final_layer. .ff_i.gate.weight caption_projection.",
    "cosmos": "p_embedder. t_embedder. t_embedding_norm. x_embedder. pos_embedder. final_layer.",
    "lumina2": "t_embedder. x_embedder. final_layer. cap_embedder. context_refiner. noise_refiner.",
    "qwen_image": "time_text_embed. img_in. txt_in. norm_out. proj_out.",
}  # fmt: skip
"""By architecture, what stays in floats: parts of names. It is what words, time and picture enter and leave by."""
KEPT["sdxl"] = KEPT["sd1"]

_IN_FLOATS_ANYWHERE = re.compile(
    r"norm(?:(?!norm)[^.])*\.weight$|relative_attention_bias|attn_rel_b|position_embedding|pos_embed"
)
_WITHIN_BLOCKS = re.compile(r"(?:block|layer|refiner|h|blk)s?(?:(?!block|layer|refiner|h|blk)\w)*\.\d+\.")
"""Of an architecture that is not in the table, all that is outside of its blocks stays in floats."""

_IN_F32 = re.compile(r"\.ff_i\.gate\.weight|img_emb\.emb_pos|pos_embedder|\.modulation$|scale_shift_table")
"""Parameters that hosts would compute with in the dtype of the file."""

READ_BY_PEERS = ("t5encoder", "t5", "llama", "qwen2vl", "qwen3", "qwen3vl")
"""Text encoders that ComfyUI-GGUF takes."""

TEXT_ENCODERS = (*READ_BY_PEERS, "gemma2", "gemma3", "clip", OWN_NAMES)
FOLDED = ("sd1", "sdxl")
"""Where tensors whose rows fill no blocks are stored in rows of 256, with their own shape in the metadata."""

_VOCABULARY = re.compile(r"^token_embd\.weight$|(?:embed_tokens|token_embedding|word_embeddings|^shared)\.weight$")
_EXPERTS = re.compile(r"\.experts\.\w+\.weight$")

_SMALL = 1024  # weights: below, a tensor is kept as F32
_FOLD, _FOLD_FROM = 256, 512
_FLOATS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NARROWER = {
    **dict.fromkeys(("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "IQ4_NL"),
    "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0",
}  # fmt: skip
"""llama.cpp's: what takes the place of a type with blocks of 256 where rows fill blocks of 32."""

SAME = "as it is"
"""The recipe that leaves every tensor in the type that it has."""


@dataclass(frozen=True)
class Recipe:
    """A row of the table; each kind of tensor has the types of its first ones, and that of all others last."""

    name: str
    number: int | None
    types: Mapping[str, tuple[tuple[int, str], ...]] = field(repr=False)

    def type_of(self, kind: str, nth: int) -> str:
        """The type of the `nth` tensor of a kind, counted from 0."""
        for count, name in self.types[kind]:
            if nth < count:
                return name
        return self.types[kind][-1][1]


class Rule(NamedTuple):
    """``pattern = type``: a glob for whole names, or, without ``*``, a part of them."""

    pattern: str
    type: str

    def fits(self, name: str) -> bool:
        if any(sign in self.pattern for sign in "*?["):
            return fnmatch.fnmatchcase(name, self.pattern)
        return self.pattern in name


class Choice(NamedTuple):
    """What a tensor becomes.

    Attributes:
        fmt: its type in the file.
        shape: there, in torch's order.
        why: if it is not what the recipe says.
    """

    fmt: Format
    shape: tuple[int, ...]
    why: str = ""


def _read_table() -> dict[str, Recipe]:
    rows = [line.split() for line in _TABLE.strip().splitlines()[1:]]
    found = {}
    for name, number, *types in rows:
        columns = types if len(types) == 4 else types * 4
        parsed = {
            kind: tuple(
                (int(times or 1 << 30), what)
                for what, _, times in (part.partition("×") for part in column.split(","))
            )
            for kind, column in zip(("most", "values", "fused", "down"), columns, strict=True)
        }  # fmt: skip
        found[name] = Recipe(name, int(number), parsed)
    return found


RECIPES = _read_table()
NAMES = (*RECIPES, SAME)


def recipe_named(name: str) -> Recipe | None:
    """The recipe of this name, or one that makes all weights this type of GGUF; None for `SAME`.

    Raises:
        UnsupportedFormat: there is none.
    """
    if name == SAME:
        return None
    if name in RECIPES:
        return RECIPES[name]
    try:
        fmt = by_name(name)
    except UnsupportedFormat:
        raise UnsupportedFormat(f"there is no recipe {name!r}: choose one of {', '.join(NAMES)}") from None
    return Recipe(fmt.name, None, dict.fromkeys(("most", "values", "fused", "down"), ((1 << 30, fmt.name),)))


def parse_rules(text: str | Iterable[str]) -> tuple[Rule, ...]:
    """Rules from lines ``pattern = type``; empty ones and those that begin with # say nothing.

    Raises:
        GraftError: a line is none.
    """
    rules = []
    for line in text.splitlines() if isinstance(text, str) else text:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        pattern, equals, name = (part.strip() for part in line.rpartition("="))
        if not (pattern and equals and name):
            raise GraftError(f"{line.strip()!r} is no rule: write `pattern = type`, such as `*.attn.qkv.weight = Q6_K`")
        if reason := cannot_write(by_name(name), True):
            raise UnsupportedFormat(f"the rule {line.strip()!r}: {reason}")
        rules.append(Rule(pattern, name))
    return tuple(rules)


class Chooser:
    """Says for each tensor of a model, in the model's order, what it becomes."""

    def __init__(
        self,
        recipe: Recipe | None,
        architecture: str,
        rules: Sequence[Rule] = (),
        measured: Collection[str] | None = None,
    ) -> None:
        """Args:
        recipe: None to leave each tensor in its type.
        architecture: ``general.architecture``.
        measured: the tensors whose importance is known; None if there is no matrix.
        """
        self.recipe, self.architecture, self.rules, self.measured = recipe, architecture, rules, measured
        self._seen: dict[str, int] = {}

    def choose(self, name: str, tensor: torch.Tensor) -> Choice:
        """What `tensor` becomes.

        Raises:
            UnsupportedFormat: nothing here writes the type that it is to become.
        """
        if tensor.dtype == torch.int8:  # bytes, such as those of a tokenizer
            return Choice(by_name("I8"), _at_least_1d(tensor.shape))
        rule = next((rule for rule in self.rules if rule.fits(name)), None)
        wanted = self._wanted(name, tensor) if rule is None else by_name(rule.type)
        if not wanted.is_quantized:
            return Choice(wanted, _at_least_1d(tensor.shape))
        if isinstance(tensor, PackedTensor) and tensor.fmt == wanted and tensor.scale is None:
            return Choice(wanted, stored_shape(tensor))
        return self._fitting(name, tensor, wanted)

    def _wanted(self, name: str, tensor: torch.Tensor) -> Format:
        if self.recipe is None:
            return own_type(tensor)
        if _stays_small(name, tensor):
            return by_name("F32")
        if self._is_kept(name, tensor):
            kept = own_type(tensor)
            return by_name("F16") if kept.name == "F32" else kept
        kind = next((kind for kind, pattern in _KINDS.items() if pattern.search(name)), "most")
        nth = self._seen[kind] = self._seen.get(kind, -1) + 1
        fmt = by_name(self.recipe.type_of(kind, nth))
        if _VOCABULARY.search(name) and fmt.is_quantized and fmt.bits_per_weight < by_name("Q6_K").bits_per_weight:
            return by_name("Q6_K")  # as llama.cpp has tables from which whole rows are taken
        return fmt

    def _is_kept(self, name: str, tensor: torch.Tensor) -> bool:
        folds = self.architecture in FOLDED and tensor.dim() == 4
        reads = self.architecture in TEXT_ENCODERS
        fits = tensor.dim() == 2 or folds or (reads and tensor.dim() == 3 and _EXPERTS.search(name))
        if not name.endswith("weight") or not fits or _IN_FLOATS_ANYWHERE.search(name):
            return True
        if reads:
            return False
        if self.architecture in KEPT:
            return any(part in name for part in KEPT[self.architecture].split())
        return _WITHIN_BLOCKS.search(name) is None

    def _fitting(self, name: str, tensor: torch.Tensor, wanted: Format) -> Choice:
        fmt, why = wanted, ""
        if needs_importance(fmt) and self.measured is not None and name not in self.measured:
            fmt, why = by_name("Q2_K"), f"no importance data, which {fmt} needs"
        if reason := cannot_write(fmt, self.measured is not None):
            raise UnsupportedFormat(reason)
        columns, count = tensor.shape[-1] if tensor.dim() else 1, tensor.numel()
        shape = _at_least_1d(tensor.shape)
        if columns % fmt.block_size == 0:
            return Choice(fmt, shape, why)
        if self.architecture in FOLDED and count >= _FOLD_FROM and count % _FOLD == 0:
            return Choice(fmt, (count // _FOLD, _FOLD), why)
        other = by_name(_NARROWER.get(fmt.name, fmt.name))
        if columns % other.block_size:
            other = float_type(tensor)
        return Choice(other, shape, f"rows of {columns} do not fit {fmt} (blocks of {fmt.block_size})")


def _stays_small(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor is so small, or of such a kind, that it is kept in F32."""
    several = tensor.dim() > 4  # which llama.cpp's tools cannot handle
    return tensor.dim() <= 1 or several or tensor.numel() <= _SMALL or _IN_F32.search(name) is not None


def own_type(tensor: torch.Tensor) -> Format:
    """The type that a tensor has, or what it is merged from, as far as weights are written in it; else F16."""
    if isinstance(tensor, MergedTensor):
        return own_type(tensor.source)
    if isinstance(tensor, PackedTensor):
        return tensor.fmt if tensor.scale is None else by_name("F16")
    return by_name(_FLOATS.get(tensor.dtype, "F16"))


def float_type(tensor: torch.Tensor) -> Format:
    """The 16-bit type that loses least of a tensor."""
    source = tensor.source if isinstance(tensor, MergedTensor) else tensor
    return by_name("BF16" if source.dtype == torch.bfloat16 and not isinstance(source, PackedTensor) else "F16")


def stored_shape(tensor: PackedTensor) -> tuple[int, ...]:
    """The shape in which packed bytes are stored: their own, or rows of 256 where rows do not fill blocks."""
    shape = _at_least_1d(tensor.shape)
    return shape if shape[-1] % tensor.fmt.block_size == 0 else (tensor.numel() // _FOLD, _FOLD)


def _at_least_1d(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape) or (1,)


__all__ = ["NAMES", "RECIPES", "SAME", "Choice", "Chooser", "Recipe", "Rule", "parse_rules", "recipe_named"]
