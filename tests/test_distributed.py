"""ComfyUI-Distributed: two ComfyUI share the demo with LoRAs, and both pictures are what each gives alone."""

from __future__ import annotations

import json
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hosts import ROOT, comfyui_hosts
from PIL import Image
from test_company import PEERS, copy_pack

sys.path.append(str(Path(__file__).parent / "in_comfyui"))
from comfy_server import Server

pytestmark = pytest.mark.host

PACK = "ComfyUI-Distributed"
HOST = next(reversed(comfyui_hosts()), None)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """A master and a worker, whom the master knows as the first."""
    if HOST is None or not (PEERS / PACK / "__init__.py").is_file():
        pytest.skip(f"{PACK} is not in {PEERS}, or there is no ComfyUI: set COMFYUI_PEERS (CONTRIBUTING.md)")
    running: list[Server] = []
    for name in ("worker", "master"):
        base = tmp_path_factory.mktemp(name)
        folder = copy_pack(PACK, base)
        if running:
            worker = {
                "id": "0", "name": "worker", "host": "127.0.0.1", "port": running[0].port, "enabled": True,
                "type": "remote", "cuda_device": None, "extra_args": "",
            }  # fmt: skip
            (folder / "gpu_config.json").write_text(json.dumps({"workers": [worker]}))
        with HOST.starting():
            running.append(Server(base, HOST.python, HOST.folder))
    yield running[1], running[0]
    for server in running:
        server.stop()


def prompt(name: str, seed: int, shared: bool, style: str = "graft-demo-neon.safetensors") -> dict[str, Any]:
    rows = {"lora_1": style, "strength_1": 0.9, "lora_2": "graft-demo-linocut.safetensors", "strength_2": 0.5}
    nodes = {
        "load": ("GraftUNETLoader", {"unet_name": "graft-demo-Q8_0.gguf"}),
        "loras": ("GraftLoraStack", {"model": ["load", 0], **rows}),
        "positive": ("GraftDemoPrompt", {"text": "a red star and a blue ring on mint"}),
        "negative": ("GraftDemoPrompt", {"text": ""}),
        "latent": ("EmptyHunyuanLatentVideo", {"width": 128, "height": 128, "length": 1, "batch_size": 1}),
        "sample": (
            "KSampler",
            {
                "model": ["loras", 0], "positive": ["positive", 0], "negative": ["negative", 0],
                "latent_image": ["latent", 0], "seed": ["seed", 0] if shared else seed, "steps": 2, "cfg": 3.0,
                "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0,
            },
        ),
        "decode": ("GraftDemoDecode", {"samples": ["sample", 0]}),
        "save": ("SaveImage", {"images": ["collect" if shared else "decode", 0], "filename_prefix": name}),
    }  # fmt: skip
    if shared:
        nodes["seed"] = ("DistributedSeed", {"seed": seed})
        nodes["collect"] = ("DistributedCollector", {"images": ["decode", 0], "load_balance": False})
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def post(server: Server, path: str, body: dict) -> dict:
    address = f"http://127.0.0.1:{server.port}{path}"
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def pictures(server: Server, path: str, body: dict) -> list[bytes]:
    """What a prompt gives, pixel for pixel."""
    name = body["prompt"]["save"]["inputs"]["filename_prefix"]
    number = post(server, path, {"client_id": "test", **body})["prompt_id"]
    history: dict = {}
    while number not in history:
        time.sleep(0.1)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/history/{number}", timeout=120) as answer:
            history = json.load(answer)
    assert history[number]["status"]["status_str"] == "success", history[number]["status"]
    return [Image.open(file).tobytes() for file in sorted(server.output.glob(f"{name}_*.png"))]


def test_both_pictures_are_what_each_gives_alone(servers: tuple[Server, Server]) -> None:
    master, worker = servers
    seeds = ((master, 7), (worker, 8))
    alone = [pictures(server, "/prompt", {"prompt": prompt("alone", seed, False)}) for server, seed in seeds]
    shared = {"prompt": prompt("shared", 7, True), "enabled_worker_ids": ["0"]}
    together = pictures(master, "/distributed/queue", shared)
    assert together == [*alone[0], *alone[1]] and len(set(together)) == 2


def test_a_file_that_the_worker_lacks_is_told_before_anything_runs(servers: tuple[Server, Server]) -> None:
    """By the worker, so that the master does not wait for its picture."""
    master, _ = servers
    loras = master.output.parent / "models" / "loras"
    loras.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "demo" / "graft-demo-blueprint.safetensors", loras / "only here.safetensors")
    shared = prompt("lacking", 9, True, style="only here.safetensors")
    with pytest.raises(urllib.error.HTTPError) as refused:
        post(master, "/distributed/queue", {"prompt": shared, "enabled_worker_ids": ["0"], "client_id": "test"})
    said = refused.value.read().decode()
    assert "put the file into the loras folder" in said and "only here.safetensors (row 1)" in said
    assert not list(master.output.glob("lacking_*.png"))
