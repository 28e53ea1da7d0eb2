"""A driver for Triton where there is no GPU: kernels are compiled for a card that is not there, and launches return."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver


class Launcher:
    """What would launch a kernel."""

    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        pass


class Utilities:
    """What Triton asks of a device before a kernel's first launch."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 << 10, "multiprocessor_count": 1, "warpSize": 32}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, and threads at most."""
        return 0, 0, 0, 0, 1024


class Driver:
    """As much of Triton's own as compiling and launching asks for."""

    launcher_cls = Launcher
    utils = Utilities()

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def stand_in(architecture: str) -> None:
    """Let this process compile and "launch" for an NVIDIA card of ``sm_90`` or the like, on tensors in main memory.

    Triton must not have been imported with its interpreter.
    """
    from graft.kernels import triton_
    from graft.kernels.triton_ import plan

    driver.set_active(Driver(GPUTarget("cuda", int(architecture[3:]), 32)))
    plan.architecture = lambda device: architecture  # type: ignore[assignment]
    triton_.unavailable = lambda device, fmt=None: None
