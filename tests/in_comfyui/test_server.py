"""The whole of it through ComfyUI's HTTP API: a server process, workflows in API format, latents in files."""

from __future__ import annotations

import json

import comfy.utils
import pytest
import torch
from architectures import write_model
from comfy_server import Server
from generation import distance, sample, with_lora
from graft.ops.files.imatrix import read_imatrix
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


def test_a_calibration_counts_what_its_graph_samples(server):
    """With one sampler of two changed, the host runs that one alone; both count, each once."""

    def importance(seed: int):
        graph = workflow("calibrated")
        graph["watch"] = {"class_type": "GraftCalibrate", "inputs": {"model": ["load", 0]}}
        graph["sample"]["inputs"]["model"] = ["watch", 0]
        graph["again"] = {**graph["sample"], "inputs": {**graph["sample"]["inputs"], "seed": seed}}
        links = {"model": ["watch", 0], "samples": ["sample", 0], "samples_2": ["again", 0]}
        graph["collect"] = {"class_type": "GraftImportance", "inputs": links}
        inputs = {"importance": ["collect", 0], "filename_prefix": f"imatrix/seed{seed}"}
        graph["write"] = {"class_type": "GraftSaveImatrix", "inputs": inputs}
        outputs = server.run(graph)["outputs"]
        assert outputs["collect"]["text"][0].endswith("ComfyUI, 2 sampler runs"), outputs
        (path,) = (server.output / "imatrix").glob(f"seed{seed}_*.gguf")
        return read_imatrix(path)

    name = "joint_blocks.0.x_block.attn.qkv.weight"
    first, second, third = importance(5), importance(6), importance(3)
    assert first.rows(name) == second.rows(name) == third.rows(name) > 0
    assert not torch.equal(first[name], second[name])
    # the first sampler has seed 3, too
    assert first.calls == third.calls == 2 and not torch.equal(first[name], third[name])


def test_prompts_for_comfyui_gguf_run_without_it(server):
    """As scripts send them, without titles, and on every host; it says what is wrong with others."""
    old = workflow("old")
    old["load"] = {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": "sd3.gguf"}}
    assert server.run(old)["status"]["status_str"] == "success"
    assert len(list(server.output.glob("old_*.latent"))) == 1
    for name in ("SD3.gguf", "Models\\sd3.gguf"):  # in other folders, on Windows
        moved = workflow("moved")
        moved["load"] = {"class_type": "UnetLoaderGGUF", "inputs": {"unet_name": name}}
        status = server.run(moved)
        assert status["status"]["status_str"] == "success"
        assert status["outputs"]["load"]["text"][0].endswith(f"\nsd3.gguf is here for {name}")
    old["load"]["inputs"] = {"unet_name": "gone.gguf"}
    assert "gone.gguf is not there" in server.refused(old)["GraftUNETLoader"]
    old["load"]["inputs"] = {"unet_name": "SD3-Q8_0.gguf"}
    assert "SD3-Q8_0.gguf is not there, there is sd3.gguf: choose that" in server.refused(old)["GraftUNETLoader"]
    old["load"]["inputs"] = {}
    assert server.refused(old) == {"GraftUNETLoader": "unet_name"}
    old |= {
        "load": workflow("old")["load"],
        "words": {"class_type": "CLIPLoaderGGUF", "inputs": {}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["words", 0], "text": ""}},
    }
    assert "type" in server.refused(old)["GraftCLIPLoader"]


def test_rows_of_any_number_by_the_api(server):
    """Behind the eighth in a text; where and when of such a row comes through a link like that of others."""
    want = latent_of(server, "eight", graft_lora=0.8)

    def latent(name: str, **when) -> torch.Tensor:
        graph = workflow(name, graft_lora=0.0)
        rows = json.dumps([{"lora": "style.safetensors", "strength": 1.0}, {"lora": "style.safetensors"}])
        graph["when"] = {"class_type": "GraftStrength", "inputs": when}
        links = {"model": ["load", 0], "when_9": ["when", 0], "when_10": ["when", 0]}
        graph["stack"] = {"class_type": "GraftLoraStack", "inputs": {**links, "more_rows": rows}}
        graph["sample"]["inputs"]["model"] = ["stack", 0]
        history = server.run(graph)
        assert history["status"]["status_str"] == "success", history["status"]
        (file,) = server.output.glob(f"{name}_*.latent")
        return load_file(file)["latent_tensor"]

    assert distance(latent("nine", blocks="* = 0.4"), want) < 1e-4, "0.4 of one LoRA twice are 0.8 of it"
    assert torch.equal(latent("never", blocks="* = 0"), latent_of(server, "plain"))


def test_what_a_lora_file_says_of_itself(server):
    """And nothing of files that the node does not list."""
    folder = server.output.parent / "models" / "loras"
    told = {"modelspec.trigger_phrase": "ohwx, soft", "ss_base_model_version": "sd3", "ss_training_comment": "<b>\n2"}
    told["ss_tag_frequency"] = json.dumps({"a": {"cat": 3, "dog": 1}, "b": {"dog": 4}})
    lora = {f"lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_{n}.weight": torch.ones(4, 4) for n in ("up", "down")}
    comfy.utils.save_torch_file(lora, str(folder / "told.safetensors"), told)
    picture = b"\x89PNG\r\n\x1a\nno more of it"
    (folder / "told.preview.png").write_bytes(picture)
    (folder / "secret.txt").write_text("secret")
    status, _, info = server.fetch("/graft/lora?name=told.safetensors")
    assert status == 200 and json.loads(info) == {
        "words": ["ohwx", "soft"], "picture": True,
        "notes": [
            ["kind", "rank 4"], ["trained for", "SD3"], ["names", "kohya"], ["base model", "sd3"],
            ["trainer's comment", "<b> 2"], ["words in captions", "dog (5), cat (3)"],
        ],
    }  # fmt: skip
    status, headers, body = server.fetch("/graft/lora/picture?name=told.safetensors")
    assert (status, body, headers["Content-Type"]) == (200, picture, "image/png")
    assert server.fetch("/graft/lora/picture?name=style.safetensors")[0] == 404
    (folder / "broken.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "Git LFS pointer" in json.loads(server.fetch("/graft/lora?name=broken.safetensors")[2])["problem"]
    outside = ["secret.txt", "../loras/told.safetensors", "..%2F..%2Fdiffusion_models%2Fsd3.gguf", "None", ""]
    outside += ["%2Fetc%2Fpasswd", "Told.safetensors", "told.preview.png", "told.safetensors%00"]
    outside += [str(folder / "told.safetensors")]
    for name in outside:
        for path in ("/graft/lora", "/graft/lora/picture", "/api/graft/lora"):
            status, _, body = server.fetch(f"{path}?name={name}")
            assert (status, body) == (404, b""), name


def test_all_that_is_missing_is_told_before_anything_runs(server):
    """Each node once with all its files and their folder; nothing of Python's where nobody has a file yet."""
    lacking = workflow("lacking", graft_lora=1.0)
    lacking["load"]["inputs"] = {"unet_name": "a/gone.gguf", "module_name": "module.gguf"}
    lacking["vae"] = {"class_type": "GraftVAELoader", "inputs": {"vae_name": "gone.gguf"}}
    lacking["decode"] = {"class_type": "VAEDecode", "inputs": {"vae": ["vae", 0], "samples": ["sample", 0]}}
    lacking["preview"] = {"class_type": "PreviewImage", "inputs": {"images": ["decode", 0]}}
    lacking["stack"]["inputs"] |= {"lora_2": "gone1.safetensors", "lora_3": "gone2.safetensors", "lora_4": "gone3.st"}
    lacking["stack"]["inputs"] |= {"enabled_4": False, "lora_5": "STYLE.safetensors"}
    files = {"clip_name1": "gone l.safetensors", "clip_name2": "gone t5.gguf", "type": "flux"}
    lacking["words"] = {"class_type": "GraftCLIPLoader", "inputs": files}
    lacking["negative"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["words", 0], "text": ""}}
    assert server.refused(lacking) == {
        "GraftUNETLoader": "; ".join(
            f"{name} is not there: put it into the diffusion_models folder, or choose another file"
            for name in ("a/gone.gguf", "module.gguf")
        ),
        "GraftVAELoader": "vae_name - gone.gguf is not there: put it into the vae folder, or choose another file",
        "GraftLoraStack": "put these files into the loras folder, choose another one, or switch the row off: "
        "gone1.safetensors (row 2), gone2.safetensors (row 3)",
        "GraftCLIPLoader": "; ".join(
            f"{name} is not there: put it into the text_encoders folder, or choose another file"
            for name in ("gone l.safetensors", "gone t5.gguf")
        ),
    }
    lacking["load"]["inputs"], lacking["words"]["inputs"] = {}, {"type": "flux"}
    lacking["positive"] = {"class_type": "GraftDemoPrompt", "inputs": {}}
    del lacking["stack"], lacking["preview"], lacking["sample"]["inputs"]["latent_image"]
    lacking["sample"]["inputs"]["model"] = ["load", 0]
    refused = server.refused(lacking)
    assert {kind: refused[kind] for kind in ("GraftUNETLoader", "GraftCLIPLoader", "GraftDemoPrompt")} == {
        "GraftUNETLoader": "unet_name", "GraftCLIPLoader": "clip_name1", "GraftDemoPrompt": "text",
    }  # fmt: skip
