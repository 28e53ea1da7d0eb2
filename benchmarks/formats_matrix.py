"""The matrix of types in docs/formats.md, from the table in `kernels/formats.py`.

    python benchmarks/formats_matrix.py            # write it into docs/formats.md
    python benchmarks/formats_matrix.py --check    # exit with 1 if that shows another one
"""

from __future__ import annotations

import sys

import torch
from checkout import ROOT
from graft.kernels import FORMATS, Format, cpu

PAGE = ROOT / "docs" / "formats.md"
BEGIN = "<!-- formats: written by `make formats` -->\n"
END = "<!-- /formats -->\n"
NEEDS_NO_DECODING = "as it is"


def row(fmt: Format) -> str:
    """A line of the matrix: what each backend does with this type."""
    if fmt.refusal:
        backends = ["refused"] * 3
    elif not fmt.is_quantized:
        backends = [NEEDS_NO_DECODING] * 3
    else:
        backends = [
            "yes" if fmt.decode else "",
            "yes" if cpu.unavailable(torch.device("cpu"), fmt) is None else "",
            "yes" if fmt.triton else "",
        ]
    return f"| {fmt.name} | {fmt.bits_per_weight:.4g} | {fmt.family} | {' | '.join(backends)} |"


def matrix() -> str:
    """The matrix in Markdown, a line per type."""
    head = "| type | bits a weight | family | torch | cpu | triton |\n|---|---|---|---|---|---|\n"
    return head + "".join(f"{row(fmt)}\n" for fmt in FORMATS)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    new = f"\n{matrix()}\n"
    if "--check" in sys.argv:
        sys.exit(0 if old == new else "docs/formats.md shows another matrix than kernels/formats.py: run make formats")
    PAGE.write_text(before + BEGIN + new + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
