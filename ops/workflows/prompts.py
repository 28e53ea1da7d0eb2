"""Our loaders in the place of others, and back, in a prompt: a workflow in API format, as scripts send it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from .swap import Choose, Json, Swapped, choice_of, stock_for
from .table import OURS, WAS, Loader, is_file, loader_of


def prompt_of(data: Any) -> Json | None:
    """The prompt in what a file or a request holds, alone or under ``prompt``; None if there is none."""
    for found in (data, data.get("prompt") if isinstance(data, dict) else None):
        if isinstance(found, dict) and any(_is_node(node) for node in found.values()):
            return found
    return None


def use_ours_in_prompt(prompt: Json, choose_for: Callable[[str], Choose]) -> list[Swapped]:
    """As `use_ours`, for a prompt."""
    done = []
    for name, node in _nodes(prompt):
        kind, old = node["class_type"], node.get("inputs") or {}
        loader = loader_of(kind)
        if loader is None:
            continue
        report, chosen = choice_of(loader, old, choose_for(loader.ours), name, kind)
        done.append(report)
        if not report.left:
            meta = {**(node.get("_meta") or {}), WAS: {"class_type": kind, "inputs": old}}
            node |= {"class_type": loader.ours, "inputs": chosen | links_of(loader, old), "_meta": meta}
    return done


def use_theirs_in_prompt(prompt: Json, choose_for: Callable[[str], Choose]) -> list[Swapped]:
    """As `use_theirs`, for a prompt."""
    done = []
    for name, node in _nodes(prompt):
        if node["class_type"] not in OURS:
            continue
        values, meta = node.get("inputs") or {}, node.get("_meta") or {}
        report = Swapped(name, node["class_type"])
        was = meta.pop(WAS, None) or {"class_type": stock_for(node["class_type"], values), "inputs": {}}
        loader = loader_of(was["class_type"])
        if loader is None:
            raise ValueError(f"no loader is called {was['class_type']}")
        choose = choose_for(was["class_type"])
        inputs, known = dict(was["inputs"]), bool(was["inputs"])
        for theirs in loader.widgets:
            own = loader.kept.get(theirs)
            if known and (theirs not in inputs or own is None or is_file(own) or own == "device"):
                continue
            value = values.get(own or "", "default")
            if is_file(own):
                found = choose(value)
                report.files.append((str(value), found))
                value = found or value
            inputs[theirs] = value
        node |= {"class_type": was["class_type"], "inputs": inputs}
        if not meta:
            node.pop("_meta", None)
        done.append(report)
    return done


def links_of(loader: Loader, inputs: Json) -> Json:
    """What comes to a loader through links, under the names of ours."""
    return {own: inputs[name] for name, own in loader.kept.items() if isinstance(inputs.get(name), list)}


def _is_node(node: Any) -> bool:
    return isinstance(node, dict) and "class_type" in node


def _nodes(prompt: Json) -> Iterator[tuple[str, Json]]:
    return ((str(name), node) for name, node in prompt.items() if _is_node(node))
