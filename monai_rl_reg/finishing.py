"""From the policy's field to results on the images' own grids, in slabs, so that large images need little memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from monai.data import MetaTensor
from torch import Tensor

from monai_rl_reg.geometry import (
    DenseTransform,
    WorldTransform,
    carry,
    carry_back,
    invert,
    reduced,
    sample,
    sample_field,
    shift,
    slabs,
    transform_points,
    voxels_to_millimetres,
)

INVERSE_TOLERANCE = 1e-2
"""Error that the inverse field may keep, in voxels of the moving image."""


@dataclass(frozen=True)
class Correspondence:
    """A registration as maps of points, from the fixed image's space to the moving image's and back.

    The way there is T(x + w(x)), with the initial transform T and w the policy's field on the fixed image's own grid.

    Attributes:
        initial: T.
        steps: w, RAS millimetres.
        displacement: T(x + w(x)) - x on the same grid, RAS millimetres.
    """

    initial: WorldTransform
    steps: DenseTransform
    displacement: DenseTransform

    @classmethod
    def on_fixed_grid(
        cls, field: Tensor, grid_affine: Tensor, initial: WorldTransform, fixed: MetaTensor
    ) -> Correspondence:
        """Resample a working field (d, *working), in voxels of its grid, onto the fixed image's own grid.

        Args:
            field: the policy's field.
            grid_affine: (4, 4) affine of the working grid.
            initial: T.
            fixed: (1, *spatial).
        """
        affine, shape = fixed.affine.double(), fixed.shape[1:]
        # components in millimetres first, then resampled: voxel vectors of one grid mean nothing on another
        working = DenseTransform(voxels_to_millimetres(field.cpu().float(), grid_affine), grid_affine)
        w, u = torch.empty(len(shape), *shape), torch.empty(len(shape), *shape)
        for rows, world in slabs(reduced(affine, len(shape)), shape):
            step = working.shift(world)
            w[:, rows], u[:, rows] = step, step + shift(initial, world + step)
        return cls(initial, DenseTransform(w, affine), DenseTransform(u, affine))

    def forth(self, points: Tensor) -> Tensor:
        """Carry world points (d, ...) from fixed to moving space."""
        return points + self.displacement.shift(points)

    def back(self, points: Tensor, *, tolerance: float = 1e-3) -> Tensor:
        """Carry world points (d, ...) from moving to fixed space, by fixed-point iteration to this many mm."""
        return invert(self.steps, carry_back(self.initial, points), tolerance=tolerance)

    def move(self, volume: MetaTensor, *, nearest: bool = False, initial_only: bool = False) -> MetaTensor:
        """Resample a volume of the moving image, (1, *moving), on the fixed image's grid, once.

        Outside the moving image is 0, or its least value where that is below: in CT 0 is water, and air -1000.

        Args:
            volume: image, linear, or label map, nearest neighbour, whose integers it keeps.
            nearest: whether it is a label map.
            initial_only: leave the policy's field out.
        """
        affine, shape = self.displacement.affine, self.displacement.displacement.shape[1:]
        d, mode = len(shape), "nearest" if nearest else "bilinear"
        to_moving = reduced(torch.linalg.inv(volume.affine.double()), d)
        source = volume.as_tensor().float()
        outside = 0.0 if nearest else min(0.0, float(source.min()))
        source = source - outside if outside else source
        moved = torch.empty(1, *shape, dtype=label_dtype(source) if nearest else torch.float32)
        for rows, world in slabs(reduced(affine, d), shape):
            there = carry(self.initial, world) if initial_only else world + self.displacement.displacement[:, rows]
            landing = transform_points(to_moving, there).float()
            moved[:, rows] = (sample(source, landing, mode=mode, outside="zeros") + outside).to(moved.dtype)
        return MetaTensor(moved, affine=affine)

    def inverse(self, moving: MetaTensor) -> tuple[MetaTensor, float, float]:
        """Return the field back, (d, *moving) in RAS millimetres, and the mean and the largest error there.

        The error is the distance in millimetres from where the field back and then the displacement lead to where they
        began, over the voxels that come from inside the fixed image; NaN where none does.
        """
        affine, shape = moving.affine.double(), moving.shape[1:]
        d = len(shape)
        to_fixed = torch.linalg.inv(reduced(self.displacement.affine, d))
        size = torch.tensor(self.displacement.displacement.shape[1:]).reshape(-1, *[1] * d)
        tolerance = INVERSE_TOLERANCE * float(affine[:3, :d].norm(dim=0).min())
        v = torch.empty(d, *shape)
        total, count, largest = 0.0, 0, torch.nan
        for rows, world in slabs(reduced(affine, d), shape):
            came = self.back(world, tolerance=tolerance)
            v[:, rows] = came - world
            voxel = transform_points(to_fixed, came).float()
            inside = ((voxel >= 0) & (voxel <= size - 1)).all(0)
            if inside.any():
                off = came - world + sample_field(self.displacement.displacement, voxel)
                error = off.square().sum(0).sqrt()[inside]  # torch's norm takes several times as long
                total, count = total + float(error.sum()), count + len(error)
                largest = max(float(error.max()), largest) if count > len(error) else float(error.max())
        return MetaTensor(v, affine=affine), total / count if count else float("nan"), float(largest)

    def spread(self, deviation: Tensor, grid_affine: Tensor) -> MetaTensor:
        """Resample a scalar of the working grid, (1, *working), on the fixed image's grid; the edge goes on."""
        affine, shape = self.displacement.affine, self.displacement.displacement.shape[1:]
        out = torch.empty(1, *shape)
        to_working = torch.linalg.inv(reduced(grid_affine.double(), len(shape))) @ reduced(affine, len(shape))
        for rows, index in slabs(to_working, shape):
            out[:, rows] = sample(deviation, index.float())
        return MetaTensor(out, affine=affine)


def label_dtype(label: Tensor) -> torch.dtype:
    """Return the smallest usual integer type that holds a label map's values."""
    top = int(label.max())
    return torch.uint8 if top < 256 else torch.int16 if top < 2**15 else torch.int32
