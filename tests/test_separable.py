"""Filters by matrix products give what torch, MONAI and numpy give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.networks.layers import gaussian_1d, separable_filtering
from torch import Tensor
from torch.nn import functional as F

from monai_rl_reg.separable import _full_precision, _Product, box_sum, enlarge, gradient, slopes, smooth

SIZES = [(2, 3, 5, 6, 7), (2, 2, 5, 6), (1, 1, 2, 3, 4)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("window", [1, 3, 9])
def test_sums_over_windows(size: tuple[int, ...], window: int) -> None:
    x = torch.rand(size, dtype=torch.double)
    pool = F.avg_pool3d if len(size) == 5 else F.avg_pool2d
    wide = F.pad(x, [window // 2] * 2 * (len(size) - 2))
    expected = pool(wide, window, stride=1, divisor_override=1)
    torch.testing.assert_close(box_sum(x, window), expected)
    some = (..., *[slice(None, None, 2)] * (len(size) - 2))
    torch.testing.assert_close(box_sum(x, window, every=2), expected[some])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [2, 3])
def test_enlarged(size: tuple[int, ...], factor: int) -> None:
    x = torch.rand(size)
    mode = "trilinear" if len(size) == 5 else "bilinear"
    torch.testing.assert_close(enlarge(x, factor), F.interpolate(x, scale_factor=factor, mode=mode))


@pytest.mark.parametrize("size", SIZES)
def test_smoothed(size: tuple[int, ...]) -> None:
    x, kernel = torch.rand(size), gaussian_1d(torch.tensor(0.7))
    torch.testing.assert_close(smooth(x, 0.7), separable_filtering(x, [kernel] * (len(size) - 2), "replicate"))


@pytest.mark.parametrize("size", SIZES)
def test_slopes(size: tuple[int, ...]) -> None:
    x = torch.rand(size)
    for dim, slope in enumerate(slopes(x), start=2):
        np.testing.assert_allclose(slope, np.gradient(x.numpy(), axis=dim), atol=1e-6)


def test_what_inference_made_serves_training_and_autocast_does_not_round() -> None:
    with torch.inference_mode():
        enlarge(torch.rand(1, 1, 31, 29), 2)
    x = (1000 * torch.rand(1, 1, 31, 29)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        made = enlarge(x, 2)
        made.sum().backward()
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, F.interpolate(x, scale_factor=2, mode="bilinear"))
    assert x.grad is not None
    assert float(x.grad.sum()) == pytest.approx(4 * x.numel(), rel=1e-5)


@pytest.mark.parametrize("size", [(2, 1, 5, 6, 7), (2, 1, 5, 6), (1, 1, 2, 3, 1)])
def test_the_gradient_is_all_slopes(size: tuple[int, ...]) -> None:
    image = torch.rand(size)
    torch.testing.assert_close(gradient(image), torch.cat(slopes(image), dim=1))


def test_a_product_in_full_precision_has_the_gradients_of_a_product() -> None:
    stacked = torch.randn(2, 4, 5, dtype=torch.double, requires_grad=True)
    left, right = torch.randn(3, 4, dtype=torch.double), torch.randn(5, 3, dtype=torch.double)
    assert torch.equal(_Product.apply(left, stacked), left @ stacked)
    assert torch.autograd.gradcheck(lambda x: _Product.apply(left, x), (stacked,))
    assert torch.autograd.gradcheck(lambda x: _Product.apply(x, right), (stacked,))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        _Product.apply(left, stacked)
    assert [x.shape for x in kept] == [left.shape], "not the volume"


def test_products_are_in_full_precision_where_tf32_is_allowed() -> None:
    backend = torch.backends.cuda.matmul
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with _full_precision():
            assert backend.fp32_precision == "ieee" if hasattr(backend, "fp32_precision") else not backend.allow_tf32
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
