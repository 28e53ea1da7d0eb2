"""ComfyUI's dynamic VRAM without a GPU: stand-ins for the device and for `comfy_aimdo`; the host's own code runs.

Device ``cpu:0`` plays the GPU. Torch copies what moves there and then calls it ``cpu``, so the host is told where a
layer runs, and all else follows: its `load`, `cast_modules_with_vbar`, its prefetch, its pinned memory.
Memory that the host has not asked to keep is lost as often as may be, and what is lost is overwritten: whoever
reads a weight after giving it back, or one that was never brought in, computes nonsense.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import mmap
import random
from collections import Counter
from pathlib import Path
from typing import Any

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy_aimdo.host_buffer
import comfy_aimdo.model_mmap
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import torch

GPU = torch.device("cpu", 0)
LOST = 0xFF
"""What is written over memory that is no longer anybody's; of any float type it is NaN."""

FAILING = 0.4
"""The share of requests for memory that fail, and of weights that lose theirs once they are given back."""

asked: Counter[str] = Counter()
"""How often room was ``refused``, or ``granted``, or the weights were ``resident`` there still."""

_random = random.Random(0)
_pages: dict[int, Page] = {}
_registered: dict[int, int] = {}


class Page:
    """Room for one layer's weights on the GPU.

    Attributes:
        memory: ``uint8``, flat.
        pins: how many users keep it there.
        version: changes with every loss; by it the host knows whether its weights are there still.
    """

    def __init__(self, size: int) -> None:
        self.memory = torch.full((size,), LOST, dtype=torch.uint8)
        self.pins = self.version = 0
        self.resident = False

    def fault(self) -> bytes | None:
        if not self.pins and _random.random() < FAILING:
            self.lose()
            asked["refused"] += 1
            return None
        asked["resident" if self.resident else "granted"] += 1
        if not self.resident:
            self.resident, self.version = True, self.version + 1
        self.pins += 1
        _pages[id(self)] = self
        return self.version.to_bytes(8, "little")

    def unpin(self) -> None:
        assert self.pins, "a weight was given back more often than it was asked for"
        self.pins -= 1
        if not self.pins:
            del _pages[id(self)]
            if _random.random() < FAILING:
                self.lose()

    def lose(self) -> int:
        """Returns: how many bytes became free."""
        freed = self.memory.numel() if self.resident and not self.pins else 0
        if freed:
            self.memory.fill_(LOST)
            self.resident = False
        return freed


class ModelVBAR:
    """One model's room on the GPU."""

    def __init__(self, size: int, device: int) -> None:
        assert device == GPU.index
        self.pages: list[Page] = []

    def prioritize(self) -> None:
        pass

    def alloc(self, size: int) -> Page:
        self.pages.append(Page(size))
        return self.pages[-1]

    def loaded_size(self) -> int:
        return sum(page.memory.numel() for page in self.pages if page.resident)

    def free_memory(self, size: float) -> int:
        freed = 0
        for page in self.pages:
            if freed >= size:
                break
            freed += page.lose()
        return freed


def vbar_fault(page: Page) -> bytes | None:
    return page.fault()


def vbar_unpin(page: Page | None) -> None:
    if page is not None:
        page.unpin()


class VRAMBuffer:
    """Room that a stream brings weights through, one after the other."""

    def __init__(self, max_size: int, device: int) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)

    def size(self) -> int:
        return self.memory.numel()

    def get(self, size: int, offset: int = 0) -> torch.Tensor:
        if offset + size > self.size():
            grown = torch.empty(offset + size, dtype=torch.uint8)
            grown[: self.size()] = self.memory
            self.memory = grown
        return self.memory[offset : offset + size]


def aimdo_to_tensor(room: Page | torch.Tensor, device: torch.device) -> torch.Tensor:
    assert device == GPU
    return room.memory if isinstance(room, Page) else room


class HostBuffer:
    """Memory that grows in its place; of an older host it has its size at once."""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0, mark_cold: bool = True) -> None:
        self.memory = torch.empty(max(int(size), int(max_grow_size)), dtype=torch.uint8)
        self.size = int(size)

    def get_raw_address(self) -> int:
        return self.memory.data_ptr()

    def extend(self, size: int, reallocate: bool = False, register: bool = True) -> int:
        if self.size + size > self.memory.numel():
            raise RuntimeError("no room in this buffer")
        self.size += size
        return self.get_raw_address()

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        start, stop = (self.get_raw_address() + edge for edge in (size, self.size))
        for pointer in [p for p in _registered if do_unregister and start <= p < stop]:
            del _registered[pointer]
        self.memory[size : self.size].fill_(LOST)
        self.size = size


def hostbuf_to_tensor(buffer: HostBuffer) -> torch.Tensor:
    return buffer.memory[: buffer.size]


class ModelMMAP:
    """A file in memory."""

    def __init__(self, path: str) -> None:
        self.file = Path(path).open("rb")  # noqa: SIM115  (as long as its tensors are there)
        self.map = mmap.mmap(self.file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)

    def get(self) -> int:
        return self.bytes.data_ptr()

    def get_file_handle(self) -> int:
        return self.file.fileno()

    def bounce(self) -> bool:
        return True


class Stream:
    """On a CPU all is in order."""

    def as_context(self, stream: Stream) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def wait_stream(self, stream: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass


class Runtime:
    """Of CUDA, what pins memory."""

    @staticmethod
    def cudaHostRegister(pointer: int, size: int, flags: int) -> int:
        if not size:
            return 1
        assert pointer not in _registered
        _registered[pointer] = size
        return 0

    @staticmethod
    def cudaHostUnregister(pointer: int) -> int:
        del _registered[pointer]
        return 0


def install() -> None:
    """Give the host a GPU with dynamic VRAM; before it loads a model."""
    stand_ins = {
        comfy_aimdo.model_vbar: (ModelVBAR, vbar_fault, vbar_unpin),
        comfy_aimdo.torch: (aimdo_to_tensor, hostbuf_to_tensor),
        comfy_aimdo.host_buffer: (HostBuffer,),
        comfy_aimdo.model_mmap: (ModelMMAP,),
    }
    for module, parts in stand_ins.items():
        for part in parts:
            setattr(module, part.__name__, part)
    comfy_aimdo.model_vbar.vbars_reset_watermark_limits = lambda: None
    with contextlib.suppress(ImportError):  # older hosts have buffers of torch's
        importlib.import_module("comfy_aimdo.vram_buffer").VRAMBuffer = VRAMBuffer
    torch.cuda.cudart = Runtime

    management = comfy.model_management
    is_device_cpu = management.is_device_cpu
    management.is_device_cpu = lambda device: is_device_cpu(device) and device.index is None
    management.get_torch_device = management.text_encoder_device = lambda: GPU
    management.NUM_STREAMS = 2
    management.STREAMS[GPU] = [Stream(), Stream()]
    management.MAX_PINNED_MEMORY = 1 << 40
    comfy.ops.cast_bias_weight = _on_the_gpu(comfy.ops.cast_bias_weight)
    with contextlib.suppress(ImportError):  # as above
        prefetch = importlib.import_module("comfy.model_prefetch")
        for name in ("make_prefetch_queue", "prefetch_queue_pop"):
            setattr(prefetch, name, _on_the_gpu(getattr(prefetch, name)))
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def _on_the_gpu(function: Any) -> Any:
    """`function`, called with the GPU as the device of a layer that has room there, whatever torch calls it."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        layer = given.get("s")
        if layer is None or hasattr(layer, "_v"):
            given["device"] = GPU
        return function(**given)

    return called


def pinned() -> int:
    """How many layers' weights have not been given back."""
    return len(_pages)


def pinned_in_memory() -> int:
    """Bytes that stand pinned for the GPU, as we count them or as the host does."""
    return max(sum(_registered.values()), comfy.model_management.TOTAL_PINNED_MEMORY)
