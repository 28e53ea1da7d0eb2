"""int8 products in a model that ComfyUI loaded: what they change, and what they leave alone."""

from __future__ import annotations

import pytest
import torch
from generation import distance, fingerprint, sample, with_lora
from gguf_samples import encode
from small import SD3, loras, sd3  # noqa: F401  (fixtures)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def int8(pack):
    kernels = pack("kernels.int8")
    if kernels.unavailable(CPU) is not None:
        pytest.skip(kernels.unavailable(CPU))
    with pytest.MonkeyPatch.context() as patch:  # the small model has 64 and 20 tokens
        patch.setattr(kernels, "LEAST_ROWS", 16)
        patch.setattr(pack("kernels"), "has_fast_bf16", lambda: False)
        yield kernels


@pytest.fixture(scope="module")
def quick(pack, sd3, folders, int8):  # noqa: F811
    """The same file; the small model's layers are all too small for the rule."""
    path = folders / "unet_gguf" / "sd3-Q4_K.gguf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAFT_INT8_LAYERS", "joint_blocks")
        return pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="int8")


def test_a_loras_effect_is_kept_and_the_base_is_as_it_was(sd3, loras, quick):  # noqa: F811
    usual, before = sd3[0], fingerprint(quick)
    base, plain = sample(quick, SD3), sample(usual, SD3)
    assert 1e-4 < distance(base, plain) < 0.02
    for lora in loras:
        effect = sample(with_lora(quick, lora, 0.8), SD3) - base
        true = sample(with_lora(usual, lora, 0.8), SD3) - plain
        kept = float((effect * true).sum() / true.square().sum())
        assert 0.98 < kept < 1.02  # the true one is a few percent of what int8 is about a percent off of
    assert torch.equal(sample(quick, SD3), base)
    assert fingerprint(quick) == before


def test_the_report_says_which_layers_and_why_not_others(pack, quick, sd3, int8, monkeypatch):  # noqa: F811
    sample(quick, SD3)
    report = pack("nodes.inspect").report(quick)
    assert "float32, int8 in 37 layers · " in report.splitlines()[0], report
    assert "37 layers in int8, where there are many tokens" in report
    assert "layers not in int8 (not quantized)" in report and "not in int8 (smaller than 768×1024)" in report
    assert "int8" not in pack("nodes.inspect").report(sd3[0])
    monkeypatch.setattr(int8, "unavailable", lambda device: "this processor has none")
    loader = pack("nodes").GraftUNETLoader()
    (text,) = loader.load("sd3-Q4_K.gguf", compute_dtype="int8")["ui"]["text"]
    assert "float32, int8 is not used: this processor has none · " in text


def test_on_a_processor_with_native_bf16_the_rest_is_in_bf16(pack, sd3, int8, monkeypatch):  # noqa: F811
    """Against that int8 has to be the faster one; where there is none, the host chooses as ever."""
    monkeypatch.setattr(pack("kernels"), "has_fast_bf16", lambda: True)
    monkeypatch.setenv("GRAFT_INT8_LAYERS", "joint_blocks")
    load = pack("nodes").GraftUNETLoader().load
    shown = load("sd3-Q4_K.gguf", compute_dtype="int8")
    model, (text,) = shown["result"][0], shown["ui"]["text"]
    assert "bfloat16, int8 in 37 layers · " in text.splitlines()[0], text
    assert model.model.manual_cast_dtype == torch.bfloat16 and torch.isfinite(sample(model, SD3)).all()
    monkeypatch.setattr(int8, "unavailable", lambda device: "this processor has none")
    (text,) = load("sd3-Q4_K.gguf", compute_dtype="int8")["ui"]["text"]
    assert "float32 (compute_dtype bf16 is faster on this processor), int8 is not used: " in text


def test_compiled_blocks_multiply_in_int8_too(quick, int8):
    from test_compile import Counting, compiled_block

    torch._dynamo.reset()
    counting = Counting()
    with torch.no_grad():
        for layer in quick.graft.layers.values():
            layer.int8_scales = None
        assert torch.equal(sample(compiled_block(quick, counting), SD3), sample(quick, SD3))
    (graph,) = counting.graphs
    called = [str(node.target) for node in graph.graph.nodes if "graft" in str(node.target)]
    assert called == ["graft.int8_linear"] * 2
    torch._dynamo.reset()


def test_codes_and_products_are_comfy_kitchens(pack, int8):
    """Those of its eager kernels; on a GPU its others take their place."""
    kitchen = pytest.importorskip("comfy_kitchen")
    if not hasattr(kitchen, "int8_linear"):
        pytest.skip("this comfy_kitchen is older than its int8 kernels")
    from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout
    from gguf import GGMLQuantizationType

    g = torch.Generator().manual_seed(0)
    weight, x, bias = torch.randn(128, 1024, generator=g), torch.randn(40, 1024, generator=g), torch.randn(128)
    x[:, 7] *= 100
    fmt = pack("kernels").by_name("Q4_K")
    data = torch.from_numpy(encode(weight.numpy(), GGMLQuantizationType.Q4_K))
    scales, _ = int8.prepare(data, fmt, weight.shape)
    codes = torch.empty(weight.shape, dtype=torch.int8)
    int8.encode(data, fmt, scales, codes, "cpu")
    decoded = pack("kernels").dequantize(data, fmt, weight.shape)
    want, params = TensorWiseINT8Layout.quantize(decoded, per_channel=True, convrot=True)
    difference = (codes.int() - want.int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() <= 0.001
    torch.testing.assert_close(scales, params.scale.view(-1, 1), rtol=1e-5, atol=0)
    theirs = int8._by_kitchen(x, data.view(128, -1), fmt, scales, bias, None, "auto", None)
    ours = int8._on_cpu(x, data.view(128, -1), fmt, scales, bias, None, "auto", None)
    assert distance(ours, theirs) < 1e-3
