"""What calibration is worth: the demo model quantized with and without it, on prompts that it was not calibrated on.

    make bench-calibration        # the tables in docs/benchmarks.md; three minutes on one core

All matrices that the demo's Q8_0 file holds in Q8_0 are quantized to a type, with nothing known of their inputs and
with the importance of 8 prompts. The error is |v - v'| / |v| of the model's output (the velocity), over 16 other
prompts with guidance and every fourth step of their sampling, where the quantized model is given what the unquantized
one saw.

The second table is of a repair: what rounding took from each weight, E = W - W', as a LoRA B·A of rank r beside it.
"Plain" is the nearest to E. "By inputs" changes what the layer gives least: |(E - BA) C^(1/2)| is the smallest there is
(EoRA, arXiv 2410.21271), where C is the mean of x xᵀ over what goes into the layer. "By a sketch" is what the nodes do,
with an eighth of their sketch's rows, as the demo is narrow. Against these stands what the same bytes buy without a
LoRA: some layers in the next larger type, those first where that takes the most from |E C^(1/2)| for its bytes. Bytes
are counted once with both factors in Q8_0, as ranks of 32 and more are stored, and once with B in F16, as these are.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from checkout import ROOT  # noqa: F401  (binds the package)
from graft.demo import pictures
from graft.demo.grafted import decoded, dense, load_model, shipped
from graft.demo.wan import Wan
from graft.kernels import Format, by_name, dequantize
from graft.ops import open_gguf
from graft.ops.calibration import Calibration, watched_layers
from graft.ops.extract import Change, cut
from graft.ops.files.imatrix import Importance, read_imatrix, write_imatrix
from graft.ops.quantize import needs_importance, quantize
from torch import Tensor, nn

CALIBRATED_ON = (
    "a red star and a blue ring on mint", "a pink heart on cream", "a blue flower on sand", "an orange moon on lilac",
    "a green triangle and a red circle on rose", "a yellow star on sky",
    "a teal circle and a purple heart and an orange square on mint",
    "a red moon and a yellow star and a blue flower on lilac",
)  # fmt: skip
HELD_OUT = (
    "a purple star on cream", "a green heart on sky", "a teal ring on rose", "a red square on lilac",
    "a yellow flower on mint", "a blue moon on cream", "an orange circle and a pink triangle on sand",
    "a purple ring and a green flower on sky", "a teal moon and a red heart on cream", "a pink square on sand",
    "a yellow circle and a blue triangle on mint", "an orange flower on rose",
    "a green star and a purple square and a teal heart on lilac",
    "a blue circle and a red flower and a pink moon on sky",
    "a yellow ring and an orange star and a green moon on rose", "a teal triangle on mint",
)  # fmt: skip
STEPS, SEEDS = 20, (1, 2)
"""Of noise: while calibrating, and on held-out prompts."""

TYPES = ("Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
RANKS = (4, 8, 16)
REPAIRED = {"Q4_K": "Q5_K", "Q3_K": "IQ4_XS", "Q2_K": "IQ3_XXS"}
"""And the next larger type."""

FACTORS = by_name("Q8_0")
SKETCHED = 64


class Call(NamedTuple):
    """What the unquantized model was given, and its answer."""

    inputs: tuple[Tensor, ...]
    output: Tensor


def watched_calls(model: Wan, prompts: tuple[str, ...], seed: int) -> list[Call]:
    """All calls of a sampling."""
    calls: list[Call] = []

    def noted(*inputs: Tensor) -> Tensor:
        output = model(*inputs)
        calls.append(Call(inputs, output))
        return output

    pictures.sample(noted, prompts, seed, STEPS)
    return calls


class Covariance:
    """Mean of x xᵀ of what goes into each linear layer, fp64 ``[K, K]``."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda _, inputs, name=name: self._add(name, inputs[0]))

    def _add(self, name: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1]).double()
        self.sums[name] = self.sums.get(name, 0) + rows.T @ rows
        self.rows[name] = self.rows.get(name, 0) + len(rows)

    def mean(self, name: str) -> Tensor:
        return self.sums[name] / self.rows[name]


def root_of(covariance: Tensor) -> Tensor:
    """Its symmetric square root."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def rounded(weight: Tensor, fmt: Format, importance: Tensor | None = None) -> Tensor:
    """What is left of a weight in a type, fp64."""
    packed = quantize(weight.float(), fmt, importance)
    return dequantize(packed.flatten(), fmt, weight.shape, torch.float32).double()


def repaired(missing: Tensor, rank: int, inputs: Tensor | None) -> Tensor:
    """The best product of rank `rank` for what a weight lacks, as it is stored."""
    found = cut(Change(missing.shape, full=missing.float()), rank, None if inputs is None else inputs.float())
    assert found.up is not None and found.down is not None
    # rows of B are too short for blocks, so it is rounded the other way round
    return rounded(found.up.T.contiguous(), FACTORS).T @ rounded(found.down, FACTORS)


class Bench:
    """The demo model, what it was calibrated to, and its calls on held-out prompts."""

    def __init__(self) -> None:
        path = shipped("Q8_0.gguf")
        self.state = decoded(load_model(path))
        self.names = [name for name, tensor in open_gguf(path).tensors.items() if tensor.fmt.name == "Q8_0"]
        model = dense(self.state, torch.float32)
        self.importance, self.sketches = self._calibrated(model)
        self.covariance = Covariance({name[:-7]: model.get_submodule(name[:-7]) for name in self.names})
        with torch.no_grad():
            watched_calls(model, CALIBRATED_ON, SEEDS[0])
        self.calls = watched_calls(dense(self.state, torch.float32), HELD_OUT, SEEDS[1])[::4]

    @staticmethod
    def _calibrated(model: Wan) -> tuple[Importance, Mapping[str, Tensor]]:
        """What a calibration tells, by way of a file, and its sketches, which are not in files."""
        calibration = Calibration(SKETCHED)
        with calibration.watching(watched_layers(model)):
            calls = watched_calls(model, CALIBRATED_ON, SEEDS[0])
        found = calibration.importance(len(calls), [f"{len(CALIBRATED_ON)} prompts"])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "demo.imatrix.gguf"
            write_imatrix(path, found)
            return read_imatrix(path), found.sketches

    @torch.no_grad()
    def error(self, weights: Mapping[str, Tensor]) -> float:
        """Of the model's output with these weights in place of its own."""
        model = dense({**self.state, **weights}, torch.float32)
        wrong = [(model(*call.inputs) - call.output).double().square().sum() for call in self.calls]
        right = [call.output.double().square().sum() for call in self.calls]
        return float((sum(wrong) / sum(right)).sqrt())

    def quantized(self, fmt: Format, calibrated: bool) -> dict[str, Tensor]:
        """All of the model's large matrices in a type."""
        known = self.importance if calibrated else {}
        return {name: rounded(self.state[name], fmt, known.get(name)) for name in self.names}

    def inputs_of(self, name: str, way: str) -> Tensor | None:
        """What a repair is made for."""
        if way == "by inputs":
            return root_of(self.covariance.mean(name.removesuffix(".weight")))
        return None if way == "plain" else self.sketches[name]

    def repaired(self, weights: Mapping[str, Tensor], rank: int, way: str) -> dict[str, Tensor]:
        """The same with a repair of that rank."""
        return {
            name: weight + repaired(self.state[name] - weight, rank, self.inputs_of(name, way))
            for name, weight in weights.items()
        }

    def bytes_of_repair(self, rank: int, up: Format) -> int:
        """Of all factors, with the rows of B in the type `up`."""
        shapes = [self.state[name].shape for name in self.names]
        return sum(rank * (FACTORS.row_bytes(columns) + up.row_bytes(rows)) for rows, columns in shapes)

    def mixed(self, small: str, large: str, nbytes: int) -> dict[str, Tensor]:
        """All in the type `small`, but for layers in `large` that take no more than `nbytes` beside it."""
        fmts = by_name(small), by_name(large)
        weights, better = (self.quantized(fmt, True) for fmt in fmts)

        def wrong(name: str, weight: Tensor) -> float:
            missing = self.state[name] - weight
            return float(((missing @ self.covariance.mean(name.removesuffix(".weight"))) * missing).sum())

        def price(name: str) -> int:
            rows, columns = self.state[name].shape
            return rows * (fmts[1].row_bytes(columns) - fmts[0].row_bytes(columns))

        worth = {name: (wrong(name, weights[name]) - wrong(name, better[name])) / price(name) for name in self.names}
        for name in sorted(self.names, key=lambda name: -worth[name]):
            if price(name) <= nbytes:
                weights[name], nbytes = better[name], nbytes - price(name)
        return weights

    @property
    def parameters(self) -> int:
        return sum(self.state[name].numel() for name in self.names)


def types_table(bench: Bench) -> dict[str, tuple[float, float]]:
    """Prints it; returns bits a weight and the calibrated error of each type."""
    print("| type | bits a weight | not calibrated | calibrated | error left |\n|---|---|---|---|---|")
    found = {}
    for name in TYPES:
        fmt = by_name(name)
        plain = None if needs_importance(fmt) else bench.error(bench.quantized(fmt, False))
        known = bench.error(bench.quantized(fmt, True))
        bits = 8 * fmt.type_size / fmt.block_size
        found[name] = bits, known
        shown = "refused |" if plain is None else f"{plain:.3f} |"
        share = "" if plain is None else f"{known / plain:.0%}"
        print(f"| {name} | {bits:.2f} | {shown} {known:.3f} | {share} |", flush=True)
    return found


def repair_table(bench: Bench, types: Mapping[str, tuple[float, float]]) -> None:
    print("\n| type | rank | plain | by inputs | by a sketch | with both factors in Q8_0 | B in F16 |")
    print("|---|---|---|---|---|---|---|")
    for name, larger in REPAIRED.items():
        weights = bench.quantized(by_name(name), True)
        for rank in RANKS:
            ways = ("plain", "by inputs", "by a sketch")
            columns = [f"{bench.error(bench.repaired(weights, rank, way)):.3f}" for way in ways]
            for up in (FACTORS, by_name("F16")):
                nbytes = bench.bytes_of_repair(rank, up)
                bits = types[name][0] + 8 * nbytes / bench.parameters
                other = bench.error(bench.mixed(name, larger, nbytes))
                columns.append(f"{bits:.2f} bits a weight; {larger} for some: {other:.3f}")
            print(f"| {name} | {rank} | {' | '.join(columns)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-repair", action="store_true", help="the first table only")
    options = parser.parse_args()
    bench = Bench()
    types = types_table(bench)
    if not options.no_repair:
        repair_table(bench, types)


if __name__ == "__main__":
    main()
