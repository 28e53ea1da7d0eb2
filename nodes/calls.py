"""What a model call of the host tells strengths: the step, the conditionings, and where the picture is."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..ops.places import Architecture, Picture, Window, patch_of, picture_of
from ..ops.strengths import Call

CANVAS = "graft_canvas"
"""Under which the host's options hold the size of the whole picture, and where areas begin, by conditioning."""
PROMPTS = "graft_prompts"
"""Under which they hold what each conditioning is for its guider, such as ``positive``."""


def call_of(model: Any, architecture: Architecture | None, x: torch.Tensor, *args: Any, **kwargs: Any) -> Call:
    """What the host's call of a model, ``apply_model(x, t, c_concat, c_crossattn, control, options, …)``, tells."""
    options = args[4] if len(args) > 4 else kwargs.get("transformer_options", {})
    sigmas, sigma = options.get("sample_sigmas"), float(args[0].flatten()[0])
    step, steps = _step(sigma, [] if sigmas is None else sigmas.tolist())
    picture = _picture(model.diffusion_model, x, kwargs, options)
    return Call(step / steps, step, sigma, _names(options), picture, architecture, _windows(x, options))


def predict_noise_told(executor: Any, x: torch.Tensor, timestep: Any, options: Any = None, seed: Any = None) -> Any:
    """The host's call of a guider: calls of the model get to know what each conditioning is for it.

    Where it stands in a call does not tell. Self-attention guidance asks for the negative one alone, and a guider for
    two prompts has it first.
    """
    prompts: dict[Any, str] = {}
    for name, conds in executor.class_obj.conds.items():
        for cond in conds or ():
            # the host gives a prompt for an area a copy among the negative ones, under the same id
            uuid = cond.get("uuid")
            prompts[uuid] = name if prompts.get(uuid, name) == name else ""
    options = options or {}
    told = {**options.get("transformer_options", {}), PROMPTS: prompts}
    return executor(x, timestep, {**options, "transformer_options": told}, seed)


def _names(options: Mapping[str, Any]) -> tuple[str, ...]:
    """What the conditionings of a call are, in order."""
    indices, uuids = options.get("cond_or_uncond") or [0], options.get("uuids") or ()
    by_place = tuple(("positive", "negative")[i] if i < 2 else str(i) for i in indices)
    prompts = options.get(PROMPTS)
    if not prompts or len(uuids) != len(by_place):
        return by_place
    return tuple(prompts.get(uuid, "other") or place for uuid, place in zip(uuids, by_place, strict=True))


def calc_cond_batch_told(executor: Any, model: Any, conds: Any, x: torch.Tensor, timestep: Any, options: dict) -> Any:
    """The host's call for all conditionings, of which some may be for an area: calls of the model get to know these.

    It cuts an area out of the picture and does not say where.
    """
    areas = {
        cond.get("uuid"): tuple(cond["area"])[-2:]
        for part in conds
        for cond in part or ()
        if cond.get("area") is not None
    }
    told = {**options.get("transformer_options", {}), CANVAS: (tuple(x.shape[-2:]), areas)}
    return executor(model, conds, x, timestep, {**options, "transformer_options": told})


def _windows(x: torch.Tensor, options: Mapping[str, Any]) -> tuple[Window | None, ...] | None:
    """Which part of the picture each conditioning draws, see `Call`."""
    size, areas = options.get(CANVAS, (tuple(x.shape[-2:]), {}))
    seen, whole, uuids = options.get("context_window"), tuple(x.shape[-2:]) == size, options.get("uuids") or ()
    if seen is not None and not (hasattr(seen, "dim") and hasattr(seen, "index_list")):
        return None  # windows of another pack, which may cut as they like
    axis = -1 if seen is None else seen.dim - (x.dim() - 3)
    if axis in (1, 2) or (axis == 0 and x.dim() == 5):
        window = None if areas and axis else _context(x, seen, axis, size)
        if window is None:
            return None
    elif whole:
        return ()
    else:
        window = Window(*size)
    if not uuids or not (whole or all(uuid in areas for uuid in uuids)):
        return None
    corners = (areas.get(uuid, (0, 0)) for uuid in uuids)
    return tuple(replace(window, top=top, left=left) for top, left in corners)


def _context(x: torch.Tensor, seen: Any, axis: int, size: tuple[int, int]) -> Window | None:
    """What a call draws of a whole that the host's context windows go over; None where nobody tells.

    Args:
        axis: see `Window`.
        size: rows and columns of what the calls of this window draw.
    """
    total, indices = getattr(seen, "total_frames", 0), list(seen.index_list)  # old hosts do not say how many
    before, length = getattr(seen, "causal_anchor_index", None), x.shape[seen.dim]
    if before is not None and length == len(indices) + 1:
        indices.insert(0, before)
    if length != len(indices):  # with frames behind them that LTX-Video is guided by
        total = 0
    if axis:
        rows, columns = (total, size[1]) if axis == 1 else (size[0], total)
        return Window(rows, columns, indices=tuple(indices), axis=axis) if total else None
    return Window(*size, indices=tuple(indices), total=total)


def _step(sigma: float, sigmas: Sequence[float]) -> tuple[float, int]:
    """Which step of how many this is; samplers also ask between two, and fp32 rounds what they ask with."""
    steps = max(1, len(sigmas) - 1)
    for number, (high, low) in enumerate(itertools.pairwise(sigmas)):
        if sigma >= high * (1 - 1e-5):
            return float(number), steps
        if sigma > low * (1 + 1e-5):
            return number + (high - sigma) / (high - low), steps
    return float(steps - 1 if sigmas else 0), steps


def _picture(
    model: Any, x: torch.Tensor, conditions: Mapping[str, Any], options: Mapping[str, Any]
) -> Picture | None:
    """Where the picture is among the tokens of this call; None where references are laid among the words."""
    references = conditions.get("ref_latents") or ()
    multiple = getattr(model, "pad_tokens_multiple", None) or 1
    if references and multiple > 1:
        return None
    behind = [*references, *(conditions.get("context_latents") or ())]
    before = [] if getattr(model, "ref_conv", None) is None else [conditions.get("reference_latent")]
    before.append(conditions.get("ref_latent"))
    return picture_of(x, patch_of(model), before, behind, multiple, options)
