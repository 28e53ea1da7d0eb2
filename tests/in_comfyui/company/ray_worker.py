"""Stands for Raylight's `RayWorker` on a CPU: a process with ComfyUI in it, in a group over gloo and not NCCL."""

from __future__ import annotations

import sys
from typing import Any


class CPUWorker:
    """Has what Raylight's loaders ask of a worker."""

    def __init__(self, rank: int, world: int, port: int, host: str) -> None:
        sys.path.insert(0, host)
        sys.argv = ["main.py", "--cpu"]
        import comfy.options

        comfy.options.enable_args_parsing()
        import torch.distributed as dist

        dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"tcp://127.0.0.1:{port}")
        self.parallel_dict = {"is_xdit": True, "cfg_degree": 2, "ulysses_degree": 1, "is_fsdp": False}
        self.model: Any = None
        self.is_model_loaded = False
        self.patched: list[str] = []
        self.active_request_key: Any = "of another loader"

    def get_parallel_dict(self) -> dict:
        return self.parallel_dict

    def set_parallel_dict(self, parallel_dict: dict) -> None:
        self.parallel_dict = parallel_dict

    def _invalidate_non_fsdp_cache(self) -> None:
        self.active_request_key = None

    def patch_cfg(self) -> None:
        self.patched.append("cfg")

    def state(self) -> tuple:
        return self.is_model_loaded, self.patched, self.active_request_key

    def sample(self) -> tuple[Any, float]:
        """A latent, and how far the ranks' are apart."""
        import torch
        import torch.distributed as dist
        from architectures import ARCHITECTURES
        from generation import sample

        latent = sample(self.model, ARCHITECTURES["sd3"])
        all_ranks = [torch.empty_like(latent) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, latent)
        return latent, max(float((other - latent).abs().max()) for other in all_ranks)
