"""Rotation of keys or values by an orthogonal matrix, which spreads outliers over all channels before rounding.

Rotated keys meet rotated queries, so that scores stay what they are; outputs of rotated values are rotated back. Values
of all tiers and of the call itself are rotated, so that the kernels need not know (QuaRot, arXiv 2404.00456).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from mikv_compile.kernels.formats import LayerFormat


@lru_cache(maxsize=64)
def matrix(dim: int, device: torch.device) -> torch.Tensor:
    """An orthogonal matrix [dim, dim] float32 whose entries are of about one size.

    The Hadamard matrix (Sylvester's) where ``dim`` is a power of two; its Kronecker product with a cosine transform of
    the odd factor elsewhere.
    """
    odd = dim
    while odd % 2 == 0:
        odd //= 2
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while hadamard.shape[0] < dim // odd:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)], 0)
    n = torch.arange(odd, dtype=torch.float64)
    cosines = torch.cos(math.pi / odd * (n[:, None] + 0.5) * n) * math.sqrt(2)
    cosines[:, 0] = 1.0
    return (torch.kron(hadamard, cosines) / math.sqrt(dim)).float().to(device)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate the channels of [..., D], any floating dtype, to float32."""
    return x.float() @ matrix(x.shape[-1], x.device)


def rotate_back(x: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`rotate`."""
    return x.float() @ matrix(x.shape[-1], x.device).T


def as_stored(fmt: LayerFormat, *keys: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Keys (and queries) and values as a layer's tiers hold them: rotated where its format says so."""
    if not fmt.rotated:
        return *keys, v
    turned = tuple(map(rotate, keys)) if "k" in fmt.rotated else keys
    return *turned, rotate(v) if "v" in fmt.rotated else v


def as_given(fmt: LayerFormat, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of :func:`as_stored` for keys and values."""
    return rotate_back(k) if "k" in fmt.rotated else k, rotate_back(v) if "v" in fmt.rotated else v


def output_as_given(fmt: LayerFormat, out: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Attention's output [..., D_v] over values as they are stored, as the model expects it."""
    return rotate_back(out).to(dtype) if "v" in fmt.rotated else out.to(dtype)
