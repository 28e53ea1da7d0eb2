"""The prompt's LoRAs on their way through Forge: their arguments go round it, and come back with their strengths."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from torch import nn

from ...kernels import AdapterError
from ...ops.strengths import Strength
from .host import Host
from .strengths import Told, taken_from

log = logging.getLogger(__name__)

Possible = Callable[[nn.Module, "Strength | None"], "tuple[Strength | None, str]"]
"""``(model, when) -> (what of it LoRAs on the model can have, why not all)``."""


class PromptLoras:
    """Hooks in Forge's reading of a prompt's LoRAs.

    Attributes:
        notes: what of them cannot be as it is written in the prompt.
    """

    def __init__(self, host: Host, possible: Possible) -> None:
        self.notes: list[str] = []
        self._host = host
        self._possible = possible
        self._told: list[tuple[Strength | None, str]] = []

    def activate(self, original: Callable, network: Any, p: Any, params_list: Sequence[Any]) -> Any:
        """Where and when LoRAs work is for us, all else for Forge."""
        kept: list[Any] = []
        told: list[tuple[Strength | None, str]] = []
        self.notes = []
        for params in params_list:
            try:
                plain, when, text = taken_from(params)
            except AdapterError as error:
                self.notes.append(f"{params.items[0]} is left out: {error}")
                continue
            kept.append(plain)
            told.append((when, text))
        self._told = told
        try:
            return original(network, p, kept)
        finally:
            self._told = []
            self._note_losses(kept, told)
            for note in self.notes:
                log.warning("%s", note)
                p.comment(f"Graft: {note}")

    def load_networks(self, original: Callable, *args: Any, **kwargs: Any) -> Any:
        """Each LoRA's strength takes along where and when it works, and so Forge notices if that changes."""
        bound = inspect.signature(original).bind(*args, **kwargs)
        strengths = bound.arguments.get("unet_multipliers")
        if strengths is not None:
            bound.arguments["unet_multipliers"] = [
                strength if told is None or told[0] is None else Told(strength, *told)
                for strength, told in zip_longest(strengths, self._told[: len(strengths)])
            ]
        return original(*bound.args, **bound.kwargs)

    def _note_losses(self, kept: Sequence[Any], told: Sequence[tuple[Strength | None, str]]) -> None:
        model = getattr(getattr(self._host.loaded(), "forge_objects", None), "unet", None)
        if model is None:
            return
        for params, (when, text) in zip(kept, told, strict=True):
            possible, why = self._possible(model.model, when)
            if why:
                lost = text if possible is None else f"region={text.partition('region=')[2].partition(':')[0]}"
                self.notes.append(f"{params.items[0]} runs without {lost}: {why}")
            if possible is not None and possible.blocks is not None:
                unused = possible.blocks.unused([path for path, _ in model.model.named_modules()])
                self.notes += [f"{params.items[0]}: no block of this model is called {rule}" for rule in unused]
