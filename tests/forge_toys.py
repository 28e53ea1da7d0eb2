"""Toy models and LoRAs for Forge, and a server that runs them. `import forge_toys` from any test."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from conftest import ROOT
from forge import Forge
from gguf_samples import encode, write_gguf
from graft.ops.files.renaming import rename
from graft.ops.files.text_encoders import T5
from hosts import Host
from PIL import Image
from safetensors.torch import load_file, save_file

WIDTH, DEPTH = 256, 2
TYPES = ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS")
MIXED = ("Q4_K", "Q4_0", "Q5_0", "Q6_K", "Q8_0", "IQ3_S")
CREDENTIALS = "toy:secret"
GRAFT = "any-name-at-all"
EXTENSION = Path(__file__).parent / "in_forge" / "toy_extension"


def flux_tensors(
    *kinds: str, width: int = WIDTH, text: int = WIDTH, double: int = DEPTH, single: int = DEPTH
) -> dict[str, tuple[np.ndarray, str]]:
    """Flux with the types `kinds` in turn in its blocks; the outer layers are F16 and F32, norms and biases F32."""
    rng = np.random.default_rng(0)
    turn = itertools.cycle(kinds)
    tensors: dict[str, tuple[np.ndarray, str]] = {}

    def linear(name: str, rows: int, columns: int, kind: str | None = None, gain: float = 1.0) -> None:
        weight = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(gain / columns**0.5)
        tensors[f"{name}.weight"] = weight, kind or next(turn)
        tensors[f"{name}.bias"] = rng.standard_normal(rows, dtype=np.float32) * np.float32(0.02), "F32"

    def norms(name: str) -> None:
        for which in ("query_norm", "key_norm"):
            tensors[f"{name}.{which}.scale"] = np.ones(128, np.float32), "F32"

    for name, columns in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        linear(f"{name}.in_layer", width, columns, "F16")
        linear(f"{name}.out_layer", width, width, "F32")
    linear("img_in", width, 64, "F16")
    linear("txt_in", width, text, "F16")
    linear("final_layer.linear", 64, width, "F32")
    linear("final_layer.adaLN_modulation.1", 2 * width, width, "F16")
    for block in range(double):
        for stream in ("img", "txt"):
            name = f"double_blocks.{block}.{stream}"
            linear(f"{name}_mod.lin", 6 * width, width, gain=0.3)
            linear(f"{name}_attn.qkv", 3 * width, width)
            linear(f"{name}_attn.proj", width, width)
            linear(f"{name}_mlp.0", 4 * width, width)
            linear(f"{name}_mlp.2", width, 4 * width)
            norms(f"{name}_attn.norm")
    for block in range(single):
        name = f"single_blocks.{block}"
        linear(f"{name}.linear1", 7 * width, width)
        linear(f"{name}.linear2", width, 5 * width)
        linear(f"{name}.modulation.lin", 3 * width, width, gain=0.3)
        norms(f"{name}.norm")
    return tensors


def t5_tensors(
    kind: str, width: int = WIDTH, words: int = 32128, is_umt5: bool = False
) -> dict[str, tuple[np.ndarray, str]]:
    """A T5 encoder under the names of llama.cpp, as all GGUF files of it have; UMT5 has positions in each block."""
    rng = np.random.default_rng(1)

    def normal(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)

    tensors = {"token_embd.weight": (normal(words, width), "Q8_0")}
    tensors["enc.output_norm.weight"] = np.ones(width, np.float32), "F32"
    for block in range(2):
        name = f"enc.blk.{block}"
        if is_umt5 or block == 0:
            tensors[f"{name}.attn_rel_b.weight"] = normal(32, 2 if is_umt5 else 4), "F32"
        shapes = {f"attn_{part}": (width, width) for part in "qkvo"}
        shapes |= {"ffn_gate": (2 * width, width), "ffn_up": (2 * width, width), "ffn_down": (width, 2 * width)}
        tensors |= {f"{name}.{part}.weight": (normal(*shape), kind) for part, shape in shapes.items()}
        tensors |= {f"{name}.{norm}.weight": (np.ones(width, np.float32), "F32") for norm in ("attn_norm", "ffn_norm")}
    return tensors


ENCODERS = {
    "gemma2": (2304, 256, 2, 1), "mistral3": (3072, 128, 4, 2), "qwen3vl": (2560, 128, 4, 2),
    "qwen3": (2560, 128, 4, 2), "qwen2vl": (3584, 128, 4, 4),
}  # fmt: skip
"""Text encoders by what llama.cpp calls them: width, width of a head, heads of queries, heads of keys."""


def write_encoder(architecture: str, path: Path) -> Path:
    """A small text encoder under the names of llama.cpp, in three types."""
    width, head, heads, kv_heads = ENCODERS[architecture]
    rng = np.random.default_rng(2)

    def normal(rows: int, columns: int, kind: str) -> tuple[np.ndarray, str]:
        return rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5), kind

    def norm(size: int) -> tuple[np.ndarray, str]:
        return 1 + 0.1 * rng.standard_normal(size, dtype=np.float32), "F32"

    tensors = {"token_embd.weight": normal(512, width, "Q6_K"), "output_norm.weight": norm(width)}
    for block in range(2):
        name = f"blk.{block}"
        for part, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            tensors[f"{name}.attn_{part}.weight"] = normal(rows * head, width, "Q4_K")
            if architecture == "qwen2vl":
                tensors[f"{name}.attn_{part}.bias"] = 0.1 * norm(rows * head)[0], "F32"
            if architecture.startswith("qwen3") and part != "v":
                tensors[f"{name}.attn_{part}_norm.weight"] = norm(head)
        tensors[f"{name}.attn_output.weight"] = normal(width, heads * head, "Q8_0")
        tensors |= {f"{name}.ffn_{part}.weight": normal(256, width, "Q4_K") for part in ("gate", "up")}
        tensors[f"{name}.ffn_down.weight"] = normal(width, 256, "Q8_0")
        more = ("post_attention_norm", "post_ffw_norm") if architecture == "gemma2" else ()
        tensors |= {f"{name}.{part}.weight": norm(width) for part in ("attn_norm", "ffn_norm", *more)}
    about = {"attention.head_count": heads, "attention.head_count_kv": kv_heads, "embedding_length": width}
    return write_gguf(path, tensors, architecture, {f"{architecture}.{key}": value for key, value in about.items()})


def _pair(rows: int, columns: int, seed: int, rank: int = 8, size: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Up and down with a product of about `size` times the size of a toy layer's weights."""
    random = torch.Generator().manual_seed(seed)
    up, down = torch.randn(rows, rank, generator=random), torch.randn(rank, columns, generator=random)
    return up * size / rank**0.5, down / columns**0.5


def _kohya(name: str, rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
    up, down = _pair(rows, columns, seed)
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(8.0)}


def _diffusers(name: str, rows: int, columns: int, seed: int) -> dict[str, torch.Tensor]:
    up, down = _pair(rows, columns, seed)
    return {f"transformer.{name}.lora_B.weight": up, f"transformer.{name}.lora_A.weight": down}


DIALECTS = {
    "native": ("diffusion_model.double_blocks.{}.img_attn.proj", "diffusion_model.single_blocks.{}.linear2"),
    "PEFT": ("base_model.model.double_blocks.{}.img_attn.proj", "base_model.model.single_blocks.{}.linear2"),
    "unet": ("unet.transformer_blocks.{}.attn.to_out.0", "unet.single_transformer_blocks.{}.proj_out"),
    "XLabs": ("double_blocks.{}.processor.proj_lora1", "single_blocks.{}.processor.proj_lora"),
}
"""What four trainers call the same two layers of a block."""


def _in_dialect(modules: list[str], xlabs: bool) -> dict[str, torch.Tensor]:
    """One LoRA, whatever its modules are called."""
    found: dict[str, torch.Tensor] = {}
    down_name, up_name = ("down", "up") if xlabs else ("lora_A", "lora_B")
    for index, module in enumerate(modules):
        up, down = _pair(WIDTH, WIDTH if index % 2 == 0 else 5 * WIDTH, 110 + index)
        found |= {f"{module}.{up_name}.weight": up, f"{module}.{down_name}.weight": down}
    return found


def write_loras(folder: Path) -> None:
    """LoRAs of whole layers, slices of fused ones, what is not quantized, the T5; one in four dialects; one of SDXL."""
    folder.mkdir(parents=True, exist_ok=True)
    whole: dict[str, torch.Tensor] = {}
    for block in range(DEPTH):
        whole |= _kohya(f"lora_unet_double_blocks_{block}_img_attn_qkv", 3 * WIDTH, WIDTH, 10 + block)
        whole |= _kohya(f"lora_unet_double_blocks_{block}_txt_mlp_0", 4 * WIDTH, WIDTH, 20 + block)
        whole |= _kohya(f"lora_unet_single_blocks_{block}_linear1", 7 * WIDTH, WIDTH, 30 + block)
        whole |= _kohya(f"lora_unet_single_blocks_{block}_linear2", WIDTH, 5 * WIDTH, 40 + block)
    save_file(whole, str(folder / "whole.safetensors"))
    sliced: dict[str, torch.Tensor] = {}
    for block in range(DEPTH):
        for i, part in enumerate(("to_q", "to_k", "to_v")):
            sliced |= _diffusers(f"transformer_blocks.{block}.attn.{part}", WIDTH, WIDTH, 50 + 3 * block + i)
            sliced |= _diffusers(f"single_transformer_blocks.{block}.attn.{part}", WIDTH, WIDTH, 60 + 3 * block + i)
        sliced |= _diffusers(f"single_transformer_blocks.{block}.proj_mlp", 4 * WIDTH, WIDTH, 70 + block)
    save_file(sliced, str(folder / "sliced.safetensors"))
    # Forge #1223: the layers that converters leave in F16 and F32, and a bias
    plain = _kohya("lora_unet_img_in", WIDTH, 64, 80) | _kohya("lora_unet_final_layer_linear", 64, WIDTH, 81)
    plain["diffusion_model.txt_in.diff_b"] = torch.full((WIDTH,), 0.2)
    plain["diffusion_model.txt_in.diff"] = _pair(WIDTH, WIDTH, 82)[0] @ _pair(WIDTH, WIDTH, 82)[1]
    save_file(plain, str(folder / "plain.safetensors"))
    text: dict[str, torch.Tensor] = {}
    for block in range(2):
        for i, part in enumerate(("q", "v")):
            name = f"lora_te2_encoder_block_{block}_layer_0_SelfAttention_{part}"
            text |= _kohya(name, WIDTH, WIDTH, 90 + 2 * block + i)
    save_file(text, str(folder / "text.safetensors"))
    for dialect, names in DIALECTS.items():
        modules = [name.format(block) for block in range(DEPTH) for name in names]
        save_file(_in_dialect(modules, dialect == "XLabs"), str(folder / f"{dialect}.safetensors"))
    other = _kohya("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", 64, 64, 99)
    save_file(other, str(folder / "sdxl.safetensors"))


def write_gguf_lora(folder: Path) -> None:
    """One LoRA twice: in GGUF, under llama.cpp's names, and what that decodes to, under kohya's; and half a file."""
    stored: dict[str, tuple[np.ndarray, str]] = {}
    decoded: dict[str, torch.Tensor] = {}
    for block in range(DEPTH):
        for part, rows, columns in (("double_blocks.{}.img_attn.qkv", 3, 1), ("single_blocks.{}.linear2", 1, 5)):
            layer, pair = part.format(block), _pair(rows * WIDTH, columns * WIDTH, 120 + block + rows)
            module = f"lora_unet_{layer.replace('.', '_')}"
            for (field, theirs, kind), factor in zip((("b", "up", "F16"), ("a", "down", "Q8_0")), pair, strict=True):
                stored[f"{layer}.weight.lora_{field}"] = factor.numpy(), kind
                qtype = gguf.GGMLQuantizationType[kind]
                numbers = gguf.dequantize(encode(factor.numpy(), qtype), qtype)
                decoded[f"{module}.lora_{theirs}.weight"] = torch.from_numpy(numbers.astype(np.float32))
            decoded[f"{module}.alpha"] = torch.tensor(4.0)
    write_gguf(folder / "packed.gguf", stored, metadata={"adapter.lora.alpha": 4.0})
    save_file(decoded, str(folder / "decoded.safetensors"))
    (folder / "damaged.gguf").write_bytes((folder / "packed.gguf").read_bytes()[:20_000])


def write_models(host: Host, folder: Path) -> None:
    """Everything under Forge's ``models`` folder."""
    (folder / "Stable-diffusion").mkdir(parents=True)
    for kind in TYPES:
        write_gguf(folder / "Stable-diffusion" / f"toy-{kind}.gguf", flux_tensors(kind))
    write_gguf(folder / "Stable-diffusion" / "toy-mixed.gguf", flux_tensors(*MIXED))
    (folder / "text_encoder").mkdir()
    write_gguf(folder / "text_encoder" / "toy-t5.gguf", t5_tensors("Q8_0"), architecture="t5encoder")
    write_loras(folder / "Lora")
    write_gguf_lora(folder / "Lora")
    # which Forge lists, and nobody loads
    control, name = folder / "ControlNet", "control_model.zero_convs.0.0.weight"
    control.mkdir()
    write_gguf(control / "packed.gguf", {name: (np.ones((32, 32), np.float32), "F16")})
    save_file({name: torch.ones(32, 32)}, str(control / "plain.safetensors"))
    done = host.run(str(EXTENSION.parent / "toys.py"), str(folder), timeout=120)
    assert done.returncode == 0, done.stdout


def write_whole(models: Path, kind: str) -> None:
    """The parts in Forge's `models` folder as one checkpoint, ``toy-whole.gguf``; the VAE in F16."""
    tensors = {f"model.diffusion_model.{name}": part for name, part in flux_tensors(kind).items()}
    t5 = {rename(name, T5): part for name, part in t5_tensors("Q8_0").items()}
    tensors |= {f"text_encoders.t5xxl.transformer.{name}": part for name, part in t5.items()}
    for file, prefix in (("text_encoder/toy-clip", "text_encoders.clip_l.transformer."), ("VAE/toy-vae", "vae.")):
        for name, weight in load_file(models / f"{file}.safetensors").items():
            tensors[prefix + name] = weight.float().numpy(), "F16" if weight.dim() > 1 else "F32"
    write_gguf(models / "Stable-diffusion" / "toy-whole.gguf", tensors, orig_shapes=False)


class Server:
    """A running Forge with toy models, as a client of its API sees it."""

    def __init__(self, host: Forge, url: str, folder: Path, process: subprocess.Popen) -> None:
        self.host, self.url, self.folder, self.process = host, url, folder, process
        self.has_graft = (folder / "extensions" / GRAFT).exists()
        self.modules = [
            str(folder / "models" / name)
            for name in ("text_encoder/toy-clip.safetensors", "text_encoder/toy-t5.gguf", "VAE/toy-vae.safetensors")
        ]

    def call(
        self, path: str, body: dict[str, Any] | None = None, timeout: float = 120, credentials: str = CREDENTIALS
    ) -> Any:
        """GET, or POST with a body; the answer as JSON."""
        data = None if body is None else json.dumps(body).encode()
        basic = base64.b64encode(credentials.encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {basic}"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode()[:2000]}") from None

    def image(self, kind: str, prompt: str = "a toy", path: str = "txt2img", **fields: Any) -> tuple[np.ndarray, str]:
        """One picture as ``uint8 [height, width, 3]``, and its infotext."""
        overrides = {
            "sd_model_checkpoint": f"toy-{kind}.gguf", "forge_additional_modules": self.modules,
            **fields.pop("override_settings", {}),
        }  # fmt: skip
        body = {
            "prompt": prompt, "seed": 1, "steps": 2, "width": 64, "height": 64, "cfg_scale": 1,
            "sampler_name": "Euler", "scheduler": "Simple", "override_settings": overrides, **fields,
        }  # fmt: skip
        answer = self.call(f"/sdapi/v1/{path}", body)
        picture = Image.open(io.BytesIO(base64.b64decode(answer["images"][0])))
        return np.asarray(picture.convert("RGB")), json.loads(answer["info"])["infotexts"][0]

    def status(self) -> dict[str, Any]:
        return self.call("/graft/status")

    def calls(self) -> dict[str, int]:
        """Layer calls by path since the start."""
        found: dict[str, int] = {}
        for entry in self.status()["calls"]:
            found[entry["path"]] = found.get(entry["path"], 0) + entry["count"]
        return found

    def reload_ui(self) -> None:
        """What the button at the bottom of the page does; returns when the new UI serves."""
        before = self.starts()
        with contextlib.suppress(OSError, ValueError, AssertionError):
            self.call("/toy/reload", {}, timeout=5)
        self.wait(lambda: self.starts() > before)

    def starts(self) -> int:
        """How often the UI has started; a server that is going away may never answer."""
        return self.call("/toy/starts", timeout=5)

    def wait(self, ready: Any, seconds: float = 300) -> None:
        """Ask until `ready()` is true; a server that is starting refuses connections."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError, ValueError, AssertionError):
                if ready():
                    return
            time.sleep(0.3)
        log = (self.folder / "log.txt").read_text(errors="replace")
        raise AssertionError(f"the server was not ready within {seconds:.0f} s, or ended before:\n{log[-4000:]}")


@contextlib.contextmanager
def serving(host: Forge, folder: Path, *flags: str, graft: bool = True) -> Iterator[Server]:
    """Forge with toy models in `folder` and this checkout as one of its extensions, for as long as the block runs.

    Args:
        graft: False for a Forge without it.
    """
    with host.starting():
        write_models(host, folder / "models")
    extensions = folder / "extensions"
    extensions.mkdir()
    if graft:
        (extensions / GRAFT).symlink_to(ROOT, target_is_directory=True)
    shutil.copytree(EXTENSION, extensions / "toy", ignore=shutil.ignore_patterns("__pycache__"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *host.command, "--api", "--api-auth", CREDENTIALS, "--port", str(port), "--data-dir", str(folder),
        "--gradio-allowed-path", str(folder), "--gradio-allowed-path", str(host.folder), *flags,
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "TRITON_INTERPRET"))}
    env |= {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1", "SD_WEBUI_RESTARTING": "1"}
    # glibc gives back at once what is freed, so that the size of the process is that of what is in use
    env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, cwd=host.folder, env=env, stdout=log, stderr=subprocess.STDOUT)
        server = Server(host, f"http://127.0.0.1:{port}", folder, process)
        try:
            with host.starting():
                server.wait(server.starts)
            yield server
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
