"""Random pictures from a running Forge, and what must hold after each. `import forge_churn` from any test."""

from __future__ import annotations

import base64
import contextlib
import io
import random
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from forge_toys import Server
from PIL import Image

KINDS = ("Q4_K", "Q8_0", "Q4_0", "IQ4_XS")
THEIRS = {"IQ4_XS": "Q4_K"}
"""What a Forge without Graft takes in place of a type that it does not decode."""
LORAS = ("whole", "sliced", "plain", "text", "native", "PEFT")
WHEN = (
    "", "", ":region=left", ":region=not 0.2,0.2,0.8,0.8:feather=0.2", ":start=0.5", ":end=0.5:region=row-2",
    ":blocks=double=0.5, single=0",
)  # fmt: skip
OFF = {"override_settings": {"graft_mode": "off"}}
KEPT = {"Blocks", "Rule", "Curve", "Strength", "Picture", "Fate", "FileReport", "Choice"}
"""Classes of what Graft keeps of what it has seen: at most 64 strengths, one report a file, one decode a type."""
_PICTURE = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


class Churn:
    """A session of random pictures, the same for a seed.

    Attributes:
        done: how many of each way were made.
        resident: MB that the system counts as Forge's after each.
        alive: ``/toy/memory`` whenever the base was looked at.
    """

    def __init__(self, server: Server, seed: int) -> None:
        self.server, self.random = server, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.resident: list[float] = []
        self.alive: list[dict[str, Any]] = []
        self._bases: dict[str, tuple[np.ndarray, dict[str, str], dict[str, int]]] = {}

    def run(self, count: int, each: int) -> None:
        """Make `count` pictures, and look at the base of the model that is loaded after every `each` of them."""
        ways = (self.txt2img, self.txt2img, self.txt2img, self.img2img, self.hires, self.interrupted, self.off)
        kind = KINDS[0]
        for number in range(1, count + 1):
            if self.random.random() < 0.15:
                kind = self.random.choice(KINDS)
            if not self.server.has_graft:
                kind = THEIRS.get(kind, kind)
            way = self.random.choice(ways)
            way(kind, "a toy " + "".join(self.lora() for _ in range(self.random.randint(0, 4))))
            self.done[way.__name__] += 1
            if number % each == 0 or number == count:
                self.check(kind)
            self.resident.append(resident(self.server.process.pid))

    def lora(self) -> str:
        name, when = self.random.choice(LORAS), self.random.choice(WHEN)
        return f"<lora:{name}:{self.random.uniform(-1, 1):.2f}{when if self.server.has_graft else ''}>"

    def txt2img(self, kind: str, prompt: str) -> None:
        self.server.image(kind, prompt, batch_size=self.random.choice((1, 1, 2)))

    def img2img(self, kind: str, prompt: str) -> None:
        picture = io.BytesIO()
        Image.fromarray(_PICTURE).save(picture, "PNG")
        encoded = base64.b64encode(picture.getvalue()).decode()
        self.server.image(kind, prompt, "img2img", init_images=[encoded], denoising_strength=0.7)

    def hires(self, kind: str, prompt: str) -> None:
        upscaler = "None" if self.server.host.is_neo else "Latent"
        self.server.image(
            kind, prompt, enable_hr=True, hr_scale=1.5, hr_second_pass_steps=1, denoising_strength=0.6,
            hr_upscaler=upscaler, hr_additional_modules=["Use same choices"],
        )  # fmt: skip

    def interrupted(self, kind: str, prompt: str) -> None:
        """Stopped somewhere between its first step and its last."""
        over = threading.Event()

        def stop() -> None:
            time.sleep(self.random.uniform(0.05, 0.5))
            while not over.wait(0.1):
                self.server.call("/sdapi/v1/interrupt", {})

        thread = threading.Thread(target=stop)
        thread.start()
        try:
            with contextlib.suppress(IndexError):  # one that is stopped early is no picture
                self.server.image(kind, prompt, steps=30)
        finally:
            over.set()
            thread.join()

    def off(self, kind: str, prompt: str) -> None:
        self.server.image(kind, prompt, **(OFF if self.server.has_graft else {}))

    def check(self, kind: str) -> None:
        """The picture without LoRAs, the packed bytes and Graft's objects are what they were, and no LoRA runs."""
        if not self.server.has_graft:
            self.server.image(kind)
            self.alive.append(self.server.call("/toy/memory"))
            return
        before = self.server.calls().get("residual", 0)
        picture, digests = self.server.image(kind)[0], self.server.call("/toy/digests")
        assert self.server.calls().get("residual", 0) == before, kind
        self.alive.append(self.server.call("/toy/memory"))
        objects = {name: count for name, count in self.alive[-1]["objects"].items() if name not in KEPT}
        known = self._bases.setdefault(kind, (picture, digests, objects))
        assert np.array_equal(picture, known[0]) and digests == known[1], kind
        assert objects == known[2], (kind, objects, known[2])
        assert not self.server.status()["loras"] and not any(part["refused"] for part in self.server.status()["parts"])

    @property
    def used(self) -> list[float]:
        """MB that the process had in use whenever the base was looked at."""
        return [alive["used"] / 1e6 for alive in self.alive]


def resident(pid: int) -> float:
    """MB of memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def told(churn: Churn) -> dict[str, Any]:
    """What came of it, for people; sizes in MB."""
    course = {"resident": churn.resident, "in use": churn.used}
    course |= {name: [alive[name] / 1e6 for alive in churn.alive] for name in ("tensors", "free")}
    sizes = {name: f"{of[0]:.0f} to {of[-1]:.0f}, at most {max(of):.0f}" for name, of in course.items()}
    return {**churn.done, "looked at the base": len(churn.alive), **sizes}


__all__ = ["Churn", "resident", "told"]
