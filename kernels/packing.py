"""Codes to bytes and back, in plain PyTorch: the reference that the Triton and C++ kernels are held to.

Planes of a byte lie ``D / planes`` channels apart, never next to each other, so that a row unpacks into contiguous
halves or quarters: byte j of a 4-bit row holds channels j and j + D/2; of a 2-bit row j, j + D/4, j + D/2, j + 3D/4.
A 3-bit row is a 2-bit row of the low bits (D/4 bytes) followed by a 1-bit row of the high bits (D/8 bytes).
"""

from __future__ import annotations

import torch


def _pack_planes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    planes = 8 // bits
    parts = codes.reshape(*codes.shape[:-1], planes, codes.shape[-1] // planes)
    packed = parts[..., 0, :].clone()
    for i in range(1, planes):
        packed |= parts[..., i, :] << (bits * i)
    return packed


def _unpack_planes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    mask = (1 << bits) - 1
    return torch.cat([(packed >> (bits * i)) & mask for i in range(8 // bits)], dim=-1)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [..., D] (uint8, below ``2**bits``) into [..., D * bits / 8] bytes."""
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat([_pack_planes(codes & 3, 2), _pack_planes(codes >> 2, 1)], dim=-1)
    return _pack_planes(codes, bits)


def unpack(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Inverse of :func:`pack`: bytes [..., dim * bits / 8] to uint8 codes [..., dim]."""
    if bits == 8:
        return packed
    if bits == 3:
        low, high = packed[..., : dim // 4], packed[..., dim // 4 :]
        return _unpack_planes(low, 2) | (_unpack_planes(high, 1) << 2)
    return _unpack_planes(packed, bits)
