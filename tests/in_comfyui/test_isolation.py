"""Branches of one workflow share layers and nothing else."""

from __future__ import annotations

import copy
import gc
import weakref

import comfy.hooks
import comfy.model_management
import nodes
import pytest
import torch
from architectures import write_model
from comfy.lora import load_lora, model_lora_keys_unet
from comfy.patcher_extension import WrappersMP
from generation import distance, fingerprint, sample, with_lora
from loras import make_lora
from safetensors.torch import save_file
from small import SD3, loras, sd3  # noqa: F401  (fixtures)


@pytest.fixture(scope="module")
def alone(sd3, loras):  # noqa: F811
    """What each branch gives when it runs by itself."""
    graft, _ = sd3
    first, second = loras
    return {
        "none": sample(graft, SD3),
        "first": sample(with_lora(graft, first), SD3),
        "second": sample(with_lora(graft, second), SD3),
        "both": sample(with_lora(with_lora(graft, first), second, 0.5), SD3),
    }


def test_on_off_on(sd3, loras, alone):  # noqa: F811
    graft, _ = sd3
    for _ in range(2):
        assert torch.equal(sample(with_lora(graft, loras[0]), SD3), alone["first"])
        assert torch.equal(sample(graft, SD3), alone["none"])


def test_two_branches_with_different_loras(sd3, loras, alone):  # noqa: F811
    graft, _ = sd3
    first, second = with_lora(graft, loras[0]), with_lora(graft, loras[1])
    both = with_lora(first, loras[1], 0.5)
    for name, branch in (("second", second), ("both", both), ("first", first), ("none", graft), ("second", second)):
        assert torch.equal(sample(branch, SD3), alone[name]), name


def test_a_clone_keeps_its_loras_when_its_parent_gets_another(sd3, loras, alone):  # noqa: F811
    graft, _ = sd3
    parent = with_lora(graft, loras[0])
    child = parent.clone()
    assert len(parent.add_patches(load_lora(loras[1], model_lora_keys_unet(graft.model, {})), 0.5)) > 0
    grandchild = with_lora(child, loras[1], 0.5)
    assert torch.equal(sample(child, SD3), alone["first"])
    assert torch.equal(sample(grandchild, SD3), alone["both"])
    assert torch.equal(sample(parent, SD3), alone["both"])


def test_a_branch_that_is_asked_within_a_call_of_another(sd3, loras):  # noqa: F811
    """As guidance by the model without its LoRA does it: every branch answers for itself."""
    graft, _ = sd3
    branches = [graft, *(with_lora(graft, lora) for lora in loras)]
    for branch in branches:
        sample(branch, SD3)

    def ask(branch):
        context, extra = SD3.conditioning(1)[0]
        inputs = {"c_crossattn": context, "y": extra["pooled_output"]}
        with torch.inference_mode():
            x, options = torch.full(SD3.latent, 0.5), {"wrappers": branch.wrappers}
            return branch.model.apply_model(x, torch.tensor([0.7]), **inputs, transformer_options=options)

    wanted = [ask(branch) for branch in branches]
    assert not torch.equal(wanted[0], wanted[1]) and not torch.equal(wanted[1], wanted[2])
    for outer in branches:
        answers = []

        def ask_others(executor, *args, answers=answers, **kwargs):
            first = executor(*args, **kwargs)
            answers.extend(ask(branch) for branch in branches)
            assert torch.equal(executor(*args, **kwargs), first)
            return first

        asking = outer.clone()
        asking.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", ask_others)
        sample(asking, SD3)
        assert answers and all(map(torch.equal, answers, wanted))


def test_a_strength_change_reloads_nothing(sd3, loras):  # noqa: F811
    graft, _ = sd3
    weak, strong = with_lora(graft, loras[0], 0.2), with_lora(graft, loras[0], 0.9)
    for branch in (weak, strong):
        sample(branch, SD3)
        assert branch.patches_uuid == graft.patches_uuid
        assert not branch.patches
    assert weak.get_additional_models()[0] is strong.get_additional_models()[0], "the factors were built anew"


def _new_loras(dense, count, layers=SD3.lora_layers):
    shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
    return [make_lora(dense.model, shapes, "native", layers, rank=8, seed=10 + n) for n in range(count)]


def test_the_host_counts_the_factors_of_every_branch_that_is_there(sd3):  # noqa: F811
    graft, dense = sd3
    comfy.model_management.unload_all_models()
    before = list(comfy.model_management.current_loaded_models)  # on devices that another test has played
    branches = [with_lora(graft, lora) for lora in _new_loras(dense, 6)]
    for branch in branches:
        sample(branch, SD3)
    held = {p for b in branches for member in b.build_residuals() for p in member.parameters()}
    after = (loaded for loaded in comfy.model_management.current_loaded_models if loaded not in before)
    counted = sum(loaded.model_memory() for loaded in after)
    assert counted == graft.model_size() + sum(p.nbytes for p in held)


def test_branches_that_share_factors_have_each_under_one_patcher(sd3, alone, loras):  # noqa: F811
    graft, dense = sd3
    first = with_lora(graft, loras[0])
    assert torch.equal(sample(first, SD3), alone["first"])
    (before,) = first.get_additional_models()
    assert before.loaded_size() > 0
    (part,) = _new_loras(dense, 1, SD3.lora_layers[:1])
    both = with_lora(first, part)
    sample(both, SD3)
    assert before.loaded_size() == 0, "it still moves what others count, too"
    members = [member for patcher in {*first.get_additional_models(), *both.get_additional_models()}
               for member in patcher.model]  # fmt: skip
    assert len(members) == len(set(members))
    assert set(members) == {*first.build_residuals(), *both.build_residuals()}
    assert set(first.get_additional_models()) & set(both.get_additional_models())
    assert torch.equal(sample(first, SD3), alone["first"])


def test_strengths_add_up_as_in_comfyui(sd3, loras):  # noqa: F811
    graft, dense = sd3
    base, ours = sample(dense, SD3), sample(graft, SD3)
    for strength in (-0.7, 0.4, 1.6):
        want = sample(with_lora(dense, loras[0], strength), SD3) - base
        assert distance(sample(with_lora(graft, loras[0], strength), SD3) - ours, want) < 1e-4


def test_sampling_under_autocast_is_as_exact_as_comfyuis(sd3, loras, alone):  # noqa: F811
    """As nodes open it around a sampler."""
    graft, dense = sd3
    exact = sample(with_lora(dense, loras[0]), SD3)
    with torch.autocast("cpu", torch.bfloat16):
        host, ours = (sample(with_lora(model, loras[0]), SD3) for model in (dense, graft))
    assert 0 < distance(ours, exact) < 2 * distance(host, exact)
    assert torch.equal(sample(with_lora(graft, loras[0]), SD3), alone["first"])


def test_a_strength_of_zero_is_the_base(sd3, loras, alone):  # noqa: F811
    graft, _ = sd3
    zero = graft.clone()
    zero.add_patches(load_lora(loras[0], model_lora_keys_unet(graft.model, {})), 0.0)
    assert torch.equal(sample(zero, SD3), alone["none"])


def test_scheduled_loras_of_hooks(sd3, loras):  # noqa: F811
    """A LoRA that hangs on a conditioning: city96's pack crashes here."""
    graft, dense = sd3
    results = {}
    for name, model in (("graft", graft), ("dense", dense)):
        outputs = []
        for strength in (0.0, 0.8):
            hooks = comfy.hooks.create_hook_lora(loras[0], strength_model=strength, strength_clip=0.0)
            outputs.append(_sample_hooked(model, hooks))
        results[name] = outputs[1] - outputs[0]
        assert torch.equal(_sample_hooked(model, None), sample(model, SD3)), f"{name}: the hook left something behind"
    assert results["dense"].norm() > 0
    assert distance(results["graft"], results["dense"]) < 1e-4


def _sample_hooked(model, hooks, steps=1):
    positive, negative = SD3.conditioning(1), SD3.conditioning(2)
    if hooks is not None:
        positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    latent = {"samples": torch.zeros(SD3.latent)}
    return nodes.common_ksampler(model, 3, steps, 1.0, "euler", "simple", positive, negative, latent)[0]["samples"]


def test_keyframes_keep_no_loras_alive_that_were_dropped(sd3, loras):  # noqa: F811
    graft, dense = sd3
    hooks = comfy.hooks.create_hook_lora(loras[0], strength_model=1.0, strength_clip=0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for n in range(10):
        keyframes.add(comfy.hooks.HookKeyframe(strength=0.1 * n, start_percent=n / 10, guarantee_steps=1))
    hooks.set_keyframes_on_hooks(keyframes)
    branch = with_lora(graft, loras[1])
    _sample_hooked(branch, hooks, steps=12)
    dropped = []
    for lora in _new_loras(dense, 8):
        dropped += map(weakref.ref, with_lora(graft, lora).build_residuals())
    assert 0 < sum(member() is not None for member in dropped) < len(dropped) / 2


def test_factors_stay_with_a_loaded_file_and_go_with_it(sd3, folders):  # noqa: F811
    """The host drops a branch before it builds the next one; its loader node keeps the file that it loaded last."""
    graft, dense = sd3
    for name, lora in zip(("one", "two"), _new_loras(dense, 2), strict=True):
        save_file(lora, folders / "loras" / f"{name}.safetensors")
    del lora

    def factors(node, name, strength):
        branch = node.load_lora_model_only(graft, f"{name}.safetensors", strength)[0]
        sample(branch, SD3)
        return [weakref.ref(member) for member in branch.build_residuals()]

    node = nodes.LoraLoaderModelOnly()
    one = factors(node, "one", 0.5)
    again = factors(node, "one", 0.9)
    assert one and all(a() is b() is not None for a, b in zip(one, again, strict=True))
    two = factors(node, "two", 0.5)
    assert not any(member() for member in one) and all(member() for member in two)
    del node
    assert not any(member() for member in two)


@pytest.mark.parametrize("loaded", [False, True], ids=["fresh", "loaded"])
def test_a_deep_copy_is_a_model_of_its_own(sd3, loras, alone, loaded):  # noqa: F811
    graft, _ = sd3
    branch = with_lora(graft, loras[0])
    if loaded:
        sample(branch, SD3)
    config = branch.model.model_config  # which newer hosts cannot copy, of their own models neither
    copied = copy.deepcopy(branch, {id(config): config})
    own = set(copied.graft.layers.values())
    assert own <= set(copied.model.modules()) and not own & set(graft.model.modules())
    branch.add_patches(load_lora(loras[1], model_lora_keys_unet(graft.model, {})), 0.5)
    assert torch.equal(sample(copied, SD3), alone["first"])
    assert torch.equal(sample(branch, SD3), alone["both"])
    assert torch.equal(sample(with_lora(copied, loras[1], 0.5), SD3), alone["both"])
    assert fingerprint(copied) == fingerprint(graft)
    first = with_lora(graft, loras[0]).merged_state_dict()
    assert all(torch.equal(value, first[name]) for name, value in copied.merged_state_dict().items())
    layers = [weakref.ref(layer) for layer in own]
    comfy.model_management.unload_all_models()
    assert torch.equal(sample(copied, SD3), alone["first"]), "from the file again"
    del copied, own
    if hasattr(comfy.model_management, "reset_cast_buffers"):
        comfy.model_management.reset_cast_buffers()  # after each prompt the host forgets its largest layer so
    gc.collect()
    assert not [layer() for layer in layers if layer()]


def test_bytes_are_never_written(sd3, loras):  # noqa: F811
    graft, _ = sd3
    before = fingerprint(graft)
    sample(with_lora(graft, loras[0]), SD3)
    with pytest.raises(Exception, match="never written to"):
        next(iter(graft.graft.layers.values())).set_weight(torch.zeros(1))
    assert fingerprint(graft) == before


def test_the_memory_that_weights_are_decoded_into_goes_with_the_model(pack, folders):
    scratch = pack("kernels.scratch")._local
    path = write_model(SD3, "Q8_0", folders / "unet_gguf" / "scratch.gguf")
    model = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
    wanted = sample(model, SD3)
    assert scratch.buffers
    comfy.model_management.unload_all_models()
    assert not hasattr(scratch, "buffers")
    assert torch.equal(sample(model, SD3), wanted) and scratch.buffers
    del model
    gc.collect()
    assert not hasattr(scratch, "buffers")
    path.unlink()


def test_a_model_that_nobody_needs_goes_at_once(pack, folders):
    """Without waiting for the garbage collector: the host frees memory for the next model by this."""
    path = write_model(SD3, "Q8_0", folders / "unet_gguf" / "gone.gguf")
    gc.collect()
    gc.disable()
    try:
        model = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
        layer = weakref.ref(next(iter(model.graft.layers.values())))
        assert layer() is not None
        del model
        assert layer() is None
    finally:
        gc.enable()
        path.unlink()
