"""Random operations on two models and a text encoder in one process: nothing leaks, nothing is damaged.

60 operations for the tests; GRAFT_CHURN sets another number, GRAFT_CHURN_SEED another order.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import hashlib
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.sd
import nodes
import pytest
import torch
from architectures import ARCHITECTURES, write_model
from comfy_extras.nodes_hooks import SetClipHooks
from generation import dense_model, fingerprint, forget, with_lora
from gguf import MODEL_ARCH
from loras import make_lora
from text_encoders import dense_clip, small, t5_shapes, write
from torch.nn.modules.module import register_module_forward_pre_hook

OPERATIONS = int(os.environ.get("GRAFT_CHURN", "60"))
SEED = int(os.environ.get("GRAFT_CHURN_SEED", "21"))
CHECK_BYTES_EVERY = 20
STRENGTHS = (0.5, 1.0, -0.75)
MOST_BRANCHES = 8

Recipe = tuple[tuple[int, float, str], ...]
"""Of LoRAs the number, the strength, and where and when it counts."""


@dataclass
class Subject:
    """A file that is loaded again and again.

    Attributes:
        load: a MODEL or CLIP of it.
        put: a branch with a LoRA's tensors at a strength, in a place of `wheres`.
        run: what a branch makes, optionally with a LoRA on a hook.
        loras: the tensors of some LoRAs.
    """

    name: str
    load: Callable[[], Any]
    put: Callable[[Any, dict, float, str], Any]
    run: Callable[[Any, dict | None], torch.Tensor]
    loras: list[dict[str, torch.Tensor]]
    nbytes: int
    wheres: tuple[str, ...] = ("",)
    held: Any = None
    fingerprint: str = ""


@dataclass
class Branch:
    subject: Subject
    held: Any
    recipe: Recipe = ()

    @property
    def patcher(self) -> Any:
        return getattr(self.held, "patcher", self.held)


@dataclass
class Churn:
    """What is loaded, and what every recipe has given so far."""

    subjects: list[Subject]
    rng: random.Random
    branches: list[Branch] = field(default_factory=list)
    results: dict[tuple, str] = field(default_factory=dict)
    done: Counter = field(default_factory=Counter)

    def any_branch(self) -> Branch:
        subject = self.rng.choice(self.subjects)
        return self.rng.choice([Branch(subject, subject.held), *(b for b in self.branches if b.subject is subject)])

    def keep(self, branch: Branch) -> None:
        self.branches = [*self.branches, branch][-MOST_BRANCHES:]

    def result(self, branch: Branch, hook: int | None = None) -> str:
        lora = None if hook is None else branch.subject.loras[hook]
        return hashlib.sha256(branch.subject.run(branch.held, lora).contiguous().numpy().tobytes()).hexdigest()

    def same(self, branch: Branch, hook: int | None = None) -> None:
        key = (branch.subject.name, branch.recipe, hook)
        got = self.result(branch, hook)
        assert self.results.setdefault(key, got) == got, f"{key} gives something else than before, after {self.done}"

    def check(self) -> None:
        """No residual is on any layer, and every byte is the file's."""
        for branch in [*(Branch(s, s.held) for s in self.subjects), *self.branches]:
            owner = branch.patcher.model.graft
            left = [name for name, layer in owner.layers.items() if layer.residual is not None]
            assert not left, f"left on {branch.subject.name} after {self.done}: {left[:3]}"
            assert not owner.calls.under_way, f"a call of {branch.subject.name} never ended, after {self.done}"
        if sum(self.done.values()) % CHECK_BYTES_EVERY == 0:
            self.check_bytes()

    def check_bytes(self) -> None:
        for model, subject in {b.patcher.model: b.subject for b in self.branches}.items():
            assert fingerprint(model) == subject.fingerprint, f"{subject.name}'s bytes have changed after {self.done}"
        for subject in self.subjects:
            assert fingerprint(getattr(subject.held, "cond_stage_model", subject.held)) == subject.fingerprint

    # the operations

    def run(self) -> None:
        self.same(self.any_branch())

    def run_base(self) -> None:
        subject = self.rng.choice(self.subjects)
        self.same(Branch(subject, subject.held))

    def hook(self) -> None:
        self.same(self.any_branch(), self.rng.randrange(2))

    def lora(self) -> None:
        branch = self.any_branch()
        if len(branch.recipe) < 2:
            subject, number = branch.subject, self.rng.randrange(len(branch.subject.loras))
            row = (number, self.rng.choice(STRENGTHS), self.rng.choice(subject.wheres))
            held = subject.put(branch.held, subject.loras[number], *row[1:])
            self.keep(Branch(subject, held, (*branch.recipe, row)))
            self.same(self.branches[-1])

    def strength(self) -> None:
        """As a node that is run again with another one: from the model, through every row."""
        branch = self.any_branch()
        held, recipe = branch.subject.held, []
        for number, *_ in branch.recipe:
            recipe.append((number, self.rng.choice(STRENGTHS), self.rng.choice(branch.subject.wheres)))
            held = branch.subject.put(held, branch.subject.loras[number], *recipe[-1][1:])
        self.keep(Branch(branch.subject, held, tuple(recipe)))
        self.same(self.branches[-1])

    def clone(self) -> None:
        branch = self.any_branch()
        self.keep(Branch(branch.subject, branch.held.clone(), branch.recipe))

    def copy_model(self) -> None:
        """A branch on another copy of the model, as for a second device."""
        branch = self.any_branch()
        if branch.patcher is branch.held:
            config = branch.held.model.model_config  # which newer hosts cannot copy
            self.keep(Branch(branch.subject, copy.deepcopy(branch.held, {id(config): config}), branch.recipe))

    def another_device(self) -> None:
        branch = self.any_branch()
        make = getattr(branch.held, "deepclone_multigpu", None)
        if make is not None and branch.patcher is branch.held:
            self.keep(Branch(branch.subject, make(torch.device("cpu")), branch.recipe))

    def drop(self) -> None:
        if self.branches:
            self.branches.pop(self.rng.randrange(len(self.branches)))

    def load(self) -> None:
        subject = self.rng.choice(self.subjects)
        self.branches = [branch for branch in self.branches if branch.subject is not subject]
        subject.held = None
        subject.held = subject.load()

    def read(self) -> None:
        """What merging and saving nodes read, with the LoRAs merged in."""
        branch = self.any_branch()
        key = self.rng.choice([f"{path}.weight" for path in branch.patcher.graft.layers])
        layer = branch.patcher.graft.layer_of(key)
        patched = branch.patcher.residuals.patches.get(key, ())
        if any(patch.when is not None for patch in patched):
            with pytest.raises(Exception, match="cannot be merged or saved in a model"):
                branch.patcher.merged(key, layer)
            return
        merged, patched = branch.patcher.merged(key, layer), bool(patched)
        assert torch.equal(merged, layer.dequantized()) is not patched
        assert key in branch.patcher.get_key_patches()

    def fail(self) -> None:
        """An error, or the interrupt of whoever presses the button, within a layer."""
        branch, left = self.any_branch(), self.rng.randrange(1, 12)
        error = self.rng.choice((comfy.model_management.InterruptProcessingException, RuntimeError, MemoryError))
        hook = self.rng.choice((None, 0))
        layers = set(branch.patcher.model.graft.layers.values())

        def raising(module: torch.nn.Module, args: Any) -> None:
            nonlocal left
            left -= module in layers
            if left < 0:
                raise error("thrown by the test")

        handle = register_module_forward_pre_hook(raising)
        try:
            with pytest.raises(error):
                self.result(branch, hook)
        finally:
            handle.remove()
        self.check()
        self.same(branch)

    def unload_a_part(self) -> None:
        loaded = comfy.model_management.current_loaded_models
        for patcher in (model.model for model in self.rng.sample(loaded, len(loaded))):
            if patcher is not None and patcher.loaded_size() > 1:
                patcher.partially_unload(patcher.offload_device, self.rng.randrange(patcher.loaded_size()))
                return

    def unload(self) -> None:
        forget()

    def collect(self) -> None:
        gc.collect()
        comfy.model_management.soft_empty_cache()


WEIGHTS = {
    "run": 14, "run_base": 8, "hook": 10, "lora": 16, "strength": 12, "clone": 6, "copy_model": 2, "another_device": 1,
    "drop": 10, "load": 4, "read": 5, "fail": 10, "unload_a_part": 8, "unload": 4, "collect": 4,
}  # fmt: skip


def diffusion(pack: Any, name: str, type_name: str, folder: Path) -> Subject:
    architecture = ARCHITECTURES[name]
    path = write_model(architecture, type_name, folder / f"churn-{name}.gguf")
    dense = dense_model(pack, path)
    shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
    within = architecture.lora_layers
    loras = [
        make_lora(dense.model, shapes, "native", within, rank=8, seed=1),
        make_lora(dense.model, shapes, "native", within, rank=20, seed=2, dtype=torch.bfloat16),
        with_magnitudes(make_lora(dense.model, shapes, "native", within[:1], rank=4, seed=3)),
    ]

    strengths = pack("ops.strengths")
    left = torch.zeros(1, 8, 8)
    left[:, :, :4] = 1
    places = {
        "left": {"mask": left},
        "early": {"curve": strengths.Curve(((0.0, 0.5, "hold"), (0.5, 0.0, "hold")))},
        "left, of the positive prompt": {"mask": left, "applies_to": "positive"},
    }

    def put(model: Any, lora: dict, strength: float, where: str) -> Any:
        # made anew, as nodes make it: one keeps its masks in the sizes that it was asked for
        when = strengths.Strength(**places[where]) if where else None
        return with_lora(model, lora, strengths.Number(strength, when))

    def run(model: Any, lora: dict | None) -> torch.Tensor:
        positive = architecture.conditioning(1)
        if lora is not None:
            hooks = comfy.hooks.create_hook_lora(lora, strength_model=0.8, strength_clip=0.0)
            positive = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
        latent = {"samples": torch.zeros(architecture.latent)}
        negative = architecture.conditioning(2)
        return nodes.common_ksampler(model, 3, 1, 1.0, "euler", "simple", positive, negative, latent)[0]["samples"]

    def load() -> Any:
        return pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32")

    return Subject(name, load, put, run, loras, path.stat().st_size, ("", "", *places))


def with_magnitudes(lora: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DoRA: of every layer with factors a magnitude for each row of the output."""
    ups = {key: value for key, value in lora.items() if key.endswith(".lora_B.weight")}
    scales = {key.replace("lora_B.weight", "dora_scale"): torch.ones(up.shape[0], 1) for key, up in ups.items()}
    return lora | scales


def text_encoder(pack: Any, folder: Path) -> Subject:
    encoder = write(folder / "churn-t5.gguf", MODEL_ARCH.T5ENCODER, t5_shapes("t5_config_xxl.json"))
    model = dense_clip([encoder.dense], "ltxv").cond_stage_model
    weights, names = model.state_dict(), comfy.lora.model_lora_keys_clip(model, {})
    inner = {key: name for name, key in names.items() if ".layer.0.SelfAttention." in key and weights[key].dim() == 2}
    loras = []
    for number in range(3):
        g, lora = torch.Generator().manual_seed(number), {}
        for key, name in inner.items():
            rows, columns = weights[key].shape
            lora[f"{name}.lora_down.weight"] = torch.randn(4 * number + 4, columns, generator=g) / columns**0.5
            lora[f"{name}.lora_up.weight"] = torch.randn(rows, 4 * number + 4, generator=g) / 8
        loras.append(lora)

    def run(clip: Any, lora: dict | None) -> torch.Tensor:
        tokens = clip.tokenize("a fox in the snow")
        if lora is None:
            return clip.encode_from_tokens(tokens, return_dict=True)["cond"]
        hooks = comfy.hooks.create_hook_lora(lora, 0.0, 0.8)
        (clip,) = SetClipHooks().apply_hooks(clip, True, False, hooks)
        return clip.encode_from_tokens_scheduled(tokens)[0][0]

    def put(clip: Any, lora: dict, strength: float, where: str) -> Any:
        return comfy.sd.load_lora_for_models(None, clip, lora, 0, strength)[1]

    def load() -> Any:
        return pack("nodes.text_encoder").load_text_encoders([str(encoder.path)], "ltxv")

    return Subject("t5", load, put, run, loras, encoder.path.stat().st_size)


@pytest.fixture
def churn(pack, folders):
    with small():
        subjects = [
            diffusion(pack, "sd3", "Q4_K", folders / "unet_gguf"),
            diffusion(pack, "wan", "Q8_0", folders / "unet_gguf"),
            text_encoder(pack, folders),
        ]
        forget()
        for subject in subjects:
            subject.held = subject.load()
            subject.fingerprint = fingerprint(getattr(subject.held, "cond_stage_model", subject.held))
        yield Churn(subjects, random.Random(SEED))
        forget()


def settled(churn: Churn) -> tuple[int, int, int]:
    """Bytes in tensors, objects, and bytes of the process, once every branch is gone and every file is loaded anew."""
    churn.branches.clear()
    for subject in churn.subjects:
        subject.held = None
        subject.held = subject.load()
    forget()
    gc.collect()
    objects = gc.get_objects()
    storages = {}
    for value in objects:
        if type(value) in (torch.Tensor, torch.nn.Parameter) and value.device.type == "cpu":
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    return sum(storages.values()), len(objects), resident()


def resident() -> int:
    """Bytes of the process, without what the allocator keeps at the end of its heap; 0 where that is not to be had."""
    if not sys.platform.startswith("linux"):
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def test_nothing_leaks_and_nothing_is_damaged(churn):
    names, weights = list(WEIGHTS), list(WEIGHTS.values())
    # whatever the process keeps for good, such as threads and kernels, it has after one of each
    for operation in [*names, *churn.rng.choices(names, weights, k=max(1, OPERATIONS // 4))]:
        perform(churn, operation)
    before = settled(churn)
    for operation in churn.rng.choices(names, weights, k=OPERATIONS - OPERATIONS // 4):
        perform(churn, operation)
    churn.check_bytes()
    after = settled(churn)
    print(f"{OPERATIONS} operations, {len(churn.results)} recipes, {dict(churn.done)}; before {before}, after {after}")
    assert after[0] == before[0], f"{after[0] - before[0]} bytes of tensors are left"
    # what the interpreter caches is a few hundred objects once; a branch that is left has as many each time
    assert after[1] - before[1] < 1000 + OPERATIONS, f"{after[1] - before[1]} objects are left"
    # the allocator may keep what the branches had at most, copies of a model among them
    largest = MOST_BRANCHES * max(subject.nbytes for subject in churn.subjects)
    assert after[2] - before[2] < largest, f"the process has grown by {after[2] - before[2]} bytes"
    for (name, recipe, hook), wanted in churn.results.items():
        subject = next(subject for subject in churn.subjects if subject.name == name)
        held = subject.held
        for number, *row in recipe:
            held = subject.put(held, subject.loras[number], *row)
        assert churn.result(Branch(subject, held, recipe), hook) == wanted, f"{name} {recipe} {hook} on a fresh model"


def perform(churn: Churn, operation: str) -> None:
    churn.done[operation] += 1
    getattr(churn, operation)()
    churn.check()
