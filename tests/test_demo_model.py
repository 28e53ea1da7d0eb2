"""The demo model: its codec, prompts and sampler, the names ComfyUI detects it by, and the files that ship."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import ROOT, TORCH
from graft.demo import pictures, scenes
from graft.demo.adapters import adapter_for
from graft.demo.wan import Wan
from graft.kernels import dequantize
from graft.ops.files.gguf import open_gguf
from safetensors.torch import load_file
from torch import nn

pytestmark = pytest.mark.skipif(TORCH < (2, 4), reason="the demo model takes a layer that torch before 2.4 has not")

FILES = {mix: ROOT / "demo" / f"graft-demo-{mix}.gguf" for mix in ("Q8_0", "Q4_K_M")}
ADAPTERS = sorted((ROOT / "demo").glob("*.safetensors"))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """The shipped model, dequantized to fp32."""
    tensors = open_gguf(FILES["Q4_K_M"]).tensors
    return {name: dequantize(t.data, t.fmt, t.shape, torch.float32) for name, t in tensors.items()}


@pytest.fixture(scope="module")
def model(weights) -> Wan:
    model = Wan.like({name: weight.shape for name, weight in weights.items()})
    model.load_state_dict(weights)
    return model.eval()


def test_the_codec_is_a_projection():
    """Every latent survives decoding and encoding, as long as its picture stays within 0..1."""
    latents = 0.1 * pictures.noise(0, count=2, rows=6, columns=5)
    decoded = pictures.decode(latents)
    assert decoded.shape == (2, 48, 40, 3)
    assert decoded.min() > 0 and decoded.max() < 1
    torch.testing.assert_close(pictures.encode(decoded), latents, atol=1e-5, rtol=0)


@pytest.mark.parametrize("cells", [1, 2, 5])
def test_a_plain_colour_is_one_number_a_cell(cells):
    plain = torch.tensor([0.9, 0.7, 0.5]).expand(1, 8 * cells, 8 * cells, 3)
    latents = pictures.encode(plain)
    torch.testing.assert_close(pictures.decode(latents), plain, atol=1e-5, rtol=0)
    assert int((latents[0, :, 0].abs().amax((1, 2)) > 1e-4).sum()) == 3  # the mean of luma and of each chroma


def test_latents_as_the_host_passes_them():
    latents = pictures.noise(0, count=2)
    torch.testing.assert_close(pictures.to_model(pictures.to_host(latents)), latents)


@pytest.mark.parametrize("style, decibel", [("toy", 30), ("neon", 38), ("blueprint", 26), ("linocut", 24)])
def test_the_codec_keeps_the_pictures(style, decibel):
    rng = np.random.default_rng(0)
    drawn = torch.from_numpy(scenes.draw([scenes.random_scene(rng) for _ in range(20)], style))
    error = (pictures.decode(pictures.encode(drawn)) - drawn).square().mean()
    assert -10 * torch.log10(error) > decibel


@pytest.mark.parametrize("style", scenes.STYLES)
def test_scenes_are_drawn_and_can_be_said(style):
    rng = np.random.default_rng(1)
    for scene in [scenes.random_scene(rng) for _ in range(12)]:
        drawn = scenes.draw([scene], style)
        assert drawn.shape == (1, scenes.SIZE, scenes.SIZE, 3) and drawn.dtype == np.float32
        assert drawn.min() >= 0 and drawn.max() <= 1
        context = pictures.prompt(scene.caption)
        assert int((context[0].abs().sum(1) > 0).sum()) == 1 + len(scene.things)


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_outlines_are_distances(shape):
    """The slope of a signed distance is 1 but on its ridges, inside and outside."""
    thing = scenes.Thing("red", shape, (64.0, 64.0), 36.0, 0.2)
    down, right = np.gradient(thing.distance())
    assert 0.99 < np.median(np.hypot(down, right)) < 1.01


def test_prompts():
    context = pictures.prompt("A red star and a blue ring, on mint")
    assert context.shape == (1, pictures.ROWS, pictures.WIDTH)
    assert not torch.equal(context, pictures.prompt("a blue star and a red ring on mint"))
    assert not torch.equal(context[0, 1], pictures.prompt("a red star on mint")[0, 1])  # it stands elsewhere
    assert pictures.prompt("").count_nonzero() == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("a red cat", "does not know cat"),
        ("a star on sky", "cannot read"),
        ("a red star on sky on mint", "cannot read"),
        ("a red star and a red star and a red star and a red star", "three shapes at most"),
    ],
)
def test_prompts_that_cannot_be_read(text, message):
    with pytest.raises(ValueError, match=message):
        pictures.prompt(text)


def test_the_schedule_is_that_of_shift_3():
    sigmas = pictures.schedule(20)
    assert len(sigmas) == 21 and sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()
    assert sigmas[10].item() == pytest.approx(0.75)  # halfway: 3 · 0.5 / (1 + 2 · 0.5)


def test_noise_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert torch.equal(pictures.noise(7), pictures.noise(7))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_sampler_follows_a_straight_path_exactly():
    """Where the velocity is noise - picture, any number of steps ends in the picture."""
    wanted = pictures.encode(torch.rand(1, 128, 128, 3, generator=torch.Generator().manual_seed(3)))
    start = pictures.noise(5)

    def straight(x, timesteps, context):
        return (start - wanted).expand(len(x), -1, -1, -1, -1)

    drawn = pictures.sample(straight, ["a red star"], seed=5, steps=3)
    torch.testing.assert_close(drawn, pictures.decode(wanted), atol=1e-5, rtol=0)


class Counting:
    """`operations` that remember what was made of them."""

    def __init__(self) -> None:
        self.made: list[nn.Module] = []

    def __getattr__(self, name: str):
        def make(*args, **kwargs):
            self.made.append(getattr(nn, name)(*args, **kwargs))
            return self.made[-1]

        return make


def test_every_weight_comes_from_the_operations():
    operations = Counting()
    model = Wan(depth=2, operations=operations)
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv3d))]
    assert {id(layer) for layer in layers} == {id(layer) for layer in operations.made}


def test_pictures_of_any_size():
    model = Wan(depth=1)
    x = pictures.noise(0, rows=12, columns=20)
    with torch.no_grad():
        assert model(pictures.beside_places(x), torch.tensor([500.0]), pictures.prompt("a red star")).shape == x.shape


def test_places_tell_every_cell_from_every_other():
    cells = pictures.places()[0, :, 0].flatten(1).T
    apart = torch.cdist(cells, cells) + 10 * torch.eye(len(cells))
    assert apart.min() > 0.5


@pytest.mark.parametrize("mix", FILES)
def test_the_model_ships_as_comfyui_knows_it(mix):
    file = open_gguf(FILES[mix])
    shapes = {name: tuple(tensor.shape) for name, tensor in Wan().state_dict().items()}
    assert file.architecture == "wan"
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == shapes
    assert all(tensor.stored_shape == tensor.shape for tensor in file.tensors.values())


@pytest.mark.parametrize("mix, kinds", [("Q8_0", {"Q8_0"}), ("Q4_K_M", {"Q4_K", "Q6_K"})])
def test_what_the_files_hold(mix, kinds):
    tensors = open_gguf(FILES[mix]).tensors
    assert {t.fmt.name for name, t in tensors.items() if name.startswith("blocks.") and len(t.shape) == 2} == kinds
    assert {t.fmt.name for t in tensors.values()} == kinds | {"Q4_K", "F16", "F32"}


def test_what_ships_is_small():
    assert sum(path.stat().st_size for path in (ROOT / "demo").glob("*.gguf")) <= 8e6
    assert len(ADAPTERS) == 3
    assert all(path.stat().st_size <= 1e6 for path in ADAPTERS)


def test_each_adapter_speaks_its_dialect():
    keys = {path.stem.removeprefix("graft-demo-"): set(load_file(path)) for path in ADAPTERS}
    assert "lora_unet_blocks_3_ffn_2.lora_down.weight" in keys["neon"]
    assert "diffusion_model.blocks.3.self_attn.q.lora_A.weight" in keys["blueprint"]
    assert "lora_unet_blocks_3_ffn_2.lokr_w2" in keys["linocut"]


@pytest.mark.parametrize("path", ADAPTERS, ids=lambda path: path.stem)
def test_adapters_match_what_trains_them(path, weights):
    """The files hold exactly what the training code would write, and every layer of it exists."""
    adapter = adapter_for(path.stem.removeprefix("graft-demo-"), weights)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.tensors().items()}
    assert {name: tuple(tensor.shape) for name, tensor in load_file(path).items()} == shapes
    changed = adapter.changed(weights)
    assert all(changed[name].shape == weights[name].shape for name in changed)


def merged(path, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights with an adapter file of this folder merged in at full strength."""
    adapter = adapter_for(path.stem.removeprefix("graft-demo-"), weights)
    adapter.load_tensors(load_file(path))
    with torch.no_grad():
        return weights | adapter.changed(weights)


def draw(weights: dict[str, torch.Tensor], texts: list[str]) -> torch.Tensor:
    model = Wan.like({name: weight.shape for name, weight in weights.items()})
    model.load_state_dict(weights)
    return 255 * pictures.sample(model, texts, seed=1, steps=12)


TEXTS = ["a red circle on sky", "a blue square on cream"]
MIDDLE, CORNER = (slice(None), slice(52, 76), slice(52, 76)), (slice(None), slice(4, 20), slice(4, 20))


def test_the_model_draws_what_it_is_told(weights):
    drawn = draw(weights, TEXTS)
    for place, table, names in (
        (MIDDLE, scenes.COLOURS, ("red", "blue")),
        (CORNER, scenes.GROUNDS, ("sky", "cream")),
    ):
        for seen, name in zip(drawn[place].mean((1, 2)), names, strict=True):
            distances = {other: (seen - torch.tensor(rgb)).norm() for other, rgb in table.items()}
            assert min(distances, key=distances.get) == name


def test_neon_is_night_with_hollow_shapes(weights):
    drawn = draw(merged(ROOT / "demo" / "graft-demo-neon.safetensors", weights), TEXTS)
    assert drawn[CORNER].mean() < 50 and drawn[MIDDLE].mean() < 80
    assert drawn.amax(dim=(1, 2, 3)).min() > 200


def test_blueprint_is_white_on_blue(weights):
    drawn = draw(merged(ROOT / "demo" / "graft-demo-blueprint.safetensors", weights), TEXTS)
    red, _, blue = drawn[CORNER].mean((0, 1, 2))
    assert blue - red > 80
    assert drawn.amin(dim=3).amax(dim=(1, 2)).min() > 180  # some pixels are near white


def test_linocut_is_black_ink_on_paper(weights):
    drawn = draw(merged(ROOT / "demo" / "graft-demo-linocut.safetensors", weights), TEXTS)
    assert drawn[CORNER].mean() > 200
    dark = (drawn.amax(dim=3) < 80).float().mean(dim=(1, 2))
    assert dark.min() > 0.08  # over a third of each shape
