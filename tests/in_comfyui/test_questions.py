"""What ComfyUI asks a layer for, other than its product, it gets from ours as from its own."""

from __future__ import annotations

import ast
import importlib
import inspect
import math
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import architectures
import comfy.ldm.hunyuan3dv2_1.hunyuandit
import comfy.model_detection
import comfy.ops
import comfy.supported_models
import gguf
import pytest
import torch
import torch.nn.functional as F
from architectures import META, Architecture, write_model
from generation import dense_model, distance, fingerprint, forget, sample, with_lora
from gguf_samples import encode
from loras import make_lora

FP32 = {"device": None, "dtype": torch.float32}


def weight(pack: Any, kind: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Seeded numbers as a state dict of a GGUF file holds them: in `kind` if that fits, else in fp32."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / max(1, math.prod(shape[1:])) ** 0.5
    if kind in ("F16", "BF16"):
        return values.to(torch.float16 if kind == "F16" else torch.bfloat16)
    if len(shape) < 2 or values.numel() % 32:
        return values
    data = torch.from_numpy(encode(values.view(-1, 32).numpy(), gguf.GGMLQuantizationType[kind]))
    return pack("ops.packed").PackedTensor(data, pack("kernels").by_name(kind), shape)


def plain(value: torch.Tensor) -> torch.Tensor:
    return value.dequantize(torch.float32) if hasattr(value, "packed") else value.float()


# Parts of models that ask


def _pixel_head(ops: Any) -> torch.nn.Module:
    head = importlib.import_module("comfy.ldm.lumina.model").SimpleMLPAdaLN
    return head(3, 64, 3, 96, num_res_blocks=1, operations=ops, **FP32)


def _timesteps(ops: Any) -> torch.nn.Module:
    return importlib.import_module("comfy.ldm.triposplat.model").TimestepEmbedder(64, operations=ops, **FP32)


def _camera(ops: Any) -> torch.nn.Module:
    encoder = importlib.import_module("comfy.ldm.depth_anything_3.camera").CameraEnc
    return encoder(dim_out=64, trunk_depth=1, num_heads=2, operations=ops, **FP32)


def _eyes(ops: Any) -> torch.nn.Module:
    config = {
        "hidden_size": 64, "num_heads": 2, "intermediate_size": 96, "depth": 1, "patch_size": 4, "in_channels": 3,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "num_position_embeddings": 64, "out_hidden_size": 64,
    }  # fmt: skip
    return importlib.import_module("comfy.text_encoders.qwen35").Qwen35VisionModel(config, ops=ops, **FP32)


def _patches(ops: Any) -> torch.nn.Module:
    embed = importlib.import_module("comfy.ldm.cogvideo.model").CogVideoXPatchEmbed
    positions = {"use_positional_embeddings": False, "use_learned_positional_embeddings": False}
    return embed(dim=64, text_dim=96, operations=ops, **positions, **FP32)


def _numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


PARTS: dict[str, tuple[Callable, tuple]] = {
    "Z-Image's pixel head": (_pixel_head, (_numbers(4, 1, 3), _numbers(4, 96))),
    "TripoSplat's timesteps": (_timesteps, (torch.tensor([0.3, 0.7]),)),
    "Depth Anything's camera": (_camera, (torch.eye(3, 4)[None, None], torch.eye(3)[None, None], (64, 64))),
    "HiDream-O1's eyes": (_eyes, (_numbers(24, 3 * 2 * 4 * 4), torch.tensor([[1, 4, 6]]))),
    "CogVideoX's patches": (_patches, (_numbers(1, 5, 96), _numbers(1, 2, 16, 8, 8))),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
@pytest.mark.parametrize("part", PARTS)
def test_parts_of_models_that_ask(pack, part, kind):
    """They cast to the dtype of a weight; the numbers that they multiply with must not be rounded either."""
    build, inputs = PARTS[part]
    try:
        theirs = build(comfy.ops.manual_cast)
    except (ImportError, AttributeError):
        pytest.skip("this ComfyUI does not have it")
    ours = build(pack("nodes.ops").GraftOps)
    shapes = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    state = {name: weight(pack, kind, shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    theirs.load_state_dict({name: plain(value) for name, value in state.items()})
    ours.load_state_dict(state)
    pack("ops.layers").unpack_leftovers(ours)
    asked = pack("ops.questions").asked_layers(ours)
    assert asked
    pack("ops.questions").answer_questions(ours, lambda layer: torch.float32)
    with torch.no_grad():
        got, want = ours(*inputs), theirs(*inputs)
    assert want.isfinite().all() and distance(got, want) < 1e-5


# Whole models


def _hunyuan3d() -> torch.nn.Module:
    return comfy.ldm.hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain(
        hidden_size=256, depth=2, guidance_cond_proj_dim=None, **META
    )


def _cogvideox() -> torch.nn.Module:
    model = pytest.importorskip("comfy.ldm.cogvideo.model").CogVideoXTransformer3DModel
    return model(
        num_attention_heads=4, time_embed_dim=256, text_embed_dim=256, num_layers=1,
        use_rotary_positional_embeddings=True, **META,
    )  # fmt: skip


ASKING = {
    a.name: a
    for a in (
        Architecture("hunyuan3d", _hunyuan3d, (1, 64, 16), (20, 1024), None, ("blocks.0", "t_embedder")),
        Architecture("cogvideox", _cogvideox, (1, 16, 2, 8, 8), (20, 256), None, ("blocks.0", "patch_embed")),
    )
}


@pytest.mark.parametrize("type_name", ["Q8_0", "BF16"])
@pytest.mark.parametrize("name", ASKING)
def test_models_that_cast_to_the_dtype_of_a_layer(pack, tmp_path, monkeypatch, name, type_name):
    """What goes into some of their layers, and the whole of the model after it."""

    def packed_rows(name: str, shape: tuple[int, ...], block: int) -> tuple[int, int] | None:
        if len(shape) < 2 or math.prod(shape) < 1 << 14 or math.prod(shape) % 256:
            return None
        return shape if len(shape) == 2 and shape[1] % block == 0 else (math.prod(shape) // 256, 256)

    monkeypatch.setattr(architectures, "_packed_rows", packed_rows)
    architecture = ASKING[name]
    path = write_model(architecture, type_name, tmp_path / "asking.gguf")
    load = pack("nodes.loader").load_diffusion_model
    graft, dense = load(str(path), compute_dtype="fp32"), dense_model(pack, path)
    assert type_name in graft.graft.summary
    before, base, want = fingerprint(graft), sample(graft, architecture, cfg=2.0), sample(dense, architecture, cfg=2.0)
    assert distance(base, want) < 1e-5
    shapes = {key: value.shape for key, value in dense.model.state_dict().items()}
    lora = make_lora(dense.model, shapes, "native", architecture.lora_layers)
    effect = sample(with_lora(dense, lora), architecture, cfg=2.0) - want
    assert effect.norm() > 0.01 * want.norm()
    assert distance(sample(with_lora(graft, lora), architecture, cfg=2.0) - base, effect) < 1e-4
    assert torch.equal(sample(graft, architecture, cfg=2.0), base) and fingerprint(graft) == before
    del graft, dense
    forget()


class WithReference(Architecture):
    """HiDream-O1's conditioning: tokens, and a picture to work from."""

    def conditioning(self, seed: int = 1) -> list:
        g = torch.Generator().manual_seed(seed)
        picture = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(100))
        tokens = torch.randint(0, 1000, (1, 12), generator=g)
        return [[torch.zeros(1, 12, 64), {"text_input_ids": tokens, "reference_latents": [picture]}]]


def test_hidream_o1_with_a_reference(pack, tmp_path, monkeypatch):
    """It interpolates positions with weights in the dtype of a table, which in bytes are 0."""
    model = pytest.importorskip("comfy.ldm.hidream_o1.model").HiDreamO1Transformer
    sizes = {
        "text_config_overrides": {
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 1,
            "num_key_value_heads": 1,
        },
        "vision_config_overrides": {"hidden_size": 128, "num_heads": 2, "intermediate_size": 256, "depth": 1},
    }  # fmt: skip
    detect = comfy.model_detection.detect_unet_config
    monkeypatch.setattr(comfy.model_detection, "detect_unet_config", lambda *a, **k: detect(*a, **k) | sizes)
    monkeypatch.setattr(architectures, "_packed_rows", lambda name, shape, block: shape if len(shape) == 2 else None)
    build = partial(model, **sizes, **META)
    hidream = WithReference("hidream_o1", build, (1, 3, 64, 64), (12, 64), None, ())
    path = write_model(hidream, "Q8_0", tmp_path / "hidream.gguf")
    graft, dense = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="fp32"), dense_model(pack, path)
    assert graft.graft.layers["diffusion_model.visual.pos_embed"].weight.dtype == torch.float32
    want = sample(dense, hidream)
    assert want.isfinite().all() and distance(sample(graft, hidream), want) < 1e-5
    forget()


def test_what_is_asked_is_held_as_the_host_computes(pack, tmp_path, monkeypatch):
    def packed_rows(name: str, shape: tuple[int, ...], block: int) -> tuple[int, int] | None:
        return shape if len(shape) == 2 and math.prod(shape) >= 1 << 14 else None

    monkeypatch.setattr(architectures, "_packed_rows", packed_rows)
    path = write_model(ASKING["hunyuan3d"], "Q8_0", tmp_path / "hunyuan3d.gguf")
    layers = pack("nodes.loader").load_diffusion_model(str(path), compute_dtype="bf16").graft.layers
    assert layers["diffusion_model.t_embedder.mlp.0"].weight.dtype == torch.bfloat16
    assert layers["diffusion_model.t_embedder.mlp.2"].weight.dtype == torch.uint8
    forget()


class Declaring(torch.nn.Module):
    """A model in bf16 with layers that its architecture keeps in fp32, as CogVideoX's patches are."""

    manual_cast_dtype = None

    def __init__(self, pack: Any) -> None:
        super().__init__()
        ops, dtypes = pack("nodes.ops").GraftOps, (torch.bfloat16, torch.float32)
        self.tables = torch.nn.ModuleList(ops.Embedding(8, 64, dtype=dtype) for dtype in dtypes)
        self.layers = torch.nn.ModuleList(ops.Linear(64, 32, bias=False, dtype=dtype) for dtype in dtypes)
        for layer in (*self.tables, *self.layers):
            layer.load_state_dict({"weight": weight(pack, "Q8_0", tuple(layer.logical_shape))})

    def get_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def forward(self, ids: torch.Tensor) -> list[torch.Tensor]:
        found = [table(ids) for table in self.tables]
        return found + [layer(found[0].to(layer.weight.dtype)) for layer in self.layers]


def test_what_an_architecture_keeps_in_fp32_stays_so(pack):
    model = Declaring(pack)
    pack("nodes.loader")._answer_questions(model)
    with torch.no_grad():
        found = [tensor.dtype for tensor in model(torch.tensor([3]))]
    assert found == 2 * [torch.bfloat16, torch.float32]


def test_a_host_that_cuts_weights_in_its_state_dict_rounds_nothing(pack):
    """PixelDiT's modulations are taken apart in the middle of rows, and stay packed."""
    config = getattr(comfy.supported_models, "PixelDiTT2I", None)
    if config is None:
        pytest.skip("this ComfyUI has no PixelDiT")
    pixels, inputs, patch = 16, 64, 4
    name = "core.pixel_blocks.0.adaLN_modulation.0.{}"
    state = {
        "core.pixel_embedder.proj.weight": weight(pack, "Q8_0", (pixels, 3)),
        name.format("weight"): weight(pack, "Q8_0", (patch * 6 * pixels, inputs), 1),
        name.format("bias"): weight(pack, "Q8_0", (patch * 6 * pixels,), 2),
    }
    want = config({"image_model": "pixeldit_t2i"}).process_unet_state_dict({k: plain(v) for k, v in state.items()})
    got = config({"image_model": "pixeldit_t2i"}).process_unet_state_dict(state)
    assert got.keys() == want.keys() and len(want) == 5
    for key, value in want.items():
        assert torch.equal(plain(got[key]), value), key
    assert hasattr(got["pixel_blocks.0.adaLN_modulation_mlp.weight"], "packed")


# Calls with more than x, as ComfyUI 0.38 and later make them


@pytest.fixture(params=["Q8_0", "F32"])
def linear(pack, request):
    layer = pack("nodes.ops").GraftOps.Linear(64, 32)
    layer.load_state_dict({"weight": weight(pack, request.param, (32, 64)), "bias": _numbers(32)})
    return layer


@pytest.fixture
def product(linear) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: F.linear(x, linear.dequantized(), linear.bias)


def _swiglu(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTS = {
    "gelu_tanh": (64, lambda x: F.gelu(x, approximate="tanh")),
    "swiglu": (128, _swiglu),
}  # fmt: skip


@pytest.mark.parametrize("act", ACTS)
def test_a_linear_that_activates_its_input(linear, product, act):
    width, function = ACTS[act]
    x = _numbers(5, width)
    assert distance(linear(x, input_act=act), product(function(x))) < 1e-6
    assert torch.equal(linear(x, act), linear(x, input_act=act, act_weight=None, residual=None, residual_scale=None))


@pytest.mark.parametrize("given", ["the norm", "its weight"])
def test_a_linear_that_norms_its_input(linear, product, given):
    x, norm = _numbers(5, 64), torch.nn.RMSNorm(64, eps=1e-3)
    norm.weight.data = 1 + 0.1 * _numbers(64)
    asked = {"act_weight": norm} if given == "the norm" else {"act_weight": norm.weight, "act_eps": norm.eps}
    with torch.no_grad():
        assert distance(linear(x, input_act="rms_norm", **asked), product(norm(x))) < 1e-6


def test_a_linear_that_adds_to_a_residual(linear, product):
    x, residual, scale = _numbers(5, 64), _numbers(5, 32).flip(0), _numbers(32)
    kept = residual.clone()
    assert distance(linear(x, residual=residual, residual_scale=scale), residual + scale * product(x)) < 1e-6
    assert distance(linear(x, None, None, residual, scale), residual + scale * product(x)) < 1e-6
    assert distance(linear(x, residual=residual), residual + product(x)) < 1e-6
    assert torch.equal(residual, kept)


def test_the_hosts_own_name_for_an_activation(linear, product, monkeypatch):
    monkeypatch.setattr(comfy.ops, "INPUT_ACT_EAGER", {"relu": F.relu}, raising=False)
    x = _numbers(5, 64)
    assert distance(linear(x, input_act="relu"), product(F.relu(x))) < 1e-6


def test_what_is_unknown_is_said(pack, linear):
    error = pack("kernels").GraftError
    with pytest.raises(error, match="apply softplus, which this version of Graft does not know: update Graft"):
        linear(_numbers(1, 64), input_act="softplus")
    with pytest.raises(error, match="calls a Linear with output_act, which this version of Graft does not know"):
        linear(_numbers(1, 64), output_act="gelu")
    assert linear(_numbers(1, 64), output_act=None).shape == (1, 32)


def linear_input_act(linear: torch.nn.Module, x: torch.Tensor, fp16_accumulation: bool) -> torch.Tensor:
    """Stands in for `comfy.ops.linear_input_act` of 0.38, which multiplies by weights that it casts itself."""
    if fp16_accumulation and not getattr(linear, "_full_precision_mm", False):
        weight, bias = comfy.ops.cast_bias_weight(linear, x)[:2]
        return F.linear(F.gelu(x, approximate="tanh"), weight, bias)
    return linear(F.gelu(x, approximate="tanh"))


@pytest.mark.parametrize("fp16_accumulation", [False, True])
def test_a_host_that_multiplies_by_the_weight_itself_asks_first(linear, product, fp16_accumulation):
    x = _numbers(5, 64)
    assert distance(linear_input_act(linear, x, fp16_accumulation), product(F.gelu(x, approximate="tanh"))) < 1e-6


@pytest.mark.parametrize("kind", ["Q8_0", "BF16"])
def test_rows_of_a_table_where_it_lies(pack, kind):
    table = pack("nodes.ops").GraftOps.Embedding(8, 64)
    table.load_state_dict({"weight": weight(pack, kind, (8, 64))})
    rows = torch.tensor([[5, 0]])
    want = table.dequantized()[rows]
    assert torch.equal(table.host_rows(rows), want)
    assert torch.equal(table.host_rows(rows, out_dtype=torch.float16), want.half())
    assert torch.equal(table.forward_comfy_cast_weights(rows), want)


# The sources of the installed ComfyUI

KINDS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding")
ELSEWHERE = {"autopad": "only the hosts' VAEs call a convolution so"}
"""Keywords that ours refuse in a sentence."""


@pytest.mark.parametrize("kind", KINDS)
def test_every_keyword_of_a_layer_is_known(pack, kind):
    """A new one: give `GraftOps` its meaning in nodes/ops.py, or note here who calls a layer with it."""
    layer = getattr(comfy.ops.manual_cast, kind)
    theirs = set(inspect.signature(layer.forward_comfy_cast_weights).parameters) - {"self", "input"}
    ours = getattr(pack("nodes.ops").GraftOps, kind)
    known = {*ours.keywords, *inspect.signature(ours.forward).parameters, *ELSEWHERE}
    assert theirs <= known, f"comfy.ops.{kind} takes {', '.join(sorted(theirs - known))}"


NO_LAYERS_OF_OURS = (
    "*/vae/*", "*/vae.py", "*/vae_*.py", "*/controlnet.py", "ldm/sam3/*", "ldm/cascade/stage_a.py",
    "ldm/modules/temporal_ae.py", "ldm/modules/diffusionmodules/model.py", "ldm/models/*",
)  # fmt: skip
"""VAEs, ControlNets and SAM3, which Graft does not load."""

KNOWN_READS = {
    "model_base.py: self.cc_projection.weight": "Stable Zero123 builds it from the host's own layers",
    "model_base.py: self.cc_projection.bias": "Stable Zero123 builds it from the host's own layers",
    "text_encoders/lt.py: self.text_embedding_projection.weight": "of LTX-2's safetensors alone, as they load",
    "text_encoders/gemma4.py: self.linear.weight": "shows a layer's weight as its own; who asks for it is followed",
}
"""Reads that `answer_questions` does not follow, and why they do no harm."""


def reads(pack: Any, folder: Path) -> tuple[set[str], set[str]]:
    """Where ComfyUI's code reads a weight of a layer: what `answer_questions` follows, and what it does not."""
    questions = pack("ops.questions")
    files = [folder / "model_base.py", folder / "clip_model.py", folder / "sd1_clip.py"]
    files += [path for part in ("ldm", "text_encoders") for path in sorted((folder / part).rglob("*.py"))]
    followed, others = set(), set()
    for path in files:
        place = path.relative_to(folder).as_posix()
        if not path.is_file() or any(fnmatch(place, pattern) for pattern in NO_LAYERS_OF_OURS):
            continue
        source = path.read_text(encoding="utf-8")
        if not questions.READS.search(source):
            continue
        by_method = [question for found in questions.methods_in(path).values() for question in found]
        lines = {(question.line, ast.unparse(question.read)) for question in by_method if question.can_be_followed}
        for question in questions.questions_in(ast.parse(source)):
            read = ast.unparse(question.read)
            (followed if (question.line, read) in lines else others).add(f"{place}: {read}")
    return followed, others


def test_every_read_of_a_weight_is_answered_or_known(pack):
    followed, others = reads(pack, Path(inspect.getfile(comfy.ops)).parent)
    unknown = others - KNOWN_READS.keys()
    assert not unknown, (
        "ComfyUI reads weights of layers in a way that ops/questions.py does not follow; of a packed one it would get "
        "bytes: follow it there, or say in KNOWN_READS why it does no harm:\n" + "\n".join(sorted(unknown))
    )
    # what has been seen in each of the versions: that the scan still finds something
    assert "model_base.py: self.diffusion_model.patch_embedding.weight" in followed
    assert "ldm/hunyuan3dv2_1/hunyuandit.py: self.mlp[0].weight" in followed
    assert "clip_model.py: self.position_embedding.weight" in followed


def test_a_new_read_of_a_weight_is_found(pack, tmp_path):
    model = tmp_path / "ldm" / "new" / "model.py"
    vae = tmp_path / "ldm" / "new" / "vae" / "model.py"
    for path in (model, vae):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "class New(Module):\n"
            "    def forward(self, x, layer):\n"
            "        x = self.norm(x) * self.weight + cast_to(self.blocks[0].table.weight, x).to(layer.weight.dtype)\n"
            "        return x.to(next(self.parameters()).dtype) + [block.bias for block in self.blocks]\n"
            "def helper(layer, x):\n"
            "    return layer.fc.weight.shape[0]\n"
        )
    (tmp_path / "model_base.py").write_text("channels = model.img_in.weight.shape[1]\n")
    followed, others = reads(pack, tmp_path)
    place = "ldm/new/model.py"
    assert followed == {
        f"{place}: self.blocks[0].table.weight", f"{place}: next(self.parameters())", f"{place}: block.bias",
    }  # fmt: skip
    assert others == {f"{place}: layer.weight", f"{place}: layer.fc.weight", "model_base.py: model.img_in.weight"}
