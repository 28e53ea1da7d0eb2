"""Workflows and prompts with loaders in them, into which ours are put, and out of which they are taken again."""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

from graft.kernels import GraftError
from graft.ops import workflows

from .bounds import bounded, sentence, written
from .choices import NUMBERS, TEXTS, Choices, damaged

SUFFIX = ".json"
_LOADERS = (
    "UNETLoader", "UnetLoaderGGUF", "CLIPLoader", "DualCLIPLoaderGGUF", "LoaderGGUF", "GraftUNETLoader",
    "GraftCLIPLoader", "UnetLoaderGGUFDisTorch2MultiGPU", "KSampler", "workflow/group",
)  # fmt: skip
_FILES = ("flux1-dev-Q4_K_M.gguf", "Flux\\\\flux1-dev.safetensors", "t5xxl.safetensors", "None", "default", "flux")
_THERE = ["flux/flux1-dev-Q8_0.gguf", "t5xxl-Q5_K_M.gguf", "t5xxl.safetensors", "clip_l.safetensors"]


def make(choices: Choices) -> bytes:
    data = prompt(choices) if choices.once_in(2) else workflow(choices)
    return damaged(choices, json.dumps(data).encode())


def anything(choices: Choices) -> Any:
    """What stands where something else should."""
    return choices.pick((None, True, -1, [], {}, [[]], {"a": 1}, 0.5, [1, 2, 3], *NUMBERS, *TEXTS, "x_" * 30_000))


def value(choices: Choices, sound: Any) -> Any:
    return anything(choices) if choices.odd() else sound


def slots(choices: Choices, names: tuple[str, ...], link: str) -> list[Any]:
    return [
        value(choices, {"name": value(choices, name), "type": "MODEL", link: value(choices, None if i else 1)})
        for i, name in enumerate(names[: choices.below(len(names) + 1)])
    ]


def node(choices: Choices, number: int) -> Any:
    widgets: Any = [choices.pick(_FILES) for _ in range(choices.below(4))]
    if choices.once_in(4):
        widgets = {f"clip_name{n}": name for n, name in enumerate(widgets)}
    made = {
        "id": value(choices, number), "type": value(choices, choices.pick((*_LOADERS, f"graph-{choices.below(3)}"))),
        "inputs": value(choices, slots(choices, ("unet_name", "clip_name1", "device"), "link")),
        "outputs": value(choices, slots(choices, ("MODEL", "CLIP"), "links")),
        "widgets_values": value(choices, widgets),
        "properties": value(choices, {"proxyWidgets": value(choices, [["1", "unet_name"], ["-1", "unet_name"]])}),
    }  # fmt: skip
    for key in tuple(made):
        if choices.odd():
            del made[key]
    return value(choices, made)


def graph(choices: Choices) -> dict[str, Any]:
    links: list[Any] = [[n, 1, 0, 2, n % 3, "MODEL"] for n in range(3)]
    if choices.once_in(2):
        links = [{"id": n, "origin_id": -10, "origin_slot": n, "target_id": 1, "target_slot": 0} for n in range(3)]
    return {
        "nodes": value(choices, [node(choices, n) for n in range(1 + choices.below(4))]),
        "links": value(choices, [value(choices, link) for link in links]),
        "inputs": value(choices, slots(choices, ("unet_name",), "linkIds")),
    }


def workflow(choices: Choices) -> Any:
    inner = [value(choices, {"id": f"graph-{n}", **graph(choices)}) for n in range(choices.below(3))]
    groups = {"group": value(choices, {"nodes": [node(choices, 0)]})}
    return {
        **graph(choices), "definitions": value(choices, {"subgraphs": value(choices, inner)}),
        "extra": value(choices, {"groupNodes": value(choices, groups)}),
    }  # fmt: skip


def prompt(choices: Choices) -> Any:
    nodes = {}
    for number in range(1 + choices.below(4)):
        inputs = {name: value(choices, choices.pick(_FILES)) for name in ("unet_name", "clip_name1", "clip_name2")}
        made = {"class_type": value(choices, choices.pick(_LOADERS)), "inputs": value(choices, inputs)}
        was = {"class_type": value(choices, "UNETLoader"), "inputs": value(choices, {"unet_name": "a"})}
        nodes[str(number)] = value(choices, {**made, "_meta": value(choices, {"graft_was": value(choices, was)})})
    return {"prompt": nodes} if choices.once_in(3) else nodes


def check(data: bytes) -> None:
    path = written(data, SUFFIX)
    with bounded(len(data)):
        try:
            found = workflows.read_workflow(path)
            for back in (False, True):
                turned = copy.deepcopy(found)
                done = workflows.swapped(turned, lambda kind: lambda name: workflows.nearest(name, _THERE), "1", back)
                assert all(isinstance(line, str) for swapped in done for line in swapped.lines)
                json.dumps(turned)
                with contextlib.suppress(GraftError):  # what one way leaves may be no workflow for the other
                    workflows.swapped(turned, lambda kind: lambda name: None, "1", not back)
        except GraftError as error:
            sentence(error)
