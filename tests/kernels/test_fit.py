"""Rounding by the error it leaves: what each way promises, and the C++ kernel against the reference."""

import itertools
import math

import pytest
import torch

from mikv_compile.kernels import cpp_fit, fit, rotation
from mikv_compile.kernels.dispatch import NotCovered
from mikv_compile.kernels.formats import SideBuffers, SideFormat
from mikv_compile.kernels.quantize import dequantize, quantize


def tokens(t=128, d=80, heads=3, batch=2, seed=0):
    """Keys as they are: channels of different spread and centre."""
    torch.manual_seed(seed)
    return torch.randn(batch, heads, t, d) * (torch.rand(d) * 3 + 0.1) + 3 * torch.randn(d)


def read(x, fmt, guide=None):
    return dequantize(SideBuffers(*quantize(x, fmt, guide)), fmt, x.shape[3])


def error(x, fmt, guide=None):
    return (read(x, fmt, guide) - x).square().mean().item()


FORMATS = [
    SideFormat(2, 64, 1, fit="clip"),
    SideFormat(3, 32, 1, fit="unbiased"),
    SideFormat(2, 1, 40, fit="unbiased"),
    SideFormat(4, 1, 80, fit="clip"),
    SideFormat(2, 1, 16, fit="clip"),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_the_kernel_chooses_as_the_reference_does(fmt):
    x = tokens()
    x[0, 1, 7, 3] = 40.0  # an outlier
    x[1, 2, :64] = 5.0  # constant groups
    for got, want in zip(cpp_fit.fit_groups(x, fmt), fit.fit_groups(x, fmt), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_stays_in_its_group(bad):
    fmt, x = SideFormat(2, 64, 1, fit="clip"), tokens(t=128)
    clean = read(x, fmt)
    x[0, 0, 3, 5] = bad
    for fitted in (fit.fit_groups, cpp_fit.fit_groups):
        codes, scales, zeros = fitted(x, fmt)
        assert int(codes.max()) <= 3
        assert not (codes[0, 0, :64, 5].any() and not scales[0, 0, 0, 5] > 0)
    got = read(x, fmt)
    rest = torch.ones_like(x, dtype=torch.bool)
    rest[0, 0, :64, 5] = False
    assert torch.equal(got[rest], clean[rest])


def test_fitting_leaves_less_error_than_the_range():
    x = tokens(t=640)
    for bits, gain in ((2, 0.75), (3, 0.9)):
        assert error(x, SideFormat(bits, 64, 1, fit="clip")) < gain * error(x, SideFormat(bits, 64, 1))


def test_unbiased_numbers_keep_the_spread_that_least_squares_takes():
    x = rotation.rotate(tokens(t=512, d=64))
    kept = {}
    for how in ("clip", "unbiased"):
        got = read(x, SideFormat(2, 1, 64, fit=how))
        centred = x - x.mean(-1, keepdim=True)
        kept[how] = ((got - got.mean(-1, keepdim=True)) * centred).sum() / centred.square().sum()
    assert abs(kept["unbiased"] - 1) < 0.005
    assert kept["clip"] < 0.95


def test_robust_zero_points_do_better_with_outliers():
    x = tokens(t=640, d=64)
    x[..., ::64, :] *= 3
    fmt = SideFormat(4, 64, 1)
    robust = SideFormat(4, 64, 1, fit="hqq")
    lost = [(read(x, f) - x).abs().pow(0.7).mean().item() for f in (fmt, robust)]
    assert lost[1] < lost[0]


def test_the_best_zero_of_all_steps_is_kept(monkeypatch):
    """Later steps do worse in some groups and better in others."""
    torch.manual_seed(0)
    x = torch.randn(2000, 8) * torch.tensor([4.0] + 7 * [1.0])
    lost = []
    for steps in range(1, fit.HQQ_STEPS + 1):
        monkeypatch.setattr(fit, "HQQ_STEPS", steps)
        codes, scale, zero = fit.fit(x, 2, "hqq")
        read = codes * scale.float()[:, None] + zero.float()[:, None]
        lost.append((x - read).abs().pow(fit.HQQ_POWER).mean(dim=1))
    for fewer, more in itertools.pairwise(lost):
        assert (more <= 1.02 * fewer).all()  # zeros are rounded to 16 bits
    assert (lost[-1] < 0.95 * lost[0]).sum() > 20


def test_levels_of_the_normal_distribution():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 256, 64)
    assert error(x, SideFormat(2, 1, 64, fit="lloyd")) < 0.16  # 0.1175 / (1 - 0.1175), as spread is kept
    assert error(x, SideFormat(2, 1, 64)) > 0.17


# Guided rounding


def guided(t=256, d=64, group=2, seed=1):
    torch.manual_seed(seed)
    k = tokens(t=t, d=d, heads=2)
    q = torch.randn(2, 2 * group, 100, d) @ torch.randn(d, d)  # queries look in some directions more than in others
    return q, k, fit.key_guide(q, k)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("d", [64, 80])
def test_queries_notice_less_of_guided_rounding(bits, d):
    q, k, guide = guided(d=d)
    fmt = SideFormat(bits, 64, 1, fit="gptq")
    assert guide is not None

    def noticed(guide):
        off = read(k, fmt, guide) - k
        return torch.einsum("bhrd,bhtd->bhrt", q.reshape(2, 2, -1, d), off).square().mean()

    assert noticed(guide) < 0.6 * noticed(None)
    assert error(k, fmt, guide) < 10 * error(k, fmt)  # what queries do not notice is bounded, too


def test_the_kernel_rounds_under_guidance_as_the_reference_does():
    _, k, guide = guided(t=128)
    fmt = SideFormat(3, 64, 1, fit="gptq")
    for got, want in zip(cpp_fit.fit_guided(k, fmt, guide), fit.fit_guided(k, fmt, guide), strict=True):
        assert torch.equal(got, want)


def test_no_guide_from_nothing():
    q, k, _ = guided()
    assert fit.key_guide(q[:, :, :0], k) is None
    assert fit.key_guide(q, k[:, :, :0]) is None


@pytest.mark.parametrize("bad", [math.nan, 0.0])
def test_a_head_without_a_guide_leaves_the_others_theirs(bad):
    q, k, guide = guided()
    q[0, :2] = bad  # the query heads of one KV head
    found = fit.key_guide(q, k)
    assert torch.equal(found.factor[0, 0], torch.eye(64))
    for got, want in zip(found, guide, strict=True):
        assert torch.equal(got[1], want[1]) and torch.equal(got[0, 1], want[0, 1])
    fmt = SideFormat(3, 64, 1, fit="gptq")
    assert torch.equal(read(k, fmt, found)[0, 0], read(k, fmt)[0, 0])


def test_the_kernel_leaves_to_the_reference_what_it_does_not_know():
    x = tokens(t=64)
    for fmt in (SideFormat(2, 64, 1, fit="hqq"), SideFormat(2, 64, 40, fit="clip")):
        with pytest.raises(NotCovered):
            cpp_fit.fit_groups(x, fmt)


# Rotation


@pytest.mark.parametrize("dim", [16, 63, 64, 80, 96, 128, 256])
def test_rotation_is_orthogonal_and_spreads_outliers(dim):
    matrix = rotation.matrix(dim, torch.device("cpu"))
    assert torch.allclose(matrix @ matrix.T, torch.eye(dim), atol=1e-5)
    assert matrix.abs().max() <= 1.5 / math.sqrt(dim)
    x = torch.zeros(1, dim)
    x[0, 3] = 1
    assert rotation.rotate(x).abs().max() < 0.4
    assert torch.allclose(rotation.rotate_back(rotation.rotate(x)), x, atol=1e-6)
