"""A pair on oblique, anisotropic grids whose truth is known, with labels and landmarks."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from monai.transforms.utils import create_rotate

GRIDS = {
    "fixed": ((28, 33, 19), (10, -15, 25), (1.1, 0.9, 1.7), (103, -52, 31)),
    "moving": ((34, 27, 31), (-20, 8, 12), (0.9, 1.3, 1.0), (100, -50, 32)),
}


def oblique(
    shape: tuple[int, ...], angles: tuple[float, ...], spacing: tuple[float, ...], centre: tuple[float, ...], flip: bool
) -> np.ndarray:
    """An affine whose grid has its centre at ``centre``."""
    affine = np.eye(4)
    rotation = np.asarray(create_rotate(3, np.radians(angles).tolist()))[:3, :3]
    if flip:  # first axis towards left, axes swapped: LPS-like and permuted grids come up in practice
        rotation = rotation[:, [1, 0, 2]] * np.array([-1, 1, 1])
    affine[:3, :3] = rotation * np.array(spacing)
    affine[:3, 3] = np.array(centre) - affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def scene(points: np.ndarray, bend: float) -> tuple[np.ndarray, np.ndarray]:
    """Image and label of nested ellipsoids about (100, -50, 30) at world points (..., 3), bent by some millimetres."""
    p = points - np.array([100, -50, 30])
    p = p + bend * np.sin(p[..., [1, 2, 0]] / 5)
    r = np.sqrt((p / np.array([11, 9, 10])) ** 2 @ np.ones(3))
    r = r + 0.1 * np.sin(p @ np.array([0.5, 0.3, 0.2]))
    label = (r < 1).astype(np.int16) + (r < 0.6) + 5 * (r < 0.3).astype(np.int16)
    image = 800 / (1 + np.exp(12 * (r - 1))) - 400 / (1 + np.exp(14 * (r - 0.6))) + 300 / (1 + np.exp(14 * (r - 0.3)))
    return (image + 100).astype(np.float32), label


def grid(role: str) -> tuple[np.ndarray, np.ndarray]:
    """The oblique, anisotropic affine of an image, and the world coordinates of its voxels."""
    shape, angles, spacing, centre = GRIDS[role]
    affine = oblique(shape, angles, spacing, centre, flip=role == "fixed")
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return affine, index @ affine[:3, :3].T + affine[:3, 3]


def write_oblique_pair(folder: Path) -> dict[str, str]:
    """Write images, labels and landmarks, and return the files by what they are."""
    made = {}
    for role, bend in (("fixed", 0.0), ("moving", 1.5)):
        affine, world = grid(role)
        for name, data in zip((role, f"{role}_label"), scene(world, bend), strict=True):
            made[name] = str(folder / f"{name}.nii.gz")
            nib.save(nib.Nifti1Image(data, affine), made[name])
    made["landmarks"] = str(folder / "points.csv")
    Path(made["landmarks"]).write_text("x,y,z,name\n-100,50,30,centre\n-104,52,33,side\n-97,48,27,other\n")
    return made


def read_field(path: Path) -> sitk.DisplacementFieldTransform:
    return sitk.DisplacementFieldTransform(sitk.Cast(sitk.ReadImage(str(path)), sitk.sitkVectorFloat64))


def points_inside(image: sitk.Image, count: int = 60) -> list[tuple[float, ...]]:
    """Physical points in the middle half of an image."""
    random, size = np.random.default_rng(0), np.array(image.GetSize())
    return [
        image.TransformContinuousIndexToPhysicalPoint(list(size * (0.25 + 0.5 * random.random(len(size)))))
        for _ in range(count)
    ]
