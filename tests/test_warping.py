"""The package's Warp gives what MONAI's gives."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks import Warp as MonaiWarp
from torch.nn import functional as F

from monai_rl_reg.warping import Warp, enlarge


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["border", "zeros", "reflection"])
@pytest.mark.parametrize("size", [(2, 3, 9, 14), (1, 1, 7, 12, 5), (3, 2, 8, 8, 8), (1, 1, 6, 5, 1)])
def test_the_same_image_as_monais(mode: str, padding: str, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    image, field = torch.rand(size), 3 * torch.randn(size[0], len(size) - 2, *size[2:])
    torch.testing.assert_close(Warp(mode, padding)(image, field), MonaiWarp(mode, padding)(image, field))


def test_the_same_gradients_as_monais() -> None:
    torch.manual_seed(0)
    image = torch.rand(2, 2, 9, 8, 7, dtype=torch.double, requires_grad=True)
    field = torch.randn(2, 3, 9, 8, 7, dtype=torch.double, requires_grad=True)
    weights = torch.rand(2, 2, 9, 8, 7)
    grads = [
        torch.autograd.grad((weights * kind("bilinear", "border")(image, field)).sum(), (image, field))
        for kind in (Warp, MonaiWarp)
    ]
    for ours, monais in zip(*grads, strict=True):
        torch.testing.assert_close(ours, monais)


def test_a_field_of_another_size_is_refused_in_monais_words() -> None:
    with pytest.raises(ValueError, match="the input DDF shape must be"):
        Warp("bilinear", "border")(torch.rand(1, 1, 8, 8), torch.zeros(1, 2, 8, 9))


@pytest.mark.parametrize(("size", "mode"), [((2, 3, 5, 6, 7), "trilinear"), ((2, 2, 5, 6), "bilinear")])
@pytest.mark.parametrize("factor", [2, 3])
def test_enlarged_as_torch_does(size: tuple[int, ...], mode: str, factor: int) -> None:
    x = torch.rand(size)
    expected = F.interpolate(x, scale_factor=factor, mode=mode, align_corners=False)
    torch.testing.assert_close(enlarge(x, factor), expected)
