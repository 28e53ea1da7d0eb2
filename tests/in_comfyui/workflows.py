"""From a workflow as people save it (UI format) to what the server runs (API format)."""

from __future__ import annotations

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def to_api(workflow: dict, object_info: dict) -> dict:
    """The prompt of a UI-format workflow: widget values are matched to inputs by their order, as the front end does.

    One that was saved before a widget was added lacks its value: the node's default counts.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"].endswith("Note"):
            continue
        info = object_info[node["type"]]
        declared = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        values = iter(node["widgets_values"])
        inputs = {}
        for name, (kind, *options) in declared.items():
            if not isinstance(kind, list) and kind not in WIDGETS:
                continue
            if (value := next(values, None)) is None:
                break
            inputs[name] = value
            if options and options[0].get("control_after_generate"):
                next(values)
        assert next(values, None) is None, f"{node['type']} has more widget values than inputs"
        for slot in node["inputs"]:
            assert slot["name"] in declared, f"{node['type']} has no input {slot['name']}"
            if slot["link"] is not None:
                inputs[slot["name"]] = sources[slot["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
