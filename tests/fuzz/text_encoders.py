"""Text encoders and vision projectors in GGUF, with the tokenizers that they bring."""

from __future__ import annotations

import functools
import struct

import numpy as np
from gguf_samples import write_gguf
from graft.kernels import GraftError
from graft.ops.files.contents import PROJECTOR, other_kind
from graft.ops.files.gguf import GGUFFile, open_gguf
from graft.ops.files.projectors import PROJECTORS, projector_beside
from graft.ops.files.text_encoders import text_encoder_tensors

from .bounds import FOLDER, bounded, sentence, written
from .choices import Choices
from .gguf_files import ARRAY, FLOAT32, INT32, STRING, UINT32, array, entry, number, strings, text
from .gguf_files import file as make_file

SUFFIX = ".gguf"
_NAMES = (
    "token_embd.weight", "output_norm.weight", "output.weight", "enc.blk.0.attn_q.weight", "enc.blk.1.attn_k.weight",
    "enc.blk.0.attn_rel_b.weight", "enc.blk.1.attn_rel_b.weight", "enc.blk.0.ffn_gate.weight", "blk.0.attn_q.weight",
    "blk.0.attn_k.weight", "blk.0.attn_norm.weight", "blk.0.post_ffw_norm.weight", "rope_freqs.weight", "q_proj",
    ".q_proj.", "blk.0.q_proj.weight", "model.embed_tokens.weight", "spiece_model", "norm.weight",
    "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight", "blk.0.ssm_a", "blk.0.ssm_dt.bias",
    "blk.0.attn_qkv.weight", "blk.0.ssm_out.weight", "blk.0.ssm_conv1d.weight", "blk.0.ffn_gate_exps.weight",
    "blk.0.ffn_up_exps.weight", "blk.0.ffn_gate_exps.bias", "blk.0.attn_sinks.weight", "blk.0.nextn.x.weight",
    "blk.0.layer_output_scale.weight",
)  # fmt: skip
_VISION = (
    "v.blk.0.attn_q.weight", "v.blk.0.attn_k.weight", "v.blk.0.attn_v.weight", "v.blk.0.attn_q.bias", "mm.0.weight",
    "v.blk.0.attn_q.weight.attn_q.", "v.patch_embd.weight", "v.patch_embd.weight.1",
    "v.deepstack.5.norm.weight", "v.deepstast.1.fc1.bias", "v.position_embd.weight",
)  # fmt: skip
_ARCHITECTURES = (
    "llama", "t5encoder", "mistral3", "qwen2vl", "gemma3", "clip", "t5", "qwen3", "gemma4", "qwen35", "gpt-oss", "pig",
)  # fmt: skip
_MODELS = ("t5", "llama", "gpt2", "bert", "gemma4")
_NUMBERS = (
    "attention.head_count", "attention.head_count_kv", "embedding_length", "ssm.group_count", "ssm.time_step_rank",
    "ssm.inner_size",
)  # fmt: skip


def make(choices: Choices) -> bytes:
    architecture = choices.pick(_ARCHITECTURES)
    entries = [entry(choices, "general.architecture", STRING, text(choices, architecture))]
    for key in _NUMBERS:
        if not choices.once_in(4):
            count = number(choices, choices.pick((1, 2, 4))) & 0xFFFFFFFF
            entries.append(entry(choices, f"{architecture}.{key}", UINT32, struct.pack("<I", count)))
    if choices.once_in(2):
        entries += tokenizer(choices)
    names = _VISION if (architecture == "clip") is not choices.odd() else _NAMES
    return make_file(choices, names, entries, most=8)


@functools.cache
def sound_of(architecture: str) -> GGUFFile:
    """A text encoder that can see."""
    table = np.ones((8, 32), np.float32)
    metadata = {f"{architecture}.ssm.{name}": 1 for name in ("group_count", "time_step_rank", "inner_size")}
    path = FOLDER / f"sound-{architecture}.gguf"
    return open_gguf(write_gguf(path, {"token_embd.weight": (table, "F32")}, architecture, metadata))


def tokenizer(choices: Choices) -> list[bytes]:
    """A vocabulary as the converter writes it."""
    tokens = ["<pad>", "<eos>", "<unk>", "\u2581a", "b"][: 1 + choices.below(5)]
    kinds = [3, 3, 2, 1, 4][: len(tokens)]
    numbers = array(choices, INT32, [struct.pack("<i", number(choices, kind) & 0x7FFFFFFF) for kind in kinds])
    scores = array(choices, FLOAT32, [struct.pack("<f", -float(i)) for i in range(len(tokens))])
    prefix = "tokenizer.ggml."
    return [
        entry(choices, prefix + "model", STRING, text(choices, choices.pick(_MODELS))),
        entry(choices, prefix + "pre", STRING, text(choices, choices.pick(("tekken", "default", "gpt-4o")))),
        entry(choices, prefix + "tokens", ARRAY, strings(choices, tokens)),
        entry(choices, prefix + "scores", ARRAY, scores),
        entry(choices, prefix + "token_type", ARRAY, numbers),
        entry(choices, prefix + "merges", ARRAY, strings(choices, ["\u2581a b", "b b"])),
        entry(choices, prefix + "unknown_token_id", UINT32),
    ]


def check(data: bytes) -> None:
    path = written(data, SUFFIX)
    with bounded(len(data)):
        try:
            file = open_gguf(path)
        except GraftError as error:
            sentence(error)
            return
        seeing = other_kind(file) is PROJECTOR
        try:
            for encoder in map(sound_of, PROJECTORS) if seeing else ():
                assert all(isinstance(name, str) for name in text_encoder_tensors(encoder, file))
            if not seeing:
                assert all(isinstance(name, str) for name in text_encoder_tensors(file))
        except GraftError as error:
            sentence(error)
        projector_beside(file, file.architecture or "", [])
