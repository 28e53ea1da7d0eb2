"""What other nodes read from a Graft MODEL: weights, never packed bytes."""

from __future__ import annotations

import gc
import weakref

import architectures
import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.sd
import comfy.utils
import nodes
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES
from comfy.hooks import get_patch_weights_from_model
from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeSimple, ModelSubtract
from generation import both_models, distance, fingerprint, sample, with_lora
from small import SD3, loras, sd3, stock  # noqa: F401  (fixtures)

TOLERANCE = 2e-5  # fp32 sums of a merge in another order


def test_key_patches_show_weights(sd3, loras):  # noqa: F811
    graft, dense = sd3
    ours, theirs = with_lora(graft, loras[0]).get_key_patches(), dense.get_key_patches()
    assert ours.keys() == theirs.keys()
    patched = 0
    for key, (entry, *rest) in ours.items():
        weight, convert = entry
        assert weight.shape == theirs[key][0][0].shape and weight.is_floating_point(), key
        shown = convert(weight.to(torch.float32, copy=True), inplace=True)
        assert torch.equal(shown, theirs[key][0][0].float()), key
        patched += bool(rest)
    assert patched == len({k for k in loras[0] if k.endswith("lora_A.weight")})


def test_model_state_dict_shows_weights(sd3):  # noqa: F811
    graft, dense = sd3
    shown = graft.model_state_dict()
    assert {k: v.shape for k, v in shown.items()} == {k: v.shape for k, v in dense.model_state_dict().items()}


@pytest.fixture
def merges(sd3, monkeypatch):  # noqa: F811
    """The names of the weights that were merged."""
    merged, names = type(sd3[0]).merged, []
    monkeypatch.setattr(type(sd3[0]), "merged", lambda self, key, *args: names.append(key) or merged(self, key, *args))
    return names


def weights_of(branch) -> dict[str, torch.Tensor]:
    """All weights of a model of the host's own with its LoRAs, as it merges them, in fp32."""
    return {
        key: comfy.lora.calculate_weight(patches, convert(weight.detach().float().clone(), inplace=True), key)
        for key, ((weight, convert), *patches) in branch.get_key_patches().items()
    }


def test_names_of_weights_cost_nothing(sd3, loras, merges):  # noqa: F811
    """Of what is listed, only what is read is merged; lists are ordinary dicts, as hosts and nodes treat them."""
    graft, dense = sd3
    branch, want = with_lora(graft, loras[0]), weights_of(with_lora(dense, loras[0]))
    shown = branch.model_state_dict()
    assert isinstance(shown, dict) and len(shown) == len(want) and list(shown) == list(want)
    assert {k: v.shape for k, v in shown.items()} == {k: v.shape for k, v in want.items()}
    copied = shown.copy()
    popped = copied.pop(next(iter(shown)))
    assert next(iter(shown)) in shown and len(copied) == len(shown) - 1 and popped.is_floating_point()
    assert all(v.detach().contiguous().cpu().nbytes and len(v) for v in shown.values() if v.dim())
    assert not merges
    (key,) = [key for key in shown if key.endswith("joint_blocks.0.x_block.mlp.fc1.weight")]
    assert distance(shown[key].float() * 1.0, want[key]) < 1e-6
    assert distance(shown[key].half(), want[key]) < 1e-3 and distance(shown[key][3:5], want[key][3:5]) < 1e-6
    assert merges == [key] * 3
    with pytest.raises(TypeError, match="read-only"):
        shown[key].add_(1)


def test_a_lora_and_a_hook_that_reaches_the_hosts_own_weights(sd3, loras, merges):  # noqa: F811
    """Where the host switches hooks it lists the whole model, and what it patches itself."""
    graft, dense = sd3
    key = next(k for k, v in dense.model.state_dict().items() if graft.graft.layer_of(k) is None and v.dim() == 1)
    shape = dense.model.state_dict()[key].shape
    hooked = loras[1] | {key.removesuffix(".weight").removesuffix(".bias") + ".diff": torch.full(shape, 0.5)}
    outputs = []
    for model in (graft, dense):
        branch = with_lora(model, loras[0])
        hooks = comfy.hooks.create_hook_lora(hooked, strength_model=0.8, strength_clip=0.0)
        positive = comfy.hooks.set_hooks_for_conditioning(SD3.conditioning(1), hooks) + SD3.conditioning(4)
        latent = {"samples": torch.zeros(SD3.latent)}
        arguments = (3, 3, 4.0, "euler", "simple", positive, SD3.conditioning(2), latent)
        outputs += [sample(branch, SD3, 3, 4.0), nodes.common_ksampler(branch, *arguments)[0]["samples"]]
    ours, theirs = outputs[1] - outputs[0], outputs[3] - outputs[2]
    assert distance(outputs[3], outputs[2]) > 0.01 and distance(ours, theirs) < 1e-4
    assert not merges


def test_another_model_as_a_lora(sd3, loras, merges):  # noqa: F811
    """The host's hooks read the weights of a whole model; what is loaded is what they show."""
    graft, dense = sd3
    sample(graft, SD3)
    plain, want = get_patch_weights_from_model(graft), weights_of(dense)
    assert plain.keys() == want.keys() - {"model_sampling.sigmas"}
    assert all(torch.equal(plain[key].to(torch.float32), want[key]) for key in plain)
    branch = with_lora(graft, loras[0])
    sample(branch, SD3)
    other, want = get_patch_weights_from_model(branch), weights_of(with_lora(dense, loras[0]))
    assert not merges
    assert max(distance(other[key].to(torch.float32), want[key]) for key in other if want[key].any()) < 1e-6
    outputs = []
    for model, weights in ((graft, other), (dense, {key: want[key] for key in other})):
        hooks = comfy.hooks.create_hook_model_as_lora(weights, None, strength_model=0.6, strength_clip=0.0)
        positive = comfy.hooks.set_hooks_for_conditioning(SD3.conditioning(1), hooks)
        arguments = (3, 1, 1.0, "euler", "simple", positive, SD3.conditioning(2), {"samples": torch.zeros(SD3.latent)})
        outputs.append(nodes.common_ksampler(model, *arguments)[0]["samples"] - sample(model, SD3))
    assert outputs[1].norm() > 0.01 and distance(*outputs) < 1e-4


def test_memory_is_counted_by_bytes(sd3, loras, merges):  # noqa: F811
    graft, dense = sd3
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*graft.model.parameters(), *graft.model.buffers())}
    packed = graft.model.state_dict()
    missing = dense.model.state_dict().keys() - packed.keys()
    branch = with_lora(graft, loras[0])
    sample(branch, SD3)
    for patcher in (graft.clone(), branch.clone()):
        patcher.size = 0  # else it remembers
        assert not missing and sum(held.values()) == patcher.model_size() < dense.model_size() / 3
    assert not merges


@pytest.mark.parametrize("tuned", [(), (0,), (1,), (0, 1)], ids=["neither", "first", "second", "both"])
def test_merges_in_both_directions(sd3, stock, loras, tuned):  # noqa: F811
    """With a LoRA on one of the models, or one on each."""
    graft, dense = sd3
    before = fingerprint(graft)

    def merged(*models):
        first, second = (with_lora(m, loras[i]) if i in tuned else m for i, m in enumerate(models))
        return sample(ModelMergeSimple().merge(first, second, 0.3)[0], SD3)

    want = merged(dense, dense)
    for models in ((graft, graft), (stock, graft), (graft, stock), (dense, graft), (graft, dense)):
        assert distance(merged(*models), want) < TOLERANCE
    assert fingerprint(graft) == before


def test_add_difference(sd3, stock, loras):  # noqa: F811
    graft, dense = sd3

    def added(base, model):
        tuned = with_lora(model, loras[1])
        difference = ModelSubtract().merge(tuned, model, 1.0)[0]
        return sample(ModelAdd().merge(base, difference)[0], SD3)

    want = added(dense, dense)
    for models in ((graft, graft), (stock, graft), (graft, stock)):
        assert distance(added(*models), want) < TOLERANCE


def test_weights_that_the_host_drops_while_it_unloads(sd3, loras):  # noqa: F811
    """Of a patched model they lie in its backup; what a merge with it has made of them goes, but not at that moment."""
    graft, dense = sd3
    tuned = with_lora(dense, loras[0])
    sample(tuned, SD3)
    merged = ModelMergeSimple().merge(graft, tuned, 0.3)[0]
    sample(merged, SD3)
    left = [weakref.ref(member) for member in merged.build_residuals()]
    del merged
    gc.collect()
    comfy.model_management.unload_all_models()
    assert not comfy.model_management.current_loaded_models
    sample(with_lora(graft, loras[1]), SD3)
    assert any(reference() is None for reference in left)  # those of weights that the model has unpatched live on


def test_a_lora_is_extracted_from_a_difference(sd3, loras):  # noqa: F811
    """"Extract and Save Lora" on what ModelSubtract made; the same tensors as on ComfyUI's own model."""
    from comfy_extras.nodes_lora_extract import LORAType, calc_lora_model

    files = []
    for model in sd3:
        difference = ModelSubtract().merge(with_lora(model, loras[0]), model, 1.0)[0]
        arguments = (difference, 8, "diffusion_model.", "diffusion_model.", {}, LORAType.FULL_DIFF)
        files.append(calc_lora_model(*arguments, bias_diff=True))
    ours, theirs = files
    changed = {k.replace(".lora_A.weight", ".diff") for k in loras[0] if k.endswith("lora_A.weight")}
    assert changed <= ours.keys() == theirs.keys()
    for key in changed:
        assert distance(ours[key].float(), theirs[key].float()) < 1e-3, key  # the file is in fp16


def _repaired(shape: tuple[int, ...]) -> dict[str, object]:
    """Adapters that we take and the host leaves out or misreads."""
    g = torch.Generator().manual_seed(0)
    up, down = (0.1 * torch.randn(*size, generator=g) for size in ((shape[0], 4), (4, shape[1])))
    magnitude = 0.5 + torch.rand(shape[0], generator=g)
    # on a square weight nobody could tell
    transposed = {"transposed": ("lora", (up.t(), down.t(), None, None, None, None))} if shape[0] != shape[1] else {}
    return transposed | {
        "alpha for each rank": ("lora", (up, down, torch.tensor([1.0, 2.0, 3.0, 4.0]), None, None, None)),
        "PEFT's magnitudes": ("lora", (up, down, 4.0, None, magnitude, None)),
    }


@pytest.mark.parametrize("place", ["x_block.attn.proj", "x_block.mlp.fc1"])
def test_what_the_host_could_not_merge_is_shown_as_it_runs(sd3, place):  # noqa: F811
    graft, _ = sd3
    name = f"diffusion_model.joint_blocks.0.{place}"
    layer, key = graft.graft.layers[name], f"{name}.weight"
    base = layer.dequantized()
    for what, value in _repaired(tuple(layer.logical_shape)).items():
        model = graft.clone()
        assert model.add_patches({key: value}, 0.5) == [key], what
        ones = torch.eye(base.shape[1])
        with model.grafted(torch.device("cpu")):
            runs = (layer(ones) - layer.bias).t() - base
        assert runs.norm() > 0.01 * base.norm()
        assert distance(model.merged(key, layer) - base, runs) < 1e-4, what
        (weight, convert), *patches = model.get_key_patches()[key]
        shown = comfy.lora.calculate_weight(patches, convert(weight.to(torch.float32, copy=True)), key)
        assert distance(shown - base, runs) < 1e-4, what
        saved = model.merged_state_dict(torch.float32)[key.removeprefix("diffusion_model.")]
        assert distance(saved - base, runs) < 1e-4, what


def test_nodes_that_only_scale_weights(pack, tmp_path):
    """Attention multipliers add nothing, `(None,)`, at strength 0, and scale by strength_model."""
    from comfy_extras.nodes_attention_multiply import UNetSelfAttentionMultiply

    with both_models(pack, ARCHITECTURES["sd15"], "Q8_0", tmp_path) as (architecture, graft, dense):
        scaled = []
        for model in (graft, dense):
            result = _outputs(UNetSelfAttentionMultiply, model=model, q=1.5, k=1.2, v=0.8, out=0.7)
            assert not getattr(result, "rejected", None)
            scaled.append(sample(result, architecture))
        base = sample(dense, architecture)
        assert distance(scaled[1], base) > 0.01
        assert distance(scaled[0] - sample(graft, architecture), scaled[1] - base) < 1e-4


def _outputs(node: type, **inputs: object) -> object:
    """A node's first output, in the older and the newer form of nodes."""
    if hasattr(node, "execute"):
        return node.execute(**inputs).result[0]
    return getattr(node(), node.FUNCTION)(**inputs)[0]


def test_a_bias_for_a_layer_without_one_is_left_out_everywhere(pack, tmp_path):
    """As the host leaves it out; but it says so."""
    with both_models(pack, ARCHITECTURES["sd15"], "Q8_0", tmp_path) as (architecture, graft, dense):
        name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
        rows, columns = graft.graft.layers[name].logical_shape
        random = torch.Generator().manual_seed(0)
        lora = {f"{name}.lora_A.weight": torch.randn(4, columns, generator=random) * 0.05}
        lora[f"{name}.lora_B.weight"] = torch.randn(rows, 4, generator=random) * 0.05
        lora[f"{name}.diff_b"] = torch.randn(rows, generator=random)
        branch = with_lora(graft, lora)
        assert branch.rejected == {f"{name}.bias": "it adds a bias to a layer that has none in this model"}
        assert distance(sample(branch, architecture), sample(with_lora(dense, lora), architecture)) < TOLERANCE
        assert f"{name}.bias" not in branch.get_key_patches()
        saved = branch.merged_state_dict(prefix="")
        assert f"{name}.weight" in saved and f"{name}.bias" not in saved


def test_each_branch_has_the_precision_that_it_asks_for(sd3, loras):  # noqa: F811
    """Also after a branch with another one has run on the model that they share."""
    from comfy_extras.nodes_model_advanced import ModelComputeDtype

    graft, dense = sd3
    lora = {k: v.float() for k, v in loras[0].items()}
    want = sample(with_lora(dense, lora), SD3) - sample(dense, SD3)
    ours = sample(graft, SD3)
    low = ModelComputeDtype().patch(with_lora(graft, lora), "bf16")[0]
    assert 1e-3 < distance(sample(low, SD3), ours + want) < 0.1
    assert distance(sample(with_lora(graft, lora), SD3) - ours, want) < 1e-4
    high = ModelComputeDtype().patch(low, "fp32")[0]
    assert distance(sample(high, SD3) - ours, want) < 1e-4


def test_the_hosts_own_patches_are_saved(sd3, loras):  # noqa: F811
    """A norm's difference is not ours; it has to be in the file whether the host has applied it yet or not."""
    graft, _ = sd3
    keys = graft.model.state_dict()
    key = next(k for k in keys if graft.graft.layer_of(k) is None and keys[k].is_floating_point())
    tuned = graft.clone()
    tuned.add_patches({key: ("diff", (torch.full_like(keys[key], 0.5),))}, 0.5)
    before = keys[key].clone()
    for _ in range(2):
        saved = tuned.merged_state_dict()[key.removeprefix("diffusion_model.")]
        assert torch.allclose(saved.float(), before.float() + 0.25, atol=1e-3)
        sample(tuned, SD3)  # now the host has applied it
    sample(graft, SD3)
    assert torch.equal(graft.model.state_dict()[key], before)


def test_what_is_merged_into_integers_is_saved_in_floats(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(architectures, "encode", lambda rows, kind: np.round(100 * rows).astype(np.int8))
    path = architectures.write_model(SD3, "I8", tmp_path / "sd3-I8.gguf")
    graft = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
    name = "joint_blocks.0.x_block.mlp.fc1.weight"
    weight = pack("ops.files.gguf").open_gguf(path).tensors[name]
    assert weight.fmt.name == "I8"
    numbers = pack("ops.packed").as_weight(weight)
    branch = graft.clone()
    branch.add_patches({f"diffusion_model.{name}": ("diff", (torch.full(numbers.shape, 0.25),))}, 0.5)
    saved = branch.merged_state_dict()
    assert all(value.is_floating_point() for value in saved.values())
    assert torch.equal(saved[name], numbers + 0.125)
    assert torch.equal(graft.merged_state_dict()[name].to(torch.int8), numbers)


def test_a_saved_checkpoint_holds_merged_weights(sd3, loras, tmp_path):  # noqa: F811
    graft, dense = sd3
    tuned = with_lora(graft, loras[0], 0.5)
    sample(tuned, SD3)
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), tuned)
    saved = comfy.utils.load_torch_file(str(tmp_path / "saved.safetensors"))
    prefix = "model.diffusion_model."
    weights = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    assert weights.keys() == dense.model.diffusion_model.state_dict().keys()
    assert all(v.is_floating_point() for v in weights.values())
    loaded = comfy.sd.load_diffusion_model_state_dict(weights, model_options={"dtype": torch.float32})
    # packed weights are saved as fp16: 11 bits
    assert distance(sample(loaded, SD3), sample(with_lora(dense, loras[0], 0.5), SD3)) < 2e-3
    assert torch.equal(sample(graft, SD3), sample(graft.clone(), SD3))


def test_a_lora_by_step_is_refused_where_weights_are_read(pack, sd3, stock, loras, tmp_path):  # noqa: F811
    """They would have it in all steps. A model that is merged into keeps it as it is, and what has no LoRA merges."""
    graft = sd3[0]
    strengths = pack("ops.strengths")
    patches = comfy.lora.load_lora(dict(loras[0]), comfy.lora.model_lora_keys_unet(graft.model, {}))
    branch = graft.clone()
    branch.add_patches(patches, 1.0, when=strengths.Strength(strengths.Curve.between(0.0, 0.5)))
    with pytest.raises(Exception, match="by region, step, prompt or block cannot be merged or saved"):
        ModelMergeSimple().merge(stock, branch, 0.5)
    with pytest.raises(Exception, match="take it off, or put it on behind this node"):
        comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), branch)
    assert not list(tmp_path.iterdir())
    merged = ModelMergeSimple().merge(branch, stock, 0.5)[0]
    assert merged.residuals.varies and branch.get_key_patches()
