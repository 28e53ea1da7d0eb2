"""Train LoRA (Graft): on the demo model and a small SD3, in this ComfyUI."""

from __future__ import annotations

import json
import os
import types

import comfy.model_management
import comfy.samplers
import comfy.sd
import folder_paths
import nodes
import pytest
import torch
from architectures import NARROW
from comfy_extras.nodes_model_advanced import ModelSamplingSD3
from conftest import ROOT
from generation import both_models, distance, sample
from graft.demo import pictures
from safetensors import safe_open
from safetensors.torch import load_file
from small import SD3, sd3  # noqa: F401

MODEL = ROOT / "demo" / "graft-demo-Q4_K_M.gguf"
TEXTS = ("a red star on mint", "a blue ring on cream", "a pink heart on sky", "a green moon on sand")


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """ComfyUI's output, elsewhere; its folder of LoRAs is listed, as the host does."""
    folder = tmp_path_factory.mktemp("output")
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(folder))
    paths, extensions = folder_paths.folder_names_and_paths["loras"]
    folder_paths.folder_names_and_paths["loras"] = ([*paths, str(folder / "loras")], extensions)
    yield folder
    folder_paths.set_output_directory(before)
    folder_paths.folder_names_and_paths["loras"] = (paths, extensions)


@pytest.fixture
def demo(pack):
    return pack("nodes.loader").load_diffusion_model(str(MODEL), compute_dtype="fp32")


@pytest.fixture(scope="module")
def prompts(pack):
    encode = pack("nodes.demo").GraftDemoPrompt().encode
    return [encode(text)[0] for text in TEXTS]


@pytest.fixture(scope="module")
def latents():
    """Dark pictures, which the model does not draw by itself."""
    drawn = torch.full((len(TEXTS), 128, 128, 3), 0.15)
    drawn[:, 40:88, 40:88, 0] = 0.9
    return {"samples": pictures.to_host(pictures.encode(drawn))}


def train(pack, model, latents, positive, **more):
    """The node's outputs; in inference mode, as the host runs it."""
    values = {
        "model": model, "positive": positive, "steps": 4, "learning_rate": 3e-3, "rank": 4,
        "layers": "attention and MLP", "filename_prefix": "loras/test", "trigger_phrase": "dark style", "seed": 3,
        "batch_size": 2, **more,
    }  # fmt: skip
    lists = {name: value if name == "positive" else [value] for name, value in values.items()}
    latents = latents if isinstance(latents, list) else [latents]
    node = pack("nodes.train").GraftTrainLora()
    with torch.inference_mode():
        return node.train(latents=latents, **lists)["result"]


def forward(model):
    """One velocity."""
    x, (context,) = pictures.beside_places(pictures.noise(3)), [pictures.prompts(TEXTS[:1])]
    with torch.no_grad(), model.grafted(torch.device("cpu")):
        return model.model.diffusion_model(x, torch.tensor([600.0]), context=context)


def draw(model, prompt):
    latent = {"samples": torch.zeros(1, 16, 1, 16, 16)}
    drawn = nodes.common_ksampler(model, 1, 6, 1.0, "euler", "simple", prompt, prompt, latent)[0]
    return pictures.decode(pictures.to_model(drawn["samples"]))


def test_a_style_is_learnt_and_the_model_is_as_it_was(pack, demo, latents, prompts, output):
    held = [layer.weight.data.clone() for layer in demo.graft.layers.values()]
    before = draw(demo, prompts[0])
    model, _, plot, _, path, report = train(
        pack, demo, latents, prompts, steps=20, learning_rate=1e-2, gradient_checkpointing=False
    )
    losses = json.loads(safe_open(path.replace(".safetensors", ".training"), "pt").metadata()["graft.training"])[
        "losses"
    ]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    after = draw(model, prompts[0])
    wanted = pictures.decode(pictures.to_model(latents["samples"][:1]))
    assert distance(after, wanted) < 0.6 * distance(before, wanted)
    # nothing is left on the model
    assert torch.equal(draw(demo, prompts[0]), before)
    assert all(layer.residual is None and not layer.weight.requires_grad for layer in demo.graft.layers.values())
    assert all(map(torch.equal, held, (layer.weight.data for layer in demo.graft.layers.values())))
    assert demo.training is None and not demo.residuals and "forward" not in vars(demo.model.diffusion_model.blocks[0])
    assert comfy.model_management.in_training is False if hasattr(comfy.model_management, "in_training") else True
    assert plot.shape[0] == 1 and plot.shape[3] == 3 and plot.min() >= 0 and plot.max() <= 1 and plot.std() > 0.01
    assert "on 40 layers" in report and path in report


def test_the_file_is_what_was_learnt(pack, demo, latents, prompts, output):
    model, state, _, _, path, _ = train(pack, demo, latents, prompts, file="fp32")
    loaded = load_file(path)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    assert all(name.startswith("lora_unet_blocks_") for name in state)
    by_hand = comfy.sd.load_lora_for_models(demo, None, loaded, 1.0, 0.0)[0]
    assert distance(forward(by_hand), forward(model)) < 1e-6 < 1e-3 < distance(forward(demo), forward(model))
    metadata = safe_open(path, "pt").metadata()
    assert metadata["modelspec.trigger_phrase"] == "dark style" and metadata["ss_network_dim"] == "4"
    assert metadata["ss_sd_model_name"] == MODEL.name and len(metadata["ss_new_sd_model_hash"]) == 64
    assert "Q4_K" in metadata["graft.trained_on"] and metadata["ss_steps"] == "4"
    assert pack("nodes.lora").trigger_words(metadata) == ["dark style"]


@pytest.mark.parametrize("kind", ["DoRA", "LoKr"])
def test_other_kinds(pack, demo, latents, prompts, output, kind):
    model, state, *_, path, report = train(pack, demo, latents, prompts, kind=kind, steps=2, file="fp32")
    name = {"DoRA": "dora_scale", "LoKr": "lokr_w1"}[kind]
    assert any(key.endswith(name) for key in state) and report.startswith(kind)
    stock = nodes.LoraLoader().load_lora(demo, None, os.path.basename(path), 1.0, 0.0)[0]
    assert distance(forward(stock), forward(model)) < 1e-6


def test_going_on_is_exact(pack, demo, latents, prompts, output):
    whole = train(pack, demo, latents, prompts, steps=4, seed=11)
    path = interrupted(pack, demo, latents, prompts, after=2, steps=4, seed=11)
    rest = train(pack, demo, latents, prompts, steps=4, seed=11, resume_from=os.path.basename(path))
    assert all(torch.equal(rest[1][name], whole[1][name]) for name in whole[1])
    assert f"went on from step 2 of {os.path.basename(path)}, exactly" in rest[5]
    with pytest.raises(pack("kernels").AdapterError, match="has 4 steps already: set steps to more"):
        train(pack, demo, latents, prompts, steps=4, resume_from=os.path.basename(rest[4]))
    os.remove(path.replace(".safetensors", ".training"))
    again = train(pack, demo, latents, prompts, steps=1, resume_from=os.path.basename(path))
    assert "the optimizer began anew" in again[5]


def interrupted(pack, model, latents, prompts, after, **more):
    """Where a run that is cancelled after so many steps has put what it has learnt."""
    session = pack("nodes.train_session").Session
    show, folder = session._show, os.path.join(folder_paths.get_output_directory(), "loras")
    before = set(os.listdir(folder)) if os.path.isdir(folder) else set()

    def stop(self):
        show(self)
        if self.run.step == after:
            comfy.model_management.interrupt_current_processing()

    session._show = stop
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            train(pack, model, latents, prompts, **more)
    finally:
        session._show = show
        comfy.model_management.interrupt_current_processing(False)
    (made,) = (name for name in set(os.listdir(folder)) - before if name.endswith(".safetensors"))
    return os.path.join(folder, made)


def test_cancel_leaves_a_file_and_nothing_on_the_model(pack, demo, latents, prompts, output):
    before = forward(demo)
    path = interrupted(pack, demo, latents, prompts, after=2)
    assert load_file(path) and safe_open(path, "pt").metadata()["ss_steps"] == "2"
    assert torch.equal(forward(demo), before) and demo.training is None
    assert "forward" not in vars(demo.model.diffusion_model.blocks[0])


def test_out_of_memory_is_a_sentence(pack, demo, latents, prompts, output, monkeypatch):
    before, training = forward(demo), pack("nodes.training")
    real, calls = training.Prepared.prediction, []

    def full(self, *args):
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return real(self, *args)

    monkeypatch.setattr(training.Prepared, "prediction", full)
    with pytest.raises(pack("kernels").OutOfMemory, match="memory ran out in training: set batch_size to 1") as raised:
        train(pack, demo, latents, prompts)
    assert "the 2 steps that were done are kept in" in str(raised.value)
    monkeypatch.undo()
    assert torch.equal(forward(demo), before)


def test_pictures_of_several_sizes_and_a_caption_for_all(pack, demo, latents, prompts, output):
    smaller = {"samples": latents["samples"][:1, ..., :12, :12].clone()}
    *_, report = train(pack, demo, [latents, smaller], prompts[:1], steps=2, batch_size=3, accumulate=2)
    assert "5 pictures, 2 steps" in report
    with pytest.raises(pack("kernels").GraftError, match="there are 4 pictures and 3 conditionings"):
        train(pack, demo, latents, prompts[:3])


def test_samples_on_the_way(pack, demo, latents, prompts, output):
    *_, samples, _, _ = train(pack, demo, latents, prompts, steps=3, sample_every=2, sample_steps=1)
    assert samples["samples"].shape == (2, 16, 1, 16, 16)
    blocked = train(pack, demo, latents, prompts, steps=1)[3]
    assert type(blocked).__name__ == "ExecutionBlocker"


def test_a_teacher(pack, demo, latents, prompts, output):
    """It learns to be the model with a LoRA on it, and not the pictures."""
    neon = ROOT / "demo" / "graft-demo-neon.safetensors"
    teacher = comfy.sd.load_lora_for_models(demo, None, load_file(neon), 1.0, 0.0)[0]
    before = distance(forward(demo), forward(teacher))
    model, *_ = train(pack, demo, latents, prompts, steps=8, teacher=teacher, rank=8, learning_rate=1e-2)
    assert distance(forward(model), forward(teacher)) < 0.75 * before
    (shifted,) = ModelSamplingSD3().patch(demo, 3.0)
    with pytest.raises(pack("kernels").GraftError, match="the teacher's steps are not those of the model"):
        train(pack, shifted, latents, prompts, steps=1, teacher=teacher)


def test_on_top_of_a_lora(pack, demo, latents, prompts, output):
    neon = load_file(ROOT / "demo" / "graft-demo-neon.safetensors")
    styled = comfy.sd.load_lora_for_models(demo, None, neon, 0.7, 0.0)[0]
    model, state, *_ = train(pack, styled, latents, prompts, steps=2)
    both = comfy.sd.load_lora_for_models(styled, None, state, 1.0, 0.0)[0]
    assert distance(forward(model), forward(both)) < 1e-6
    assert distance(forward(model), forward(demo)) > 1e-2


def test_which_layers(pack, demo, output):
    targets = pack("nodes.train_targets").targets

    def named(which, pattern=""):
        return {target.layer.removeprefix("diffusion_model.") for target in targets(demo, which, pattern)}

    attention, mlp = named("attention"), named("MLP")
    assert all("attn" in name for name in attention) and len(attention) == 32
    assert all("ffn" in name for name in mlp) and len(mlp) == 8
    assert named("attention and MLP") == attention | mlp == named("all in blocks")
    assert named("all") > attention | mlp and "head.head" in named("all")
    assert named("attention", "blocks.0.*.q, ffn.2") == {
        "blocks.0.self_attn.q", "blocks.0.cross_attn.q", *(f"blocks.{i}.ffn.2" for i in range(4))
    }  # fmt: skip
    with pytest.raises(pack("kernels").AdapterError, match="no layer of this model is called like 'nothing'"):
        named("all", "nothing")


def test_rows_of_a_fused_layer(pack):
    """Flux's single blocks have queries, keys and values in one layer with a part of the MLP."""
    train_, names = pack("nodes.train_targets"), pack("nodes.save_lora").Name
    Region = pack("ops.kinds").Region
    parts = [
        *(names(f"single_transformer_blocks.0.attn.to_{x}", Region(0, i * 8, 8)) for i, x in enumerate("qkv")),
        names("single_transformer_blocks.0.proj_mlp", Region(0, 24, 32)),
    ]
    path = "diffusion_model.single_blocks.0.linear1"
    assert train_._target(path, "attention", parts) == train_.Target(path, Region(0, 0, 24))
    assert train_._target(path, "MLP", parts) == train_.Target(path, Region(0, 24, 32))
    assert train_._target(path, "attention and MLP", parts) == train_.Target(path)
    assert train_._target("diffusion_model.single_blocks.0.modulation.lin", "attention", ()) is None


@pytest.fixture(scope="module")
def flux(pack, tmp_path_factory):
    """``(architecture, graft, dense)`` of a Flux with queries, keys and values in one layer with a part of the MLP."""
    with both_models(pack, NARROW["flux"], "Q4_K", tmp_path_factory.mktemp("flux")) as models:
        yield models


@pytest.mark.parametrize("which", ["attention", "MLP"])
@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoKr"])
def test_rows_of_a_fused_layer_are_learnt_and_every_loader_reads_them(pack, flux, output, kind, which):
    architecture, graft, dense = flux
    latents = {"samples": torch.randn(architecture.latent, generator=torch.Generator().manual_seed(1))}
    positive = [architecture.conditioning()]
    given = {"kind": kind, "layers": which, "batch_size": 1, "file": "fp32", "learning_rate": 1e-2, "seed": 5}
    model, *_, path, _ = train(pack, graft, latents, positive, steps=2, **given)
    linear1 = "diffusion_model.single_blocks.0.linear1"
    start, end = (0, 3 * 1024) if which == "attention" else (3 * 1024, 7 * 1024)
    assert json.loads(safe_open(path, "pt").metadata()["graft.rows"])[linear1] == [start, end - start]
    (patch,) = model.residuals.patches[f"{linear1}.weight"]
    adapter = getattr(patch.adapter, "inner", patch.adapter)  # what a DoRA scales is all rows, by 1 outside of these
    learnt = adapter.delta(torch.zeros(7 * 1024, 1024)).any(1)
    assert learnt[start:end].any() and not learnt[:start].any() and not learnt[end:].any()
    want = sample(model, architecture)
    name = os.path.basename(path)
    for loaded in (
        nodes.LoraLoader().load_lora(graft, None, name, 1.0, 0.0)[0],
        pack("nodes.lora").GraftLoraStack().apply(graft, lora_1=name)["result"][0],
    ):
        assert distance(sample(loaded, architecture), want) < 1e-6
    # the host's own model has weights of its own kind, into which the host merges the file
    stock = nodes.LoraLoader().load_lora(dense, None, name, 1.0, 0.0)[0]
    effect = sample(stock, architecture) - sample(dense, architecture)
    assert distance(want - sample(graft, architecture), effect) < 1e-3
    whole = train(pack, graft, latents, positive, steps=4, **given)
    first = interrupted(pack, graft, latents, positive, after=2, steps=4, **given)
    rest = train(pack, graft, latents, positive, steps=4, resume_from=os.path.basename(first), **given)
    assert "exactly" in rest[5] and all(torch.equal(rest[1][key], whole[1][key]) for key in whole[1])


def test_another_architecture_in_bf16(pack, sd3, output):  # noqa: F811
    graft, dense = sd3
    before = sample(graft, SD3)
    latents = {"samples": torch.randn(SD3.latent, generator=torch.Generator().manual_seed(1))}
    *_, report = train(pack, graft, latents, [SD3.conditioning()[:1]], steps=2, compute="bf16", batch_size=1)
    assert "2 steps" in report and torch.equal(sample(graft, SD3), before)
    with pytest.raises(pack("kernels").AdapterError, match="trains on a model of Load Diffusion Model"):
        train(pack, dense, latents, [SD3.conditioning()[:1]])


def test_the_loss_is_that_of_what_the_model_gives(pack):
    """A velocity, a noise or a picture: the host's own model sampling says how they depend on each other."""
    import comfy.model_sampling as sampling

    wanted, found, x = (torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    sigmas = torch.tensor([0.3, 0.8])

    class Flow(sampling.ModelSamplingDiscreteFlow, sampling.CONST):
        pass

    class Noise(sampling.ModelSamplingDiscrete, sampling.EPS):
        pass

    class Velocity(sampling.ModelSamplingDiscrete, sampling.V_PREDICTION):
        pass

    for kind in (Flow, Noise, Velocity):
        model_sampling = kind()
        prepared = types.SimpleNamespace(model=types.SimpleNamespace(model_sampling=model_sampling))
        denoised = [model_sampling.calculate_denoised(sigmas, output, x) for output in (found, wanted)]
        got = pack("nodes.training").Prepared.loss(prepared, denoised[0], denoised[1], sigmas)
        torch.testing.assert_close(got, (found - wanted).square().mean(), rtol=1e-3, atol=1e-4)
