"""The main job without a host, to look at: the demo model in many GGUF types, with LoRAs beside its packed weights.

    make demo            # demo.png and the table below it; a few minutes on two cores once .venv is there

The files in `demo/` are opened with the reader and run in the layers that the nodes use, in fp32. Other types are
quantized on the fly from the Q8_0 file. Every picture is drawn a second time by torch's own layers with the LoRAs
merged into the dequantized weights. The numbers are of one model call, held to the same merged model in fp64:

    error of the base       |y - y64| / |y64|, without LoRAs
    error of the effect     the same of what the LoRA changes
    effect kept             the share of the true effect that is left: 1 is all of it

The last two also for what some loaders do: dequantize, merge, requantize to the file's type. There are no times: in
a model as small as this the calls outweigh the arithmetic. `make bench-comfy` takes layers of Flux's size.

The exit status is 1 if an error exceeds what rounding explains. Each of the n matmuls on the way adds an error of
about sqrt(K) 2^-24 of its result (K additions, rounded independently): together e = sqrt(n K) 2^-24. Guidance g
makes (2g - 1) e of it, and what a step adds is at most doubled by the steps after it, twice for the two pictures:
4 (2g - 1) e is how far a picture may be from its twin, in root mean square and relative to the picture.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from checkout import ROOT
from gguf import GGMLQuantizationType
from graft.demo import pictures
from graft.demo.grafted import Grafted, decoded, dense, load_model, shipped
from graft.demo.wan import Wan
from graft.kernels import by_name, dequantize
from graft.ops import load_adapters, open_gguf
from graft.ops.layers import packed_layers
from graft.tests.gguf_samples import encode, write_gguf
from sheet import Section, draw_sheet
from torch import Tensor, nn

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "IQ3_S", "IQ2_XS")
STYLES = ("neon", "blueprint", "linocut")
STRENGTHS = (0.0, 0.5, 1.0, 1.5)
TOGETHER = {"neon": 0.6, "blueprint": 0.6}
SIDES = {"neon": 1.0, "blueprint": 1.0}
"""The left and the right half."""
PROMPTS = (
    "a red star and a blue ring on mint", "a pink heart on cream", "a blue flower on sand", "an orange moon on lilac",
    "a green triangle and a red circle on rose", "a yellow star on sky",
    "a teal circle and a purple heart and an orange square on mint",
    "a red moon and a yellow star and a blue flower on lilac",
)  # fmt: skip
SEED, STEPS, GUIDANCE = 7, 20, 3.0


# Files


def quantized(weights: Mapping[str, Tensor], like: Path, type_name: str, path: Path) -> Path:
    """The file `like` with what it holds in Q8_0 in another type."""
    tensors = {}
    for name, tensor in open_gguf(like).tensors.items():
        kind = type_name if tensor.fmt.name == "Q8_0" else tensor.fmt.name
        tensors[name] = (weights[name].numpy(), kind)
    return write_gguf(path, tensors, architecture="wan")


def requantized(state: Mapping[str, Tensor], like: Path) -> dict[str, Tensor]:
    """What is left of merged weights when they are packed into the file's types again."""
    result = {name: weight.float() for name, weight in state.items()}
    for name, tensor in open_gguf(like).tensors.items():
        if tensor.fmt.is_quantized:
            packed = torch.from_numpy(encode(result[name].numpy(), GGMLQuantizationType[tensor.fmt.name]))
            result[name] = dequantize(packed, tensor.fmt, tensor.shape)
    return result


def digest(model: nn.Module) -> str:
    """Hash of all bytes that the layers hold."""
    sha = hashlib.sha256()
    for layer in packed_layers(model).values():
        sha.update(layer.weight.data.contiguous().view(torch.uint8).numpy())
    return sha.hexdigest()


# Measuring


def rounding(model: Wan) -> float:
    """What fp32 adds to one call, relative to its result; see above."""
    block = 10 + 2 + 2  # the matrices of a block, and two products for each attention
    wide = max(layer.logical_shape[1] for name, layer in packed_layers(model).items() if name.startswith("blocks."))
    return math.sqrt((7 + block * len(model.blocks)) * wide) * 2.0**-24


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@dataclass
class Result:
    """What was measured for one type."""

    type_name: str
    bits: float
    nbytes: int
    base_error: float
    effect_error: float
    kept: float
    requantized_error: float
    requantized_kept: float
    bounds: tuple[float, float]

    @property
    def passes(self) -> bool:
        return self.base_error <= self.bounds[0] and self.effect_error <= self.bounds[1]


def measure(path: Path, type_name: str, grafted: Grafted, lossy: Wan) -> Result:
    """One model call halfway through, for a prompt and the empty one, against the merged model in fp64."""
    x = pictures.beside_places(pictures.noise(SEED, 2))
    inputs = (x, torch.full((2,), 750.0), pictures.prompts([PROMPTS[0], ""]))
    model, before = grafted.model, digest(grafted.model)
    base, changed, again = model(*inputs), grafted(*inputs), model(*inputs)
    if not torch.equal(base, again) or digest(model) != before:
        raise SystemExit(f"{type_name}: the base changed")
    wide = [value.double() for value in inputs]
    true_base = dense(decoded(model), torch.float64)(*wide)
    true_effect = grafted.twin(torch.float64)(*wide) - true_base
    effect, lossy_effect = changed.double() - base, lossy(*inputs) - true_base

    def kept(effect: Tensor) -> float:
        return ((effect * true_effect).sum() / true_effect.square().sum()).item()

    error = rounding(model)
    # the effect is the difference of two outputs, each with that error
    of_effect = math.sqrt(2) * error * (true_base.norm() / true_effect.norm()).item()
    return Result(
        type_name, by_name(type_name).bits_per_weight, path.stat().st_size,
        relative(base, true_base), relative(effect, true_effect), kept(effect),
        relative(lossy_effect, true_effect), kept(lossy_effect), (error, of_effect),
    )  # fmt: skip


# Pictures


class Studio:
    """Draws every picture twice, and remembers how far the two are apart."""

    def __init__(self) -> None:
        self.strays: dict[str, float] = {}
        self.bound = 0.0

    def draw(self, what: str, grafted: Grafted, texts: Sequence[str]) -> Tensor:
        """``[n, 128, 128, 3]`` by the packed model, held to its merged twin."""
        drawn, twin = paint(grafted, texts), paint(grafted.twin(), texts)
        self.strays[what] = relative(drawn, twin)
        self.bound = 4 * (2 * GUIDANCE - 1) * rounding(grafted.model)
        return drawn

    def failures(self) -> list[str]:
        return [what for what, stray in self.strays.items() if stray > self.bound]


def paint(model: Callable[[Tensor, Tensor, Tensor], Tensor], texts: Sequence[str]) -> Tensor:
    return pictures.sample(model, texts, seed=SEED, steps=STEPS, guidance=GUIDANCE)


def strength_rows(studio: Studio, model: Wan, base: Tensor, styles: Sequence[str]) -> Iterator[Section]:
    """A row for each style: the first prompt at every strength, the last ones, in their columns, at full strength."""
    for style in styles:
        row, others = [("× 0", base[0])], []
        for strength in STRENGTHS[1:]:
            texts = PROMPTS[:1] + PROMPTS[len(STRENGTHS) :] if strength == 1 else PROMPTS[:1]
            drawn = studio.draw(f"{style} {strength:g}", Grafted(model, {style: strength}), texts)
            row.append((f"× {strength:g}", drawn[0]))
            others += [(f"× {strength:g}", picture) for picture in drawn[1:]]
        kind = load_adapters(shipped(f"{style}.safetensors")).what
        remark = f"{kind}, at these strengths; nothing is reloaded between them"
        yield Section(style.capitalize(), remark, [*row, *others])


def region_rows(studio: Studio, model: Wan) -> list[Section]:
    """Two LoRAs on all of the picture, and each on its own half of it."""
    left = torch.zeros(1, 2, 2)
    left[..., 0] = 1
    masks = dict(zip(SIDES, (left, 1 - left), strict=True))
    everywhere = studio.draw("both everywhere", Grafted(model, SIDES), PROMPTS)
    by_region = studio.draw("by region", Grafted(model, SIDES, masks), PROMPTS)
    first, second = SIDES
    return [
        Section("Both everywhere", f"{first} and {second}, each × 1: they bleed", [("", p) for p in everywhere]),
        Section(
            "By region, one pass", f"{first} on the left half, {second} on the right half, each × 1",
            [("", picture) for picture in by_region],
        ),
    ]  # fmt: skip


def type_rows(studio: Studio, types: Sequence[str], folder: Path, results: list[Result]) -> list[Section]:
    """The same picture from every type, the LoRA grafted on; and merged and requantized."""
    source = shipped("Q8_0.gguf")
    weights = {name: value.float() for name, value in decoded(load_model(source)).items()}
    ours, theirs = [], []
    for type_name in types:
        path = source if type_name == "Q8_0" else quantized(weights, source, type_name, folder / f"{type_name}.gguf")
        grafted = Grafted(load_model(path), {"neon": 1.0})
        lossy = dense(requantized(grafted.merged(), path), torch.float32)
        results.append(measure(path, type_name, grafted, lossy))
        ours.append((type_name, studio.draw(type_name, grafted, PROMPTS[:1])[0]))
        theirs.append((f"{results[-1].requantized_kept:.0%} kept", paint(lossy, PROMPTS[:1])[0]))
        print(f"{type_name} measured", file=sys.stderr)
    return [
        Section("Every type", "neon grafted onto the packed weights: all of its effect, on each", ours),
        Section("The other way", "neon merged into the weights and requantized: this much of it is left", theirs),
    ]


# Showing


HEADERS = (
    "type", "bits a\nweight", "MB", "error of\nthe base", "error of\nthe effect", "effect\nkept",
    "requantized:\nerror", "effect\nkept",
)  # fmt: skip


def cells(result: Result) -> list[str]:
    """A row of the table."""
    return [
        result.type_name, f"{result.bits:.2f}", f"{result.nbytes / 1e6:.1f}", f"{result.base_error:.1e}",
        f"{result.effect_error:.1e}", f"{result.kept:.4f}", f"{result.requantized_error:.2g}",
        f"{result.requantized_kept:.2f}",
    ]  # fmt: skip


def as_text(results: list[Result]) -> str:
    """The table in plain text."""
    split = [header.split("\n") for header in HEADERS]
    rows = [[h[0] if len(h) > 1 else "" for h in split], [h[-1] for h in split], *map(cells, results)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines[:2], "-" * len(lines[0]), *lines[2:]])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--styles", nargs="*", default=STYLES)
    parser.add_argument("--out", type=Path, default=ROOT / "demo.png")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    started = time.perf_counter()
    studio, results = Studio(), []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model = load_model(shipped("Q8_0.gguf"))
        base = studio.draw("base", Grafted(model, {}), PROMPTS)
        remark = "demo/graft-demo-Q8_0.gguf, no LoRA: a prompt for each column"
        sections = [Section("The base", remark, [("", picture) for picture in base])]
        if set(SIDES) <= set(args.styles):
            sections += region_rows(studio, model)
        sections += strength_rows(studio, model, base, args.styles)
        if set(TOGETHER) <= set(args.styles):
            both = studio.draw("together", Grafted(model, TOGETHER), PROMPTS)
            names = " and ".join(f"{style} × {strength:g}" for style, strength in TOGETHER.items())
            sections.append(Section("Together", names, [("", picture) for picture in both]))
        sections += type_rows(studio, args.types, Path(folder), results)
    worst = max(studio.strays, key=lambda what: studio.strays[what])
    note = (
        f"Every picture is within {studio.bound:.0e} of its twin, drawn with the LoRA merged in fp32 "
        f"(at most {studio.strays[worst]:.0e}, {worst})."
    )
    print(f"\n{as_text(results)}\n\n{note}")
    draw_sheet(args.out, sections, HEADERS, [cells(result) for result in results], note)
    print(f"{args.out} written; packed bytes unchanged; {time.perf_counter() - started:.0f} s")
    failed = [result.type_name for result in results if not result.passes] + studio.failures()
    if failed:
        print(f"an error exceeds what rounding explains: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
