"""Files that hold every kind of adapter, on whole models: a Graft model does what ComfyUI does on the decoded one.

Each layer gets another kind, through the host's own loader and the stock nodes' way, and through GraftLoraStack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import adapter_samples as samples
import pytest
import torch
from adapter_samples import Sampler
from architectures import NARROW
from generation import both_models, distance, fingerprint, sample, with_lora
from safetensors.torch import save_file

TYPES = ("Q8_0", "Q4_K", "IQ3_S")
CASES = {f"{a.name}-{t}": (a, t) for a in NARROW.values() for t in TYPES}
INPUTS_AND_ENDS = (
    "x_embedder", "patch_embedding", "input_blocks.0", "img_in", "txt_in", "time_in", "vector_in", "guidance_in",
    "final_layer", "single_blocks.0.modulation",
)  # fmt: skip
"""Smaller than most of the blocks' layers, so that more kinds find a place in one file."""

# the host leaves LoKr with a core out
EXACT = [k for k in (samples.KINDS | samples.CONV_KINDS) if "oft" not in k and k != "lokr core"]
TURNED = ["oft", "boft", "oft constrained", "lora", "boft rescaled"]
"""ComfyUI inverts their matrices in fp32."""

MAGNITUDE = {"lora": 4, "loha": 7, "lokr": 8, "glora": 5}
SIZE = 0.3  # of ΔW over W


def sized(value: tuple, weight: torch.Tensor) -> tuple:
    """A sample with its ΔW and its magnitudes in proportion to `weight`."""
    kind, fields = value[0], list(value[1])
    norm = weight.norm()
    if kind in ("oft", "boft"):
        return kind, tuple(fields)
    if kind in ("diff", "set"):
        return kind, (fields[0] * (norm / fields[0].norm() * (1 if kind == "set" else SIZE)),)
    if kind == "glora":
        fields[0] = fields[0] / weight.shape[1] ** 0.5
    first = {"lora": 0, "loha": 0, "glora": 2}.get(kind, 0 if fields[0] is not None else 3)
    delta = samples.difference(torch.zeros(weight.shape, dtype=torch.float64), kind, tuple(fields))
    fields[first] = fields[first] * (SIZE * norm / delta.norm()).float()
    magnitude = fields[MAGNITUDE[kind]]
    if magnitude is not None:
        axis = 0 if magnitude.shape[0] == weight.shape[0] else 1
        unit = math.sqrt(weight.numel() / weight.shape[axis])
        fields[MAGNITUDE[kind]] = magnitude / unit * (norm / math.sqrt(weight.shape[axis])).float()
    return kind, tuple(fields)


def fits(kind: str, weight: torch.Tensor) -> bool:
    if any(n % 16 for n in weight.shape[:2]):
        return kind == "diff"
    if kind in samples.CONV_KINDS and weight.dim() == 2:
        return False
    # the host knows these on images only
    return kind not in ("loha tucker", "tucker") or weight.dim() < 5 or weight[0, 0].numel() == 1


def files_of(
    weights: dict[str, torch.Tensor], biased: set[str], kinds: list[str], seed: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Files in kohya's names with one kind after the other, a layer each, and differences of biases.

    As many as it takes for every kind that fits a layer to be on one.
    """
    r = Sampler(seed, torch.float32)
    makers = samples.KINDS | samples.CONV_KINDS
    uses = dict.fromkeys(kinds, 0)
    needed = {k for k in kinds if any(fits(k, weight) for weight in weights.values())}
    while any(uses[k] == 0 for k in needed):
        state = {}
        for name, weight in weights.items():
            kind = min((k for k in (*kinds, "diff") if fits(k, weight)), key=lambda k: uses.get(k, math.inf))
            uses[kind] = uses.get(kind, 0) + 1
            value = sized(makers[kind](r, tuple(weight.shape)), weight)
            for field, tensor in zip(samples.FIELDS[value[0]], value[1], strict=False):
                if tensor is not None:
                    state[f"lora_unet_{name.replace('.', '_')}.{field}"] = torch.as_tensor(tensor).contiguous()
            if name in biased:
                state[f"lora_unet_{name.replace('.', '_')}.diff_b"] = r(weight.shape[0], scale=0.1)
        yield state


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def models(request, pack, tmp_path_factory):
    """A Graft model, ComfyUI's own of the same file, and the weights that adapters go to."""
    with both_models(pack, *request.param, tmp_path_factory.mktemp("gguf")) as (architecture, graft, dense):
        wanted = (*architecture.lora_layers, *INPUTS_AND_ENDS)
        names = [name.removeprefix("diffusion_model.") for name in graft.graft.layers]
        state = dense.model.diffusion_model.state_dict()
        weights = {n: state[f"{n}.weight"] for n in names if n.startswith(wanted)}
        yield architecture, graft, dense, weights


def test_every_kind_is_what_comfyui_makes_of_it(models, pack, folders):
    architecture, graft, dense, weights = models
    biased = {name for name in weights if graft.graft.layers[f"diffusion_model.{name}"].bias is not None}
    before, base, ours = fingerprint(graft), sample(dense, architecture), sample(graft, architecture)
    files = [
        (state, tolerance)
        for kinds, tolerance, seed in ((EXACT, 1e-4, 0), (TURNED, 1e-3, 1))
        for state in files_of(weights, biased, kinds, seed)
    ]
    for i, (state, tolerance) in enumerate(files):
        want = sample(with_lora(dense, state, 0.7), architecture) - base
        patched = with_lora(graft, state, 0.7)
        assert not patched.rejected
        got = sample(patched, architecture) - ours
        assert want.norm() > 0.01 * base.norm(), "the file has no effect to compare"
        assert distance(got, want) < tolerance
        paths = {r.path for r in patched.residuals.residuals.values()}
        assert paths == {"residual"}
        if i == 0:
            save_file(state, folders / "loras" / "every_kind.safetensors")
            stack = pack("nodes.lora").GraftLoraStack().apply(graft, lora_1="every_kind.safetensors", strength_1=0.7)
            assert distance(sample(stack["result"][0], architecture) - ours, got) < 1e-5
    assert torch.equal(sample(graft, architecture), ours), "the base is not what it was before the files"
    assert fingerprint(graft) == before
