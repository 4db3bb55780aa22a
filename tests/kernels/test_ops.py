"""The declared ops: schemas, fake implementations and mutation, by torch's own checks."""

import pytest
import torch

import mikv_compile.kernels.ops
import mikv_compile.policies  # noqa: F401  (registers the scorers)
from mikv_compile.kernels.formats import LayerFormat, Orders, StoreBuffers, buffer_shapes

B, H_Q, H_KV, D, T = 2, 4, 2, 16, 70
FORMAT = "8:t1c16,8:t1c16|4:t64c1,2:t1c16+scored+watch:r0p1n1"
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H_Q, T, D, generator=generator)
    k, v = (torch.randn(B, H_KV, T, D, generator=generator) for _ in range(2))
    fmt = LayerFormat.parse(FORMAT)
    shapes = buffer_shapes(fmt, B, H_KV, D, D, (96, 128), torch.float32)
    return q, k, v, [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes]


def test_importance(tensors):
    q, k, v, _ = tensors
    for policy in ("h2o", "snapkv", "recent"):
        torch.library.opcheck(torch.ops.mikv.importance_v1, (q, k, v, None, 0.25, True, policy), test_utils=CHECKS)


def test_compress_attend_update(tensors):
    q, k, v, buffers = tensors
    scores = torch.rand(B, H_KV, T)
    fill = Orders(0, 2, 60, (6, 64), 0, (0,)).encode()
    torch.library.opcheck(torch.ops.mikv.compress_v1, (q, k, v, scores, buffers, fill, FORMAT), test_utils=CHECKS)
    torch.ops.mikv.compress_v1(q, k, v, scores, buffers, fill, FORMAT)
    step = Orders(T, 2, T, (6, 64), 1, (0,)).encode()
    one = (q[:, :, :1], k[:, :, :1], v[:, :, :1])
    mask = torch.ones(B, 1, 1, T + 1, dtype=torch.bool)
    torch.library.opcheck(torch.ops.mikv.attend_v1, (*one, mask, 0.25, buffers, step, FORMAT), test_utils=CHECKS)
    _, lse = torch.ops.mikv.attend_v1(*one, mask, 0.25, buffers, step, FORMAT)
    torch.library.opcheck(torch.ops.mikv.update_v1, (*one, lse, mask, 0.25, buffers, step, FORMAT), test_utils=CHECKS)


def test_a_mask_that_broadcasts_over_columns(tensors):
    q, k, v, buffers = tensors
    torch.ops.mikv.compress_v1(
        q, k, v, torch.rand(B, H_KV, T), buffers, Orders(0, 2, 60, (6, 64), 0, (0,)).encode(), FORMAT
    )
    orders = Orders(T, 2, T, (6, 64), 0, (0,)).encode()
    one = (q[:, :, :1], k[:, :, :1], v[:, :, :1])
    narrow = torch.ones(1, 1, dtype=torch.bool)
    with_mask, _ = torch.ops.mikv.attend_v1(*one, narrow, 0.25, buffers, orders, FORMAT)
    without, _ = torch.ops.mikv.attend_v1(*one, None, 0.25, buffers, orders, FORMAT)
    torch.testing.assert_close(with_mask, without)


def test_formats_read_back_what_they_print():
    for text in (FORMAT, "fp,fp", "bf16,fp16+scored", "3:t1c8b,2:t1c8|2:t64c1,2:t1c16+scored+watch:r32p7n2"):
        assert str(LayerFormat.parse(text)) == text
    assert StoreBuffers.from_list([torch.empty(0)] * 16).to_list().__len__() == 16
