"""Where the rows of a layer's activations lie: in the picture, in the words, or nowhere.

A mask is about the picture. A layer sees rows of tokens, in an order that its architecture has and that its path tells:
words first or last in a joint stream, references behind the picture, padding up to a multiple.
"""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels import AdapterError, GraftError


class Place(Enum):
    """What the rows of a layer are, in their order; references always follow the picture."""

    PICTURE = "picture"
    WORDS = "words"
    WORDS_PICTURE = "words, picture"
    PICTURE_WORDS = "picture, words"
    LEVEL = "a level of a UNet"
    SELF_ATTENTION = "self-attention at a level of a UNet"
    NOWHERE = "nowhere"


@dataclass(frozen=True)
class Picture:
    """The picture or video of a model call, in cells of its latent.

    Attributes:
        frames, rows, columns: of the latent; a picture has one frame.
        patch: cells of a token in each of these directions.
        before: tokens in front of the picture's own, such as Wan's reference.
        behind: tokens of reference pictures behind them.
        multiple: what the picture's tokens are padded to a multiple of.
        keeps_references: whether only the layers that take references in see them: attention has kept the rest of an
            earlier call.
        batch: pictures that the call draws, of all conditionings; 0 where that is not known.
        merges_tokens: whether self-attention sees fewer tokens than there are (ToMe).
    """

    frames: int
    rows: int
    columns: int
    patch: tuple[int, int, int] = (1, 1, 1)
    before: int = 0
    behind: int = 0
    multiple: int = 1
    keeps_references: bool = False
    batch: int = 0
    merges_tokens: bool = False

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens in each direction; models pad the latent to whole ones."""
        t, h, w = (-(-n // p) for n, p in zip((self.frames, self.rows, self.columns), self.patch, strict=True))
        return t, h, w

    @property
    def tokens(self) -> int:
        """The picture's own."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class Window:
    """The part of a whole picture that a model call draws, in cells of its latent.

    Attributes:
        rows, columns: of the whole.
        top, left: where the part begins.
        indices: which frames, rows or columns of the whole it has, one by one, if not all of them in a row.
        axis: what these are: 0 frames, 1 rows, 2 columns.
        total: how many frames the whole has, where `indices` are frames; 0 where nobody has told, nor which they are.
    """

    rows: int
    columns: int
    top: int = 0
    left: int = 0
    indices: tuple[int, ...] = ()
    axis: int = 0
    total: int = 0

    def cut(self, mask: torch.Tensor, picture: Picture) -> torch.Tensor:
        """A mask of the whole, ``[n, rows, columns]`` of any size, for the part alone: a number for each cell.

        Raises:
            GraftError: the mask differs from frame to frame, and nobody has told which frames these are.
        """
        cells = F.interpolate(mask.unsqueeze(1), (self.rows, self.columns), mode="area")[:, 0]
        if self.indices and self.axis:
            cells = cells.index_select(self.axis, torch.tensor(self.indices, device=cells.device))
        elif self.indices and cells.shape[0] > 1:
            if not self.total:
                raise GraftError(
                    "a LoRA has a mask for each frame, and another node draws the video in parts: nobody tells which, "
                    "so give it one mask for all frames or take that node out"
                )
            cells = _over_time(cells, self.total)[list(self.indices)]
        return cells[:, self.top : self.top + picture.rows, self.left : self.left + picture.columns]


def patch_of(model: Any, default: int = 1) -> tuple[int, int, int]:
    """Cells of a token in each direction, by what a host's class of models says of itself."""
    size = getattr(model, "patch_size", getattr(model, "patch", default))
    patch = (size, size) if isinstance(size, int) else tuple(size)
    return (*(1,) * (3 - len(patch)), *patch) if all(isinstance(n, int) for n in patch) else (1, 1, 1)


def picture_of(
    latent: torch.Tensor, patch: tuple[int, int, int], before: Sequence[torch.Tensor | None] = (),
    behind: Sequence[torch.Tensor | None] = (), multiple: int = 1, options: Mapping[str, Any] | None = None,
) -> Picture:  # fmt: skip
    """The picture of a latent ``[B, C, (frames,) rows, columns]`` with reference latents before and behind it.

    Args:
        options: both hosts' ``transformer_options`` of the call, whose patches may change what layers see.
    """

    def alone(latent: torch.Tensor) -> Picture:
        frames, rows, columns = (*(1,) * (5 - latent.dim()), *latent.shape[2:])
        return Picture(frames, rows, columns, patch)

    def tokens(latents: Sequence[torch.Tensor | None]) -> int:
        return sum(alone(latent).tokens for latent in latents if latent is not None)

    patches = ((options or {}).get("patches") or {}).get("attn1_patch") or ()
    return replace(
        alone(latent), before=tokens(before), behind=tokens(behind), multiple=multiple, batch=latent.shape[0],
        # ComfyUI's FluxKVCache, once a call has filled it
        keeps_references=any(type(patch).__name__ == "KV_Attn_Input" and patch.cache for patch in patches),
        merges_tokens=any("tomesd" in str(getattr(patch, "__module__", "")) for patch in patches),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Architecture:
    """Where the tokens of one family of models are.

    Attributes:
        name: as people call it.
        marks: layers by which it is known; all of them are there.
        rules: ``(pattern, place)``; the first pattern that a layer's whole path fits counts, else it is nowhere.
        code: what stands in the code of its class, where hosts of different ages join words and picture in another
            order; "" where all do the same.
    """

    name: str
    marks: tuple[str, ...]
    rules: tuple[tuple[re.Pattern[str], Place], ...]
    code: str = ""


def _architecture(name: str, marks: str, code: str = "", **patterns: str) -> Architecture:
    rules = ((re.compile(rf"^(?:{pattern})$"), Place[place]) for place, pattern in patterns.items())
    return Architecture(name, tuple(marks.split()), tuple(rules), code)


_STREAMS = {
    "PICTURE": r"double_blocks\.\d+\.img_(?:attn|mlp)\..+|img_in(?:\.proj)?|final_layer\.linear",
    "WORDS": r"double_blocks\.\d+\.txt_(?:attn|mlp)\..+|txt_in(?:\..+)?",
}
_HUNYUAN_VIDEO = "double_blocks.0.img_attn.qkv txt_in.individual_token_refiner.blocks.0.self_attn.qkv"
ARCHITECTURES = (
    _architecture(
        "HunyuanVideo", _HUNYUAN_VIDEO, "torch.cat((txt, img), 1)",  # since it also runs version 1.5
        **_STREAMS, WORDS_PICTURE=r"single_blocks\.\d+\.linear[12]",
    ),
    _architecture(
        "HunyuanVideo", _HUNYUAN_VIDEO, "torch.cat((img, txt), 1)",
        **_STREAMS, PICTURE_WORDS=r"single_blocks\.\d+\.linear[12]",
    ),
    _architecture(
        "Flux", "double_blocks.0.img_attn.qkv single_blocks.0.linear1",
        **_STREAMS, WORDS_PICTURE=r"single_blocks\.\d+\.linear[12]",
    ),
    _architecture(
        "SD3", "joint_blocks.0.x_block.attn.qkv",
        PICTURE=r"joint_blocks\.\d+\.x_block\.(?:attn2?|mlp)\..+|x_embedder\.proj|final_layer\.linear",
        WORDS=r"joint_blocks\.\d+\.context_block\.(?:attn|mlp)\..+|context_embedder",
    ),
    _architecture(
        "Qwen-Image", "transformer_blocks.0.img_mlp.net.0.proj transformer_blocks.0.attn.add_q_proj",
        PICTURE=r"transformer_blocks\.\d+\.(?:img_mlp\..+|attn\.to_(?:[qkv]|out\.0))|img_in|proj_out",
        WORDS=r"transformer_blocks\.\d+\.(?:txt_mlp\..+|attn\.(?:add_[qkv]_proj|to_add_out))|txt_in",
    ),
    _architecture(
        "Lumina 2", "layers.0.attention.qkv noise_refiner.0.attention.qkv",
        PICTURE=r"noise_refiner\.\d+\.(?:attention|feed_forward)\..+|x_embedder",
        WORDS=r"context_refiner\.\d+\.(?:attention|feed_forward)\..+|cap_embedder\..+",
        WORDS_PICTURE=r"layers\.\d+\.(?:attention|feed_forward)\..+|final_layer\.linear",
    ),
    _architecture(
        "Krea 2", "blocks.0.attn.wq txtmlp.1 first",
        PICTURE=r"first",
        WORDS=r"txtfusion\..+|txtmlp\..+",
        WORDS_PICTURE=r"blocks\.\d+\.(?:attn|mlp)\..+|last\.linear",
    ),
    _architecture(
        "Wan", "blocks.0.self_attn.q blocks.0.cross_attn.q patch_embedding",
        PICTURE=r"(?:vace_)?blocks\.\d+\.(?:self_attn\..+|cross_attn\.[qo]|ffn\..+)|(?:vace_)?patch_embedding|head\.head",
        WORDS=r"(?:vace_)?blocks\.\d+\.cross_attn\.[kv]|text_embedding\..+",
    ),
    _architecture(
        "LTX-Video", "transformer_blocks.0.attn1.to_q patchify_proj",
        PICTURE=r"transformer_blocks\.\d+\.(?:attn1\..+|attn2\.to_(?:q|out\.0)|ff\..+)|patchify_proj|proj_out",
        WORDS=r"transformer_blocks\.\d+\.attn2\.to_[kv]|caption_projection\..+",
    ),
    _architecture(
        "Stable Diffusion", "input_blocks.0.0 time_embed.0",
        WORDS=r".+\.attn2\.to_[kv]",
        NOWHERE=r".+\.emb_layers\.\d+|time_embed\..+|label_emb\..+",
        SELF_ATTENTION=r".+\.attn1\..+",
        LEVEL=r"(?:input_blocks|middle_block|output_blocks|out)\..+",
    ),
)  # fmt: skip
"""The more particular before the more general."""


def architecture_of(layers: Collection[str], network: type | None = None) -> Architecture:
    """The architecture that these layers are of, by path, with or without ``diffusion_model.`` in front.

    Args:
        network: the class of the model, whose code is read where that tells hosts apart.

    Raises:
        AdapterError: nobody has written down where its tokens are.
    """
    paths = {native(path) for path in layers}
    alike = (a for a in ARCHITECTURES if all(mark in paths for mark in a.marks))
    found = next((a for a in alike if a.code in _code_of(network)), None)
    if found is None:
        known = ", ".join(dict.fromkeys(a.name for a in ARCHITECTURES))
        raise AdapterError(
            "take the mask off: it needs to know where this model keeps its picture, schedules and blocks do not "
            f"(masks work on {known})"
        )
    return found


@functools.cache
def _code_of(network: type | None) -> str:
    """"" where there is none to be had: then no architecture is told by it."""
    try:
        return "" if network is None else inspect.getsource(network)
    except (OSError, TypeError):
        return ""


def native(path: str) -> str:
    """A layer's path without what hosts and compilers put in front of it and into it."""
    return path.replace("_orig_mod.", "").removeprefix("diffusion_model.")


@functools.cache
def place_of(architecture: Architecture, path: str) -> Place:
    """What the rows of the layer at `path` are."""
    plain = native(path)
    return next((place for pattern, place in architecture.rules if pattern.search(plain)), Place.NOWHERE)


def on_tokens(mask: torch.Tensor, picture: Picture) -> torch.Tensor:
    """A mask ``[n, rows, columns]`` of any size as a number for each token of the picture: ``[tokens]``.

    It is averaged over each cell and over each token's cells, so that edges stay sharp, and goes over time from its
    first frame to its last.
    """
    t, h, w = picture.grid
    cells = F.interpolate(mask.unsqueeze(1), (picture.rows, picture.columns), mode="area")
    # what lies outside of the picture is as its edge
    _, ph, pw = picture.patch
    cells = F.pad(cells, (0, w * pw - picture.columns, 0, h * ph - picture.rows), mode="replicate")
    grid = F.avg_pool2d(cells, (ph, pw))[:, 0]
    return _over_time(grid, t).flatten()


def on_positions(mask: torch.Tensor, space: torch.Size) -> torch.Tensor:
    """The same for the positions of a convolution, ``[1, *space]`` with one to three dimensions of space."""
    rows, columns = (1, *space)[-2:]
    grid = F.interpolate(mask.unsqueeze(1), (rows, columns), mode="area")[:, 0]
    return _over_time(grid, space[0] if len(space) == 3 else 1).reshape(1, *space)


def _over_time(grid: torch.Tensor, frames: int) -> torch.Tensor:
    """``[n, h, w] -> [frames, h, w]``; one for all, or the first to the first and the last to the last."""
    if grid.shape[0] == frames:
        return grid
    if grid.shape[0] == 1:
        return grid.expand(frames, -1, -1)
    if frames == 1:
        return grid[:1]
    flat = grid.flatten(1).t().unsqueeze(0)
    return F.interpolate(flat, frames, mode="linear", align_corners=True)[0].t().reshape(frames, *grid.shape[1:])


def over_rows(
    mask: torch.Tensor, picture: Picture, place: Place, count: int, elsewhere: float, path: str, batch: int = 0
) -> torch.Tensor:
    """A number for each of a layer's `count` rows of tokens: the mask in the picture, `elsewhere` for all others.

    Args:
        batch: how many such rows of tokens the layer has; 0 where that is not known.

    Raises:
        GraftError: they are not those of the picture.
    """
    if place in (Place.LEVEL, Place.SELF_ATTENTION):
        is_merged = picture.merges_tokens and place is Place.SELF_ATTENTION
        if is_merged or (picture.batch and batch not in (0, picture.batch)):
            raise GraftError(
                f"{path} has other tokens than the picture, which another node or extension merges or cuts into tiles "
                "(ToMe, HyperTile): take the mask off or that out"
            )
        return on_tokens(mask, _level(picture, count, path))
    own = on_tokens(mask, picture)
    padding, behind = -own.numel() % picture.multiple, picture.behind
    if place is Place.PICTURE and count == picture.before + own.numel() + behind:
        padding = 0  # a layer that makes the tokens, before they are padded
    elif picture.keeps_references:
        behind = 0
    around = [picture.before, padding + behind]
    words = count - own.numel() - sum(around)
    if words < 0 or (words and place is Place.PICTURE):
        raise GraftError(
            f"{path} has {count} tokens where the picture has {own.numel() + sum(around)}: "
            "another node or extension changes what this model sees, take the mask off or that out"
        )
    if place is Place.PICTURE_WORDS:
        around[1] += words
    else:
        around[0] += words
    return F.pad(own, (around[0], around[1]), value=elsewhere)


def _level(picture: Picture, count: int, path: str) -> Picture:
    """The picture at the level of a UNet that has `count` tokens: its sides are halved and rounded up."""
    rows, columns = picture.rows, picture.columns
    while rows * columns > count and rows * columns > 1:
        rows, columns = -(-rows // 2), -(-columns // 2)
    if rows * columns != count:
        raise GraftError(
            f"{path} has {count} tokens, which is no level of a picture of {picture.rows} by {picture.columns}: "
            "another node or extension changes what this model sees, take the mask off or that out"
        )
    return Picture(1, rows, columns)


__all__ = [
    "ARCHITECTURES", "Architecture", "Picture", "Place", "Window", "architecture_of", "native", "on_positions",
    "on_tokens", "over_rows", "patch_of", "picture_of", "place_of",
]  # fmt: skip
