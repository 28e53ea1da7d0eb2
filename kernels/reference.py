"""Reference decode of every GGUF type in torch: the oracle, and the fallback on any device.

`decode_<type>(blocks: uint8 [B, type_size]) -> fp32 [B, block_size]`, on the device of `blocks`. Layouts and formulas
are those of ggml (`block_*` in ggml-common.h, `dequantize_row_*` in ggml-quants.c); the results are those of
`gguf.quants.dequantize` bit for bit, the signs of zeros included, in which ggml agrees. Every device can reach that:
a scale has 11 significant bits, and scale, sub-scale and code multiplied fit into the 24 of fp32, so that all products
are exact in any order, and only the addition of a type with an offset rounds, once, fused or not.

In the layouts, `x[n]` are n bytes, `d` and `m` fp16 numbers, u16 and u32 words, all little-endian; fields of a byte or
word are listed from the lowest bits upwards. The wider unsigned dtypes are avoided, as many devices lack them.
"""

from __future__ import annotations

import torch
from torch.nn.functional import embedding

from . import codebooks


def _words(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Reinterpret uint8 [..., n] as little-endian words [..., n / itemsize]."""
    # a copy (of a scale's few bytes a block), because a view would need an aligned storage offset and strides
    return data.clone(memory_format=torch.contiguous_format).view(dtype)


def _half(data: torch.Tensor) -> torch.Tensor:
    """Read uint8 [B, 2 n] as fp16: fp32 [B, n]."""
    return _words(data, torch.float16).float()


def _fields(packed: torch.Tensor, bits: int, dim: int = -2, count: int | None = None) -> torch.Tensor:
    """Split every element into `count` fields of `bits` bits, lowest first, along a new dimension `dim`.

    With dim=-2 all the lowest fields come first, with dim=-1 the fields of an element stay together.
    """
    mask = (1 << bits) - 1
    return torch.stack([packed >> bits * i & mask for i in range(count or 8 // bits)], dim)


def _scale(d: torch.Tensor, q: torch.Tensor, m: torch.Tensor | None = None) -> torch.Tensor:
    """d q + m, with fp32 d and m [B, G] for each group of N / G codes and codes q, in all [B, N]: fp32 [B, N]."""
    weights = q.flatten(1).unflatten(1, (d.shape[1], -1)) * d.unsqueeze(2)
    return (weights if m is None else weights.add_(m.unsqueeze(2))).flatten(1)


def _look_up(book: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Entries [..., width] of a code book [entries, width]."""
    return embedding(index.int(), book)


def decode_bf16(blocks: torch.Tensor) -> torch.Tensor:
    """BF16, a block is one weight: the upper half of an fp32 [2]."""
    return (_words(blocks, torch.int16).int() << 16).view(torch.float32)


def decode_q4_0(blocks: torch.Tensor) -> torch.Tensor:
    """Q4_0, 32 weights: d[2] | qs[16], weights 0..15 in the low nibbles, 16..31 in the high ones. w = d (q - 8)."""
    d, qs = blocks.split((2, 16), 1)
    return _scale(_half(d), _fields(qs, 4).view(torch.int8) - 8)


def decode_q4_1(blocks: torch.Tensor) -> torch.Tensor:
    """Q4_1, 32 weights: d[2] | m[2] | qs[16], nibbles as in Q4_0. w = d q + m."""
    d, m, qs = blocks.split((2, 2, 16), 1)
    return _scale(_half(d), _fields(qs, 4), _half(m))


def _five_bits(qh: torch.Tensor, qs: torch.Tensor) -> torch.Tensor:
    """The codes of Q5_0 and Q5_1: uint8 [B, 32]."""
    return _fields(qs, 4).flatten(1) | _fields(qh, 1, dim=-1).flatten(1) << 4


def decode_q5_0(blocks: torch.Tensor) -> torch.Tensor:
    """Q5_0, 32 weights: d[2] | qh[4], u32 | qs[16], nibbles as in Q4_0.

    Bit i of qh is the fifth bit of weight i. w = d (q - 16).
    """
    d, qh, qs = blocks.split((2, 4, 16), 1)
    return _scale(_half(d), _five_bits(qh, qs).view(torch.int8) - 16)


def decode_q5_1(blocks: torch.Tensor) -> torch.Tensor:
    """Q5_1, 32 weights: d[2] | m[2] | qh[4], u32 | qs[16]. Codes as in Q5_0. w = d q + m."""
    d, m, qh, qs = blocks.split((2, 2, 4, 16), 1)
    return _scale(_half(d), _five_bits(qh, qs), _half(m))


def decode_q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """Q8_0, 32 weights: d[2] | qs[32], signed. w = d q."""
    d, qs = blocks.split((2, 32), 1)
    return _scale(_half(d), qs.view(torch.int8))


def decode_q2_k(blocks: torch.Tensor) -> torch.Tensor:
    """Q2_K, 256 weights: scales[16] | qs[64] | d[2] | m[2].

    scales[j], for the 16 weights 16 j ...: scale in the low nibble, min in the high one. Each 32 bytes of qs hold 128
    weights: 32 in bits 0-1, the next 32 in bits 2-3, and so on. w = d scale q - m min.
    """
    scales, qs, d, m = blocks.split((16, 64, 2, 2), 1)
    return _scale(_half(d) * (scales & 15), _fields(qs.unflatten(1, (2, 32)), 2), -_half(m) * (scales >> 4))


def decode_q3_k(blocks: torch.Tensor) -> torch.Tensor:
    """Q3_K, 256 weights: hmask[32] | qs[64] | scales[12] | d[2].

    The low two bits of the codes lie in qs as in Q2_K; the third bit of weight i is bit i / 32 of hmask[i % 32]. The
    low nibbles of the 16 scales are those of scales[0..7], first the low, then the high ones; their upper two bits are
    bits 0-1 of scales[8..11], then bits 2-3, and so on. w = d (scale - 32) (q - 4), scale for 16 weights.
    """
    hmask, qs, scales, d = blocks.split((32, 64, 12, 2), 1)
    low, high = scales.split((8, 4), 1)
    scale = (_fields(low, 4).flatten(1) | _fields(high, 2).flatten(1) << 4).view(torch.int8) - 32
    q = _fields(qs.unflatten(1, (2, 32)), 2).flatten(1) | _fields(hmask, 1).flatten(1) << 2
    return _scale(_half(d) * scale, q.view(torch.int8) - 4)


def _scales_mins(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 6-bit scales and mins, uint8 [B, 8] each, that Q4_K and Q5_K pack into 12 bytes.

    Scales 0..3 are the low six bits of bytes 0..3, mins 0..3 those of bytes 4..7. Bytes 8..11 hold the low nibbles of
    scales 4..7 (low) and of mins 4..7 (high), whose upper two bits are the upper two of bytes 0..3 and 4..7.
    """
    scale, minimum, rest = packed.split(4, 1)
    return (
        torch.cat((scale & 63, rest & 15 | scale >> 6 << 4), 1),
        torch.cat((minimum & 63, rest >> 4 | minimum >> 6 << 4), 1),
    )


def decode_q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """Q4_K, 256 weights: d[2] | m[2] | scales[12] | qs[128].

    Each 32 bytes of qs hold 64 weights, 32 in the low nibbles, then 32 in the high ones.
    w = d scale q - m min with 6-bit scale and min for 32 weights (`_scales_mins`).
    """
    d, m, packed, qs = blocks.split((2, 2, 12, 128), 1)
    scale, minimum = _scales_mins(packed)
    return _scale(_half(d) * scale, _fields(qs.unflatten(1, (4, 32)), 4), -_half(m) * minimum)


def decode_q5_k(blocks: torch.Tensor) -> torch.Tensor:
    """Q5_K, 256 weights: d[2] | m[2] | scales[12] | qh[32] | qs[128].

    As Q4_K, with the fifth bit of weight i in bit i / 32 of qh[i % 32].
    """
    d, m, packed, qh, qs = blocks.split((2, 2, 12, 32, 128), 1)
    scale, minimum = _scales_mins(packed)
    q = _fields(qs.unflatten(1, (4, 32)), 4).flatten(1) | _fields(qh, 1).flatten(1) << 4
    return _scale(_half(d) * scale, q, -_half(m) * minimum)


def decode_q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """Q6_K, 256 weights: ql[128] | qh[64] | scales[16], signed | d[2].

    Each half of 128 weights takes 64 bytes of ql (64 weights in the low nibbles, 64 in the high ones) and 32 of qh
    (32 weights in bits 0-1, the next 32 in bits 2-3, and so on). w = d scale (q - 32), scale for 16 weights.
    """
    ql, qh, scale, d = blocks.split((128, 64, 16, 2), 1)
    low = _fields(ql.unflatten(1, (2, 64)), 4).flatten(1)
    high = _fields(qh.unflatten(1, (2, 32)), 2).flatten(1)
    return _scale(_half(d) * scale.view(torch.int8), (low | high << 4).view(torch.int8) - 32)


def _iq1(d: torch.Tensor, index: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """d (entry ± 1/8) with fp32 d [B, G], 11-bit indices [B, 32] and the sign of the shift [B, S], as a bool."""
    shift = (1 - 2 * negative.to(torch.int32)).float() / 8
    entries = _look_up(codebooks.values("iq1s", index.device), index)
    return _scale(d, entries.flatten(1).unflatten(1, (shift.shape[1], -1)) + shift.unsqueeze(2))


def decode_iq1_s(blocks: torch.Tensor) -> torch.Tensor:
    """IQ1_S, 256 weights: d[2] | qs[32] | qh[16], u16.

    A word of qh serves 32 weights: four times 3 high bits of an index into the book, whose low 8 bits are in qs, then
    the scale in bits 12-14, and in bit 15 the sign of the shift. w = d (2 scale + 1) (entry ± 1/8).
    """
    d, qs, qh = blocks.split((2, 32, 16), 1)
    words = _words(qh, torch.int16)  # [B, 8]
    index = qs | _fields(words, 3, dim=-1, count=4).flatten(1) << 8
    scale = 2 * (words >> 12 & 7) + 1
    return _iq1(_half(d) * scale, index, words < 0)


def decode_iq1_m(blocks: torch.Tensor) -> torch.Tensor:
    """IQ1_M, 256 weights: qs[32] | qh[16] | scales[8], u16.

    A nibble of qh serves 8 weights: 3 high bits of the index, and in bit 3 the sign of the shift. A word of scales
    holds four 3-bit scales for 16 weights each; the upper nibbles of the four words make up the fp16 d, lowest first.
    w = d (2 scale + 1) (entry ± 1/8).
    """
    qs, qh, packed = blocks.split((32, 16, 8), 1)
    nibbles = packed[:, 1::2] >> 4
    d = _half(nibbles[:, 0::2] | nibbles[:, 1::2] << 4)
    scale = 2 * _fields(_words(packed, torch.int16), 3, dim=-1, count=4).flatten(1) + 1
    high = _fields(qh, 4, dim=-1).flatten(1)  # [B, 32]
    return _iq1(d * scale, qs | (high & 7).short() << 8, high > 7)


def _iq23(d: torch.Tensor, book: str, index: torch.Tensor, sign: torch.Tensor, sign_bits: int) -> torch.Tensor:
    """d ± entry with fp32 d [B, G], the numbers of the entries and those of the signs of 8 weights [B, 32]."""
    entries = _look_up(codebooks.values(book, index.device), index.flatten(1))
    signs = _look_up(codebooks.signs(sign_bits, index.device), sign.flatten(1))
    return _scale(d, entries.flatten(1).mul_(signs.flatten(1)))


def decode_iq2_xxs(blocks: torch.Tensor) -> torch.Tensor:
    """IQ2_XXS, 256 weights: d[2] | 8 x (qs[4] | u32).

    For 32 weights, four indices into the book and a word: four times 7 sign bits, then the 4-bit scale.
    w = d (scale + 1/2) / 4 x ± entry.
    """
    d, packed = blocks.split((2, 64), 1)
    qs, words = packed.unflatten(1, (8, 8)).split((4, 4), 2)
    word = _words(words, torch.int32)  # [B, 8, 1]
    scale = (word >> 28 & 15).flatten(1).float() + 0.5
    return _iq23(_half(d) * scale * 0.25, "iq2xxs", qs, _fields(word, 7, dim=-1, count=4), 7)


def decode_iq2_xs(blocks: torch.Tensor) -> torch.Tensor:
    """IQ2_XS, 256 weights: d[2] | qs[64], u16 | scales[8].

    A word for 8 weights: 9 bits of index, 7 sign bits. The nibbles of scales, low first, serve 16 weights each.
    w = d (scale + 1/2) / 4 x ± entry.
    """
    d, qs, packed = blocks.split((2, 64, 8), 1)
    words = _words(qs, torch.int16)  # [B, 32]
    scale = _fields(packed, 4, dim=-1).flatten(1).float() + 0.5
    return _iq23(_half(d) * scale * 0.25, "iq2xs", words & 511, words >> 9 & 127, 7)


def decode_iq2_s(blocks: torch.Tensor) -> torch.Tensor:
    """IQ2_S, 256 weights: d[2] | qs[32] | signs[32] | qh[8] | scales[8].

    For 8 weights, a byte of qs and 2 bits of qh, lowest first, are the index, and a byte of signs all 8 signs. The
    nibbles of scales, low first, serve 16 weights each. w = d (scale + 1/2) / 4 x ± entry.
    """
    d, qs, sign, qh, packed = blocks.split((2, 32, 32, 8, 8), 1)
    index = qs | _fields(qh, 2, dim=-1).flatten(1).short() << 8
    scale = _fields(packed, 4, dim=-1).flatten(1).float() + 0.5
    return _iq23(_half(d) * scale * 0.25, "iq2s", index, sign, 8)


def decode_iq3_xxs(blocks: torch.Tensor) -> torch.Tensor:
    """IQ3_XXS, 256 weights: d[2] | qs[64] | words[32], u32.

    A byte of qs is the entry of 4 weights; a word for 32: four times 7 sign bits of 8 weights, then the 4-bit scale.
    w = d (scale + 1/2) / 2 x ± entry.
    """
    d, qs, words = blocks.split((2, 64, 32), 1)
    word = _words(words, torch.int32)  # [B, 8]
    scale = (word >> 28 & 15).float() + 0.5
    return _iq23(_half(d) * scale * 0.5, "iq3xxs", qs, _fields(word, 7, dim=-1, count=4), 7)


def decode_iq3_s(blocks: torch.Tensor) -> torch.Tensor:
    """IQ3_S, 256 weights: d[2] | qs[64] | qh[8] | signs[32] | scales[4].

    For 4 weights, a byte of qs and a bit of qh, lowest first, are the index; a byte of signs is for 8. The nibbles of
    scales, low first, serve 32 weights each. w = d (2 scale + 1) x ± entry.
    """
    d, qs, qh, sign, packed = blocks.split((2, 64, 8, 32, 4), 1)
    index = qs | _fields(qh, 1, dim=-1).flatten(1).short() << 8
    scale = 2 * _fields(packed, 4, dim=-1).flatten(1) + 1
    return _iq23(_half(d) * scale, "iq3s", index, sign, 8)


def decode_iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    """IQ4_NL, 32 weights: d[2] | qs[16]. As Q4_0, with the codes' values from a table of 16: w = d kvalues[q]."""
    d, qs = blocks.split((2, 16), 1)
    return _scale(_half(d), _look_up(codebooks.values("iq4nl", qs.device), _fields(qs, 4)))


def decode_iq4_xs(blocks: torch.Tensor) -> torch.Tensor:
    """IQ4_XS, 256 weights: d[2] | scales_h[2], u16 | scales_l[4] | qs[128].

    Each 16 bytes of qs are the codes of 32 weights as in IQ4_NL; their 6-bit scale has its low nibble in scales_l, its
    upper two bits in scales_h, lowest first. w = d (scale - 32) kvalues[q].
    """
    d, high, low, qs = blocks.split((2, 2, 4, 128), 1)
    scale = _fields(low, 4, dim=-1).flatten(1) | _fields(high, 2, dim=-1).flatten(1) << 4  # [B, 8]
    codes = _fields(qs.unflatten(1, (8, 16)), 4)
    return _scale(_half(d) * (scale.view(torch.int8) - 32), _look_up(codebooks.values("iq4nl", qs.device), codes))


def _trits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` base-3 digits of every byte, first the first digit of all: int16 [B, count n].

    A byte is ceil(x 256 / 243) for the number x of five digits: multiplying by 3 moves a digit out at the top.
    """
    wide = packed.short()
    return torch.stack([(wide * 3**i & 255) * 3 >> 8 for i in range(count)], 1).flatten(1)


def decode_tq1_0(blocks: torch.Tensor) -> torch.Tensor:
    """TQ1_0, 256 weights: qs[48] | qh[4] | d[2].

    Base-3 digits, five a byte for 32 and then 16 bytes of qs, four a byte in qh. w = d (digit - 1).
    """
    first, second, last, d = blocks.split((32, 16, 4, 2), 1)
    return _scale(_half(d), torch.cat((_trits(first, 5), _trits(second, 5), _trits(last, 4)), 1) - 1)


def decode_tq2_0(blocks: torch.Tensor) -> torch.Tensor:
    """TQ2_0, 256 weights: qs[64] | d[2]. 2-bit codes laid out as in Q2_K. w = d (q - 1)."""
    qs, d = blocks.split((64, 2), 1)
    return _scale(_half(d), _fields(qs.unflatten(1, (2, 32)), 2).view(torch.int8) - 1)


def decode_mxfp4(blocks: torch.Tensor) -> torch.Tensor:
    """MXFP4 (OCP MX 1.0), 32 weights: e[1] | qs[16], nibbles as in Q4_0.

    w = 2^(e - 128) kvalues[q]: an E8M0 scale, halved because the E2M1 values in the table are doubled. As in ggml,
    e = 255 is 2^127 and not the specification's NaN; e < 2 needs a device that keeps subnormal numbers.
    """
    e, qs = blocks.split((1, 16), 1)
    e = e.int()
    # e of 0 and 1 give subnormal numbers: a bit of the mantissa instead of an exponent
    d = torch.where(e < 2, e + 1 << 21, e - 1 << 23).view(torch.float32)
    return _scale(d, _look_up(codebooks.values("mxfp4", qs.device), _fields(qs, 4)))


def decode_nvfp4(blocks: torch.Tensor) -> torch.Tensor:
    """NVFP4, 64 weights: e[4] | 4 x qs[8].

    e[j] is the unsigned E4M3 scale of 16 weights: 8 in the low nibbles of 8 bytes, then 8 in the high ones.
    w = e / 2 x kvalues[q], the E2M1 values in the table being doubled. As in ggml, 0x7f is 0 and bit 7 is ignored.
    The scale of the whole tensor, which NVFP4 also has, is another tensor of the file.
    """
    e, qs = blocks.split((4, 32), 1)
    exponent, mantissa = (e >> 3 & 15).int(), (e & 7).int()
    mantissa += (exponent > 0).int() << 3
    power = (exponent.clamp(min=1) - 11 + 127 << 23).view(torch.float32)  # 2^(exponent - 7 - 3 - 1)
    d = (mantissa * power).masked_fill(e == 0x7F, 0)
    return _scale(d, _look_up(codebooks.values("mxfp4", qs.device), _fields(qs.unflatten(1, (4, 8)), 4)))
