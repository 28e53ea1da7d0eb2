"""Training within the host: its model sampling gives noise and target, its guider loads models.

The host's samplers, wrappers and nodes see an ordinary sampling whose sampler happens to train, so what they do to a
model, such as another shift of the timesteps or a ControlNet, counts in training as well.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch

from ..kernels import GraftError
from ..ops.factors import ordinary
from ..ops.layers import PackedLayer

EARLIEST, LATEST = 1e-3, 1 - 1e-3
"""Shares of the way from noise to picture between which a step of training is."""

_KEPT = 64
"""Prepared examples that stay on the device: a conditioning may have 8 MB."""

_FUSED = re.compile(r"(apply|rms)_rope|adaln")
"""Functions of comfy_kitchen that models call on their activations."""

_APART = ("area", "mask", "control", "gligen", "strength", "start_percent", "end_percent")
"""What conditionings may have that keeps them from running in one batch."""


class Example(NamedTuple):
    """A picture to learn from.

    Attributes:
        latent: ``[1, channels, ...]`` as the host's nodes pass it; models may take other shapes (`shape_of`).
        cond: its conditioning, an entry of the host's lists.
    """

    latent: torch.Tensor
    cond: Any


def examples_of(model: Any, latents: Sequence[dict], positive: Sequence[Any]) -> list[Example]:
    """What the host's own Train LoRA takes: batches or lists of latents, and a conditioning for all or for each.

    Raises:
        GraftError: there are other numbers of them, or a conditioning has LoRAs of its own.
    """
    found: list[torch.Tensor] = []
    for entry in latents:
        samples = entry["samples"]
        if getattr(samples, "is_nested", False):
            raise GraftError("these latents are of picture and sound together, on which no LoRA can be trained here")
        found += comfy.sample.fix_empty_latent_channels(model, ordinary(samples)).split(1)
    conds = [cond for conditioning in positive for cond in conditioning]
    if len(conds) not in (1, len(found)):
        raise GraftError(
            f"there are {len(found)} pictures and {len(conds)} conditionings: connect one for all, or one for each"
        )
    if any("hooks" in options for _, options in conds):
        raise GraftError(
            "a conditioning has a scheduled LoRA on it: connect one without, the LoRA learns for all steps"
        )
    conds = [[_ordinary(cond), {name: _ordinary(value) for name, value in options.items()}] for cond, options in conds]
    return [Example(latent, conds[index % len(conds)]) for index, latent in enumerate(found)]


def shape_of(model: Any, example: Example) -> torch.Size:
    """What the host's `model` makes of a latent, and so the noise on it: some put frames beside each other."""
    return model.process_latent_in(example.latent).shape


def _ordinary(value: Any) -> Any:
    """What autograd may keep, where the host has made it in inference mode."""
    if isinstance(value, torch.Tensor):
        return ordinary(value)
    return [_ordinary(part) for part in value] if isinstance(value, list) else value


class Prepared:
    """A model that the host has loaded, for as long as its sampling lasts.

    Attributes:
        device: where it computes.
    """

    def __init__(self, guider: Any, options: dict, device: torch.device, seed: int) -> None:
        self.model, self.device = guider.inner_model, device
        self._options, self._seed = options, seed
        self._conds: dict[int, tuple[torch.Tensor, dict]] = {}

    def batches(self, picked: Sequence[Example]) -> list[list[int]]:
        """Which of these run together: pictures of one size, with conditionings that can."""
        groups: list[list[int]] = []
        for index, example in enumerate(picked):
            for group in groups:
                first = picked[group[0]]
                alike = first.latent.shape == example.latent.shape
                if alike and _can_join(self._prepared(first)[1], self._prepared(example)[1]):
                    group.append(index)
                    break
            else:
                groups.append([index])
        return groups

    def _prepared(self, example: Example) -> tuple[torch.Tensor, dict]:
        """Latent and conditioning as the model takes them."""
        key = id(example.latent)
        if len(self._conds) > _KEPT:
            self._conds.clear()
        if key not in self._conds:
            latent = self.model.process_latent_in(example.latent.to(self.device, torch.float32))
            conds = {"positive": comfy.sampler_helpers.convert_cond([example.cond])}
            noise = torch.zeros_like(latent)
            conds = comfy.samplers.process_conds(self.model, noise, conds, self.device, latent, None, self._seed)
            self._conds[key] = latent, conds["positive"][0]
        return self._conds[key]

    def shape(self, example: Example) -> torch.Size:
        """Of its latent as the model takes it."""
        return self._prepared(example)[0].shape

    def sigmas(self, shares: Sequence[float]) -> torch.Tensor:
        """How noisy it is at these shares of the way from noise to picture."""
        to_sigma = self.model.model_sampling.percent_to_sigma
        return torch.tensor(
            [float(to_sigma(min(max(share, EARLIEST), LATEST))) for share in shares], device=self.device
        )

    def prediction(
        self, batch: Sequence[Example], noise: torch.Tensor, sigmas: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model takes the pictures for, ``[n, ...]``, and what they are."""
        latents, conds = zip(*(self._prepared(example) for example in batch), strict=True)
        sampling, noise = self.model.model_sampling, noise.to(self.device)
        pictures = torch.cat(latents)
        wide = sigmas.view(-1, *(1,) * (pictures.dim() - 1))
        noisy = sampling.noise_scaling(wide, noise, pictures, False)
        wanted = sampling.noise_scaling(torch.zeros_like(wide), torch.zeros_like(noise), pictures, False)
        (found,) = comfy.samplers.calc_cond_batch(self.model, [[_joined(conds)]], noisy, sigmas, self._options)
        return found, wanted

    def loss(self, found: torch.Tensor, wanted: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        """Mean square of the error in what the model itself gives: noise, velocity or picture.

        The picture that is made of it depends on it by a factor that the host's model sampling knows.
        """
        one, zero = torch.ones_like(wanted), torch.zeros_like(wanted)
        by = self.model.model_sampling.calculate_denoised(sigmas, one, zero)
        return ((found.float() - wanted) / by).square().mean()


def _can_join(first: dict, other: dict) -> bool:
    ours, theirs = first["model_conds"], other["model_conds"]
    if any(first.get(name) is not None or other.get(name) is not None for name in _APART) and first is not other:
        return False
    return ours.keys() == theirs.keys() and all(cond.can_concat(theirs[name]) for name, cond in ours.items())


def _joined(conds: Sequence[dict]) -> dict:
    """One conditioning for a batch."""
    first = conds[0]
    if len(conds) == 1:
        return first
    joined = {
        name: cond._copy_with(cond.concat([other["model_conds"][name] for other in conds[1:]]))
        for name, cond in first["model_conds"].items()
    }
    return {**first, "model_conds": joined}


class _Guider(comfy.samplers.CFGGuider):
    """Prepares one set of conditionings."""

    def set_conds(self, positive: Any) -> None:
        self.inner_set_conds({"positive": positive})


class _Work(comfy.samplers.Sampler):
    """A sampler that does something else."""

    def __init__(self, work: Callable[[Prepared], None], seed: int) -> None:
        self.work, self.seed = work, seed

    def sample(
        self, model_wrap: Any, sigmas: torch.Tensor, extra_args: dict, callback: Any, noise: torch.Tensor,
        latent_image: Any = None, denoise_mask: Any = None, disable_pbar: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        self.work(Prepared(model_wrap, extra_args["model_options"], noise.device, self.seed))
        return torch.zeros_like(noise)


def run(patcher: Any, examples: Sequence[Example], seed: int, work: Callable[[Prepared], None], room: float) -> None:
    """Have the host load a model and hand it to `work`, as for a sampling.

    Args:
        room: bytes that the work needs beside the model's weights.
    """
    comfy.model_management.load_models_gpu([patcher], memory_required=room)
    _make_ordinary(patcher.model)
    latent = torch.zeros(shape_of(patcher.model, examples[0]))
    guider = _Guider(patcher)
    guider.set_conds(list({id(example.cond): example.cond for example in examples}.values()))
    # of a usual sampling, for LoRAs whose strength goes by its steps
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", 20)
    with _host_in_training(), _without_dropout(patcher.model):
        guider.sample(torch.zeros_like(latent), latent, _Work(work, seed), sigmas, seed=seed)


def memory_for(patcher: Any, shape: Sequence[int], batch: int, checkpointing: bool) -> float:
    """Bytes that a step may need, by the host's own estimate for a sampling; a rule of thumb."""
    return patcher.memory_required([batch, *shape[1:]]) * (3 if checkpointing else 12)


def _make_ordinary(model: torch.nn.Module) -> None:
    """Let autograd keep what the host has made in inference mode: the same memory, without a copy."""
    for module in model.modules():
        if isinstance(module, PackedLayer):
            continue  # nothing of theirs is kept
        for name, held in module._parameters.items():
            if held is not None and held.is_inference():
                module._parameters[name] = torch.nn.Parameter(ordinary(held.data), requires_grad=False)
        for name, held in module._buffers.items():
            if held is not None and held.is_inference():
                module._buffers[name] = ordinary(held)
        for name, held in vars(module).items():
            if isinstance(held, torch.Tensor) and held.is_inference():
                setattr(module, name, ordinary(held))  # e.g. places that it has worked out for an earlier picture


@contextlib.contextmanager
def _host_in_training() -> Iterator[None]:
    """Has the host run its models as they can be trained."""
    management: Any = comfy.model_management
    with contextlib.ExitStack() as stack:
        # newer hosts bring weights in through memory that the next layer gets as well: autograd keeps some of it
        stack.enter_context(_holding(management, NUM_STREAMS=0))
        # some of its functions write into what they are given otherwise
        stack.enter_context(_holding(management, in_training=True))
        kitchen: Any = sys.modules.get("comfy_kitchen")
        if kitchen is not None:
            # its fused functions have no gradients; each has a form in plain torch
            plain = {name: getattr(kitchen.backends.eager, name, None) for name in dir(kitchen) if _FUSED.match(name)}
            stack.enter_context(_holding(kitchen, **{name: form for name, form in plain.items() if form is not None}))
        yield


@contextlib.contextmanager
def _without_dropout(model: torch.nn.Module) -> Iterator[None]:
    """Older hosts leave some models in torch's training mode: a block's second run would drop other numbers."""
    modules = [module for module in model.modules() if module.training]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module in modules:
            module.training = True


@contextlib.contextmanager
def _holding(module: Any, **values: Any) -> Iterator[None]:
    """A module with other values, of those names that it has."""
    before = {name: getattr(module, name) for name in values if hasattr(module, name)}
    try:
        for name in before:
            setattr(module, name, values[name])
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)


__all__ = ["Example", "Prepared", "examples_of", "memory_for", "run", "shape_of"]
