"""Packed codes as operands of dots, without converting a single integer.

A row of codes is read once, as 32-bit words. A code that is masked out of a word and taken for the bits of a float16 is
a subnormal number, ``code * 2**-24``, which tensor cores multiply exactly, and so is a code that stays where it is in
its byte, ``2**shift`` times as large. The two halves of a word are two such numbers: a word of 4-bit codes becomes
eight operands with four ANDs and one shift. The factors join the queries, or the sums once all slots are added up.

All columns that come from one word stay neighbours. Column ``c`` of a tile of P planes holds, with ``half = c % 2``,
``pair = c // 2 % 2``, ``plane = c // 4 % P`` and ``word = c // (4 * P)``, the channel
``plane * width + 4 * word + 2 * half + pair`` (see ``packing.py`` for planes and widths).
"""

# Triton's tuples may differ in length, which mypy does not know of.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def column_channels(
    COLUMNS: tl.constexpr, BITS: tl.constexpr, WIDTH: tl.constexpr, RANGE: tl.constexpr,
    PLANES: tl.constexpr, FIRST: tl.constexpr, FIRST_BYTE: tl.constexpr,
):  # fmt: skip
    """What the columns of ``code_tile`` hold: channels [COLUMNS] int32, whether they exist, and the factor of each.

    Args:
        WIDTH: bytes of a plane. RANGE, FIRST_BYTE: how many of them were loaded, and from which on.
        PLANES, FIRST: of the tile.
    """
    column = tl.arange(0, COLUMNS)
    byte = column // (4 * PLANES) * 4 + column % 2 * 2 + column // 2 % 2
    plane = FIRST + column // 4 % PLANES
    shift = plane * (0 if BITS == 3 else BITS)
    factor = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    return plane * WIDTH + FIRST_BYTE + byte, byte < RANGE, factor


@triton.jit
def load_words(
    codes, slot, slot_ok,
    BITS: tl.constexpr, WIDTH: tl.constexpr, RANGE: tl.constexpr, FIRST_BYTE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Bytes FIRST_BYTE to ``FIRST_BYTE + RANGE`` of all planes of slots [N] of one head: a tuple of [N, WORDS] int32.

    Args:
        codes: *int32, the head's. WIDTH: bytes of a plane. WORDS: a power of two, at least ``RANGE / 4``.

    Returns:
        One tile; of 3-bit rows three: the two halves of the low bits and the high bits.
    """
    word = tl.arange(0, WORDS)
    if WORDS == 4:
        # A thread that loads the whole row would store it to shared memory one number at a time.
        word = tl.max_contiguous(word, 2)
    ok = slot_ok[:, None] & (word < RANGE // 4)[None, :]
    row = FIRST_BYTE // 4 + word[None, :]
    if BITS == 3:
        rows = codes + (slot * (WIDTH * 3 // 4))[:, None] + row
        low = tl.load(rows, mask=ok, other=0)
        words = (low, tl.load(rows + WIDTH // 4, mask=ok, other=0), tl.load(rows + WIDTH // 2, mask=ok, other=0))
    else:
        words = (tl.load(codes + (slot * (WIDTH // 4))[:, None] + row, mask=ok, other=0),)
    return words


@triton.jit
def _halves(pairs, SUBNORMAL: tl.constexpr):
    """Both halves of [N, WORDS] int32 as float16: [N, WORDS, 2]."""
    low, high = pairs.to(tl.int16), (pairs >> 16).to(tl.int16)
    if SUBNORMAL:
        found = tl.join(low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True))
    else:
        found = tl.join(low.to(tl.float16), high.to(tl.float16))
    return found


@triton.jit
def _plane(words, PLANE: tl.constexpr, BITS: tl.constexpr, SUBNORMAL: tl.constexpr):
    """One plane: [N, WORDS, 4] float16."""
    if BITS == 3:
        # The planes are those of the high bits; two of them share a plane of the low bits.
        low, high = words[PLANE % 2] >> (PLANE // 2 * 2), words[2] >> PLANE
        even = (low & 0x00030003) | ((high & 0x00010001) << 2)
        odd = ((low >> 8) & 0x00030003) | (((high >> 8) & 0x00010001) << 2)
    else:
        MASK: tl.constexpr = (((1 << BITS) - 1) << (PLANE * BITS)) * 0x00010001
        even, odd = words[0] & MASK, (words[0] >> 8) & MASK
    pairs = tl.permute(tl.join(_halves(even, SUBNORMAL), _halves(odd, SUBNORMAL)), (0, 1, 3, 2))
    return tl.reshape(pairs, (pairs.shape[0], pairs.shape[1], 4))


@triton.jit
def _planes(words, FIRST: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr, SUBNORMAL: tl.constexpr):
    """Several planes, behind each other within each word: [N, WORDS, 4 * PLANES] float16."""
    if PLANES == 1:
        found = _plane(words, FIRST, BITS, SUBNORMAL)
    else:
        HALF: tl.constexpr = PLANES // 2
        first = _planes(words, FIRST, HALF, BITS, SUBNORMAL)
        both = tl.permute(tl.join(first, _planes(words, FIRST + HALF, HALF, BITS, SUBNORMAL)), (0, 1, 3, 2))
        found = tl.reshape(both, (both.shape[0], both.shape[1], 4 * PLANES))
    return found


@triton.jit
def code_tile(words, FIRST: tl.constexpr, PLANES: tl.constexpr, BITS: tl.constexpr, SUBNORMAL: tl.constexpr):
    """Codes of PLANES planes from plane FIRST on: [N, 4 * PLANES * WORDS] float16.

    Each is its code divided by the column's factor and, if SUBNORMAL, by ``2**24``. Dots must then take subnormal
    numbers, as those of NVIDIA do.
    """
    found = _planes(words, FIRST, PLANES, BITS, SUBNORMAL)
    return tl.reshape(found, (found.shape[0], found.shape[1] * found.shape[2]))
