"""LoRA, DoRA and OFT as PEFT trains and saves them, on its own small models and on a diffusers transformer."""

from __future__ import annotations

import adapter_samples as samples
import oracle
import pytest
import torch
from graft.kernels import by_name
from graft.ops import layers
from graft.ops.factors import FactorCache
from graft.ops.files.lora import load_adapters
from graft.ops.packed import PackedTensor
from graft.ops.residual import ResidualStack
from safetensors.torch import save_file
from torch import nn

peft = pytest.importorskip("peft", reason="peft is not installed: its own results cannot be compared")

one_thread = pytest.fixture(autouse=True)(samples.one_thread)
CPU = torch.device("cpu")


class Block(nn.Module):
    """Two layers with the names of a diffusers transformer's."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(32, 48)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)

    def forward(self, x: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.to_q(x), self.conv(image)


def noise(module: nn.Module, scale: float = 0.1) -> None:
    """Trained values for what PEFT begins with zeros."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if any(mark in name for mark in ("lora_A", "lora_B", "oft_R")):
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
        elif "magnitude" in name:
            parameter.data *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)


def grafted(model: nn.Module, file, strength: float = 1.0):
    """The model with Graft layers for its own, and a stack with the file's adapters."""
    ours = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            layer = layers.Linear(module.in_features, module.out_features, bias=module.bias is not None)
        elif isinstance(module, nn.Conv2d):
            options = {"stride": module.stride, "padding": module.padding}
            layer = layers.Conv2d(module.in_channels, module.out_channels, module.kernel_size, **options)
        else:
            continue
        layer.load_weight(module.weight.data)
        layer.bias = module.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        ours[name] = layer
    stack = ResidualStack()
    fitted = load_adapters(file).on(ours)
    fitted.add_to(stack, strength)
    stack.build(ours, FactorCache())
    return ours, stack, fitted


CONFIGS = {
    "LoRA": lambda: peft.LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "conv"]),
    "DoRA": lambda: peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=["to_q", "conv"]),
    "LoRA with a bias": lambda: peft.LoraConfig(r=4, lora_alpha=4, lora_bias=True, target_modules=["to_q"]),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=["to_q"]),
}


@pytest.mark.filterwarnings("ignore:Adapter .default.:UserWarning")  # it takes a bias for a torn tensor
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_peft_file_does_what_peft_does(tmp_path, kind: str) -> None:
    torch.manual_seed(0)
    plain = Block().requires_grad_(False)
    x, image = torch.randn(5, 32), torch.randn(2, 8, 6, 6)
    base = plain(x, image)
    trained = peft.get_peft_model(plain, CONFIGS[kind]())
    noise(trained, 0.02 if kind == "OFT" else 0.1)
    trained.eval()
    with torch.no_grad():
        wanted = trained(x, image)
    state = peft.get_peft_model_state_dict(trained)
    file = tmp_path / "peft.safetensors"
    save_file({k: v.contiguous() for k, v in state.items()}, file)
    model = trained.unload()
    ours, stack, fitted = grafted(model, file)
    assert not fitted.rejected and not fitted.missing and not fitted.report(1.0).missing
    with stack.active(ours, CPU), torch.no_grad():
        got = model(x, image)
    for mine, theirs, before in zip(got, wanted, base, strict=True):
        if not torch.equal(theirs, before):
            assert (mine - theirs).norm() / (theirs - before).norm() < 1e-5


def test_a_named_adapter_is_found(tmp_path) -> None:
    model = Block().requires_grad_(False)
    trained = peft.get_peft_model(model, CONFIGS["LoRA"](), adapter_name="style")
    noise(trained)
    x, image = torch.randn(5, 32), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        wanted = trained(x, image)
    file = tmp_path / "named.safetensors"
    state = {k: v.contiguous() for k, v in trained.state_dict().items() if "lora_" in k}
    assert all(".style." in k for k in state)
    save_file(state, file)
    model = trained.unload()
    ours, stack, fitted = grafted(model, file)
    assert len(fitted.matched) == 2
    with stack.active(ours, CPU), torch.no_grad():
        got = model(x, image)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_diffusers_transformer_on_packed_weights(tmp_path, dora: bool) -> None:
    """The effect on a transformer with Q8_0 weights, against diffusers with PEFT on the same weights decoded."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(8, 12, 12),
    ).requires_grad_(False).eval()  # fmt: skip
    fmt = by_name("Q8_0")
    packed = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.in_features % 32 == 0:
            data = oracle.quantize(module.weight.data, fmt)
            packed[name] = PackedTensor(data, fmt, module.weight.shape)
            module.weight.data = packed[name].dequantize(torch.float32)
    inputs = {
        "hidden_states": torch.randn(1, 16, 8), "encoder_hidden_states": torch.randn(1, 4, 32),
        "pooled_projections": torch.randn(1, 32), "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(4, 3), "return_dict": False,
    }  # fmt: skip
    inputs["img_ids"][:, 1] = torch.arange(16)
    base = model(**inputs)[0]
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "ff.net.0.proj", "x_embedder"]
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=4, use_dora=dora, target_modules=targets))
    noise(model)
    wanted = model(**inputs)[0]
    state = peft.get_peft_model_state_dict(model)
    file = tmp_path / "style.safetensors"
    save_file({f"transformer.{k}": v.contiguous() for k, v in state.items()}, file)
    model.unload_lora()
    ours, stack, fitted = grafted(model, file)
    for name, weight in packed.items():
        ours[name].load_weight(weight)
    stack = ResidualStack()
    fitted.add_to(stack, 1.0)
    stack.build(ours, FactorCache())
    assert torch.allclose(model(**inputs)[0], base, rtol=1e-4, atol=1e-5)
    with stack.active(ours, CPU):
        got = model(**inputs)[0]
    assert (got - wanted).norm() / (wanted - base).norm() < 1e-4
    assert all(r.path == "residual" for r in stack.residuals.values()) and len(stack.residuals) > 8
