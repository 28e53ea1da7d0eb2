"""LoRAs by region and step in ComfyUI: what four cost beside four plain ones, and beside the host's own masked hooks.

A part of `make bench-comfy`, which starts ComfyUI and loads the models. The time of a step is what lies between two
callbacks of the sampler: the whole of it, with all that hooks and strengths do between two calls of the model. It is
counted in the processor's time, which other programs on the machine change less.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

STEPS = 4
EVERYWHERE = "four LoRAs, everywhere and always"
BY_REGION = "four LoRAs, each with a mask and a schedule"
HOSTS_OWN = "the same hooks on ComfyUI's own model, fp32"
STRENGTH = 0.8
KEYS = ((1.0, 0.4), (0.3, 1.0), (0.9, 0.6), (0.5, 0.8))
"""First and last strength of each LoRA's schedule."""


def measure(
    graft: Any, dense: Any, loras: list[dict], conditioning: list, size: int, pack: Callable, turns: int
) -> str:
    """A Markdown table.

    Args:
        graft: a MODEL of Graft's.
        dense: the host's own, of the same weights in fp32.
        loras: four files.
        size: of a side of the latent, with 16 channels.
        pack: finds a module of Graft's by name.
        turns: samplings with constants and with masks and schedules, in turn.
    """
    plain, none = with_patches(graft, loras), graft.clone()
    varying = with_patches(graft, loras, strengths(pack))
    ways: dict[str, tuple[Any, list]] = {
        "no LoRA": (none, conditioning),
        EVERYWHERE: (plain, conditioning),
        BY_REGION: (varying, conditioning),
        "ComfyUI's hooks, each with a mask and keyframes, on Graft's model": (
            graft, with_hooks(conditioning, loras, size),
        ),
    }  # fmt: skip
    found = {name: [sample(*way, size)] for name, way in ways.items()}
    for _ in range(turns - 1):
        for name in (EVERYWHERE, BY_REGION):
            found[name].append(sample(*ways[name], size))
    found[HOSTS_OWN] = [sample(dense, with_hooks(conditioning, loras, size), size)]
    return table(found)


def strengths(pack: Callable) -> list[Any]:
    """A quarter of the picture each, and a course."""
    module = pack("ops.strengths")
    masks = pack("nodes.strengths").regions("four quarters", 0.0, (0, 0, 1, 1))
    curves = (module.Curve(((0.0, first, "linear"), (1.0, last, "hold"))) for first, last in KEYS)
    return [module.Strength(curve, mask[None]) for curve, mask in zip(curves, masks, strict=True)]


def with_patches(model: Any, loras: list[dict], when: list | None = None) -> Any:
    import comfy.lora

    model = model.clone()
    names = comfy.lora.model_lora_keys_unet(model.model, {})
    for index, lora in enumerate(loras):
        strength = {} if when is None else {"when": when[index]}
        model.add_patches(comfy.lora.load_lora(dict(lora), names), STRENGTH, **strength)
    return model


def hooks(loras: list[dict]) -> list[Any]:
    """What Create Hook LoRA and Create Hook Keyframes make: a keyframe for each step."""
    import comfy.hooks

    made = []
    for lora, (first, last) in zip(loras, KEYS, strict=True):
        group, keyframes = comfy.hooks.create_hook_lora(lora, STRENGTH, 0.0), comfy.hooks.HookKeyframeGroup()
        for step in range(STEPS):
            share = step / STEPS
            keyframes.add(comfy.hooks.HookKeyframe(first + (last - first) * share, share))
        group.set_keyframes_on_hooks(keyframes)
        made.append(group)
    return made


def with_hooks(conditioning: list, loras: list[dict], size: int) -> list:
    """The conditioning once for each quarter of the picture, as Cond Set Props and Cond Pair Combine make it."""
    import comfy.hooks
    import torch

    half = size // 2
    corners = [(top, left) for top in (0, half) for left in (0, half)]
    regions: list = []
    for (top, left), group in zip(corners, hooks(loras), strict=True):
        mask = torch.zeros(1, size, size)
        mask[:, top : top + half, left : left + half] = 1
        regions += comfy.hooks.set_conds_props([conditioning], 1.0, "default", mask, group)[0]
    return regions


@contextmanager
def counted(network: Any) -> Iterator[list[int]]:
    """How often it is called."""
    calls: list[int] = []
    handle = network.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


class Steps(NamedTuple):
    """Seconds of the processor of every step of a sampling but the first, and passes of the model in a step."""

    seconds: list[float]
    passes: float


def sample(model: Any, positive: list, size: int) -> Steps:
    import comfy.sample
    import torch

    latent = torch.zeros(1, 16, size, size)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    stamps: list[float] = []
    with counted(model.model.diffusion_model) as calls:
        comfy.sample.sample(
            model, noise, STEPS, 1.0, "euler", "simple", positive, positive, latent, disable_pbar=True,
            callback=lambda *_: stamps.append(time.process_time()),
        )  # fmt: skip
    seconds = [later - earlier for earlier, later in itertools.pairwise(stamps)]
    print(f"  {len(calls)} passes, {[round(t, 2) for t in seconds]} s", flush=True)
    return Steps(seconds, len(calls) / STEPS)


def table(found: dict[str, list[Steps]]) -> str:
    medians = {name: statistics.median(s for run in runs for s in run.seconds) for name, runs in found.items()}
    lines = ["| | passes a step | a step | times that by region |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {runs[0].passes:g} | {medians[name]:.2f} s | {medians[name] / medians[BY_REGION]:.2f} |"
        for name, runs in found.items()
    ]
    pairs = [
        b / a - 1
        for one, other in zip(found[EVERYWHERE], found[BY_REGION], strict=True)
        for a, b in zip(one.seconds, other.seconds, strict=True)
    ]
    low, middle, high = statistics.quantiles(pairs, n=4)
    return "\n".join(lines) + (
        f"\n\nMasks and schedules against constants, {len(pairs)} pairs of steps: median {middle:+.1%}, "
        f"middle half {low:+.1%} to {high:+.1%}"
    )
