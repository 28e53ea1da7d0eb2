"""Other packs' LoRA nodes and model patchers on a Graft model give what they give on ComfyUI's own.

`tests/test_company.py` copies the packs into the custom_nodes of COMFYUI_BASE and runs this with them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.utils
import folder_paths
import nodes
import pytest
import torch
from architectures import ARCHITECTURES, flux_as_wide_as_its_file, flux_of, write_model
from generation import dense_model, distance, fingerprint, forget, sample
from loras import make_lora

PACKS = Path(os.environ["COMFYUI_BASE"]) / "custom_nodes"
FLUX = replace(ARCHITECTURES["flux"], build=partial(flux_of, 512), lora_layers=("double_blocks.0", "single_blocks.0"))
STYLE, OTHER = "style.safetensors", "other.safetensors"


class NoText:
    """A CLIP without layers, for nodes that insist on one."""

    def __init__(self) -> None:
        self.cond_stage_model = torch.nn.Module()
        self.patcher = SimpleNamespace(model=self.cond_stage_model)

    def clone(self) -> NoText:
        return self

    def add_patches(self, *args: Any) -> list:
        return []


async def _load(folder: Path) -> bool:
    return await nodes.load_custom_node(str(folder))


async def _with_server() -> dict[str, bool]:
    """Packs expect the server when they are loaded; it does not listen."""
    import execution
    import server

    instance = server.PromptServer(asyncio.get_running_loop())
    instance.prompt_queue = execution.PromptQueue(instance)
    await nodes.init_builtin_extra_nodes()
    return {folder.name: await _load(folder) for folder in sorted(PACKS.iterdir()) if folder.is_dir()}


@pytest.fixture(scope="module", autouse=True)
def packs() -> dict[str, bool]:
    """The packs that are there, and whether ComfyUI could load them."""
    return asyncio.run(_with_server())


@pytest.fixture(scope="module")
def models(packs, pack, folders) -> Iterator[tuple[Any, Any]]:
    """``(graft, dense)`` of one Flux file, and two LoRAs."""
    path = write_model(FLUX, "Q4_K", folders / "unet_gguf" / "flux.gguf")
    with flux_as_wide_as_its_file():
        graft = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
        dense = dense_model(pack, path)
    shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
    for seed, (name, dialect) in enumerate({STYLE: "native", OTHER: "kohya"}.items(), 1):
        lora = make_lora(dense.model, shapes, dialect, FLUX.lora_layers, rank=8 * seed, seed=seed)
        comfy.utils.save_torch_file(lora, str(folders / "loras" / name))
    folder_paths.filename_list_cache.clear()
    yield graft, dense
    forget()


def run(name: str, *given: Any, **inputs: Any) -> Any:
    """What a node returns, as the host calls it."""
    node = nodes.NODE_CLASS_MAPPINGS[name]()
    return getattr(node, node.FUNCTION)(*given, **inputs)


def _stacked(model: Any, stack: list) -> Any:
    return run("GraftLoraStack", model=model, lora_stack=stack)["result"][0]


def _ours(model: Any) -> list:
    """The LORA_STACK of our node."""
    rows = {"lora_1": STYLE, "strength_1": 0.7, "lora_2": OTHER, "strength_2": -0.3}
    return run("GraftLoraStack", model=model, **rows)["result"][1]


def _manager(model: Any) -> Any:
    """It looks names up in what its own server has scanned, and takes a path as it is."""
    named = [f"<lora:{folder_paths.get_full_path('loras', name)}:{strength}>" for name, strength, _ in ROWS]
    return run("LoRA Text Loader (LoraManager)", model, " ".join(named))[0]


BLOCKS = "1,0.3,0.6" + 9 * ",1"
ROWS = [(STYLE, 0.7, 0.7), (OTHER, -0.3, -0.3)]
Node = Callable[[Any], Any]

LOADERS: dict[tuple[str, str], Node] = {
    ("rgthree-comfy", "Power Lora Loader (rgthree)"): lambda model: run(
        "Power Lora Loader (rgthree)", model, None,
        **{f"lora_{i}": {"on": True, "lora": name, "strength": s} for i, (name, s, _) in enumerate(ROWS)},
        lora_9={"on": False, "lora": STYLE, "strength": 1.0},
    )[0],
    ("rgthree-comfy", "Lora Loader Stack (rgthree)"): lambda model: run(
        "Lora Loader Stack (rgthree)", model, None, STYLE, 0.7, OTHER, -0.3, "None", 1.0, "None", 1.0
    )[0],
    ("ComfyUI-KJNodes", "DiTBlockLoraLoader"): lambda model: run(
        "DiTBlockLoraLoader", model, 0.7, STYLE,
        blocks=run("FluxBlockLoraSelect", **{"double_blocks.0.": 3.0, "single_blocks.0.": 0.0})[0],
    )[0],
    ("ComfyUI-Lora-Manager", "LoRA Text Loader (LoraManager)"): _manager,
    ("efficiency-nodes-comfyui", "LoRA Stacker"): lambda model: _stacked(
        model,
        run(
            "LoRA Stacker", "advanced", 2, lora_name_1=STYLE, model_str_1=0.7, clip_str_1=0.1, lora_name_2=OTHER,
            model_str_2=-0.3, clip_str_2=0.0,
        )[0],
    ),
    ("ComfyUI-Easy-Use", "easy loraStack"): lambda model: _stacked(
        model,
        run(
            "easy loraStack", True, "simple", 2, lora_1_name=STYLE, lora_1_strength=0.7, lora_2_name=OTHER,
            lora_2_strength=-0.3,
        )[0],
    ),
    ("ComfyUI-Easy-Use", "easy loraStackApply"): lambda model: run("easy loraStackApply", _ours(model), model)[0],
    ("ComfyUI_Comfyroll_CustomNodes", "CR LoRA Stack"): lambda model: _stacked(
        model,
        run("CR LoRA Stack", STYLE, 0.7, 1.0, "On", OTHER, -0.3, 1.0, "On", STYLE, 9.0, 1.0, "Off")[0],
    ),
    ("ComfyUI_Comfyroll_CustomNodes", "CR Apply LoRA Stack"): lambda model: run(
        "CR Apply LoRA Stack", model, None, _ours(model)
    )[0],
    ("ComfyUI_Comfyroll_CustomNodes", "CR Load LoRA"): lambda model: run(
        "CR Load LoRA", model, None, "On", STYLE, 0.7, 0.7
    )[0],
    ("ComfyUI-Inspire-Pack", "LoraLoaderBlockWeight //Inspire"): lambda model: run(
        "LoraLoaderBlockWeight //Inspire", model, NoText(), STYLE, 0.9, 0.9, False, 0, 4.0, 1.0, "Preset", BLOCKS
    )[0],
    ("ComfyUI-Inspire-Pack", "ApplyLBW //Inspire"): lambda model: run(
        "ApplyLBW //Inspire", model, NoText(), 0.9, 0.9,
        run("MakeLBW //Inspire", model, NoText(), STYLE, False, 0, 4.0, 1.0, "Preset", BLOCKS)[0],
    )[0],
    ("ComfyUI_essentials", "FluxBlocksBuster+"): lambda model: run(
        "FluxBlocksBuster+", model, "## 0 = 1.3\n# 0 = 0.8"
    )[0],
}  # fmt: skip
"""By pack and node: a model with what the node puts on it."""


def there(packs: dict[str, bool], pack: str) -> None:
    if pack not in packs:
        pytest.skip(f"{pack} is not installed (COMFYUI_PEERS)")
    if not packs[pack]:
        pytest.skip(f"{pack} is installed, and this ComfyUI cannot load it: see its log above")


@pytest.mark.parametrize(("pack_name", "node"), LOADERS, ids=[node for _, node in LOADERS])
def test_a_node_gives_what_it_gives_on_a_plain_model(packs, models, pack_name, node):
    there(packs, pack_name)
    graft, dense = models
    before, base = fingerprint(graft), sample(graft, FLUX)
    plain = sample(dense, FLUX)
    assert distance(base, plain) < 1e-5
    apply = LOADERS[pack_name, node]
    got, want = sample(apply(graft), FLUX) - base, sample(apply(dense), FLUX) - plain
    assert distance(got, want) < 1e-4 and want.norm() / plain.norm() > 1e-3
    assert torch.equal(sample(graft, FLUX), base) and fingerprint(graft) == before


def test_all_loaders_of_the_same_rows_agree(packs, models):
    """With the stock node, too."""
    graft, _ = models
    want = graft
    for name, strength, _ in ROWS:
        want = nodes.LoraLoaderModelOnly().load_lora_model_only(want, name, strength)[0]
    expected = sample(want, FLUX)
    alike = {"Power Lora Loader (rgthree)", "LoRA Stacker", "easy loraStackApply", "CR Apply LoRA Stack"}
    found = [(pack, node) for pack, node in LOADERS if node in alike and packs.get(pack)]
    if not found:
        pytest.skip("none of these packs is installed (COMFYUI_PEERS)")
    for key in found:
        assert distance(sample(LOADERS[key](graft), FLUX), expected) < 1e-6, key


@pytest.mark.parametrize("ending", ["MultiGPU", "DisTorch2MultiGPU"])
def test_our_loader_under_the_wrappers_of_multigpu(packs, models, pack, ending):
    """Which take the first of what it returns; a LoRA on it is exact."""
    there(packs, "ComfyUI-MultiGPU")
    assert {"GraftUNETLoader" + ending, "GraftCLIPLoader" + ending} <= set(pack("nodes.multigpu").wrap())
    device = "device" if ending == "MultiGPU" else "compute_device"
    wrapped = nodes.NODE_CLASS_MAPPINGS["GraftUNETLoader" + ending]
    assert "cpu" in wrapped.INPUT_TYPES()["optional"][device][0]
    assert wrapped.RELATIVE_PYTHON_MODULE == nodes.NODE_CLASS_MAPPINGS["GraftUNETLoader"].RELATIVE_PYTHON_MODULE
    with flux_as_wide_as_its_file():
        result = run("GraftUNETLoader" + ending, unet_name="flux.gguf", compute_dtype="fp32", **{device: "cpu"})
    graft, _ = models
    assert "Flux" in result["ui"]["text"][0]
    assert torch.equal(sample(result[0], FLUX), sample(graft, FLUX))
    with_lora = nodes.LoraLoaderModelOnly().load_lora_model_only
    want = sample(with_lora(graft, STYLE, 0.7)[0], FLUX)
    assert torch.equal(sample(with_lora(result[0], STYLE, 0.7)[0], FLUX), want)


def _settings(node: Any) -> dict[str, Any] | None:
    """The defaults of a node that needs nothing but a model; None if it needs more, or gives something else."""
    inputs = node.INPUT_TYPES()
    if list(node.RETURN_TYPES)[:1] != ["MODEL"] or inputs.get("required", {}).get("model", ("",))[0] != "MODEL":
        return None
    found = {}
    for name, (kind, *options) in ((n, s) for n, s in inputs["required"].items() if n != "model"):
        settings = options[0] if options else {}
        listed = kind if isinstance(kind, list) else settings.get("options")
        if "default" not in settings and not listed:
            return None
        found[name] = settings["default"] if "default" in settings else listed[0]
    return found


def _patched(name: str, model: Any) -> Any:
    """What a node makes of a model, with a LoRA on it, in two steps with guidance."""
    model = nodes.LoraLoaderModelOnly().load_lora_model_only(model, STYLE, 0.7)[0]
    result = run(name, model=model, **(_settings(nodes.NODE_CLASS_MAPPINGS[name]) or {}))
    return sample(getattr(result, "args", result)[0], FLUX, steps=2, cfg=3.0)


# they compile, quantize or attend in ways of a GPU, measure, or are of another model
ELSEWHERE = ("Compile", "Sage", "Report", "Save", "Extract", "Train")


def test_model_patchers_do_what_they_do_on_a_plain_model(packs, models):
    """Every node of the host and of all packs that needs nothing but a model, with its defaults."""
    graft, dense = models
    compared, refused = {}, []
    for name, node in sorted(nodes.NODE_CLASS_MAPPINGS.items()):
        try:
            usable = _settings(node) is not None and not any(word in name for word in ELSEWHERE)
        except Exception:
            usable = False  # of a node that cannot be asked
        if not usable or name.startswith("Graft"):
            continue
        try:
            want = _patched(name, dense)
        except Exception as error:
            refused.append(f"{name}: {error}")
            continue
        compared[name] = distance(_patched(name, graft), want)
    print(f"compared: {', '.join(compared)}; not for a plain Flux: {'; '.join(refused)}")
    assert len(compared) >= 10
    assert {name: apart for name, apart in compared.items() if not apart < 1e-4} == {}
