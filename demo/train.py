"""Train the demo model and its adapters from nothing but `scenes.py`, and write the files that ship.

    python -m demo.train base                 # about half an hour on two cores
    python -m demo.train adapter neon         # a few minutes each
    python -m demo.train adapter blueprint
    python -m demo.train adapter linocut
    python -m demo.train export               # demo/graft-demo-*.gguf and the adapters

Run it from the checkout. What is trained stays in the working folder until it is exported.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import libgguf
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW, Muon
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import pictures, scenes
from .adapters import Adapter, adapter_for
from .wan import Wan

HERE = Path(__file__).resolve().parent
WORK = HERE.parent / "build" / "demo"
MIXES = {"Q8_0": ("Q8_0", "Q8_0"), "Q4_K_M": ("Q4_K", "Q6_K")}
SENSITIVE = ("ffn.2", "text_embedding.2", "time_embedding", "head.head")  # where rounding shows most
STYLES = [style for style in scenes.STYLES if style != "toy"]
PREVIEWS = [
    "a red circle on sky", "a yellow star on lilac", "a pink heart on cream", "a blue flower on sand",
    "a green square and an orange moon on rose", "a purple ring and a red heart on mint",
    "a teal triangle and a yellow flower and a blue star on cream",
    "a red moon and a green circle and a pink square on sky",
]  # fmt: skip


class Gallery:
    """A pool of pictures in one style, with their captions.

    Args:
        style: a key of `scenes.STYLES`.
        count: how many to draw.
        seed: of the scenes.
    """

    def __init__(self, style: str, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        drawn = [scenes.random_scene(rng) for _ in range(count)]
        self.captions = [scene.caption for scene in drawn]
        self.latents = torch.cat([
            pictures.encode(torch.from_numpy(scenes.draw(drawn[i : i + 256], style))).half()
            for i in range(0, count, 256)
        ])  # fmt: skip

    def batches(self, size: int, empty: float = 0.1) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless random batches (latents, context); a share `empty` comes without its caption."""
        while True:
            picked = torch.randint(len(self.captions), (size,)).tolist()
            texts = ["" if torch.rand(()) < empty else self.captions[i] for i in picked]
            yield self.latents[picked].float(), pictures.prompts(texts)


def flow_loss(model: Any, latents: Tensor, context: Tensor) -> Tensor:
    """Rectified flow: at a random share of noise, how far the model is from the velocity noise - picture.

    The shares are spread as the sampler's schedule visits them, and evenly over a batch.
    """
    even = (torch.randperm(len(latents)) + torch.rand(len(latents))) / len(latents)
    sigma = pictures.SHIFT * even / (1 + (pictures.SHIFT - 1) * even)
    noise = torch.randn_like(latents)
    mixed = torch.lerp(latents, noise, sigma.view(-1, 1, 1, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(pictures.beside_places(mixed), 1000 * sigma, context)
    return F.mse_loss(velocity.float(), noise - latents)


def learning_rate(step: int, steps: int) -> float:
    """The share of the full rate: linear up, then half a cosine down to 0."""
    warm_up = min(100, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))


def optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the model, if a rate is given for it; AdamW for everything else that learns."""
    inside, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() == 2 and not name.startswith("head.")
            (inside if args.muon_rate and matrix else rest).append(parameter)
    chosen: list[torch.optim.Optimizer] = [AdamW(rest, lr=args.rate, betas=(0.9, 0.98), weight_decay=0.0)]
    return [*chosen, Muon(inside, lr=args.muon_rate, weight_decay=0.0)] if inside else chosen


def fit(model: nn.Module, gallery: Gallery, args: argparse.Namespace, look: Path, keep: Callable[[Any], None]) -> None:
    """Train what of `model` requires gradients.

    Now and then, and at the end, the running average of the weights is given to `keep` and drawn to `look`.
    """
    chosen = optimizers(model, args)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: learning_rate(step, args.steps)) for o in chosen]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.average))
    begin, losses = time.monotonic(), []
    for step, batch in zip(range(1, args.steps + 1), gallery.batches(args.batch), strict=False):
        with sdpa_kernel(SDPBackend.MATH):  # quicker than the fused kernel at so few tokens
            loss = flow_loss(model, *batch)
            loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        for optimizer, schedule in zip(chosen, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        average.update_parameters(model)
        losses.append(loss.item())
        if step % 50 == 0 or step == args.steps:
            minutes = (time.monotonic() - begin) / 60
            print(f"step {step}/{args.steps}, loss {np.mean(losses[-50:]):.4f}, {minutes:.1f} min", flush=True)
        if step % 100 == 0 or step == args.steps:
            preview(average, look)
            keep(average.module)


def initialise(model: Wan) -> None:
    """Xavier weights, zero biases; what every layer adds to the stream starts at zero, with its gate open."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or name.endswith((".o.weight", "ffn.2.weight", "head.weight", "projection.1.weight")):
            nn.init.zeros_(parameter)
        elif name.endswith(".weight") and parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter.view(len(parameter), -1))
    for block in model.blocks:
        block.modulation.data[:, [2, 5]] = 1.0


class Adapted(nn.Module):
    """A frozen model with an adapter merged into its weights anew in every call, so that the adapter can learn."""

    def __init__(self, model: Wan, adapter: Adapter, strength: float = 1.0) -> None:
        super().__init__()
        self.model, self.adapter, self.strength = model, adapter, strength

    def forward(self, *inputs: Tensor) -> Tensor:
        changed = self.adapter.changed(dict(self.model.named_parameters()), self.strength)
        return torch.func.functional_call(self.model, changed, inputs)


def preview(model: Any, path: Path) -> None:
    """A row of pictures to look at."""
    drawn = (pictures.sample(model, PREVIEWS, seed=1) * 255).round().to(torch.uint8)
    Image.fromarray(torch.cat(list(drawn), dim=1).numpy()).save(path)


def train_base(args: argparse.Namespace) -> None:
    def keep(trained: Wan) -> None:
        save_file(trained.state_dict(), args.work / "base.safetensors")

    model = Wan()
    initialise(model)
    fit(model, Gallery("toy", args.pictures, args.seed), args, args.work / "base.png", keep)


def adapter_file(style: str) -> str:
    return f"graft-demo-{style}.safetensors"


def train_adapter(args: argparse.Namespace) -> None:
    def keep(trained: Adapted) -> None:
        tensors = {name: tensor.half().contiguous() for name, tensor in trained.adapter.tensors().items()}
        save_file(tensors, args.work / adapter_file(args.style))

    model = Wan().requires_grad_(False)
    model.load_state_dict(load_file(args.work / "base.safetensors"))
    adapted = Adapted(model, adapter_for(args.style, dict(model.named_parameters())))
    fit(adapted, Gallery(args.style, args.pictures, args.seed), args, args.work / f"{args.style}.png", keep)


def stored_type(name: str, tensor: Tensor, mix: str) -> str:
    """The GGUF type that a parameter is stored in.

    Matrices get the mix: its first type, or its second where rounding shows most. The first matrix for the words
    is Q4_K in both: a word is 4096 signs, over which its rounding errors average out. The patch convolution is
    F16; vectors and modulations are F32.
    """
    if name == "text_embedding.0.weight":
        return "Q4_K"
    if tensor.dim() == 5:
        return "F16"
    if tensor.dim() != 2:
        return "F32"
    most, sensitive = MIXES[mix]
    return sensitive if any(part in name for part in SENSITIVE) else most


def write_model(path: Path, weights: dict[str, Tensor], mix: str) -> None:
    """A GGUF file of the base, names as they are (without a prefix)."""
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_name("Graft demo")
    writer.add_description("128x128 pictures of coloured shapes: see demo/README.md of Graft")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{mix}"])
    for name, tensor in weights.items():
        kind = gguf.GGMLQuantizationType[stored_type(name, tensor, mix)]
        data = tensor.float().numpy()
        if kind.name.startswith("F"):
            writer.add_tensor(name, data.astype(np.float16 if kind.name == "F16" else np.float32))
        else:
            writer.add_tensor(name, libgguf.quantize_rows(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def export(args: argparse.Namespace) -> None:
    """Everything that was trained, as it ships."""
    for mix in MIXES:
        write_model(HERE / f"graft-demo-{mix}.gguf", load_file(args.work / "base.safetensors"), mix)
    for style in STYLES:
        shutil.copy(args.work / adapter_file(style), HERE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK, help="where weights in fp32 and previews go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    commands = parser.add_subparsers(required=True)
    base = commands.add_parser("base", help="train the model itself")
    base.set_defaults(action=train_base)
    adapter = commands.add_parser("adapter", help="train a style on top of it")
    adapter.add_argument("style", choices=STYLES)
    adapter.set_defaults(action=train_adapter)
    for command, steps, batch, drawn, rate, muon_rate, average in (
        (base, 2200, 64, 12000, 2e-3, 0.02, 0.995),
        (adapter, 600, 32, 3000, 3e-3, 0.0, 0.98),
    ):
        command.add_argument("--steps", type=int, default=steps)
        command.add_argument("--batch", type=int, default=batch)
        command.add_argument("--rate", type=float, default=rate, help="full learning rate of AdamW")
        command.add_argument("--muon-rate", type=float, default=muon_rate, help="full rate of Muon; 0: without it")
        command.add_argument("--average", type=float, default=average, help="decay of the average of weights")
        command.add_argument("--pictures", type=int, default=drawn, help="how many to draw for training")
    commands.add_parser("export", help="write the files that ship").set_defaults(action=export)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    args.action(args)


if __name__ == "__main__":
    main()
