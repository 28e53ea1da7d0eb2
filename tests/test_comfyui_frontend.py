"""`web/graft.js` in the front ends that ComfyUI comes with, in a browser: the demo workflow on a running server.

Playwright is installed beside this checkout and not in the hosts, so these tests run here and only the server there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import there_and_back
import torch
from browser import chromium
from graft.ops.files.gguf import open_gguf
from hosts import EVERYTHING, ROOT, Host, comfyui_hosts
from safetensors.torch import load_file, save_file
from workflow_samples import group_node, shown_by_inputs

sys.path.append(str(Path(__file__).parent / "in_comfyui"))
from comfy_server import Server

pytestmark = pytest.mark.host

DEMO = json.loads((ROOT / "example_workflows" / "Graft demo.json").read_text())
MAKE = json.loads((ROOT / "example_workflows" / "Graft make.json").read_text())
STYLES = ("neon", "blueprint", "linocut")
LOADER, STACK, INSPECT = "GraftUNETLoader", "GraftLoraStack", "GraftInspect"

HELPERS = """
window.seen = {
  nodes: (kind) => app.graph._nodes.filter((node) => node.type === kind),
  text: (kind) => seen.nodes(kind)[0]?.widgets?.find((widget) => widget.name === "graft_text"),
  rows: (kind) => {
    const [node] = seen.nodes(kind);
    const view = node.widgets.find((widget) => widget.name === "graft_rows")?.element;
    const drawn = document.querySelectorAll(`[data-node-id="${node.id}"] [data-testid="node-widget"]`);
    const names = node.widgets.filter((widget) => node.isWidgetVisible(widget)).map((widget) => widget.name);
    const linked = names.filter((name) => name.startsWith("lora_")).length;
    const whole = view?.isConnected && names.length === 3 * linked + 1 + Boolean(seen.text(kind));
    if (!whole || (LiteGraph.vueNodesMode && drawn.length !== names.length)) return -1;
    return linked + view.querySelectorAll("[data-row]").length;
  },
  run: () => {
    seen.ended = undefined;
    app.queuePrompt(0);
  },
};
app.api.addEventListener("execution_success", () => (seen.ended = "success"));
app.api.addEventListener("execution_error", ({ detail }) => {
  seen.ended = detail.exception_message;
  seen.error = `${detail.exception_type}: ${detail.exception_message}`;
});
"""


class Page:
    """A page of a running ComfyUI, and what its console said about our file."""

    def __init__(self, page: Any, server: Server, vue: bool, kind: str = INSPECT) -> None:
        self.page, self.server, self.vue = page, server, vue
        self.problems: list[str] = []
        page.set_default_timeout(60_000)
        page.on("console", lambda line: self._hear(line.type, line.text, line.location.get("url", "")))
        page.on("pageerror", lambda error: self._hear("error", f"{error}\n{error.stack}", ""))
        # else newer front ends open what was open before, some time after they are there, over what a test has opened
        page.add_init_script("sessionStorage.clear(); localStorage.clear()")
        self.open(kind)

    def _hear(self, kind: str, text: str, where: str) -> None:
        if where.startswith("https://"):  # newer front ends ask the registry for packs, and nothing is online
            return
        if text.startswith("PromptExecutionError: Prompt execution failed"):  # a test's; we are in its stack of calls
            return
        if "/userdata?dir=" in where:  # a folder of the user's that is not there yet is a 404 to the host
            return
        if kind in ("error", "warning") and "graft" in (text + where).lower():
            self.problems.append(f"{text} {where}")

    def open(self, kind: str = INSPECT) -> None:
        """Anew, until the page knows a kind of nodes."""
        address = f"http://127.0.0.1:{self.server.port}"
        for key, value in {"VueNodes.Enabled": self.vue, "TutorialCompleted": True, "UseNewMenu": "Top"}.items():
            self.page.request.post(f"{address}/settings/Comfy.{key}", data=json.dumps(value))
        self.page.goto(address)
        self.wait(f"Boolean(window.app?.vueAppReady && app.graph && LiteGraph.registered_node_types.{kind})")
        self.wait("Boolean(app.api.clientId && app.api.socket?.readyState === WebSocket.OPEN)")  # or events are lost
        # or the page opens its first workflow over ours
        self.wait("Boolean(app.extensionManager?.workflow?.activeWorkflow)")
        self.page.evaluate(HELPERS)

    def wait(self, condition: str, *given: Any) -> None:
        self.page.wait_for_function(condition, arg=list(given) or None)

    def see(self, expression: str, *given: Any) -> Any:
        return self.page.evaluate(expression, list(given) or None)

    def load(self, workflow: dict) -> None:
        self.see("([workflow]) => app.loadGraphData(workflow)", workflow)
        self.wait("([count]) => app.graph._nodes.length === count", len(workflow["nodes"]))

    def run(self) -> None:
        self.see("() => seen.run()")
        self.wait("() => seen.ended")
        assert self.see("() => seen.ended") == "success"

    def wait_for_texts(self) -> dict[str, str]:
        """What the nodes with a text say, when all do."""
        kinds = [kind for kind in (LOADER, STACK, INSPECT) if self.see("([kind]) => seen.nodes(kind).length", kind)]
        self.wait("([kinds]) => kinds.every((kind) => seen.text(kind)?.value)", kinds)
        return {kind: self.see("([kind]) => seen.text(kind).value", kind) for kind in kinds}

    def has_panel(self) -> bool:
        """Whether it tells errors in a panel, as newer front ends do, and not in a window."""
        return self.see("() => Boolean(app.collectNodeMenuItems)")

    def saved(self) -> dict:
        return self.see("() => JSON.parse(JSON.stringify((app.rootGraph ?? app.graph).serialize()))")

    def sent(self) -> dict:
        """The prompt, by node."""
        return self.see("async () => (await app.graphToPrompt()).output")

    def command(self, name: str) -> None:
        self.see("([name]) => app.extensionManager.command.execute(name)", name)

    def menu(self, node: int, content: str) -> None:
        """Choose an entry of a node's menu."""
        found = "app.canvas.getNodeMenuOptions(app.graph.getNodeById(id))"
        entries = f"{found}.filter((entry) => entry?.content === content)"
        assert self.see(f"([id, content]) => {entries}.length", node, content) == 1
        self.see(f"([id, content]) => {entries}[0].callback()", node, content)

    def set_row(self, row: int, file: str) -> None:
        change = "widget.value = file; widget.callback?.(file); app.graph.setDirtyCanvas(true, true)"
        find = "const widget = seen.nodes('GraftLoraStack')[0].widgets.find((widget) => widget.name === name)"
        self.see(f"([name, file]) => {{ {find}; {change} }}", f"lora_{row}", file)

    def wait_for_rows(self, rows: int) -> None:
        self.wait("([kind, rows]) => seen.rows(kind) === rows", STACK, rows)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Host], Server]]:
    """The server of a host, started when it is first asked for."""
    running: list[Server] = []

    @functools.cache
    def start(host: Host) -> Server:
        with host.starting():
            running.append(Server(tmp_path_factory.mktemp("comfy"), host.python, host.folder))
        running[-1].host = host.name
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


NEWEST = comfyui_hosts()[-1:]
SHOWN = comfyui_hosts() if EVERYTHING else [*comfyui_hosts()[:-1][:1], *NEWEST]
"""Whose pages are opened, those of the newest with Nodes 2.0, too; `make hosts` opens all in both ways."""
MODES = [
    pytest.param((host, mode), id=f"{host.name}-{mode}")
    for host in SHOWN
    for mode in (("canvas", "vue") if EVERYTHING or host in NEWEST else ("canvas",))
]


@pytest.fixture(scope="module", params=MODES)
def page(request: pytest.FixtureRequest, browser: Any, servers: Callable[[Host], Server]) -> Iterator[Page]:
    """The front end of a host with nodes drawn on a canvas, and as Vue components where it offers them."""
    host, mode = request.param
    tab = browser.new_page(viewport={"width": 1800, "height": 1150})
    opened = Page(tab, servers(host), vue=mode == "vue")
    setting = "app.ui.settings.settingsParamLookup['Comfy.VueNodes.Enabled']?.type"
    if opened.vue and opened.see(setting) in (None, "hidden"):
        tab.close()
        pytest.skip("this front end does not offer Nodes 2.0")
    yield opened
    tab.close()


def demo(*styles: str, inspect: bool = False, steps: int = 1) -> dict:
    """The demo workflow with these LoRAs, the other rows as they are in a fresh node."""
    workflow = json.loads(json.dumps(DEMO))
    nodes = {node["type"]: node for node in workflow["nodes"]}
    files = [f"graft-demo-{style}.safetensors" for style in styles]
    files += ["None"] * (8 - len(files))
    nodes[STACK]["widgets_values"] = [*(value for file in files for value in (True, file, 1.0)), ""]
    nodes["KSampler"]["widgets_values"][2] = steps
    if inspect:
        link, node = workflow["last_link_id"] + 1, workflow["last_node_id"] + 1
        model = {"name": "model", "type": "MODEL", "link": link}
        shape = {"pos": [430, 1000], "size": [360, 60], "flags": {}, "mode": 0, "order": 99, "properties": {}}
        workflow["nodes"].append({"id": node, "type": INSPECT, "inputs": [model], "widgets_values": [], **shape})
        workflow["links"].append([link, nodes[STACK]["id"], 0, node, 0, "MODEL"])
        nodes[STACK]["outputs"][0]["links"].append(link)
        workflow |= {"last_link_id": link, "last_node_id": node}
    return workflow


def test_the_text_is_on_the_node_whole(page: Page) -> None:
    page.load(demo(*STYLES, inspect=True))
    page.run()
    texts = page.wait_for_texts()
    assert texts[LOADER].startswith("Wan 2.1 / 2.2 T2V · 4.9M · Q8_0 45")
    assert "\nruns on the processor: the model takes 4." in texts[LOADER] and texts[LOADER].count("\n") == 2
    for style in STYLES:
        assert f"graft-demo-{style}.safetensors ×1.00: 41/41 layers" in texts[STACK]
    assert texts[STACK].count("\n") == 5 and "41 layers next to the quantized weights: " in texts[INSPECT]
    assert "\nblocks.ffn: Q8_0 8 · 1.11 MB\n" in texts[INSPECT]
    assert "\ngraft-demo-neon.safetensors ×1.00 changes the weights by: " in texts[INSPECT]
    areas = "[...document.querySelectorAll('textarea')]"
    for text in (texts[LOADER], texts[STACK]):
        page.wait(
            f"([text]) => {areas}.some((area) => area.value === text && area.readOnly && area.clientHeight > 20"
            " && area.scrollHeight <= area.clientHeight + 1)", text,
        )  # fmt: skip


def test_a_long_text_scrolls(page: Page) -> None:
    page.load(demo(inspect=True))
    lines = "\n".join(f"line {i}" for i in range(60))
    page.see("([kind, text]) => seen.nodes(kind)[0].onExecuted({ text: [text] })", INSPECT, lines)
    areas = "[...document.querySelectorAll('textarea')]"
    page.wait(
        f"([text]) => {areas}.some((area) => area.value === text && area.clientHeight > 100"
        " && area.scrollHeight > 2 * area.clientHeight)", lines,
    )  # fmt: skip
    needed = 60 * 16  # pixels
    assert page.see("([kind]) => seen.nodes(kind)[0].size[1]", INSPECT) < needed / 2


def test_the_text_outlives_undo(page: Page) -> None:
    page.load(demo("neon"))
    page.run()
    texts = page.wait_for_texts()
    page.see("() => app.loadGraphData(app.graph.serialize())")
    assert page.wait_for_texts() == texts


def test_nodes_that_did_not_run_again_say_it_too(page: Page) -> None:
    workflow = demo("neon", "linocut", inspect=True)
    page.load(workflow)
    page.run()
    texts = page.wait_for_texts()
    page.open()
    page.load(workflow)
    assert not page.see("([kind]) => seen.text(kind)", LOADER)
    page.run()
    assert page.wait_for_texts() == texts


OVERLAPS = """async () => {
  await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
  const box = ({ pos, size }) => [pos[0], pos[1] - 30, pos[0] + size[0], pos[1] + size[1]];
  const apart = (a, b) => a[2] <= b[0] || b[2] <= a[0] || a[3] <= b[1] || b[3] <= a[1];
  const pairs = app.graph._nodes.flatMap((a, i, all) => all.slice(i + 1).map((b) => [a, b]));
  return pairs.filter(([a, b]) => !apart(box(a), box(b))).map(([a, b]) => `${a.type}, ${b.type}`);
}"""


def test_nothing_of_the_demo_overlaps_after_a_run(page: Page) -> None:
    page.load(demo(*STYLES))
    page.run()
    page.wait_for_texts()
    page.wait("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
    assert page.see(OVERLAPS) == []


REPORTS = {
    LOADER: "Flux.1 dev · 11.9B · Q4_K 228, Q6_K 76, F32 471 · 6.6 GB · bfloat16 · triton\n"
    "runs on NVIDIA GeForce RTX 3060: the model takes 6.8 GB of 12.9 GB, dynamic VRAM is on\n"
    "weights are decoded on the card, in Triton kernels",
    STACK: "style.safetensors ×0.80: 304/304 layers, rank 16\n  kohya names; 304 layers next to the quantized weights",
    "GraftCLIPLoader": "clip_l.safetensors: CLIP-L as it is\nt5xxl.gguf: T5 XXL Q8_0 169, F32 50\ntriton",
    "GraftImportance": "304 layers in 160 model calls, up to 30,000 rows each\nsix prompts",
    "GraftTrainLora": "LoRA, rank 16, on 40 layers, 360,448 numbers\n64 pictures, 300 steps, 0.35 s a step\n"
    "loss 2.8083 -> 2.5305\n"
    "trained on Wan 2.1 / 2.2 T2V · 4.9M · Q8_0 45, Q4_K 1, F32 76, F16 1 · 4.7 MB · float32 · cpu\n"
    "734,400 bytes: /output/loras/graft-demo-blueprint-trained_00001_.safetensors",
}


def test_no_template_overlaps_with_reports_on_its_nodes(page: Page) -> None:
    if not page.vue:
        pytest.skip("Nodes 2.0 are taller")
    show = "([kind, text]) => seen.nodes(kind).forEach((node) => node.onExecuted({ text: [text] }))"
    drawn = "() => app.graph._nodes.every(({ id }) => document.querySelector(`[data-node-id=\"${id}\"]`))"
    for path in sorted((ROOT / "example_workflows").glob("*.json")):
        page.load(json.loads(path.read_text()))
        page.see("() => { app.canvas.ds.scale = 0.5; app.canvas.ds.offset = [100, 100]; }")
        page.wait(drawn)
        for kind, text in REPORTS.items():
            page.see(show, kind, text)
        for _ in range(5):  # frames in which nodes grow
            found = page.see(OVERLAPS)
        assert found == [], path.name


def test_rows_come_and_go(page: Page) -> None:
    page.load(demo())
    page.wait_for_rows(0)
    page.load(demo("neon", "blueprint"))
    page.wait_for_rows(2)
    page.set_row(3, "graft-demo-linocut.safetensors")
    page.wait_for_rows(3)
    page.set_row(2, "None")
    page.wait_for_rows(2)
    page.set_row(8, "graft-demo-neon.safetensors")
    page.wait_for_rows(3)
    page.set_row(8, "None")
    page.wait_for_rows(2)


ROWS_SENT = """async () => {
  const { inputs } = (await app.graphToPrompt()).output["2"];
  const rows = [1, 2, 3, 4, 5, 6, 7, 8].filter((row) => inputs[`lora_${row}`] !== "None");
  const short = (file) => file.replace("graft-demo-", "").replace(".safetensors", "");
  const row = (n) => [inputs[`enabled_${n}`], short(inputs[`lora_${n}`]), inputs[`strength_${n}`], inputs[`when_${n}`]];
  return rows.map((n) => [n, ...row(n)]);
}"""


def link(page: Page, row: int) -> None:
    """Have a row of LoRA Stack take where and when it works from a node."""
    choose(page, row, "Link where and when")
    page.see(
        """([socket]) => {
          const [stack] = seen.nodes("GraftLoraStack");
          const when = LiteGraph.createNode("GraftStrength");
          app.graph.add(when);
          when.connect(0, stack, stack.inputs.findIndex((slot) => slot.name === socket));
        }""", f"when_{row}",
    )  # fmt: skip


def test_a_row_is_one_line(page: Page) -> None:
    """It is added, switched, changed, linked, moved and removed there; the file's own list has a search."""
    page.load(demo("neon"))
    page.wait_for_rows(1)
    line = page.page.locator(".graft-rows [data-row]")
    page.page.locator(".graft-rows .add").click()
    page.page.locator(".litecontextmenu").get_by_text("blueprint").click()
    page.wait_for_rows(2)
    line.nth(0).locator("input[type=checkbox]").click()
    strength = line.nth(1).locator("input[type=number]")
    strength.fill("0.45")
    strength.press("Enter")
    assert page.see(ROWS_SENT) == [[1, False, "neon", 1, None], [2, True, "blueprint", 0.45, None]]

    link(page, 2)
    page.see("() => app.loadGraphData(app.graph.serialize())")
    page.wait_for_rows(2)
    choose(page, 2, "Move up")
    ((_, *first), (_, *second)) = page.see(ROWS_SENT)
    assert first[:3] == [True, "blueprint", 0.45] and first[3] and second == [False, "neon", 1, None]
    names = "() => seen.nodes('GraftLoraStack')[0].inputs.filter((slot) => !slot.widget).map((slot) => slot.name)"
    assert page.see(names) == ["model", "lora_stack", "clip", "when_1"]
    choose(page, 1, "Remove")
    page.wait_for_rows(1)
    assert page.see(names) == ["model", "lora_stack", "clip"]


def choose(page: Page, row: int, entry: str) -> None:
    page.page.locator(f".graft-rows [data-row='{row}'] button[title=More]").click()
    page.page.locator(".litecontextmenu").get_by_text(entry, exact=True).click()


def test_a_row_has_a_second_strength_where_there_is_a_clip(page: Page) -> None:
    page.load(demo("neon", "blueprint"))
    page.wait_for_rows(2)
    page.see("""() => {
      const [stack] = seen.nodes("GraftLoraStack");
      const loader = LiteGraph.createNode("GraftCLIPLoader");
      app.graph.add(loader);
      loader.connect(0, stack, stack.inputs.findIndex((slot) => slot.name === "clip"));
    }""")
    second = page.page.locator(".graft-rows [data-row='2'] input[title='Strength for CLIP']")
    second.fill("0.5")
    second.press("Enter")
    page.wait("() => seen.nodes('GraftLoraStack')[0].serialize().widgets_values[24] === '2 = 0.5'")
    choose(page, 2, "Move up")
    page.wait("() => seen.nodes('GraftLoraStack')[0].serialize().widgets_values[24] === '1 = 0.5'")


STYLES_SENT = """async () => {
  const { inputs } = (await app.graphToPrompt()).output["2"];
  const first = [1, 2, 3, 4, 5, 6, 7, 8].map((n) => [inputs[`lora_${n}`], inputs[`strength_${n}`]]);
  const more = JSON.parse(inputs.more_rows || "[]").map(({ lora, strength }) => [lora, strength]);
  const whens = Object.keys(inputs).filter((name) => name.startsWith("when_"));
  const short = (file) => file.replace("graft-demo-", "").replace(".safetensors", "");
  return [[...first, ...more].map(([file, strength]) => short(file) + strength), whens];
}"""


def test_there_are_as_many_rows_as_one_likes(page: Page) -> None:
    """Those behind the eighth are added, changed, linked, moved, removed and inserted like the others."""
    page.load(demo(*(["neon"] * 8)))
    page.wait_for_rows(8)
    add(page, "blueprint")
    add(page, "linocut")
    page.wait_for_rows(10)
    line = page.page.locator(".graft-rows [data-row]")
    line.nth(9).locator("input[type=number]").fill("0.25")
    line.nth(9).locator("input[type=number]").press("Enter")
    line.nth(8).locator("input[type=checkbox]").click()
    link(page, 10)
    page.see("() => app.loadGraphData(app.graph.serialize())")
    page.wait_for_rows(10)
    assert page.see(STYLES_SENT) == [[*["neon1"] * 8, "blueprint1", "linocut0.25"], ["when_10"]]
    page.run()
    assert page.wait_for_texts()[STACK].count("41/41 layers") == 9

    choose(page, 10, "Move up")
    choose(page, 9, "Move up")
    assert page.see(STYLES_SENT) == [[*["neon1"] * 7, "linocut0.25", "neon1", "blueprint1"], ["when_8"]]
    choose(page, 8, "Insert above")
    page.page.locator(".litecontextmenu").get_by_text("blueprint").click()
    page.wait_for_rows(11)
    rows = [*["neon1"] * 7, "blueprint1", "linocut0.25", "neon1", "blueprint1"]
    assert page.see(STYLES_SENT) == [rows, ["when_9"]]
    choose(page, 11, "Insert below")
    page.page.locator(".litecontextmenu").get_by_text("linocut").click()
    page.wait_for_rows(12)
    for _ in range(5):
        choose(page, 1, "Remove")
    page.wait_for_rows(7)
    rows = ["neon1", "neon1", "blueprint1", "linocut0.25", "neon1", "blueprint1", "linocut1", "None1"]
    assert page.see(STYLES_SENT) == [rows, ["when_4"]]
    page.page.locator(".graft-rows input[title='Switch all rows on and off']").click()
    page.wait("() => document.querySelectorAll('.graft-rows .off').length === 0")
    page.page.locator(".graft-rows input[title='Switch all rows on and off']").click()
    page.wait("() => document.querySelectorAll('.graft-rows .off').length === 7")


def add(page: Page, style: str) -> None:
    rows = page.see("() => document.querySelectorAll('.graft-rows [data-row]').length")
    page.page.locator(".graft-rows .add").click()
    page.page.locator(".litecontextmenu").get_by_text(style).click()
    page.wait_for_rows(rows + 1)


def foot(page: Page, entry: str) -> None:
    page.page.locator(".graft-rows button[title='Presets and more']").click()
    page.page.locator(".litecontextmenu").get_by_text(entry, exact=True).click()


def test_presets_are_json_in_the_users_folder(page: Page) -> None:
    mode = "vue" if page.vue else "canvas"
    page.load(demo("neon", "blueprint"))
    page.wait_for_rows(2)
    name = f"two: {mode}"
    foot(page, "Save the rows as a preset")
    field = page.page.get_by_role("dialog").locator("input[type=text]")
    field.fill(name)
    field.press("Enter")
    folder = page.server.output.parent / "user" / "default" / "graft" / "lora_presets"
    saved = folder / f"two_ {mode}.json"
    page.page.get_by_text(f"Preset saved: two_ {mode}").first.wait_for()
    rows = [{"on": True, "lora": f"graft-demo-{style}.safetensors", "strength": 1} for style in ("neon", "blueprint")]
    assert json.loads(saved.read_text()) == rows
    rows = [{"lora": "graft-demo-linocut.safetensors", "strength": 0.5, "strength_clip": 0.1}, {"bad": 1}]
    (folder / f"<b>one {mode}.json").write_text(json.dumps(rows))

    foot(page, "Load a preset")
    page.page.locator(".litecontextmenu").get_by_text(f"<b>one {mode}", exact=True).click()
    page.wait_for_rows(1)
    assert page.see(STYLES_SENT)[0] == ["linocut0.5", *["None1"] * 7]
    assert page.see("() => seen.nodes('GraftLoraStack')[0].serialize().widgets_values[24]") == "1 = 0.1"
    foot(page, "Add the rows of a preset")
    page.page.locator(".litecontextmenu").get_by_text(f"two_ {mode}", exact=True).click()
    page.wait_for_rows(3)
    assert page.see(STYLES_SENT)[0] == ["linocut0.5", "neon1", "blueprint1", *["None1"] * 5]
    foot(page, "Delete a preset")
    page.page.locator(".litecontextmenu").get_by_text(f"two_ {mode}", exact=True).click()
    page.page.get_by_role("dialog").get_by_text("Delete the preset").wait_for()
    page.page.get_by_role("dialog").locator("button").last.click()
    presets = "(await app.api.listUserDataFullInfo('graft/lora_presets'))"
    page.wait(f"async ([name]) => {presets}.every(({{ path }}) => path !== name)", saved.name)
    assert not saved.exists()


def test_a_row_tells_what_its_file_says(page: Page) -> None:
    folder = page.server.output.parent / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"told & {HOSTILE}"
    told = {"modelspec.trigger_phrase": f"ohwx, {HOSTILE}", "ss_sd_model_name": HOSTILE, "ss_steps": "1200"}
    save_file(load_file(ROOT / "demo" / "graft-demo-neon.safetensors"), folder / f"{name}.safetensors", told)
    shutil.copy(ROOT / "example_workflows" / "Graft demo.jpg", folder / f"{name}.jpg")
    page.open()
    page.load(demo("neon"))
    page.wait_for_rows(1)
    page.page.locator(".graft-rows .add").click()
    page.page.locator(".litecontextmenu").get_by_text(f"{name}.safetensors", exact=True).click()
    page.wait_for_rows(2)
    choose(page, 2, "Info")
    window = page.page.locator("dialog.graft-info")
    window.locator("h3").get_by_text(f"{name}.safetensors", exact=True).wait_for()
    text = window.inner_text()
    told = [f"Trigger words\tohwx, {HOSTILE}", "kind\trank 16", "trained for\tWan"]
    for row in (*told, f"trained on\t{HOSTILE}", "steps\t1200"):
        assert row in text, text
    page.wait("() => document.querySelector('.graft-info img').naturalWidth > 100")
    window.get_by_text("Close", exact=True).click()
    page.wait("() => !document.querySelector('.graft-info')")
    choose(page, 2, "Info")
    window.locator("h3").wait_for()
    page.page.keyboard.press("Escape")
    page.wait("() => !document.querySelector('.graft-info')")
    assert page.see("() => [window.ran, document.querySelectorAll('img[src=x]').length]") == [None, 0]


def test_rows_whose_file_is_missing_may_be_skipped(page: Page) -> None:
    workflow = demo("neon", "blueprint")
    (stack,) = (node for node in workflow["nodes"] if node["type"] == STACK)
    stack["widgets_values"][1] = f"gone {page.vue}.safetensors"
    page.load(workflow)
    page.wait_for_rows(2)
    foot(page, "Skip rows whose file is missing")
    page.page.locator(".graft-rows .words").get_by_text("skips missing files").wait_for()
    page.run()
    text = page.wait_for_texts()[STACK]
    assert text.startswith(f"gone {page.vue}.safetensors (row 1): skipped, the file is not here\ngraft-demo-blueprint")
    foot(page, "Stop if a file is missing")
    assert page.see("async () => (await app.graphToPrompt()).output['2'].inputs.if_missing") == "error"


def test_a_row_with_a_link_shows_its_widgets(page: Page) -> None:
    page.load(demo("neon"))
    page.see("""() => {
      const [stack] = seen.nodes("GraftLoraStack");
      const number = LiteGraph.createNode("PrimitiveNode");
      app.graph.add(number);
      number.connect(0, stack, stack.inputs.findIndex((slot) => slot.widget?.name === "strength_5"));
    }""")
    page.wait_for_rows(2)
    page.see("() => app.loadGraphData(app.graph.serialize())")
    page.wait_for_rows(2)
    page.see("""() => {
      const [stack] = seen.nodes("GraftLoraStack");
      stack.disconnectInput(stack.inputs.findIndex((slot) => slot.widget?.name === "strength_5"));
    }""")
    page.wait_for_rows(1)


def test_a_new_stack_is_as_tall_as_its_rows(page: Page) -> None:
    heights = page.see("""async () => {
      const two = ["GraftLoraStack", "GraftLoraStack"].map((kind) => LiteGraph.createNode(kind));
      two[0].widgets.find((widget) => widget.name === "lora_1").value = "graft-demo-neon.safetensors";
      await new Promise((done) => setTimeout(done));
      return two.map((node) => node.size[1]);
    }""")
    assert heights[0] - heights[1] == 26 and heights[1] < 200


def test_the_clip_loader_folds_files_that_are_not_chosen(page: Page) -> None:
    page.load(demo())
    page.see("""() => {
      const loader = LiteGraph.createNode("GraftCLIPLoader");
      loader.pos = [60, 700];
      app.graph.add(loader);
    }""")
    shown = """() => {
      const [loader] = seen.nodes("GraftCLIPLoader");
      return loader.widgets.filter((widget) => loader.isWidgetVisible(widget)).map((widget) => widget.name);
    }"""
    choose = """([number, file]) => {
      const find = (widget) => widget.name === `clip_name${number}`;
      seen.nodes("GraftCLIPLoader")[0].widgets.find(find).value = file;
    }"""
    always = ["clip_name1", "type", "device", "backend"]
    for number, file, rows in ((0, "", [2]), (2, "t5.gguf", [2, 3]), (4, "llama.gguf", [2, 3, 4]), (4, "None", [2, 3])):
        if number:
            page.see(choose, number, file)
        names = page.see(shown)
        assert names == [*always[:2], *(f"clip_name{row}" for row in rows), *always[2:]]
    assert page.see("() => seen.nodes('GraftCLIPLoader')[0].serialize().widgets_values.length") == 7


# some front ends save the text of their own widget for progress, which is no matter of ours
SAVED_AND_SENT = """async () => {
  for (const node of app.graph._nodes)
    if (node.widgets) node.widgets = node.widgets.filter((widget) => widget.name !== "$$node-text-preview");
  const nodes = app.graph.serialize().nodes.sort((a, b) => a.id - b.id);
  return {
    values: nodes.map((node) => node.widgets_values),
    slots: nodes.map((node) => node.inputs.map((slot) => slot.name).filter((name) => !name.startsWith("when_"))),
    sent: (await app.graphToPrompt()).output,
  };
}"""


@pytest.fixture(scope="module")
def plain(browser: Any) -> Callable[[Server], dict]:
    """What a page without our file saves and sends, of `demo("neon", "blueprint", inspect=True)`."""

    @functools.cache
    def of(server: Server) -> dict:
        tab = browser.new_page()
        tab.route("**/graft.js", lambda route: route.abort())
        opened = Page(tab, server, vue=False)
        opened.load(demo("neon", "blueprint", inspect=True))
        found = opened.see(SAVED_AND_SENT)
        tab.close()
        return found

    return of


def test_what_is_saved_and_sent_is_that_of_a_page_without_our_file(page: Page, plain: Callable[[Server], dict]) -> None:
    workflow = demo("neon", "blueprint", inspect=True)
    page.load(workflow)
    loaded = page.see(SAVED_AND_SENT)
    page.run()
    page.wait_for_texts()
    assert loaded == page.see(SAVED_AND_SENT) == plain(page.server)
    values = {node["id"]: node["widgets_values"] for node in workflow["nodes"]}
    # a workflow from before a widget was added lacks its value
    saved = [got[: len(values[key])] for key, got in zip(sorted(values), loaded["values"], strict=True)]
    assert saved == [values[key] for key in sorted(values)] and len(values[2]) == 25


HOSTILE = "<img src=x onerror=window.ran=1>"


def test_names_and_texts_from_files_are_shown_as_text(page: Page) -> None:
    """A file's name, the names of its tensors and its metadata, in lists, on nodes and in messages."""
    folder = page.server.output.parent / "models" / "loras"
    folder.mkdir(parents=True, exist_ok=True)
    hostile = f"{'vue' if page.vue else 'canvas'}{HOSTILE}"  # a file that no other page has run
    lora = load_file(ROOT / "demo" / "graft-demo-neon.safetensors")
    lora |= {f"diffusion_model.{HOSTILE}.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
    for name, state in ((hostile, lora), (f"none{hostile}", {"a": torch.ones(1)})):
        save_file(state, folder / f"{name}.safetensors", {"modelspec.trigger_phrase": HOSTILE})
    page.open()
    workflow = demo("neon", inspect=True)
    (stack,) = (node for node in workflow["nodes"] if node["type"] == STACK)
    stack["widgets_values"][4] = f"{hostile}.safetensors"
    page.load(workflow)
    page.wait_for_rows(2)
    page.run()
    assert all(page.wait_for_texts().values())
    stack["widgets_values"][4] = f"none{hostile}.safetensors"
    page.load(workflow)
    page.see("() => seen.run()")
    page.wait("() => seen.ended")
    assert f"none{hostile}.safetensors holds no adapter" in page.see("() => seen.ended")
    assert page.see("() => seen.error").startswith(f"graft.AdapterError: none{hostile}")
    if page.has_panel():
        page.wait("() => document.body.innerText.includes('graft.AdapterError')")
    page.wait("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
    assert page.see("() => [window.ran, document.querySelectorAll('img[src=x]').length]") == [None, 0]


def test_files_that_are_missing_are_named_with_what_to_do(page: Page) -> None:
    """Before anything runs; whoever opens the panel reads all of it."""
    workflow = demo("neon")
    (stack,) = (node for node in workflow["nodes"] if node["type"] == STACK)
    stack["widgets_values"][1], stack["widgets_values"][4] = "Gone\\one.safetensors", "two.safetensors"
    page.load(workflow)
    page.see("() => seen.run()")
    remedy = "put these files into the loras folder, choose another one, or switch the row off"
    if page.has_panel():
        page.page.get_by_text("See Errors").dispatch_event("click")
    page.wait(
        "([text]) => document.body.innerText.replace(/\\s+/g, ' ').includes(text)",
        f"{remedy}: Gone\\one.safetensors (row 1), two.safetensors (row 2)",
    )
    page.open()  # without what the host has put over it


def templates(host_python: Path) -> dict[str, dict]:
    """The official templates that come with a ComfyUI and load diffusion models by themselves."""
    found = {}
    folders = host_python.parent.parent.glob("lib/python*/site-packages/comfyui_workflow_templates*/templates")
    for path in (path for folder in sorted(folders) for path in folder.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        if '"UNETLoader"' in text:
            found[path.stem] = json.loads(text)
    return found


# one with four text encoders, and one with its loaders in a subgraph
TEMPLATES = {"canvas": "hidream_i1_full", "vue": "flux_dev_full_text_to_image"}
LOADERS = {"UNETLoader": LOADER, **{f"{n}CLIPLoader": "GraftCLIPLoader" for n in ("", "Dual", "Triple", "Quadruple")}}
QUANTIZED = re.compile(r"(?:_fp8\w*|_fp16|_bf16)?\.safetensors$")


def all_nodes(workflow: dict) -> dict[tuple, dict]:
    """By graph and id."""
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    return {(graph["id"], node["id"]): node for graph in graphs for node in graph["nodes"]}


def quantized(name: str) -> str:
    """What its GGUF might be called."""
    return QUANTIZED.sub("-Q4_K_M.gguf", name)


def test_our_loaders_take_the_place_of_a_templates_and_go_again(page: Page) -> None:
    name = TEMPLATES["vue" if page.vue else "canvas"]
    found = templates(page.server.python)
    models = page.server.output.parent / "models"
    for node in all_nodes(found[name]).values():
        folder = models / ("diffusion_models" if node["type"] == "UNETLoader" else "text_encoders")
        folder.mkdir(parents=True, exist_ok=True)
        for file in (value for value in node.get("widgets_values") or [] if str(value).endswith(".safetensors")):
            if node["type"] in LOADERS:
                (folder / quantized(file)).touch()
    page.open()
    page.load(found[name])
    before, sent = page.saved(), page.sent()
    page.command("Graft.UseGGUF")
    after = page.saved()
    old, new = all_nodes(before), all_nodes(after)
    assert old.keys() == new.keys()
    swapped = 0
    for key, node in old.items():
        assert new[key]["type"] == LOADERS.get(node["type"], node["type"])
        assert new[key]["pos"] == node["pos"] and new[key].get("title") == node.get("title")
        if node["type"] in LOADERS:
            swapped += 1
            assert new[key]["properties"]["cnr_id"] == "graft" and "models" not in new[key]["properties"]
    assert swapped >= 2
    prompt = page.sent()
    assert prompt.keys() == sent.keys()
    for key, node in sent.items():
        ours = prompt[key]["inputs"]
        if node["class_type"] not in LOADERS:
            assert prompt[key] == node, "another node has changed"
            continue
        files = [value for value in node["inputs"].values() if str(value).endswith(".safetensors")]
        assert [value for value in ours.values() if str(value).endswith(".gguf")] == [quantized(file) for file in files]
        assert "type" not in node["inputs"] or ours["type"] == node["inputs"]["type"]
    page.see("() => app.extensionManager.workflow.activeWorkflow.changeTracker.undo()")
    assert page.sent() == sent
    page.command("Graft.UseGGUF")
    assert page.sent() == prompt
    page.command("Graft.Back")
    assert page.sent() == sent
    origins = {key: node["properties"].get("models") for key, node in all_nodes(page.saved()).items()}
    assert origins == {key: node["properties"].get("models") for key, node in old.items()}


def test_the_swap_without_a_page_does_the_same(page: Page) -> None:
    """`ops/workflows` against `web/loaders.js`, on official templates, there and back."""
    from graft.ops.workflows import loader_of, nearest, use_ours, use_theirs

    found = list(templates(page.server.python).items())
    found = found[:: max(1, len(found) // 25)]
    assert len(found) >= 20
    found += [("shown by inputs", shown_by_inputs()), ("group node", group_node())]
    names: dict[str, list[str]] = {LOADER: [], "GraftCLIPLoader": []}
    graphs = [graph for _, w in found for graph in [w, *w.get("definitions", {}).get("subgraphs", [])]]
    for node in (node for graph in graphs for node in graph["nodes"] if node["type"] in LOADERS):
        files = [value for value in node.get("widgets_values") or [] if str(value).endswith(".safetensors")]
        # of some text encoders there is no GGUF, and of some models none that is near
        names[LOADERS[node["type"]]] += [quantized(file) if len(file) % 3 else file for file in files]
    run = """async ([workflows, files]) => {
      const { useOurs, useTheirs } = await import("/extensions/graft/loaders.js");
      const any = new Proxy({}, { get: () => Object.values(files).flat() });
      return workflows.map((workflow) => {
        useOurs(workflow, files);
        const there = structuredClone(workflow);
        useTheirs(workflow, any);
        return [there, workflow];
      });
    }"""
    of_page = page.see(run, [workflow for _, workflow in found], names)
    everything = [name for files in names.values() for name in files]
    swapped = 0
    for (name, workflow), (there, back) in zip(found, of_page, strict=True):
        done = use_ours(workflow, lambda kind: lambda file: nearest(file, names[kind]))
        swapped += sum(not one.left for one in done)
        assert all(loader_of(one.kind) for one in done if "group node" not in one.left) and workflow == there, name
        use_theirs(workflow, lambda kind: lambda file: nearest(file, everything, lambda _: True))
        assert workflow == back, name
    assert swapped >= 20


def test_a_workflow_with_a_group_node(page: Page) -> None:
    """What that holds is told and left; it was drawn, so that the page has more of it than what is saved."""
    models = page.server.output.parent / "models" / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    (models / "flux1-dev-Q4_K_M.gguf").touch()
    page.open()
    page.load(group_node())
    page.wait("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
    page.command("Graft.UseGGUF")
    kinds = {node["id"]: node["type"] for node in page.saved()["nodes"]}
    assert kinds[2] == LOADER and kinds[1].endswith("Both")
    told = "left as it is: choose Convert to nodes on the group node Both first"
    page.wait("([text]) => document.querySelector('.p-toast')?.innerText.includes(text)", told)


@pytest.mark.skipif("GRAFT_WORKFLOWS" not in os.environ, reason="no workflows of others: set GRAFT_WORKFLOWS")
def test_workflows_of_others(page: Page) -> None:
    """All in a folder, as people have saved them: only loaders change, come back, and the tool does the same."""
    paths = sorted(Path(os.environ["GRAFT_WORKFLOWS"]).glob("*.json"))
    workflows = {path.name: json.loads(path.read_text(encoding="utf-8-sig")) for path in paths}
    assert workflows, "no *.json there"
    models, folders = page.server.output.parent / "models", {LOADER: "diffusion_models"}
    for kind, files in there_and_back.files_in(list(workflows.values())).items():
        for file in files:
            path = models / folders.get(kind, "text_encoders") / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    page.open()
    page.see("() => { app.canvas.pause_rendering = true; }")  # hundreds of nodes, a hundred times
    page.see(there_and_back.ADD_KINDS, there_and_back.kinds_in(list(workflows.values())))
    listed = """() => Object.fromEntries([["GraftUNETLoader", "unet_name"], ["GraftCLIPLoader", "clip_name1"]].map(
      ([kind, input]) => {
        const [list, options] = LiteGraph.registered_node_types[kind].nodeData.input.required[input];
        return [kind, Array.isArray(list) ? list : options.options];
      }))"""
    files, failed, swapped = page.see(listed), {}, 0
    for name, workflow in workflows.items():
        try:
            swapped += there_and_back.check(page, workflow, files)
        except AssertionError as error:
            failed[name] = str(error)
    print(f"{page.server.host}: {len(workflows)} workflows, {swapped} loaders there and back, {len(failed)} failed")
    assert not failed


def test_names_are_spelled_as_on_this_computer(page: Page) -> None:
    workflow = demo("neon")
    values = {node["type"]: node["widgets_values"] for node in workflow["nodes"]}
    values[LOADER][0], values[STACK][1] = "Graft-Demo-Q8_0.GGUF", "Graft-demo-Neon.safetensors"
    values[STACK].append('[{"lora": "GRAFT-demo-linocut.safetensors", "strength": 0.5}, {"lora": "Gone.safetensors"}]')
    page.load(workflow)
    saved = {node["type"]: node["widgets_values"] for node in page.saved()["nodes"]}
    assert (saved[LOADER][0], saved[STACK][1]) == ("graft-demo-Q8_0.gguf", "graft-demo-neon.safetensors")
    behind = [(row["lora"], row["strength"]) for row in json.loads(saved[STACK][25])]
    assert behind == [("graft-demo-linocut.safetensors", 0.5), ("Gone.safetensors", 1)]
    told = "A file of this workflow is missing Gone.safetensors, into models/loras"
    page.wait("([text]) => document.querySelector('.p-toast')?.innerText.replace(/\\s+/g, ' ').includes(text)", told)


def test_our_widgets_are_in_the_order_that_the_swap_writes_them_in(page: Page) -> None:
    assert page.see("""async () => {
      const { OURS } = await import("/extensions/graft/loaders.js");
      const widgets = (type) => LiteGraph.createNode(type).widgets.map(({ name }) => name);
      return Object.keys(OURS).filter((type) => Object.keys(OURS[type]).join() !== widgets(type).join());
    }""") == []


def test_one_loader_of_a_pack_that_is_missing(page: Page) -> None:
    """From its menu: its links, its title and its place stay, and who made it is not said of ours."""
    workflow = demo("neon")
    loader = next(node for node in workflow["nodes"] if node["type"] == LOADER)
    origin = {"cnr_id": "comfyui-gguf", "ver": "1.1.4", "aux_id": "city96/ComfyUI-GGUF"}
    loader |= {
        "type": "UnetLoaderGGUFAdvancedDisTorch2MultiGPU", "title": "My model", "properties": origin,
        "widgets_values": ["sub\\GRAFT-demo-Q8_0.gguf", "float32", "default", False, "cuda:1", 4.0, "cpu", "", True],
    }  # fmt: skip
    page.load(workflow)
    page.menu(loader["id"], "Use GGUF (Graft)")
    (ours,) = (node for node in page.saved()["nodes"] if node["id"] == loader["id"])
    assert (ours["type"], ours["title"], ours["pos"]) == (LOADER, "My model", loader["pos"])
    assert ours["widgets_values"][:3] == ["graft-demo-Q8_0.gguf", "auto", "auto"]
    assert ours["properties"]["cnr_id"] == "graft" and "aux_id" not in ours["properties"]
    page.run()
    page.menu(loader["id"], "Back from Graft's loader")
    (theirs,) = (node for node in page.saved()["nodes"] if node["id"] == loader["id"])
    assert theirs["type"] == loader["type"] and theirs["widgets_values"] == loader["widgets_values"]
    assert origin.items() <= theirs["properties"].items()


def texts_in(picture: Path) -> dict[str, str]:
    """What a PNG says of itself, by key."""
    data, at, found = picture.read_bytes(), 8, {}
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        if kind == b"tEXt":
            key, _, text = data[at + 8 : at + 8 + length].partition(b"\0")
            found[key.decode("latin-1")] = text.decode("latin-1")
        at += 12 + length
    return found


def at_the_other_end(page: Page, browser: Any, servers: Callable[[Host], Server]) -> Page:
    """A page of the newest ComfyUI where this one is of the oldest, and the other way round."""
    hosts = comfyui_hosts()
    ends = {hosts[0].name: hosts[-1], hosts[-1].name: hosts[0]}
    if page.vue or len(ends) < 2 or page.server.host not in ends:
        pytest.skip("the oldest and the newest front end, one way and the other")
    return Page(browser.new_page(), servers(ends[page.server.host]), vue=False)


def test_a_picture_from_another_version_and_other_folders_runs_here(
    page: Page, browser: Any, servers: Callable[[Host], Server]
) -> None:
    there = at_the_other_end(page, browser, servers)
    host = page.server.host  # the servers have files of both ways
    names = {
        there.server: (f"Flux/{host}-8.gguf", f"a/{host} Style.safetensors"),
        page.server: (f"{host}-8.GGUF".lower(), f"{host} style.safetensors"),
    }
    for server, (model, lora) in names.items():
        for name, folder, demos in ((model, "diffusion_models", "Q8_0.gguf"), (lora, "loras", "neon.safetensors")):
            path = server.output.parent / "models" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / "demo" / f"graft-demo-{demos}", path)
    workflow = demo("neon")
    values = {node["type"]: node["widgets_values"] for node in workflow["nodes"]}
    values[LOADER][0], values[STACK][1] = names[there.server]
    values["SaveImage"][0] = f"for {host}"
    for tab in (there, page):
        tab.open()
    there.load(workflow)
    there.run()
    (picture,) = there.server.output.glob(f"for {host}_*.png")
    text = texts_in(picture)["workflow"].replace("Flux/", "Flux\\\\")
    page.load(json.loads(text))
    page.run()
    texts = page.wait_for_texts()
    assert texts[LOADER].endswith(f"\n{host.lower()}-8.gguf is here for Flux\\{host}-8.gguf")
    assert texts[STACK].endswith(f"\n{host} style.safetensors is here for a/{host} Style.safetensors")
    assert all(node["properties"]["cnr_id"] == "graft" for node in page.saved()["nodes"] if "Graft" in node["type"])
    there.page.close()


CHINESE = re.compile("[\u4e00-\u9fff]")
SAID = {
    "style.safetensors ×0.80: 3/4 layers, rank 4 to 16; 1 not in this model, such as a (trained for Flux, model is "
    "SD3)\n  kohya names; 3 layers next to the quantized weights":
    "style.safetensors ×0.80: 3/4 层，秩 4 到 16；模型里没有其中 1 个，例如 a (为 Flux 训练，模型是 SD3)\n"
    "  kohya 命名；3 层在量化权重旁计算",
    "runs on NVIDIA RTX 3060: the model takes 6.8 GB of 12.9 GB, dynamic VRAM is on":
    "在 NVIDIA RTX 3060 上运行：模型占用 6.8 GB，共 12.9 GB，动态显存已打开",
    "faster: run python -m pip install -U triton with ComfyUI's Python and start ComfyUI again":
    "更快的方法：用 ComfyUI 的 Python 运行 python -m pip install -U triton，然后重启 ComfyUI",
    "saved my-Q4_K_M.gguf, 6.87 GB in 64 s\n2 layers in another type, rows of 96 do not fit Q4_K (blocks of 256): a, b":
    "已保存 my-Q4_K_M.gguf，6.87 GB，用时 64 秒\n2 层用了另一种类型，每行 96 个数，不适合 Q4_K（每块 256 个）: a, b",
    "no phrase of ours": "no phrase of ours",
}  # fmt: skip


@contextmanager
def in_chinese(page: Page) -> Iterator[None]:
    """The page as it is where ComfyUI's language is Chinese."""
    setting = f"http://127.0.0.1:{page.server.port}/settings/Comfy.Locale"
    page.page.request.post(setting, data=json.dumps("zh"))
    try:
        page.open()
        yield
    finally:
        page.page.request.post(setting, data=json.dumps("en"))
        page.open()


def test_all_of_it_is_in_chinese_where_comfyui_is(page: Page) -> None:
    hosts = comfyui_hosts()
    if page.vue != (page.server.host == hosts[-1].name) or page.server.host not in (hosts[0].name, hosts[-1].name):
        pytest.skip("in the oldest front end on the canvas, and in the newest with Vue nodes")
    with in_chinese(page):
        page.load(demo("neon", "blueprint"))
        page.wait_for_rows(2)
        names = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
        fresh = """([kind]) => {
          const node = LiteGraph.createNode(kind);
          return [node.title, node.widgets.find(({ name }) => name === "strength_3").label];
        }"""
        stack = names[STACK]
        assert page.see(fresh, STACK) == [stack["display_name"], stack["inputs"]["strength_3"]["name"]]
        page.page.locator(".graft-rows [data-row='2'] button").last.click()
        entries = page.page.locator(".litecontextmenu .litemenu-entry").all_inner_texts()
        assert len(entries) == 6 and all(map(CHINESE.search, entries)), entries
        page.page.locator(".litecontextmenu").get_by_text("移除", exact=True).click()
        page.wait_for_rows(1)
        loader = "app.canvas.getNodeMenuOptions(seen.nodes('GraftUNETLoader')[0])"
        menus = f"[...app.canvas.getCanvasMenuOptions(), ...{loader}]"
        entries = page.see(f"() => {menus}.map((entry) => entry?.content).filter((text) => text?.includes('Graft'))")
        labels = page.see("() => [...document.querySelectorAll('.graft-rows [title]')].map(({ title }) => title)")
        assert all(map(CHINESE.search, [*entries, *labels])), [*entries, *labels]
        page.command("Graft.Back")
        page.page.get_by_text("已更换 1 个加载器，Ctrl+Z 可撤销").first.wait_for()
        translated = "async ([text]) => (await import('/extensions/graft/phrases.js')).translated(text, 'zh')"
        assert [page.see(translated, text) for text in SAID] == list(SAID.values())
        page.load(demo("neon"))
        page.run()
        texts = page.wait_for_texts()
        assert "在处理器上运行" in texts[LOADER]
        assert "41/41 层，秩 16" in texts[STACK] and "41 层在量化权重旁计算" in texts[STACK]
        text = "async ([kind]) => (await fetch(app.api.fileURL(`/extensions/graft/docs/${kind}/zh.md`))).text()"
        assert page.see(text, STACK).startswith(f"# {stack['display_name']}\n")


def failed(page: Page, workflow: dict) -> tuple[str, str]:
    """What a run tells the page of its error, and what the server has written."""
    page.load(workflow)
    page.see("() => seen.run()")
    page.wait("() => seen.ended")
    runs = page.page.request.get(f"http://127.0.0.1:{page.server.port}/history").json().values()
    events = [event for run in runs for event in run["status"]["messages"]]
    written = [told["exception_message"] for kind, told in events if kind == "execution_error"]
    return page.see("() => seen.ended").strip(), written[-1].strip()


def wait_for_words(page: Page, words: str) -> None:
    """That an error is read by whoever opens the panel, or the window that is there by itself."""
    if page.has_panel():
        page.page.get_by_text(re.compile("^(See Errors|查看错误)$")).first.dispatch_event("click")
    page.wait("([text]) => document.body.innerText.replace(/\\s+/g, ' ').includes(text)", words)


def test_errors_are_in_chinese_where_comfyui_is(page: Page) -> None:
    """Those of ours, of a run and of a prompt that is refused; what a stock node says stays as it is."""
    if (page.server.host, page.vue) not in ((comfyui_hosts()[0].name, False), (comfyui_hosts()[-1].name, True)):
        pytest.skip("in the oldest front end and the newest")
    mode = "vue" if page.vue else "canvas"
    models = page.server.output.parent / "models" / "diffusion_models"
    models.mkdir(parents=True, exist_ok=True)
    (models / f"page {mode}.gguf").write_text("<!DOCTYPE html>")
    workflow = demo("neon")
    values = {node["type"]: node["widgets_values"] for node in workflow["nodes"]}
    with in_chinese(page):
        values[LOADER][0] = f"page {mode}.gguf"  # named so that no other page has run it
        said, written = failed(page, workflow)
        assert written.startswith("File is 15 bytes, a web page: download the model itself, after logging in if")
        words = "文件有 15 字节，是一个网页：请下载模型本身，如果网站要求，请先登录 ("
        assert said == f"{words}{models / f'page {mode}.gguf'})"
        wait_for_words(page, words)
        page.open()
        values[LOADER][0], values[STACK][1] = "graft-demo-Q8_0.gguf", "gone.safetensors"
        page.load(workflow)
        page.see("() => seen.run()")
        wait_for_words(page, "请把文件放入 loras 文件夹，或选择其他文件，或停用该行：gone.safetensors (第 1 行)")
        page.open()
        values[STACK][1], values["SaveImage"][0] = "graft-demo-neon.safetensors", "../../outside"
        said, written = failed(page, workflow)
        assert said == written and "Saving image outside the output folder is not allowed" in said
    values[LOADER][0] = f"page {mode}.gguf"
    said, written = failed(page, workflow)
    assert said == written and said.startswith("File is 15 bytes, a web page")
    page.open()


def is_told(files: int) -> str:
    """Whether saved nodes say what so many files are."""
    entries = "app.graph.serialize().nodes.flatMap(({ properties }) => properties.graft_files ?? [])"
    return f"() => {entries}.filter(({{ hash }}) => hash?.length === 64).length === {files}"


def test_files_with_other_names_are_found_by_what_they_are(
    page: Page, browser: Any, servers: Callable[[Host], Server]
) -> None:
    """By their SHA-256, which is in a picture from another version; one that nobody has is told with all that helps."""
    there = at_the_other_end(page, browser, servers)
    models = there.server.output.parent / "models"
    own = f"of {page.server.host}"  # the servers have files of both ways
    names = {"diffusion_models": ("Q8_0.gguf", f"{own}/a.gguf"), "loras": ("neon.safetensors", f"{own}.safetensors")}
    for folder, (demos, name) in names.items():
        (models / folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "demo" / f"graft-demo-{demos}", models / folder / name)
    there.open()
    workflow = demo("neon")
    values = {node["type"]: node["widgets_values"] for node in workflow["nodes"]}
    values[LOADER][0], values[STACK][1] = (name for _, name in names.values())
    there.load(workflow)
    there.run()
    there.wait(is_told(2))  # it is read once the run has ended
    there.see("() => { seen.nodes('KSampler')[0].widgets[0].value += 1; }")
    values["SaveImage"][0] = f"told for {page.server.host}"
    there.see("([name]) => { seen.nodes('SaveImage')[0].widgets[0].value = name; }", values["SaveImage"][0])
    there.run()
    (picture,) = there.server.output.glob(f"{values['SaveImage'][0]}_*.png")
    there.page.close()
    travelled = json.loads(texts_in(picture)["workflow"])

    page.load(demo("neon"))
    page.run()
    page.wait(is_told(2))
    page.open()  # what was read is known to a new page, too
    page.load(travelled)
    saved = {node["type"]: node for node in page.saved()["nodes"]}
    same = saved[LOADER]["widgets_values"][0], saved[STACK]["widgets_values"][1]
    for kind, name, (_, (demos, theirs)) in zip((LOADER, STACK), same, names.items(), strict=True):
        # another test may have put the same file here under another name
        (said,) = saved[kind]["properties"]["graft_files"]
        digest = hashlib.sha256((ROOT / "demo" / f"graft-demo-{demos}").read_bytes()).hexdigest()
        assert name != theirs and (said["name"], said["hash"]) == (name, digest)
    toast = "() => document.querySelector('.p-toast')?.innerText ?? ''"
    page.wait(f"([text]) => ({toast})().includes(text)", f"{same[0]} for {own}/a.gguf, the same file by its SHA-256")
    page.run()

    loader = next(node for node in travelled["nodes"] if node["type"] == LOADER)
    loader["widgets_values"][0] = "My/gone.gguf"
    url = "https://huggingface.co/someone/gone.gguf"
    loader["properties"]["graft_files"] = [
        {"name": "My/gone.gguf", "directory": "diffusion_models", "hash": "ab" * 32, "url": url}
    ]
    page.load(travelled)
    told = f"My/gone.gguf, SHA-256 abababababab, into models/diffusion_models, {url}"
    page.wait(f"([text]) => ({toast})().replace(/\\s+/g, ' ').includes(text)", told)
    saved = {node["type"]: node["properties"] for node in page.saved()["nodes"]}
    assert saved[LOADER]["models"][0]["url"] == url and saved[LOADER]["graft_files"][0]["hash"] == "ab" * 32


def test_a_workflow_passes_a_comfyui_without_the_pack(browser: Any, tmp_path: Path) -> None:
    """What is opened and saved there has our nodes' values, and what tells where to get them, as they were."""
    hosts = comfyui_hosts()
    if not hosts:
        pytest.skip("no ComfyUI found: set COMFYUI_PATH to run the host tests (CONTRIBUTING.md)")
    with hosts[-1].starting():
        server = Server(tmp_path, hosts[-1].python, hosts[-1].folder, bare=True)
    try:
        page = Page(browser.new_page(), server, vue=False, kind="KSampler")
        workflow = demo("neon")
        origin = {"cnr_id": "graft", "ver": "0.1.0", "graft_files": [{"name": "a", "hash": "ab" * 32}]}
        ours = {node["id"]: node for node in workflow["nodes"] if node["type"].startswith("Graft")}
        for node in ours.values():
            node["properties"] |= origin
        page.load(workflow)
        for node in page.saved()["nodes"]:
            if node["id"] in ours:
                assert node["type"] == ours[node["id"]]["type"] and origin.items() <= node["properties"].items()
                assert node["widgets_values"] == ours[node["id"]]["widgets_values"]
        page.page.close()
    finally:
        server.stop()


def test_the_console_is_quiet(page: Page) -> None:
    assert page.problems == []


def test_a_model_of_ones_own_is_made_and_chosen(page: Page) -> None:
    """Saved with its LoRA and calibrated, told on the node; after a refresh the loader has it, and draws with it."""
    if page.server.host not in (comfyui_hosts()[0].name, comfyui_hosts()[-1].name):
        pytest.skip("in the oldest and the newest front end")
    workflow, name = json.loads(json.dumps(MAKE)), f"own-{'vue' if page.vue else 'canvas'}"
    for node in workflow["nodes"]:
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 1
        elif node["type"] == "GraftSaveGGUF":
            node["widgets_values"][1:3] = name, "diffusion_models"
    page.open()
    page.load(workflow)
    page.run()
    page.wait("() => seen.text('GraftSaveGGUF')?.value")
    text = page.see("() => seen.text('GraftSaveGGUF').value")
    assert text.startswith(f"saved {name}-Q4_K_M.gguf") and "wan · Q4_K_M" in text
    path = page.server.output.parent / "models" / "diffusion_models" / f"{name}-Q4_K_M.gguf"
    file = open_gguf(path)
    assert file.metadata["graft.loras"] == ["graft-demo-neon.safetensors ×1"] and file.metadata["graft.importance"]
    page.load(demo())
    choose = "const [widget] = seen.nodes('GraftUNETLoader')[0].widgets; "
    listed = f"{choose} const {{ values }} = widget.options; return typeof values === 'function' ? values() : values;"
    page.command("Comfy.RefreshNodeDefinitions")
    page.wait(f"([file]) => {{ const names = (() => {{ {listed} }})(); return names.includes(file); }}", path.name)
    page.see(f"([file]) => {{ {choose} widget.value = file; widget.callback?.(file); }}", path.name)
    page.run()
    # the types of the new file
    assert "Q4_K" in page.wait_for_texts()[LOADER] and "Q6_K" in page.wait_for_texts()[LOADER]
    assert page.problems == []
