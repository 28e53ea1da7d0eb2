"""Train LoRA (Graft) on tiny models of many architectures: it runs, and keeping less for the way back changes nothing.

`make hosts` takes all of them, the tests a few.
"""

from __future__ import annotations

import inspect
import os

import comfy.sample
import folder_paths
import pytest
import torch
from generation import distance, fingerprint, forget
from sweep import known_classes, output_of, random_noise, sizes_of, write_tiny
from tiny_models import MODELS

EVERY = os.environ.get("GRAFT_EVERY_HOST")
USUAL = ("SD15", "Flux", "ZImage", "WAN21_I2V")
CASES = [
    name for name, tiny in MODELS.items() if name in known_classes() and not tiny.called and (EVERY or name in USUAL)
]


@pytest.fixture(scope="module", autouse=True)
def output(tmp_path_factory):
    """ComfyUI's output, elsewhere."""
    before = folder_paths.get_output_directory()
    folder_paths.set_output_directory(str(tmp_path_factory.mktemp("output")))
    yield
    folder_paths.set_output_directory(before)


def runs_one_conditioning(tiny):
    with sizes_of(tiny) as module:
        return "swap_cfg_halves" in inspect.getsource(type(module).forward)


@pytest.mark.parametrize("name", CASES)
def test_it_trains(pack, tmp_path, name):
    tiny, path = MODELS[name], tmp_path / f"{name}.gguf"
    if not isinstance(tiny.latent[0], int):
        pytest.skip("picture and sound together: the node refuses them")
    if tiny.cfg > 1 and not runs_one_conditioning(tiny):
        pytest.skip("this ComfyUI runs it on both conditionings at once only")
    g = torch.Generator().manual_seed(1)

    def noise(*shape):
        return random_noise(g, *shape)

    try:
        with torch.inference_mode():
            with sizes_of(tiny) as module:
                write_tiny(tiny, module, "weights", path)
                graft = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")
            before, held = output_of(graft, tiny), fingerprint(graft)
            context = None if tiny.context is None else noise(1, *tiny.context)
            latent = comfy.sample.fix_empty_latent_channels(graft, noise(*tiny.latent))
            latent = graft.model.process_latent_out(latent)  # as a VAE's node gives it
            given = {
                "model": [graft], "latents": [{"samples": latent}],
                "positive": [[[context, tiny.brings(noise)]]],
                "steps": [2], "learning_rate": [1e-2], "rank": [2], "layers": ["all"], "filename_prefix": ["loras/x"],
                "trigger_phrase": [""], "seed": [0],
                "optimizer": ["SGD"],  # its steps are as the gradients are, where Adam's make much of their last digits
            }  # fmt: skip
            trained = [
                pack("nodes.train").GraftTrainLora().train(**given, gradient_checkpointing=[saving])["result"][1]
                for saving in (False, True)
            ]
            assert torch.equal(output_of(graft, tiny), before) and fingerprint(graft) == held
        ups = [
            torch.cat([value.flatten() for key, value in sorted(lora.items()) if "lora_up" in key]) for lora in trained
        ]
        assert ups[0].norm() > 0 and distance(ups[1], ups[0]) < 1e-3
    finally:
        graft = None
        forget()
