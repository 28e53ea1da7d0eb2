"""Files that change between loading and running, and names that lead elsewhere, inside ComfyUI."""

from __future__ import annotations

import os
import shutil

import comfy.sd
import folder_paths
import nodes
import pytest
import torch
from architectures import write_model
from generation import forget, sample, with_lora
from safetensors.torch import save_file
from small import SD3, loras, sd3  # noqa: F401  (fixtures)


@pytest.fixture
def model(pack, folders):
    """``(path, a Graft model of it)``, and no other model loaded."""
    path = write_model(SD3, "Q8_0", folders / "unet_gguf" / "faults.gguf")
    os.utime(path, (1_700_000_000, 1_700_000_000))  # clocks of file systems are coarse
    yield path, pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
    forget()
    path.unlink(missing_ok=True)


def test_a_model_that_is_written_to_does_not_run(pack, model, loras, sd3):  # noqa: F811
    path, graft = model
    branch = with_lora(graft, loras[0])
    wanted = sample(branch, SD3)
    forget()
    os.truncate(path, path.stat().st_size + 1)
    for each in (branch, graft):
        with pytest.raises(Exception, match="was written to after it was loaded") as caught:
            sample(each, SD3)
        assert str(caught.value).endswith(f"({path})")
    assert all(layer.residual is None for layer in graft.graft.layers.values())
    again = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
    assert torch.equal(sample(with_lora(again, loras[0]), SD3), wanted), "what is appended changes no tensor"


def test_a_model_that_is_replaced_or_deleted_runs_on(model):
    path, graft = model
    wanted = sample(graft, SD3)
    other = shutil.copy(path, f"{path}.part")
    os.replace(other, path)
    forget()
    assert torch.equal(sample(graft, SD3), wanted)
    path.unlink()
    forget()
    assert torch.equal(sample(graft, SD3), wanted)


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9",
        "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9",
        "CUDA out of memory. Tried to allocate 64.00 MiB",
        "CUDA error: an illegal memory access was encountered",
    ],
)
def test_a_full_memory_is_not_laid_on_the_file(pack, model, monkeypatch, words):
    path, _ = model

    def fails(*args, **kwargs):
        raise RuntimeError(words)

    monkeypatch.setattr(comfy.sd, "load_diffusion_model_state_dict", fails)
    with pytest.raises(RuntimeError) as caught:
        pack("nodes.loader").load_diffusion_model(str(path))
    assert str(caught.value) == words


def test_a_lora_that_is_replaced_between_two_runs_is_read_anew(sd3, loras, folders):  # noqa: F811
    graft, _ = sd3
    path = folders / "loras" / "replaced.safetensors"
    stack = nodes.NODE_CLASS_MAPPINGS["GraftLoraStack"]()
    row = {"lora_1": "replaced.safetensors", "strength_1": 0.5}
    states = []
    for lora in loras:
        save_file(lora, f"{path}.part")
        os.replace(f"{path}.part", path)
        states.append(stack.IS_CHANGED(**row))
        got = sample(stack.apply(graft, **row)["result"][0], SD3)
        assert torch.equal(got, sample(with_lora(graft, lora, 0.5), SD3))
    assert states[0] != states[1]
    path.unlink()
    with pytest.raises(Exception, match=r"into the loras folder, .*: replaced\.safetensors \(row 1\)$"):
        stack.apply(graft, **row)


OUTSIDE = ("../{}", "../../{}", "{folder}/{}", "loras/../../{}")


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_lead_nowhere_but_into_the_model_folders(sd3, loras, folders, name):  # noqa: F811
    """They come with workflows, which come from strangers."""
    secret = folders / "outside.safetensors"
    save_file(loras[0], secret)
    shutil.copy(secret, folders / "outside.gguf")
    name = name.format("outside.safetensors", folder=folders)
    classes = nodes.NODE_CLASS_MAPPINGS
    with pytest.raises(Exception, match="put the file into the loras folder"):
        classes["GraftLoraStack"]().apply(sd3[0], lora_1=name)
    with pytest.raises(Exception, match="put the file into the loras folder"):
        classes["GraftLoraStack"]().apply(sd3[0], lora_stack=[(name, 1.0, 1.0)])
    with pytest.raises(Exception, match="is not there"):
        classes["GraftUNETLoader"]().load(name.replace(".safetensors", ".gguf"))
    with pytest.raises(Exception, match="is not there"):
        classes["GraftCLIPLoader"]().load(name, "sd3")
    for given in ((name,), (None, name)):
        with pytest.raises(Exception, match="is not there"):
            classes["GraftUNETLoader"].VALIDATE_INPUTS(*given)
    for value in ("clip_name1", "clip_name2"):
        with pytest.raises(Exception, match="is not there"):
            classes["GraftCLIPLoader"].VALIDATE_INPUTS(**{value: name})
    with pytest.raises(Exception, match="put the file into the loras folder"):
        classes["GraftLoraStack"].VALIDATE_INPUTS(lora_1=name)


def test_links_are_followed_as_the_host_follows_them(sd3, loras, folders, tmp_path):  # noqa: F811
    """People keep models on other disks; one that leads nowhere is a file that is gone."""
    save_file(loras[0], tmp_path / "a.safetensors")
    link = folders / "loras" / "link.safetensors"
    link.symlink_to(tmp_path / "a.safetensors")
    assert folder_paths.get_full_path("loras", link.name)
    apply = nodes.NODE_CLASS_MAPPINGS["GraftLoraStack"]().apply
    assert "layers" in apply(sd3[0], lora_1=link.name)["result"][2]
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(Exception, match=r"into the loras folder, .*: link\.safetensors \(row 1\)$"):
        apply(sd3[0], lora_1=link.name)
    link.unlink()
