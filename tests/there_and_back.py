"""A workflow in the page, with our loaders in the place of others, and back: what may differ, and what may not."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graft.ops.workflows import loader_of, nearest, use_ours, use_ours_in_prompt, use_theirs, use_theirs_in_prompt
from graft.ops.workflows.table import OURS, is_file

Json = dict[str, Any]
Key = tuple[int, Any]  # which graph of the workflow, and the node's id in it

# What a page changes by itself as it opens a workflow again or draws it, and what differs from call to call
_NOISE = {"order", "localized_name", "size", "Node name for S&R", "audioUI"}
_ENDINGS = re.compile(r"(?:_fp8\w*|_fp16|_bf16)?\.safetensors$")

ADD_KINDS = """async ([kinds]) => {
  for (const [name, widgets, output] of kinds) {
    if (name in LiteGraph.registered_node_types) continue;
    const of = (widget) => (widget === "patch_on_device" ? ["BOOLEAN", {}] : [["a", "b"], {}]);
    await app.registerNodeDef(name, {
      name, display_name: name, description: "", category: "test", python_module: "custom_nodes.test",
      input: { required: Object.fromEntries(widgets.map((widget) => [widget, of(widget)])) },
      output: [output], output_name: [output], output_is_list: [false], output_node: false,
    });
  }
}"""
"""Makes the page know kinds of nodes, as if their packs were there."""


def graphs_of(workflow: Json) -> list[Json]:
    return [workflow, *((workflow.get("definitions") or {}).get("subgraphs") or [])]


def nodes_of(workflow: Json) -> dict[Key, Json]:
    return {(at, node["id"]): node for at, graph in enumerate(graphs_of(workflow)) for node in graph["nodes"]}


def kinds_in(workflows: Sequence[Json]) -> list[tuple[str, list[str], str]]:
    """Of all loaders that ours stand for: name, widgets, output."""
    kinds = {node["type"]: loader_of(node["type"]) for workflow in workflows for node in nodes_of(workflow).values()}
    known = {kind: loader for kind, loader in kinds.items() if loader is not None}
    return [(kind, row.widgets, "MODEL" if "UNET" in row.ours else "CLIP") for kind, row in known.items()]


def files_in(workflows: Sequence[Json]) -> dict[str, set[str]]:
    """The files that loaders name, as GGUF and as this system writes them, by the class of ours."""
    found: dict[str, set[str]] = {kind: set() for kind in OURS}
    for node in (node for workflow in workflows for node in nodes_of(workflow).values()):
        loader, values = loader_of(node["type"]), node.get("widgets_values")
        for name, value in zip(loader.widgets, values, strict=False) if loader and isinstance(values, list) else ():
            if is_file(loader.kept.get(name)) and isinstance(value, str) and value.lower() not in ("", "none"):
                found[loader.ours].add(_ENDINGS.sub("-Q4_K_M.gguf", value.replace("\\", "/")))
    return found


def check(page: Any, workflow: Json, files: Mapping[str, Sequence[str]]) -> int:
    """Go there and back in the page and without it.

    Args:
        page: of a running ComfyUI, which knows every kind of loaders in the workflow.
        files: what our loaders list.

    Returns:
        how many loaders were changed.

    Raises:
        AssertionError: something that was not meant has changed, or the tool does something else than the page.
    """

    def choose_for(kind: str) -> Callable[[object], str | None]:
        return lambda name: nearest(name, files[kind])

    def choose_back(kind: str) -> Callable[[object], str | None]:
        return lambda name: None

    page.load(workflow)
    page.load(page.saved())  # of nodes of packs that are missing, older front ends lose slots as they open them again
    before, sent = page.saved(), page.sent()
    page.command("Graft.UseGGUF")
    after, prompt = page.saved(), page.sent()
    by_tool = copy.deepcopy(before)
    use_ours(by_tool, choose_for)
    swapped = _same_but_loaders(before, after, by_tool)
    assert links_of(after) == links_of(by_tool) == links_of(before, swapped), "links"
    by_tool = copy.deepcopy(sent)
    use_ours_in_prompt(by_tool, choose_for)
    _same_prompt(by_tool, prompt, "the tool's prompt")
    use_theirs_in_prompt(by_tool, choose_back)
    _same_prompt(by_tool, sent, "the tool's prompt, back")

    tracker = "app.extensionManager.workflow.activeWorkflow.changeTracker"
    page.see(f"() => {tracker}.undo()")
    _same(plain(page.saved()), plain(before), "after undo")
    _same_prompt(page.sent(), sent, "after undo")
    page.see(f"() => {tracker}.redo()")
    _same(plain(page.saved()), plain(after), "after redo")
    saved = page.saved()
    page.load(saved)
    _same(plain(page.saved()), plain(after), "opened again")
    _same_prompt(page.sent(), prompt, "opened again")

    page.command("Graft.Back")
    _same(plain(page.saved()), plain(before), "back")
    _same_prompt(page.sent(), sent, "back")

    # the file as it is, through the tool, and then into the page
    by_tool = copy.deepcopy(workflow)
    use_ours(by_tool, choose_for)
    page.load(by_tool)
    _same_prompt(page.sent(), prompt, "the tool's workflow")
    use_theirs(by_tool, choose_back)
    page.load(by_tool)
    _same_prompt(page.sent(), sent, "the tool's workflow, back")
    return len(swapped)


def plain(workflow: Json) -> Json:
    """A saved workflow with what a page may change by itself in one order."""
    found = {"nodes": [], "links": links_of(workflow)}
    for (at, _), node in sorted(nodes_of(workflow).items(), key=lambda item: str(item[0])):
        kept = {key: value for key, value in node.items() if key not in ("inputs", "outputs")}
        found["nodes"].append({**copy.deepcopy(kept), "graph": at})
    return found


def links_of(workflow: Json, swapped: Sequence[Key] = ()) -> list[tuple]:
    """All links, by the names of inputs; of the loaders that are `swapped`, as ours has them."""
    found = []
    for at, graph in enumerate(graphs_of(workflow)):
        nodes = {node["id"]: node for node in graph["nodes"]}
        for link in graph.get("links") or []:
            names = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
            ends = link[:5] if isinstance(link, list) else [link[name] for name in names]
            _, origin, origin_slot, target, target_slot = ends
            begin = graph["inputs"][origin_slot]["name"] if origin == -10 else origin_slot
            slots = nodes.get(target, {}).get("inputs") or []
            end = slots[target_slot]["name"] if target_slot < len(slots) else target_slot
            if (at, target) in swapped:
                loader = loader_of(nodes[target]["type"])
                assert loader is not None
                end = loader.kept.get(end)
            if end is not None:
                found.append((at, origin, begin, target, end))
    return sorted(found, key=str)


def _same_but_loaders(before: Json, after: Json, by_tool: Json) -> list[Key]:
    """Which loaders were changed, to the same by the page and by the tool."""
    old, new, tools = nodes_of(before), nodes_of(after), nodes_of(by_tool)
    assert old.keys() == new.keys(), "nodes have come or gone"
    subgraphs = [graph.get("id") for graph in graphs_of(before)[1:]]
    swapped = []
    for key, node in old.items():
        ours, of_tool = new[key], tools[key]
        assert ours["type"] == of_tool["type"], f"{key}: {ours['type']}, the tool {of_tool['type']}"
        assert ours["pos"] == node["pos"], f"{key}: position"
        title = None if node.get("title") == node["type"] else node.get("title")
        assert title is None or ours.get("title") == title, f"{key}: title"
        if ours["type"] != node["type"]:
            swapped.append(key)
            assert ours["widgets_values"] == of_tool["widgets_values"], f"{key}: {ours['widgets_values']}"
        elif node["type"] in subgraphs:
            for what in (ours, of_tool):
                what["shown"] = (what.get("properties") or {}).get("proxyWidgets"), what.get("widgets_values")
            _same(ours.pop("shown"), of_tool.pop("shown"), f"{key}: what the subgraph shows")
        else:
            _same(ours.get("widgets_values"), node.get("widgets_values"), f"{key}: another node")
    return swapped


def _same_prompt(one: Json, other: Json, what: str) -> None:
    sent = [{key: (node["class_type"], node["inputs"]) for key, node in prompt.items()} for prompt in (one, other)]
    _same(*sent, what)


def _same(one: Any, other: Any, what: str) -> None:
    found = list(_differences(one, other, what))
    assert not found, "; ".join(found[:3])


def _differences(one: Any, other: Any, where: str) -> Any:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted({*one, *other} - _NOISE, key=str):
            yield from _differences(one.get(key), other.get(key), f"{where}, {key}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            yield from _differences(a, b, f"{where}, {index}")
    elif one != other:
        yield f"{where}: {str(one)[:200]}, was {str(other)[:200]}"
