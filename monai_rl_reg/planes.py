"""How a grid of any orientation is shown: planes cut from it, turned as a radiologist reads them.

A voxel array may run along the patient's axes in any order and direction. Here its axes are permuted and reversed
(never resampled) so that, as nearly as the grid allows, the first runs to the patient's left, the second to the back
and the third to the feet: every plane then lies as radiological convention has it, with the patient's right at the left
of axial and coronal pictures. Two-dimensional images have the one plane.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from nibabel.orientations import io_orientation
from torch import Tensor

from monai_rl_reg.geometry import reduced


@dataclass(frozen=True)
class Plane:
    """One of the planes that are shown.

    Args:
        name: as people call it; empty where there is only one.
        across: shown axis that runs to the right of the picture.
        down: shown axis that runs down.
        through: shown axis that the plane cuts; None in 2D.
        letters: the side of the patient at the picture's left and at its top; none in 2D, where files do not tell.
    """

    name: str
    across: int
    down: int
    through: int | None = None
    letters: tuple[str, str] = ("", "")


PLANES = {
    2: (Plane("", 0, 1),),
    3: (
        Plane("axial", 0, 1, 2, ("R", "A")),
        Plane("coronal", 0, 2, 1, ("R", "S")),
        Plane("sagittal", 1, 2, 0, ("A", "S")),
    ),
}
"""The planes by the number of dimensions."""


class ShownGrid:
    """A grid with its axes turned for showing.

    Args:
        affine: from voxels to RAS millimetres, (4, 4).
        shape: of the grid, d sizes.

    Attributes:
        affine: (d+1, d+1), double precision, of the grid as it is stored.
        shape: sizes of the shown axes.
        spacing: millimetres between voxels along the shown axes.
        planes: the planes of this many dimensions.
    """

    def __init__(self, affine: Tensor, shape: Sequence[int]) -> None:
        d = len(shape)
        self.affine = reduced(affine.detach().cpu().double(), d)
        orientation = io_orientation(self.affine.numpy())
        self.axes = [int((orientation[:, 0] == axis).nonzero()[0][0]) for axis in range(d)]
        self.reversed = [bool(orientation[axis, 1] > 0) for axis in self.axes]
        self.shape = tuple(int(shape[axis]) for axis in self.axes)
        self.spacing = tuple(float(self.affine[:d, axis].norm()) for axis in self.axes)
        self.planes = PLANES[d]

    def turn(self, volume: Tensor) -> Tensor:
        """Return a volume (C, *spatial) of this grid with its axes as they are shown; a view where that is possible."""
        turned = volume.permute(0, *[axis + 1 for axis in self.axes])
        return turned.flip([i + 1 for i, back in enumerate(self.reversed) if back])

    def cut(self, volume: Tensor, plane: Plane, point: Sequence[int]) -> Tensor:
        """Cut a plane out of a volume of this grid.

        Args:
            volume: (C, *spatial), its axes as they are stored.
            plane: which.
            point: voxel that the plane goes through, on the shown axes.

        Returns:
            (C, down, across).
        """
        if plane.through is not None:
            axis = self.axes[plane.through]
            volume = volume.narrow(axis + 1, self._stored(plane.through, point[plane.through]), 1)
        turned = self.turn(volume)
        if plane.through is not None:
            turned = turned.squeeze(plane.through + 1)
        return turned.mT

    def voxels(self, plane: Plane, point: Sequence[int]) -> Tensor:
        """Return the stored voxel coordinates of a plane's points, (d, down, across), double precision."""
        down = torch.arange(self.shape[plane.down], dtype=torch.float64)[:, None]
        across = torch.arange(self.shape[plane.across], dtype=torch.float64)[None]
        size = (down.shape[0], across.shape[1])
        coordinates = torch.empty(len(self.shape), *size, dtype=torch.float64)
        for i, axis in enumerate(self.axes):
            shown = across if i == plane.across else down if i == plane.down else torch.tensor([[float(point[i])]])
            stored = self.shape[i] - 1 - shown if self.reversed[i] else shown
            coordinates[axis] = stored.expand(size)
        return coordinates

    def along_plane(self, vectors: Tensor, plane: Plane) -> Tensor:
        """Return how far vectors (d, ...) in stored voxels reach right and down a plane, (2, ...) in millimetres."""
        parts = []
        for i in (plane.across, plane.down):
            sign = -1.0 if self.reversed[i] else 1.0
            parts.append(sign * self.spacing[i] * vectors[self.axes[i]])
        return torch.stack(parts)

    def size(self, plane: Plane) -> tuple[float, float]:
        """Return a plane's width and height in millimetres."""
        return (
            self.shape[plane.across] * self.spacing[plane.across],
            self.shape[plane.down] * self.spacing[plane.down],
        )

    def fullest(self, mass: Tensor) -> tuple[int, ...]:
        """Return, for every shown axis, the slice with the highest sum of a volume (1, *spatial)."""
        turned = self.turn(mass)[0]
        axes = range(turned.ndim)
        return tuple(int(turned.sum([a for a in axes if a != axis]).argmax()) for axis in axes)

    def shown(self, voxel: Sequence[float]) -> tuple[int, ...]:
        """Return the shown axes' coordinates of a stored voxel, rounded and kept inside the grid."""
        nearest = [round(float(voxel[axis])) for axis in self.axes]
        kept = [min(max(v, 0), n - 1) for v, n in zip(nearest, self.shape, strict=True)]
        return tuple(self._stored(i, v) for i, v in enumerate(kept))

    def _stored(self, shown_axis: int, index: int) -> int:
        return self.shape[shown_axis] - 1 - index if self.reversed[shown_axis] else index
