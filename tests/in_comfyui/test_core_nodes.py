"""Nodes of ComfyUI's own that change a MODEL: on a Graft model they draw what they draw on ComfyUI's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

import nodes
import pytest
import torch
from generation import dense_model, distance, forget
from hosts import EVERYTHING
from sweep import lora_for, random_noise, sizes_of, with_lora, write_tiny
from tiny_models import MODELS

FAMILIES = ("WAN21_T2V", "SD15", "SD3", "Flux", "LTXV", "QwenImage") if EVERYTHING else ("WAN21_T2V",)
ELSEWHERE = ("ModelMerge", "TorchCompile", "Graft")
"""What the names of nodes begin with that have tests of their own."""
VALUES = {
    "strength": 0.5, "scale": 2.0, "downscale_factor": 2.0, "ratio": 0.5, "q": 0.9, "k": 0.8, "v": 1.1, "out": 0.9,
    "self_temporal": 0.5, "cross_temporal": 0.6, "layers": "0", "double_layers": "0", "single_layers": "0",
    "start_percent": 0.0, "end_percent": 1.0, "multiplier": 0.7, "eta": 0.5, "norm_threshold": 3.0, "momentum": 0.2,
    "scaling_factor": 1.1, "context_length": 2, "context_overlap": 1, "tile_size": 64, "swap_size": 1, "nag_scale": 3.0,
    "reuse_threshold": 10.0,
}  # fmt: skip
"""With which a node shows on a small model, where its defaults do not."""


@pytest.fixture(scope="module")
def changers() -> dict[str, type]:
    """Nodes that take one MODEL, and otherwise what a person types or chooses and a prompt, and give one."""
    with pytest.MonkeyPatch.context() as patch:  # other tests see those that they know
        for known in ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "LOADED_MODULE_DIRS"):
            patch.setattr(nodes, known, dict(getattr(nodes, known)))
        asyncio.run(nodes.init_builtin_extra_nodes())
        every = nodes.NODE_CLASS_MAPPINGS
    found = {}
    for name, node in every.items():
        kinds = [spec[0] for spec in node.INPUT_TYPES().get("required", {}).values()]
        known = all(is_typed(kind) or kind in ("MODEL", "CONDITIONING") for kind in kinds)
        if known and kinds.count("MODEL") == 1 and "MODEL" in node.RETURN_TYPES and not name.startswith(ELSEWHERE):
            found[name] = node
    return found


def is_typed(kind: Any) -> bool:
    return not isinstance(kind, str) or kind in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN")


def changed(node: type, model: Any, prompt: list) -> Any:
    """The model behind the node."""
    inputs, arguments = node.INPUT_TYPES(), {}
    required, optional = inputs["required"], inputs.get("optional", {})
    for name, (kind, *more) in {**required, **{n: s for n, s in optional.items() if is_typed(s[0])}}.items():
        options = more[0] if more else {}
        if kind in ("MODEL", "CONDITIONING"):
            arguments[name] = model if kind == "MODEL" else prompt
        elif name in VALUES and kind in ("INT", "FLOAT", "STRING"):
            arguments[name] = VALUES[name]
        else:
            choices = kind if isinstance(kind, (list, tuple)) else options.get("options", [None])
            arguments[name] = options.get("default", choices[0])
    owner = node if hasattr(node, "EXECUTE_NORMALIZED") else node()  # nodes of the newer kind are classes
    given = getattr(owner, node.FUNCTION)(**arguments)
    return given[node.RETURN_TYPES.index("MODEL")]


def outcome(make: Callable[[], torch.Tensor]) -> torch.Tensor | str:
    """What it gives, or the error that it raises: many nodes are made for other models."""
    try:
        return make()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_pictures_are_those_on_the_hosts_own_model(pack, folders, changers, family):
    """Each node between two LoRAs, one that is on the model already and one that is put on behind it."""
    tiny, path = MODELS[family], folders / "unet_gguf" / f"core-{family}.gguf"
    with sizes_of(tiny) as module:
        write_tiny(tiny, module, "weights", path)
        graft = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
        dense = dense_model(pack, path)
    before, behind = (lora_for(graft, dense, seed=seed) for seed in (5, 6))
    noise = partial(random_noise, torch.Generator().manual_seed(1))
    prompts = [[[noise(1, *tiny.context), tiny.brings(noise)]] for _ in range(3)]

    def picture(model: Any, change: Callable[[Any], Any]) -> torch.Tensor:
        model, latent = with_lora(change(with_lora(model, before)), behind), {"samples": torch.zeros(tiny.latent)}
        return nodes.common_ksampler(model, 3, 3, 4.0, "euler", "simple", *prompts[:2], latent)[0]["samples"]

    plain, without = picture(graft, same), picture(dense, same)
    assert distance(plain, without) < 1e-4
    shown, wrong = [], {}
    for name, node in changers.items():
        change = partial(changed, node, prompt=prompts[2])
        want, got = (outcome(partial(picture, model, change)) for model in (dense, graft))
        if isinstance(want, str) or isinstance(got, str):
            if want != got:
                wrong[name] = want, got
            continue
        if distance(want, without) > 1e-3:
            shown.append(name)
        if distance(got, want) > 1e-4:
            wrong[name] = distance(got, want)
    assert not wrong
    assert len(shown) >= 15, shown
    assert torch.equal(picture(graft, same), plain)
    forget()


def same(model: Any) -> Any:
    return model
