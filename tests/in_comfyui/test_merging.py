"""What other nodes read from a Graft MODEL: weights, never packed bytes."""

from __future__ import annotations

import comfy.sd
import comfy.utils
import torch
from comfy_extras.nodes_model_merging import ModelAdd, ModelMergeSimple, ModelSubtract
from generation import distance, fingerprint, sample, with_lora
from small import SD3, loras, sd3  # noqa: F401  (fixtures)

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


def test_merges_in_both_directions(sd3, loras):  # noqa: F811
    graft, dense = sd3
    other_graft, other_dense = with_lora(graft, loras[0]), with_lora(dense, loras[0])
    before = fingerprint(graft)
    merge = ModelMergeSimple().merge
    want = sample(merge(dense, other_dense, 0.3)[0], SD3)
    assert distance(sample(merge(graft, other_graft, 0.3)[0], SD3), want) < TOLERANCE
    assert distance(sample(merge(dense, other_graft, 0.3)[0], SD3), want) < TOLERANCE
    assert distance(sample(merge(graft, other_dense, 0.3)[0], SD3), want) < TOLERANCE
    assert fingerprint(graft) == before


def test_add_difference(sd3, loras):  # noqa: F811
    graft, dense = sd3

    def add_difference(model):
        tuned = with_lora(model, loras[1])
        difference = ModelSubtract().merge(tuned, model, 1.0)[0]
        return ModelAdd().merge(model, difference)[0]

    assert distance(sample(add_difference(graft), SD3), sample(add_difference(dense), SD3)) < TOLERANCE


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
