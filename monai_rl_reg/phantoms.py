"""A synthetic cohort of labelled images, so that everything runs without a download."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from monai.transforms.utils import create_rotate
from torch import Tensor

from monai_rl_reg.files import made_once
from monai_rl_reg.geometry import grid_points
from monai_rl_reg.nifti import write_image

INTENSITIES = (0.02, 0.45, 0.8, 0.15, 0.6)
"""Mean intensity of background, cortex, core, ventricles and nuclei: the labels 0 to 4."""


def make_cohort(folder: str | Path, *, count: int = 24, size: int = 40, spatial_dims: int = 3, seed: int = 0) -> Path:
    """Make a cohort in the Decathlon's layout (``imagesTr``, ``labelsTr``), unless it is already there.

    Every case is the same nested anatomy under a smooth random deformation, with a bias field and noise; sizes differ
    and are odd in part, and every third case has a rotated (oblique) affine and its own voxel size.

    Args:
        folder: where; made as a whole or not at all.
        count: number of cases.
        size: about the number of voxels a side.
        spatial_dims: 2 or 3.
        seed: of everything random in it.

    Returns:
        the folder of this cohort.
    """
    folder = Path(os.path.normpath(folder)) / f"cohort_{spatial_dims}d_{count}x{size}_seed{seed}"
    if folder.is_dir():
        return folder
    print(f"No data given: making a synthetic cohort of {count} cases in {folder}")
    random = torch.Generator().manual_seed(seed)

    def make(inside: Path) -> None:
        for i in range(count):
            image, label, affine = make_case(random, size=size, spatial_dims=spatial_dims, oblique=i % 3 == 2)
            write_image(inside / "imagesTr" / f"phantom_{i:03d}.nii.gz", image, affine)
            write_image(inside / "labelsTr" / f"phantom_{i:03d}.nii.gz", label, affine)

    return made_once(folder, make)


def make_case(
    random: torch.Generator, *, size: int = 40, spatial_dims: int = 3, oblique: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return image (1, *spatial), label (1, *spatial) uint8 and RAS affine (4, 4) of one random case."""
    d = spatial_dims
    shape = [size + int(torch.randint(-3, 4, (1,), generator=random)) + (4 if i == 1 else 0) for i in range(d)]
    affine = torch.eye(4, dtype=torch.float64)
    if oblique:
        angles = (torch.rand(3 if d == 3 else 1, generator=random) - 0.5) * math.radians(24)
        rotation = torch.as_tensor(create_rotate(d, angles.tolist()), dtype=torch.float64)[:d, :d]
        spacing = 0.9 + 0.2 * torch.rand(d, generator=random, dtype=torch.float64)
        affine[:d, :d] = rotation * spacing
    centre = torch.tensor([(n - 1) / 2 for n in shape], dtype=torch.float64)
    affine[:d, 3] = -affine[:d, :d] @ centre
    keep = [*range(d), 3]
    world = grid_points(affine[keep][:, keep], shape)

    point = world / (0.5 * size)  # the anatomy fills [-1, 1]
    point = point + torch.stack([_waves(random, d, count=6, frequency=3.0, amplitude=0.07)(point) for _ in range(d)])
    label = _anatomy(point)
    texture = _waves(torch.Generator().manual_seed(0), d, count=12, frequency=14.0, amplitude=0.06)
    image = torch.tensor(INTENSITIES, dtype=torch.float64)[label] + (label > 0) * texture(point)
    image = image * (1 + _waves(random, d, count=3, frequency=1.5, amplitude=0.15)(world / (0.5 * size)))
    image = image + 0.02 * torch.randn(image.shape, generator=random, dtype=torch.float64)
    return (1000 * image[None]).float(), label[None].to(torch.uint8), affine


def _anatomy(point: Tensor) -> Tensor:
    """Label of points (d, *spatial) of the undeformed anatomy: nested ellipsoids, 0 outside."""

    def inside(centre: tuple[float, ...], radii: tuple[float, ...]) -> Tensor:
        d = point.shape[0]
        shape = (-1, *[1] * d)
        c, r = torch.tensor(centre[:d]).reshape(shape), torch.tensor(radii[:d]).reshape(shape)
        return ((point - c) / r).square().sum(0) < 1

    label = torch.zeros(point.shape[1:], dtype=torch.long)
    label[inside((0, 0, 0), (0.78, 0.9, 0.75))] = 1
    label[inside((0, 0, 0), (0.58, 0.7, 0.55))] = 2
    for side in (-1, 1):
        label[inside((0.24 * side, -0.12, 0.08), (0.17, 0.36, 0.24))] = 3
        label[inside((0.27 * side, 0.42, -0.05), (0.2, 0.17, 0.24))] = 4
    return label


def _waves(
    random: torch.Generator, d: int, *, count: int, frequency: float, amplitude: float
) -> Callable[[Tensor], Tensor]:
    """A smooth random function of points (d, *spatial): a sum of ``count`` sine waves."""
    direction = torch.randn(count, d, generator=random, dtype=torch.float64)
    direction = frequency * direction / direction.norm(dim=1, keepdim=True)
    direction = direction * (0.4 + 0.6 * torch.rand(count, 1, generator=random, dtype=torch.float64))
    phase = 2 * math.pi * torch.rand(count, generator=random, dtype=torch.float64)
    weight = amplitude * math.sqrt(2 / count)

    def evaluate(point: Tensor) -> Tensor:
        angle = torch.tensordot(direction, point, dims=1) + phase.reshape(-1, *[1] * d)
        return weight * angle.sin().sum(0)

    return evaluate
