"""Graft in a running Forge and Forge Neo: images made over the API with toy Flux GGUFs. One server each."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from browser import chromium
from forge import EACH, chosen, named
from forge_churn import Churn, told
from forge_toys import DIALECTS, TYPES, Server, flux_tensors, serving, write_whole
from gguf_samples import write_gguf
from hosts import EVERYTHING
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.host

ALL_LORAS = "<lora:whole:0.7><lora:sliced:-0.6><lora:plain:0.8><lora:text:1.5>"
SOME_LORAS = ("<lora:whole:0.7>", "<lora:whole:0.7><lora:sliced:-0.6>", "<lora:whole:0.5>")
OFF = {"override_settings": {"graft_mode": "off"}}


@pytest.fixture(scope="module", params=EACH, ids=named)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(chosen(request.param), tmp_path_factory.mktemp("forge-server")) as running:
        yield running


@pytest.fixture
def forge_online(server: Server) -> Iterator[None]:
    """Forge's own LoRAs stay on the layers, where it applies them exactly; this is the reference."""
    server.call("/toy/online?on=true", {})
    yield
    server.call("/toy/online?on=false", {})


def apart(a: np.ndarray, b: np.ndarray) -> int:
    """Largest difference of two pictures, in 255ths."""
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize("kind", TYPES)
def test_pixels_are_those_of_forges_online_mode(server: Server, forge_online: None, kind: str) -> None:
    base, _ = server.image(kind)
    digests, before = server.call("/toy/digests"), server.calls()
    got, _ = server.image(kind, f"a toy {ALL_LORAS}")
    during = server.calls()
    some = [server.image(kind, f"a toy {loras}")[0] for loras in SOME_LORAS]
    again, _ = server.image(kind)
    assert np.array_equal(again, base)  # the LoRAs are gone without a trace
    assert server.call("/toy/digests") == digests and len(digests) == 26 + 14 + server.host.is_neo  # its embeddings
    # 11 layers of the transformer in each of two steps, 4 of the T5 once
    assert during["residual"] - before.get("residual", 0) == 2 * 11 + 4 and "exact" not in during
    theirs, infotext = server.image(kind, **OFF)
    assert "Graft: off" in infotext and apart(base, theirs) <= 1
    theirs, _ = server.image(kind, f"a toy {ALL_LORAS}", **OFF)
    assert apart(got, base) > 8 and apart(got, theirs) <= 1
    for loras, picture in zip(SOME_LORAS, some, strict=True):
        theirs, _ = server.image(kind, f"a toy {loras}", **OFF)
        assert apart(picture, base) > 4 and apart(picture, theirs) <= 1, loras


def test_loras_are_reported_with_their_layers(server: Server) -> None:
    server.image("Q4_K", f"a toy {ALL_LORAS}")
    status = server.status()
    assert status["active"] and status["facts"]["Checkpoint"] == "toy-Q4_K.gguf"
    unet, text = status["parts"]
    assert unet["types"] == {"Q4_K": 26, "F16": 6, "F32": 4} and unet["architecture"] == "FluxTransformer2DModel"
    # Neo has layers for packed embeddings
    assert text["types"] == ({"Q8_0": 15, "F32": 1} if server.host.is_neo else {"Q8_0": 14})
    assert not unet["refused"] and not text["refused"]
    found = {(lora["name"], lora["part"]): (lora["residual"], lora["layers"]) for lora in status["loras"]}
    assert found == {
        ("whole", "Diffusion model"): (8, 8), ("sliced", "Diffusion model"): (4, 4),
        ("plain", "Diffusion model"): (4, 4), ("text", "Text encoders"): (4, 4),
    }  # fmt: skip


def test_every_dialect_reaches_its_layers(server: Server) -> None:
    base, _ = server.image("Q4_K")
    pictures = {dialect: server.image("Q4_K", f"a toy <lora:{dialect}:1>")[0] for dialect in DIALECTS}
    (lora,) = server.status()["loras"]
    assert (lora["matched"], lora["total"], lora["residual"], lora["note"]) == (4, 4, 4, "")
    assert apart(pictures["native"], base) > 4
    for dialect, picture in pictures.items():
        assert np.array_equal(picture, pictures["native"]), dialect


def test_a_lora_of_another_model_is_named(server: Server) -> None:
    base, _ = server.image("Q4_K")
    picture, _ = server.image("Q4_K", "a toy <lora:sdxl:1><lora:whole:0>")
    whole, sdxl = sorted(server.status()["loras"], key=lambda lora: -lora["matched"])
    assert (whole["name"], whole["matched"], whole["total"]) == ("whole", 8, 8)
    assert (sdxl["name"], sdxl["matched"], sdxl["total"]) == ("sdxl", 0, 1)
    assert "model is Flux (0 of 1 layers match)" in sdxl["note"] and np.array_equal(picture, base)


def test_loras_come_and_go(server: Server) -> None:
    prompts = ("a toy <lora:whole:1>", "a toy <lora:sliced:1>", "a toy", "a toy <lora:whole:1>", "a toy <lora:whole:0>")
    a, b, none, again, zero = (server.image("Q4_0", prompt)[0] for prompt in prompts)
    assert np.array_equal(a, again) and np.array_equal(none, zero)
    assert min(apart(a, b), apart(a, none), apart(b, none)) > 4


def test_a_new_strength_patches_nothing(server: Server, forge_online: None) -> None:
    server.image("Q6_K", "a toy <lora:whole:1>")
    digests = server.call("/toy/digests")
    got, _ = server.image("Q6_K", "a toy <lora:whole:0.37>")
    assert server.call("/toy/digests") == digests
    theirs, _ = server.image("Q6_K", "a toy <lora:whole:0.37>", **OFF)
    assert apart(got, theirs) <= 1


HIRES = {
    "enable_hr": True, "hr_scale": 2, "hr_second_pass_steps": 1, "denoising_strength": 0.6,
    "hr_additional_modules": ["Use same choices"],
}  # fmt: skip


def test_hires(server: Server, forge_online: None) -> None:
    prompt = f"a toy {ALL_LORAS}"
    fields = {**HIRES, "hr_upscaler": "None" if server.host.is_neo else "Latent"}  # Neo has none for latents
    got, _ = server.image("Q4_K", prompt, **fields)
    theirs, _ = server.image("Q4_K", prompt, **fields, **OFF)
    assert got.shape == (128, 128, 3) and apart(got, theirs) <= 1


def test_a_refiner_takes_over_with_the_loras(server: Server, forge_online: None) -> None:
    prompt, steps = f"a toy {ALL_LORAS}", {"steps": 4}
    at = 0.9 if server.host.is_neo else 0.5  # there it is a sigma, here a share of the steps
    switched = {**steps, "refiner_checkpoint": "toy-Q8_0.gguf", "refiner_switch_at": at}
    alone = [server.image(kind, prompt, **steps)[0] for kind in ("Q4_0", "Q8_0")]
    got, infotext = server.image("Q4_0", prompt, **switched)
    assert "Refiner: toy-Q8_0" in infotext and min(apart(got, picture) for picture in alone) > 1
    assert np.array_equal(server.image("Q4_0", prompt, **steps)[0], alone[0])
    theirs, _ = server.image("Q4_0", prompt, **switched, **OFF)
    assert apart(got, theirs) <= 1


def test_img2img_and_batches(server: Server, forge_online: None) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(picture, "PNG")
    encoded = base64.b64encode(picture.getvalue()).decode()
    fields = {"init_images": [encoded], "denoising_strength": 0.7, "batch_size": 2}
    got, _ = server.image("Q8_0", f"a toy {ALL_LORAS}", "img2img", **fields)
    theirs, _ = server.image("Q8_0", f"a toy {ALL_LORAS}", "img2img", **fields, **OFF)
    base, _ = server.image("Q8_0", "a toy", "img2img", **fields)
    assert apart(got, theirs) <= 1 and apart(got, base) > 4


def test_a_lora_in_gguf_is_one_of_safetensors(server: Server, forge_online: None) -> None:
    """Forge lists it, and draws with it what its numbers are, with Graft on and off."""
    assert {"packed", "decoded", "whole"} <= {lora["name"] for lora in server.call("/sdapi/v1/loras")}
    base, _ = server.image("Q4_K")
    got, want = (server.image("Q4_K", f"a toy <lora:{name}:0.7>")[0] for name in ("packed", "decoded"))
    assert apart(want, base) > 4 and np.array_equal(got, want)
    server.image("Q4_K", "a toy <lora:packed:0.7>")
    (lora,) = server.status()["loras"]
    assert (lora["name"], lora["matched"], lora["total"], lora["residual"]) == ("packed", 4, 4, 4)
    got, want = (server.image("Q4_K", f"a toy <lora:{name}:0.7>", **OFF)[0] for name in ("packed", "decoded"))
    assert apart(want, base) > 4 and np.array_equal(got, want)


def test_a_damaged_lora_in_gguf_is_left_out_and_named(server: Server) -> None:
    want, _ = server.image("Q4_K", "a toy <lora:whole:0.7>")
    for _ in range(2):  # said again with the next picture
        got, _ = server.image("Q4_K", "a toy <lora:damaged:1><lora:whole:0.7>")
        (note,) = server.status()["notes"]
        assert np.array_equal(got, want) and note.startswith("damaged.gguf is left out: ")


def test_controlnets_in_gguf_are_not_listed(server: Server) -> None:
    """As docs/parts.md says; those of safetensors are."""
    listed = [name.partition(" [")[0] for name in server.call("/controlnet/model_list")["model_list"]]
    assert "plain" in listed and "packed" not in listed


SAVED = {"Q8_0": ("Q8_0",), "Q4_K_M": ("Q4_K_M",), "baked": ("Q8_0", "whole", 0.7)}
"""What is made of the toy: a type, and the LoRA that is merged in."""


@pytest.fixture(scope="module")
def saved(server: Server, make_gguf: Callable[[Sequence[str]], int]) -> None:
    """The toy as our command makes GGUF of it, and as gguf-py's writer does of the same tensors in the same types."""
    checkpoints, loras = (server.folder / "models" / name for name in ("Stable-diffusion", "Lora"))
    plain = {name: array for name, (array, _) in flux_tensors("F32").items()}
    source = server.folder / "toy.safetensors"
    save_file({name: torch.from_numpy(array) for name, array in plain.items()}, source)
    for name, (kind, *lora) in SAVED.items():
        path, weights = checkpoints / f"toy-saved-{name}.gguf", dict(plain)
        options = ["--lora", f"{loras / lora[0]}.safetensors:{lora[1]}"] if lora else []
        assert make_gguf([str(source), str(path), "--type", kind, *options]) == 0
        if lora:
            factors = {name: array.numpy() for name, array in load_file(loras / f"{lora[0]}.safetensors").items()}
            for layer in [name.removesuffix(".weight") for name in plain if name.endswith(".weight")]:
                module = f"lora_unet_{layer.replace('.', '_')}"
                if f"{module}.alpha" in factors:  # which is the rank
                    change = factors[f"{module}.lora_up.weight"] @ factors[f"{module}.lora_down.weight"]
                    weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + np.float32(lora[1]) * change
        types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
        assert types.keys() == plain.keys()
        write_gguf(checkpoints / f"toy-written-{name}.gguf", {key: (weights[key], types[key]) for key in types})
    server.call("/sdapi/v1/refresh-checkpoints", {})


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_file_draws_the_same_picture(server: Server, saved: None, name: str) -> None:
    """In Forge's own layers, too, with Graft off."""
    for off in ({}, OFF):
        got, want = (server.image(f"{kind}-{name}", **off)[0] for kind in ("saved", "written"))
        assert got.std() > 8 and apart(got, want) <= (name == "baked")  # where a sum may round to another code


def test_a_lora_baked_into_a_saved_file_is_one_beside_it(server: Server, saved: None) -> None:
    base, beside = (server.image("saved-Q8_0", f"a toy{lora}")[0] for lora in ("", " <lora:whole:0.7>"))
    baked = server.image("saved-baked")[0].astype(float)
    # Q8_0 rounds by up to a half of 1/127 of the largest of 32 weights, which is two times their size on average: each
    # file by 2 / 127 / sqrt(12) of a layer's output, which 11 layers in each of two steps add up as noise does. Both
    # pictures are rounded to whole levels
    noise = 2 / 127 / 12**0.5 * (2 * 11 * 2) ** 0.5 * baked.std() + (2 / 12) ** 0.5
    effect = float(np.sqrt(np.mean((beside - base.astype(float)) ** 2)))
    assert float(np.sqrt(np.mean((baked - beside) ** 2))) < noise < effect


def test_a_whole_checkpoint_in_gguf_draws_what_its_parts_draw(server: Server) -> None:
    """Its VAE is in F16: rows of three, as convolutions have them, fill no blocks."""
    write_whole(server.folder / "models", "Q4_K")
    server.call("/sdapi/v1/refresh-checkpoints", {})
    alone = {"override_settings": {"forge_additional_modules": []}}
    pictures = []
    for prompt in ("a toy", "a toy <lora:whole:0.7><lora:text:1.5>"):
        got, want = server.image("whole", prompt, **alone)[0], server.image("Q4_K", prompt)[0]
        assert apart(got, want) <= 1
        pictures.append(want)
    assert apart(*pictures) > 8


def test_a_lora_works_in_its_region_and_in_its_steps(server: Server) -> None:
    def image(arguments: str, **fields: Any) -> np.ndarray:
        return server.image("Q4_K", f"a toy <lora:whole:1{arguments}>", **fields)[0]

    base, full = server.image("Q4_K")[0], image("")
    assert np.array_equal(image(":start=0:end=1"), full)
    assert np.array_equal(image(":start=0.75"), base)  # of two steps the second begins at a half
    first, second = image(":end=0.5"), image(":start=0.5")
    left, picture_text = server.image("Q4_K", "a toy <lora:whole:1:region=left>")
    weighed = image(":blocks=double=0.5, single=0")
    shown = [base, full, first, second, left, weighed]
    assert all(apart(a, b) > 0 for i, a in enumerate(shown) for b in shown[:i])
    assert "<lora:whole:1:region=left>" in picture_text
    server.image("Q4_K", "a toy <lora:whole:1:region=left><lora:whole:1:region=0.5,0,1,1:feather=0.2>")
    loras = [(lora["name"], lora["when"], lora["residual"]) for lora in server.status()["loras"]]
    assert loras == [("whole", "region=left", 8), ("whole", "feather=0.2:region=0.5,0,1,1", 8)]
    assert not server.status()["notes"]

    # twice the size in the second pass, and its steps begin anew
    hires = {**HIRES, "hr_upscaler": "None" if server.host.is_neo else "Latent"}
    assert apart(image(":region=left:end=0.5", **hires), image(":region=right:end=0.5", **hires)) > 2


def test_arguments_that_cannot_be_are_named_under_the_picture(server: Server, forge_online: None) -> None:
    base, _ = server.image("Q4_K")
    wrong, _ = server.image("Q4_K", "a toy <lora:whole:1:region=lef>")
    (note,) = server.status()["notes"]
    assert np.array_equal(wrong, base)
    assert note.startswith("whole is left out: region=lef is unknown: write one of left")
    off, _ = server.image("Q4_K", "a toy <lora:whole:1:blocks=single=0, double=0>", **OFF)
    assert server.status()["notes"] == ["whole runs without blocks=single=0, double=0: Graft is off"]
    assert np.array_equal(off, server.image("Q4_K", "a toy <lora:whole:1>", **OFF)[0])
    server.image("Q4_K", "a toy <lora:whole:1:blocks=doubel=0>")
    assert server.status()["notes"] == ["whole: no block of this model is called doubel"]
    server.image("Q4_K")
    assert not server.status()["notes"]


PICTURES = int(os.environ.get("GRAFT_CHURN", 6))
LEAK = 10.0
"""MB. The factors of one LoRA are 0.4, the transformer of one of the toys is 4 to 7, and all of one 180."""


def churned(server: Server) -> Churn:
    churn = Churn(server, seed=1)
    churn.run(PICTURES, each=max(3, PICTURES // 25))
    print("\n", server.host.name, "" if server.has_graft else "without Graft", told(churn))
    return churn


def test_churn(server: Server, forge_online: None) -> None:
    """Random pictures leave nothing behind, no more than in a Forge without Graft; GRAFT_CHURN is how many."""
    churn = churned(server)
    if PICTURES < 100:
        return
    with serving(server.host, server.folder.with_name(f"{server.folder.name}-without"), graft=False) as other:
        other.call("/toy/online?on=true", {})
        without = churned(other)
    # the second half against the first, in which all files, sizes and types have come up
    for ours, theirs in ((churn.used, without.used), (churn.resident, without.resident)):
        growth, usual = (max(sizes[len(sizes) // 2 :]) - max(sizes[: len(sizes) // 2]) for sizes in (ours, theirs))
        assert growth - usual < LEAK, (ours, theirs)


def test_settings_travel_in_the_infotext(server: Server) -> None:
    _, infotext = server.image("Q8_0")
    assert "Graft: auto" in infotext and "Graft dtype" not in infotext
    chosen = {"graft_mode": "on", "graft_dtype": "bf16", "graft_backend": "torch"}
    got, infotext = server.image("Q8_0", "a toy <lora:whole:1>", override_settings=chosen)
    assert re.search("Graft: on, Graft backend: torch, Graft dtype: bf16", infotext)
    assert server.status()["settings"] == {"mode": "auto", "backend": "auto", "dtype": "auto"}
    read = server.call("/toy/overrides", {"infotext": infotext})
    assert {name: value for name, value in read.items() if name.startswith("graft_")} == chosen
    exact, _ = server.image("Q8_0", "a toy <lora:whole:1>")
    assert 0 < apart(got, exact) <= 8  # bf16 shows, and only a little


def test_xyz_plot_has_our_axes(server: Server) -> None:
    script = next(s for s in server.call("/sdapi/v1/script-info") if s["name"] == "x/y/z plot" and not s["is_img2img"])
    arguments = [argument["value"] for argument in script["args"]]
    axes = script["args"][0]["choices"]
    assert {"Graft", "Graft backend", "Graft dtype"} <= set(axes)
    arguments[:3] = [axes.index("Graft"), "", ["auto", "off"]]
    arguments[3:9] = [axes.index("Nothing"), "", [], axes.index("Nothing"), "", []]
    before = server.calls().get("forge", 0)
    server.image("Q8_0", script_name="x/y/z plot", script_args=arguments)
    assert server.calls()["forge"] > before
    server.image("Q8_0")


def test_reloading_the_ui_twice_changes_nothing(server: Server) -> None:
    prompt = f"a toy {ALL_LORAS}"
    first, _ = server.image("Q4_K", prompt)
    start = server.calls()
    second, _ = server.image("Q4_K", prompt + " ")
    once = {path: count - start[path] for path, count in server.calls().items()}
    for _ in range(2):
        server.reload_ui()
        start = server.calls()
        again, _ = server.image("Q4_K", prompt + " ")
        calls = {path: count - start[path] for path, count in server.calls().items()}
        assert np.array_equal(again, second) and server.status()["active"]
        # no layer runs twice; Forge may have kept the text's encoding, or not
        assert calls["residual"] in (once["residual"], once["residual"] - 4) and set(calls) == set(once)
    assert first.shape == second.shape


def test_the_status_asks_for_the_credentials_of_the_api(server: Server) -> None:
    for path in ("/sdapi/v1/options", "/graft/status"):
        with pytest.raises(AssertionError, match=f"{path}: 401 "):
            server.call(path, credentials="toy:wrong")
        assert server.call(path)


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    """A browser with Forge's page open on the tab."""
    if not (EVERYTHING or server.host.is_neo or len(EACH) == 1):
        pytest.skip("`make hosts` opens the page of this Forge, too")
    with chromium() as browser:
        opened = browser.new_page(viewport={"width": 1500, "height": 1000})
        opened.set_default_timeout(60_000)
        opened.goto(server.url)
        opened.get_by_role("tab", name="Graft", exact=True).click()
        yield opened


def test_the_tab_in_a_browser(server: Server, page: Any) -> None:
    server.image("mixed", f"a toy {ALL_LORAS}")
    page.click("#graft_refresh")
    loaded = page.locator("#graft_loaded")
    loaded.get_by_text("IQ3_S 4").wait_for()  # the model of an earlier test has none
    loaded.get_by_text("whole ×0.7").wait_for()
    assert "Graft runs the GGUF layers" in page.inner_text("#graft_status")
    text = loaded.inner_text()
    assert "FluxTransformer2DModel" in text and "Q4_K 5" in text and "IQ3_S 4" in text and "8/8" in text

    page.locator("#graft_mode").get_by_label("off").check()
    page.locator("#graft_status").get_by_text("Graft is off").wait_for()
    assert server.status()["settings"]["mode"] == "off"
    page.locator("#graft_mode").get_by_label("auto").check()
    page.locator("#graft_status").get_by_text("Graft runs").wait_for()

    page.click("#graft_verify_run")
    page.wait_for_selector("#graft_verified .bars")
    rows = page.locator("#graft_verified table tr").all_inner_texts()[1:]
    found = {row.split("\t")[0]: row.split("\t")[2:] for row in rows}
    assert {"Q4_K", "Q4_0", "Q5_0", "Q6_K", "Q8_0", "IQ3_S"} == set(found)
    for kind, (beside, _merged, requantized, kept, *times) in found.items():
        assert float(beside) < 1e-4 and float(times[1]) > 0, kind
        assert (requantized == "–") == (kind in ("Q4_K", "Q6_K", "IQ3_S")), kind
        assert kept == "–" or requantized.endswith(" %"), kind

    for file, shown in (("toy-mixed.gguf", "GGUF, flux"), ("sliced.safetensors", "Flux")):
        page.fill("#graft_file input", file)
        page.get_by_role("option", name=file).click()
        page.locator("#graft_contents").get_by_text(shown).wait_for()
    first = next(server.folder.rglob("sliced.safetensors"))
    twin = first.parent / "twins" / first.name
    twin.parent.mkdir()
    shutil.copy(next(server.folder.rglob("text.safetensors")), twin)
    page.click("#graft_files")
    page.fill("#graft_file input", f"twins/{first.name}")
    page.get_by_role("option", name=f"twins/{first.name}").click()
    page.locator("#graft_contents").get_by_text("unknown", exact=True).wait_for()
    shutil.rmtree(twin.parent)
    screenshot = server.folder / "tab.png"
    page.locator("#tab_graft").screenshot(path=str(screenshot))
    assert screenshot.stat().st_size > 50_000


HOSTILE = "<img src=x onerror=window.ran=1>"


def test_names_and_texts_from_files_are_shown_as_text(server: Server, page: Any) -> None:
    """Of a LoRA and of a model: the file's name, the names of its tensors, its metadata; and in a prompt."""
    sound = next(server.folder.rglob("sliced.safetensors"))
    lora = load_file(sound) | {f"{HOSTILE}.lora_{side}.weight": torch.ones(4, 4) for side in ("up", "down")}
    names = [f"lora{HOSTILE}.safetensors", f"model{HOSTILE}.gguf"]
    told = {"ss_network_module": HOSTILE, "modelspec.title": HOSTILE, "modelspec.trigger_phrase": HOSTILE}
    save_file(lora, sound.parent / names[0], told)
    model = next(server.folder.rglob("toy-Q4_K.gguf")).parent / names[1]
    metadata = {"general.name": HOSTILE, "general.author": HOSTILE}
    write_gguf(model, {f"{HOSTILE}.weight": (np.ones((4, 32), np.float32), "F32")}, HOSTILE, metadata=metadata)
    try:
        page.click("#graft_files")
        for name in names:
            page.fill("#graft_file input", name)
            page.get_by_role("option", name=name).click()
            page.locator("#graft_contents").get_by_text(HOSTILE).first.wait_for()
        server.image("Q4_K", 'a toy <lora:sliced:1:region="onerror=window.ran=1&lt;img src=x>')
        page.click("#graft_refresh")
        # the LoRA is left out, and what was mistyped is told
        page.locator("#graft_loaded").get_by_text("onerror=window.ran=1").first.wait_for()
        assert page.evaluate("[window.ran, document.querySelectorAll('img[src=x]').length]") == [None, 0]
    finally:
        (sound.parent / names[0]).unlink()
        model.unlink()


def test_presets_change_nothing_of_ours(server: Server, page: Any) -> None:
    before, _ = server.image("Q4_K", f"a toy {ALL_LORAS}")
    presets = page.locator("#forge_ui_preset")
    for name in ("xl", "zit", "flux") if server.host.is_neo else ("sd", "xl", "flux"):
        if server.host.is_neo:
            box = presets.get_by_label("UI Preset")
            box.click()
            page.get_by_role("option", name=name, exact=True).click()
            page.wait_for_function("([box, name]) => box.value === name", arg=[box.element_handle(), name])
        else:
            presets.get_by_label(name, exact=True).check()
    page.click("#graft_refresh")
    page.locator("#graft_status").get_by_text("Graft runs the GGUF layers").wait_for()
    assert server.status()["active"] and server.status()["settings"]["mode"] == "auto"
    assert np.array_equal(server.image("Q4_K", f"a toy {ALL_LORAS}")[0], before)


def test_the_settings_page_has_our_options(page: Any) -> None:
    page.get_by_role("tab", name="Settings", exact=True).click()
    page.locator("#settings").get_by_role("tab", name="Graft", exact=True).click()
    for label in ("LoRAs on GGUF models", "Kernels", "Computation dtype"):
        page.locator("#settings_graft").get_by_text(label, exact=True).wait_for()


def test_the_log_is_quiet(server: Server) -> None:
    log = (server.folder / "log.txt").read_text()
    assert "Graft is not active" not in log and "goes back to Forge" not in log
    meant = "region=lef ", "onerror=", "damaged.gguf"  # by tests
    assert not [line for line in log.splitlines() if "left out" in line and not any(map(line.count, meant))]
