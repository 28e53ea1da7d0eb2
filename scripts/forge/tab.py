"""The tab "Graft": what is active, what is loaded, what the LoRAs do, and three tools to look closer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import gradio as gr

from ...ops.report import size_text
from . import inspection, pictures
from .engine import Settings
from .session import OPTIONS, Part, UsedLora
from .strengths import REGIONS
from .verify import CHANGE, RANK, TOKENS, Comparison

_HELP = {
    "graft_mode": "auto: beside the weights, merged for each call where the rank makes that cheaper; "
    "on: always beside; off: Forge's own way",
    "graft_backend": "auto takes the fastest that runs here",
    "graft_dtype": "auto is what Forge computes in; int8 multiplies large layers in int8: faster, about 1 % less "
    "precise, LoRAs stay exact; int8 leaves Q8_0 as it is, int8_all makes Q8_0 faster, too",
}
_OURS, _MERGED, _REQUANTIZED = "#16a34a", "#6b7280", "#dc2626"


class Desk(Protocol):
    """What the tab asks of the rest."""

    def headline(self) -> tuple[bool, str]: ...
    def facts(self) -> list[tuple[str, str]]: ...
    def parts(self) -> list[Part]: ...
    def loras(self) -> list[UsedLora]: ...
    def notes(self) -> list[str]: ...
    def counts(self) -> Counter[tuple[str, str]]: ...
    def settings(self) -> Settings: ...
    def choose(self, option: str, value: str) -> None: ...
    def verify(self) -> list[Comparison]: ...
    def files(self) -> list[Path]: ...


def build(desk: Desk) -> gr.Blocks:
    """The tab's contents."""
    with gr.Blocks(analytics_enabled=False) as blocks:
        with gr.Row():
            with gr.Column(scale=3):
                status = gr.HTML(value=lambda: _status(desk), elem_id="graft_status")
                loaded = gr.HTML(value=lambda: _loaded(desk), elem_id="graft_loaded")
            with gr.Column(scale=2):
                controls = [_control(desk, name) for name in OPTIONS]
                refresh = gr.Button("Refresh", elem_id="graft_refresh")
        with gr.Accordion("Verify", open=True, elem_id="graft_verify"):
            run = gr.Button("Compare one layer of each type", variant="primary", elem_id="graft_verify_run")
            compared = gr.HTML(pictures.panel(pictures.note(_EXPLANATION)), elem_id="graft_verified")
        with gr.Accordion("Look into a file", open=True, elem_id="graft_inspect"):
            with gr.Row():
                chosen = gr.Dropdown(list(_labelled(desk)), label="GGUF models and LoRAs in Forge's folders",
                                     elem_id="graft_file", scale=5)  # fmt: skip
                again = gr.Button("Look for files again", elem_id="graft_files", scale=1)
            contents = gr.HTML(elem_id="graft_contents")

        shown = [status, loaded]
        for name, control in zip(OPTIONS, controls, strict=True):
            control.input(_chooser(desk, name), control, shown, show_progress=False)
        refresh.click(lambda: (_status(desk), _loaded(desk)), None, shown, show_progress=False)
        run.click(lambda: _verified(desk), None, compared)
        chosen.change(lambda name: _contents(desk, name), chosen, contents, show_progress=False)
        again.click(lambda: gr.update(choices=list(_labelled(desk))), None, chosen, show_progress=False)
    return blocks


def _control(desk: Desk, name: str) -> gr.Radio:
    attribute, label, choices, _ = OPTIONS[name]
    return gr.Radio(
        list(choices), label=label, info=_HELP[name], elem_id=name, interactive=True,
        value=lambda: getattr(desk.settings(), attribute),
    )  # fmt: skip


def _chooser(desk: Desk, name: str) -> Callable[[str], tuple[str, str]]:
    def choose(value: str) -> tuple[str, str]:
        desk.choose(name, value)
        return _status(desk), _loaded(desk)

    return choose


def _status(desk: Desk) -> str:
    good, text = desk.headline()
    return pictures.panel(pictures.verdict(good, text), pictures.facts(desk.facts()))


def _loaded(desk: Desk) -> str:
    parts = desk.parts()
    if not parts:
        return pictures.panel(pictures.heading("Loaded model"), pictures.note("No model is loaded yet: make an image."))
    return pictures.panel(
        pictures.heading("Loaded model"),
        pictures.table(("", "architecture", "GGUF layers", "other parameters", "size"), map(_part_row, parts), (4,)),
        *(pictures.note(_baked_note(part)) for part in parts if part.baked),
        pictures.heading("LoRAs in use"),
        _loras(desk.loras()),
        *map(pictures.note, desk.notes()),
        pictures.note(_TRAINING),
        pictures.heading("Layer calls since the start"),
        _counts(desk.counts()),
    )


def _part_row(part: Part) -> tuple[str, ...]:
    types = ", ".join(f"{name} {count}" for name, count in part.types.most_common())
    others = ", ".join(f"{name} {count}" for name, count in part.others.most_common())
    refused = "".join(f"; {count} in Forge's own forward: {why}" for why, count in part.refused.items())
    counted = f"{part.layers}: {types}{refused}" if part.layers else "none"
    return part.title, part.architecture, counted, others, size_text(part.nbytes)


def _baked_note(part: Part) -> str:
    return (
        f"{part.title}: {part.baked} layers are in Forge's own layout, whose scales it has rounded. They go back to "
        "the file's bytes when they next run with Graft, where Graft has seen these; else load the model again."
    )


def _loras(loras: list[UsedLora]) -> str:
    if not loras:
        return pictures.note("None. Write <lora:name:weight> into the prompt.") + pictures.note(_WHERE)
    rows = [
        (_named(lora), lora.part, f"{lora.matched}/{lora.total}" if lora.total else "–",
         f"{lora.residual}/{lora.layers}", _elsewhere(lora))
        for lora in loras
    ]  # fmt: skip
    columns = ("LoRA", "on", "of the file", "beside the weights", "the others")
    return pictures.table(columns, rows, (2, 3)) + pictures.note(_COLUMNS) + pictures.note(_WHERE)


_TRAINING = "To train a LoRA on a GGUF model, use the node Train LoRA (Graft) in ComfyUI. The LoRA runs here, too."

_COLUMNS = (
    "Of the file: how many of the file's layers this model has. Beside the weights: on how many of these the LoRA runs "
    "next to the quantized weights, which stay as they are. The others: what happens on the rest, and why."
)


_WHERE = (
    "A LoRA can work on a part of the picture: <lora:name:1:region=left>. It can work on a part of the steps: "
    "<lora:name:1:start=0:end=0.25> is the first quarter. Regions: "
    f"{', '.join(REGIONS)}, or left, top, right and bottom as shares, such as region=0,0,0.5,1; region=not left is all "
    "the rest. feather=0.1 makes the edge of a region soft. blocks=double 0-9=0.5, single=0 gives weights to blocks."
)


def _named(lora: UsedLora) -> str:
    return f"{lora.name} ×{lora.strength:g}" + (f", {lora.when.replace(':', ', ')}" if lora.when else "")


def _elsewhere(lora: UsedLora) -> str:
    others = [f"{count} {what}" for what, count in lora.others.items()]
    if lora.waiting:
        others.append(f"{lora.waiting} not run yet")
    if lora.note:
        others.append(lora.note)
    return "; ".join(others) or "none"


_PATHS = {
    "base": "without a LoRA", "residual": "LoRAs beside the weights", "exact": "LoRAs merged for each call, exactly",
    "forge": "Forge's own forward",
}  # fmt: skip


def _counts(counts: Counter[tuple[str, str]]) -> str:
    if not counts:
        return pictures.note("None.")
    rows = [(_PATHS[path] + (f": {why}" if why else ""), f"{count:,}") for (path, why), count in sorted(counts.items())]
    return pictures.table(("path", "calls"), rows, (1,))


_EXPLANATION = (
    f"Runs the largest layer of each type with a LoRA of rank {RANK} that changes its weights by {CHANGE:.0%}: beside "
    "the weights, as Graft does it; merged into them in each step, as Forge's online mode does; and merged and "
    "quantized again, as the offline mode of Forge master does. The errors are those of the LoRA's effect, the times "
    f"are for {TOKENS} tokens; on small layers they scatter more than they differ."
)


def _verified(desk: Desk) -> str:
    try:
        compared = desk.verify()
    except Exception as error:
        return pictures.panel(pictures.verdict(False, f"The comparison failed: {error}"))
    if not compared:
        return pictures.panel(pictures.note("No quantized layer is loaded: choose a GGUF checkpoint, make an image."))
    columns = ("type", "layer", "error: beside", "merged", "requantized", "effect kept by requantizing",
               "ms: no LoRA", "beside", "merged")  # fmt: skip
    return pictures.panel(
        pictures.note(_EXPLANATION),
        pictures.table(columns, map(_comparison_row, compared), range(2, 9)),
        pictures.heading("Error of the LoRA's effect, on a logarithmic scale"),
        pictures.log_bars((f"{c.fmt} · {c.path}", _bars(c)) for c in compared),
    )


def _comparison_row(c: Comparison) -> tuple[str, ...]:
    shape = "×".join(map(str, c.shape))
    kept = "–" if c.kept is None else f"{c.kept:.2f}"
    times = (c.base_ms, c.residual_ms, c.merged_ms)
    return (
        c.fmt, f"{c.path} {shape}", _number(c.residual), _number(c.merged), _number(c.requantized), kept,
        *("–" if t is None else f"{t:.1f}" for t in times),
    )  # fmt: skip


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    if value < 1e-3:
        return f"{value:.1e}"
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.1f} %"


def _bars(c: Comparison) -> list[tuple[str, float | None, str, str]]:
    return [
        ("beside the weights (Graft)", c.residual, _OURS, _number(c.residual)),
        ("merged (Forge online)", c.merged, _MERGED, _number(c.merged)),
        ("requantized (Forge offline)", c.requantized, _REQUANTIZED, c.refusal or _number(c.requantized)),
    ]


def _labelled(desk: Desk) -> dict[str, Path]:
    """The files by their names, with their folder's in front where two are of the same name."""
    files = desk.files()
    count = Counter(path.name for path in files)
    return {path.name if count[path.name] == 1 else f"{path.parent.name}/{path.name}": path for path in files}


def _contents(desk: Desk, label: str | None) -> str:
    path = _labelled(desk).get(label or "")
    return "" if path is None else pictures.panel(pictures.facts(inspection.inspect(path)))


__all__ = ["Desk", "build"]
