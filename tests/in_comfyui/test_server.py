"""The whole of it through ComfyUI's HTTP API: a server process, workflows in API format, latents in files."""

from __future__ import annotations

import comfy.utils
import pytest
import torch
from architectures import write_model
from comfy_server import Server
from generation import distance, sample, with_lora
from safetensors.torch import load_file
from small import SD3, loras, sd3  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def server(tmp_path_factory, loras):  # noqa: F811
    base = tmp_path_factory.mktemp("comfy")
    for folder in ("diffusion_models", "loras"):
        (base / "models" / folder).mkdir(parents=True)
    write_model(SD3, "Q4_K", base / "models" / "diffusion_models" / "sd3.gguf")
    (base / "models" / "diffusion_models" / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    comfy.utils.save_torch_file(loras[0], str(base / "models" / "loras" / "style.safetensors"))
    running = Server(base)
    yield running
    running.stop()


def workflow(name: str, graft_lora: float = 0.0, stock_lora: float = 0.0) -> dict:
    """Load, graft with our node and the stock one, sample, save the latent as `name`."""
    nodes: dict = {
        "load": ("GraftUNETLoader", {"unet_name": "sd3.gguf", "compute_dtype": "fp32"}),
        "positive": ("TestConditioning", {"architecture": "sd3", "seed": 1}),
        "negative": ("TestConditioning", {"architecture": "sd3", "seed": 2}),
    }
    model = "load"
    if graft_lora:
        row = {"enabled_1": True, "lora_1": "style.safetensors", "strength_1": graft_lora}
        nodes["stack"] = ("GraftLoraStack", {"model": [model, 0], **row})
        model = "stack"
    if stock_lora:
        file = {"lora_name": "style.safetensors", "strength_model": stock_lora}
        nodes["stock"] = ("LoraLoaderModelOnly", {"model": [model, 0], **file})
        model = "stock"
    settings = {"seed": 3, "steps": 1, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    links = {"model": [model, 0], "positive": ["positive", 0], "negative": ["negative", 0]}
    nodes["sample"] = ("KSampler", {**settings, **links, "latent_image": ["positive", 1]})
    nodes["save"] = ("SaveLatent", {"samples": ["sample", 0], "filename_prefix": name})
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def latent_of(server: Server, name: str, **loras_on: float) -> torch.Tensor:
    history = server.run(workflow(name, **loras_on))
    assert history["status"]["status_str"] == "success", history["status"]
    (file,) = server.output.glob(f"{name}_*.latent")
    return load_file(file)["latent_tensor"]


def test_the_nodes_are_there(server):
    info = server.get("/object_info")
    assert info["GraftUNETLoader"]["display_name"] == "Load Diffusion Model (GGUF, Graft)"
    assert "sd3.gguf" in info["GraftUNETLoader"]["input"]["required"]["unet_name"][0]
    assert info["GraftLoraStack"]["output"] == ["MODEL", "LORA_STACK", "STRING", "STRING", "CLIP"]


def test_the_server_samples_what_the_functions_sample(server, sd3, loras):  # noqa: F811
    graft, _ = sd3
    base = latent_of(server, "base")
    assert distance(base, sample(graft, SD3)) < 1e-6
    stack = latent_of(server, "stack", graft_lora=0.8)
    assert distance(stack, sample(with_lora(graft, loras[0], 0.8), SD3)) < 1e-6
    assert torch.equal(latent_of(server, "stock", stock_lora=0.8), stack)
    both = latent_of(server, "both", graft_lora=0.5, stock_lora=0.3)
    assert distance(both - base, stack - base) < 1e-4, "0.5 and 0.3 of one LoRA are 0.8 of it"


def test_reports_reach_the_history(server):
    fresh = workflow("report", graft_lora=0.7)
    fresh["load"]["inputs"]["backend"] = "torch"  # not the loader's cached output of another test
    outputs = server.run(fresh)["outputs"]
    assert "Q4_K" in outputs["load"]["text"][0] and "torch (as chosen)" in outputs["load"]["text"][0]
    assert outputs["stack"]["text"][0].startswith("style.safetensors ×0.70: ")


def test_a_bad_file_is_named_in_the_error(server):
    bad = workflow("bad")
    bad["load"]["inputs"]["unet_name"] = "pointer.gguf"
    status = server.run(bad)["status"]
    assert status["status_str"] == "error"
    (error,) = (data for kind, data in status["messages"] if kind == "execution_error")
    assert "Git LFS pointer" in error["exception_message"] and error["node_id"] == "load"
