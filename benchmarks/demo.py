"""The main job without a host: GGUF files of a small diffusion transformer, two LoRAs beside their packed weights.

    make demo            # a table, and the same as demo.png; under two minutes on two cores

For every type the model is written with gguf-py and libgguf, opened with the reader and run in the layers that the
nodes use, in fp32. It is held to the dequantized model with the LoRAs merged into its weights, in fp64:

    error of the base       |y - y₆₄| / |y₆₄|, without LoRAs
    error of the effect     the same of what the LoRAs change
    effect kept             the share of the true effect that is left: 1 is all of it

The last two also for what some loaders do: dequantize, merge, requantize to the file's type.
The exit status is 1 if an error exceeds what rounding explains: each of the n matmuls on the way adds an error of
about √K · 2⁻²⁴ of its result (K additions, rounded independently), so that n of them add √(n K) · 2⁻²⁴.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from checkout import ROOT
from gguf import GGMLQuantizationType
from graft.kernels import by_name, dequantize
from graft.ops.adapters import LoRA, Patch, Region
from graft.ops.gguf_file import diffusion_tensors, open_gguf
from graft.ops.layers import Linear, packed_layers, unpack_leftovers
from graft.ops.packed import as_weight
from graft.ops.residual import FactorCache, ResidualStack
from graft.tests.gguf_samples import encode, write_gguf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TYPES = ("Q8_0", "Q6_K", "Q4_K", "Q4_0", "MXFP4", "IQ4_XS", "IQ3_S")
CHANNELS, TOKENS, HEADS = 64, 256, 8
STRENGTHS = (0.8, 0.6)
STRENGTH_OF_DELTA = 0.01  # |ΔW| / |W| of a LoRA at strength 1
CPU = torch.device("cpu")


# The model: a few blocks of a diffusion transformer


class Block(nn.Module):
    """Attention and MLP on ``[batch, tokens, width]``, modulated by the time ``[batch, width]``."""

    def __init__(self, linear: Callable[[int, int], nn.Module], width: int) -> None:
        super().__init__()
        self.modulation = linear(width, 6 * width)
        self.qkv, self.proj = linear(width, 3 * width), linear(width, width)
        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(time)).unsqueeze(1).chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift
        q, k, v = self.qkv(h).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.proj(h)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h)))


class Transformer(nn.Module):
    """A small diffusion transformer, of whatever linear layers."""

    def __init__(self, linear: Callable[[int, int], nn.Module], width: int, blocks: int) -> None:
        super().__init__()
        self.img_in, self.time_in = linear(CHANNELS, width), linear(width, width)
        self.blocks = nn.ModuleList(Block(linear, width) for _ in range(blocks))
        self.final = linear(width, CHANNELS)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x, time = self.img_in(x), self.time_in(time)
        for block in self.blocks:
            x = block(x, time)
        return self.final(F.layer_norm(x, x.shape[-1:]))

    def matmuls(self) -> int:
        """How many follow upon each other, attention's two included."""
        return 2 + 6 * len(self.blocks)


def random_weights(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of size 1/√K and small biases, by parameter name."""
    weights = {}
    for name, parameter in model.named_parameters():
        size = parameter.shape[1] ** -0.5 if parameter.dim() == 2 else 0.02
        weights[name] = torch.randn(parameter.shape, generator=generator) * size
    return weights


def write_model(path: Path, weights: dict[str, Tensor], type_name: str) -> Path:
    """Blocks in `type_name`, the small layers around them as F16, biases as F32."""
    tensors = {}
    for name, weight in weights.items():
        kind = "F32" if weight.dim() == 1 else type_name if name.startswith("blocks.") else "F16"
        tensors[name] = (weight.numpy(), kind)
    return write_gguf(path, tensors, architecture="demo")


def load_model(path: Path, width: int, blocks: int) -> Transformer:
    """What the loader node does: map the file, hand its bytes to the layers."""
    model = Transformer(Linear, width, blocks)
    state = {name: as_weight(tensor) for name, tensor in diffusion_tensors(open_gguf(path)).items()}
    model.load_state_dict(state)
    unpack_leftovers(model)
    return model


# The LoRAs, as trainers write them


def write_lora(path: Path, shapes: dict[str, torch.Size], rank: int, generator: torch.Generator) -> Path:
    """A kohya file for modules of these weight shapes, alpha half the rank."""
    tensors = {}
    alpha = rank / 2
    for name, (rows, columns) in shapes.items():
        module = "lora_unet_" + name.replace(".", "_")
        size = STRENGTH_OF_DELTA / (alpha / rank * rank**0.5)
        tensors[f"{module}.lora_down.weight"] = torch.randn(rank, columns, generator=generator) * columns**-0.5
        tensors[f"{module}.lora_up.weight"] = torch.randn(rows, rank, generator=generator) * size
        tensors[f"{module}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def write_loras(folder: Path, weights: dict[str, Tensor], generator: torch.Generator) -> list[Path]:
    """One of rank 16 on every layer of the blocks, and one of rank 32 for q, k and v by themselves."""
    shapes = {name.removesuffix(".weight"): weight.shape for name, weight in weights.items() if weight.dim() == 2}
    everything = {name: shape for name, shape in shapes.items() if name.startswith("blocks.")}
    fused = {name[:-3]: shape for name, shape in everything.items() if name.endswith("qkv")}
    apart = {stem + part: torch.Size((rows // 3, columns)) for stem, (rows, columns) in fused.items() for part in "qkv"}
    return [
        write_lora(folder / "everything.safetensors", everything, 16, generator),
        write_lora(folder / "attention.safetensors", apart, 32, generator),
    ]


def read_lora(path: Path, layers: dict[str, Any], strength: float) -> Iterator[tuple[str, Patch]]:
    """The file's adapters as patches by parameter name; q, k and v are thirds of the rows of qkv."""
    tensors = load_file(path)
    places = {"lora_unet_" + name.replace(".", "_"): (name, None) for name in layers}
    for name, layer in layers.items():
        if name.endswith(".qkv"):
            third = layer.logical_shape[0] // 3
            stem = "lora_unet_" + name.replace(".", "_").removesuffix("qkv")
            places |= {stem + part: (name, Region(0, i * third, third)) for i, part in enumerate("qkv")}
    for key in tensors:
        module, _, rest = key.partition(".")
        if rest == "lora_up.weight":
            name, region = places[module]
            down, alpha = tensors[f"{module}.lora_down.weight"], tensors[f"{module}.alpha"].item()
            yield f"{name}.weight", Patch(strength, LoRA(tensors[key], down, alpha), region=region)


def merged(weights: dict[str, Tensor], patches: list[tuple[str, Patch]]) -> dict[str, Tensor]:
    """The weights in fp64 with every patch added to them."""
    result = {name: weight.double() for name, weight in weights.items()}
    for name, patch in patches:
        factors = patch.adapter.low_rank()
        delta = patch.strength * factors.scale * factors.up.double() @ factors.down.double()
        part = result[name] if patch.region is None else result[name].narrow(*patch.region)
        part += delta
    return result


# Measuring


@dataclass
class Result:
    """What was measured for one type; times in seconds a step."""

    type_name: str
    bits: float
    nbytes: int
    base_error: float
    effect_error: float
    kept: float
    requantized_error: float
    requantized_kept: float
    bounds: tuple[float, float]
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def passes(self) -> bool:
        return self.base_error <= self.bounds[0] and self.effect_error <= self.bounds[1]


def dense(state: dict[str, Tensor], width: int, blocks: int, dtype: torch.dtype) -> Transformer:
    """The same model of torch's own layers."""
    with torch.device("meta"):
        model = Transformer(nn.Linear, width, blocks)
    model.load_state_dict({name: weight.to(dtype) for name, weight in state.items()}, assign=True)
    return model


def decoded(model: Transformer) -> dict[str, Tensor]:
    """Every parameter as fp32 numbers."""
    layers = packed_layers(model)
    plain = {f"{name}.weight": layer.dequantized() for name, layer in layers.items()}
    return plain | {f"{name}.bias": layer.bias.float() for name, layer in layers.items()}


def requantized(state: dict[str, Tensor], type_name: str) -> dict[str, Tensor]:
    """What is left of merged weights when they are packed into the file's type again."""
    result = {name: weight.float() for name, weight in state.items()}
    for name, weight in result.items():
        if weight.dim() == 2 and name.startswith("blocks."):
            packed = torch.from_numpy(encode(weight.numpy(), GGMLQuantizationType[type_name]))
            result[name] = dequantize(packed, type_name, weight.shape)
    return result


def digest(model: nn.Module) -> str:
    """Hash of all bytes that the layers hold."""
    sha = hashlib.sha256()
    for layer in packed_layers(model).values():
        sha.update(layer.weight.data.contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


def seconds_a_step(steps: dict[str, Callable[[], Tensor]], turns: int = 5) -> dict[str, float]:
    """Medians of steps that take turns, so that a busy moment of the machine hits all of them alike."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def measure(
    path: Path, loras: list[Path], type_name: str, width: int, blocks: int, inputs: tuple[Tensor, ...]
) -> Result:
    """Run one file with and without the LoRAs, and hold it to the merged model."""
    model = load_model(path, width, blocks)
    layers = packed_layers(model)
    before = digest(model)
    patches = [p for lora, strength in zip(loras, STRENGTHS, strict=True) for p in read_lora(lora, layers, strength)]
    stack = ResidualStack()
    for name, patch in patches:
        stack.add(name, patch)
    stack.build(layers, FactorCache())

    def with_loras() -> Tensor:
        with stack.active(layers, CPU):
            return model(*inputs)

    base, grafted, again = model(*inputs), with_loras(), model(*inputs)
    state = decoded(model)
    full = merged(state, patches)
    wide = [x.double() for x in inputs]
    true_base = dense(state, width, blocks, torch.float64)(*wide)
    true_effect = dense(full, width, blocks, torch.float64)(*wide) - true_base
    lossy = dense(requantized(full, type_name), width, blocks, torch.float32)(*inputs)
    if not torch.equal(base, again) or digest(model) != before:
        raise SystemExit(f"{type_name}: the base changed")

    def kept(effect: Tensor) -> float:
        return ((effect * true_effect).sum() / true_effect.square().sum()).item()

    rounding = math.sqrt(model.matmuls() * 4 * width) * 2.0**-24
    # the effect is the difference of two outputs, each with that error
    of_effect = math.sqrt(2) * rounding * (true_base.norm() / true_effect.norm()).item()
    twin = dense(full, width, blocks, torch.float32)
    return Result(
        type_name, by_name(type_name).bits_per_weight, sum(layer.weight.nbytes for layer in layers.values()),
        relative(base, true_base), relative(grafted.double() - base, true_effect), kept(grafted.double() - base),
        relative(lossy - true_base, true_effect), kept(lossy - true_base), (rounding, of_effect),
        seconds_a_step({"base": lambda: model(*inputs), "loras": with_loras, "merged": lambda: twin(*inputs)}),
    )  # fmt: skip


# Showing


HEADERS = (
    "type", "bits a\nweight", "MB", "error of\nthe base", "error of\nthe effect", "effect\nkept",
    "requantized:\nerror", "effect\nkept", "ms a step:\nGraft", "with two\nLoRAs", "merged\nfp32",
)  # fmt: skip


def cells(result: Result) -> list[str]:
    """A row of the table."""
    return [
        result.type_name, f"{result.bits:.2f}", f"{result.nbytes / 1e6:.1f}", f"{result.base_error:.1e}",
        f"{result.effect_error:.1e}", f"{result.kept:.4f}", f"{result.requantized_error:.2g}",
        f"{result.requantized_kept:.2f}",
        *(f"{1000 * result.seconds[name]:.0f}" for name in ("base", "loras", "merged")),
    ]  # fmt: skip


def as_text(results: list[Result]) -> str:
    """The table in plain text."""
    split = [header.split("\n") for header in HEADERS]
    rows = [[h[0] if len(h) > 1 else "" for h in split], [h[-1] for h in split], *map(cells, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines[:2], "-" * len(lines[0]), *lines[2:]])


INK, GRID, GRAFT, OTHER = "#22272e", "#d8dee6", "#1a7f5a", "#c8553d"


def as_picture(results: list[Result], title: str, note: str, path: Path) -> None:
    """The table, the errors on a logarithmic axis, and what is left of the LoRAs' effect."""
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK, "axes.edgecolor": GRID})
    figure = plt.figure(figsize=(12, 4.9 + 0.36 * len(results)), dpi=130, facecolor="white")
    grid = figure.add_gridspec(
        2, 2, height_ratios=(1.25 + 0.33 * len(results), 3.0), hspace=0.22, wspace=0.16,
        left=0.06, right=0.97, top=0.875, bottom=0.075,
    )  # fmt: skip
    figure.text(0.035, 0.958, title, fontsize=16, fontweight="bold", va="center")
    figure.text(0.035, 0.915, note, fontsize=10, color="#57606a", va="center")
    _draw_table(figure.add_subplot(grid[0, :]), results)
    _draw_errors(figure.add_subplot(grid[1, 0]), results)
    _draw_kept(figure.add_subplot(grid[1, 1]), results)
    figure.savefig(path)
    plt.close(figure)


def _draw_table(axes: Any, results: list[Result]) -> None:
    axes.axis("off")
    table = axes.table([cells(r) for r in results], colLabels=HEADERS, cellLoc="center", bbox=(0, 0, 1, 1))
    table.auto_set_font_size(False)
    table.set_fontsize(10.5)
    header = 1.7 / (len(results) + 1.7)
    for (row, column), cell in table.get_celld().items():
        cell.set_height(header if row == 0 else (1 - header) / len(results))
        cell.visible_edges = "B"
        cell.set_edgecolor(INK if row == 0 else GRID)
        bold = row == 0 or column in (0, 5)
        colour = {3: GRAFT, 4: GRAFT, 5: GRAFT, 6: OTHER, 7: OTHER}.get(column, INK) if row else INK
        cell.set_text_props(fontweight="bold" if bold else "normal", color=colour)


def _clean(axes: Any, title: str, results: list[Result]) -> None:
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold")
    axes.set_xticks(range(len(results)), [r.type_name for r in results])
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, colors=INK)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_errors(axes: Any, results: list[Result]) -> None:
    _clean(axes, "Errors, and the most that rounding explains (–)", results)
    places = range(len(results))
    for index, values, colour, label in (
        (None, [r.requantized_error for r in results], OTHER, "effect, requantized"),
        (1, [r.effect_error for r in results], GRAFT, "effect"),
        (0, [r.base_error for r in results], INK, "base"),
    ):
        axes.plot(places, values, "o", color=colour, markersize=8, label=label)
        if index is not None:
            axes.plot(places, [r.bounds[index] for r in results], "_", color=colour, markersize=26, markeredgewidth=1.6)
    axes.set_yscale("log")
    axes.set_ylim(1e-7, 1e4)
    axes.minorticks_off()
    axes.set_xlim(-0.6, len(results) - 0.4)
    axes.legend(loc="upper right", ncols=3, frameon=False, fontsize=9, handletextpad=0.3, columnspacing=1.2)


def _draw_kept(axes: Any, results: list[Result]) -> None:
    _clean(axes, "Share of the LoRAs' effect that is left", results)
    for offset, values, colour, label in (
        (-0.2, [r.kept for r in results], GRAFT, "Graft"),
        (0.2, [r.requantized_kept for r in results], OTHER, "merged and requantized"),
    ):
        bars = axes.bar([i + offset for i in range(len(results))], values, 0.36, color=colour, label=label)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8.5, color=INK)
    axes.set_ylim(min(0.0, *(1.6 * r.requantized_kept for r in results)), 1.35)
    axes.legend(loc="upper right", ncols=2, frameon=False, fontsize=9)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--width", type=int, default=512, help="a multiple of 256")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "demo.png")
    return parser.parse_args()


def run(args: argparse.Namespace, folder: Path) -> Iterator[Result]:
    """Write the files into `folder` and measure type by type."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        empty = Transformer(nn.Linear, args.width, args.blocks)
    weights = random_weights(empty, generator)
    inputs = (torch.randn(1, TOKENS, CHANNELS, generator=generator), torch.randn(1, args.width, generator=generator))
    loras = write_loras(folder, weights, generator)
    for type_name in args.types:
        path = write_model(folder / f"{type_name}.gguf", weights, type_name)
        yield measure(path, loras, type_name, args.width, args.blocks, inputs)


def main() -> int:
    args = arguments()
    started = time.perf_counter()
    results = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for result in run(args, Path(folder)):
            results.append(result)
            print(f"{result.type_name} measured", file=sys.stderr)
    note = (
        f"{args.blocks} transformer blocks at {args.width} with random weights, {TOKENS} tokens, fp32; "
        f"LoRAs of rank 16 (all layers) and 32 (q, k, v apart), |ΔW| = {STRENGTH_OF_DELTA:.0%} of |W|"
    )
    print(f"\n{note}\n\n{as_text(results)}\n")
    as_picture(results, "LoRAs beside packed weights: their full effect on every GGUF type", note, args.out)
    print(f"{args.out} written; packed bytes unchanged; {time.perf_counter() - started:.0f} s")
    if failed := [r.type_name for r in results if not r.passes]:
        print(f"an error exceeds what rounding explains: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
