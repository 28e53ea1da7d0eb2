"""Text encoders in GGUF without a host: names against gguf-py's table, what is undone, and what is refused.

`tests/in_comfyui/test_text_encoders.py` runs them against the host's own.
"""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import tokenizer_samples as samples
import torch
from gguf_samples import write_gguf
from graft.kernels import CorruptFile, UnsupportedFormat
from graft.ops.files import projectors, text_encoders
from graft.ops.files.gguf import open_gguf
from graft.ops.files.projectors import projector_beside
from graft.ops.files.renaming import rename
from graft.ops.files.text_encoders import architecture_of, text_encoder_tensors
from graft.ops.packed import PackedTensor

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


def decoded(tensor) -> np.ndarray:
    return gguf.dequantize(tensor.data.numpy(), gguf.GGMLQuantizationType[tensor.fmt.name]).reshape(tensor.shape)


TABLES = [
    *((arch, text_encoders._NAMES[arch]) for arch in text_encoders._NAMES),
    ("t5", text_encoders.T5_UNGATED), ("clip", projectors._QWEN2VL), ("clip", projectors._QWEN3VL),
]  # fmt: skip


@pytest.mark.parametrize(("architecture", "table"), TABLES)
def test_names_are_those_of_gguf_py(architecture, table):
    """Every name that we turn back, gguf-py's table turns into the one that we started from."""
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    arch = gguf.MODEL_ARCH.MMPROJ if architecture == "clip" else arch
    names = gguf.get_tensor_name_map(arch, 8)
    known = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "N") for tensor in gguf.MODEL_TENSORS[arch]}
    listed = {ours: theirs for ours, theirs in table.items() if ours in known}
    # one table serves several architectures, of which some have no head, no norms in their attention or no MLP
    assert len(table) - len(listed) <= 6 and len(listed) > 8
    for ours, theirs in listed.items():
        ours, theirs = ours.replace("N", "7"), theirs.replace(".N.", ".7.")
        # those of Qwen3-VL's merger the converter writes past gguf-py's table
        assert names.get_name(theirs) == ours or "visual.merger." in theirs, theirs
        assert rename(f"{ours}.weight", table) == f"{theirs}.weight"
    assert rename("blk.3.unheard_of.weight", table) == "blk.3.unheard_of.weight"


def encoder(path, tensors, architecture="llama", **metadata):
    heads = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}
    return open_gguf(write_gguf(path, tensors, architecture, {**heads, **metadata}))


def test_queries_and_keys_get_their_order_back_and_stay_packed(tmp_path):
    tensors = {
        "token_embd.weight": (array(8, 256), "Q8_0"),
        "blk.0.attn_q.weight": (array(256, 256), "Q4_K"),
        "blk.0.attn_k.weight": (array(128, 256), "F16"),
        "blk.0.attn_v.weight": (array(128, 256), "Q4_K"),
    }
    file = encoder(tmp_path / "a.gguf", tensors)
    state = text_encoder_tensors(file)
    for name, stored, heads in (("q_proj", "attn_q", 4), ("k_proj", "attn_k", 2), ("v_proj", "attn_v", None)):
        weight = state[f"model.layers.0.self_attn.{name}.weight"]
        tensor = file.tensors[f"blk.0.{stored}.weight"]
        assert isinstance(weight, PackedTensor) == (stored != "attn_k")
        want = decoded(tensor)
        if heads:  # what LlamaModel.permute does, backwards
            want = want.reshape(heads, -1, 2, 256).swapaxes(1, 2).reshape(want.shape)
        assert np.array_equal(weight.to(torch.float32).numpy(), want)


@pytest.mark.parametrize(
    "odd",
    [{"blk.0.attn_q.weight": (array(10, 256), "F32")}, {"blk.0.attn_k.bias": (array(7), "F32")}],
    ids=["rows", "bias"],
)
def test_heads_that_do_not_divide_queries_are_refused(tmp_path, odd):
    tensors = {"token_embd.weight": (array(8, 256), "F16")}
    with pytest.raises(UnsupportedFormat, match=r"rows, which \d heads do not divide \(.*odd.gguf\)"):
        text_encoder_tensors(encoder(tmp_path / "odd.gguf", tensors | odd))


@pytest.mark.parametrize("weight", [torch.ones(()), torch.ones(0, 8), torch.ones(0)], ids=["scalar", "no rows", "none"])
def test_queries_without_rows_are_refused(tmp_path, weight):
    file = encoder(tmp_path / "odd.gguf", {"token_embd.weight": (array(8, 256), "F16")})
    with pytest.raises(UnsupportedFormat, match=r"q_proj.weight has 0 rows, which 4 heads do not divide"):
        text_encoders._join_halves({"model.layers.0.self_attn.q_proj.weight": weight}, file, "llama")


def test_names_of_any_form_have_no_heads(tmp_path):
    names = ["weight", "", ".", "q_proj", "..q_proj", "a" * 3000]
    tensors = {"token_embd.weight": (array(8, 256), "F16")}
    state = {name: torch.ones(()) for name in names}
    text_encoders._join_halves(state, encoder(tmp_path / "a.gguf", tensors), "llama")
    assert list(state) == names
    without = encoder(tmp_path / "b.gguf", tensors, **{"llama.attention.head_count": True})
    with pytest.raises(UnsupportedFormat, match="head_count is True, where a number of heads is needed"):
        text_encoders._join_halves({}, without, "llama")


def test_scales_beside_weights_go_with_them(tmp_path):
    """NVFP4's one, and one for each row, in the order that its row gets."""
    rows = np.arange(1, 257, dtype=np.float32)[:, None] / 64
    tensors = {
        "token_embd.weight": (array(8, 256), "Q8_0"),
        "output.weight": (array(8, 256), "Q8_0"),
        "blk.0.attn_q.weight": (array(256, 256), "Q4_K"),
        "blk.0.attn_v.weight": (array(128, 256), "Q4_K"),
    }
    plain = text_encoder_tensors(encoder(tmp_path / "a.gguf", tensors))
    scales = {"output.scale": 0.5, "blk.0.attn_v.scale": 0.25, "blk.0.attn_v.input_scale": 3.0}
    tensors |= {name: (np.array([scale], np.float32), "F32") for name, scale in scales.items()}
    tensors |= {"blk.0.attn_q.weight_scale": (rows, "F32")}
    scaled = text_encoder_tensors(encoder(tmp_path / "b.gguf", tensors))
    assert scaled.keys() == plain.keys() and all(isinstance(weight, PackedTensor) for weight in scaled.values())
    ordered = torch.from_numpy(rows).view(4, -1, 2).transpose(1, 2).reshape(-1, 1)
    factors = {"lm_head": 0.5, "model.layers.0.self_attn.v_proj": 0.25, "model.layers.0.self_attn.q_proj": ordered}
    for name, weight in scaled.items():
        want = plain[name].dequantize(torch.float32) * factors.get(name.removesuffix(".weight"), 1.0)
        assert torch.equal(weight.dequantize(torch.float32), want), name


def test_what_no_text_encoder_has_is_left_out(tmp_path):
    t5 = {
        "token_embd.weight": (array(8, 64), "F16"),
        "enc.blk.0.ffn_up.weight": (array(64, 64), "F16"),
        "dec.blk.0.attn_q.weight": (array(64, 64), "F16"),
    }
    state = text_encoder_tensors(encoder(tmp_path / "t5.gguf", t5, "t5"))
    assert state.keys() == {"shared.weight", "encoder.block.0.layer.1.DenseReluDense.wi.weight"}
    gated = t5 | {"enc.blk.0.ffn_gate.weight": (array(64, 64), "F16")}
    state = text_encoder_tensors(encoder(tmp_path / "gated.gguf", gated, "t5"))
    assert {name.split(".")[-2] for name in state} == {"shared", "wi_0", "wi_1"}
    llama = {"token_embd.weight": (array(8, 64), "F16"), "rope_freqs.weight": (array(32), "F32")}
    assert text_encoder_tensors(encoder(tmp_path / "l.gguf", llama)).keys() == {"model.embed_tokens.weight"}


def test_names_of_transformers_are_kept(tmp_path):
    tensors = {"shared.weight": (array(8, 64), "F16")}
    tensors["encoder.block.0.layer.0.SelfAttention.q.weight"] = (array(64, 64), "Q8_0")
    for architecture in ("t5", "pig"):
        assert text_encoder_tensors(encoder(tmp_path / "a.gguf", tensors, architecture)).keys() == tensors.keys()


def tokenizer_of(path) -> dict:
    """What a file of the samples has in its metadata."""
    return {key: value for key, value in open_gguf(path).metadata.items() if key.startswith("tokenizer.")}


def test_mistral_brings_its_tokenizer(tmp_path):
    tokenizer = samples.train_tekken(samples.TEKKEN_PATTERN)
    metadata = tokenizer_of(samples.write_tekken(tmp_path / "tokens.gguf", tokenizer))
    file = encoder(tmp_path / "a.gguf", {"token_embd.weight": (array(8, 64), "F16")}, **metadata)
    model = text_encoder_tensors(file)["tekken_model"]
    assert model.dtype == torch.uint8 and bytes(model.numpy()).startswith(b'{"config"')


UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
GEMMA = "model.layers.0.post_feedforward_layernorm.weight"


@pytest.mark.parametrize("name", [UMT5, GEMMA])
def test_a_tokenizer_is_known_by_the_weights(name, tmp_path):
    """As other converters write UMT5 and Gemma, whatever they call the architecture."""
    umt5 = name == UMT5
    original = samples.train_umt5(True) if umt5 else samples.train_gemma()
    rows = samples.processor(original).vocab_size()
    write = samples.write_t5 if umt5 else samples.write_gemma
    metadata = tokenizer_of(write(tmp_path / "tokens.gguf", original, rows))
    tensors = {name: (array(32, 4), "F32"), "shared.weight": (array(8, 64), "F16")}
    model = text_encoder_tensors(encoder(tmp_path / "a.gguf", tensors, "pig", **metadata))["spiece_model"]
    text = samples.TEXTS[1]
    assert samples.processor(bytes(model.numpy())).encode(text) == samples.processor(original).encode(text)
    with pytest.raises(UnsupportedFormat, match="tokenizer"):
        text_encoder_tensors(encoder(tmp_path / "a.gguf", tensors, "pig"))
    # and one in the file is taken as it is
    with_model = {**tensors, "spiece_model": (array(4), "F32")}
    assert text_encoder_tensors(encoder(tmp_path / "a.gguf", with_model, "pig", **metadata)).keys() == with_model.keys()


def test_a_tokenizer_that_hosts_have_is_not_wanted(tmp_path):
    """AuraFlow's T5 has the distances of a UMT5."""
    tensors = {UMT5: (array(32, 4), "F32"), "shared.weight": (array(2, 2048), "F16")}
    assert text_encoder_tensors(encoder(tmp_path / "a.gguf", tensors, "pig")).keys() == tensors.keys()


@pytest.mark.parametrize("splits", [{}, {"tokenizer.ggml.pre": "default"}])
def test_a_mistral_without_its_tokenizer_is_refused(splits, tmp_path):
    file = encoder(tmp_path / "a.gguf", {"token_embd.weight": (array(131072, 1), "F16")}, **splits)
    with pytest.raises(UnsupportedFormat, match=r"Mistral's tokenizer cannot be rebuilt.* not like tekken: get this"):
        text_encoder_tensors(file)


REFUSED = [
    ("flux", "double_blocks.0.img_attn.qkv.weight", "flux is not a text encoder: use a loader for diffusion models"),
    ("clip", "v.blk.0.ln1.weight", r"a vision projector \(mmproj\), not a text encoder: choose its text encoder"),
    ("vae", "decoder.conv_in.weight", "vae is a VAE, not a text encoder: use a VAE loader"),
    ("llama", "blk.0.attn_q.weight.lora_a", "this is a LoRA, not a text encoder: put it into models/loras"),
    ("phi3", "token_embd.weight", "as safetensors: .*architecture phi3 cannot be read, only t5, t5encoder, "),
]


@pytest.mark.parametrize(("architecture", "name", "message"), REFUSED)
def test_what_is_no_text_encoder_is_refused(architecture, name, message, tmp_path):
    file = encoder(tmp_path / "a.gguf", {name: (array(64), "F32")}, architecture)
    with pytest.raises(UnsupportedFormat, match=message):
        text_encoder_tensors(file)


ODD = {
    "blk.0.attn_q_norm.weight": "qwen3", "blk.0.attn_q.bias": "qwen2", "blk.0.post_ffw_norm.weight": "gemma3",
    "blk.0.layer_output_scale.weight": "gemma4", "blk.0.ssm_a": "qwen35", "blk.0.attn_sinks.weight": "gpt-oss",
    "enc.blk.0.attn_q.weight": "t5",
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_architecture_is_known_by_its_tensors(name, tmp_path):
    file = open_gguf(write_gguf(tmp_path / "a.gguf", {name: (array(64), "F32")}, "pig"))
    assert architecture_of(file) == ODD[name]


def test_an_odd_architecture_is_known_by_its_metadata(tmp_path):
    """Whether queries are interleaved no tensor tells."""
    tensors = {"token_embd.weight": (array(8, 64), "F16"), "blk.0.attn_q.weight": (array(64, 64), "F16")}
    assert architecture_of(encoder(tmp_path / "a.gguf", tensors, "pig")) == "llama"
    with pytest.raises(UnsupportedFormat, match=r"as safetensors: .*architecture pig cannot be read, only t5, t5enc"):
        text_encoder_tensors(open_gguf(write_gguf(tmp_path / "b.gguf", tensors, "pig")))


def test_heads_that_do_not_fit_are_refused(tmp_path):
    tensors = {"token_embd.weight": (array(8, 64), "F16"), "blk.0.attn_q.weight": (array(60, 64), "F16")}
    for heads, message in ((7, "60 rows, which 7 heads do not divide"), (0, "head_count is 0, where a number of")):
        file = encoder(tmp_path / "a.gguf", tensors, **{"llama.attention.head_count": heads})
        with pytest.raises(UnsupportedFormat, match=message):
            text_encoder_tensors(file)


def projector(path, width=64, parts="qkv", types=("F16", "F16", "F16"), other=None):
    tensors = {f"v.blk.0.attn_{part}.weight": (array(32, 32), types["qkv".index(part)]) for part in parts}
    frames = {f"v.patch_embd.weight{suffix}": (array(32, 3, 14, 14), "F32") for suffix in ("", ".1")}
    return encoder(path, tensors | frames | (other or {}), "clip", **{"clip.vision.projection_dim": width})


def qwen(path, width=64):
    tensors = {"token_embd.weight": (array(8, width), "F16")}
    return encoder(path, tensors, "qwen2vl", **{"qwen2vl.embedding_length": width})


def test_the_projector_is_joined(tmp_path):
    for types in (("Q8_0", "Q8_0", "Q8_0"), ("F16", "Q8_0", "F32")):
        vision = projector(tmp_path / "mmproj.gguf", types=types)
        state = text_encoder_tensors(qwen(tmp_path / "a.gguf"), vision)
        joined = state["visual.blocks.0.attn.qkv.weight"]
        assert isinstance(joined, PackedTensor) == (len(set(types)) == 1)
        parts = [decoded(vision.tensors[f"v.blk.0.attn_{part}.weight"]) for part in "qkv"]
        assert np.array_equal(joined.to(torch.float32).numpy(), np.concatenate(parts))
        frames = state["visual.patch_embed.proj.weight"]
        assert frames.shape == (32, 3, 2, 14, 14) and not torch.equal(frames[:, :, 0], frames[:, :, 1])
    with pytest.raises(CorruptFile, match=r"get the projector again: v\.blk\.0\.attn_v\.weight is missing"):
        text_encoder_tensors(qwen(tmp_path / "a.gguf"), projector(tmp_path / "mmproj.gguf", parts="qk"))
    for odd in (
        {"v.blk.0.attn_k.weight": (array(32, 16), "F16")},
        {"v.blk.0.attn_k.weight": (array(), "F32")},
        {"v.patch_embd.weight.1": (array(16, 3, 14, 14), "F32")},
        {"v.patch_embd.weight.1": (array(32), "F32"), "v.patch_embd.weight": (array(32), "F32")},
    ):
        with pytest.raises(CorruptFile, match=r"get the projector again: .* are \("):
            text_encoder_tensors(qwen(tmp_path / "a.gguf"), projector(tmp_path / "mmproj.gguf", other=odd))


def test_the_projector_that_belongs_to_it_is_found(tmp_path):
    file = qwen(tmp_path / "Qwen2.5-VL-7B-Instruct-UD-Q4_K_XL.gguf")
    assert projector_beside(file, "qwen2vl") is None
    (tmp_path / "broken-mmproj.gguf").write_bytes(b"GGUF")
    unreadable = []
    assert projector_beside(file, "qwen2vl", unreadable) is None and "broken-mmproj.gguf" in str(unreadable[0])
    projector(tmp_path / "a-3B-mmproj.gguf", width=32)
    assert projector_beside(file, "qwen2vl") is None, "another width is another model's"
    projector(tmp_path / "mmproj-F16.gguf")
    assert projector_beside(file, "qwen2vl", unreadable).path.name == "mmproj-F16.gguf" and len(unreadable) == 1
    projector(tmp_path / "zz-Qwen2.5-VL-7B-Instruct-mmproj-BF16.GGUF")
    assert projector_beside(file, "qwen2vl").path.name == "zz-Qwen2.5-VL-7B-Instruct-mmproj-BF16.GGUF", (
        "the one called like it"
    )
    llama = encoder(tmp_path / "llama.gguf", {"token_embd.weight": (array(8, 64), "F16")})
    assert projector_beside(llama, "llama") is None, "it has no eyes"
