"""One training of Train LoRA (Graft): its steps, what people see of it, and what is kept."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import logging
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.sample
import comfy.utils
import latent_preview
import torch
from comfy_execution.graph_utils import ExecutionBlocker

from ..kernels import AdapterError, GraftError, OutOfMemory, is_full
from ..ops.checkpointing import checkpointed
from ..ops.files.lora import AdapterFile, load_adapters
from ..ops.files.lora_writer import write_lora
from ..ops.make import sha256_of
from ..ops.report import layers
from ..ops.training import Plan, Run, Training
from . import node
from .calibrate import without_compiling
from .hashes import digest_of
from .lora import DEMO_LORAS, NONE, apply_lora
from .model_files import Found, find, listed
from .patcher import GraftPatcher
from .plot import loss_plot, smoothed
from .save_lora import free_path
from .train_targets import targets
from .training import Example, Prepared, examples_of, memory_for, run, shape_of

log = logging.getLogger(__name__)

STATE = ".training"
"""Ending of the file that a later run goes on from."""
ROWS = "graft.rows"
"""In a file's metadata, which rows of fused layers learn: the tensors are of whole layers, as loaders know them."""
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp32": torch.float32}
HOME = "the loras folder"

_ROUND = 32
"""Steps for which a teacher answers at a time, before the host brings the other model back."""
_PER_FACTOR = 16
"""Bytes that a number in a factor takes with its gradient and what the optimizer keeps of it."""
_EVERY = 0.5
"""Seconds between texts on the node."""

_OOM: Any = comfy.model_management.OOM_EXCEPTION


class Inputs(NamedTuple):
    """What the node was given, of which the host makes lists."""

    model: Any
    latents: list
    positive: list
    steps: int
    learning_rate: float
    rank: int
    layers: str
    filename_prefix: str
    trigger_phrase: str
    seed: int
    batch_size: int
    accumulate: int
    kind: str
    alpha: float
    schedule: str
    optimizer: str
    compute: str
    gradient_checkpointing: bool
    pattern: str
    resume_from: str
    file: str
    sample_every: int
    sample_steps: int
    sample_cfg: float
    negative: Any
    teacher: Any
    unique_id: str | None


class Session:
    """One run of the node.

    Attributes:
        patcher: a clone of the model, on which the LoRA learns.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.patcher = inputs.model.clone()
        self.patcher.additional_models.pop("multigpu", None)  # whose copies of the layers learn nothing
        dtype = _compute_dtype(self.patcher, DTYPES[inputs.compute])
        if dtype != self.patcher.compute_dtype():
            self.patcher.set_model_compute_dtype(dtype)
        self.examples = examples_of(self.patcher, inputs.latents, inputs.positive)
        self.notes: list[str] = []
        self.samples: list[torch.Tensor] = []
        self.path = ""
        plan = Plan(inputs.steps, inputs.learning_rate, inputs.schedule, inputs.optimizer, inputs.seed & (2**62 - 1))
        training = self._training().to(self.patcher.load_device)
        self.run = Run(training, plan)
        self.before = 0
        if inputs.resume_from != NONE:
            self._go_on()
        self.bar = comfy.utils.ProgressBar(inputs.steps)
        self._begun = self._shown = time.monotonic()

    def _training(self) -> Training:
        inputs, patches = self.inputs, self.patcher.residuals.patches
        layers = self.patcher.graft.layers
        if inputs.resume_from == NONE:
            wanted = targets(self.patcher, inputs.layers, inputs.pattern)
            return Training(
                layers, wanted, inputs.kind, inputs.rank, inputs.alpha, inputs.seed & (2**62 - 1), before=patches
            )
        file = load_adapters(found_lora(inputs.resume_from).present(HOME), "comfy")
        told = file.metadata.get(ROWS, "")
        return Training.going_on(layers, file.on(layers, norm="comfy").placed, patches, told)

    def _go_on(self) -> None:
        path = found_lora(self.inputs.resume_from).present(HOME)
        name = os.path.basename(path)
        if self.run.load(_state_of(path), sha256_of(path)):
            self.before = self.run.step
            self.notes.append(f"went on from step {self.run.step} of {name}, exactly")
        else:
            why = f"its {STATE} file is not there or does not fit, so the optimizer began anew"
            self.notes.append(f"began with the factors of {name}; {why}")
        if self.run.step >= self.inputs.steps:
            raise AdapterError(
                f"{name} has {self.run.step} steps already: set steps to more, since it counts those of the earlier run"
            )

    def result(self) -> dict:
        """Train, save, and put the LoRA on the model."""
        try:
            self._train()
        except comfy.model_management.InterruptProcessingException:
            self._keep("cancelled")
            raise
        except Exception as error:
            self._keep("stopped by an error")
            if not (is_full(error) or isinstance(error, _OOM)):
                raise
            raise OutOfMemory(self._too_large()) from error
        finally:
            self.patcher.training = None
        self._save()
        state = self.run.training.state()
        patcher = self.inputs.model.clone()
        name = os.path.basename(self.path)
        report = apply_lora(patcher, AdapterFile(Path(self.path), dict(state), {}, "kohya"), name, 1.0)
        if report.rejected or report.missing:
            raise AdapterError(report.text)
        losses = self.run.losses
        text = self._report()
        log.info("%s", text)
        shown = f"{name}: {len(losses)} steps, loss {smoothed(losses)[-1]:.4f}"
        samples = {"samples": torch.cat(self.samples)} if self.samples else ExecutionBlocker(None)
        return node.result((patcher, state, loss_plot(losses, shown), samples, self.path, text), text)

    # Steps

    def _train(self) -> None:
        self.patcher.training = self.run.training
        with without_compiling():
            while self.run.step < self.inputs.steps:
                stop = self._next_stop()
                taught = self._teach(stop) if self.inputs.teacher is not None else {}
                work = functools.partial(self._advance, stop=stop, taught=taught)
                run(self.patcher, self.examples, self.inputs.seed, work, self._room())
                every = self.inputs.sample_every
                if every and (self.run.step % every == 0 or self.run.step == self.inputs.steps):
                    self._sample()

    def _next_stop(self) -> int:
        """The step up to which this model runs without the host's bringing another one."""
        stops, step = [self.inputs.steps], self.run.step
        if self.inputs.sample_every:
            stops.append(step + self.inputs.sample_every - step % self.inputs.sample_every)
        if self.inputs.teacher is not None:
            stops.append(step + _ROUND)
        return min(stops)

    def _room(self) -> float:
        largest = max((example.latent for example in self.examples), key=torch.Tensor.numel)
        steps = memory_for(self.patcher, largest.shape, self.inputs.batch_size, self.inputs.gradient_checkpointing)
        return steps + _PER_FACTOR * sum(parameter.numel() for parameter in self.run.parameters)

    def _advance(self, model: Prepared, stop: int, taught: _Taught) -> None:
        diffusion_model, saving = model.model.diffusion_model, self.inputs.gradient_checkpointing
        blocks = checkpointed(diffusion_model) if saving else contextlib.nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), blocks:
            while self.run.step < stop:
                comfy.model_management.throw_exception_if_processing_interrupted()
                parts = self._parts(model)
                answers = taught.get(self.run.step, [None] * len(parts))
                self.run.advance([
                    functools.partial(self._loss, model, part, answer, len(parts))
                    for part, answer in zip(parts, answers, strict=True)
                ])  # fmt: skip
                self._show()

    def _parts(self, model: Prepared) -> list[_Part]:
        """What the next step learns from, in batches that run together."""
        size = self.inputs.batch_size * self.inputs.accumulate
        picked = [self.examples[index] for index in self.run.examples(len(self.examples), size)]
        random = self.run.random()
        even = (torch.randperm(size, generator=random) + torch.rand(size, generator=random)) / size
        noise = [torch.randn(model.shape(example), generator=random) for example in picked]
        parts = []
        for group in model.batches(picked):
            for first in range(0, len(group), self.inputs.batch_size):
                indices = group[first : first + self.inputs.batch_size]
                sigmas = model.sigmas([float(even[index]) for index in indices])
                noises = torch.cat([noise[index] for index in indices])
                parts.append(_Part([picked[index] for index in indices], noises, sigmas, len(indices) / size))
        return parts

    def _loss(
        self, model: Prepared, part: _Part, answer: tuple[torch.Tensor, torch.Tensor] | None, parts: int
    ) -> torch.Tensor:
        found, wanted = model.prediction(part.examples, part.noise, part.sigmas)
        if not found.requires_grad:
            raise GraftError("none of the layers that learn runs in a call of this model: choose other layers")
        if answer is not None:
            sigmas, wanted = answer[0], answer[1].to(wanted)
            if not torch.allclose(sigmas, part.sigmas.cpu()):
                raise GraftError(
                    "the teacher's steps are not those of the model: put ModelSamplingSD3 or the like on both"
                )
        # the run takes the mean of the parts, of which some are smaller
        return model.loss(found, wanted, part.sigmas) * part.share * parts

    def _teach(self, stop: int) -> _Taught:
        """What the teacher makes of what the steps up to `stop` will see."""
        taught: _Taught = {}

        def answer(model: Prepared) -> None:
            first = self.run.step
            try:
                with torch.no_grad():
                    while self.run.step < stop:
                        comfy.model_management.throw_exception_if_processing_interrupted()
                        parts = self._parts(model)
                        found = [model.prediction(part.examples, part.noise, part.sigmas)[0] for part in parts]
                        sigmas = [part.sigmas.cpu() for part in parts]
                        taught[self.run.step] = [(s, f.float().cpu()) for s, f in zip(sigmas, found, strict=True)]
                        self.run.step += 1
            finally:
                self.run.step = first

        room = memory_for(self.inputs.teacher, self.examples[0].latent.shape, self.inputs.batch_size, True) / 3
        run(self.inputs.teacher.clone(), self.examples, self.inputs.seed, answer, room)
        return taught

    def _sample(self) -> None:
        """Draw a picture with what has been learnt so far, and show it."""
        latent = torch.zeros(shape_of(self.patcher.model, self.examples[0]))
        noise = comfy.sample.prepare_noise(latent, self.inputs.seed)
        positive, last = [self.examples[0].cond], {}

        def callback(step: int, denoised: torch.Tensor, x: torch.Tensor, total: int) -> None:
            last["x0"] = denoised

        with torch.no_grad():
            drawn = comfy.sample.sample(
                self.patcher, noise, self.inputs.sample_steps, self.inputs.sample_cfg, "euler", "simple", positive,
                self.inputs.negative if self.inputs.negative is not None else positive, latent, callback=callback,
                disable_pbar=True, seed=self.inputs.seed & (2**63 - 1),
            )  # fmt: skip
            self.samples.append(drawn.cpu())
            previewer = latent_preview.get_previewer(self.patcher.load_device, self.patcher.model.latent_format)
            if previewer is not None and "x0" in last:
                preview = previewer.decode_latent_to_preview_image("JPEG", last["x0"])
                self.bar.update_absolute(self.run.step, self.inputs.steps, preview)

    # What people see and keep

    def _show(self) -> None:
        self.bar.update_absolute(self.run.step, self.inputs.steps)
        now = time.monotonic()
        if now - self._shown < _EVERY and self.run.step < self.inputs.steps:
            return
        self._shown = now
        loss = smoothed(self.run.losses)[-1]
        text = f"step {self.run.step} of {self.inputs.steps}, loss {loss:.4f}, {self._pace()}"
        node.say(text, self.inputs.unique_id)

    def _pace(self) -> str:
        done = max(1, self.run.step - self.before)
        return f"{(time.monotonic() - self._begun) / done:.2g} s a step"

    def _keep(self, why: str) -> None:
        """Save what has been learnt by a run that ends early."""
        if self.run.step > self.before:
            self._save()
            log.warning("training was %s after %d steps; what it has learnt is in %s", why, self.run.step, self.path)
            node.say(f"{why} after step {self.run.step}, kept in {os.path.basename(self.path)}", self.inputs.unique_id)

    def _save(self) -> None:
        self.path = free_path(self.inputs.filename_prefix, ".safetensors")
        write_lora(self.path, self.run.training.state(), self.inputs.file, self._metadata())
        self.run.save(_state_of(self.path), sha256_of(self.path))

    def _too_large(self) -> str:
        tips = [] if self.inputs.gradient_checkpointing else ["switch gradient_checkpointing on"]
        tips += ["set batch_size to 1 and use accumulate"] if self.inputs.batch_size > 1 else []
        kept = f"; the {self.run.step} steps that were done are kept in {self.path}" if self.path else ""
        tips.append("use smaller pictures, or a file with fewer bits")
        return f"memory ran out in training: {', or '.join(tips)}{kept}"

    def _metadata(self) -> dict[str, str]:
        """As kohya's trainer and the Model Spec write it, so that other tools show it."""
        inputs, training, plan = self.inputs, self.run.training, self.run.plan
        files = [file.path for file in self.patcher.graft.files]
        base = files[0] if files else None
        kinds = {"LoRA": "networks.lora", "DoRA": "networks.lora", "LoKr": "lycoris.kohya"}
        dora = training.kind == "DoRA"
        told = {
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.title": os.path.basename(inputs.filename_prefix),
            "modelspec.date": datetime.datetime.now().isoformat(timespec="seconds"),
            "modelspec.architecture": f"{type(self.patcher.model.model_config).__name__}/lora",
            "modelspec.trigger_phrase": inputs.trigger_phrase.strip(),
            "ss_network_module": kinds[training.kind],
            "ss_network_dim": str(training.rank),
            "ss_network_alpha": str(next(iter(training.each()))[1].alpha),
            "ss_network_args": json.dumps({"algo": "lokr"} if training.kind == "LoKr" else {"dora_wd": dora}),
            "ss_steps": str(self.run.step),
            "ss_max_train_steps": str(plan.steps),
            "ss_learning_rate": str(plan.rate),
            "ss_lr_scheduler": plan.schedule,
            "ss_optimizer": plan.optimizer,
            "ss_seed": str(inputs.seed),
            "ss_batch_size_per_device": str(inputs.batch_size),
            "ss_gradient_accumulation_steps": str(inputs.accumulate),
            "ss_num_train_images": str(len(self.examples)),
            "ss_sd_model_name": os.path.basename(base) if base else "",
            "ss_new_sd_model_hash": _digest_of_base(base) if base else "",
            "graft.trained_on": self.patcher.graft.summary,
            ROWS: training.rows(),
        }
        return {name: value for name, value in told.items() if value}

    def _report(self) -> str:
        training, losses = self.run.training, smoothed(self.run.losses)
        count = len({target.layer for target in training.targets})
        numbers = sum(parameter.numel() for parameter in self.run.parameters)
        lines = [
            f"{training.kind}, rank {training.rank}, on {layers(count)}, {numbers:,} numbers",
            f"{len(self.examples)} pictures, {self.run.step} steps, {self._pace()}",
            f"loss {losses[min(len(losses) - 1, 9)]:.4f} -> {losses[-1]:.4f}",
            *self.notes,
            f"trained on {self.patcher.graft.summary}",
            f"{os.path.getsize(self.path):,} bytes: {self.path}",
        ]
        return "\n".join(lines)


_Taught = dict[int, list[tuple[torch.Tensor, torch.Tensor]]]
"""By step, for each of its parts: how noisy it was, and what the teacher took it for."""


class _Part(NamedTuple):
    """What runs together.

    Attributes:
        share: of the step.
    """

    examples: list[Example]
    noise: torch.Tensor
    sigmas: torch.Tensor
    share: float


def _compute_dtype(patcher: GraftPatcher, chosen: torch.dtype | None) -> torch.dtype:
    """What to compute in: in fp16 gradients would vanish."""
    usual = chosen or patcher.compute_dtype()
    if usual != torch.float16:
        return usual
    return torch.bfloat16 if comfy.model_management.should_use_bf16(patcher.load_device) else torch.float32


def loras() -> list[str]:
    """Those that a run can go on from."""
    return [name for name in listed("loras", DEMO_LORAS) if name.lower().endswith((".safetensors", ".sft"))]


def found_lora(name: str) -> Found:
    """The file that a workflow calls so."""
    return find(name, "loras", DEMO_LORAS, among=loras())


def _state_of(path: str) -> str:
    return os.path.splitext(path)[0] + STATE


@functools.lru_cache(maxsize=4)
def _digest_once(path: str, state: Any) -> str:
    return digest_of(path)


def _digest_of_base(path: os.PathLike[str] | str) -> str:
    """Of a model's file; "" where it has gone from its place."""
    try:
        return _digest_once(os.fspath(path), node.file_state(os.fspath(path)))
    except OSError:
        return ""


__all__ = ["DTYPES", "HOME", "STATE", "Inputs", "Session", "found_lora", "loras"]
