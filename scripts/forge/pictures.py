"""Tables and bar charts as HTML in the colours of whichever theme Forge wears."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

STYLE = """<style>
.graft table{width:100%;border-collapse:collapse;font-size:.95em;margin:0}
.graft th,.graft td{padding:.35em .7em;text-align:left;vertical-align:top}
.graft th,.graft td{border-bottom:1px solid var(--border-color-primary)}
.graft th{font-weight:600;color:var(--body-text-color-subdued)}
.graft td.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.graft .note{color:var(--body-text-color-subdued);margin:.3em 0}
.graft h4{margin:.8em 0 .3em}
.graft .good{color:#16a34a;font-weight:600}.graft .bad{color:#dc2626;font-weight:600}
.graft .bars{display:grid;grid-template-columns:max-content 1fr;gap:.15em .8em;align-items:center;font-size:.9em}
.graft .bars .type{grid-column:1/3;font-weight:600;margin-top:.5em}
.graft .bar{display:flex;align-items:center;gap:.5em}
.graft .bar i{display:block;height:.95em;border-radius:3px;min-width:3px}
</style>"""


def panel(*parts: str) -> str:
    """One block of HTML with Graft's style."""
    return f'<div class="graft">{STYLE}{"".join(parts)}</div>'


def heading(text: str) -> str:
    return f"<h4>{html.escape(text)}</h4>"


def note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def verdict(good: bool, text: str) -> str:
    return f'<p class="{"good" if good else "bad"}">{html.escape(text)}</p>'


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """Rows of text; the columns whose index is in `numbers` are set to the right."""
    head = "".join(f"<th>{html.escape(c)}</th>" for c in columns)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=number' if i in numbers else ''}>{html.escape(str(v))}</td>" for i, v in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table>{f'<tr>{head}</tr>' if any(columns) else ''}{body}</table>"


def log_bars(groups: Iterable[tuple[str, Sequence[tuple[str, float | None, str, str]]]], floor: float = 1e-8) -> str:
    """Bars on a logarithmic scale from `floor` to 1.

    Args:
        groups: ``(title, [(label, value, colour, text behind the bar)])``; a value of None has no bar.
    """
    cells = []
    for title, bars in groups:
        cells.append(f'<span class="type">{html.escape(title)}</span>')
        for label, value, colour, text in bars:
            share = 0.0 if value is None else _share(value, floor)
            bar = "" if value is None else f'<i style="width:{70 * share:.1f}%;background:{colour}"></i>'
            cells.append(f"<span>{html.escape(label)}</span>")
            cells.append(f'<span class="bar">{bar}<span>{html.escape(text)}</span></span>')
    return f'<div class="bars">{"".join(cells)}</div>'


def _share(value: float, floor: float) -> float:
    if value <= floor:
        return 0.0
    return min(1.0, 1 - math.log10(value) / math.log10(floor))
