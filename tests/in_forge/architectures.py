"""Small models of Forge Neo's own classes, each in fp32 and in Q4_K, with a LoRA for every Linear layer."""

from __future__ import annotations

import copy
import functools
import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import libgguf
import numpy as np
import torch
from backend import args, memory_management, operations, utils
from backend.patcher.base import ModelPatcher
from graft.kernels import by_name, dequantize
from graft.ops.files.gguf import open_gguf
from graft.ops.make import plan_model, write_model
from graft.ops.packed import as_weight, in_fp32
from graft.ops.recipes import recipe_named
from graft.scripts.forge.engine import Engine
from torch import nn

CPU = torch.device("cpu")
Q4_K = by_name("Q4_K")
RANK = 4


class Architecture(NamedTuple):
    """A class of Neo's, small sizes for it, and the shapes of what it is called with; floats stand for themselves."""

    module: str
    cls: str
    config: dict[str, Any]
    inputs: dict[str, Any]


_FLUX = {
    "in_channels": 16, "out_channels": 16, "context_in_dim": 256, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2,
    "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True,
}  # fmt: skip
_IMAGE = {"x": (1, 16, 8, 8), "context": (1, 6, 256)}
ARCHITECTURES = {
    "Flux": Architecture(
        "flux", "IntegratedFluxTransformer2DModel", {**_FLUX, "vec_in_dim": 256, "guidance_embed": True},
        {**_IMAGE, "timestep": 0.5, "y": (1, 256), "guidance": 3.5},
    ),
    "Flux.2": Architecture(
        "flux", "IntegratedFluxTransformer2DModel",
        {**_FLUX, "in_channels": 256, "out_channels": 128, "vec_in_dim": None, "guidance_embed": False, "patch_size": 1,
         "qkv_bias": False, "axes_dim": [32, 32, 32, 32], "txt_ids_dims": [3], "global_modulation": True,
         "mlp_silu_act": True, "ops_bias": False},
        {**_IMAGE, "x": (1, 256, 4, 4), "timestep": 0.5},
    ),
    "Chroma": Architecture(
        "chroma", "IntegratedChromaTransformer2DModel",
        {**_FLUX, "in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 256, "hidden_dim": 256, "n_layers": 2,
         "txt_ids_dims": [], "vec_in_dim": None},
        {**_IMAGE, "timestep": 0.5, "guidance": 0.0},
    ),
    "Qwen-Image": Architecture(
        "qwen", "QwenImageTransformer2DModel",
        {"num_layers": 2, "attention_head_dim": 128, "num_attention_heads": 2, "joint_attention_dim": 256},
        {**_IMAGE, "x": (1, 16, 1, 8, 8), "timesteps": 0.5},
    ),
    "Wan": Architecture(
        "wan", "WanModel",
        {"dim": 256, "ffn_dim": 512, "text_dim": 256, "num_heads": 2, "num_layers": 2},
        {**_IMAGE, "x": (1, 16, 2, 8, 8), "timestep": 0.5},
    ),
    "Lumina 2": Architecture(
        "lumina", "NextDiT",
        {"in_channels": 16, "dim": 256, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 1,
         "cap_feat_dim": 256, "axes_dims": [32, 48, 48], "axes_lens": [64, 64, 64], "qk_norm": True},
        {**_IMAGE, "timesteps": 0.5, "num_tokens": 6},
    ),
    "Z-Image": Architecture(
        "lumina", "NextDiT",
        {"in_channels": 16, "dim": 256, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
         "cap_feat_dim": 256, "axes_dims": [32, 48, 48], "axes_lens": [64, 64, 64], "qk_norm": True,
         "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32, "ffn_dim_multiplier": 2.0},
        {**_IMAGE, "timesteps": 0.5, "num_tokens": 6},
    ),
    "Anima": Architecture(
        "anima", "Anima",
        {"in_channels": 16, "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "model_channels": 256,
         "crossattn_emb_channels": 256, "adaln_lora_dim": 256, "num_blocks": 2, "num_heads": 2},
        {**_IMAGE, "x": (1, 16, 1, 8, 8), "timesteps": 0.5},
    ),
    "Krea 2": Architecture(
        "krea", "SingleStreamDiT",
        {"features": 256, "txtdim": 256, "heads": 2, "kvheads": 1, "layers": 2, "txtlayers": 2, "txtheads": 2,
         "txtkvheads": 2},
        {**_IMAGE, "context": (1, 6, 512), "timesteps": 0.5},
    ),
    "Ernie": Architecture(
        "ernie", "ErnieImageModel",
        {"hidden_size": 256, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 512, "text_in_dim": 512},
        {"x": (1, 128, 4, 4), "context": (1, 6, 512), "timesteps": 0.5},
    ),
    "PiD": Architecture(
        "pixeldit.pid", "PidNet",
        {"num_groups": 2, "hidden_size": 256, "pixel_attn_hidden_size": 256, "pixel_num_groups": 2, "patch_depth": 2,
         "pixel_depth": 1, "txt_embed_dim": 256, "lq_hidden_dim": 32, "lq_num_res_blocks": 1},
        {"x": (1, 3, 32, 32), "context": (1, 6, 256), "timesteps": 0.5},
    ),
}  # fmt: skip


class Joint(NamedTuple):
    """A layer that sees the picture, how many tokens it has before and behind that, and those of the picture."""

    path: str
    before: int
    behind: int
    grid: tuple[int, int, int] = (1, 4, 4)


JOINT = {
    "Flux": Joint("single_blocks.0.linear1", 6, 0), "Flux.2": Joint("single_blocks.0.linear1", 6, 0),
    "Chroma": Joint("single_blocks.0.linear1", 6, 0),
    "Qwen-Image": Joint("transformer_blocks.0.img_mlp.net.0.proj", 0, 0),
    "Wan": Joint("blocks.0.ffn.0", 0, 0, (2, 4, 4)), "Lumina 2": Joint("layers.0.attention.qkv", 6, 0),
    "Z-Image": Joint("layers.0.attention.qkv", 32, 16), "Krea 2": Joint("blocks.0.attn.wq", 6, 0),
}  # fmt: skip
"""Those that have masks; a context has 6 tokens, and a latent of 8 by 8 cells is 4 by 4 tokens of the picture."""


@functools.cache
def small(name: str, engine: Engine) -> Small:
    """One of them, built once."""
    return Small(name, engine)


class Small:
    """One of them.

    Attributes:
        plain: in fp32, with what the packed weights decode to.
        patcher: of the packed one.
    """

    def __init__(self, name: str, engine: Engine) -> None:
        self.what = ARCHITECTURES[name]
        if name == "PiD":  # what its picture is made of comes by the side
            args.dynamic_args.lq_latent = torch.zeros(1, 16, 4, 4), torch.tensor([0.1])
        self.random = torch.Generator().manual_seed(0)
        self.plain, packed = self._build(None), self._build("gguf")
        state: dict[str, torch.Tensor] = dict(self.plain.named_buffers())
        for key, value in self.plain.named_parameters():
            self._fill(key, value.data)
            state[key] = self._parameter(engine, key, value.data)
        self.linears = [k for k, m in packed.named_modules() if isinstance(m, engine.host.layers["Linear"])]
        packed.load_state_dict(state, strict=False)
        self.patcher = ModelPatcher(packed, CPU, CPU)
        self.inputs = {key: self._input(value) for key, value in self.what.inputs.items()}
        self.loras = {
            f"{path}.weight": self._lora(*self.plain.get_submodule(path).weight.shape) for path in self.linears
        }

    def _build(self, kind: str | None) -> nn.Module:
        cls = getattr(importlib.import_module(f"backend.nn.{self.what.module}"), self.what.cls)
        with operations.using_forge_operations(device=CPU, dtype=torch.float32, bnb_dtype=kind):
            return cls(**copy.deepcopy(self.what.config))

    def _fill(self, key: str, value: torch.Tensor) -> None:
        value.copy_(torch.randn(value.shape, generator=self.random))
        value.mul_(value[0].numel() ** -0.5 if value.dim() > 1 else 0.1)
        if value.dim() < 2 and key.endswith(("weight", "scale")):
            value.add_(1)

    def _parameter(self, engine: Engine, key: str, value: torch.Tensor) -> torch.Tensor:
        """Q4_K where a Linear holds whole blocks; `value` becomes what it decodes to."""
        module = self.plain.get_submodule(key.rpartition(".")[0])
        if not isinstance(module, operations.ForgeOperations.Linear) or value.dim() < 2 or value.shape[1] % 256:
            return engine.host.gguf_parameter(value.clone(), by_name("F32"), value.shape, None)
        packed = torch.from_numpy(libgguf.quantize_rows(value.numpy(), Q4_K.ggml_type).view(np.uint8)).clone()
        value.copy_(dequantize(packed.reshape(-1), Q4_K, tuple(value.shape), torch.float32, "torch"))
        kind = engine.host.types[engine.host.type_of(Q4_K.ggml_type)]
        return engine.host.gguf_parameter(packed, Q4_K, value.shape, kind)

    def _input(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return torch.randn(value, generator=self.random)
        return torch.tensor([value]) if isinstance(value, float) else value

    def _lora(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        up = torch.randn(rows, RANK, generator=self.random) * 0.3 / RANK**0.5
        return up, torch.randn(RANK, columns, generator=self.random) / columns**0.5

    def run(self, strength: float | None = None) -> torch.Tensor:
        """The packed model's answer, with the LoRA or without."""
        from backend.patcher.lora import weight_adapter

        patcher = self.patcher.clone()
        if strength is not None:
            adapters = {
                k: weight_adapter.LoRAAdapter(set(), (*v, None, None, None, None)) for k, v in self.loras.items()
            }
            assert len(patcher.add_patches(adapters, strength, filename="a", online_mode=True)) == len(self.linears)
        patcher.partially_load(CPU, 1e32)
        memory_management.bake_gguf_model(patcher.model)
        return patcher.model(**copy.deepcopy(self.inputs))

    def at(self, path: str, strength: float | None) -> torch.Tensor:
        """What the layer at `path` gives in a call of the whole model, with the LoRA on it alone or without."""
        from backend.modules.k_model import KModel
        from backend.patcher.lora import weight_adapter

        whole = KModel.__new__(KModel)
        nn.Module.__init__(whole)
        whole.computation_dtype, whole.diffusion_model = torch.float32, self.patcher.model
        whole.predictor = SimpleNamespace(
            calculate_input=lambda sigma, x: x, timestep=lambda t: t, calculate_denoised=lambda sigma, y, x: y
        )
        patcher = ModelPatcher(whole, CPU, CPU)
        if strength is not None:
            adapter = weight_adapter.LoRAAdapter(set(), (*self.loras[f"{path}.weight"], None, None, None, None))
            patcher.add_patches({f"diffusion_model.{path}.weight": adapter}, strength, filename="a", online_mode=True)
        patcher.partially_load(CPU, 1e32)
        memory_management.bake_gguf_model(whole)
        seen: list[torch.Tensor] = []
        hook = whole.diffusion_model.get_submodule(path).register_forward_hook(lambda m, a, y: seen.append(y.clone()))
        named = copy.deepcopy(self.inputs)
        x, t = named.pop("x"), named.pop("timestep" if "timestep" in named else "timesteps")
        try:
            whole.apply_model(x, t, c_crossattn=named.pop("context"), transformer_options={}, **named)
        finally:
            hook.remove()
        return seen[0]

    def saved(self, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """What a file that Graft makes of the model in fp32 answers, read by Forge, and the numbers in it in fp32."""
        write_model(path, plan_model(self.plain.state_dict(), recipe_named("Q8_0"), self.what.cls), overwrite=True)
        packed, plain = self._build("gguf"), copy.deepcopy(self.plain)
        packed.load_state_dict(utils.load_torch_file(str(path)), strict=False)
        tensors = open_gguf(path).tensors
        assert sum(tensor.fmt.name == "Q8_0" for tensor in tensors.values()) >= 4
        plain.load_state_dict({name: in_fp32(as_weight(tensor)) for name, tensor in tensors.items()}, strict=False)
        patcher = ModelPatcher(packed, CPU, CPU)
        patcher.partially_load(CPU, 1e32)
        memory_management.bake_gguf_model(packed)
        got, want = (model(**copy.deepcopy(self.inputs)) for model in (packed, plain))
        return got, want

    def dense(self, strength: float | None = None) -> torch.Tensor:
        """The same by the model in fp32, with the LoRA in its weights."""
        before = {path: self.plain.get_submodule(path).weight.data for path in self.linears}
        if strength is not None:
            for path, weight in before.items():
                up, down = self.loras[f"{path}.weight"]
                self.plain.get_submodule(path).weight.data = weight + strength * up @ down
        y = self.plain(**copy.deepcopy(self.inputs))
        for path, weight in before.items():
            self.plain.get_submodule(path).weight.data = weight
        return y
