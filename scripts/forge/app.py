"""Graft as an extension of Forge: installed once, asked by Forge's callbacks, and by the tab."""

from __future__ import annotations

import logging
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from modules import paths_internal, script_callbacks, scripts, sd_models, shared

from . import inspection, tab
from .engine import Engine, Settings
from .host import NoForge, detect
from .session import OPTIONS, Part, UsedLora, backend_of, infotext, int8_of, parts, settings_from, used_loras
from .verify import Comparison, verify

log = logging.getLogger(__name__)


class App:
    """The one Graft of this process; it outlives a reload of the UI.

    Attributes:
        engine: None if this Forge has not what Graft needs; `problem` says why.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.problem = ""
        try:
            self.engine = Engine(detect())
        except NoForge as error:
            self.problem = str(error)
            log.warning("Graft is not active: %s", error)

    # what Forge calls

    def load(self) -> None:
        """Install the hooks and register with Forge; called each time the UI is built."""
        if self.engine is not None:
            self.engine.install()
        script_callbacks.on_ui_settings(self._add_settings)
        script_callbacks.on_ui_tabs(lambda: [(tab.build(self), "Graft", "graft")])
        script_callbacks.on_before_ui(self._add_axis)
        script_callbacks.on_app_started(self._add_routes)
        script_callbacks.on_script_unloaded(self._unload)
        script_callbacks.on_cfg_denoiser(self._begins_step)

    def _unload(self) -> None:
        if self.engine is not None:
            self.engine.uninstall()
            self._add_loras_again()  # Forge itself, if Graft does not come back

    def _begins_step(self, params: Any) -> None:
        """The sampler is about to call the model."""
        denoiser = getattr(params, "denoiser", None)
        if self.engine is not None and denoiser is not None:
            self.engine.step = (denoiser.step, denoiser.total_steps or 1)
            self.engine.canvas = tuple(params.x.shape[-2:])

    def before_images(self, p: Any) -> None:
        """Take the settings of this job, which may have brought its own, and write them into its infotext."""
        if self.engine is None:
            return
        self._configure(settings_from(shared.opts), p)
        if any(part.layers for part in self.parts()):
            p.extra_generation_params.update(infotext(self.engine.settings))

    def after_images(self) -> None:
        """A job is done."""
        if self.engine is not None:
            self.engine.release()
            self.engine.step, self.engine.canvas = (0, 1), ()

    def _configure(self, settings: Settings, p: Any = None) -> None:
        assert self.engine is not None
        if settings == self.engine.settings:
            return
        if self.engine.configure(settings):
            self._add_loras_again()
        if p is not None:
            p.clear_prompt_cache()  # the text encoders are GGUF models, too

    def _add_loras_again(self) -> None:
        """With the next images; Forge does that only when the prompt's LoRAs are others than last time."""
        model = self._model()
        if hasattr(model, "current_lora_hash"):
            model.current_lora_hash = None

    def _add_settings(self) -> None:
        section = ("graft", "Graft")
        for name, (_, label, choices, title) in OPTIONS.items():
            radio = {"choices": list(choices)}
            shared.opts.add_option(
                name, shared.OptionInfo("auto", label, gr.Radio, radio, section=section, infotext=title)
            )

    def _add_axis(self) -> None:
        """Our settings as axes of the X/Y/Z plot."""
        grid = next((d.module for d in scripts.scripts_data if d.script_class.__module__ == "xyz_grid.py"), None)
        if grid is None:
            return
        for name, (_, _, choices, title) in OPTIONS.items():
            if any(option.label == title for option in grid.axis_options):
                continue
            grid.axis_options.append(
                grid.AxisOption(title, str, grid.apply_override(name), choices=lambda choices=choices: list(choices))
            )

    def _add_routes(self, _: Any, server: Any) -> None:
        server.add_api_route("/graft/status", self.status, methods=["GET"], dependencies=_credentials())

    def status(self) -> dict[str, Any]:
        """What the tab shows, for programs."""
        good, headline = self.headline()
        return {
            "active": good, "headline": headline, "facts": dict(self.facts()), "settings": vars(self.settings()),
            "parts": [{**vars(part), "layers": part.layers} for part in self.parts()],
            "loras": [{**vars(lora), "layers": lora.layers} for lora in self.loras()],
            "notes": self.notes(),
            "calls": [{"path": path, "why": why, "count": n} for (path, why), n in self.counts().items()],
        }  # fmt: skip

    # what the tab asks

    def headline(self) -> tuple[bool, str]:
        """Whether Graft runs the layers, and a sentence that says so."""
        if self.engine is None:
            return False, f"Graft is not active: {self.problem}"
        if self.settings().mode == "off":
            return False, "Graft is off: GGUF models run as Forge runs them."
        return True, f"Graft runs the GGUF layers of {self.engine.host.name}."

    def facts(self) -> list[tuple[str, str]]:
        """What was detected, and what was chosen."""
        if self.engine is None:
            return []
        device = self._device()
        return [
            ("Kernels", backend_of(self.engine, device)),
            *int8_of(self.engine, self._model(), device),
            ("Device", str(device)),
            ("Checkpoint", self._checkpoint()),
            *self.engine.host.features.items(),
            ("Added by Graft", ", ".join(self.engine.added) or "none"),
        ]

    def parts(self) -> list[Part]:
        return [] if self.engine is None else parts(self.engine, self._model())

    def loras(self) -> list[UsedLora]:
        return [] if self.engine is None else used_loras(self.engine, self._model())

    def notes(self) -> list[str]:
        return [] if self.engine is None else self.engine.prompt.notes

    def counts(self) -> Counter[tuple[str, str]]:
        return Counter() if self.engine is None else self.engine.counts

    def settings(self) -> Settings:
        return settings_from(shared.opts)

    def choose(self, option: str, value: str) -> None:
        """Set an option as the Settings page does."""
        shared.opts.set(option, value)
        shared.opts.save(shared.config_filename)
        if self.engine is not None:
            self._configure(self.settings())

    def verify(self) -> list[Comparison]:
        """On Forge's own thread, so that no image is being made at the same time."""
        engine, model = self.engine, self._model()
        if engine is None:
            return []
        unet = getattr(getattr(model, "forge_objects", None), "unet", None)
        dtype = getattr(getattr(unet, "model", None), "computation_dtype", torch.float32)
        return _on_main_thread(verify, engine, model, self._device(), dtype)

    def files(self) -> list[Path]:
        """GGUF and safetensors files in Forge's model folders."""
        own = (f"{paths_internal.models_path}/{name}" for name in ("Stable-diffusion", "Lora", "text_encoder", "VAE"))
        return list(inspection.files([*own, *_named_folders(shared.cmd_opts)]))

    def _model(self) -> Any:
        return sd_models.model_data.get_sd_model()

    def _checkpoint(self) -> str:
        return getattr(getattr(self._model(), "sd_checkpoint_info", None), "name", "none")

    def _device(self) -> torch.device:
        from backend import memory_management

        return memory_management.get_torch_device()


def _on_main_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run where Forge runs its images; its own helper loses exceptions, this does not."""
    from modules_forge import main_thread

    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, function(*arguments)))
        except Exception as error:
            outcome.append((False, error))

    main_thread.run_and_wait_result(run)
    good, value = outcome[0]
    if not good:
        raise value
    return value


def _named_folders(options: Any) -> list[str]:
    """Those of ``--ckpt-dir X``, or of ``--ckpt-dirs X --ckpt-dirs Y``, as newer branches have it; and so on."""
    found: list[str] = []
    for kind in ("ckpt", "lora", "text_encoder", "vae"):
        one, several = getattr(options, f"{kind}_dir", None), getattr(options, f"{kind}_dirs", None)
        found += [str(folder) for folder in (one, *(several or ())) if folder]
    return found


def _credentials() -> list[Any]:
    """What a route depends on, so that it asks for the credentials that Forge's own API asks for."""
    if not shared.cmd_opts.api_auth:
        return []
    from fastapi import Depends
    from modules.api.api import Api

    pairs = dict(pair.split(":", 1) for pair in shared.cmd_opts.api_auth.split(","))
    return [Depends(types.MethodType(Api.auth, types.SimpleNamespace(credentials=pairs)))]


app = App()
