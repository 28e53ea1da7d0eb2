"""What newer hosts do with a model under dynamic VRAM, played by `dynamic_vram.py`; run only where that is on."""

from __future__ import annotations

import uuid

import comfy.model_management
import comfy.model_patcher
import pytest
import torch
from generation import distance, fingerprint, sample, with_lora
from small import SD3, loras, sd3, stock  # noqa: F401  (fixtures)

if getattr(comfy.model_patcher, "CoreModelPatcher", None) in (None, comfy.model_patcher.ModelPatcher):
    pytest.skip("dynamic VRAM is off: it is on with GRAFT_DYNAMIC_VRAM=1", allow_module_level=True)

import dynamic_vram

TOLERANCE = 1e-5  # fp32 sums in another order


@pytest.fixture
def tuned(sd3, loras):  # noqa: F811
    """``(graft, dense)`` with a LoRA."""
    return tuple(with_lora(model, loras[0], 0.7) for model in sd3)


def test_it_is_on(sd3, stock):  # noqa: F811
    """And it takes memory away: the other tests would see little without."""
    graft, dense = sd3
    assert graft.is_dynamic() and stock.is_dynamic() and not dense.is_dynamic()
    dynamic_vram.asked.clear()
    for model in (graft, stock):
        for _ in range(4):
            sample(model, SD3)
    asked = dynamic_vram.asked
    assert 0.3 < asked["refused"] / asked.total() < 0.5
    assert asked["granted"] > 0.2 * asked.total() and asked["resident"] > 0.1 * asked.total()


def test_pictures_are_those_of_the_plain_run(sd3, loras, tuned):  # noqa: F811
    graft, dense = sd3
    base = sample(graft, SD3)
    assert distance(base, sample(dense, SD3)) < TOLERANCE
    ours, theirs = (sample(t, SD3, steps=3) - sample(m, SD3, steps=3) for t, m in zip(tuned, sd3, strict=True))
    assert distance(ours, theirs) < 1e-4
    assert torch.equal(sample(graft, SD3), base)


@pytest.mark.skipif(
    not hasattr(comfy.model_patcher.ModelPatcherDynamic, "restore_loaded_backups"),
    reason="this ComfyUI moves no layer before it is used",
)
def test_small_layers_move_as_they_are(sd3):  # noqa: F811
    """What the host puts on the GPU at once; it calls that a patch, and casts what it takes for a weight."""
    graft, _ = sd3
    before, layers = fingerprint(graft), graft.graft.layers
    comfy.model_management.load_models_gpu([graft])
    moved = {key: held.weight for key, held in graft.backup.items() if graft.graft.layer_of(key) is not None}
    assert any(layers[key.removesuffix(".weight")].fmt.is_quantized for key in moved if key.endswith(".weight"))
    for key, held in moved.items():
        path, _, name = key.rpartition(".")
        there = getattr(layers[path], name)
        assert there is not held and there.data_ptr() != held.data_ptr(), key
        assert there.dtype == held.dtype and torch.equal(there, held), key
    assert fingerprint(graft) == before
    comfy.model_management.unload_all_models()
    assert not graft.backup
    for name, source in graft.graft.sources.items():
        assert layers[name].weight.data_ptr() == source.data_ptr(), name
    assert fingerprint(graft) == before


def _under_pressure(model):
    """`model`, from which the host takes all memory back before each call of it."""
    clone = model.clone()

    def called(apply_model, arguments):
        for loaded in list(comfy.model_management.current_loaded_models):
            if loaded.model.is_dynamic():
                loaded.model.partially_unload(loaded.model.offload_device, 1e30)
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    clone.set_model_unet_function_wrapper(called)
    return clone


def test_memory_is_taken_back_between_steps(tuned):
    want = sample(tuned[1], SD3, steps=3)
    assert distance(sample(_under_pressure(tuned[0]), SD3, steps=3), want) < TOLERANCE


def test_models_are_unloaded_and_come_back(tuned):
    graft = tuned[0]
    want, before = sample(graft, SD3), fingerprint(graft)
    free_memory, gpu = comfy.model_management.free_memory, dynamic_vram.GPU
    for unload in (
        comfy.model_management.unload_all_models,
        lambda: free_memory(1e30, gpu),
        lambda: free_memory(1e30, gpu, for_dynamic=True),
        lambda: graft.partially_unload(graft.offload_device, graft.model_size() // 2),
        lambda: graft.partially_unload_ram(1e30),
        lambda: graft.model_patches_to(graft.offload_device),
        graft.detach,
    ):
        unload()
        assert fingerprint(graft) == before
        assert distance(sample(graft, SD3), want) < TOLERANCE
    comfy.model_management.unload_all_models()
    assert not graft.model.dynamic_vbars[gpu].loaded_size() and not graft.loaded_size()


def test_a_clone_without_dynamic_vram(loras, tuned):  # noqa: F811
    """As the host makes one for scheduled LoRAs, to train, and for a CPU; it is loaded anew from its file."""
    graft, dense = tuned
    want = sample(dense, SD3)
    plain = graft.clone(disable_dynamic=True)
    assert not plain.is_dynamic() and plain.model is not graft.model and type(plain) is not type(graft)
    for clone in (plain, graft.get_non_dynamic_delegate(), graft.get_non_dynamic_delegate(), plain.clone()):
        assert distance(sample(clone, SD3), want) < TOLERANCE
    more = [sample(with_lora(model, loras[1], 0.4), SD3) for model in (plain, dense)]
    assert distance(*more) < TOLERANCE
    assert distance(sample(graft, SD3), want) < TOLERANCE


def test_layers_that_are_prefetched(sd3):  # noqa: F811
    """As the host's LTX-2 brings in its next block; the layers of one are given back when the next one comes."""
    prefetch = pytest.importorskip("comfy.model_prefetch", reason="this ComfyUI has no prefetch")
    graft, _ = sd3
    comfy.model_management.load_models_gpu([graft])
    blocks, gpu = list(graft.model.diffusion_model.joint_blocks), dynamic_vram.GPU
    queue = prefetch.make_prefetch_queue(list(blocks), gpu, {"prefetch_dynamic_vbars": True})
    prefetch.prefetch_queue_pop(queue, gpu, None)
    compared = 0
    for block in blocks:
        ours = set(graft.graft.layers.values()) & set(block.modules())
        for layer in (layer for layer in ours if hasattr(layer, "_v")):
            assert hasattr(layer, "_prefetch")
            x = torch.randn(3, layer.logical_shape[1])
            got, want = layer(x), torch.nn.functional.linear(x, layer.dequantized(), layer.bias)
            assert distance(got, want) < TOLERANCE
            compared += 1
        prefetch.prefetch_queue_pop(queue, gpu, block)
    assert compared > 20
    prefetch.cleanup_prefetch_queues()


def test_a_patch_that_passed_us_by_is_refused_when_the_model_is_loaded(sd3):  # noqa: F811
    """The host would work it into packed bytes, or find that it does not fit and leave it out."""
    graft, _ = sd3
    base = sample(graft, SD3)
    for place in ("joint_blocks.0.x_block.mlp.fc1", "final_layer.linear"):  # a large layer, and a small one
        clone, key = graft.clone(), f"diffusion_model.{place}.weight"
        patch = ("diff", (torch.ones(graft.graft.layer_of(key).logical_shape),))
        clone.patches, clone.patches_uuid = {key: [(1.0, patch, 1.0, None, None)]}, uuid.uuid4()
        with pytest.raises(Exception, match="past Graft's model patcher"):
            sample(clone, SD3)
        assert torch.equal(sample(graft, SD3), base)
