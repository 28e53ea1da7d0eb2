"""The loader for Raylight with two workers on the CPU, in place of its own, which want CUDA and NCCL."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import nodes
import pytest
from generation import distance, sample, with_lora
from small import SD3, loras, sd3  # noqa: F401  (fixtures)

ray = pytest.importorskip("ray", reason="Ray is not installed into this ComfyUI's Python")
HERE = Path(__file__).resolve().parent
WORKERS = 2


@pytest.fixture(scope="module")
def actors(tmp_path_factory) -> Iterator[list[Any]]:
    sys.path.append(str(HERE))
    import ray_worker

    places = [str(HERE), str(HERE.parent), str(HERE.parent.parent), os.environ["COMFYUI_PATH"]]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1"}
    ray.init(
        num_cpus=WORKERS, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": environment},
        _temp_dir=str(tmp_path_factory.mktemp("ray")),
    )  # fmt: skip
    remote = ray.remote(ray_worker.CPUWorker)
    yield [remote.remote(rank, WORKERS, port, os.environ["COMFYUI_PATH"]) for rank in range(WORKERS)]
    ray.shutdown()


@pytest.fixture
def loader(pack, monkeypatch) -> Any:
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "RayUNETLoader", object)
    assert pack("nodes.raylight").add()
    monkeypatch.delitem(nodes.NODE_CLASS_MAPPINGS, "GraftRayLoader")
    return pack("nodes.raylight").GraftRayLoader()


def test_the_node_is_there_only_with_raylight(pack):
    assert not pack("nodes.raylight").add() and "GraftRayLoader" not in nodes.NODE_CLASS_MAPPINGS


def test_each_worker_has_the_model_with_its_loras(actors, loader, sd3, loras, folders):  # noqa: F811
    graft, _ = sd3
    for number, lora in enumerate(loras):
        comfy.utils.save_torch_file(lora, str(folders / "loras" / f"lora{number}.safetensors"))
    folder_paths.filename_list_cache.clear()
    init = {"workers": actors}, None
    first = {"path": str(folders / "loras" / "lora0.safetensors"), "strength_model": 0.7}
    rows = [("lora1.safetensors", -0.4, 1.0), ("None", 1.0, 1.0), ("lora0.safetensors", 0.0, 1.0)]
    (loaded,) = loader.load(init, "sd3-Q4_K.gguf", compute_dtype="fp32", lora=[first], lora_stack=rows)
    assert loaded["workers"] == actors
    assert ray.get([actor.state.remote() for actor in actors]) == [(True, ["cfg"], None)] * WORKERS
    want = sample(with_lora(with_lora(graft, loras[0], 0.7), loras[1], -0.4), SD3)
    for latent, apart in ray.get([actor.sample.remote() for actor in actors]):
        assert apart == 0.0 and distance(latent, want) < 1e-6
    assert distance(sample(graft, SD3), want) > 1e-3


def test_what_does_not_work_is_said(actors, loader, sd3, folders):  # noqa: F811
    init = {"workers": actors}, None
    (folders / "unet_gguf" / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    folder_paths.filename_list_cache.clear()
    with pytest.raises(Exception, match="Git LFS pointer"):
        loader.load(init, "pointer.gguf")
    before = ray.get(actors[0].get_parallel_dict.remote())
    ray.get(actors[0].set_parallel_dict.remote({**before, "is_fsdp": True}))
    with pytest.raises(Exception, match="switch FSDP off in Raylight's initializer"):
        loader.load(init, "sd3-Q4_K.gguf")
    ray.get(actors[0].set_parallel_dict.remote(before))
