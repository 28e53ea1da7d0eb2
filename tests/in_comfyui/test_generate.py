"""The main job: load a GGUF model, graft LoRAs, sample; held to ComfyUI on the dequantized weights."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, NARROW
from generation import both_models, distance, fingerprint, sample, with_lora
from loras import DIALECTS, make_lora, targets

BASE_TOLERANCE = 1e-5  # fp32 sums in another order: some 1e-7 a layer
EFFECT_TOLERANCE = 1e-4  # the same, over an effect that is a tenth of the output

TYPES = ("Q8_0", "Q4_K", "IQ4_XS")
FLUX = ARCHITECTURES["flux"]
CASES = {f"{a.name}-{t}": (a, t) for a in NARROW.values() for t in TYPES} | {"flux-3072-Q4_K": (FLUX, "Q4_K")}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def pair(request, pack, tmp_path_factory):
    """A Graft model and ComfyUI's own of the same file."""
    with both_models(pack, *request.param, tmp_path_factory.mktemp("gguf")) as (architecture, graft, dense):
        yield architecture, graft, dense, sample(dense, architecture)


def test_every_kind_of_layer_is_packed(pair):
    _, graft, _, _ = pair
    layers = graft.graft.layers.values()
    assert any(layer.fmt.is_quantized for layer in layers)
    assert all(layer.weight.dtype == torch.uint8 for layer in layers if layer.fmt.is_quantized)


def test_base_and_loras_as_comfyui_has_them(pair):
    architecture, graft, dense, base = pair
    before = fingerprint(graft)
    ours = sample(graft, architecture)
    assert distance(ours, base) < BASE_TOLERANCE
    shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
    tried = []
    for seed, dialect in enumerate(DIALECTS):
        if not targets(dense.model, dialect, architecture.lora_layers):
            continue
        if architecture is FLUX and dialect != "diffusers":
            continue  # 480 M weights to merge: the dialect with row slices only
        lora = make_lora(dense.model, shapes, dialect, architecture.lora_layers, seed=seed)
        assert lora, dialect
        want = sample(with_lora(dense, lora, 0.8), architecture) - base
        got = sample(with_lora(graft, lora, 0.8), architecture) - ours
        assert want.norm() > 0.01 * base.norm(), f"{dialect}: the LoRA has no effect to compare"
        assert distance(got, want) < EFFECT_TOLERANCE, dialect
        tried.append(dialect)
    assert "native" in tried or tried == ["diffusers"]
    assert torch.equal(sample(graft, architecture), ours), "the base is not what it was before the LoRAs"
    assert fingerprint(graft) == before
