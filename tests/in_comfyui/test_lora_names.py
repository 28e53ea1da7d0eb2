"""Stock LoRA nodes on a Graft model: names and forms that ComfyUI has none for, and what they still leave unloaded."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import adapter_samples as samples
import comfy.hooks
import comfy.lora
import comfy.lora_convert
import comfy.model_base
import comfy.utils
import comfy.weight_adapter
import nodes
import pytest
import torch
from adapter_samples import Sampler
from architectures import ARCHITECTURES, META
from generation import both_models, distance, sample, with_lora
from graft.nodes import lora_names
from graft.nodes.inspect import report
from graft.nodes.lora import trigger_words
from graft.nodes.patcher import Graft
from graft.ops.adapters import from_host
from graft.ops.files.dialects import LayerNames
from graft.ops.files.lora import target_of
from graft.ops.report import family_of
from small import SD3, sd3  # noqa: F401  (a fixture)
from test_dialects import key_map, weights_of

BLOCK = "joint_blocks.0.x_block."
# each: the name in the file, the host's name for the same layer, and how the factors are called
NAMES = {
    "transformer.base_model.model.transformer_blocks.0.attn.to_q": "transformer.transformer_blocks.0.attn.to_q",
    "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1": f"diffusion_model.{BLOCK}mlp.fc1",
    "joint_blocks.1.x_block.attn.proj": "diffusion_model.joint_blocks.1.x_block.attn.proj",
    "unet.base_model.model.transformer_blocks.2.attn.add_q_proj": "transformer.transformer_blocks.2.attn.add_q_proj",
    "lora_unet_transformer_blocks_1_attn_to_k": "transformer.transformer_blocks.1.attn.to_k",
    "norm_out.linear": "transformer.norm_out.linear",
}
FACTORS = [("lora_A.style.weight", "lora_B.style.weight"), ("lora_A.weight", "lora_B.weight"),
           ("lora_down.weight", "lora_up.weight")]  # fmt: skip


@pytest.fixture
def odd(sd3, folders):  # noqa: F811
    """A file of such names in the folder of LoRAs, and the same tensors under the host's names."""
    theirs = comfy.lora.model_lora_keys_unet(sd3[1].model, {})
    shapes = {key: value.shape for key, value in sd3[1].model.state_dict().items()}
    r = Sampler(1, torch.float32)
    odd, usual = {}, {}
    for i, (name, known) in enumerate(NAMES.items()):
        target = target_of(theirs[known])
        rows = shapes[target.key][0] if target.region is None else target.region.length
        down, up = r(4, shapes[target.key][1]), r(rows, 4)
        a, b = FACTORS[i % len(FACTORS)]
        odd |= {f"{name}.{a}": down, f"{name}.{b}": up}
        usual |= {f"{known}.lora_down.weight": down, f"{known}.lora_up.weight": up}
    comfy.utils.save_torch_file(odd, str(folders / "loras" / "odd_names.safetensors"))
    return odd, usual


@pytest.fixture(scope="module")
def clip_l():
    """CLIP L without weights of its own."""
    import comfy.sd
    import comfy.sd1_clip

    parts = {"clip": comfy.sd1_clip.SD1ClipModel, "tokenizer": comfy.sd1_clip.SD1Tokenizer, "params": {}}
    return comfy.sd.CLIP(type("Target", (), parts))


def test_stock_loaders_know_our_names_on_a_graft_model(sd3, odd):  # noqa: F811
    graft, dense = sd3
    only = nodes.LoraLoaderModelOnly().load_lora_model_only(graft, "odd_names.safetensors", 0.8)[0]
    both = nodes.LoraLoader().load_lora(graft, None, "odd_names.safetensors", 0.8, 0.8)[0]
    stack = nodes.NODE_CLASS_MAPPINGS["GraftLoraStack"]()
    ours, *_ = stack.apply(graft, lora_1="odd_names.safetensors", strength_1=0.8)["result"]
    want, base = sample(with_lora(dense, odd[1], 0.8), SD3), sample(dense, SD3)
    got = sample(only, SD3)
    assert distance(got - sample(graft, SD3), want - base) < 1e-4 and distance(want, base) > 0.1
    assert torch.equal(sample(both, SD3), got) and torch.equal(sample(ours, SD3), got)
    assert "rejected" not in report(only)


def test_hooks_know_them_too(sd3, odd):  # noqa: F811
    model, _, hooks = comfy.hooks.load_hook_lora_for_models(sd3[0], None, odd[0], 0.8, 0.8)
    stack = model.hook_residuals[hooks.hooks[0].hook_ref]
    assert sum(map(len, stack.patches.values())) == len(NAMES)


def test_other_models_are_the_hosts_own(sd3, odd, caplog):  # noqa: F811
    """They get what the host gives, of the host's own types."""
    dense = sd3[1].model
    names = comfy.lora.model_lora_keys_unet(dense, {})
    plain = comfy.lora.model_lora_keys_unet.without_graft(dense, {})
    assert type(names) is dict and names.keys() == plain.keys()
    given: dict = {}
    assert comfy.lora.model_lora_keys_unet(dense, given) is given
    state = odd[0] | odd[1]
    loaded = comfy.lora.load_lora(state, names)
    assert type(loaded) is dict and loaded.keys() == comfy.lora.load_lora.without_graft(state, names).keys()
    assert caplog.text.count("lora key not loaded: norm_out.linear.lora_up.weight") == 2


def test_a_reload_wraps_the_hosts_functions_once():
    before = comfy.lora.load_lora, comfy.lora.model_lora_keys_unet
    lora_names.extend_host()
    for old, name in zip(before, ("load_lora", "model_lora_keys_unet"), strict=True):
        new = getattr(comfy.lora, name)
        assert new is not old and new.without_graft is old.without_graft
        assert new.without_graft.__module__ == "comfy.lora" and not hasattr(new.without_graft, "without_graft")


def test_inspect_says_what_a_stock_loader_left_out(sd3, odd, caplog):  # noqa: F811
    far = {f"lora_unet_down_blocks_0_attentions_{i}_proj_in.{n}": torch.ones(4, 4)
           for i in range(4) for n in FACTORS[2]}  # fmt: skip
    name = "transformer.transformer_blocks.0.attn.to_kv"
    damaged = {f"{name}.lora_A.weight": torch.ones(4, 7), f"{name}.lora_B.weight": torch.ones(21, 4)}
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())}
    model = with_lora(sd3[0], odd[0] | far | damaged | text)
    lines = report(model).splitlines()
    few = ", ".join(f"lora_unet_down_blocks_0_attentions_{i}_proj_in" for i in range(3))
    why = "4 names that no layer of this model has (the file is for another version of SD3)"
    assert f"rejected: {few}, …: {why}" in lines, lines
    assert any(line.startswith(f"rejected: {name}: the adapter is for 21×7, ") for line in lines), lines
    assert f"{name} is left out: the adapter is for 21×7" in caplog.text
    assert "lora key not loaded: lora_unet_down_blocks_0_attentions_3_proj_in.lora_up.weight" in caplog.text
    assert "rejected" not in report(sd3[0])


def test_a_difference_beside_factors_and_the_bias_of_a_part(sd3):  # noqa: F811
    """The host's loader has one patch for a parameter, and none for a part's bias."""
    graft, dense = sd3
    width = dense.model.state_dict()[f"diffusion_model.{BLOCK}attn.qkv.weight"].shape[1]
    r, name = Sampler(2, torch.float32), "transformer.transformer_blocks.0.attn.to_k"
    factors = {f"{name}.lora_A.weight": r(4, width), f"{name}.lora_B.weight": r(width, 4)}
    whole, bias = {f"{name}.diff": r(width, width, scale=0.05)}, r(width)
    want = with_lora(with_lora(dense, factors), whole).clone()
    assert want.add_patches({(f"diffusion_model.{BLOCK}attn.qkv.bias", (0, width, width)): ("diff", (bias,))})
    got = with_lora(graft, factors | whole | {f"{name}.diff_b": bias})
    effect = sample(want, SD3) - sample(dense, SD3)
    assert distance(sample(got, SD3) - sample(graft, SD3), effect) < 1e-4


def test_what_the_hosts_loader_stops_at_is_read_or_left_out(sd3, odd, folders, clip_l):  # noqa: F811
    """It raises at an alpha for each rank and at a missing factor, and the whole file was lost."""
    graft, dense = sd3
    name, alphas = "transformer.transformer_blocks.0.attn.to_k", torch.tensor([2.0, 0.0, -1.0, 4.0])
    r, broken = Sampler(6, torch.float32), "diffusion_model.joint_blocks.1.x_block.mlp.fc1"
    width = dense.model.state_dict()[f"diffusion_model.{BLOCK}attn.qkv.weight"].shape[1]
    down, up = r(4, width), r(width, 4)
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(3072, 2)}
    state = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": alphas}
    state |= {f"{broken}.lora_up.weight": torch.ones(4 * width, 4)} | text
    usual = {f"{name}.lora_down.weight": down * alphas.unsqueeze(1) / 4, f"{name}.lora_up.weight": up}
    effect = sample(with_lora(dense, usual), SD3) - sample(dense, SD3)
    got = with_lora(graft, state)
    assert distance(sample(got, SD3) - sample(graft, SD3), effect) < 1e-4
    assert f"rejected: {broken}: one of lora_up and lora_down is missing" in report(got)
    comfy.utils.save_torch_file(state, str(folders / "loras" / "stops.safetensors"))
    for model in sd3:
        stack = nodes.NODE_CLASS_MAPPINGS["GraftLoraStack"]()
        got, _, line, *_ = stack.apply(model, clip=clip_l, lora_1="stops.safetensors")["result"]
        assert line.startswith("stops.safetensors ×1.00: 1/2 layers") and "2 left out, such as" in line, line
        assert distance(sample(got, SD3) - sample(model, SD3), effect) < 1e-4


@pytest.fixture(scope="module")
def wan(pack, tmp_path_factory):
    """A model with queries, keys and values apart."""
    with both_models(pack, ARCHITECTURES["wan"], "Q4_K", tmp_path_factory.mktemp("wan")) as models:
        yield models


ATTENTION = "diffusion_model.blocks.1.self_attn."
KINDS = ["lora", "loha", "lokr", "lokr low rank", "dora out", "dora out over lokr", "glora", "oft", "diff"]
MAKE = samples.KINDS | {"lokr low rank": lambda r, shape: samples.lokr(r, shape, "low rank")}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_a_fused_layer_are_the_hosts_merge_of_it(wan, kind: str):
    architecture, graft, dense = wan
    weights = dense.model.state_dict()
    parts = [f"{ATTENTION}{letter}.weight" for letter in "qkv"]
    fused = torch.cat([weights[part] for part in parts])
    r = Sampler(3, torch.float32)
    which, fields = MAKE[kind](r, tuple(fused.shape))
    named = zip(samples.FIELDS[which], fields, strict=False)
    name = f"{ATTENTION}qkv"
    state = {f"{name}.{field}": torch.as_tensor(value) for field, value in named if value is not None}
    loaded = comfy.lora.load_lora(state, {name: "fused.weight"})
    patch = (0.8, loaded["fused.weight"], 1.0, None, None)
    merged = comfy.lora.calculate_weight([patch], fused.clone(), "fused.weight").chunk(3)
    want = dense.clone()
    assert len(want.add_patches({part: ("set", (rows,)) for part, rows in zip(parts, merged, strict=True)})) == 3
    effect = sample(want, architecture) - sample(dense, architecture)
    assert effect.norm() > 0
    state |= {f"{name}.diff_b": torch.zeros(len(fused))}
    got = sample(with_lora(graft, state, 0.8), architecture) - sample(graft, architecture)
    assert distance(got, effect) < 1e-4


def test_parts_in_groups_that_do_not_divide_them(wan, folders):
    """LoKr's 16 groups over three parts; LoRA Stack runs it on stock models, too."""
    architecture, graft, dense = wan
    weights = dense.model.state_dict()
    parts = [f"{ATTENTION}{letter}.weight" for letter in "qkv"]
    rows, columns = torch.cat([weights[part] for part in parts]).shape
    r, name = Sampler(4, torch.float32), "base_model.model.blocks.1.self_attn.to_qkv"
    w1, w2 = r(16, 16), r(rows // 16, columns // 16)
    state = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}
    comfy.utils.save_torch_file(state, str(folders / "loras" / "kr.safetensors"))
    delta = torch.kron(w1, w2).chunk(3)
    want = dense.clone()
    want.add_patches({part: ("diff", (d,)) for part, d in zip(parts, delta, strict=True)})
    effect = sample(want, architecture) - sample(dense, architecture)
    stack = nodes.NODE_CLASS_MAPPINGS["GraftLoraStack"]()
    for model in (graft, dense):
        got, _, text, *_ = stack.apply(model, lora_1="kr.safetensors")["result"]
        assert text.startswith("kr.safetensors ×1.00: 3/3 layers, LoKr"), text
        assert distance(sample(got, architecture) - sample(model, architecture), effect) < 1e-4
    only = nodes.LoraLoaderModelOnly().load_lora_model_only(graft, "kr.safetensors", 1.0)[0]
    assert distance(sample(only, architecture) - sample(graft, architecture), effect) < 1e-4


def test_what_cannot_be_divided_is_in_the_report(wan, folders):
    _, graft, dense = wan
    shape = tuple(dense.model.state_dict()[f"{ATTENTION}q.weight"].shape)
    r, name = Sampler(5, torch.float32), f"{ATTENTION}qkv"
    _, fields = samples.lora(r, (3 * shape[0], shape[1]), dora=samples.magnitudes(r, (3 * shape[0], shape[1]), 1))
    state = {f"{name}.{f}": torch.as_tensor(v) for f, v in zip(samples.FIELDS["lora"], fields, strict=True)
             if v is not None}  # fmt: skip
    comfy.utils.save_torch_file(state, str(folders / "loras" / "columns.safetensors"))
    for model in (graft, dense):
        with pytest.raises(Exception, match=f"0 of 1 layers fit, such as {name}: DoRA's norms are over all rows"):
            nodes.NODE_CLASS_MAPPINGS["GraftLoraStack"]().apply(model, lora_1="columns.safetensors")
    loaded = nodes.LoraLoaderModelOnly().load_lora_model_only(graft, "columns.safetensors", 1.0)[0]
    assert f"rejected: {name}: DoRA's norms are over all rows" in report(loaded)


def like_a_graft_model(kind: type, state: dict[str, torch.Tensor], config: dict):
    """A model of the host's class without weights, whose layers are ours by name and shape."""
    layers = {k.removesuffix(".weight"): SimpleNamespace(logical_shape=v.shape)
              for k, v in state.items() if k.endswith(".weight") and v.dim() > 1}  # fmt: skip
    graft = Graft.__new__(Graft)
    graft.layers = layers
    model = kind.__new__(kind)
    model.__dict__.update(state_dict=lambda: state, model_config=SimpleNamespace(unet_config=config), graft=graft)
    return model


def test_the_hosts_loader_gets_no_more_names_than_the_file_has(monkeypatch):
    """It tries every name on every kind of adapter: of the thousands that we know it gets those of the file."""
    state, config, kind = weights_of("flux")
    model = like_a_graft_model(kind, state, config)
    theirs = comfy.lora.model_lora_keys_unet(model, {})
    file = {f"base_model.model.transformer_blocks.0.attn.to_q.lora_{n}.weight": torch.ones(s)
            for n, s in (("A", (4, 3072)), ("B", (3072, 4)))}  # fmt: skip
    given: list[set] = []
    load = comfy.lora.load_lora
    monkeypatch.setattr(comfy.lora, "load_lora", lambda s, n, **k: given.append(set(n)) or load(s, n, **k))
    assert len(load(file, theirs)) == 1
    assert given == [{"x"}, {*theirs, "base_model.model.transformer_blocks.0.attn.to_q"}]


H = 64
COSMOS = {"max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
          "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True, "model_channels": H, "num_blocks": 1,
          "num_heads": 2, "crossattn_emb_channels": H, "use_adaln_lora": True, "adaln_lora_dim": 16}  # fmt: skip
LUMINA = {"dim": 48, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 6, "axes_dims": [2, 2, 4],
          "axes_lens": [30, 51, 51], "cap_feat_dim": 32, "qk_norm": True}  # fmt: skip
CLASSES = {
    "anima.model.Anima": ("Anima", {**COSMOS, "pos_emb_cls": "rope3d"}),
    "cosmos.predict2.MiniTrainDIT": ("Cosmos-Predict2 or Anima", {**COSMOS, "pos_emb_cls": "rope3d"}),
    "cosmos.model.GeneralDIT": ("Cosmos", {**COSMOS, "pos_emb_cls": "rope3d", "block_config": "FA-CA-MLP",
                                           "affline_emb_norm": True}),
    "pixart.pixartms.PixArtMS": ("PixArt", {"depth": 1, "hidden_size": H, "num_heads": 2}),
    "omnigen.omnigen2.OmniGen2Transformer2DModel": (
        "OmniGen2 or Boogu", {"num_layers": 1, "num_refiner_layers": 1}),
    "boogu.model.BooguTransformer2DModel": ("Boogu", {}),
    "ideogram4.model.Ideogram4Transformer2DModel": ("Ideogram 4", {}),
    "triposplat.model.LatentSeqMMFlowModel": ("TripoSplat", {}),
    "lens.model.LensTransformer2DModel": ("Lens", {}),
    "joyimage.model.JoyImageTransformer3DModel": ("JoyImage", {}),
    "hunyuan3d.model.Hunyuan3Dv2": ("Hunyuan3D", {"depth": 1, "depth_single_blocks": 1}),
    "hunyuan3dv2_1.hunyuandit.HunYuanDiTPlain": ("Hunyuan3D", {"depth": 1}),
    "pixeldit.model.PixDiT_T2I": ("PixelDiT", {}),
    "krea2.model.SingleStreamDiT": ("Krea 2", {}),
    "kandinsky5.model.Kandinsky5": ("Kandinsky 5", {}),
    "ernie.model.ErnieImageModel": ("ERNIE-Image", {}),
    "hidream_o1.model.HiDreamO1Transformer": ("HiDream-O1", {}),
    "lightricks.model.LTXVModel": ("LTX-Video", {"num_layers": 1}),
    "aura.mmdit.MMDiT": ("AuraFlow", {"n_double_layers": 1, "n_layers": 2, "dim": H, "n_heads": 2}),
    "hydit.models.HunYuanDiT": ("Hunyuan-DiT", {"depth": 2, "hidden_size": H, "num_heads": 2}),
    "lumina.model.NextDiT": ("Lumina 2", {**LUMINA, "n_kv_heads": 2}),
    "qwen_image.model.QwenImageTransformer2DModel": ("Qwen-Image", {"num_layers": 1, "num_attention_heads": 2,
                                                                    "attention_head_dim": 32}),
    "wan.model.WanModel": ("Wan", {"model_type": "i2v", "dim": H, "ffn_dim": H, "num_heads": 2, "num_layers": 1}),
    "audio.dit.AudioDiffusionTransformer": ("Stable Audio", {"depth": 1, "embed_dim": H, "num_heads": 2}),
    "cogvideo.model.CogVideoXTransformer3DModel": ("CogVideoX", {"num_layers": 1}),
    "ace.model.ACEStepTransformer2DModel": ("ACE-Step", {"num_layers": 1, "inner_dim": H, "num_attention_heads": 2}),
}  # fmt: skip


def built(path: str, **options) -> dict[str, torch.Tensor]:
    """The parameters of a class of the host's, on no device."""
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)
    except (ImportError, AttributeError):
        pytest.skip("this ComfyUI has no such model")
    return {f"diffusion_model.{k}": v for k, v in kind(**options, **META).state_dict().items()}


@pytest.mark.parametrize("path", CLASSES)
def test_a_file_for_any_of_the_hosts_models_is_known(path: str):
    family, options = CLASSES[path]
    weights = {k: v for k, v in built(path, **options).items() if k.endswith(".weight") and v.dim() > 1}
    layers = [key.removesuffix(".weight") for key in weights]
    plain = [name.removeprefix("diffusion_model.") for name in layers]
    for names in (layers, plain, ["lora_unet_" + name.replace(".", "_") for name in plain]):
        assert family_of(names) == family
        # a file may be of some of the layers alone: a guess may say less, but not something else
        others = {family_of([name]) for name in names} - {"", family}
        shared = {"Flux"} if family == "Hunyuan3D" else set()
        related = {"Qwen-Image or Lens", "LTX-Video or PixArt", "OmniGen2, Boogu or Lumina 2", "OmniGen2 or Boogu",
                   "Lumina 2 or Z-Image", "Lumina 2, Z-Image or Ideogram 4", "Cosmos-Predict2 or Anima"}  # fmt: skip
        assert others <= related | shared, others


STOCK = {
    "Krea 2, fused": ("Krea2", "krea2.model.SingleStreamDiT", {}, {"layers": 28}, [
        ("transformer.transformer_blocks.0.attn.to_qkv", ["blocks.0.attn.wq", "blocks.0.attn.wk", "blocks.0.attn.wv"]),
        ("base_model.model.blocks.3.attn.qkv", ["blocks.3.attn.wq", "blocks.3.attn.wk", "blocks.3.attn.wv"]),
        ("base_model.model.transformer_blocks.0.ff.up", ["blocks.0.mlp.up"]),
        ("lora_transformer_transformer_blocks_1_attn_to_q", ["blocks.1.attn.wq"]),
        ("lycoris_transformer_blocks_2_attn_to_qkv", ["blocks.2.attn.wq", "blocks.2.attn.wk", "blocks.2.attn.wv"]),
    ]),
    "Z-Image, musubi": ("Lumina2", "lumina.model.NextDiT", {**LUMINA, "n_kv_heads": 6}, {"n_layers": 1, "dim": 48}, [
        ("lora_unet_layers_0_attention_to_k", [("layers.0.attention.qkv", (0, 48, 48))]),
        ("lora_unet_layers_0_attention_to_out_0", ["layers.0.attention.out"]),
        ("base_model.model.layers.0.feed_forward.w1", ["layers.0.feed_forward.w1"]),
    ]),
    "Lumina 2 has fewer keys": ("Lumina2", "lumina.model.NextDiT", {**LUMINA, "n_kv_heads": 2},
                                {"n_layers": 1, "dim": 48}, [
        ("transformer.layers.0.attention.to_v", [("layers.0.attention.qkv", (0, 64, 16))]),
    ]),
    "LTX": ("LTXV", "lightricks.model.LTXVModel", {"num_layers": 1}, {}, [
        ("transformer.transformer_blocks.0.attn1.to_q", ["transformer_blocks.0.attn1.to_q"]),
        ("transformer.base_model.model.transformer_blocks.0.attn2.to_kv",
         ["transformer_blocks.0.attn2.to_k", "transformer_blocks.0.attn2.to_v"]),
    ]),
    "Qwen-Image, fused": ("QwenImage", "qwen_image.model.QwenImageTransformer2DModel",
                          {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 32}, {}, [
        ("transformer.transformer_blocks.0.attn.to_added_qkv",
         [f"transformer_blocks.0.attn.add_{n}_proj" for n in "qkv"]),
    ]),
}  # fmt: skip


@pytest.mark.parametrize("case", STOCK)
def test_names_of_trainers_reach_the_hosts_loader(case: str):
    kind, path, options, config, wanted = STOCK[case]
    state = built(path, **options)
    model = like_a_graft_model(getattr(comfy.model_base, kind), state, config)
    names = comfy.lora.model_lora_keys_unet(model, {})
    known = LayerNames(lora_names.weight_shapes(model), {name: target_of(key) for name, key in names.items()})
    for name, layers in wanted:
        places = [(f"diffusion_model.{p}", None) if isinstance(p, str) else (f"diffusion_model.{p[0]}", p[1])
                  for p in layers]  # fmt: skip
        targets = known.targets(name)
        assert [(t.layer, t.region and tuple(t.region)) for t in targets] == places
        rows = sum(t.region.length if t.region else state[t.key].shape[0] for t in targets)
        lora = {f"{name}.lora_A.default.weight": torch.ones(4, state[targets[0].key].shape[1]),
                f"{name}.lora_B.default.weight": torch.ones(rows, 4)}  # fmt: skip
        loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(lora), names)
        assert {(target_of(key).layer, target_of(key).region) for key in loaded} == set(places)
        for key, value in loaded.items():
            target = target_of(key)
            assert from_host(value, state[target.key].shape, target.region).rank == 4


@pytest.mark.parametrize(
    ("metadata", "words"),
    [({"modelspec.trigger_phrase": "ohwx man, in my style"}, ["ohwx man", "in my style"]),
     ({"ss_trigger_words": " ohwx ,, "}, ["ohwx"]), ({}, []),
     *(({"ss_tag_frequency": json}, []) for json in (
         '{"1_girl": {"1girl": 90, "solo": 80}}', "[" * 100_000, '{"a": {"b": ' + "9" * 9000 + "}}", "[1]", "{"))],
    ids=["phrase", "words", "nothing", "captions", "nested", "huge", "a list", "damaged"],
)  # fmt: skip
def test_trigger_words_are_what_the_trainer_named(metadata, words):
    assert trigger_words(metadata) == words


def test_a_model_has_the_hosts_names_and_no_others():
    """The map is as long as the host's, whatever we know beside it."""
    for name in ("flux", "wan"):
        theirs, state = key_map(name)
        _, config, kind = weights_of(name)
        assert comfy.lora.model_lora_keys_unet(like_a_graft_model(kind, state, config), {}).keys() == theirs.keys()
