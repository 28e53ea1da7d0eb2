"""What the decode functions are made of: loads from a block, and the way from packed bits to numbers.

A decode function has the shape ``decode(row, unit, mask, table, UNIT) -> fp32 [R, UNIT]``:

    row    u8 pointers [R] to the first byte of rows of whole blocks
    unit   which UNIT weights of each row to decode: ``unit * UNIT .. unit * UNIT + UNIT - 1``
    mask   bool [R]; nothing is read where it is False, and the weights there are meaningless
    table  int32 pointer to the format's code book (`codebooks.table`), None where it has none
    UNIT   32 .. 256 in powers of two, a divisor of the row's weights

Inside, tensors are [R, C], where a column stands for STEP weights: 4 for a word of packed codes, 8 for an entry of
a grid, 16 or 32 for a scale. Codes travel four to a 32-bit word, one a byte, in the order of the weights, so that bit
operations serve four weights at once and the expansion to fp32 is a byte conversion, which GPUs do in one instruction.

Every product of a scale, a sub-scale and a code has at most 24 significant bits (11 + 6 + 7) and is exact in fp32,
so a format's result has one rounding at most, the addition of its minimum, whether or not the compiler fuses.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(unit, UNIT: tl.constexpr, STEP: tl.constexpr, QK: tl.constexpr):
    """Block in the row, and index in that block, of every STEP weights of a unit; QK weights make a block."""
    step = tl.arange(0, UNIT // STEP)
    if UNIT >= QK:
        return unit * (UNIT // QK) + step // (QK // STEP), step % (QK // STEP)
    else:
        units: tl.constexpr = QK // UNIT
        return unit // units + step * 0, unit % units * (UNIT // STEP) + step


@triton.jit
def load_u8(row, block, index, mask, FIELD: tl.constexpr, TYPE_SIZE: tl.constexpr):
    """Byte `index` of the field that starts at byte FIELD of a block: u32 [R, C]."""
    offset = block * TYPE_SIZE + FIELD + index
    return tl.load(row[:, None] + offset[None, :], mask=mask[:, None], other=0).to(tl.uint32)


@triton.jit
def load_u16(row, block, index, mask, FIELD: tl.constexpr, TYPE_SIZE: tl.constexpr):
    """16-bit word `index` of the field at byte FIELD of a block: u32 [R, C]."""
    halves = row.to(tl.pointer_type(tl.uint16))
    offset = block * (TYPE_SIZE // 2) + FIELD // 2 + index
    return tl.load(halves[:, None] + offset[None, :], mask=mask[:, None], other=0).to(tl.uint32)


@triton.jit
def load_u32(row, block, index, mask, FIELD: tl.constexpr, TYPE_SIZE: tl.constexpr):
    """32-bit word `index` of the field at byte FIELD of a block, little-endian: u32 [R, C].

    Blocks are aligned as their size is. In parts where they are not aligned to words: that takes as many
    instructions as two aligned loads and a funnel shift, and never touches a byte of another block.
    """
    if TYPE_SIZE % 4 == 0 and FIELD % 4 == 0:
        words = row.to(tl.pointer_type(tl.uint32))
        offset = block * (TYPE_SIZE // 4) + FIELD // 4 + index
        return tl.load(words[:, None] + offset[None, :], mask=mask[:, None], other=0)
    elif TYPE_SIZE % 2 == 0 and FIELD % 2 == 0:
        low = load_u16(row, block, 2 * index, mask, FIELD, TYPE_SIZE)
        return low | (load_u16(row, block, 2 * index, mask, FIELD + 2, TYPE_SIZE) << 16)
    else:
        word = load_u8(row, block, 4 * index, mask, FIELD, TYPE_SIZE)
        word |= load_u8(row, block, 4 * index, mask, FIELD + 1, TYPE_SIZE) << 8
        word |= load_u8(row, block, 4 * index, mask, FIELD + 2, TYPE_SIZE) << 16
        return word | (load_u8(row, block, 4 * index, mask, FIELD + 3, TYPE_SIZE) << 24)


@triton.jit
def load_quads(words, start, shifted, mask):
    """Sixteen bytes at a time, wherever between words they begin: u32 [R, 4 C].

    Five words each are loaded whole, rather than eight halves: 32-bit loads can be pipelined, 16-bit ones cannot.

    Args:
        words: u32 pointers [R].
        start: which word is the first of each sixteen bytes, [C].
        shifted: bool [R], whether the bytes begin in the middle of that word.
        mask: bool [R].
    """
    R: tl.constexpr = words.shape[0]
    C: tl.constexpr = start.shape[0]
    at = words[:, None] + start[None, :]
    four = tl.load(at[:, :, None] + tl.arange(0, 4)[None, None, :], mask=mask[:, None, None], other=0)
    fifth = tl.load(at + 4, mask=mask[:, None], other=0)
    # a word's upper half and the lower one of the next: both lie in one thread
    even, odd = tl.split(tl.reshape(four, [R, C, 2, 2]))
    _, third = tl.split(even)
    beyond = tl.join(third, fifth)
    shifted = shifted[:, None, None]
    even, odd = (
        tl.where(shifted, (even >> 16) | (odd << 16), even),
        tl.where(shifted, (odd >> 16) | (beyond << 16), odd),
    )
    return tl.reshape(tl.join(even, odd), [R, 4 * C])


@triton.jit
def load_f16(row, block, mask, FIELD: tl.constexpr, TYPE_SIZE: tl.constexpr):
    """The fp16 at byte FIELD of a block: fp32 [R, C]."""
    halves = row.to(tl.pointer_type(tl.float16))
    offset = block * (TYPE_SIZE // 2) + FIELD // 2
    return tl.load(halves[:, None] + offset[None, :], mask=mask[:, None], other=0).to(tl.float32)


@triton.jit
def as_f16(bits):
    """The low 16 bits read as fp16: fp32 of the same shape."""
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def repeat(x, N: tl.constexpr):
    """Every column N times: [R, C] to [R, N C]."""
    wide = tl.broadcast_to(x[:, :, None], [x.shape[0], x.shape[1], N])
    return tl.reshape(wide, [x.shape[0], x.shape[1] * N])


@triton.jit
def bytes_of(words):
    """The bytes of words, lowest first: u32 [R, C] to u32 [R, 4 C]; the bits above a byte are not cleared."""
    # joined rather than broadcast, because that keeps the four in one thread: wide stores, fewer exchanges
    even = tl.join(words, words >> 16)
    odd = tl.join(words >> 8, words >> 24)
    return tl.reshape(tl.join(even, odd), [words.shape[0], words.shape[1] * 4])


@triton.jit
def unpack(words):
    """Unsigned bytes to numbers: u32 [R, C] to fp32 [R, 4 C]."""
    return bytes_of(words).to(tl.uint8).to(tl.float32)


@triton.jit
def unpack_signed(words):
    """Two's complement bytes to numbers: u32 [R, C] to fp32 [R, 4 C]."""
    return bytes_of(words).to(tl.uint8).to(tl.int8, bitcast=True).to(tl.float32)


@triton.jit
def spread(bits):
    """The low four bits of a word into the lowest bits of its four bytes."""
    # the four copies of the nibble, 7 bits apart, do not overlap: the product is an OR of shifts
    return ((bits & 0xF) * 0x00204081) & 0x01010101


@triton.jit
def negate(words, signs):
    """Negate the bytes of `words`, none of them zero, where the low four bits of `signs` say so."""
    ones = spread(signs)
    # two's complement; no byte is zero, so adding one to its inverse carries nothing into the next
    return (words ^ (ones * 0xFF)) + ones


@triton.jit
def with_parity(signs):
    """Seven sign bits to eight: the number of negative weights is even, so the eighth is the parity."""
    folded = signs ^ (signs >> 4)
    folded ^= folded >> 2
    folded ^= folded >> 1
    return signs | ((folded & 1) << 7)
