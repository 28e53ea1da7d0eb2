"""Our loaders in the place of others, and back, in a workflow as the page saves it. `web/loaders.js` does the same.

Ids, links, positions and titles stay; what a loader was is kept with the node, so that it can be put back.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from .names import is_gguf
from .table import MEANINGLESS, ORIGIN, OURS, PACK, STOCK, WAS, Loader, is_file, loader_of

Json = dict[str, Any]
Choose = Callable[[object], "str | None"]
"""Finds the file that a name means; None if none is near."""

_INPUTS = -10  # the id of a subgraph's inputs where a link begins
_BY_INPUT = "-1"  # in place of a node's id, where a shown widget is that of an input of the subgraph
_WITHOUT_MEANING = ("default", "none", "target", "", False, None)


@dataclass
class Swapped:
    """What became of a loader.

    Attributes:
        node: its id.
        kind: its class, as it was.
        files: for each file its name, and the one that was chosen for it; None if none here is near.
        lost: choices that have no equal.
        left: why it was left as it is; "" if it was not.
    """

    node: str
    kind: str
    files: list[tuple[str, str | None]] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    left: str = ""

    @property
    def lines(self) -> list[str]:
        """For people: what they have to know or to do."""
        if self.left:
            return [f"left as it is: {self.left}"]
        chosen = [
            f"choose a file: there is none with a name like {was}" if now is None else f"{now} for {was}"
            for was, now in self.files
            if was != now
        ]
        return chosen + [f"not taken along: {choice}" for choice in self.lost]


def use_ours(workflow: Json, choose_for: Callable[[str], Choose]) -> list[Swapped]:
    """Put our loaders in the place of all others for which there is a GGUF.

    Args:
        workflow: as it is saved; it is changed.
        choose_for: for a class of ours, what finds the file that a name means.
    """
    done = _in_group_nodes(workflow, loader_of)
    for graph, node in _nodes(workflow):
        loader = loader_of(node["type"])
        if loader is None:
            continue
        values = _values_of(node, loader.widgets) | _values_outside(workflow, graph, node)
        choose = choose_for(loader.ours)
        report, chosen = choice_of(loader, values, choose, str(node["id"]), node["type"])
        done.append(report)
        if report.left:
            continue
        given = node.get("widgets_values") or []
        was = {
            "type": node["type"],
            "names": loader.widgets,
            "values": given if isinstance(given, list) else list(values.values()),
            **_pick(node.get("properties"), ORIGIN),
        }
        outside: dict[str, str] = {}

        def choose_outside(name: object, choose: Choose = choose, outside: dict[str, str] = outside) -> str | None:
            found = choose(name)
            if found is not None and found != name:
                outside.setdefault(found, str(name))
            return found

        _change(workflow, graph, node, loader.ours, loader.kept, list(chosen.values()), choose_outside)
        if outside:
            was["outside"] = outside
        kept = _omit(node.get("properties"), ORIGIN)
        node["properties"] = {**kept, "Node name for S&R": loader.ours, WAS: was}
    return done


def sign(workflow: Json, version: str) -> None:
    """Tell in nodes of ours where a recipient gets the pack, as the page does where it saves them."""
    for _, node in _nodes(workflow):
        if node["type"] in OURS:
            node["properties"] = {**(node.get("properties") or {}), "cnr_id": PACK, "ver": version}


def choice_of(loader: Loader, values: Json, choose: Choose, node: str, kind: str) -> tuple[Swapped, Json]:
    """What ours is set to in the place of a loader with these values, by name; nothing where it is to be left."""
    report = Swapped(node, kind)
    named = [name for name in loader.kept if is_file(loader.kept[name]) and not _is_none(values.get(name))]
    if not any(is_gguf(values[name]) or is_gguf(choose(values[name]) or "") for name in named):
        shown = ", ".join(values[name] for name in named)
        report.left = f"there is no GGUF with a name like {shown}" if named else "its file comes through a link"
        return report, {}
    chosen = {**OURS[loader.ours], **loader.set}
    for name, value in values.items():
        own = loader.kept.get(name)
        if name in named:
            found = choose(value)
            chosen[own or ""] = found or value
            report.files.append((value, found))
        elif own == "device":
            chosen[own] = "cpu" if value == "cpu" else "default"
        elif own is not None and not is_file(own):
            chosen[own] = value
        if _is_lost(name, own, value):
            report.lost.append(f"{name} {value}")
    return report, chosen


def use_theirs(workflow: Json, choose_for: Callable[[str], Choose]) -> list[Swapped]:
    """Put back what our loaders took the place of, or ComfyUI's own.

    Args:
        workflow: as it is saved; it is changed.
        choose_for: for a class of other loaders, what finds the file that a name means.
    """
    done = _in_group_nodes(workflow, OURS.get)
    for graph, node in _nodes(workflow):
        if node["type"] not in OURS:
            continue
        values = _values_of(node, list(OURS[node["type"]]))
        report = Swapped(str(node["id"]), node["type"])
        was = (node.get("properties") or {}).get(WAS) or {"type": stock_for(node["type"], values)}
        loader = loader_of(was["type"])
        if loader is None:
            raise ValueError(f"no loader is called {was['type']}")
        choose = choose_for(was["type"])
        theirs = list(was.get("values") or [])
        # of a node that was saved without its last widgets, none is made up
        for index, name in enumerate((was.get("names") or loader.widgets)[: len(theirs) or None]):
            own = loader.kept.get(name)
            known = index < len(theirs) and theirs[index] is not None
            if known and (own is None or is_file(own) or own == "device"):
                continue
            value = "default" if own is None else values.get(own)
            if own is not None and is_file(own):
                found = choose(value)
                report.files.append((str(value), found))
                value = found or value
            theirs[index : index + 1] = [value]
        kept = {own: name for name, own in loader.kept.items()}
        outside = was.get("outside") or {}

        def choose_outside(name: object, choose: Choose = choose, outside: Json = outside) -> str | None:
            return outside.get(str(name)) or choose(name)

        _change(workflow, graph, node, was["type"], kept, theirs, choose_outside)
        properties = {**_omit(node.get("properties"), (*ORIGIN, WAS)), **_pick(was, ORIGIN)}
        node["properties"] = {**properties, "Node name for S&R": was["type"]}
        done.append(report)
    return done


def stock_for(kind: str, values: Json) -> str:
    """The host's own loader for as many files."""
    files = sum(not _is_none(value) for name, value in values.items() if is_file(name))
    return STOCK[kind][min(max(files, 1), len(STOCK[kind])) - 1]


def _in_group_nodes(workflow: Json, is_wanted: Callable[[str], object]) -> list[Swapped]:
    """Group nodes with such nodes in them: left as they are, since what they hold is kept apart from the nodes."""
    groups = (workflow.get("extra") or {}).get("groupNodes") or {}
    done = []
    for _, node in _nodes(workflow):
        name = re.sub("^workflow[/>]", "", str(node["type"]))
        if name != node["type"] and any(is_wanted(inner["type"]) for inner in groups.get(name, {}).get("nodes") or []):
            left = f"choose Convert to nodes on the group node {name} first"
            done.append(Swapped(str(node["id"]), node["type"], left=left))
    return done


def _is_none(name: object) -> bool:
    return not isinstance(name, str) or name.lower() in ("", "none")


def _is_lost(name: str, own: str | None, value: object) -> bool:
    if name in MEANINGLESS or isinstance(value, list) or value in _WITHOUT_MEANING:
        return False
    return value != "cpu" if own == "device" else own is None


def _graphs(workflow: Json) -> list[Json]:
    """All graphs of a workflow: itself, and the definitions of its subgraphs."""
    return [workflow, *((workflow.get("definitions") or {}).get("subgraphs") or [])]


def _nodes(workflow: Json) -> Iterator[tuple[Json, Json]]:
    for graph in _graphs(workflow):
        for node in graph.get("nodes") or []:
            yield graph, node


def _values_of(node: Json, names: Sequence[str]) -> Json:
    given = node.get("widgets_values") or []
    return dict(given) if isinstance(given, dict) else {name: value for name, value in zip(names, given, strict=False)}


def _change(
    workflow: Json, graph: Json, node: Json, kind: str, kept: Mapping[str, str], values: list, choose: Choose
) -> None:
    """Make a node one of another class, with its inputs under the other's names and links of those only."""
    if node.get("title") == node["type"]:
        del node["title"]
    node |= {"type": kind, "widgets_values": values}
    inputs = node.get("inputs") or []
    files = _inputs_outside(
        graph, inputs, lambda slot: any(is_file(name) for name in (_name_of(slot), kept.get(_name_of(slot)))) or None
    )
    for slot in inputs:
        if _name_of(slot) not in kept:
            _unlink(workflow, graph, slot.get("link"))
    node["inputs"] = [_renamed(slot, kept[_name_of(slot)]) for slot in inputs if _name_of(slot) in kept]
    for index, slot in enumerate(node["inputs"]):
        _set_target(graph, slot.get("link"), index)
    _change_promoted(workflow, graph, node["id"], kept.get, choose, files)


def _name_of(slot: Json) -> str:
    return (slot.get("widget") or slot)["name"]


def _renamed(slot: Json, name: str) -> Json:
    widget = {"widget": {"name": name}} if slot.get("widget") else {}
    return {**_omit(slot, ("localized_name",)), "name": name, **widget}


def _change_promoted(
    workflow: Json, graph: Json, node_id: object, become: Callable[[str], str | None], choose: Choose, files: Json
) -> None:
    """Widgets that a subgraph's nodes show of a node in it: under new names, of files the nearest ones, others gone.

    Args:
        become: the new name of a widget of the node; None if it is gone.
        files: has those inputs of the subgraph that are files of the node.
    """
    for outer, node in _instances(workflow, graph):
        shown = _rows_of(node)
        after = []
        for entry, value in shown:
            of, name = str(entry[0]), entry[1]
            own = of == str(node_id)
            now = become(name) if own else name
            if now is None:
                continue
            a_file = is_file(name) or is_file(now) if own else of == _BY_INPUT and name in files
            if a_file and isinstance(value, str):
                value = choose(value) or value
            after.append(([entry[0], now, *entry[2:]] if own else entry, value))
        if shown:
            _show_rows(node, shown, after)
        for index, name in enumerate(_valued_inputs(node)):
            value = node["widgets_values"][index]
            if name in files and isinstance(value, str):
                node["widgets_values"][index] = choose(value) or value
        # a subgraph's node in another subgraph shows them further
        if outer is workflow:
            continue
        changed = {entry[1] for entry, _ in shown if str(entry[0]) == str(node_id)}
        changed -= {slot["name"] for slot in graph.get("inputs") or []}

        def further(name: str, changed: Set[str] = changed) -> str | None:
            return become(name) if name in changed else name

        beyond = _inputs_outside(outer, node.get("inputs") or [], lambda slot: files.get(slot["name"]))
        _change_promoted(workflow, outer, node["id"], further, choose, beyond)


def _inputs_outside(graph: Json, slots: Sequence[Json], tell: Callable[[Json], Any]) -> Json:
    """Of a subgraph's inputs those that slots of a node hang on: what `tell` says of the slot, by the input's name."""
    found = {}
    for slot in slots:
        link = _find_link(graph, slot.get("link"))
        if link is None or _of_link(link, "origin_id") != _INPUTS or tell(slot) is None:
            continue
        for source in (graph.get("inputs") or [])[_of_link(link, "origin_slot") :][:1]:
            found[source["name"]] = tell(slot)
    return found


_NOWHERE: Any = object()  # the value of a shown widget that is kept with the node within


def _rows_of(node: Json) -> list[tuple[list, Any]]:
    """The widgets that a subgraph's node shows, with their values where it has them; none if it shows none."""
    shown = (node.get("properties") or {}).get("proxyWidgets")
    if not isinstance(shown, list):
        return []
    # either all have a value here, or only those of the subgraph's inputs, the others having theirs within
    by_input = [index for index, entry in enumerate(shown) if str(entry[0]) == _BY_INPUT]
    given = node.get("widgets_values")
    size = len(given) if isinstance(given, list) else 0
    valued = next((places for places in (list(range(len(shown))), by_input) if places and len(places) == size), [])
    values = dict(zip(valued, given or [], strict=False))
    return [(entry, values.get(index, _NOWHERE)) for index, entry in enumerate(shown)]


def _show_rows(node: Json, before: Sequence[tuple[list, Any]], rows: Sequence[tuple[list, Any]]) -> None:
    node["properties"]["proxyWidgets"] = [entry for entry, _ in rows]
    if any(value is not _NOWHERE for _, value in before):
        node["widgets_values"] = [value for _, value in rows if value is not _NOWHERE]


def _valued_inputs(node: Json) -> list[str]:
    """The inputs of a subgraph's node whose values it has, in their order, as older front ends save them."""
    names = [slot["name"] for slot in node.get("inputs") or [] if slot.get("widget")]
    elsewhere = any(value is not _NOWHERE for _, value in _rows_of(node))
    given = node.get("widgets_values")
    return names if not elsewhere and isinstance(given, list) and len(given) == len(names) else []


def _values_outside(workflow: Json, graph: Json, node: Json) -> Json:
    """Values of a node's widgets that the node of its subgraph has, and not itself."""
    found: Json = {}

    def seek(within: Json, slots: Sequence[Json], tell: Callable[[Json], Any]) -> None:
        outside = _inputs_outside(within, slots, tell)
        for outer, instance in _instances(workflow, within) if outside else ():
            for entry, value in _rows_of(instance):
                if str(entry[0]) == _BY_INPUT and entry[1] in outside and value is not _NOWHERE:
                    found[outside[entry[1]]] = value
            for index, name in enumerate(_valued_inputs(instance)):
                if name in outside:
                    found[outside[name]] = instance["widgets_values"][index]
            seek(outer, instance.get("inputs") or [], lambda slot: outside.get(slot["name"]))

    seek(graph, node.get("inputs") or [], _name_of)
    return found


def _instances(workflow: Json, graph: Json) -> list[tuple[Json, Json]]:
    """The nodes that stand for a subgraph, each with the graph that it is in."""
    return [(outer, node) for outer, node in _nodes(workflow) if "id" in graph and node["type"] == graph["id"]]


_PLACES = ("id", "origin_id", "origin_slot", "target_id", "target_slot")


def _of_link(link: Any, name: str) -> Any:
    """A part of a link, which is a list in a workflow and an object in a subgraph."""
    return link[_PLACES.index(name)] if isinstance(link, list) else link[name]


def _set_in_link(link: Any, name: str, value: int) -> None:
    link[_PLACES.index(name) if isinstance(link, list) else name] = value


def _find_link(graph: Json, link_id: object) -> Any:
    found = (link for link in graph.get("links") or [] if link_id is not None and _of_link(link, "id") == link_id)
    return next(found, None)


def _set_target(graph: Json, link_id: object, slot: int) -> None:
    link = _find_link(graph, link_id)
    if link is not None:
        _set_in_link(link, "target_slot", slot)


def _unlink(workflow: Json, graph: Json, link_id: object) -> None:
    """Take a link out; an input of a subgraph that then leads nowhere goes with it."""
    link = _find_link(graph, link_id)
    if link is None:
        return
    graph["links"].remove(link)
    origin, slot = _of_link(link, "origin_id"), _of_link(link, "origin_slot")
    if origin != _INPUTS:
        node: Json = next((node for node in graph["nodes"] if node["id"] == origin), {})
        for output in (node.get("outputs") or [])[slot : slot + 1]:
            output["links"] = [other for other in output.get("links") or [] if other != link_id]
        return
    source = graph["inputs"][slot]
    source["linkIds"] = [other for other in source.get("linkIds") or [] if other != link_id]
    if not source["linkIds"]:
        _remove_input(workflow, graph, slot)


def _remove_input(workflow: Json, graph: Json, index: int) -> None:
    name = graph["inputs"].pop(index)["name"]
    for link in graph["links"]:
        slot = _of_link(link, "origin_slot")
        if _of_link(link, "origin_id") == _INPUTS and slot > index:
            _set_in_link(link, "origin_slot", slot - 1)
    for outer, node in _instances(workflow, graph):
        if name in _valued_inputs(node):
            del node["widgets_values"][_valued_inputs(node).index(name)]
        shown = _rows_of(node)
        left = [(entry, value) for entry, value in shown if (str(entry[0]), entry[1]) != (_BY_INPUT, name)]
        if len(left) < len(shown):
            _show_rows(node, shown, left)
        slot = next((slot for slot in node.get("inputs") or [] if slot["name"] == name), None)
        if slot is None:
            continue
        node["inputs"].remove(slot)
        _unlink(workflow, outer, slot.get("link"))
        for place, other in enumerate(node["inputs"]):
            _set_target(outer, other.get("link"), place)


def _pick(values: Json | None, names: Sequence[str]) -> Json:
    return {name: values[name] for name in names if values and name in values}


def _omit(values: Json | None, names: Sequence[str]) -> Json:
    return {name: value for name, value in (values or {}).items() if name not in names}
