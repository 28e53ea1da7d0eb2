"""Made-up workflows, of kinds that people have: what our loaders take the place of in them is in unusual places."""

from __future__ import annotations


def _slot(name: str, link: int | None) -> dict:
    return {"name": name, "type": "COMBO", "link": link, "widget": {"name": name}}


def _from_outside(link: int, slot: int, target: int, target_slot: int) -> dict:
    ends = {"origin_id": -10, "origin_slot": slot, "target_id": target, "target_slot": target_slot}
    return {"id": link, **ends, "type": "COMBO"}


_PLACE = {"flags": {}, "order": 0, "mode": 0}


def shown_by_inputs(file: str = "flux1-dev.safetensors") -> dict:
    """A loader two subgraphs deep. What runs is the file that is chosen outside, where some front ends keep it: a
    widget of a subgraph's input, under -1 in place of a node's id. The dtype is shown likewise; the loader itself has
    another file."""
    shown = [["-1", "unet_name"], ["-1", "weight_dtype"]]
    inner = {
        "id": "aaaaaaaa-0000-4000-8000-000000000001", "name": "inner",
        "inputs": [
            {"id": f"aaaaaaaa-0000-4000-8000-00000000001{n}", "name": name, "type": "COMBO", "linkIds": [5 + n]}
            for n, name in enumerate(("unet_name", "weight_dtype"))
        ],
        "outputs": [{"id": "aaaaaaaa-0000-4000-8000-000000000013", "name": "MODEL", "type": "MODEL", "linkIds": [7]}],
        "nodes": [
            {
                "id": 3, "type": "UNETLoader", "pos": [200, 100], "size": [270, 82], **_PLACE,
                "inputs": [_slot("unet_name", 5), _slot("weight_dtype", 6)],
                "outputs": [{"name": "MODEL", "type": "MODEL", "links": [7]}],
                "widgets_values": ["another.safetensors", "default"], "properties": {},
            }
        ],
        "links": [
            _from_outside(5, 0, 3, 0),
            _from_outside(6, 1, 3, 1),
            {"id": 7, "origin_id": 3, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "MODEL"},
        ],
    }  # fmt: skip
    outer = {
        "id": "aaaaaaaa-0000-4000-8000-000000000002", "name": "outer",
        "inputs": [
            {"id": f"aaaaaaaa-0000-4000-8000-00000000002{n}", "name": name, "type": "COMBO", "linkIds": [8 + n]}
            for n, name in enumerate(("unet_name", "weight_dtype"))
        ],
        "outputs": [{"id": "aaaaaaaa-0000-4000-8000-000000000023", "name": "MODEL", "type": "MODEL", "linkIds": [10]}],
        "nodes": [
            {
                "id": 4, "type": inner["id"], "pos": [200, 100], "size": [270, 82], **_PLACE,
                "inputs": [_slot("unet_name", 8), _slot("weight_dtype", 9)],
                "outputs": [{"name": "MODEL", "type": "MODEL", "links": [10]}],
                "widgets_values": ["stale.safetensors", "default"], "properties": {"proxyWidgets": [*shown]},
            }
        ],
        "links": [
            _from_outside(8, 0, 4, 0),
            _from_outside(9, 1, 4, 1),
            {"id": 10, "origin_id": 4, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "MODEL"},
        ],
    }  # fmt: skip
    for graph in (inner, outer):
        graph |= {
            "version": 1, "state": {"lastNodeId": 9, "lastLinkId": 20, "lastGroupId": 0, "lastRerouteId": 0},
            "inputNode": {"id": -10, "bounding": [0, 100, 120, 80]}, "widgets": [], "groups": [], "extra": {},
            "outputNode": {"id": -20, "bounding": [600, 100, 120, 60]},
        }  # fmt: skip
    nodes = [
        {
            "id": 1, "type": outer["id"], "pos": [100, 100], "size": [270, 82], **_PLACE,
            "inputs": [_slot("unet_name", None), _slot("weight_dtype", None)],
            "outputs": [{"name": "MODEL", "type": "MODEL", "links": []}],
            "widgets_values": [file, "fp8_e4m3fn"], "properties": {"proxyWidgets": [*shown]},
        }
    ]  # fmt: skip
    definitions = {"subgraphs": [outer, inner]}
    ids = {"id": "aaaaaaaa-0000-4000-8000-000000000000", "revision": 0, "last_node_id": 9, "last_link_id": 20}
    return {**ids, "nodes": nodes, "links": [], "groups": [], "definitions": definitions, "extra": {}, "version": 0.4}


def group_node() -> dict:
    """A group node, as older front ends made them, with two loaders in it; and a loader beside it."""
    loader = {
        "type": "UNETLoader", "pos": [0, 0], "size": [270, 82], **_PLACE, "inputs": [], "index": 0, "properties": {},
        "outputs": [{"name": "MODEL", "type": "MODEL", "links": []}],
        "widgets_values": ["flux1-dev.safetensors", "default"],
    }  # fmt: skip
    text = {
        "type": "DualCLIPLoader", "pos": [0, 120], "size": [270, 106], **_PLACE, "inputs": [], "index": 1,
        "outputs": [{"name": "CLIP", "type": "CLIP", "links": []}], "properties": {},
        "widgets_values": ["clip_l.safetensors", "t5xxl_fp16.safetensors", "flux", "default"],
    }  # fmt: skip
    group = {"nodes": [loader, text], "links": [], "external": [], "config": {}}
    nodes = [
        {
            "id": 1, "type": "workflow/Both", "pos": [100, 100], "size": [300, 200], **_PLACE, "inputs": [],
            "outputs": [{"name": name, "type": name, "links": []} for name in ("MODEL", "CLIP")], "properties": {},
            "widgets_values": [*loader["widgets_values"], *text["widgets_values"]],
        },
        {**{key: value for key, value in loader.items() if key != "index"}, "id": 2, "pos": [500, 100]},
    ]  # fmt: skip
    ids = {"last_node_id": 2, "last_link_id": 0, "version": 0.4, "config": {}}
    return {**ids, "nodes": nodes, "links": [], "groups": [], "extra": {"groupNodes": {"Both": group}}}
