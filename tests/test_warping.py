"""The package's Warp gives what MONAI's gives."""

from __future__ import annotations

import pytest
import torch
from monai.networks.blocks import Warp as MonaiWarp
from torch.nn import functional as F

from monai_rl_reg.warping import MOST_ROWS, Warp


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
@pytest.mark.parametrize("padding", ["border", "zeros", "reflection"])
@pytest.mark.parametrize(
    "size",
    [
        (2, 3, 9, 14),
        (1, 1, 7, 12, 5),
        (3, 2, 8, 8, 8),
        (1, 1, 6, 5, 1),
        (1, 2, 1, 5, 6),
        (2, 1, 5, 1, 6),
        (1, 1, 1, 1, 4),
    ],
)
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


def test_volumes_by_planes_are_torchs_own_to_some_thousandths_of_a_voxel() -> None:
    torch.manual_seed(0)
    size = (64, 250, 12)
    image = torch.linspace(0, size[1] - 1, size[1])[:, None].expand(1, 1, *size).contiguous()  # its row is its value
    field = F.interpolate(6 * torch.randn(1, 3, 4, 8, 3), size=size, mode="trilinear")
    assert size[0] * size[1] <= MOST_ROWS
    moved, monais = (kind("bilinear", "border")(image, field) for kind in (Warp, MonaiWarp))
    assert float((moved - monais).abs().max()) < 4e-3
    assert float((moved - monais).abs().mean()) < 1e-3


def test_nothing_pulls_beyond_the_edge_where_the_image_goes_on_as_it_is() -> None:
    field = torch.zeros(1, 3, 6, 7, 8, requires_grad=True)
    (pull,) = torch.autograd.grad(Warp("bilinear", "border")(torch.rand(1, 1, 6, 7, 8), field).sum(), field)
    for dim in range(3):
        faces = pull[0, dim].movedim(dim, 0)
        assert not faces[[0, -1]].any()
        assert faces[1:-1].all()
