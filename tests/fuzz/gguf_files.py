"""GGUF files: sound ones, with something wrong in each field now and then."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from graft.kernels.formats import FORMATS

from .choices import NUMBERS, TEXTS, Choices, damaged

UINT32, INT32, FLOAT32, STRING, ARRAY, UINT64 = 4, 5, 6, 8, 9, 10
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_WEIGHTS = [fmt for fmt in FORMATS if not fmt.refusal]
DIFFUSION = (
    "img_in.weight", "double_blocks.0.img_attn.qkv.weight", "model.diffusion_model.x.weight", "img_in.weight_scale",
    "img_in.scale_weight", "img_in.comfy_quant", "double_blocks.0.img_attn.qkv.weight_scale", "scaled_fp8",
    "diffusion_model.y.weight", "z.bias", "first_stage_model.decoder.conv_in.weight", "v.blk.0.ln1.weight",
)  # fmt: skip
_NOTES = ("{}", '{"format": "int8"}', "[" * 9999, "{" * 9999, "1" * 9999, "null", '{"format": [1]}', "NaN")
_KEYS = (
    "general.architecture", "general.alignment", "general.name", "general.file_type", "tokenizer.ggml.model",
    "comfy.gguf.quant.img_in.weight", "comfy.gguf.orig_shape.img_in.weight", "comfy.gguf.orig_shape.z.bias",
    "split.count", "split.no",
)  # fmt: skip
_TEXT_KEYS = {"general.architecture", "general.name", "tokenizer.ggml.model"}
_ARCHITECTURES = ("flux", "wan", "t5encoder", "clip", "vae", "llama", "qwen2vl", "gemma3", "never heard of it")


def number(choices: Choices, sound: int) -> int:
    """`sound`, or one of those that arithmetic fails on."""
    return choices.pick(NUMBERS) if choices.odd() else sound


def text(choices: Choices, sound: str) -> bytes:
    value = choices.pick(TEXTS) if choices.odd() else sound
    data = choices.noise(9) if choices.odd() else value.encode()
    return struct.pack("<Q", number(choices, len(data))) + data


def value(choices: Choices, kind: int, depth: int = 0) -> bytes:
    """A metadata value of this type; arrays may hold arrays."""
    if kind == STRING:
        return text(choices, choices.pick(_ARCHITECTURES))
    if kind == ARRAY:
        item = choices.pick((INT32, UINT64, STRING, 0, ARRAY)) if depth < 6 else INT32
        count = choices.below(4)
        items = b"".join(value(choices, item, depth + 1) for _ in range(count))
        return struct.pack("<IQ", item, number(choices, count)) + items
    code = _CODES.get(kind, "I")
    if code in "fd":
        return choices.noise(struct.calcsize(code))
    largest = 1 << 8 * struct.calcsize(code)
    return (number(choices, choices.pick((1, 8, 32, 64))) % largest).to_bytes(struct.calcsize(code), "little")


def entry(choices: Choices, key: str, kind: int, data: bytes | None = None) -> bytes:
    kind = number(choices, kind) & 0xFFFFFFFF
    return text(choices, key) + struct.pack("<I", kind) + (value(choices, kind) if data is None else data)


def array(choices: Choices, kind: int, items: Sequence[bytes]) -> bytes:
    return struct.pack("<IQ", number(choices, kind) & 0xFFFFFFFF, number(choices, len(items))) + b"".join(items)


def strings(choices: Choices, items: Sequence[str]) -> bytes:
    return array(choices, STRING, [text(choices, item) for item in items])


def file(
    choices: Choices, names: Sequence[str] = DIFFUSION, entries: Sequence[bytes] = (), most: int = 5
) -> bytes:
    """A file of some tensors of these names and some metadata beside `entries`."""
    entries = list(entries)
    first = choices.below(len(_KEYS))
    for key in _KEYS[first : first + choices.below(4)]:
        if key == "general.architecture" and entries:
            continue  # the caller's own
        sound = {"general.alignment": struct.pack("<I", choices.pick((32, 64)))}.get(key)
        kind = UINT32 if sound else STRING if key in _TEXT_KEYS else choices.pick((UINT32, ARRAY, STRING, UINT64))
        if key.startswith("comfy.gguf.quant."):
            kind, sound = STRING, text(choices, choices.pick(_NOTES))
        entries.append(entry(choices, key, kind, None if choices.odd() else sound))
    infos, offset = [], 0
    chosen = dict.fromkeys(choices.pick(names) for _ in range(choices.below(most + 1)))
    for name in chosen:
        fmt = choices.pick(FORMATS if choices.odd() else _WEIGHTS)
        rows, blocks = choices.pick(((), (1,), (4,), (2, 3))), choices.pick((1, 2))
        dims = [number(choices, n) for n in (blocks * fmt.block_size, *rows)]
        if choices.odd():
            dims = [choices.pick(NUMBERS) for _ in range(choices.below(12))]
        infos.append(
            text(choices, name)
            + struct.pack("<I", number(choices, len(dims)) & 0xFFFFFFFF)
            + b"".join(struct.pack("<Q", dim) for dim in dims)
            + struct.pack("<IQ", number(choices, fmt.ggml_type) & 0xFFFFFFFF, number(choices, offset))
        )
        size = blocks * fmt.type_size
        for n in rows:
            size *= n
        offset += size + -size % 32
    version = number(choices, 3) & 0xFFFFFFFF
    counts = number(choices, len(infos)), number(choices, len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join((*entries, *infos))
    return damaged(choices, head + bytes(-len(head) % 32) + choices.noise(offset))
