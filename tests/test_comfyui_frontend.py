"""`web/graft.js` in the front ends that ComfyUI comes with, in a browser: the demo workflow on a running server.

Playwright is installed beside this checkout and not in the hosts, so these tests run here and only the server there.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium
from hosts import ROOT, Host, comfyui_hosts

sys.path.append(str(Path(__file__).parent / "in_comfyui"))
from comfy_server import Server

pytestmark = pytest.mark.host

DEMO = json.loads((ROOT / "example_workflows" / "Graft demo.json").read_text())
STYLES = ("neon", "blueprint", "linocut")
LOADER, STACK, INSPECT = "GraftUNETLoader", "GraftLoraStack", "GraftInspect"

HELPERS = """
window.seen = {
  nodes: (kind) => app.graph._nodes.filter((node) => node.type === kind),
  text: (kind) => seen.nodes(kind)[0]?.widgets?.find((widget) => widget.name === "graft_text"),
  rows: (kind) => {
    const [node] = seen.nodes(kind);
    const drawn = document.querySelectorAll(`[data-node-id="${node.id}"] [data-testid="node-widget"]`);
    const names = node.widgets.filter((widget) => node.isWidgetVisible(widget)).map((widget) => widget.name);
    const rows = names.filter((name) => name.startsWith("lora_")).length;
    const whole = names.length === 3 * rows + Boolean(seen.text(kind));
    return whole && (!LiteGraph.vueNodesMode || drawn.length === names.length) ? rows : -1;
  },
  run: () => {
    seen.ended = undefined;
    app.queuePrompt(0);
  },
};
app.api.addEventListener("execution_success", () => (seen.ended = "success"));
app.api.addEventListener("execution_error", ({ detail }) => (seen.ended = detail.exception_message));
"""


class Page:
    """A page of a running ComfyUI, and what its console said about our file."""

    def __init__(self, page: Any, server: Server, vue: bool) -> None:
        self.page, self.server, self.vue = page, server, vue
        self.problems: list[str] = []
        page.set_default_timeout(60_000)
        page.on("console", lambda line: self._hear(line.type, line.text, line.location.get("url", "")))
        page.on("pageerror", lambda error: self._hear("error", f"{error}\n{error.stack}", ""))
        self.open()

    def _hear(self, kind: str, text: str, where: str) -> None:
        if kind in ("error", "warning") and "graft" in (text + where).lower():
            self.problems.append(f"{text} {where}")

    def open(self) -> None:
        address = f"http://127.0.0.1:{self.server.port}"
        for key, value in {"VueNodes.Enabled": self.vue, "TutorialCompleted": True, "UseNewMenu": "Top"}.items():
            self.page.request.post(f"{address}/settings/Comfy.{key}", data=json.dumps(value))
        self.page.goto(address)
        self.wait("Boolean(window.app?.vueAppReady && app.graph && LiteGraph.registered_node_types.GraftInspect)")
        self.wait("Boolean(app.api.clientId && app.api.socket?.readyState === WebSocket.OPEN)")  # or events are lost
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
        running.append(Server(tmp_path_factory.mktemp("comfy"), host.python, host.folder))
        return running[-1]

    yield start
    for server in running:
        server.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


MODES = [pytest.param((h, m), id=f"{h.name}-{m}") for h in comfyui_hosts() for m in ("canvas", "vue")]


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
    nodes[STACK]["widgets_values"] = [value for file in files for value in (True, file, 1.0)]
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
    assert texts[LOADER].startswith("WAN21_T2V · 4.9M · Q8_0 45") and "\n" not in texts[LOADER]
    for style in STYLES:
        assert f"graft-demo-{style}.safetensors ×1.00: 41/41 layers" in texts[STACK]
    assert texts[STACK].count("\n") == 5 and "41 layers beside the packed weight: " in texts[INSPECT]
    areas = "[...document.querySelectorAll('textarea')]"
    for text in texts.values():
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
    assert page.see("([kind]) => seen.nodes(kind)[0].size[1]", INSPECT) < 400


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


def test_nothing_of_the_demo_overlaps_after_a_run(page: Page) -> None:
    page.load(demo(*STYLES))
    page.run()
    page.wait_for_texts()
    overlap = """() => {
      const box = ({ pos, size }) => [pos[0], pos[1] - 30, pos[0] + size[0], pos[1] + size[1]];
      const apart = (a, b) => a[2] <= b[0] || b[2] <= a[0] || a[3] <= b[1] || b[3] <= a[1];
      const pairs = app.graph._nodes.flatMap((a, i, all) => all.slice(i + 1).map((b) => [a, b]));
      return pairs.filter(([a, b]) => !apart(box(a), box(b))).map(([a, b]) => `${a.type}, ${b.type}`);
    }"""
    page.wait("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(true))))")
    assert page.see(overlap) == []


def test_rows_come_and_go(page: Page) -> None:
    page.load(demo())
    page.wait_for_rows(1)
    page.load(demo("neon", "blueprint"))
    page.wait_for_rows(3)
    page.set_row(3, "graft-demo-linocut.safetensors")
    page.wait_for_rows(4)
    page.set_row(2, "None")
    page.wait_for_rows(4)
    page.set_row(3, "None")
    page.wait_for_rows(2)
    page.set_row(8, "graft-demo-neon.safetensors")
    page.wait_for_rows(8)
    page.set_row(8, "None")
    page.wait_for_rows(2)


def test_a_row_with_a_link_stays(page: Page) -> None:
    page.load(demo("neon"))
    page.see("""() => {
      const [stack] = seen.nodes("GraftLoraStack");
      const number = LiteGraph.createNode("PrimitiveNode");
      app.graph.add(number);
      number.connect(0, stack, stack.inputs.findIndex((slot) => slot.widget?.name === "strength_5"));
    }""")
    page.wait_for_rows(6)
    page.see("() => app.loadGraphData(app.graph.serialize())")
    page.wait_for_rows(6)
    page.see("""() => {
      const [stack] = seen.nodes("GraftLoraStack");
      stack.disconnectInput(stack.inputs.findIndex((slot) => slot.widget?.name === "strength_5"));
    }""")
    page.wait_for_rows(2)


def test_a_new_stack_is_as_tall_as_its_one_row(page: Page) -> None:
    height = "() => LiteGraph.createNode('GraftLoraStack').size[1]"
    assert page.see(height) < 200
    pair = "['GraftLoraStack', 'GraftLoraStack'].map((kind) => LiteGraph.createNode(kind))"
    count = "node.widgets.filter((widget) => !widget.hidden).length"
    changed = "two[0].widgets[1].value = 'graft-demo-neon.safetensors'"
    assert page.see(f"() => {{ const two = {pair}; {changed}; return two.map((node) => {count}); }}") == [6, 3]


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
    slots: nodes.map((node) => node.inputs.map((slot) => slot.name)),
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
    assert loaded["values"] == [values[key] for key in sorted(values)] and len(values[2]) == 24


def test_the_console_is_quiet(page: Page) -> None:
    assert page.problems == []
