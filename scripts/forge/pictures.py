"""Tables and bar charts as HTML in the colours of whichever theme Forge wears."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

STYLE = """<style>
.graft table{width:100%;border-collapse:collapse;font-size:.95em;margin:0 0 .6em}
.graft table,.graft table tr,.graft table th,.graft table td{border:none!important;background:none}
.graft table tr{border-bottom:1px solid var(--border-color-primary)!important}
.graft table th,.graft table td{padding:.25em 1em .25em 0!important;text-align:left;vertical-align:top;line-height:1.4}
.graft table th{font-weight:600;color:var(--body-text-color-subdued)}
.graft table .number{text-align:right;font-variant-numeric:tabular-nums}
.graft table td.number{white-space:nowrap}
.graft table.facts td:first-child{color:var(--body-text-color-subdued);width:11em}
.graft .note{color:var(--body-text-color-subdued);margin:.2em 0 .8em}
.graft h4{margin:1em 0 .3em}
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
    """Rows of text under their headings; the columns whose index is in `numbers` are set to the right."""

    def cells(tag: str, values: Sequence[object]) -> str:
        classes = (' class="number"' if i in numbers else "" for i in range(len(values)))
        return "".join(f"<{tag}{c}>{html.escape(str(v))}</{tag}>" for c, v in zip(classes, values, strict=True))

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', columns)}</tr>{body}</table>"


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """What is what."""
    body = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(str(v))}</td></tr>" for k, v in rows)
    return f'<table class="facts">{body}</table>'


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
