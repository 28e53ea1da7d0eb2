"""Safetensors files of adapters: sound ones, with something wrong in each field now and then."""

from __future__ import annotations

import json
import math
from typing import Any

from .choices import NUMBERS, TEXTS, Choices, damaged

H = 32
_MODULES = {
    "lora_unet_img_in": (H, 16), "diffusion_model.img_in": (H, 16), "transformer.x_embedder": (H, 16),
    "lora_unet_double_blocks_0_img_attn_qkv": (3 * H, H), "diffusion_model.double_blocks.0.img_attn.qkv": (3 * H, H),
    "transformer.transformer_blocks.0.attn.to_q": (H, H), "double_blocks.0.processor.qkv_lora1": (3 * H, H),
    "base_model.model.transformer_blocks.0.attn.to_k": (H, H), "lycoris_transformer_blocks_0_attn_to_qkv": (3 * H, H),
    "lora_unet_input_blocks_0_0": (16, 4, 3, 3), "lora_te_text_model_encoder_layers_0_mlp_fc1": (H, H),
    "nobody.knows.this": (4, 4),
}  # fmt: skip
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
_METADATA = ("ss_tag_frequency", "ss_network_module", "modelspec.title", "ss_base_model_version")
_RANK = 4


def fields_of(choices: Choices, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The tensors of one adapter on a weight of `shape`, by field."""
    out, inner, kernel = shape[0], shape[1], shape[2:]
    ones, r = (1,) * len(kernel), _RANK
    return choices.pick((
        {".lora_down.weight": (r, inner, *kernel), ".lora_up.weight": (out, r, *ones), ".alpha": ()},
        {".lora_A.weight": (r, inner, *kernel), ".lora_B.weight": (out, r, *ones)},
        {".lora_A.style.weight": (r, inner), ".lora_B.style.weight": (out, r), ".lora_magnitude_vector.style": (out,)},
        {".lora_down.weight": (r, inner), ".lora_up.weight": (out, r), ".lora_A.weight": (r, inner),
         ".lora_B.bias": (out,), ".alpha": ()},
        {".down.weight": (r, inner), ".up.weight": (out, r)},
        {".lora_down.weight": (r, inner, *ones), ".lora_mid.weight": (r, r, *kernel),
         ".lora_up.weight": (out, r, *ones)},
        {".lora_A.weight": (r, inner), ".lora_B.weight": (out, r), ".dora_scale": (out, 1), ".lora_B.bias": (out,)},
        {".lora_A.weight": (r, 2 * inner), ".lora_B.weight": (out, r), ".reshape_weight": (2,)},
        {".hada_w1_a": (out, r), ".hada_w1_b": (r, math.prod(shape[1:])), ".hada_w2_a": (out, r),
         ".hada_w2_b": (r, math.prod(shape[1:])), ".alpha": ()},
        {".lokr_w1": (4, 2), ".lokr_w2": (out // 4, inner // 2, *kernel), ".alpha": ()},
        {".lokr_w1": (4, 2), ".lokr_w2_a": (out // 4, r), ".lokr_w2_b": (r, math.prod(shape[1:]) // 2)},
        {".a1.weight": (inner, r), ".a2.weight": (r, inner), ".b1.weight": (out, r), ".b2.weight": (r, inner)},
        {".oft_blocks": (out // 4, 4, 4), ".alpha": ()},
        {".oft_blocks": (3, out // 8, 8, 8), ".rescale": (out, 1)},
        {".oft_R.default.weight": (inner // 4, 6)},
        {".diff": shape, ".diff_b": (out,)},
        {".set_weight": shape},
    ))  # fmt: skip


def _number(choices: Choices, sound: int) -> int:
    return choices.pick(NUMBERS) if choices.odd() else sound


def _shape(choices: Choices, sound: tuple[int, ...]) -> list[Any]:
    if choices.odd():
        return [choices.pick((0, 1, 2, 3, 4, 16, 32, 33)) for _ in range(choices.below(5))]
    if choices.odd():
        return [choices.pick((*NUMBERS, -1, 1.5, "4", None, [4])) for _ in range(choices.below(3) + 1)]
    return list(sound)


def file(choices: Choices) -> bytes:
    """A file of one to three adapters, of few bytes."""
    header: dict[str, Any] = {}
    offset, body = 0, []
    for _ in range(choices.below(3) + 1):
        module = choices.pick(tuple(_MODULES))
        shape = _MODULES[module]
        if choices.odd():
            module = choices.pick(TEXTS)
        for field, sound in fields_of(choices, shape).items():
            if choices.odd():
                continue
            if choices.odd():
                field = choices.pick(tuple(fields_of(choices, shape)))
            dims, dtype = _shape(choices, sound), choices.pick(("F32", "F16", "BF16"))
            if choices.odd():
                dtype = choices.pick((*_DTYPES, "F4", "", 7))
            whole = all(isinstance(dim, int) and 0 <= dim < 1 << 16 for dim in dims)
            size = math.prod(dims) * _DTYPES.get(dtype, 1) if whole else 8
            size = min(size, 1 << 17)
            offsets = [_number(choices, offset), _number(choices, offset + size)]
            header[f"{module}{field}"] = {"dtype": dtype, "shape": dims, "data_offsets": offsets}
            offset += size
            body.append(_numbers(choices, size, dtype, field))
    if choices.once_in(4):
        metadata: Any = {choices.pick(_METADATA): choices.pick(TEXTS), "modelspec.trigger_phrase": "a, b"}
        header["__metadata__"] = choices.pick(({"a": 1}, [], None, "a")) if choices.odd() else metadata
    text = json.dumps(header).encode()
    if choices.odd():
        text = choices.pick((b"{}", b"[" * 999, b"null", text[:-1], text * 2, b'{"a":1}', b"\xff" + text))
    return damaged(choices, _number(choices, len(text)).to_bytes(8, "little") + text + b"".join(body))


def _numbers(choices: Choices, size: int, dtype: Any, field: str) -> bytes:
    """Moderate floats, or any bytes: infinities and NaN among them."""
    if choices.once_in(8) or dtype not in ("F32", "F16", "BF16"):
        return choices.noise(size)
    unit = {"F32": b"\0\0\0\x3f", "F16": b"\0\x38", "BF16": b"\0\x3f"}[dtype]  # 0.5
    return (unit * (size // len(unit) + 1))[:size]
