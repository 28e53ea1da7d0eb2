"""The two layouts in which Forge holds packed bytes: the file's, and the one that it bakes for its own decode.

On the first load Forge rewrites four types: scales are cast to the computation dtype, and two nibbles of
one byte become neighbours instead of half a block apart; Q4_K's header of 16 bytes (d, dmin, 6-bit scales)
grows to 32 (a scale and a min of each of the eight sub-blocks). Only the header loses anything, so the
header alone has to be kept to get the file's bytes back.

    type    header  nibble groups     baked header
    Q8_0    d       none              d
    Q4_0    d       1 of 16 bytes     d
    Q4_1    d, m    1 of 16 bytes     d, m
    Q4_K    16 B    4 of 32 bytes     8 d·scale, 8 dmin·min
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Baked:
    """How Forge rewrites the blocks of one type.

    Attributes:
        header: bytes before the codes in the file.
        baked_header: bytes before the codes after baking, in a 16-bit computation dtype.
        groups: groups of nibbles that are reordered within themselves; 0 for whole bytes.
    """

    header: int
    baked_header: int
    groups: int

    @property
    def header_is_scales(self) -> bool:
        """Whether the baked header is the file's with each fp16 number cast."""
        return self.header == self.baked_header


BAKED: dict[str, Baked] = {
    "Q8_0": Baked(2, 2, 0),
    "Q4_0": Baked(2, 2, 1),
    "Q4_1": Baked(4, 4, 1),
    "Q4_K": Baked(16, 32, 4),
}


def headers(blocks: torch.Tensor, name: str) -> torch.Tensor:
    """What baking loses of ``uint8 [n, type_size]``: a copy of the headers, ``uint8 [n, header]``, in main memory."""
    return blocks.view(torch.uint8)[:, : BAKED[name].header].to("cpu", copy=True)


def file_blocks(
    baked: torch.Tensor, name: str, computation_dtype: torch.dtype, kept: torch.Tensor | None = None
) -> torch.Tensor | None:
    """Blocks in the file's layout from blocks in Forge's.

    Args:
        baked: ``[n, baked_header + codes]`` of any 8-bit dtype.
        name: the type.
        computation_dtype: of the baked scales; fp16 or bf16.
        kept: the file's headers, ``uint8 [n, header]``, if they were kept.

    Returns:
        ``uint8 [n, type_size]``; without `kept`, blocks that decode to the numbers Forge has now. None where
        there are none such, since Q4_K's six-bit scales cannot be found again from their products.
    """
    baked = baked.view(torch.uint8)
    rule = BAKED[name]
    if kept is not None:
        header = kept.to(baked.device)
    elif rule.header_is_scales:
        scales = baked[:, : rule.baked_header].contiguous().view(computation_dtype)
        header = scales.to(torch.float16).view(torch.uint8)
    else:
        return None
    codes = baked[:, rule.baked_header :]
    if rule.groups:
        codes = _apart(codes, rule.groups)
    return torch.cat([header, codes], dim=1)


def _apart(codes: torch.Tensor, groups: int) -> torch.Tensor:
    """Neighbouring nibbles, low ones first, as the file has them: a group's first half low, its second high."""
    count = codes.shape[0]
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).view(count, groups, 2, -1)
    return (nibbles[:, :, 0] | nibbles[:, :, 1] << 4).reshape(count, -1)
