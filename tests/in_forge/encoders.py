"""Text encoders of llama.cpp through Forge Neo's own loader, and the same weights as it loads them from safetensors."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
from backend import loader, utils
from backend.nn.llm import llama
from graft.kernels import dequantize
from graft.ops.files.gguf import GGUFFile, open_gguf
from huggingface_guess import model_list
from torch import nn
from toy_extension.sizes import ENCODER


class Kind(NamedTuple):
    """Whose text encoder it is, the class that Neo loads it as, and where that has its sizes."""

    model: str
    cls: str
    config: str


KINDS = {
    "gemma2": Kind("Lumina2", "Gemma2Model", "Gemma2_2B_Config"),
    "mistral3": Kind("ErnieImage", "Mistral3Model", "Ministral3_3BConfig"),
    "qwen3vl": Kind("Krea2", "Qwen3VLModel", "Qwen3VL_4BConfig"),
    "qwen3": Kind("ZImage", "Qwen3Model", "Qwen3_4BConfig"),
    "qwen2vl": Kind("QwenImage", "Qwen2_5_VLForConditionalGeneration", "Qwen25_7BVLI_Config"),
}
BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


class Encoder:
    """One file, loaded by Neo in both ways."""

    def __init__(self, path: Path) -> None:
        self.path, self.kind = path, path.stem
        file = open_gguf(path)
        self.shrink(file)
        self.packed = self.load(utils.load_torch_file(str(path)), str(path))
        self.plain = self.load(self.dense(file), "as.safetensors")

    def shrink(self, file: GGUFFile) -> None:
        """Make Neo's own class as small as the file; without eyes, which are another file's matter."""
        about = {key.rpartition(".")[2]: value for key, value in file.metadata.items() if key.startswith(self.kind)}
        sizes = ENCODER | {"num_attention_heads": about["head_count"], "num_key_value_heads": about["head_count_kv"]}
        original = getattr(llama, KINDS[self.kind].config)
        setattr(llama, KINDS[self.kind].config, functools.partial(original, **sizes))
        loader.read_arbitrary_config = lambda folder: {"hidden_size": about["embedding_length"]}
        llama.qwen_vl.Qwen2VLVisionTransformer = llama.Qwen3VLVisionModel = lambda *args, **kwargs: nn.Identity()

    def dense(self, file: GGUFFile) -> dict[str, torch.Tensor]:
        """What the checkpoint was made of, in fp32, under the names of transformers."""
        names = BLOCK | (GEMMA if self.kind == "gemma2" else {})
        state = {}
        for name, tensor in file.tensors.items():
            weight = dequantize(tensor.data, tensor.fmt, tensor.shape, torch.float32, "torch")
            module, _, parameter = name.rpartition(".")
            if self.kind == "mistral3" and module.endswith(("attn_q", "attn_k")):
                # llama.cpp turns the two halves of each head into pairs
                heads = file.metadata[f"mistral3.attention.head_count{'_kv' * module.endswith('attn_k')}"]
                weight = weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            if self.kind == "gemma2" and module.endswith("norm"):
                weight = weight - 1
            if module.startswith("blk."):
                _, block, part = module.split(".")
                module = f"model.layers.{block}.{names[part]}"
            else:
                module = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[module]
            state[f"{module}.{parameter}"] = weight.contiguous()
        if self.kind == "qwen3vl":
            state = {name.replace("model.", "model.language_model.", 1): weight for name, weight in state.items()}
            width = state["model.language_model.norm.weight"].shape[0]
            state["model.visual.deepstack_merger_list.0.norm.weight"] = torch.ones(1)
            state["model.visual.merger.linear_fc2.weight"] = torch.ones(width, 1)
        return state

    def load(self, state: dict[str, torch.Tensor], path: str) -> nn.Module:
        """What Neo does with a text encoder that was chosen beside a checkpoint."""
        guess = object.__new__(getattr(model_list, KINDS[self.kind].model))
        state = loader.replace_state_dict({}, state, guess, path)
        ((target, component),) = guess.clip_target(state).items()
        state = loader.try_filter_state_dict(guess.process_clip_state_dict(state), [f"{target}."])
        return loader.load_huggingface_component(guess, component, "transformers", KINDS[self.kind].cls, "", state)


T5 = {
    "attn_norm": "layer.0.layer_norm", "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm", "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1", "ffn_down": "layer.1.DenseReluDense.wo",
    **{f"attn_{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
}  # fmt: skip


def umt5(path: Path) -> tuple[nn.Module, nn.Module]:
    """Wan's text encoder from the file, and from its weights in fp32."""
    file = open_gguf(path)
    width = file.tensors["token_embd.weight"].shape[1]
    config = json.loads(Path("backend/huggingface/Wan-AI/Wan2.1-T2V-14B/text_encoder/config.json").read_text())
    sizes = {"d_model": width, "d_ff": 2 * width, "num_heads": 2, "num_layers": 2, "d_kv": width // 2}
    loader.read_arbitrary_config = lambda folder: {**config, **sizes}
    state = {}
    for name, tensor in file.tensors.items():
        weight = dequantize(tensor.data, tensor.fmt, tensor.shape, torch.float32, "torch")
        module = name.removesuffix(".weight")
        if module.startswith("enc.blk."):
            _, _, block, part = module.split(".")
            module = f"encoder.block.{block}.{T5[part]}"
        else:
            module = {"token_embd": "shared", "enc.output_norm": "encoder.final_layer_norm"}[module]
        state[f"{module}.weight"] = weight.contiguous()
    return tuple(
        _umt5(state, str(source))
        for state, source in ((utils.load_torch_file(str(path)), path), (state, "as.safetensors"))
    )  # type: ignore[return-value]


def _umt5(state: dict[str, torch.Tensor], path: str) -> nn.Module:
    guess = object.__new__(model_list.WAN21_T2V)
    state = loader.replace_state_dict({}, state, guess, path)
    ((target, component),) = guess.clip_target(state).items()
    state = loader.try_filter_state_dict(guess.process_clip_state_dict(state), [f"{target}."])
    return loader.load_huggingface_component(guess, component, "transformers", "UMT5EncoderModel", "", state)


def encode(model: nn.Module) -> torch.Tensor:
    """The last hidden states of some tokens, in fp32."""
    tokens = torch.arange(7).view(1, -1) * 11 % ENCODER["vocab_size"]
    return model(None, embeds=model.get_input_embeddings()(tokens))[0].float()
