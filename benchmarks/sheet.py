"""A contact sheet: rows of pictures with captions, and a table below them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

MARGIN, TILE, GAP = 52, 128, 12  # pixels
COLUMNS = 8
WIDTH = 2 * MARGIN + COLUMNS * TILE + (COLUMNS - 1) * GAP
PAPER, INK, GREY, LINE, GREEN, RED = "#fbfaf7", "#1c1f24", "#7b8087", "#dcdad3", "#1a7f5a", "#c1503a"
ABOUT = "A demo model of 4.9 million weights, trained from nothing but drawn shapes. One seed everywhere"
LEFT, OURS, THEIRS = 0, (3, 4, 5), (6, 7)  # columns of the table: what stands left, Graft's, the other way's


@dataclass
class Section:
    """One row: what it is, a remark, and pictures ``[128, 128, 3]`` in 0..1 with their captions."""

    title: str
    remark: str
    pictures: list[tuple[str, Tensor]]

    @property
    def height(self) -> int:
        return 40 + TILE + (24 if any(caption for caption, _ in self.pictures) else 6) + 16


@cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The typeface that comes with matplotlib, so that the sheet looks the same everywhere."""
    wanted = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(wanted), size)


def draw_sheet(
    path: Path, sections: Sequence[Section], headers: Sequence[str], rows: Sequence[Sequence[str]], note: str
) -> None:
    """Write the sheet as PNG; `headers` may have two lines each."""
    table = 70 + 30 * len(rows)
    height = 150 + sum(section.height for section in sections) + 34 + table + 84
    sheet = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN - 2, 44), "Graft", INK, font(40, bold=True))
    pen.text((MARGIN + 152, 52), "LoRAs beside the packed weights of a GGUF model", INK, font(17))
    pen.text((MARGIN + 152, 76), ABOUT, GREY, font(13))
    y = 128
    for section in sections:
        _draw_section(sheet, pen, section, y)
        y += section.height
    _draw_table(pen, headers, rows, y + 20)
    pen.text((MARGIN, height - 56), note, GREY, font(13))
    sheet.quantize(256, kmeans=3).save(path, optimize=True)  # a third of the size that true colour takes


def _draw_section(sheet: Image.Image, pen: ImageDraw.ImageDraw, section: Section, y: int) -> None:
    pen.line((MARGIN, y, WIDTH - MARGIN, y), LINE)
    pen.text((MARGIN, y + 11), section.title, INK, font(15, bold=True))
    beside = MARGIN + pen.textlength(section.title, font(15, bold=True)) + 12
    pen.text((beside, y + 13), section.remark, GREY, font(13))
    for column, (caption, picture) in enumerate(section.pictures):
        x = MARGIN + column * (TILE + GAP)
        tile = Image.fromarray((picture * 255).round().to(torch.uint8).numpy())
        sheet.paste(tile, (x, y + 40))
        pen.text((x + TILE / 2, y + 40 + TILE + 8), caption, INK, font(13), anchor="mt")


def _draw_table(pen: ImageDraw.ImageDraw, headers: Sequence[str], rows: Sequence[Sequence[str]], y: int) -> None:
    step = (WIDTH - 2 * MARGIN - 60) / (len(headers) - 1)
    ends = [MARGIN + 60 + step * column for column in range(len(headers))]
    pen.line((MARGIN, y - 12, WIDTH - MARGIN, y - 12), LINE)
    for column, header in enumerate(headers):
        x, anchor = (MARGIN, "ld") if column == LEFT else (ends[column], "rd")
        colour = GREEN if column in OURS else RED if column in THEIRS else GREY
        align = "left" if column == LEFT else "right"
        pen.multiline_text((x, y + 44), header, colour, font(12), anchor=anchor, align=align, spacing=3)
    pen.line((MARGIN, y + 54, WIDTH - MARGIN, y + 54), INK)
    for index, row in enumerate(rows):
        baseline = y + 80 + 30 * index
        for column, cell in enumerate(row):
            colour = GREEN if column in OURS else RED if column in THEIRS else INK
            x, anchor = (MARGIN, "ls") if column == LEFT else (ends[column], "rs")
            pen.text((x, baseline), cell, colour, font(14, bold=column in (LEFT, OURS[-1])), anchor=anchor)
