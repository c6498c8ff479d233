"""Displacement fields and coordinates; the only place that knows RAS from LPS.

One direction everywhere: ``moved(x) = moving(x + u(x))``. Inside the package ``u`` is in voxels of the grid it lives
on, channels in array order (MONAI's :class:`~monai.networks.blocks.Warp`). World coordinates are millimetres in RAS, as
in NIfTI and MONAI; LPS, as in ITK, exists only in files and is converted here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from monai_rl_reg.separable import slopes
from monai_rl_reg.warping import Warp, by_planes, sample_planes, tall_rows


def compose(displacement: Tensor, step: Tensor, warp: Warp) -> Tensor:
    """Return the field that applies ``step`` after ``displacement``: D <- warp(D, a) + a.

    Args:
        displacement: D, (B, d, *spatial) in voxels.
        step: a, (B, d, *spatial) in voxels.
        warp: a linear :class:`Warp` with border padding: beyond the edge the field goes on as it is there.
    """
    composed: Tensor = warp(displacement, step) + step
    return composed


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """Return the determinant of the Jacobian of x -> x + u(x), (B, *spatial), of u (B, d, *spatial) in voxels.

    Central differences, one-sided at the edges (as ``numpy.gradient``). A value of zero or less is a fold.
    """
    dims = displacement.shape[1]
    columns = [slope.unbind(1) for slope in slopes(displacement.float())]
    rows = [list(row) for row in zip(*columns, strict=True)]
    for i in range(dims):
        rows[i][i] = rows[i][i] + 1
    if dims == 2:
        return rows[0][0] * rows[1][1] - rows[0][1] * rows[1][0]
    (a, b, c), (d, e, f), (g, h, i) = rows
    return a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)


def identity_grid(shape: Sequence[int]) -> Tensor:
    """Return the voxel coordinates of a grid, (d, *shape), double precision."""
    axes = [torch.arange(n, dtype=torch.float64) for n in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def grid_points(affine: Tensor, shape: Sequence[int]) -> Tensor:
    """Return where an affine (d+1, d+1) carries the voxel coordinates of a grid, (d, *shape), double precision.

    Every direction adds its own share: no product of matrices, and no coordinates to begin with.
    """
    d, affine = len(shape), affine.double()
    points = affine[:d, d].reshape(d, *[1] * d)
    for axis, n in enumerate(shape):
        share = affine[:d, axis, None] * torch.arange(n, dtype=torch.float64)
        points = points + share.reshape(d, *[n if i == axis else 1 for i in range(d)])
    return points


def transform_points(affine: Tensor, points: Tensor) -> Tensor:
    """Apply a (d+1, d+1) affine to points (d, ...)."""
    d = points.shape[0]
    return torch.addmm(affine[:d, d:], affine[:d, :d], points.flatten(1)).reshape(points.shape)


def sample(image: Tensor, index: Tensor, *, mode: str = "bilinear", outside: str = "border") -> Tensor:
    """Sample an image at voxel coordinates.

    Args:
        image: (C, *spatial).
        index: (d, *shape), coordinates in the image's voxels.
        mode: ``bilinear`` (linear in 2D and 3D alike) or ``nearest``.
        outside: ``border`` repeats the edge; ``zeros`` gives 0 to every point more than half a voxel outside, which
            is ITK's rule, and interpolates the edge voxel up to there.

    Returns:
        (C, *shape) in fp32.
    """
    d, shape = index.shape[0], index.shape[1:]
    index = index.reshape(d, -1)
    spread = torch.tensor(image.shape[1:], dtype=index.dtype, device=index.device)[:, None]
    grid = (2 * index / (spread - 1).clamp(min=1) - 1).flip(0).T.reshape(-1, *[1] * (d - 1), d)
    out = F.grid_sample(image[None].to(index.dtype), grid[None], mode=mode, padding_mode="border", align_corners=True)[
        0
    ].float()
    if outside == "zeros":
        out = out * ((index >= -0.5) & (index <= spread - 0.5)).all(0).reshape(out.shape[1:])
    return out.reshape(-1, *shape)


def sample_field(field: Tensor, index: Tensor) -> Tensor:
    """Sample a smooth field (C, *spatial) as :func:`sample` does, off by thousandths of a voxel, in half the time."""
    if field.ndim != 4 or not field.dtype == index.dtype == torch.float32 or not by_planes(field[None]):
        return sample(field, index)
    z, y, x = index[:, None]
    y, x = (2 / max(n - 1, 1) * w - 1 for n, w in ((tall_rows(field[None]), y), (field.shape[3], x)))
    return sample_planes(field[None], z, y, x)[0]


def reduced(affine: Tensor, d: int) -> Tensor:
    """Return the (d+1, d+1) part of a (4, 4) affine: files of 2D images carry a 3D one."""
    keep = [*range(d), 3]
    return affine[keep][:, keep]


def voxels_to_millimetres(displacement: Tensor, affine: Tensor) -> Tensor:
    """Turn a field (d, *spatial) in voxels of the grid with this affine into RAS millimetres: u_mm = A[:d, :d] u."""
    d = displacement.shape[0]
    return torch.tensordot(affine[:d, :d].to(displacement), displacement, dims=1)


def ras_to_lps(vectors: Tensor) -> Tensor:
    """Swap between RAS and LPS vectors (d, ...), either way: the first two components change sign."""
    sign = torch.ones(vectors.shape[0], dtype=vectors.dtype, device=vectors.device)
    sign[:2] = -1
    return vectors * sign.reshape(-1, *[1] * (vectors.ndim - 1))


def world_box(affine: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest world coordinate, (d,) each, that a grid's voxel centres reach.

    Args:
        affine: (d+1, d+1).
        shape: of the grid, d sizes.
    """
    corners = torch.cartesian_prod(*[torch.tensor([0.0, n - 1.0], dtype=torch.float64) for n in shape]).T
    world = transform_points(affine.double(), corners.reshape(len(shape), -1))
    return world.amin(1), world.amax(1)


def slabs(affine: Tensor, shape: Sequence[int], most: int = 1_000_000) -> Iterator[tuple[slice, Tensor]]:
    """Yield :func:`grid_points` in slabs of at most ``most`` voxels (at least one layer), to bound the memory of work.

    Args:
        affine: (d+1, d+1).
        shape: of the grid, d sizes.
        most: voxels.

    Yields:
        the slab along the first axis, and its points (d, *slab), double precision.
    """
    layer = 1
    for n in shape[1:]:
        layer *= n
    thick = max(1, most // layer)
    for start in range(0, shape[0], thick):
        stop = min(start + thick, shape[0])
        there = affine.double().clone()
        there[:-1, -1] += start * there[:-1, 0]
        yield slice(start, stop), grid_points(there, (stop - start, *shape[1:]))


@dataclass(frozen=True)
class DenseTransform:
    """A world transform T(x) = x + g(x) that is known on a grid; beyond its edge g goes on as it is there.

    Attributes:
        displacement: g, (d, *spatial) in RAS millimetres.
        affine: (4, 4), of the grid.
    """

    displacement: Tensor
    affine: Tensor

    def shift(self, points: Tensor) -> Tensor:
        """Return g at world points (d, ...), in their precision."""
        to_grid = torch.linalg.inv(reduced(self.affine.double(), points.shape[0]))
        index = transform_points(to_grid, points.double()).float()
        return sample_field(self.displacement, index).to(points.dtype)


WorldTransform = Tensor | DenseTransform
"""From fixed to moving space, RAS millimetres: an affine (4, 4), or a :class:`DenseTransform`."""


def carry(transform: WorldTransform, points: Tensor) -> Tensor:
    """Return the transform of world points (d, ...)."""
    if isinstance(transform, DenseTransform):
        return points + transform.shift(points)
    return transform_points(reduced(transform.to(points.dtype), points.shape[0]), points)


def shift(transform: WorldTransform, points: Tensor) -> Tensor:
    """Return how far the transform carries world points (d, ...)."""
    if isinstance(transform, DenseTransform):
        return transform.shift(points)
    affine = reduced(transform.to(points.dtype), points.shape[0])
    return transform_points(affine - torch.eye(len(affine), dtype=affine.dtype), points)


def landing(affine: Tensor, shape: Sequence[int], transform: WorldTransform, to_other: Tensor) -> Tensor:
    """Return where a transform carries the voxels of a grid, in voxels of another one, (d, *shape), double precision.

    Args:
        affine: (d+1, d+1), of the grid.
        shape: of the grid, d sizes.
        transform: from the one image's space to the other's.
        to_other: (d+1, d+1), from world coordinates to voxels of the other grid.
    """
    if isinstance(transform, DenseTransform):
        return transform_points(to_other, carry(transform, grid_points(affine, shape)))
    return grid_points(to_other @ reduced(transform.double(), len(shape)) @ affine, shape)


def carry_back(transform: WorldTransform, points: Tensor) -> Tensor:
    """Return the points (d, ...) that the transform carries to these; a dense one by :func:`invert`."""
    if isinstance(transform, DenseTransform):
        return invert(transform, points)
    return carry(torch.linalg.inv(transform.double()), points)


def invert(transform: DenseTransform, points: Tensor, *, iterations: int = 60, tolerance: float = 1e-3) -> Tensor:
    """Return the x with x + g(x) = z for world points z (d, ...), by the fixed-point iteration x <- z - g(x).

    Points that are not there after a third of the iterations, as where g stretches more than twofold, go on with half,
    and then with a quarter of that step. Where none converges, as at folds, the best x met is returned.

    Args:
        transform: gives g.
        points: z.
        iterations: at most; only points that are not there yet take part.
        tolerance: the error |x + g(x) - z| in millimetres to stop at.
    """
    to_grid = torch.linalg.inv(reduced(transform.affine.double(), points.shape[0]))
    z = transform_points(to_grid, points.flatten(1).double()).float()
    to_voxels = to_grid[:-1, :-1].float()
    # only the way from z to x, in millimetres: single precision knows it well
    way = -sample_field(transform.displacement, z)
    found = torch.empty_like(way)
    here, held, best = torch.arange(z.shape[1], device=z.device), way, torch.full_like(z[0], torch.inf)
    for i in range(iterations):
        off = way + sample_field(transform.displacement, torch.addmm(z, to_voxels, way))
        error = off.square().sum(0)
        better = error < best
        best, held = torch.where(better, error, best), torch.where(better, way, held)
        open_ = (error > tolerance**2).nonzero().flatten()
        if len(open_) == 0:
            break
        way = torch.sub(way, off, alpha=0.5 ** (3 * i // iterations))
        if len(open_) < 0.8 * len(error):  # else it costs more to leave the others out
            found.index_copy_(1, here, held)  # those that go on are written again
            here, best = here[open_], best[open_]
            z, way, held = (x.index_select(1, open_) for x in (z, way, held))
    found[:, here] = held
    return points + found.to(points.dtype).reshape(points.shape)
