"""Whose call it is: on several devices, in threads, and of layers that a host calls by themselves."""

from __future__ import annotations

import importlib
import threading
from collections import Counter
from functools import partial

import comfy.conds
import comfy.hooks
import comfy.model_base
import comfy.model_management
import nodes
import pytest
import torch
from architectures import META, Architecture
from comfy.model_base import BaseModel
from generation import both_models, distance, sample, sample_guided, with_lora
from loras import make_lora
from small import SD3, loras, sd3, stock  # noqa: F401  (fixtures)

DEVICES = [torch.device("cpu"), torch.device("cpu:1"), torch.device("cpu:2")]


@pytest.fixture
def devices(monkeypatch):
    """The host has three devices; their tensors are all on the one processor."""
    if not hasattr(comfy.model_management, "get_all_torch_devices"):
        pytest.skip("this ComfyUI has no node for several devices")
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda *args, **kwargs: DEVICES)


def left_on(model) -> list[str]:
    """Layers with a residual, outside of all calls."""
    return [name for name, layer in model.graft.layers.items() if layer.residual is not None]


def on_devices(model, count: int = len(DEVICES)):
    from comfy_extras.nodes_multigpu import MultiGPUCFGSplitNode

    return MultiGPUCFGSplitNode.execute(model, count).result[0]


def clones_of(model) -> list:
    """Those of the other devices, as the last sampling had them."""
    return model.get_additional_models_with_key("multigpu")


def guided(model, hooks=None, steps: int = 2) -> torch.Tensor:
    """Sampling with three conditionings in each step, of which `hooks` are on one."""
    positive, negative = SD3.conditioning(1), SD3.conditioning(2)
    if hooks is not None:
        positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    latent = {"samples": torch.zeros(SD3.latent)}
    positive = positive + SD3.conditioning(4)
    return nodes.common_ksampler(model, 3, steps, 4.0, "euler", "simple", positive, negative, latent)[0]["samples"]


@pytest.fixture
def calls(monkeypatch):
    """How often each model is called."""
    counts: Counter = Counter()
    apply = BaseModel._apply_model

    def count(self, *args, **kwargs):
        counts[self] += 1
        return apply(self, *args, **kwargs)

    monkeypatch.setattr(BaseModel, "_apply_model", count)
    return counts


@pytest.mark.parametrize("count", [2, 3])
def test_devices_share_a_guidance(sd3, loras, devices, calls, count):  # noqa: F811
    """With a LoRA before the node, and after it."""
    graft, _ = sd3
    base, first, second = (guided(model) for model in (graft, *(with_lora(graft, lora) for lora in loras)))
    assert distance(first, base) > 0.01 and distance(second, base) > 0.01
    split = on_devices(graft, count)
    branches = [on_devices(with_lora(graft, loras[0]), count), with_lora(split, loras[1]), split]
    for branch, wanted in zip(branches, (first, second, base), strict=True):
        calls.clear()
        assert distance(guided(branch), wanted) < 1e-5
        everywhere = [branch, *clones_of(branch)]
        assert calls.keys() == {model.model for model in everywhere} and len(calls) == count
        assert not any(map(left_on, everywhere))
    mine = [set(model.build_residuals()) for model in (branches[0], *clones_of(branches[0]))]
    assert all(mine) and len(set.union(*mine)) == sum(map(len, mine)), "devices have a factor in common"
    assert torch.equal(guided(graft), base)


def test_hooks_on_several_devices(sd3, loras, devices, calls):  # noqa: F811
    graft, _ = sd3
    split = on_devices(graft)
    for model, other in ((graft, split), (with_lora(graft, loras[1]), with_lora(split, loras[1]))):
        hooks = comfy.hooks.create_hook_lora(loras[0], strength_model=0.8, strength_clip=0.0)
        wanted, plain = guided(model, hooks), guided(model)
        assert distance(wanted, plain) > 0.01
        calls.clear()
        assert distance(guided(other, hooks), wanted) < 1e-5
        assert len(calls) == len(DEVICES)
        everywhere = [other, *clones_of(other)]
        assert not any(map(left_on, everywhere)) and not any(m.hook_residuals for m in everywhere)
        assert distance(guided(other), plain) < 1e-5


def test_a_branch_on_another_device(sd3, loras, devices):  # noqa: F811
    """For a GPU, Select Model Device loads a model of its own; for the CPU, a clone runs elsewhere than the others."""
    from comfy_extras.nodes_multigpu import _retarget_patcher

    graft, _ = sd3
    branch = with_lora(graft, loras[0])
    wanted = guided(branch)
    moved, here = _retarget_patcher(branch.clone(), DEVICES[1], DEVICES[0]), branch.clone()
    here.load_device = DEVICES[2]
    assert moved.model is not graft.model and here.model is graft.model
    for model in (moved, here, branch):
        assert distance(guided(model), wanted) < 1e-5
        assert {host.load_device for host in model.get_additional_models()} == {model.load_device}
    assert not set(moved.build_residuals()) & set(branch.build_residuals())


def ask(branch) -> torch.Tensor:
    """What a branch answers when it is called by itself."""
    context, extra = SD3.conditioning(1)[0]
    inputs = {"c_crossattn": context, "y": extra["pooled_output"]}
    with torch.inference_mode():
        options = {"wrappers": branch.wrappers}
        x = torch.full(SD3.latent, 0.5)
        return branch.model.apply_model(x, torch.tensor([0.7]), **inputs, transformer_options=options)


def test_branches_of_one_model_in_threads(sd3, loras):  # noqa: F811
    graft, _ = sd3
    branches = [graft, *(with_lora(graft, lora) for lora in loras)]
    wanted = [ask(branch) for branch in branches]
    assert not torch.equal(wanted[0], wanted[1]) and not torch.equal(wanted[1], wanted[2])
    answers: list[list[torch.Tensor]] = [[] for _ in branches]
    start = threading.Barrier(len(branches))

    def run(index: int) -> None:
        start.wait()
        answers[index] += [ask(branches[index]) for _ in range(4)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(branches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(answers, wanted, strict=True):
        assert len(got) == 4 and all(torch.equal(answer, want) for answer in got)
    assert not left_on(graft)


def test_a_call_of_a_model_whose_patcher_is_unknown_is_refused(sd3, loras, pack):  # noqa: F811
    """It would run without its LoRAs, or with those of another branch."""
    graft, _ = sd3
    branch = with_lora(graft, loras[0])
    wrappers = branch.wrappers
    del branch
    with pytest.raises(pack("kernels").GraftError, match="left its LoRAs behind"):
        graft.model.apply_model(torch.zeros(SD3.latent), torch.ones(1), transformer_options={"wrappers": wrappers})


@pytest.mark.parametrize("place", ["positive", "negative"])
def test_another_model_for_the_negative_prompt(sd3, stock, loras, place):  # noqa: F811
    """A guider that calls a second model by the wrappers of the first, of which one is ours."""
    custom = importlib.import_module("comfy_extras.nodes_custom_sampler")
    if not hasattr(custom, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no such guider")

    def picture(model) -> torch.Tensor:
        first, second = (model, stock) if place == "positive" else (stock, model)
        guider = custom.Guider_DualModel(first, second)
        guider.set_conds(SD3.conditioning(1), SD3.conditioning(2))
        guider.set_cfg(4.0)
        return sample_guided(guider, SD3, steps=2)

    graft, dense = sd3
    base, want = picture(dense), picture(with_lora(dense, loras[0]))
    assert distance(picture(graft), base) < 1e-5
    assert distance(picture(with_lora(graft, loras[0])) - base, want - base) < 1e-4 < distance(want, base)
    assert not left_on(graft)


def _prepares_its_context(self, **kwargs):
    """As models do that run layers while the host makes their conditioning; and what a ControlNet does in a step."""
    conds = BaseModel.extra_conds(self, **kwargs)
    context = self.diffusion_model.context_embedder(kwargs["cross_attn"])
    conds["c_crossattn"] = comfy.conds.CONDRegular(context.repeat(1, 1, 16))
    conds["y"] = comfy.conds.CONDRegular(kwargs["pooled_output"])
    return conds


def test_layers_that_a_host_calls_to_prepare_a_conditioning(sd3, monkeypatch):  # noqa: F811
    graft, dense = sd3
    shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
    lora = make_lora(dense.model, shapes, "native", ("context_embedder",), rank=8, seed=5)
    monkeypatch.setattr(comfy.model_base.SD3, "extra_conds", _prepares_its_context)
    base, want = (sample(model, SD3) for model in (dense, with_lora(dense, lora)))
    assert distance(want, base) > 0.01
    ours = sample(graft, SD3)
    assert distance(ours, base) < 1e-5
    branch = with_lora(graft, lora)
    assert distance(sample(branch, SD3) - ours, want - base) < 1e-4
    assert torch.equal(sample(graft, SD3), ours) and not left_on(graft)


class Anima(Architecture):
    def conditioning(self, seed: int = 1) -> list:
        ids = torch.arange(10, 22) * seed
        extra = {"t5xxl_ids": ids, "t5xxl_weights": torch.ones(12)}
        return [[context, extra] for context, _ in super().conditioning(seed)]


def test_animas_adapter_runs_before_sampling(pack, tmp_path, monkeypatch):
    try:
        anima = importlib.import_module("comfy.ldm.anima.model")
    except ImportError:
        pytest.skip("this ComfyUI does not know Anima")
    monkeypatch.setattr(anima, "LLMAdapter", partial(anima.LLMAdapter, num_layers=1))
    build = partial(
        anima.Anima, max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2,
        patch_temporal=1, model_channels=256, use_adaln_lora=True, pos_emb_cls="rope3d", **META,
    )  # fmt: skip
    small = Anima("anima", build, (1, 16, 1, 8, 8), (20, 1024), None, ("llm_adapter.blocks.0",))
    with both_models(pack, small, "Q8_0", tmp_path) as (_, graft, dense), torch.inference_mode():
        shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
        lora = make_lora(dense.model, shapes, "native", small.lora_layers, scale=1.0)
        base, want = (sample(model, small) for model in (dense, with_lora(dense, lora)))
        assert distance(want, base) > 0.01
        ours = sample(graft, small)
        assert distance(ours, base) < 1e-5
        assert distance(sample(with_lora(graft, lora), small) - ours, want - base) < 1e-4
        assert torch.equal(sample(graft, small), ours) and not left_on(graft)
