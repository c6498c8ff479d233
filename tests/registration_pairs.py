"""Pairs, labels and actions that the tests of the registration task share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.metrics import compute_dice
from monai.networks.utils import one_hot
from torch import Tensor
from torch.nn import functional as F

from monai_rl_reg.geometry import identity_grid

SIZES = [(16, 14), (12, 10, 11)]
ODD_SIZES = [(15, 13), (16, 14), (13, 10, 11)]


def no_policy(observation: Tensor) -> Tensor:
    raise AssertionError("the registration loss looks at one step only")


def constant_action(shift: float, size: Sequence[int], *, batch: int = 1) -> Tensor:
    """A shift along the first axis."""
    action = torch.zeros(batch, len(size), *size)
    action[:, 0] = shift
    return action


def smooth_action(size: Sequence[int], *, batch: int = 1, amplitude: float = 1.0) -> Tensor:
    mode = "trilinear" if len(size) == 3 else "bilinear"
    coarse = amplitude * torch.randn(batch, len(size), *[4] * len(size))
    return F.interpolate(coarse, size=tuple(size), mode=mode, align_corners=True)


def blob(centre: Sequence[float], size: Sequence[int]) -> Tensor:
    offset = identity_grid(size) - torch.tensor(centre, dtype=torch.float64).reshape(-1, *[1] * len(size))
    return torch.exp(-offset.square().sum(0) / 4).float()[None, None]


def blocks(size: Sequence[int], shift: int = 0) -> Tensor:
    """Three labels of unequal size, shifted along the first axis."""
    label = torch.zeros(1, 1, *size)
    label[:, :, 2 + shift : 5 + shift, 2:6] = 1
    label[:, :, 6 + shift : 8 + shift, 1:8] = 2
    label[:, :, 5 + shift : 9 + shift, 8:] = 3
    return label


def random_pair(size: Sequence[int], *, batch: int = 2) -> Tensor:
    return torch.rand(batch, 2, *size)


def random_labels(size: Sequence[int], *, batch: int = 2) -> Tensor:
    return torch.randint(0, 4, (batch, 2, *size))


def monai_dice(moved: Tensor, fixed: Tensor) -> Tensor:
    return compute_dice(one_hot(moved, 4), one_hot(fixed, 4), include_background=False).nanmean(1)


def half(size: Sequence[int]) -> list[int]:
    return [(n + 1) // 2 for n in size]
