"""Convolutions of a single small image: the same values, by the faster way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from monai.networks.blocks import Convolution
from torch import nn

from monai_rl_reg.convolutions import SingleImageMode, quick_convolutions
from monai_rl_reg.networks import PlannerActor

NAIVE = ("slow_conv", "conv_depthwise3d")
KINDS: dict[str, Any] = {"plain": {}, "strided": {"stride": 2}, "dilated": {"dilation": 2}, "no bias": {"bias": False}}


def operations(network: nn.Module, image: torch.Tensor) -> set[str]:
    """Return the names of the operations that torch ran."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        network(image)
    return {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dims", [2, 3])
def test_values_are_those_of_torch(dims: int, kind: str) -> None:
    convolution = (nn.Conv2d if dims == 2 else nn.Conv3d)(3, 5, 3, padding=1, **KINDS[kind])
    image = torch.rand(1, 3, *[9, 8, 7][:dims])
    expected = convolution(image)
    with SingleImageMode():
        torch.testing.assert_close(convolution(image), expected)


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(padding: str) -> None:
    convolution, image = nn.Conv3d(2, 4, 3, padding=padding), torch.rand(1, 2, 6, 5, 7)
    expected = convolution(image)
    with SingleImageMode():
        torch.testing.assert_close(convolution(image), expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_transposed_and_grouped(dims: int) -> None:
    image = torch.rand(1, 4, *[6] * dims)
    up = (nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d)(4, 3, 4, stride=2, padding=1)
    grouped = (nn.Conv2d if dims == 2 else nn.Conv3d)(4, 8, 3, groups=4)
    for network in (up, grouped):
        expected = network(image)
        with SingleImageMode():
            torch.testing.assert_close(network(image), expected)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 4, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2},
        {"kernel_size": 2, "stride": 2, "dilation": 2},
        {"kernel_size": 4, "stride": 1, "padding": 1},
    ],
    ids=str,
)
def test_transposed_in_every_way(dims: int, bias: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    kind = nn.ConvTranspose2d if dims == 2 else nn.ConvTranspose3d
    up, image = kind(4, 6, bias=bias, **options), torch.rand(1, 4, *[5, 6, 1][:dims])
    with torch.no_grad():
        expected = up(image)
        with quick_convolutions(image.device, half=False):
            torch.testing.assert_close(up(image), expected)
            if "output_padding" not in options and "groups" not in options and "dilation" not in options:
                functional = {key: value for key, value in options.items() if key != "kernel_size"}
                made = getattr(nn.functional, f"conv_transpose{dims}d")(image, up.weight, up.bias, **functional)
                torch.testing.assert_close(made, expected)


@pytest.mark.parametrize("dims", [2, 3])
def test_an_image_with_metadata(dims: int) -> None:
    kind = (nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 2]
    networks = kind(4, 3, 4, stride=2, padding=1), kind(4, 3, 2, stride=2), (nn.Conv2d, nn.Conv3d)[dims - 2](4, 3, 1)
    image = torch.rand(1, 4, *[5, 6, 4][:dims])
    with torch.no_grad(), SingleImageMode():
        for network in networks:
            torch.testing.assert_close(torch.as_tensor(network(MetaTensor(image))), network(image), check_stride=False)


def test_gradients_are_those_of_torch() -> None:
    network = nn.Sequential(nn.Conv3d(2, 4, 3), nn.ReLU(), nn.ConvTranspose3d(4, 2, 3), nn.ConvTranspose3d(2, 2, 2, 2))
    image = torch.rand(1, 2, 7, 7, 7)
    network(image).square().sum().backward()
    expected = [parameter.grad.clone() for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad()
    with SingleImageMode():
        network(image).square().sum().backward()
    torch.testing.assert_close([parameter.grad for parameter in network.parameters()], expected)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_no_layer_of_a_small_image_is_computed_the_slow_way() -> None:
    policy = PlannerActor(3, 2, 3, channels=(16, 32, 64), plan_channels=8, action_stride=2).eval()
    image = torch.rand(1, 2, 36, 52, 36)
    with torch.no_grad():
        by_itself = operations(policy, image)
        with quick_convolutions(image.device, half=False):
            quick = operations(policy, image)
    slow = {name for name in by_itself if any(word in name for word in NAIVE)}
    if not slow:
        pytest.skip("this torch leaves small images to oneDNN by itself: the mode can go")
    assert not slow & quick


def test_other_precisions_and_half_are_left_alone() -> None:
    block, image = Convolution(3, 2, 4, conv_only=True), torch.rand(1, 2, 8, 8, 8)
    with SingleImageMode():
        assert block.double()(image.double()).dtype == torch.float64
    block.float()
    with quick_convolutions(image.device, half=True):
        assert block(image).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), quick_convolutions(image.device, half=False):
        assert block(image).dtype == torch.bfloat16
