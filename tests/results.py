"""A small registration with everything in it that a report shows, whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from monai.data import MetaTensor
from monai.networks.blocks import Warp
from torch import Tensor

from monai_rl_reg.geometry import identity_grid, sample, transform_points
from monai_rl_reg.metrics import local_ncc, mean_label_dice
from monai_rl_reg.phantoms import make_case
from monai_rl_reg.registration import Registration


def make_result(
    spatial_dims: int = 3, *, size: int = 22, steps: int = 3, amplitude: float = 2.0, labels: bool = True
) -> tuple[Registration, Tensor]:
    """A registration that went well, of a phantom on an oblique anisotropic grid; and the moving label, on its grid.

    The moving image lies on a grid of its own with its axes in another order. It is the fixed image at y + v(y), v a
    smooth field in millimetres, and the displacement is v's exact inverse.
    """
    d = spatial_dims
    keep = [*range(d), 3]
    image, label, affine = make_case(torch.Generator().manual_seed(5), size=size, spatial_dims=d, oblique=True)
    image, label = image[..., ::2], label[..., ::2]  # thick slices
    affine = affine.clone()
    affine[:, d - 1] *= 2
    world_affine = affine[keep][:, keep]
    world = transform_points(world_affine, identity_grid(image.shape[1:]))
    v, u = waves(amplitude, size, d)

    def from_fixed(volume: Tensor, at: Tensor, mode: str = "bilinear") -> Tensor:
        return sample(volume, transform_points(torch.linalg.inv(world_affine), at).float(), mode=mode, outside="zeros")

    shape = [size + 6 + i for i in range(d)]
    moving_affine = torch.eye(4, dtype=torch.float64)
    moving_affine[:d, :d] = torch.eye(d, dtype=torch.float64).roll(1, 0) * torch.tensor([1.0, -0.9, 1.1])[:d]
    moving_affine[:d, 3] = -moving_affine[:d, :d] @ torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    moving_world = transform_points(moving_affine[keep][:, keep], identity_grid(shape))
    moving = 3 * from_fixed(image, moving_world + v(moving_world)) + 7
    unmoved_label = from_fixed(label, moving_world + v(moving_world), "nearest").to(torch.uint8)

    to_moving = torch.linalg.inv(moving_affine[keep][:, keep])
    before, after = (transform_points(to_moving, at).float() for at in (world, world + u(world)))
    linear = torch.linalg.inv(world_affine[:d, :d])
    voxels = torch.tensordot(linear, u(world), dims=1).float()
    working = torch.cat([image / image.max(), sample(moving, before, outside="zeros") / moving.max()])
    history = [voxels * i / steps for i in range(steps + 1)]
    at_start, moved_label = (
        sample(unmoved_label, at, mode="nearest", outside="zeros").to(torch.uint8) for at in (before, after)
    )
    curve = []
    for now in history:
        moved = Warp("bilinear", "border")(working[None, 1:], now[None])
        at = transform_points(to_moving, world + torch.tensordot(world_affine[:d, :d], now.double(), dims=1)).float()
        dice = mean_label_dice(sample(unmoved_label, at, mode="nearest", outside="zeros")[None], label[None])
        curve.append({"ncc": float(local_ncc(moved, working[None, :1])), "dice": float(dice)})
    result = Registration(
        fixed=MetaTensor(image, affine=affine),
        moving=MetaTensor(moving, affine=moving_affine),
        moved=MetaTensor(sample(moving, after, outside="zeros"), affine=affine),
        displacement=MetaTensor(u(world).float(), affine=affine),
        inverse_displacement=MetaTensor(v(world).float(), affine=affine),
        moved_label=MetaTensor(moved_label, affine=affine) if labels else None,
        unmoved_label=MetaTensor(at_start, affine=affine) if labels else None,
        fixed_label=MetaTensor(label, affine=affine) if labels else None,
        uncertainty=MetaTensor(0.1 * u(world).norm(dim=0, keepdim=True).float(), affine=affine),
        working=MetaTensor(working, affine=affine),
        history=history,
        curve=curve,
        quality={
            "fixed": f"/folder/{'a_long_name' * 9}.nii.gz",
            "moving": "moving.nii.gz",
            "similarity": "ncc",
            "ncc_before": curve[0]["ncc"],
            "ncc_after": curve[-1]["ncc"],
            "dice_before": curve[0]["dice"],
            "dice_after": curve[-1]["dice"],
            "folded_percent": 0.0,
            "sdlogj": 0.08,
            "inverse_error_mm": 0.02,
            "steps": steps,
            "seconds": 1.25,
            "warnings": [],
            "versions": {"monai": "1.5.0"},
        },
    )
    return result, unmoved_label


def waves(amplitude: float, size: int, dims: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """A smooth field of world points (d, *shape), in millimetres, and its inverse."""

    def forth(points: Tensor) -> Tensor:
        turned = points.roll(1, 0) * (2 * math.pi / (1.4 * size))
        return amplitude * torch.stack([torch.sin(turned[i] + i + 0.5) for i in range(dims)])

    def back(points: Tensor) -> Tensor:
        field = torch.zeros_like(points)
        for _ in range(60):
            field = -forth(points + field)
        return field

    return forth, back
