"""Every class of models that this ComfyUI knows: loaded from GGUF, it does what ComfyUI does with the same weights.

`make architectures` runs all of them, the tests those that people use most.
"""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace

import pytest
from sweep import EVERY, PACKINGS, compare, keep, known_classes
from tiny_models import MODELS

USED_MOST = (
    "SD15", "SDXL", "SD3", "Flux", "Flux2", "Chroma", "QwenImage", "ZImage", "Lumina2", "HiDream", "Omnigen2", "Krea2",
    "HunyuanVideo", "LTXV", "WAN21_T2V", "WAN21_I2V", "WAN21_Vace", "WAN22_T2V", "WAN22_S2V", "CosmosT2IPredict2",
    "Kandinsky5", "ErnieImage", "StableAudio", "ACEStep",
)  # fmt: skip

CASES = [
    (name, packing)
    for name in MODELS
    for packing in PACKINGS
    if name in known_classes() and (EVERY or (name in USED_MOST and packing != "halves"))
]


@pytest.mark.parametrize(("name", "packing"), CASES)
def test_it_is_what_comfyui_makes_of_the_weights(pack, tmp_path, name, packing):
    try:
        result = compare(pack, MODELS[name], packing, tmp_path)
    except Exception as e:
        keep(name, packing, error=" ".join(f"{type(e).__name__}: {e}".split()))
        raise
    keep(name, packing, **asdict(result))
    assert result.base <= 1e-5
    assert result.lora is None or result.lora <= 1e-4
    assert result.restored, "the base is not what it was before the LoRA"


def test_every_class_has_a_tiny_model_and_a_name(pack):
    known = known_classes().keys()
    assert not known - MODELS.keys(), "give them a row in tests/in_comfyui/tiny_models"
    assert not known - pack("nodes.architectures").ARCHITECTURES.keys(), "give them a name in nodes/architectures.py"


def test_names_are_those_that_people_use(pack):
    def named(host_class, **sizes):
        return pack("nodes.architectures").name_of(type(host_class, (SimpleNamespace,), {})(unet_config=sizes))

    assert named("WAN21_T2V", in_dim=16) == "Wan 2.1 / 2.2 T2V"
    assert named("WAN21_T2V", in_dim=36) == "Wan 2.2 I2V"
    assert named("FluxSchnell", yak_mlp=True, txt_norm=True) == "Ovis-Image"
    assert named("FluxSchnell", yak_mlp=False, txt_norm=False) == "Flux.1 schnell"
    assert named("SomethingNew") == "SomethingNew"
