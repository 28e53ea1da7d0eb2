"""What the loader says of a machine, for machines that are not here."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from graft.kernels import Choice
from graft.ops.advice import Machine, advice

CARD = Machine("cuda", "NVIDIA GeForce RTX 3060", 12_900_000_000, (8, 6))
TRITON, NO_TRITON = Choice("triton", ""), Choice("torch", "triton: Triton is not installed (triton)")
FAILED = Choice("torch", "triton: a trial launch failed with RuntimeError: no kernel image")
PIP = "with ComfyUI's Python and start ComfyUI again"


def said(machine: Machine, choice: Choice, dtype=torch.bfloat16, nbytes: int = 6_800_000_000) -> list[str]:
    return advice(machine, choice, dtype, nbytes)


def test_a_card_with_all_that_it_needs() -> None:
    assert said(CARD, TRITON) == [
        "runs on NVIDIA GeForce RTX 3060: the model takes 6.8 GB of 12.9 GB",
        "weights are decoded on the card, in Triton kernels",
    ]
    (place, _) = said(dataclasses.replace(CARD, is_dynamic=True), TRITON)
    assert place.endswith(" of 12.9 GB, dynamic VRAM is on")


def test_a_model_that_is_larger_than_the_card() -> None:
    place, _ = said(CARD, TRITON, nbytes=12_700_000_000)
    assert place.endswith("in main memory, which is slower: a file of up to 10.8 GB stays on the card")


@pytest.mark.parametrize(
    ("machine", "choice", "line"),
    [
        ({}, NO_TRITON, f"faster: run python -m pip install -U triton {PIP}"),
        ({"system": "Windows"}, NO_TRITON, f"faster: run python -m pip install -U triton-windows {PIP}"),
        ({"system": "Windows", "is_portable": True}, NO_TRITON,
         "faster: run python_embeded\\python.exe -m pip install -U triton-windows in the folder of "
         "ComfyUI_windows_portable and start ComfyUI again"),
        ({"is_amd": True, "capability": None}, NO_TRITON,
         "faster: install PyTorch for ROCm from pytorch.org, which brings Triton, and start ComfyUI again"),
        ({"is_amd": True, "capability": None, "system": "Windows"}, NO_TRITON,
         "faster on Linux: PyTorch for ROCm brings Triton there. Triton for AMD cards on Windows was not tried"),
        ({"capability": (6, 1)}, FAILED,
         "Triton is made for NVIDIA cards from the RTX 30 series on: this one has no faster way"),
        ({"device": "mps", "name": "Apple's GPU", "capability": None}, Choice("torch", "triton: unknown"), None),
        ({"device": "cpu", "name": "the processor", "capability": None},
         Choice("torch", "cpu: libgguf is not installed (pip install libgguf)"),
         f"faster: run python -m pip install libgguf {PIP}"),
        ({}, Choice("torch", "as chosen"), None),
    ],
)  # fmt: skip
def test_what_would_be_faster_and_how_to_get_it(machine, choice, line) -> None:
    _, way, *rest = said(dataclasses.replace(CARD, **machine), choice, torch.float16)
    assert way == "weights are decoded by torch code" and rest == ([] if line is None else [line])


def test_old_cards_have_no_bf16() -> None:
    old = dataclasses.replace(CARD, capability=(7, 5))
    assert said(old, TRITON)[2:] == ["faster: choose fp16 in compute_dtype, this card has no bf16 units"]
    assert said(old, TRITON, torch.float16)[2:] == []


def test_this_machine() -> None:
    place, way, *_ = said(Machine.of(torch.device("cpu"), 16_000_000_000), Choice("cpu", ""), torch.float32)
    assert place == "runs on the processor: the model takes 6.8 GB of 16 GB" and way == "weights are decoded by libgguf"
